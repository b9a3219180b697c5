"""Parts of the kernels in Triton: products, norms and distributions of one sequence.

Names: `pre` is what enters a norm, `n` sizes and `p` the next powers of two.
"""

import triton
import triton.language as tl


def pair(layer):
    """Return the kernel and the bias of a layer."""
    return layer.kernel, layer.bias


@triton.jit
def fetch(x, n: tl.constexpr, p: tl.constexpr):
    """Load n numbers as (p,) float32."""
    i = tl.arange(0, p)
    return tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def put(x, value, n: tl.constexpr, p: tl.constexpr):
    """Store the first n numbers of (p,)."""
    i = tl.arange(0, p)
    tl.store(x + i, value, mask=i < n)


@triton.jit
def product(x, w, rows: tl.constexpr, n: tl.constexpr, p: tl.constexpr, span: tl.constexpr):
    """A vector in memory (rows,) times a weight (rows, n): (p,), of `span` numbers of the weight at once."""
    tile: tl.constexpr = max(span // p, 1)
    j, total = tl.arange(0, p), tl.zeros((tile, p), tl.float32)
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        part = tl.load(x + i, mask=i < rows, other=0.0).to(tl.float32)
        inside = (i[:, None] < rows) & (j[None, :] < n)
        total += part[:, None] * tl.load(w + i[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def product_of_blocks(
    x, own: tl.constexpr, w, apart: tl.constexpr, stride: tl.constexpr, rows: tl.constexpr,
    n: tl.constexpr, width: tl.constexpr, p: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """The same of blocks at once, each of which puts out `width` of the n numbers, by a weight (rows, width).

    Their weights are `apart` in memory, rows of one are `stride` apart, and their inputs `own`: 0 if they share one.
    """
    tile: tl.constexpr = max(span // p, 1)
    j, total = tl.arange(0, p), tl.zeros((tile, p), tl.float32)
    block, column = j // width, j % width
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        inside = (i[:, None] < rows) & (j[None, :] < n)
        part = tl.load(x + block[None, :] * own + i[:, None], mask=inside, other=0.0).to(tl.float32)
        at = w + block[None, :] * apart + i[:, None] * stride + column[None, :]
        total += part * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def pull(grad, w, out, rows: tl.constexpr, n: tl.constexpr, p: tl.constexpr, span: tl.constexpr):
    """Add a weight (rows, n) times a gradient (p,) to a vector in memory (rows,), which all threads see afterwards."""
    tile: tl.constexpr = max(span // p, 1)
    j = tl.arange(0, p)
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        inside = (i[:, None] < rows) & (j[None, :] < n)
        weight = tl.load(w + i[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.load(out + i, mask=i < rows, other=0.0)
        tl.store(out + i, before + tl.sum(weight * grad[None, :], 1), mask=i < rows)
    tl.debug_barrier()


@triton.jit
def pull_by_blocks(
    grad, w, apart: tl.constexpr, out, rows: tl.constexpr, width: tl.constexpr,
    n: tl.constexpr, p: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Add to a vector in memory (rows,), `width` of which are a block's, what the gradient of each block (n,) gives.

    grad: in memory, as of all blocks one after the other; w: of a block (width, n), `apart` in memory.
    """
    tile: tl.constexpr = max(span // p, 1)
    j = tl.arange(0, p)
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        block, row = i // width, i % width
        inside = (i[:, None] < rows) & (j[None, :] < n)
        weight = tl.load(w + (block * apart + row * n)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.load(grad + block[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.load(out + i, mask=i < rows, other=0.0)
        tl.store(out + i, before + tl.sum(weight * part, 1), mask=i < rows)
    tl.debug_barrier()


@triton.jit
def pull_shared(
    grad, w, apart: tl.constexpr, out, rows: tl.constexpr, n: tl.constexpr, width: tl.constexpr,
    p: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Add to a vector in memory (rows,), which all blocks see, what the gradient of them all (p,) gives.

    w: of a block (rows, width), `apart` in memory; n: of all blocks together.
    """
    tile: tl.constexpr = max(span // p, 1)
    j = tl.arange(0, p)
    at = (j // width) * apart + j % width
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        inside = (i[:, None] < rows) & (j[None, :] < n)
        weight = tl.load(w + i[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.load(out + i, mask=i < rows, other=0.0)
        tl.store(out + i, before + tl.sum(weight * grad[None, :], 1), mask=i < rows)
    tl.debug_barrier()


@triton.jit
def norm_silu(pre, scale, n: tl.constexpr, eps: tl.constexpr):
    """silu(pre / rms(pre) * scale) of (p,), zeros beyond n."""
    y = pre * (1 / tl.sqrt(tl.sum(pre * pre, 0) / n + eps)) * scale
    return y * tl.sigmoid(y)


@triton.jit
def norm_silu_gradient(grad, pre, scale, n: tl.constexpr, eps: tl.constexpr):
    """Return the gradients of `pre` and of `scale`, (p,) each, of that of the result."""
    inverse = 1 / tl.sqrt(tl.sum(pre * pre, 0) / n + eps)
    unit = pre * inverse
    y = unit * scale
    half = tl.sigmoid(y)
    grad = grad * half * (1 + y * (1 - half))
    on_unit = grad * scale
    return inverse * (on_unit - unit * (tl.sum(on_unit * unit, 0) / n)), grad * unit


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def probabilities(logit, inside):
    """Softmax over the classes of (S, K); what is not inside has none."""
    logit = tl.where(inside, logit, float("-inf"))
    raised = tl.where(inside, tl.exp(logit - tl.max(logit, 1)[:, None]), 0.0)
    return raised / tl.sum(raised, 1)[:, None]
