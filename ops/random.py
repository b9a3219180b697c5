"""Random draws. Acting and learning use separate generators, so that neither affects the other.

    with drawing_from(generator):
        noise = rand(shape, device)

Outside any `drawing_from`, PyTorch's global generators are used.
"""

import contextlib

import torch

_generator: torch.Generator | None = None


@contextlib.contextmanager
def drawing_from(generator):
    """Let `rand` and `randn` draw from a torch.Generator in the body; afterwards, restore the previous one."""
    global _generator
    before, _generator = _generator, generator
    try:
        yield
    finally:
        _generator = before


def rand(shape, device=None):
    """Draw uniform numbers in [0, 1) of a shape."""
    return torch.rand(shape, device=device, generator=_generator)


def randn(shape, device=None):
    """Draw standard normal numbers of a shape."""
    return torch.randn(shape, device=device, generator=_generator)


def make_generator(seed, device):
    """Return a torch.Generator on a device, or on the CPU for the meta device, which has none."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
