"""Encoders and decoders: observations to embeddings, latent states to observations.

Letters: B batch, T time, N = B T, D deter, S groups x K classes stoch.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import distributions as dists
from layers import MLP, BlockLinear, Conv2d, Linear, MaxPool, Norm
from tools import symlog


class ImageEncoder(nn.Module):
    """Four stages of [Conv, 2x2 max-pool, RMSNorm, SiLU] on all images, joined on channels."""

    def __init__(self, shapes, depth, mults, kernel):
        super().__init__()
        self.keys = sorted(shapes)
        depths = [sum(shapes[key][-1] for key in self.keys), *[depth * mult for mult in mults]]
        self.convs = nn.ModuleList(Conv2d(a, b, kernel) for a, b in itertools.pairwise(depths))
        self.norms = nn.ModuleList(Norm(size) for size in depths[1:])
        height, width = (size // 2 ** len(mults) for size in shapes[self.keys[0]][:2])
        self.size = height * width * depths[-1]

    def forward(self, obs, dtype):
        """{key: (N, H, W, C) uint8} -> (N, size)"""
        x = torch.cat([obs[key] for key in self.keys], -1)
        x = x.to(dtype) / 255 - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(MaxPool.apply(conv(x)))
        return x.reshape(len(x), -1)


class VectorEncoder(nn.Module):
    """An MLP on all vectors: floats through symlog, integers one-hot, joined in sorted order of the keys."""

    def __init__(self, shapes, classes, layers, units):
        super().__init__()
        self.keys = sorted(shapes)
        self.classes = classes
        width = sum(sum(classes.get(key, [])) or shapes[key][0] for key in self.keys)
        self.mlp = MLP(width, layers, units)
        self.size = units

    def forward(self, obs, dtype):
        """{key: (N, n) float or (N, n) integer} -> (N, size)"""
        parts = [
            dists.one_hots(value, self.classes[key]) if key in self.classes else symlog(value)
            for key, value in ((key, obs[key].reshape(len(obs[key]), -1)) for key in self.keys)
        ]
        return self.mlp(torch.cat(parts, -1).to(dtype))


class ObsSpec(NamedTuple):
    """What the model sees, by key: image shapes (H, W, C), vector widths (n,), classes [k...] of integer vectors."""

    images: dict
    vectors: dict
    classes: dict


class MultiEncoder(nn.Module):
    """Any mix of vectors and images -> embedding [vectors, images] (..., size)."""

    def __init__(self, spec, config):
        super().__init__()
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorEncoder(spec.vectors, spec.classes, config.layers, config.units)
        if spec.images:
            self.parts["image"] = ImageEncoder(spec.images, config.depth, config.mults, config.kernel)
        self.size = sum(part.size for part in self.parts.values())

    def forward(self, obs, dtype):
        """{key: (B, T, ...)} -> (B, T, size) in the compute dtype."""
        lead = next(iter(obs.values())).shape[:2]
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        assert all(value.shape[:2] == lead for value in obs.values()), {k: v.shape for k, v in obs.items()}
        return torch.cat([part(flat, dtype) for part in self.parts.values()], -1).unflatten(0, lead)


class ImageDecoder(nn.Module):
    """Features -> images: a start map from deter (block by block) and stoch, then nearest x2 and Conv stages."""

    def __init__(self, shapes, deter, stoch, depth, mults, kernel, units, blocks):
        super().__init__()
        self.shapes = shapes
        depths = [depth * mult for mult in mults]
        height, width = (size // 2 ** len(mults) for size in next(iter(shapes.values()))[:2])
        self.start = (height, width, depths[-1])
        size = height * width * depths[-1]
        self.from_deter = BlockLinear(deter, size, blocks)
        self.from_stoch = nn.Sequential(Linear(stoch, 2 * units), Norm(2 * units), Linear(2 * units, size))
        self.norm = Norm(depths[-1])
        pairs = list(zip(depths[:0:-1], depths[-2::-1], strict=True))
        self.convs = nn.ModuleList(Conv2d(a, b, kernel) for a, b in pairs)
        self.norms = nn.ModuleList(Norm(b) for _, b in pairs)
        self.out = Conv2d(depths[0], sum(shape[-1] for shape in shapes.values()), kernel)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: ImageMSE with mean (N, H, W, C)}"""
        h, w, c = self.start
        blocks = len(self.from_deter.kernel)
        x = self.from_deter(deter.view(len(deter), blocks, -1))
        x = x.reshape(-1, blocks, h, w, c // blocks).permute(0, 2, 3, 1, 4).reshape(-1, h, w, c)
        x = self.norm(x + self.from_stoch(stoch).view(-1, h, w, c))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(upsample(x)))
        x = torch.sigmoid(self.out(upsample(x)).float())
        images = x.split([shape[-1] for shape in self.shapes.values()], -1)
        return dict(zip(self.shapes, images, strict=True))


def upsample(x):
    """Nearest-neighbour doubling of (N, H, W, C)."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)


class VectorDecoder(nn.Module):
    """Features -> vectors: one MLP, one linear output per key."""

    def __init__(self, shapes, classes, inputs, layers, units):
        super().__init__()
        self.classes = classes
        self.mlp = MLP(inputs, layers, units)
        self.keys = list(shapes)
        widths = [sum(classes.get(key, [])) or shapes[key][0] for key in self.keys]
        self.outs = nn.ModuleList(Linear(units, width) for width in widths)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: (N, width)}"""
        x = self.mlp(torch.cat([stoch, deter], -1))
        return {key: out(x) for key, out in zip(self.keys, self.outs, strict=True)}


class MultiDecoder(nn.Module):
    """State -> one distribution per observation key."""

    def __init__(self, spec, deter, stoch, config):
        super().__init__()
        c = config
        self.classes = spec.classes
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorDecoder(spec.vectors, spec.classes, deter + stoch, c.layers, c.units)
        if spec.images:
            self.parts["image"] = ImageDecoder(spec.images, deter, stoch, c.depth, c.mults, c.kernel, c.units, c.blocks)

    def forward(self, state):
        """State (B, T, ...) -> {key: distribution over (B, T, ...)}"""
        lead = state.deter.shape[:2]
        deter, stoch = state.deter.flatten(0, 1), state.stoch.flatten(2).flatten(0, 1)
        outs = {}
        for name, part in self.parts.items():
            for key, out in part(deter, stoch).items():
                outs[key] = self.distribution(name, key, out.unflatten(0, lead))
        return outs

    def distribution(self, part, key, out):
        if part == "image":
            return dists.ImageMSE(out)
        if key in self.classes:
            return dists.Classes(out, self.classes[key])
        return dists.SymlogMSE(out)
