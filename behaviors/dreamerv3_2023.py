"""Behavior of DreamerV3 as first published (arXiv:2301.04104v1; agent.py of danijar/dreamerv3 at 8fa35f8)."""

import torch

from behaviors.dynamics import DynamicsBehavior


class DreamerV3of2023(DynamicsBehavior):
    """Takes the model's word on whether an episode goes on as a yes or a no, and the data's word at the start."""

    @torch.no_grad()
    def discounts(self, world, feat):
        """Return (H + 1, N): the discount where more likely than not a state is no end, else 0 (WorldModel.imagine)."""
        return world.discounts(feat) if world.cont is None else self.discount * world.cont(feat).mode()

    def weigh(self, cont, alive):
        return torch.cat([alive[None], cont[1:]]).cumprod(0)

    @torch.no_grad()
    def improve(self, rollout, outs=None):
        """Move the slow critic as DreamerV3 does, but make it a copy at the very first update (SlowUpdater)."""
        slow, fast = list(self.slow.parameters()), list(self.critic.parameters())
        rate = self.slow_rate * (self.updates % self.slow_every == 0)
        rate = torch.maximum(rate, (self.updates == 0).to(rate))
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))
        self.updates += 1
        return {}
