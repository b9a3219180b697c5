"""An actor: environments, and a copy of the agent beside them that acts in chunks of steps."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from agents import make_agent
from agents.random import Random
from envs import longest_episode, make_env
from envs.parallel import Envs, Local, Worker
from modalities import obs_spec
from specs import act_spec, step_layout
from tools import derive_seed
from training import machine
from training.cluster import connect
from training.driver import Driver
from training.remote import Chunk, Fleet

Weights = Mapping[str, np.ndarray]
UNUSED = ("world.decoder.",)  # beginnings of parameters that no acting needs
RESTARTS = 1000  # more than those of an actor's environments, whose numbers decide their seeds


class Actor:
    """Steps `remote.envs` environments on this machine's CPU, with the agent whose weights it was given last.

    The first of a fresh run's actors draws as the run itself would; each other, and each that takes the place of one
    that died, has seeds of its own.

    Args:
      config: the whole configuration.
      number: which of the actors; restart: how many it follows that died; behind: agent steps that the run has behind
        it; folder: working directory of the run, which is this process's own if it exists here.
    """

    def __init__(self, config: Any, number: int, restart: int, behind: int, folder: str):
        self.config, self.known, self.folder = config, (number, restart, behind), folder
        self.envs: Envs | None = None  # until there is something to do: Ray tells of no error in here but a death

    def open(self) -> Envs:
        """Make the environments and the agent, if they are not there yet. Raises UserError as `make_env` does."""
        if self.envs:
            return self.envs
        config, folder, (number, restart, behind) = self.config, self.folder, self.known
        with contextlib.suppress(OSError):
            os.chdir(folder)
        seed = derive_seed(config.seed, 6, *self.known) if any(self.known) else config.seed
        own = config.replace(device="cpu", compile=False, threads=1, seed=seed)
        machine.prepare(own)
        count, kind = config.remote.envs, Worker if config.parallel else Local
        places = range(number * count, (number + 1) * count)
        makers = [functools.partial(make_later, config, index, behind, restart * RESTARTS) for index in places]
        envs = Envs(kind, makers, config.env_timeout, longest_episode(config))
        specs = obs_spec(envs.obs_space), act_spec(envs.act_space)
        self.agents = {"agent": make_agent(own, *specs), "random": Random(specs[1], derive_seed(seed, 3))}
        self.version = -1  # of the weights
        layout = step_layout(envs.obs_space, specs[1])
        self.driver = Driver(envs, specs[1], layout, [self._hear], [self._keep])
        self.envs = envs
        return envs

    def about(self) -> dict[str, Any]:
        """Return what `envs.parallel.Envs` knows of its environments."""
        return {name: getattr(self.open(), name) for name in ("obs_space", "act_space", "own", "left_out", "longest")}

    def collect(self, weights: Weights | None, version: int, who: str, mode: str, length: int) -> Chunk:
        """Take `length` steps in every environment, the ends of episodes among them.

        Args:
          weights: of the agent, as `weights_of` returns them, or None where they do not matter; version: their number.
          who: agent or random; mode: of acting.
        """
        envs = self.open()
        if weights is not None and version != self.version:
            load_weights(self.agents["agent"], weights)
            self.version = version
        self.steps: list[list[Any]] = [[] for _ in range(len(envs))]
        self.stored: list[list[Any]] = [[] for _ in range(len(envs))]
        self.logs: list[dict[str, np.ndarray]] = []
        for _ in range(length):
            self.driver.step(self.agents[who], mode)
        steps = {key: np.stack([[step[key] for step in row] for row in self.steps]) for key in self.steps[0][0]}
        stored = {key: np.stack([[step[key] for step in row] for row in self.stored]) for key in self.stored[0][0]}
        names = sorted({name for entries in self.logs for name in entries})
        zeros = np.zeros(len(envs), np.float32)
        logs = {name: np.stack([entries.get(name, zeros) for entries in self.logs], 1) for name in names}
        events = list(envs.events)
        envs.events.clear()
        return Chunk(version, steps, stored, logs, envs.restarts, events)

    def close(self) -> None:
        """Close the environments."""
        if self.envs:
            self.envs.close()

    def _hear(self, obs):
        self.logs.append({key: value for key, value in obs.items() if key.startswith("log_")})

    def _keep(self, index, step, stored):
        self.steps[index].append(step)
        self.stored[index].append(stored or {})


def make_later(config: Any, index: int, behind: int, before: int, restart: int) -> Any:
    """Make environment `index` of a run, which follows `before` and `restart` others that failed."""
    return make_env(config, "train", index, behind, before + restart)


def weights_of(agent: Any) -> dict[str, np.ndarray]:
    """Return {name: array} of what the agent acts by; on CPU the arrays are its own, not copies."""
    state = agent.nets.state_dict() if hasattr(agent, "nets") else {}
    return {name: value.cpu().numpy() for name, value in state.items() if not name.startswith(UNUSED)}


def load_weights(agent: Any, weights: Weights) -> None:
    """Give an agent on CPU the weights that `weights_of` returned."""
    own = weights_of(agent)
    for name, value in weights.items():
        np.copyto(own[name], value)


def open_fleet(config: Any, behind: int, stack: contextlib.ExitStack) -> Fleet:
    """Start the actors of a run that has `behind` agent steps behind it; `stack` leaves the cluster."""
    remote, folder = config.remote, os.getcwd()
    cpus = remote.envs if config.parallel else 1
    ray = connect(remote.address, stack, max(os.cpu_count() or 1, remote.actors * cpus))
    kind = ray.remote(num_cpus=cpus, max_restarts=0)(Actor)

    def make(number, restart):
        return config, number, restart, behind, folder

    return Fleet(ray, kind, make, remote.actors, remote.envs, remote.patience)
