"""Random network distillation: novelty of observations (arXiv:1810.12894; openai/random-network-distillation)."""

import torch.nn as nn

from explorers.carried import Carried
from explorers.scale import Moments
from ops.layers import MLP, Linear, Style

LIMIT = 5.0  # of whitened inputs, in standard deviations


class RND(Carried):
    """Reward observations of which a network has not yet learned what another one, random and fixed, says.

        x        = clip((embed - mean) / std, -5, 5)
        loss[t]  = mean (predictor(x[t]) - target(x[t]))^2
        bonus    = loss, divided by the standard deviation of its discounted sum

    Where the original sees pictures, whitened by their running statistics, this one sees their embedding. The model's
    state would not do: its samples are noise that is new at every step, beside which a new place is nothing.

    Args:
      world: WorldModel; act_spec: unused; config: the whole configuration, with rnd.features, layers, width.
    """

    def __init__(self, world, act_spec, config):
        super().__init__("rnd", world, config)
        c, style = config.rnd, Style(config.norm, config.act, config.init)
        self.weight = c.scale

        def net(layers):
            mlp = MLP(world.encoder.size, layers, c.width, style)
            return nn.Sequential(mlp, Linear(c.width, c.features, 1.0, style.out))

        self.target = net(c.layers).requires_grad_(False)
        self.predictor = net(c.layers + 2)  # two hidden layers more than the target, as in the code
        self.inputs = Moments(world.encoder.size)

    def losses(self, world, states, batch):
        """Return {loss of the predictor, loss of the head: (B, T)} and what came up; see `Explorer`."""
        embed = batch["embed"].detach().float()  # (B, T, E)
        self.inputs.add(embed.flatten(0, 1))
        error = self.errors(embed)
        bonus = self.scale(error.detach())
        losses = {"intrinsic/rnd": error, "intrinsic/rnd_head": self.head_loss(states, bonus)}
        return losses, {"rnd_reward": bonus}

    def errors(self, embed):
        """Embeddings (..., E) -> mean squared error of the predictor (...)."""
        x = ((embed - self.inputs.mean.clone()) / self.inputs.std().clamp(min=1e-3)).clamp(-LIMIT, LIMIT)
        return (self.predictor(x) - self.target(x)).float().square().mean(-1)
