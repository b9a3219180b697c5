"""Checkpoints: reading and writing them, and whether a run may go on from one."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tools import UserError, atomic_write

SAME = ("task", "action_repeat")  # in all of a logdir's run


def load_checkpoint(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint to CPU memory. Raises UserError if it is missing or no checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or "agent" not in saved:
            raise ValueError("it is no checkpoint of this project")
    except Exception as error:
        said = str(error) or type(error).__name__
        reason = "no such file" if isinstance(error, FileNotFoundError) else said.splitlines()[0]
        raise UserError(f"{path} cannot be loaded: {reason}") from None
    return saved


def load_stored(path: pathlib.Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Read what a replay saved beside a checkpoint, or return None, after `warn(line)`, if it cannot be read."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch and pickle have many of their own for a damaged file
        reason = "it is gone" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        warn(f"{path}: {reason}: the replay's latent states start anew")
        return None


def save_checkpoint(logdir: pathlib.Path, checkpoint: dict[str, Any], stored: Any, updates: int) -> None:
    """Write latest.pt, and what the replay stores to a file of its own beside it, each atomically.

    Raises OSError where the logdir cannot take them; what was there before is still good then.
    """
    name = f"replay-{updates}.pt"
    atomic_save(logdir / name, stored)
    atomic_save(logdir / "latest.pt", {**checkpoint, "replay": name})
    for old in logdir.glob("replay-*.pt"):
        if old.name != name:
            old.unlink(missing_ok=True)


def atomic_save(path: pathlib.Path, state: Any) -> None:
    """`torch.save(state, path)`, atomically. Raises OSError where the path cannot take it."""
    try:
        atomic_write(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch finds its archive incomplete after a write that failed
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def check_same(saved: Mapping[str, Any], config: Any) -> None:
    """Raises UserError if a checkpoint is to be gone on with by a run whose replay and curves it does not belong to."""
    for key in SAME:
        was = saved.get(key, config[key])  # older ones do not tell
        if was != config[key]:
            way = f"give another --logdir, with --from_checkpoint {config.logdir} to start from what it has learned"
            raise UserError(f"--{key} {config[key]}: the run in {config.logdir} has {was}; {way}")


def load_agent_state(agent: Any, saved: Mapping[str, Any], config: Any) -> None:
    """Load a checkpoint into an agent. Raises UserError if it is of another agent."""
    kind = saved.get("kind", "dreamer")  # older ones do not tell
    if kind != config.agent:
        raise UserError(f"the checkpoint is of another agent: --agent is {kind} there and {config.agent} here")
    agent.load_state_dict(saved["agent"])


def checkpoint_file(path: str | pathlib.Path) -> pathlib.Path:
    """Return the checkpoint that a path means: itself, or the latest of a logdir."""
    path = pathlib.Path(path).expanduser()
    return path / "latest.pt" if path.is_dir() else path
