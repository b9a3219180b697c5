"""Behavior of Dreamer (arXiv:1912.01603)."""

import torch

from behaviors.dynamics import DynamicsBehavior


def shifted_weights(cont, alive, discount):
    """Return weights (H + 1, N) in which the discount of arriving in a state counts from the state after it on."""
    return torch.cat([alive[None], torch.full_like(cont[:1], discount), cont[1:-1]]).cumprod(0)


class DreamerV1(DynamicsBehavior):
    """One critic, without a slow one; the actor climbs returns, not advantages."""

    def slow_values(self, feat):
        return None

    def weigh(self, cont, alive):
        return shifted_weights(cont, alive, self.discount)

    def climbed(self, ret, adv, scale):
        return ret / scale

    def critic_loss(self, critic, target, slow):
        return -critic.log_prob(target)
