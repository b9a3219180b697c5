"""The dream: M in the place of the environment, for all candidates at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from agents.world_models.controller import Controller
from agents.world_models.memory import MDNRNN, sample
from agents.world_models.vision import Vision, draw
from tools import UserError

STARTS = 1000  # first latents that are kept for dreams to begin with


@torch.no_grad()
def first_latents(vision: Vision, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Return mean and log-variance (2, S, Z) of V on first observations of episodes, at most `STARTS` of them.

    batches: of {key: (B, T, ...)} with is_first. Raises UserError if none begins an episode.
    """
    found: list[torch.Tensor] = []
    for batch in batches:
        if batch["is_first"].any():
            latents = torch.stack(vision.encode(vision.encoder.prepare(batch)))  # (2, B, T, Z)
            found.append(latents[:, batch["is_first"]])
        if sum(part.shape[1] for part in found) >= STARTS:
            break
    if not found:
        raise UserError("--stages.collect: no window holds the start of an episode, with which dreams could begin")
    return torch.cat(found, 1)[:, :STARTS]


class Dream:
    """Plays episodes in M.

    Args:
      memory: MDNRNN; controller: Controller; config: the section `stages`.
    """

    def __init__(self, memory: MDNRNN, controller: Controller, config: Any):
        self.memory, self.controller, self.config = memory, controller, config

    @torch.no_grad()
    def fitness(self, candidates: np.ndarray, starts: torch.Tensor, generator: torch.Generator) -> np.ndarray:
        """Return the mean return (P,) of the dreams of candidates (P, size).

        All of them dream from the same `rollouts` starts, drawn from latents (2, S, Z).
        """
        count = self.config.rollouts
        weights = torch.from_numpy(candidates).to(starts.device).repeat_interleave(count, 0)  # (P rollouts, size)
        chosen = torch.randint(starts.shape[1], (count,), generator=generator, device=starts.device)
        returns = self.play(weights, draw(*starts[:, chosen]).repeat(len(candidates), 1))
        return returns.view(len(candidates), count).mean(1).double().cpu().numpy()

    def play(self, weights: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Dream with weights (N, size) from latents (N, Z); return the returns (N,).

        A dream ends where M says that the episode does, or after `dream_length` steps.
        """
        memory = self.memory.initial(len(z), z.device)
        total, alive = torch.zeros(len(z), device=z.device), torch.ones(len(z), device=z.device)
        for _ in range(self.config.dream_length):
            action = self.controller.act(z, memory.h, weights)
            memory = self.memory.step(z, action, memory)
            found = self.memory.predict(z, memory.h)
            z = sample(found, self.config.temperature)
            total += alive * found.reward  # that of arriving, also where the end is
            alive = alive * (found.end <= 0)
            if not alive.any():
                break
        return total
