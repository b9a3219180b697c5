"""Acting by planning in latent space, without a learned policy (PlaNet, arXiv:1811.04551, algorithm 2)."""

import torch
import torch.nn as nn

from models import Rollout
from ops.distributions import one_hot
from ops.random import randn
from rssm import feature
from tools import UserError

FLOOR = 1e-6  # added to the variance in a refit, which so never ends (planet/control/planning.py)


class CEM(nn.Module):
    """The cross-entropy method: refit a normal over action sequences to the candidates with the most predicted reward.

    A behavior without parameters. A discrete action is the largest of the numbers that stand for its classes.

    Args:
      feat_size: width of the features; act_spec: ActionSpec.
      config: the whole configuration, with cem.horizon H, iterations, candidates J, elites.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__()
        self.spec, c = act_spec, config.cem
        if c.elites > c.candidates:
            raise UserError(f"--cem.elites {c.elites} are more than --cem.candidates {c.candidates}")
        self.horizon, self.iterations, self.candidates, self.elites = c.horizon, c.iterations, c.candidates, c.elites
        self.rewards = None  # those that plans are made for when data is collected, if there are more than the task's

    def optimized(self):
        """There is nothing to optimize."""
        return {}

    def policies(self):
        """There is no policy: it plans."""
        return {}

    def compile_parts(self):
        """There is nothing to compile: acting stays as it is written."""

    def initial(self, count, device):
        """Nothing is carried from step to step: each step plans anew."""
        return ()

    def act(self, world, state, carry, mode):
        """Choose the first actions (N, A) of the plans from posterior states (N, ...).

        Plans are for the task's reward, and for intrinsic ones only where data is collected.
        """
        start = state.map(lambda x: x.repeat_interleave(self.candidates, 0))
        shape = (self.horizon, len(state.deter), self.candidates, self.spec.size)

        def score(plans):
            """Plans (H, N, J, A) -> the sum of the rewards along each of them (N, J)."""
            actions = self.native(plans).flatten(1, 2)
            states, _ = world.rssm.imagine(start, actions, self.horizon)
            if self.rewards and mode in ("noisy", "explore"):
                reward = self.rewards(Rollout(states, actions, feature(states)))[1:]
            else:
                reward = world.reward(feature(states.map(lambda x: x[1:]))).mode()
            return reward.sum(0).view(shape[1:3])

        plan = search(score, shape, self.iterations, self.elites, state.deter.device)
        return self.native(plan[0]), carry

    def native(self, plans):
        """Numbers (..., A) -> the action vectors that they stand for (..., A)."""
        parts = self.spec.split(plans)
        return self.spec.join({key: self.choose(key, part) for key, part in parts.items()})

    def choose(self, key, numbers):
        """Numbers (..., width) of an action key -> numbers, or one-hots of the largest if it is discrete."""
        if key not in self.spec.classes:
            return numbers
        choices = numbers.split(self.spec.classes[key], -1)
        return torch.cat([one_hot(choice.argmax(-1), choice.shape[-1]) for choice in choices], -1)

    def rollout(self, world, states):
        """Nothing is imagined for learning."""
        return None

    def losses(self, world, rollout, batch, rewards):
        """Nothing is learned."""
        return {}, {}

    def replay_losses(self, world, states, batch, outs):
        """Nothing is learned."""
        return {}

    def metrics(self, outs):
        """Nothing is learned."""
        return {}

    def improve(self, rollout, outs=None):
        """There is no critic."""
        return {}


def search(score, shape, iterations, elites, device="cpu"):
    """Maximize a score over sequences in [-1, 1] by the cross-entropy method, for N problems at once.

    Args:
      score: function of candidates (H, N, J, A) -> (N, J).
      shape: (H, N, J, A); iterations: of refitting; elites: how many of J a refit is made to.
    Returns: the last mean (H, N, A).
    """
    horizon, count, _, size = shape
    mean = torch.zeros(horizon, count, 1, size, device=device)
    stddev = torch.ones_like(mean)
    for _ in range(iterations):
        plans = (mean + stddev * randn(shape, device)).clamp(-1, 1)
        best = score(plans).topk(elites, -1).indices[None, :, :, None].expand(horizon, -1, -1, size)
        chosen = plans.gather(2, best)
        mean, stddev = chosen.mean(2, keepdim=True), (chosen.var(2, correction=0, keepdim=True) + FLOOR).sqrt()
    return mean[:, :, 0]
