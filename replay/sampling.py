"""Sample batches of experience from the steps in memory; save and restore them."""

from __future__ import annotations

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ops.collectives import count, place
from replay import memory
from replay.ahead import Lookahead
from replay.episodes import Arrays, Layout, Step, check_keys, load_episode
from replay.memory import step_bytes
from replay.npz import steps_in
from replay.rings import Mirror, Stream, rows_of
from tools import UserError, accepts, derive_seed, misfit

Places = list[tuple[int, int]]  # (stream, position of a window's first step)
SMALL_STEP = 4096  # bytes; memory for smaller steps is cheap; see room_for_run


class Replay:
    """Sample windows of consecutive steps of one stream.

    `windows` selects the distribution:
      fresh: windows that were never sampled come first, each once and without overlap; the rest of a batch is uniform
        over all windows, across the ends of episodes (DreamerV3).
      uniform: the same without priority of fresh ones (its 2023 form).
      episode: a finished episode, then a window of it, each uniformly (PlaNet, Dreamer).
      episode_ends: the same, but windows that would overlap the end count as the last one (DreamerV2).
      episode_but_last: as episode, but no window reaches the episode's last step (Dreamer's code).

    With each step an agent may store more, such as the latest latent state. A window then begins with `context` steps
    of which only what is stored with them is used.

    Args:
      layout: {key: (shape, dtype)} of one step; stored: the same of what the agent stores with it.
      streams: number of environments; capacity: agent steps over all streams.
      length: trained steps in a sequence (T); context: steps that precede them.
      seed: of the sampling.
      device: that has a copy of all steps, to sample from, or None; see `resident`.
      ahead: device that the next batch may be copied to before it is asked for, or None; see `look_ahead`.
    Attributes:
      memory: the Need of all its steps; tight: a warning if this leaves little of the memory, or None.
    Raises UserError for a capacity that is less than a window, or does not fit into memory.
    """

    def __init__(
        self,
        layout: Layout,
        stored: Layout,
        *,
        streams: int,
        capacity: int,
        length: int,
        context: int = 0,
        seed: int = 0,
        windows: str = "fresh",
        device: torch.device | None = None,
        ahead: torch.device | None = None,
    ):
        self.layout = layout if isinstance(layout, dict) else dict(layout)  # a StepLayout stays one
        self.stored = dict(stored)
        self.length, self.context, self.capacity, self.windows = length, context, capacity, windows
        self.window = length + context
        shares = [(capacity + index) // streams for index in range(streams)]  # their sum is the capacity
        self.spared = 1 if windows == "episode_but_last" else 0  # steps at the end of an episode
        if shares[0] < self.window + self.spared:
            raise UserError(f"--dataset_size leaves {shares[0]} steps a stream, too few for windows of {self.window}")
        check_keys(self.layout)
        self.memory = memory.need(self.layout | self.stored, capacity)
        self.tight = memory.check(self.memory)
        self.streams = [Stream(self.layout, self.stored, share, self.window + self.spared) for share in shares]
        self.mirror = Mirror(self.streams, device) if device else None
        self.ahead = Lookahead(ahead) if ahead else None
        self.fresh: collections.deque[tuple[int, int]] = collections.deque()
        self.queued = [0] * streams
        self.rng = np.random.default_rng(seed)

    def __len__(self):
        return sum(len(stream) for stream in self.streams)

    def ready(self) -> bool:
        """True if a window can be sampled."""
        if self.windows.startswith("episode"):
            return any(stream.whole_episodes() for stream in self.streams)
        return any(len(stream) >= self.window for stream in self.streams)

    def add(self, index: int, step: Step, stored: Mapping[str, Any] | None = None) -> None:
        """Append one step {key: value} to stream `index`, with what the agent stores with it, or zeros."""
        self.changes()
        if step["is_first"] and len(self.streams[index]):  # even if a worker died after a single step
            self.end_episode(index)
        self.streams[index].append({**step, **(stored or dict.fromkeys(self.stored, 0))})
        if self.windows == "fresh":
            self.queue_fresh(index)

    def extend(self, index: int, name: str, episode: Arrays, stored: Arrays | None = None) -> None:
        """Append {key: (T, ...)} of an episode file to stream `index`, with what is stored, or zeros; not as fresh."""
        self.changes()
        length = len(episode["reward"])
        zeros = {key: np.zeros((length, *shape), dtype) for key, (shape, dtype) in self.stored.items()}
        self.streams[index].extend({**episode, **zeros, **(stored or {})})
        self.close_episode(index, name, length)
        self.queued[index] = self.streams[index].stop

    def queue_fresh(self, index):
        if self.streams[index].stop - self.queued[index] >= self.window:
            self.fresh.append((index, self.queued[index]))
            self.queued[index] += self.window

    def sample(self, batch: int, fresh: bool = True) -> tuple[dict[str, Any], Places]:
        """Sample `batch` windows, fresh ones first unless `fresh` is false.

        Returns:
          {key: (B, context + T, ...)} arrays, or tensors on `device` if there is one, and of what is stored that of the
          context steps alone, {key: (B, context, ...)}; and their places: list of (stream, position).
        """
        taken = self.ahead.take(batch, fresh) if self.ahead else None
        places, out = taken or (self.draw_places(batch, fresh), {})
        lengths = {key: self.context if key in self.stored else self.window for key in self.streams[0].data}
        return out | self.gather(places, {key: n for key, n in lengths.items() if key not in out}), places

    def look_ahead(self, batch):
        """Take the observations of `sample(batch)` early, if it is likely to come next.

        What is drawn, and what it shows, are bit for bit what they would have been.
        """
        if self.ahead and self.ahead.due():
            fresh, state = list(self.fresh), self.rng.bit_generator.state
            places = self.draw_places(batch, fresh=True)
            observations = self.gather(places, dict.fromkeys(self.layout, self.window))
            self.ahead.keep((batch, True), places, observations, functools.partial(self.undraw, fresh, state))

    def undraw(self, fresh, state):
        """Go back to what was fresh, and to the state of the generator."""
        self.fresh = collections.deque(fresh)
        self.rng.bit_generator.state = state

    def changes(self):
        """Forget what was taken early, before steps or their ends are written."""
        if self.ahead:
            self.ahead.changed()

    def draw_places(self, batch, fresh):
        """Draw the places of `batch` windows."""
        draw = self.draw_episode if self.windows.startswith("episode") else self.draw
        places: list[tuple[int, int]] = []
        while len(places) < batch:
            places.append((fresh and self.next_fresh()) or draw())
        return places

    def gather(self, places, lengths):
        """Return {key: (B, n, ...)} of the first n steps of windows, for {key: n}: arrays, or the mirror's tensors."""
        if self.mirror:
            return self.mirror.gather(places, lengths)
        data = self.streams[0].data
        out = {key: np.empty((len(places), n, *data[key].shape[1:]), data[key].dtype) for key, n in lengths.items()}
        for row, (index, position) in enumerate(places):
            self.streams[index].gather(position, out, row)
        return out

    def next_fresh(self):
        while self.fresh:
            index, position = self.fresh.popleft()
            stream = self.streams[index]
            if stream.start <= position <= stream.stop - self.window:
                return index, position
        return None

    def draw(self):
        """Draw a window (stream, position) uniformly."""
        index, number = self.choose([max(0, len(stream) - self.window + 1) for stream in self.streams])
        return index, self.streams[index].start + number

    def draw_episode(self):
        """Draw an episode uniformly, then a window (stream, position) of it, uniformly except for `episode_ends`."""
        index, number = self.choose([len(stream.whole_episodes()) for stream in self.streams])
        begin, length = self.streams[index].whole[number]
        last = length - self.window - self.spared
        beyond = self.window if self.windows == "episode_ends" else 0
        return index, begin + min(int(self.rng.integers(last + 1 + beyond)), last)

    def choose(self, counts):
        """Draw (stream, number) uniformly, with `counts` numbers in each stream."""
        bounds = np.cumsum(counts)
        number = int(self.rng.integers(bounds[-1]))
        index = int(np.searchsorted(bounds, number, side="right"))
        return index, number - int(bounds[index - 1] if index else 0)

    def refresh(self, places: Places, stored: Mapping[str, torch.Tensor]) -> None:
        """Write back what the agent stores with the trained steps: {key: tensor (B, T, ...)}.

        A GPU may be computing it still; the next batch is taken meanwhile.
        """
        self.look_ahead(len(places))
        rows = rows_of(self.streams, places, np.arange(self.context, self.window)).reshape(-1)
        rows, first = np.unique(rows[::-1], return_index=True)
        newest = len(places) * self.length - 1 - first  # windows may overlap: the last one's is kept
        flat = {key: value.flatten(0, 1) for key, value in stored.items()}
        if self.mirror:
            self.mirror.write(rows, newest, flat)
            return
        arrays = {key: value.cpu().numpy() for key, value in flat.items()}
        bases = np.cumsum([0, *(stream.capacity for stream in self.streams)])
        cuts = np.searchsorted(rows, bases)  # the rows are sorted, so that a stream's stand together
        for stream, base, part in zip(self.streams, bases, map(slice, cuts, cuts[1:]), strict=False):
            for key, value in arrays.items():
                stream.data[key][rows[part] - base] = value[newest[part]]

    def close_episode(self, index: int, name: str, length: int) -> None:
        """Record that the last `length` steps of stream `index` are in an episode file."""
        self.streams[index].close_episode(name, length)
        self.end_episode(index)

    def end_episode(self, index):
        """Mark the newest step of stream `index` as its episode's last."""
        self.changes()
        self.streams[index].end_episode()
        if self.mirror:
            self.mirror.end_episode(index)

    # -- resuming

    def names(self) -> set[str]:
        """Return the names of the episode files that a state saved now would need."""
        return {name for stream in self.streams for name in stream.names()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `restore` needs besides the episode files, in types that `torch.load` reads with weights_only."""
        self.changes()
        if self.mirror:
            self.mirror.pull()
        return {
            "streams": [stream.state_dict() for stream in self.streams],
            "fresh": list(self.fresh),
            "queued": list(self.queued),
            "rng": self.rng.bit_generator.state,
        }

    def restore(
        self, saved: Mapping[str, Any] | None, paths: Iterable[pathlib.Path], warn: Callable[[str], None]
    ) -> None:
        """Fill empty streams from episode files; with `saved`, restore the state that `state_dict` returned.

        Files that `saved` does not list are appended, with zeros stored. What does not fit this replay is left alone.

        Args:
          saved: what `state_dict` returned, or None.
          paths: the episode files that exist, oldest first.
          warn: function of one line, called for each file that cannot be used.
        """
        refused: dict[str, list[pathlib.Path]] = {}
        read = functools.partial(self.read, refused=refused)
        reason = misfit(saved, STATE) or self._misfit(saved) if saved else None
        if saved and reason:
            warn(f"what the replay stored is damaged ({reason}): its latent states start anew")
            saved = None
        rest = {path.name: path for path in paths}
        known = saved["streams"] if saved else []
        same = len(known) == len(self.streams)  # otherwise each episode goes to the emptiest stream
        if same:
            for stream, old in zip(self.streams, known, strict=True):
                stream.rewind(old["stop"] - sum(length for _, length in old["episodes"]))
        pieces = [(index, *piece) for index, stream in enumerate(known) for piece in stored_by_episode(stream)]
        if not same:
            pieces.sort(key=lambda piece: piece[1])  # oldest first, as those may be overwritten
        gone = 0
        for index, (name, length), stored in pieces:
            path = rest.pop(name, None)
            gone += path is None
            episode = read(path)
            if episode and len(episode["reward"]) == length:
                stored = {key: value for key, value in stored.items() if key in self.stored}
                self.extend(index if same else self.emptiest(), name, episode, stored)
        if gone:
            warn(f"{gone} of the replay's episode files are not there any more")
        if saved and same:
            self.fresh.extend(map(tuple, saved["fresh"]))
            self.queued = [min(old, s.stop) for old, s in zip(saved["queued"], self.streams, strict=True)]
            self.rng.bit_generator.state = saved["rng"]
        self.load(rest.values(), read)
        for reason, files in refused.items():
            more = [f"{path.name}" for path in files[1:3]] + [f"{len(files) - 3} more"] * (len(files) > 3)
            warn(f"skipped {', '.join([str(files[0]), *more])}: {reason}")

    def _misfit(self, saved):
        """Return why a saved state cannot be one of this replay's agent, or None."""
        for stream in saved["streams"]:
            lengths = [length for _, length in stream["episodes"]]
            tensors = {key: value for key, value in stream.items() if isinstance(value, torch.Tensor)}
            if min(lengths, default=1) < 1 or stream["stop"] < sum(lengths):
                return "lengths of episodes"
            for key, value in tensors.items():
                shape, dtype = self.stored.get(key, (value.shape[1:], None))
                kind = torch.from_numpy(np.empty(0, dtype)).dtype if dtype else value.dtype
                if value.shape != (sum(lengths), *shape) or value.dtype != kind:
                    return f"shape or type of {key}"
        count = len(saved["streams"])
        same = len(saved["queued"]) == count and all(0 <= index < count for index, _ in saved["fresh"])
        return None if same else "number of streams"

    def load(self, paths, read):
        """Append the newest episode files that fit, oldest first, each to the emptiest stream."""
        episodes, room = [], self.capacity - len(self)
        for path in reversed(list(paths)):
            episode = read(path) if room > 0 else None
            if episode:
                episodes.append((path.name, episode))
                room -= len(episode["reward"])
        for name, episode in reversed(episodes):
            self.extend(self.emptiest(), name, episode)

    def emptiest(self):
        """Return the index of the stream with the fewest steps."""
        return min(range(len(self.streams)), key=lambda index: len(self.streams[index]))

    def read(self, path, refused):
        """Return the episode of a file; if it cannot be used, note {reason: [path]} in `refused` and return None."""
        if path is None:
            return None
        try:
            return load_episode(path, self.layout)
        except ValueError as error:
            refused.setdefault(str(error), []).append(path)


STATE = {  # what `Replay.state_dict` returns; see `tools.misfit`
    "streams": [{"episodes": [(str, int)], "stop": int, str: int | list | tuple | torch.Tensor}],
    "fresh": [(int, int)],
    "queued": [int],
    "rng": lambda state: accepts(functools.partial(setattr, np.random.default_rng().bit_generator, "state"), state),
}


def make_replay(
    config: Any, layout: Layout, agent: Any, paths: Sequence[Sequence[pathlib.Path]], device: torch.device
) -> Replay:
    """Return an empty replay for a run.

    It has room for the whole run and the episode files of offline_traindir, or dataset_size steps if that is less.

    Args:
      config: a rank's own, see `training.distributed.share`.
      layout: {key: (shape, dtype)} of a step; agent: with `stored` and `context`.
      paths: the episode files of offline_traindir, and those that the run has written; device: of the agent.
    """
    offline, own = (sum(map(steps_in, group)) for group in paths)
    room = max(room_for_run(config, layout), own) + offline
    capacity = min(config.dataset_size, -(-room // count()))
    there = resident(device, {**layout, **agent.stored}, capacity)
    return Replay(
        layout,
        agent.stored,
        streams=config.envs,
        capacity=capacity,
        length=config.batch_length,
        context=agent.context,
        seed=derive_seed(config.seed, 4, *place()),
        windows=config.replay_window,
        device=there,
        ahead=device if device.type == "cuda" and not there else None,
    )


def stored_by_episode(stream):
    """Return ((name, length), {key: (length, ...)} of what was stored) for each episode of a saved stream."""
    if not stream["episodes"]:  # np.split returns one piece for an empty array
        return []
    cuts = np.cumsum([length for _, length in stream["episodes"]])[:-1]
    parts = {key: np.split(value.numpy(), cuts) for key, value in stream.items() if isinstance(value, torch.Tensor)}
    return [
        (episode, {key: part[number] for key, part in parts.items()})
        for number, episode in enumerate(stream["episodes"])
    ]


def room_for_run(config: Any, layout: Layout) -> int:
    """Return an upper bound of the steps that the run of a configuration adds to the replays of all ranks.

    An episode has one step more than actions. A tenth more is enough for all but very short episodes, twice as many
    for any; the latter is used if steps are small, as those of bandits are.
    """
    room = 2.0 if step_bytes(layout) < SMALL_STEP else 1.1
    actions = config.steps / config.action_repeat + config.prefill
    return math.ceil(room * actions) + config.envs * count() * (config.batch_length + 2)


def resident(device: torch.device, layout: Layout, capacity: int) -> torch.device | None:
    """Return the device for a copy of `capacity` steps; None on CPU, or if it would exceed half of the free memory."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return device if step_bytes(layout) * capacity <= free / 2 else None
