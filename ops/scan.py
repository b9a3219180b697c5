"""Layers that are used at every step of a sequence, and whose weights get their gradients in one piece.

Backpropagation through T steps would compute T gradients of each kernel, every one a matrix made from a few rows, and
add them up. Here the steps see kernels as constants and add an offset to each product. The gradients of the offsets
of all steps, times all inputs of the products, are the kernel's gradient: one matrix product over all T steps.
"""

import torch
import torch.nn.functional as F

_active = None  # takes the place of `multiply` within a step


def product(x, kernel, bias=None):
    """x @ kernel + bias: what every linear layer computes.

    Args:
      x: (..., in), or (N, blocks, in) if there is a kernel for each block; gives its dtype to the product.
      kernel: (in, out) or (blocks, in, out); bias: (out,) or (blocks, out), or None.
    Returns: (..., out) or (N, blocks, out).
    """
    return (_active or multiply)(x, kernel, bias)


def multiply(x, kernel, bias=None):
    """`product` outside of a scan."""
    bias = None if bias is None else bias.to(x.dtype)
    if kernel.ndim == 2:
        return F.linear(x, kernel.to(x.dtype).T, bias)
    out = multiply_blocks(x, kernel.to(x.dtype))
    return out if bias is None else out + bias


def multiply_blocks(x, kernel):
    """(N, blocks, in), (blocks, in, out) -> (N, blocks, out)"""
    return torch.bmm(x.transpose(0, 1), kernel).transpose(0, 1)


class Scan:
    """Calls a step function once for each of T steps, so that every weight gets its gradient in one piece.

    Args:
      step: function of tensors that returns tensors, the same layers at every call.
      length: T.
      example: arguments of a call, from which it is seen what the step multiplies with.
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
        """The next step."""
        outs, inputs = self.call(self.step, next(self.weights), args)
        for seen, x in zip(self.inputs, inputs, strict=True):
            seen.append(x)
        return outs


def call_step(step, weights, args):
    """step(*args) with given weights.

    Args:
      weights: [(kernel, its transpose, offset)] in the order of the products in the step.
    Returns: what the step returns, and the input (N, ..., in) of every product.
    """
    global _active
    queue, inputs = list(weights), []

    def apply(x, kernel, bias):
        kernel, transposed, offset = queue.pop(0)
        inputs.append(x.detach().clone())  # a compiled step may not return views
        return ConstantProduct.apply(x, kernel, transposed) + offset

    _active = apply
    try:
        return step(*args), inputs
    finally:
        _active = None


def find_products(step, args):
    """[(x, kernel, bias)] of the products in a step, in their order."""
    global _active
    found = []

    def note(x, kernel, bias):
        found.append((x.detach(), kernel, bias))
        return multiply(x, kernel, bias)

    _active = note
    try:
        step(*args)
    finally:
        _active = None
    return found


def constant(kernel, dtype):
    """A kernel without gradient, and its transpose; both lie in memory as products want them."""
    kernel = kernel.detach().to(dtype).contiguous()
    return kernel, kernel.mT.contiguous()


class ConstantProduct(torch.autograd.Function):
    """x @ kernel, with a gradient towards x alone."""

    @staticmethod
    def forward(ctx, x, kernel, transposed):
        ctx.save_for_backward(transposed)
        return x @ kernel if kernel.ndim == 2 else multiply_blocks(x, kernel)

    @staticmethod
    def backward(ctx, grad):
        (transposed,) = ctx.saved_tensors
        return grad @ transposed if transposed.ndim == 2 else multiply_blocks(grad, transposed), None, None


class Offsets(torch.autograd.Function):
    """The bias, or zeros, once for each step: (T, N, ..., out). Its gradient is that of bias and kernel.

    Args:
      x: an input of the product, for its shape and dtype; kernel; bias, or None; length: T.
      inputs: list that will hold the inputs of all products by the time of the backward pass.
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
