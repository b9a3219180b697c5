"""Signals: what they ask of a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tools import NonFiniteLoss

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is that of a terminal that is closed
SAVING = "SIGUSR1"  # what job schedulers send some time before the end


class Interrupted(KeyboardInterrupt):
    """A second signal broke off the waiting for an environment."""


@contextlib.contextmanager
def signals_noted(
    run: Any,
    acknowledge: Callable[..., Any] = lambda name, again=False: None,
    compiles: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Let signals set attributes of `run`, which it acts on when what it has in hand is done.

    SIGINT, SIGTERM and SIGHUP, unless that is ignored, set `stopped` to their number, which ends the run in good order.
    A second one breaks off an environment that does not answer (Interrupted), or a run that compiles; a third ends the
    run wherever it is.
    SIGUSR1 sets `save_asked`.

    Args:
      acknowledge: function of a signal's name, and True if it is not the first; called from within the handler.
      compiles: function that tells whether the run is compiling, which may take minutes.
    """
    again = 0

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal again
        if not run.stopped:
            run.stopped = number
            acknowledge(signal.Signals(number).name)
            return
        again += 1
        if again > 1 or compiles():
            raise KeyboardInterrupt
        if awaits_environment(frame):
            raise Interrupted
        acknowledge(signal.Signals(number).name, True)

    def save(number: int, frame: FrameType | None) -> None:
        run.save_asked = True

    handlers = dict.fromkeys(ENDING, end) | {SAVING: save}
    known = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    hup = getattr(signal, "SIGHUP", None)
    if hup and signal.getsignal(hup) == signal.SIG_IGN:  # as nohup has it
        del known[hup]
    before = {number: signal.signal(number, handler) for number, handler in known.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def given_up_if_stopped(run: Any) -> Iterator[None]:
    """Let a `Run` that is ending leave a learn call that fails: the signal may have hit a compiler at work, too."""
    try:
        yield
    except Exception as error:
        if not run.stopped or isinstance(error, NonFiniteLoss):
            raise
        run.out.say("warning", f"the update in hand was given up ({type(error).__name__})")


def awaits_environment(frame: FrameType | None) -> bool:
    """True if the code that a signal met was called to step, render or wait for environments."""
    while frame:
        if frame.f_globals.get("__name__") == "envs.parallel":
            return True
        frame = frame.f_back
    return False
