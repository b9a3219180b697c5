"""The Behaviour Suite for reinforcement learning (Osband et al. 2020)."""

from __future__ import annotations

import pathlib
from typing import Any

import bsuite
import numpy as np
from bsuite import sweep
from bsuite.logging import csv_logging
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import one_line, unknown
from envs.wrappers import ActionRepeat, flags
from tools import UserError


def make(task: str, config: Any, place: Place) -> Env:
    """Make the suite's `name/number`, such as `catch/0`: experiments of 20 or so settings or seeds each.

    The first training environment is recorded as the suite does, for its own analysis to read:
    `logdir/bsuite/0/bsuite_id_-_catch-0.csv`, and after a resume or a restart, counted anew, `logdir/bsuite/1/`.
    The suite wants `sweep.EPISODES[task]` episodes. Raises UserError for an unknown task, or where the data
    that the mnist tasks download cannot be had.
    """
    if task not in sweep.SETTINGS:
        raise unknown("bsuite task", task, sweep.SWEEP)
    name, number = task.split(sweep.SEPARATOR)
    try:
        env = bsuite.load(name, sweep.SETTINGS[task])
    except OSError as error:
        raise UserError(f"bsuite_{task} downloads its data, which failed: {one_line(error)}") from error
    _seed(env, np.random.RandomState([place.seed, int(number)]))
    recorded = place.mode == "train" and place.number == 0
    folder = pathlib.Path(config.logdir).expanduser() / "bsuite" if recorded else None
    return ActionRepeat(BSuite(env, task, folder), config.action_repeat)


class BSuite:
    """One of the suite's environments, its array of numbers called `state`; recorded below `folder` if there is one."""

    def __init__(self, env: Any, task: str, folder: pathlib.Path | None = None):
        self._env, self._task, self._folder = env, task, folder
        self.obs_space = {"state": spaces.Box(-np.inf, np.inf, env.observation_spec().shape)}
        self.act_space = {"action": spaces.Discrete(env.action_spec().num_values)}

    def reset(self):
        if self._folder:  # not before it is played: a run that is refused leaves nothing behind
            self._env = csv_logging.wrap_environment(self._env, self._task, str(_new_folder(self._folder)))
            self._folder = None
        return self._observe(self._env.reset())

    def step(self, action):
        return self._observe(self._env.step(action["action"]))

    def render(self, size=None):
        raise UserError("bsuite environments cannot be rendered")

    def close(self):
        pass

    def _observe(self, timestep):
        terminal = timestep.last() and timestep.discount == 0
        ends = flags(timestep.reward or 0, timestep.first(), timestep.last(), terminal)
        return {"state": timestep.observation, **ends}


def _seed(env, rng):
    """Draw everything random from `rng`; settings leave the seed open, and not every experiment takes one.

    What a setting fixes by its `mapping_seed`, such as the arms of a bandit, is drawn already and stays.
    """
    while env is not None:
        env._rng = rng
        env = vars(env).get("_env")


def _new_folder(parent):
    """Return the first of parent/0, parent/1, ... that is not there yet."""
    number = 0
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)
