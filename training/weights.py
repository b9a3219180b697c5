"""Weights in memory that learner and actor share: two copies, and a board of numbers beside them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

# Places on the board. The learner writes the first four, the actor the others, each a number that can be read at once.
VERSION, PUBLISHED, HEARD, WISH = range(4)  # of the newest weights: number, time; the learner's last sign; what to do
TAKEN, TICKS, MISSED, LATE, AGES, SAFE = range(4, 10)  # version in use; ticks, missed deadlines, worst delay in s, ...
PLACES = 16
STOP = -1.0  # a wish


class Weights:
    """The tensors of an agent for another process to act with.

    Version v stands in copy v % 2, so that there is always one that is not being written: the learner writes a version
    only when the actor has taken over the one before the last. Nobody waits.

    Args:
      tensors: {name: tensor}, whose sizes and types count. May be sent to another process.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.form = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        self.size = sum(_padded(value.nbytes) for value in tensors.values())
        self.memory = torch.zeros(max(8, 2 * self.size), dtype=torch.uint8).share_memory_()
        self.board = torch.zeros(PLACES, dtype=torch.float64).share_memory_()

    def copy(self, version: int) -> dict[str, torch.Tensor]:
        """Return {name: tensor}, views of the shared memory of a version."""
        begin, views = version % 2 * self.size, {}
        for name, (shape, dtype) in self.form.items():
            length = torch.Size(shape).numel() * dtype.itemsize
            views[name] = self.memory[begin : begin + length].view(dtype).view(shape)
            begin += _padded(length)
        return views

    def publish(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Write the next version, unless the actor may be reading there still; return whether it was written."""
        version = int(self.board[VERSION])
        if self.board[TAKEN] < version - 1:
            return False
        for name, view in self.copy(version + 1).items():
            view.copy_(tensors[name])
        self.board[PUBLISHED] = time.monotonic()
        self.board[VERSION] = version + 1
        return True


def _padded(length):
    """Return a number of bytes up to where any type may begin."""
    return -(-length // 16) * 16


class Taker:
    """Takes over new weights, as far as there is time.

    Args:
      weights: Weights; tensors: {name: tensor} of the networks that act, which get other memory in exchange.
    """

    def __init__(self, weights: Weights, tensors: Mapping[str, torch.Tensor]):
        self.weights, self.tensors = weights, tensors
        self.spare = {name: torch.empty_like(value) for name, value in tensors.items()}
        self.version, self.published = 0, time.monotonic()
        self.todo: list[str] = []
        self.goal = 0

    def work(self, until: float) -> None:
        """Copy until a time by `time.monotonic`, or until the newest weights are in use; one tensor at least."""
        board = self.weights.board
        if not self.todo:
            newest = int(board[VERSION])
            if newest == self.version:
                return
            self.goal, self.todo = newest, list(self.tensors)
            self.source, self.since = self.weights.copy(newest), float(board[PUBLISHED])
        while self.todo:
            name = self.todo.pop()
            self.spare[name].copy_(self.source[name])
            if time.monotonic() > until and self.todo:
                return
        for name, value in self.tensors.items():
            value.data, self.spare[name].data = self.spare[name].data, value.data
        self.version, self.published = self.goal, self.since
        board[TAKEN] = self.goal


def tensors_of(agent: Any) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the parameters and buffers that an agent saves; nothing for one without networks."""
    nets = getattr(agent, "nets", None)
    if nets is None:
        return {}
    saved = nets.state_dict()
    every = {**dict(nets.named_parameters()), **dict(nets.named_buffers())}
    return {name: value for name, value in every.items() if name in saved}
