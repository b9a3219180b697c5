"""Bonuses that are computed on replayed steps, and carried into imagination by a head."""

import torch.nn as nn

from explorers.scale import ReturnScale
from networks import scalar_head
from ops.layers import Style
from rssm import feature


class Carried(nn.Module):
    """The part of an explorer that pays in imagined states what it would pay for the observation there.

    Where an error is measured against what is observed, an imagined state has nothing to measure: against the world
    model's own prediction the error would only be that model's noise. So a head predicts the bonus from a state.

    Args:
      name: of the reward; world: WorldModel; config: the whole configuration, with reward_head.
    """

    def __init__(self, name, world, config):
        super().__init__()
        self.name, self.scale = name, ReturnScale(world.discount)
        self.head = scalar_head(world.feat_size, config.reward_head, Style(config.norm, config.act, config.init))

    def head_loss(self, states, bonus):
        """Posterior State (B, T, ...) and what was paid for it (B, T) -> minus the head's log-likelihood (B, T)."""
        return -self.head(feature(states).detach()).log_prob(bonus)

    def rewards(self):
        """Return the one reward."""
        return {self.name: self.reward}

    def reward(self, rollout):
        """Return the bonus that is expected on arriving in each state: (H + 1, N), never negative."""
        return self.head(rollout.feat).mode().clamp(min=0)
