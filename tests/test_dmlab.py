"""DeepMind Lab with a stand-in for its Python module: calls to it, and observations made from its results."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import envs.dmlab
from envs import make_env
from tests.factories import check_conformance, one_line_error
from tests.factories import env_config as make_config

LENGTH = 20  # frames of an episode of the stand-in
FORWARD, FIRE = 0, 14


class Lab:
    """Stand-in for `deepmind_lab.Lab`, after docs/users/python_api.md of the repository google-deepmind/lab.

    Episodes last LENGTH frames, each of which rewards its number; pictures are as bright as the frames that have
    passed. What the module refuses, or leaves undefined, fails.
    """

    made = []

    def __init__(self, level, observations, config=None, renderer="software"):
        assert all(isinstance(word, str) for pair in config.items() for word in pair)
        self.level, self.names, self.config = level, observations, config
        self.frame = None
        self.seeds, self.steps, self.closed = [], [], 0
        Lab.made.append(self)

    def reset(self, episode=-1, seed=None):
        assert isinstance(seed, int) and 0 <= seed < 2**31
        self.seeds.append(seed)
        self.frame = 0
        return True

    def is_running(self):
        return self.frame is not None and self.frame < LENGTH

    def observations(self):
        assert self.is_running(), "RuntimeError: Environment in wrong status for call to observations()"
        shape = int(self.config["height"]), int(self.config["width"]), 3
        shown = {name: np.full(shape, 10 + self.frame, np.uint8) for name in self.names}
        return shown | ({"INSTR": f"go on {self.frame}"} if "INSTR" in self.names else {})

    def step(self, action, num_steps=1):
        assert self.is_running(), "RuntimeError: Environment in wrong status for call to step()"
        assert action.dtype == np.intc and action.shape == (7,)
        self.steps.append((tuple(action.tolist()), num_steps))
        before, self.frame = self.frame, min(LENGTH, self.frame + num_steps)
        return float(sum(range(before + 1, self.frame + 1)))

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def lab(monkeypatch):
    monkeypatch.setattr(Lab, "made", [])
    monkeypatch.setitem(sys.modules, "deepmind_lab", SimpleNamespace(Lab=Lab))


def make(task="explore_goal_locations_small", index=0, **changes):
    env = make_env(make_config(f"dmlab_{task}", **changes), "train", index)
    return env, Lab.made[-1]


def act(number):
    return {"action": np.eye(15, dtype=np.float32)[number]}


def test_conformance():
    env, lab = make(action_repeat=4, size=(48, 64))
    assert env.obs_space.keys() == {"image"} and env.obs_space["image"].shape == (48, 64, 3)
    assert (lab.config["height"], lab.config["width"]) == ("48", "64")  # drawn at that size, not resized
    check_conformance(env, steps=12)
    env.close()
    env.close()
    assert lab.closed == 1


def test_levels():
    assert len(envs.dmlab.DMLAB30) == len(set(envs.dmlab.DMLAB30)) == 30
    for name in envs.dmlab.DMLAB30:
        _, lab = make(name)
        assert lab.level == f"contributed/dmlab30/{name}" and "allowHoldOutLevels" not in lab.config
    assert make("seekavoid_arena_01")[1].level == "seekavoid_arena_01"


@pytest.mark.parametrize(
    "task, script",
    [
        ("rooms_exploit_deferred_effects_test", "rooms_exploit_deferred_effects_test"),
        ("rooms_collect_good_objects_test", "rooms_collect_good_objects_test"),
        ("language_execute_random_task_test", "language_execute_random_task"),
    ],
)
def test_held_out_episodes(task, script):
    _, lab = make(task)
    assert lab.level == f"contributed/dmlab30/{script}"
    assert (lab.config["allowHoldOutLevels"], lab.config["mixerSeed"]) == ("true", "1611489005")


def test_actions_are_passed_on_with_their_repeat():
    env, lab = make(action_repeat=4)
    assert env.act_space["action"].n == 15
    env.reset()
    assert env.step(act(FORWARD))["reward"] == 1 + 2 + 3 + 4
    assert env.step(act(FIRE))["reward"] == 5 + 6 + 7 + 8
    env.step(act(12))
    assert lab.steps == [((0, 0, 0, 1, 0, 0, 0), 4), ((0, 0, 0, 0, 1, 0, 0), 4), ((-60, 0, 0, 1, 0, 0, 0), 4)]


def test_actions_are_those_of_the_large_set():
    """The set has every action once: four moves, four turns, two looks, four turns while walking, and a shot."""
    table = envs.dmlab.ACTIONS
    assert len({tuple(row) for row in table.tolist()}) == 15
    walking, still = table[table[:, 3] == 1], table[table[:, 3] == 0]
    assert sorted(walking[:, 0]) == [-60, -10, 0, 10, 60] and sorted(still[:, 0]) == [-60, -10, *[0] * 5, 10, 60]
    assert sorted(table[:, 1]) == [-10, *[0] * 13, 10]
    assert sorted(table[:, 2]) == [-1, *[0] * 13, 1]
    assert (table[:, 4].sum(), np.abs(table[:, 5:]).sum()) == (1, 0)


def test_the_end_is_a_time_out_that_shows_the_last_picture():
    env, _ = make(action_repeat=8)
    stream = [env.reset(), *[env.step(act(FORWARD)) for _ in range(3)]]
    assert [int(obs["image"][0, 0, 0]) for obs in stream] == [10, 18, 26, 26]
    assert [bool(obs["is_last"]) for obs in stream] == [False, False, False, True]
    assert not stream[-1]["is_terminal"]
    assert stream[-1]["reward"] == 17 + 18 + 19 + 20  # the frames that were left
    assert np.array_equal(env.render(), stream[-1]["image"])
    obs = env.reset()
    assert obs["is_first"] and obs["image"][0, 0, 0] == 10


def test_every_episode_has_a_seed_of_its_own():
    seeds = []
    for index, seed in [(0, 0), (0, 0), (1, 0), (0, 1)]:
        env, lab = make(index=index, seed=seed)
        env.reset(), env.reset(), env.reset()
        seeds.append(tuple(lab.seeds))
    assert seeds[0] == seeds[1]
    assert len({number for stream in seeds[1:] for number in stream}) == 9


def test_mistakes_are_one_line(monkeypatch):
    config = make_config("dmlab_explore_goal_location_small")
    assert "'explore_goal_locations_small'" in one_line_error(make_env, config, "train", 0)
    monkeypatch.setitem(sys.modules, "deepmind_lab", None)
    assert "deepmind_lab" in one_line_error(make_env, make_config("dmlab_lt_chasm"), "train", 0)
