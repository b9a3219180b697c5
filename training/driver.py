"""The one loop in which agents meet environments: collecting, evaluating, filming and benchmarks are calls of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from replay.episodes import stored_step
from specs import ActionSpec
from training.protocol import Agent


class Episode(NamedTuple):
    """A finished episode of environment number `env`: sum of its rewards, length in actions, what it logged."""

    env: int
    score: float
    length: int
    logs: dict[str, float]


class Account:
    """Follows the episodes of N environments, step by step, and tells what it hears on.

    Args:
      count: N; on_step: functions (index, step, stored) of an environment's step {key: value} and of what the agent
        stores with it, {key: value} or None; on_episode: functions of an Episode.
    Attributes:
      returns, lengths: (N,) sum of the rewards and number of actions of the episodes under way.
    """

    def __init__(self, count: int, on_step: Sequence[Callable], on_episode: Sequence[Callable]):
        self.on_step, self.on_episode = on_step, on_episode
        self.returns, self.lengths = np.zeros(count), np.zeros(count, int)

    def note(self, index: int, step: Mapping[str, Any], stored: Any, logs: Mapping[str, float]) -> None:
        """Account for a step of environment `index`; logs: its `log_*` entries, which count in an episode's end."""
        going_on = not step["is_first"]
        self.returns[index] = step["reward"] + self.returns[index] * going_on
        self.lengths[index] = (self.lengths[index] + 1) * going_on
        for function in self.on_step:
            function(index, step, stored)
        if step["is_last"] and going_on:
            episode = Episode(index, float(self.returns[index]), int(self.lengths[index]), dict(logs))
            for function in self.on_episode:
                function(episode)


class Driver(Account):
    """Steps environments with an agent, one step in all of them at a time.

    The environments act on while the caller does something else: what they come to is received at the next step.

    Args:
      envs: `envs.parallel.Envs`, with N environments; act_spec: ActionSpec.
      layout: {key: (shape, dtype)} of a stored step.
      on_obs: functions of the observations {key: (N, ...)}, called before the agent acts on them.
      on_step, on_episode: see `Account`.
    """

    def __init__(
        self,
        envs: Any,
        act_spec: ActionSpec,
        layout: Mapping[str, Any],
        on_obs: Sequence[Callable] = (),
        on_step: Sequence[Callable] = (),
        on_episode: Sequence[Callable] = (),
    ):
        super().__init__(len(envs), on_step, on_episode)
        self.envs, self.layout, self.on_obs = envs, layout, on_obs
        self.obs: dict[str, np.ndarray] | None = None
        self.agent: Agent | None = None
        self.carry: Any = None
        self.actions = act_spec.zeros(len(envs))

    def step(self, agent: Agent, mode: str, going: Callable[[], bool] = lambda: True) -> int:
        """Let the agent act once everywhere; return how many agent steps that were: the ends of episodes are none.

        going: asked once all is noted; where it is false, the environments stay where they are: an episode that nobody
          wants need not begin, which takes seconds in some and a person's hand at a robot.
        """
        obs = self.obs = self.envs.reset() if self.obs is None else self.envs.receive()
        if agent is not self.agent:
            self.agent, self.carry = agent, agent.initial(len(self.envs))
        for function in self.on_obs:
            function(obs)
        actions, self.carry, stored = agent.act(obs, self.carry, mode)
        for index in range(len(self.envs)):
            step = stored_step(self.layout, obs, self.actions, index)
            logs = {key: float(value[index]) for key, value in obs.items() if key.startswith("log_")}
            self.note(index, step, stored and {key: value[index] for key, value in stored.items()}, logs)
        self.actions = actions
        if going():
            self.envs.send(actions)
        else:
            self.obs = None
        return int((~obs["is_last"]).sum())

    def rest(self) -> None:
        """Receive the step under way, so that the environments can be asked for something else."""
        if self.obs is not None:
            self.envs.receive()
            self.obs = None
