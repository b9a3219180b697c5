"""Distributions that heads output, with `log_prob`, `mode`, `sample` and `entropy`.

Randomness enters as an argument (`noise`), so that a whole sequence's noise can be drawn at once, a step can be
compiled or captured, and recorded draws can be replayed; TanhNormal's mode alone draws for itself. Everything is
computed in float32. Those of numbers are in ops/normals.py.
"""

import math

import torch
import torch.nn.functional as F

from ops.math import symexp, symlog
from ops.normals import HALF_LOG_2PI
from ops.random import rand


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
