"""Behavior of DreamerV2 (arXiv:2010.02193, section 2.2; danijar/dreamerv2, agent.py ActorCritic)."""

import torch

from behaviors.dynamics import DynamicsBehavior
from ops.math import lambda_target
from tools import UserError


class DreamerV2(DynamicsBehavior):
    """Returns and baselines come from the slow critic, and a state's value includes the reward of arriving there.

        state    z_0  z_1  ...  z_{H-1}  z_H
        target   t_0  t_1  ...  t_{H-1}         t_h = r_h + c_h ((1 - lam) v_{h+1} + lam t_{h+1}),  t_H = v_H
        weight   1    c_0  ...  c_0 ... c_{H-2}

    The action in z_h first shows in t_{h+1}, so that H steps leave the actor H - 1 terms; the critic learns H.

    Args: as for DynamicsBehavior. Raises UserError if the horizon leaves the actor nothing.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__(feat_size, act_spec, config)
        if self.horizon < 2:
            raise UserError("--imag_horizon 1 leaves nothing to the actor of DreamerV2, which needs at least 2")

    def losses(self, world, rollout, batch, rewards):
        """The actor climbs the returns, by the dynamics, REINFORCE or both (eq. 6); the critic predicts them (eq. 5).

        Returns: {policy: (H - 1, N), value: (H, N)}, {name: tensor} for metrics.
        """
        feat, going = rollout.feat, 1 - batch["is_terminal"].flatten().float()  # (H + 1, N, F), (N,)
        with torch.set_grad_enabled(self.share > 0):
            reward, cont = rewards(rollout), world.discounts(feat)  # (H + 1, N)
            if world.cont is not None:
                cont = torch.cat([going[None] * self.discount, cont[1:]])  # the truth, where it is known
            value = self.slow(feat).mode()  # (H + 1, N)
        target = lambda_target(reward, value, cont, self.lam)  # (H, N)
        weight = torch.cat([torch.ones_like(cont[:1]), cont[:-1]]).cumprod(0).detach()  # (H + 1, N)

        # --- Actor: an action counts from the state on that it leads to. Where both gradients are mixed, that of the
        # log-probability also flows through the action, as in the code's `both`.
        policy, ret, adv = self.actor(feat[:-2].detach()), target[1:], target[1:] - value[:-2]  # (H - 1, N)
        logpi, entropy = policy.log_prob(rollout.actions[:-1]), policy.entropy()  # (H - 1, N)
        objective = self.share * ret + (1 - self.share) * logpi * self.held(adv)

        # --- Critic
        critic = self.critic(feat[:-1].detach())
        losses = {
            "policy": -weight[:-2] * (objective + self.entropy * entropy),
            "value": -weight[:-1] * critic.log_prob(target.detach()),
        }
        outs = {"reward": reward, "cont": cont, "weight": weight, "value": value, "slow": value, "ret": target}
        outs |= {"adv": adv, "logpi": logpi, "entropy": entropy}
        outs |= {"ret_offset": torch.zeros_like(target[0, 0]), "ret_scale": torch.ones_like(target[0, 0])}
        return losses, {name: out.detach() for name, out in outs.items()}
