"""Environments: `make_env` for one, `make_envs` for many that step together.

A task is `suite_name`: `dmc_walker_walk`, `gym_CartPole-v1`, `custom_package.module:Class`, `dummy_multi`.
"""

import functools
import importlib
from typing import Protocol

import numpy as np
from gymnasium import spaces

from envs import wrappers
from envs.errors import one_line, unknown
from envs.parallel import Envs, Local, Worker
from tools import UserError, derive_seed

# suite -> (module, the function in it that makes a task, what pip installs for it).
# Nothing is imported before its suite is asked for.
SUITES = {
    "atari": ("envs.atari", "make", "ale-py==0.12.1"),
    "atari100k": ("envs.atari", "make", "ale-py==0.12.1"),
    "bsuite": ("envs.bsuite", "make", "bsuite==0.3.6"),
    "crafter": ("envs.crafter", "make", "crafter==1.8.3"),
    "custom": ("envs.from_gym", "make_custom", "gymnasium"),
    "dmc": ("envs.dmc", "make", "dm_control==1.0.50 mujoco==3.17.0"),
    "dmlab": ("envs.dmlab", "make", "the wheel that https://github.com/google-deepmind/lab builds"),
    "dummy": ("envs.dummy", "make", "gymnasium"),
    "gym": ("envs.from_gym", "make", "gymnasium"),
    "memorymaze": ("envs.memorymaze", "make", "memory-maze==1.0.3 dm_control==1.0.50 mujoco==3.17.0"),
    "minecraft": ("envs.minecraft", "make", "minerl==0.4.4, which needs a Java 8 JDK"),
    "minigrid": ("envs.minigrid", "make", "minigrid==3.2.0"),
    "popgym": ("envs.popgym", "make", "popgym==1.0.7"),
    "procgen": ("envs.procgen", "make", "--no-deps -r requirements/procgen.txt"),
}

MODES = {"train": 1, "eval": 2}


class Env(Protocol):
    """What the rest of the project may expect of an environment.

    Observations are dicts with the keys of `obs_space` and `reward` (float32), `is_first`, `is_last` (the
    episode ended, for whatever reason), `is_terminal` (it ended in a state without a future: never by a
    time-out), and perhaps scalars named `log_*` that are for the logger alone. After a last observation only
    `reset` makes sense. The dict and its arrays are the caller's: nothing that is done later changes them.

    Attributes:
      obs_space: images `Box(0, 255, (H, W, C), uint8)`, vectors `Box((n,), float32)`, `Discrete(n)` (an int32
        scalar in 0..n-1) and `MultiDiscrete(nvec)` (int32 (n,)).
      act_space: `Box(-1, 1, (n,), float32)`, `Discrete(n)` or `MultiDiscrete(nvec)`; key `action` unless the
        environment has a dict of actions.
    """

    obs_space: dict[str, spaces.Space]
    act_space: dict[str, spaces.Space]

    def reset(self) -> dict:
        """Start an episode: its first observation, reward 0."""

    def step(self, action: dict[str, np.ndarray]) -> dict:
        """Act. Each action is float32: (n,) clipped to [-1, 1], or one-hots of width n or sum(nvec)."""

    def render(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """A picture (H, W, 3) uint8 for people. Raises UserError where there is none.

        size: the (H, W) wished for; an environment that cannot choose draws at its own, as all do without it.
        """

    def close(self) -> None:
        """Free what is held; may be called twice."""


def make_env(config, mode: str, index: int, behind: int = 0, restart: int = 0) -> Env:
    """One environment.

    Args:
      config: `task`, `seed`, `size` [H, W] of images, `action_repeat`, `time_limit` (environment frames, 0
        for the environment's own limit alone), `frame_stack` (images in one; 1 for each alone),
        `encoder.cnn_keys` and `encoder.mlp_keys`; for dmc also
        `camera` (-1 for the task's usual one).
      mode: "train" or "eval": their environments never share a seed.
      index: its place among the environments of its mode.
      behind: agent steps that the run has behind it, so that it goes on in other episodes than it began with.
      restart: how many went before it at this place: each has another seed.
    Raises: UserError for an unknown suite or task, a missing package, an unsupported space, or when no
      observation is left.
    """
    suite, _, task = config.task.partition("_")
    if suite not in SUITES:
        raise UserError(
            f"{unknown('suite', suite, SUITES)} (a task is suite_name, with suite one of {', '.join(SUITES)})"
        )
    module, make, packages = SUITES[suite]
    try:
        seed = derive_seed(config.seed, MODES[mode], index, *([behind, restart] if behind or restart else []))
        env = getattr(importlib.import_module(module), make)(task, config, seed)
    except ImportError as error:
        raise UserError(f"task '{config.task}' cannot be made ({one_line(error)}): pip install {packages}") from error
    env = wrappers.SelectKeys(env, config.encoder)
    env = wrappers.Resize(env, config.size)  # before images are copied
    env = wrappers.PlainObs(env)
    if config.frame_stack > 1:
        env = wrappers.FrameStack(env, config.frame_stack)
    env = wrappers.PlainActions(env)
    if config.time_limit > 0:
        env = wrappers.TimeLimit(env, max(1, config.time_limit // config.action_repeat))
    return env


def make_envs(config, mode: str, count: int, behind: int = 0) -> Envs:
    """`count` environments of a mode that step together, each in its own process if `config.parallel`.

    A process that does not answer a step within `config.env_timeout` seconds is restarted. `behind`: see `make_env`.
    """
    kind = Worker if config.parallel else Local
    makers = [functools.partial(make_env, config, mode, index, behind) for index in range(count)]
    return Envs(kind, makers, config.env_timeout)
