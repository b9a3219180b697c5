"""ICM: curiosity about what one's own actions change (arXiv:1705.05363; pathak22/noreward-rl, src/model.py)."""

import torch
import torch.nn as nn

from explorers.carried import Carried
from ops.distributions import MultiOneHot, VectorNormal
from ops.layers import MLP, Linear, Style

INVERSE, FORWARD, WEIGHT = 0.8, 0.2, 10.0  # of the losses: beta 0.2, and 1 / lambda (src/constants.py)


class ICM(Carried):
    """Reward steps whose outcome a forward model does not predict, in features that tell which action was taken.

        phi[t]      = features(embed[t])                      numbers, of what is observed at t alone
        L_I[t + 1]  = -log p(action[t + 1] | phi[t], phi[t + 1])
        L_F[t + 1]  = 1/2 |forward(phi[t], action[t + 1]) - phi[t + 1]|^2
        loss        = 10 (0.8 L_I + 0.2 L_F)
        bonus[t + 1] = 2 L_F[t + 1] / n, divided by the standard deviation of its discounted sum

    The features learn by the inverse model alone, and so leave out what no action changes; the forward model's input
    and target are both held (large-scale-curiosity, arXiv:1808.04355, from which the bonus's form is, too). They see
    the embedding and not the state, whose recurrent part has been told the action.

    Args:
      world: WorldModel; act_spec: ActionSpec.
      config: the whole configuration, with icm.features n, layers, width, and icm.eta; if that is not 0, the bonus is
        eta L_F, as in the paper, and nothing is divided.
    """

    def __init__(self, world, act_spec, config):
        super().__init__("icm", world, config)
        c, style = config.icm, Style(config.norm, config.act, config.init)
        self.spec, self.size, self.eta = act_spec, c.features, c.eta
        self.weight = c.scale

        def net(inputs, outputs):
            return nn.Sequential(MLP(inputs, c.layers, c.width, style), Linear(c.width, outputs, 1.0, style.out))

        self.features = net(world.encoder.size, c.features)
        self.inverse = net(2 * c.features, act_spec.size)
        self.forward_model = net(c.features + act_spec.size, c.features)

    def losses(self, world, states, batch):
        """Return {loss of the three models, loss of the head: (B, T - 1)} and what came up; see `Explorer`.

        What leads into another episode has no loss and no bonus.
        """
        action, within = batch["action"][:, 1:], ~batch["is_first"][:, 1:]  # (B, T - 1)
        phi = self.features(batch["embed"].detach()).float()  # (B, T, n)
        inverse = self.inverse_loss(phi[:, :-1], phi[:, 1:], action) * within
        error = self.errors(phi[:, :-1].detach(), phi[:, 1:].detach(), action) * within  # (B, T - 1)
        bonus = self.bonus(error.detach())
        head = self.head_loss(states.map(lambda x: x[:, 1:]), bonus) * within
        losses = {"intrinsic/icm": WEIGHT * (INVERSE * inverse + FORWARD * error), "intrinsic/icm_head": head}
        return losses, {"icm_inverse": inverse, "icm_forward": error, "icm_reward": bonus}

    def inverse_loss(self, before, after, action):
        """Features (..., n) and the action between them (..., A) -> minus its log-likelihood (...).

        Choices are categorical, numbers normal with unit variance.
        """
        parts = self.spec.split(self.inverse(torch.cat([before, after], -1)))
        kinds = {
            key: MultiOneHot(part, self.spec.classes[key]) for key, part in parts.items() if key in self.spec.classes
        }
        kinds |= {key: VectorNormal(part) for key, part in parts.items() if key not in kinds}
        return -sum(kinds[key].log_prob(part) for key, part in self.spec.split(action).items())

    def errors(self, before, after, action):
        """Features (..., n) and the action between them (..., A) -> half the squared error of the prediction (...)."""
        predicted = self.forward_model(torch.cat([before, action.to(before.dtype)], -1))
        return 0.5 * (predicted.float() - after).square().sum(-1)

    def bonus(self, error):
        """Half the squared errors (B, T - 1) of replayed steps -> the bonus that they pay (B, T - 1)."""
        return self.eta * error if self.eta else self.scale(2 * error / self.size)
