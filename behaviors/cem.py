"""Acting by planning in latent space, without a learned policy (PlaNet, arXiv:1811.04551, algorithm 2)."""

import torch
import torch.nn as nn

from networks import feature
from ops.distributions import one_hot


class CEM(nn.Module):
    """The cross-entropy method: refit a normal over action sequences to the candidates with the most predicted reward.

    It stands where a learned behaviour does, and learns nothing. A discrete action is the largest of the numbers that
    stand for its classes.

    Args:
      act_spec: ActionSpec.
      config: with horizon H, iterations, candidates J, elites.
    """

    def __init__(self, act_spec, config):
        super().__init__()
        self.spec = act_spec
        self.horizon, self.iterations = config.horizon, config.iterations
        self.candidates, self.elites = config.candidates, config.elites

    def compile(self):
        """There is nothing to compile: acting stays as it is written."""

    def losses(self, world, states, batch, reward, imagine=None):
        """Nothing is learned: no losses, no metrics."""
        return {}, {}

    def update_slow(self):
        """There is no critic."""

    def act(self, world, state, mode):
        """The first actions (N, A) of the plans from the posterior State (N, ...); `mode` makes no difference."""
        start = state.map(lambda x: x.repeat_interleave(self.candidates, 0))
        shape = (self.horizon, len(state.deter), self.candidates, self.spec.size)

        def score(plans):
            """Plans (H, N, J, A) -> the sum of the rewards along each of them (N, J)."""
            states, _ = world.rssm.imagine(start, self.native(plans).flatten(1, 2), self.horizon)
            return world.reward(feature(states.map(lambda x: x[1:]))).mode().sum(0).view(shape[1:3])

        return self.native(search(score, shape, self.iterations, self.elites, state.deter.device)[0])

    def native(self, plans):
        """Numbers (..., A) -> the action vectors that they stand for (..., A)."""
        parts = plans.split(list(self.spec.widths.values()), -1)
        return torch.cat(
            [
                torch.cat([one_hot(x.argmax(-1), x.shape[-1]) for x in part.split(self.spec.classes[key], -1)], -1)
                if key in self.spec.classes
                else part
                for key, part in zip(self.spec.widths, parts, strict=True)
            ],
            -1,
        )


def search(score, shape, iterations, elites, device="cpu"):
    """Maximise a score over sequences in [-1, 1] by the cross-entropy method, for N problems at once.

    Args:
      score: function of candidates (H, N, J, A) -> (N, J).
      shape: (H, N, J, A); iterations: of refitting; elites: how many of J a refit is made to.
    Returns: the last mean (H, N, A).
    """
    horizon, count, _, size = shape
    mean = torch.zeros(horizon, count, 1, size, device=device)
    stddev = torch.ones_like(mean)
    for _ in range(iterations):
        plans = (mean + stddev * torch.randn(shape, device=device)).clamp(-1, 1)
        best = score(plans).topk(elites, -1).indices[None, :, :, None].expand(horizon, -1, -1, size)
        chosen = plans.gather(2, best)
        mean, stddev = chosen.mean(2, keepdim=True), chosen.std(2, correction=0, keepdim=True)
    return mean[:, :, 0]
