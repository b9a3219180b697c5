"""What every suite needs: plain observations and actions, chosen keys, action repeat, time limits.

A suite hands out environments with the spaces they were born with (a dict of Gymnasium spaces for
observations, another for actions) and takes actions in that form. The wrappers make of it what `envs.Env`
promises. An observation's dict is made for one step and handed on, so they change it in place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

import modalities
from envs.env import Env
from modalities.image.space import too_small
from specs import act_spec, is_optional, named, presence, step_dtype
from tools import UserError

MOST_INTEGERS = 256  # values of a whole number in a box of actions
NO_BOUND = 1e30  # what is larger stands for no bound, such as the largest float32


def flags(reward: float = 0.0, is_first: bool = False, is_last: bool = False, is_terminal: bool = False) -> dict:
    """Return the entries that every observation carries beside those of its space."""
    return {
        "reward": np.float32(reward),
        "is_first": np.bool_(is_first),
        "is_last": np.bool_(is_last),
        "is_terminal": np.bool_(is_terminal),
    }


def is_kept(encoder: Any, key: str, kind: str) -> bool:
    """True if the model reads an observation of a kind: images by `encoder.cnn_keys`, vectors by `mlp_keys`, and so on.

    An empty expression stands for none of them.
    """
    name = modalities.space(kind).KEYS
    try:
        return bool(getattr(encoder, name) and re.match(getattr(encoder, name), key))
    except re.error as error:
        raise UserError(f"--encoder.{name} {getattr(encoder, name)}: {error}") from None


class Wrapper:
    """Passes everything on to `env`; a subclass says what is different."""

    def __init__(self, env: Env):
        self.env = env

    def __getattr__(self, name):
        if name == "env":  # a subclass that failed before it had one
            raise AttributeError(name)
        return getattr(self.env, name)


# ---------------------------------------------------------------------------
# Episodes


class ActionRepeat(Wrapper):
    """Takes each action `repeat` times, or until the episode ends, and sums the rewards."""

    def __init__(self, env: Env, repeat: int):
        super().__init__(env)
        self._repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self._repeat):
            obs = self.env.step(action)
            total += float(obs["reward"])
            if obs["is_last"]:
                break
        obs["reward"] = np.float32(total)
        return obs


class TimeLimit(Wrapper):
    """Ends episodes after `limit` agent steps: a last observation that is not terminal."""

    def __init__(self, env: Env, limit: int):
        super().__init__(env)
        self._limit = limit
        self._steps = 0

    def reset(self):
        self._steps = 0
        return self.env.reset()

    def step(self, action):
        obs = self.env.step(action)
        self._steps += 1
        if self._steps >= self._limit:
            obs["is_last"] = np.True_
        return obs


class AutoReset(Wrapper):
    """Starts a new episode, the action unused, at the step that follows a last observation."""

    def __init__(self, env: Env):
        super().__init__(env)
        self._over = True

    def reset(self):
        self._over = False
        return self.env.reset()

    def step(self, action):
        if self._over:
            return self.reset()
        obs = self.env.step(action)
        self._over = bool(obs["is_last"])
        return obs


# ---------------------------------------------------------------------------
# Observations


class SelectKeys(Wrapper):
    """Drops the observations that `encoder` does not read. Raises UserError if that is all of them.

    left_out: {observation: the key that leaves it out}.
    """

    def __init__(self, env: Env, config: Any):
        super().__init__(env)
        encoder = config.encoder
        offered = modalities.told(env.obs_space, dict(flat(config.modalities.to_dict())), "--modalities.")
        kinds = {key: modalities.kind_of(space, config) for key, space in offered.items()}
        self.obs_space = {key: space for key, space in offered.items() if is_kept(encoder, key, kinds[key])}
        dropped = {key: kind for key, kind in kinds.items() if key not in self.obs_space}
        self.left_out = {key: f"--encoder.{modalities.space(kind).KEYS}" for key, kind in dropped.items()}
        if not self.obs_space:
            small = [key for key, kind in kinds.items() if kind != "image" and len(env.obs_space[key].shape or ()) > 1]
            note = f" ({', '.join(f'{key} {env.obs_space[key].shape}' for key in small)}: no image)" if small else ""
            raise UserError(f"no observation is left: {' or '.join(_choices(encoder, kinds))}{note}")
        for key in self.left_out:
            if too_small(env.obs_space[key], config) and is_kept(encoder, key, "image"):
                found = f"observation '{key}' {env.obs_space[key].shape} is too small for an image of {config.size}"
                cure = "let encoder.mlp_keys take it as numbers, or leave it out of encoder.cnn_keys"
                raise UserError(f"{found}: {cure}")

    def reset(self):
        return self._select(self.env.reset())

    def step(self, action):
        return self._select(self.env.step(action))

    def _select(self, obs):
        for key in self.left_out:
            obs.pop(key, None)  # it may be offered and not there: what nobody reads is not drawn
        return obs


def flat(tree, prefix=""):
    """Yield (key, value) of a section whose keys may have dots, which nest them."""
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def _choices(encoder, kinds):
    """Say of each kind which observations its regular expression may match; kinds: {key: kind}."""
    usual = {"image", "vector", *kinds.values()}
    for kind in filter(usual.__contains__, reversed(modalities.MODALITIES)):  # as they are asked whose a space is
        name = modalities.space(kind).KEYS
        offered = sorted(key for key in kinds if kinds[key] == kind)
        yield f"encoder.{name} '{getattr(encoder, name)}' must match one of {offered}"


class PlainObs(Wrapper):
    """Makes observations what `Env` promises, each as its kind in `modalities` has it.

    Beside one that may be missing, for which None stands, an integer says whether it is there; if not, it is zeros, or
    the silence of a sound. No observation of the environment's own may be called as that integer of another is.
    """

    def __init__(self, env: Env, config: Any):
        super().__init__(env)
        self._converters = {
            key: modalities.space(modalities.kind_of(space, config)).converter(key, space, config)
            for key, space in env.obs_space.items()
        }
        self.obs_space: dict[str, spaces.Space] = {}
        self._missing = {}  # {key: what stands for it} of those that may be
        self._unseen: set[str] = set()  # those of them that were not there yet in this episode
        for key, converter in self._converters.items():
            if presence(key) in self._converters:
                means = f"would say whether there is '{key}'"
                raise UserError(
                    f"observation '{presence(key)}' {means}: give it another name, or leave one of them out"
                )
            self.obs_space[key] = plain = converter.space
            if is_optional(env.obs_space[key]):
                self.obs_space[presence(key)] = named(spaces.Discrete(2), f"whether there is {key}")
                self._missing[key] = np.full(plain.shape or (), getattr(plain, "silence", 0), step_dtype(plain))

    def reset(self):
        return self._plain(self.env.reset())

    def step(self, action):
        return self._plain(self.env.step(action))

    def _plain(self, obs):
        is_first = obs["is_first"]
        if is_first:
            self._unseen = set(self._missing)
        for key, nothing in self._missing.items():
            there = obs[key] is not None
            obs[presence(key)] = np.int32(there)
            obs[key] = self._converters[key](obs[key], key in self._unseen) if there else nothing.copy()
            if there:
                self._unseen.discard(key)
        for key, converter in self._converters.items():
            if key not in self._missing:
                obs[key] = converter(obs[key], is_first)
        return obs


# ---------------------------------------------------------------------------
# Actions


class PlainActions(Wrapper):
    """Actions as float32 vectors: boxes in [-1, 1], discrete choices as (concatenated) one-hots."""

    safe: dict[str, np.ndarray] | None  # `safe_action` where somebody asks for it, set by `make_env`
    own: dict[str, Any]  # what `envs.spaces.describe` says of the spaces below the wrappers, set by `make_env`

    def __init__(self, env: Env):
        super().__init__(env)
        if not env.act_space:
            raise UserError("the environment has no action: its action space is an empty dict")
        plain = {key: _plain_action(key, space) for key, space in env.act_space.items()}
        self.act_space = {key: space for key, (space, _) in plain.items()}
        self._native = {key: native for key, (_, native) in plain.items()}

    def step(self, action):
        return self.env.step({key: native(action[key]) for key, native in self._native.items()})

    @property
    def safe_action(self):
        """Return the action that the environment calls safe as an agent would give it, None if it names none.

        Raises UserError for what is no action.
        """
        spec = act_spec(self.act_space)
        zeros = {key: vector[0] for key, vector in spec.zeros(1).items()}
        try:
            safe = self.env.safe_action if hasattr(self.env, "safe_action") else None
            if safe is None:
                return None
            return {key: _as_given(spec, key, safe[key], self._native[key], zeros[key]) for key in spec.widths}
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"the environment's safe_action is no action of its action space: {error}") from None


def _as_given(spec, key, value, native, zeros):
    """Return the float32 vector that `native` carries to an action of the environment's own form."""
    if key in spec.classes:
        counts = np.asarray(value) - np.asarray(native(spec.one_hot(key, np.zeros(len(spec.classes[key]), int))))
        return spec.one_hot(key, counts.reshape(-1).astype(int))
    middle, high = (np.asarray(native(zeros + end), np.float64).reshape(-1) for end in (0, 1))
    wide = np.where(high == middle, 1, high - middle)
    return ((np.asarray(value, np.float64).reshape(-1) - middle) / wide).clip(-1, 1).astype(np.float32)


def _plain_action(key, space) -> tuple[spaces.Space, Callable[[np.ndarray], Any]]:
    """Return a plain space and the function that carries a float32 vector back to the environment's own form."""
    if not math.prod(space.shape or ()):
        raise UserError(f"action '{key}' has no numbers (shape {space.shape}): there is nothing to choose")
    if isinstance(space, spaces.Box) and space.dtype.kind in "biu":
        low, high = space.low.astype(object), space.high.astype(object)  # int64 has no room for their difference
        count = np.asarray(high - low + 1, object)  # of a single number, NumPy makes one of Python's
        if count.max() > MOST_INTEGERS:
            found = f"{space.dtype} from {low.min()} to {high.max()}"
            cure = f"whole numbers have up to {MOST_INTEGERS} values each, declare it float32 and round what comes"
            raise UserError(f"action '{key}' is {found}: {cure}")
        nvec = count.astype(np.int64)
        return spaces.MultiDiscrete(nvec.reshape(-1)), _indices(nvec, low.astype(np.int64), space.dtype)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return spaces.Box(-1, 1, (int(np.prod(space.shape)),)), _unscale(space)
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return spaces.Discrete(int(space.n)), lambda x: int(x.argmax()) + start
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec.reshape(-1)), _indices(space.nvec, space.start, space.dtype)
    if isinstance(space, spaces.MultiBinary):
        nvec = np.full(space.shape, 2)
        return spaces.MultiDiscrete(nvec.reshape(-1)), _indices(nvec, 0, space.dtype)
    raise UserError(f"action '{key}' is a {type(space).__name__} space, which is not supported")


def _unscale(space):
    """Return the map from [-1, 1] to [low, high]; a dimension without bounds stays, one with one bound is moved."""
    low, high = (bound.astype(np.float64).reshape(-1) for bound in (space.low, space.high))
    low, high = np.where(low < -NO_BOUND, -np.inf, low), np.where(high > NO_BOUND, np.inf, high)
    free = ~np.isfinite(low)
    low = np.where(free, np.where(np.isfinite(high), high - 2, -1), low)
    high = np.where(np.isfinite(high), high, low + 2)
    bounds = low, high, (low + high) / 2, (high - low) / 2
    low, high, middle, half = (bound.astype(space.dtype) for bound in bounds)

    def native(x):
        x = np.minimum(np.maximum(middle + half * x, low), high)  # several times as fast as np.clip
        return x.astype(space.dtype, copy=False).reshape(space.shape)

    return native


def _indices(nvec, start, dtype):
    """Return the map from concatenated one-hots to an array of indices shaped like `nvec`."""
    ends = np.cumsum(nvec.reshape(-1)).tolist()
    parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def native(x):
        return (np.reshape([x[part].argmax() for part in parts], nvec.shape) + start).astype(dtype)

    return native
