"""Measure what --remat saves: memory and time of one update with and without, and that both compute the same.

    python3 benchmarks/remat.py --configs size200m --task dummy_pixels --batch_size 2

On the CPU the memory is the growth of the process in an update, on a GPU what was allocated in it at most. Each is
measured in a process of its own.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/remat.py")  # before the first package is imported

import torch

from agents import make_agent
from benchmarks import timing
from envs import make_envs
from modalities import obs_spec
from specs import act_spec
from training import machine
from training.config import CONFIGS, load_config


def measure(config):
    """Return the result of one update: MB, seconds, loss and norm of the gradient."""
    device = machine.prepare(config)
    with contextlib.closing(make_envs(config, "train", 1)) as envs:
        spaces = envs.obs_space, envs.act_space
    specs = obs_spec(spaces[0]), act_spec(spaces[1])
    agent = make_agent(config, *specs)
    size = config.batch_size, config.batch_length
    steps = timing.random_steps(spaces[0], specs[1], size[0] * size[1])
    batch = agent.batch({key: value.reshape(*size, *value.shape[1:]) for key, value in steps.items()})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = timing.peak_memory(device) if device.type == "cpu" else torch.cuda.memory_allocated(device) / 1e6
    start = time.perf_counter()
    _, metrics = timing.update(agent, batch)
    timing.synchronize(device)
    found = {"MB": timing.peak_memory(device) - before, "s": time.perf_counter() - start}

    return found | {name: float(metrics[name]) for name in ("loss", "grad_norm")}


def main(words):
    """Print both results; return the exit status."""
    flags = ["--log_level", "error", "--compile", "false", "--graphs", "false", *words]
    if words[:1] == ["--alone"]:
        print(json.dumps(measure(load_config(words[1:], CONFIGS))))
        return 0
    for remat in ("false", "true"):
        command = [sys.executable, __file__, "--alone", *flags, "--remat", remat]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        print(f"remat {remat:5}", ", ".join(f"{name} {value:.6g}" for name, value in result.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
