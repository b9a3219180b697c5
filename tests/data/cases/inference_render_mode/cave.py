import numpy as np
import gymnasium as gym
from gymnasium import spaces


class Env(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Discrete(2)

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.zeros((48, 64, 3), np.uint8) if self.render_mode == "rgb_array" else None

    def look(self):
        return np.full(3, self.t / 200, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action):
        self.t += 1
        return self.look(), 1.0, self.t >= 12, False, {}
