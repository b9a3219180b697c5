"""What every suite needs: plain observations and actions, chosen keys, action repeat, time limits.

A suite hands out environments with the spaces they were born with (a dict of Gymnasium spaces for
observations, another for actions) and takes actions in that form. The wrappers make of it what `envs.Env`
promises. An observation's dict is made for one step and handed on, so they change it in place.
"""

import re
from collections import deque

import numpy as np
from gymnasium import spaces

from envs.errors import one_line
from tools import UserError


def flags(reward=0.0, is_first=False, is_last=False, is_terminal=False) -> dict:
    """The entries that every observation carries beside those of its space."""
    return {
        "reward": np.float32(reward),
        "is_first": np.bool_(is_first),
        "is_last": np.bool_(is_last),
        "is_terminal": np.bool_(is_terminal),
    }


def is_image(space: spaces.Space) -> bool:
    """Whether a space is uint8 up to 255, of shape (H, W) or (H, W, C) with 1, 3 or 4 channels."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or not (space.high == 255).all():
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[-1] in (1, 3, 4))


def is_kept(encoder, key: str, image: bool) -> bool:
    """Whether the model reads an observation: images by `encoder.cnn_keys`, others by `mlp_keys`."""
    name = "cnn_keys" if image else "mlp_keys"
    try:
        return bool(re.match(getattr(encoder, name), key))
    except re.error as error:
        raise UserError(f"--encoder.{name} {getattr(encoder, name)}: {error}") from None


class Wrapper:
    """Passes everything on to `env`; a subclass says what is different."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        if name == "env":  # a subclass that failed before it had one
            raise AttributeError(name)
        return getattr(self.env, name)


# ---------------------------------------------------------------------------
# Episodes


class ActionRepeat(Wrapper):
    """Takes each action `repeat` times, or until the episode ends, and sums the rewards."""

    def __init__(self, env, repeat: int):
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

    def __init__(self, env, limit: int):
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

    def __init__(self, env):
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


class PlainObs(Wrapper):
    """Observations as uint8 images (H, W, C), float32 vectors (n,), int32 scalars or int32 vectors (n,)."""

    def __init__(self, env):
        super().__init__(env)
        plain = {key: _plain_obs(key, space) for key, space in env.obs_space.items()}
        self.obs_space = {key: space for key, (space, _) in plain.items()}
        self._convert = {key: convert for key, (_, convert) in plain.items()}

    def reset(self):
        return self._plain(self.env.reset())

    def step(self, action):
        return self._plain(self.env.step(action))

    def _plain(self, obs):
        for key, convert in self._convert.items():
            obs[key] = convert(obs[key])
        return obs


def _plain_obs(key, space):
    """A plain space, and the function that carries a value there.

    It copies arrays, for an environment may write its next state into the one that it handed out.
    """
    if is_image(space):
        shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
        return spaces.Box(0, 255, shape, np.uint8), lambda x: np.array(x, np.uint8, order="C").reshape(shape)
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n)), lambda x: np.int32(x - space.start)
    if isinstance(space, spaces.MultiDiscrete):
        nvec = space.nvec.reshape(-1)
        return spaces.MultiDiscrete(nvec), lambda x: (np.asarray(x) - space.start).reshape(-1).astype(np.int32)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        size = int(np.prod(space.shape))
        plain = spaces.Box(-np.inf, np.inf, (size,))
        if space.shape == plain.shape:  # nearly always, and half the time
            return plain, lambda x: np.array(x, np.float32)
        return plain, lambda x: np.array(x, np.float32).reshape(size)
    kind = type(space).__name__
    raise UserError(f"observation '{key}' is a {kind} space, not supported: leave it out by encoder.mlp_keys")


class SelectKeys(Wrapper):
    """Drops the observations that `encoder` does not read. Raises UserError if that is all of them."""

    def __init__(self, env, encoder):
        super().__init__(env)
        self.obs_space = {key: space for key, space in env.obs_space.items() if is_kept(encoder, key, is_image(space))}
        self._dropped = env.obs_space.keys() - self.obs_space.keys()
        if not self.obs_space:
            images = sorted(key for key, space in env.obs_space.items() if is_image(space))
            others = sorted(env.obs_space.keys() - images)
            raise UserError(
                f"no observation is left: encoder.cnn_keys '{encoder.cnn_keys}' must match one of {images} "
                f"or encoder.mlp_keys '{encoder.mlp_keys}' one of {others}"
            )

    def reset(self):
        return self._select(self.env.reset())

    def step(self, action):
        return self._select(self.env.step(action))

    def _select(self, obs):
        for key in self._dropped:
            obs.pop(key, None)  # it may be offered and not there: what nobody reads is not drawn
        return obs


class Resize(Wrapper):
    """Brings every image to `size` (H, W) by averaging areas."""

    def __init__(self, env, size):
        super().__init__(env)
        size = tuple(size)
        images = {key: space.shape for key, space in env.obs_space.items() if is_image(space)}
        self._shapes = {key: (*size, *shape[2:]) for key, shape in images.items() if shape[:2] != size}
        self.obs_space = dict(env.obs_space)
        for key, shape in self._shapes.items():
            self.obs_space[key] = spaces.Box(0, 255, shape, np.uint8)
        if self._shapes:
            self._cv2 = _import_cv2()

    def reset(self):
        return self._resize(self.env.reset())

    def step(self, action):
        return self._resize(self.env.step(action))

    def _resize(self, obs):
        for key, shape in self._shapes.items():
            image = np.asarray(obs[key], np.uint8)
            image = self._cv2.resize(image, (shape[1], shape[0]), interpolation=self._cv2.INTER_AREA)
            obs[key] = image.reshape(shape)  # OpenCV drops a single channel
        return obs


def _import_cv2():
    try:
        import cv2
    except ImportError as error:
        message = f"images are resized by OpenCV ({one_line(error)}): pip install opencv-python-headless"
        raise UserError(message) from error
    return cv2


class FrameStack(Wrapper):
    """Stacks the last `count` images along the channels, the oldest first; the first of an episode is repeated."""

    def __init__(self, env, count: int):
        super().__init__(env)
        self._frames = {key: deque(maxlen=count) for key, space in env.obs_space.items() if is_image(space)}
        self.obs_space = dict(env.obs_space)
        for key in self._frames:
            height, width, channels = env.obs_space[key].shape
            self.obs_space[key] = spaces.Box(0, 255, (height, width, count * channels), np.uint8)

    def reset(self):
        obs = self.env.reset()
        for key, frames in self._frames.items():
            frames.extend([obs[key]] * frames.maxlen)
        return self._stack(obs)

    def step(self, action):
        obs = self.env.step(action)
        for key, frames in self._frames.items():
            frames.append(obs[key])
        return self._stack(obs)

    def _stack(self, obs):
        for key, frames in self._frames.items():
            obs[key] = np.concatenate(frames, -1)
        return obs


# ---------------------------------------------------------------------------
# Actions


class PlainActions(Wrapper):
    """Actions as float32 vectors: boxes in [-1, 1], discrete choices as (concatenated) one-hots."""

    def __init__(self, env):
        super().__init__(env)
        plain = {key: _plain_action(key, space) for key, space in env.act_space.items()}
        self.act_space = {key: space for key, (space, _) in plain.items()}
        self._native = {key: native for key, (_, native) in plain.items()}

    def step(self, action):
        return self.env.step({key: native(action[key]) for key, native in self._native.items()})


def _plain_action(key, space):
    """A plain space, and the function that carries a float32 vector back to the environment's own form."""
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
    raise UserError(f"action '{key}' is a {type(space).__name__} space of {space.dtype}, which is not supported")


def _unscale(space):
    """From [-1, 1] to [low, high]; a dimension without bounds is left as it is, one with a single bound is moved."""
    low, high = (bound.astype(np.float64).reshape(-1) for bound in (space.low, space.high))
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
    """From concatenated one-hots to an array of indices shaped like `nvec`."""
    ends = np.cumsum(nvec.reshape(-1)).tolist()
    parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def native(x):
        return (np.reshape([x[part].argmax() for part in parts], nvec.shape) + start).astype(dtype)

    return native
