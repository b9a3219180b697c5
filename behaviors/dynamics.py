"""An actor whose gradient comes, all of it or in part, through the world model: what the older forms share."""

import torch

from models import ImagBehavior, Rollout
from ops.math import lambda_return
from rssm import feature


class DynamicsBehavior(ImagBehavior):
    """As DreamerV3, but the actor also climbs the returns by their gradient through the imagined dynamics.

    The 2023 form overrides what it takes for an end and how it weighs states; the older ones have losses of their own.

    Args: as for ImagBehavior. `actor.grad` says `auto` for the dynamics if all actions are continuous and REINFORCE
      otherwise; `mixed` takes a share `actor.grad_mix` of the dynamics.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__(feat_size, act_spec, config)
        shares = {"reinforce": 0.0, "dynamics": 1.0, "mixed": config.actor.grad_mix}
        self.share = (shares | {"auto": 0.0 if act_spec.classes else 1.0})[config.actor.grad]

    def rollout(self, world, states):
        """Imagine with the policy from every state (B, T, ...): a Rollout, with gradient where that is wanted."""
        start = states.map(lambda x: x.detach().flatten(0, 1))  # (N, ...)
        noise = iter(self.actor.noise((self.horizon, len(start.deter)), start.deter.device))  # (H, N, n)
        with torch.set_grad_enabled(self.share > 0):
            states, actions = world.rssm.imagine(start, lambda state: self.policy(*state, next(noise)), self.horizon)
            return Rollout(states, actions, feature(states))

    def losses(self, world, rollout, batch, rewards):
        """Return the losses of actor and critic: as ImagBehavior's."""
        feat, alive = rollout.feat, 1 - batch["is_terminal"].flatten().float()
        critic = self.critic(feat.detach())
        with torch.no_grad():
            slow = self.slow(feat).mode()  # (H + 1, N)
        with torch.set_grad_enabled(self.share > 0):
            reward, cont = rewards(rollout), self.discounts(world, feat)  # (H + 1, N)
            value = self.values(feat) if self.share else critic.mode()  # (H + 1, N)
        ret = lambda_return(torch.zeros_like(cont.T), 1 - cont.T, reward.T, value.T, 1.0, self.lam).T  # (H, N)
        weight = self.weigh(cont.detach(), alive)  # (H + 1, N)
        offset, scale = self.return_norm(ret.detach())
        adv = (ret - value[:-1]) / scale  # (H, N)
        policy = self.actor(feat[:-1].detach())
        logpi, entropy = policy.log_prob(rollout.actions.detach()), policy.entropy()
        objective = (1 - self.share) * logpi * self.held(adv)
        if self.share:
            objective = objective + self.share * adv
        target = torch.cat([ret, value[-1:]]).detach()
        losses = {
            "policy": -weight[:-1] * (objective + self.entropy * entropy),
            "value": weight[:-1] * self.critic_loss(critic, target, slow)[:-1],
        }
        outs = {"reward": reward, "cont": cont, "weight": weight, "value": value, "slow": slow, "ret": ret, "adv": adv}
        outs |= {"logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}
        return losses, {name: out.detach() for name, out in outs.items()}

    def held(self, adv):
        """Return advantages that weigh a log-probability: without their gradient through the dynamics.

        By REINFORCE alone they have none, except towards constants that learn (`behaviors/meta.py`).
        """
        return adv.detach() if self.share else adv

    def discounts(self, world, feat):
        """Return the discount (H + 1, N) of what follows each state."""
        return world.discounts(feat)

    def values(self, feat):
        """Return the critic's values (...) of features (..., F), with a gradient towards these alone."""
        params = {name: param.detach() for name, param in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, params, (feat,)).mode()

    def weigh(self, cont, alive):
        """Return the weight (H + 1, N) of each state: the probability to have come so far.

        Args:
          cont: discounts (H + 1, N); alive: (N,) 0 where the start is terminal in truth.
        """
        return cont.cumprod(0)
