"""Encoders and decoders of vectors: numbers, and integers that name classes."""

import torch
import torch.nn as nn

import ops.distributions as dists
from ops.layers import MLP, Linear
from ops.math import symlog


class VectorEncoder(nn.Module):
    """An MLP on all vectors: floats (through symlog), integers one-hot, joined in sorted order of the keys."""

    def __init__(self, shapes, classes, config, style):
        super().__init__()
        self.keys = sorted(shapes)
        self.classes = classes
        self.squash = symlog if config.symlog else nn.Identity()
        width = sum(sum(classes.get(key, [])) or shapes[key][0] for key in self.keys)
        self.mlp = MLP(width, config.layers, config.units, style)
        self.size = config.units

    def forward(self, obs, dtype):
        """{key: (N, n) float or (N, n) integer} -> (N, size)"""
        parts = [
            dists.one_hots(value, self.classes[key]) if key in self.classes else self.squash(value)
            for key, value in ((key, obs[key].reshape(len(obs[key]), -1)) for key in self.keys)
        ]
        return self.mlp(torch.cat(parts, -1).to(dtype))


class VectorDecoder(nn.Module):
    """Features -> vectors: one MLP, one linear output per key."""

    def __init__(self, shapes, classes, inputs, config, style):
        super().__init__()
        self.classes = classes
        self.mlp = MLP(inputs, config.layers, config.units, style)
        self.keys = list(shapes)
        widths = [sum(classes.get(key, [])) or shapes[key][0] for key in self.keys]
        self.outs = nn.ModuleList(Linear(config.units, width, init=style.init) for width in widths)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: (N, width)}"""
        x = self.mlp(torch.cat([stoch, deter], -1))
        return {key: out(x) for key, out in zip(self.keys, self.outs, strict=True)}


VECTOR_DISTS = {"symlog_mse": dists.SymlogMSE, "normal": dists.VectorNormal}
