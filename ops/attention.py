"""Attention and Transformer blocks.

Letters: N sequences, L places, U units.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.layers import ACTS, Linear, RMSNorm
from tools import UserError


class Attention(nn.Module):
    """Multi-head attention: queries (N, Q, U) look at what stands at L places (N, L, inputs).

    Args:
      units: U; heads: which must divide U; inputs: width of what is looked at.
    Raises UserError if they do not.
    """

    def __init__(self, units, heads, inputs=None):
        super().__init__()
        if units % heads:
            raise UserError(f"{heads} attention heads do not divide {units} units")
        self.heads = heads
        self.query = Linear(units, units)
        self.keyed = Linear(inputs or units, 2 * units)  # keys and values
        self.out = Linear(units, units)

    def forward(self, x, seen, mask=None, causal=False):
        """(N, Q, U), (N, L, inputs) -> (N, Q, U). mask: (N, L) bool, true where there is something to see, which must
        be so somewhere; causal: a place sees those up to its own."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, Q, U / heads)
        key, value = self.keyed(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm Transformer block on (N, L, U): attention to itself, then an MLP, each added to its input."""

    def __init__(self, units, heads, act):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(units) for _ in range(2))
        self.attention = Attention(units, heads)
        self.mlp = nn.Sequential(Linear(units, 4 * units), ACTS[act](), Linear(4 * units, units))

    def forward(self, x, mask=None, causal=False):
        """(N, L, U) -> (N, L, U); mask, causal: as `Attention` takes them."""
        seen = self.norms[0](x)
        x = x + self.attention(seen, seen, mask, causal)
        return x + self.mlp(self.norms[1](x))


def masked_mean(x, mask):
    """Mean of (N, L, U) over the places where mask (N, L) is true, zeros where it is nowhere: (N, U)."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / torch.clamp(weight.sum(1), min=1)
