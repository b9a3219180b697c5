"""Behavior of Dreamer (arXiv:1912.01603)."""

from behaviors.dreamerv2 import shifted_weights
from behaviors.dynamics import DynamicsBehavior


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
