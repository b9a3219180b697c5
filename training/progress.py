"""The line that tells how far a run is: rewritten in place on a terminal, a line every so often elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from training.console import Harmless, shown

REFRESH = 0.5  # seconds between two pictures of the line on a terminal
INTERVAL = 30.0  # seconds between lines where there is none
MARK = 1.0  # seconds between the counts that rates are made from
RECENT = 10  # counts that a rate looks back on; what is left of the time looks back on all
COUNTS = 300
ENOUGH = 10  # updates that tell how long one takes
LEAST = 0.1  # seconds that tell a rate: the first updates are made while they are compiled, where time does not count
LONG = ("compiling", "evaluating", "filming")  # stages that a file hears of when they first begin

Field = tuple[int, str]  # how important a text is, 0 most, and the text: where room is short, 0 stays longest


# ---------------------------------------------------------------------------
# The line


class _Terminal(Console):
    """A console that takes its words as they are, one line each, and whose pipe may break."""

    def __init__(self, file: Any):
        super().__init__(
            file=file,
            force_terminal=True,
            force_interactive=True,
            force_jupyter=False,
            soft_wrap=True,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def on_broken_pipe(self) -> None:
        """Lose what nobody reads, where rich would end the process."""


class Line:
    """One line of fields that change, and lines of text above it.

    Args:
      stream: where it stands, stderr if none is given; interval: seconds between lines where that is no terminal.
    """

    def __init__(self, stream: IO[str] | None = None, interval: float = INTERVAL):
        self.out = Harmless(stream) if stream else Harmless()
        terminal = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.live = Live(console=_Terminal(Harmless(self.out.stream)), auto_refresh=False) if terminal else None
        self.interval = REFRESH if terminal else interval
        self.shown_at = monotonic()

    def due(self) -> bool:
        """True if the line is as old as its interval."""
        return monotonic() - self.shown_at >= self.interval

    def show(self, fields: Sequence[Field]) -> None:
        """Show fields now, on a terminal as many as there is room for."""
        self.shown_at = monotonic()
        if not self.live:
            self.message(_joined(fields))
            return
        with _nowhere():
            if not self.live.is_started:  # from here on, what else is printed comes above the line
                self.live.start()
                self.live.console.show_cursor()  # rich hides it, and a kill would leave it hidden
            self.live.update(fitted(fields, self.live.console.width - 1), refresh=True)

    def message(self, text: Any) -> None:
        """Print a line of text."""
        if self.live and self.live.is_started:
            with _nowhere():
                self.live.console.print(Text(shown(text)))
        else:
            self.out.write(f"{shown(text)}\n")
            self.out.flush()

    def interject(self, text: str) -> None:
        """Print a line of text at once; for signal handlers, which may interrupt the stream's own writing."""
        erase = "\r\x1b[2K" if self.live and self.live.is_started else ""
        with _nowhere():
            os.write(self.out.fileno(), f"{erase}{shown(text)}\n".encode())

    def close(self) -> None:
        """End the line and leave it where it is."""
        if self.live:
            with _nowhere():
                self.live.stop()


def _nowhere() -> contextlib.AbstractContextManager:
    """Forget the errors of a stream without a descriptor, and of a terminal that is gone."""
    return contextlib.suppress(OSError, ValueError)


def fitted(fields: Sequence[Field], width: int) -> Text:
    """Return as many fields as fit a width, in their order; of the most important one what fits."""
    kept = list(fields)
    while len(kept) > 1 and Text(_joined(kept)).cell_len > width:
        kept.remove(max(kept, key=lambda field: field[0]))
    line = Text(_joined(kept), no_wrap=True, end="")
    line.truncate(max(width, 0), overflow="crop")
    return line


def _joined(fields: Sequence[Field]) -> str:
    return shown("  ".join(text for _, text in fields))


# ---------------------------------------------------------------------------
# What it says of a run


class Ahead(NamedTuple):
    """The frames and updates that a run has before it, and how often each stage comes, such as evaluating."""

    frames: int = 0
    updates: int = 0
    stages: Mapping[str, int] = {}


class Progress:
    """Tells in which stage a run is, how far, how fast, and when it will be done.

    Rates are those of the recent past without the time in stages such as evaluations. The time to come is that of the
    updates ahead, or of the frames if there are none, and of the stages ahead as far as there were such. Before an
    update was measured it is not known.

    Args:
      total: frames of the whole run; step, updates: at its start; best: highest return so far, or None.
      ahead: function that returns an Ahead; stream, interval: see Line.
    """

    def __init__(
        self,
        total: int,
        step: int = 0,
        updates: int = 0,
        best: float | None = None,
        ahead: Callable[[], Ahead] = Ahead,
        stream: IO[str] | None = None,
        interval: float = INTERVAL,
    ):
        self.total, self.best, self.ahead = total, best, ahead
        self.line = Line(stream, interval)
        self.name, self.step, self.updates = "", step, updates
        self.share: float | None = (
            None  # of the learner's stage, and what it was when the stage was first seen, and when
        )
        self.begun = 0.0, 0.0
        self.last: float | None = None
        self.stages: list[tuple[str, float]] = []  # those that are under way, with their starts
        self.detail = ""  # of the last of them
        self.waited = 0.0  # seconds in stages
        self.spent: dict[str, tuple[int, float]] = {}  # {stage: how often, seconds in all}
        self.marks = deque([(self._now(), step, updates)], maxlen=COUNTS)
        self.unshown = False

    def update(self, name: str, step: int, updates: int, share: float | None = None) -> None:
        """Take "prefill" or "learning", frames and updates; ends what `begin` began.

        Of an agent that learns in stages, take the name of the present one, and the share of it that is done.
        """
        while self.stages:
            self.end()
        now = self._now()
        if name != self.name:
            self.begun = now, share or 0.0
            if self.name:
                self.marks.clear()
        self.name, self.step, self.updates, self.share, self.unshown = name, step, updates, share, True
        if not self.marks or now - self.marks[-1][0] >= MARK:
            self.marks.append((now, step, updates))
        if self.line.due():
            self._show()

    def episode(self, score: float) -> None:
        """Take the return of a training episode."""
        self.last = score
        self.best = score if self.best is None else max(self.best, score)

    def begin(self, name: str) -> None:
        """Enter a stage, in which neither frames nor updates count."""
        self.stages.append((name, monotonic()))
        self.detail = ""
        if self.line.live:
            self._show()
        elif name in LONG and name not in self.spent:
            self.line.message(f"{name} at step {self.step:,}")

    def end(self) -> None:
        """Leave the stage that was entered last."""
        name, start = self.stages.pop()
        seconds = monotonic() - start
        count, before = self.spent.get(name, (0, 0.0))
        self.spent[name] = count + 1, before + seconds
        self.waited += 0.0 if self.stages else seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Be in a stage during the body."""
        self.begin(name)
        depth = len(self.stages)
        try:
            yield
        finally:
            while len(self.stages) >= depth:
                self.end()

    def tell(self, detail: str) -> None:
        """Say how far the stage under way is."""
        self.detail = detail
        if self.line.live and self.line.due():
            self._show()

    def close(self) -> None:
        """Show where the run ended, and end the line."""
        while self.stages:
            self.end()
        if self.name and self.step >= self.total:
            self.name = "done"
        if self.unshown or (self.line.live and self.line.live.is_started):
            self._show()
        self.line.close()

    # -- numbers

    def _now(self) -> float:
        """Return the time on a clock that stands still in stages."""
        return (self.stages[0][1] if self.stages else monotonic()) - self.waited

    def _since(self, marks: int) -> tuple[float, int, int]:
        """Return the seconds, frames and updates since the mark so many back."""
        then, step, updates = self.marks[max(0, len(self.marks) - marks)]
        return max(self._now() - then, 1e-3), self.step - step, self.updates - updates

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end of the run or of a learner's stage; None if they are not known."""
        if self.share is not None:
            done = self.share - self.begun[1]
            return (1 - self.share) * (self._now() - self.begun[0]) / done if done > 0 else None
        ahead = self.ahead()
        seconds, frames, updates = self._since(COUNTS)
        if (ahead.frames or ahead.updates) and seconds < LEAST:
            return None
        if ahead.updates and updates and (updates >= ENOUGH or not frames):
            left = ahead.updates * seconds / updates
        elif frames and (updates or not ahead.updates):
            left = ahead.frames * seconds / frames
        elif ahead.frames or ahead.updates:
            return None
        else:
            left = 0.0
        for name, times in ahead.stages.items():
            count, spent = self.spent.get(name, (1, 0.0))
            left += times * spent / count
        return left

    def _show(self) -> None:
        self.unshown = False
        stage = " ".join(filter(None, [self.stages[-1][0], self.detail])) if self.stages else self.name
        fields: list[Field] = [(0, stage)]
        if self.name:
            seconds, frames, updates = self._since(RECENT)
            fields += [
                (1, f"{100 * self.step // max(self.total, 1) if self.share is None else int(100 * self.share)}%"),
                (7, f"step {self.step:,}/{self.total:,}"),
                (4, f"{rate(frames, seconds)} fps"),
                (5, f"{rate(updates, seconds)} updates/s"),
                *([(3, f"return {number(self.last)}")] if self.last is not None else []),
                *([(6, f"best {number(self.best)}")] if self.best is not None else []),
            ]
            if self.share is not None and self.share < 1:
                fields.append((2, f"ETA of {self.name} {clock(self.seconds_left())}"))
            elif self.share is None and (self.step < self.total or self.ahead().updates):
                fields.append((2, f"ETA {clock(self.seconds_left())}"))
        self.line.show(fields)


def rate(count: int, seconds: float) -> str:
    """Return how many there were in a second; a dash for a time that tells nothing."""
    return number(count / seconds) if seconds >= LEAST else "\N{EN DASH}"


def number(value: float) -> str:
    """Return a number in at most six characters or so: 12.3, 512, -1733, 12.3k, 4.1M."""
    for limit, divisor, unit in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if abs(value) < limit:
            scaled = abs(value) / divisor
            digits = 2 if 0 < scaled < 1 else 1 if scaled < 100 else 0
            return f"{value / divisor:.{digits}f}{unit}"
    return f"{value:.1e}"


def clock(seconds: float | None) -> str:
    """Return a duration as hours, minutes and seconds, or as days and hours; a dash for None."""
    if seconds is None:
        return "\N{EN DASH}"
    hours, rest = divmod(max(int(seconds), 0), 3600)
    return f"{hours // 24}d {hours % 24:02}h" if hours >= 100 else f"{hours}:{rest // 60:02}:{rest % 60:02}"
