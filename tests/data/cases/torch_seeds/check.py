import os, pathlib, sys

import numpy as np

episodes = [np.load(path)["action"] for path in sorted(pathlib.Path("run/train_eps").glob("*.npz"))][-3:]
print("the same" if all(np.array_equal(episodes[0], other) for other in episodes[1:]) else "they differ")
