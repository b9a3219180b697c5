"""Processes of trials, on this machine or on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.plan import Plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent() -> None:
    """Let the system send this process SIGTERM when its parent dies, as by kill -9; only Linux knows how."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch(argv: Sequence[str], log: str, folder: str, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a process in a folder, its output appended to the file `log`.

    It has a session of its own: Ctrl-C is for the sweep alone, which then ends it.
    """
    with open(log, "ab") as file:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


class Local:
    """Starts processes on this machine."""

    def start(self, argv: Sequence[str], log: pathlib.Path) -> Any:
        """Return a process, with the methods poll, send_signal and kill of `subprocess.Popen`."""
        return launch(argv, str(log), os.getcwd(), os.environ)


class Remote:
    """A process on another node, with the methods of `subprocess.Popen` that a sweep needs."""

    def __init__(self, ray: Any, host: Any):
        self.ray, self.host = ray, host
        self.asked = host.poll.remote()
        self.placed = False  # on a node, which may take until one has room

    def poll(self) -> int | None:
        """Return the exit status, -9 if the node is gone, or None while it runs or waits for a place."""
        if not self.ray.wait([self.asked], timeout=0)[0]:
            return None
        try:
            status = self.ray.get(self.asked)
            self.placed = True
        except self.ray.exceptions.RayActorError:
            return -signal.SIGKILL
        if status is None:
            self.asked = self.host.poll.remote()
        else:
            self.kill()
        return status

    def send_signal(self, number: int) -> None:
        """Pass a signal on; what waits for a place need not begin."""
        self.host.send_signal.remote(number) if self.placed else self.kill()

    def kill(self) -> None:
        self.ray.kill(self.host)


class Host:
    """Holds a process; the class of a Ray actor."""

    def __init__(self, argv: Sequence[str], log: str, folder: str, environment: Mapping[str, str]):
        own = {key: os.environ[key] for key in ("PATH", "CUDA_VISIBLE_DEVICES") if key in os.environ}
        self.process = launch(argv, log, folder, {**environment, **own})

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return self.process.returncode

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)


class OnRay:
    """Starts processes on the nodes of a Ray cluster, which all see the files of this one."""

    def __init__(self, ray: Any, plan: Plan):
        self.ray = ray
        self.kind = ray.remote(num_cpus=max(1, plan.base.threads), num_gpus=plan.settings.gpus)(Host)

    def start(self, argv: Sequence[str], log: pathlib.Path) -> Remote:
        return Remote(self.ray, self.kind.remote(list(argv), str(log), os.getcwd(), dict(os.environ)))


def make_launcher(plan: Plan, stack: contextlib.ExitStack) -> Local | OnRay:
    """Return what starts processes where the plan says. Raises UserError without Ray or its cluster."""
    if not plan.settings.ray:
        return Local()
    from training.cluster import connect

    return OnRay(connect(plan.settings.ray, stack), plan)
