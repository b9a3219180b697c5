"""Take the next batch from the host's memory while a GPU computes an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from replay.rings import upload


class Batch(NamedTuple):
    """Draws and observations of a batch that were taken early: what was asked for, and how to undo the draws."""

    asked: tuple
    places: Any
    observations: dict[str, torch.Tensor]
    undo: Callable[[], None]


class Lookahead:
    """Takes the observations of a batch before it is asked for, where bursts of samples make it likely that it will be.

    A burst is what is sampled between two changes of the replay. Every one is expected to be as long as the last, so
    that in a steady rhythm no batch is taken in vain; one that was is undone, as if it had never been drawn.

    Args:
      device: that observations are copied to, on a stream of its own if it is a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batch: Batch | None = None
        self.sampled = self.expected = 0  # samples since the replay changed; of the burst before

    def changed(self) -> None:
        """Undo what was taken early, as the replay is about to change or to be saved."""
        if self.sampled:
            self.sampled, self.expected = 0, self.sampled
        self.undo()

    def undo(self) -> None:
        """Undo what was taken early, if anything was."""
        if self.batch:
            self.batch.undo()
            self.batch = None

    def take(self, *asked: Any) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """Return places and observations if they are those that are asked for, else None."""
        self.sampled += 1
        if self.batch and self.batch.asked != asked:
            self.undo()
        batch, self.batch = self.batch, None
        if batch is None:
            return None
        if self.stream:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)
            for value in batch.observations.values():
                value.record_stream(now)  # its memory may not be taken before this stream is done with it
        return batch.places, batch.observations

    def due(self) -> bool:
        """True if another batch is expected before the replay changes."""
        return self.batch is None and 0 < self.sampled < self.expected

    def keep(self, asked: tuple, places: Any, arrays: dict[str, Any], undo: Callable[[], None]) -> None:
        """Copy a batch's observations to the device, for `take`."""
        with torch.cuda.stream(self.stream):  # which does nothing for None
            tensors = upload(arrays.values(), self.device)
        self.batch = Batch(asked, places, dict(zip(arrays, tensors, strict=True)), undo)
