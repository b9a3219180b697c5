"""Collecting elsewhere: actors on a Ray cluster send chunks of steps, which are taken in step by step.

The train ratio stays exact, as agent steps count when they are taken in, one step of an actor's environments after the
other, and the updates due are made in between. An actor gets its next chunk to do when there is credit: chunks that are
asked of it, or not used up yet, are at most `lag` more than one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specs import ActionSpec
from tools import UserError
from training.driver import Driver
from training.protocol import Agent

LOOK = 0.5  # seconds between two looks at whether the run is to end
START = 600  # seconds in which one actor at least must answer, unless even an old one may take longer
TRIES = 3  # actors in a row that die in one place before they have done anything


class Chunk(NamedTuple):
    """Steps that an actor has collected in its E environments, L in each.

    version: number of the policy; steps: {key: (E, L, ...)} as a driver tells them; stored: the same of what the agent
    stores with them, {} for nothing; logs: {log_*: (E, L)}; restarts: of its environments so far; events: lines.
    """

    version: int
    steps: Mapping[str, np.ndarray]
    stored: Mapping[str, np.ndarray]
    logs: Mapping[str, np.ndarray]
    restarts: int
    events: Sequence[str]


class Fleet:
    """The actors, on whichever nodes have room. One that dies, or does not answer, is replaced where there is room.

    To a run it is what `envs.parallel.Envs` is: it has its attributes, but no steps are taken here.

    Args:
      ray: the module, connected; kind: class of the actors, `ray.remote` made.
      make: function (number, restart) -> arguments of an actor; count: of actors; each: environments of one.
      patience: seconds that an actor may take for what it was asked for.
    """

    def __init__(self, ray: Any, kind: Any, make: Callable, count: int, each: int, patience: float):
        self.ray, self.kind, self.make, self.each, self.patience = ray, kind, make, each, patience
        self.events: list[str] = []
        self.replaced = [0] * count
        self.tries = [0] * count
        self.env_restarts = [0] * count
        self.asked: list[deque] = [deque() for _ in range(count)]  # (reference, arguments) in order
        self.since = [0.0] * count  # when an actor was asked, or last answered
        self.answered = [False] * count
        self.last = count - 1  # the actor whose chunk came last
        self.actors = [kind.remote(*make(number, 0)) for number in range(count)]
        try:
            about = self._first_word()
        except BaseException:
            self.close()
            raise
        self.obs_space, self.act_space = about["obs_space"], about["act_space"]
        self.own, self.left_out, self.longest = about["own"], about["left_out"], about["longest"]

    def __len__(self):
        return len(self.actors) * self.each

    @property
    def restarts(self) -> int:
        """The number of actors and environments that were replaced so far."""
        return sum(self.replaced) + sum(self.env_restarts)

    def put(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Put weights where every node fetches them from once; return what to ask with."""
        return self.ray.put(dict(weights))

    def ask(self, number: int, *what: Any) -> None:
        """Ask an actor for a chunk; see `agents.actor.Actor.collect`."""
        if not self.asked[number]:
            self.since[number] = time.monotonic()
        self.asked[number].append((self.actors[number].collect.remote(*what), what))

    def wait(self, going: Callable[[], bool]) -> tuple[int, Chunk] | None:
        """Wait for the next chunk; return its actor's number and it, or None if `going` says that it is not needed.

        Raises UserError of an actor's, and RuntimeError if those in one place die over and over, or none answers.
        """
        began = time.monotonic()
        while going():
            turns = [(self.last + 1 + turn) % len(self.asked) for turn in range(len(self.asked))]  # Ray looks in order
            first = {self.asked[number][0][0]: number for number in turns if self.asked[number]}
            ready, _ = self.ray.wait(list(first), timeout=LOOK)
            for reference in ready:
                chunk = self._answer(first[reference], reference)
                if chunk:
                    self._note(first[reference], chunk)
                    return first[reference], chunk
            now = time.monotonic()
            for number in first.values():  # but not those that are new, which may wait for room on a node
                if self.answered[number] and now - self.since[number] > self.patience:
                    self._replace(number, f"gave no answer in {self.patience:g} s (remote.patience)")
            if now - began > max(START, self.patience) and not any(self.answered):
                raise RuntimeError(f"no actor has answered in {now - began:.0f} s; see what `ray status` says")
        return None

    def _note(self, number, chunk):
        """Take note of an actor that has answered."""
        self.asked[number].popleft()
        self.last, self.since[number] = number, time.monotonic()
        self.answered[number], self.tries[number] = True, 0
        self.env_restarts[number] = max(self.env_restarts[number], chunk.restarts)
        self.events += [f"actor {number}: {event}" for event in chunk.events]

    def close(self) -> None:
        """End the actors; may be called twice."""
        actors, self.actors = self.actors, []
        for actor in actors:
            self.ray.kill(actor)

    def _first_word(self):
        """Return what the first actor that answers says of its environments."""
        pending = {actor.about.remote(): number for number, actor in enumerate(self.actors)}
        deadline = time.monotonic() + max(START, self.patience)
        while time.monotonic() < deadline:
            ready, _ = self.ray.wait(list(pending), timeout=LOOK)
            for reference in ready:
                number = pending.pop(reference)
                about = self._answer(number, reference)
                if about:
                    return about
                pending[self.actors[number].about.remote()] = number
        raise UserError("--remote.actors: no node of the cluster has room for one; see what `ray status` says")

    def _answer(self, number, reference):
        """Return an actor's answer; replace it and return None if it has died instead."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            self._replace(number, f"raised {type(error.cause).__name__}: {error.cause}", str(error))
        except self.ray.exceptions.RayError as error:
            self._replace(number, f"died ({type(error).__name__})", str(error))
        return None

    def _replace(self, number, reason, details=""):
        """Let another actor do what one was asked for."""
        self.ray.kill(self.actors[number])
        if self.tries[number] == TRIES:
            raise RuntimeError(f"actor {number} {reason}\n{details}".strip())
        self.tries[number] += 1
        self.replaced[number] += 1
        self.events.append(f"actor {number} was replaced: it {reason}")
        self.actors[number] = self.kind.remote(*self.make(number, self.replaced[number]))
        self.answered[number] = False
        asked, self.asked[number] = self.asked[number], deque()
        for _, what in asked:
            self.ask(number, *what)


class Collector(Driver):
    """Takes in what a fleet collects, with the methods of a Driver that a run needs.

    Args:
      fleet: Fleet; act_spec, layout, on_step, on_episode: as the Driver's.
      remote: section of the configuration; learner: the agent whose weights the actors get.
      weights: function that returns them; updates: one that counts the updates; going: one that is false once the run
        is to end.
    """

    def __init__(
        self,
        fleet: Any,
        act_spec: ActionSpec,
        layout: Mapping[str, Any],
        on_step: Sequence[Callable],
        on_episode: Sequence[Callable],
        *,
        remote: Any,
        learner: Agent,
        weights: Callable[[], Mapping[str, np.ndarray]],
        updates: Callable[[], int],
        going: Callable[[], bool],
    ):
        super().__init__(fleet, act_spec, layout, on_step=on_step, on_episode=on_episode)
        self.fleet, self.remote, self.learner = fleet, remote, learner
        self.weights, self.updates, self.going = weights, updates, going
        self.version, self.handle = -1, None  # of the weights that were put out last
        self.open = [0] * (len(fleet) // remote.envs)  # chunks of each actor, asked or not used up
        self.chunk: Chunk | None = None
        self.number = self.at = 0  # the chunk's actor, and which of its steps is next
        self.ages: list[int] = []

    def step(self, agent: Agent, mode: str, going: Callable[[], bool] = lambda: True) -> int:
        """Take in one step of an actor's environments; return how many agent steps that were. 0 if the run is to end.

        agent, mode: who shall act in what is collected from now on, and how; going: not asked, as actors go on alone.
        """
        if not self.chunk:
            self._ask(agent, mode)
            if not self._next(self.going):
                return 0
            self._ask(agent, mode)
        return self._take()

    def drain(self) -> int:
        """Take in what has arrived, as a run that was told to end would lose it; return how many agent steps."""
        count = 0
        while self.chunk or self._next(once()):
            count += self._take()
        return count

    def _next(self, going):
        """Wait for the next chunk; False if there is none by the time that `going` says that it is not needed."""
        found = self.fleet.wait(going)
        if found:
            (self.number, self.chunk), self.at = found, 0
        return bool(found)

    def _take(self):
        """Take in the next step of the chunk in hand; return how many agent steps that were."""
        assert self.chunk
        at, chunk = self.at, self.chunk
        steps, stored, logs = (
            {key: value[:, at].copy() for key, value in part.items()}
            for part in (chunk.steps, chunk.stored, chunk.logs)
        )
        if chunk.version >= 0:
            self.ages.append(self.updates() - chunk.version)
        for place in range(self.remote.envs):
            parts = [{key: value[place] for key, value in part.items()} for part in (steps, stored, logs)]
            logs_here = {key: float(value) for key, value in parts[2].items()}
            self.note(self.number * self.remote.envs + place, parts[0], parts[1] or None, logs_here)
        self.at += 1
        if self.at == chunk.steps["reward"].shape[1]:
            self.chunk = None
            self.open[self.number] -= 1
        return int((~steps["is_last"]).sum())

    def rest(self) -> None:
        """Nothing here is under way."""

    def gauges(self) -> dict[str, float]:
        """Return what is to be logged: by how many updates the policies that collected were older than the learner."""
        ages, self.ages = self.ages, []
        return {"policy_age": sum(ages) / len(ages)} if ages else {}

    def _ask(self, agent, mode):
        """Let every actor that has credit collect."""
        who = "agent" if agent is self.learner else "random"
        for number in range(len(self.open)):
            while self.open[number] <= self.remote.lag:
                self.open[number] += 1
                handle, version = self._policy() if who == "agent" else (None, -1)
                self.fleet.ask(number, handle, version, who, mode, self.remote.length)

    def _policy(self):
        """Return the weights that are out, and their version; newer ones if they are `sync` updates old."""
        updates = self.updates()
        if self.version < 0 or updates - self.version >= self.remote.sync:
            self.handle, self.version = self.fleet.put(self.weights()), updates
        return self.handle, self.version


def once() -> Callable[[], bool]:
    """Return a function that is true the first time."""
    answers = iter([True])
    return lambda: next(answers, False)
