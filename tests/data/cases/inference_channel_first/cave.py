import numpy as np
import gymnasium as gym
from gymnasium import spaces


class Env(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Discrete(2)

    def render(self):
        return np.zeros((3, 48, 64), np.uint8)

    def look(self):
        return np.full(3, self.t / 200, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action):
        self.t += 1
        return self.look(), 1.0, self.t >= 12, False, {}
