"""Layers, encoders, decoders, heads and the recurrent state-space model (RSSM).

Parameters are float32. Activations carry the compute dtype: every layer casts its weights to its input's dtype, and
norms compute their statistics in float32. Letters: B batch, T time, D deter, S groups x K classes stoch, E embed.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import distributions as dists
from tools import symlog

# ---------------------------------------------------------------------------
# Layers


def init_(weight, fan_in, outscale=1.0):
    """Truncated normal within two standard deviations, of standard deviation outscale / sqrt(fan_in)."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, 0, 1, -2, 2)
        return weight.mul_(1.1368 * outscale / fan_in**0.5)


class Linear(nn.Module):
    """x W + b, with W stored (out, in)."""

    def __init__(self, inputs, outputs, outscale=1.0):
        super().__init__()
        self.weight = nn.Parameter(init_(torch.empty(outputs, inputs), inputs, outscale))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def head(self, x):
        """The share of the output that the first inputs give, without the bias."""
        return F.linear(x, self.weight[:, : x.shape[-1]].to(x.dtype))

    def tail(self, x):
        """The share of the output that the last inputs give, with the bias: head(x) + tail(y) = forward([x, y])."""
        return F.linear(x, self.weight[:, -x.shape[-1] :].to(x.dtype), self.bias.to(x.dtype))


class BlockLinear(nn.Module):
    """A linear layer of its own for each of `blocks` equal slices: kernel (blocks, in/blocks, out/blocks).

    The fan-in of the initialisation is the full input width, as in the authors' code.
    """

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        shape = (blocks, inputs // blocks, outputs // blocks)
        self.kernel = nn.Parameter(init_(torch.empty(shape), inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        """(N, blocks, in/blocks) -> (N, blocks, out/blocks)"""
        bias = self.bias.view(len(self.kernel), 1, -1)
        return torch.baddbmm(bias.to(x.dtype), x.transpose(0, 1), self.kernel.to(x.dtype)).transpose(0, 1)


class Conv2d(nn.Module):
    """A convolution with 'same' padding on images (N, H, W, C), stride 1 or 2."""

    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__()
        self.weight = nn.Parameter(init_(torch.empty(outputs, inputs, kernel, kernel), inputs * kernel**2))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride = stride

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        total = self.weight.shape[-1] - self.stride
        if total % 2:
            x = F.pad(x, (total // 2, total - total // 2) * 2)
            total = 0
        weight = self.weight.to(x.dtype, memory_format=torch.channels_last)
        x = F.conv2d(x, weight, self.bias.to(x.dtype), self.stride, total // 2)
        return x.permute(0, 2, 3, 1)


class ConvTranspose2d(nn.Module):
    """The transpose of a 'same' convolution of stride 2: images (N, H, W, C) -> (N, 2 H, 2 W, outputs)."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.weight = nn.Parameter(init_(torch.empty(inputs, outputs, kernel, kernel), inputs * kernel**2))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        height, width = 2 * x.shape[1], 2 * x.shape[2]
        padding = (self.weight.shape[-1] - 2) // 2
        x = F.conv_transpose2d(
            x.permute(0, 3, 1, 2), self.weight.to(x.dtype), self.bias.to(x.dtype), stride=2, padding=padding
        )
        return x[:, :, :height, :width].permute(0, 2, 3, 1)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, statistics in float32."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-4).to(x.dtype)


class Norm(nn.Sequential):
    """RMSNorm and SiLU: what follows every hidden layer."""

    def __init__(self, size):
        super().__init__(RMSNorm(size), nn.SiLU())


class MLP(nn.Sequential):
    """`layers` times [Linear, RMSNorm, SiLU] of width `units`."""

    def __init__(self, inputs, layers, units):
        sizes = [inputs] + [units] * layers
        pairs = [(Linear(a, b), Norm(b)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        super().__init__(*[module for pair in pairs for module in pair])


def max_pool(x):
    """2x2 maximum of (N, H, W, C); equal maxima share the gradient evenly."""
    n, h, w, c = x.shape
    return x.view(n, h // 2, 2, w // 2, 2, c).amax((2, 4))


# ---------------------------------------------------------------------------
# Encoders and decoders


class ImageEncoder(nn.Module):
    """Four stages of [Conv, 2x2 max-pool, RMSNorm, SiLU] on all images, joined on channels."""

    def __init__(self, shapes, depth, mults, kernel):
        super().__init__()
        self.keys = sorted(shapes)
        depths = [sum(shapes[key][-1] for key in self.keys), *[depth * mult for mult in mults]]
        self.convs = nn.ModuleList(Conv2d(a, b, kernel) for a, b in zip(depths[:-1], depths[1:], strict=True))
        self.norms = nn.ModuleList(Norm(size) for size in depths[1:])
        height, width = (size // 2 ** len(mults) for size in shapes[self.keys[0]][:2])
        self.size = height * width * depths[-1]

    def forward(self, obs, dtype):
        """{key: (N, H, W, C) uint8} -> (N, size)"""
        x = torch.cat([obs[key] for key in self.keys], -1)
        x = x.to(dtype) / 255 - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(max_pool(conv(x)))
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


# ---------------------------------------------------------------------------
# Heads


class Head(nn.Module):
    """An MLP and a linear output, read as a distribution.

    Args:
      inputs, outputs: widths.
      dist: function of the logits (..., outputs) that makes the distribution.
    """

    def __init__(self, inputs, outputs, dist, layers, units, outscale=1.0):
        super().__init__()
        self.mlp = MLP(inputs, layers, units)
        self.out = Linear(units, outputs, outscale)
        self.dist = dist

    def forward(self, feat):
        return self.dist(self.out(self.mlp(feat)))


def symexp_twohot(logits):
    """Logits over bins at symexp(linspace(-20, 20)) -> TwoHot."""
    return dists.TwoHot(logits, dists.symexp_bins(logits.shape[-1], logits.device))


def binary(logits):
    """Logits (..., 1) -> Bernoulli."""
    return dists.Bernoulli(logits)


class ActionSpec(NamedTuple):
    """The action vector: {key: width} in sorted order, and {key: [k...]} for the discrete ones."""

    widths: dict
    classes: dict

    @property
    def size(self):
        return sum(self.widths.values())


class ActionHead(nn.Module):
    """Features of the policy -> distribution of one action key (..., width)."""

    def __init__(self, units, width, classes, config):
        super().__init__()
        self.classes = classes
        self.config = config
        names = ["logits"] if classes else ["mean", "stddev"]
        self.outs = nn.ModuleDict({name: Linear(units, width, config.outscale) for name in names})

    def forward(self, x):
        outs = [out(x) for out in self.outs.values()]
        if self.classes:
            return dists.MultiOneHot(*outs, self.classes, self.config.unimix)
        return dists.BoundedNormal(*outs, self.config.min_std, self.config.max_std)


class Actor(nn.Module):
    """Features -> distribution of the action vector: one head per action key."""

    def __init__(self, inputs, spec, config):
        super().__init__()
        self.mlp = MLP(inputs, config.layers, config.units)
        self.widths = list(spec.widths.values())
        self.heads = nn.ModuleList(
            ActionHead(config.units, width, spec.classes.get(key), config) for key, width in spec.widths.items()
        )
        self.noises = [len(spec.classes.get(key, range(width))) for key, width in spec.widths.items()]
        self.kinds = [dists.OneHot if key in spec.classes else dists.BoundedNormal for key in spec.widths]

    def forward(self, feat):
        x = self.mlp(feat)
        return dists.Joint([head(x) for head in self.heads], self.widths, self.noises)

    def noise(self, shape, device):
        """Noise for the distribution's `sample`: (*shape, n)."""
        pairs = zip(self.kinds, self.noises, strict=True)
        return torch.cat([kind.noise((*shape, width), device) for kind, width in pairs], -1)


# ---------------------------------------------------------------------------
# Recurrent state-space model


class State(NamedTuple):
    """A latent state: deter (..., D) and stoch (..., S, K)."""

    deter: torch.Tensor
    stoch: torch.Tensor

    def map(self, function):
        return State(function(self.deter), function(self.stoch))


def feature(state):
    """What heads see: [deter, flattened stoch] (..., D + S K)."""
    return torch.cat([state.deter, state.stoch.flatten(-2)], -1)


class BlockGRU(nn.Module):
    """The recurrent cell of DreamerV3: a GRU whose matrices are block-diagonal.

    Args:
      deter, stoch, action: widths of the state and the action; deter is a multiple of blocks.
      hidden: width of the three input embeddings.
      layers: hidden block layers before the gates.
    """

    def __init__(self, deter, stoch, action, hidden, blocks, layers):
        super().__init__()
        self.blocks = blocks
        self.embed_deter = MLP(deter, 1, hidden)
        self.embed_stoch = MLP(stoch, 1, hidden)
        self.embed_action = MLP(action, 1, hidden)
        widths = [deter + 3 * hidden * blocks] + [deter] * (layers - 1)
        self.hidden = nn.ModuleList(BlockLinear(width, deter, blocks) for width in widths)
        self.norms = nn.ModuleList(Norm(deter) for _ in widths)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def prepare(self, action):
        """The part that does not depend on the state, for any number of steps: (..., A) -> (..., hidden)."""
        return self.embed_action(action / action.detach().abs().clamp(min=1))

    def forward(self, deter, stoch, embedded):
        """(N, D), (N, S K) and a prepared action (N, hidden) -> the next deter (N, D)"""
        parts = [self.embed_deter(deter), self.embed_stoch(stoch), embedded]
        shared = torch.cat(parts, -1)[:, None].expand(-1, self.blocks, -1)
        slices = deter.view(len(deter), self.blocks, -1)
        x = torch.cat([slices, shared], -1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = norm(linear(x).reshape(deter.shape)).view(slices.shape)
        reset, cand, update = self.gates(x).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return (update * cand + (1 - update) * slices).reshape(deter.shape)


class OneHotLatent:
    """S independent one-hot variables of K classes with a share of uniform probability.

    Args:
      groups, classes: S and K.
      unimix: share of the uniform distribution.
    """

    def __init__(self, groups, classes, unimix):
        self.shape = (groups, classes)
        self.unimix = unimix
        self.size = groups * classes
        self.outputs = groups * classes

    def dist(self, logits):
        """(..., S K) -> distribution with batch shape (..., S)"""
        return dists.OneHot(logits.unflatten(-1, self.shape), self.unimix)

    def noise(self, shape, device):
        """Noise for a draw of batch shape `shape`: (*shape, S)."""
        return dists.OneHot.noise((*shape, self.shape[0]), device)

    def kl(self, post, prior):
        """KL(post || prior) summed over the groups: (...)"""
        return post.kl(prior).sum(-1)


class RSSM(nn.Module):
    """A recurrent state-space model (PlaNet, arXiv:1811.04551) made of a recurrent cell and a kind of latent.

    Args:
      cell: module with prepare(action) and forward(deter, stoch, prepared).
      latent: object with shape, size, outputs, dist, noise, kl.
      deter, hidden, embed: widths of the recurrent state, of the hidden layers and of the encoder's output.
      img_layers, obs_layers: hidden layers of the prior and of the posterior.
    """

    def __init__(self, cell, latent, deter, hidden, embed, img_layers, obs_layers):
        super().__init__()
        self.cell = cell
        self.latent = latent
        self.deter = deter
        self.prior = nn.Sequential(MLP(deter, img_layers, hidden), Linear(hidden, latent.outputs))
        self.posterior = nn.Sequential(MLP(deter + embed, obs_layers, hidden), Linear(hidden, latent.outputs))

    def initial(self, batch, device, dtype=torch.float32):
        """The state before anything was seen: zeros."""
        return State(
            torch.zeros(batch, self.deter, device=device, dtype=dtype),
            torch.zeros(batch, *self.latent.shape, device=device, dtype=dtype),
        )

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter a sequence.

        Time alignment: action[t] is the action that led to embed[t]; where is_first[t], state and action are zeroed.

        Args:
          embed: (B, T, E); action: (B, T, A); is_first: (B, T) bool.
          state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, drawn here if None.
        Returns: State (B, T, ...), posterior distribution with batch shape (B, T, S).
        """
        if noise is None:
            noise = self.latent.noise(is_first.shape, embed.device)
        keep = (~is_first).to(embed.dtype).transpose(0, 1)[..., None]
        action = self.cell.prepare(action.to(embed.dtype).transpose(0, 1) * keep)
        first, *rest = self.posterior[0]
        from_embed = first.tail(embed.transpose(0, 1))
        deter, stoch = state.deter.to(embed.dtype), state.stoch.to(embed.dtype)
        deters, stochs, logits = [], [], []
        noise = noise.transpose(0, 1)
        for t in range(len(action)):
            deter = self.cell(deter * keep[t], stoch.flatten(1) * keep[t], action[t])
            hidden = first.head(deter) + from_embed[t]
            for layer in rest:
                hidden = layer(hidden)
            logit = self.posterior[1](hidden)
            stoch = self.latent.dist(logit).sample(noise[t]).to(deter.dtype)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return State(torch.stack(deters, 1), torch.stack(stochs, 1)), self.latent.dist(torch.stack(logits, 1))

    def predict(self, deter):
        """The prior's distribution, batch shape (..., S), given deter (..., D)."""
        return self.latent.dist(self.prior(deter))

    def imagine(self, start, policy, horizon, noise=None):
        """Roll the prior forward, by a policy or along given actions.

        Args:
          start: State (N, ...).
          policy: a function State -> action (N, A), or actions (H, N, A).
          horizon: number of steps H.
          noise: (H, N, S) for the prior draws, drawn here if None.
        Returns: State (H + 1, N, ...) with the start first, actions (H, N, A).
        """
        if noise is None:
            noise = self.latent.noise((horizon, len(start.deter)), start.deter.device)
        states, actions = [start], []
        for t in range(horizon):
            state = states[-1]
            action = policy(state) if callable(policy) else policy[t]
            deter = self.cell(state.deter, state.stoch.flatten(1), self.cell.prepare(action.to(state.deter.dtype)))
            stoch = self.predict(deter).sample(noise[t]).to(deter.dtype)
            states.append(State(deter, stoch))
            actions.append(action)
        return State(*(torch.stack(x) for x in zip(*states, strict=True))), torch.stack(actions)
