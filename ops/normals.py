"""Normal distributions of numbers, such as continuous actions, as those in ops/distributions.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ops.random import rand, randn

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Normal:
    """Diagonal normal over the last axis.

    Args:
      mean, stddev: (..., n)
    """

    def __init__(self, mean, stddev):
        self.mean, self.stddev = mean, stddev

    @staticmethod
    def noise(shape, device=None):
        """Draw the noise of `sample`: standard normal variables of the sample's shape."""
        return randn(shape, device)

    def detach(self):
        """Return the same distribution without gradient."""
        return Normal(self.mean.detach(), self.stddev.detach())

    def sample(self, noise):
        return self.mean + self.stddev * noise

    def mode(self):
        return self.mean

    def log_prob(self, value):
        z = (value - self.mean) / self.stddev
        return (-0.5 * z.square() - self.stddev.log() - HALF_LOG_2PI).sum(-1)

    def entropy(self):
        return Normal.entropies(self).sum(-1)

    def entropies(self):
        """Return the entropy of each number (..., n)."""
        return self.stddev.log() + 0.5 + HALF_LOG_2PI

    def kl(self, other):
        """Return KL(self || other) in nats (...)."""
        ratio = (self.stddev / other.stddev).square()
        distance = ((self.mean - other.mean) / other.stddev).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)

    @classmethod
    def entropy_range(cls, min_std, max_std):
        """Return the least and the greatest entropy of an action with mean 0, of a policy with these bounds."""
        ends = cls(torch.zeros(2), torch.tensor([-math.inf, math.inf]), min_std, max_std)
        return tuple(ends.entropies().tolist())


class BoundedNormal(Normal):
    """Actions of DreamerV3: mean tanh(m), stddev (max - min) sigmoid(s + 2) + min, samples not squashed.

    Args:
      mean, stddev: (..., A) raw network outputs.
      min_std, max_std: bounds of the standard deviation.
    """

    def __init__(self, mean, stddev, min_std, max_std):
        stddev = (max_std - min_std) * torch.sigmoid(stddev.float() + 2) + min_std
        super().__init__(mean.float().tanh(), stddev)


class TruncatedNormal(Normal):
    """Actions of DreamerV2: a normal of mean tanh(m), stddev max sigmoid(s / max) + min, truncated to [-1, 1].

    Args: as for BoundedNormal.
    """

    def __init__(self, mean, stddev, min_std, max_std):
        super().__init__(mean.float().tanh(), max_std * torch.sigmoid(stddev.float() / max_std) + min_std)
        self.low, self.high = (-1 - self.mean) / self.stddev, (1 - self.mean) / self.stddev
        self.below = torch.special.ndtr(self.low)
        self.inside = (torch.special.ndtr(self.high) - self.below).clamp(min=1e-6)

    @staticmethod
    def noise(shape, device=None):
        """Draw the noise of `sample`: uniform variables of the sample's shape."""
        return rand(shape, device)

    def sample(self, noise):
        """Invert the cumulative distribution; results lie just inside the bounds.

        The gradient is that of mean + stddev z with z held, 1 and z, as TensorFlow Probability has it; the exact one
        would also move the cut, and vanish towards the bounds.
        """
        z = torch.special.ndtri((self.below + noise * self.inside).clamp(1e-6, 1 - 1e-6)).detach()
        value = self.mean + self.stddev * z
        return value + (value.clamp(-1 + 1e-6, 1 - 1e-6) - value).detach()

    def log_prob(self, value):
        return super().log_prob(value) - self.inside.log().sum(-1)

    def entropy(self):
        return super().entropy() + self._cut().sum(-1)

    def entropies(self):
        return super().entropies() + self._cut()

    def _cut(self):
        """Return what cutting off the tails adds to each number's entropy (..., n)."""
        edges = [z * torch.exp(-0.5 * z.square() - HALF_LOG_2PI) for z in (self.low, self.high)]
        return self.inside.log() + (edges[0] - edges[1]) / (2 * self.inside)


class TanhNormal(Normal):
    """Actions of Dreamer: tanh of a normal with mean 5 tanh(m / 5), stddev softplus(s + c) + min, c so that s = 0
    gives max + min.

    Args: as for BoundedNormal.
    """

    SAMPLES = 100  # from which `mode` chooses
    UNIFORM = math.log(2)  # entropy over [-1, 1], which none exceeds; wider normals pile up at the bounds
    # Nodes of Gaussian quadrature and their weights.
    NODES = list(zip(*(x.tolist() for x in np.polynomial.hermite_e.hermegauss(15)), strict=True))
    ROOT = math.sqrt(2 * math.pi)  # the sum of the weights

    def __init__(self, mean, stddev, min_std, max_std):
        start = math.log(math.expm1(max_std))
        super().__init__(5 * torch.tanh(mean.float() / 5), F.softplus(stddev.float() + start) + min_std)

    def sample(self, noise):
        return torch.tanh(super().sample(noise))

    def mode(self):
        """Return the densest of 100 samples, drawn here, as the most likely action has no closed form (Dreamer).

        From a standard deviation of about 1 on, the density is greatest near the bounds, whatever the mean.
        """
        z = super().sample(self.noise((self.SAMPLES, *self.mean.shape), self.mean.device))  # (100, ..., n)
        best = self.log_prob_before_tanh(z).argmax(0)[None, ..., None].expand(1, *self.mean.shape)
        return torch.tanh(z.gather(0, best)[0])

    def log_prob(self, value):
        return self.log_prob_before_tanh(torch.atanh(value.clamp(-1 + 1e-6, 1 - 1e-6)))

    def log_prob_before_tanh(self, z):
        """Return the log-probability (...) of tanh(z), exact even where tanh rounds to 1."""
        return super().log_prob(z) - log_slope_of_tanh(z).sum(-1)

    @classmethod
    def entropy_range(cls, min_std, max_std):
        least = cls(torch.zeros(1), torch.tensor([-math.inf]), min_std, max_std)
        return least.entropies().item(), cls.UNIFORM

    def entropy(self):
        """Return the normal's entropy plus the mean log-slope of tanh, which quadrature computes."""
        return super().entropy() + self._slopes().sum(-1) / self.ROOT

    def entropies(self):
        return super().entropies() + self._slopes() / self.ROOT

    def _slopes(self):
        return sum(weight * log_slope_of_tanh(self.mean + self.stddev * node) for node, weight in self.NODES)


def log_slope_of_tanh(x):
    """Return log(1 - tanh(x)^2), exact even where tanh rounds to 1."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))
