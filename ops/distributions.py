"""Distributions that heads output, with `log_prob`, `mode`, `sample` and `entropy`.

Randomness enters as an argument (`noise`), so that a whole sequence's noise can be drawn at once, a step can be
compiled or captured, and recorded draws can be replayed; TanhNormal's mode alone draws for itself. Everything here is
computed in float32.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ops.math import symexp, symlog
from ops.random import rand, randn


def one_hot(index, classes, dtype=torch.float32):
    """Encode integers (...) below `classes` as (..., classes); unlike PyTorch's own, without a host sync."""
    return (index[..., None] == torch.arange(classes, device=index.device)).to(dtype)


def one_hots(index, classes):
    """Encode integers (..., n), the i-th below classes[i], as concatenated one-hots (..., sum(classes)) float32."""
    parts = zip(index.unbind(-1), classes, strict=True)
    return torch.cat([one_hot(part, size) for part, size in parts], -1)


def concatenated(parts):
    """Join tensors on the last axis; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class StraightThrough(torch.autograd.Function):
    """Return the first argument with the gradient of the second: hard + probs - sg(probs), as one operation."""

    @staticmethod
    def forward(ctx, hard, probs):
        ctx.dtype = probs.dtype
        return hard

    @staticmethod
    def backward(ctx, grad):
        return None, grad.to(ctx.dtype)


class OneHot:
    """Independent one-hot categoricals over the last axis, mixed with the uniform distribution.

    probs = (1 - unimix) softmax(logits) + unimix / K (DreamerV3, section "World model learning").

    Args:
      logits: (..., K)
      unimix: share of the uniform distribution, 0 for a plain categorical.
      dtype: of what `sample` and `mode` return.
    """

    def __init__(self, logits, unimix=0.0, dtype=torch.float32):
        probs = logits.float().softmax(-1)
        self.probs = torch.add(torch.tensor(unimix / logits.shape[-1]), probs, alpha=1 - unimix) if unimix else probs
        self.raw = None if unimix else logits.float()
        self.dtype = dtype

    @property
    def logits(self):
        """Return log-probabilities (..., K)."""
        return self.probs.log() if self.raw is None else self.raw.log_softmax(-1)

    def detach(self):
        """Return the same distribution without gradient."""
        other = object.__new__(type(self))
        other.probs, other.raw = self.probs.detach(), None if self.raw is None else self.raw.detach()
        other.dtype = self.dtype
        return other

    @staticmethod
    def noise(shape, device=None):
        """Draw the noise of `sample`: uniform variables, one for each group; shape is the batch shape (...)."""
        return rand(shape, device)

    def sample(self, noise):
        """Draw one-hots (..., K) by inverting the cumulative distribution at noise (...); straight-through."""
        index = (noise[..., None] >= self.probs.detach().cumsum(-1)[..., :-1]).sum(-1)
        return self.straight_through(index)

    def mode(self):
        """Return the most likely one-hot vector (..., K); straight-through."""
        return self.straight_through(self.probs.argmax(-1))

    def straight_through(self, index):
        """Return the one-hot of a class index (...), with the gradient of the probabilities."""
        return StraightThrough.apply(one_hot(index, self.probs.shape[-1], self.dtype), self.probs)

    def log_prob(self, value):
        """Return the log-probability (...) of one-hot vectors (..., K)."""
        return (self.logits * value).sum(-1)

    def entropy(self):
        """Return the entropy in nats (...)."""
        return -(self.probs * self.logits).sum(-1)

    def kl(self, other):
        """Return KL(self || other) in nats (...)."""
        return (self.probs * (self.logits - other.logits)).sum(-1)


class MultiOneHot:
    """One or more one-hot variables, each of its own width, concatenated in one vector: a (multi-)discrete action.

    Args:
      logits: (..., sum(classes))
      classes: number of classes of each variable.
      unimix: share of the uniform distribution.
    """

    def __init__(self, logits, classes, unimix=0.0):
        self.classes = list(classes)
        self.parts = [OneHot(part, unimix) for part in logits.split(self.classes, -1)]

    def sample(self, noise):
        """Draw one-hots (..., sum(classes)). noise: (..., number of variables), uniform."""
        parts = zip(self.parts, noise.unbind(-1), strict=True)
        return concatenated([part.sample(part_noise) for part, part_noise in parts])

    def mode(self):
        return concatenated([part.mode() for part in self.parts])

    def log_prob(self, value):
        parts = zip(self.parts, value.split(self.classes, -1), strict=True)
        return sum(part.log_prob(part_value) for part, part_value in parts)

    def entropy(self):
        return sum(part.entropy() for part in self.parts)

    def entropies(self):
        """Return the entropy of each variable (..., n)."""
        return torch.stack([part.entropy() for part in self.parts], -1)


class Classes(MultiOneHot):
    """A vector of integers, as an observation: `log_prob` takes, and `mode` returns, indices (..., n)."""

    def mode(self):
        return torch.stack([part.probs.argmax(-1) for part in self.parts], -1)

    def log_prob(self, value):
        value = value.reshape(*self.parts[0].probs.shape[:-1], len(self.classes))
        return super().log_prob(one_hots(value, self.classes))


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


class Joint:
    """Independent distributions, concatenated on the last axis: the actions of a dict of keys.

    Args:
      parts: one distribution per action key, in sorted order of the keys.
      widths: width of each on the last axis; noises: width of each one's noise.
    """

    def __init__(self, parts, widths, noises):
        self.parts = parts
        self.widths, self.noises = list(widths), list(noises)

    def sample(self, noise):
        parts = zip(self.parts, noise.split(self.noises, -1), strict=True)
        return concatenated([part.sample(part_noise) for part, part_noise in parts])

    def mode(self):
        return concatenated([part.mode() for part in self.parts])

    def log_prob(self, value):
        parts = zip(self.parts, value.split(self.widths, -1), strict=True)
        return sum(part.log_prob(part_value) for part, part_value in parts)

    def entropy(self):
        return sum(part.entropy() for part in self.parts)

    def entropies(self):
        """Return the entropy of each variable of the action vector (..., n)."""
        return torch.cat([part.entropies() for part in self.parts], -1)


def symexp_bins(count):
    """Return exactly antisymmetric bin positions symexp(linspace(-20, 20, count)), in raw units: (count,)."""
    half = symexp(torch.linspace(-20, 0, (count + 1) // 2)) if count % 2 else None
    if half is None:
        half = symexp(torch.linspace(-20, 20, count)[: count // 2])
    return torch.cat([half, -half.flip(0)[count % 2 :]])


class TwoHot:
    """A categorical over bins that represents a real number (DreamerV3, eq. 9-10, released form).

    A target's weight is shared by its two neighboring bins, by distance in raw units.

    Args:
      logits: (..., bins)
      bins: (bins,) ascending positions, antisymmetric.
    """

    def __init__(self, logits, bins):
        self.logits = logits.float().log_softmax(-1)
        self.bins = bins

    def mode(self):
        """Return the mean (...); pairing each bin with its negative makes uniform logits give exactly 0."""
        probs = self.logits.exp()
        half = probs.shape[-1] // 2
        return (probs[..., -half:] - probs[..., :half].flip(-1)) @ self.bins[-half:]

    def log_prob(self, value):
        """Return the negative cross-entropy (...) to the two-hot encoding of value (...)."""
        above = torch.searchsorted(self.bins, value.detach().contiguous(), right=True)
        below = (above - 1).clamp(min=0)
        above = above.clamp(max=len(self.bins) - 1)
        to_below = (value - self.bins[below]).abs()
        to_above = (self.bins[above] - value).abs()
        share = torch.where(below == above, 1.0 + 0 * value, to_above / (to_below + to_above))  # NaN stays NaN
        picked = self.logits.gather(-1, torch.stack([below, above], -1))
        return share * picked[..., 0] + (1 - share) * picked[..., 1]


class SymlogTwoHot(TwoHot):
    """Two-hot of DreamerV3's 2023 form: bins evenly spaced in symlog space, where target and mean are taken."""

    def mode(self):
        return symexp(super().mode())

    def log_prob(self, value):
        return super().log_prob(symlog(value))


class UnitNormal:
    """A number predicted with unit variance.

    Args:
      mean: (..., 1)
    """

    def __init__(self, mean):
        self.mean = mean.float().squeeze(-1)

    def mode(self):
        return self.mean

    def log_prob(self, value):
        return -0.5 * (self.mean - value).square() - HALF_LOG_2PI


class Bernoulli:
    """A binary variable that accepts soft targets.

    Args:
      logit: (..., 1)
    """

    def __init__(self, logit):
        self.logit = logit.float().squeeze(-1)

    def mean(self):
        """Return the probability of 1 (...)."""
        return torch.sigmoid(self.logit)

    def mode(self):
        return (self.logit > 0).float()

    def log_prob(self, value):
        return value * F.logsigmoid(self.logit) + (1 - value) * F.logsigmoid(-self.logit)


class SymlogMSE:
    """A vector predicted in symlog space; log_prob is minus the squared error, with neither 1/2 nor constant.

    Args:
      mean: (..., n) in symlog space.
    """

    def __init__(self, mean):
        self.mean = mean.float()

    def mode(self):
        return symexp(self.mean)

    def log_prob(self, value):
        return -(self.mean - symlog(value.reshape(self.mean.shape))).square().sum(-1)


class VectorNormal:
    """A vector predicted with unit variance (Dreamer, DreamerV2).

    Args:
      mean: (..., n)
    """

    def __init__(self, mean):
        self.mean = mean.float()

    def mode(self):
        return self.mean

    def log_prob(self, value):
        error = (self.mean - value.reshape(self.mean.shape)).square().sum(-1)
        return -0.5 * error - HALF_LOG_2PI * self.mean.shape[-1]


class ImageMSE:
    """An image predicted in [0, 1]; log_prob is minus the squared error summed over the image.

    Args:
      mean: (..., H, W, C) in [0, 1].
    """

    def __init__(self, mean):
        self.mean = mean.float()

    def mode(self):
        return self.mean

    def log_prob(self, value):
        """Return minus the squared error (...) of value (..., H, W, C), uint8 0..255."""
        return -(self.mean - value.float() / 255).square().sum((-3, -2, -1))


class ImageNormal(ImageMSE):
    """An image predicted in [0, 1] with unit variance (Dreamer, DreamerV2)."""

    def log_prob(self, value):
        return 0.5 * super().log_prob(value) - HALF_LOG_2PI * math.prod(self.mean.shape[-3:])
