"""Pure functions and small clocks that every other room uses."""

import fcntl
import functools
import math
import os
import random
import time
import uuid

import numpy as np
import torch


class UserError(Exception):
    """A mistake that the user can mend: printed as one line on stderr, exit status 2."""


# ---------------------------------------------------------------------------
# Clocks: each answers "now?" for a counter that only grows, and can be saved


class Every:
    """True when `step` has passed a multiple of `period` since the last True; 0 or less means never."""

    def __init__(self, period, first=True):
        self.period = period
        self.next = -math.inf if first else period
        self.step = 0

    def __call__(self, step):
        self.step = step
        if self.period <= 0 or step < self.next:
            return False
        self.next = (step // self.period + 1) * self.period
        return True

    def state_dict(self):
        return {"next": self.next, "step": self.step}

    def load_state_dict(self, state):
        """Go on from a state; one that was saved with a longer period waits no longer than this one's."""
        self.next, self.step = state["next"], state.get("step", 0)  # older states do not tell
        if self.period > 0:
            self.next = min(self.next, (self.step // self.period + 1) * self.period)


class Ratio:
    """How many times to act so that the total is floor(ratio * steps), exactly, however the calls fall.

    Args:
      ratio: times for a step.
      burst: act in multiples of this many times, when they are due.
      first: times at the first call, beyond the ratio.
    """

    def __init__(self, ratio, burst=1, first=0):
        self.ratio, self.burst, self.first = ratio, burst, first
        self.start = None
        self.done = self.step = 0

    def __call__(self, step):
        self.step = step
        if self.start is None:
            self.start = step
            return self.first
        due = math.floor((step - self.start) * self.ratio + 1e-9) - self.done
        due -= due % self.burst
        self.done += due
        return due

    def state_dict(self):
        return {"start": self.start, "done": self.done, "step": self.step, "ratio": self.ratio}

    def load_state_dict(self, state):
        """Go on from a state; one that was saved with another ratio leaves nothing to make up for."""
        self.start, self.done, self.step = state["start"], state["done"], state.get("step", 0)
        if state.get("ratio", self.ratio) != self.ratio and self.start is not None:
            self.start, self.done = self.step, 0


class Rates:
    """Growth per second of counters since the last call."""

    def __init__(self, **counters):
        self.time, self.counters = time.monotonic(), counters

    def __call__(self, **counters):
        """counters: the same names as at construction, now. Returns {name: growth per second}."""
        now = time.monotonic()
        seconds = max(now - self.time, 1e-9)
        rates = {name: (value - self.counters[name]) / seconds for name, value in counters.items()}
        self.time, self.counters = now, counters
        return rates


# ---------------------------------------------------------------------------
# Randomness


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**64)


def derive_seed(seed, *path):
    """A 31-bit seed that is a function of `seed` and a path of small integers, distinct for distinct paths."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0] >> 1)


def get_rng_state():
    """The state of every global generator, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state):
    """Undo `get_rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ---------------------------------------------------------------------------
# Files


def atomic_write(path, write):
    """Call `write(file)` on a temporary file beside `path` and rename it: the path holds all of it or what it held.

    Args:
      path: where the content shall stand.
      write: function of a binary file open for writing.
    """
    path = os.fspath(path)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def atomic_save(path, state):
    """`torch.save(state, path)`, atomically. Raises OSError where the path cannot take it."""
    try:
        atomic_write(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch finds its archive incomplete after a write that failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def hold(directory):
    """Lock a directory until the process ends, or until the function that is returned is called.

    Raises UserError if it is held already. Where the file system knows no locks, nothing is held.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{directory}: another run is writing there") from None
    except OSError:
        pass
    return functools.partial(os.close, handle)
