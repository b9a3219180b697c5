"""Steps of experience, and episode files.

A step holds obs[t], reward[t], is_first[t], is_last[t], is_terminal[t] and the action that led to obs[t]:

    step          0         1         2                T-1
    observation   o_0       o_1       o_2     ...      o_{T-1}
    action        0         a_0       a_1     ...      a_{T-2}     a_t was chosen on seeing o_t
    reward        0         r_1       r_2     ...      r_{T-1}
    is_first      True      False     False            False
    is_last       False     False     False            True

This is also the layout of the episode files, which are those of DreamerV2 and dreamerv3-torch: one compressed .npz per
episode, {time}-{uuid}-{length}.npz, arrays of equal length, no pickles.
"""

from __future__ import annotations

import collections
import datetime
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from replay.content import check_content
from tools import atomic_write

Layout = Mapping[str, tuple[tuple[int, ...], Any]]  # {key: (shape, dtype)} of one step
Arrays = Mapping[str, np.ndarray]  # {key: (N or T, ...)}
Step = dict[str, Any]  # {key: value} of one step

# ---------------------------------------------------------------------------
# Steps


def stored_step(layout: Layout, obs: Arrays, actions: Arrays, index: int) -> Step:
    """Return one environment's observation, reward and flags, with the action that led to them: zeros at is_first."""
    step = {key: obs[key][index] for key in layout if key in obs}
    return step | {key: action[index] * ~obs["is_first"][index] for key, action in actions.items()}


# ---------------------------------------------------------------------------
# Episode files

NAME = re.compile(r"\d{8}T\d{6}[^-]*-.+-([0-9]+)\.npz")


def save_episode(directory: str | pathlib.Path, episode: Mapping[str, Any]) -> pathlib.Path:
    """Write {key: (T, ...)} as one compressed .npz, atomically; return its path."""
    now = datetime.datetime.now().strftime("%Y%m%dT%H%M%SF%f")
    path = pathlib.Path(directory) / f"{now}-{uuid.uuid4().hex}-{len(episode['reward'])}.npz"
    atomic_write(path, lambda file: np.savez_compressed(file, **episode))
    return path


def load_episode(path: pathlib.Path, layout: Layout) -> dict[str, np.ndarray]:
    """Read an episode file and convert it to the layout; unknown keys are ignored.

    Args:
      layout: {key: (shape, dtype)} of one step; a StepLayout also tells which classes and actions there are.
    Returns: {key: (T, ...)}
    Raises ValueError that names the problem.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            episode = {key: file[key] for key in file.files if key in layout}
    except Exception as error:  # zipfile, zlib and NumPy raise dozens of types for a damaged or foreign file
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    if "reward" not in episode or not episode["reward"].ndim or not len(episode["reward"]):
        raise ValueError("holds no reward")
    length = len(episode["reward"])
    steps = np.arange(length)
    episode.setdefault("is_first", steps == 0)
    episode.setdefault("is_terminal", np.zeros(length, bool))
    episode.setdefault("is_last", (steps == length - 1) | episode["is_terminal"].astype(bool))
    for key, (shape, dtype) in layout.items():
        if key not in episode:
            raise ValueError(f"lacks {key}")
        value = episode[key]
        if value.shape[:1] != (length,) or not fits(value.shape[1:], shape):
            raise ValueError(f"{key} has shape {value.shape} where {(length, *shape)} was expected")
        if value.dtype.kind not in "biuf" or (dtype == np.uint8 and value.dtype != np.uint8):
            raise ValueError(f"{key} has type {value.dtype} where {np.dtype(dtype)} was expected")
        if not finite(value):
            raise ValueError(f"{key} is not finite")
        if np.dtype(dtype).kind == "i" and ((value < 0).any() or (value % 1).any()):
            raise ValueError(f"{key} holds what is no class: 0, 1, 2, ...")
        episode[key] = value.reshape(length, *shape).astype(dtype)
    episode["is_first"][0] = True
    episode["is_last"][-1] = True  # even if a run was stopped here: the next step in a stream is of another episode
    check_content(path.name, episode, layout)
    return episode


def finite(value: np.ndarray) -> bool:
    """True if all numbers of an array are finite in single precision."""
    if value.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(np.float32, copy=False)).all())


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """True if values of a shape fit another: images may lack a channel axis of size 1, the rest needs equal size."""
    if len(wanted) > 1:
        return shape == wanted or (len(wanted) == 3 and (*shape, 1) == wanted)
    return int(np.prod(shape)) == int(np.prod(wanted))


class EpisodeWriter:
    """Collect the steps of environments and write each episode when it ends.

    The oldest files are deleted so that the directory has at most `limit` steps.

    Args:
      directory: of the files, created if missing; count: number of environments; limit: in agent steps.
    """

    def __init__(self, directory: str | pathlib.Path, count: int, limit: int):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.steps: list[list[Step]] = [[] for _ in range(count)]
        self.limit = limit
        self.files = collections.deque((path, length_of(path)) for path in episode_files(self.directory))
        self.total = sum(length for _, length in self.files)

    def add(self, index: int, step: Step) -> tuple[str, int] | None:
        """Append {key: value} of one environment; return (name, length) of the file if it is the last, else None."""
        if step["is_first"]:
            self.steps[index] = []
        self.steps[index].append(step)
        return self.flush(index) if step["is_last"] else None

    def flush(self, index: int) -> tuple[str, int] | None:
        """Write the unfinished episode of one environment; return (name, length), or None if there is none."""
        steps, self.steps[index] = self.steps[index], []
        if len(steps) < 2:
            return None
        path = save_episode(self.directory, {key: np.stack([step[key] for step in steps]) for key in steps[0]})
        self.files.append((path, len(steps)))
        self.total += len(steps)
        while self.total > self.limit and len(self.files) > 1:
            oldest, length = self.files.popleft()
            self.total -= length
            oldest.unlink(missing_ok=True)
        return path.name, len(steps)


def episode_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Return the episode files of a folder, oldest first; none if it does not exist."""
    return sorted(pathlib.Path(folder).expanduser().glob("*.npz"))


def length_of(path: pathlib.Path) -> int:
    """Return the length in steps that a file's name states; 0 if it is not of the form {time}-{uuid}-{length}.npz."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0
