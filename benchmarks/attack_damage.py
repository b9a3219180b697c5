"""Attack what a run has written by damaging it, and read it back; see attack.py."""

import collections
import contextlib
import io
import pathlib
import random
import shutil
import sys
import tempfile

import numpy as np
import torch

import dreamer
from benchmarks.scores import read_run
from replay.episodes import load_episode
from tools import UserError
from training.checkpoint import load_checkpoint, load_stored
from training.config import CONFIGS, load_config

WORDS = (
    "--configs debug --task dummy_multi --size 16 16 --steps 60 --time_limit 20 --eval_every 0 --prefill 30"
    " --eval_episode_num 1 --train_ratio 1 --video_pred_log false"
)
KINDS = ("latest.pt", "replay", "episode", "config.yaml", "scores.jsonl")
COMMANDS = 0.02  # share of damages that are given to a whole command
BROKEN = ("accepted in silence", "errors of other kinds")


def attack_damage(count, seed=0):
    """Damage files of a run `count` times and read each. Return {kind of file: Counter of what became of it}.

    BROKEN names the counts that must be 0. A configuration and lines of scores have no checksum: what still reads is
    not counted as accepted in silence there.
    """
    rng = random.Random(seed)
    seen = {kind: collections.Counter(dict.fromkeys(BROKEN, 0)) for kind in (*KINDS, "structure", "whole commands")}
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        run = pathlib.Path(folder) / "run"
        assert quietly(dreamer.main, [*WORDS.split(), "--logdir", str(run)]) == 0
        files = {"latest.pt": run / "latest.pt", "replay": next(run.glob("replay-*.pt"))}
        files |= {"episode": next((run / "train_eps").glob("*.npz")), "config.yaml": run / "config.yaml"}
        files |= {"scores.jsonl": run / "scores.jsonl"}
        readers = make_readers(files)
        assert all(read() is True for read in readers.values())  # while they are whole
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            whole = files[kind].read_bytes()
            how, damaged = damage(whole, rng)
            if damaged == whole:
                continue
            files[kind].write_bytes(damaged)
            judge(seen[kind], how, readers[kind])
            if rng.random() < COMMANDS:
                judge_command(seen["whole commands"], f"{kind}: {how}", run)
            files[kind].write_bytes(whole)
        whole = files["latest.pt"].read_bytes()
        for _ in range(max(1, count // 40)):
            how = break_structure(files["latest.pt"], rng)
            judge_command(seen["structure"], how, run)
            files["latest.pt"].write_bytes(whole)
    return seen


def damage(content, rng):
    """Return in words how some bytes are damaged, and what becomes of them."""
    data, place = bytearray(content), rng.randrange(len(content))
    length = rng.choice([1, 4, 16, 512])
    how = rng.choice(["flip", "junk", "zeros", "cut", "empty", "insert", "append"])
    if how == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif how in ("junk", "zeros"):
        piece = rng.randbytes(length) if how == "junk" else bytes(length)
        data[place : place + length] = piece[: len(data) - place]
    elif how == "insert":
        data[place:place] = rng.randbytes(length)
    elif how == "append":
        data += rng.randbytes(length)
    else:
        del data[0 if how == "empty" else place :]
    return f"{how} at {place} of {len(content)}", bytes(data)


def make_readers(files):
    """Return {kind: function that reads the file and returns True if that is what it held, False if it is refused}.

    One that returns None has been accepted with other content.
    """
    tree = {kind: torch.load(files[kind], weights_only=True) for kind in ("latest.pt", "replay")}
    layout = episode_layout(files["episode"])
    steps = load_episode(files["episode"], layout)

    def checkpoint():
        return same(load_checkpoint(files["latest.pt"]), tree["latest.pt"]) or None

    def stored():
        warnings = []
        found = load_stored(files["replay"], warnings.append)
        return False if warnings else same(found, tree["replay"]) or None

    def episode():
        try:
            return same(load_episode(files["episode"], layout), steps) or None
        except ValueError:
            return False

    def config():
        load_config(["--config", str(files["config.yaml"])], CONFIGS)
        return True

    def scores():
        return quietly(read_run, files["scores.jsonl"].parent) is not None

    return dict(zip(KINDS, (checkpoint, stored, episode, config, scores), strict=True))


def episode_layout(path):
    """Return the layout {key: (shape, dtype)} of an episode file."""
    with np.load(path) as file:
        return {key: (file[key].shape[1:], file[key].dtype) for key in file.files}


def same(one, other):
    """True if two trees of dicts, lists, arrays and tensors are equal, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def judge(seen, how, read):
    """Read a damaged file and count what becomes of it."""
    seen["damaged"] += 1
    try:
        found = read()
    except UserError as error:
        found = False if "\n" not in str(error) else error
    except Exception as error:
        found = error
    if isinstance(found, Exception):
        seen["errors of other kinds"] += 1
        print(f"{how}: {type(found).__name__}: {found}", file=sys.stderr)
    elif found is None:
        seen["accepted in silence"] += 1
        print(f"{how}: accepted in silence", file=sys.stderr)
    else:
        seen["read as it was" if found else "refused"] += 1


def judge_command(seen, how, run):
    """Resume a copy of a run with a damaged file by a whole command, which must go on or end in one line."""
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        copy = shutil.copytree(run, pathlib.Path(folder) / "run")
        argv = [*WORDS.split(), "--logdir", str(copy), "--steps", "70"]

        def resume():
            status = quietly(dreamer.main, argv)
            if status not in (0, 2):
                raise RuntimeError(f"exit status {status}")
            return status == 0

        judge(seen, how, resume)


def break_structure(path, rng):
    """Replace or delete an entry of a checkpoint, at any depth; return which."""
    tree = torch.load(path, weights_only=True)
    place, names = tree, []
    while True:
        names.append(rng.choice(list(place) if isinstance(place, dict) else range(len(place))))
        below = place[names[-1]]
        if not (isinstance(below, (dict, list)) and below and rng.random() < 0.8):
            break
        place = below
    if isinstance(place, dict) and rng.random() < 0.4:
        del place[names[-1]]
    else:
        place[names[-1]] = rng.choice([None, "text", -1, [], {}, torch.zeros(3)])
    torch.save(tree, path)
    return f"latest.pt: {'/'.join(map(str, names))}"


def quietly(function, *args):
    """Call a function; what it prints is dropped."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return function(*args)
