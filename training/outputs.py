"""Where a run writes and prints."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from replay.episodes import EpisodeWriter
from training.console import is_printed, warn_at
from training.driver import Episode
from training.logdir import best_return
from training.logger import Logger, NoLogger
from training.progress import Ahead, Progress


class Outputs:
    """The logdir's logger and the lines on the terminal.

    Args:
      config: the whole configuration; step, updates: where the run goes on, 0 for a fresh one.
      ahead: function that returns what the run has before it; mute: True to write no files, as ranks but the first.
    Raises UserError, with nothing written, if an output is not to be had; OSError if the logdir cannot be written.
    """

    def __init__(self, config: Any, step: int, updates: int, ahead: Callable[[], Ahead] = Ahead, mute: bool = False):
        self.config, self.warned = config, False
        self.logdir = pathlib.Path(config.logdir).expanduser()
        self.logger: Any = (
            NoLogger() if mute else Logger(self.logdir, step, config.logger, config.to_dict(), config.explicit)
        )
        self.evaluated = 0  # episodes of the evaluation under way
        self.progress = Progress(config.steps, step, updates, best_return(self.logdir), ahead)

    def close(self) -> None:
        """Close all files and end the progress line."""
        self.progress.close()
        self.logger.close()

    def speaks(self, level: str) -> bool:
        """True if messages of a level are printed."""
        return is_printed(level, self.config.log_level)

    def say(self, level: str, text: str) -> None:
        """Print a line above the progress line, warnings to stderr by their name."""
        if level == "warning":
            warn_at(self.config.log_level, text)
        elif self.speaks(level):
            self.progress.line.message(text)

    def show(self, name: str, step: int, updates: int, share: float | None = None) -> None:
        """Update the progress line: see `Progress.update`."""
        if self.speaks("info"):
            self.progress.update(name, step, updates, share)

    def begin(self, name: str) -> None:
        """Say that something begins that takes long, and lasts until the next `show`."""
        if self.speaks("info"):
            self.progress.begin(name)

    def stage(self, name: str) -> contextlib.AbstractContextManager:
        """Say that the body takes long, in a word for what it does."""
        self.evaluated = 0
        return self.progress.stage(name) if self.speaks("info") else contextlib.nullcontext()

    def acknowledge(self, signal: str, again: bool = False) -> None:
        """Say at once that a signal came, for the first time or again; for its handler."""
        if not self.speaks("info"):
            return
        compiles = self.compiles()
        unit = "update" if compiles or (self.progress.name == "learning" and not self.progress.stages) else "step"
        second = {
            "step": "again: without waiting for an environment that hangs",
            "update": "again: at once, without saving" if compiles else "twice more: at once, without saving",
        }[unit]
        first = f"{'compiling, which can take minutes: ' * compiles}the run saves and ends after this {unit} ({second})"
        late = f"still at this {unit}; once more ends the run at once, without saving"
        self.progress.line.interject(f"{signal}: {late if again else first}")

    def compiles(self) -> bool:
        """True while the first update is compiled, if this is shown."""
        return self.progress.stages[-1:] != [] and self.progress.stages[-1][0] == "compiling"

    def say_restarts(self, envs: Any) -> None:
        """Warn of environments that had to be restarted since the last call."""
        for event in envs.events:
            self.say("warning", event)
        envs.events.clear()

    def watch(self, lengths: np.ndarray, longest: int) -> None:
        """Warn, once, if an episode under way, of lengths (N,), may never end."""
        if lengths.max() > longest and not self.warned:
            self.warned = True
            self.say("warning", f"{endless(longest)}; until one ends there is no return, and it stays in memory")

    def score(self, step: int, mode: str, episode: Episode) -> None:
        """Log a finished episode to scores.jsonl."""
        self.logger.score(step, mode, episode.score, episode.length, **episode.logs)
        if mode == "train":
            self.progress.episode(episode.score)
        else:
            self.evaluated += 1
            self.progress.tell(f"{self.evaluated}/{self.config.eval_episode_num}")
        self.say("debug", f"step {step:,}: {mode} episode of {episode.length} steps, return {episode.score:.1f}")

    def trained(self, step: int, number: int, episode: Episode) -> None:
        """Log the training episode of a number, which ended at a step."""
        self.score(step, "train", episode)
        scalars = {"train_return": episode.score, "train_length": episode.length, "train_episodes": number}
        self.logger.scalars({**scalars, **episode.logs}, step)


def endless(steps: int) -> str:
    """Return what to say of an episode that has taken more than a number of agent steps."""
    return f"an episode has not ended in {steps:,} agent steps: if it never does, --time_limit FRAMES ends it"


class Recorder:
    """Store what a driver meets in the replay, and on disk episode by episode.

    Args:
      replay: Replay; writer: EpisodeWriter.
    Attributes:
      on_file: function (index, first) that hears when an episode of environment `index` stands in a file; `first` is
        true if the step in hand begins another and so is not in it.
    """

    def __init__(self, replay: Any, writer: EpisodeWriter):
        self.replay, self.writer = replay, writer
        self.on_file: Callable[[int, bool], None] = lambda index, first: None

    def __call__(self, index: int, step: dict[str, Any], stored: dict[str, Any] | None) -> None:
        """Store one step of environment `index`."""
        if step["is_first"]:  # what is unfinished then was cut off by the end of its worker
            self.close_episode(index, self.writer.flush(index), True)
        self.replay.add(index, step, stored)
        self.close_episode(index, self.writer.add(index, step))

    def close_episode(self, index: int, file: tuple[str, int] | None, first: bool = False) -> None:
        """Tell the replay that an episode stands in a file (name, length); None for no file. first: see `on_file`."""
        if file:
            self.replay.close_episode(index, *file)
            self.on_file(index, first)

    def flush(self) -> None:
        """Write unfinished episodes as far as they went."""
        for index in range(len(self.replay.streams)):
            self.close_episode(index, self.writer.flush(index))
