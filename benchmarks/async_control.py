"""Does an actor keep its clock while the learner learns? A slow environment, slower updates, and the deadlines met.

    python -m benchmarks.async_control --hz 20 --step_ms 20 --update_ms 200 --seconds 60

The environment's step takes `--step_ms` of waiting, as a robot's does. The learner computes for at least `--update_ms`
in each update. Presets behind `--configs` choose the agent, which the actor computes, too. The run is one of dreamer.py
in a folder that is removed; the last line of its metrics is printed as JSON.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("-m benchmarks.async_control")  # before the first package is imported

import numpy as np
from gymnasium.spaces import Box


class Slow:
    """An environment whose step waits for a number of milliseconds, with a safe action.

    Args:
      length: steps of an episode; record: file to which each step adds the first number of its action, float32.
    """

    observation_space, action_space = Box(-1, 1, (8,)), Box(-1, 1, (2,))
    safe_action = np.array([0.5, -0.5], np.float32)

    def __init__(self, wait_ms: float = 20.0, length: int = 200, record: str = ""):
        self.wait, self.length, self.count = wait_ms / 1000, length, 0
        self.file = open(record, "ab", buffering=0) if record else None  # noqa: SIM115 - as long as the environment

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.zeros(8, np.float32), {}

    def step(self, action):
        time.sleep(self.wait)
        self.count += 1
        if self.file:
            self.file.write(np.float32(action[0]).tobytes())
        obs = np.concatenate([np.asarray(action, np.float32), np.full(6, self.count / self.length, np.float32)])
        return obs.clip(-1, 1), float(obs[0]), False, self.count == self.length, {"count": self.count}


def slowed(learn, seconds):
    """Return a learn call that computes for at least so long."""
    import torch

    work = torch.randn(256, 256)

    def learn_slowly(agent, replay):
        begin = time.perf_counter()
        metrics = learn(agent, replay)
        while time.perf_counter() - begin < seconds:
            torch.mm(work, work)
        return metrics

    return learn_slowly


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hz", type=float, default=20)
    parser.add_argument("--step_ms", type=float, default=20)
    parser.add_argument("--update_ms", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--configs", nargs="*", default=["debug"])
    args = parser.parse_args()
    import dreamer
    from agents.dreamer import Dreamer

    Dreamer.learn = slowed(Dreamer.learn, args.update_ms / 1000)
    steps = round(args.seconds * args.hz)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--task", "custom_benchmarks.async_control:Slow", "--env.wait_ms", args.step_ms, "--logdir", folder]
        words += ["--collect", "async", "--control_hz", args.hz, "--steps", steps, "--log_every", steps // 2]
        words += ["--eval_episode_num", 0, "--time_limit", 0, "--train_ratio", 1e6, "--dataset_size", 1e5]
        status = dreamer.main(["--configs", *args.configs, *map(str, words)])
        text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "deadlines_met" in line]
    names = ("step", "updates", "updates_per_second", "train_ratio", "weights_age", "safe_actions")
    names += ("control_ticks", "deadlines_missed", "deadline_late_ms")
    print(json.dumps({name: round(float(lines[-1][name]), 3) for name in names}))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
