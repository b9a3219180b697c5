"""Layers: linear, block-linear, convolutions, norm, MLP.

Parameters are float32. Activations carry the compute dtype: every layer casts its weights to its input's dtype, and
norms compute their statistics in float32.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.scan import product, seen

EPS = 1e-4  # added to the mean square in norms


class Style(NamedTuple):
    """Names of the norm, activation and initialization of hidden layers.

    norm: after the linear part: rms (DreamerV3), layer (its 2023 form; the linear part then has no bias), layer_bias
      (DreamerV2; it has one) or none.
    act: activation, silu, elu or relu.
    init: rule of the initial weights, see `INITS`.
    """

    norm: str = "rms"
    act: str = "silu"
    init: str = "fan_in"

    @property
    def out(self):
        """Rule of layers without a norm: of DreamerV3's 2023 form uniform, with the variance of its other layers."""
        return "glorot" if self.init == "fan_avg" else self.init


DREAMERV3 = Style()


def truncated_normal_(weight, variance):
    """Fill with a normal truncated at two standard deviations; the factor restores the variance after truncation."""
    return nn.init.trunc_normal_(weight, 0, 1, -2, 2).mul_(1.1368 * variance**0.5)


# Rule -> function of a weight, its fan-in and its fan-out.
INITS = {
    "fan_in": lambda weight, fan_in, fan_out: truncated_normal_(weight, 1 / fan_in),
    "fan_avg": lambda weight, fan_in, fan_out: truncated_normal_(weight, 2 / (fan_in + fan_out)),
    "glorot": lambda weight, fan_in, fan_out: weight.uniform_(-1, 1).mul_((6 / (fan_in + fan_out)) ** 0.5),
    "orthogonal": lambda weight, fan_in, fan_out: nn.init.orthogonal_(weight),
}


def init_(weight, fan_in, fan_out, rule="fan_in", outscale=1.0):
    """Fill a weight with its initial values."""
    with torch.no_grad():
        return INITS[rule](weight, fan_in, fan_out).mul_(outscale)


def cast(x, dtype):
    """Return x.to(dtype), or None for None."""
    return None if x is None else x.to(dtype)


class Linear(nn.Module):
    """x K + b, with the kernel K stored (in, out)."""

    def __init__(self, inputs, outputs, outscale=1.0, init="fan_in", bias=True):
        super().__init__()
        self.kernel = nn.Parameter(init_(torch.empty(inputs, outputs), inputs, outputs, init, outscale))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x):
        return product(x, self.kernel, self.bias)

    def first(self, x):
        """Return the contribution of the first inputs to the output, without the bias."""
        return product(x, self.kernel[: x.shape[-1]])

    def last(self, x):
        """Return the contribution of the last inputs, with the bias: first(x) + last(y) = forward([x, y])."""
        return product(x, self.kernel[-x.shape[-1] :], self.bias)


class BlockLinear(nn.Module):
    """A separate linear layer for each of `blocks` equal slices: kernel (blocks, in/blocks, out/blocks).

    The fan-in of the initialization is the full input width, as in the authors' code.
    """

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        shape = (blocks, inputs // blocks, outputs // blocks)
        self.kernel = nn.Parameter(init_(torch.empty(shape), inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        """Map (N, blocks, in/blocks) to (N, blocks, out/blocks)."""
        return product(x, self.kernel, self.bias.view(len(self.kernel), -1))

    def first(self, x):
        """Return the contribution of each slice's first inputs to the output, without the bias."""
        return product(x, self.kernel[:, : x.shape[-1]])

    def last(self, x):
        """Return the contribution of last inputs that all slices share, with the bias: (N, n) -> as `forward`."""
        return product(x, self.kernel[:, -x.shape[-1] :], self.bias.view(len(self.kernel), -1))


@contextlib.contextmanager
def cast_once(dtype, *modules):
    """Let the linear layers of modules have their parameters in a dtype in the body, where nothing is learned.

    Many products then share one cast of each, which they would make themselves otherwise.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, (Linear, BlockLinear))]
    places = [(layer._parameters, name) for layer in layers for name in layer._parameters]
    kept = [params[name] for params, name in places]
    others = [param.detach() for param in kept if param is not None and param.dtype != dtype]
    casts = [torch.empty_like(param, dtype=dtype) for param in others]
    if others:
        torch._foreach_copy_(casts, others)  # one kernel for as many as it takes
    casts = iter(casts)
    try:
        for (params, name), param in zip(places, kept, strict=True):
            params[name] = param if param is None or param.dtype == dtype else next(casts)
        yield
    finally:
        for (params, name), param in zip(places, kept, strict=True):
            params[name] = param


class Conv2d(nn.Module):
    """A convolution of images (N, H, W, C), stride 1 or 2, with 'same' padding or, if `valid`, none."""

    def __init__(self, inputs, outputs, kernel, stride=1, valid=False, init="fan_in", bias=True):
        super().__init__()
        shape, area = (outputs, inputs, kernel, kernel), kernel**2
        self.weight = nn.Parameter(init_(torch.empty(shape), inputs * area, outputs * area, init))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride = stride
        self.padding = 0 if valid else kernel - stride  # sum of both sides

    def forward(self, x):
        x, padding = x.permute(0, 3, 1, 2), self.padding
        if padding % 2:
            x = F.pad(x, (padding // 2, padding - padding // 2) * 2)
            padding = 0
        weight = self.weight.to(x.dtype, memory_format=torch.channels_last)
        x = F.conv2d(x, weight, cast(self.bias, x.dtype), self.stride, padding // 2)
        return x.permute(0, 2, 3, 1)

    def size(self, size):
        """Return the output height or width for an input of height or width `size`."""
        return (size + self.padding - self.weight.shape[-1]) // self.stride + 1


class ConvTranspose2d(nn.Module):
    """The transpose of a convolution of stride 2: images (N, H, W, C) -> (N, 2 H, 2 W, outputs) if that has 'same'
    padding, else (N, 2 H + kernel - 2, 2 W + kernel - 2, outputs)."""

    def __init__(self, inputs, outputs, kernel, valid=False, init="fan_in", bias=True):
        super().__init__()
        shape, area = (inputs, outputs, kernel, kernel), kernel**2
        self.weight = nn.Parameter(init_(torch.empty(shape), inputs * area, outputs * area, init))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.padding = 0 if valid else kernel - 2  # sum of both sides

    def forward(self, x):
        height, width = (2 * size + self.weight.shape[-1] - 2 - self.padding for size in x.shape[1:3])
        x = F.conv_transpose2d(
            x.permute(0, 3, 1, 2),
            self.weight.to(x.dtype),
            cast(self.bias, x.dtype),
            stride=2,
            padding=self.padding // 2,
        )
        return x[:, :, :height, :width].permute(0, 2, 3, 1)


class Conv1d(nn.Module):
    """A convolution of sequences (N, L, C) with 'same' padding: (N, ceil(L / stride), outputs)."""

    def __init__(self, inputs, outputs, kernel, stride=1, init="fan_in", bias=True):
        super().__init__()
        shape = (outputs, inputs, kernel)
        self.weight = nn.Parameter(init_(torch.empty(shape), inputs * kernel, outputs * kernel, init))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride = stride

    def forward(self, x):
        padding = max(0, (self.size(x.shape[1]) - 1) * self.stride + self.weight.shape[-1] - x.shape[1])
        x = F.pad(x.transpose(1, 2), (padding // 2, padding - padding // 2))
        return F.conv1d(x, self.weight.to(x.dtype), cast(self.bias, x.dtype), self.stride).transpose(1, 2)

    def size(self, length):
        """Return the output's length for an input's."""
        return -(-length // self.stride)


class ConvTranspose1d(nn.Module):
    """The transpose of `Conv1d`: (N, L, C) -> (N, stride L, outputs); the kernel is no shorter than the stride."""

    def __init__(self, inputs, outputs, kernel, stride, init="fan_in", bias=True):
        super().__init__()
        shape = (inputs, outputs, kernel)
        self.weight = nn.Parameter(init_(torch.empty(shape), inputs * kernel, outputs * kernel, init))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride = stride

    def forward(self, x):
        length, padding = self.stride * x.shape[1], (self.weight.shape[-1] - self.stride) // 2
        weight, bias = self.weight.to(x.dtype), cast(self.bias, x.dtype)
        out = F.conv_transpose1d(x.transpose(1, 2), weight, bias, self.stride, padding)
        return out[..., :length].transpose(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, statistics in float32."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.scale.shape, seen(self.scale), EPS).to(x.dtype)


class NormSiLU(torch.autograd.Function):
    """silu(x / rms(x) * scale) with an explicit gradient, which takes fewer passes over memory than autograd.

    Args:
      x: (..., n); scale: (n,); eps: 0-d tensor, added to the mean square.
    """

    @staticmethod
    def forward(ctx, x, scale, eps):
        out, inverse = NormSiLU.compute(x, scale, eps)
        ctx.save_for_backward(x, scale, inverse)
        return out

    @staticmethod
    def compute(x, scale, eps):
        """Return the result and 1 / rms(x) (..., 1)."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return F.silu((wide * inverse).mul_(scale), inplace=True).to(x.dtype), inverse

    @staticmethod
    def backward(ctx, grad):
        x, scale, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to have one, too
            out = F.silu(F.rms_norm(x.float(), scale.shape, scale, EPS)).to(x.dtype)
            return *torch.autograd.grad(out, (x, scale), grad, create_graph=True), None
        unit = x.float() * inverse
        grad = torch.ops.aten.silu_backward(grad.float(), unit * scale)
        pull = grad * unit  # on the scale, and through the mean square on x
        grad_x = (grad * scale).addcmul_(unit, (pull @ scale)[..., None], value=-1 / x.shape[-1]).mul_(inverse)
        return grad_x.to(x.dtype), pull.reshape(-1, x.shape[-1]).sum(0), None


def has_norm_kernel(device):
    """Return True if PyTorch computes an RMS norm in one kernel on a device, and its gradient in two."""
    return device.type == "cuda"


class Norm(RMSNorm):
    """RMSNorm and SiLU, which follow every hidden layer of DreamerV3, in as few operations as a device allows."""

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("eps", torch.tensor(EPS), persistent=False)

    def forward(self, x):
        scale = seen(self.scale)
        if has_norm_kernel(x.device):
            return F.silu(F.rms_norm(x.float(), scale.shape, scale, EPS)).to(x.dtype)
        if torch.is_grad_enabled():
            return NormSiLU.apply(x, scale, self.eps)
        return NormSiLU.compute(x, scale, self.eps)[0]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-3) * scale + bias over the last axis, statistics in float32."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return F.layer_norm(x.float(), self.scale.shape, seen(self.scale), seen(self.bias), 1e-3).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "layer_bias": LayerNorm, "none": lambda size: nn.Identity()}
ACTS = {"silu": nn.SiLU, "elu": nn.ELU, "relu": nn.ReLU}


def norm_act(size, style):
    """Return the module that follows the linear part of a hidden layer: norm and activation."""
    if style.norm == "rms" and style.act == "silu":
        return Norm(size)
    return nn.Sequential(NORMS[style.norm](size), ACTS[style.act]())


class Blend(torch.autograd.Function):
    """Go from a to b by a share w of the way, all of one shape: `torch.lerp` with two operations less backward."""

    @staticmethod
    def forward(ctx, a, b, w):
        ctx.save_for_backward(a, b, w)
        return torch.lerp(a, b, w)

    @staticmethod
    def backward(ctx, grad):
        a, b, w = ctx.saved_tensors
        on_b = grad * w
        return grad - on_b, on_b, grad * (b - a)


class MLP(nn.Sequential):
    """`layers` times [Linear, norm, activation] of width `units`."""

    def __init__(self, inputs, layers, units, style=DREAMERV3):
        sizes = [inputs] + [units] * layers
        bias = style.norm != "layer"
        pairs = [(Linear(a, b, init=style.init, bias=bias), norm_act(b, style)) for a, b in itertools.pairwise(sizes)]
        super().__init__(*[module for pair in pairs for module in pair])


class MaxPool(torch.autograd.Function):
    """2x2 maximum of (N, H, W, C), where equal maxima share the gradient evenly.

    PyTorch's pooling gives the whole gradient to the first maximum; its `amax` shares it, but is slow on CPU.
    """

    @staticmethod
    def forward(ctx, x):
        first, second, third, fourth = quarters(x)
        out = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out = ctx.saved_tensors
        hits = [part == out for part in quarters(x)]
        share = grad / sum(hit.to(torch.uint8) for hit in hits)
        grad = torch.empty_like(x)
        for part, hit in zip(quarters(grad), hits, strict=True):
            torch.mul(share, hit, out=part)
        return grad


def quarters(x):
    """Return the four pixels of every 2x2 square: views (N, H / 2, W / 2, C) of (N, H, W, C)."""
    n, h, w, c = x.shape
    squares = x.view(n, h // 2, 2, w // 2, 2, c)
    return [squares[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]
