"""Behavior of DreamerV2 (arXiv:2010.02193)."""

import torch

from behaviors.dynamics import DynamicsBehavior


def shifted_weights(cont, alive, discount):
    """Return weights (H + 1, N) in which the discount of arriving in a state counts from the state after it on."""
    return torch.cat([alive[None], torch.full_like(cont[:1], discount), cont[1:-1]]).cumprod(0)


class DreamerV2(DynamicsBehavior):
    """Returns and baselines come from the slow critic; the actor climbs returns, not advantages."""

    def slow_values(self, feat):
        return self.slow(feat).mode()  # with gradient

    def values(self, critic, feat, slow):
        return slow

    def weigh(self, cont, alive):
        return shifted_weights(cont, alive, self.discount)

    def climbed(self, ret, adv, scale):
        return ret / scale

    def critic_loss(self, critic, target, slow):
        return -critic.log_prob(target)
