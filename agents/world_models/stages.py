"""The order in which World Models learns: what is due now, and what acting has to bring."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# What goes on. Learn calls are due in the first three; in the others, acting brings data or scores.
VISION, MEMORY, EVOLVE = "vision", "memory", "evolve"
COLLECT, PLAY, SCORE, DONE = "collect", "play", "score", "done"
WORDS = {COLLECT: "data", VISION: "V", MEMORY: "M", EVOLVE: "C", PLAY: "C", SCORE: "C", DONE: "done"}


class Stages:
    """Progress through the stages, which is also the clock of the learn calls.

    In each round: collect data; learn V; learn M; then evolve C for a number of generations. A generation is one learn
    call, for which the candidates dream, or have played in the real environment before. Every `score_every` generations
    and after the last, the mean of the candidates' distribution is scored in the real environment.

    Args:
      config: the section `stages`.
    Attributes:
      name: of the stage; done: how many agent steps, updates or generations of it are done, of `goal`; round: from 0.
      played: share of the candidates' episodes that are played, of the generation that waits for them.
    """

    def __init__(self, config: Any):
        self.config = config
        self.name, self.done, self.round, self.generations, self.played = COLLECT, 0, 0, 0, 0.0
        self.begun: int | None = None  # agent steps before the stage

    @property
    def goal(self) -> int:
        """The number of agent steps, updates or generations that the stage takes."""
        config = self.config
        goals = {COLLECT: config.collect, VISION: config.v_updates, MEMORY: config.m_updates}
        return goals.get(self.name, config.generations)

    def due(self, step: int) -> int:
        """Return how many learn calls are due after `step` agent steps: 1 until the stage's share is done."""
        if self.name == COLLECT:
            self.begun = step if self.begun is None else self.begun
            self.done = step - self.begun
            if self.done >= self.goal:
                self.enter(VISION)
        return int(self.name in (VISION, MEMORY, EVOLVE))

    def tick(self) -> None:
        """Count a learn call; go on to the next stage when this one has had its share."""
        self.done += 1
        if self.name == VISION and self.done >= self.goal:
            self.enter(MEMORY)
        elif self.name == MEMORY and self.done >= self.goal:
            self.evolve()
        elif self.name == EVOLVE:
            self.generations += 1
            is_last = self.generations >= self.config.generations
            if is_last or self.generations % self.config.score_every == 0:
                self.enter(SCORE)
            else:
                self.evolve()

    def scored(self) -> None:
        """Note that acting has brought all the scores that were waited for."""
        if self.name == PLAY:
            self.enter(EVOLVE)
        elif self.generations < self.config.generations:
            self.evolve()
        else:
            self.generations, self.round = 0, self.round + 1
            self.enter(COLLECT if self.round < self.config.rounds else DONE)

    def evolve(self) -> None:
        """Begin a generation."""
        self.enter(EVOLVE if self.config.train_in == "dream" else PLAY)

    def enter(self, name: str) -> None:
        """Begin a stage, or the one that follows if it has nothing to do."""
        self.name, self.done, self.begun, self.played = name, 0, None, 0.0
        if name == VISION and not self.goal:
            self.enter(MEMORY)
        elif name == MEMORY and not self.goal:
            self.evolve()
        elif name in (EVOLVE, PLAY):
            self.done = self.generations

    def stage(self) -> tuple[str, float]:
        """Return the word for what is learned now, and which share of it is."""
        word = WORDS[self.name] + (f" of round {self.round + 1}" if self.round and self.name != DONE else "")
        if self.name in (PLAY, SCORE, EVOLVE):
            waiting = self.played if self.name == PLAY else 0.0
            return word, min(1.0, (self.generations + waiting) / max(self.goal, 1))
        return word, 1.0 if self.name == DONE else min(1.0, self.done / self.goal)

    def finished(self) -> bool:
        """True if nothing is left to learn, however many steps are."""
        return self.name == DONE

    def left(self, step: int, begin: int) -> int:
        """Return how many learn calls are still to come, whatever the steps."""
        config = self.config
        each = {VISION: config.v_updates, MEMORY: config.m_updates, EVOLVE: config.generations}
        order = [COLLECT, VISION, MEMORY, EVOLVE]
        stage = self.name if self.name in order else EVOLVE
        now = sum(each.get(name, 0) for name in order[order.index(stage) :]) - self.generations
        now -= self.done if self.name in (VISION, MEMORY) else 0
        return 0 if self.name == DONE else now + (config.rounds - self.round - 1) * sum(each.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a clock saves; where the stages stand is part of the agent, see `place`."""
        return {"start": self.begun, "done": self.done, "finished": self.finished()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The agent has loaded it."""

    def place(self) -> dict[str, Any]:
        """Return where the stages stand, from which `go_to` makes them go on."""
        return {name: getattr(self, name) for name in ("name", "done", "round", "generations", "begun")}

    def go_to(self, place: dict[str, Any]) -> None:
        """Undo `place`."""
        for name, value in place.items():
            setattr(self, name, value)


class Auditions:
    """Scores of candidates in environments, an episode at a time.

    Args:
      weights: (P, size) of the candidates; rollouts: episodes of each.
    Attributes:
      scores: (P, rollouts), NaN where an episode is still to be played.
    """

    def __init__(self, weights: np.ndarray, rollouts: int):
        self.weights = weights
        self.scores = np.full((len(weights), rollouts), np.nan)
        self.playing: dict[int, tuple[int, int]] = {}  # environment -> its place in `scores`
        self.sums: dict[int, float] = {}

    def begin(self, env: int) -> None:
        """Give an environment that starts an episode the next one to play, if there is one.

        What it was playing was cut off, as by the restart of a worker: it does not count and will be played anew.
        """
        self.playing.pop(env, None)
        taken = set(self.playing.values())
        left = (tuple(place) for place in np.argwhere(np.isnan(self.scores)))
        place = next((place for place in left if place not in taken), None)
        if place:
            self.playing[env], self.sums[env] = place, 0.0

    def reward(self, env: int, reward: float, is_last: bool) -> None:
        """Count a reward; the last one of an episode makes the score."""
        if env in self.playing:
            self.sums[env] += float(reward)
            if is_last:
                self.scores[self.playing.pop(env)] = self.sums[env]

    def weights_of(self, env: int) -> np.ndarray:
        """Return the weights (size,) with which an environment acts, the first candidate's if it plays for none."""
        return self.weights[self.playing[env][0] if env in self.playing else 0]

    def share(self) -> float:
        """Return which share of the episodes was played."""
        return float(np.isfinite(self.scores).mean())

    def complete(self) -> bool:
        """True if all episodes were played."""
        return not np.isnan(self.scores).any()

    def state_dict(self) -> dict[str, Any]:
        """Return weights and finished scores; episodes under way will be played anew."""
        played = np.isfinite(self.scores)  # no checkpoint is read that holds what is not finite
        scores = torch.from_numpy(np.where(played, self.scores, 0.0))
        return {"weights": torch.from_numpy(self.weights), "scores": scores, "played": torch.from_numpy(played)}

    @classmethod
    def read(cls, state: dict[str, Any]) -> Auditions:
        """Undo `state_dict`."""
        auditions = cls(state["weights"].numpy(), state["scores"].shape[1])
        auditions.scores = np.where(state["played"].numpy(), state["scores"].numpy(), np.nan)
        return auditions
