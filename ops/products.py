"""Matrix products of float32 on a CPU, each by the faster of the two libraries that PyTorch carries.

PyTorch gives them to MKL. On AMD's processors with AVX-512 it reaches less than half of what oneDNN does: 230 and 500
GFLOP/s on two cores of a Zen 5, for 1,024 rows (docs/performance.md). Large products go to oneDNN there. Anywhere else,
and for other dtypes, PyTorch's own choice stands.
"""

import pathlib
import re

import torch
import torch.nn.functional as F

LEAST = 2**22  # multiplications of a product from which on oneDNN's is faster by more than its call is longer,
BLOCKS, ACROSS = 2, 4  # times so many for blocks, and where x has to be copied
ROWS, SUMMED = 8, 64  # at the least, as others wait for memory


def is_amd_with_avx512(path="/proc/cpuinfo"):
    """True on an AMD processor with 512-bit vectors, as Linux tells it in the file at `path`."""
    try:
        told = pathlib.Path(path).read_text()
    except (OSError, ValueError):
        return False
    return "AuthenticAMD" in told and re.search(r"^flags\b.*\bavx512f\b", told, re.M) is not None


ONEDNN = torch.backends.mkldnn.is_available() and is_amd_with_avx512()


def matmul(x, y, bias=None):
    """Return x @ y + bias, with gradients.

    Args:
      x: (..., K); y: (K, M) and bias (M,) or None; or x: (B, N, K), y: (B, K, M), bias (B, N or 1, M).
    Returns: (..., M), or (B, N, M).
    """
    if takes_onednn(x, y):
        out = Product.apply(x if y.ndim == 3 else x.flatten(0, -2), y)
        out = out if y.ndim == 3 else out.unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias
    if y.ndim == 3:
        return torch.bmm(x, y) if bias is None else torch.baddbmm(bias, x, y)
    return x @ y if bias is None else F.linear(x, y.T, bias)


def takes_onednn(x, y):
    """True if the product of x (..., K) and y (K, M), or of their blocks, goes to oneDNN."""
    if not ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    rows, summed, width = x.numel() // x.shape[-1], y.shape[-2], y.shape[-1]
    least = LEAST * (ACROSS if x.stride(-1) != 1 else 1)
    if y.ndim == 3:
        rows, least = x.shape[1], least * BLOCKS
    return rows >= ROWS and summed >= SUMMED and rows * summed * width >= least


class Product(torch.autograd.Function):
    """The product of two matrices (N, K) and (K, M), or of each of several (B, N, K) and (B, K, M)."""

    @staticmethod
    def forward(x, y):
        return torch.ops.dreamer.mm(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        wants_x, wants_y = ctx.needs_input_grad
        return matmul(grad, y.mT) if wants_x else None, matmul(x.mT, grad) if wants_y else None


# ---------------------------------------------------------------------------
# An operator, which the compiler takes as it is


def multiply(x, y):
    """Compute `Product` by oneDNN. Where both factors lie across to what it reads, the narrower one is copied."""
    if x.ndim == 3:
        return torch.stack([multiply(*pair) for pair in zip(x, y, strict=True)])
    if x.stride(-1) != 1 and y.shape[-1] < x.shape[0]:
        return linear(y.T, x).T.contiguous()
    return linear(x, y.T)


def linear(x, weight):
    """Return x @ weight.T; a weight with gaps between its rows, as a block has, would be read number by number."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.T.contiguous().T if weight.stride(0) == 1 else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


library = torch.library.Library("dreamer", "DEF")
library.define("mm(Tensor x, Tensor y) -> Tensor")
library.impl("mm", multiply, "CPU")


@torch.library.register_fake("dreamer::mm")
def shape_of(x, y):
    """Return an empty tensor like the product."""
    return x.new_empty(*x.shape[:-1], y.shape[-1])
