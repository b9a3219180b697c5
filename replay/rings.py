"""Steps in memory: a ring for each environment, and a copy of all rings on the device."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import torch

from replay.episodes import Arrays, Layout, Step


class Stream:
    """The steps of one environment in order of time: a preallocated ring that overwrites the oldest.

    Positions count all steps ever added; the ring has those in [start, stop). The system allocates memory only as
    steps arrive.

    Args:
      layout: {key: (shape, dtype)} of one step; stored: the same of what an agent stores with it.
      capacity: number of steps.
      window: length in steps of the windows that will be sampled.
    """

    def __init__(self, layout: Layout, stored: Layout, capacity: int, window: int):
        self.capacity, self.window, self.stored = capacity, window, list(stored)
        layout = {**layout, **stored}
        self.data = {key: np.zeros((capacity, *shape), dtype) for key, (shape, dtype) in layout.items()}
        self.episodes: collections.deque[tuple[str, int, int]] = (
            collections.deque()
        )  # (file name, length, position after the last step)
        self.whole: collections.deque[tuple[int, int]] = (
            collections.deque()
        )  # (position of the first step, length) of those that are long enough for a window
        self.rewind(0)

    def rewind(self, position):
        """Start at a position other than 0; for an empty stream."""
        self.first = self.stop = position

    @property
    def start(self):
        return max(self.first, self.stop - self.capacity)

    def __len__(self):
        return self.stop - self.start

    def append(self, step: Step) -> None:
        index = self.stop % self.capacity
        for key, value in self.data.items():
            value[index] = step[key]
        self.stop += 1

    def extend(self, steps: Arrays) -> None:
        """Append {key: (T, ...)} of several steps."""
        length = len(steps["reward"])
        index = np.arange(self.stop, self.stop + length)[-self.capacity :] % self.capacity
        for key, value in self.data.items():
            value[index] = steps[key][-self.capacity :]
        self.stop += length

    def end_episode(self):
        """Mark the newest step as its episode's last."""
        self.data["is_last"][(self.stop - 1) % self.capacity] = True

    def close_episode(self, name: str, length: int) -> None:
        """Record that the last `length` steps are in an episode file."""
        self.episodes.append((name, length, self.stop))
        while self.episodes[0][2] <= self.start:
            self.episodes.popleft()
        if length >= self.window:
            self.whole.append((self.stop - length, length))
        self.whole_episodes()

    def names(self):
        """Return the names of the episode files that `state_dict` lists."""
        return [name for name, _, _ in self.episodes]

    def whole_episodes(self):
        """Return (first position, length) of the complete episodes in memory that are long enough for a window."""
        while self.whole and self.whole[0][0] < self.start:
            self.whole.popleft()
        return self.whole

    def state_dict(self):
        """Return names and lengths of the episodes in memory, and what is stored with their steps."""
        spans = [np.arange(stop - length, stop) for _, length, stop in self.episodes]
        steps = np.concatenate([np.zeros(0, int), *spans])
        stored = {key: self.data[key][steps % self.capacity] for key in self.stored}
        for value in stored.values():
            value[steps < self.start] = 0  # the oldest episode may be overwritten in part
        stop = self.episodes[-1][2] if self.episodes else self.stop
        episodes = [(name, length) for name, length, _ in self.episodes]
        return {"episodes": episodes, "stop": stop} | {key: torch.from_numpy(value) for key, value in stored.items()}

    def pieces(self, begin, end):
        """Split the positions [begin, end) where the ring wraps: yield slices of the ring and of the positions."""
        position = begin
        while position < end:
            index = position % self.capacity
            length = min(end - position, self.capacity - index)
            yield slice(index, index + length), slice(position - begin, position - begin + length)
            position += length

    def gather(self, position, length, out, row):
        """Copy {key: (length, ...)} from a position into row `row` of the arrays of `out`."""
        for ring, window in self.pieces(position, position + length):
            for key, value in out.items():
                value[row, window] = self.data[key][ring]


class Mirror:
    """A copy of the streams' steps on the device, so that sampling and refreshing transfer only indices.

    New steps are copied when the next batch is sampled. From then on only the copy of what agents store with them is
    up to date, until `pull` writes it back.

    Args:
      streams: list of Stream; device: torch device.
    """

    def __init__(self, streams, device):
        self.streams, self.device = streams, device
        self.bases = np.cumsum([0, *(stream.capacity for stream in streams)])
        self.data = {
            key: torch.zeros(
                (int(self.bases[-1]), *value.shape[1:]), dtype=torch.from_numpy(value).dtype, device=device
            )
            for key, value in streams[0].data.items()
        }
        self.rings = [  # {key: (capacity, ...)} of each stream
            {key: value[begin:end] for key, value in self.data.items()} for begin, end in itertools.pairwise(self.bases)
        ]
        self.done = [0] * len(streams)  # position up to which each stream was copied

    def push(self):
        """Copy the new steps to the device."""
        for index, stream in enumerate(self.streams):
            for ring, _ in stream.pieces(max(self.done[index], stream.start), stream.stop):
                for key, value in self.rings[index].items():
                    value[ring].copy_(torch.from_numpy(stream.data[key][ring]))
            self.done[index] = stream.stop

    def end_episode(self, index):
        """Mark the newest step of a stream as its episode's last, if it was already copied."""
        stream = self.streams[index]
        if self.done[index] == stream.stop:
            self.rings[index]["is_last"][(stream.stop - 1) % stream.capacity] = True

    def gather(self, places, length):
        """Return {key: (B, length, ...)} tensors of windows (stream, position)."""
        self.push()
        steps = np.arange(length)
        rows = [self.bases[i] + (position + steps) % self.streams[i].capacity for i, position in places]
        rows = torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)
        return {key: value[rows] for key, value in self.data.items()}

    def pull(self):
        """Write what agents stored back into the streams."""
        for index, stream in enumerate(self.streams):
            for ring, _ in stream.pieces(stream.start, self.done[index]):
                for key in stream.stored:
                    stream.data[key][ring] = self.rings[index][key][ring].cpu().numpy()
