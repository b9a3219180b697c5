"""DeepMind Lab: the 30 levels of DMLab-30 and the 12 that came with the first release (arXiv:1612.03801)."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import unknown
from envs.wrappers import flags, is_kept

CORE = (
    "lt_chasm",
    "lt_hallway_slope",
    "lt_horseshoe_color",
    "lt_space_bounce_hard",
    "nav_maze_random_goal_01",
    "nav_maze_random_goal_02",
    "nav_maze_random_goal_03",
    "nav_maze_static_01",
    "nav_maze_static_02",
    "nav_maze_static_03",
    "seekavoid_arena_01",
    "stairway_to_melon",
)
DMLAB30 = (
    "explore_goal_locations_large",
    "explore_goal_locations_small",
    "explore_object_locations_large",
    "explore_object_locations_small",
    "explore_object_rewards_few",
    "explore_object_rewards_many",
    "explore_obstructed_goals_large",
    "explore_obstructed_goals_small",
    "language_answer_quantitative_question",
    "language_execute_random_task",
    "language_select_described_object",
    "language_select_located_object",
    "lasertag_one_opponent_large",
    "lasertag_one_opponent_small",
    "lasertag_three_opponents_large",
    "lasertag_three_opponents_small",
    "natlab_fixed_large_map",
    "natlab_varying_map_randomized",
    "natlab_varying_map_regrowth",
    "psychlab_arbitrary_visuomotor_mapping",
    "psychlab_continuous_recognition",
    "psychlab_sequential_comparison",
    "psychlab_visual_search",
    "rooms_collect_good_objects_train",
    "rooms_exploit_deferred_effects_train",
    "rooms_keys_doors_puzzle",
    "rooms_select_nonmatching_object",
    "rooms_watermaze",
    "skymaze_irreversible_path_hard",
    "skymaze_irreversible_path_varied",
)

INSTRUCTION = "INSTR"  # the observation of the levels whose names begin with language_
LONGEST = 1024  # characters of it

# What IMPALA (arXiv:1802.01561) tests under: what levels hold out of training, in an order of their own.
HELD_OUT = {"allowHoldOutLevels": "true", "mixerSeed": str(0x600D5EED)}

# Look left/right and down/up in pixels per frame, strafe, move, fire, jump, crouch. The large set of PopArt
# (arXiv:1809.04474) and R2D2, which DreamerV3 uses; the nine actions of IMPALA cannot look up or down.
ACTIONS = np.array(
    [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, -1, 0, 0, 0],
        [0, 0, -1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [-10, 0, 0, 0, 0, 0, 0],
        [10, 0, 0, 0, 0, 0, 0],
        [-60, 0, 0, 0, 0, 0, 0],
        [60, 0, 0, 0, 0, 0, 0],
        [0, 10, 0, 0, 0, 0, 0],
        [0, -10, 0, 0, 0, 0, 0],
        [-10, 0, 0, 1, 0, 0, 0],
        [10, 0, 0, 1, 0, 0, 0],
        [-60, 0, 0, 1, 0, 0, 0],
        [60, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ],
    np.intc,
)


def levels() -> dict[str, tuple[str, dict]]:
    """Return {task: (its level script, its settings)}.

    With `_test` at its end (in the place of `_train` where there is one) a level of DMLab-30 plays the episodes
    that it holds out of training; two levels have a script of their own for that.
    """
    tasks = {name: (name, {}) for name in CORE}
    for name in DMLAB30:
        test = name.removesuffix("_train") + "_test"
        script = test if name.endswith("_train") else name
        tasks[name] = f"contributed/dmlab30/{name}", {}
        tasks[test] = f"contributed/dmlab30/{script}", HELD_OUT
    return tasks


def make(task: str, config: Any, place: Place) -> Env:
    """Make the level `task`, such as `explore_goal_locations_small`. Raises UserError for an unknown one."""
    tasks = levels()
    if task not in tasks:
        raise unknown("dmlab level", task, tasks)
    import deepmind_lab

    script, settings = tasks[task]
    height, width = config.size
    settings = {"height": str(height), "width": str(width), "logLevel": "WARN", **settings}
    told = task.startswith("language_") and is_kept(config.encoder, "instruction", "text")
    lab = deepmind_lab.Lab(script, ["RGB_INTERLEAVED", *[INSTRUCTION] * told], config=settings)
    return DMLab(lab, (height, width), config.action_repeat, np.random.default_rng(place.seed), told)


class DMLab:
    """A level, seen by its `image`, and by its `instruction` if one is told: in the language levels.

    Episodes end when the level's time is up: a time-out, never a terminal state. (The released code of DreamerV3
    calls it terminal, its option `episodic`.)
    """

    def __init__(self, lab: Any, size: tuple[int, int], repeat: int, rng: np.random.Generator, told: bool = False):
        self._lab = lab
        self._repeat = repeat
        self._rng = rng
        self._image = np.zeros((*size, 3), np.uint8)
        self.obs_space: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, self._image.shape, np.uint8)}
        self._told = {"instruction": ""} if told else {}
        if told:
            self.obs_space["instruction"] = spaces.Text(LONGEST, min_length=0)
        self.act_space = {"action": spaces.Discrete(len(ACTIONS))}

    def reset(self):
        self._lab.reset(seed=int(self._rng.integers(2**31)))
        return self._observe(is_first=True)

    def step(self, action):
        reward = self._lab.step(ACTIONS[action["action"]], num_steps=self._repeat)
        return self._observe(reward, is_last=not self._lab.is_running())

    def render(self, size=None):
        return self._image

    def close(self):
        if self._lab is not None:
            self._lab.close()
        self._lab = None

    def _observe(self, reward=0.0, is_first=False, is_last=False):
        if not is_last:  # a level that has ended shows nothing more: its last picture stays
            shown = self._lab.observations()
            self._image = shown["RGB_INTERLEAVED"]
            if self._told:
                words = shown[INSTRUCTION]
                self._told = {"instruction": words.decode(errors="replace") if isinstance(words, bytes) else str(words)}
        return {"image": self._image, **self._told, **flags(reward, is_first, is_last)}
