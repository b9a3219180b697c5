"""Encoder and decoder of all kinds of observations together.

Letters: B batch, T time, D deter, S groups x K classes stoch, E embedding.
"""

import torch
import torch.nn as nn

from modalities import MODALITIES, nets


class MultiEncoder(nn.Module):
    """Observations of all kinds -> embedding (B, T, E): the kinds' embeddings side by side."""

    def __init__(self, spec, config):
        super().__init__()
        self.keys = {kind: list(spec.of(kind)) for kind in MODALITIES if spec.of(kind)}
        self.parts = nn.ModuleDict({kind: nets(kind).make_encoder(spec.of(kind), config) for kind in self.keys})
        self.size = sum(part.size for part in self.parts.values())

    def prepare(self, batch):
        """{key: (B, T, ...)} as the replay gives it -> as the model predicts it."""
        for kind, part in self.parts.items():
            batch = batch | part.prepare({key: batch[key] for key in self.keys[kind]})
        return batch

    def forward(self, batch, dtype):
        """{key: (B, T, ...)} -> (B, T, E) in the compute dtype."""
        embeds = []
        for kind, part in self.parts.items():
            lead = batch[self.keys[kind][0]].shape[:2]
            embeds.append(part({key: batch[key].flatten(0, 1) for key in self.keys[kind]}, dtype))  # (B T, size)
        return torch.cat(embeds, -1).unflatten(0, lead)  # (B, T, E)


class MultiDecoder(nn.Module):
    """State (B, T, ...) -> {key: distribution over (B, T) observations}."""

    def __init__(self, spec, deter, stoch, config):
        super().__init__()
        kinds = [kind for kind in MODALITIES if spec.of(kind)]
        self.parts = nn.ModuleDict(
            {kind: nets(kind).make_decoder(spec.of(kind), deter, stoch, config) for kind in kinds}
        )

    def forward(self, state):
        lead = state.deter.shape[:2]
        deter, stoch = state.deter.flatten(0, 1), state.stoch.flatten(2).flatten(0, 1)  # (B T, D), (B T, S K)
        outs = {}
        for part in self.parts.values():
            outs |= {key: part.dist(key, out.unflatten(0, lead)) for key, out in part(deter, stoch).items()}
        return outs
