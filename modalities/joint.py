"""Encoder and decoder of all kinds of observations together.

Letters: B batch, T time, N = B T, D deter, S groups x K classes stoch, E embedding, U units.
"""

from typing import Any

import torch
import torch.nn as nn

from modalities import MODALITIES, nets
from ops.attention import Attention
from ops.layers import ACTS, Linear, RMSNorm, init_
from ops.random import rand
from specs import presence
from tools import UserError

QUERIES, HEADS = 4, 4  # of the attention that joins


class MultiEncoder(nn.Module):
    """Observations of all kinds -> embedding (B, T, E): a part for each kind, joined by `encoder.fusion`.

    Observations that may be missing have parts of their own. What is not there, or is left out in learning by the
    chance of `encoder.drop`, counts for nothing: it is masked, or joined as zeros.
    """

    def __init__(self, spec, config):
        super().__init__()
        own = grouped(spec)
        self.keys = {name: keys for name, (_, keys) in own.items()}
        self.parts = nn.ModuleDict(
            {name: nets(kind).make_encoder(chosen(spec, keys), config) for name, (kind, keys) in own.items()}
        )
        self.optional = {name: presence(keys[0]) for name, keys in self.keys.items() if presence(keys[0]) in spec}
        self.drop = config.encoder.drop
        self.join = FUSIONS[config.encoder.fusion](self.parts, config)
        self.size = self.join.size

    def prepare(self, batch):
        """{key: (B, T, ...)} as the replay gives it -> as the model predicts it."""
        for name, part in self.parts.items():
            batch = batch | part.prepare({key: batch[key] for key in self.keys[name]})
        return batch

    def forward(self, batch, dtype, learning=False):
        """{key: (B, T, ...)} -> (B, T, E) in the compute dtype."""
        embeds = {}
        for name, part in self.parts.items():
            lead = batch[self.keys[name][0]].shape[:2]
            embeds[name] = part({key: batch[key].flatten(0, 1) for key in self.keys[name]}, dtype)  # (B T, size)
        there = {name: batch[key].flatten() > 0 for name, key in self.optional.items()}  # (B T,)
        if learning and self.drop:
            some = next(iter(embeds.values()))
            drawn = (rand((len(some), len(embeds)), some.device) >= self.drop).unbind(1)
            there = {name: kept & there.get(name, kept) for name, kept in zip(embeds, drawn, strict=True)}
        return self.join(embeds, there).unflatten(0, lead)  # (B, T, E)


def chosen(spec, keys):
    """Return {key: Observed} of some keys."""
    return {key: spec[key] for key in keys}


def grouped(spec):
    """Return {name: (kind, keys)} of an encoder's parts: one for each kind, and for each key that may be missing."""
    own = {}
    for kind in MODALITIES:
        keys = list(spec.of(kind))
        alone = [key for key in keys if presence(key) in spec]
        if together := [key for key in keys if key not in alone]:
            own[kind] = kind, together
        own |= {f"{kind}_{index}": (kind, [key]) for index, key in enumerate(alone)}
    return own


class Concat(nn.Module):
    """Embeddings side by side; what is not there is zeros."""

    def __init__(self, parts, config):
        super().__init__()
        self.size = sum(part.size for part in parts.values())

    def forward(self, embeds, there):
        """{name: (N, size)}, {name: (N,) bool, for some of them} -> (N, E)"""
        masked = {name: embeds[name] * mask[:, None] for name, mask in there.items()}
        return torch.cat(list((embeds | masked).values()), -1)


class Attend(nn.Module):
    """A few learned queries that look at the tokens of all parts by cross-attention.

    Each part gives one token or more, such as the places of an image. A token gets a learned vector of its part and
    one of its place there. One that is always there, and says nothing, stands for the case that all are missing.
    """

    def __init__(self, parts, config):
        super().__init__()
        units = config.encoder.units
        if units % HEADS:
            words = f"{HEADS} attention heads do not divide {units} units"
            raise UserError(f"--encoder.units {units}: {words}, as --encoder.fusion attention needs")
        counts = {name: getattr(part, "tokens", 1) for name, part in parts.items()}
        self.counts = counts
        self.inputs = nn.ModuleDict({name: Linear(part.size // counts[name], units) for name, part in parts.items()})
        self.kinds = nn.ParameterDict({name: init_(torch.empty(units), 1, 1) for name in parts})
        self.places = nn.ParameterDict({name: init_(torch.empty(count, units), 1, 1) for name, count in counts.items()})
        self.nothing = nn.Parameter(torch.zeros(1, units))
        self.queries = nn.Parameter(init_(torch.empty(QUERIES, units), 1, 1))
        self.norms = nn.ModuleList(RMSNorm(units) for _ in range(3))  # of queries, of tokens, and before the MLP
        self.attention = Attention(units, HEADS)
        self.mlp = nn.Sequential(Linear(units, 4 * units), ACTS[config.act](), Linear(4 * units, units))
        self.size = QUERIES * units

    def forward(self, embeds, there):
        """{name: (N, size)}, {name: (N,) bool, for some of them} -> (N, E)"""
        tokens, masks = [], []
        for name, embed in embeds.items():
            token = self.inputs[name](embed.unflatten(-1, (self.counts[name], -1)))  # (N, tokens, U)
            tokens.append(token + (self.kinds[name] + self.places[name]).to(token.dtype))
            mask = there.get(name)
            mask = torch.ones_like(embed[:, 0], dtype=torch.bool) if mask is None else mask
            masks.append(mask[:, None].expand(-1, self.counts[name]))
        count, dtype = tokens[0].shape[0], tokens[0].dtype
        tokens.append(self.nothing.to(dtype).expand(count, 1, -1))
        masks.append(torch.ones_like(masks[0][:, :1]))
        seen = self.norms[1](torch.cat(tokens, 1))  # (N, L, U)
        queries = self.queries.to(dtype).expand(count, -1, -1)  # (N, Q, U)
        x = queries + self.attention(self.norms[0](queries), seen, torch.cat(masks, 1) if there else None)
        x = x + self.mlp(self.norms[2](x))
        return x.flatten(1)


FUSIONS: dict[str, Any] = {"concat": Concat, "attention": Attend}


class MultiDecoder(nn.Module):
    """State (B, T, ...) -> {key: distribution over (B, T) observations}."""

    def __init__(self, spec, deter, stoch, config):
        super().__init__()
        kinds = [kind for kind in MODALITIES if spec.of(kind)]
        self.parts = nn.ModuleDict(
            {kind: nets(kind).make_decoder(spec.of(kind), deter, stoch, config) for kind in kinds}
        )
        self.optional = {key: presence(key) for key in spec if presence(key) in spec}

    def forward(self, state):
        lead = state.deter.shape[:2]
        deter, stoch = state.deter.flatten(0, 1), state.stoch.flatten(2).flatten(0, 1)  # (B T, D), (B T, S K)
        outs: dict[str, Any] = {}
        for part in self.parts.values():
            outs |= {key: part.dist(key, out.unflatten(0, lead)) for key, out in part(deter, stoch).items()}
        return outs

    def losses(self, state, batch):
        """State, {key: (B, T, ...)} prepared -> {key: loss (B, T)}, zero where an observation is missing."""
        losses = {key: -dist.log_prob(batch[key]) for key, dist in self(state).items()}
        return losses | {key: losses[key] * (batch[there] > 0) for key, there in self.optional.items()}
