"""What is learned: the world model from data, the behaviour in imagination (DreamerV3, arXiv:2301.04104)."""

import copy

import torch
import torch.nn as nn

import distributions as dists
from encoders import MultiDecoder, MultiEncoder
from networks import RSSM, Actor, BlockGRU, Head, OneHotLatent, State, TwoHotHead, feature
from tools import lambda_return


class WorldModel(nn.Module):
    """Encodes observations, filters and imagines latent states, predicts observations, rewards and continuation.

    Args:
      obs_spec: ObsSpec; act_spec: ActionSpec.
      config: the whole configuration.
      dtype: compute dtype of the activations.
    """

    def __init__(self, obs_spec, act_spec, config, dtype=torch.float32):
        super().__init__()
        c = config.rssm
        self.dtype = dtype
        self.keys = [*obs_spec.vectors, *obs_spec.images]
        self.encoder = MultiEncoder(obs_spec, config.encoder)
        latent = OneHotLatent(c.stoch, c.classes, c.unimix)
        cell = BlockGRU(c.deter, latent.size, act_spec.size, c.hidden, c.blocks, c.dyn_layers)
        self.rssm = RSSM(cell, latent, c.deter, c.hidden, self.encoder.size, c.img_layers, c.obs_layers)
        self.feat_size = c.deter + latent.size
        self.decoder = MultiDecoder(obs_spec, c.deter, latent.size, config.decoder)
        h = config.reward_head
        self.reward = TwoHotHead(self.feat_size, h.bins, h.layers, h.units, h.outscale)
        h = config.cont_head
        self.cont = Head(self.feat_size, 1, dists.Bernoulli, h.layers, h.units)
        self.free_nats = config.free_nats
        self.discount = 1 - 1 / config.horizon

    def encode(self, batch):
        """{key: (B, T, ...)} -> embedding (B, T, E)"""
        return self.encoder({key: batch[key] for key in self.keys}, self.dtype)

    def loss(self, batch, state, noise=None):
        """The world model's losses on a batch of sequences.

        Args:
          batch: {key: (B, T, ...)} as the replay gives it, with action, reward, is_first, is_terminal.
          state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, or None.
        Returns: {name: loss (B, T)}, the posterior State (B, T, ...), {name: (B, T) or 0-d metric}.
        """
        embed = self.encode(batch)
        states, post = self.rssm.observe(embed, batch["action"], batch["is_first"], state, noise)
        prior = self.rssm.predict(states.deter)
        feat = feature(states)
        cont_target = (1 - batch["is_terminal"].float()) * self.discount
        losses = {key: -dist.log_prob(batch[key]) for key, dist in self.decoder(states).items()}
        losses["reward"] = -self.reward(feat).log_prob(batch["reward"])
        losses["cont"] = -self.cont(feat).log_prob(cont_target)
        losses["dyn"], losses["rep"], kl = kl_losses(self.rssm.latent, post, prior, self.free_nats)
        metrics = {"kl": kl, "post_ent": post.entropy().sum(-1), "prior_ent": prior.entropy().sum(-1)}
        return losses, states, metrics

    @torch.no_grad()
    def open_loop(self, batch, state, context):
        """Reconstruct the first `context` steps, then predict the rest from the actions alone.

        Args:
          batch: {key: (B, T, ...)}; state: State (B, ...) before the first step; context: number of steps seen.
        Returns: {image key: (B, T, H, W, C) in [0, 1]}
        """
        embed = self.encode(batch)
        seen, _ = self.rssm.observe(
            embed[:, :context], batch["action"][:, :context], batch["is_first"][:, :context], state
        )
        actions = batch["action"][:, context:].transpose(0, 1)
        ahead, _ = self.rssm.imagine(seen.map(lambda x: x[:, -1]), actions, len(actions))
        ahead = ahead.map(lambda x: x[1:].transpose(0, 1))
        parts = [self.decoder(seen), self.decoder(ahead)]
        images = [key for key in parts[0] if batch[key].dtype == torch.uint8]
        return {key: torch.cat([part[key].mode() for part in parts], 1) for key in images}


def kl_losses(latent, post, prior, free):
    """KL balancing by stopped gradients, free nats by clipping each step's sum over the groups (DreamerV3, eq. 5).

    Returns: dyn = max(free, KL(sg(post) || prior)), rep = max(free, KL(post || sg(prior))), KL: (B, T) each.
    """
    dyn = latent.kl(post.detach(), prior)
    rep = latent.kl(post, prior.detach())
    return dyn.clamp(min=free), rep.clamp(min=free), rep


class ReturnNorm(nn.Module):
    """Offset and scale of the returns, averaged over batches (DreamerV3, eq. 7).

    Args:
      rate: share of the new batch; limit: least scale.
      low, high: percentiles in percent; the scale is the range between them.
      debias: divide the averages by the weight that real batches have in them.
    """

    def __init__(self, rate, limit, low, high, debias=False):
        super().__init__()
        self.rate, self.limit, self.debias = rate, limit, debias
        self.register_buffer("percentiles", torch.tensor([low, high]) / 100, persistent=False)
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, returns):
        """Fold in a batch of returns of any shape; returns (offset, scale), 0-d."""
        self.range.lerp_(torch.quantile(returns.float().flatten(), self.percentiles), self.rate)
        self.weight.lerp_(torch.ones_like(self.weight), self.rate)
        low, high = self.range / self.weight if self.debias else self.range
        return low, (high - low).clamp(min=self.limit)


class MomentNorm(nn.Module):
    """Mean and standard deviation of a signal, averaged over batches without bias.

    Args:
      rate: share of the new batch; limit: least scale.
    """

    def __init__(self, rate, limit):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, x):
        """Fold in a batch of any shape; returns (offset, scale), 0-d."""
        self.moments.lerp_(torch.stack([x.mean(), x.square().mean()]), self.rate)
        self.weight.lerp_(torch.ones_like(self.weight), self.rate)
        mean, square = self.moments / self.weight
        return mean, (square - mean.square()).clamp(min=0).sqrt().clamp(min=self.limit)


class ImagBehavior(nn.Module):
    """Actor and critic, learned from trajectories that the world model imagines.

    Args:
      feat_size: width of the features; act_spec: ActionSpec; config: the whole configuration.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__()
        self.actor = Actor(feat_size, act_spec, config.actor)
        c = config.critic
        self.critic = TwoHotHead(feat_size, c.bins, c.layers, c.units, c.outscale)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_every, self.slow_reg = c.slow_rate, c.slow_every, c.slow_reg
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        n = config.return_norm
        self.return_norm = ReturnNorm(n.rate, n.limit, n.low, n.high)
        self.horizon = config.imag_horizon
        self.lam = config.lam
        self.entropy = config.actor.entropy
        self.discount = 1 - 1 / config.horizon

    def imagine(self, world, start):
        """Trajectories of the policy from start states (N, ...): State (H + 1, N, ...), actions (H, N, A)."""
        shape = (self.horizon, len(start.deter))
        noise = iter(self.actor.noise(shape, start.deter.device))
        return world.rssm.imagine(start, lambda state: self.policy(*state, next(noise)), self.horizon)

    def policy(self, deter, stoch, noise):
        """Draw actions (N, A) in states (N, D), (N, S, K), by the actor's noise (N, n)."""
        return self.actor(feature(State(deter, stoch))).sample(noise)

    def loss(self, world, states, actions, reward):
        """Losses of actor and critic along imagined trajectories; no gradient reaches the world model.

            index        0        1        ...  H
            state        start    imagined ...  imagined
            action       a_0      a_1      ...           a_t is taken in state t
            reward, cont r_0      r_1      ...  r_H      predicted on arriving; r_0 is not used
            return       R_0      R_1      ...           R_t follows a_t: 15 actions give 15 returns

        Args:
          world: WorldModel, for the continuation.
          states: State (H + 1, N, ...), actions: (H, N, A), without gradient.
          reward: function of features (H + 1, N, F) -> (H + 1, N).
        Returns: {name: loss (H, N)}, {name: tensor} for metrics, returns and advantages among them.
        """
        with torch.no_grad():
            feat = feature(states)
            rewards, cont = reward(feat), world.cont(feat).mean()
            weight = cont.cumprod(0)
            slow = self.slow(feat).mode()
        critic = self.critic(feat)
        value = critic.mode().detach()
        ret = lambda_return(torch.zeros_like(cont.T), 1 - cont.T, rewards.T, value.T, 1.0, self.lam).T
        offset, scale = self.return_norm(ret)
        adv = (ret - value[:-1]) / scale
        policy = self.actor(feat[:-1])
        logpi, entropy = policy.log_prob(actions), policy.entropy()
        target = torch.cat([ret, slow[-1:]])
        value_loss = -(critic.log_prob(target) + self.slow_reg * critic.log_prob(slow))[:-1]
        losses = {
            "policy": -weight[:-1] * (logpi * adv + self.entropy * entropy),
            "value": weight[:-1] * value_loss,
        }
        outs = {"reward": rewards, "cont": cont, "weight": weight, "value": value, "slow": slow, "ret": ret, "adv": adv}
        return losses, {**outs, "logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}

    def replay_loss(self, states, batch, boot):
        """The critic's loss on the replayed sequence; its gradient reaches the world model.

        Args:
          states: posterior State (B, T, ...); batch: with reward, is_last, is_terminal (B, T).
          boot: (B, T) imagined return of each state.
        Returns: loss (B, T - 1), replayed returns (B, T - 1).
        """
        critic = self.critic(feature(states))
        with torch.no_grad():
            slow = self.slow(feature(states)).mode()
        args = batch["is_last"], batch["is_terminal"], batch["reward"], boot
        ret = lambda_return(*args, self.discount, self.lam)
        weight = 1 - batch["is_last"].float()
        target = torch.cat([ret, slow[:, -1:]], 1)
        loss = -weight * (critic.log_prob(target) + self.slow_reg * critic.log_prob(slow))
        return loss[:, :-1], ret

    @torch.no_grad()
    def update_slow(self):
        """Move the slow critic towards the critic, at every `slow_every`-th call, the first included."""
        slow, fast = list(self.slow.parameters()), list(self.critic.parameters())
        rate = self.slow_rate * (self.updates % self.slow_every == 0)
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))
        self.updates += 1
