import os, pathlib, sys

import numpy as np

sys.path.insert(0, os.environ["DREAMER"])
from replay.episodes import load_episode

flag, number = ((), bool), ((), np.float32)
layout = {"is_first": flag, "is_last": flag, "is_terminal": flag, "reward": number}
paths = sorted(pathlib.Path("data").glob("*.npz"))
print("terminal" if all(load_episode(path, layout)["is_terminal"][-1] for path in paths) else "never terminal")
