"""CarRacing as World Models has it (Ha and Schmidhuber, 2018; hardmaru/WorldModelsExperiments, carracing/env.py).

The preset `carracing` puts it around gym_CarRacing-v3, and has what it shows resized to 64x64.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np

from tools import UserError

SHOWN = 84  # rows of 96; below is the bar with speed and steering


class CarRacing(gymnasium.Wrapper):
    """Cuts off the status bar, and takes three numbers in [-1, 1] for steering, gas and brake.

    Steering is as it is, gas (a + 1) / 2, and the brake a where a > 0. The road is drawn with all its corners turned at
    once, where Gymnasium turns one after the other: the same pictures, about twice as fast.

    Args:
      env: gym_CarRacing-v3 with numbers for actions. Raises UserError for another.
    """

    def __init__(self, env: Any):
        if type(env.unwrapped).__name__ != "CarRacing" or not isinstance(env.action_space, gymnasium.spaces.Box):
            raise UserError(
                "--wrappers envs.car_racing:CarRacing goes around gym_CarRacing-v3 with numbers for actions"
            )
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (SHOWN, 96, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (3,))
        env.unwrapped._render_road = Road(env.unwrapped)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return obs[:SHOWN], info

    def step(self, action):
        steering, gas, brake = action
        obs, *rest = self.env.step(np.array([steering, (gas + 1) / 2, max(brake, 0)], np.float32))
        return obs[:SHOWN], *rest


class Road:
    """Draws field, grass and road as `CarRacing._render_road` of Gymnasium does. race: that environment, unwrapped."""

    def __init__(self, race: Any):
        from gymnasium.envs.box2d.car_racing import GRASS_DIM, MAX_SHAPE_DIM, PLAYFIELD, WINDOW_H, WINDOW_W

        self.race = race
        self.near = -MAX_SHAPE_DIM, np.array([WINDOW_W, WINDOW_H]) + MAX_SHAPE_DIM
        square = np.array([(1, 0), (0, 0), (0, 1), (1, 1)])
        self.field = PLAYFIELD * (2 * square[None] - 1)
        steps = range(-20, 20, 2)
        self.grass = np.array([GRASS_DIM * (square + np.array([x, y])) for x in steps for y in steps])
        self.pieces: Any = None  # the race's list of the road's, and their corners (N, 4, 2)
        self.corners = np.zeros((0, 4, 2))

    def __call__(self, zoom: float, translation: Any, angle: float) -> None:
        race = self.race
        if self.pieces is not race.road_poly:  # there is a new list with every episode
            self.pieces, self.corners = race.road_poly, np.array([corners for corners, _ in race.road_poly])
        colors = [race.grass_color] * len(self.grass) + [color for _, color in race.road_poly]
        corners = turned(np.concatenate([self.field, self.grass, self.corners]), zoom, translation, angle)
        low, high = self.near
        near = ((corners[1:] >= low) & (corners[1:] <= high)).all(-1).any(-1)
        self._draw(corners[0], race.bg_color)
        for index in np.flatnonzero(near):
            self._draw(corners[1 + index], colors[index])

    def _draw(self, corners, color):
        from pygame import gfxdraw

        corners, color = corners.tolist(), [int(part) for part in color]
        gfxdraw.aapolygon(self.race.surf, corners, color)
        gfxdraw.filled_polygon(self.race.surf, corners, color)


def turned(corners: np.ndarray, zoom: float, translation: Any, angle: float) -> np.ndarray:
    """Return corners (..., 2) turned by an angle, scaled and moved, rounded as pygame and Python round."""
    angle = math.fmod(angle, 2 * math.pi)
    angle += 2 * math.pi * (angle < 0)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = corners[..., 0], corners[..., 1]
    return np.stack([x * cos - y * sin, x * sin + y * cos], -1) * zoom + np.array(translation)
