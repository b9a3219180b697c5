"""Anything that speaks the Gymnasium API: registered ids, and classes of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator

from envs.env import Env, Place
from envs.errors import one_line, unknown
from envs.opengl import choose_renderer, close_before_exit
from envs.wrappers import ActionRepeat, flags
from modalities import kind_of
from tools import UserError

# Pictures are drawn into memory: without this, pygame looks for a display and complains.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

# Start of an id -> (module that registers it when imported, what pip installs for it).
REGISTERED_BY = {
    "ALE/": ("ale_py", "ale-py==0.12.1"),
    "MiniGrid-": ("minigrid", "minigrid==3.2.0"),
    "BabyAI-": ("minigrid", "minigrid==3.2.0"),
}

PLAIN = spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary
TAKEN = {*flags(), "deter", "stoch", "file"}  # keys beside those of the environment


def make(task: str, config: Any, place: Place) -> Env:
    """Make the environment that Gymnasium registers as `task`. Raises UserError if it cannot be made."""
    for prefix, (module, packages) in REGISTERED_BY.items():
        if task.startswith(prefix):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UserError(f"gym_{task} cannot be made ({one_line(error)}): pip install {packages}") from error
    try:
        module, _, name = task.rpartition(":")
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).entry_point
        creator = entry if callable(entry) else load_env_creator(entry)
        draws = "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ())
        mujoco = "mujoco" in str(entry).lower()
        draws = draws and (not mujoco or choose_renderer())  # MuJoCo without OpenGL may end the process
        kwargs = {"render_mode": "rgb_array"} if draws else {}  # not every environment takes the argument
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        if isinstance(error, gymnasium.error.Error) and name not in gymnasium.registry:
            raise unknown("gym task", name, gymnasium.registry) from error
        raise UserError(f"gym_{task} cannot be made: {one_line(error)}") from error
    env = FromGym(env, place.seed)
    if mujoco:
        close_before_exit(env)
    return ActionRepeat(env, config.action_repeat)


def make_custom(task: str, config: Any, place: Place) -> Env:
    """Make an instance of the class that `task`, a `package.module:Class`, names. UserError if there is none."""
    module_name, colon, class_name = task.partition(":")
    if not (module_name and colon and class_name):
        raise UserError(f"custom_{task} must look like custom_package.module:Class")
    if os.getcwd() not in sys.path:  # a script finds what lies beside it, not what lies where it is called
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = f"it is looked for where the command is called, {os.getcwd()}, and on PYTHONPATH"
        raise UserError(f"custom_{task}: '{module_name}' cannot be imported: {one_line(error)}; {where}") from error
    classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
    if class_name not in classes:
        raise unknown(f"class in {module_name}", class_name, classes)
    make_instance = getattr(module, class_name)
    try:
        inspect.signature(make_instance).bind()
    except TypeError as error:
        raise UserError(f"custom_{task} must be made without arguments: {one_line(error)}") from error
    return ActionRepeat(FromGym(make_instance(), place.seed), config.action_repeat)


class FromGym:
    """A Gymnasium environment (or what quacks like one) with dicts for observations and actions.

    Nested dict and tuple spaces are flattened, their keys and places joined by "/". A bare observation is
    called `image` or `state`, the places of a bare tuple `state/0`, `state/1`, and a bare action `action`.
    Raises UserError where the environment does not follow the Gymnasium API.
    """

    def __init__(self, env: Any, seed: int):
        for name in ("observation_space", "action_space", "reset", "step"):
            if not hasattr(env, name):
                raise UserError(f"{type(env).__name__} is no Gymnasium environment: it has no '{name}'")
        parameters = inspect.signature(env.reset).parameters.values()
        if not any(p.name == "seed" or p.kind == p.VAR_KEYWORD for p in parameters):
            raise UserError(f"{type(env).__name__}.reset must take a seed: reset(*, seed=None, options=None)")
        self._env = env
        self._seed = seed
        self._bare = "image" if kind_of(env.observation_space) == "image" else "state"
        self.obs_space = _flatten(env.observation_space, env.observation_space, self._bare)
        self.act_space = _flatten(env.action_space, env.action_space, "action")
        clash = {key for key in self.obs_space if is_taken(key) or key in (*self.act_space, "action")}
        clash |= {key for key in self.act_space if is_taken(key)}
        if clash:
            raise UserError(f"{self._name} must call its observations and actions something else than {sorted(clash)}")
        self._closed = self._checked = False

    def reset(self):
        result = self._env.reset(seed=self._seed)
        self._seed = None  # later episodes go on in the same stream
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UserError(f"{self._name}.reset must return (observation, info), as Gymnasium has it")
        obs = self._observe(result[0])
        if not self._checked:
            self._check(obs)
        return {**obs, **flags(is_first=True)}

    def step(self, action):
        result = self._env.step(_nest(self._env.action_space, action, "action"))
        if not (isinstance(result, tuple) and len(result) == 5):
            wanted = "(observation, reward, terminated, truncated, info)"
            raise UserError(f"{self._name}.step must return {wanted}, as Gymnasium has it")
        obs, reward, terminated, truncated, _ = result
        ends = flags(np.asarray(reward).item(), is_last=terminated or truncated, is_terminal=terminated)
        return {**self._observe(obs), **ends}

    def render(self, size=None):  # drawn as large as the environment likes
        try:
            image = self._env.render()
        except Exception as error:  # a run goes on without its pictures
            raise UserError(f"{self._name} cannot be rendered: {one_line(error)}") from error
        if not isinstance(image, np.ndarray):
            raise UserError(f"{self._name} cannot be rendered: it has no render mode rgb_array")
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            found = f"{image.dtype} {image.shape}"
            raise UserError(f"{self._name} cannot be rendered: expected uint8 (H, W, 3), got {found}")
        return image

    def close(self):
        if not self._closed and hasattr(self._env, "close"):
            self._env.close()
        self._closed = True

    @property
    def _name(self):
        return type(getattr(self._env, "unwrapped", self._env)).__name__

    def _observe(self, obs):
        return _flatten(self._env.observation_space, obs, self._bare)

    def _check(self, obs):
        """Raise UserError if the first observation is not what its space promises."""
        self._checked = True
        for key, space in self.obs_space.items():
            if isinstance(space, PLAIN) and np.shape(obs[key]) != space.shape:
                found = f"shape {np.shape(obs[key])} where its space has {space.shape}"
                raise UserError(f"{self._name}.reset gave the observation '{key}' in {found}")


def is_taken(key: str) -> bool:
    """True if a key means something else in a stored step or its file, or can name no folder."""
    return key in TAKEN or key.startswith(("log_", "/")) or ".." in key.split("/")


def _flatten(space, tree, bare, path=""):
    """Return the leaves of a tree shaped like `space` (or of it) as one dict. Raises UserError if one is missing."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return {path or bare: tree}
    leaves = {}
    for name, below, child in _children(space, bare, path):
        try:
            leaves |= _flatten(child, tree[name], bare, below)
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"the observation '{below}' is in the environment's space and not in what it gives"
            ) from None
    return leaves


def _nest(space, leaves, bare, path=""):
    """Undo `_flatten`."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return leaves[path or bare]
    tree = {name: _nest(child, leaves, bare, below) for name, below, child in _children(space, bare, path)}
    return tree if isinstance(space, spaces.Dict) else tuple(tree.values())


def _children(space, bare, path):
    """Return (name or index, path, space) of each member of a dict or tuple at `path`."""
    if isinstance(space, spaces.Dict):
        return [(name, f"{path}/{name}" if path else str(name), child) for name, child in space.items()]
    return [(index, f"{path or bare}/{index}", child) for index, child in enumerate(space)]
