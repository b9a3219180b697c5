"""CarRacing as World Models has it: what is cut off, how actions become the environment's, and the same pictures."""

import gymnasium
import numpy as np
import pytest

from envs import make_env
from envs.car_racing import CarRacing
from tests.factories import check_conformance, one_line_error
from training.config import CONFIGS, load_config
from training.foreign import check_foreign

TASK = "CarRacing-v3"


def config(*argv):
    return load_config(["--configs", *argv], CONFIGS)


def test_the_pictures_are_those_of_gymnasium_without_the_status_bar():
    plain, ours = (
        gymnasium.make(TASK, render_mode="rgb_array"),
        CarRacing(gymnasium.make(TASK, render_mode="rgb_array")),
    )
    for seed in (3, None):  # a new road is another list of pieces
        assert np.array_equal(plain.reset(seed=seed)[0][:84], ours.reset(seed=seed)[0])
        for action in np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32):
            theirs = np.array([action[0], (action[1] + 1) / 2, max(action[2], 0)], np.float32)
            (one, *rest), (other, *same) = plain.step(theirs), ours.step(action)
            assert np.array_equal(one[:84], other) and rest == same
    assert np.array_equal(plain.render(), ours.render())


def test_steering_is_as_it_is_gas_is_scaled_and_the_brake_clipped():
    env, seen = CarRacing(gymnasium.make(TASK)), []
    env.reset(seed=0)
    car = env.unwrapped.car
    for name in ("steer", "gas", "brake"):
        setattr(car, name, lambda value, name=name: seen.append((name, float(value))))
    for action in ([0.5, 0.0, -0.7], [-1.0, -1.0, 0.25], [0.0, 1.0, 1.0]):
        env.step(np.array(action, np.float32))
    assert seen == [
        *(("steer", -0.5), ("gas", 0.5), ("brake", 0.0)),
        *(("steer", 1.0), ("gas", 0.0), ("brake", 0.25)),
        *(("steer", 0.0), ("gas", 1.0), ("brake", 1.0)),
    ]


@pytest.mark.parametrize("presets", [["carracing"], ["carracing", "world_models"], ["race"]])
def test_the_presets_show_64x64_pixels_and_take_three_numbers(presets):
    env = make_env(config(*presets, "--time_limit", "3"), "train", 0)
    assert {key: space.shape for key, space in env.obs_space.items()} == {"image": (64, 64, 3)}
    assert env.act_space["action"].shape == (3,) and env.act_space["action"].low.tolist() == [-1] * 3
    check_conformance(env, 4)
    env.close()


def test_the_wrapper_goes_around_no_other_environment():
    flags = ["--task", "gym_Pendulum-v1", "--wrappers", "envs.car_racing:CarRacing"]
    said = one_line_error(make_env, load_config(flags, CONFIGS), "train", 0)
    assert "goes around gym_CarRacing-v3" in said


def test_the_wrapper_is_ours_whatever_a_user_has_beside_it(tmp_path, monkeypatch):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "car_racing.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    env = make_env(config("carracing"), "train", 0)
    env.close()
    check_foreign(config("race").replace(logdir=str(tmp_path)), tmp_path)  # as a config.yaml names it
