"""Steps of experience and the files that episodes are kept in.

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

import collections
import datetime
import pathlib
import re
import uuid

import numpy as np

from tools import atomic_write

# ---------------------------------------------------------------------------
# Steps


def stored_step(layout, obs, actions, index):
    """One environment's observation, reward and flags, and the action that led to them: zeros at is_first."""
    step = {key: obs[key][index] for key in layout if key in obs}
    return step | {key: action[index] * ~obs["is_first"][index] for key, action in actions.items()}


def step_layout(obs_space, act_spec):
    """{key: (shape, dtype)} of a stored step."""
    layout = {key: (space.shape, space.dtype) for key, space in obs_space.items()}
    layout = {key: (shape, np.int32 if dtype.kind == "i" else dtype) for key, (shape, dtype) in layout.items()}
    layout |= {key: ((width,), np.dtype(np.float32)) for key, width in act_spec.widths.items()}
    layout |= {"reward": ((), np.float32), "is_first": ((), bool), "is_last": ((), bool), "is_terminal": ((), bool)}
    return layout


# ---------------------------------------------------------------------------
# Episode files

NAME = re.compile(r"\d{8}T\d{6}[^-]*-.+-([0-9]+)\.npz")


def save_episode(directory, episode):
    """Write {key: (T, ...)} as one compressed .npz, atomically. Returns its path."""
    now = datetime.datetime.now().strftime("%Y%m%dT%H%M%SF%f")
    path = pathlib.Path(directory) / f"{now}-{uuid.uuid4().hex}-{len(episode['reward'])}.npz"
    atomic_write(path, lambda file: np.savez_compressed(file, **episode))
    return path


def load_episode(path, layout):
    """Read an episode file and bring it into the layout; unknown keys are ignored.

    Args:
      layout: {key: (shape, dtype)} of one step.
    Returns: {key: (T, ...)}
    Raises ValueError saying what is wrong with the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            episode = {key: file[key] for key in file.files if key in layout}
    except Exception as error:  # zipfile, zlib and NumPy have dozens of their own for a damaged or foreign file
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
    episode["is_last"][-1] = True  # also where a run was stopped: what follows in a stream is another episode
    return episode


def finite(value):
    """Whether all numbers of an array are finite in single precision."""
    if value.dtype.kind != "f":
        return True
    with np.errstate(over="ignore"):
        return bool(np.isfinite(value.astype(np.float32, copy=False)).all())


def fits(shape, wanted):
    """Whether values of a shape can be brought into another: images by a single channel alone, the rest by size."""
    if len(wanted) == 3:
        return shape == wanted or (*shape, 1) == wanted
    return int(np.prod(shape)) == int(np.prod(wanted))


class EpisodeWriter:
    """Collects the steps of environments and writes each episode when it ends.

    The oldest files are deleted so that the directory holds no more than `limit` steps.

    Args:
      directory: where the files go, made if it is not there; count: number of environments; limit: in agent steps.
    """

    def __init__(self, directory, count, limit):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.steps = [[] for _ in range(count)]
        self.limit = limit
        self.files = collections.deque((path, length_of(path)) for path in self.paths())
        self.total = sum(length for _, length in self.files)

    def paths(self):
        """The episode files that exist, oldest first."""
        return sorted(self.directory.glob("*.npz"))

    def add(self, index, step):
        """Append {key: value} of one environment; returns (name, length) of the file that it completes, or None."""
        if step["is_first"]:
            self.steps[index] = []
        self.steps[index].append(step)
        return self.flush(index) if step["is_last"] else None

    def flush(self, index):
        """Write the episode of one environment as far as it went; returns (name, length), or None if there is none."""
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


def length_of(path):
    """The length in steps that a file's name states; 0 if it is not of the form {time}-{uuid}-{length}.npz."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0
