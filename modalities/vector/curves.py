"""A prediction of vectors as curves over time, drawn with OpenCV."""

import numpy as np

from tools import IMAGINED, SEEN

SEQUENCES, ROWS = 2, 8  # at most that many are drawn of a batch, and of the entries of a vector
WIDTH, HEIGHT = 200, 240  # of the curves of a sequence in pixels, if its rows need no more
ROW = 56  # least height of a row
MARGIN, STRIP = 44, 22  # left of the curves, and above them
PAPER, SHADE, FAINT, TRUTH = (255, 255, 255), (255, 246, 228), (150, 150, 150), (40, 40, 40)


def draw(truth, model, seen):
    """Draw truth and prediction of each entry as curves that grow over time.

    Args:
      truth, model: (B, T) or (B, T, n); seen: steps that the model was shown.
    Returns: uint8 (B or fewer, T, H, W, 3): the truth in black; the model in blue while it sees, in orange, on shaded
      ground, where it imagines.
    """
    truth, model = (np.asarray(x, np.float64).reshape(*x.shape[:2], -1) for x in (truth, model))
    total = truth.shape[-1]
    truth, model = (np.nan_to_num(x[:SEQUENCES, :, :ROWS]) for x in (truth, model))
    ranges = [limits(truth[..., row], model[..., row]) for row in range(truth.shape[-1])]
    return np.stack([film(*pair, seen, ranges, total) for pair in zip(truth, model, strict=True)])


def bars(values):
    """Draw the numbers of a vector (n,), or one number, as bars from the middle, x / (1 + |x|) of the way to the edge.

    Returns: uint8 (H, W, 3), with the number beside each of the first bars.
    """
    import cv2

    values = np.nan_to_num(np.asarray(values, np.float64).reshape(-1))[:ROWS]
    page = np.full((STRIP + ROW * len(values), MARGIN + WIDTH, 3), PAPER, np.uint8)
    middle = MARGIN + WIDTH // 2
    for row, value in enumerate(values):
        top, end = STRIP + row * ROW, middle + round(value / (1 + abs(value)) * WIDTH / 2)
        page[top + ROW // 2 : top + ROW - 8, min(middle, end) : max(middle, end) + 1] = IMAGINED
        page[top : top + ROW, middle] = FAINT
        text = f"[{row}] {value:.3g}"
        cv2.putText(page, text, (3, top + ROW // 2 - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.5, TRUTH, 1, cv2.LINE_AA)
    cv2.putText(page, "goal", (3, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, IMAGINED, 1, cv2.LINE_AA)
    return page


def limits(truth, model):
    """Return the numbers at the lower and upper edge of a row: they hold the truth, and the model where it is near."""
    low, high = truth.min(), truth.max()
    span = (high - low) or min(np.abs(model - low).max(), 1e6)
    span = max(span, 1e-6 * max(abs(low), abs(high)), 1e-9)  # which a float can tell
    return max(min(model.min(), low - span / 8), low - span), min(max(model.max(), high + span / 8), high + span)


def film(truth, model, seen, ranges, total):
    """Return the frames (T, H, W, 3) of one sequence; truth, model: (T, rows); total: entries of the whole vector."""
    import cv2  # which no environment needs

    steps, rows = truth.shape
    height = max(ROW, HEIGHT // rows)
    xs = MARGIN + np.linspace(4, WIDTH - 4, steps)
    page = empty_page(rows, height, (xs[seen - 1] + xs[min(seen, steps - 1)]) / 2, ranges, total)

    def points(values, row):
        low, high = ranges[row]
        place = 1 - (np.clip(values[:, row], low, high) - low) / (high - low)
        return np.stack([xs, STRIP + height * row + 3 + place * (height - 7)], -1)

    curves = [(points(truth, row), points(model, row)) for row in range(rows)]
    frames = []
    for time in range(steps):
        last = max(time - 1, 0)
        for true, predicted in curves:
            for places, color, width in ((predicted, SEEN if time < seen else IMAGINED, 2), (true, TRUTH, 1)):
                start, end = ((16 * places[index]).astype(int).tolist() for index in (last, time))  # 16ths of a pixel
                cv2.line(page, start, end, color, width, cv2.LINE_AA, 4)
        frames.append(page.copy())
    return np.stack(frames)


def empty_page(rows, height, border, ranges, total):
    """Return a picture (H, W, 3) with axes and legend; border: x where imagination begins."""
    import cv2

    def write(text, place, color, size=0.38):
        cv2.putText(page, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, color, 1, cv2.LINE_AA)

    page = np.full((STRIP + rows * height, MARGIN + WIDTH, 3), PAPER, np.uint8)
    page[STRIP:, round(border) :] = SHADE
    for place, word, color in ((4, "truth", TRUTH), (48, "model sees", SEEN), (130, "imagines", IMAGINED)):
        write(word, (place, 15), color, 0.42)
    if total > rows:
        write(f"{rows} of {total}", (198, 15), FAINT)
    for row, (low, high) in enumerate(ranges):
        top = STRIP + row * height
        page[top, :] = FAINT
        write(f"[{row}]", (3, top + height // 2 + 4), TRUTH, 0.42)
        write(f"{high:.2g}", (3, top + 12), FAINT)
        write(f"{low:.2g}", (3, top + height - 4), FAINT)
    return page
