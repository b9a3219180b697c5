"""A task that only its pictures tell: go below the mark."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Goal(gymnasium.Env):
    """A mark is in the upper half of the picture, you are in the lower: go left or right until you are below it.

    Both begin anywhere in [0, 1]; a step goes up to a fifth of that. The reward is 1 below the mark and falls to 0 a
    quarter away: whoever does not look gets a quarter of the 16 that there are, at the most and on average.
    """

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    length = 16

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._mark = self.np_random.uniform(0, 1, 2)
        self._steps = 0
        return self.render(), {}

    def step(self, action):
        self._place = min(1.0, max(0.0, self._place + action[0] / 5))
        self._steps += 1
        reward = max(0.0, 1 - 4 * abs(self._place - self._mark))
        return self.render(), reward, False, self._steps >= self.length, {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        for top, place in ((8, self._mark), (40, self._place)):
            left = round(place * 48)
            image[top : top + 16, left : left + 16] = 255
        return image


def places(image):
    """Return where the mark is and where you are (N) each, in [0, 1], as seen in images (N, 64, 64, 3)."""
    return [half.any((1, 3)).argmax(1) / 48 for half in (image[:, :32], image[:, 32:])]
