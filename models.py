"""What is learned: a world model from data, and behavior in imagination (DreamerV3, arXiv:2301.04104).

Letters: B batch, T time, H imagined steps, N = B T start states, D deter, S groups x K classes stoch, E embedding,
F = D + S K features, A actions.
"""

import contextlib
import copy
from typing import NamedTuple

import torch
import torch.nn as nn

import ops.distributions as dists
from modalities.joint import MultiDecoder, MultiEncoder
from networks import Actor, Head, scalar_head
from ops import collectives, kernels
from ops.layers import Style, cast_once
from ops.math import lambda_return
from rssm import State, feature, make_rssm
from tools import UserError

# ---------------------------------------------------------------------------
# World model


class WorldModel(nn.Module):
    """Encode observations, filter and imagine latent states, predict observations, rewards and continuation.

    Args:
      obs_spec: ObsSpec; act_spec: ActionSpec; config: the whole configuration.
      dtype: compute dtype of the activations.
    """

    def __init__(self, obs_spec, act_spec, config, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        style, cont = Style(config.norm, config.act, config.init), config.cont_head
        self.encoder = MultiEncoder(obs_spec, config)
        self.rssm = make_rssm(self.encoder.size, act_spec, config.rssm, style, config.ops.scan)
        deter, stoch = self.rssm.deter, self.rssm.latent.size
        self.feat_size = deter + stoch
        self.decoder = MultiDecoder(obs_spec, deter, stoch, config)
        self.reward = scalar_head(self.feat_size, config.reward_head, style)
        sizes = cont.layers, cont.units
        self.cont = Head(self.feat_size, 1, dists.Bernoulli, *sizes, style=style) if cont.use else None
        self.discount = 1 - 1 / config.horizon
        self.cont_target = (self.discount if cont.discounted else 0.0) or 1.0  # of a state that is not terminal
        self.squash_reward = REWARDS[config.clip_rewards]
        self.clip_kl = CLIPS[config.kl_clip]
        self.free_nats = config.free_nats

    def prepare(self, batch):
        """{key: (B, T, ...)} as the replay gives it -> as the model predicts it."""
        return {**self.encoder.prepare(batch), "reward": self.squash_reward(batch["reward"])}

    def encode(self, batch, learning=False):
        """{key: (B, T, ...)} -> embedding (B, T, E); in learning, some observations may be left out on purpose."""
        return self.encoder(batch, self.dtype, learning)

    def losses(self, states, post, batch):
        """Return the losses {name: (B, T)} of all predictions from the states of a batch, and {name: (B, T)} metrics.

        Args:
          states: State (B, T, ...); post: their distribution, batch shape (B, T, S).
          batch: {key: (B, T, ...)} prepared, with reward and is_terminal.
        """
        feat = feature(states)  # (B, T, F)
        prior = self.rssm.predict(states.deter)
        losses = self.decoder.losses(states, batch)
        losses["reward"] = -self.reward(feat).log_prob(batch["reward"])
        if self.cont is not None:
            losses["cont"] = -self.cont(feat).log_prob((1 - batch["is_terminal"].float()) * self.cont_target)
        losses["dyn"], losses["rep"], kl = kl_losses(self.rssm.latent, post, prior, self.free_nats, self.clip_kl)
        return losses, {"kl": kl, "post_ent": post.entropy().sum(-1), "prior_ent": prior.entropy().sum(-1)}

    def rewards(self, rollout):
        """Return the predicted reward of arriving in each imagined state: (H + 1, N)."""
        return self.reward(rollout.feat).mode()

    def discounts(self, feat):
        """Features (..., F) -> discount of what follows (...): the predicted continuation times 1 - 1 / horizon."""
        if self.cont is None:
            return torch.full(feat.shape[:-1], self.discount, device=feat.device)
        return self.cont(feat).mean() * (self.discount / self.cont_target)

    @torch.no_grad()
    def open_loop(self, batch, state, seen):
        """Reconstruct the first `seen` steps, then predict the rest from the actions alone.

        Args:
          batch: {key: (B, T, ...)} prepared, with action; state: State (B, ...) before the first step.
        Returns: {key: prediction (B, T, ...)}
        """
        embed, action = self.encode(batch), batch["action"]
        states, _ = self.rssm.observe(embed[:, :seen], action[:, :seen], batch["is_first"][:, :seen], state)
        actions = action[:, seen:].transpose(0, 1)
        ahead, _ = self.rssm.imagine(states.map(lambda x: x[:, -1]), actions, len(actions))
        ahead = ahead.map(lambda x: x[1:].transpose(0, 1))
        parts = self.decoder(states), self.decoder(ahead)
        return {key: torch.cat([part[key].mode() for part in parts], 1) for key in parts[0]}


# What the model makes of rewards.
REWARDS = {"none": lambda reward: reward, "tanh": torch.tanh}

# Free nats, below which a KL (B, T) does not pull: in every step (DreamerV3, PlaNet), or in the mean over the batch
# (Dreamer, DreamerV2), of all ranks.
CLIPS = {
    "step": lambda kl, free: kl.clamp(min=free),
    "mean": lambda kl, free: collectives.mean(kl.mean()).clamp(min=free).expand(kl.shape),
}


def kl_losses(latent, post, prior, free, clip=CLIPS["step"]):
    """KL balancing by stopped gradients, with free nats (DreamerV3, eq. 5).

    The gradient of dyn + rep is that of KL(post || prior), so that weights of 1 and 1 are PlaNet and Dreamer, and
    weights of alpha and 1 - alpha are DreamerV2.

    Returns: dyn = clip(KL(sg(post) || prior)), rep = clip(KL(post || sg(prior))), KL: (B, T) each.
    """
    dyn = latent.kl(post.detach(), prior)
    rep = latent.kl(post, prior.detach())
    return clip(dyn, free), clip(rep, free), rep


# ---------------------------------------------------------------------------
# Behavior


@contextlib.contextmanager
def frozen(module):
    """Freeze the parameters of a module in the body; gradients still flow through it."""
    params = [param for param in module.parameters() if param.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


class Rollout(NamedTuple):
    """Trajectories that a behavior imagined.

        index        0        1        ...  H
        state, feat  start    imagined ...  imagined
        action       a_0      a_1      ...           a_t is taken in state t: 15 actions give 15 returns

    states: State (H + 1, N, ...); actions: (H, N, A); feat: (H + 1, N, F).
    """

    states: State
    actions: torch.Tensor
    feat: torch.Tensor


class ImagBehavior(nn.Module):
    """DreamerV3's actor and critic, learned from trajectories that the world model imagines.

    Args:
      feat_size: width of the features; act_spec: ActionSpec; config: the whole configuration.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__()
        style, c, n = Style(config.norm, config.act, config.init), config.critic, config.return_norm
        self.actor = Actor(feat_size, act_spec, config.actor, style)
        self.critic = scalar_head(feat_size, c, style)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_every, self.slow_reg = c.slow_rate, c.slow_every, c.slow_reg
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.return_norm = ReturnNorm(n.rate, n.limit, n.low, n.high)
        self.horizon = config.imag_horizon
        self.discount, self.lam = 1 - 1 / config.horizon, config.lam
        self.entropy = config.actor.entropy
        self.replayed = config.loss_scales.repval > 0
        self.kernel = kernels.imagining(config, act_spec) if config.ops.scan == "triton" else None

    def optimized(self):
        """Return {name of an optimizer's group: module}."""
        return {"actor": self.actor, "critic": self.critic}

    def policies(self):
        """Return {name: module} of what acts."""
        return {"actor": self.actor}

    def compile_parts(self):
        """Compile the policy's step in imagination and the losses."""
        self.policy = torch.compile(self.policy, dynamic=False)
        self.losses = torch.compile(self.losses, dynamic=False)

    def initial(self, count, device):
        """Nothing is carried from step to step."""
        return ()

    def act(self, world, state, carry, mode):
        """Choose actions (N, A) in posterior states (N, ...): the policy's mode if `mode` is "mode", else a sample."""
        policy = self.actor(feature(state))
        if mode == "mode":
            return policy.mode(), carry
        return policy.sample(self.actor.noise(state.deter.shape[:1], state.deter.device)), carry

    def policy(self, deter, stoch, noise):
        """Draw actions (N, A) in states (N, D), (N, S, K), by the actor's noise (N, n)."""
        return self.actor(feature(State(deter, stoch)).detach()).sample(noise)

    @torch.no_grad()
    def rollout(self, world, states):
        """Imagine with the policy from every state (B, T, ...): a Rollout."""
        start = states.map(lambda x: x.detach().flatten(0, 1))  # (N, ...)
        noise = self.actor.noise((self.horizon, len(start.deter)), start.deter.device)  # (H, N, n)
        with cast_once(start.deter.dtype, world.rssm, self.actor):
            if self.kernel:
                states, actions = self.kernel(world.rssm, self.actor, start, noise)
            else:
                each = iter(noise)
                states, actions = world.rssm.imagine(start, lambda state: self.policy(*state, next(each)), self.horizon)
        return Rollout(states, actions, feature(states))

    def losses(self, world, rollout, batch, rewards):
        """The actor learns by REINFORCE with normalized returns, the critic to predict the returns (eq. 6 and 7).

        Args:
          world: WorldModel; rollout: Rollout; batch: {key: (B, T, ...)} from whose states it starts.
          rewards: function of a Rollout -> (H + 1, N), predicted on arriving; the first is not used.
        Returns: {name: loss (H, N)}, {name: tensor} for metrics and `replay_losses`.
        """
        critic = self.critic(rollout.feat)
        with torch.no_grad():
            reward, cont = rewards(rollout), world.discounts(rollout.feat)  # (H + 1, N)
            value, slow = critic.mode(), self.slow(rollout.feat).mode()  # (H + 1, N)
        ret = lambda_return(torch.zeros_like(cont.T), 1 - cont.T, reward.T, value.T, 1.0, self.lam).T  # (H, N)
        weight = cont.cumprod(0)  # (H + 1, N)
        offset, scale = self.return_norm(ret)
        adv = (ret - value[:-1]) / scale  # (H, N)
        policy = self.actor(rollout.feat[:-1])
        logpi, entropy = policy.log_prob(rollout.actions), policy.entropy()  # (H, N)
        target = torch.cat([ret, value[-1:]])  # (H + 1, N)
        losses = {
            "policy": -weight[:-1] * (logpi * adv + self.entropy * entropy),
            "value": weight[:-1] * self.critic_loss(critic, target, slow)[:-1],
        }
        outs = {"reward": reward, "cont": cont, "weight": weight, "value": value, "slow": slow, "ret": ret, "adv": adv}
        outs |= {"logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}
        return losses, {name: out.detach() for name, out in outs.items()}

    def replay_losses(self, world, states, batch, outs):
        """The critic also learns from the rewards of the replayed sequence; its gradient reaches the world model.

        Args:
          states: posterior State (B, T, ...); batch: with reward, is_last, is_terminal (B, T).
          outs: what `losses` returned; the imagined return of each state stands in for what follows the sequence.
        Returns: {name: loss (B, T - 1)}.
        """
        if not self.replayed:
            return {}
        boot = outs["ret"][0].view(batch["reward"].shape)  # (B, T)
        feat = feature(states)  # (B, T, F)
        with torch.no_grad():
            slow = self.slow(feat).mode()  # (B, T)
        target = torch.cat([self.replay_returns(batch, boot), boot[:, -1:]], 1)  # (B, T)
        loss = (1 - batch["is_last"].float()) * self.critic_loss(self.critic(feat), target, slow)
        return {"repval": loss[:, :-1]}

    def replay_returns(self, batch, boot):
        """Return the returns (B, T - 1) of the replayed rewards; boot (B, T): estimates of each state's return."""
        last, term, reward = batch["is_last"], batch["is_terminal"], batch["reward"]
        return lambda_return(last, term, reward, boot, self.discount, self.lam)

    def critic_loss(self, critic, target, slow):
        """Pull the critic's distribution to the target, and to the slow critic's value."""
        return -critic.log_prob(target) - self.slow_reg * critic.log_prob(slow)

    @torch.no_grad()
    def improve(self, rollout, outs=None):
        """After a gradient step: move the slow critic towards the critic, at every `slow_every`-th call."""
        slow, fast = list(self.slow.parameters()), list(self.critic.parameters())
        rate = self.slow_rate * (self.updates % self.slow_every == 0)
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))
        self.updates += 1
        return {}

    def metrics(self, outs):
        """Return metrics of what `losses` returned, mostly means over the imagined trajectories: 0-d tensors."""
        adv, ret = (collectives.gather(outs[name]) for name in ("adv", "ret"))
        ret = (ret - outs["ret_offset"]) / outs["ret_scale"]
        slow = {"imag_slow_value": outs["slow"].mean()} if "slow" in outs else {}
        return slow | {
            "actor_entropy": outs["entropy"].mean(),
            "adv": outs["adv"].mean(),
            "adv_std": adv.std(correction=0),
            "adv_mag": outs["adv"].abs().mean(),
            "imag_reward": outs["reward"].mean(),
            "imag_cont": outs["cont"].mean(),
            "imag_return": outs["ret"].mean(),
            "imag_return_norm": ret.mean(),
            "imag_return_min": ret.min(),
            "imag_return_max": ret.max(),
            "imag_return_rate": (ret.abs() >= 1).float().mean(),
            "imag_value": outs["value"].mean(),
            "imag_weight": outs["weight"].mean(),
            "return_scale": outs["ret_scale"],
        }


class ReturnNorm(nn.Module):
    """Offset and scale of the returns, averaged over batches (DreamerV3, eq. 7).

    Args:
      rate: share of the new batch; limit: least scale.
      low, high: percentiles in percent; the scale is the range between them.
    """

    def __init__(self, rate, limit, low, high):
        super().__init__()
        if low > high:
            raise UserError(f"--return_norm.low {low} is above --return_norm.high {high}")
        self.rate, self.limit = rate, limit
        self.register_buffer("percentiles", torch.tensor([low, high]) / 100, persistent=False)
        self.register_buffer("range", torch.zeros(2))

    @torch.no_grad()
    def forward(self, returns):
        """Fold in a batch of returns of any shape, and those of the other ranks; return (offset, scale), 0-d."""
        self.range.lerp_(torch.quantile(collectives.gather(returns.float().flatten()), self.percentiles), self.rate)
        low, high = self.range
        return low, (high - low).clamp(min=self.limit)
