"""Steps in memory: a ring for each environment, and a copy of all rings on the device."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import torch

from replay.episodes import Arrays, Layout, Step

PACKED = 2**26  # bytes that are copied to the device at once, about
ALIGNED = 16  # bytes at a multiple of which an array begins among others


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

    def gather(self, position, out, row):
        """Copy the steps from a position on into row `row` of {key: (B, T, ...)}, each key's T of them."""
        for length in {value.shape[1] for value in out.values()}:
            keys = [key for key, value in out.items() if value.shape[1] == length]
            for ring, window in self.pieces(position, position + length):
                for key in keys:
                    out[key][row, window] = self.data[key][ring]


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
        """Copy the new steps of all streams to the device, all keys in one transfer."""
        spans = [(max(done, s.start), s.stop) for done, s in zip(self.done, self.streams, strict=True)]
        self.done = [stop for _, stop in spans]
        most = max(1, PACKED // sum(value[0].nbytes for value in self.data.values()))  # steps
        together: list[tuple[int, int, int]] = []
        count = 0
        for index, (begin, stop) in enumerate(spans):
            for at in range(begin, stop, most):
                end = min(at + most, stop)
                if count + end - at > most:
                    self._upload(together)
                    together, count = [], 0
                together.append((index, at, end))
                count += end - at
        if together:
            self._upload(together)

    def _upload(self, spans):
        """Copy the steps [begin, stop) of streams, [(stream, begin, stop)], to the device."""
        places = [(i, np.arange(begin, stop) % self.streams[i].capacity) for i, begin, stop in spans]
        arrays = {key: np.concatenate([self.streams[i].data[key][at] for i, at in places]) for key in self.data}
        rows = np.concatenate([self.bases[i] + at for i, at in places])
        rows, *values = upload([rows, *arrays.values()], self.device)
        for key, value in zip(arrays, values, strict=True):
            self.data[key].index_copy_(0, rows, value)

    def end_episode(self, index):
        """Mark the newest step of a stream as its episode's last, if it was already copied."""
        stream = self.streams[index]
        if self.done[index] == stream.stop:
            self.rings[index]["is_last"][(stream.stop - 1) % stream.capacity] = True

    def gather(self, places, lengths):
        """Return {key: (B, T, ...)} tensors of windows (stream, position); lengths: {key: T}."""
        self.push()
        rows = rows_of(self.streams, places, np.arange(max(lengths.values())))
        rows = torch.from_numpy(rows).to(self.device, non_blocking=True)
        return {key: self.data[key][rows[:, :length]] for key, length in lengths.items()}

    def write(self, rows, places, stored):
        """Write what an agent stores: {key: (M, ...)} tensors, of which those at `places` (n,) go to `rows` (n,)."""
        rows, places = upload([rows, places], self.device)
        for key, value in stored.items():
            self.data[key].index_copy_(0, rows, value[places].to(self.data[key].dtype))

    def pull(self):
        """Write what agents stored back into the streams."""
        for index, stream in enumerate(self.streams):
            for ring, _ in stream.pieces(stream.start, self.done[index]):
                for key in stream.stored:
                    stream.data[key][ring] = self.rings[index][key][ring].cpu().numpy()


def rows_of(streams, places, steps):
    """Return the rows (B, T) of windows [(stream, position)] in all rings one after the other; steps: (T,) offsets."""
    bases = np.cumsum([0, *(stream.capacity for stream in streams)])
    return np.stack([bases[i] + (position + steps) % streams[i].capacity for i, position in places])


def upload(arrays, device):
    """Return arrays as tensors on a device, carried there in one transfer."""
    sizes = [math.ceil(array.nbytes / ALIGNED) * ALIGNED for array in arrays]
    places = np.cumsum([0, *sizes])
    packed = torch.empty(int(places[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = packed.numpy()
    for array, begin in zip(arrays, places[:-1], strict=True):
        memory[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    parts = (there[begin : begin + array.nbytes] for array, begin in zip(arrays, places[:-1], strict=True))
    dtypes = (torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays)
    return [part.view(dtype).view(array.shape) for part, dtype, array in zip(parts, dtypes, arrays, strict=True)]
