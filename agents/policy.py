"""A trained agent in use: without environments, for one observation or a batch of them."""

import pathlib

import numpy as np

from agents import make_agent
from specs import ActionSpec, ObsSpec
from tools import UserError
from training.checkpoint import checkpoint_file, load_agent_state, load_checkpoint
from training.config import CONFIGS, load_config


class Policy:
    """Wraps an agent for a user's own loop.

    Args:
      agent: Agent, with obs_spec and act_spec.
    """

    def __init__(self, agent):
        self.agent, self.obs_spec, self.act_spec = agent, agent.obs_spec, agent.act_spec

    def act(self, obs, state=None, mode="sample"):
        """Choose actions for a batch of environments, or for a single one.

        Args:
          obs: {key: (N, ...)} arrays, or {key: (...)} of a single environment, for each key that the agent was
            trained on. `is_first` (N,) or () says where an episode starts; left out, one starts everywhere if `state`
            is None, and nowhere else.
          state: what the last call returned, or None.
          mode: "mode" or "sample" of the policy.
        Returns: {key: (N, width) or (width,)} float32 arrays, numbers in [-1, 1] or one-hots, and the new state.
        Raises ValueError for an observation that the agent was not trained on, or another mode.
        """
        batch, single = self.batch(obs, state is None)
        count = len(batch["is_first"])
        actions, state, _ = self.agent.act(batch, self.agent.initial(count) if state is None else state, mode)
        actions = {key: np.clip(value, -1, 1) for key, value in actions.items()}
        return ({key: value[0] for key, value in actions.items()} if single else actions), state

    def batch(self, obs, is_first):
        """Return observations with a batch axis and is_first, and True if they had none."""
        if not hasattr(obs, "keys") or not obs.keys() >= self.obs_spec.keys():
            found = sorted(obs) if hasattr(obs, "keys") else type(obs).__name__
            raise ValueError(f"expected an observation with the keys {sorted(self.obs_spec)}, got {found}")
        arrays = {key: np.asarray(obs[key]) for key in self.obs_spec}
        key, seen = next(iter(self.obs_spec.items()))
        scalar = len(seen.classes) == 1  # a class (), of which a batch is (N,) or (N, 1)
        single = np.ndim(obs["is_first"]) == 0 if "is_first" in obs else arrays[key].ndim == len(seen.shape) - scalar
        arrays = {key: value[None] if single else value for key, value in arrays.items()}
        for key, seen in self.obs_spec.items():
            shape = arrays[key].shape[1:]
            if shape != seen.shape and not (len(seen.classes) == 1 and shape == ()):
                raise ValueError(f"observation {key}: expected shape {seen.shape}, got {shape}")
            if arrays[key].dtype.kind == "f":
                arrays[key] = arrays[key].astype(np.float32)
        first = obs["is_first"] if "is_first" in obs else np.full(len(arrays[key]), is_first)
        return {**arrays, "is_first": np.atleast_1d(np.asarray(first, bool))}, single


def load_policy(path, device="auto"):
    """Load a Policy from a checkpoint or its logdir; see `dreamer.load_agent`."""
    path = checkpoint_file(path)
    checkpoint = load_checkpoint(path)
    saved = checkpoint["agent"]
    if "specs" not in saved:
        raise UserError(f"{path} does not tell its spaces, being of an older version: resume its run to write it anew")
    config = load_config(["--config", str(pathlib.Path(path).parent / "config.yaml"), "--compile", "false"], CONFIGS)
    specs = ObsSpec.read(saved["specs"]["observation"]), ActionSpec(**saved["specs"]["action"])
    agent = make_agent(config.replace(device=str(device)), *specs)
    load_agent_state(agent, checkpoint, config)
    return Policy(agent)
