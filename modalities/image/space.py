"""Which spaces are images, and how an environment's images become plain: resized, copied, stacked."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from gymnasium import spaces

from specs import Observed
from tools import UserError

KEYS = "cnn_keys"


class Plain(spaces.Box):
    """The space of plain images, (H, W, C) uint8. Frame stacks have more channels than an environment's image may."""


def accepts(space: spaces.Space) -> bool:
    """True for plain images and for uint8 up to 255 of shape (H, W) or (H, W, C) with 1, 3 or 4 channels."""
    if isinstance(space, Plain):
        return True
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or not (space.high == 255).all():
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[-1] in (1, 3, 4))


class Converter:
    """Resize images to (H, W) by averaging areas, copy them and stack the last ones along the channels.

    The oldest comes first; the first of an episode fills the stack.
    """

    def __init__(self, space: spaces.Box, size: tuple[int, int], frames: int):
        channels = space.shape[2] if len(space.shape) == 3 else 1
        self.space = Plain(0, 255, (*size, channels * frames), np.uint8)
        self._shape = (*size, channels)
        self._cv2 = _import_cv2() if space.shape[:2] != size else None
        self._count = frames
        self._frames: deque[np.ndarray] = deque(maxlen=frames)

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        if self._cv2:
            height, width, _ = self._shape
            value = np.asarray(value, np.uint8)
            frame = self._cv2.resize(value, (width, height), interpolation=self._cv2.INTER_AREA)
        else:
            frame = np.array(value, np.uint8, order="C")
        frame = frame.reshape(self._shape)  # OpenCV drops a single channel, and gray images come without
        if self._count == 1:
            return frame
        self._frames.extend([frame] * self._count if is_first else [frame])
        return np.concatenate(self._frames, -1)


def converter(key: str, space: spaces.Box, config: Any) -> Converter:
    """Return what makes the images of a space plain, as `size` and `frame_stack` of `config` ask for.

    Raises UserError where images must be resized and OpenCV is missing.
    """
    return Converter(space, tuple(config.size), config.frame_stack)


def observed(space: spaces.Box) -> Observed:
    """Return what networks need to know: the shape (H, W, C)."""
    return Observed("image", tuple(space.shape))


def _import_cv2():
    """Import OpenCV, which takes time and memory that most environments can do without."""
    try:
        import cv2
    except ImportError as error:
        reason = " ".join(str(error).split())
        message = f"images are resized by OpenCV ({reason}): pip install opencv-python-headless"
        raise UserError(message) from error
    return cv2
