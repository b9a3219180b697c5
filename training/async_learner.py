"""Learning beside an actor that never waits: `--collect async` (as DayDreamer does it, arXiv:2206.14176).

The actor is a process of its own, which steps the environments on a clock, `--control_hz`; see async_actor.py. Steps
come through a journal on disk, weights go through shared memory. The train ratio is an upper bound: the learner makes
at most one update between two looks at the journal, and what it does not get to is not made up for at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from tools import UserError, derive_seed
from training.async_actor import Setup, serve
from training.driver import Account
from training.journal import FOLDER, Reader, recover
from training.weights import AGES, HEARD, LATE, MISSED, SAFE, STOP, TAKEN, TICKS, VERSION, WISH, Weights, tensors_of

CONTEXT = "spawn"  # how the actor is started: a fork would copy locks that other threads hold
START = 600  # seconds to make environments
END = 30  # seconds to act safely and close them
TRIES = 3  # restarts of an actor without an episode that ends


class Bounded:
    """A train ratio that is an upper bound: one learn call at most is due between two looks at what was collected.

    clock: `tools.Ratio` or the like.
    """

    def __init__(self, clock: Any):
        self.clock, self.looked = clock, True

    def due(self, step: int) -> int:
        return min(1, self.clock.due(step)) if self.looked else 0

    def tick(self) -> None:
        self.clock.tick()
        self.looked = False

    def left(self, step: int, begin: int) -> int:
        return 0  # none that has to be made

    def finished(self) -> bool:
        return self.clock.finished()

    def stage(self) -> Any:
        return self.clock.stage()

    def state_dict(self) -> dict[str, Any]:
        return {**self.clock.state_dict(), "pending": 0}  # nothing has to be done before a run is at its end

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state)


class RealTime:
    """Environments in an actor's process, beside which the caller learns. Stands where `envs.parallel.Envs` stands.

    Args:
      make_envs: picklable function (agent steps behind the run) that makes the environments.
      behind: those steps; config: the whole configuration; logdir and keys of collecting count.
    Attributes: as of Envs; lengths: (N,) number of actions of the episodes under way.
    """

    def __init__(self, make_envs: Callable[[int], Any], behind: int, config: Any):
        self.make_envs, self.behind, self.config = make_envs, behind, config
        self.logdir = pathlib.Path(config.logdir)
        self.events: list[str] = []
        self.restarts = self.deaths = self.tries = self.inner = 0
        self.process: Any = None
        self.reader = Reader(self.logdir / FOLDER)
        self.weights: Any = None  # Weights, from `begin` on
        self._start()

    def __len__(self):
        return self.count

    # -- the process

    def _start(self):
        context: Any = multiprocessing.get_context(CONTEXT)
        self.pipe, theirs = context.Pipe()
        make = functools.partial(self.make_envs, self.behind + self.deaths)  # other seeds
        self.process = context.Process(target=serve, args=(theirs, make), daemon=True)
        with _interrupts_blocked():
            self.process.start()
        theirs.close()
        kind, found = self._answer(START)
        assert kind == "spaces"
        self.obs_space, self.act_space, self.own, self.left_out, self.longest, self.count = found

    def _answer(self, seconds):
        """Wait for a message. Raises what the actor has raised, RuntimeError if it is dead."""
        try:
            if not self.pipe.poll(seconds):
                raise RuntimeError("the actor gave no answer in time")
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(END)
            raise RuntimeError(f"the actor died (exit code {self.process.exitcode})") from None
        if kind == "user error":
            raise UserError(answer)
        if kind == "os error":
            raise OSError(*answer)
        if kind == "error":
            raise RuntimeError("the actor " + "\n".join(answer))
        return kind, answer

    def begin(self, run: Any, make_agent: Callable[..., Any], specs: Any, layout: Any, on_step: Any, on_episode: Any):
        """Let the actor begin for a Run.

        Args:
          make_agent: picklable function (config, obs_spec, act_spec); specs: of observations and actions.
          layout: {key: (shape, dtype)} of a stored step; on_step, on_episode: as a Driver's.
        """
        self.run, self.make_agent, self.specs, self.layout = run, make_agent, specs, layout
        self.account = Account(self.count, on_step, on_episode)
        self.lengths = self.account.lengths
        self.weights = Weights(tensors_of(run.agent))
        self.updates, self.begun_at, self.seen = run.updates, (run.updates, run.agent_steps), [0.0] * 4
        (self.logdir / FOLDER).mkdir(exist_ok=True)
        run.recorder.on_file = self._filed
        self._set_off()

    def _set_off(self):
        board, config = self.weights.board, self.config
        board[TAKEN], board[HEARD] = board[VERSION] - 1, time.monotonic()
        seed = derive_seed(config.seed, 9, self.run.agent_steps, self.deaths)
        own = config.replace(device="cpu", compile=False, seed=seed)
        agent = functools.partial(self.make_agent, own, *self.specs)
        place = self.logdir, config.control_hz, config.control_patience, config.log_level
        stored = dict(self.run.agent.stored)
        self.ticked = float(board[TICKS]), time.monotonic()
        self.pipe.send(Setup(agent, self.run.random, self.weights, self.specs[1], self.layout, stored, *place))

    def _attend(self):
        """Hear what the actor has to say; replace one that died, or hangs in an environment."""
        ticks, now = float(self.weights.board[TICKS]), time.monotonic()
        if ticks != self.ticked[0]:
            self.ticked = ticks, now
        elif now - self.ticked[1] > self.config.env_timeout:
            self.process.kill()
            self.process.join()
        try:
            while self.pipe.poll(0):
                _, (events, restarts) = self._answer(0)
                self.events += events
                self.inner = restarts
                self.restarts = self.deaths + restarts
        except RuntimeError as error:
            if self.tries == TRIES or "\n" in str(error):
                raise
            self.tries, self.deaths = self.tries + 1, self.deaths + 1
            self.restarts = self.deaths + self.inner
            self.events.append(f"the actor was restarted: {str(error).removeprefix('the actor ')}")
            self._start()
            self._set_off()

    # -- collecting

    def step(self, agent: Any, mode: str) -> int:
        """Store what the actor has sent, hand it the newest weights; return the agent steps, perhaps none."""
        self._attend()
        run, board = self.run, self.weights.board
        board[WISH] = 0 if agent is run.random else 1 if mode == "explore" else 2
        self.beat()
        fresh = run.updates != self.updates or not board[VERSION]
        if fresh and self.weights.publish(tensors_of(run.agent)):
            self.updates = run.updates
        steps = self._read()
        run.clock.looked = True
        if not steps and not run.learning_due():
            time.sleep(min(0.25 / self.config.control_hz, 0.1))
        return steps

    def beat(self) -> bool:
        """Let the actor know that the learner is there; return True."""
        self.weights.board[HEARD] = time.monotonic()
        return True

    def _read(self):
        """Store what is in the journal, but no more than the run lacks; return the agent steps."""
        wanted = math.ceil((self.config.steps - self.run.step) / self.config.action_repeat)
        steps = 0
        for entry in self.reader.entries():
            self.account.note(*entry)
            steps += not entry.step["is_last"]
            if entry.step["is_last"]:
                self.tries = 0
            if steps >= wanted:
                break
        return steps

    def _filed(self, index, first):
        self.reader.filed(index, first)

    def metrics(self) -> dict[str, float]:
        """Return how the actor does since the last call: deadlines, the age of its weights; and the actual ratio."""
        board = self.weights.board
        now = [float(board[place]) for place in (TICKS, MISSED, AGES, SAFE)]
        ticks, missed, ages, _ = (value - before for value, before in zip(now, self.seen, strict=True))
        late, self.seen, board[LATE] = float(board[LATE]), now, 0.0
        steps, updates = self.run.agent_steps - self.begun_at[1], self.run.updates - self.begun_at[0]
        replayed = self.config.batch_size * self.config.batch_length
        return {
            "control_ticks": now[0],
            "deadlines_missed": now[1],
            "deadlines_met": 1 - missed / max(ticks, 1),
            "deadline_late_ms": 1000 * late,
            "weights_version": max(0.0, float(board[TAKEN])),
            "weights_age": ages / max(ticks, 1),
            "safe_actions": now[3],
            "train_ratio": updates * replayed / max(steps, 1),
        }

    # -- the end

    def stop(self) -> int:
        """End the actor; store what it has sent, and return the agent steps."""
        if self.weights is not None and self.process.is_alive():
            self.weights.board[WISH] = STOP
        else:
            self.pipe.close()
        self.process.join(END)
        if self.process.is_alive():
            self.events.append("the actor did not end in time and was killed")
            self.process.kill()
            self.process.join()
        return self._read() if self.weights is not None and self.config.steps > self.run.step else 0

    def close(self) -> None:
        """End the actor, and make episode files of what nobody has stored; may be called twice."""
        if self.process is None:
            return
        if self.process.exitcode is None:
            with contextlib.suppress(RuntimeError):
                self.stop()
        self.process = None
        recover(self.logdir, self.reader.filed_to)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hide signals that a whole group of processes gets from what starts within: the learner ends it in good order."""
    resource_tracker.ensure_running()  # its start, at that of the first process, would unblock them
    hidden = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, hidden)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
