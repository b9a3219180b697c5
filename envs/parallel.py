"""Many environments that step together, in this process or each in its own.

Actions and observations lie in memory that parent and workers share: a record for each environment, which only
one side touches at a time. A socket hands it over:

    parent                              worker
                                        make the environment
                    <---  MESSAGE, its spaces
    file of the memory  --->
    STEP, RESET, or RENDER and a size  --->
                                        read the action, write the observation
                    <---  DONE, or MESSAGE and a message: `log_*` entries, a picture, an error

The end of either process, however it comes, is an end of file for the other: a worker then closes its
environment and ends, a parent starts another worker.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, reduction, resource_tracker
from typing import Any

import numpy as np

from envs.checks import check_same
from envs.env import Env
from envs.errors import one_line
from envs.foreign import Foreign
from envs.opengl import load_compiler_first
from envs.wrappers import AutoReset
from specs import act_spec, step_layout
from tools import UserError, guard_output

STEP, RESET, RENDER = b"s", b"r", b"p"
DONE, MESSAGE = b"d", b"m"
START = 600  # seconds to make an environment, unless even a step may take longer
CLOSE = 5  # seconds to close it
TRIES = 3  # restarts of an environment that neither ends an episode nor lasts in between
LASTS = 1000  # steps


class Failure(Exception):
    """Something that makes a worker useless, such as "died (exit code -9)"; `details` is its traceback, or empty."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(reason)
        self.details = details


class Envs:
    """Environments that step together and start their next episodes by themselves.

    Observations are dicts of arrays (N, ...) with dtypes uint8, float32, int32 and bool, copies that stay as they
    are. An environment whose previous observation was the last of its episode ignores its action and returns the
    first of the next. A `log_*` entry that an environment did not give is 0.

    A worker that dies, hangs or raises is replaced by one with another seed, and what comes back for it is the
    first observation of a new episode; that the one before was not a last tells the two cases apart. One that
    fails at its start, or over and over, is a RuntimeError with its traceback. A UserError is passed on. After
    either only `close` makes sense.

    Args:
      kind: `Local` or `Worker`.
      makers: one picklable function per environment that makes it, given how often it was restarted.
      timeout: seconds that a step may take, once it is waited for.
      longest: steps after which an episode can be taken for one that never ends.
    Attributes:
      events: a line about each restart, for the caller to log and clear.
      left_out: {observation that is dropped: the key of the configuration that says so}.
      safe_action: {key: (width,)} in the form of agents' actions, or None; see `Env`.
    """

    def __init__(
        self,
        kind: type[Local] | type[Worker],
        makers: Sequence[Callable[[int], Env]],
        timeout: float = 600.0,
        longest: int = 10000,
    ):
        self.events, self.longest = [], longest
        self._kind, self._makers, self._timeout = kind, makers, timeout
        self._restarts = [0] * len(makers)
        self._tries = [0] * len(makers)  # restarts since it last did well
        self._lasted = [0] * len(makers)  # steps since then or the last restart
        self._handles = []
        self._under_way = False
        self._file: Any = None
        try:
            for make in makers:  # all start before the first is waited for
                self._handles.append(kind(make, 0))
            answers, failures = self._answers(range(len(makers)), self._start_timeout)
            for index, failure in failures.items():
                raise _fatal(index, failure)
            self.obs_space, self.act_space, self.own, self.left_out, self.safe_action = answers[0]
            self._check_spaces(answers)
            layout = _layout(self.obs_space, self.act_space)
            self._file = _anonymous_file(layout.itemsize * len(makers))
            self._records = _map(self._file.fileno(), layout, len(makers))
            self._observations, self._actions = (_columns(self._records[name]) for name in ("obs", "act"))
            for index, handle in enumerate(self._handles):
                handle.attach(self._file.fileno(), self._records, index)
        except BaseException:
            self.close()
            raise

    def __len__(self):
        return len(self._handles)

    @property
    def restarts(self) -> int:
        """The number of restarts so far."""
        return sum(self._restarts)

    def reset(self) -> dict[str, np.ndarray]:
        """Start new episodes everywhere."""
        self._check_idle()
        self._tell_all(RESET)
        return self.receive()

    def step(self, actions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Act everywhere; every array of `actions` is (N, A)."""
        self.send(actions)
        return self.receive()

    def send(self, actions: dict[str, np.ndarray]) -> None:
        """Start a step everywhere without waiting for it. Until `receive`, nothing else may be asked but `close`."""
        self._check_idle()
        for key, column in self._actions.items():
            column[...] = actions[key]
        self._tell_all(STEP)

    def receive(self) -> dict[str, np.ndarray]:
        """Wait for the observations of the step that was sent."""
        if not self._under_way:
            raise RuntimeError("nothing to receive: no step was sent")
        logs, failures = self._answers(range(len(self)), self._timeout)
        for index in logs:
            self._lasted[index] += 1
            if self._observations["is_last"][index] or self._lasted[index] >= LASTS:
                self._tries[index] = self._lasted[index] = 0
        while failures:
            answers, failures = self._restart(failures)
            logs |= answers
        self._under_way = False
        names = sorted({name for entries in logs.values() for name in entries})
        stacked = {name: np.array([logs[i].get(name, 0) for i in range(len(self))], np.float32) for name in names}
        return stacked | {key: column.copy() for key, column in self._observations.items()}

    def render(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return a picture (H, W, 3) uint8 of one environment. Raises UserError where there is none.

        size: the (H, W) wished for, as `Env.render` takes it.
        """
        self._check_idle()
        self._handles[index].send(RENDER, size)
        answers, failures = self._answers([index], self._timeout)
        if failures:  # the next step finds it dead
            raise UserError(f"no picture: environment {index} {failures[index]}")
        return answers[index]

    def close(self) -> None:
        """Close the environments and end their processes, also in the midst of a step; may be called twice.

        One that fails at it becomes an event: what it has done is not worth less for that.
        """
        for index, handle in enumerate(self._handles):
            try:
                handle.stop()
            except Failure as failure:
                self.events.append(f"environment {index} could not be closed: it {failure}")
        deadline = time.monotonic() + CLOSE
        for handle in self._handles:
            handle.join(deadline - time.monotonic())
        self._handles.clear()  # and so what an environment holds without closing it, such as a port
        if self._file:
            self._file.close()

    @property
    def _start_timeout(self):
        return max(START, self._timeout)

    def _check_spaces(self, answers):
        for index, found in answers.items():
            check_same((self.obs_space, self.act_space), found[:2], f"environment {index}")

    def _check_idle(self):
        if self._under_way:
            raise RuntimeError("a step is under way: receive it first")

    def _tell_all(self, command):
        self._under_way = True
        for handle in self._handles:
            handle.send(command)

    def _answers(self, indices, seconds):
        """Wait for one answer of each, for `seconds` in all. Return {index: answer} and {index: Failure}."""
        deadline = time.monotonic() + seconds
        answers, failures = {}, {}
        for index in indices:
            try:
                answers[index] = self._handles[index].receive(deadline - time.monotonic())
            except Failure as failure:
                failures[index] = failure
        return answers, failures

    def _restart(self, failures):
        """Replace what failed and begin episodes there. Return what `_answers` does."""
        for index, failure in failures.items():
            self._handles[index].stop()
            self._handles[index].join(CLOSE)
            if self._tries[index] == TRIES:
                raise _fatal(index, failure)
            self._tries[index] += 1
            self._lasted[index] = 0
            self._restarts[index] += 1
            self.events.append(f"environment {index} was restarted: it {failure}")
            handle = self._handles[index] = self._kind(self._makers[index], self._restarts[index])
            handle.attach(self._file.fileno(), self._records, index)
            handle.send(RESET)
        made, failed = self._answers(failures, self._start_timeout)
        self._check_spaces(made)
        begun, failed_later = self._answers(made, self._start_timeout)
        return begun, failed | failed_later


def _fatal(index, failure):
    return RuntimeError(f"environment {index} {failure}\n{failure.details}".strip())


# ---------------------------------------------------------------------------
# Memory


def _anonymous_file(size):
    """Return a file of zeros without a name, in memory if there is room: gone with the last process that holds it."""
    for folder in ("/dev/shm", None):
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is returned
            file.write(bytes(size))
            file.flush()
            return file
        except OSError:  # no such folder, as on macOS, or too small a one, as in a container
            if folder is None:
                raise


def _layout(obs_space, act_space):
    """Return the record of one environment as a NumPy dtype: its observation `obs` and its next action `act`."""
    actions = act_spec(act_space)
    obs, act = [], []
    for key, (shape, dtype) in step_layout(obs_space, actions).items():
        (act if key in actions.widths else obs).append((key, dtype, shape))
    return np.dtype([("obs", np.dtype(obs, align=True)), ("act", np.dtype(act, align=True))], align=True)


def _map(descriptor, layout, count):
    """Map a file as an array (count,) of records."""
    return np.ndarray(count, layout, mmap.mmap(descriptor, layout.itemsize * count))


def _columns(records):
    """Return {key: (N, ...)}, views of an array (N,) of records."""
    return {key: records[key] for key in records.dtype.names}


class SharedEnv:
    """An environment at its record, where it reads actions and writes observations."""

    def __init__(self, env: Env, records: np.ndarray, index: int):
        self._env = env
        self._index = index
        self._actions = _columns(records["act"][index : index + 1])
        self._columns = _columns(records["obs"])
        self._methods = {STEP: self._step, RESET: self._reset, RENDER: self._render}

    def obey(self, command: bytes, *args: Any) -> dict[str, float] | np.ndarray:
        """Do what STEP, RESET or RENDER (with a size) asks for. Return the `log_*` entries, or the picture."""
        return self._methods[command](*args)

    def _reset(self):
        return self._write(self._env.reset())

    def _step(self):
        return self._write(self._env.step({key: value[0].copy() for key, value in self._actions.items()}))

    def _render(self, size):
        return self._env.render(size)

    def _write(self, obs):
        for key, column in self._columns.items():
            column[self._index] = obs[key]
        return {key: float(value) for key, value in obs.items() if key.startswith("log_")}


# ---------------------------------------------------------------------------
# Kinds of environments. The first answer is the spaces; then comes one for each `send`


def _spaces(env):
    """Return the spaces of observations and actions, the environment's own as `make_env` says, what is left out, and
    the action that is safe."""
    own, left_out = getattr(env, "own", None), getattr(env, "left_out", {})
    return env.obs_space, env.act_space, own, left_out, getattr(env, "safe", None)


class Local:
    """An environment of this process, with the methods of a `Worker`. It is never restarted: errors pass.

    It does what it is asked for when the answer is waited for, so that a GPU has work meanwhile.
    """

    def __init__(self, make: Callable[[int], Env], restart: int):
        load_compiler_first()
        self._foreign = Foreign("an environment")
        with self._foreign:
            self._env = AutoReset(make(restart))
        self._pending: Callable[[], Any] | None = lambda: _spaces(self._env)

    def attach(self, descriptor: int, records: np.ndarray, index: int) -> None:
        self._shared = SharedEnv(self._env, records, index)
        self._foreign.name = getattr(self._env, "name", f"environment {index}")

    def send(self, command: bytes, *args: Any) -> None:
        if self._pending:  # what nobody has waited for is done all the same
            self.receive(0)
        self._pending = functools.partial(self._shared.obey, command, *args)

    def receive(self, seconds: float) -> Any:
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("nothing to receive: nothing was asked for")
        with self._foreign:
            return pending()

    def stop(self) -> None:
        """Close the environment. Raises Failure if that fails."""
        try:
            with self._foreign:
                self._env.close()
        except Exception as error:
            raise Failure(_raised(error)) from error

    def join(self, seconds: float) -> None:
        pass


class Worker:
    """An environment in a process of its own."""

    def __init__(self, make: Callable[[int], Env], restart: int):
        if not hasattr(select, "poll"):
            raise UserError("--parallel true needs Linux or macOS: there is no poll() here")
        # A fork would copy locks held by other threads (PyTorch's, a logger's) and an open CUDA context.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, restart), daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # so that the end of either process is an end of file for the other
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)

    def attach(self, descriptor: int, records: np.ndarray, index: int) -> None:
        """Give it its record: one of `records`, which are the content of the file behind a descriptor."""
        with contextlib.suppress(OSError):  # it is dead, which `receive` will tell
            self._pipe.send((records.dtype, len(records), index))
            reduction.send_handle(self._pipe, descriptor, self._process.pid)

    def send(self, command: bytes, *args: Any) -> None:
        """Ask for something, without waiting; `args` are those of RENDER."""
        with contextlib.suppress(OSError):  # it is dead, which `receive` will tell
            os.write(self._pipe.fileno(), command)
            if command == RENDER:
                self._pipe.send(args)

    def receive(self, seconds: float) -> Any:
        """Wait for the answer. Raises the worker's UserError, or Failure."""
        if not self._poll.poll(min(max(0, 1000 * seconds), 2**31 - 1)):
            self._process.kill()
            raise Failure("gave no answer in time (env_timeout)")
        try:
            sign = os.read(self._pipe.fileno(), 1)
            if sign == DONE:
                return {}
            kind, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(CLOSE)
            raise Failure(f"died (exit code {self._process.exitcode})") from None
        if kind == "user error":
            raise UserError(answer)
        if kind == "error":
            raise Failure(*answer)
        return answer

    def stop(self) -> None:
        """Ask the process to end, without waiting."""
        self._pipe.close()

    def join(self, seconds: float) -> None:
        """Wait for the process to end, and end it if it does not."""
        self._process.join(max(0, seconds))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _interrupts_blocked():
    """Hide signals that a whole group of processes gets from what starts within: the parent ends it in good order."""
    resource_tracker.ensure_running()  # its start, at that of the first process, would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, make, restart):
    """Live as a worker: make the environment, then obey until it fails or the parent is done or gone."""
    guard_output()
    env = None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # It stays a daemon to its parent, which so ends it, but may have processes of its own, as simulators do.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]

    def begin():
        nonlocal env
        env = AutoReset(make(restart))
        return _spaces(env)

    with contextlib.suppress(EOFError, OSError):
        if _answer(pipe, begin):
            layout, count, index = pipe.recv()
            descriptor = reduction.recv_handle(pipe)
            shared = SharedEnv(env, _map(descriptor, layout, count), index)
            os.close(descriptor)
            alive = True
            while alive and (command := os.read(pipe.fileno(), 1)):
                args = pipe.recv() if command == RENDER else ()
                alive = _answer(pipe, shared.obey, command, *args)
    if env is not None:
        try:
            env.close()
        except Exception as error:
            print(f"dreamer.py: warning: an environment could not be closed: it {_raised(error)}", file=sys.stderr)


def _end_with_parent():
    """End this process, even one that hangs, as soon as its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent and connection.wait([parent.sentinel]):
        os._exit(1)


def _raised(error):
    return f"raised {type(error).__name__}: {one_line(error)}"


def _answer(pipe, function, *args):
    """Call a function and send what becomes of it. Return True if the environment can still be used."""
    try:
        kind, answer = "ok", function(*args)
    except UserError as error:
        kind, answer = "user error", one_line(error)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        kind, answer = "error", (_raised(error), traceback.format_exc())
    if len(answer) == 0:  # a step without `log_*` entries
        os.write(pipe.fileno(), DONE)
    else:
        os.write(pipe.fileno(), MESSAGE)
        pipe.send((kind, answer))
    return kind != "error"
