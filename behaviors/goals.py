"""Goals of a hierarchy: recurrent states told in a few codes, and how near a state has come to one (Director,
arXiv:2206.04114, and danijar/director)."""

import math

import torch
import torch.nn as nn

from ops import collectives
from ops.distributions import OneHot
from ops.layers import MLP, Linear, Style
from ops.math import correction
from ops.optim import OwnAdam
from ops.random import rand

LEAST, MOST = 1e-5, 1.0  # bounds of the weight of the KL
RATE = 0.01  # of running means, once they are of as many batches


class GoalAutoencoder(nn.Module):
    """Encodes a recurrent state as G one-hot codes of C classes, and decodes such codes into a recurrent state.

        loss = |deter - decode(code)|^2 + beta KL(code || uniform),    code ~ encode(deter)

    beta starts at 1 and is multiplied or divided by 1.1 in an update whose KL is more than 10 % above or below its
    target, within [1e-5, 1]. The target is a share of the greatest KL, G log C: 0.6 of 8 x 8 codes are Director's 10
    nats. It learns from replayed states, which get no gradient, by an Adam of its own with Director's constants, but
    for its decay of weights. Those are eps 1e-6 and clip 100.

    Args:
      deter: width of the recurrent state (D).
      config: the whole configuration, with hierarchy.groups, classes, layers, units, goal_kl and goal_lr.
    """

    def __init__(self, deter, config):
        super().__init__()
        c, style = config.hierarchy, Style(config.norm, config.act, config.init)
        self.shape, self.size = (c.groups, c.classes), c.groups * c.classes
        mlps = (MLP(width, c.layers, c.units, style) for width in (deter, self.size))
        self.encoder, self.decoder = (
            nn.Sequential(mlp, Linear(c.units, width, outscale=0.1, init=style.out))
            for mlp, width in zip(mlps, (self.size, deter), strict=True)
        )
        self.target = c.goal_kl * c.groups * math.log(c.classes)
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("usual", torch.zeros(deter))
        self.register_buffer("count", torch.zeros(()))
        self.opt = OwnAdam([*self.encoder.parameters(), *self.decoder.parameters()], c.goal_lr, 1e-6, 100.0)

    def compile_parts(self):
        """Compile what learning spends its time in."""
        self.loss = torch.compile(self.loss, dynamic=False)

    def encode(self, deter):
        """Recurrent states (..., D) -> distribution of their codes, batch shape (..., G)."""
        return OneHot(self.encoder(deter).unflatten(-1, self.shape))

    def decode(self, code):
        """Codes (..., G C) -> recurrent states (..., D) float32."""
        return self.decoder(code).float()

    def near(self, goal, deter):
        """Return the `max_cosine` (...) of how goals and recurrent states (..., D) differ from the usual state."""
        return max_cosine(goal - self.usual, deter - self.usual)

    def error(self, deter):
        """Return the mean squared error (...) of recurrent states (..., D) that come back from codes: it is large where
        few such states were replayed."""
        code = self.encode(deter).sample(rand((*deter.shape[:-1], self.shape[0]), deter.device))
        return (self.decode(code.flatten(-2)) - deter).square().mean(-1)

    def loss(self, deter, noise):
        """Return the squared error of recurrent states (N, D) and the KL of their codes, drawn by noise (N, G): (N,)
        each."""
        dist = self.encode(deter)
        back = self.decode(dist.sample(noise).flatten(-2))
        return (back - deter).square().sum(-1), (math.log(self.shape[1]) - dist.entropy()).sum(-1)

    def learn(self, deter):
        """Take a gradient step on recurrent states (N, D), move beta and the usual state; return {name: 0-d metric}."""
        errors, kls = self.loss(deter, rand((len(deter), self.shape[0]), deter.device))
        error, kl = errors.mean(), kls.mean()
        with torch.no_grad():
            self.beta.mul_(correction(collectives.mean(kl), self.target)).clamp_(LEAST, MOST)
            self.count += 1
            self.usual.lerp_(collectives.mean(deter.mean(0)), (1 / self.count).clamp(min=RATE))
        loss = error + self.beta * kl
        norm = self.opt.step(loss)
        metrics = {"goal_loss": loss.detach(), "goal_error": error.detach() / deter.shape[-1], "goal_kl": kl.detach()}
        return metrics | {"goal_beta": self.beta.clone(), "goal_grad_norm": norm}


class Novelty(nn.Module):
    """Running mean and standard deviation of a reward, in which it is told: 0 is usual, whatever its scale.

    A reward of which only the scale is told is positive everywhere, and then to end an episode, also where the task is
    solved, costs all that would have been received.

    rate: share of a new batch, once there were more than 1 / rate of them.
    """

    def __init__(self, rate=RATE):
        super().__init__()
        self.rate = rate
        for name in ("count", "mean", "square"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def forward(self, reward):
        """Fold in a batch of rewards of any shape; return it in standard deviations from the mean."""
        self.count += 1
        rate = (1 / self.count).clamp(min=self.rate)
        self.mean.lerp_(collectives.mean(reward.mean()), rate)
        self.square.lerp_(collectives.mean(reward.square().mean()), rate)
        return (reward - self.mean) / ((self.square - self.mean.square()).clamp(min=0).sqrt() + 1e-8)


def max_cosine(goal, state):
    """Return how near states (..., D) are to goals (..., D): g . s / max(|g|, |s|)^2, 1 where they are equal.

    Unlike a cosine it also asks for the goal's length.
    """
    longer = torch.maximum(goal.square().sum(-1), state.square().sum(-1))
    return (goal * state).sum(-1) / longer.clamp(min=1e-12)
