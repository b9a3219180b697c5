"""Behavior that learns by proximal policy optimization from what it imagines (PPO, arXiv:1707.06347)."""

import functools

import torch
import torch.nn as nn

from models import ImagBehavior
from ops import collectives
from ops.math import correction, lambda_return
from ops.optim import OwnAdam
from ops.random import rand
from tools import UserError


class PPO(ImagBehavior):
    """DreamerV3's actor and critic, learned in several epochs over the same imagined trajectories.

        delta[t] = r[t+1] + c[t+1] v[t+1] - v[t]                      c: predicted continuation times 1 - 1 / horizon
        A[t] = delta[t] + lam c[t+1] A[t+1]                           (GAE, arXiv:1506.02438, eq. 16)
        ratio = pi(a[t] | s[t]) / pi_old(a[t] | s[t])                 pi_old: the policy that imagined
        policy = -E w[t] (min(ratio A, clip(ratio, 1 - e, 1 + e) A) + entropy bonus)   (PPO, eq. 7 and 9)

    As v[t] + A[t] is the lambda-return that DreamerV3's critic predicts, this one does the same; its slow copy, too,
    does what it does there. Each state weighs w[t], the probability to have come so far. All learning is in `improve`,
    by Adams of its own after the world model's step, so that no gradient reaches the world model; the critic learns at
    imagined states alone, without `loss_scales.repval`, and `actor.grad` says nothing here.

    The number of minibatches is fixed. From the first one on in which the policy has gone further than `ppo.kl_stop`
    from the one that imagined, the actor stays as it is, and the critic learns on (as in Spinning Up's PPO).

    Args: as for ImagBehavior.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__(feat_size, act_spec, config)
        c = config.ppo
        self.clip, self.epochs, self.minibatches = c.clip, c.epochs, c.minibatches
        self.kl_stop, self.value_clip = c.kl_stop or float("inf"), c.value_clip
        self.normalize = ADVANTAGES[c.advantage]
        meta = config.meta
        learned = dict.fromkeys(meta.learn, (meta.rate, meta.limit, meta.start))
        self.adapted = AdaptedEntropy(self.actor, config) if c.entropy_target else None
        make = functools.partial(OwnAdam, eps=c.eps, clip=c.grad_clip)
        self.actor_opt = make(self.actor.parameters(), c.actor_lr, learned=learned.get("actor_lr"))
        self.critic_opt = make(self.critic.parameters(), c.critic_lr, learned=learned.get("critic_lr"))

    def optimized(self):
        """There is nothing for the agent's optimizer."""
        return {}

    def bonus(self, policy):
        """Return what the entropy of a policy adds to its gain, of its batch shape."""
        return self.adapted(policy) if self.adapted else self.entropy * policy.entropy()

    def compile_parts(self):
        """Compile the policy's step in imagination, the estimates, and what a minibatch costs."""
        for name in ("policy", "estimate", "policy_loss", "value_loss"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def losses(self, world, rollout, batch, rewards):
        """Return no loss, and {name: tensor} of what `improve` learns from; see ImagBehavior."""
        with torch.no_grad():
            reward, cont = rewards(rollout), world.discounts(rollout.feat)  # (H + 1, N)
            return {}, self.estimate(rollout.feat, rollout.actions, reward, cont, cont.cumprod(0))

    def actor_loss(self, world, rollout, rewards, outs):
        """Return the actor's loss over whole trajectories, 0-d, with gradient towards all that it depends on; and what
        it is made of, as `estimate`, with the features (H + 1, N, F).

        outs: what `losses` returned of the policy that imagined.
        """
        with torch.no_grad():
            reward, cont = rewards(rollout), world.discounts(rollout.feat)  # (H + 1, N)
        return self.whole_loss(rollout.feat, rollout.actions, reward, cont, cont.cumprod(0), outs["logpi"])

    def whole_loss(self, feat, actions, reward, cont, weight, logpi):
        """Return what `actor_loss` does; logpi: (H, N) of the actions when they were imagined, else as `estimate`."""
        outs = PPO.estimate(self, feat, actions, reward, cont, weight)  # as written: what is compiled has no gradient
        parts = (feat, actions, logpi, outs["adv"], weight)  # of its gradient
        loss, _, _ = PPO.policy_loss(self, *(part[: len(actions)].flatten(0, 1) for part in parts))
        return loss, {**outs, "feat": feat}

    def estimate(self, feat, actions, reward, cont, weight):
        """Return {name: tensor} of what is known about trajectories before anything is learned from them.

        Args:
          feat: (H + 1, N, F); actions: (H, N, A); reward: (H + 1, N) on arriving, the first is not used.
          cont: (H + 1, N) discount of what follows; weight: (H + 1, N) of each state in the losses.
        """
        value, slow = self.critic(feat).mode(), self.slow(feat).mode()  # (H + 1, N)
        ret = lambda_return(torch.zeros_like(cont.T), 1 - cont.T, reward.T, value.T, 1.0, self.lam).T  # (H, N)
        offset, scale = self.return_norm(ret)
        adv = self.normalize(ret - value[:-1], weight[:-1], scale)  # (H, N)
        policy = self.actor(feat[:-1])
        logpi, entropy = policy.log_prob(actions), policy.entropy()  # (H, N)
        outs = {"reward": reward, "cont": cont, "weight": weight, "value": value, "slow": slow, "ret": ret, "adv": adv}
        outs |= {"logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}
        return outs | ({"entropy_share": self.adapted.shares(policy).flatten(0, 1).mean(0)} if self.adapted else {})

    def replay_losses(self, world, states, batch, outs):
        """Nothing is learned from replayed rewards."""
        return {}

    def improve(self, rollout, outs=None):
        """Learn from the trajectories; return {name: 0-d metric}."""
        return self.learn(rollout.feat, rollout.actions, outs)

    def learn(self, feat, actions, outs):
        """Pass `epochs` times over trajectories in minibatches of random steps, then move the slow critic.

        Args:
          feat: (H + 1, N, F); actions: (H, N, A); outs: what `estimate` returned of them.
        Returns: {name: 0-d metric}, means over all minibatches; actor_steps is the share that the actor learned from.
        """
        length = len(actions)
        names = ("logpi", "adv", "weight", "ret", "value", "slow")
        data = {"feat": feat, "actions": actions, **{name: outs[name] for name in names}}
        data = {name: value[:length].flatten(0, 1) for name, value in data.items()}  # (H N, ...)
        going, seen = torch.ones((), dtype=torch.bool, device=feat.device), []
        for _ in range(self.epochs):
            for index in rand(data["adv"].shape, feat.device).argsort().chunk(self.minibatches):
                part = {name: value[index] for name, value in data.items()}
                metrics, going = self.learn_part(part, going)
                seen.append(torch.stack(list(metrics.values())))
        super().improve(None)
        metrics = dict(zip(metrics, torch.stack(seen).mean(0), strict=True))
        metrics |= self.adapted.adapt(outs["entropy_share"]) if self.adapted else {}
        for name in filter(self.learns, ("actor", "critic")):
            opt = getattr(self, f"{name}_opt")
            metrics |= {f"{name}_lr": opt.lr * opt.factor, f"{name}_factor": opt.factor.clone()}
        return metrics

    def learns(self, name):
        """True if the rate of the actor or the critic learns, too."""
        return getattr(self, f"{name}_opt").learned is not None

    def learn_part(self, part, going):
        """Take a step of the actor, if it is still `going`, and one of the critic on a minibatch {name: (M, ...)}.

        Returns: {name: 0-d metric}, and the 0-d bool tensor that says whether the actor is going on.
        """
        loss, kl, clipped = self.policy_loss(*(part[name] for name in ("feat", "actions", "logpi", "adv", "weight")))
        going = going & (collectives.mean(kl) <= self.kl_stop)
        norm = self.actor_opt.step(loss, going)
        names = ("feat", "ret", "value", "slow", "weight")
        value_loss = self.value_loss(*(part[name] for name in names))
        metrics = {"policy_loss": loss.detach(), "value_loss": value_loss.detach(), "actor_kl": kl}
        metrics |= {"actor_clipped": clipped, "actor_steps": going.float(), "actor_grad_norm": norm}
        return {**metrics, "critic_grad_norm": self.critic_opt.step(value_loss)}, going

    def policy_loss(self, feat, actions, logpi, adv, weight):
        """Return the policy's loss on a minibatch, how far it has gone from the one that imagined, and the share of
        ratios that were clipped: 0-d each.

        Args: feat: (M, F); actions: (M, A); logpi: (M,) their log-probabilities then; adv, weight: (M,).
        """
        policy = self.actor(feat)
        change = policy.log_prob(actions) - logpi
        ratio = change.exp()
        gain = torch.minimum(ratio * adv, ratio.clamp(1 - self.clip, 1 + self.clip) * adv)
        loss = -(weight * (gain + self.bonus(policy))).mean()
        with torch.no_grad():  # the KL by its estimate E[ratio - 1 - log ratio], which is never negative
            kl = (weight * (ratio - 1 - change)).sum() / weight.sum().clamp(min=1e-8)
            clipped = ((ratio - 1).abs() > self.clip).float().mean()
        return loss, kl, clipped

    def value_loss(self, feat, ret, value, slow, weight):
        """Return the critic's loss on a minibatch, 0-d. Where `ppo.value_clip` says so, a value that has moved so far
        towards its return has nothing to gain, as in the authors' code of PPO.

        Args: feat: (M, F); ret, value, slow: (M,) returns, and the critics' values then; weight: (M,).
        """
        critic = self.critic(feat)
        loss = self.critic_loss(critic, ret, slow)
        if self.value_clip:
            now = critic.mode().detach()
            clipped = value + (now - value).clamp(-self.value_clip, self.value_clip)
            loss = loss * ((now - ret).square() >= (clipped - ret).square())
        return (weight * loss).mean()


class AdaptedEntropy(nn.Module):
    """A bonus for entropy whose weights hold it near a share of the greatest (danijar/director, AutoAdapt).

        share = (entropy - least) / (greatest - least)       of each variable of the action
        bonus = sum of weight * share

    A weight starts at 1 and is multiplied or divided by 1.1 in an update whose share is more than 10 % below or above
    `ppo.entropy_target`, within [1e-5, 100].

    Args:
      actor: Actor; config: the whole configuration.
    Raises UserError if meta-gradients move the weight, too, or a deviation of 0 is allowed.
    """

    LEAST, MOST = 1e-5, 100.0

    def __init__(self, actor, config):
        super().__init__()
        self.target = config.ppo.entropy_target
        low, high = torch.tensor(actor.entropy_ranges()).unbind(-1)
        if "entropy" in config.meta.learn:
            raise UserError("--meta.learn entropy: its weight is held to --ppo.entropy_target; 0 for a constant one")
        if not torch.isfinite(low).all():
            raise UserError("--ppo.entropy_target: --actor.min_std has to be above 0")
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("extent", high - low, persistent=False)
        self.register_buffer("weight", torch.ones_like(low))

    def shares(self, policy):
        """Return the share of the greatest entropy that a policy has, of each variable (..., n)."""
        return (policy.entropies() - self.low) / self.extent

    def forward(self, policy):
        """Return the bonus of a policy, of its batch shape."""
        return (self.weight * self.shares(policy)).sum(-1)

    @torch.no_grad()
    def adapt(self, share):
        """Move the weights by the mean shares (n,) of a batch; return metrics as 0-d tensors."""
        self.weight.mul_(correction(self.target, collectives.mean(share))).clamp_(self.LEAST, self.MOST)
        return {"entropy_share": share.mean(), "entropy_weight": self.weight.mean()}


def standardized(adv, weight, scale):
    """Return advantages with a weighted mean of 0 and a weighted variance of 1 over all trajectories."""
    share = weight / collectives.mean(weight.sum()).clamp(min=1e-8)
    centered = adv - collectives.mean((share * adv).sum())
    variance = collectives.mean((share * centered.square()).sum()).clamp(min=1e-16)  # at 0 the root has no gradient
    return centered / (variance.sqrt() + 1e-8)


# `ppo.advantage` -> function of advantages and weights (H, N), and of the scale of the returns, 0-d.
ADVANTAGES = {
    "std": standardized,
    "range": lambda adv, weight, scale: adv / scale,
    "none": lambda adv, weight, scale: adv,
}
