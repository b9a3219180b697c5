"""The process that acts in the environments on a fixed clock, whatever the learner does: see async_learner.py.

A tick acts on what the environments returned last and steps them; its deadline is the next tick. Ticks are at absolute
times, so that delays do not add up. A reset at the end of an episode takes the time that it takes.
"""

from __future__ import annotations

import errno
import multiprocessing
import pathlib
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np

from tools import UserError, guard_output, locked
from training.console import warn_at
from training.driver import Driver
from training.journal import FOLDER, Journal, recover
from training.protocol import Agent
from training.weights import AGES, HEARD, LATE, MISSED, SAFE, STOP, TICKS, WISH, Taker, Weights, tensors_of

RESERVE = 0.002  # seconds before a tick that weights are left alone


class Setup(NamedTuple):
    """The message of the learner to the actor once it knows the environments' spaces.

    agent: function without arguments that makes the agent on this machine's CPU; random: the agent before it.
    """

    agent: Callable[[], Agent]
    random: Agent
    weights: Weights
    act_spec: Any
    layout: Any
    stored: Any
    logdir: pathlib.Path
    hz: float
    patience: float
    log_level: str


class Ticks:
    """A clock of absolute times.

    Args:
      hz: ticks per second; now, sleep: of the time.
    Attributes:
      at: time of this tick.
    """

    def __init__(
        self,
        hz: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.period, self.now, self.sleep = 1 / hz, now, sleep
        self.restart()

    def restart(self) -> None:
        """Let the next tick be now."""
        self.at = self.now() - self.period

    def wait(self) -> None:
        """Wait for the next tick; one whose time is over is left out."""
        self.at += self.period * (1 + int(self.late() / self.period))
        while (left := self.at - self.now()) > 0:
            self.sleep(left)

    def late(self) -> float:
        """Return by how many seconds the deadline of this tick is over, at most 0 before it."""
        return max(0.0, self.now() - self.at - self.period)


class Safe:
    """An agent that does what is safe.

    Args:
      actions: {key: (N, width)}
    """

    def __init__(self, actions: dict[str, np.ndarray]):
        self.actions = actions

    def initial(self, count: int) -> Any:
        """Nothing is carried from step to step."""
        return ()

    def act(self, obs: Any, carry: Any, mode: str) -> Any:
        """Return the actions, no carry and nothing to store."""
        return self.actions, (), None


def serve(pipe: Any, make_envs: Callable[[], Any]) -> None:
    """Live as an actor: make the environments, tell their spaces, then act until the learner is done or gone."""
    guard_output()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have workers
    try:
        envs = make_envs()
        try:
            pipe.send(("spaces", (envs.obs_space, envs.act_space, envs.own, envs.left_out, envs.longest, len(envs))))
            setup = pipe.recv()
            with locked(setup.logdir / FOLDER):
                act(pipe, envs, setup)
            if not learner_lives():
                count = recover(setup.logdir)
                why = f"the learner is gone: the environments got their safe action, and {count} steps an episode file"
                warn_at(setup.log_level, why)
        finally:
            envs.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the learner is gone before it began
        return
    except UserError as error:
        tell(pipe, ("user error", str(error)))
    except OSError as error:
        tell(pipe, ("os error", (error.errno or errno.EIO, error.strerror or str(error))))
    except Exception as error:
        tell(pipe, ("error", (f"raised {type(error).__name__}: {error}", traceback.format_exc())))


def tell(pipe: Any, message: Any) -> None:
    """Send a message, unless nobody is there."""
    try:
        pipe.send(message)
    except OSError:
        return


def learner_lives() -> bool:
    """True if the process that has started this one is there."""
    parent = multiprocessing.parent_process()
    return parent is not None and not connection.wait([parent.sentinel], 0)


def act(pipe: Any, envs: Any, setup: Setup) -> None:
    """Step the environments on the clock until the learner says so, or is gone; their last action is the safe one."""
    import torch

    torch.set_num_threads(1)
    agent, board = setup.agent(), setup.weights.board
    if hasattr(agent, "opt"):
        agent.opt = None  # its memory
    taker = Taker(setup.weights, tensors_of(agent))
    journal = Journal(setup.logdir / FOLDER, setup.layout, setup.stored)
    logs: list[dict[str, Any]] = [{}]

    def note(obs):
        logs[0] = {key: value for key, value in obs.items() if key.startswith("log_")}

    def keep(index, step, stored):
        journal.add(index, step, stored, {key: float(value[index]) for key, value in logs[0].items()})

    driver = Driver(envs, setup.act_spec, setup.layout, on_obs=[note], on_step=[keep])
    safe: Any = Safe(safe_actions(envs, setup.act_spec))
    wishes = [(setup.random, "sample"), (agent, "explore"), (agent, "noisy")]
    driver.step(*wishes[0] if board[WISH] == 0 else (safe, "sample"))  # a reset
    ticks = Ticks(setup.hz)
    while board[WISH] != STOP and learner_lives():
        ticks.wait()
        there = taker.version or board[WISH] == 0 or not taker.tensors
        trusted = there and heard(board, ticks.at, setup.patience)
        driver.step(*(wishes[int(board[WISH])] if trusted else (safe, "sample")))
        board[SAFE] += not trusted
        board[AGES] += ticks.at - taker.published
        board[TICKS] += 1
        if envs.events:
            tell(pipe, ("events", (list(envs.events), envs.restarts)))
            envs.events.clear()
        if driver.obs and driver.obs["is_last"].any():  # what followed was a reset
            ticks.restart()
            continue
        late = ticks.late()
        board[MISSED] += late > 0
        board[LATE] = max(float(board[LATE]), late)
        spare = ticks.at + ticks.period - RESERVE
        if time.monotonic() < spare:
            taker.work(spare)
    driver.step(safe, "sample")
    driver.rest()
    journal.close()


def heard(board: Any, at: float, patience: float) -> bool:
    """True if the learner gave a sign within `patience` seconds before a time, or that does not count: at 0."""
    return not patience or at - float(board[HEARD]) <= patience


def safe_actions(envs: Any, act_spec: Any) -> dict[str, np.ndarray]:
    """Return {key: (N, width)}: what environments say is safe, else zeros, and the first of choices."""
    own = envs.safe_action or {}
    zeros = {key: np.zeros((len(envs), width), np.float32) for key, width in act_spec.widths.items()}
    for key, choices in act_spec.classes.items():
        zeros[key] = np.repeat(act_spec.one_hot(key, np.zeros((1, len(choices)), int)), len(envs), 0)
    return {key: np.repeat(own[key][None], len(envs), 0) if key in own else zeros[key] for key in zeros}
