"""Checkpoints: reading them, and making the agent that they hold."""

import pathlib

import torch

from agents.dreamer import Dreamer
from specs import ActionSpec, ObsSpec
from tools import UserError
from training.config import CONFIGS, load_config
from training.machine import choose_device, choose_dtype

SAME = ("task", "action_repeat")  # in all of a logdir's run


def load_checkpoint(path):
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


def load_latents(path, warn):
    """What a replay saved beside a checkpoint, or None, after `warn(line)`, where it cannot be read."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch and pickle have many of their own for a damaged file
        reason = "it is gone" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        warn(f"{path}: {reason}: the replay's latent states start anew")
        return None


def check_same(saved, config):
    """Raises UserError if a checkpoint is to be gone on with by a run whose replay and curves it does not belong to."""
    for key in SAME if config.script != "eval_only" else ():
        was = saved.get(key, config[key])  # older ones do not tell
        if was != config[key]:
            way = f"give another --logdir, with --from_checkpoint {config.logdir} to start from what it has learned"
            raise UserError(f"--{key} {config[key]}: the run in {config.logdir} has {was}; {way}")


def checkpoint_file(path):
    """The checkpoint that a path means: itself, or the latest of a logdir."""
    path = pathlib.Path(path).expanduser()
    return path / "latest.pt" if path.is_dir() else path


def load_agent(path, device="auto"):
    """A trained agent as its checkpoint and the config.yaml beside it describe it; no environment is needed.

        agent, state = load_agent("logdir/run"), None
        action, state = agent.act(obs, state)  # see Dreamer.act

    Args:
      path: a checkpoint or its logdir; device: auto, cpu, cuda or cuda:N.
    Returns: the Dreamer. Raises UserError if it cannot be loaded or is of another size than its config.yaml says.
    """
    path = checkpoint_file(path)
    saved = load_checkpoint(path)["agent"]
    if "specs" not in saved:
        raise UserError(f"{path} does not tell its spaces, being of an older version: resume its run to write it anew")
    config = load_config(["--config", str(path.parent / "config.yaml")], CONFIGS)
    obs_spec, act_spec = ObsSpec(**saved["specs"]["observation"]), ActionSpec(**saved["specs"]["action"])
    device = choose_device(str(device))
    agent = Dreamer(obs_spec, act_spec, config, device, choose_dtype(config.precision, device))
    agent.load(saved)
    return agent
