"""One-line errors that name the cure."""

import difflib

from tools import UserError


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown(what: str, name: str, valid) -> UserError:
    """The error to raise for a `name` that is not among the `valid` ones: it offers the nearest."""
    near = difflib.get_close_matches(name, list(valid), 1, cutoff=0.0)
    return UserError(f"unknown {what} '{name}'" + (f": did you mean '{near[0]}'?" if near else ": there is none"))
