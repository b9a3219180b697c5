"""Many environments that step together, in this process or each in its own."""

import contextlib
import multiprocessing
import signal
import traceback
from multiprocessing import resource_tracker

import numpy as np

from envs.errors import one_line
from envs.wrappers import AutoReset
from tools import UserError


class Envs:
    """Environments that step together and start their next episodes by themselves.

    Observations are dicts of arrays (N, ...) with dtypes uint8, float32, int32 and bool. An environment whose
    previous observation was the last of its episode ignores its action and returns the first of the next. A
    `log_*` entry that an environment did not give is 0.

    Args:
      kind: `Local` or `Worker`.
      makers: one picklable function per environment that makes it.
    """

    def __init__(self, kind, makers):
        self._handles = []
        try:
            for make in makers:  # all start before the first is waited for
                self._handles.append(kind(make))
            (self.obs_space, self.act_space), *_ = [handle.receive() for handle in self._handles]
        except BaseException:
            self.close()
            raise

    def __len__(self):
        return len(self._handles)

    def reset(self) -> dict[str, np.ndarray]:
        """Start new episodes everywhere."""
        for handle in self._handles:
            handle.send("reset")
        return self._stack([handle.receive() for handle in self._handles])

    def step(self, actions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Act everywhere; every array of `actions` is (N, A)."""
        for index, handle in enumerate(self._handles):
            handle.send("step", {key: value[index] for key, value in actions.items()})
        return self._stack([handle.receive() for handle in self._handles])

    def render(self, index: int) -> np.ndarray:
        """A picture (H, W, 3) uint8 of one environment. Raises UserError where there is none."""
        self._handles[index].send("render")
        return self._handles[index].receive()

    def close(self):
        """Close the environments and end their processes; may be called twice."""
        for handle in self._handles:
            handle.stop()
        for handle in self._handles:
            handle.join()

    def _stack(self, observations):
        logs = {key for obs in observations for key in obs if key.startswith("log_")}
        stacked = {key: np.array([obs.get(key, 0) for obs in observations], np.float32) for key in sorted(logs)}
        for key in (*self.obs_space, "reward", "is_first", "is_last", "is_terminal"):
            stacked[key] = np.stack([obs[key] for obs in observations])
        return stacked


class Local:
    """An environment of this process, with the methods of a `Worker`."""

    def __init__(self, make):
        self._env = AutoReset(make())
        self._answer = self._env.obs_space, self._env.act_space

    def send(self, method, *args):
        self._answer = getattr(self._env, method)(*args)

    def receive(self):
        return self._answer

    def stop(self):
        self._env.close()

    def join(self):
        pass


class Worker:
    """An environment in a process of its own. The first answer is its pair of spaces; then one per `send`."""

    def __init__(self, make):
        # A fork would copy locks held by other threads (PyTorch's, a logger's) and an open CUDA context.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # so that the end of either process is an end of file for the other

    def send(self, method, *args):
        """Ask for `method(*args)` of the environment, without waiting."""
        with self._death_is_an_error():
            self._pipe.send((method, args))

    def receive(self):
        """Wait for the answer. Raises the worker's UserError, or RuntimeError with its traceback."""
        with self._death_is_an_error():
            kind, answer = self._pipe.recv()
        if kind == "user error":
            raise UserError(answer)
        if kind == "error":
            raise RuntimeError(f"an environment failed in its worker process:\n{answer}")
        return answer

    def stop(self):
        """Ask the process to end, without waiting."""
        with contextlib.suppress(OSError):  # it has ended already
            self._pipe.send(("close", ()))

    def join(self):
        """Wait for the process to end, and end it if it does not."""
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @contextlib.contextmanager
    def _death_is_an_error(self):
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise RuntimeError(f"an environment's worker process died (exit code {code})") from error


@contextlib.contextmanager
def _interrupts_blocked():
    """What starts within never sees Ctrl-C, not even while it imports: the parent ends it in good order."""
    resource_tracker.ensure_running()  # its start, at that of the first process, would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, make):
    """The life of a worker: make the environment, then answer until told to close or the parent is gone."""
    env = None

    def begin():
        nonlocal env
        env = AutoReset(make())
        return env.obs_space, env.act_space

    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send(_attempt(begin))
        while True:
            method, args = pipe.recv()
            if method == "close":
                break
            pipe.send(_attempt(getattr(env, method), *args))
    if env is not None:
        env.close()


def _attempt(function, *args):
    """What became of a call, in a form that can be sent: (kind, answer)."""
    try:
        return "ok", function(*args)
    except UserError as error:
        return "user error", one_line(error)
    except Exception:
        return "error", traceback.format_exc()
