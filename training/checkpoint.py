"""Checkpoints: reading and writing them, and whether a run may go on from one."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tools import UserError, atomic_write, misfit
from training.archive import check_archive
from training.rng import fits_generator, fits_global_generators

NUMBER = int | float
MOST_RANKS = 65536
FILES = "text.tokenizer", "text.embeddings"
CLOCK = {"next": NUMBER, "step?": NUMBER}


def is_count(value: Any) -> bool:
    """True for 0, 1, 2, ..."""
    return type(value) is int and value >= 0


LEARNED = {  # what any checkpoint has; see `tools.misfit`
    "agent": {str: object},
    "counters": {"agent_steps": is_count, "updates": is_count, "episodes": is_count},
    "kind?": str,
    "task?": str,
    "action_repeat?": is_count,
    "files?": {str: str},
}
RESUMED = LEARNED | {  # and what a run needs to go on
    "clocks": {
        "ratio": {
            "start": int | None,
            "done": int,
            "pending?": int,
            "step?": NUMBER,
            "ratio?": NUMBER,
            "finished?": bool,
        },
        **dict.fromkeys(("log", "eval", "save"), CLOCK),
    },
    "rng": fits_global_generators,
    "random": fits_generator,
    "replay": lambda name: isinstance(name, str) and re.fullmatch(r"replay-\d+(-0)?\.pt", name),
    "ranks?": lambda count: is_count(count) and 0 < count <= MOST_RANKS,
}


def load_checkpoint(path: pathlib.Path, form: Mapping[str, Any] = LEARNED) -> dict[str, Any]:
    """Read a checkpoint to CPU memory, and prove it: its bytes, its form, and that its numbers are finite.

    Raises UserError if it is missing, damaged, of another form, or if what was learned is no number any more.
    """
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle have many of their own for what they refuse
        raise UserError(f"{path} cannot be loaded: {reason_of(error)}{remedy(path, error)}") from None
    if not isinstance(saved, dict) or "agent" not in saved:
        raise UserError(f"{path} cannot be loaded: it is no checkpoint of this project")
    reason = misfit(saved, form) or not_finite(saved["agent"], "agent")
    if reason:
        raise UserError(f"{path} cannot be loaded: {reason}")
    return saved


def load_stored(path: pathlib.Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Read what a replay saved beside a checkpoint, or return None, after `warn(line)`, if it cannot be read.

    Its tensors lie in the file still, which is not copied to memory as a whole.
    """
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = "it is gone" if isinstance(error, FileNotFoundError) else reason_of(error)
        warn(f"{path}: {reason}: the replay's latent states start anew")
        return None


def load_states(
    logdir: pathlib.Path, saved: Mapping[str, Any], warn: Callable[[str], None]
) -> list[dict[str, Any] | None]:
    """Read what the replays of all ranks saved beside a checkpoint; see `load_stored`."""
    count, updates = saved.get("ranks", 1), int(re.findall(r"\d+", saved["replay"])[0])  # older ones had one
    return [load_stored(logdir / stored_file(updates, count, rank), warn) for rank in range(count)]


def reason_of(error: Exception) -> str:
    """Return in a few words why a file could not be read."""
    if isinstance(error, OSError):
        return "no such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
    if isinstance(error, ValueError):
        return str(error)
    return "it is no checkpoint of this project: it holds more than numbers, text and tensors, and code is not run"


def remedy(path: pathlib.Path, error: Exception) -> str:
    """Return what to do about a damaged checkpoint, as the end of a line."""
    if not isinstance(error, ValueError) or path.name != "latest.pt":
        return ""
    return ": put a copy of it there, or remove it to begin at step 0 with the episodes that are there"


def not_finite(tree: Any, name: str) -> str | None:
    """Return a line that names the first tensor of a tree that is not finite, or None."""
    if isinstance(tree, Mapping):
        return next(filter(None, (not_finite(value, f"{name}.{key}") for key, value in tree.items())), None)
    if isinstance(tree, torch.Tensor) and tree.is_floating_point() and not tree.isfinite().all():
        return f"{name} is not finite: what it had learned is lost"
    return None


def save_checkpoint(logdir: pathlib.Path, checkpoint: dict[str, Any], stored: Any, ranks: Any, updates: int) -> None:
    """Write latest.pt, and what the replay stores to a file of its own beside it, each atomically.

    Each of the `training.distributed.Ranks` writes the latter, and the first of them the former when all have done so.
    Raises OSError where the logdir cannot take them; what was there before is still good then.
    """
    atomic_save(logdir / stored_file(updates, ranks.count, ranks.rank), stored)
    ranks.agree()
    if ranks.rank == 0:
        atomic_save(logdir / "latest.pt", checkpoint)
    ranks.agree()  # before any rank removes what the checkpoint before needs
    if ranks.rank == 0:
        kept = {stored_file(updates, ranks.count, rank) for rank in range(ranks.count)}
        for old in logdir.glob("replay-*.pt"):
            if old.name not in kept:
                old.unlink(missing_ok=True)


def stored_file(updates: int, ranks: int, rank: int) -> str:
    """Return the name of the file of what a rank's replay stored when a checkpoint was written."""
    return f"replay-{updates}-{rank}.pt" if ranks > 1 else f"replay-{updates}.pt"


def atomic_save(path: pathlib.Path, state: Any) -> None:
    """`torch.save(state, path)`, atomically. Raises OSError where the path cannot take it."""
    try:
        atomic_write(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch finds its archive incomplete after a write that failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_agent_state(agent: Any, saved: Mapping[str, Any], config: Any) -> None:
    """Load a checkpoint into an agent. Raises UserError if it is of another agent, or other files: see `files_of`."""
    kind = saved.get("kind", "dreamer")  # older ones do not tell
    if kind != config.agent:
        raise UserError(f"the checkpoint is of another agent: --agent is {kind} there and {config.agent} here")
    now = files_of(config)
    for key, digest in saved.get("files", {}).items():
        if now.get(key, digest) != digest:
            words = "its content is not what the agent has learned with, though the name may be"
            raise UserError(f"--{key} {config[key]}: {words}: bring that file back, or begin anew")
    agent.load_state_dict(saved["agent"])


def files_of(config: Any) -> dict[str, str]:
    """Return {key: SHA-256} of the files that say what tokens of texts mean, as far as they can be read."""
    found = {}
    for key in filter(config.__getitem__, FILES):
        with contextlib.suppress(OSError), open(config[key], "rb") as file:  # who needs it says why
            found[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def checkpoint_file(path: str | pathlib.Path) -> pathlib.Path:
    """Return the checkpoint that a path means: itself, or the latest of a logdir."""
    path = pathlib.Path(path).expanduser()
    return path / "latest.pt" if path.is_dir() else path
