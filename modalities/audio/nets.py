"""Encoders and decoders of sounds: waveforms of n samples in [-1, 1], in C channels.

Letters: B batch, T time, N = B T.
"""

import functools
import itertools

import torch
import torch.nn as nn

from modalities.audio import strips
from modalities.audio.space import SILENT
from modalities.audio.spectrum import LogMel, LogSpectrum
from ops.layers import Conv1d, ConvTranspose1d, Linear, Style, norm_act
from tools import UserError

WINDOWS = (64, 256, 1024)  # samples, of the spectra that a prediction may be compared by


def make_encoder(observed, config):
    """Return the encoder of {key: Observed}; config: the whole configuration."""
    return AudioEncoder(check(observed, config.audio), config.audio, Style(config.norm, config.cnn_act, config.init))


def make_decoder(observed, deter, stoch, config):
    """Return the decoder of {key: Observed} from features [deter, stoch]; config: the whole configuration.

    Raises UserError, too, for a loss on spectra where no sound is as long as a window of them.
    """
    longest = max(seen.shape[0] for seen in observed.values())
    if config.audio.spectrum and longest < WINDOWS[0]:
        words = f"the sounds have up to {longest} samples, fewer than the {WINDOWS[0]} of its shortest window"
        raise UserError(f"--audio.spectrum {config.audio.spectrum:g}: {words}: --audio.spectrum 0")
    style = Style(config.norm, config.cnn_act, config.init)
    return AudioDecoder(check(observed, config.audio), deter + stoch, config.audio, style)


def drawer(config):
    """Return the function that shows a prediction as strips of both waveforms."""
    return functools.partial(strips.draw, rate=config.audio.rate)


def check(observed, config):
    """Return the shapes {key: (n, C)}. Raises UserError for those that the configuration does not fit."""
    for key, seen in observed.items():
        if config.mel and seen.shape[0] < config.window:
            words = f"sound {key} has {seen.shape[0]} samples"
            raise UserError(f"{words}: --audio.window {config.window} must not be more, or --audio.mel 0")
    if config.kernel < config.stride:
        raise UserError(f"--audio.kernel {config.kernel} leaves gaps: it must not be less than audio.stride")
    return {key: seen.shape for key, seen in observed.items()}


def scaled(wave):
    """Return a waveform in [-1, 1]: bytes, silent at 128, as numbers."""
    return wave if wave.is_floating_point() else (wave.float() - SILENT) / SILENT


class AudioEncoder(nn.Module):
    """Stages of [strided Conv1d, norm, activation] on each sound, or on its log-mel spectrum; places joined at the end.

    Sounds of different lengths have stages of their own; they are joined in sorted order of the keys.
    """

    def __init__(self, shapes, config, style):
        super().__init__()
        self.keys, self.front = sorted(shapes), LogMel(config) if config.mel else nn.Identity()
        depths = [config.depth * mult for mult in config.mults]
        kind = {"kernel": config.kernel, "stride": config.stride, "init": style.init, "bias": style.norm != "layer"}
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.tokens = 0
        for key in self.keys:
            length, channels = shapes[key]
            if config.mel:
                length, channels = self.front.size(length), config.mel * channels
            self.convs.append(nn.ModuleList(Conv1d(a, b, **kind) for a, b in itertools.pairwise([channels, *depths])))
            self.norms.append(nn.ModuleList(norm_act(size, style) for size in depths))
            self.tokens += functools.reduce(lambda size, conv: conv.size(size), self.convs[-1], length)
        self.size = self.tokens * depths[-1]

    def prepare(self, obs):
        """Return {key: (..., n, C)} as the model predicts them: in [-1, 1]."""
        return {key: scaled(wave) for key, wave in obs.items()}

    def forward(self, obs, dtype):
        """{key: (N, n, C) in [-1, 1]} -> (N, size)"""
        outs = []
        for key, convs, norms in zip(self.keys, self.convs, self.norms, strict=True):
            x = self.front(obs[key]).to(dtype)
            for conv, norm in zip(convs, norms, strict=True):
                x = norm(conv(x))
            outs.append(x.flatten(1))
        return torch.cat(outs, -1)


class AudioDecoder(nn.Module):
    """Features -> sounds: a linear layer to the places of the encoder, then the transpose of its stages."""

    def __init__(self, shapes, inputs, config, style):
        super().__init__()
        depths = [config.depth * mult for mult in config.mults][::-1]
        self.shapes, self.depth, self.weight = shapes, depths[0], config.spectrum
        self.spectra = nn.ModuleList(map(LogSpectrum, WINDOWS if config.spectrum else ()))
        kind = {"kernel": config.kernel, "stride": config.stride}
        bias = style.norm != "layer"
        self.starts, self.convs, self.norms, self.outs = (nn.ModuleList() for _ in range(4))
        for length, channels in shapes.values():
            for _ in depths:
                length = -(-length // config.stride)
            self.starts.append(Linear(inputs, length * depths[0], init=style.out))
            pairs = itertools.pairwise(depths)
            self.convs.append(
                nn.ModuleList(ConvTranspose1d(a, b, init=style.init, bias=bias, **kind) for a, b in pairs)
            )
            self.norms.append(nn.ModuleList(norm_act(size, style) for size in depths))
            self.outs.append(ConvTranspose1d(depths[-1], channels, init=style.out, **kind))

    def forward(self, deter, stoch):
        """(N, D), (N, S K) -> {key: mean (N, n, C)}"""
        feat, waves = torch.cat([stoch, deter], -1), {}
        parts = zip(self.shapes.items(), self.starts, self.convs, self.norms, self.outs, strict=True)
        for (key, (length, _)), start, convs, (norm, *norms), out in parts:
            x = norm(start(feat).unflatten(-1, (-1, self.depth)))
            for conv, norm in zip(convs, norms, strict=True):
                x = norm(conv(x))
            waves[key] = out(x)[:, :length].float()
        return waves

    def dist(self, key, out):
        """Mean (..., n, C) of a key -> distribution over such waveforms."""
        return Waveform(out, self.weight, self.spectra)


class Waveform:
    """A waveform; log_prob is minus the squared error summed over its samples, and minus what differs in its spectra.

    Args:
      mean: (..., n, C); weight: of the mean distance of each of `spectra`, LogSpectrum of windows of several lengths,
        those that are longer than the sound left out.
    """

    def __init__(self, mean, weight=0.0, spectra=()):
        self.mean, self.weight, self.spectra = mean.float(), weight, spectra

    def mode(self):
        return self.mean

    def log_prob(self, value):
        """Return minus the loss (...) of value (..., n, C), in [-1, 1]."""
        loss = (self.mean - value).square().sum((-2, -1))
        for spectrum in self.spectra:
            if spectrum.window <= value.shape[-2]:
                ours, theirs = (spectrum(wave.flatten(0, -3)) for wave in (self.mean, value))  # (N, frames, C, F)
                apart = (ours - theirs).abs().mean((-3, -2, -1))
                loss = loss + self.weight * apart.unflatten(0, value.shape[:-2])
        return -loss
