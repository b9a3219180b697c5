"""Behavior of DreamerV3 as first published (arXiv:2301.04104v1)."""

import torch

from behaviors.dynamics import DynamicsBehavior


class DreamerV3of2023(DynamicsBehavior):
    """Weighs the start by whether it is terminal in truth, not by what the model predicts."""

    def weigh(self, cont, alive):
        return torch.cat([alive[None], cont[1:]]).cumprod(0)
