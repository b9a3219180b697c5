"""Encoders and decoders of images.

Letters: B batch, T time, N = B T, D deter, S groups x K classes stoch, H height, W width, C channels.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import ops.distributions as dists
from ops.layers import BlockLinear, Conv2d, ConvTranspose2d, Linear, MaxPool, Style, norm_act
from ops.random import rand
from tools import UserError


def make_encoder(observed, config):
    """Return the encoder of {key: Observed}; config: the whole configuration."""
    shapes = {key: seen.shape for key, seen in observed.items()}
    check_encoder(shapes, config.encoder)
    style = Style(config.norm, config.cnn_act, config.init)
    return ImageEncoder(shapes, config.encoder, style, config.image_bits)


def make_decoder(observed, deter, stoch, config):
    """Return the decoder of {key: Observed} from features [deter, stoch]; config: the whole configuration."""
    shapes = {key: seen.shape for key, seen in observed.items()}
    check_decoder(shapes, deter, config.decoder)
    style = Style(config.norm, config.cnn_act, config.init)
    kind = ImageDecoder if config.decoder.cnn == "pool" else TransposedDecoder
    return kind(shapes, deter, stoch, config.decoder, style)


def drawer(config):
    """Return the function that shows a prediction."""
    return draw


def draw(truth, model, seen):
    """Show a prediction: true and predicted images, and their difference around gray.

    Args:
      truth: (B, T, H, W, C) uint8; model: (B, T, H, W, C) float, 0 to 1; seen: steps that the model was shown.
    Returns: (truth, model, error), each uint8 (B, T, H, W, C).
    """
    truth = truth / np.float32(255)
    panels = truth, model, (model - truth + 1) / 2
    return tuple((np.clip(panel, 0, 1) * 255).astype(np.uint8) for panel in panels)


def picture(image):
    """Draw a predicted image (H, W, C), 0 to 1: the last of those stacked along C."""
    image = (np.clip(image[..., -3:] if image.shape[-1] % 3 == 0 else image[..., -1:], 0, 1) * 255).astype(np.uint8)
    return image.repeat(3, -1) if image.shape[-1] == 1 else image


class ImageEncoder(nn.Module):
    """Stages of [Conv, norm, activation] on all images, joined on channels; each stage halves the image.

    `config.cnn` says how: `pool` by a 2x2 max-pool behind a convolution of stride 1 (DreamerV3), `same` and `valid`
    by a convolution of stride 2, with 'same' padding (its 2023 form) or with none (PlaNet to DreamerV2).
    """

    def __init__(self, shapes, config, style, bits=8):
        super().__init__()
        self.keys, self.bits = sorted(shapes), bits
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
        self.tokens, self.size = height * width, height * width * depths[-1]

    def prepare(self, obs):
        """Return {key: (..., H, W, C)} as the model predicts them: quantized where fewer than 8 bits are kept."""
        return {key: quantize(image, self.bits) for key, image in obs.items()} if self.bits < 8 else obs

    def forward(self, obs, dtype):
        """{key: (N, H, W, C) in 0..255} -> (N, size)"""
        x = torch.cat([obs[key] for key in self.keys], -1)
        x = x.to(dtype) / 255 - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(self.pool(conv(x)))
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Features -> images: a start map from deter (block by block) and stoch, then nearest x2 and Conv stages.

    The image stack of DreamerV3, which ends in a sigmoid.
    """

    def __init__(self, shapes, deter, stoch, config, style):
        super().__init__()
        self.shapes, self.image_dist = shapes, IMAGE_DISTS[config.image_dist]
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

    def dist(self, key, out):
        """Output (..., H, W, C) of a key -> distribution over such images."""
        return self.image_dist(out)


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
        self.shapes, self.image_dist = shapes, IMAGE_DISTS[config.image_dist]
        depths = [config.depth * mult for mult in config.mults]
        height, width = (size // 2 ** len(depths) for size in next(iter(shapes.values()))[:2])
        valid = config.cnn == "valid"
        self.start = (1, 1, 4 * depths[-1]) if valid else (height, width, depths[-1])
        kernels = (5, 5, 6, 6) if valid else [config.kernel] * len(depths)
        channels = [self.start[-1], *depths[-2::-1], sum(shape[-1] for shape in shapes.values())]
        *stages, last = zip(channels[:-1], channels[1:], kernels, strict=True)
        self.linear = Linear(deter + stoch, math.prod(self.start), init=style.out)
        kind = {"valid": valid, "init": style.init, "bias": style.norm != "layer"}
        self.convs = nn.ModuleList(ConvTranspose2d(*stage, **kind) for stage in stages)
        self.norms = nn.ModuleList(norm_act(size, style) for _, size, _ in stages)
        self.out = ConvTranspose2d(*last, valid=valid, init=style.out)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: mean (N, H, W, C)}"""
        x = self.linear(torch.cat([deter, stoch], -1)).view(-1, *self.start)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return split_channels(self.out(x).float() + 0.5, self.shapes)

    def dist(self, key, out):
        """Output (..., H, W, C) of a key -> distribution over such images."""
        return self.image_dist(out)


def split_channels(x, shapes):
    """(N, H, W, all channels) -> {key: (N, H, W, C)}"""
    return dict(zip(shapes, x.split([shape[-1] for shape in shapes.values()], -1), strict=True))


IMAGE_DISTS = {"mse": dists.ImageMSE, "normal": dists.ImageNormal}


def quantize(image, bits):
    """Return images in 0..255 with `bits` bits, and uniform noise in place of the rest (Glow, arXiv:1807.03039)."""
    levels = torch.div(image, 2 ** (8 - bits), rounding_mode="floor")
    return (levels + rand(image.shape, image.device)) * (255 / 2**bits)


# ---------------------------------------------------------------------------
# Sizes that the stages can halve and double


def check_encoder(shapes, config):
    """Raises UserError for images that the encoder cannot take."""
    factor, least = 2 ** len(config.mults), least_size(config) if config.cnn == "valid" else 0
    for key, (height, width, _) in shapes.items():
        if height % factor or width % factor:
            raise UserError(f"image {key} is {height}x{width}: --size must be a multiple of {factor}")
        if min(height, width) < least:
            raise UserError(f"image {key} is {height}x{width}: --encoder.cnn valid needs at least {least}x{least}")


def least_size(config):
    """Return the side of the smallest image that an encoder without padding brings down to a single place."""
    side = 1
    for _ in config.mults:
        side = 2 * (side - 1) + config.kernel
    return side


def check_decoder(shapes, deter, config):
    """Raises UserError for images that the decoder cannot draw, and for widths that its blocks do not divide."""
    factor = 2 ** len(config.mults)
    for key, (height, width, _) in shapes.items():
        if config.cnn == "valid" and ((height, width) != (64, 64) or len(config.mults) != 4):
            raise UserError(f"image {key} is {height}x{width}: --decoder.cnn valid needs 64x64 and 4 mults")
        if height % factor or width % factor:
            raise UserError(f"image {key} is {height}x{width}: --size must be a multiple of {factor}")
    widths = {"rssm.deter": deter, "decoder.depth x decoder.mults[-1]": config.depth * config.mults[-1]}
    for name, width in widths.items() if config.cnn == "pool" else ():
        if width % config.blocks:
            raise UserError(f"{name} = {width} is no multiple of --decoder.blocks {config.blocks}")
