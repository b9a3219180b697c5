"""What is observed and what is done."""

from typing import NamedTuple

import gymnasium
import numpy as np


class ObsSpec(NamedTuple):
    """What the model sees, by key: image shapes (H, W, C), vector widths (n,), classes [k...] of integer vectors."""

    images: dict
    vectors: dict
    classes: dict


class ActionSpec(NamedTuple):
    """The action vector: {key: width} in sorted order, and {key: [k...]} for the discrete ones."""

    widths: dict
    classes: dict

    @property
    def size(self):
        return sum(self.widths.values())


def obs_spec(space):
    """{key: Gymnasium space} -> ObsSpec: uint8 boxes of three dimensions are images, all else vectors."""
    images, vectors, classes = {}, {}, {}
    for key, box in space.items():
        if isinstance(box, gymnasium.spaces.Discrete):
            vectors[key], classes[key] = (1,), [int(box.n)]
        elif isinstance(box, gymnasium.spaces.MultiDiscrete):
            vectors[key], classes[key] = (len(box.nvec),), [int(n) for n in box.nvec]
        elif box.dtype == np.uint8 and len(box.shape) == 3:
            images[key] = box.shape
        else:
            vectors[key] = (int(np.prod(box.shape)),)
    return ObsSpec(images, vectors, classes)


def act_spec(space):
    """{key: Gymnasium space} -> ActionSpec: one-hots of discrete keys and values of boxes, in sorted order of keys."""
    widths, classes = {}, {}
    for key, box in sorted(space.items()):
        if isinstance(box, gymnasium.spaces.Discrete):
            classes[key] = [int(box.n)]
        elif isinstance(box, gymnasium.spaces.MultiDiscrete):
            classes[key] = [int(n) for n in box.nvec]
        widths[key] = sum(classes[key]) if key in classes else int(np.prod(box.shape))
    return ActionSpec(widths, classes)
