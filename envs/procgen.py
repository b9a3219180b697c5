"""Procgen: sixteen games with generated levels (Cobbe et al. 2019, arXiv:1912.01588)."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import unknown
from envs.wrappers import ActionRepeat, flags

# Game -> steps after which a level is cut off.
TIMEOUTS = {
    "bigfish": 6000,
    "bossfight": 4000,
    "caveflyer": 1000,
    "chaser": 1000,
    "climber": 1000,
    "coinrun": 1000,
    "dodgeball": 1000,
    "fruitbot": 1000,
    "heist": 1000,
    "jumper": 1000,
    "leaper": 500,
    "maze": 500,
    "miner": 1000,
    "ninja": 1000,
    "plunder": 4000,
    "starpilot": 1000,
}
NATIVE_SIZE, DRAWN_SIZE = (64, 64), (512, 512)
ANOTHER_LEVEL = np.array([-1])  # an action


def make(task: str, config: Any, place: Place) -> Env:
    """Make a game by its name.

    Images of 64 by 64 are the game's own. Those of any other `config.size` come from its large drawings for
    people, which has more detail and takes longer.

    Args:
      config: `procgen` has `distribution` ("easy" or "hard"), `levels` (how many there are, 0 for no end) and
        `start_level` (the seed of the first, where they are counted). Evaluation plays the same levels.
    Raises: UserError for an unknown game.
    """
    if task not in TIMEOUTS:
        raise unknown("procgen game", task, TIMEOUTS)
    drawn = tuple(config.size) != NATIVE_SIZE
    game = _import_procgen().ProcgenGym3Env(
        num=1,
        env_name=task,
        distribution_mode=config.procgen.distribution,
        num_levels=config.procgen.levels,
        start_level=config.procgen.start_level,
        rand_seed=place.seed,
        num_threads=0,
        render_mode="rgb_array" if drawn else None,
    )
    return ActionRepeat(Procgen(game, TIMEOUTS[task], drawn), config.action_repeat)


class Procgen:
    """A game from gym3, one level an episode.

    The game shows the next level in place of how the last one ended, so the last observation of an episode has
    the image of the one before. Nor does it tell time-outs from deaths: an end at the step where time runs out
    is a time-out unless the level was completed there.
    """

    def __init__(self, game: Any, timeout: int, drawn: bool):
        self._game = game
        self._timeout = timeout
        self._drawn = drawn
        self._new_level = True  # the game shows the start of a level that no episode has shown
        self.obs_space = {"image": spaces.Box(0, 255, (*(DRAWN_SIZE if drawn else NATIVE_SIZE), 3), np.uint8)}
        self.act_space = {"action": spaces.Discrete(15)}

    def reset(self):
        if not self._new_level:
            self._game.act(ANOTHER_LEVEL)
        _, obs, _ = self._game.observe()
        self._look(obs)
        self._new_level = False
        self._steps = 0
        return {"image": self._image, **flags(is_first=True)}

    def step(self, action):
        self._game.act(np.array([action["action"]]))
        (reward,), obs, (self._new_level,) = self._game.observe()
        self._steps += 1
        if not self._new_level:
            self._look(obs)
            return {"image": self._image, **flags(reward)}
        completed = self._game.get_info()[0]["prev_level_complete"]
        terminal = completed or self._steps < self._timeout
        return {"image": self._image, **flags(reward, is_last=True, is_terminal=terminal)}

    def render(self, size=None):
        return self._image

    def close(self):
        self._game.close()

    def _look(self, obs):
        self._image = self._game.get_info()[0]["rgb"] if self._drawn else obs["rgb"][0]


def _import_procgen():
    """Import procgen, kept from registering its games with gym, a package that nothing else in it needs."""
    registration = types.ModuleType("procgen.gym_registration")
    registration.register_environments = lambda: None
    sys.modules.setdefault(registration.__name__, registration)
    import procgen

    return procgen
