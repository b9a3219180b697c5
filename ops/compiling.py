"""What the compiler is told. It takes seconds to import, so that it is only where something is compiled."""

import functools
import sys

import torch


def eagerly(function):
    """Let a function call what is compiled as it is written."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return call
