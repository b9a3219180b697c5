"""Encoders and decoders of vectors: numbers, and integers that name classes."""

import torch
import torch.nn as nn

import ops.distributions as dists
from modalities.vector import curves
from ops.layers import MLP, Linear, Style
from ops.math import symlog


def make_encoder(observed, config):
    """Return the encoder of {key: Observed}; config: the whole configuration."""
    return VectorEncoder(observed, config.encoder, Style(config.norm, config.act, config.init))


def make_decoder(observed, deter, stoch, config):
    """Return the decoder of {key: Observed} from features [deter, stoch]; config: the whole configuration."""
    return VectorDecoder(observed, deter + stoch, config.decoder, Style(config.norm, config.act, config.init))


def drawer(config):
    """Return the function that shows a prediction as curves: see `curves.draw`, the one panel."""
    return lambda truth, model, seen: (curves.draw(truth, model, seen),)


def picture(vector):
    """Draw a predicted vector (n,), or one number, as bars: see `curves.bars`."""
    return curves.bars(vector)


def width(seen):
    """Return how many numbers a network sees of an Observed: those of the vector, or of its one-hots."""
    return sum(seen.classes) or seen.shape[0]


class VectorEncoder(nn.Module):
    """An MLP on all vectors: floats (through symlog), integers one-hot, joined in sorted order of the keys."""

    def __init__(self, observed, config, style):
        super().__init__()
        self.keys = sorted(observed)
        self.classes = {key: seen.classes for key, seen in observed.items() if seen.classes}
        self.squash = symlog if config.symlog else nn.Identity()
        self.mlp = MLP(sum(map(width, observed.values())), config.layers, config.units, style)
        self.size = config.units

    def prepare(self, obs):
        """Return {key: (..., n)} as the model predicts them: as they are."""
        return obs

    def forward(self, obs, dtype):
        """{key: (N, n) float or (N, n) integer} -> (N, size)"""
        parts = [
            dists.one_hots(value, self.classes[key]) if key in self.classes else self.squash(value)
            for key, value in ((key, obs[key].reshape(obs[key].shape[0], -1)) for key in self.keys)
        ]
        return self.mlp(torch.cat(parts, -1).to(dtype))


class VectorDecoder(nn.Module):
    """Features -> vectors: one MLP, one linear output per key."""

    def __init__(self, observed, inputs, config, style):
        super().__init__()
        self.observed = observed
        self.vector_dist = VECTOR_DISTS[config.vector_dist]
        self.mlp = MLP(inputs, config.layers, config.units, style)
        self.outs = nn.ModuleList(Linear(config.units, width(seen), init=style.out) for seen in observed.values())

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: (N, width)}"""
        x = self.mlp(torch.cat([stoch, deter], -1))
        return {key: out(x) for key, out in zip(self.observed, self.outs, strict=True)}

    def dist(self, key, out):
        """Output (..., width) of a key -> distribution over (..., n)."""
        classes = self.observed[key].classes
        return dists.Classes(out, classes) if classes else self.vector_dist(out)


VECTOR_DISTS = {"symlog_mse": dists.SymlogMSE, "normal": dists.VectorNormal}
