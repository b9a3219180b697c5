"""One-line errors that name the cure."""

from __future__ import annotations

from collections.abc import Iterable

from tools import UserError, nearest


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, its name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown(what: str, name: str, valid: Iterable[str], meant: str = "") -> UserError:
    """Return the error to raise for a `name` that is not among the `valid` ones: it offers `meant`, or the nearest."""
    near = meant or nearest(name, valid, cutoff=0.0)
    return UserError(f"unknown {what} '{name}'" + (f": did you mean '{near}'?" if near else ": there is none"))
