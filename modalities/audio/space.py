"""Which spaces are sounds, and how their waveforms become plain: (n, channels) of bytes or of numbers in [-1, 1].

No shape tells a sound from other numbers: an environment tags its space (`specs.tagged`; an environment of Gymnasium by
`metadata["modalities"]`), or the user says --modalities.KEY audio.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from specs import Observed, named
from tools import UserError

KEYS = "audio_keys"
CHANNELS = 8  # most that are told from samples
HUGE = 1e9  # a bound of floats that is no bound
SILENT = 128  # of bytes


class Waveform(spaces.Box):
    """The space of plain sounds: (n, channels) uint8, silent at 128, or float32."""

    @property
    def silence(self) -> int:
        """Return the number that stands where nothing is heard."""
        return SILENT if self.dtype == np.uint8 else 0


def accepts(space: spaces.Space, config: Any = None) -> bool:
    """True for plain sounds; others must be told to be one."""
    return isinstance(space, Waveform)


class Converter:
    """Carries waveforms of one shape to (n, channels): bytes stay bytes, all else is scaled from its bounds."""

    def __init__(self, space: spaces.Box):
        samples, channels = self._shape = (*space.shape, 1)[:2]
        low, high = (bound.astype(np.float64) for bound in (space.low, space.high))
        self._bytes = space.dtype == np.uint8
        whole = np.issubdtype(space.dtype, np.integer)
        bounded = (whole or max(np.abs(low).max(), np.abs(high).max()) < HUGE) and low.min() < high.max()
        self._scale = 1 / max(-low.min(), high.max()) if bounded else 1.0
        words = f"audio {samples} samples" + (f", {channels} channels" if channels > 1 else "")
        scaled = " (scaled to [-1, 1])" if not self._bytes and self._scale != 1 else ""
        plain = Waveform(0, 255, self._shape, np.uint8) if self._bytes else Waveform(-np.inf, np.inf, self._shape)
        self.space = named(plain, words + scaled)

    def __call__(self, value: Any, is_first: bool) -> np.ndarray:
        if self._bytes:
            return np.array(value, np.uint8).reshape(self._shape)
        wave = np.array(value, np.float32).reshape(self._shape)
        return wave if self._scale == 1 else wave * np.float32(self._scale)


def converter(key: str, space: spaces.Space, config: Any) -> Converter:
    """Return what makes sounds plain. Raises UserError unless they are Box (n,) or (n, channels)."""
    shape = space.shape or ()
    if not isinstance(space, spaces.Box) or not (len(shape) == 1 or (len(shape) == 2 and 1 <= shape[1] <= CHANNELS)):
        wanted = f"audio is a Box (n,) or (n, channels), up to {CHANNELS} channels"
        raise UserError(f"observation '{key}' is {space}, and {wanted}")
    if shape[0] < 2:
        raise UserError(f"observation '{key}' has {shape[0]} samples, and audio has at least 2")
    return Converter(space)


def observed(space: spaces.Box) -> Observed:
    """Return what networks need to know: the shape (n, channels)."""
    return Observed("audio", tuple(space.shape))
