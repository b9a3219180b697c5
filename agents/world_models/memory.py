"""M: an LSTM that predicts a mixture of Gaussians over the next latent (World Models, 2018, appendix A.2).

Letters: B batch, T time, N states, Z latent numbers, K Gaussians of each, H hidden width, A actions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.random import rand, randn

LEAST_LOGSTD = -4.0  # a Gaussian that is narrower than its data explodes the density
RARE = 10.0  # weight of ends, of which an episode has one


class Memory(NamedTuple):
    """State of the LSTM: h and c, (N, H) each. C sees h."""

    h: torch.Tensor
    c: torch.Tensor


class Prediction(NamedTuple):
    """The next step as M sees it: the mixture of each latent number (..., Z, K), reward and logit of the end (...)."""

    logits: torch.Tensor
    mean: torch.Tensor
    logstd: torch.Tensor
    reward: torch.Tensor
    end: torch.Tensor


class MDNRNN(nn.Module):
    """LSTM with a mixture density head.

    Args:
      z: latent numbers; actions: width of the action vector; hidden: H; mixtures: K.
      change: True to predict how z changes rather than what it becomes.
    """

    def __init__(self, z, actions, hidden, mixtures, change):
        super().__init__()
        self.z, self.hidden, self.mixtures, self.change = z, hidden, mixtures, change
        self.cell = nn.LSTMCell(z + actions, hidden)
        self.out = nn.Linear(hidden, 3 * z * mixtures + 2)
        with torch.no_grad():
            self.cell.bias_ih[hidden : 2 * hidden] = 1.0  # forget gate
            self.cell.bias_hh[hidden : 2 * hidden] = 0.0

    def initial(self, count, device=None):
        """Return the Memory (count, H) before an episode."""
        return Memory(*torch.zeros(2, count, self.hidden, device=device))

    def step(self, z, action, memory):
        """Take in a latent (N, Z) and the action (N, A) chosen there; return the next Memory."""
        return Memory(*self.cell(torch.cat([z, action], -1), tuple(memory)))

    def predict(self, z, h):
        """Return the Prediction of what follows the latent (..., Z) that led to h (..., H)."""
        *mixture, rest = self.out(h).split([self.z * self.mixtures] * 3 + [2], -1)
        logits, mean, logstd = (part.unflatten(-1, (self.z, self.mixtures)) for part in mixture)
        mean = mean + z[..., None] if self.change else mean
        return Prediction(logits.log_softmax(-1), mean, logstd.clamp(min=LEAST_LOGSTD), *rest.unbind(-1))

    def observe(self, z, action, is_first):
        """Run over sequences: return the Predictions (B, T - 1) of steps 1 to T - 1.

        Args:
          z: (B, T, Z); action: (B, T, A), action[t] led to z[t]; is_first: (B, T), where the memory starts anew.
        """
        memory, hidden = self.initial(len(z), z.device), []
        for t in range(z.shape[1] - 1):
            keep = ~is_first[:, t, None]
            memory = self.step(z[:, t], action[:, t + 1], Memory(memory.h * keep, memory.c * keep))
            hidden.append(memory.h)
        return self.predict(z[:, :-1], torch.stack(hidden, 1))

    def loss(self, z, action, reward, is_terminal, is_first):
        """Return the loss, 0-d, and {name: 0-d metric}; z (B, T, Z), action (B, T, A), the others (B, T)."""
        found = self.observe(z, action, is_first)
        real = (~is_first[:, 1:]).float()  # a first step follows from nothing
        scale = 1 / real.sum().clamp(min=1)
        ends = is_terminal[:, 1:].float()
        weights = real * (1 + (RARE - 1) * ends)
        losses = {
            "mdn_loss": -(log_density(found, z[:, 1:]).mean(-1) * real).sum() * scale,
            "reward_loss": ((found.reward - reward[:, 1:]) ** 2 * real).sum() * scale,
            "done_loss": F.binary_cross_entropy_with_logits(found.end, ends, weights, reduction="sum") * scale,
        }
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}


def log_density(prediction, z):
    """Return the log-density of each latent number under its mixture: (..., Z)"""
    error = (z[..., None] - prediction.mean) * torch.exp(-prediction.logstd)
    normal = -0.5 * error**2 - prediction.logstd - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(prediction.logits + normal, -1)


def sample(prediction, temperature):
    """Draw the next latent (..., Z): a Gaussian by logits / temperature, its noise times sqrt(temperature).

    As the temperature goes to 0, this is the mean of the likeliest Gaussian.
    """
    gumbel = -torch.log(-torch.log(rand(prediction.logits.shape, prediction.logits.device).clamp(1e-20, 1 - 1e-7)))
    choice = (prediction.logits + temperature * gumbel).argmax(-1, keepdim=True)
    mean, logstd = (part.gather(-1, choice)[..., 0] for part in (prediction.mean, prediction.logstd))
    return mean + math.sqrt(temperature) * logstd.exp() * randn(mean.shape, mean.device)
