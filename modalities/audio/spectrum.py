"""Spectra of waveforms, computed in PyTorch.

Letters: N sounds, n samples, C channels, F frequencies.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tools import UserError

FLOOR = 1e-3  # added to magnitudes before their logarithm is taken: what is softer counts as silence


class Spectrum(nn.Module):
    """Waveforms (N, n, C) -> magnitudes (N, frames, C, F = window // 2 + 1) of Hann windows, half over each other.

    They are scaled so that a full sine has 1. A product with cosines and sines, which can be exported, as a Fourier
    transform cannot.
    """

    def __init__(self, window):
        super().__init__()
        self.window = window
        place = torch.arange(window, dtype=torch.float64)
        angle = 2 * math.pi / window * place[:, None] * torch.arange(window // 2 + 1)
        hann = torch.hann_window(window, dtype=torch.float64)[:, None] * (4 / window)
        waves = torch.cat([hann * angle.cos(), hann * angle.sin()], -1)  # (window, 2 F)
        self.register_buffer("waves", waves.float(), persistent=False)

    def frames(self, length):
        """Return the number of frames of so many samples."""
        half = self.window // 2
        return (length + 2 * half - self.window) // half + 1

    def forward(self, wave):
        half = self.window // 2
        padded = F.pad(wave.float().transpose(1, 2), (half, half), "reflect")  # (N, C, n + window)
        parts = (padded.unfold(-1, self.window, half) @ self.waves).unflatten(-1, (2, -1))
        power = parts.square().sum(-2)
        return (power + 1e-12).sqrt().transpose(1, 2)  # a root has no slope at 0


class LogSpectrum(Spectrum):
    """Waveforms (N, n, C) -> log-magnitudes (N, frames, C, F)."""

    def forward(self, wave):
        return torch.log(super().forward(wave) + FLOOR)


class LogMel(nn.Module):
    """Waveforms (N, n, C) -> log-mel spectra (N, frames, C mel).

    Args:
      config: with mel, the number of bands; window, samples; rate, samples a second.
    Raises UserError for bands so narrow that they see nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.spectrum = Spectrum(config.window)
        bands = mel_bands(config.mel, config.window, config.rate)
        if empty := int((bands.sum(0) == 0).sum()):
            words = (
                f"{empty} of the bands see no frequency of --audio.window {config.window} at --audio.rate {config.rate}"
            )
            raise UserError(f"--audio.mel {config.mel}: {words}: take fewer bands, or a longer window")
        self.register_buffer("bands", bands, persistent=False)

    def size(self, length):
        """Return the number of frames of so many samples."""
        return self.spectrum.frames(length)

    def forward(self, wave):
        return torch.log(self.spectrum(wave) @ self.bands + FLOOR).flatten(2)


def mel_bands(count, window, rate):
    """Return triangular filters (F, count), even on the mel scale, 2595 log10(1 + f / 700), from 0 to rate / 2."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, count + 2, dtype=torch.float64) * top / 2595) - 1)  # Hz
    places = torch.arange(window // 2 + 1, dtype=torch.float64)[:, None] * (rate / window)
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return F.relu(torch.minimum(rising, falling)).float()
