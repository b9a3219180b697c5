"""Logging: metrics and scores as JSON lines, and means of metrics."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools import NonFiniteLoss
from training.boards import TensorBoard, WeightsAndBiases
from training.videos import gif


class Logger:
    """Write metrics.jsonl, scores.jsonl and the named `outputs` in a logdir. Existing files are appended to."""

    def __init__(self, logdir, step=0, outputs=("tensorboard",), config=None, chosen=()):
        """
        Args:
          step: at which a resumed run continues; TensorBoard hides what was logged later. 0 for a fresh run.
          outputs: any of "tensorboard" and "wandb", which get metrics and videos besides the JSON lines.
          config: nested dict of the run's settings, for the outputs to show; chosen: dotted keys that the user set.
        Raises UserError if wandb is not installed, before anything is written, or if it refuses the run.
        """
        logdir = Path(logdir)
        kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
        names = sorted(set(outputs), reverse=True)  # wandb may fail, so it comes first, before anything is written
        self._outputs: list[Any] = [kinds[name](logdir, step, config, chosen) for name in names]
        logdir.mkdir(parents=True, exist_ok=True)
        self._metrics = _JsonLines(logdir / "metrics.jsonl")
        self._scores = _JsonLines(logdir / "scores.jsonl")
        self._pending = {}

    def scalars(self, values, step):
        """Buffer {name: number, or array or tensor of one number} for the next flush, merged with others of `step`."""
        numbers = {name: _plain(value) for name, value in values.items()}
        for name, number in numbers.items():
            if not isinstance(number, (int, float)):
                raise TypeError(f"metric {name} must be a number, got {number!r}")
        self._pending.setdefault(int(step), {}).update(numbers)

    def video(self, name, frames, step, fps=20):
        """Write frames, uint8 (T,H,W,C) with C 1 or 3, to the outputs as a GIF; return its bytes."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3):
            raise ValueError(f"video {name}: expected uint8 (T,H,W,1 or 3), got {frames.dtype} {frames.shape}")
        encoded = gif(frames[..., 0] if frames.shape[-1] == 1 else frames, fps)
        for output in self._outputs:
            output.video(name, encoded, frames.shape[1:], int(step))
        return encoded

    def text(self, name, text, step):
        """Write a text in Markdown to the outputs."""
        for output in self._outputs:
            output.text(name, text, int(step))

    def audio(self, name, path, step):
        """Write the sound of a WAV file to the outputs."""
        for output in self._outputs:
            output.audio(name, path, int(step))

    def score(self, step, mode, score, length, **extra):
        """Write a finished episode to scores.jsonl immediately. mode: "train" or "eval"; extra: numbers or text."""
        self._scores.write({"step": step, "mode": mode, "score": score, "length": length, **extra})

    def flush(self):
        """Write the pending scalars: a line of metrics.jsonl for each step, and the curves of the outputs."""
        for step, numbers in self._pending.items():
            self._metrics.write({"step": step, **numbers})
            for output in self._outputs:
                output.scalars(numbers, step)
        self._pending = {}
        for output in self._outputs:
            output.flush()

    def close(self):
        """Flush and close all files, those that a full disk spares as well."""
        with contextlib.ExitStack() as stack:
            for file in (self._scores, self._metrics, *self._outputs):
                stack.callback(file.close)
            self.flush()


class NoLogger:
    """Write nothing, with the methods of a Logger: what all ranks of a run know is written by the first."""

    def scalars(self, values, step): ...

    def video(self, name, frames, step, fps=20): ...

    def score(self, step, mode, score, length, **extra): ...

    def flush(self): ...

    def close(self): ...


class _JsonLines:
    """A file of one JSON object per line. A kill can truncate only the last line; opening removes such a line.

    A last line that is whole, as an editor may leave it, only lacks its end, and gets it.
    """

    def __init__(self, path):
        # Unbuffered, so that a line is one call of write(2).
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if _is_object(content[end:]):
            self._file.write(b"\n")
        else:
            self._file.truncate(end)

    def write(self, entries):
        """Write {name: number or text} as a line; nan, inf and -inf become text, as JSON has no such numbers."""
        plain = {name: _plain(value) for name, value in entries.items()}
        strict = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
        line = json.dumps(strict, allow_nan=False).encode() + b"\n"
        written = self._file.write(line)
        if written < len(line):  # what a full disk takes of a line is no line
            self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        self._file.close()


def _is_object(line):
    """True if a line holds a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _plain(value):
    """Return the Python number in an array or tensor of one element; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


class Metrics:
    """Average the metrics of updates between two logs.

    They stay on the device until they are fetched: on CPU at every update, elsewhere at every 50th.
    """

    def __init__(self):
        self.pending, self.sums, self.counts = [], {}, {}

    def add(self, metrics, step):
        """Add {name: 0-d tensor} of one update, made at `step` environment frames."""
        if not metrics:
            return
        values = torch.stack([value.float() for value in metrics.values()])
        self.pending.append((step, list(metrics), values))
        if len(self.pending) >= (1 if values.device.type == "cpu" else 50):
            self.drain()

    def drain(self):
        """Fetch pending metrics. Raises NonFiniteLoss with the step and the terms if a loss is not finite."""
        pending, self.pending = self.pending, []
        for step, names, values in pending:
            values = dict(zip(names, values.tolist(), strict=True))
            terms = {name: value for name, value in values.items() if "loss" in name or name.endswith("grad_norm")}
            if not all(map(math.isfinite, terms.values())):
                shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
                raise NonFiniteLoss(f"the loss is not finite at step {step}: {shown}")
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self):
        """Return {name: mean since the last call}, each over the updates that reported it."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
