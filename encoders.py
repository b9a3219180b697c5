"""Encoders and decoders: observations to embeddings, latent states to observations.

Letters: B batch, T time, N = B T, D deter, S groups x K classes stoch.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import distributions as dists
from layers import DREAMERV3, MLP, BlockLinear, Conv2d, ConvTranspose2d, Linear, MaxPool, norm_act
from tools import symlog


class ImageEncoder(nn.Module):
    """Stages of [Conv, norm, activation] on all images, joined on channels; each stage halves the image.

    `config.cnn` says how: `pool` by a 2x2 max-pool behind a convolution of stride 1 (DreamerV3), `same` and `valid`
    by a convolution of stride 2, with 'same' padding (its 2023 form) or with none (PlaNet to DreamerV2).
    """

    def __init__(self, shapes, config, style):
        super().__init__()
        self.keys = sorted(shapes)
        depths = [sum(shapes[key][-1] for key in self.keys), *[config.depth * mult for mult in config.mults]]
        pooled = config.cnn == "pool"
        kind = {"stride": 1 if pooled else 2, "valid": config.cnn == "valid", "init": style.init}
        kind["bias"] = style.norm != "layer"
        self.convs = nn.ModuleList(Conv2d(a, b, config.kernel, **kind) for a, b in itertools.pairwise(depths))
        self.norms = nn.ModuleList(norm_act(size, style) for size in depths[1:])
        self.pool = MaxPool.apply if pooled else nn.Identity()
        height, width = shapes[self.keys[0]][:2]
        for conv in self.convs:
            height, width = (conv.size(size) // (2 if pooled else 1) for size in (height, width))
        self.size = height * width * depths[-1]

    def forward(self, obs, dtype):
        """{key: (N, H, W, C) in 0..255} -> (N, size)"""
        x = torch.cat([obs[key] for key in self.keys], -1)
        x = x.to(dtype) / 255 - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(self.pool(conv(x)))
        return x.reshape(len(x), -1)


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


class ObsSpec(NamedTuple):
    """What the model sees, by key: image shapes (H, W, C), vector widths (n,), classes [k...] of integer vectors."""

    images: dict
    vectors: dict
    classes: dict


class MultiEncoder(nn.Module):
    """Any mix of vectors and images -> embedding [vectors, images] (..., size)."""

    def __init__(self, spec, config, style=DREAMERV3, cnn_style=DREAMERV3):
        super().__init__()
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorEncoder(spec.vectors, spec.classes, config, style)
        if spec.images:
            self.parts["image"] = ImageEncoder(spec.images, config, cnn_style)
        self.size = sum(part.size for part in self.parts.values())

    def forward(self, obs, dtype):
        """{key: (B, T, ...)} -> (B, T, size) in the compute dtype."""
        lead = next(iter(obs.values())).shape[:2]
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        assert all(value.shape[:2] == lead for value in obs.values()), {k: v.shape for k, v in obs.items()}
        return torch.cat([part(flat, dtype) for part in self.parts.values()], -1).unflatten(0, lead)


class ImageDecoder(nn.Module):
    """Features -> images: a start map from deter (block by block) and stoch, then nearest x2 and Conv stages.

    The image stack of DreamerV3, which ends in a sigmoid.
    """

    def __init__(self, shapes, deter, stoch, config, style):
        super().__init__()
        self.shapes = shapes
        depths = [config.depth * mult for mult in config.mults]
        height, width = (size // 2 ** len(depths) for size in next(iter(shapes.values()))[:2])
        self.start = (height, width, depths[-1])
        size, units = height * width * depths[-1], 2 * config.units
        self.from_deter = BlockLinear(deter, size, config.blocks)
        self.from_stoch = nn.Sequential(Linear(stoch, units), norm_act(units, style), Linear(units, size))
        self.norm = norm_act(depths[-1], style)
        pairs = list(zip(depths[:0:-1], depths[-2::-1], strict=True))
        self.convs = nn.ModuleList(Conv2d(a, b, config.kernel) for a, b in pairs)
        self.norms = nn.ModuleList(norm_act(b, style) for _, b in pairs)
        self.out = Conv2d(depths[0], sum(shape[-1] for shape in shapes.values()), config.kernel)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: mean (N, H, W, C) in [0, 1]}"""
        h, w, c = self.start
        blocks = len(self.from_deter.kernel)
        x = self.from_deter(deter.view(len(deter), blocks, -1))
        x = x.reshape(-1, blocks, h, w, c // blocks).permute(0, 2, 3, 1, 4).reshape(-1, h, w, c)
        x = self.norm(x + self.from_stoch(stoch).view(-1, h, w, c))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(upsample(x)))
        return split_channels(torch.sigmoid(self.out(upsample(x)).float()), self.shapes)


def upsample(x):
    """Nearest-neighbour doubling of (N, H, W, C)."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)


class TransposedDecoder(nn.Module):
    """Features -> images: a linear layer to a start map, then transposed convolutions of stride 2, and 0.5 added.

    The image stack of the older forms. With `config.cnn` = `same` the start map is the image halved once for each
    stage (DreamerV3's 2023 form); with `valid` it is a single point, which kernels of 5, 5, 6 and 6 blow up to 64x64
    (PlaNet to DreamerV2).
    """

    def __init__(self, shapes, deter, stoch, config, style):
        super().__init__()
        self.shapes = shapes
        depths = [config.depth * mult for mult in config.mults]
        height, width = (size // 2 ** len(depths) for size in next(iter(shapes.values()))[:2])
        valid = config.cnn == "valid"
        self.start = (1, 1, 4 * depths[-1]) if valid else (height, width, depths[-1])
        kernels = (5, 5, 6, 6) if valid else [config.kernel] * len(depths)
        channels = [self.start[-1], *depths[-2::-1], sum(shape[-1] for shape in shapes.values())]
        *stages, last = zip(channels[:-1], channels[1:], kernels, strict=True)
        self.linear = Linear(deter + stoch, math.prod(self.start), init=style.init)
        kind = {"valid": valid, "init": style.init}
        self.convs = nn.ModuleList(ConvTranspose2d(*stage, **kind, bias=style.norm != "layer") for stage in stages)
        self.norms = nn.ModuleList(norm_act(size, style) for _, size, _ in stages)
        self.out = ConvTranspose2d(*last, **kind)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: mean (N, H, W, C)}"""
        x = self.linear(torch.cat([deter, stoch], -1)).view(-1, *self.start)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return split_channels(self.out(x).float() + 0.5, self.shapes)


def split_channels(x, shapes):
    """(N, H, W, all channels) -> {key: (N, H, W, C)}"""
    return dict(zip(shapes, x.split([shape[-1] for shape in shapes.values()], -1), strict=True))


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


IMAGE_DISTS = {"mse": dists.ImageMSE, "normal": dists.ImageNormal}
VECTOR_DISTS = {"symlog_mse": dists.SymlogMSE, "normal": dists.VectorNormal}


class MultiDecoder(nn.Module):
    """State -> one distribution per observation key."""

    def __init__(self, spec, deter, stoch, config, style=DREAMERV3, cnn_style=DREAMERV3):
        super().__init__()
        self.classes = spec.classes
        self.image_dist, self.vector_dist = IMAGE_DISTS[config.image_dist], VECTOR_DISTS[config.vector_dist]
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorDecoder(spec.vectors, spec.classes, deter + stoch, config, style)
        if spec.images:
            kind = ImageDecoder if config.cnn == "pool" else TransposedDecoder
            self.parts["image"] = kind(spec.images, deter, stoch, config, cnn_style)

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
            return self.image_dist(out)
        if key in self.classes:
            return dists.Classes(out, self.classes[key])
        return self.vector_dist(out)
