"""What the compiler is told. It takes seconds to import, so that it is only where something is compiled."""

import functools
import sys

import torch

from ops.random import drawing_from, rand, randn


def eagerly(function):
    """Let a function call what is compiled as it is written."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return call


def compiled(function):
    """Return a function of tensors, compiled, whose noise is drawn before it is called, in the order of its own draws.

    So that it is one graph: a generator inside would part it. The function must have no effect but its result.
    """
    asked = None  # ("uniform" or "normal", shape) of each draw

    def given(noise, *args):
        left = iter(noise)
        with drawing_from(lambda kind, shape: next(left)):
            return function(*args)

    whole = torch.compile(given, dynamic=False)

    def call(*args):
        nonlocal asked
        asked = draws_of(function, *args) if asked is None else asked
        noise = [(rand if kind == "uniform" else randn)(shape) for kind, shape in asked]
        with torch.compiler.set_stance("default"):  # also inside of what is called `eagerly`
            return whole(noise, *args)

    return call


def draws_of(function, *args):
    """Call a function without drawing; return what it would draw: [("uniform" or "normal", shape)]."""
    asked = []

    def record(kind, shape):
        asked.append((kind, tuple(shape)))
        return torch.full(shape, 0.5)

    with drawing_from(record):
        function(*args)
    return asked
