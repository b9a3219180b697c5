"""A loop over time that computes the gradient of each weight in one matrix product.

Backpropagation through T steps would compute T gradients of each kernel, each a product of few rows, and add
them up. Here the steps see kernels as constants and add an offset to each product. The gradients of the offsets
of all steps, times all inputs of the products, are the kernel's gradient: one matrix product over all T steps.
Those of other weights, such as a norm's scale, are added up in one operation.
"""

import contextlib

import torch

from ops.products import matmul, takes_onednn

_multiply = _see = None  # within a step, they replace `multiply` and what `seen` does


@contextlib.contextmanager
def weighing_by(multiply, see):
    """Let `product` and `seen` call other functions in the body; afterwards, restore the previous ones."""
    global _multiply, _see
    before, (_multiply, _see) = (_multiply, _see), (multiply, see)
    try:
        yield
    finally:
        _multiply, _see = before


def scan(step, carry, constant, inputs, call):
    """Fold a step over time.

    Args:
      step: function (*carry, constant, *inputs of one step) -> (*new carry, *other outputs), tensors (B, ...).
      carry: tuple of tensors (B, ...); constant: the same tensors at every step; inputs: tensors (T, B, ...).
      call: `call_step`, or a compiled one.
    Returns: the outputs of all steps, each as (B, T, ...).
    """
    steps, outs = list(zip(*(x.unbind() for x in inputs), strict=True)), []
    if torch.is_grad_enabled():
        step = Scan(step, len(steps), (*carry, constant, *steps[0]), call)
    for now in steps:
        outs.append(step(*carry, constant, *now))
        carry = outs[-1][: len(carry)]
    return [torch.stack(x, 1) for x in zip(*outs, strict=True)]


def product(x, kernel, bias=None):
    """Return x @ kernel + bias, for every linear layer.

    Args:
      x: (..., in); for a kernel of blocks (N, blocks, in), or (N, in) that all of them share. The result has its dtype.
      kernel: (in, out) or (blocks, in, out); bias: (out,) or (blocks, out), or None.
    Returns: (..., out) or (N, blocks, out).
    """
    return (_multiply or multiply)(x, kernel, bias)


def seen(weight):
    """Return a weight that is no part of a product, as the steps of a scan are to see it, for every other layer."""
    return weight if _see is None else _see(weight)


def multiply(x, kernel, bias=None):
    """Compute `product` outside a scan."""
    bias = None if bias is None else bias.to(x.dtype)
    if kernel.ndim == 2:
        return matmul(x, kernel.to(x.dtype), bias)
    return multiply_blocks(x, kernel.to(x.dtype), None if bias is None else bias[:, None])


def multiply_blocks(x, kernel, bias=None):
    """Multiply each block: (N, blocks, in) or a shared (N, in), (blocks, in, out) -> (N, blocks, out).

    bias: (blocks, N or 1, out) that is added, or None.
    """
    x = x.expand(len(kernel), *x.shape) if x.ndim == 2 else x.transpose(0, 1)
    return matmul(x, kernel, bias).transpose(0, 1)


class Scan:
    """Call a step function once for each of T steps, so that the gradient of every kernel is one matrix product.

    Args:
      step: function of tensors that returns tensors, the same layers at every call.
      length: T.
      example: arguments of a call, by which the weights in a step are found.
      call: `call_step`, or a compiled one.
    """

    def __init__(self, step, length, example, call):
        self.step, self.call = step, call
        products, others = find_weights(step, example)
        self.inputs = [[] for _ in products]
        constants = [constant(kernel, x.dtype) for x, kernel, _ in products]
        offsets = [
            Offsets.apply(*found, length, inputs).unbind() for found, inputs in zip(products, self.inputs, strict=True)
        ]
        others = [weight.expand(length, *weight.shape).unbind() for weight in others]
        self.weights = iter(
            (
                [(*pair, each[t]) for pair, each in zip(constants, offsets, strict=True)],
                [each[t] for each in others],
            )
            for t in range(length)
        )

    def __call__(self, *args):
        """Compute the next step."""
        outs, inputs = self.call(self.step, next(self.weights), args)
        for kept, x in zip(self.inputs, inputs, strict=True):
            kept.append(x)
        return outs


def call_step(step, weights, args):
    """Call step(*args) with given weights.

    Args:
      weights: [(kernel, its transpose, offset)] of the products in the step, [weight] of what else it sees, in order.
    Returns: the outputs of the step, and the input (N, ..., in) of every product.
    """
    products, others, inputs = *map(list, weights), []

    def apply(x, kernel, bias):
        kernel, transposed, offset = products.pop(0)
        if torch.compiler.is_compiling():  # it may not return views, and adds the offset where it reads the product
            inputs.append(x.detach().clone())
            return ConstantProduct.apply(x, kernel, transposed, None) + offset
        inputs.append(x.detach())
        return ConstantProduct.apply(x, kernel, transposed, offset)

    with weighing_by(apply, lambda weight: others.pop(0)):
        return step(*args), inputs


def find_weights(step, args):
    """Return [(x, kernel, bias)] of the products in a step, and [weight] of what else it sees, in their order."""
    products, others = [], []

    def note(x, kernel, bias):
        products.append((x.detach(), kernel, bias))
        return multiply(x, kernel, bias)

    def see(weight):
        others.append(weight)
        return weight

    with weighing_by(note, see):
        step(*args)
    return products, others


def constant(kernel, dtype):
    """Return a kernel without gradient, and its transpose; both contiguous, as products are fastest then."""
    kernel = kernel.detach().to(dtype).contiguous()
    return kernel, kernel.mT.contiguous()


class ConstantProduct(torch.autograd.Function):
    """x @ kernel, plus an offset if there is one, with gradients with respect to x and the offset only."""

    @staticmethod
    def forward(ctx, x, kernel, transposed, offset):
        ctx.save_for_backward(transposed)
        ctx.shared, ctx.has_offset = x.ndim < kernel.ndim, offset is not None
        if kernel.ndim == 3:
            return multiply_blocks(x, kernel, None if offset is None else offset.transpose(0, 1))
        if offset is None or takes_onednn(x, kernel):
            out = matmul(x, kernel)
            return out if offset is None else out + offset
        return torch.addmm(offset.flatten(0, -2), x.flatten(0, -2), kernel).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        (transposed,) = ctx.saved_tensors
        if ctx.shared:  # the sum over blocks is a part of one product
            grad_x = matmul(grad.flatten(1), transposed.flatten(0, 1))
        else:
            grad_x = matmul(grad, transposed) if transposed.ndim == 2 else multiply_blocks(grad, transposed)
        return grad_x, None, None, grad if ctx.has_offset else None


class Offsets(torch.autograd.Function):
    """Repeat the bias, or zeros, for each step: (T, N, ..., out). Backward returns the gradients of bias and kernel.

    Args:
      x: an input of the product, for its shape and dtype; kernel; bias, or None; length: T.
      inputs: list to which the inputs of all products are appended before the backward pass.
    """

    @staticmethod
    def forward(ctx, x, kernel, bias, length, inputs):
        ctx.inputs, ctx.dtype, ctx.has_bias = inputs, kernel.dtype, bias is not None
        ctx.blocks, ctx.shared = kernel.ndim == 3, x.ndim < kernel.ndim
        width = (len(kernel), kernel.shape[-1]) if ctx.blocks else (*x.shape[1:-1], kernel.shape[-1])
        offset = x.new_zeros(width) if bias is None else bias.to(x.dtype, copy=True)
        return offset.expand(length, len(x), *width)

    @staticmethod
    def backward(ctx, grad):
        x, grad = torch.cat(ctx.inputs), grad.flatten(0, 1)
        if ctx.shared:
            kernel = matmul(x.T, grad.flatten(1)).unflatten(1, grad.shape[1:]).transpose(0, 1)
        elif ctx.blocks:
            kernel = matmul(x.permute(1, 2, 0), grad.transpose(0, 1))
        else:
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            kernel = matmul(x.T, grad)
        bias = grad.sum(0).to(ctx.dtype) if ctx.has_bias else None
        return None, kernel.to(ctx.dtype), bias, None, None
