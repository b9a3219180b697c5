"""Anything that speaks the Gymnasium API: registered ids, and classes and functions of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

from envs import making
from envs.checks import article, flag_of, info_of, refusal, reward_of
from envs.env import Env, Place
from envs.errors import described, one_line, unknown
from envs.opengl import choose_renderer, close_before_exit
from envs.tasks import suggestions
from envs.trees import flatten, flatten_space, modern, nest
from envs.user_modules import import_user_module
from envs.wrappers import ActionRepeat, flags, is_kept
from modalities import kind_of, told
from modalities.image.space import too_small
from specs import tagged
from tools import UserError

# Pictures are drawn into memory: without this, pygame looks for a display and complains.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

# Start of an id, as a regular expression -> (module that registers it when imported, what pip installs for it).
REGISTERED_BY = {
    r"ALE/|\w+(NoFrameskip|Deterministic)-v\d": ("ale_py", "-r requirements/atari.txt"),
    "MiniGrid-": ("minigrid", "-r requirements/minigrid.txt"),
    "BabyAI-": ("minigrid", "-r requirements/minigrid.txt"),
}

# Gymnasium's own families, as their modules are called -> what pip installs for them.
PACKAGES = {
    "box2d": "-r requirements/box2d.txt",
    "mujoco": "-r requirements/dmc.txt",
    "classic_control": "-r requirements.txt",
    "toy_text": "-r requirements.txt",
}
MISSING = (gymnasium.error.DependencyNotInstalled, ImportError)

TAKEN = {*flags(), "deter", "stoch", "file"}  # keys beside those of the environment


def make(task: str, config: Any, place: Place) -> Env:
    """Make the environment that Gymnasium registers as `task`. Raises UserError if it cannot be made."""
    asked = f"gym_{task}"
    for prefix, (module, packages) in REGISTERED_BY.items():
        if re.match(prefix, task):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UserError(f"{asked} cannot be made ({one_line(error)}): pip install {packages}") from error
    module, _, name = task.rpartition(":")
    if module:
        import_user_module(module, asked)
    try:
        spec = gymnasium.spec(name)
        entry = spec.entry_point
        creator = entry if callable(entry) else load_env_creator(entry)
    except (gymnasium.error.Error, ImportError, AttributeError) as error:
        if name not in gymnasium.registry:
            raise unknown_id(name) from error
        for family, packages in PACKAGES.items():
            if isinstance(error, MISSING) and family in str(entry):
                why = f"its packages are not installed ({family})"
                raise UserError(f"{asked} cannot be made: {why}: pip install {packages}") from error
        raise UserError(f"{asked} cannot be made: {one_line(error)}") from error
    mujoco = "mujoco" in str(entry).lower()
    given = config.env.to_dict()
    limit = {"max_episode_steps": given.pop("max_episode_steps")} if "max_episode_steps" in given else {}
    kwargs = making.fitting(creator, given, asked, spec.kwargs)
    if mujoco and "render_mode" not in given and not choose_renderer():
        kwargs.pop("render_mode", None)  # MuJoCo without OpenGL may end the process
    try:
        env = gymnasium.make(name, disable_env_checker=True, **limit, **kwargs)
    except gymnasium.error.Error as error:
        raise UserError(f"{asked} cannot be made: {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{asked} cannot be made: {described(error)}") from error
    env = FromGym(making.wrap(env, config.wrappers), place.seed, config)
    if mujoco:
        close_before_exit(env)
    if task.startswith(("MiniGrid-", "BabyAI-")):
        refuse_symbols(task, env, config)
    return ActionRepeat(env, config.action_repeat)


def make_custom(task: str, config: Any, place: Place) -> Env:
    """Make what the class or function gives that `task`, `package.module:Class`, names. UserError if there is none."""
    asked = f"custom_{task}"
    if not all(task.rpartition(":")):
        raise UserError(f"{asked} must look like custom_package.module:Class")
    maker = making.load(task, asked)
    env = making.make(maker, making.fitting(maker, config.env.to_dict(), asked), asked)
    env = FromGym(making.wrap(env, config.wrappers), place.seed, config)
    return ActionRepeat(env, config.action_repeat)


def unknown_id(name: str) -> UserError:
    """Return the error to raise for an id that Gymnasium does not know."""
    meant = next((other for other in suggestions(name) if other != f"gym_{name}"), "")
    return unknown("gym task", name, gymnasium.registry, meant.removeprefix("gym_"))


def refuse_symbols(task: str, env: Env, config: Any) -> None:
    """Raise UserError if the encoder takes the grid of a MiniGrid task, which are symbols, for an image."""
    own = f"minigrid_{task.removeprefix('MiniGrid-')} is this task with pictures"
    for key, space in env.obs_space.items():
        is_read = is_kept(config.encoder, key, "vector")
        if too_small(space, config) and not is_read and is_kept(config.encoder, key, "image"):
            cure = f"--encoder.mlp_keys '{key}|direction' takes it as numbers"
            raise UserError(f"gym_{task} has symbols in '{key}' {space.shape}, which are no image: {own}; or {cure}")


class FromGym:
    """A Gymnasium environment (or what quacks like one) with dicts for observations and actions.

    Nested dict and tuple spaces are flattened, their keys and places joined by "/". A bare observation is
    called `image`, `text` or `state`, the places of a bare tuple `state/0`, `state/1`, and a bare action `action`.
    `metadata["modalities"]` may say of which kind an observation is that its space does not tell, {"sound": "audio"},
    and `metadata["optional"]` list those of a dict that may be missing, or None, in some steps.
    Numbers of a dict of observations whose names begin with `log_`, and those of info that `config.log_info`
    names, are for the logger alone.
    Raises UserError where the environment does not follow the Gymnasium API.
    """

    def __init__(self, env: Any, seed: int, config: Any = None):
        check_interface(env)
        self._env = env
        self._seed = seed
        self._task = config.task if config else self._name
        self._infos = tuple(config.log_info) if config else ()
        self._missing = set(self._infos)  # those that no info has had yet
        self._space = modern(env.observation_space, f"{self._name}.observation_space")
        self._actions = modern(env.action_space, f"{self._name}.action_space")
        kind = kind_of(self._space, config)
        self._bare = kind if kind in ("image", "text") else "state"
        obs_space = flatten_space(self._space, self._bare)
        self.act_space = flatten_space(self._actions, "action")
        self._logs = [key for key in obs_space if key.startswith("log_")]
        obs_space = {key: space for key, space in obs_space.items() if key not in self._logs}
        self.obs_space, self._optional = self._told(obs_space)
        clash = {key for key in self.obs_space if is_taken(key) or key in (*self.act_space, "action")}
        clash |= {key for key in self.act_space if is_taken(key)}
        if clash:
            raise UserError(f"{self._name} must call its observations and actions something else than {sorted(clash)}")
        self._closed = False
        self._steps = 0
        self._size: tuple[int, int] | None = None  # of pictures

    def reset(self):
        self._steps = 0
        result = self._env.reset(seed=self._seed)
        self._seed = None  # later episodes go on in the same stream
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise UserError(f"{self._name}.reset must return (observation, info), as Gymnasium has it")
        return self._entries(*result, flags(is_first=True))

    def step(self, action):
        self._steps += 1
        result = self._env.step(nest(self._actions, action, "action"))
        if not (isinstance(result, tuple) and len(result) == 5):
            wanted = "(observation, reward, terminated, truncated, info)"
            raise UserError(f"{self._name}.step must return {wanted}, as Gymnasium has it")
        obs, reward, terminated, truncated, info = result
        try:
            reward = reward_of(reward)
            terminated, truncated = flag_of("terminated", terminated), flag_of("truncated", truncated)
            info = info_of(info)
        except ValueError as error:
            raise refusal(self._task, self._steps, str(error)) from None
        ends = flags(reward, is_last=terminated or truncated, is_terminal=terminated)
        entries = self._entries(obs, info, ends)
        if ends["is_last"] and self._missing:
            there = ", ".join(sorted(map(str, info))) or "nothing"
            raise UserError(f"--log_info {min(self._missing)}: no info of an episode had it, the last has {there}")
        return entries

    def render(self, size=None):  # drawn as large as the environment likes
        try:
            image = self._env.render()
        except Exception as error:  # a run goes on without its pictures
            raise UserError(f"{self._name} cannot be rendered: {one_line(error)}") from error
        if not isinstance(image, np.ndarray):
            raise UserError(f"{self._name} cannot be rendered: it has no render mode rgb_array")
        shape = image.shape
        if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
            image = np.ascontiguousarray(image.transpose(1, 2, 0))  # channels first
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            found = f"{image.dtype} {shape}"
            raise UserError(f"{self._name} cannot be rendered: expected uint8 (H, W, 3), got {found}")
        self._size = self._size or image.shape[:2]
        return image if image.shape[:2] == self._size else resized(image, self._size)

    def close(self):
        if not self._closed and hasattr(self._env, "close"):
            self._env.close()
        self._closed = True

    @property
    def safe_action(self):
        """Return {key: array} of what the environment calls safe, None if it names nothing."""
        own = getattr(self._env, "safe_action", getattr(getattr(self._env, "unwrapped", None), "safe_action", None))
        return None if own is None else flatten(self._actions, own, "action")

    @property
    def _name(self):
        return type(getattr(self._env, "unwrapped", self._env)).__name__

    def _told(self, obs_space):
        """Return the spaces as the environment's metadata tag them, and the keys that may be missing."""
        metadata = getattr(self._env, "metadata", None)
        metadata = metadata if isinstance(metadata, Mapping) else {}
        kinds, optional = metadata.get("modalities", {}), metadata.get("optional", ())
        where = f"{self._name}.metadata"
        if not isinstance(kinds, Mapping) or not isinstance(optional, (list, tuple)):
            raise UserError(f"{where} must have a dict for modalities, and a list for optional")
        obs_space = told(obs_space, kinds, f"{where}['modalities'] ")
        for key in optional:
            if key not in obs_space or not isinstance(self._space, gymnasium.spaces.Dict):
                raise UserError(f"{where}['optional'] {key}: there is no such observation in a dict of them")
        return obs_space | {key: tagged(obs_space[key], optional=True) for key in optional}, tuple(optional)

    def _entries(self, obs, info, ends):
        """Return the dict of a step: observations, what is logged, reward and flags."""
        if self._optional and isinstance(obs, Mapping):
            obs = {**dict.fromkeys(self._optional), **obs}
        try:
            leaves = flatten(self._space, obs, self._bare)
            if self._logs:
                leaves |= {key: number_of(f"observation '{key}'", leaves[key]) for key in self._logs}
            if self._infos:
                there = [key for key in self._infos if key in info]
                self._missing.difference_update(there)
                leaves |= {f"log_{key}": number_of(f"info['{key}']", info[key]) for key in there}
        except ValueError as error:
            raise refusal(self._task, self._steps, str(error)) from None
        leaves.update(ends)
        return leaves


def check_interface(env: Any) -> None:
    """Raise UserError unless an object has the methods and attributes of a Gymnasium environment for one agent."""
    name = type(env).__name__
    if hasattr(env, "num_envs"):
        cure = "make a single one, and have several by --envs"
        raise UserError(f"{name} is a vectorized environment of {env.num_envs}: {cure}")
    if hasattr(env, "possible_agents"):
        raise UserError(
            f"{name} is an environment of several agents (PettingZoo): make one that a single agent acts in"
        )
    for attribute in ("observation_space", "action_space", "reset", "step"):
        if not hasattr(env, attribute):
            raise UserError(f"{name} is no Gymnasium environment: it has no '{attribute}'")
    parameters = inspect.signature(env.reset).parameters.values()
    if not any(p.name == "seed" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise UserError(f"{name}.reset must take a seed: reset(*, seed=None, options=None)")


def is_taken(key: str) -> bool:
    """True if a key means something else in a stored step or its file, or can name no folder."""
    return key in TAKEN or key.startswith(("log_", "/")) or ".." in key.split("/")


def number_of(what: str, value: Any) -> np.float32:
    """Return what is to be logged as a number; raise ValueError if it is none. what: it is, for the message."""
    if np.size(value) != 1 or np.asarray(value).dtype.kind not in "biuf":
        raise ValueError(f"{what} is {article(value)}, and only numbers are logged")
    return np.float32(np.asarray(value).item())


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a picture in the (H, W) of those before it: a film has one size."""
    from modalities.image.space import import_cv2

    return import_cv2().resize(image, size[::-1])
