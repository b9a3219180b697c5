"""Attack runs by killing them at random moments and resuming them; see attack.py."""

import collections
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch

import dreamer
from benchmarks.processes import MARK, end, marked, start

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, LENGTH = 160, 10  # of a run and, at most, of its episodes, in agent steps
WORDS = (
    f"--configs debug --task dummy_multi --size 16 16 --steps {STEPS} --time_limit {LENGTH} --save_every 20"
    " --eval_every 80 --eval_episode_num 1 --eval_envs 1 --log_every 20 --prefill 30 --train_ratio 2"
)
WORKERS = ["--envs", "2", "--parallel", "true"]
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
LEFT = 8  # seconds that workers have to notice that their parent is gone
LONGEST = 600  # seconds until a run is taken for one that hangs
WHOLE = 0.15  # share of kills that hit a command from its first moment on, the others come once it has imported PyTorch
BROKEN = (
    *("finished episodes lost", "episodes repeated", "unreadable files", "unreadable lines", "temporary files left"),
    *("processes left", "locks kept", "tracebacks", "hangs", "runs not finished", "/dev/shm left"),
)


def attack_kills(count, seed=0, longest=LONGEST):
    """Kill runs `count` times in all and resume each until it is done. Return a Counter of what was seen.

    BROKEN names the counts that must be 0.
    """
    FORK.set_forkserver_preload([__name__])
    rng, seen = random.Random(seed), collections.Counter(dict.fromkeys(BROKEN, 0))
    shm, began = shared_memory(), time.time()
    typical = {}  # parallel or not -> seconds that a run takes
    while seen["kills"] < count:
        parallel = rng.random() < 0.5
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            logdir = pathlib.Path(folder) / "run"
            if parallel not in typical:  # one that is left alone
                begin = time.monotonic()
                finish(logdir, parallel, seen, longest)
                typical[parallel] = time.monotonic() - begin
                continue
            known = collections.Counter()
            for _ in range(min(rng.randint(1, 3), count - seen["kills"])):
                kill(logdir, parallel, rng, typical[parallel], seen)
                known |= check(logdir, known, seen)
            finish(logdir, parallel, seen, longest)
            check(logdir, known, seen)
            seen["temporary files left"] += len(list(logdir.rglob("*.tmp")))
    left = {name for name in shared_memory() - shm if os.stat(f"/dev/shm/{name}").st_ctime >= began}
    seen["/dev/shm left"] = len(left)
    return seen


# ---------------------------------------------------------------------------
# Runs. Forking one from a process that has imported all that it needs saves seconds each.

FORK = multiprocessing.get_context("forkserver")


def launch(logdir, parallel, whole):
    """Start a run; return its process (with pid), its mark, and the file of what it prints."""
    errors = logdir.with_suffix(".err")
    argv = [*WORDS.split(), *(WORKERS if parallel else []), "--logdir", str(logdir)]
    if whole:
        with errors.open("ab") as file:
            command = [sys.executable, str(ROOT / "dreamer.py"), *argv]
            return (*start(command, logdir.parent, stdout=file, stderr=file), errors)
    mark = os.urandom(16).hex()
    process = FORK.Process(target=run_forked, args=(argv, errors, mark))
    process.start()
    return process, mark, errors


def run_forked(argv, errors, mark):
    os.setsid()
    os.environ[MARK] = mark  # for its workers
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(dreamer.main(argv))


def wait(process, seconds):
    """Wait for a process of either kind; return its exit status, or None if it lives on."""
    if isinstance(process, multiprocessing.process.BaseProcess):
        process.join(seconds)
        return process.exitcode
    with contextlib.suppress(Exception):
        process.wait(seconds)
    return process.poll()


def kill(logdir, parallel, rng, typical, seen):
    """Start or resume a run and kill it after a random time; count what it leaves behind."""
    whole = rng.random() < WHOLE
    process, mark, errors = launch(logdir, parallel, whole)
    number, group = rng.choice(SIGNALS), rng.random() < 0.5
    status = wait(process, rng.uniform(0, typical * (1.5 if whole else 1)))
    if status is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it just ended, or has no group yet
            (os.killpg if group else os.kill)(process.pid, number)
        seen["kills"] += 1
        seen[f"kills by {number.name}"] += 1
        if wait(process, 60) is None:
            seen["hangs"] += 1
    settle(process, mark, seen)
    count_locks(logdir, seen)
    count_tracebacks(errors, seen)


def finish(logdir, parallel, seen, longest):
    """Run to the end."""
    process, mark, errors = launch(logdir, parallel, False)
    status = wait(process, longest)
    seen["runs"] += 1
    seen["hangs"] += status is None
    if status != 0 or (steps_done(logdir) or 0) < STEPS:  # two environments may take it a step beyond
        seen["runs not finished"] += 1
        print(f"exit {status}, {steps_done(logdir)} steps: {errors.read_text()[-1500:]}", file=sys.stderr)
    settle(process, mark, seen)
    count_tracebacks(errors, seen)


def settle(process, mark, seen):
    """Give what a run started time to end, count what does not, and end it."""
    deadline = time.monotonic() + LEFT
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    seen["processes left"] += len(marked(mark))
    if isinstance(process, multiprocessing.process.BaseProcess):
        process.kill()
        process.join()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    else:
        end(process, mark)


# ---------------------------------------------------------------------------
# What is left


def count_locks(logdir, seen):
    """Count a lock that nobody can hold any more."""
    if logdir.is_dir():
        descriptor = os.open(logdir, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            seen["locks kept"] += 1
        finally:
            os.close(descriptor)


def count_tracebacks(errors, seen):
    """Count the tracebacks in what was printed since the last call."""
    text = errors.read_text(errors="replace") if errors.exists() else ""
    found = text.count("Traceback (most recent call last)")
    if found:
        seen["tracebacks"] += found
        print(text[text.index("Traceback (most recent call last)") :][-1500:], file=sys.stderr)
    errors.unlink(missing_ok=True)


def check(logdir, known, seen):
    """Count what is wrong with the files of a logdir; return a Counter of its finished training episodes.

    known: the episodes that were finished before, as of {(score, length): number}.
    """
    episodes, digests = collections.Counter(), collections.Counter()
    for path in sorted((logdir / "train_eps").glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            seen["unreadable files"] += 1
            continue
        content = b"".join(arrays[key].tobytes() for key in sorted(arrays))
        digests[hashlib.sha256(content).hexdigest()] += 1
        episodes[round(float(arrays["reward"].sum()), 2), len(arrays["reward"]) - 1] += 1
    repeated = sum(digests.values()) - len(digests)
    seen["episodes repeated"] = max(seen["episodes repeated"], repeated)
    scored = collections.Counter()
    for line in lines_of(logdir / "scores.jsonl", seen):
        if line.get("mode") == "train":
            scored[round(float(line["score"]), 2), line["length"]] += 1
    seen["finished episodes lost"] += sum(((scored | known) - episodes).values())
    seen["finished episodes seen"] = max(seen["finished episodes seen"], 0) + sum((scored - known).values())
    return scored | known


def lines_of(path, seen):
    """Return the lines of a file of JSON; a kill may cut the last one short."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            seen["unreadable lines"] += 1
    return found


def steps_done(logdir):
    """Return the agent steps of a logdir's checkpoint, or None if it cannot be read."""
    try:
        return torch.load(logdir / "latest.pt", weights_only=True)["counters"]["agent_steps"]
    except Exception:
        return None


def shared_memory():
    """Return the names in /dev/shm."""
    folder = pathlib.Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
