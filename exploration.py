"""How to collect data other than by the task's own policy: at random, or by a policy that seeks what is new."""

import numpy as np
import torch
import torch.nn as nn

from ops.layers import MLP, Linear, Style


class Random:
    """Acts uniformly at random, with the interface of an agent's `act`.

    Args:
      spec: ActionSpec; seed: of the actions.
    """

    def __init__(self, spec, seed):
        self.spec = spec
        self.rng = np.random.default_rng(seed)

    def act(self, obs, memory=None):
        """{key: (N, ...)} -> {key: (N, width)} float32: values in [-1, 1], or one-hots of discrete keys; no memory."""
        count = len(obs["is_first"])
        return {key: self.draw(key, width, count) for key, width in self.spec.widths.items()}, None

    def draw(self, key, width, count):
        classes = self.spec.classes.get(key)
        if not classes:
            return self.rng.uniform(-1, 1, (count, width)).astype(np.float32)
        parts = [np.eye(size, dtype=np.float32)[self.rng.integers(size, size=count)] for size in classes]
        return np.concatenate(parts, 1)


def perturb(action, spec, amount):
    """Actions (N, A) with exploration noise: a normal of stddev `amount` on values, cut to [-1, 1] (Dreamer), and
    every discrete choice replaced by a uniform one with probability `amount`."""
    parts = []
    for key, part in zip(spec.widths, action.split(list(spec.widths.values()), -1), strict=True):
        if key not in spec.classes:
            parts.append((part + amount * torch.randn_like(part)).clamp(-1, 1))
            continue
        for choice in part.split(spec.classes[key], -1):
            other = torch.zeros_like(choice).scatter_(-1, torch.rand_like(choice).argmax(-1, keepdim=True), 1.0)
            parts.append(torch.where(torch.rand_like(choice[:, :1]) < amount, other, choice))
    return torch.cat(parts, -1)


class Plan2Explore(nn.Module):
    """Seeks states in which an ensemble of one-step predictors disagrees (arXiv:2005.05960).

    Args:
      sizes: {what may be predicted: its width}, of which `config.disag_target` names one.
      feat_size, act_size: widths of features and actions.
      config: the whole configuration.
      behavior: ImagBehavior of its own, which maximises the disagreement.
    """

    def __init__(self, sizes, feat_size, act_size, config, behavior):
        super().__init__()
        self.behavior = behavior
        self.target = config.disag_target
        self.conditioned = config.disag_action_cond
        self.log = config.disag_log
        self.intr_scale, self.extr_scale = config.expl_intr_scale, config.expl_extr_scale
        inputs, units = feat_size + act_size * self.conditioned, config.disag_units
        style = Style(config.norm, config.act, config.init)
        self.ensemble = nn.ModuleList(
            nn.Sequential(
                MLP(inputs, config.disag_layers, units, style), Linear(units, sizes[self.target], 1.0, style.init)
            )
            for _ in range(config.disag_models)
        )

    def predict(self, feat, action):
        """Features (..., F) and the actions taken there (..., A) -> what each model says comes next (M, ..., n)."""
        inputs = torch.cat([feat, action.to(feat.dtype)], -1) if self.conditioned else feat
        return torch.stack([model(inputs).float() for model in self.ensemble])

    def ensemble_loss(self, feat, action, target, is_first):
        """The models' squared errors, averaged; no gradient reaches the world model.

        Args:
          feat: (B, T, F); action: (B, T, A), action[t] led to feat[t]; target: (B, T, n); is_first: (B, T).
        Returns: (B, T - 1), 0 where the next step belongs to another episode.
        """
        predicted = self.predict(feat[:, :-1].detach(), action[:, 1:])
        error = (predicted - target[:, 1:].detach().float()).square().sum(-1).mean(0)
        return error * ~is_first[:, 1:]

    def intrinsic(self, feat, actions):
        """The disagreement on arriving in each state: features (H + 1, N, F), actions (H, N, A) -> (H + 1, N)."""
        variance = self.predict(feat[:-1], actions).var(0).mean(-1)
        novelty = variance.clamp(min=1e-12).log() if self.log else variance
        return torch.cat([torch.zeros_like(novelty[:1]), novelty])

    def reward(self, extrinsic):
        """The reward function of its behaviour, given the task's."""

        def combined(feat, actions):
            total = self.intr_scale * self.intrinsic(feat, actions)
            return total + self.extr_scale * extrinsic(feat, actions) if self.extr_scale else total

        return combined
