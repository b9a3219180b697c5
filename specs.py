"""What is observed and what is done: sizes that environments, replay and networks agree on.

Made from Gymnasium spaces once and used everywhere. Worker processes import this file, so PyTorch is imported only
where tensors are at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    import torch

AnySpace = TypeVar("AnySpace", bound=spaces.Space)
FLAGS = ("is_first", "is_last", "is_terminal")  # bool, beside `reward`, in every observation


class Observed(NamedTuple):
    """One observation key as networks see it.

    kind: a name in `modalities.MODALITIES`.
    shape: of one observation, such as (H, W, C) of an image or (n,) of a vector.
    classes: [k...] of integers, the i-th below classes[i], such as the tokens of a text; empty for anything else.
    """

    kind: str
    shape: tuple[int, ...]
    classes: tuple[int, ...] = ()


class ObsSpec(dict[str, Observed]):
    """{key: Observed} of all that the model sees, in the order of the environment's keys."""

    def of(self, kind: str) -> dict[str, Observed]:
        """Return the keys of one kind."""
        return {key: observed for key, observed in self.items() if observed.kind == kind}

    def plain(self) -> dict:
        """Return nested dicts and lists, from which `read` makes an equal spec."""
        return {
            key: {**seen._asdict(), "shape": list(seen.shape), "classes": list(seen.classes)}
            for key, seen in self.items()
        }

    @classmethod
    def read(cls, plain: Mapping) -> ObsSpec:
        """Undo `plain`, also as checkpoints had it at first: {images: {key: shape}, vectors: ..., classes: ...}."""
        if plain.keys() == {"images", "vectors", "classes"}:
            kinds = {"vector": plain["vectors"], "image": plain["images"]}
            plain = {
                key: {"kind": kind, "shape": shape, "classes": plain["classes"].get(key, ())}
                for kind, shapes in kinds.items()
                for key, shape in shapes.items()
            }
        return cls(
            {key: Observed(seen["kind"], tuple(seen["shape"]), tuple(seen["classes"])) for key, seen in plain.items()}
        )


class ActionSpec(NamedTuple):
    """The action vector: the keys' parts side by side, in sorted order of the keys.

    widths: {key: width of its part}.
    classes: {key: [k...]} of (multi-)discrete keys, whose parts are one-hots of k classes side by side. The parts of
      all other keys are numbers in [-1, 1].
    """

    widths: dict[str, int]
    classes: dict[str, list[int]]

    @property
    def size(self) -> int:
        """The width of the vector (A)."""
        return sum(self.widths.values())

    @property
    def variables(self) -> dict[str, int]:
        """{key: how many independent variables it has}: choices if it is discrete, else numbers."""
        return {key: len(self.classes[key]) if key in self.classes else width for key, width in self.widths.items()}

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """(..., A) -> {key: (..., width)}"""
        return dict(zip(self.widths, vector.split(list(self.widths.values()), -1), strict=True))

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """{key: (..., width)} -> (..., A); other keys are ignored."""
        import torch

        return torch.cat([parts[key] for key in self.widths], -1)

    def zeros(self, count: int) -> dict[str, np.ndarray]:
        """Return {key: (count, width)} zeros: what led to the first observation of an episode."""
        return {key: np.zeros((count, width), np.float32) for key, width in self.widths.items()}

    def uniform(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """Draw {key: (count, width)} float32: numbers in [-1, 1] and one-hots, all with equal chances."""
        return {key: self._draw(key, rng, count) for key in self.widths}

    def _draw(self, key, rng, count):
        if key not in self.classes:
            return rng.uniform(-1, 1, (count, self.widths[key])).astype(np.float32)
        choices = [rng.integers(size, size=count) for size in self.classes[key]]
        return self.one_hot(key, np.stack(choices, -1))

    def one_hot(self, key: str, index: np.ndarray) -> np.ndarray:
        """Class indices (..., n) of a discrete key -> one-hots side by side (..., width) float32."""
        starts = np.cumsum([0, *self.classes[key]])
        vectors = np.zeros((*index.shape[:-1], starts[-1]), np.float32)
        np.put_along_axis(vectors, index + starts[:-1], 1, -1)
        return vectors


class StepLayout(dict[str, tuple[tuple[int, ...], np.dtype]]):
    """{key: (shape, dtype)} of a stored step: observation, action, reward and flags.

    actions: what the actions are; classes: {key: (k, ...)} of the observations that are integers; sounds: the keys of
    waveforms, whose spaces have a `silence`.
    """

    actions: ActionSpec
    classes: dict[str, tuple[int, ...]]
    sounds: frozenset[str]


def named(space: AnySpace, about: str) -> AnySpace:
    """Let a plain space say what an environment's observations were taken for; see `modalities.describe`."""
    vars(space)["about"] = about
    return space


def tagged(space: AnySpace, modality: str = "", optional: bool = False) -> AnySpace:
    """Return a copy of an environment's space that tells what its shape does not.

    Args:
      modality: the kind of observation, such as "audio"; "" leaves it to the space. optional: there may be none in some
        steps, for which None stands.
    """
    space = copy.copy(space)
    vars(space).update({"modality": modality} if modality else {}, **({"optional": True} if optional else {}))
    return space


def is_optional(space: spaces.Space) -> bool:
    """True if an observation may be missing in some steps."""
    return bool(vars(space).get("optional"))


def presence(key: str) -> str:
    """Return the key of the integer that says, of an observation that may be missing, whether it is there (1)."""
    return f"{key}/present"


def classes_of(space: spaces.Space) -> tuple[int, ...]:
    """Return the classes of each integer that a discrete or multi-discrete space holds; () for any other space."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec)
    return ()


def act_spec(act_space: Mapping[str, spaces.Space]) -> ActionSpec:
    """{key: Box, Discrete or MultiDiscrete} -> ActionSpec."""
    widths, classes = {}, {}
    for key, space in sorted(act_space.items()):
        if found := classes_of(space):
            classes[key] = list(found)
        widths[key] = sum(found) if found else int(np.prod(space.shape or ()))
    return ActionSpec(widths, classes)


def step_dtype(space: spaces.Space) -> np.dtype:
    """Return the dtype in which an observation of a plain space is stored: integers that name classes are int32."""
    dtype = np.dtype(space.dtype)
    return np.dtype(np.int32) if dtype.kind == "i" else dtype


def step_layout(obs_space: Mapping[str, spaces.Space], actions: ActionSpec) -> StepLayout:
    """Return {key: (shape, dtype)} of a stored step: observation, action, reward and flags."""
    layout = {key: (tuple(space.shape or ()), step_dtype(space)) for key, space in obs_space.items()}
    layout |= {key: ((width,), np.dtype(np.float32)) for key, width in actions.widths.items()}
    layout |= {"reward": ((), np.dtype(np.float32))} | {flag: ((), np.dtype(bool)) for flag in FLAGS}
    steps = StepLayout(layout)
    steps.actions = actions
    steps.classes = {key: classes for key, space in obs_space.items() if (classes := classes_of(space))}
    steps.sounds = frozenset(key for key, space in obs_space.items() if hasattr(space, "silence"))
    return steps
