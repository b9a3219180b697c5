"""Lines for people: what is foreign in them is made visible, and printing them never fails.

Names of files, tasks and keys and the texts of exceptions come from elsewhere. A newline or an escape sequence in them
would forge lines or steer the terminal, so that every line passes `shown`. A stream that is closed, full or gone loses
what is printed, and nothing else.
"""

from __future__ import annotations

import sys
from typing import IO, Any

LEVELS = ("debug", "info", "warning", "error")
PLAIN = str.maketrans({"\N{EN DASH}": "-", "\N{RIGHTWARDS ARROW}": "->"})  # ours, where an encoding lacks them


def shown(text: Any) -> str:
    """Return a text as one line: what is not printable, such as a newline, as the escape that Python has for it."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Harmless:
    """A text stream on which writing never fails.

    Args:
      stream: what it writes to, or None; stderr as it is at each call if it is left out.
    """

    def __init__(self, *stream: IO[str] | None):
        self._given = stream

    @property
    def stream(self) -> IO[str] | None:
        """The stream that is written to."""
        return self._given[0] if self._given else sys.stderr

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """True if the stream is a terminal."""
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the stream's descriptor. Raises OSError if it has none."""
        if self.stream is None:
            raise OSError("no stream")
        return self.stream.fileno()

    def write(self, text: str) -> int:
        """Write a text, escaped where the encoding cannot show it."""
        try:
            if self.stream is not None:
                self.stream.write(encodable(text, self.encoding))
        except (OSError, ValueError):  # the latter from a stream that is closed
            pass
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            pass


def encodable(text: str, encoding: str) -> str:
    """Return a text that an encoding can show: signs of ours in plain letters, all else that it lacks as escapes."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def print_line(text: Any, *stream: IO[str] | None) -> None:
    """Print a text as one line on a stream, stderr if none is given."""
    out = Harmless(*stream)
    out.write(f"{shown(text)}\n")
    out.flush()


def is_printed(level: str, least: str) -> bool:
    """True if messages of a level are printed where `log_level` is `least`."""
    return LEVELS.index(level) >= LEVELS.index(least)


def warn_at(least: str, text: str) -> None:
    """Print a warning to stderr, unless `log_level` is above that."""
    if is_printed("warning", least):
        print_line(f"dreamer.py: warning: {text}")
