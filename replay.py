"""Experience: episode files on disk, rings of steps in memory, and the batches that are sampled from them.

A step holds obs[t], reward[t], is_first[t], is_last[t], is_terminal[t] and the action that led to obs[t]:

    step          0         1         2                T-1
    observation   o_0       o_1       o_2     ...      o_{T-1}
    action        0         a_0       a_1     ...      a_{T-2}     a_t was chosen on seeing o_t
    reward        0         r_1       r_2     ...      r_{T-1}
    is_first      True      False     False            False
    is_last       False     False     False            True

This is also the layout of the episode files, which are those of DreamerV2 and dreamerv3-torch: one compressed .npz per
episode, {time}-{uuid}-{length}.npz, arrays of equal length, no pickles.
"""

import collections
import datetime
import itertools
import os
import pathlib
import uuid

import numpy as np
import torch

from tools import UserError, atomic_write

# ---------------------------------------------------------------------------
# Episode files


def save_episode(directory, episode):
    """Write {key: (T, ...)} as one compressed .npz, atomically. Returns its path."""
    now = datetime.datetime.now().strftime("%Y%m%dT%H%M%SF%f")
    path = pathlib.Path(directory) / f"{now}-{uuid.uuid4().hex}-{len(episode['reward'])}.npz"
    atomic_write(path, lambda file: np.savez_compressed(file, **episode))
    return path


def load_episode(path, layout):
    """Read an episode file and bring it into the layout; unknown keys are ignored.

    Args:
      layout: {key: (shape, dtype)} of one step.
    Returns: {key: (T, ...)}
    Raises ValueError saying what is wrong with the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            episode = {key: file[key] for key in file.files if key in layout}
    except Exception as error:  # zipfile, zlib and NumPy have dozens of their own for a damaged or foreign file
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    if "reward" not in episode or not episode["reward"].ndim or not len(episode["reward"]):
        raise ValueError("holds no reward")
    length = len(episode["reward"])
    steps = np.arange(length)
    episode.setdefault("is_first", steps == 0)
    episode.setdefault("is_terminal", np.zeros(length, bool))
    episode.setdefault("is_last", (steps == length - 1) | episode["is_terminal"].astype(bool))
    for key, (shape, dtype) in layout.items():
        if key not in episode:
            raise ValueError(f"lacks {key}")
        value = episode[key]
        if value.shape[:1] != (length,) or value[0].size != int(np.prod(shape)):
            raise ValueError(f"{key} has shape {value.shape} where {(length, *shape)} was expected")
        if value.dtype.kind not in "biuf" or (dtype == np.uint8 and value.dtype != np.uint8):
            raise ValueError(f"{key} has type {value.dtype} where {np.dtype(dtype)} was expected")
        episode[key] = value.reshape(length, *shape).astype(dtype)
    episode["is_last"][-1] = True  # also where a run was stopped: what follows in a stream is another episode
    return episode


class EpisodeWriter:
    """Collects the steps of environments and writes each episode when it ends.

    The oldest files are deleted so that the directory holds no more than `limit` steps.

    Args:
      directory: where the files go, made if it is not there; count: number of environments; limit: in agent steps.
    """

    def __init__(self, directory, count, limit):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.steps = [[] for _ in range(count)]
        self.limit = limit
        self.files = collections.deque((path, length_of(path)) for path in self.paths())
        self.total = sum(length for _, length in self.files)

    def paths(self):
        """The episode files that exist, oldest first."""
        return sorted(self.directory.glob("*.npz"))

    def add(self, index, step):
        """Append {key: value} of one environment; returns (name, length) of the file that it completes, or None."""
        if step["is_first"]:
            self.steps[index] = []
        self.steps[index].append(step)
        return self.flush(index) if step["is_last"] else None

    def flush(self, index):
        """Write the episode of one environment as far as it went; returns (name, length), or None if there is none."""
        steps, self.steps[index] = self.steps[index], []
        if len(steps) < 2:
            return None
        path = save_episode(self.directory, {key: np.stack([step[key] for step in steps]) for key in steps[0]})
        self.files.append((path, len(steps)))
        self.total += len(steps)
        while self.total > self.limit and len(self.files) > 1:
            oldest, length = self.files.popleft()
            self.total -= length
            oldest.unlink(missing_ok=True)
        return path.name, len(steps)


def length_of(path):
    """The length in steps that a file's name states; 0 if it states none."""
    tail = path.stem.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else 0


# ---------------------------------------------------------------------------
# Steps


def stored_step(layout, obs, actions, index):
    """One environment's observation, reward and flags, and the action that led to them: zeros at is_first."""
    step = {key: obs[key][index] for key in layout if key in obs}
    return step | {key: action[index] * ~obs["is_first"][index] for key, action in actions.items()}


def step_layout(obs_space, act_spec):
    """{key: (shape, dtype)} of a stored step."""
    layout = {key: (space.shape, space.dtype) for key, space in obs_space.items()}
    layout = {key: (shape, np.int32 if dtype.kind == "i" else dtype) for key, (shape, dtype) in layout.items()}
    layout |= {key: ((width,), np.dtype(np.float32)) for key, width in act_spec.widths.items()}
    layout |= {"reward": ((), np.float32), "is_first": ((), bool), "is_last": ((), bool), "is_terminal": ((), bool)}
    return layout


# ---------------------------------------------------------------------------
# Rings of steps


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

    def close_episode(self, name, length):
        """Note that the last `length` steps stand in an episode file, and that the last of them is the episode's."""
        self.data["is_last"][(self.stop - 1) % self.capacity] = True
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

    def close_episode(self, index):
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
        if self.mirror:
            self.mirror.close_episode(index)

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
        for index, stream in enumerate(known):
            index %= len(self.streams)
            if len(known) == len(self.streams):  # else several go into one, at positions of its own
                first = sum(length for _, length in stream["episodes"])
                self.streams[index].rewind(stream["stop"] - first)
            for (name, length), *latent in latents_by_episode(stream):
                episode = self.read(rest.pop(name, None), warn)
                if episode and len(episode["reward"]) == length:
                    self.extend(index, name, episode, latent)
        if len(known) == len(self.streams):
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
            self.extend(min(range(len(self.streams)), key=lambda i: len(self.streams[i])), name, episode)

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
    lengths = [length for _, length in stream["episodes"]]
    cuts = np.cumsum(lengths)[:-1]
    latents = (np.split(stream[key].numpy(), cuts) for key in ("deter", "stoch") if key in stream)
    return zip(stream["episodes"], *latents, strict=True)


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
