"""The DeepMind Control Suite, from proprioception or from pixels."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import one_line, unknown
from envs.opengl import NO_RENDERER, choose_renderer, close_before_exit, import_suite
from envs.wrappers import flags, is_kept
from tools import UserError

ALIASES = {"cup_catch": "ball_in_cup_catch"}
CAMERAS = {"quadruped": 2}  # the first does not follow the body
RENDER_SIZE = (256, 256)
SHADOW_SIZE = 512  # instead of 2048: frames take six tenths of the time


def make(task: str, config: Any, place: Place) -> Env:
    """Make the suite's `domain_task`, such as `walker_walk`. Its `image` is drawn only if the encoder reads it.

    Raises: UserError for an unknown task or camera, or if pictures are wanted and OpenGL is missing.
    """
    image = is_kept(config.encoder, "image", "image")
    if not choose_renderer() and image:
        raise UserError(NO_RENDERER)
    suite = import_suite()
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
    task = ALIASES.get(task, task)
    if task not in tasks:
        raise unknown("dmc task", task, tasks)
    domain, name = tasks[task]
    env = suite.load(domain, name, task_kwargs={"random": place.seed})
    camera = CAMERAS.get(domain, 0) if config.camera == -1 else config.camera
    if not 0 <= camera < env.physics.model.ncam:
        raise UserError(f"dmc_{task} has cameras 0 to {env.physics.model.ncam - 1}, not {camera}")
    return DMC(env, config.action_repeat, camera, tuple(config.size) if image else None)


class DMC:
    """A dm_control environment. Its `image` is always offered, but there only if its `size` is given."""

    def __init__(self, env: Any, repeat: int, camera: int, size: tuple[int, int] | None = None):
        self._env = env
        self._repeat = repeat
        self._camera = camera
        self._size = size
        # Every frame is resolved from the whole offscreen buffer: the smallest that will do is the fastest
        # and gives the same pictures. A smaller map of shadows changes pixels by 0.03 of 255 on average.
        visual = env.physics.model.vis
        visual.global_.offheight, visual.global_.offwidth = size or RENDER_SIZE
        visual.quality.shadowsize = SHADOW_SIZE
        self.obs_space = {key: spaces.Box(-np.inf, np.inf, spec.shape) for key, spec in env.observation_spec().items()}
        self.obs_space["image"] = spaces.Box(0, 255, (*(size or RENDER_SIZE), 3), np.uint8)
        spec = env.action_spec()
        low, high = (np.broadcast_to(bound, spec.shape) for bound in (spec.minimum, spec.maximum))
        self.act_space = {"action": spaces.Box(low.astype(np.float32), high.astype(np.float32))}
        close_before_exit(self)

    def reset(self):
        return self._observe(self._env.reset(), 0.0)

    def step(self, action):
        reward = 0.0
        for _ in range(self._repeat):
            timestep = self._env.step(action["action"])
            reward += timestep.reward
            if timestep.last():
                break
        return self._observe(timestep, reward)

    def render(self, size=None):
        size = tuple(size or RENDER_SIZE)
        self._enlarge_buffer(size)
        return self._draw(size)

    def close(self):
        if self._env is not None:
            self._env.physics.free()
            self._env.close()
        self._env = None

    def _observe(self, timestep, reward):
        # dm_control says by the discount of the last step whether a state is terminal or time ran out.
        terminal = timestep.last() and timestep.discount == 0
        obs = {**timestep.observation, **flags(reward, timestep.first(), timestep.last(), terminal)}
        if self._size:
            obs["image"] = self._draw(self._size)
        return obs

    def _enlarge_buffer(self, size):
        physics = self._env.physics
        view = physics.model.vis.global_
        if size[0] > view.offheight or size[1] > view.offwidth:
            view.offheight, view.offwidth = np.maximum(size, (view.offheight, view.offwidth))
            if physics._contexts:  # of the old size; the next frame makes new ones
                physics._free_rendering_contexts()

    def _draw(self, size):
        import mujoco

        try:
            image = self._env.physics.render(*size, camera_id=self._camera)
        except (mujoco.FatalError, RuntimeError) as error:
            backend = os.environ.get("MUJOCO_GL", "unset")
            raise UserError(f"dm_control cannot render (MUJOCO_GL is {backend}): {one_line(error)}") from error
        return np.ascontiguousarray(image)  # OpenGL's rows run upwards
