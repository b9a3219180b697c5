"""What an environment is: its methods, and which of a run's environments it is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from gymnasium import spaces


class Place(NamedTuple):
    """Tells one environment of a run from all others, for the function that makes it.

    mode: "train" or "eval".
    number: among those of its mode, from 0. What replaces an environment that failed has its number.
    seed: 31 bits, for all that is random. No other environment has it, nor has this one after a restart or a resume.
    """

    mode: str
    number: int
    seed: int


class Env(Protocol):
    """The methods and attributes on which the rest of the project relies.

    Observations are dicts with the keys of `obs_space` and `reward` (float32), `is_first`, `is_last` (the
    episode ended, for whatever reason), `is_terminal` (it ended in a state without a future: never by a
    time-out), and perhaps scalars named `log_*` that are for the logger alone. After a last observation only
    `reset` makes sense. The dict and its arrays are the caller's: nothing that is done later changes them.

    Attributes:
      obs_space: images `Box(0, 255, (H, W, C), uint8)`, vectors `Box((n,), float32)`, `Discrete(n)` (an int32
        scalar in 0..n-1) and `MultiDiscrete(nvec)` (int32 (n,)), texts (int32 (n,) token ids) and sounds (uint8 or
        float32 (n, channels)).
      act_space: `Box(-1, 1, (n,), float32)`, `Discrete(n)` or `MultiDiscrete(nvec)`; key `action` unless the
        environment has a dict of actions.
      safe_action: {key: array} as `step` takes it, or None: what to do when nobody decides (`--collect async`). An
        environment may lack it. In a user's own environment it has the form of the space there.
    """

    obs_space: dict[str, spaces.Space]
    act_space: dict[str, spaces.Space]

    def reset(self) -> dict:
        """Start an episode. Return its first observation, with reward 0."""

    def step(self, action: dict[str, np.ndarray]) -> dict:
        """Act. Each action is float32: (n,) clipped to [-1, 1], or one-hots of width n or sum(nvec)."""

    def render(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return a picture (H, W, 3) uint8 for people. Raises UserError where there is none.

        size: the (H, W) wished for; an environment that cannot choose draws at its own, as all do without it.
        """

    def close(self) -> None:
        """Free what is held; may be called twice."""
