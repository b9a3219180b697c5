"""Plan2Explore: disagreement of one-step predictions (arXiv:2005.05960)."""

import torch
import torch.nn as nn

from ops.distributions import VectorNormal
from ops.layers import MLP, Linear, Style
from rssm import feature


class Plan2Explore(nn.Module):
    """Reward states in which an ensemble of one-step predictors disagrees (arXiv:2005.05960).

    Args:
      world: WorldModel whose states are predicted; act_spec: ActionSpec.
      config: the whole configuration, with the keys disag_*.
    """

    weight = 1.0

    def __init__(self, world, act_spec, config):
        super().__init__()
        self.target = config.disag_target
        self.spread, self.log = SPREADS[config.disag_form], config.disag_log
        deter, stoch = world.rssm.deter, world.rssm.latent.size
        sizes = {"stoch": stoch, "deter": deter, "feat": world.feat_size, "embed": world.encoder.size}
        inputs, units = world.feat_size + act_spec.size, config.disag_units
        style = Style(config.norm, config.act, config.init)
        self.ensemble = nn.ModuleList(
            nn.Sequential(
                MLP(inputs, config.disag_layers, units, style), Linear(units, sizes[self.target], 1.0, style.out)
            )
            for _ in range(config.disag_models)
        )

    def predict(self, feat, action):
        """Features (..., F) and the actions taken there (..., A) -> what each model says comes next (M, ..., n)."""
        inputs = torch.cat([feat, action.to(feat.dtype)], -1)
        return torch.stack([model(inputs).float() for model in self.ensemble])

    def losses(self, world, states, batch):
        """Return {"disag": (B, T - 1)}, {}: minus the log-likelihood of the next step under unit normals, summed over
        the models; 0 where the next step is of another episode. No gradient reaches the world model."""
        feat = feature(states)
        targets = {"stoch": states.stoch.flatten(2), "deter": states.deter, "feat": feat, "embed": batch["embed"]}
        return {"disag": self.ensemble_loss(feat, batch["action"], targets[self.target], batch["is_first"])}, {}

    def ensemble_loss(self, feat, action, target, is_first):
        """(B, T, F), (B, T, A) with action[t] led to feat[t], (B, T, n), (B, T) -> loss (B, T - 1)"""
        predicted = self.predict(feat[:, :-1].detach(), action[:, 1:])
        loss = -VectorNormal(predicted).log_prob(target[:, 1:].detach().float().expand(predicted.shape)).sum(0)
        return loss * ~is_first[:, 1:]

    def rewards(self):
        """Return the one reward of Plan2Explore: the disagreement."""
        return {"disag": self.disagreement}

    def disagreement(self, rollout):
        """Return how far the predictions spread on arriving in each state: (H + 1, N), 0 at the start."""
        novelty = self.spread(self.predict(rollout.feat[:-1], rollout.actions)).mean(-1)
        novelty = novelty.clamp(min=1e-12).log() if self.log else novelty
        return torch.cat([torch.zeros_like(novelty[:1]), novelty])


# `disag_form` -> spread (..., n) of the models' predictions (M, ..., n): of the paper, and of DreamerV2's code.
SPREADS = {"variance": lambda x: x.var(0), "std": lambda x: x.std(0, correction=0)}
