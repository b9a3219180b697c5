"""Random network distillation: novelty of states (arXiv:1810.12894; openai/random-network-distillation)."""

import torch.nn as nn

from explorers.scale import Moments, ReturnScale
from networks import feature
from ops.layers import MLP, Linear, Style

LIMIT = 5.0  # of whitened inputs, in standard deviations


class RND(nn.Module):
    """Reward states in which a network has not yet learned what another one, random and fixed, says of them.

        x        = clip((state - mean) / std, -5, 5)
        loss[t]  = mean (predictor(x[t]) - target(x[t]))^2
        bonus    = loss, divided by the standard deviation of its discounted sum

    It is a function of one state, and so is computed in imagined states themselves. Where the original sees pictures,
    whitened by their running statistics, this one sees the model's states.

    Args:
      world: WorldModel; act_spec: unused; config: the whole configuration, with rnd.features, layers, width.
    """

    def __init__(self, world, act_spec, config):
        super().__init__()
        c, style = config.rnd, Style(config.norm, config.act, config.init)
        self.weight = c.scale

        def net(layers):
            mlp = MLP(world.feat_size, layers, c.width, style)
            return nn.Sequential(mlp, Linear(c.width, c.features, 1.0, style.out))

        self.target = net(c.layers).requires_grad_(False)
        self.predictor = net(c.layers + 2)  # two hidden layers more than the target, as in the code
        self.inputs = Moments(world.feat_size)
        self.scale = ReturnScale(world.discount)

    def losses(self, world, states, batch):
        """Return {"intrinsic/rnd": (B, T)} and what came up; see `Explorer`."""
        feat = feature(states).detach().float()  # (B, T, F)
        self.inputs.add(feat.flatten(0, 1))
        error = self.errors(feat)
        return {"intrinsic/rnd": error}, {"rnd_reward": self.scale(error.detach())}

    def errors(self, feat):
        """Features (..., F) -> mean squared error of the predictor (...)."""
        x = ((feat.float() - self.inputs.mean.clone()) / self.inputs.std().clamp(min=1e-3)).clamp(-LIMIT, LIMIT)
        return (self.predictor(x) - self.target(x)).square().mean(-1)

    def rewards(self):
        """Return the one reward of RND."""
        return {"rnd": self.reward}

    def reward(self, rollout):
        """Return the bonus of arriving in each state: (H + 1, N)."""
        return self.errors(rollout.feat) / self.scale.moments.std().clamp(min=1e-8)
