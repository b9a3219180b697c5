"""Crafter (Hafner 2022): survive, gather and build in a world made anew for every episode, seen from above."""

from __future__ import annotations

from typing import Any

import crafter
import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import unknown
from envs.wrappers import ActionRepeat, flags

RENDER_SIZE = (256, 256)
REWARDS = {"reward": True, "noreward": False}


def make(task: str, config: Any, place: Place) -> Env:
    """Make `reward`, or `noreward`, where what would have been the return is only logged. UserError for others."""
    if task not in REWARDS:
        raise unknown("crafter task", task, REWARDS)
    height, width = config.size
    env = Reproducible(size=(width, height), reward=REWARDS[task], seed=place.seed)
    return ActionRepeat(Crafter(env, REWARDS[task]), config.action_repeat)


class Crafter:
    """Crafter as published: `image`, 17 actions, 10000 steps; dying is terminal, running out of steps is not.

    Observations also count what the episode has achieved so far, `log_achievement_<name>` for 22 names. An
    episode has unlocked those that its last observation counts at least once: the Crafter score is made of the
    share of episodes that did. Without rewards `log_reward` is the sum so far of those that were withheld.
    """

    def __init__(self, env: crafter.Env, rewards: bool):
        self._env = env
        self._rewards = rewards
        width, height = env.observation_space.shape[:2]
        self.obs_space = {"image": spaces.Box(0, 255, (height, width, 3), np.uint8)}
        self.act_space = {"action": spaces.Discrete(env.action_space.n)}

    def reset(self):
        self._withheld = 0.0
        image = self._env.reset()
        return {"image": image, **self._log(dict.fromkeys(crafter.constants.achievements, 0)), **flags(is_first=True)}

    def step(self, action):
        image, reward, last, info = self._env.step(action["action"])
        self._withheld += info["reward"]
        ends = flags(reward, is_last=last, is_terminal=info["discount"] == 0)
        return {"image": image, **self._log(info["achievements"]), **ends}

    def render(self, size=None):
        height, width = size or RENDER_SIZE
        # At night pictures are noisy, and the noise comes from the generator that decides what happens next.
        random = self._env._world.random
        state = random.get_state()
        image = self._env.render((width, height))
        random.set_state(state)
        return image

    def close(self):
        pass

    def _log(self, achievements):
        counts = {f"log_achievement_{name}": np.float32(count) for name, count in achievements.items()}
        return counts if self._rewards else {**counts, "log_reward": np.float32(self._withheld)}


class Reproducible(crafter.Env):
    """The same episodes from the same seed.

    The package draws the creature that vanishes from a set, whose order changes from one process to the next.
    """

    def _balance_chunk(self, chunk, objs):
        super()._balance_chunk(chunk, sorted(objs, key=lambda obj: tuple(obj.pos)))
