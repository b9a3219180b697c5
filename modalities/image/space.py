"""Which spaces are images, and how an environment's images become plain: moved, scaled, resized, copied, stacked.

An array is an image if it has the shape of one: two sides, and up to 12 channels before or behind them, or a stack of
such. `LEAST` says how long the sides must be. What is smaller is a board, whose cells are numbers: it is a vector.

    values                         shapes                                    scaled
    uint8, 0 to 255                (H, W) and (H, W, 1 | 3 | 4) of any size  no
    0 to 255, other bounds, bool   (H, W, C) (C, H, W) and stacks of these   from the bounds to 0 to 255
    other bounds, bool, bits       (H, W)                                    from the bounds to 0 to 255

An array that looks like an image and cannot be taken for one is refused, not taken for thousands of numbers.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from specs import Observed, named
from tools import UserError

KEYS = "cnn_keys"
CHANNELS = 12  # most that are told from a side
LEAST = 16  # pixels of a side
LEAST_BITS = 32  # where values are neither 0 to 255 nor floats with channels: boards have up to 25
HUGE = 1e9  # a bound that is no bound


class Plain(spaces.Box):
    """The space of plain images, (H, W, C) uint8. Frame stacks have more channels than an environment's image may."""


class Layout(NamedTuple):
    """Places of the axes of an image.

    axes: those of height, width, and then of what becomes channels, the slowest first; words: how to say it.
    """

    axes: tuple[int, ...]
    words: str = ""


def accepts(space: spaces.Space, config: Any = None) -> bool:
    """True for plain images and for what has the shape of an image; see above. config: has `size` and `image_layout`.

    A small array of uint8 that would have to be blown up to `size` is no image.
    """
    if isinstance(space, Plain):
        return True
    if not isinstance(space, (spaces.Box, spaces.MultiBinary)) or len(space.shape) < 2:
        return False
    return bool(layout_of(space, config) or looks_like_one(space))


def layout_of(space: spaces.Box | spaces.MultiBinary, config: Any = None) -> Layout | None:
    """Return the layout of an image's space, None if it is not one; see `accepts`."""
    shape, count, least = space.shape, len(space.shape), least_side(space)
    if count == 2:
        layout, big = Layout((0, 1)), min(shape) >= least and bounds(space) is not None
        return layout if big or (is_pixels(space) and not is_board(shape, config)) else None
    given = count == 3 and config is not None and config.image_layout
    if given in ("hwc", "chw"):
        return Layout((0, 1, 2)) if given == "hwc" else Layout((1, 2, 0), "channels first, moved")
    if count == 3 and is_pixels(space) and shape[2] in (1, 3, 4) and not is_board(shape, config):
        return Layout((0, 1, 2))
    for layout in LAYOUTS.get(count, ()):
        height, width, *rest = (shape[axis] for axis in layout.axes)
        if min(height, width) >= least and all(1 <= size <= CHANNELS for size in rest):
            return layout
    return None


LAYOUTS = {  # by number of axes
    3: [Layout((0, 1, 2)), Layout((1, 2, 0), "channels first, moved")],
    4: [
        Layout((1, 2, 0, 3), "a stack in front, moved"),
        Layout((2, 3, 0, 1), "a stack and channels first, moved"),
        Layout((0, 1, 3, 2), "a stack behind the channels"),
    ],
}


def looks_like_one(space: spaces.Box | spaces.MultiBinary) -> bool:
    """True for three axes or more of which two neighbors are as long as the sides of an image."""
    least, shape = least_side(space), space.shape
    return len(shape) > 2 and any(min(pair) >= least for pair in itertools.pairwise(shape))


def too_small(space: spaces.Space, config: Any) -> bool:
    """True for uint8 up to 255 in the shape of an image that is a board instead, being small; see `accepts`."""
    return is_pixels(space) and len(space.shape or ()) in (2, 3) and is_board(space.shape or (), config)


def is_pixels(space: spaces.Space) -> bool:
    """True for uint8 up to 255."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and bool((space.high == 255).all())


def is_board(shape: tuple[int, ...], config: Any) -> bool:
    """True for an array (H, W, ...) that is too small for an image and would have to be blown up to `config.size`."""
    if min(shape[:2]) >= LEAST or config is None:
        return False
    return shape[0] < config.size[0] or shape[1] < config.size[1]


def bounds(space: spaces.Box | spaces.MultiBinary) -> tuple[Any, Any] | None:
    """Return the least and largest value, numbers or arrays like an image; None where there are none."""
    if isinstance(space, spaces.MultiBinary):
        return 0.0, 1.0
    low, high = (bound.astype(np.float64) for bound in (space.low, space.high))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and max(-low.min(), high.max()) < HUGE):
        return None
    if (low >= high).any():
        return None
    uniform = (low == low.flat[0]).all() and (high == high.flat[0]).all()
    return (float(low.flat[0]), float(high.flat[0])) if uniform else (low, high)


def least_side(space: spaces.Box | spaces.MultiBinary) -> int:
    """Return how many pixels a side of an image must have; see above."""
    floats = isinstance(space, spaces.Box) and space.dtype.kind == "f" and len(space.shape) > 2
    return LEAST if floats or is_bytes(bounds(space)) else LEAST_BITS


def is_bytes(found: tuple[Any, Any] | None) -> bool:
    """True for the bounds 0 and 255."""
    return found is not None and np.ndim(found[0]) == 0 and found == (0.0, 255.0)


# ---------------------------------------------------------------------------


class Converter:
    """Bring images to (H, W, C) uint8, resize them by averaging areas, copy and stack the last ones along the channels.

    The oldest comes first; the first of an episode fills the stack.

    Args:
      space: of the environment's images; layout: where their axes are; size: (H, W); frames: in a stack.
    """

    def __init__(self, space: spaces.Box | spaces.MultiBinary, layout: Layout, size: tuple[int, int], frames: int):
        height, width, *rest = (space.shape[axis] for axis in layout.axes)
        channels = int(np.prod(rest))
        scaled = None if is_pixels(space) else bounds(space)
        words = [layout.words] if layout.words else []
        if scaled and not is_bytes(scaled):
            words += [f"{np.min(scaled[0]):g} to {np.max(scaled[1]):g}, scaled"]
        words += [f"resized from {height}x{width}"] * ((height, width) != size) + [f"last {frames}"] * (frames > 1)
        shape = *size, channels * frames
        about = f"image {'x'.join(map(str, shape))}" + (f" ({'; '.join(words)})" if words else "")
        self.space = named(Plain(0, 255, shape, np.uint8), about)
        self._axes = None if layout.axes == tuple(range(len(layout.axes))) else layout.axes
        self._given, self._shape = (height, width, channels), (*size, channels)
        self._scale = scaled and (scaled[0], 255 / (scaled[1] - scaled[0]))
        self._cv2: Any = import_cv2() if (height, width) != size else None
        self._count = frames
        self._frames: deque[np.ndarray] = deque(maxlen=frames)

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        if self._scale:
            low, factor = self._scale
            value = np.clip(np.rint((np.asarray(value, np.float32) - low) * factor), 0, 255).astype(np.uint8)
        if self._axes:
            value = np.asarray(value, np.uint8).transpose(self._axes).reshape(self._given)
        if self._cv2:
            frame = self._resize(np.ascontiguousarray(value, np.uint8))
        else:
            frame = np.array(value, np.uint8, order="C")
        frame = frame.reshape(self._shape)  # OpenCV drops a single channel, and gray images come without
        if self._count == 1:
            return frame
        self._frames.extend([frame] * self._count if is_first else [frame])
        return np.concatenate(self._frames, -1)

    def _resize(self, image):
        """Resize an image, four channels at a time: OpenCV takes no more."""
        height, width, channels = self._shape
        if channels > 4:
            parts = np.split(image.reshape(self._given), range(4, channels, 4), -1)
            parts = [self._cv2.resize(part, (width, height), interpolation=self._cv2.INTER_AREA) for part in parts]
            return np.concatenate([part.reshape(height, width, -1) for part in parts], -1)
        return self._cv2.resize(image, (width, height), interpolation=self._cv2.INTER_AREA)


def converter(key: str, space: spaces.Box | spaces.MultiBinary, config: Any) -> Converter:
    """Return what makes the images of a space plain, as `size`, `frame_stack` and `image_layout` of `config` ask for.

    Raises UserError for what looks like an image and cannot be taken for one, and where images must be resized and
    OpenCV is missing.
    """
    layout = layout_of(space, config)
    shape = "x".join(map(str, space.shape))
    cure = "; as numbers it comes through --wrappers gymnasium.wrappers:FlattenObservation"
    if layout is None:
        taken = f"neither 1 to {CHANNELS} channels, behind or before the sides, nor a stack of such"
        least = "--image_layout hwc or chw takes any number of them" if len(space.shape) == 3 else "give (H, W, C)"
        raise UserError(f"observation '{key}' looks like an image, but {shape} has {taken}: {least}{cure}")
    if bounds(space) is None:
        bound = "its space must tell its bounds, such as Box(0, 1, shape, np.float32)"
        raise UserError(f"observation '{key}' looks like an image ({shape} {space.dtype}), but {bound}{cure}")
    return Converter(space, layout, tuple(config.size), config.frame_stack)


def observed(space: spaces.Box) -> Observed:
    """Return what networks need to know: the shape (H, W, C)."""
    return Observed("image", tuple(space.shape))


def import_cv2():
    """Import OpenCV, which takes time and memory that most environments can do without."""
    try:
        import cv2
    except ImportError as error:
        reason = " ".join(str(error).split())
        message = f"images are resized by OpenCV ({reason}): pip install opencv-python-headless"
        raise UserError(message) from error
    return cv2
