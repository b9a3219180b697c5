"""A prediction of sounds as strips of both waveforms, drawn with OpenCV."""

import numpy as np

from modalities import Drawing
from tools import IMAGINED, SEEN

SEQUENCES, WIDTH, HEIGHT = 2, 240, 48  # drawn of a batch; pixels of a strip
PAPER, FAINT, TRUTH = (255, 255, 255), (190, 190, 190), (40, 40, 40)


def draw(truth, model, seen, rate):
    """Draw the true waveform in black, and under it the model's: in blue while it sees, then in orange.

    Args:
      truth: (B, T, n, C), bytes or numbers in [-1, 1]; model: (B, T, n, C); seen: steps that the model was shown.
      rate: samples a second.
    Returns: Drawing of the first channel, uint8 (B or fewer, T, 2 HEIGHT, WIDTH, 3); and the sound of all sequences.
    """
    truth = (truth.astype(np.float32) - 128) / 128 if truth.dtype == np.uint8 else np.asarray(truth, np.float32)
    model = np.nan_to_num(np.asarray(model, np.float32))
    truth, model = truth[..., 0], model[..., 0]
    films = [
        [np.concatenate([strip(a, TRUTH), strip(b, SEEN if time < seen else IMAGINED)]) for time, (a, b) in each]
        for each in (enumerate(zip(*pair, strict=True)) for pair in zip(truth[:SEQUENCES], model, strict=False))
    ]
    drawing = Drawing([np.stack([np.stack(film) for film in films])])
    both = np.stack([truth, model], -1)  # (B, T, n, 2)
    drawing.sound = rate, np.clip(both.reshape(len(both), -1, 2), -1, 1)
    return drawing


def strip(wave, color):
    """Return a picture (HEIGHT, WIDTH, 3) of a waveform (n,): in each column a line from its lowest to its highest."""
    import cv2  # which no environment needs

    page = np.full((HEIGHT, WIDTH, 3), PAPER, np.uint8)
    cv2.line(page, (0, HEIGHT // 2), (WIDTH - 1, HEIGHT // 2), FAINT)
    parts = np.array_split(wave, WIDTH) if len(wave) > WIDTH else [[value] for value in wave]
    xs = np.linspace(0, WIDTH - 1, len(parts)).round().astype(int)
    ys = [[round((1 - np.clip(f(part), -1, 1)) / 2 * (HEIGHT - 1)) for f in (np.min, np.max)] for part in parts]
    points = np.array([[x, y] for x, pair in zip(xs, ys, strict=True) for y in pair], np.int32)
    cv2.polylines(page, [points], False, color, 1, cv2.LINE_AA)
    return page
