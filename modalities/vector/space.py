"""Vectors: numbers, and integers that name classes. How an environment's become plain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from specs import Observed, classes_of, named
from tools import UserError

KEYS = "mlp_keys"


def accepts(space: spaces.Space, config: Any = None) -> bool:
    """True: what no other kind takes is a vector, or `converter` refuses it."""
    return True


class Numbers:
    """Carries numbers and bits of any shape to float32 vectors (n,)."""

    def __init__(self, space: spaces.Box | spaces.MultiBinary):
        size = math.prod(space.shape)
        board = ", no image" if len(space.shape) > 1 else ""
        shape = f" ({'x'.join(map(str, space.shape))}{board})" if space.shape not in ((), (size,)) else ""
        about = f"{size} number{'s' * (size != 1)}{shape}"
        self.space = named(spaces.Box(-np.inf, np.inf, (size,)), about)
        self._is_vector = space.shape == self.space.shape

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        vector = np.array(value, np.float32)  # a copy: an environment may write its next state into its array
        return vector if self._is_vector else vector.reshape(self.space.shape)


class Integers:
    """Carries integers, which begin anywhere, to int32 from 0 on: a scalar of Discrete, (n,) of MultiDiscrete."""

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete):
        self._start = space.start
        self.space: spaces.Space
        if isinstance(space, spaces.Discrete):
            self.space = named(spaces.Discrete(int(space.n)), f"one of {space.n}")
        else:
            classes = space.nvec.reshape(-1)
            self.space = named(spaces.MultiDiscrete(classes), f"one of {' and of '.join(map(str, classes))}")

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        return (np.asarray(value) - self._start).reshape(self.space.shape or ()).astype(np.int32)


def converter(key: str, space: spaces.Space, config: Any) -> Numbers | Integers:
    """Return what makes observations plain. Raises UserError unless they are Box, MultiBinary or (Multi)Discrete."""
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return Integers(space)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        if not math.prod(space.shape):
            raise UserError(f"observation '{key}' has no numbers (shape {space.shape}): leave it out by encoder.{KEYS}")
        return Numbers(space)
    kind = type(space).__name__
    raise UserError(f"observation '{key}' is a {kind} space, not supported: leave it out by encoder.{KEYS}")


def observed(space: spaces.Space) -> Observed:
    """Return what networks need to know: the shape (n,), (1,) of a scalar, and the classes of integers."""
    return Observed("vector", (math.prod(space.shape or ()),), classes_of(space))
