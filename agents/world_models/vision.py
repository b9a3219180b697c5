"""V: a variational autoencoder, observations to latents z (World Models, 2018, appendix A.1).

Letters: B batch, T time, Z latent numbers.
"""

import torch
import torch.nn as nn

from modalities.joint import MultiDecoder, MultiEncoder
from ops.layers import Linear
from ops.random import randn
from rssm import State


class Vision(nn.Module):
    """Encode observations to a normal distribution over z, and decode z to observations.

    Encoders and decoders are those of the observations' kinds; the presets make them those of the paper for images.

    Args:
      obs_spec: ObsSpec; config: the whole configuration.
    """

    def __init__(self, obs_spec, config):
        super().__init__()
        stages = config.stages
        self.size, self.tolerance, self.rec = stages.z, stages.kl_tolerance, config.loss_scales.rec
        self.encoder = MultiEncoder(obs_spec, config)
        self.out = Linear(self.encoder.size, 2 * self.size)
        self.decoder = MultiDecoder(obs_spec, self.size, 0, config)

    def encode(self, batch, learning=False):
        """{key: (B, T, ...)} prepared -> mean and log-variance of z, (B, T, Z) each. learning: see `MultiEncoder`."""
        return self.out(self.encoder(batch, torch.float32, learning)).float().chunk(2, -1)

    def decode(self, z):
        """(B, T, Z) -> {key: distribution over (B, T) observations}"""
        return self.decoder(State(z, z[..., None, :0]))

    def loss(self, batch):
        """Return the loss, 0-d, and {name: 0-d metric}, for {key: (B, T, ...)} observations.

        The loss is what the decoder fails to predict, and KL(q(z | o) || N(0, 1)) above kl_tolerance a dimension.
        """
        batch = self.encoder.prepare(batch)
        mean, logvar = self.encode(batch, learning=True)
        z = draw(mean, logvar)
        reconstruction = sum(self.decoder.losses(State(z, z[..., None, :0]), batch).values())  # (B, T)
        divergence = kl(mean, logvar)
        loss = self.rec * reconstruction.mean() + divergence.clamp(min=self.tolerance * self.size).mean()
        metrics = {"vae_loss": loss, "reconstruction_loss": reconstruction.mean(), "kl_loss": divergence.mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}


def draw(mean, logvar):
    """Draw z ~ N(mean, exp(logvar)), through which gradients flow."""
    return mean + torch.exp(logvar / 2) * randn(mean.shape, mean.device)


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the last dimension: (..., Z) -> (...)"""
    return 0.5 * (mean**2 + logvar.exp() - logvar - 1).sum(-1)
