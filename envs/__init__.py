"""Environments: `make_env` for one, `make_envs` for many that step together.

A task is `suite_name`: `dmc_walker_walk`, `gym_CartPole-v1`, `custom_package.module:Class`, `dummy_multi`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from envs import wrappers
from envs.checks import Checked
from envs.env import Env, Place
from envs.errors import one_line
from envs.parallel import Envs, Local, Worker
from envs.spaces import describe
from envs.tasks import SUITES, split_task
from tools import UserError, derive_seed

# suite -> where its limit of an episode stands in the configuration, in frames
LIMITS = {"atari": ("atari", "limit"), "atari100k": ("atari", "limit"), "minecraft": ("minecraft", "length")}
OPEN = "gym", "custom"  # suites whose environments take arguments and wrappers
MODES = {"train": 1, "eval": 2}
ENDLESS = 10000  # agent steps, where no limit is known


def make_env(config: Any, mode: str, index: int, behind: int = 0, restart: int = 0) -> Env:
    """Make one environment.

    Args:
      config: `task`, `seed`, `size` [H, W] of images, `action_repeat`, `time_limit` (environment frames, 0
        for the environment's own limit alone), `frame_stack` (images in one; 1 for each alone),
        `image_layout` (where images have their channels), `encoder.cnn_keys` and `encoder.mlp_keys`; for gym and
        custom also `env` (arguments), `wrappers` and `log_info`, for dmc `camera` (-1 for the task's usual one), for
        bsuite `logdir`; other suites have a section of their own.
      mode: "train" or "eval": their environments never share a seed.
      index: which of the environments of its mode, from 0.
      behind: agent steps that the run has behind it, so that it goes on in other episodes than it began with.
      restart: how many environments this one follows that failed: each has another seed.
    Raises: UserError for an unknown suite or task, a missing package, an unsupported space, or when no
      observation is left.
    """
    suite, task = split_task(config.task)
    check_options(config, suite)
    module, make, packages = SUITES[suite]
    later = [behind, restart] if behind or restart else []
    place = Place(mode, index, derive_seed(config.seed, MODES[mode], index, *later))
    try:
        env = getattr(importlib.import_module(module), make)(task, config, place)
    except ImportError as error:
        raise UserError(f"task '{config.task}' cannot be made ({one_line(error)}): pip install {packages}") from error
    env = wrappers.SelectKeys(env, config)
    env = Checked(env, config, f"{config.task} ({mode} environment {index})")
    given = {"observation": env.obs_space, "action": env.act_space}
    env = wrappers.PlainObs(env, config)
    env = wrappers.PlainActions(env)
    env.own = {name: {key: describe(space) for key, space in each.items()} for name, each in given.items()}
    env.safe = env.safe_action if getattr(config, "collect", "sync") == "async" else None  # others may mean else by it
    if config.time_limit > 0:
        env = wrappers.TimeLimit(env, max(1, config.time_limit // config.action_repeat))
    return env


def check_options(config: Any, suite: str, meant: Callable[[str], str] = lambda name: "") -> None:
    """Raise UserError if the user gave options that environments of a suite do not have.

    meant: function of the name of an argument that returns the key for which it may have been taken, or nothing.
    """
    takers = {"env": OPEN, "wrappers": OPEN, "log_info": (*OPEN, "minigrid", "popgym")}
    for key in sorted(getattr(config, "explicit", ())):
        suites = takers.get(key.partition(".")[0], (suite,))
        if suite not in suites and config[key] not in ((), {}):
            hint = meant(key.removeprefix("env.")) if key.startswith("env.") else ""
            said = f"--{key} is for {', '.join(f'{name}_' for name in suites)} tasks, not for {suite}_"
            raise UserError(said + (f": did you mean --{hint}?" if hint else ""))


def make_envs(config: Any, mode: str, count: int, behind: int = 0, first: int = 0) -> Envs:
    """Make `count` environments of a mode that step together, each in its own process if `config.parallel`.

    A process that does not answer a step within `config.env_timeout` seconds is restarted. `behind`: see `make_env`.
    `first`: index of the first of them, where other ranks have those before it.
    """
    kind = Worker if config.parallel else Local
    makers = [functools.partial(make_env, config, mode, first + index, behind) for index in range(count)]
    return Envs(kind, makers, config.env_timeout, longest_episode(config))


def longest_episode(config: Any) -> int:
    """Return the agent steps after which an episode can be taken for one that never ends."""
    section, key = LIMITS.get(config.task.partition("_")[0], (None, None))
    frames = config.time_limit or (
        getattr(getattr(config, section), key) if section else ENDLESS * config.action_repeat
    )
    return max(1, frames // config.action_repeat)
