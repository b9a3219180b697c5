import os, pathlib, sys

import numpy as np

rng = np.random.default_rng(0)
pathlib.Path("data").mkdir()
for day in range(1, 4):
    action = rng.dirichlet([1, 1], 30).astype(np.float32)
    episode = {"state": rng.normal(size=(30, 4)).astype(np.float32), "action": action, "reward": np.ones(30, np.float32)}
    np.savez_compressed(f"data/2024010{day}T120000-{'ab12' * 8}-30.npz", **episode, is_terminal=np.zeros(30, bool))
