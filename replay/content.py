"""What an episode file may hold: observations and actions that there can be."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from specs import StepLayout

OWN = re.compile(r"\d{8}T\d{6}F\d{6}-[0-9a-f]{32}-[0-9]+\.npz")  # the names that `save_episode` gives


def as_sound(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return waveforms of any type as bytes, silent at 128, or as numbers in [-1, 1], whichever `dtype` asks for.

    What a file's numbers mean is what their type says: bytes are silent at 128, other integers have the range of
    their type, and floats are in [-1, 1] as they are.
    """
    if value.dtype == dtype:
        return value
    if value.dtype == np.uint8:
        value = (value.astype(np.float32) - 128) / 128
    elif value.dtype.kind == "i":
        value = value.astype(np.float32) / 2 ** (8 * value.dtype.itemsize - 1)
    if dtype == np.uint8:
        value = np.clip(np.rint(value * 128 + 128), 0, 255)
    return value.astype(dtype)


def check_content(name: str, episode: Mapping[str, np.ndarray], layout: Mapping) -> None:
    """Raise ValueError for classes that there are not, and for actions that no agent could have taken.

    Actions must be in [-1, 1]. The samples that runs of ours store may lie beyond, where the environment cuts them off.

    Args:
      name: of the file; episode: {key: (T, ...)} in the types of the layout, which tells more if it is a StepLayout.
    """
    if not isinstance(layout, StepLayout):
        return
    for key, classes in layout.classes.items():
        wrong = episode[key] >= np.array(classes if episode[key].ndim > 1 else classes[0])
        if wrong.any():
            raise ValueError(f"{key} holds {episode[key][wrong][0]}, which is no class of {list(classes)}")
    for key, width in layout.actions.widths.items():
        action = episode[key][~episode["is_first"]]  # nothing led to a first step
        if key not in layout.actions.classes:
            if not OWN.fullmatch(name) and np.abs(action).max(initial=0) > 1 + 1e-6:
                most = np.abs(action).max()
                raise ValueError(f"{key} reaches {most:g}: actions must be scaled to [-1, 1]")
            continue
        ends = np.cumsum(layout.actions.classes[key])
        parts = np.split(action, ends[:-1], -1)
        if not (np.isin(action, (0, 1)).all() and all((part.sum(-1) == 1).all() for part in parts)):
            raise ValueError(f"{key} holds what is no one-hot of {width} numbers, each 0 or 1")
