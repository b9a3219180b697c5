"""Procgen: all games, their own images and rendered ones, and ends of levels."""

import struct
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from envs import make_env
from envs.procgen import TIMEOUTS
from tests.factories import check_conformance, end_of_episode, one_line_error, play, same
from tests.factories import env_config as make_config

WAIT = {"action": np.eye(15, dtype=np.float32)[4]}


def make_procgen(game, mode="train", index=0, seed=0, size=(64, 64), time_limit=0, **changes):
    options = SimpleNamespace(**{"distribution": "hard", "levels": 0, "start_level": 0, **changes})
    config = make_config(f"procgen_{game}", seed=seed, size=size, time_limit=time_limit, procgen=options)
    return make_env(config, mode, index)


def first_images(count, **options):
    """Return the first images of this many levels of caveflyer."""
    env = make_procgen("caveflyer", **options)
    images = [env.reset()["image"] for _ in range(count)]
    env.close()
    return images


def distinct(images):
    return len({image.tobytes() for image in images})


def test_every_game_and_its_timeout():
    """The library saves the step of the time-out before the level's seed in its state."""
    assert len(TIMEOUTS) == 16
    for task, timeout in TIMEOUTS.items():
        env = make_procgen(task)
        assert env.obs_space["image"].shape == (64, 64, 3) and env.act_space["action"].n == 15
        assert env.reset()["image"].std() > 1
        [state], [info] = env._game.get_state(), env._game.get_info()
        head, found, _ = state.partition(struct.pack("i", info["level_seed"]))
        assert found and struct.unpack("i", head[-4:]) == (timeout,), task
        env.close()


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_conformance(size):
    env = make_procgen("coinrun", size=size, time_limit=25)
    stream = check_conformance(env)
    assert distinct(obs["image"] for obs in stream) > 10
    env.close()
    env.close()


def test_large_images_have_more_detail():
    env = make_procgen("coinrun", size=(96, 96))
    own = make_procgen("coinrun").reset()["image"]
    image = env.reset()["image"]
    drawing = env.render()
    assert drawing.shape == (512, 512, 3)
    assert np.array_equal(image, cv2.resize(drawing, (96, 96), interpolation=cv2.INTER_AREA))
    small = cv2.resize(drawing, (64, 64), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(small - own).mean() < 10 < np.abs(small - own[:, ::-1]).mean()  # the same scene


def test_seeds():
    def stream(*where):
        env = make_procgen("starpilot", *where, time_limit=20)
        observations = play(env, 60)
        env.close()
        return observations

    first = stream("train", 0)
    assert same(first, stream("train", 0))
    assert not same(first, stream("train", 1))
    assert not same(first, stream("eval", 0))
    assert not same(first, stream("train", 0, 1))


def test_options():
    assert distinct(first_images(6)) == 6
    assert distinct(first_images(6, levels=1)) == 1
    one, other = first_images(1, levels=1), first_images(1, levels=1, start_level=7)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, first_images(1, levels=1, distribution="easy"))


# ---------------------------------------------------------------------------
# Ends


def test_time_out_is_not_terminal():
    env = make_procgen("maze")
    for _ in range(2):
        steps, rewards, last = end_of_episode(env, WAIT)
        assert (steps, sum(rewards), bool(last["is_terminal"])) == (500, 0, False)


def test_completed_level_is_terminal():
    env = make_procgen("maze", distribution="easy")
    stream = play(env, 5000)
    begins = [t for t, obs in enumerate(stream) if obs["is_first"]]
    ends = [t for t, obs in enumerate(stream) if obs["is_last"]]
    completed = 0
    for begin, end in zip(begins, ends, strict=False):
        last = stream[end]
        completed += bool(last["is_terminal"])
        assert last["reward"] == (10 if last["is_terminal"] else 0)
        assert last["is_terminal"] or end - begin == 500
        assert np.array_equal(last["image"], stream[end - 1]["image"])  # not the next level's
        if end + 1 < len(stream):
            assert not np.array_equal(last["image"], stream[end + 1]["image"])
    assert completed > 0


def test_death_is_terminal():
    steps, _, last = end_of_episode(make_procgen("starpilot"), WAIT)
    assert steps < 1000 and last["is_terminal"]


# ---------------------------------------------------------------------------
# Mistakes


def test_mistakes(monkeypatch):
    assert "did you mean 'coinrun'?" in one_line_error(make_procgen, "coinrum")
    monkeypatch.setitem(sys.modules, "procgen", None)
    assert "-r requirements/procgen.txt" in one_line_error(make_procgen, "coinrun")
