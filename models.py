"""What is learned: the world model from data, the behaviour in imagination (DreamerV3, arXiv:2301.04104)."""

import contextlib
import copy

import torch
import torch.nn as nn

import ops.distributions as dists
from modalities.image.nets import IMAGE_DISTS, ImageDecoder, ImageEncoder, TransposedDecoder
from modalities.vector.nets import VECTOR_DISTS, VectorDecoder, VectorEncoder
from networks import CELLS, LATENTS, RSSM, Actor, Head, State, feature, scalar_head
from ops.layers import DREAMERV3, Style
from ops.math import lambda_return


class MultiEncoder(nn.Module):
    """Any mix of vectors and images -> embedding [vectors, images] (..., size)."""

    def __init__(self, spec, config, style=DREAMERV3, cnn_style=DREAMERV3):
        super().__init__()
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorEncoder(spec.vectors, spec.classes, config, style)
        if spec.images:
            self.parts["image"] = ImageEncoder(spec.images, config, cnn_style)
        self.size = sum(part.size for part in self.parts.values())

    def forward(self, obs, dtype):
        """{key: (B, T, ...)} -> (B, T, size) in the compute dtype."""
        lead = next(iter(obs.values())).shape[:2]
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        assert all(value.shape[:2] == lead for value in obs.values()), {k: v.shape for k, v in obs.items()}
        return torch.cat([part(flat, dtype) for part in self.parts.values()], -1).unflatten(0, lead)


class MultiDecoder(nn.Module):
    """State -> one distribution per observation key."""

    def __init__(self, spec, deter, stoch, config, style=DREAMERV3, cnn_style=DREAMERV3):
        super().__init__()
        self.classes = spec.classes
        self.image_dist, self.vector_dist = IMAGE_DISTS[config.image_dist], VECTOR_DISTS[config.vector_dist]
        self.parts = nn.ModuleDict()
        if spec.vectors:
            self.parts["vector"] = VectorDecoder(spec.vectors, spec.classes, deter + stoch, config, style)
        if spec.images:
            kind = ImageDecoder if config.cnn == "pool" else TransposedDecoder
            self.parts["image"] = kind(spec.images, deter, stoch, config, cnn_style)

    def forward(self, state):
        """State (B, T, ...) -> {key: distribution over (B, T, ...)}"""
        lead = state.deter.shape[:2]
        deter, stoch = state.deter.flatten(0, 1), state.stoch.flatten(2).flatten(0, 1)
        outs = {}
        for name, part in self.parts.items():
            for key, out in part(deter, stoch).items():
                outs[key] = self.distribution(name, key, out.unflatten(0, lead))
        return outs

    def distribution(self, part, key, out):
        if part == "image":
            return self.image_dist(out)
        if key in self.classes:
            return dists.Classes(out, self.classes[key])
        return self.vector_dist(out)


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
        self.images = list(obs_spec.images)
        style = Style(config.norm, config.act, config.init)
        styles = style, style._replace(act=config.cnn_act)
        self.encoder = MultiEncoder(obs_spec, config.encoder, *styles)
        latent = LATENTS[c.latent](c)
        cell = CELLS[c.cell](c.deter, latent.size, act_spec.size, c, style)
        sizes = (c.deter, c.hidden, self.encoder.size, c.img_layers, c.obs_layers)
        self.rssm = RSSM(cell, latent, *sizes, style, learned=c.initial == "learned")
        self.feat_size = c.deter + latent.size
        self.decoder = MultiDecoder(obs_spec, c.deter, latent.size, config.decoder, *styles)
        self.reward = scalar_head(self.feat_size, config.reward_head, style)
        h = config.cont_head
        self.cont = Head(self.feat_size, 1, dists.Bernoulli, h.layers, h.units, style=style) if h.use else None
        self.discount = 1 - 1 / config.horizon
        self.cont_target = self.discount if h.discounted else 1.0  # of a state that is not terminal
        self.image_bits = config.image_bits
        self.squash_reward = REWARDS[config.clip_rewards]
        self.clip_kl = CLIPS[config.kl_clip]
        self.free_nats = config.free_nats

    def preprocess(self, batch):
        """{key: (B, T, ...)} as the replay gives it -> as the model predicts it."""
        images = {key: quantize(batch[key], self.image_bits) for key in self.images if self.image_bits < 8}
        rewards = {"reward": self.squash_reward(batch["reward"])} if "reward" in batch else {}
        return {**batch, **images, **rewards}

    def encode(self, batch):
        """{key: (B, T, ...)} -> embedding (B, T, E)"""
        return self.encoder({key: batch[key] for key in self.keys}, self.dtype)

    def discounts(self, feat):
        """Features (..., F) -> discount of what follows (...): the predicted continuation times 1 - 1 / horizon."""
        if self.cont is None:
            return torch.full(feat.shape[:-1], self.discount, device=feat.device)
        return self.cont(feat).mean() * (self.discount / self.cont_target)

    def loss(self, batch, state, noise=None):
        """The world model's losses on a batch of sequences.

        Args:
          batch: {key: (B, T, ...)} preprocessed, with action, reward, is_first, is_terminal.
          state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, or None.
        Returns: {name: loss (B, T)}, the posterior State (B, T, ...), {name: (B, T, ...)} that metrics and others need.
        """
        embed = self.encode(batch)
        states, post = self.rssm.observe(embed, batch["action"], batch["is_first"], state, noise)
        prior = self.rssm.predict(states.deter)
        feat = feature(states)
        losses = {key: -dist.log_prob(batch[key]) for key, dist in self.decoder(states).items()}
        losses["reward"] = -self.reward(feat).log_prob(batch["reward"])
        if self.cont is not None:
            losses["cont"] = -self.cont(feat).log_prob((1 - batch["is_terminal"].float()) * self.cont_target)
        losses["dyn"], losses["rep"], kl = kl_losses(self.rssm.latent, post, prior, self.free_nats, self.clip_kl)
        outs = {"kl": kl, "post_ent": post.entropy().sum(-1), "prior_ent": prior.entropy().sum(-1)}
        return losses, states, {**outs, "embed": embed}

    @torch.no_grad()
    def open_loop(self, batch, state, context):
        """Reconstruct the first `context` steps, then predict the rest from the actions alone.

        Args:
          batch: {key: (B, T, ...)}; state: State (B, ...) before the first step; context: number of steps seen.
        Returns: {image key: (B, T, H, W, C) in [0, 1]}
        """
        embed = self.encode(self.preprocess(batch))
        seen, _ = self.rssm.observe(
            embed[:, :context], batch["action"][:, :context], batch["is_first"][:, :context], state
        )
        actions = batch["action"][:, context:].transpose(0, 1)
        ahead, _ = self.rssm.imagine(seen.map(lambda x: x[:, -1]), actions, len(actions))
        ahead = ahead.map(lambda x: x[1:].transpose(0, 1))
        parts = [self.decoder(seen), self.decoder(ahead)]
        return {key: torch.cat([part[key].mode() for part in parts], 1) for key in self.images}


def quantize(image, bits):
    """Images in 0..255 with `bits` bits, and uniform noise in place of the rest (Glow, arXiv:1807.03039; PlaNet)."""
    levels = torch.div(image, 2 ** (8 - bits), rounding_mode="floor")
    return (levels + torch.rand(image.shape, device=image.device)) * (255 / 2**bits)


# What the model makes of rewards.
REWARDS = {"none": lambda reward: reward, "tanh": torch.tanh}

# Free nats, below which a KL (B, T) does not pull: in every step (DreamerV3, PlaNet), or in the mean over the batch
# (Dreamer, DreamerV2).
CLIPS = {
    "step": lambda kl, free: kl.clamp(min=free),
    "mean": lambda kl, free: kl.mean().clamp(min=free).expand(kl.shape),
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


@contextlib.contextmanager
def frozen(module):
    """What is computed within has no gradient towards the parameters of `module`, only through it."""
    params = [param for param in module.parameters() if param.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


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


# Weight (H + 1, N) of an imagined state, by name: the discounts (H + 1, N) up to it, its own included or not.
# `alive` (N,) is 0 where the start is terminal in truth, so that nothing counts beyond it; gamma is the full discount.
WEIGHTS = {
    "predicted": lambda cont, alive, gamma: cont.cumprod(0),
    "true_start": lambda cont, alive, gamma: torch.cat([alive[None], cont[1:]]).cumprod(0),
    "shifted": lambda cont, alive, gamma: torch.cat(
        [alive[None], torch.full_like(cont[:1], gamma), cont[1:-1]]
    ).cumprod(0),
}


def dynamics_share(config, spec):
    """The share of the actor's gradient that comes through the dynamics; the rest is REINFORCE.

    Args:
      config: of the actor; its `grad` says `auto` for the dynamics if all actions are continuous, REINFORCE otherwise.
      spec: ActionSpec.
    """
    shares = {"reinforce": 0.0, "dynamics": 1.0, "mixed": config.grad_mix, "auto": 0.0 if spec.classes else 1.0}
    return shares[config.grad]


class ImagBehavior(nn.Module):
    """Actor and critic, learned from trajectories that the world model imagines.

    Args:
      feat_size: width of the features; act_spec: ActionSpec; config: the whole configuration.
      replayed: whether the critic also learns from the rewards of the replayed sequence.
    """

    def __init__(self, feat_size, act_spec, config, replayed):
        super().__init__()
        style = Style(config.norm, config.act, config.init)
        self.actor = Actor(feat_size, act_spec, config.actor, style)
        c = config.critic
        self.critic = scalar_head(feat_size, c, style)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.slow_rate, self.slow_every, self.slow_reg = c.slow_rate, c.slow_every, c.slow_reg
        self.slow_target = c.slow_target
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        n = config.return_norm
        self.return_norm = ReturnNorm(n.rate, n.limit, n.low, n.high)
        self.horizon = config.imag_horizon
        self.lam = config.lam
        self.entropy = config.actor.entropy
        self.discount = 1 - 1 / config.horizon
        self.weigh = WEIGHTS[config.imag_weight]
        self.dynamics_share = dynamics_share(config.actor, act_spec)
        self.baseline = config.actor.baseline
        self.replayed = replayed

    def compile(self):
        """Compile the policy's step in imagination and the loss."""
        self.policy = torch.compile(self.policy, dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def act(self, world, state, mode):
        """Actions (N, A) in the posterior State (N, ...): the policy's mode where `mode` says so, or a sample."""
        policy = self.actor(feature(state))
        if mode == "mode":
            return policy.mode()
        return policy.sample(self.actor.noise(state.deter.shape[:1], state.deter.device))

    def imagine(self, world, start):
        """Trajectories of the policy from start states (N, ...): State (H + 1, N, ...), actions (H, N, A)."""
        shape = (self.horizon, len(start.deter))
        noise = iter(self.actor.noise(shape, start.deter.device))
        with torch.set_grad_enabled(self.dynamics_share > 0):
            return world.rssm.imagine(start, lambda state: self.policy(*state, next(noise)), self.horizon)

    def policy(self, deter, stoch, noise):
        """Draw actions (N, A) in states (N, D), (N, S, K), by the actor's noise (N, n)."""
        return self.actor(feature(State(deter, stoch)).detach()).sample(noise)

    def losses(self, world, states, batch, reward, imagine=None):
        """All losses of actor and critic; no gradient reaches the world model but that of the replayed sequence.

        Args:
          world: WorldModel; states: posterior State (B, T, ...); batch: {key: (B, T, ...)}.
          reward: function of features (H + 1, N, F) and actions (H, N, A) -> (H + 1, N).
          imagine: function (world, start State (N, ...)) -> imagined states and actions; the policy's own if None.
        Returns: {name: loss}, {name: tensor} for metrics.
        """
        lead = batch["reward"].shape
        start = states.map(lambda x: x.detach().flatten(0, 1))
        alive = 1 - batch["is_terminal"].flatten().float()
        with frozen(world):
            imagined, actions = (imagine or self.imagine)(world, start)
            losses, outs = self.loss(world, imagined, actions, alive, reward)
        losses = {name: loss.mean(0).view(lead) for name, loss in losses.items()}
        if self.replayed:
            losses["repval"], _ = self.replay_loss(states, batch, outs["ret"][0].view(lead))
        return losses, outs

    def loss(self, world, states, actions, alive, reward):
        """Losses of actor and critic along imagined trajectories.

            index        0        1        ...  H
            state        start    imagined ...  imagined
            action       a_0      a_1      ...           a_t is taken in state t
            reward, cont r_0      r_1      ...  r_H      predicted on arriving; r_0 is not used
            return       R_0      R_1      ...           R_t follows a_t: 15 actions give 15 returns

        Args:
          world: WorldModel, for the continuation.
          states: State (H + 1, N, ...), actions: (H, N, A), with the policy's gradient if that is wanted through them.
          alive: (N,) 0 where the start is a terminal state.
          reward: function of features (H + 1, N, F) and actions -> (H + 1, N).
        Returns: {name: loss (H, N)}, {name: tensor} for metrics, returns and advantages among them.
        """
        differentiable = self.dynamics_share > 0
        feat = feature(states)
        critic = self.critic(feat.detach())
        with torch.set_grad_enabled(differentiable):
            rewards, cont = reward(feat, actions), world.discounts(feat)
            slow = self.slow(feat).mode() if self.slow_target or self.slow_reg else None
            value = slow if self.slow_target else self.online_value(critic, feat)
            ret = lambda_return(torch.zeros_like(cont.T), 1 - cont.T, rewards.T, value.T, 1.0, self.lam).T
        weight = self.weigh(cont.detach(), alive, self.discount)
        offset, scale = self.return_norm(ret.detach())
        adv = (ret - value[:-1]) / scale
        policy = self.actor(feat[:-1].detach())
        logpi, entropy = policy.log_prob(actions.detach()), policy.entropy()
        objective = (1 - self.dynamics_share) * logpi * adv.detach()
        if differentiable:
            objective = objective + self.dynamics_share * (adv if self.baseline else ret / scale)
        losses = {
            "policy": -weight[:-1] * (objective + self.entropy * entropy),
            "value": weight[:-1] * self.critic_loss(critic, torch.cat([ret, value[-1:]]).detach(), slow)[:-1],
        }
        outs = {"reward": rewards, "cont": cont, "weight": weight, "value": value, "ret": ret, "adv": adv}
        outs |= {"logpi": logpi, "entropy": entropy, "ret_offset": offset, "ret_scale": scale}
        outs |= {} if slow is None else {"slow": slow}
        return losses, {name: out.detach() for name, out in outs.items()}

    def online_value(self, critic, feat):
        """The critic's values (H + 1, N), given its distribution at `feat`, with a gradient towards `feat` alone."""
        if not feat.requires_grad:
            return critic.mode()
        params = {name: param.detach() for name, param in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, params, (feat,)).mode()

    def critic_loss(self, critic, target, slow):
        """Minus the log-probability of the target, and of the slow critic's value, where that is a regulariser."""
        loss = -critic.log_prob(target)
        return loss - self.slow_reg * critic.log_prob(slow.detach()) if self.slow_reg else loss

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
        loss = weight * self.critic_loss(critic, torch.cat([ret, boot[:, -1:]], 1), slow)
        return loss[:, :-1], ret

    @torch.no_grad()
    def update_slow(self):
        """Move the slow critic towards the critic, at every `slow_every`-th call, the first included."""
        slow, fast = list(self.slow.parameters()), list(self.critic.parameters())
        rate = self.slow_rate * (self.updates % self.slow_every == 0)
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))
        self.updates += 1


@torch.no_grad()
def behavior_metrics(outs):
    """Metrics of what `ImagBehavior.losses` returned: means over the imagined trajectories, 0-d tensors."""
    ret = (outs["ret"] - outs["ret_offset"]) / outs["ret_scale"]
    slow = {"imag_slow_value": outs["slow"].mean()} if "slow" in outs else {}
    return slow | {
        "actor_entropy": outs["entropy"].mean(),
        "adv": outs["adv"].mean(),
        "adv_std": outs["adv"].std(correction=0),
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
