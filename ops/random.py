"""Random draws. Acting and learning use separate generators, so that neither affects the other.

    with drawing_from(generator):
        noise = rand(shape, device)

Outside any `drawing_from`, PyTorch's global generators are used.
"""

import contextlib

import torch

_source = None  # a torch.Generator, or a function


@contextlib.contextmanager
def drawing_from(source):
    """Let `rand` and `randn` draw from a source in the body; afterwards, restore the previous one.

    source: a torch.Generator, or a function ("uniform" or "normal", shape) -> tensor, for noise that comes from
      elsewhere.
    """
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


def rand(shape, device=None):
    """Draw uniform numbers in [0, 1) of a shape."""
    if callable(_source):
        return _source("uniform", shape)
    return torch.rand(shape, device=device, generator=_source)


def randn(shape, device=None):
    """Draw standard normal numbers of a shape."""
    if callable(_source):
        return _source("normal", shape)
    return torch.randn(shape, device=device, generator=_source)


def make_generator(seed, device):
    """Return a torch.Generator on a device, or on the CPU for the meta device, which has none."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
