"""The recurrent state-space model (RSSM): recurrent cells, latents and how they are stored.

Letters: B batch, T time, H imagined steps, N sequences or start states, D deter, S groups x K classes stoch, E embed.
"""

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import ops.distributions as dists
from ops import kernels, normals
from ops.layers import DREAMERV3, MLP, Blend, BlockLinear, LayerNorm, Linear, Norm
from ops.scan import call_step, scan
from tools import UserError


class State(NamedTuple):
    """A latent state: deter (..., D) and stoch (..., S, K)."""

    deter: torch.Tensor
    stoch: torch.Tensor

    def map(self, function):
        return State(function(self.deter), function(self.stoch))


def feature(state):
    """Return the input of all heads: [deter, flattened stoch] (..., D + S K)."""
    return torch.cat([state.deter, state.stoch.flatten(-2)], -1)


class BlockGRU(nn.Module):
    """The recurrent cell of DreamerV3: a GRU whose matrices are block-diagonal.

    Args:
      deter, stoch, action: widths of the state and the action. Raises UserError if blocks do not divide deter.
      hidden: width of the three input embeddings.
      layers: hidden block layers before the gates.
    """

    def __init__(self, deter, stoch, action, hidden, blocks, layers):
        super().__init__()
        if deter % blocks:
            raise UserError(f"--rssm.deter {deter} is no multiple of --rssm.blocks {blocks}")
        self.blocks = blocks
        self.embed_deter = MLP(deter, 1, hidden)
        self.embed_stoch = MLP(stoch, 1, hidden)
        self.embed_action = MLP(action, 1, hidden)
        widths = [deter + 3 * hidden * blocks] + [deter] * (layers - 1)
        self.hidden = nn.ModuleList(BlockLinear(width, deter, blocks) for width in widths)
        self.norms = nn.ModuleList(Norm(deter) for _ in widths)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def prepare(self, action):
        """The part that does not depend on the state, for any number of steps: (..., A) -> (..., hidden)."""
        return self.embed_action(action / action.detach().abs().clamp(min=1))

    def forward(self, deter, stoch, embedded):
        """(N, D), (N, S K) and a prepared action (N, hidden) -> the next deter (N, D)"""
        slices = deter.view(deter.shape[0], self.blocks, -1)
        inputs = torch.cat([self.embed_deter(deter), self.embed_stoch(stoch), embedded], -1)
        x = self.hidden[0].first(slices) + self.hidden[0].last(inputs)
        x = self.norms[0](x.reshape(deter.shape)).view(slices.shape)
        for linear, norm in zip(self.hidden[1:], self.norms[1:], strict=True):
            x = norm(linear(x).reshape(deter.shape)).view(slices.shape)
        reset, cand, update = self.gates(x).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return Blend.apply(slices, cand, update).reshape(deter.shape)


class DenseGRU(nn.Module):
    """The recurrent cell of PlaNet to DreamerV3's 2023 form: hidden layers on [stoch, action], then a dense GRU.

    Args:
      deter, stoch, action: widths of the state and the action.
      hidden, layers: width and number of the hidden layers.
      gru: `GRU`, `ResetFirstGRU` or `NormGRU`, or what makes one; style: Style.
    """

    def __init__(self, deter, stoch, action, hidden, layers, gru, style=DREAMERV3):
        super().__init__()
        self.hidden = MLP(stoch + action, layers, hidden, style)
        self.gru = gru(hidden, deter, style.init)

    def prepare(self, action):
        """The part that does not depend on the state, for any number of steps: (..., A) -> (..., hidden)."""
        return self.hidden[0].last(action / action.detach().abs().clamp(min=1))

    def forward(self, deter, stoch, prepared):
        """(N, D), (N, S K) and a prepared action (N, hidden) -> the next deter (N, D)"""
        layer, *rest = self.hidden
        x = layer.first(stoch) + prepared
        for layer in rest:
            x = layer(x)
        return self.gru(x, deter)


class GRU(nn.Module):
    """The GRU of Dreamer, which is Keras's, its recurrent kernel orthogonal at the start: inputs (N, n), state (N, D)
    -> state (N, D). The reset comes after the product, as in PyTorch's."""

    def __init__(self, inputs, deter, init="fan_in"):
        super().__init__()
        self.inputs = Linear(inputs, 3 * deter, init=init)
        self.state = Linear(deter, 3 * deter, init="orthogonal")

    def forward(self, x, deter):
        (reset, update, cand), (reset_, update_, cand_) = self.inputs(x).chunk(3, -1), self.state(deter).chunk(3, -1)
        cand = torch.tanh(cand + torch.sigmoid(reset + reset_) * cand_)
        return Blend.apply(cand, deter, torch.sigmoid(update + update_))


class ResetFirstGRU(nn.Module):
    """The GRU of PlaNet, which is TensorFlow's block cell (arXiv:1406.1078, v1): the reset comes before the product,
    and the gates' bias starts at 1, so that 73 % of the state are kept; as `GRU`."""

    def __init__(self, inputs, deter, init="fan_in"):
        super().__init__()
        self.gates = Linear(inputs + deter, 2 * deter, init=init)
        self.cand = Linear(inputs + deter, deter, init=init)
        nn.init.ones_(self.gates.bias)

    def forward(self, x, deter):
        reset, update = torch.sigmoid(self.gates(torch.cat([x, deter], -1))).chunk(2, -1)
        cand = torch.tanh(self.cand(torch.cat([x, reset * deter], -1)))
        return Blend.apply(cand, deter, update)


class NormGRU(nn.Module):
    """The GRU of DreamerV2 with LayerNorm on its gates, and a bias of -1 towards keeping the state; as `GRU`.

    bias: of the linear part, before the norm; DreamerV3's 2023 form has none there.
    """

    def __init__(self, inputs, deter, init="fan_in", bias=False):
        super().__init__()
        self.linear = Linear(inputs + deter, 3 * deter, init=init, bias=bias)
        self.norm = LayerNorm(3 * deter)

    def forward(self, x, deter):
        reset, cand, update = self.norm(self.linear(torch.cat([x, deter], -1))).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return Blend.apply(deter, cand, torch.sigmoid(update - 1))


BiasedNormGRU = functools.partial(NormGRU, bias=True)

# Recurrent cells by name: function of the widths of deter, stoch and action, the RSSM's configuration, and the Style.
CELLS = {
    "block_gru": lambda d, s, a, c, style: BlockGRU(d, s, a, c.hidden, c.blocks, c.dyn_layers),
    "norm_gru": lambda d, s, a, c, style: DenseGRU(d, s, a, c.hidden, c.dyn_layers, NormGRU, style),
    "norm_gru_bias": lambda d, s, a, c, style: DenseGRU(d, s, a, c.hidden, c.dyn_layers, BiasedNormGRU, style),
    "gru": lambda d, s, a, c, style: DenseGRU(d, s, a, c.hidden, c.dyn_layers, GRU, style),
    "reset_first_gru": lambda d, s, a, c, style: DenseGRU(d, s, a, c.hidden, c.dyn_layers, ResetFirstGRU, style),
}


class Latent(Protocol):
    """A kind of stochastic state: S variables of K numbers each.

    shape: (S, K); size: S K; outputs: width of the layer that gives its parameters.
    """

    shape: tuple[int, int]
    size: int
    outputs: int

    def dist(self, params: torch.Tensor) -> Any:
        """(..., outputs) -> distribution with batch shape (..., S): sample(noise) and mode() (..., S, K), entropy()
        (..., S), and detach(), the same without gradient."""

    def noise(self, shape: tuple, device) -> torch.Tensor:
        """Draw the noise that the distribution's `sample` takes, for states of batch shape `shape`."""

    def kl(self, post, prior) -> torch.Tensor:
        """Return KL(post || prior) in nats, summed over the variables: (...)."""

    def layout(self) -> tuple[tuple[int, ...], np.dtype]:
        """Return (shape, dtype) in which the replay stores one state."""

    def pack(self, stoch: torch.Tensor) -> torch.Tensor:
        """(..., S, K) -> what the replay stores."""

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """Undo `pack`, in float32."""


class OneHotLatent:
    """S independent one-hot variables of K classes with a share of uniform probability (DreamerV2, DreamerV3).

    Args:
      groups, classes: S and K.
      unimix: share of the uniform distribution.
    """

    def __init__(self, groups, classes, unimix):
        self.shape = (groups, classes)
        self.unimix = unimix
        self.size = self.outputs = groups * classes

    def dist(self, logits):
        """(..., S K) -> distribution with batch shape (..., S)"""
        return dists.OneHot(logits.unflatten(-1, self.shape), self.unimix, logits.dtype)

    def noise(self, shape, device):
        """Draw noise for states of batch shape `shape`: (*shape, S)."""
        return dists.OneHot.noise((*shape, self.shape[0]), device)

    def kl(self, post, prior):
        """Return KL(post || prior) summed over the groups: (...)."""
        return post.kl(prior).sum(-1)

    def layout(self):
        """Return (shape, dtype) of the S class indices."""
        return (self.shape[0],), np.dtype(np.uint8 if self.shape[1] <= 256 else np.int16)

    def pack(self, stoch):
        """(..., S, K) -> class indices (..., S)"""
        return stoch.argmax(-1)

    def unpack(self, stored):
        """Class indices (..., S) -> (..., S, K)"""
        return dists.one_hot(stored, self.shape[1])


class GaussianLatent:
    """S independent normal variables, of K = 1 number each, with stddev softplus(s) + min_std (PlaNet, Dreamer).

    Args:
      size: S.
      min_std: least standard deviation.
    """

    def __init__(self, size, min_std=0.1):
        self.shape = (size, 1)
        self.min_std = min_std
        self.size = size
        self.outputs = 2 * size

    def dist(self, params):
        """(..., 2 S) -> distribution with batch shape (..., S)"""
        mean, stddev = params.float().unflatten(-1, (2, *self.shape)).unbind(-3)
        return normals.Normal(mean, F.softplus(stddev) + self.min_std)

    def noise(self, shape, device):
        """Draw noise for states of batch shape `shape`: (*shape, S, 1)."""
        return normals.Normal.noise((*shape, *self.shape), device)

    def kl(self, post, prior):
        """Return KL(post || prior) summed over the variables: (...)."""
        return post.kl(prior).sum(-1)

    def layout(self):
        """Return (shape, dtype) of the S numbers in half precision."""
        return (self.size,), np.dtype(np.float16)

    def pack(self, stoch):
        """(..., S, 1) -> (..., S) float16"""
        return stoch[..., 0].half()

    def unpack(self, stored):
        """(..., S) -> (..., S, 1)"""
        return stored[..., None].float()


LATENTS = {
    "onehot": lambda config: OneHotLatent(config.stoch, config.classes, config.unimix),
    "gaussian": lambda config: GaussianLatent(config.stoch),
}


def make_rssm(embed, act_spec, config, style=DREAMERV3, scan="loop"):
    """Return the RSSM of a configuration's section `rssm`, for embeddings of width `embed` and an ActionSpec.

    scan: `loop`, or `triton` for kernels that observe on a GPU. Raises UserError where they do not know the RSSM.
    """
    latent = LATENTS[config.latent](config)
    cell = CELLS[config.cell](config.deter, latent.size, act_spec.size, config, style)
    rssm = RSSM(cell, latent, embed, config, style)
    rssm.kernels = kernels.observing(config, style) if scan == "triton" else None
    return rssm


class RSSM(nn.Module):
    """A recurrent state-space model (PlaNet, arXiv:1811.04551): a recurrent cell and a kind of latent.

        deter[t] = cell(deter[t-1], stoch[t-1], action[t])      action[t] led to step t
        prior      p(stoch[t] | deter[t])
        posterior  q(stoch[t] | deter[t], embed[t])

    Args:
      cell: module with prepare(action) and forward(deter, stoch, prepared).
      latent: `Latent`.
      embed: width of the encoder's output (E).
      config: with deter and hidden, widths of the recurrent state and of the hidden layers; img_layers and obs_layers,
        hidden layers of prior and posterior; initial, `zeros` or `learned` (DreamerV3's 2023 form): the state before
        anything was seen.
    """

    def __init__(self, cell, latent, embed, config, style=DREAMERV3):
        super().__init__()
        self.cell = cell
        self.latent = latent
        self.deter = deter = config.deter
        out = (config.hidden, latent.outputs, 1.0, style.out)
        self.prior = nn.Sequential(MLP(deter, config.img_layers, config.hidden, style), Linear(*out))
        self.posterior = nn.Sequential(MLP(deter + embed, config.obs_layers, config.hidden, style), Linear(*out))
        self.start = nn.Parameter(torch.zeros(deter)) if config.initial == "learned" else None
        self.call_step = call_step
        self.kernels = None  # or what observes in place of `scan`

    def compile_parts(self):
        """Compile one step of observing and one of imagining; the loops over time stay as they are written."""
        self.call_step = torch.compile(self.call_step, dynamic=False)
        self.imagine_step = torch.compile(self.imagine_step, dynamic=False)

    # -- states

    def initial(self, batch, device, dtype=torch.float32):
        """Return the state before anything was seen, (batch, ...): zeros, or a learned deter and the prior's mode at
        it, without gradient."""
        if self.start is not None:
            deter = torch.tanh(self.start).to(dtype).expand(batch, -1)
            with torch.no_grad():
                return State(deter, self.predict(deter).mode().to(dtype))
        return State(
            torch.zeros(batch, self.deter, device=device, dtype=dtype),
            torch.zeros(batch, *self.latent.shape, device=device, dtype=dtype),
        )

    def layout(self):
        """Return {key: (shape, dtype)} in which the replay stores one state."""
        return {"deter": ((self.deter,), np.dtype(np.float16)), "stoch": self.latent.layout()}

    def pack(self, state):
        """State (..., D), (..., S, K) -> {key: what the replay stores of it (..., ...)}."""
        return {"deter": state.deter.half(), "stoch": self.latent.pack(state.stoch)}

    def unpack(self, stored, dtype):
        """Undo `pack`; a step that no agent has seen is stored as zeros and has the state of zeros."""
        stoch = self.latent.unpack(stored["stoch"])
        known = stored["deter"].any(-1)[..., None, None]
        return State(stored["deter"].to(dtype), (stoch * known).to(dtype))

    # -- filtering

    def observe(self, embed, action, is_first, state, noise=None):
        """Filter a sequence; where is_first, the state is set to the initial one and the action to zero.

        Args:
          embed: (B, T, E); action: (B, T, A), action[t] led to embed[t]; is_first: (B, T) bool.
          state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, drawn here if None.
        Returns: State (B, T, ...), posterior distribution with batch shape (B, T, S).
        """
        if noise is None:
            noise = self.latent.noise(is_first.shape, embed.device)
        (layer, *_), _ = self.posterior
        keep = (~is_first).to(embed.dtype).transpose(0, 1)[..., None]  # (T, B, 1)
        action = self.cell.prepare(action.to(embed.dtype).transpose(0, 1) * keep)  # (T, B, hidden)
        embed = layer.last(embed.transpose(0, 1))  # (T, B, hidden)
        deter, stoch = state.deter.to(embed.dtype), state.stoch.to(embed.dtype)
        initial = self.initial(deter.shape[0], deter.device, deter.dtype)
        inputs = keep, action, embed, noise.transpose(0, 1)
        if self.kernels:
            deters, stochs, logits = self.kernels(self, (deter, stoch), *(x.transpose(0, 1) for x in inputs))
        else:
            deters, stochs, logits = scan(self.observe_step, (deter, stoch), initial, inputs, self.call_step)
        return State(deters, stochs), self.latent.dist(logits)  # (B, T, ...)

    def observe_step(self, deter, stoch, initial, keep, action, embed, noise):
        """One step of `observe`; what depends on neither deter nor stoch comes prepared.

        Args:
          deter: (B, D); stoch: (B, S, K); initial: State (B, ...) to start from; keep: (B, 1), 0 where to.
          action: prepared (B, hidden); embed: its share of the posterior's first layer (B, hidden); noise: (B, S).
        Returns: deter (B, D), stoch (B, S, K), posterior logits (B, S K).
        """
        deter = torch.lerp(initial.deter, deter, keep)
        stoch = torch.lerp(initial.stoch, stoch, keep[..., None])
        deter = self.cell(deter, stoch.flatten(1), action)
        (layer, *rest), out = self.posterior
        hidden = layer.first(deter) + embed
        for layer in rest:
            hidden = layer(hidden)
        logit = out(hidden)
        return deter, self.latent.dist(logit).sample(noise).to(deter.dtype), logit

    def predict(self, deter):
        """Return the prior's distribution, batch shape (..., S), given deter (..., D)."""
        return self.latent.dist(self.prior(deter))

    # -- imagining

    def imagine(self, start, policy, horizon, noise=None):
        """Roll the prior forward, by a policy or along given actions.

        Args:
          start: State (N, ...).
          policy: a function State -> action (N, A), or actions (H, N, A).
          horizon: number of steps H.
          noise: (H, N, S) for the prior draws, drawn here if None.
        Returns: State (H + 1, N, ...) with the start first, actions (H, N, A).
        """
        if noise is None:
            noise = self.latent.noise((horizon, len(start.deter)), start.deter.device)
        states, actions = [start], []
        for t in range(horizon):
            state = states[-1]
            action = policy(state) if callable(policy) else policy[t]
            states.append(State(*self.imagine_step(*state, action.to(state.deter.dtype), noise[t])))
            actions.append(action)
        return State(*(torch.stack(x) for x in zip(*states, strict=True))), torch.stack(actions)

    def imagine_step(self, deter, stoch, action, noise):
        """One step of `imagine`: (N, D), (N, S, K), (N, A), (N, S) -> deter (N, D), stoch (N, S, K)"""
        deter = self.cell(deter, stoch.flatten(1), self.cell.prepare(action))
        return deter, self.predict(deter).sample(noise).to(deter.dtype)
