"""What every other file may use, without PyTorch: errors of the user, seeds, clocks, atomic files, safe streams."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import math
import os
import pathlib
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

# Colors (RGB) of predictions: a blue where a model sees, an orange where it imagines; the color-blind tell them apart.
SEEN, IMAGINED = (0, 114, 178), (230, 159, 0)


class UserError(Exception):
    """A mistake that the user can mend: printed as one line on stderr, exit status 2."""


class NonFiniteLoss(Exception):
    """The loss of an update is not a number, or infinite: there is nothing to go on from but the last checkpoint."""


class Lost(Exception):
    """Another process of the run is gone, so that what all of them compute cannot be."""


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Raise Lost for whatever torch.distributed raises in the body when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost("another rank of the run is gone") from error


class Parser(argparse.ArgumentParser):
    """Reports a mistake in a command line as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def plain(name: str) -> str:
    """Return the letters and digits of a name in lower case: what is left where spellings differ."""
    return "".join(filter(str.isalnum, name.lower()))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is spelled most like `name`, case and punctuation aside, or None.

    cutoff: how alike they must be, from 0 to 1.
    """
    names = {plain(each): each for each in known}
    near = difflib.get_close_matches(plain(name), names, 1, cutoff)
    return names[near[0]] if near else None


def derive_seed(seed: int, *path: int) -> int:
    """Return a 31-bit seed that is a function of `seed` and a path of small integers, distinct for distinct paths."""
    import numpy as np  # a tenth of a second that a misspelt flag need not wait for

    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0] >> 1)


# ---------------------------------------------------------------------------
# Clocks: each answers "now?" for a counter that only grows, and can be saved

SECONDS = {"s": 1, "m": 60, "h": 3600}


class Every:
    """True when `step` has passed a multiple of `period` since the last True; 0 or less means never.

    Args:
      period: in steps, or a time such as 90s, 10m or 1.5h.
      first: True at the very first call as well.
    """

    def __init__(self, period: float | str, first: bool = True):
        self.by_time = isinstance(period, str)
        self.period = float(period[:-1]) * SECONDS[period[-1]] if isinstance(period, str) else period
        self.next = -math.inf if first and not self.by_time else self.now(0) + self.period
        self.step = 0.0

    def now(self, step: float) -> float:
        """Return where the clock's hand stands: at the step, or at the time."""
        return time.monotonic() if self.by_time else step

    def __call__(self, step: float) -> bool:
        self.step = step
        now = self.now(step)
        if self.period <= 0 or now < self.next:
            return False
        self.next = now + self.period if self.by_time else (now // self.period + 1) * self.period
        return True

    def state_dict(self) -> dict[str, float]:
        return {"next": -math.inf if self.by_time else self.next, "step": self.step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a state; one that was saved with a longer period waits no longer than this one's."""
        if self.by_time:
            return
        self.next, self.step = state["next"], state.get("step", 0)  # older states lack the step
        if self.period > 0:
            self.next = min(self.next, (self.step // self.period + 1) * self.period)


class Ratio:
    """Says how often to act so that the total is floor(ratio * steps), exactly, however the calls fall.

    Args:
      ratio: times for a step.
      burst: act in multiples of this many times, when they are due.
      first: times at the first call, beyond the ratio.
    """

    def __init__(self, ratio: float, burst: int = 1, first: int = 0):
        self.ratio, self.burst, self.first = ratio, burst, first
        self.start: int | None = None
        self.done = self.pending = self.step = 0

    def due(self, step: int) -> int:
        """Return how many times to act now; each is to be told to `tick`."""
        self.step = step
        if self.start is None:
            self.start, self.pending, self.done = step, self.first, -self.first
        elif not self.pending:
            due = math.floor((step - self.start) * self.ratio + 1e-9) - self.done
            self.pending = due - due % self.burst
        return self.pending

    def tick(self) -> None:
        """Count one time as done."""
        self.pending -= 1
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("start", "done", "pending", "step", "ratio")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; one that was saved with another ratio leaves nothing to make up for."""
        self.start, self.done, self.step = state["start"], state["done"], state.get("step", 0)
        self.pending = state.get("pending", 0)
        if state.get("ratio", self.ratio) != self.ratio and self.start is not None:
            self.start, self.done, self.pending = self.step, 0, 0

    def stage(self) -> None:
        """There is one kind of time, and no stage to tell of."""

    def finished(self) -> bool:
        """False: as long as there are steps, there is something to do."""
        return False

    def left(self, step: int, begin: int) -> int:
        """Return how many times are still to come until `step`, if the first call of `due` is or was at `begin`."""
        start, done = (begin, -self.first) if self.start is None else (self.start, self.done)
        total = math.floor((step - start) * self.ratio + 1e-9)
        return max(0, total - total % self.burst - done)


class Rates:
    """Growth per second of counters since the last call."""

    def __init__(self, **counters: float):
        self.time, self.counters = time.monotonic(), counters

    def __call__(self, **counters: float) -> dict[str, float]:
        """Return {name: growth per second} of counters of the same names as at construction."""
        now = time.monotonic()
        seconds = max(now - self.time, 1e-9)
        rates = {name: (value - self.counters[name]) / seconds for name, value in counters.items()}
        self.time, self.counters = now, counters
        return rates


# ---------------------------------------------------------------------------
# What is read from a file, and may be anyone's


def misfit(value: Any, form: Any, name: str = "") -> str | None:
    """Return in what a tree of dicts and lists differs from a form, such as "counters.updates is missing", or None.

    Args:
      form: {key: form} for a dict with these keys and any others, those whose name here ends in "?" being optional;
        {type: form} for a dict whose keys are all of the type; [form] for a list of any length; (form, ...) for one of
        this length; a type or a union of types; or a function that is true of what fits.
      name: of the value, dotted.
    """
    if isinstance(form, dict):
        return misfit(value, Mapping, name) or _misfit_of_keys(value, form, f"{name}." if name else "")
    if isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            return f"{name or 'it'} is no list"
        if isinstance(form, tuple) and len(value) != len(form):
            return f"{name or 'it'} has {len(value)} entries instead of {len(form)}"
        forms = form if isinstance(form, tuple) else form * len(value)
        found = (misfit(item, part, f"{name}[{i}]") for i, (item, part) in enumerate(zip(value, forms, strict=True)))
        return next(filter(None, found), None)
    is_type = not callable(form) or isinstance(form, type)  # a union of types cannot be called
    fits = isinstance(value, form) and (form is bool or not isinstance(value, bool)) if is_type else form(value)
    return None if fits else f"{name or 'it'} is not what belongs there"


def _misfit_of_keys(value: Mapping, form: Mapping, prefix: str) -> str | None:
    for key, part in form.items():
        if isinstance(key, type):
            wrong = next((word for word in value if not isinstance(word, key)), None)
            found = (misfit(item, part, f"{prefix}{word}") for word, item in value.items())
            reason = next(filter(None, found), None) if wrong is None else f"{prefix}{wrong} is no such key"
        else:
            word = key.removesuffix("?")
            missing = f"{prefix}{word} is missing" if word == key else None
            reason = misfit(value[word], part, f"{prefix}{word}") if word in value else missing
        if reason:
            return reason
    return None


def accepts(setter: Callable[[Any], Any], state: Any) -> bool:
    """True if a generator that serves for nothing else takes a state; it alone knows what is one."""
    try:
        setter(state)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, RuntimeError):
        return False
    return True


# ---------------------------------------------------------------------------
# Files

LOCK = ".lock"  # its first byte is what Windows locks, so that others read from the second on
TEMPORARY = re.compile(
    r"(latest\.pt|best\.pt|replay-\d+(-\d+)?\.pt|step_\d+\.pt|config\.yaml|wandb_id\.txt|\d{8}T\d{6}\w*-\w+-\d+\.npz)"
    r"\.[0-9a-f]{8}\.tmp"
)


def atomic_write(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path` and rename it: the path holds all of it or what it held."""
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


def sweep(directories: Sequence[pathlib.Path]) -> None:
    """Remove the temporary files that a run which was killed has left in directories that none writes to now."""
    for directory in directories:
        for path in directory.glob("*.tmp"):
            if TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[bool]:
    """Lock a directory against other processes, by a file in it. Raises UserError if another holds it, and names it.

    Children do not inherit the lock, and a process that is killed leaves none, only the file. The value is False where
    there is no lock, as the file system knows none or cannot be written.
    """
    from filelock import FileLock, Timeout  # a tenth of a second that a misspelt flag need not wait for

    path = pathlib.Path(directory) / LOCK
    try:
        lock = FileLock(path, blocking=False, on_acquired=_sign)
    except ValueError:  # a system without locks, where the file itself is one
        lock = FileLock(path, blocking=False)
    with contextlib.suppress(OSError, NotImplementedError):
        try:
            lock.acquire()
        except Timeout:  # an OSError
            raise UserError(f"{directory}: another run is writing there{_signed(path)}") from None
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                path.unlink()
            lock.release()


def _sign(handle: int) -> None:
    """Write who holds a lock into its file, which a full disk need not take."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, f"\nprocess {os.getpid()} on {socket.gethostname()}\n".encode())


def _signed(path: pathlib.Path) -> str:
    """Return ": who" for who holds a lock, as far as its file tells."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(1)
        who = file.read(300).decode("ascii", "replace").strip()
        return f": {who}" if re.fullmatch(r"process \d+ on [\w.-]+", who) else ""
    return ""


# ---------------------------------------------------------------------------
# Standard streams


class _Lossy(io.RawIOBase):
    """A descriptor to write on that never fails: what it does not take is lost."""

    def __init__(self, number: int):
        self.number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        try:
            return os.write(self.number, data)
        except OSError:  # nobody reads it, the disk is full, the terminal is gone
            return len(data)


def guard_output() -> None:
    """Make stdout and stderr streams that cannot fail, for all that prints in this process, until its very end.

    What a broken pipe, a full disk or a dead terminal does not take is lost; a character that the encoding lacks is
    escaped. Standard descriptors that are closed are opened on the null device: the next file to be opened would have
    their number, and what is printed in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        buffered = io.BufferedWriter(_Lossy(number))
        line_buffering = name == "stderr" or os.isatty(number)
        write_through = getattr(old, "write_through", False)
        encoding = getattr(old, "encoding", None) or "utf-8"
        stream = io.TextIOWrapper(buffered, encoding, "backslashreplace", None, line_buffering, write_through)
        setattr(sys, name, stream)
