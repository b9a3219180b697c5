"""Shared parts of benchmarks: command lines, tables, and pages with tables between markers."""

import contextlib
import datetime
import math
import os
import pathlib
import platform
import sys

import numpy as np

from tools import UserError, atomic_write


def mean_and_error(values):
    """Return the mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def digits(value):
    """Write a number to three significant digits: 4,710 and 0.273; a dash for nan."""
    if math.isnan(value):
        return "-"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def markdown(head, rows):
    """Return a table; bars within cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def put_between(page, name, text):
    """Return the page with `text` between its markers `<!-- name:begin -->` and `<!-- name:end -->`, on its own lines.

    Raises UserError unless each marker is there once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, middle, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not (middle and found) or begin in rest or end in before + after:
        raise UserError(f"the page must have {begin} and, after it, {end} just once")
    return f"{before}{begin}\n{text}\n{end}{after}"


def write_between(path, name, text):
    """Put `text` between its markers in the page at `path`, atomically."""
    page = put_between(pathlib.Path(path).read_text(encoding="utf-8"), name, text)
    atomic_write(path, lambda file: file.write(page.encode()))


def all_cores():
    """Return the cores that this process may use, or [] if the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def processor():
    """Return the processor's name."""
    with contextlib.suppress(OSError, StopIteration):  # no Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine():
    """Describe the machine and its load in words."""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    count, today = len(all_cores()) or os.cpu_count(), datetime.date.today().isoformat()
    cores = f"{count} core{'s' * (count != 1)}"
    return f"{processor()}, {cores}{load}, Python {platform.python_version()}, {today}"


def publish(parser, argv, text_of, marker=None, **defaults):
    """Run the command line of a benchmark that prints a text, and puts it between markers of the page --write.

    Args:
      parser: Parser with --write; text_of: function of the arguments that returns the text.
      marker: name of the markers; the argument `command` if it is None; defaults: of arguments that nobody gives.
    Returns: the exit status.
    """
    parser.add_argument("--write", metavar="PAGE", help="put the table between its markers in this file")
    parser.set_defaults(**defaults)
    try:
        args = parser.parse_args(argv)
        name = marker or args.command
        if args.write:  # so that a missing marker is reported before the runs
            put_between(pathlib.Path(args.write).read_text(encoding="utf-8"), name, "")
        text = text_of(args)
        print(text)
        if args.write:
            write_between(args.write, name, text)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
