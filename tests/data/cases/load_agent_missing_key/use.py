import os, pathlib, sys

import numpy as np

sys.path.insert(0, os.environ["DREAMER"])
from dreamer import load_agent

agent, state = load_agent("run", "cpu"), None
for obs in ({"stat": np.zeros(3)}, {"state": np.zeros(5, np.float32)}, np.zeros(3, np.float32)):
    try:
        print(agent.act(obs, None, "mode")[0])
    except Exception as error:
        print(type(error).__name__, error)
