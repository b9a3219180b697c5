"""Attack with time: what a run holds of the system while it learns on and on; see attack.py."""

import collections
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

from benchmarks.processes import end, marked, start

ROOT = pathlib.Path(__file__).resolve().parents[1]
CAPACITY = 1000  # agent steps of the replay
RATIO = 256  # replayed steps for each: 8 updates
PER_STEP = RATIO // (4 * 8)
GROWTH = 2.0  # MB of memory for 10,000 updates, all processes together, from which on it counts as a leak
ENOUGH = 2000  # updates at capacity, fewer of which say nothing about memory
WORDS = (
    f"--configs debug --task dummy_multi --size 16 16 --envs 2 --parallel true --time_limit 50 --train_ratio {RATIO}"
    f" --dataset_size {CAPACITY} --eval_every 200 --log_every 20 --save_every 100"
)
BROKEN = ("run not finished", "memory grows", "descriptors grow", "threads grow", "/dev/shm grows", "processes grow")


def attack_soak(updates):
    """Let a run with workers, evaluations and videos make so many updates, and watch it. Return a Counter.

    Its growth is measured once the replay is at capacity, and memory where ENOUGH updates follow that. BROKEN names
    the counts that must be 0.
    """
    seen = collections.Counter(dict.fromkeys(BROKEN, 0))
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        logdir = pathlib.Path(folder) / "run"
        command = [sys.executable, str(ROOT / "dreamer.py"), *WORDS.split(), "--logdir", str(logdir)]
        command += ["--steps", str(updates // PER_STEP + 40)]
        with open(f"{folder}/printed", "wb") as file:
            process, mark = start(command, folder, stdout=file, stderr=file)
            rows = []
            while process.poll() is None:
                time.sleep(1)
                with contextlib.suppress(OSError):  # a process ended while it was looked at
                    rows.append({**progress(logdir / "metrics.jsonl"), **held([process.pid, *marked(mark)])})
            end(process, mark)
        seen["run not finished"] = int(process.returncode != 0)
        if process.returncode:
            print(pathlib.Path(f"{folder}/printed").read_text()[-1500:], file=sys.stderr)
        seen["updates"] = int(progress(logdir / "metrics.jsonl")["updates"])
    judge(rows, seen)
    return seen


def progress(path):
    """Return the newest updates and steps in the replay of a run's metrics."""
    found = {"updates": 0, "replay_steps": 0}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # it is being written
            found |= {key: value for key, value in json.loads(line).items() if key in found}
    return found


def held(pids):
    """Return what processes hold: MB of memory that is theirs alone, descriptors, threads, entries of /dev/shm."""
    pids = sorted(set(pids))
    shm = pathlib.Path("/dev/shm")
    return {
        "memory": sum(private_memory(pid) for pid in pids) / 2**20,
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        "/dev/shm": len(list(shm.iterdir())) if shm.is_dir() else 0,
        "processes": len(pids),
    }


def private_memory(pid):
    """Return the bytes of a process's resident memory that no other shares."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith("Private_")}
    return 1024 * sum(map(int, sizes.values()))


def judge(rows, seen):
    """Count what grew from when the replay was full until the last quarter."""
    full = [row for row in rows if row["replay_steps"] >= CAPACITY - 1]
    if len(full) < 8:
        return
    first, last = full[len(full) // 8 : len(full) // 2], full[-len(full) // 4 :]
    span = last[-1]["updates"] - full[0]["updates"]
    seen["updates at capacity"] = span
    for name in ("descriptors", "threads", "/dev/shm", "processes"):
        grows = "grows" if name == "/dev/shm" else "grow"
        lowest = [min(row[name] for row in part) for part in (first, last)]  # evaluations come and go
        seen[f"{name} {grows}"] = max(0, lowest[1] - lowest[0])
        seen[name] = lowest[1]
    slope = np.polyfit(
        [row["updates"] for row in full[len(full) // 8 :]], [row["memory"] for row in full[len(full) // 8 :]], 1
    )[0]
    seen["MB for 10,000 updates"] = round(10_000 * float(slope), 2)
    seen["MB at the end"] = round(last[-1]["memory"])
    seen["memory grows"] = int(span >= ENOUGH and 10_000 * slope > GROWTH)
