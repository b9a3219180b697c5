"""Memory Maze (Pasukonis et al. 2023): find the objects of a maze again and again, in the order that is asked for."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.dmc import RENDER_SIZE
from envs.env import Env, Place
from envs.errors import one_line, unknown
from envs.opengl import NO_RENDERER, choose_renderer, close_before_exit, import_suite
from envs.wrappers import ActionRepeat, flags
from tools import UserError

TASKS = ("9x9", "11x11", "13x13", "15x15")
PIXELS = 64  # of the published task; smaller ones have no room for the border that shows the color asked for
CAMERA = "walker/egocentric"


def make(task: str, config: Any, place: Place) -> Env:
    """Make `9x9`, `11x11`, `13x13` or `15x15`: mazes of 1000, 2000, 3000 and 4000 steps, whose end is a time-out.

    Raises UserError for another name, or if OpenGL is missing.
    """
    if task not in TASKS:
        raise unknown("memorymaze task", task, TASKS)
    if not choose_renderer():
        raise UserError(NO_RENDERER)
    import_suite()  # says in one line where MUJOCO_GL names what does not work
    pixels = max(PIXELS, *config.size)
    env = load(task, seed=place.seed, image_only_obs=True, camera_resolution=pixels)
    return ActionRepeat(MemoryMaze(env, pixels), config.action_repeat)


def load(task: str, **settings: Any) -> Any:
    """Load the package's maze of a size, such as `9x9`, whose walls' pictures are there once.

    The package has a copy of the eight for each of ten parts of a maze. All of them are decoded, and drawn smaller and
    smaller for the renderer, whenever a maze is made: at every reset.
    """
    tasks = _import_tasks()
    arena = tasks.MazeWithTargetsArena

    def shared(wall_textures: dict, **options: Any) -> Any:
        parts = {part: textures for part, textures in wall_textures.items() if part.isdigit()}
        return arena(wall_textures=wall_textures | dict.fromkeys(parts, parts["0"]), **options)

    tasks.MazeWithTargetsArena = shared
    try:
        return getattr(tasks, f"memory_maze_{task}")(**settings)
    finally:
        tasks.MazeWithTargetsArena = arena


class MemoryMaze:
    """Memory Maze as published: `image` through the agent's eyes, 6 actions, reward 1 for each object found."""

    def __init__(self, env: Any, pixels: int):
        self._env = env
        # Every frame is resolved from the whole offscreen buffer, as in envs.dmc.
        view = getattr(env.task.root_entity.mjcf_model.visual, "global")
        view.offheight, view.offwidth = (max(pixels, side) for side in RENDER_SIZE)
        self.obs_space = {"image": spaces.Box(0, 255, (pixels, pixels, 3), np.uint8)}
        self.act_space = {"action": spaces.Discrete(env.action_spec().num_values)}
        close_before_exit(self)

    def reset(self):
        import mujoco

        try:  # a new maze is a new model with an OpenGL context of its own
            return self._observe(self._env.reset())
        except (mujoco.FatalError, RuntimeError) as error:
            raise UserError(f"Memory Maze cannot be drawn: {one_line(error)}") from error

    def step(self, action):
        return self._observe(self._env.step(action["action"]))

    def render(self, size=None):  # drawn at one size
        image = self._env.physics.render(*RENDER_SIZE, camera_id=CAMERA)
        framed = np.full_like(image, self._color)
        border = 2 * RENDER_SIZE[0] // PIXELS
        framed[border:-border, border:-border] = image[border:-border, border:-border]
        return framed

    def close(self):
        if self._env is not None:
            self._env.close()
        self._env = None

    def _observe(self, timestep):
        image = timestep.observation
        self._color = image[0, 0].copy()  # the border's: of the object to find
        terminal = timestep.last() and timestep.discount == 0
        ends = flags(timestep.reward or 0, timestep.first(), timestep.last(), terminal)
        return {"image": image, **ends}


def _import_tasks():
    """Import the package's tasks. They import `gym`, of which they use only names that gymnasium has as well."""
    names = [] if "gym" in sys.modules else ["gym", "gym.envs", "gym.envs.registration"]
    for name in names:
        sys.modules[name] = sys.modules[name.replace("gym", "gymnasium", 1)]
    try:
        from memory_maze import tasks
    finally:
        for name in names:
            del sys.modules[name]
    logging.getLogger("absl").addFilter(_worth_saying)
    return tasks


def _worth_saying(record):
    """False for what dm_control says at every reset: the walker, a ball on joints, has no velocity to set."""
    return "no free joint" not in record.getMessage()
