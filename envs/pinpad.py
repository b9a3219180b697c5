"""Pin Pad: step on pads in the right order (Director, arXiv:2206.04114), on a grid small enough for two CPU cores."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.dummy import MOVES, Dummy

SIDE = 9
NAMES = {"three": 3, "four": 4, "five": 5, "six": 6}
# Upper left corners (row, column) of the pads, which have 2 by 2 cells and lie along the walls, in the order in which
# they are to be stepped on: no two that follow each other are neighbors.
PADS = ((0, 0), (7, 7), (0, 7), (7, 0), (0, 4), (7, 3))
COLORS = ((230, 60, 60), (60, 200, 60), (70, 90, 240), (230, 210, 50), (220, 60, 220), (60, 210, 220))
VIEW = 2  # cells that an egocentric picture shows to each side


class PinPad(Dummy):
    """Go up, right, down, left or stay, from the middle of an empty grid; reward 1 and the end for stepping on all pads
    in their order, with no other one in between: the last pads must be the right ones.

    What was stepped on is part of what is seen: `pads`, the last of them, the oldest first, 0 where there are fewer.

    Args:
      view: `vector` for `player`, the cell as a number that is seen as a one-hot; `image` for a picture of the grid;
        `ego` for a picture of the 5 by 5 cells around the player. In pictures the bar on top shows the pads.
      count: of pads, three to six.
    """

    length = 100

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], view: str = "vector", count: int = 3):
        super().__init__(rng, size)
        self._view, self._count = view, count
        self._pads = np.zeros((SIDE, SIDE), np.int32)  # 0 is floor
        for number, (row, column) in enumerate(PADS[:count], 1):
            self._pads[row : row + 2, column : column + 2] = number
        self.act_space = {"action": spaces.Discrete(len(MOVES))}
        self.obs_space: dict[str, Any] = {"image": spaces.Box(0, 255, (*size, 3), np.uint8)}
        if view == "vector":
            seen = {"player": spaces.Discrete(SIDE * SIDE), "pads": spaces.MultiDiscrete([count + 1] * count)}
            self.obs_space = seen

    def _start(self):
        self._place, self._done = (SIDE // 2, SIDE // 2), []

    def _act(self, action):
        down, right = MOVES[int(action["action"])]
        row, column = self._place[0] + down, self._place[1] + right
        if 0 <= row < SIDE and 0 <= column < SIDE:
            self._place = (row, column)
        pad = int(self._pads[self._place])
        if pad and self._done[-1:] != [pad]:
            self._done = [*self._done, pad][-self._count :]
        solved = self._done == list(range(1, self._count + 1))
        return float(solved), solved

    def _observe(self):
        if self._view != "vector":
            return {"image": self._picture(self._size, self._view == "ego")}
        pads = np.array(self._done + [0] * (self._count - len(self._done)), np.int32)
        return {"player": np.int32(self._place[0] * SIDE + self._place[1]), "pads": pads}

    def _draw(self, size):
        return self._picture(size, False)

    def _picture(self, size, ego):
        """Draw the grid, or what is around the player, below a bar of the last pads: (H, W, 3)."""
        cells = np.full((SIDE + 2 * VIEW, SIDE + 2 * VIEW, 3), 90, np.uint8)  # walls around
        floor = cells[VIEW:-VIEW, VIEW:-VIEW]
        floor[:] = np.array([(0, 0, 0), *COLORS], np.uint8)[self._pads]
        floor[self._place] = 255
        if ego:
            floor = cells[self._place[0] :, self._place[1] :][: 2 * VIEW + 1, : 2 * VIEW + 1]
        high = max(1, size[0] // 8)
        bar = np.zeros((high, size[1], 3), np.uint8)
        for place, pad in enumerate(self._done):
            left, right = (size[1] * x // self._count for x in (place, place + 1))
            bar[:, left:right] = COLORS[pad - 1]
        return np.concatenate([bar, enlarge(floor, (size[0] - high, size[1]))])


def enlarge(picture, size):
    """Return a picture (h, w, 3) of cells in another size (H, W), each cell a rectangle."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, picture.shape, strict=False))
    return picture[rows][:, columns]


# Task -> function of the generator and the size of images: pinpad, pinpad_image, ... pinpad_six_ego
PINPADS = {
    "_".join(["pinpad", *([name] * (count != 3)), *([view] * (view != "vector"))]): functools.partial(
        PinPad, view=view, count=count
    )
    for name, count in NAMES.items()
    for view in ("vector", "image", "ego")
}
