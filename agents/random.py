"""The agent that acts uniformly at random and learns nothing: a baseline, and what fills the replay at first."""

import numpy as np

from ops.collectives import place
from tools import Ratio, UserError, derive_seed


def make(obs_spec, act_spec, config, device, dtype):
    """Return the random agent of a configuration."""
    return Random(act_spec, derive_seed(config.seed, 5, *place()), obs_spec)


class Random:
    """Acts uniformly at random; an `Agent` without networks.

    Args:
      act_spec: ActionSpec; seed: of the actions; obs_spec: ObsSpec of what it could see, for its checkpoint.
    """

    stored, context = {}, 0

    def __init__(self, act_spec, seed, obs_spec=()):
        self.obs_spec, self.act_spec = obs_spec, act_spec
        self.generators = {"act": np.random.default_rng(seed)}

    def clock(self, config):
        """Return a clock at which nothing is ever due."""
        return Ratio(0.0)

    def initial(self, count):
        """Nothing is carried from step to step."""
        return ()

    def act(self, obs, carry=(), mode="sample"):
        """Return actions {key: (N, width)}, no carry and nothing to store."""
        return self.act_spec.uniform(self.generators["act"], len(obs["is_first"])), (), None

    def learn(self, replay):
        """Nothing is learned."""
        return {}

    def report(self, arrays, seen, carry=None):
        """Nothing is predicted."""
        return {}

    def state_dict(self):
        return {"specs": {"observation": self.obs_spec.plain(), "action": self.act_spec._asdict()}}

    def load_state_dict(self, saved):
        """There is nothing to load. Raises UserError if the checkpoint is of an agent that learns."""
        if saved.keys() != {"specs"}:
            raise UserError("the checkpoint is of another agent: it has learned something")
