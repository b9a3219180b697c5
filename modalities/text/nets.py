"""Encoders and decoders of texts.

Letters: B batch, T time, N = B T, L length in tokens, V size of the vocabulary, U units.
"""

import functools

import torch
import torch.nn as nn

from modalities.text import pages
from modalities.text.space import END, FIRST, PAD, vocabulary
from ops.attention import Block, masked_mean
from ops.layers import MLP, Linear, RMSNorm, Style, init_, norm_act
from tools import UserError


def make_encoder(observed, config):
    """Return the encoder of {key: Observed}; config: the whole configuration."""
    check(config.text)
    return TextEncoder(observed, config.text, config.act, vocabulary(config.text).vectors)


def make_decoder(observed, deter, stoch, config):
    """Return the decoder of {key: Observed} from features [deter, stoch]; config: the whole configuration."""
    return DECODERS[config.text.decoder](observed, deter + stoch, config.text, Style(config.norm, config.act))


def drawer(config):
    """Return the function that shows a prediction as pages on which both texts stand."""
    return functools.partial(pages.draw, words=vocabulary(config.text))


def check(config):
    """Raise UserError for a section `text` whose heads do not divide its units."""
    if config.units % config.heads:
        words = f"{config.heads} attention heads do not divide {config.units} units"
        raise UserError(f"--text.heads {config.heads}: {words} (text.units)")


def sizes(observed):
    """Return the largest vocabulary (V) and the lengths {key: L} of {key: Observed}."""
    lengths = {key: len(seen.classes) for key, seen in observed.items()}
    return max(max(seen.classes) for seen in observed.values()), lengths


class Embedding(nn.Module):
    """Ids (N, L) -> (N, L, U): a vector for each token, and one for its place in a text of each key.

    vectors: None, or (V - FIRST, n), what is known of each word: then these, which stay as they are, through a layer.
    """

    def __init__(self, size, lengths, units, vectors=None):
        super().__init__()
        own = size if vectors is None else FIRST
        self.tokens = nn.Parameter(init_(torch.empty(own, units), 1, 1))
        self.places = nn.ParameterList(init_(torch.empty(length, units), 1, 1) for length in lengths.values())
        self.keys = list(lengths)
        self.known = None
        if vectors is not None:
            self.known = Linear(vectors.shape[1], units)
            self.register_buffer("vectors", torch.from_numpy(vectors), persistent=False)

    def forward(self, key, ids, dtype):
        table = self.tokens
        if self.known is not None:
            table = torch.cat([table, self.known(self.vectors)])
        places = self.places[self.keys.index(key)][: ids.shape[1]]
        return (nn.functional.embedding(ids, table) + places).to(dtype)


class TextEncoder(nn.Module):
    """A small Transformer: pre-norm, learned places, mean over the tokens that are there; none there gives zeros.

    The texts of all keys share it; their embeddings are joined in sorted order of the keys.
    """

    def __init__(self, observed, config, act, vectors=None):
        super().__init__()
        size, lengths = sizes(observed)
        self.keys = sorted(observed)
        self.embed = Embedding(size, lengths, config.units, vectors)
        self.blocks = nn.ModuleList(Block(config.units, config.heads, act) for _ in range(config.layers))
        self.norm = RMSNorm(config.units)
        self.tokens = len(self.keys)
        self.size = config.units * self.tokens

    def prepare(self, obs):
        """Return {key: (..., L)} as the model predicts them: as they are."""
        return obs

    def forward(self, obs, dtype):
        """{key: (N, L) integer} -> (N, size)"""
        return torch.cat([self.encode(key, obs[key].long(), dtype) for key in self.keys], -1)

    def encode(self, key, ids, dtype):
        there = ids != PAD
        seen = torch.cat([torch.ones_like(there[:, :1]), there[:, 1:]], 1)  # something must be, even where nothing is
        x = self.embed(key, ids, dtype)
        for block in self.blocks:
            x = block(x, seen)
        return masked_mean(self.norm(x), there)


class ParallelDecoder(nn.Module):
    """Features -> texts: a vector for each place, and its token from that alone."""

    def __init__(self, observed, inputs, config, style):
        super().__init__()
        size, self.lengths = sizes(observed)
        self.mlp = MLP(inputs, config.decoder_layers, config.units, style)
        self.places = nn.ModuleList(Linear(config.units, length * config.units) for length in self.lengths.values())
        self.norm = norm_act(config.units, style)
        self.out = Linear(config.units, size)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: logits (N, L, V)}"""
        x = self.mlp(torch.cat([stoch, deter], -1))
        pairs = zip(self.lengths.items(), self.places, strict=True)
        return {key: self.out(self.norm(place(x).unflatten(-1, (length, -1)))) for (key, length), place in pairs}

    def dist(self, key, out):
        """Logits (..., L, V) of a key -> distribution over ids (..., L)."""
        return Parallel(out)


class Parallel:
    """A text whose tokens are independent.

    Args:
      logits: (..., L, V)
    """

    def __init__(self, logits):
        self.logits = logits.float()

    def mode(self):
        """Return the most likely ids (..., L), nothing behind the first end."""
        return ended(self.logits.argmax(-1))

    def log_prob(self, value):
        """Return the log-probability (...) of ids (..., L), that is of those that are there."""
        return log_prob(self.logits, value)


class AutoregressiveDecoder(nn.Module):
    """Features -> texts, token by token: a causal Transformer that sees the features at every place."""

    def __init__(self, observed, inputs, config, style):
        super().__init__()
        size, self.lengths = sizes(observed)
        self.mlp = MLP(inputs, config.decoder_layers, config.units, style)
        self.embed = Embedding(size, self.lengths, config.units)
        self.blocks = nn.ModuleList(Block(config.units, config.heads, style.act) for _ in range(config.layers))
        self.norm = RMSNorm(config.units)
        self.out = Linear(config.units, size)

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: (N, U), what its text is read from}"""
        x = self.mlp(torch.cat([stoch, deter], -1))
        return dict.fromkeys(self.lengths, x)

    def dist(self, key, out):
        """(..., U) of a key -> distribution over ids (..., L)."""
        return Autoregressive(self, key, out)

    def logits(self, key, source, before):
        """Return the logits (N, L, V) of tokens, from (N, U) and those before each, (N, L)."""
        x = self.embed(key, before, source.dtype) + source[:, None]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.out(self.norm(x))


class Autoregressive:
    """A text whose tokens depend on those before.

    Args:
      decoder: AutoregressiveDecoder; key: of the text; source: (..., U).
    """

    def __init__(self, decoder, key, source):
        self.decoder, self.key, self.source = decoder, key, source

    def mode(self):
        """Return ids (..., L), each the most likely one behind those chosen before it."""
        lead, source = self.source.shape[:-1], self.source.flatten(0, -2)
        ids = torch.full((len(source), 1), END, device=source.device)
        for _ in range(self.decoder.lengths[self.key]):
            ids = torch.cat([ids, self.decoder.logits(self.key, source, ids)[:, -1:].argmax(-1)], 1)
        return ended(ids[:, 1:]).unflatten(0, lead)

    def log_prob(self, value):
        """Return the log-probability (...) of ids (..., L), that is of those that are there."""
        ids = value.long().flatten(0, -2)
        before = torch.cat([torch.full_like(ids[:, :1], END), ids[:, :-1]], 1)
        logits = self.decoder.logits(self.key, self.source.flatten(0, -2), before)
        return log_prob(logits.float(), ids).unflatten(0, value.shape[:-1])


def log_prob(logits, value):
    """Return the log-probability (...) of ids (..., L) by logits (..., L, V), summed over those that are no PAD."""
    value = value.long()
    picked = logits.gather(-1, value[..., None])[..., 0] - logits.logsumexp(-1)
    return (picked * (value != PAD)).sum(-1)


def ended(ids):
    """Return ids (..., L) with PAD behind the first END."""
    ends = ids == END
    return torch.where(ends.cumsum(-1) > ends.long(), PAD, ids)


DECODERS = {"parallel": ParallelDecoder, "autoregressive": AutoregressiveDecoder}
