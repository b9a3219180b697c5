"""Which checkpoints stay beside latest.pt: the best, and one for every so many frames."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from tools import Every, UserError
from training.checkpoint import atomic_save, load_checkpoint


class Keeper:
    """Writes checkpoints that stay: best.pt and step_<frames>.pt, each atomically.

    Args:
      logdir: of the run; rules: "best" (by the return of evaluations) and "every:N" (frames).
      state: function that returns what a checkpoint holds.
    """

    def __init__(self, logdir: pathlib.Path, rules: Sequence[str], state: Callable[[], dict[str, Any]]):
        self.logdir, self.state = logdir, state
        self.path = logdir / "best.pt" if "best" in rules else None
        self.periods = [int(rule.partition(":")[2]) for rule in rules if rule != "best"]
        self.best = -math.inf

    def begin(self, step: int, warn: Callable[[str], None]) -> None:
        """Begin at a number of frames, and learn from best.pt, if there is one, what is to be surpassed."""
        self.clocks = [Every(period, first=False) for period in self.periods]
        for clock in self.clocks:
            clock.load_state_dict({"next": math.inf, "step": step})
        if self.path and self.path.exists():
            try:
                self.best = float(load_checkpoint(self.path, {"eval_return": int | float})["eval_return"])
            except UserError as error:
                warn(f"{error}: the next evaluation is the best")

    def serve(self, step: int) -> None:
        """Keep a checkpoint if one is due after `step` frames."""
        if any([clock(step) for clock in self.clocks]):  # noqa: C419 (each is to be asked)
            atomic_save(self.logdir / f"step_{step:09d}.pt", self.state())

    def evaluated(self, score: float | None) -> None:
        """Keep the agent if the return of a whole evaluation, or None, is the best so far: the first of equals."""
        if self.path and score is not None and score > self.best:
            self.best = score
            atomic_save(self.path, {**self.state(), "eval_return": score})
