"""Spectra of waveforms, computed in PyTorch.

Letters: N sounds, n samples, C channels, F frequencies.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

FLOOR = 1e-3  # added to magnitudes before their logarithm is taken: what is softer counts as silence


def spectrum(wave, window):
    """Return magnitudes (N, C, F = window / 2 + 1, frames) of (N, n, C): Hann windows, half over each other, scaled so
    that a full sine has 1."""
    hann = torch.hann_window(window, device=wave.device)
    flat = wave.float().transpose(1, 2).flatten(0, 1)
    parts = torch.stft(flat, window, window // 2, window=hann, pad_mode="reflect", return_complex=True)
    power = torch.view_as_real(parts).square().sum(-1)
    return (power + 1e-12).sqrt().unflatten(0, (len(wave), -1)) * (4 / window)  # a root has no slope at 0


def log_spectrum(wave, window):
    """Return log-magnitudes (N, frames, C F) of (N, n, C)."""
    return torch.log(spectrum(wave, window) + FLOOR).permute(0, 3, 1, 2).flatten(2)


class LogMel(nn.Module):
    """Waveforms (N, n, C) -> log-mel spectra (N, frames, C mel).

    Args:
      config: with mel, the number of bands; window, samples; rate, samples a second.
    """

    def __init__(self, config):
        super().__init__()
        self.window = config.window
        self.register_buffer("bands", mel_bands(config.mel, config.window, config.rate), persistent=False)

    def size(self, length):
        """Return the number of frames of so many samples."""
        return length // (self.window // 2) + 1

    def forward(self, wave):
        found = torch.einsum("ncft,fm->ntcm", spectrum(wave, self.window), self.bands)
        return torch.log(found + FLOOR).flatten(2)


def mel_bands(count, window, rate):
    """Return triangular filters (F, count), even on the mel scale, 2595 log10(1 + f / 700), from 0 to rate / 2."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, count + 2, dtype=torch.float64) * top / 2595) - 1)  # Hz
    places = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)[:, None]
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    return F.relu(torch.minimum(rising, falling)).float()
