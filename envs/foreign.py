"""A boundary around the code of environments that run in this process."""

from __future__ import annotations

import sys
from typing import Any

from tools import UserError

# What an environment may set for all of its process: functions of torch that read it, and that set it.
MODES = {
    "get_default_dtype": "set_default_dtype",
    "is_grad_enabled": "set_grad_enabled",
    "get_num_threads": "set_num_threads",
    "are_deterministic_algorithms_enabled": "use_deterministic_algorithms",
}


class Foreign:
    """Runs an environment's code, in a `with` statement, as often as needed.

    The modes of PyTorch that it sets are in force in its own calls alone, and it cannot end this process.

    Args:
      name: of the environment, for messages.
    Raises UserError if the body raises SystemExit or KeyboardInterrupt.
    """

    def __init__(self, name: str):
        self.name = name
        torch = sys.modules.get("torch")  # where nobody has loaded it, there is nothing of ours to keep
        self.readers = [getattr(torch, name) for name in MODES] if torch else []
        self.setters = [getattr(torch, name) for name in MODES.values()] if torch else []
        self.theirs: list[Any] = []
        self.ours: list[Any] = []

    def __enter__(self):
        self.ours = [read() for read in self.readers]
        if self.theirs:
            self._switch(self.ours, self.theirs)

    def __exit__(self, kind, error, trace):
        theirs = [read() for read in self.readers]
        if theirs != self.ours:
            self.theirs = theirs
            self._switch(theirs, self.ours)
        if kind in (SystemExit, KeyboardInterrupt):  # but not a kind of our own: a second Ctrl-C
            said = f" ({error.args[0]})" if error.args and error.args[0] is not None else ""
            raise UserError(f"{self.name} would have ended the run: it raised {kind.__name__}{said}") from error

    def _switch(self, now: list[Any], wanted: list[Any]) -> None:
        for write, old, new in zip(self.setters, now, wanted, strict=True):
            if old != new:
                write(new)
