"""The mazes and Pin Pads of the dummy suite, played by hand."""

import math

import numpy as np
import pytest

from envs import make_env
from envs.dummy import MAZES
from envs.pinpad import PADS, PINPADS, SIDE
from tests.factories import check_conformance, env_config

TASKS = [*MAZES, *PINPADS]


def make(task, size=(64, 64)):
    return make_env(env_config(f"dummy_{task}", size=size), "train", 0)


def play(env, moves):
    """Return the observations of moves by name: up, right, down, left, stay."""
    actions = np.eye(env.act_space["action"].n, dtype=np.float32)
    return [env.step({"action": actions["urdls".index(move)]}) for move in moves]


@pytest.mark.parametrize("task", TASKS)
def test_conformance(task):
    check_conformance(make(task, (16, 32)), steps=105)


def test_the_far_corner_of_the_maze_pays_once_and_ends_the_episode():
    env = make("maze")
    env.reset()
    *way, there = play(env, "d" * 4 + "r" * 14 + "d" * 14 + "r" * 4)  # by two doors
    assert there["reward"] == 1 and there["is_terminal"] and len(way) + 1 == 36
    assert not any(obs["reward"] or obs["is_last"] for obs in way)


def test_empowerment_of_a_cell_is_the_logarithm_of_the_cells_that_can_be_reached():
    maze, five = (MAZES[name](np.random.default_rng(0), (64, 64)) for name in ("maze", "maze_stay"))
    corner, wall, floor, door = (0, 0), (0, 4), (4, 5), (9, 4)
    assert [five.reachable(place, 1) for place in (corner, wall, floor, door)] == [3, 4, 5, 3]
    assert [maze.reachable(place, 1) for place in (corner, wall, floor, door)] == [3, 4, 4, 3]  # a wall is as good
    assert five.reachable(floor, 2) == 13 and five.reachable(corner, 2) == 6
    assert math.log(five.reachable(floor, 1)) == pytest.approx(1.609, abs=1e-3)


@pytest.mark.parametrize("task, changes", [("maze_tv", True), ("maze_remote", False)])
def test_a_television_shows_noise_in_its_cell_alone(task, changes):
    env = make(task)
    env.reset()
    *way, there = play(env, "r" * 8)
    assert not any(obs["screen"].any() for obs in way) and there["screen"].all()
    assert there["log_tv"] == pytest.approx(1 / 8) and there["log_cells"] == 9
    bumped, watched = (play(env, move)[0]["screen"] for move in "us")
    assert np.array_equal(there["screen"], bumped) != changes
    assert not np.array_equal(bumped, watched)  # by itself, or because one stays
    assert not play(env, "l")[0]["screen"].any()


def test_pads_are_apart_along_the_walls():
    cells = [{(row + a, column + b) for a in (0, 1) for b in (0, 1)} for row, column in PADS]
    assert len(set.union(*cells)) == 4 * len(PADS)
    assert all(max(cell) < SIDE for pad in cells for cell in pad)
    assert (SIDE // 2, SIDE // 2) not in set.union(*cells)


def test_three_pads_by_hand():
    env = make("pinpad")
    assert env.reset()["player"] == 4 * 9 + 4
    first = play(env, "uuullls")  # to the first pad, at (1, 1)
    assert first[-1]["pads"].tolist() == [1, 0, 0] and first[-1]["player"] == 10
    second = play(env, "rrrrrddddddr")  # along its cells and between the others to the second, at (7, 7)
    assert second[-1]["pads"].tolist() == [1, 2, 0] and not any(obs["reward"] for obs in second)
    third = play(env, "uuuuuu")  # to the third, at (1, 7)
    assert third[-1]["reward"] == 1 and third[-1]["is_terminal"] and third[-1]["pads"].tolist() == [1, 2, 3]
    assert not any(obs["is_last"] for obs in third[:-1])


def test_a_wrong_pad_does_not_count():
    env = make("pinpad")
    env.reset()
    assert play(env, "uuurrr")[-1]["pads"].tolist() == [3, 0, 0]  # the third one first
    stream = play(env, "lllllls")
    assert stream[-1]["pads"].tolist() == [3, 1, 0]
    stream = play(env, "rrrrrdddddd" + "r")
    assert stream[-1]["pads"].tolist() == [3, 1, 2] and not stream[-1]["is_last"]
    stream = play(env, "uuuuuu")
    assert stream[-1]["pads"].tolist() == [1, 2, 3] and stream[-1]["reward"] == 1  # the last three are right


def test_the_pictures_show_pads_player_and_what_was_stepped_on():
    for task, shown in {"pinpad_image": 9, "pinpad_ego": 5}.items():
        env = make(task, (72, 90))
        image = env.reset()["image"]
        assert not image[:9].any()  # nothing was stepped on
        middle = image[9:][63 // 2, 90 // 2]
        assert middle.tolist() == [255] * 3  # the player
        assert (image[9:].reshape(-1, 3) == 255).all(1).mean() == pytest.approx(1 / shown**2, rel=0.2)
        image = play(env, "uuulll")[-1]["image"]
        assert image[4, :30].tolist() == [[230, 60, 60]] * 30 and not image[:9, 30:].any()
    assert make("pinpad_ego").reset()["image"].shape == (64, 64, 3)
