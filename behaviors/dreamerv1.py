"""Behavior of Dreamer (arXiv:1912.01603), as danijar/dreamer computes it."""

import torch

from behaviors.dynamics import DynamicsBehavior
from ops.math import lambda_target
from tools import UserError


class DreamerV1(DynamicsBehavior):
    """One critic, without a slow one; the actor climbs returns, by their gradient through the imagined dynamics.

    The value of a state includes the reward of arriving there, so that H actions give H - 1 returns, and the critic
    learns at imagined states alone:

        state    start   1       2       ...  H - 1            H
        action   a[0]    a[1]    a[2]    ...  a[H-1]
        return           ret[1]  ret[2]  ...  ret[H-1]           ret[h] = r[h] + c[h] ((1 - lam) v[h+1] + lam ret[h+1])
        weight           1       c[1]    ...  c[1] ... c[H-2]    ret[H] = v[H]

    Args: as for DynamicsBehavior. Raises UserError for what Dreamer cannot do.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__(feat_size, act_spec, config)
        if self.horizon < 2:
            raise UserError("--behavior dreamerv1 needs --imag_horizon 2 at least: H actions give H - 1 returns")
        if self.replayed:
            raise UserError("--behavior dreamerv1 has no critic on replayed data: --loss_scales.repval must be 0")
        self.spared = 1 if config.cont_head.use else 0

    def rollout(self, world, states):
        """Imagine from every state (B, T, ...); not from the last ones if the model predicts ends: it may be one."""
        steps = states.deter.shape[1] - self.spared
        return super().rollout(world, states.map(lambda x: x[:, :steps]))

    def losses(self, world, rollout, batch, rewards):
        """Return the losses (H - 1, N) of actor and critic, and {name: tensor} for metrics; see ImagBehavior."""
        feat = rollout.feat  # (H + 1, N, F)
        with torch.set_grad_enabled(self.share > 0):
            reward, cont, value = rewards(rollout), world.discounts(feat), self.values(feat)  # (H + 1, N)
        ret = lambda_target(reward[1:], value[1:], cont[1:], self.lam)  # (H - 1, N)
        weight = torch.cat([torch.ones_like(cont[:1]), cont[1:-2]]).detach().cumprod(0)  # (H - 1, N)
        offset, scale = self.return_norm(ret.detach())
        adv = (ret - value[:-2]) / scale  # (H - 1, N)
        policy = self.actor(feat[:-2].detach())  # of the action that led to each return's state
        logpi, entropy = policy.log_prob(rollout.actions[:-1].detach()), policy.entropy()  # (H - 1, N)
        objective = self.share * ret / scale + (1 - self.share) * logpi * self.held(adv)
        critic = self.critic(feat[1:-1].detach())
        losses = {
            "policy": -weight * (objective + self.entropy * entropy),
            "value": -weight * critic.log_prob(ret.detach()),
        }
        outs = {"reward": reward, "cont": cont, "weight": weight, "value": value, "ret": ret, "adv": adv}
        outs |= {"logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}
        return losses, {name: out.detach() for name, out in outs.items()}
