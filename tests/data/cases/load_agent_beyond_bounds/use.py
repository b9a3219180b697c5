import os, pathlib, sys

import numpy as np

sys.path.insert(0, os.environ["DREAMER"])
from dreamer import load_agent

agent, state = load_agent("run", "cpu"), None
largest = 0
for _ in range(300):
    action, state = agent.act({"state": np.zeros(3, np.float32)}, state)
    largest = max(largest, abs(action["action"]).max())
print("within" if largest <= 1 else "beyond", largest)
