"""All that the loop knows of an agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Clock(Protocol):
    """Says when to learn. `tools.Ratio` is the train ratio's."""

    def due(self, step: int) -> int:
        """Return how many learn calls are due after `step` agent steps; each is then told to `tick`."""

    def tick(self) -> None:
        """Count one learn call as done."""

    def stage(self) -> tuple[str, float] | None:
        """Return the word for what is learned now and its share that is done; None if learning is all one."""

    def finished(self) -> bool:
        """True if nothing is left to learn, however many steps are; its `state_dict` then has {"finished": True}."""

    def left(self, step: int, begin: int) -> int:
        """Return how many learn calls are to come until `step` agent steps, if they begin or began at `begin`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Agent(Protocol):
    """Acts in environments and learns from the replay. N: number of environments.

    stored: {key: (shape, dtype)} that the replay keeps beside each step; {} for nothing.
    context: steps that precede a trained window and only lend it what is stored with them.
    pictures: an agent that is after something may have this function of a carry that draws it for the first
      environment: [uint8 (H, W, 3)], [] for nothing.
    generators: {name: torch or NumPy generator} that it draws from, whose states are saved with a run and which an
      evaluation leaves as they were.
    """

    stored: Mapping[str, tuple[tuple[int, ...], Any]]
    context: int
    generators: Mapping[str, Any]

    def clock(self, config: Any) -> Clock:
        """Return the clock of its learn calls."""

    def initial(self, count: int) -> Any:
        """Return the carry before the first step of `count` environments."""

    def act(
        self, obs: Mapping[str, np.ndarray], carry: Any, mode: str
    ) -> tuple[dict[str, np.ndarray], Any, Mapping[str, np.ndarray] | None]:
        """Choose actions.

        Args:
          obs: {key: (N, ...)}, with reward, is_first and is_last.
          carry: what the last call returned, or `initial`.
          mode: "mode" or "sample" to perform; "noisy" or "explore" to collect data.
        Returns: actions {key: (N, width)} float32, the next carry, and {key: (N, ...)} to store (None: nothing).
        """

    def learn(self, replay: Any) -> Mapping[str, Any]:
        """Do one update, or one piece of work: {name: 0-d tensor} of metrics."""

    def report(
        self, arrays: Mapping[str, np.ndarray], seen: int, carry: Any = None
    ) -> dict[str, tuple[np.ndarray, ...]]:
        """Show what the model expects: {key: (truth, model, error)}, each uint8 (B, T, H, W, C), or one such film.

        Args:
          arrays: {key: (B, T, ...)} as the replay gives them, of which the first `seen` steps are seen and the rest
            imagined from the actions alone; carry: of the agent before the first step, if it is known.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that learning depends on, with {"specs": ...} to build the agent without an environment."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. Raises UserError, with nothing changed, if it is another agent's."""
