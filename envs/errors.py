"""One-line errors that name the cure."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

from tools import UserError, nearest


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, its name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown(what: str, name: str, valid: Iterable[str], meant: str = "") -> UserError:
    """Return the error to raise for a `name` that is not among the `valid` ones: it offers `meant`, or the nearest."""
    near = meant or nearest(name, valid, cutoff=0.0)
    return UserError(f"unknown {what} '{name}'" + (f": did you mean '{near}'?" if near else ": there is none"))


def described(error: BaseException) -> str:
    """Return an exception in one line, with its type and the place in the file that it comes from."""
    if isinstance(error, ModuleNotFoundError) and error.name == "gym":
        return "No module named 'gym': import gymnasium as gym, which has the same names and is here"
    if isinstance(error, ImportError):
        return one_line(error)
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"
