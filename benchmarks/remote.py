"""Measure and attack actors on a Ray cluster, which is started on this machine.

    python3 benchmarks/remote.py rates  # frames/s of 1, 2, 4 actors and of as many workers, 20 ms a step
    python3 benchmarks/remote.py kills  # 20 actors killed in one run: are steps, updates and episodes exact?

The second exits with status 1 if anything was lost.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/remote.py")  # before the first package is imported

import gymnasium
import numpy as np

from benchmarks.processes import end, start

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECONDS = 0.02  # of a step
LENGTH = 25  # of an episode


class Slow(gymnasium.Env):
    """Takes a while for each step; leaves the number of its process in a folder, if one is given."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, seconds=SECONDS, folder=None):
        self.seconds = seconds
        if folder:
            (pathlib.Path(folder) / f"{time.time_ns()}-{os.getpid()}").touch()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        time.sleep(self.seconds)
        self.time += 1
        return np.full(3, self.time / LENGTH, np.float32), 1.0, False, self.time == LENGTH, {}


WORDS = "--configs debug --task custom_benchmarks.remote:Slow --eval_envs 0 --train_ratio 1 --save_every 0"


def command(logdir, words):
    return [sys.executable, str(ROOT / "dreamer.py"), *WORDS.split(), "--logdir", str(logdir), *words.split()]


def lines(path):
    """Return the objects of a file of JSON lines, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rates(options):
    """Print frames/s of the second half of runs whose environments lie with actors, or in workers of the run."""
    print(f"{'where':>10}  {'count':>5}  {'frames/s':>8}  of {1 / SECONDS:g} each")
    for count in (1, 2, 4):
        steps = int(options.seconds * count / SECONDS)
        kinds = {
            "workers": f"--envs {count} --parallel",
            "actors": f"--remote.actors {count} --remote.envs 1 --remote.lag 1 --remote.length 10",
        }
        for name, words in kinds.items():
            with tempfile.TemporaryDirectory(prefix="remote-") as folder:
                logdir = pathlib.Path(folder) / "run"
                more = f" --steps {steps} --prefill 40 --log_every {steps // 6} --dataset_size 20000"
                subprocess.run(command(logdir, words + more), check=True, stderr=subprocess.DEVNULL, cwd=ROOT)
                fps = [line["fps"] for line in lines(logdir / "metrics.jsonl") if "fps" in line]
            rate = float(np.median(fps[len(fps) // 2 :]))
            print(f"{name:>10}  {count:5}  {rate:8.1f}  {rate * SECONDS / count:.2f}", flush=True)
    return 0


def kills(options):
    """Kill actors in a run, one every so often; check what the run has at its end."""
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="remote-") as folder:
        logdir, born = pathlib.Path(folder) / "run", pathlib.Path(folder) / "born"
        born.mkdir()
        steps = options.steps
        words = f"--remote.actors 2 --remote.envs 2 --remote.length 8 --env.folder {born} --env.seconds 0.005"
        words += f" --steps {steps} --prefill 200 --dataset_size {2 * steps} --log_every 500"
        process, mark = start(command(logdir, words), ROOT, stderr=subprocess.PIPE, text=True)
        killed, dead = 0, set()
        while process.poll() is None and killed < options.kills:
            time.sleep(rng.uniform(*options.every))
            pids = {int(path.name.partition("-")[2]) for path in born.iterdir()} - dead
            alive = sorted(pid for pid in pids if os.path.exists(f"/proc/{pid}"))
            if len(alive) > 1 and lines(logdir / "scores.jsonl"):  # never the last, so that there is progress
                victim = rng.choice(alive)
                dead.add(victim)
                os.kill(victim, signal.SIGKILL)
                killed += 1
        said = process.communicate()[1]
        left = end(process, mark)
        found = judge(logdir, steps, process.returncode, killed, said) | {"no process is left": not left}
    print(f"{killed} actors killed")
    for what, holds in found.items():
        print(f"{'ok' if holds else 'FAILED'}: {what}")
    return 0 if all(found.values()) else 1


def judge(logdir, steps, status, killed, said):
    """Return {what is promised: whether it holds} of a run at its end."""
    import torch

    saved = torch.load(logdir / "latest.pt", weights_only=True)
    done, updates, episodes = (saved["counters"][name] for name in ("agent_steps", "updates", "episodes"))
    start = saved["clocks"]["ratio"]["start"]
    scores = [line for line in lines(logdir / "scores.jsonl") if line["mode"] == "train"]
    stored = []
    for path in (logdir / "train_eps").glob("*.npz"):
        with np.load(path) as file:
            stored.append((len(file["reward"]), bool(file["is_last"][-1]), int((~file["is_last"]).sum())))
    whole = sum(last and length == LENGTH + 1 for length, last, _ in stored)
    return {
        f"the run came to its end (status {status})": status == 0,
        f"{said.count('was replaced')} replacements are told": said.count("was replaced") >= killed,
        f"{done} agent steps of {steps}": steps <= done < steps + 2,
        f"{updates} updates are those of the ratio": updates == int((done - start) / 32 + 1e-9),
        f"{whole} whole episodes are stored, {episodes} were counted": whole == episodes == len(scores),
        f"{sum(count for *_, count in stored)} stored steps are the agent steps, but for a few single ones": (
            done - 4 * (killed + 1) <= sum(count for *_, count in stored) <= done
        ),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["rates", "kills"])
    parser.add_argument("--seconds", type=float, default=40, help="that a run of rates takes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, nargs=2, default=(2.0, 8.0), help="seconds between two kills")
    parser.add_argument("--steps", type=int, default=60000, help="agent steps of the run of kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    return rates(options) if options.what == "rates" else kills(options)


if __name__ == "__main__":
    sys.exit(main())
