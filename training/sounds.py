"""Sounds: as numbers, as the bytes of a WAV, and in the film that they belong to."""

import io
import os
import pathlib
import subprocess
import tempfile
import wave

import imageio_ffmpeg
import numpy as np

from training.videos import check_mp4

RATE = 44100  # of a film's sound, in samples a second


def numbers(sound):
    """Return a waveform (n, C) as float32 in [-1, 1], from such numbers or from bytes, which are silent at 128."""
    sound = np.asarray(sound)
    sound = sound.reshape(len(sound), -1)
    sound = (sound.astype(np.float32) - 128) / 128 if sound.dtype == np.uint8 else sound.astype(np.float32)
    return np.clip(np.nan_to_num(sound), -1, 1)


def wav(sound, rate):
    """Return a waveform (n, C) in [-1, 1] as the bytes of a WAV of 16 bits, with `rate` samples a second."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(sound.shape[1])
        out.setsampwidth(2)
        out.setframerate(max(1, round(rate)))
        out.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def add_sound(path, sound, rate):
    """Let an MP4 have a waveform (n, C), up to two channels, from its beginning.

    All its frames stay, however short the sound is, of a few samples of which nothing may be left. Raises OSError if it
    fails; the film is then as it was.
    """
    folder = path.parent
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        heard, both = os.path.join(scratch, "sound.wav"), os.path.join(scratch, f"both{path.suffix}")
        with open(heard, "wb") as file:
            file.write(wav(sound[:, :2], rate))
        given = ["-i", str(path), "-i", heard]
        how = ["-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", "-ar", str(RATE)]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *given, *how, both]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise OSError(f"{path.name} gets no sound: {' '.join(done.stderr.split())[:200]}")
        check_mp4(pathlib.Path(both))
        os.replace(both, path)


def together(heard, frames):
    """Join the sounds of the frames of a film, None where there is none: (n, C), all of the longest one's length.

    Returns: the waveform, samples of a frame; None and 0 if nothing is heard.
    """
    parts = [numbers(part) if part is not None else None for part in heard[:frames]]
    longest = max((part.shape for part in parts if part is not None), default=None)
    if longest is None:
        return None, 0
    silence = np.zeros(longest, np.float32)
    return np.concatenate([silence if part is None else part for part in parts]), longest[0]
