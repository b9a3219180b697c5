"""A prediction of texts as pages on which both stand, drawn with Pillow."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modalities import Drawing
from modalities.text.space import read
from tools import IMAGINED, SEEN

SEQUENCES, WIDTH, LETTERS, LINE = 2, 240, 38, 13  # drawn of a batch; pixels; letters of a line, and its height
MOST = 5  # lines of a text
PAPER, TRUTH = (255, 255, 255), (40, 40, 40)


def draw(truth, model, seen, words):
    """Draw what was said in black, and under it what the model says: in blue while it sees, then in orange.

    Args:
      truth, model: ids (B, T, L); seen: steps that the model was shown; words: Vocabulary.
    Returns: Drawing of uint8 (B or fewer, T, H, W, 3), and the lines of all sequences.
    """
    known = {}

    def text(ids):
        place = np.asarray(ids).tobytes()
        if place not in known:
            known[place] = read(np.asarray(ids), words)
        return known[place]

    lines = [[(text(a), text(b)) for a, b in zip(*pair, strict=True)] for pair in zip(truth, model, strict=True)]
    shown = lines[:SEQUENCES]
    films = [np.stack([page(*pair, time < seen) for time, pair in enumerate(each)]) for each in shown]
    drawing = Drawing([np.stack(films)])
    drawing.lines = lines
    return drawing


def wrapped(text):
    """Return the lines of a text, the last of which says so where there are too many."""
    text = "".join(letter if letter.isprintable() else "·" for letter in text)
    return textwrap.wrap(text, LETTERS, max_lines=MOST, placeholder=" …") or ["(nothing)"]


def page(truth, model, sees):
    """Return a picture (H, W, 3) of two texts, of one size for all, as a film is made in pieces."""
    image = Image.new("RGB", (WIDTH, 2 * MOST * LINE + 12), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for top, text, color in ((3, truth, TRUTH), (MOST * LINE + 7, model, SEEN if sees else IMAGINED)):
        for row, line in enumerate(wrapped(text)):
            pen.text((4, top + row * LINE), line, color, font)
    return np.asarray(image)
