"""Steps in memory: a ring for each environment, and a copy of all rings on the device."""

import collections
import itertools

import numpy as np
import torch


class Stream:
    """The steps of one environment in the order in which they happened: a preallocated ring, the oldest overwritten.

    Positions count all steps ever added; those in [start, stop) are held. Memory is taken from the system only as
    steps arrive.

    Args:
      layout: {key: (shape, dtype)} of one step, perhaps with deter and stoch; capacity: number of steps.
      window: steps of the windows that will be asked for.
    """

    def __init__(self, layout, capacity, window):
        self.capacity, self.window = capacity, window
        self.data = {key: np.zeros((capacity, *shape), dtype) for key, (shape, dtype) in layout.items()}
        self.latents = [key for key in ("deter", "stoch") if key in layout]
        self.episodes = collections.deque()  # (file name, length, position behind the last step)
        self.whole = collections.deque()  # (position of the first step, length) of those that hold a window
        self.rewind(0)

    def rewind(self, position):
        """Start at a position other than 0; for an empty stream."""
        self.first = self.stop = position

    @property
    def start(self):
        return max(self.first, self.stop - self.capacity)

    def __len__(self):
        return self.stop - self.start

    def append(self, step):
        index = self.stop % self.capacity
        for key, value in self.data.items():
            value[index] = step[key]
        self.stop += 1

    def extend(self, steps):
        """Append {key: (T, ...)} of several steps."""
        length = len(steps["reward"])
        index = np.arange(self.stop, self.stop + length)[-self.capacity :] % self.capacity
        for key, value in self.data.items():
            value[index] = steps[key][-self.capacity :]
        self.stop += length

    def end_episode(self):
        """Note that the newest step is its episode's last."""
        self.data["is_last"][(self.stop - 1) % self.capacity] = True

    def close_episode(self, name, length):
        """Note that the last `length` steps stand in an episode file."""
        self.episodes.append((name, length, self.stop))
        while self.episodes[0][2] <= self.start:
            self.episodes.popleft()
        if length >= self.window:
            self.whole.append((self.stop - length, length))
        self.whole_episodes()

    def whole_episodes(self):
        """The finished episodes that hold a window and of which nothing was overwritten: (first position, length)."""
        while self.whole and self.whole[0][0] < self.start:
            self.whole.popleft()
        return self.whole

    def save(self):
        """Names and lengths of the episodes held, and the latents of their steps."""
        steps = [np.arange(stop - length, stop) for _, length, stop in self.episodes]
        steps = np.concatenate(steps) if steps else np.zeros(0, int)
        held = (steps >= self.start)[:, None]  # the oldest episode may be overwritten in part: no latents for that
        stop = self.episodes[-1][2] if self.episodes else self.stop
        latents = {key: torch.from_numpy(self.data[key][steps % self.capacity] * held) for key in self.latents}
        return {"episodes": [(name, length) for name, length, _ in self.episodes], "stop": stop, **latents}

    def pieces(self, begin, end):
        """Where the positions [begin, end) lie in the ring: slices, and which of the positions each holds."""
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
    """A copy of the streams' steps on the device, so that sampling and refreshing need neither the host nor its bus.

    New steps are copied when a batch is next asked for. From then on their latents are up to date here alone, until
    `pull` writes them back.

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
        self.done = [0] * len(streams)  # positions that were copied

    def push(self):
        """Copy the steps that are new."""
        for index, stream in enumerate(self.streams):
            for ring, _ in stream.pieces(max(self.done[index], stream.start), stream.stop):
                for key, value in self.rings[index].items():
                    value[ring].copy_(torch.from_numpy(stream.data[key][ring]))
            self.done[index] = stream.stop

    def end_episode(self, index):
        """Note that the newest step of a stream is an episode's last, should it have been copied already."""
        stream = self.streams[index]
        if self.done[index] == stream.stop:
            self.rings[index]["is_last"][(stream.stop - 1) % stream.capacity] = True

    def gather(self, places, length):
        """{key: (B, length, ...)} tensors of windows (stream, position)."""
        self.push()
        steps = np.arange(length)
        rows = [self.bases[i] + (position + steps) % self.streams[i].capacity for i, position in places]
        rows = torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)
        return {key: value[rows] for key, value in self.data.items()}

    def pull(self):
        """Write the latents back into the streams."""
        for index, stream in enumerate(self.streams):
            for ring, _ in stream.pieces(stream.start, self.done[index]):
                for key in stream.latents:
                    stream.data[key][ring] = self.rings[index][key][ring].cpu().numpy()
