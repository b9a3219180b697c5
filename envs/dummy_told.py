"""Small worlds in which one is told where to go, in words, by a tone, or both: without them one cannot know."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.dummy import Dummy
from specs import tagged

MOVES = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))  # stay, up, right, down, left
ROWS, COLUMNS = ("north", "upper", "lower", "south"), ("west", "left", "right", "east")
ROW_WORDS = ("north", "top", "first", "upper", "high", "second", "lower", "low", "third", "south", "bottom", "last")
COLUMN_WORDS = ("west", "red", "oak", "left", "green", "elm", "right", "blue", "ash", "east", "gray", "fir")
PAIRS = tuple(itertools.product(range(12), range(12)))  # of these, three in turn for the same row or column
SAMPLES = 256  # of a tone in a step
CYCLES = 2, 3, 4, 6, 8, 12, 16, 24  # of a tone in these, by column


def place_of(row: int, column: int) -> tuple[int, int]:
    """Return the place that a pair of words means."""
    return row // 3, column // 3


class Told(Dummy):
    """Go to the place that one is told, and stay there: reward 1 in every step that one is there.

    Attributes:
      rows, columns: of the world; goals: the places (row, column) that one may be told.
    """

    length = 10
    rows, columns = 4, 4
    goals: tuple[tuple[int, int], ...] = tuple(itertools.product(range(4), range(4)))

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space: dict[str, spaces.Space] = {"position": spaces.MultiDiscrete([self.rows, self.columns])}
        self.act_space = {"action": spaces.Discrete(len(MOVES))}

    @classmethod
    def best(cls) -> float:
        """Return the mean return of who goes straight to the goal."""
        starts = itertools.product(range(cls.rows), range(cls.columns))
        apart = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in itertools.product(starts, cls.goals) if a != b]
        return float(np.mean([cls.length - steps + 1 for steps in apart]))

    def _start(self):
        self._told = int(self._rng.integers(len(self.goals)))
        self._goal = self.goals[self._told]
        self._place = self._goal
        while self._place == self._goal:
            self._place = int(self._rng.integers(self.rows)), int(self._rng.integers(self.columns))

    def _act(self, action):
        down, right = MOVES[action["action"]]
        row, column = self._place[0] + down, self._place[1] + right
        self._place = min(self.rows - 1, max(0, row)), min(self.columns - 1, max(0, column))
        return float(self._place == self._goal), False

    def _observe(self) -> dict[str, Any]:
        return {"position": np.array(self._place)}

    def _draw(self, size):
        row, column = self._place
        return self._square(size, column / (self.columns - 1), row / max(1, self.rows - 1))


class Instruction(Told):
    """The goal is told in words, such as "go to the upper left"."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space["instruction"] = spaces.Text(64)

    def _observe(self):
        row, column = self._goal
        return {**super()._observe(), "instruction": f"go to the {ROWS[row]} {COLUMNS[column]}"}


class Known(Instruction):
    """As `Instruction`, with three words for each row and column, and without a sixth of the pairs of words."""

    pairs = tuple(pair for pair in PAIRS if (pair[0] + pair[1]) % 6 != 1)
    goals = tuple(place_of(*pair) for pair in pairs)

    def _observe(self):
        row, column = self.pairs[self._told]
        return {**super()._observe(), "instruction": f"go to the {ROW_WORDS[row]} {COLUMN_WORDS[column]}"}


class New(Known):
    """Only the pairs of words that `Known` leaves out; each word stands there in ten others."""

    pairs = tuple(pair for pair in PAIRS if pair not in Known.pairs)
    goals = tuple(place_of(*pair) for pair in pairs)


class Tone(Told):
    """The goal, a place in a corridor, is told by the pitch of a tone that sounds in every step."""

    rows, columns = 1, 8
    goals = tuple((0, column) for column in range(8))

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space["tone"] = tagged(spaces.Box(-1, 1, (SAMPLES,)), "audio")

    def _observe(self):
        return {**super()._observe(), "tone": tone(CYCLES[self._goal[1]])}


class All(Told):
    """Every kind of observation, none of which can be done without.

    The row of a place is told in words and its column by a tone, which sounds in every third step, the first among
    them, and is missing in the others. The goal is that place, or where `opposite` is 1 the one across the middle. The
    `image` alone shows where one is.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.obs_space = {
            "image": spaces.Box(0, 255, (*size, 3), np.uint8),
            "opposite": spaces.Discrete(2),
            "instruction": spaces.Text(64),
            "tone": tagged(spaces.Box(-1, 1, (SAMPLES,)), "audio", optional=True),
        }

    def _start(self):
        super()._start()
        self._opposite = int(self._rng.integers(2))

    def _observe(self):
        row, column = (3 - x for x in self._goal) if self._opposite else self._goal
        return {
            "image": self._draw(self._size),
            "opposite": self._opposite,
            "instruction": f"go {ROWS[row]}",
            "tone": tone(CYCLES[2 * column]) if self._steps % 3 == 0 else None,
        }


def tone(cycles: int) -> np.ndarray:
    """Return a sine with a number of cycles in `SAMPLES` samples."""
    return (0.5 * np.sin(2 * np.pi * cycles * np.arange(SAMPLES) / SAMPLES)).astype(np.float32)


def of_mode(mode: str) -> dict[str, type[Told]]:
    """Return {task: class} for training or evaluation; `instruction_new` is evaluated on pairs of words never seen."""
    new = Known if mode == "train" else New
    return {"instruction": Instruction, "instruction_new": new, "tone": Tone, "all": All}
