"""What a run has stored, dealt among the ranks that go on from it, as many as there were or others."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from replay.sampling import STATE, Replay
from tools import misfit

State = dict[str, Any]  # what `Replay.state_dict` returns


def deal(
    states: Sequence[State | None],
    paths: Sequence[pathlib.Path],
    rank: int,
    count: int,
    streams: int,
    replay: Replay,
) -> tuple[State | None, list[pathlib.Path]]:
    """Return what the replay of one rank is to be restored from, see `Replay.restore`.

    Streams keep their places if there are as many as before; otherwise the episodes of each are dealt one by one. So
    are the files that no state lists.

    Args:
      states: of the ranks that saved them, None for one that cannot be read; paths: the episode files that exist.
      rank, count: of the replay; streams: of all ranks together; replay: of this rank.
    """
    if len(states) == count == 1:
        return states[0], list(paths)
    sound = [state if state and is_sound(state) else None for state in states]
    known = [stream for state in sound if state for stream in state["streams"]]
    whole = [state for state in sound if state]
    if len(whole) == len(states) and len(known) == streams:
        own = slice_of(whole, rank, count, replay)
    else:
        own = {"streams": [every(stream, rank, count) for stream in known], "fresh": [], "queued": [0] * len(known)}
        own["rng"] = replay.rng.bit_generator.state
    mine = {name for stream in own["streams"] for name, _ in stream["episodes"]}
    listed = {name for stream in known for name, _ in stream["episodes"]}
    rest = {path.name for path in [path for path in paths if path.name not in listed][rank::count]}
    return (own if known else None), [path for path in paths if path.name in mine | rest]


def is_sound(state: State) -> bool:
    """True if a state has the form of one, and a row of what is stored for each step."""
    if misfit(state, STATE):
        return False
    lengths = [sum(length for _, length in stream["episodes"]) for stream in state["streams"]]
    tensors = [[value for value in stream.values() if isinstance(value, torch.Tensor)] for stream in state["streams"]]
    return all(len(value) == length for length, own in zip(lengths, tensors, strict=True) for value in own)


def slice_of(states: Sequence[State], rank: int, count: int, replay: Replay) -> State:
    """Return a rank's part of streams that keep their places: those of the ranks that saved them, one after another."""
    if len(states) == count:
        return states[rank]
    own, bases = len(replay.streams), np.cumsum([0, *(len(state["streams"]) for state in states)])
    first = rank * own
    fresh = [(base + i, at) for base, state in zip(bases[:-1], states, strict=True) for i, at in state["fresh"]]
    return {
        "streams": [stream for state in states for stream in state["streams"]][first : first + own],
        "fresh": [(int(i) - first, at) for i, at in fresh if first <= i < first + own],
        "queued": [at for state in states for at in state["queued"]][first : first + own],
        "rng": states[rank]["rng"] if rank < len(states) else replay.rng.bit_generator.state,
    }


def every(stream: State, rank: int, count: int) -> State:
    """Return a stream with every `count`-th of its episodes, and of what is stored with their steps."""
    lengths = [length for _, length in stream["episodes"]]
    numbers = np.repeat(np.arange(len(lengths)), lengths)  # of the episode that a step is of
    rows = torch.from_numpy(numbers % count == rank)
    kept = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in stream.items()}
    return kept | {"episodes": stream["episodes"][rank::count], "stop": sum(lengths[rank::count])}
