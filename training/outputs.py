"""Where a run writes and prints."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np

from replay.episodes import EpisodeWriter
from training.driver import Episode
from training.logger import Logger, Progress

LEVELS = ("debug", "info", "warning", "error")


class Outputs:
    """The logdir's logger and the lines on the terminal.

    Args:
      config: the whole configuration; step, updates: where the run goes on, 0 for a fresh one.
    Raises UserError, with nothing written, if an output is not to be had; OSError if the logdir cannot be written.
    """

    def __init__(self, config: Any, step: int, updates: int):
        self.config, self.warned = config, False
        self.logdir = pathlib.Path(config.logdir).expanduser()
        self.logger = Logger(self.logdir, step, config.logger, config.to_dict(), config.explicit)
        self.progress = Progress(config.steps, step=step, updates=updates)

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
            self.progress.message(text)

    def show(self, step: int, updates: int, last_return: float | None) -> None:
        """Update the progress line."""
        if self.speaks("info"):
            self.progress.update(step, updates, last_return)

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
        self.say("debug", f"step {step:,}: {mode} episode of {episode.length} steps, return {episode.score:.1f}")


def is_printed(level: str, least: str) -> bool:
    """True if messages of a level are printed where `log_level` is `least`."""
    return LEVELS.index(level) >= LEVELS.index(least)


def warn_at(least: str, text: str) -> None:
    """Print a warning to stderr, unless `log_level` is above that."""
    if is_printed("warning", least):
        print(f"dreamer.py: warning: {text}", file=sys.stderr)


def endless(steps: int) -> str:
    """Return what to say of an episode that has taken more than a number of agent steps."""
    return f"an episode has not ended in {steps:,} agent steps: if it never does, --time_limit FRAMES ends it"


class Recorder:
    """Store what a driver meets in the replay, and on disk episode by episode.

    Args:
      replay: Replay; writer: EpisodeWriter.
    """

    def __init__(self, replay: Any, writer: EpisodeWriter):
        self.replay, self.writer = replay, writer

    def __call__(self, index: int, step: dict[str, Any], stored: dict[str, Any] | None) -> None:
        """Store one step of environment `index`."""
        if step["is_first"]:  # what is unfinished then was cut off by the end of its worker
            self.close_episode(index, self.writer.flush(index))
        self.replay.add(index, step, stored)
        self.close_episode(index, self.writer.add(index, step))

    def close_episode(self, index: int, file: tuple[str, int] | None) -> None:
        """Tell the replay that an episode stands in a file (name, length); None for no file."""
        if file:
            self.replay.close_episode(index, *file)

    def flush(self) -> None:
        """Write unfinished episodes as far as they went."""
        for index in range(len(self.replay.streams)):
            self.close_episode(index, self.writer.flush(index))
