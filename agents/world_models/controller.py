"""C: one linear layer from [z, h], or z alone, to the action, and the evolution strategy that finds its weights.

Letters: P candidates, N environments or dreams, Z latent numbers, H width of M, F features, A actions.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ops.random import rand, randn
from specs import ActionSpec
from tools import UserError

BROWNIAN = 50**-0.5  # stddev of a step of the walk by which numbers collect, in a space from -1 to 1


class Controller:
    """Maps features to actions: tanh of the layer for numbers, the largest output for a choice.

    Weights are given with every call: (N, size), row i for features i. They are not learned by gradients.

    Args:
      features: F, Z + H or Z alone; act_spec: ActionSpec.
    Attributes:
      size: number of weights, (F + 1) A.
    """

    def __init__(self, features: int, act_spec: ActionSpec):
        self.features, self.act_spec = features, act_spec
        self.size = (features + 1) * act_spec.size

    def act(self, z: torch.Tensor, h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(N, Z), (N, H), (N, size) -> actions (N, A): numbers in [-1, 1], one-hots of choices."""
        feat = torch.cat([z, h], -1)[:, : self.features]  # without h, if these are Z
        matrix, bias = weights.split([self.features * self.act_spec.size, self.act_spec.size], -1)
        out = torch.einsum("nf,nfa->na", feat, matrix.view(-1, self.features, self.act_spec.size)) + bias
        return chosen(self.act_spec, torch.tanh(out))  # which tanh leaves the largest


def wander(act_spec: ActionSpec, policy: str, last: torch.Tensor, is_first: np.ndarray) -> torch.Tensor:
    """Return actions (N, A) for the first collection of data.

    policy: random for independent ones, or brownian for a walk from `last` (N, A) that starts anew with an episode, in
      which choices are held for two steps in the mean.
    """
    fresh = 2 * rand(last.shape, last.device) - 1
    if policy == "random":
        return chosen(act_spec, fresh)
    first = torch.as_tensor(is_first, device=last.device)[:, None]
    walk = (last + BROWNIAN * randn(last.shape, last.device)).clamp(-1, 1)
    hold = (rand((len(last), 1), last.device) < 0.5) & ~first
    parts = []
    for key, part in act_spec.split(torch.where(first, fresh, walk)).items():
        if key in act_spec.classes:
            parts.append(torch.where(hold, act_spec.split(last)[key], act_spec.split(chosen(act_spec, fresh))[key]))
        else:
            parts.append(part)
    return torch.cat(parts, -1)


def chosen(act_spec: ActionSpec, out: torch.Tensor) -> torch.Tensor:
    """Return numbers (N, A) with the largest of each choice as a one-hot."""
    parts = []
    for key, part in act_spec.split(out).items():
        for choice in part.split(act_spec.classes[key], -1) if key in act_spec.classes else ():
            parts.append(torch.nn.functional.one_hot(choice.argmax(-1), choice.shape[-1]).float())
        if key not in act_spec.classes:
            parts.append(part)
    return torch.cat(parts, -1)


class Evolution:
    """CMA-ES of the package `cma`, which maximizes the fitness and can be saved: all draws are made from a seed.

    Args:
      size: numbers of a candidate; population: P; sigma: first step size; seed: of the draws.
    """

    def __init__(self, size: int, population: int, sigma: float, seed: int):
        self.size, self.population, self.sigma, self.seed = size, population, sigma, seed
        self.told: list[list[float]] = []
        self._start()

    def _start(self):
        try:
            import cma
        except ImportError:
            raise UserError("--agent world_models needs cma: pip install -r requirements/world_models.txt") from None
        rng = np.random.default_rng(self.seed)
        options = {"popsize": self.population, "randn": lambda *shape: rng.standard_normal(shape), "verbose": -9}
        options |= {"seed": np.nan, "maxiter": np.inf, "tolstagnation": np.inf}  # nan: the global generator stays
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(np.zeros(self.size), self.sigma, options)
        self._ask()

    def _ask(self):
        self._asked = self._strategy.ask()
        self.candidates = np.array(self._asked, np.float32)  # (P, size)

    @property
    def mean(self) -> np.ndarray:
        """The mean (size,) of the distribution from which candidates are drawn."""
        return np.asarray(self._strategy.mean, np.float32)

    @property
    def step_size(self) -> float:
        """The sigma of the distribution."""
        return float(self._strategy.sigma)

    def tell(self, fitness: np.ndarray) -> None:
        """Learn from the fitness (P,) of `candidates`, and draw the next ones."""
        self.told.append([float(value) for value in fitness])
        self._strategy.tell(self._asked, [-value for value in self.told[-1]])
        self._ask()

    def state_dict(self) -> dict[str, Any]:
        """Return all fitnesses that were told, from which the strategy comes about again."""
        return {"told": torch.tensor(self.told, dtype=torch.float64).view(-1, self.population)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`: tell a new strategy, with the same draws, what the old one was told."""
        self.told = []
        self._start()
        for fitness in state["told"].numpy():
            self.tell(fitness)
