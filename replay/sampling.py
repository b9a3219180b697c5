"""Batches of experience: which windows of the steps in memory are sampled, and how a run gets them back."""

import collections
import math
import os

import numpy as np
import torch

from replay.episodes import load_episode
from replay.rings import Mirror, Stream
from tools import UserError

SMALL_STEP = 4096  # bytes of a step below which memory is cheap; see room_for_run


class Replay:
    """Samples windows of consecutive steps of one stream.

    Which, is said by `windows`:
      fresh: windows that were never sampled come first, each once and without overlap; the rest of a batch is uniform
        over all windows, across the ends of episodes as they happened (DreamerV3).
      uniform: the same without the fresh ones (its 2023 form).
      episode: a finished episode, then a window of it, all with equal chances (PlaNet, Dreamer).
      episode_ends: the same, with the chances of windows that would overlap the end given to the last one (DreamerV2).

    Beside each step may stand the latent state that the agent last computed for it, deter in half precision and stoch
    as class indices; a window's first step then only lends its latent as the state that the sequence starts from.

    Args:
      layout: {key: (shape, dtype)} of one step, without latents.
      latent: (D, (S, K)) widths of the latent state, or None if it is not stored.
      streams: number of environments; capacity: agent steps over all streams.
      length: trained steps in a sequence (T); one step of context is added if latents are stored.
      seed: of the sampling.
      device: on which a copy of all steps is kept and sampled from, or None; see `resident`.
    """

    def __init__(self, layout, latent, streams, capacity, length, seed, windows="fresh", device=None):
        self.length, self.capacity, self.windows = length, capacity, windows
        self.context = 1 if latent else 0
        self.window = length + self.context
        self.layout = dict(layout)
        layout = self.layout | latent_layout(latent)
        shares = [(capacity + index) // streams for index in range(streams)]  # their sum is the capacity
        if shares[0] < self.window:
            raise UserError(f"--dataset_size leaves {shares[0]} steps a stream, too few for windows of {self.window}")
        check_memory(layout, capacity)
        self.streams = [Stream(layout, share, self.window) for share in shares]
        self.mirror = Mirror(self.streams, device) if device else None
        self.fresh = collections.deque()
        self.queued = [0] * streams
        self.rng = np.random.default_rng(seed)

    def __len__(self):
        return sum(len(stream) for stream in self.streams)

    def ready(self):
        """Whether a window can be sampled."""
        if self.windows.startswith("episode"):
            return any(stream.whole_episodes() for stream in self.streams)
        return any(len(stream) >= self.window for stream in self.streams)

    def add(self, index, step, latent=None):
        """Append one step {key: value} to stream `index`, with its latent (deter (D,), stoch (S,) class indices)."""
        deter, stoch = latent or (0, 0)
        if step["is_first"] and len(self.streams[index]):  # also where a worker's end cut off a single step
            self.end_episode(index)
        self.streams[index].append({**step, "deter": deter, "stoch": stoch})
        if self.windows == "fresh":
            self.queue_fresh(index)

    def extend(self, index, name, episode, latent=None):
        """Append {key: (T, ...)} of an episode file to stream `index`, with latents or zeros; not as fresh data."""
        length = len(episode["reward"])
        deter, stoch = latent or (np.zeros((length, 1)), np.zeros((length, 1)))
        self.streams[index].extend({**episode, "deter": deter, "stoch": stoch})
        self.close_episode(index, name, length)
        self.queued[index] = self.streams[index].stop

    def queue_fresh(self, index):
        if self.streams[index].stop - self.queued[index] >= self.window:
            self.fresh.append((index, self.queued[index]))
            self.queued[index] += self.window

    def sample(self, batch, fresh=True):
        """A batch of `batch` windows, fresh ones first unless `fresh` is false.

        Returns:
          {key: (B, T + context, ...)} arrays, perhaps with `deter` (..., D) float16 and `stoch` (..., S) integers, or
          tensors on the device where there is one, and where they stand: list of (stream, position).
        """
        draw = self.draw_episode if self.windows.startswith("episode") else self.draw
        places = []
        while len(places) < batch:
            places.append((fresh and self.next_fresh()) or draw())
        if self.mirror:
            return self.mirror.gather(places, self.window), places
        out = {
            key: np.empty((batch, self.window, *value.shape[1:]), value.dtype)
            for key, value in self.streams[0].data.items()
        }
        for row, (index, position) in enumerate(places):
            self.streams[index].gather(position, self.window, out, row)
        return out, places

    def next_fresh(self):
        while self.fresh:
            index, position = self.fresh.popleft()
            stream = self.streams[index]
            if stream.start <= position <= stream.stop - self.window:
                return index, position
        return None

    def draw(self):
        """A window (stream, position), all with equal chances."""
        index, number = self.choose([max(0, len(stream) - self.window + 1) for stream in self.streams])
        return index, self.streams[index].start + number

    def draw_episode(self):
        """A window (stream, position) of an episode; both with equal chances, but for `episode_ends`."""
        index, number = self.choose([len(stream.whole_episodes()) for stream in self.streams])
        begin, length = self.streams[index].whole[number]
        last = length - self.window
        beyond = self.window if self.windows == "episode_ends" else 0
        return index, begin + min(int(self.rng.integers(last + 1 + beyond)), last)

    def choose(self, counts):
        """One of all the things of which there are `counts` in each stream, with equal chances: (stream, number)."""
        bounds = np.cumsum(counts)
        number = int(self.rng.integers(bounds[-1]))
        index = int(np.searchsorted(bounds, number, side="right"))
        return index, number - int(bounds[index - 1] if index else 0)

    def refresh(self, places, deter, stoch):
        """Write back the latents of the trained steps, if they are stored: tensors (B, T, D), (B, T, S) of indices."""
        latents = {"deter": deter, "stoch": stoch}
        if not self.mirror:
            latents = {key: value.cpu().numpy() for key, value in latents.items()}
        rings = self.mirror.rings if self.mirror else [stream.data for stream in self.streams]
        for row, (index, position) in enumerate(places):  # one after the other: windows may overlap
            for ring, window in self.streams[index].pieces(position + 1, position + 1 + self.length):
                for key, value in latents.items():
                    rings[index][key][ring] = value[row, window]

    def close_episode(self, index, name, length):
        """Note that the last `length` steps of stream `index` stand in an episode file."""
        self.streams[index].close_episode(name, length)
        self.end_episode(index)

    def end_episode(self, index):
        """Note that the newest step of stream `index` is its episode's last."""
        self.streams[index].end_episode()
        if self.mirror:
            self.mirror.end_episode(index)

    # -- going on after an interruption

    def save(self):
        """What `restore` needs beside the episode files, in types that `torch.load(weights_only=True)` accepts."""
        if self.mirror:
            self.mirror.pull()
        return {
            "streams": [stream.save() for stream in self.streams],
            "fresh": list(self.fresh),
            "queued": list(self.queued),
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, saved, paths, warn):
        """Fill empty streams from episode files; with `saved`, to the state in which `save` found them.

        Files that `saved` does not know follow behind what it does, with latents of zero.

        Args:
          saved: what `save` returned, or None.
          paths: the episode files that exist, oldest first.
          warn: function of one line, called for each file that cannot be used.
        """
        rest = {path.name: path for path in paths}
        known = saved["streams"] if saved else []
        same = len(known) == len(self.streams)  # else each episode goes where there is room for it
        if same:
            for stream, old in zip(self.streams, known, strict=True):
                stream.rewind(old["stop"] - sum(length for _, length in old["episodes"]))
        pieces = [(index, *piece) for index, stream in enumerate(known) for piece in latents_by_episode(stream)]
        if not same:
            pieces.sort(key=lambda piece: piece[1])  # the oldest first, which may be overwritten
        gone = 0
        for index, (name, length), *latent in pieces:
            path = rest.pop(name, None)
            gone += path is None
            episode = self.read(path, warn)
            if episode and len(episode["reward"]) == length:
                self.extend(index if same else self.emptiest(), name, episode, latent)
        if gone:
            warn(f"{gone} of the replay's episode files are not there any more")
        if same:
            self.fresh.extend(map(tuple, saved["fresh"]))
            self.queued = [min(old, s.stop) for old, s in zip(saved["queued"], self.streams, strict=True)]
            self.rng.bit_generator.state = saved["rng"]
        self.load(rest.values(), warn)

    def load(self, paths, warn):
        """Append the newest of the episode files, oldest first, each to the stream that holds least."""
        episodes, room = [], self.capacity - len(self)
        for path in reversed(list(paths)):
            episode = self.read(path, warn) if room > 0 else None
            if episode:
                episodes.append((path.name, episode))
                room -= len(episode["reward"])
        for name, episode in reversed(episodes):
            self.extend(self.emptiest(), name, episode)

    def emptiest(self):
        """The stream that holds least."""
        return min(range(len(self.streams)), key=lambda index: len(self.streams[index]))

    def read(self, path, warn):
        """The episode of a file, or None with a warning."""
        if path is None:
            return None
        try:
            return load_episode(path, self.layout)
        except ValueError as error:
            warn(f"skipped {path}: {error}")


def latent_layout(latent):
    """{key: (shape, dtype)} of a stored latent of widths (D, (S, K)); nothing for None."""
    if not latent:
        return {}
    deter, (groups, classes) = latent
    return {"deter": ((deter,), np.float16), "stoch": ((groups,), np.uint8 if classes <= 256 else np.int16)}


def latents_by_episode(stream):
    """((name, length), deter (length, D), stoch (length, S)) for each episode of a saved stream, or without latents."""
    if not stream["episodes"]:  # nothing would be split into one piece, not into none
        return ()
    cuts = np.cumsum([length for _, length in stream["episodes"]])[:-1]
    latents = (np.split(stream[key].numpy(), cuts) for key in ("deter", "stoch") if key in stream)
    return zip(stream["episodes"], *latents, strict=True)


def room_for_run(config, layout):
    """Steps that the whole run of a configuration may add to a replay.

    An episode has a step more than it has actions. Room for a tenth more is enough for all but the shortest, room for
    twice as many for any: that is left to small steps, such as those of bandits.
    """
    room = 2.0 if step_bytes(layout) < SMALL_STEP else 1.1
    actions = config.steps / config.action_repeat + config.prefill
    return math.ceil(room * actions) + config.envs * (config.batch_length + 2)


def step_bytes(layout):
    """Memory of one step of {key: (shape, dtype)}."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())


def resident(device, layout, latent, capacity):
    """The device for a replay's copy of its steps: None on CPU, and where they would take half of the free memory."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return device if step_bytes(layout | latent_layout(latent)) * capacity <= free / 2 else None


def check_memory(layout, capacity):
    """Raises UserError if `capacity` steps cannot fit into this machine's memory."""
    step = step_bytes(layout)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if step * capacity > memory:
        raise UserError(
            f"{capacity} steps of {step / 1024:.1f} KB do not fit into {memory / 2**30:.0f} GiB of memory: "
            f"lower --dataset_size to at most {int(0.8 * memory / step)}"
        )
