"""Kinds of observations, one folder each.

A kind is a folder here and its line in `MODALITIES`. It has two files: `space.py`, without PyTorch, says which
Gymnasium spaces are of the kind and how their observations become plain arrays (environments and their worker
processes import it); `nets.py` has encoder, decoder and loss, and how a prediction is shown on film. docs/modalities.md
adds one. `joint.py` is what joins the kinds that there are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from specs import Observed, ObsSpec, tagged
from tools import UserError

# In the order in which embeddings are joined. A space is of the last kind that accepts it; a vector is the rest.
MODALITIES = ("vector", "image", "text", "audio")


class Converter(Protocol):
    """Carries the observations of one key to a plain space.

    space: the plain space, which is of the same kind.
    """

    space: spaces.Space

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        """Return the plain value, a copy that nothing changes later; is_first: an episode starts here."""


class Space(Protocol):
    """The interface of `modalities/<kind>/space.py`.

    KEYS: the key in the section `encoder` whose regular expression chooses the observations of this kind.
    """

    KEYS: str

    def accepts(self, space: spaces.Space, config: Any = None) -> bool:
        """True if a space is of this kind, as an environment gives it or plain. config: None only for plain ones."""

    def converter(self, key: str, space: spaces.Space, config: Any) -> Converter:
        """Return what makes an environment's observations plain. Raises UserError for a space it cannot carry over."""

    def observed(self, space: spaces.Space) -> Observed:
        """Return what networks need to know of a plain space."""


class Nets(Protocol):
    """The interface of `modalities/<kind>/nets.py`. N = B T; config is the whole configuration.

    A kind may have `picture`, a function of one predicted observation (...) that draws it, uint8 (H, W, 3).
    """

    def make_encoder(self, observed: Mapping[str, Observed], config: Any) -> Any:
        """Return a module with `size`, the width of what it gives; `prepare({key: (B, T, ...)})`, observations as the
        model predicts them; and `forward({key: (N, ...)}, dtype)` -> (N, size). It may have `tokens`, the number of
        equal parts of the embedding that attention tells apart, such as the places of an image; else it is one."""

    def make_decoder(self, observed: Mapping[str, Observed], deter: int, stoch: int, config: Any) -> Any:
        """Return a module with `forward(deter (N, D), stoch (N, S K))` -> {key: output (N, ...)} and `dist(key, output
        (B, T, ...))` -> a distribution over (B, T) observations, with `log_prob` and `mode`. The loss is -log_prob."""

    def drawer(self, config: Any) -> Callable[..., Sequence[np.ndarray]] | None:
        """Return a function of arrays (truth, model), each (B, T, ...), and of how many steps the model was shown, that
        shows them as three films (truth, model, error), each uint8 (B, T, H, W, C with C 1, 3 or a stack of these), or
        as one that says what is what, (B or fewer, T, H, W, 3); or None, for what is not filmed. A `Drawing` of films
        also has what can be read or heard."""


class Drawing(tuple[np.ndarray, ...]):
    """The films of a prediction, with what of it can be read or heard.

    lines: of texts, [[(truth, model) of each step] of each sequence].
    sound: of audio, (rate in samples a second, float32 (B, T n, 2) in [-1, 1]: the truth left, the model right).
    """

    lines: Sequence[Sequence[tuple[str, str]]] | None = None
    sound: tuple[int, np.ndarray] | None = None


def space(kind: str) -> ModuleType:
    """Import the part of a kind that works without PyTorch: a `Space`."""
    return importlib.import_module(f"modalities.{kind}.space")


def nets(kind: str) -> ModuleType:
    """Import the networks of a kind: a `Nets`."""
    return importlib.import_module(f"modalities.{kind}.nets")


def kind_of(observation_space: spaces.Space, config: Any = None) -> str:
    """Return the kind of a space: what it was told to be, or the last in `MODALITIES` that accepts it.

    config: None only for plain ones.
    """
    told = vars(observation_space).get("modality")
    return told or next(kind for kind in reversed(MODALITIES) if space(kind).accepts(observation_space, config))


def told(obs_space: Mapping[str, spaces.Space], named: Mapping[str, Any], asked: str) -> dict[str, spaces.Space]:
    """Return an environment's spaces, those that were told to be of a kind tagged so.

    Args:
      named: {key: its kind}; asked: where that stands, for messages. Raises UserError for a key or kind that is none.
    """
    for key, kind in named.items():
        if key not in obs_space:
            raise UserError(f"{asked}{key}: there is no such observation, there are {', '.join(obs_space)}")
        if kind not in MODALITIES:
            raise UserError(f"{asked}{key} {kind}: expected one of {', '.join(MODALITIES)}")
    return {key: tagged(child, named[key]) if key in named else child for key, child in obs_space.items()}


def drawers(obs_spec: ObsSpec, config: Any) -> dict[str, Callable[..., Sequence[np.ndarray]]]:
    """Return {key: function (truth, model, seen) -> films} of the observations whose predictions are shown."""
    made = {kind: nets(kind).drawer(config) for kind in {seen.kind for seen in obs_spec.values()}}
    return {key: made[seen.kind] for key, seen in obs_spec.items() if made[seen.kind]}


def describe(obs_space: Mapping[str, spaces.Space]) -> dict[str, str]:
    """Say what the observations of an environment were taken for: {key: "image 64x64x3 (channels first, moved)"}."""
    return {key: str(vars(child).get("about", child)) for key, child in obs_space.items()}


def obs_spec(obs_space: Mapping[str, spaces.Space]) -> ObsSpec:
    """{key: plain Gymnasium space} -> ObsSpec."""
    return ObsSpec({key: space(kind_of(child)).observed(child) for key, child in obs_space.items()})
