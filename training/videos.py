"""Videos: frames of what was observed, what is drawn onto them, predictions in a grid, files.

Sizes are in pixels, colors RGB. Nothing here draws random numbers.
"""

import io
import math

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image

from tools import IMAGINED, SEEN

LEAST = 240  # the shorter side of a film; smaller pictures are enlarged by a whole number
MOST = 240  # height of a film on a board, which shows it small; larger pictures are shrunk to it
SHOWN = 250  # frames of it; of longer films every n-th is shown
BORDER = 6  # width of the border of a predicted picture
NAMES = "truth", "model", "error"  # of the rows of a prediction
MARGIN, STRIP = 44, 18  # of the names of the rows, and of the line above them
INK, PAPER = (255, 255, 255), 24


def visible(video, stack):
    """Return frames (T, H, W, 3) of images (T, H, W, C): the newest of `stack` images, in gray or color."""
    last = video[..., -(video.shape[-1] // stack) :]
    return last.repeat(3, -1) if last.shape[-1] == 1 else last[..., :3]


def as_rgb(image):
    """uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) -> (H, W, 3)"""
    image = image.reshape(*image.shape[:2], -1)
    return np.ascontiguousarray(image.repeat(3, -1) if image.shape[-1] == 1 else image[..., :3])


def enlarge(image, least=LEAST):
    """Enlarge a picture (H, W, C) by a whole number, so that its shorter side has `least` pixels or more."""
    factor = max(1, math.ceil(least / min(image.shape[:2])))
    return image.repeat(factor, 0).repeat(factor, 1)


def beside(frame, pictures):
    """Put pictures [(H', W', 3)] beside a frame (H, W, 3), as high as that; it is enlarged for them if it is small."""
    import cv2

    if not pictures:
        return frame
    frame = enlarge(frame)
    height = len(frame)
    shown = [frame]
    for picture in pictures:
        grows = len(picture) < height
        size = max(1, round(picture.shape[1] * height / len(picture))), height
        resized = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if grows else cv2.INTER_AREA)
        shown += [np.full((height, BORDER, 3), IMAGINED, np.uint8), resized]
    return np.concatenate(shown, 1)


def bordered(image, color, width=BORDER):
    """Put a border around a picture (H, W, 3)."""
    framed = np.empty((image.shape[0] + 2 * width, image.shape[1] + 2 * width, 3), np.uint8)
    framed[:] = color
    framed[width:-width, width:-width] = image
    return framed


def write(image, text, place, size=11):
    """Write a line of text onto a picture (H, W, 3) in place. place: (x, y) of its lower left; size: its height."""
    import cv2  # which no environment needs

    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, size / 28, INK, 1, cv2.LINE_AA)


def caption(frame, step, score):
    """Return a frame (H, W, 3) with step and score in its upper left corner, on a dark ground."""
    frame = frame.copy()
    text = f"step {step}  score {score:.1f}"
    size = min(max(12.0, frame.shape[0] / 24), frame.shape[1] / 14)
    height, width = int(1.6 * size), int(0.62 * size * len(text))
    frame[:height, :width] //= 4
    write(frame, text, (int(size / 3), int(1.25 * size)), size)
    return frame


def captioned(frames, scores):
    """Draw step and score onto frames [(H, W, 3)] that follow each other, enlarged if they are small.

    scores: [the sum of rewards up to there].
    """
    return [
        caption(enlarge(frame), step, score) for step, (frame, score) in enumerate(zip(frames, scores, strict=True))
    ]


def board_film(frames, scores):
    """Do what `captioned` does for a board: (T, H, W, 3) of bounded length and height."""
    import cv2

    every = math.ceil(len(frames) / SHOWN)
    last = len(frames) - 1
    drawn = []
    for step in sorted({*range(0, len(frames), every), last}):
        frame = enlarge(frames[step])
        height, width = frame.shape[:2]
        if height > MOST:
            frame = cv2.resize(frame, (max(1, round(width * MOST / height)), MOST), interpolation=cv2.INTER_AREA)
        drawn.append(caption(frame, step, scores[step]))
    return np.stack(drawn)


def open_loop(panels, seen, stack=1, under=()):
    """Arrange a prediction in rows and its sequences in columns: blue borders where the model sees, orange where not.

    Args:
      panels: (truth, model, error), each uint8 (B, T, H, W, C), C of `stack` images; or one drawing (B, T, H, W, 3).
      seen: steps that the model was shown; it imagines the rest.
      under: [(name, drawing (B, T, H, W, 3))] of other predictions for the same sequences, to stand below.
    Yields: T frames (height, width, 3).
    """
    named = len(panels) > 1
    for time in range(panels[0].shape[1]):
        color = SEEN if time < seen else IMAGINED
        images = [visible(panel[:, time], stack) if named else panel[:, time] for panel in panels]
        rows = [[bordered(enlarge(image, LEAST / len(panels)), color, BORDER // 2) for image in row] for row in images]
        picture = np.concatenate([np.concatenate(row, 1) for row in rows])
        page = np.full((picture.shape[0] + STRIP, picture.shape[1] + MARGIN * named, 3), PAPER, np.uint8)
        page[STRIP:, MARGIN * named :] = picture
        write(page, f"step {time}: the model {'sees' if time < seen else 'imagines'}", (4, STRIP - 5))
        for row, name in enumerate(NAMES if named else ()):
            write(page, name, (4, STRIP + (2 * row + 1) * picture.shape[0] // 6 + 4))
        yield with_below(page, [(name, drawing[:, time]) for name, drawing in under], color)


def with_below(page, drawings, color):
    """Return a page (H, W, 3) with drawings [(name, (B, H, W, 3))] below it, a row for each."""
    for name, images in drawings:
        row = np.concatenate([bordered(image, color, BORDER // 2) for image in images], 1)
        height, width = row.shape[:2]
        wide = max(page.shape[1], MARGIN + width)
        joined = np.full((page.shape[0] + STRIP + height, wide, 3), PAPER, np.uint8)
        joined[: page.shape[0], : page.shape[1]] = page
        joined[-height:, MARGIN : MARGIN + width] = row
        write(joined, name, (MARGIN, joined.shape[0] - height - 5))
        page = joined
    return page


def gif(frames, fps):
    """Return frames, uint8 (T, H, W) or (T, H, W, 3), as the bytes of a GIF with one palette, which is quickly made."""
    images = [Image.fromarray(frame) for frame in frames]
    if frames.ndim == 4:
        every = math.ceil(math.sqrt(frames[..., 0].size / 1e6))
        some = frames[:, ::every, ::every].reshape(len(frames), -1, 3)  # a million pixels do for a palette
        palette = Image.fromarray(some).quantize(256, method=Image.Quantize.MAXCOVERAGE)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
    return file.getvalue()


def write_mp4(path, frames, fps):
    """Write a list of frames (H, W, 3) as an MP4; create its folder. Raises OSError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        imageio.mimwrite(path, frames, fps=fps, macro_block_size=2, ffmpeg_log_level="fatal")
    except OSError:
        raise
    except Exception as error:  # imageio has many for an ffmpeg that was killed, as by a Ctrl-C that it got, too
        raise OSError(f"ffmpeg ended before {path.name} was written ({type(error).__name__})") from error
    check_mp4(path)


def check_mp4(path):
    """Raise OSError if an MP4 cannot be read: ffmpeg, which wrote it, ends without a word on a full disk."""
    try:
        whole = imageio_ffmpeg.count_frames_and_secs(path)[0] > 0
    except RuntimeError:
        whole = False
    if not whole:
        raise OSError(f"{path.name} was cut short: is the disk full?")
