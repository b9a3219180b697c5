"""Test what load_agent gives: an agent that takes an environment's own observations and gives its own actions."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import dreamer
from envs import make_env
from envs.spaces import Converter, describe, rebuild
from tests.factories import draw_action
from tools import UserError
from training.config import load_config

SPACES = [
    spaces.Box(-1, 1, (3,)),
    spaces.Box(np.array([-3.0, 0.1]), np.array([np.inf, 7.0]), dtype=np.float64),
    spaces.Box(0, 255, (4, 6, 3), np.uint8),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary((2, 2)),
]


class Odd(gymnasium.Env):
    """Large images, integers that begin below 0 and nested observations; bounds far from [-1, 1]."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (24, 40, 3), np.uint8),
            "body": spaces.Dict({"phase": spaces.Discrete(3, start=-1), "grid": spaces.Box(-9, 9, (2, 2))}),
        }
    )
    action_space = spaces.Dict(
        {
            "gear": spaces.Discrete(3, start=-1),
            "torque": spaces.Box(np.array([2.0, -50.0]), np.array([4.0, 100.0]), dtype=np.float64),
            "keys": spaces.MultiBinary(3),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time == 9, {}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Return a run in Odd whose observations are two frames of 16x16."""
    path = tmp_path_factory.mktemp("runs") / "odd"
    words = "--configs debug --task custom_tests.test_policy:Odd --size 16 16 --frame_stack 2 --steps 60"
    quiet = "--eval_episode_num 0 --log_level error"
    assert dreamer.main([*f"{words} {quiet}".split(), "--logdir", str(path)]) == 0
    return path


def observe(seed=0):
    return Odd().reset(seed=seed)[0]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_is_rebuilt_from_plain_data(space):
    plain = describe(space)
    assert rebuild(plain) == space
    assert all(isinstance(value, (str, int, float, list)) for value in plain.values())


def test_actions_are_those_of_the_environment(logdir):
    agent, env, state = dreamer.load_agent(logdir, "cpu"), Odd(), None
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        action, state = agent.act(obs, state, mode="sample")
        assert type(action["gear"]) is int and 2 <= action["torque"][0] <= 4
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            (obs, _), state = env.reset(), None


def test_a_batch_acts_as_its_members_do(logdir):
    agent = dreamer.load_agent(logdir, "cpu")
    many = [observe(seed) for seed in range(3)]
    batch = {
        "camera": np.stack([obs["camera"] for obs in many]),
        "body": {key: np.stack([obs["body"][key] for obs in many]) for key in ("phase", "grid")},
    }
    actions, state = agent.act(batch)
    actions, state = agent.act({**batch, "is_first": np.array([False, True, False])}, state)
    assert actions["torque"].shape == (3, 2) and actions["gear"].shape == (3,)
    alone, memory = agent.act(many[0])
    alone, memory = agent.act(many[0], memory)
    assert alone["gear"] == actions["gear"][0]
    np.testing.assert_allclose(alone["torque"], actions["torque"][0], rtol=1e-5)
    assert memory.frames["camera"].shape == (1, 16, 16, 6) and state.frames["camera"].shape == (3, 16, 16, 6)


def test_the_same_observations_lead_to_the_same_actions(logdir):
    agent, sampled = dreamer.load_agent(logdir, "cpu"), []
    twice = [agent.act(observe(), agent.act(observe(1))[1])[0]["torque"] for _ in range(2)]
    assert np.array_equal(*twice)
    sampled = [agent.act(observe(), mode="sample")[0]["torque"] for _ in range(2)]
    assert not np.array_equal(*sampled)


def test_the_agent_sees_what_the_wrappers_showed_it(logdir):
    config = load_config(["--config", str(logdir / "config.yaml")], dreamer.CONFIGS)
    env, agent, raw = make_env(config, "eval", 0), dreamer.load_agent(logdir, "cpu"), []
    inner = env
    while not isinstance(inner, Odd):
        inner = inner.__dict__.get("env") or inner.__dict__["_env"]
    given, inner.step = inner.step, lambda action: raw.append(given(action)) or raw[-1]
    plain, rng = env.reset(), np.random.default_rng(0)
    camera = plain["camera"][..., :3]
    batch, _ = agent.batch({"camera": camera, "body/phase": 0, "body/grid": np.zeros((2, 2))}, True)
    assert np.array_equal(batch["camera"][0], camera)  # images also as the agent sees them
    frames = {"camera": plain["camera"][None]}
    for _ in range(3):
        plain = env.step(draw_action(env.act_space, rng))
        batch, single = agent.batch(raw[-1][0], False)
        batch, frames = agent.stacked(batch, frames)
        assert single and all(np.array_equal(batch[key][0], plain[key]) for key in agent.obs_spec)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"camera": None}, "observation camera: expected an array of numbers, got NoneType"),
        ({"camera": np.zeros((24, 40), np.uint8)}, r"camera: expected shape \(24, 40, 3\) or \(16, 16, 3\)"),
        ({"camera": np.zeros((24, 40, 3))}, "observation camera: expected integers, got float64"),
        ({"camera": np.full((24, 40, 3), 300)}, "expected integers from 0 to 255, got 300 to 300"),
        ({"body": {"phase": 2, "grid": np.zeros((2, 2))}}, "body/phase: expected integers from -1 to 1, got 2"),
        ({"body": {"phase": 0, "grid": np.full((2, 2), np.nan)}}, "observation body/grid is not finite"),
        ({"body": {"phase": 0, "grid": "here"}}, "body/grid: expected an array of numbers, got str"),
        ({"body": {"phase": 0}}, r"expected an observation with the keys \['body/grid', 'body/phase', 'camera'\]"),
        ({"body": {"phase": np.zeros(3, int), "grid": np.zeros((3, 2, 2))}}, "camera is of one environment, and body"),
        ({"is_first": np.zeros(2, bool)}, "expected as many of each observation and of is_first"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(logdir, change, said):
    with pytest.raises(UserError, match=said) as caught:
        dreamer.load_agent(logdir, "cpu").act({**observe(), **change})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_lists_other_floats_and_other_keys_are_taken(logdir):
    agent, obs = dreamer.load_agent(logdir, "cpu"), observe()
    grid = obs["body"]["grid"]
    first = agent.act(obs)[0]
    body = {**obs["body"], "grid": grid.astype(np.float64).tolist()}
    second = agent.act({**obs, "body": body, "reward": 3.0, "unknown": "x"})[0]
    assert np.array_equal(first["torque"], second["torque"])


def test_a_state_of_another_number_of_environments_is_refused(logdir):
    agent = dreamer.load_agent(logdir, "cpu")
    _, state = agent.act(observe())
    batch = {"camera": np.zeros((2, 24, 40, 3), np.uint8), "body/phase": [0, 0], "body/grid": np.zeros((2, 2, 2))}
    with pytest.raises(UserError, match="the state is of 1 environments, and the observations of 2"):
        agent.act(batch, state)


def test_a_checkpoint_without_spaces_gives_actions_as_the_agent_has_them(logdir, tmp_path, capsys):
    saved = torch.load(logdir / "latest.pt", weights_only=True)
    assert saved.pop("spaces")["action"]["keys"] == {"kind": "MultiBinary", "shape": [3], "dtype": "int8"}
    torch.save(saved, tmp_path / "latest.pt")
    text = (logdir / "config.yaml").read_text().replace("log_level: error", "log_level: info")
    (tmp_path / "config.yaml").write_text(text)
    agent = dreamer.load_agent(tmp_path, "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks the environment's spaces" in line
    obs = {"camera": np.zeros((16, 16, 6), np.uint8), "body/phase": np.int32(1), "body/grid": np.zeros(4)}
    action, _ = agent.act(obs)
    assert {key: value.shape for key, value in action.items()} == {"gear": (3,), "keys": (6,), "torque": (2,)}
    assert np.abs(action["torque"]).max() <= 1 and action["gear"].sum() == 1


def test_the_wrappers_decide_how_actions_become_the_environments_own():
    own = {"observation": {}, "action": {"action": describe(SPACES[1])}}
    native = Converter(own, load_config([], dreamer.CONFIGS)).native
    assert native({"action": np.array([-1.0, 0.0], np.float32)})["action"].tolist() == [-3.0, pytest.approx(3.55)]
