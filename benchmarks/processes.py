"""Commands in sessions of their own, and the processes that they leave behind, found by a mark in their environment."""

import contextlib
import os
import pathlib
import signal
import subprocess
import uuid

MARK = "DREAMER_BENCHMARK"  # a variable that every descendant of a command inherits, whatever group it joins


def start(command, folder, **kwargs):
    """Start a command (a list, or a line for bash) in a session of its own; return its Popen and its mark.

    Signals that the caller ignores, as under nohup, have their usual effect there.
    """
    mark = uuid.uuid4().hex
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {}), MARK: mark}
    argv = ["bash", "-c", command] if isinstance(command, str) else command
    kwargs |= {"stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": usual_signals}
    return subprocess.Popen(argv, cwd=folder, env=environ, **kwargs), mark


def usual_signals():
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def marked(mark):
    """Return the ids of living processes with a mark; none where the system has no /proc."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end(process, mark):
    """Kill what is left of a command, so that nothing outlives the caller; return the ids of what was."""
    left = [pid for pid in marked(mark) if pid != process.pid]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    while pids := [pid for pid in marked(mark) if pid != process.pid]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    return left
