"""Kill a sweep twice, as by kill -9, go on with it each time, and check that it comes to its table.

    python3 benchmarks/sweep_kills.py                # 12 trials of quickstart, shortened: about 20 minutes on two cores
    python3 benchmarks/sweep_kills.py --trials 4 --steps 300

It prints the table and the best trial, then what was checked; exit status 1 if anything of it failed.
"""

import argparse
import csv
import json
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
    installed.demand("benchmarks/sweep_kills.py")  # before the first package is imported

from benchmarks.processes import end, marked, start
from training.logdir import scores

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEFT = 60  # seconds that trainings have to save and end once their sweep is dead


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--at_once", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the sweep lies; a temporary folder, removed at the end, if left out")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="sweep-") as temporary:
        found = attack(options, pathlib.Path(options.folder or temporary).absolute())
    for what, holds in found.items():
        print(f"{'ok' if holds else 'FAILED'}: {what}")
    return 0 if all(found.values()) else 1


def write(options, folder):
    """Write the sweep's file; return its path."""
    keys = {
        "sweep": {"method": "tpe", "trials": options.trials, "at_once": options.at_once},
        "configs": "quickstart",
        "logdir": str(folder / "runs" / "{trial}"),
        "steps": options.steps,
        "eval_every": options.steps // 3,
        "save_every": options.steps // 10,
        "video_pred_log": False,
        "opt.lr": {"low": 1e-4, "high": 2e-3, "log": True},
        "imag_horizon": [8, 10, 15],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    path.write_text(json.dumps(keys, indent=2))
    return path


def attack(options, folder):
    """Run, kill and resume a sweep; return {what was checked: whether it holds}."""
    rng, found = random.Random(options.seed), {}
    command = [sys.executable, str(ROOT / "sweep.py"), "--config", str(write(options, folder))]
    for number in range(options.kills):
        process, mark = start(command, folder)
        wanted = (number + rng.random()) / options.kills * options.trials  # trials begun before the kill
        while process.poll() is None and len(list((folder / "runs").glob("[0-9]*"))) <= wanted:
            time.sleep(0.5)
        time.sleep(rng.uniform(0, 20))
        before = frames(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + LEFT
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.5)
        print(f"killed: {len(before)} trials begun, at evaluations of step {before}", flush=True)
        found[f"kill {number + 1}: the trainings ended with their sweep"] = not end(process, mark)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    with open(folder / "runs" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    found["the last one ended with status 0"] = done.returncode == 0
    found[f"{options.trials} trials are complete"] = [r["state"] for r in rows] == ["complete"] * options.trials
    found["best trial and table are printed"] = "best: trial" in done.stdout and done.stdout.startswith("trial ")
    found["every trial has a whole last evaluation"] = all(
        sum(each["step"] == step for each in scores(path, "eval")) >= 10
        for path in (folder / "runs").glob("[0-9]*")
        for step in [options.steps]
    )
    found["plot of importances"] = (folder / "runs" / "importances.png").exists()
    return found


def frames_of(logdir):
    return [entry["step"] for entry in scores(logdir, "eval")]


def frames(folder):
    """Return the last step at which each trial was evaluated, 0 for none."""
    return [max(frames_of(path), default=0) for path in sorted((folder / "runs").glob("[0-9]*"))]


if __name__ == "__main__":
    sys.exit(main())
