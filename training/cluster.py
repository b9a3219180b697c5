"""A Ray cluster: joining one that is there, or starting one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from tools import UserError

_apart = False  # whether a process that is forked now gets a session of its own


def connect(address: str, stack: contextlib.ExitStack, cpus: int | None = None) -> Any:
    """Join the Ray cluster at an address, and return the module ray; `stack` leaves it again.

    address: `auto` for the cluster that this machine is a node of, `local` for one that is started here and ends with
      this process, else what `ray.init` takes, such as 10.0.0.1:6379 or ray://10.0.0.1:10001.
    cpus: that a local one shall have room for, whatever the machine has; None for those that it has.
    Raises UserError where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError("this needs Ray: pip install -r requirements/ray.txt") from None
    if ray.is_initialized():
        return ray
    try:
        with sessions_apart():
            ray.init(
                address,
                num_cpus=cpus if address == "local" else None,
                include_dashboard=False if address == "local" else None,
                configure_logging=True,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except Exception as error:  # Ray has no type of its own for this, nor for a node that is slow to start
        way = "start one with: ray start --head; or take local for one on this machine alone"
        raise UserError(f"no Ray cluster at {address} ({' '.join(str(error).split())[:200]}): {way}") from None
    stack.callback(ray.shutdown)
    return ray


@contextlib.contextmanager
def sessions_apart() -> Iterator[None]:
    """Let what Ray starts in the body have a session of its own.

    A signal that ends this process may be for its whole group, as that of a terminal which is closed. Without its node
    Ray ends the process that it is imported by, which has still to save.
    """
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def _leave_session():
    if _apart:
        os.setsid()


if hasattr(os, "register_at_fork"):  # called where a program is started, too, if that has a `preexec_fn`, as Ray's
    os.register_at_fork(after_in_child=_leave_session)
