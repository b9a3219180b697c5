"""Drawing of films, predictions and curves."""

import io
import time

import imageio.v3 as imageio
import numpy as np
import pytest

from modalities.vector import curves
from tools import IMAGINED, SEEN
from training import videos
from training.videos import MARGIN, SHOWN, STRIP, board_film, caption, captioned, enlarge, gif, open_loop


@pytest.mark.parametrize("side, factor", [(1, 240), (16, 15), (64, 4), (84, 3), (96, 3), (239, 2), (240, 1), (600, 1)])
def test_small_pictures_are_enlarged_by_a_whole_number(side, factor):
    image = np.random.default_rng(0).integers(0, 255, (side, 2 * side, 3), dtype=np.uint8)
    large = enlarge(image)
    assert large.shape == (factor * side, 2 * factor * side, 3)
    np.testing.assert_array_equal(large[::factor, ::factor], image)


def test_a_caption_is_drawn_into_the_corner_of_a_copy():
    frame = np.full((240, 300, 3), 200, np.uint8)
    drawn = caption(frame, 12, -3.5)
    changed = (drawn != frame).any(-1)
    assert (
        (frame == 200).all()
        and changed[:12, :100].mean() > 0.95
        and not changed[30:].any()
        and not changed[:, 200:].any()
    )
    assert drawn.max() == 255  # the text
    assert not np.array_equal(drawn, caption(frame, 13, -3.5))
    assert not np.array_equal(drawn, caption(frame, 12, -3.4))
    assert caption(frame[:2, :3], 1, 1.0).shape == (2, 3, 3)  # whatever the size


def test_a_film_has_every_frame_and_that_of_a_board_is_bounded():
    frames = [np.full((400, 600, 3), 200, np.uint8)] * (2 * SHOWN + 1)
    scores = list(np.linspace(0, 1, len(frames)))
    drawn = captioned(frames, scores)
    assert len(drawn) == len(frames) and drawn[0].shape == (400, 600, 3)
    film = board_film(frames, scores)
    assert film.shape == (168, 240, 360, 3)  # each third, and the last
    small = board_film(frames[:1], scores[:1])
    np.testing.assert_array_equal(film[0], small[0])
    last = caption(frames[0][:240, :360], len(frames) - 1, scores[-1])
    np.testing.assert_array_equal(film[-1], last)


def test_predictions_stand_in_named_rows_with_borders_that_tell_what_was_seen():
    rng = np.random.default_rng(0)
    panels = tuple(rng.integers(0, 255, (2, 5, 40, 50, 3), dtype=np.uint8) for _ in range(3))
    frames = np.stack(list(open_loop(panels, 2)))
    high, wide = 2 * 40 + 6, 2 * 50 + 6  # doubled, so that three are 240 pixels high, and a border of 3
    assert frames.shape == (5, STRIP + 3 * high, MARGIN + 2 * wide, 3)
    for time_, frame in enumerate(frames):
        for row, panel in enumerate(panels):
            for column, sequence in enumerate(panel):
                part = frame[STRIP + row * high :, MARGIN + column * wide :][:high, :wide]
                assert (part[0] == (SEEN if time_ < 2 else IMAGINED)).all()
                np.testing.assert_array_equal(part[3:-3:2, 3:-3:2], sequence[time_])
    names = [frames[0, STRIP + row * high :][:high, :MARGIN] for row in range(3)]
    assert all(name.max() == 255 for name in names)
    assert not np.array_equal(names[0], names[1]) and not np.array_equal(names[1], names[2])


@pytest.mark.parametrize("channels, stack", [(1, 1), (4, 4), (3, 1), (9, 3)])
def test_of_stacked_and_gray_images_the_newest_is_shown(channels, stack):
    panels = tuple(np.random.default_rng(0).integers(0, 255, (1, 2, 80, 80, channels), dtype=np.uint8) for _ in "123")
    first = next(iter(open_loop(panels, 1, stack)))
    newest = panels[0][0, 0][..., -(channels // stack) :]
    np.testing.assert_array_equal(
        first[STRIP + 3 : STRIP + 83, MARGIN + 3 : MARGIN + 83], newest + np.zeros(3, np.uint8)
    )


def colored(frame, color):
    """Return where a frame (H, W, 3) has nearly a color."""
    return np.abs(frame.astype(int) - color).max(-1) < 40


@pytest.mark.parametrize("shape", [(4,), (1,), (17,), ()])
def test_curves_grow_blue_where_the_model_sees_and_orange_where_it_imagines(shape):
    truth = np.random.default_rng(0).normal(size=(4, 9, *shape))
    (film, *_) = films = curves.draw(truth, truth + 0.4, 5)
    assert films.shape[:2] == (2, 9) and films.dtype == np.uint8 and min(films.shape[2:4]) >= 240
    plot = film[:, curves.STRIP + 1 :, curves.MARGIN :]
    drawn = [[colored(frame, color).sum() for frame in plot] for color in (SEEN, IMAGINED)]
    assert drawn[0][0] < drawn[0][2] < drawn[0][4] and drawn[1][4] == 0
    assert 0 < drawn[1][5] < drawn[1][8] and abs(drawn[0][8] - drawn[0][4]) < 0.2 * drawn[0][4]
    assert film[0].shape[0] <= curves.STRIP + curves.ROWS * curves.ROW


def test_a_perfect_prediction_lies_on_the_truth():
    truth = np.cumsum(np.random.default_rng(0).normal(size=(1, 9, 1)), 1)
    (perfect,), (off,) = curves.draw(truth, truth, 5), curves.draw(truth, truth + 1.0, 5)
    apart = [colored(film[-1, curves.STRIP + 1 :, curves.MARGIN :], IMAGINED).sum() for film in (perfect, off)]
    assert apart[0] < apart[1]


@pytest.mark.parametrize(
    "truth, model", [(0.0, 0.0), (1.0, np.inf), (0.0, np.nan), (1e30, -1e30), (0.0, 1e-30), (3, 4)]
)
def test_any_numbers_can_be_drawn(truth, model):
    films = curves.draw(np.full((1, 4, 2), truth), np.full((1, 4, 2), model), 2)
    assert films.shape[:2] == (1, 4)
    assert len(np.unique(films)) > 2
    assert curves.draw(np.full((1, 1, 2), truth), np.full((1, 1, 2), model), 1).shape[1] == 1


def test_drawing_leaves_random_numbers_alone():
    before = np.random.get_state()[1].copy()
    list(open_loop((curves.draw(np.zeros((1, 4, 2)), np.ones((1, 4, 2)), 2),), 2))
    board_film([np.zeros((8, 8, 3), np.uint8)], [0.0])
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_gif_has_all_frames_and_its_colors_come_from_the_whole_film():
    frames = np.zeros((60, 8, 8, 3), np.uint8)
    frames[range(60), 0, 0] = np.stack([np.arange(60) * 4, 255 - np.arange(60) * 4, np.full(60, 128)], -1)
    decoded = imageio.imread(io.BytesIO(gif(frames, 20)), extension=".gif", plugin="pillow", index=...)
    assert decoded.shape[0] == 60
    assert np.abs(decoded[..., :3].astype(int) - frames).max() < 24


def test_a_film_of_the_longest_episode_is_drawn_in_seconds():
    frames = [np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)] * 500
    start = time.process_time()
    encoded = gif(board_film(frames, [0.0] * 500), 20)
    assert time.process_time() - start < 10 and len(encoded) < 20e6


def test_an_mp4_whose_ffmpeg_was_killed_is_one_line(tmp_path, monkeypatch):
    def killed(*args, **kwargs):  # as imageio-ffmpeg when its ffmpeg got a Ctrl-C and listed no encoders
        raise IndexError("list index out of range")

    monkeypatch.setattr(videos.imageio, "mimwrite", killed)
    with pytest.raises(OSError, match=r"ffmpeg ended before film\.mp4 was written"):
        videos.write_mp4(tmp_path / "film.mp4", [np.zeros((16, 16, 3), np.uint8)], 20)


def test_mp4s_are_written_with_their_folder(tmp_path):
    videos.write_mp4(tmp_path / "a" / "film.mp4", captioned([np.zeros((15, 17, 3), np.uint8)] * 3, [0.0, 1.0, 2.0]), 30)
    assert imageio.imread(tmp_path / "a" / "film.mp4", plugin="FFMPEG").shape == (3, 240, 272, 3)
