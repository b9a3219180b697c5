"""How much memory steps take, and how much there is: the machine's, or what its owner gives to this process."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tools import UserError

CGROUPS = pathlib.Path("/sys/fs/cgroup")  # where Docker, Kubernetes, Slurm and systemd set limits
MINE = pathlib.Path("/proc/self/cgroup")  # which of them hold for this process
LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # of version 2, which also slows down, and 1
USUAL = 0.8  # share of the memory that a replay may take without a word: environments and networks need some as well


class Need(NamedTuple):
    """The memory of a replay when it is full.

    steps: its capacity; needed: their bytes; limit: bytes of memory that there are, infinite if that is not known.
    """

    steps: int
    needed: int
    limit: float

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.needed / self.steps / 1024:.1f} KB, {size(self.needed)} of memory"


def need(layout: Mapping[str, tuple[tuple[int, ...], Any]], steps: int) -> Need:
    """Return the Need of a number of steps of {key: (shape, dtype)}."""
    return Need(steps, step_bytes(layout) * steps, memory_limit())


def check(needs: Need) -> str | None:
    """Return a warning if a replay leaves little of the memory. Raises UserError if it does not fit."""
    if needs.needed <= USUAL * needs.limit:
        return None
    most = int(USUAL * needs.limit * needs.steps / needs.needed)
    step = f"{needs.needed / needs.steps / 1024:.1f} KB"
    if needs.needed > needs.limit:
        why = f"{needs.steps} steps of {step} do not fit into {size(needs.limit)} of memory"
        raise UserError(f"{why}: lower --dataset_size to at most {most}")
    return f"the replay will grow to {needs}, of {size(needs.limit)}: --dataset_size {most} leaves room for the rest"


def step_bytes(layout: Mapping[str, tuple[tuple[int, ...], Any]]) -> int:
    """Return the size in bytes of one step of {key: (shape, dtype)}."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())


def size(count: float) -> str:
    """Return a number of bytes in words: 12.3 GiB, 640 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"


def memory_limit() -> float:
    """Return the bytes of memory that this process may use, infinity if that is not known."""
    known = getattr(os, "sysconf_names", {})
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in known else math.inf
    return min([machine, *_group_limits()])


def _group_limits() -> list[float]:
    """Return the limits of the control groups that this process is in, those above them included."""
    limits = []
    for line in _text(MINE).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        group = root / path.lstrip("/")  # in a container it may name what is only seen from outside
        for folder in [group, *group.parents]:
            limits += [float(text) for text in (_text(folder / name).strip() for name in LIMITS) if text.isdigit()]
            if folder == root:
                break
    return [limit for limit in limits if limit > 0]  # version 1 says "none" by a number beyond any machine's


def _text(path: pathlib.Path) -> str:
    """Return what a small file holds, "" if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
