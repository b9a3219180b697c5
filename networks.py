"""Heads and the actor."""

import math

import torch
import torch.nn as nn

import ops.distributions as dists
from ops import normals
from ops.layers import DREAMERV3, MLP, Linear


class Head(nn.Module):
    """An MLP and a linear output, read as a distribution.

    Args:
      inputs, outputs: widths.
      dist: function of the logits (..., outputs) that makes the distribution.
    """

    def __init__(self, inputs, outputs, dist, layers, units, outscale=1.0, style=DREAMERV3):
        super().__init__()
        self.mlp = MLP(inputs, layers, units, style)
        self.out = Linear(units, outputs, outscale, style.out)
        self.dist = dist

    def forward(self, feat):
        return self.dist(self.out(self.mlp(feat)))


class TwoHotHead(Head):
    """A head whose output spreads a number over bins: a `kind` of distribution with the positions of its bins."""

    def __init__(self, inputs, kind, bins, *args):
        super().__init__(inputs, len(bins), self.twohot, *args)
        self.kind = kind
        self.register_buffer("bins", bins, persistent=False)

    def twohot(self, logits):
        return self.kind(logits, self.bins)


# How a head predicts a number, by name: function of the head's inputs, its number of bins, and what an MLP takes.
SCALARS = {
    "symexp_twohot": lambda n, bins, *args: TwoHotHead(n, dists.TwoHot, dists.symexp_bins(bins), *args),
    "symlog_twohot": lambda n, bins, *args: TwoHotHead(n, dists.SymlogTwoHot, torch.linspace(-20, 20, bins), *args),
    "normal": lambda n, bins, *args: Head(n, 1, dists.UnitNormal, *args),
}


def scalar_head(inputs, config, style=DREAMERV3):
    """A head for rewards or values.

    Args:
      config: with dist, bins, layers, units, outscale.
    """
    return SCALARS[config.dist](inputs, config.bins, config.layers, config.units, config.outscale, style)


CONTINUOUS = {
    "bounded_normal": normals.BoundedNormal,
    "truncated_normal": normals.TruncatedNormal,
    "tanh_normal": normals.TanhNormal,
}


class ActionHead(nn.Module):
    """Features of the policy -> distribution of one action key (..., width)."""

    def __init__(self, width, classes, config, init):
        super().__init__()
        self.classes = classes
        self.config = config
        self.kind = dists.OneHot if classes else CONTINUOUS[config.dist]
        names = ["logits"] if classes else ["mean", "stddev"]
        self.outs = nn.ModuleDict({name: Linear(config.units, width, config.outscale, init) for name in names})

    def forward(self, x):
        outs = [out(x) for out in self.outs.values()]
        if self.classes:
            return dists.MultiOneHot(*outs, self.classes, self.config.unimix)
        return self.kind(*outs, self.config.min_std, self.config.max_std)

    def entropy_ranges(self):
        """Return the least and the greatest entropy of each variable: [(low, high)]."""
        if self.classes:
            return [(0.0, math.log(count)) for count in self.classes]
        width = self.outs["mean"].kernel.shape[1]
        return [self.kind.entropy_range(self.config.min_std, self.config.max_std)] * width


class Actor(nn.Module):
    """Features -> distribution of the action vector: one head per action key."""

    def __init__(self, inputs, spec, config, style=DREAMERV3):
        super().__init__()
        self.spec = spec
        self.mlp = MLP(inputs, config.layers, config.units, style)
        self.heads = nn.ModuleList(
            ActionHead(width, spec.classes.get(key), config, style.out) for key, width in spec.widths.items()
        )

    def forward(self, feat):
        """Features (..., F) -> distribution over actions (..., A)."""
        x = self.mlp(feat)
        return dists.Joint([head(x) for head in self.heads], self.spec.widths.values(), self.spec.variables.values())

    def noise(self, shape, device):
        """Draw the noise that the distribution's `sample` takes: (*shape, n)."""
        pairs = zip(self.heads, self.spec.variables.values(), strict=True)
        return torch.cat([head.kind.noise((*shape, width), device) for head, width in pairs], -1)

    def entropy_ranges(self):
        """Return the least and the greatest entropy of each variable of the action: [(low, high)]."""
        return [pair for head in self.heads for pair in head.entropy_ranges()]
