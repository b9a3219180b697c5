"""Environments small enough to check by hand, for tests and for a first run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import unknown
from envs.wrappers import ActionRepeat, flags


def make(task: str, config: Any, place: Place) -> Env:
    """Make `vector`, `discrete`, `pixels`, `multi`, a `maze`, a `pinpad`, or one of envs/dummy_told.py.

    Raises UserError for any other.
    """
    tasks = tasks_of(place.mode)
    if task not in tasks:
        raise unknown("dummy task", task, tasks)
    return ActionRepeat(tasks[task](np.random.default_rng(place.seed), tuple(config.size)), config.action_repeat)


def tasks_of(mode: str) -> dict[str, Callable]:
    """Return {task: what makes it of a generator and a size} for training or evaluation."""
    from envs.dummy_told import of_mode  # these two build on this file
    from envs.pinpad import PINPADS

    tasks = {"vector": Vector, "discrete": Corridor, "pixels": Pixels, "multi": Multi, **MAZES, **PINPADS}
    return tasks | of_mode(mode)


class Dummy:
    """Counts steps and says how an episode ends; a task fills in `_start`, `_act`, `_observe` and `_draw`.

    Attributes:
      length: steps after which time runs out.
    """

    length: int

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self._rng = rng
        self._size = size  # (H, W) of images

    def reset(self):
        self._steps = 0
        self._start()
        return {**self._observe(), **flags(is_first=True)}

    def step(self, action):
        self._steps += 1
        reward, terminal = self._act(action)
        last = terminal or self._steps >= self.length
        return {**self._observe(), **flags(reward, is_last=last, is_terminal=terminal)}

    def render(self, size=None):
        return self._draw(size or self._size)

    def close(self):
        pass

    def _square(self, size, x, y):
        """Draw a white square, an eighth of the picture wide, on black; (x, y) in [0, 1] is where it stands."""
        height, width = size
        high, wide = max(1, height // 8), max(1, width // 8)
        top, left = round(y * (height - high)), round(x * (width - wide))
        image = np.zeros((height, width, 3), np.uint8)
        image[top : top + high, left : left + wide] = 255
        return image


class Vector(Dummy):
    """Do what you see: `state` is a target (2,) and the time left; reward 1 - mean|action - target|."""

    length = 20

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {"state": spaces.Box(-1, 1, (3,))}
        self.act_space = {"action": spaces.Box(-1, 1, (2,))}

    def _start(self):
        self._target = self._rng.uniform(-1, 1, 2).astype(np.float32)

    def _act(self, action):
        reward = 1 - np.abs(action["action"] - self._target).mean()
        self._start()
        return reward, False

    def _observe(self):
        return {"state": np.append(self._target, np.float32(1 - self._steps / self.length))}

    def _draw(self, size):
        return self._square(size, *(self._target + 1) / 2)


class Corridor(Dummy):
    """Five cells in a row: begin in 0, go left (0) or right (1); reward 1 and a terminal state in cell 4."""

    length = 20

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {"position": spaces.Discrete(5)}
        self.act_space = {"action": spaces.Discrete(2)}

    def _start(self):
        self._position = 0

    def _act(self, action):
        self._position = max(0, self._position + (1 if action["action"] else -1))
        arrived = self._position == 4
        return float(arrived), arrived

    def _observe(self):
        return {"position": np.int32(self._position)}

    def _draw(self, size):
        return self._square(size, self._position / 4, 0.5)


class Pixels(Dummy):
    """A square in one of eight columns: go left (0), stay (1) or go right (2); reward 1 in the rightmost."""

    length = 16

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {"image": spaces.Box(0, 255, (*size, 3), np.uint8)}
        self.act_space = {"action": spaces.Discrete(3)}

    def _start(self):
        self._column = int(self._rng.integers(8))

    def _act(self, action):
        self._column = min(7, max(0, self._column + action["action"] - 1))
        return float(self._column == 7), False

    def _observe(self):
        return {"image": self._draw(self._size)}

    def _draw(self, size):
        return self._square(size, self._column / 7, 0.5)


class Multi(Dummy):
    """Every kind of observation and action at once.

    `move` (2,) pushes a point by a fifth of itself; `state` is where the point is, and `image` shows it. The
    episode ends, in a terminal state, when a coordinate reaches 1 or -1. `phase` counts 0, 1, 2, 0, ... and
    the reward is 1 if `mode` equals the phase that was seen, less the point's largest |coordinate|.
    """

    length = 12

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {
            "image": spaces.Box(0, 255, (*size, 3), np.uint8),
            "state": spaces.Box(-1, 1, (2,)),
            "phase": spaces.Discrete(3),
        }
        self.act_space = {"move": spaces.Box(-1, 1, (2,)), "mode": spaces.Discrete(3)}

    def _start(self):
        self._point = self._rng.uniform(-0.5, 0.5, 2).astype(np.float32)

    def _act(self, action):
        right = action["mode"] == (self._steps - 1) % 3
        self._point = np.clip(self._point + action["move"] / 5, -1, 1).astype(np.float32)
        far = np.abs(self._point).max()
        return float(right) - far, bool(far >= 1)

    def _observe(self):
        phase = np.int32(self._steps % 3)
        return {
            "image": self._draw(self._size),
            "state": self._point,
            "phase": phase,
            "log_steps": np.float32(self._steps),
        }

    def _draw(self, size):
        return self._square(size, *(self._point + 1) / 2)


MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))  # (down, right): up, right, down, left, stay


class Maze(Dummy):
    """Four rooms behind doors: go up, right, down or left, from one corner to the only reward, in the opposite one.

    `position` (2,) in [-1, 1] is where one stands. `log_cells` counts the distinct cells that this environment has
    ever seen visited, of `cells`: it tells how well somebody explores.

    Attributes:
      actions: the first so many of MOVES.
    """

    length = 60
    size = 19
    cells = 9 * 9 * 4 + 4
    actions = 4

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {"position": spaces.Box(-1, 1, (2,))}
        self.act_space = {"action": spaces.Discrete(self.actions)}
        middle, quarter = self.size // 2, self.size // 4
        self._free = np.ones((self.size, self.size), bool)
        self._free[middle] = self._free[:, middle] = False
        for door in (quarter, self.size - 1 - quarter):
            self._free[middle, door] = self._free[door, middle] = True
        self._seen = np.zeros_like(self._free)

    def move(self, place: tuple[int, int], action: int) -> tuple[int, int]:
        """Return the cell (row, column) where an action leads."""
        down, right = MOVES[action]
        row, column = place[0] + down, place[1] + right
        inside = min(row, column) >= 0 and max(row, column) < self.size
        return (row, column) if inside and self._free[row, column] else place

    def reachable(self, place: tuple[int, int], steps: int) -> int:
        """Return how many cells sequences of so many actions lead to; its logarithm is the empowerment of a cell."""
        ends = {place}
        for _ in range(steps):
            ends = {self.move(end, action) for end in ends for action in range(self.actions)}
        return len(ends)

    def _start(self):
        self._place = (0, 0)
        self._seen[self._place] = True

    def _act(self, action):
        self._place = self.move(self._place, int(action["action"]))
        self._seen[self._place] = True
        arrived = self._place == (self.size - 1, self.size - 1)
        return float(arrived), arrived

    def _observe(self):
        position = 2 * np.array(self._place, np.float32) / (self.size - 1) - 1
        return {"position": position, "log_cells": np.float32(self._seen.sum())}

    def _draw(self, size):
        walls = np.repeat(np.repeat(~self._free, 8, 0), 8, 1)[..., None] * np.uint8(90)
        image = np.tile(walls, 3)
        top, left = (8 * x for x in self._place)
        image[top : top + 8, left : left + 8] = 255
        return image


class FiveMaze(Maze):
    """The maze with a fifth action, to stay: a cell's empowerment is log 5, 4 or 3 by its open neighbors."""

    actions = 5


class NoisyTV(FiveMaze):
    """The maze with a television in a corner of the first room: `screen` (8,) shows noise there, and else zeros.

    What it shows cannot be predicted and tells nothing. `log_tv` is the share of all steps that were spent there.
    """

    television = (0, 8)

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space["screen"] = spaces.Box(-1, 1, (8,))
        self._screen, self._watched, self._all = self._noise(), 0, 0

    def _noise(self):
        return self._rng.uniform(-1, 1, 8).astype(np.float32)

    def _act(self, action):
        self._change(action["action"])
        result = super()._act(action)
        self._watched, self._all = self._watched + (self._place == self.television), self._all + 1
        return result

    def _change(self, action):
        self._screen = self._noise()

    def _observe(self):
        shown = self._screen if self._place == self.television else np.zeros_like(self._screen)
        return {**super()._observe(), "screen": shown, "log_tv": np.float32(self._watched / max(self._all, 1))}


class RemoteTV(NoisyTV):
    """The same with a remote control: in front of the television staying there changes what it shows, at random."""

    def _change(self, action):
        if action == 4 and self._place == self.television:
            self._screen = self._noise()


MAZES = {"maze": Maze, "maze_stay": FiveMaze, "maze_tv": NoisyTV, "maze_remote": RemoteTV}
