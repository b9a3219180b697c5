"""Steps of experience, and episode files.

A step holds obs[t], reward[t], is_first[t], is_last[t], is_terminal[t] and the action that led to obs[t]:

    step          0         1         2                T-1
    observation   o_0       o_1       o_2     ...      o_{T-1}
    action        0         a_0       a_1     ...      a_{T-2}     a_t was chosen on seeing o_t
    reward        0         r_1       r_2     ...      r_{T-1}
    is_first      True      False     False            False
    is_last       False     False     False            True

This is also the layout of the episode files, which are those of DreamerV2 and dreamerv3-torch: one compressed .npz per
episode, {time}-{uuid}-{length}.npz, the time in UTC, arrays of equal length, no pickles. What the names say counts for
nothing: lengths are those of the arrays.
"""

from __future__ import annotations

import collections
import datetime
import functools
import pathlib
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from replay import npz
from replay.content import as_sound, check_content
from replay.memory import memory_limit, size, step_bytes
from tools import UserError, atomic_write

Layout = Mapping[str, tuple[tuple[int, ...], Any]]  # {key: (shape, dtype)} of one step
Arrays = Mapping[str, np.ndarray]  # {key: (N or T, ...)}
Step = dict[str, Any]  # {key: value} of one step
FLAGS = ("is_first", "is_last", "is_terminal")  # which a file may lack

# ---------------------------------------------------------------------------
# Steps


def stored_step(layout: Layout, obs: Arrays, actions: Arrays, index: int) -> Step:
    """Return one environment's observation, reward and flags, with the action that led to them: zeros at is_first."""
    step = {key: obs[key][index] for key in layout if key in obs}
    return step | {key: action[index] * ~obs["is_first"][index] for key, action in actions.items()}


# ---------------------------------------------------------------------------
# Episode files

LONGEST_KEY = 200  # bytes of a key, which becomes the name of a folder
SMALL, SHARE = 2**26, 4  # bytes that a file may always take, and one part in so many of the memory


def check_keys(keys: Iterable[str]) -> None:
    """Raise UserError for a key of observations or actions that no archive or folder can be called."""
    for key in keys:
        plain = key.isprintable() and key.encode("utf-8", "ignore").decode() == key
        if not plain or not 0 < len(key.encode("utf-8", "ignore")) <= LONGEST_KEY:
            shown = ascii(key) if len(key) < 40 else f"{key[:40]!a}..."
            raise UserError(f"the environment calls an observation or action {shown}, which can name no file")


def save_episode(directory: str | pathlib.Path, episode: Mapping[str, Any], name: str = "") -> pathlib.Path:
    """Write {key: (T, ...)} as one compressed .npz, of a new name if none is given, atomically; return its path."""
    path = pathlib.Path(directory) / (name or new_name(len(episode["reward"])))
    atomic_write(path, lambda file: npz.write(file, episode))
    return path


def new_name(length: int) -> str:
    """Return the name of a new file of an episode of so many steps."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SF%f")
    return f"{now}-{uuid.uuid4().hex}-{length}.npz"


def load_episode(path: pathlib.Path, layout: Layout) -> dict[str, np.ndarray]:
    """Read an episode file and convert it to the layout; unknown keys are ignored.

    Args:
      layout: {key: (shape, dtype)} of one step; a StepLayout also tells which classes and actions there are.
    Returns: {key: (T, ...)}
    Raises ValueError that names the problem. Sizes are checked before anything large is read.
    """
    try:
        with npz.opened(path) as file:
            heads = {key: file.head(key) for key in file.members if key in layout}
            ends = "discount" in file.members and "is_terminal" not in file.members  # as the first Dreamer wrote them
            length = check_heads(heads, layout, file.members)
            episode = {key: file.array(key, head) for key, head in heads.items()}
            if ends and (head := file.head("discount")).shape == (length,):
                episode["is_terminal"] = file.array("discount", head) == 0
    except Misfit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # zipfile, zlib and NumPy raise dozens of types for a damaged or foreign file
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    steps = np.arange(length)
    episode.setdefault("is_first", steps == 0)
    episode.setdefault("is_terminal", np.zeros(length, bool))
    episode.setdefault("is_last", (steps == length - 1) | episode["is_terminal"].reshape(length).astype(bool))
    for key, (shape, dtype) in layout.items():
        value = episode[key]
        if not finite(value):
            raise ValueError(f"{key} is not finite")
        if np.dtype(dtype).kind == "i" and ((value < 0).any() or (value % 1).any()):
            raise ValueError(f"{key} holds what is no class: 0, 1, 2, ...")
        value = as_sound(value, np.dtype(dtype)) if key in getattr(layout, "sounds", ()) else value
        episode[key] = value.reshape(length, *shape).astype(dtype)
    episode["is_first"][0] = True
    episode["is_last"][-1] = True  # even if a run was stopped here: the next step in a stream is of another episode
    check_content(path.name, episode, layout)
    return {key: episode[key] for key in layout}


class Misfit(ValueError):
    """An episode file is whole, and not of this task."""


def check_heads(heads: Mapping[str, npz.Head], layout: Layout, keys: Collection[str]) -> int:
    """Return the length in steps of an episode file whose arrays begin with `heads`; raise Misfit unless it fits.

    keys: all that the file has.
    """
    there = f"it has {', '.join(sorted(map(ascii, keys)))}"
    if "reward" not in heads or not heads["reward"].shape or not heads["reward"].shape[0]:
        raise Misfit(f"holds no reward: {there}")
    length = heads["reward"].shape[0]
    for key, (shape, dtype) in layout.items():
        if key not in heads and key in FLAGS:
            continue
        if key not in heads:
            raise Misfit(f"lacks {key}: {there}")
        found, kind = heads[key].shape, heads[key].dtype
        if kind.hasobject:
            raise ValueError(f"{key} holds pickles, which may run code")
        if found[:1] != (length,) or not fits(found[1:], shape):
            raise Misfit(f"{key} has shape {found} where {(length, *shape)} was expected")
        sound = key in getattr(layout, "sounds", ()) and (kind.kind in "if" or kind == np.uint8)
        if kind.kind not in "biuf" or (dtype == np.uint8 and kind != np.uint8 and not sound):
            raise Misfit(f"{key} has type {kind} where {np.dtype(dtype)} was expected")
    taken = sum(head.nbytes for head in heads.values()) + length * step_bytes(layout)
    if taken > SMALL and taken > memory_limit() / SHARE:
        raise Misfit(f"claims {length:,} steps, which take {size(taken)} of memory")
    return length


def finite(value: np.ndarray) -> bool:
    """True if all numbers of an array are finite in single precision."""
    if value.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(np.float32, copy=False)).all())


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """True if values of a shape fit another: an axis of size 1 at the end, of channels, may be left out of several."""
    if len(wanted) > 1:
        return wanted in (shape, (*shape, 1))
    return int(np.prod(shape)) == int(np.prod(wanted))


class EpisodeWriter:
    """Collect the steps of environments and write each episode when it ends.

    The oldest files are deleted so that the directory has at most `limit` steps, but none of those that are held, and
    nothing that is no episode.

    Args:
      directory: of the files, created if missing; count: number of environments; limit: in agent steps.
      held: function that returns the names of files which are needed still.
      mine: function of the name of a file that is there already: whether to count it, and perhaps delete it.
      later: function that is given what is to be done on disk, in order, as a function without arguments; by default it
        is done at once.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        count: int,
        limit: int,
        held: Callable[[], Collection[str]] = frozenset,
        mine: Callable[[str], bool] = bool,
        later: Callable[[Callable[[], object]], object] = lambda job: job(),
    ):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.steps: list[list[Step]] = [[] for _ in range(count)]
        self.limit, self.held, self.later = limit, held, later
        paths = (path for path in by_age(episode_files(self.directory)) if mine(path.name))
        found = ((path, npz.steps_in(path)) for path in paths)
        self.files = collections.deque((path, length) for path, length in found if length)
        self.total = sum(length for _, length in self.files)

    def add(self, index: int, step: Step) -> tuple[str, int] | None:
        """Append {key: value} of one environment; return (name, length) of its file if it is the last, else None."""
        if step["is_first"]:
            self.steps[index] = []
        self.steps[index].append(step)
        return self.flush(index) if step["is_last"] else None

    def flush(self, index: int) -> tuple[str, int] | None:
        """Write the unfinished episode of one environment; return (name, length), or None if there is none."""
        steps, self.steps[index] = self.steps[index], []
        if len(steps) < 2:
            return None
        path = self.directory / new_name(len(steps))
        self.later(functools.partial(_write_steps, path, steps))
        self.files.append((path, len(steps)))
        self.total += len(steps)
        if self.total > self.limit:
            self._forget()
        return path.name, len(steps)

    def _forget(self):
        """Delete the oldest files until the rest is within the limit, the newest and those that are held aside."""
        held = self.held()
        kept: collections.deque[tuple[pathlib.Path, int]] = collections.deque()
        while len(self.files) > 1 and self.total > self.limit:
            path, length = self.files.popleft()
            if path.name in held:
                kept.append((path, length))
            else:
                self.total -= length
                self.later(functools.partial(path.unlink, missing_ok=True))
        self.files = kept + self.files


def _write_steps(path: pathlib.Path, steps: Sequence[Step]) -> None:
    """Write the steps of an episode as one compressed .npz, atomically."""
    save_episode(path.parent, {key: np.stack([step[key] for step in steps]) for key in steps[0]}, path.name)


def episode_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Return what is called an episode file in a folder, sorted by name; nothing if it does not exist."""
    return sorted(pathlib.Path(folder).expanduser().glob("*.npz"))


def by_age(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Return files oldest first, as the file system has it: names tell the time of a zone, and clocks are set."""

    def age(path):
        try:
            return path.lstat().st_mtime_ns, path.name
        except OSError:  # it was deleted meanwhile
            return 0, path.name

    return sorted(paths, key=age)
