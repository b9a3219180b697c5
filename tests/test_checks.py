"""Whatever an environment gives is checked against what it promised, at every step."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs import make_envs
from envs.checks import Checked, problem, test_of
from tests.factories import Section, Toy, env_config, make_toy, one_line_error, play

ACTION = {"action": np.float32([1, 0])}
VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
ZEROS = np.zeros(3, np.float32)


def later(space, value, at=2):
    """Return a toy whose observation is fine until step `at`."""
    return Toy(space, lambda step: value if step == at else space.sample())


OBSERVATIONS = {  # name: (space, observation at the second step, what the line says)
    "grows": (VECTOR, np.zeros(5, np.float32), "has shape (5,) where its space has (3,)"),
    "shrinks": (VECTOR, np.zeros(1, np.float32), "has shape (1,) where its space has (3,)"),
    "scalar": (VECTOR, 0.5, "has shape () where its space has (3,)"),
    "not a number": (VECTOR, np.float32([0, np.nan, 0]), "is not finite: nan (1 of 3 numbers)"),
    "infinite": (VECTOR, np.float32([0, 0, -np.inf]), "is not finite: -inf"),
    "too large": (spaces.Box(-1, 1, (3,), np.float64), np.array([0, 1e300, 0]), "is not finite: 1e+300"),
    "long": (spaces.Box(-1, 1, (600,)), np.full(600, np.nan), "is not finite: nan (600 of 600 numbers)"),
    "two axes": (spaces.Box(-1, 1, (2, 2)), np.array([[0, 0], [np.inf, 0]]), "is not finite: inf"),
    "text": (VECTOR, np.array(["a", "b", "c"]), "is text where"),
    "objects": (VECTOR, np.array([None, 1, 2]), "is object (3,) where"),
    "complex": (VECTOR, np.zeros(3, complex), "is complex128 (3,) where"),
    "ragged": (VECTOR, [[1], [1, 2], 3], "is ragged where"),
    "a dict": (VECTOR, {"x": ZEROS}, "is a dict where"),
    "nothing": (VECTOR, None, "is None where"),
    "class": (spaces.Discrete(3), 3, "is 3 where its space has a whole number from 0 to 2"),
    "negative class": (spaces.Discrete(3), -1, "is -1 where"),
    "below the start": (spaces.Discrete(3, start=1), 0, "is 0 where its space has a whole number from 1 to 3"),
    "half a class": (spaces.Discrete(3), 1.5, "is 1.5 where"),
    "classes": (spaces.MultiDiscrete([2, 3]), np.array([1, 5]), "is 5 where its space has whole numbers"),
    "bits": (spaces.MultiBinary(3), np.array([0, 2, 0]), "is 2 where its space has 0 and 1"),
    "whole": (spaces.Box(0, 9, (2,), np.int64), np.array([0.5, 1]), "is 0.5 where its space has int64 (2,)"),
    "bytes": (spaces.Box(0, 255, (4,), np.uint8), np.array([0, 300, 0, 0]), "is 300 where its space has 0 to 255"),
    "transposed": (IMAGE, np.zeros((3, 64, 64), np.uint8), "has shape (3, 64, 64) where its space has (64, 64, 3)"),
    "image of floats": (IMAGE, np.zeros((64, 64, 3), np.float32), "is float32 where its space has uint8"),
    "image of bools": (IMAGE, np.zeros((64, 64, 3), bool), "declare Box(0, 1, shape, bool)"),
    "image out of range": (IMAGE, np.full((64, 64, 3), -1), "is -1 where its space has 0 to 255"),
    "brighter than white": (spaces.Box(0, 1, (64, 64, 3)), np.full((64, 64, 3), 9.0), "is 9.0 where"),
    "no mask": (
        spaces.Box(0, 1, (64, 64), np.uint8),
        np.full((64, 64), 2, np.uint8),
        "is 2 where its space has 0 to 1",
    ),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_an_observation_that_leaves_its_space_is_one_line_at_its_step(name):
    space, value, words = OBSERVATIONS[name]
    env = make_toy(later(space, value))
    env.reset(), env.step(ACTION)
    message = one_line_error(env.step, ACTION)
    assert message.startswith("custom_tests.factories:newest_toy (train environment 0) at step 2 of its episode: ")
    assert words in message and len(message) < 300


def test_the_first_observation_is_checked_too():
    assert "at step 0" in one_line_error(make_toy(later(VECTOR, None, at=0)).reset)


FINE = [
    (VECTOR, [0, 0.5, 1]),
    (VECTOR, torch.tensor([0, 0.5, 1])),
    (VECTOR, np.array([1, 2, 3])),
    (VECTOR, np.array([True, False, True])),
    (VECTOR, np.float32([1e30, -1e30, 7])),  # beyond its bounds, as many are
    (spaces.Box(-1, 1, ()), 0.5),
    (spaces.Box(-1, 1, ()), np.array(3)),
    (spaces.Discrete(3), np.int64(2)),
    (spaces.Discrete(3), np.array(2)),
    (spaces.Discrete(3), 2.0),
    (spaces.Discrete(3), True),
    (spaces.MultiDiscrete([2, 3]), [1, 2]),
    (spaces.MultiBinary(2), np.array([True, False])),
    (spaces.Box(0, 9, (2,), np.int64), np.array([3.0, 1.0])),
    (IMAGE, np.full((64, 64, 3), 255)),
    (IMAGE, np.zeros((64, 64, 3), np.uint8)[::-1]),
    (spaces.Box(0, 1, (64, 64, 3)), np.full((64, 64, 3), 1.0001)),  # of rounding
    (spaces.Box(0, 1, (64, 64), np.uint8), np.eye(64, dtype=bool)),
]


@pytest.mark.parametrize("number", range(len(FINE)))
def test_what_is_exactly_as_good_is_taken(number):
    space, value = FINE[number]
    assert make_toy(later(space, value)).reset() and problem(space, value, space is IMAGE) is None


@pytest.mark.parametrize("space", [space for space, _, _ in OBSERVATIONS.values()] + [space for space, _ in FINE])
def test_the_fast_test_takes_samples_and_agrees_with_the_slow_one(space):
    fine = test_of(space, image=len(space.shape or ()) > 1 and space.shape[0] == 64)
    assert all(fine(space.sample()) for _ in range(5))
    for _, value, _ in OBSERVATIONS.values():
        assert not fine(value) or problem(space, value) is None


test_of.__test__ = False


BESIDE = {  # name: (reward, terminated, truncated, info), what the line says
    "reward None": ((None, False, False, {}), "the reward is None"),
    "reward text": (("1", False, False, {}), "the reward is text"),
    "reward dict": (({"agent": 1.0}, False, False, {}), "the reward is a dict"),
    "rewards": ((np.zeros(2), False, False, {}), "the reward is an array (2,)"),
    "reward complex": ((1j, False, False, {}), "the reward is a complex"),
    "reward not a number": ((float("nan"), False, False, {}), "the reward is not finite: nan"),
    "reward too large": ((1e39, False, False, {}), "the reward is not finite: 1e+39"),
    "terminated dict": ((0.0, {"__all__": False}, False, {}), "terminated is a dict, expected True or False"),
    "terminated text": ((0.0, "False", False, {}), "terminated is text"),
    "terminated None": ((0.0, None, False, {}), "terminated is None"),
    "truncated dict": ((0.0, False, {}, {}), "truncated is a dict"),
    "truncated array": ((0.0, False, np.array([False, True]), {}), "truncated is an array (2,)"),
    "truncated array of one": ((0.0, False, np.array([False]), {}), "truncated is an array (1,)"),
    "truncated 2": ((0.0, False, 2, {}), "truncated is 2, expected"),
    "info list": ((0.0, False, False, []), "info is a list, expected a dict"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_rewards_flags_and_infos_that_are_none_are_one_line(name, recwarn):
    result, words = BESIDE[name]
    env = make_toy(Toy(VECTOR, act=lambda step: result))
    env.reset()
    message = one_line_error(env.step, ACTION)
    assert words in message and "at step 1 of its episode" in message and "newest_toy" in message
    assert not recwarn.list


@pytest.mark.parametrize("end", [True, 1, np.bool_(True), np.array(True), np.int64(1), 1.0, torch.tensor(True)])
@pytest.mark.parametrize("one", [1, True, np.float64(1), np.array([1.0]), np.array(1), torch.tensor(1.0)])
def test_flags_may_be_bools_and_their_numbers_and_rewards_single_numbers(end, one):
    env = make_toy(Toy(VECTOR, act=lambda step: (one, end, 0, {})))
    env.reset()
    obs = env.step(ACTION)
    assert obs["is_last"] and obs["is_terminal"] and obs["reward"] == 1


def test_a_tuple_of_another_length_is_one_line():
    space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)])
    message = one_line_error(make_toy(Toy(space, lambda step: (1, 2, 0))).reset)
    assert "the observation 'state' has 3 parts where its space has 2" in message


def test_spaces_that_change_are_still_those_of_the_start():
    toy = Toy(VECTOR, lambda step: np.zeros(3 + (step > 1), np.float32))
    env = make_toy(toy)
    env.reset(), env.step(ACTION)
    toy.observation_space = spaces.Box(-1, 1, (4,))
    assert "has shape (4,) where its space has (3,)" in one_line_error(env.step, ACTION)


class Changing(gymnasium.Env):
    """Instances differ in their spaces."""

    action_space = spaces.Discrete(2)
    made = 0

    def __init__(self):
        Changing.made += 1
        self.observation_space = spaces.Box(-1, 1, (2 + Changing.made,))


def test_environments_of_one_run_have_the_same_spaces():
    config = env_config("custom_tests.test_checks:Changing")
    message = one_line_error(make_envs, config, "train", 2)
    assert "environment 1 has other spaces: observation 'state'" in message


def test_every_suite_is_checked(monkeypatch):
    from envs import dummy, make_env

    observe = dummy.Vector._observe
    monkeypatch.setattr(dummy.Vector, "_observe", lambda env: {"state": observe(env)["state"][:2]})
    env = make_env(env_config("dummy_vector"), "eval", 3)
    assert one_line_error(env.reset).startswith("dummy_vector (eval environment 3) at step 0 of its episode: ")


def test_checking_passes_the_same_arrays_on():
    class Fixed:
        obs_space = {"state": VECTOR}
        obs = {"state": ZEROS, "reward": np.float32(0)}

        def reset(self):
            return self.obs

    assert Checked(Fixed(), env_config("any"), "fixed").reset()["state"] is ZEROS
    assert Section(a=1).to_dict() == {"a": 1} and len(play(make_toy(Toy(VECTOR)), 30)) == 31
