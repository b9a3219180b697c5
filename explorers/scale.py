"""Running statistics by which rewards and inputs of explorers are scaled. They are tensors and change in place."""

import torch
import torch.nn as nn

from ops.collectives import average_


class Moments(nn.Module):
    """Mean and variance of what was seen: at first every sample counts as much as any other (Chan et al., 1979), and
    later, as what explorers see changes with what is learned, a new batch has the share `RATE`.

    Args:
      shape: of one sample.
    """

    RATE = 0.05  # an error falls a hundredfold within some hundred updates: at 0.01 its scale would lag behind

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))  # until something was seen

    @torch.no_grad()
    def add(self, samples):
        """Fold in samples (n, *shape), and those of the other ranks."""
        size, mean = len(samples), samples.mean(0)
        average_([mean])
        var = (samples - mean).square().mean(0)
        average_([var])
        known, total = (self.count / (self.count + size)).clamp(max=1 - self.RATE), self.count + size
        delta = mean - self.mean
        self.var.copy_(known * self.var + (1 - known) * var + known * (1 - known) * delta.square())
        self.mean.add_(delta * (1 - known))
        self.count.copy_(total)

    def std(self):
        """Return the standard deviation (*shape), a tensor of its own."""
        return self.var.sqrt()


class ReturnScale(nn.Module):
    """The standard deviation of a reward's discounted sum, by which the reward is divided.

        sum[t] = discount sum[t-1] + reward[t]

    Of large-scale-curiosity (arXiv:1808.04355: RewardForwardFilter and RunningMeanStd), where no mean is subtracted and
    the sum goes on through the ends of episodes. There it runs along the environments' steps; here it begins anew with
    each replayed sequence, so that it stays away from zero where the reward is constant. And there all of the past
    counts; here the first errors of untrained networks are forgotten, beside which later ones would pay nothing.

    Args:
      discount: of a step.
    """

    def __init__(self, discount):
        super().__init__()
        self.discount = discount
        self.moments = Moments()

    @torch.no_grad()
    def forward(self, reward):
        """Fold in rewards (B, T); return them divided by the scale."""
        total, totals = torch.zeros_like(reward[:, 0]), []
        for step in reward.unbind(1):
            total = self.discount * total + step
            totals.append(total)
        self.moments.add(torch.stack(totals, 1).flatten())
        return reward / self.moments.std().clamp(min=1e-8)
