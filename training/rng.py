"""Generators of random numbers: the global ones, which environments may use, and those of agents and replay."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tools import accepts, misfit


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**64)


def get_rng_state() -> dict[str, Any]:
    """Return the state of every global generator, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Undo `get_rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index, own in zip(here, state["cuda"], strict=False):  # there may be more or fewer devices than there were
        torch.cuda.set_rng_state(own.cpu(), index)


def fits_global_generators(state: Any) -> bool:
    """True if `set_rng_state` takes a state."""
    form = {
        "python": (int, [int], float | None),
        "numpy": (str, torch.Tensor, int, int, float),
        "torch": torch.Tensor,
        "cuda": [torch.Tensor],
        "agent?": {str: fits_generator},
    }
    if misfit(state, form):
        return False
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    return (
        accepts(random.Random().setstate, (version, tuple(internal), gauss))
        and accepts(np.random.RandomState().set_state, (name, keys.numpy(), *rest))
        and accepts(torch.Generator().set_state, state["torch"])
    )


def fits_generator(state: Any) -> bool:
    """True if a generator, of NumPy or PyTorch, takes a state."""
    if isinstance(state, torch.Tensor):
        own = torch.Generator()  # others, as of CUDA, have states of another size
        return state.dtype == torch.uint8 and (state.shape != own.get_state().shape or accepts(own.set_state, state))
    return accepts(functools.partial(setattr, np.random.default_rng().bit_generator, "state"), state)


def generator_states(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: state}, in types that `torch.load(weights_only=True)` accepts."""
    return {
        name: g.bit_generator.state if isinstance(g, np.random.Generator) else g.get_state()
        for name, g in generators.items()
    }


def set_generator_states(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Undo `generator_states`; a state of another kind of device, or none, leaves a generator as it is."""
    for name, generator in generators.items():
        if isinstance(generator, np.random.Generator):
            if isinstance(states.get(name), Mapping):
                generator.bit_generator.state = states[name]
        elif isinstance(states.get(name), torch.Tensor) and states[name].shape == generator.get_state().shape:
            generator.set_state(states[name])


@contextlib.contextmanager
def undisturbed(generators: Mapping[str, Any]):
    """Restore all generators afterwards, the global ones included, so that the body cannot affect training."""
    states = get_rng_state(), generator_states(generators)
    try:
        yield
    finally:
        set_rng_state(states[0])
        set_generator_states(generators, states[1])
