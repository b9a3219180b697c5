"""A journal of steps on their way from an actor to the learner: files that grow, one for each episode.

The actor appends a step by one call of write(2), which waits for nobody and has no limit but the disk; the learner
reads behind it, stores what it reads as it stores any step, and removes a file once its steps stand in an episode file.
What is in the journal outlives both: whoever is left, or the next run, makes episode files of it by `recover`.

    {"steps": [[key, dtype, shape], ...], "stored": [...]}   the first line
    length, step, log_* entries as JSON                      and so on
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from replay.episodes import save_episode
from tools import locked

FOLDER = "journal"  # in the logdir
NAME = re.compile(r"(\d{9})-(\d{4})\.steps")
LENGTH = struct.Struct("<I")  # of the log_* entries that follow a step
GIVEN = "_given"  # whether the agent has stored something with a step


class Entry(NamedTuple):
    """A step {key: value} of environment `env`, what the agent stores with it, and the step's log_* entries."""

    env: int
    step: dict[str, Any]
    stored: dict[str, Any] | None
    logs: dict[str, float]


class Journal:
    """Writes steps.

    Args:
      folder: of the files; layout: {key: (shape, dtype)} of a step; stored: the same of what the agent stores with it.
    """

    def __init__(self, folder: pathlib.Path, layout: Mapping[str, Any], stored: Mapping[str, Any]):
        self.folder, self.stored = folder, list(stored)
        heads = {"steps": described(layout), "stored": described(stored)}
        self.head, self.dtype = json.dumps(heads).encode() + b"\n", record_type(heads)
        numbers = [int(match[1]) for match in map(NAME.fullmatch, names(folder)) if match]
        self.number = max(numbers, default=-1)
        self.files: dict[int, Any] = {}

    def add(
        self, index: int, step: Mapping[str, Any], stored: Mapping[str, Any] | None, logs: Mapping[str, float]
    ) -> None:
        """Append a step of environment `index`. Raises OSError where the disk takes no more."""
        if step["is_first"] or index not in self.files:
            self._open(index)
        record = np.zeros((), self.dtype)
        for key, value in step.items():
            record[key] = value
        for key in self.stored if stored else ():
            record[key] = stored[key]  # type: ignore[index]
        record[GIVEN] = stored is not None
        text = json.dumps(logs).encode() if logs else b""
        self.files[index].write(LENGTH.pack(len(text)) + record.tobytes() + text)

    def _open(self, index):
        if index in self.files:
            self.files[index].close()
        self.number += 1
        path = self.folder / f"{self.number:09d}-{index:04d}.steps"
        self.files[index] = open(path, "ab", buffering=0)  # noqa: SIM115 - it stays open
        self.files[index].write(self.head)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


class Reader:
    """Reads a journal behind its writer.

    Args:
      folder: of the files.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.at: dict[str, int] = {}  # {file: position up to which it was read}
        self.filed_to: dict[str, int] = {}  # and up to which its steps stand in episode files
        self.types: dict[str, tuple[np.dtype, list[str]]] = {}
        self.now: tuple[str, int, bool] | None = None  # of the step in hand: file, position there, whether it is a last

    def entries(self) -> Iterator[Entry]:
        """Yield what was written since the last call."""
        for name in sorted(filter(NAME.fullmatch, names(self.folder))):
            yield from self._entries(name)
        self.now = None

    def _entries(self, name):
        match = NAME.fullmatch(name)
        assert match
        with open(self.folder / name, "rb") as file:
            if name not in self.types:
                head = file.readline()
                if not head.endswith(b"\n"):
                    return
                heads = json.loads(head)
                self.types[name] = record_type(heads), [key for key, *_ in heads["stored"]]
                self.at[name] = len(head)
            file.seek(self.at[name])
            content = file.read()
        dtype, stored = self.types[name]
        position = 0
        while True:
            begin = position + LENGTH.size
            if begin > len(content):
                return
            (more,) = LENGTH.unpack_from(content, position)
            end = begin + dtype.itemsize + more
            if end > len(content):  # it is being written
                return
            record = np.frombuffer(content, dtype, 1, begin)[0]
            logs = json.loads(content[begin + dtype.itemsize : end]) if more else {}
            values = {key: record[key] for key in dtype.names or () if key not in (GIVEN, *stored)}
            given = {key: record[key] for key in stored} if record[GIVEN] else None
            self.now = name, self.at[name], bool(record["is_last"])
            self.at[name] += end - position
            position = end
            yield Entry(int(match[2]), values, given, logs)

    def filed(self, index: int, first: bool) -> None:
        """Note that the steps of an environment so far stand in an episode file; remove what is of no use any more.

        first: True if the step in hand begins an episode, and so is not among them.
        """
        own = sorted(name for name in self.at if int(name.split("-")[1][:4]) == index)
        if own and self.now and self.now[0] == own[-1] and self.now[2]:
            own.append("")  # the actor is done with the newest, too
        for name in own[:-1]:
            self._remove(name)
        if own and own[-1] and not (first and self.now and self.now[0] == own[-1]):
            self.filed_to[own[-1]] = self.at[own[-1]]

    def _remove(self, name):
        (self.folder / name).unlink(missing_ok=True)
        for kept in (self.at, self.types, self.filed_to):
            kept.pop(name, None)


def recover(logdir: pathlib.Path, filed: Mapping[str, int] | None = None) -> int:
    """Make episode files of what is left of a journal, and remove it; return the number of steps.

    filed: {file: position up to which its steps stand in episode files}. Raises UserError if an actor is at work there.
    """
    folder, count = logdir / FOLDER, 0
    if not folder.is_dir():
        return 0
    with locked(folder):
        reader = Reader(folder)
        for name in sorted(filter(NAME.fullmatch, names(folder))):
            reader.at.clear()
            begin = (filed or {}).get(name, 0)
            steps = []
            for entry in reader._entries(name):
                if reader.now and reader.now[1] >= begin:
                    steps.append(entry.step)
            if len(steps) > 1 or (steps and begin):
                (logdir / "train_eps").mkdir(exist_ok=True)
                save_episode(logdir / "train_eps", {key: np.stack([step[key] for step in steps]) for key in steps[0]})
                count += len(steps)
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return count


def described(layout: Mapping[str, Any]) -> list[list[Any]]:
    """Return {key: (shape, dtype)} as JSON has it."""
    return [[key, np.dtype(dtype).str, list(shape)] for key, (shape, dtype) in layout.items()]


def record_type(heads: Mapping[str, Any]) -> np.dtype:
    """Return the type of a record, from what `described` says of steps and of what is stored with them."""
    fields = [(key, dtype, tuple(shape)) for part in ("steps", "stored") for key, dtype, shape in heads[part]]
    return np.dtype([*fields, (GIVEN, "?")])


def names(folder: pathlib.Path) -> list[str]:
    """Return the names of the files in a folder; nothing if it does not exist."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
