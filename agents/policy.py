"""A trained agent in use: without environments, on what an environment gives, in what it takes."""

import contextlib
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Text
from torch.utils._pytree import tree_leaves

from agents import make_agent
from agents.acting import certain
from agents.older import read_specs
from envs.checks import problem
from envs.spaces import Converter
from specs import presence
from tools import UserError
from training.checkpoint import checkpoint_file, load_agent_state, load_checkpoint
from training.config import CONFIGS, load_config
from training.console import warn_at


class Unfit(UserError, ValueError):
    """An observation or a state that the agent cannot take."""


class Memory(NamedTuple):
    """Memory of a Policy in N environments: the agent's carry, and {key: the last images of a stack (N, ...)}.

    Beside those of a key, `presence` of it says where there has been an image in this episode (N,).
    """

    carry: Any
    frames: Mapping[str, np.ndarray]

    @property
    def state(self):
        """The latent State (N, ...)."""
        return self.carry.state


class Policy:
    """Wraps an agent for a user's own loop.

    Args:
      agent: Agent, with obs_spec and act_spec; config: the whole configuration.
      own: the environment's own spaces, as `envs.spaces.describe` has them; None if they are not known: observations
        are then taken as the agent sees them, and actions are numbers in [-1, 1] or one-hots.
      path: of the checkpoint; steps: agent steps that it had seen.
    Attributes:
      converter: `envs.spaces.Converter`, or None if the spaces are not known.
      flags: {observation that says whether another is there: that one}.
    """

    def __init__(self, agent, config, own=None, path=None, steps=None):
        self.agent, self.obs_spec, self.act_spec = agent, agent.obs_spec, agent.act_spec
        self.config, self.own, self.path, self.steps = config, own, path, steps
        self.converter = Converter(own, config) if own else None
        self.flags = {presence(key): key for key in self.obs_spec if presence(key) in self.obs_spec}

    def act(self, obs, state=None, mode="mode"):
        """Choose actions for a batch of environments, or for a single one.

        Args:
          obs: {key: (N, ...)} arrays, or {key: (...)} of a single environment, as the environment gives them, for each
            key that the agent was trained on; nested dicts and tuples as well, texts as strings or lists of them, and
            images also as the agent sees them. What may be missing may be left out, or None, also in a list of N: one
            or all of them. Where nothing of a batch is there, `is_first` (N,) says so. Other keys are ignored.
            `is_first` (N,) or () says where an episode starts; left out, one starts everywhere if `state` is None, and
            nowhere else.
          state: what the last call returned, or None.
          mode: "mode" for the most likely latent and action, so that the same observations lead to the same actions; or
            "sample" to draw both.
        Returns: {key: action} as the environment takes them, an int of a Discrete space and else an array, each with an
          axis N if the observations had one; and the new state.
        Raises Unfit, a UserError and a ValueError, for what does not fit the agent, in one line; ValueError for another
          mode.
        """
        batch, single = self.batch(obs, state is None)
        count = len(batch["is_first"])
        carry, frames = Memory(self.agent.initial(count), {}) if state is None else state
        if any(len(leaf) != count for leaf in tree_leaves(carry)):
            raise Unfit(f"the state is of {len(tree_leaves(carry)[0])} environments, and the observations of {count}")
        batch, frames = self.stacked(batch, frames)
        sure = mode == "mode" and hasattr(self.agent, "world")
        with certain(self.agent) if sure else contextlib.nullcontext():
            parts, carry, _ = self.agent.act(batch, carry, mode)
        parts = {key: np.clip(value, -1, 1) for key, value in parts.items()}
        actions = [self.native({key: value[i] for key, value in parts.items()}) for i in range(count)]
        together = {key: np.stack([action[key] for action in actions]) for key in parts}
        return actions[0] if single else together, Memory(carry, frames)

    def native(self, action):
        """Carry {key: (width,)} to what the environment takes."""
        return self.converter.native(action) if self.converter else action

    # -- observations

    def batch(self, obs, is_first):
        """Return observations as the agent sees them, with a batch axis and is_first, and True if they had none."""
        leaves = flat(obs) if isinstance(obs, Mapping) or hasattr(obs, "keys") else {}
        wanted = self.obs_spec.keys() - self.flags.keys()  # flags are made here, if they are not given
        optional = set(self.flags.values())
        gaps = {key: gaps_of(leaves[key]) for key in optional & leaves.keys()}  # {key: where a batch has None}
        leaves |= {key: filled(leaves[key]) for key, holes in gaps.items() if holes is not None}
        there = {key for key in wanted & leaves.keys() if leaves[key] is not None or key not in optional}
        if wanted - there - optional or not (there or (optional and isinstance(obs, Mapping))):
            found = sorted(leaves) if leaves else type(obs).__name__
            raise Unfit(f"expected an observation with the keys {sorted(wanted)}, got {found}")
        arrays = {key: numbers(key, leaves[key], self.obs_spec[key].kind) for key in self.obs_spec if key in there}
        lead, single = self.lead(arrays, gaps, leaves)
        first = np.broadcast_to(leaves.get("is_first", is_first), lead)
        count = 1 if single else lead[0]
        items = [{key: value if single else value[i] for key, value in arrays.items()} for i in range(count)]
        for flag, key in self.flags.items():  # what is said to be missing, or not given, is None
            said = np.broadcast_to(np.asarray(leaves.get(flag, key in there)).astype(bool), lead or (1,))
            said = said if gaps.get(key) is None else said & ~gaps[key]
            for item, known in zip(items, said, strict=True):
                item[key] = item[key] if known and key in there else None
        plain = [self.plain(item) for item in items]
        return {
            **{key: np.stack([item[key] for item in plain]) for key in self.obs_spec},
            "is_first": np.atleast_1d(first).astype(bool),
        }, single

    def lead(self, arrays, gaps, leaves):
        """Return the shape in front of all that is given, (N,) or (), and True if it is (). Raises Unfit if it differs.

        Args:
          arrays: {key: array} of what is there; gaps: see `gaps_of`; leaves: all that is given, flags included.
        """
        singles = {key: self.is_single(key, value) for key, value in arrays.items()}
        singles |= {key: False for key, holes in gaps.items() if holes is not None}
        given = {key: np.shape(leaves[key]) for key in ("is_first", *self.flags) if key in leaves}
        if not singles:  # all is missing: of how many, the flags tell
            singles = {key: not shape for key, shape in given.items()} or {"is_first": True}
        single = all(singles.values())
        if any(singles.values()) != single:
            one, many = (next(key for key in singles if singles[key] == kind) for kind in (True, False))
            raise Unfit(f"observation {one} is of one environment, and {many} of a batch")
        leads = {key: () if single else value.shape[:1] for key, value in arrays.items()}
        leads |= {key: holes.shape for key, holes in gaps.items() if holes is not None}
        leads |= {key: shape for key, shape in given.items() if shape or key == "is_first"}
        lead = next(iter(leads.values()), ())
        if any(shape != lead for shape in leads.values()) or 0 in lead:
            raise Unfit(f"expected as many of each observation and of is_first, got {leads}")
        return lead, single

    def shapes(self, key):
        """Return the shapes that one observation of a key may have: the environment's own, and an image's as seen."""
        seen = self.obs_spec[key]
        if not self.converter:
            return [() if len(seen.classes) == 1 else seen.shape]
        own, plain = self.converter.obs_space[key], self.converter.plain_space[key]
        return [own.shape or (), *([plain.shape] if seen.kind == "image" else [])]

    def is_single(self, key, value):
        """True if an array is one observation of a key, False if it is a batch of them. Raises Unfit otherwise."""
        shapes = self.shapes(key)
        if value.shape in shapes:
            return True
        if value.ndim and value.shape[1:] in shapes:
            return False
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise Unfit(f"observation {key}: expected shape {wanted}, got {value.shape}")

    def plain(self, item):
        """Carry one observation of each key to what the agent sees, one frame of it. Raises Unfit where it cannot."""
        given = {key: value for key, value in item.items() if value is not None}
        for key, value in given.items():
            check_values(key, value, self.obs_spec[key], self.converter and self.converter.obs_space[key])
        if not self.converter:
            return self.bare(item)
        spaces = self.converter.obs_space
        seen = {key: value for key, value in given.items() if value.shape != (spaces[key].shape or ())}
        own = {key: value for key, value in item.items() if key not in seen}
        own |= {key: str(own[key]) for key in given if key in own and isinstance(spaces[key], Text)}
        try:
            return {**self.converter.plain(own), **seen}
        except UserError as error:
            raise Unfit(str(error)) from None

    def bare(self, item):
        """Do what `plain` does where the environment's own spaces are not known: arrays are taken as they are."""
        plain = {flag: np.int32(item[key] is not None) for flag, key in self.flags.items()}
        for key, value in item.items():
            seen = self.obs_spec[key]
            if value is None:
                dtype = np.uint8 if seen.kind == "image" else np.int32 if seen.classes else np.float32
                value = np.zeros(seen.shape, dtype)
            if seen.kind == "audio" and value.dtype == np.uint8:  # silent at 128
                value = (value.astype(np.float32) - 128) / 128
            is_float = not seen.classes and (seen.kind == "vector" or value.dtype.kind == "f")
            plain[key] = np.asarray(value, np.float32) if is_float else value
        return plain

    def stacked(self, batch, frames):
        """Return a batch whose images are the last ones along the channels, and these alone {key: (N, ...)}.

        The oldest comes first; the first of an episode fills the stack. Where one is missing, all are zeros, and the
        stack stays as it is.
        """
        count = self.config.frame_stack if self.converter else 1
        if count == 1:
            return batch, {}
        frames, first = dict(frames), batch["is_first"]
        for key in self.obs_spec.of("image"):
            image, flag = batch[key], presence(key)
            there = np.asarray(batch.get(flag, np.ones_like(first))) > 0
            fresh = np.concatenate([image] * count, -1)
            before = frames.get(key, fresh)
            moved = np.concatenate([before[..., image.shape[-1] :], image], -1)
            begun = frames.get(flag, np.full_like(first, key in frames)) & ~first
            stack = np.where(begun[:, None, None, None], moved, fresh)
            batch = batch | {key: np.where(there[:, None, None, None], stack, np.uint8(0))}
            frames |= {key: np.where(there[:, None, None, None], stack, before), flag: begun | there}
        return batch, frames


def flat(tree, path=""):
    """Return the leaves of nested dicts and tuples, their keys and places joined by "/"."""
    if not isinstance(tree, (Mapping, tuple)) and not hasattr(tree, "keys"):
        return {path: tree}
    children = enumerate(tree) if isinstance(tree, tuple) else tree.items()
    return {
        name: leaf
        for key, child in children
        for name, leaf in flat(child, f"{path}/{key}" if path else str(key)).items()
    }


def gaps_of(value):
    """Return where a list or an array of N observations has None (N,), or None if it has it nowhere."""
    several = isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1)
    holes = np.array([item is None for item in value], bool) if several else np.zeros(0, bool)
    return holes if holes.any() else None


def filled(value):
    """Return a list of observations in which one that is there stands for None, or None if there is none."""
    known = next((item for item in value if item is not None), None)
    return None if known is None else [known if item is None else item for item in value]


def numbers(key, value, kind):
    """Return an array. Raises Unfit for what are no numbers, and no text where the kind of observation is text."""
    try:
        array = np.asarray(value)
    except ValueError:  # of lists of several lengths
        array = np.array(None)
    if array.dtype.kind not in ("biufU" if kind == "text" else "biuf"):
        wanted = "text" if kind == "text" else "an array of numbers"
        raise Unfit(f"observation {key}: expected {wanted}, got {type(value).__name__}")
    return array


def check_values(key, value, seen, own):
    """Raise Unfit for what is no such observation. own: the environment's space, or None."""
    if isinstance(own, Text) != (value.dtype.kind == "U"):
        wanted = "text" if isinstance(own, Text) else "numbers"
        raise Unfit(f"observation {key}: expected {wanted}, got {value.dtype}")
    if value.dtype.kind == "U":
        return check_own(key, str(value), seen, own)
    whole = (seen.kind == "image" and (own is None or own.dtype.kind in "iu")) or bool(seen.classes)
    if whole and value.dtype.kind == "f":
        raise Unfit(f"observation {key}: expected integers, got {value.dtype}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise Unfit(f"observation {key} is not finite: {value}".split("\n")[0])
    if whole and value.size:
        low, high = (0, 255) if seen.kind == "image" else (0, np.array(seen.classes) - 1)
        if seen.classes and own is not None and hasattr(own, "start"):
            low, high = own.start, own.start + (own.n if hasattr(own, "n") else own.nvec) - 1
        if own is not None and seen.kind == "text":  # bytes
            high = 255
        if (value < low).any() or (value > high).any():
            raise Unfit(
                f"observation {key}: expected integers from {low} to {high}, got {value.min()} to {value.max()}"
            )
    if own is not None and value.shape == (own.shape or ()):
        check_own(key, value, seen, own)


def check_own(key, value, seen, own):
    """Raise Unfit for what would end a run, were it the environment's."""
    if found := problem(own, value, seen.kind == "image"):
        raise Unfit(f"observation {key} {found}")


def load_policy(path, device="auto", **changes):
    """Load a Policy from a checkpoint or its logdir; see `dreamer.load_agent`.

    changes: keys of the configuration that shall have another value than in the run.
    """
    path = checkpoint_file(path)
    checkpoint = load_checkpoint(path)
    saved = checkpoint["agent"]
    if "specs" not in saved:
        raise UserError(f"{path} does not tell its spaces, being of an older version: resume its run to write it anew")
    written = pathlib.Path(path).parent / "config.yaml"
    plain = ["--compile", "false", "--graphs", "false"]
    config = load_config(plain, CONFIGS, written, functools.partial(warn_at, "warning"))
    config = config.replace(device=str(device), **changes)
    agent = make_agent(config, *read_specs(saved))
    load_agent_state(agent, checkpoint, config)
    own = checkpoint.get("spaces")
    if not own:
        warn = functools.partial(warn_at, config.log_level)
        warn(f"{path} lacks the environment's spaces: actions are in [-1, 1] or one-hot; resume its run to add them")
    return Policy(agent, config, own, path, checkpoint["counters"]["agent_steps"])
