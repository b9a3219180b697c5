"""A loop over time that computes the gradient of each weight in one matrix product.

Backpropagation through T steps would compute T gradients of each kernel, each a product of few rows, and add
them up. Here the steps see kernels as constants and add an offset to each product. The gradients of the offsets
of all steps, times all inputs of the products, are the kernel's gradient: one matrix product over all T steps.
"""

import contextlib

import torch
import torch.nn.functional as F

_multiply = None  # replaces `multiply` within a step


@contextlib.contextmanager
def multiplying_by(function):
    """Let `product` call a function in place of `multiply` in the body; afterwards, restore the previous one."""
    global _multiply
    before, _multiply = _multiply, function
    try:
        yield
    finally:
        _multiply = before


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
      x: (..., in), or (N, blocks, in) if there is a kernel for each block; the result has its dtype.
      kernel: (in, out) or (blocks, in, out); bias: (out,) or (blocks, out), or None.
    Returns: (..., out) or (N, blocks, out).
    """
    return (_multiply or multiply)(x, kernel, bias)


def multiply(x, kernel, bias=None):
    """Compute `product` outside a scan."""
    bias = None if bias is None else bias.to(x.dtype)
    if kernel.ndim == 2:
        return F.linear(x, kernel.to(x.dtype).T, bias)
    out = multiply_blocks(x, kernel.to(x.dtype))
    return out if bias is None else out + bias


def multiply_blocks(x, kernel):
    """Multiply each block: (N, blocks, in), (blocks, in, out) -> (N, blocks, out)."""
    return torch.bmm(x.transpose(0, 1), kernel).transpose(0, 1)


class Scan:
    """Call a step function once for each of T steps, so that the gradient of every weight is one matrix product.

    Args:
      step: function of tensors that returns tensors, the same layers at every call.
      length: T.
      example: arguments of a call, by which the products in a step are found.
      call: `call_step`, or a compiled one.
    """

    def __init__(self, step, length, example, call):
        self.step, self.call = step, call
        products = find_products(step, example)
        self.inputs = [[] for _ in products]
        constants = [constant(kernel, x.dtype) for x, kernel, _ in products]
        offsets = [
            Offsets.apply(*found, length, seen).unbind() for found, seen in zip(products, self.inputs, strict=True)
        ]
        self.weights = iter(
            [[(*c, o) for c, o in zip(constants, each, strict=True)] for each in zip(*offsets, strict=True)]
        )

    def __call__(self, *args):
        """Compute the next step."""
        outs, inputs = self.call(self.step, next(self.weights), args)
        for seen, x in zip(self.inputs, inputs, strict=True):
            seen.append(x)
        return outs


def call_step(step, weights, args):
    """Call step(*args) with given weights.

    Args:
      weights: [(kernel, its transpose, offset)] in the order of the products in the step.
    Returns: the outputs of the step, and the input (N, ..., in) of every product.
    """
    queue, inputs = list(weights), []

    def apply(x, kernel, bias):
        kernel, transposed, offset = queue.pop(0)
        inputs.append(x.detach().clone())  # a compiled step may not return views
        return ConstantProduct.apply(x, kernel, transposed) + offset

    with multiplying_by(apply):
        return step(*args), inputs


def find_products(step, args):
    """Return [(x, kernel, bias)] of the products in a step, in their order."""
    found = []

    def note(x, kernel, bias):
        found.append((x.detach(), kernel, bias))
        return multiply(x, kernel, bias)

    with multiplying_by(note):
        step(*args)
    return found


def constant(kernel, dtype):
    """Return a kernel without gradient, and its transpose; both contiguous, as products are fastest then."""
    kernel = kernel.detach().to(dtype).contiguous()
    return kernel, kernel.mT.contiguous()


class ConstantProduct(torch.autograd.Function):
    """x @ kernel with a gradient with respect to x only."""

    @staticmethod
    def forward(ctx, x, kernel, transposed):
        ctx.save_for_backward(transposed)
        return x @ kernel if kernel.ndim == 2 else multiply_blocks(x, kernel)

    @staticmethod
    def backward(ctx, grad):
        (transposed,) = ctx.saved_tensors
        return grad @ transposed if transposed.ndim == 2 else multiply_blocks(grad, transposed), None, None


class Offsets(torch.autograd.Function):
    """Repeat the bias, or zeros, for each step: (T, N, ..., out). Backward returns the gradients of bias and kernel.

    Args:
      x: an input of the product, for its shape and dtype; kernel; bias, or None; length: T.
      inputs: list to which the inputs of all products are appended before the backward pass.
    """

    @staticmethod
    def forward(ctx, x, kernel, bias, length, inputs):
        ctx.inputs, ctx.blocks, ctx.dtype, ctx.has_bias = inputs, kernel.ndim == 3, kernel.dtype, bias is not None
        width = (*x.shape[1:-1], kernel.shape[-1])
        offset = x.new_zeros(width) if bias is None else bias.to(x.dtype, copy=True)
        return offset.expand(length, len(x), *width)

    @staticmethod
    def backward(ctx, grad):
        x, grad = torch.cat(ctx.inputs), grad.flatten(0, 1)
        if not ctx.blocks:
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        kernel = torch.bmm(x.permute(1, 2, 0), grad.transpose(0, 1)) if ctx.blocks else x.T @ grad
        bias = grad.sum(0).to(ctx.dtype) if ctx.has_bias else None
        return None, kernel.to(ctx.dtype), bias, None, None
