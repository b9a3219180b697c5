"""Environments as people have them: arguments, factories, wrappers, own metrics, and mistakes in one line each."""

import sys
import textwrap
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from envs import make_env, make_envs
from specs import act_spec
from tests.factories import CONFIGS, Toy, end_of_episode, env_config, make_toy, one_line_error
from training.config import load_config

STATE = spaces.Box(-1, 1, (3,))
ONE = {"action": np.float32([1, 0])}
HERE = "custom_tests.test_custom"


class Cave(gymnasium.Env):
    """An environment with arguments of its own."""

    metadata = {"render_modes": ["human", "rgb_array"]}
    observation_space = STATE
    action_space = spaces.Discrete(2)
    made = []

    def __init__(self, level=1, render_mode=None, sizes=(), walls=None):
        self.render_mode = render_mode
        Cave.made.append({"level": level, "render_mode": render_mode, "sizes": sizes, "walls": walls})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {"is_success": self.steps > 2, "distance": np.float32(9 - self.steps)}
        return np.zeros(3, np.float32), 1.0, self.steps == 4, False, info

    def render(self):
        return np.zeros((8 + self.steps, 9, 3), np.uint8) if self.render_mode == "rgb_array" else None


class Needy(Cave):
    def __init__(self, level, *, map_name):
        super().__init__(level)


class Mute(Cave):
    def __init__(self):
        super().__init__()


class Passes(Cave):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class Breaks(Cave):
    def __init__(self, render_mode=None):
        raise ValueError("no license\nserver")


def make_cave(render_mode=None, depth=2):
    return gymnasium.wrappers.TimeLimit(Cave(depth, render_mode), 3)


def half(env):
    """Wrap an environment so that its rewards are halved."""
    return gymnasium.wrappers.TransformReward(env, lambda reward: reward / 2)


an_environment = Cave()
gymnasium.register("Cave-v0", entry_point=Cave, max_episode_steps=50)
gymnasium.register("MuteCave-v0", entry_point=Mute)
gymnasium.register("NeedyCave-v0", entry_point=Needy, kwargs={"level": 3})
gymnasium.register("BreakingCave-v0", entry_point=Breaks)
gymnasium.register("MadeCave-v0", entry_point=f"{HERE.removeprefix('custom_')}:make_cave")


def make(name, **changes):
    task = name if name.startswith("gym_") else f"{HERE}:{name}"
    return make_env(env_config(task, **changes), "train", 0)


@pytest.mark.parametrize("task", ["Cave", "Passes", "gym_Cave-v0"])
def test_arguments_reach_the_constructor_and_the_configuration_holds_them(task):
    name = task if task.startswith("gym_") else f"{HERE}:{task}"
    flags = ["--task", name, "--env.level", "7", "--env.sizes", "1", "2", "--env.walls.deep", "true"]
    make_env(load_config(flags, CONFIGS), "train", 0)
    assert Cave.made[-1] == {"level": 7, "render_mode": "rgb_array", "sizes": [1, 2], "walls": {"deep": True}}


def test_pictures_are_asked_for_where_the_class_or_function_can_give_them():
    for task in ("Cave", "make_cave", "gym_Cave-v0", "gym_MadeCave-v0", "Passes"):
        env = make(task)
        env.reset()
        assert env.render().shape == (8, 9, 3)
        env.step(ONE)
        assert env.render().shape == (8, 9, 3)  # the environment's have grown: a film has one size
    for task in ("Mute", "gym_MuteCave-v0"):
        env = make(task)
        env.reset()
        assert "no render mode rgb_array" in one_line_error(env.render)
    make("Cave", env={"render_mode": "human"})
    assert Cave.made[-1]["render_mode"] == "human"


def test_what_a_function_makes_is_an_environment():
    assert end_of_episode(make("make_cave", env={"depth": 5}), ONE)[0] == 3
    assert Cave.made[-1]["level"] == 5
    assert end_of_episode(make("gym_Cave-v0", env={"max_episode_steps": 2}), ONE)[0] == 2


def test_wrappers_go_around_in_order():
    wrappers = ("gymnasium.wrappers:FlattenObservation", "tests.test_custom:half", "tests.test_custom:half")
    for task in ("Cave", "gym_Cave-v0"):
        assert end_of_episode(make(task, wrappers=wrappers), ONE)[1] == [0.25] * 4
    images = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (64, 64, 3)), "b": STATE})

    class Seen(gymnasium.Env, Toy):
        __init__ = Toy.__init__
        reset, step = Toy.reset, Toy.step

    env = make_toy(Seen(images), wrappers=("gymnasium.wrappers:FlattenObservation",))
    assert env.obs_space["state"].shape == (64 * 64 * 3 + 3,)


def test_a_file_is_a_module_too(tmp_path, monkeypatch):
    (tmp_path / "my_cave.py").write_text("from tests.test_custom import Cave\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("./my_cave.py", str(tmp_path / "my_cave.py"), "./my_cave"):
        make_env(env_config(f"custom_{name}:Cave"), "train", 0).reset()
    assert "there is no file" in one_line_error(make_env, env_config("custom_./cave.py:Cave"), "train", 0)


MODULES = {
    "syntax": ("def broken(:\n", "SyntaxError: invalid syntax"),
    "raises": ("x = 1\nraise RuntimeError('no\\ndisplay')\n", "RuntimeError: no display ("),
    "exits": ("import sys\nsys.exit('usage')\n", "SystemExit: usage"),
    "lacks": ("import no_such_package_of_any\n", "No module named 'no_such_package_of_any'"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_fails_is_one_line_with_the_place(tmp_path, monkeypatch, name):
    code, words = MODULES[name]
    (tmp_path / f"fails_{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    message = one_line_error(make_env, env_config(f"custom_fails_{name}:Env"), "train", 0)
    assert f"'fails_{name}' cannot be imported: " in message and words in message
    assert name in ("lacks",) or f"fails_{name}.py, line " in message


MISTAKES = {
    "Needy": ({}, "needs an argument 'level': give it by --env.level VALUE"),
    "gym_NeedyCave-v0": ({}, "needs an argument 'map_name'"),
    "Cave": ({"env": {"levle": 3}}, "--env.levle: custom_tests.test_custom:Cave takes no argument of that name"),
    "gym_Cave-v0": ({"env": {"levle": 3}}, "(it takes level, render_mode, sizes, walls)"),
    "Breaks": ({}, "cannot be made: ValueError: no license server ("),
    "gym_BreakingCave-v0": ({}, "cannot be made: ValueError: no license server ("),
    "Cvae": ({}, "'Cave'"),
    "HERE": ({}, "HERE is an object (str), expected the class"),
    "an_environment": ({}, "an_environment is an object (Cave)"),
    "make_cave": ({"wrappers": ("gymnasium.wrappers:Nothing",)}, "unknown class or function in gymnasium.wrappers"),
    "half": ({}, "needs an argument 'env'"),
    "Mute": ({"wrappers": ("gymnasium.wrappers:TimeLimit",)}, "needs more than an environment (max_episode_steps)"),
    "Passes": ({"wrappers": ("gymnasium",)}, "--wrappers gymnasium must look like package.module:Class"),
    "gym_PoongNoFrameskip-v4": ({}, "did you mean 'PongNoFrameskip-v4'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_made_is_one_line(name):
    changes, words = MISTAKES[name]
    assert words in one_line_error(lambda: make(name, **changes))


@pytest.mark.parametrize(
    "task, hint",
    {
        "CartPole-v1": "'gym_CartPole-v1'",
        "ALE/Pong-v5": "'atari_pong'",
        "package:Cave-v0": "'gym_package:Cave-v0'",
        "cave:Cave": "'custom_cave:Cave'",
        "my_cave.py:Cave": "'custom_my_cave.py:Cave'",
    }.items(),
)
def test_a_task_without_its_suite_is_told_which(task, hint):
    assert hint in one_line_error(make_env, env_config(task), "train", 0)


@pytest.mark.parametrize("flag", ["--env.level 3", "--wrappers gymnasium.wrappers:FlattenObservation", "--log_info x"])
def test_options_that_a_suite_has_not_are_refused(flag):
    config = load_config(["--task", "dummy_vector", *flag.split()], CONFIGS)
    message = one_line_error(make_env, config, "train", 0)
    assert message.startswith(flag.split()[0]) and "tasks, not for dummy_" in message


# ---------------------------------------------------------------------------
# Own metrics


def test_what_info_tells_is_logged_with_the_step():
    env = make("Cave", log_info=("is_success", "distance"))
    assert not any(key.startswith("log_") for key in env.reset())
    steps = [env.step(ONE) for _ in range(4)]
    assert [float(obs["log_is_success"]) for obs in steps] == [0, 0, 1, 1]
    assert [float(obs["log_distance"]) for obs in steps] == [8, 7, 6, 5]


def test_a_misspelt_metric_is_told_at_the_end_of_an_episode():
    env = make("Cave", log_info=("is_sucess",))
    message = one_line_error(end_of_episode, env, ONE)
    assert message == "--log_info is_sucess: no info of an episode had it, the last has distance, is_success"


def test_a_metric_that_comes_at_the_end_alone_is_fine():
    toy = Toy(STATE, act=lambda step: (0.0, step >= 3, False, {"won": True} if step >= 3 else {}))
    env = make_toy(toy, log_info=("won",))
    assert end_of_episode(env, ONE)[2]["log_won"] == 1


@pytest.mark.parametrize(
    "value, words", [({"r": 1}, "is a dict"), ("yes", "is text"), (np.zeros(2), "is an array (2,)")]
)
def test_only_numbers_are_logged(value, words):
    env = make_toy(Toy(STATE, act=lambda step: (0.0, False, False, {"x": value})), log_info=("x",))
    env.reset()
    assert f"info['x'] {words}, and only numbers are logged" in one_line_error(env.step, ONE)


def test_observations_called_log_are_for_the_logger():
    space = spaces.Dict({"state": STATE, "log_success": spaces.Box(0, 1, ()), "log_count": spaces.Discrete(3)})
    env = make_toy(Toy(space))
    obs = env.reset()
    assert env.obs_space.keys() == {"state"} and obs["log_success"].dtype == obs["log_count"].dtype == np.float32
    picture = spaces.Dict({"state": STATE, "log_image": spaces.Box(0, 255, (8, 8), np.uint8)})
    assert "'log_image' is an array (8, 8), and only numbers" in one_line_error(make_toy(Toy(picture)).reset)


def test_workers_hand_the_metrics_on():
    config = env_config(f"{HERE}:Cave", log_info=("is_success",), parallel=True)
    envs = make_envs(config, "train", 1)
    try:
        envs.reset()
        seen = [envs.step({"action": np.float32([[1, 0]])}) for _ in range(3)]
    finally:
        envs.close()
    assert [obs["log_is_success"].tolist() for obs in seen] == [[0], [0], [1]]


# ---------------------------------------------------------------------------
# Actions


def test_boxes_of_whole_numbers_are_choices():
    space = spaces.Dict(
        {
            "steer": spaces.Box(np.array([-1, 0]), np.array([1, 4]), (2,), np.int64),
            "bits": spaces.Box(0, 1, (2,), bool),
            "gray": spaces.Box(0, 255, (1,), np.uint8),
            "one": spaces.Box(0, 1, (), np.uint8),
        }
    )
    toy = Toy(STATE, action_space=space)
    env = make_toy(toy)
    assert {key: child.nvec.tolist() for key, child in env.act_space.items()} == {
        "steer": [3, 5],
        "bits": [2, 2],
        "gray": [256],
        "one": [2],
    }
    env.reset()
    spec, rng = act_spec(env.act_space), np.random.default_rng(0)
    for _ in range(5):
        env.step({key: value[0] for key, value in spec.uniform(rng, 1).items()})
        assert space.contains(toy.action)
    steer = np.float32([0, 0, 1, 1, 0, 0, 0, 0])
    gray, one = np.eye(256, dtype=np.float32)[255], np.float32([0, 1])
    env.step({"steer": steer, "bits": np.float32([0, 1, 1, 0]), "gray": gray, "one": one})
    assert {key: value.tolist() for key, value in toy.action.items()} == {
        "steer": [1, 0],
        "bits": [True, False],
        "gray": [255],
        "one": 1,
    }


def test_actions_without_usable_bounds_raise_no_warnings():
    most = np.finfo(np.float64).max
    toy = Toy(STATE, action_space=spaces.Box(-most, most, (2,), np.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_toy(toy)
        env.reset()
        env.step({"action": np.float32([0.5, -1])})
    assert toy.action.tolist() == [0.5, -1]


def test_a_large_choice_is_drawn_without_a_table_of_all():
    spec = act_spec({"action": spaces.Discrete(200_000), "two": spaces.MultiDiscrete([2, 3])})
    drawn = spec.uniform(np.random.default_rng(0), 2)
    assert drawn["action"].shape == (2, 200_000) and drawn["action"].sum(-1).tolist() == [1, 1]
    assert spec.one_hot("two", np.array([[1, 2], [0, 0]])).tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]


# ---------------------------------------------------------------------------
# Spaces and environments that are something else


class Old:
    """Spaces of the package that came before Gymnasium, by their names and attributes."""

    class Space:
        def __init__(self, **attributes):
            vars(self).update(attributes)

    class Box(Space): ...

    class Discrete(Space): ...

    class Dict(Space): ...


def test_spaces_of_the_old_package_are_taken_as_they_are():
    low = np.float32([-1, -1])
    state = Old.Box(low=low, high=-low, shape=(2,), dtype=np.dtype(np.float32))
    space = Old.Dict(spaces={"state": state, "phase": Old.Discrete(n=3)})
    env = make_toy(Toy(space, lambda step: {"state": low, "phase": 2}, action_space=Old.Discrete(n=2)))
    assert env.obs_space == {"state": spaces.Box(-np.inf, np.inf, (2,)), "phase": spaces.Discrete(3)}
    assert env.reset()["phase"] == 2 and env.act_space == {"action": spaces.Discrete(2)}


KINDS = {
    "no space yet": (
        Toy(None),
        "observation_space is None, expected a space of Gymnasium, there before the first reset",
    ),
    "a method": (Toy(lambda agent: STATE), "observation_space is a method"),
    "a shape": (Toy((3,)), "observation_space is a builtins.tuple"),
    "no action space": (Toy(STATE, action_space=None), "action_space is None"),
    "no action": (Toy(STATE, action_space=spaces.Dict({})), "the environment has no action"),
    "empty action": (Toy(STATE, action_space=spaces.Box(-1, 1, (0,))), "action 'action' has no numbers"),
    "empty observation": (Toy(spaces.Box(-1, 1, (0,))), "observation 'state' has no numbers"),
    "no observation": (Toy(spaces.Dict({})), "no observation is left"),
    "many values": (Toy(STATE, action_space=spaces.Box(0, 999, (2,), np.int64)), "declare it float32 and round"),
    "no bounds": (Toy(STATE, action_space=spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64)), "up to 256 values each"),
    "text": (Toy(STATE, action_space=spaces.Text(5)), "action 'action' is a Text space"),
    "vectorized": (
        Toy(STATE, num_envs=4),
        "is a vectorized environment of 4: make a single one, and have several by --envs",
    ),
    "several agents": (Toy(STATE, possible_agents=["a", "b"]), "several agents (PettingZoo)"),
    "twice": (Toy(spaces.Dict({"a/b": STATE, "a": spaces.Dict({"b": STATE})})), "the space has 'a/b' twice"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_environment_for_one_agent_is_one_line(name):
    toy, words = KINDS[name]
    assert words in one_line_error(make_toy, toy)


def test_a_dict_that_lacks_an_observation_tells_what_it_has():
    space = spaces.Dict({"x": STATE, "y": STATE})
    message = one_line_error(make_toy(Toy(space, lambda step: {"x": np.zeros(3), "z": 0})).reset)
    assert "'y' is in the environment's space and not in what it gives, which has ['x', 'z']" in message


@pytest.mark.parametrize(
    "image, shape",
    {(3, 48, 64): (48, 64, 3), (1, 48, 64): (48, 64, 1), (48, 64): (48, 64), (48, 64, 4): (48, 64, 4)}.items(),
)
def test_pictures_come_with_their_channels_last(image, shape):
    assert make_toy(Toy(STATE, render=lambda: np.zeros(image, np.uint8))).render().shape == shape


def test_pictures_of_other_shapes_are_one_line():
    env = make_toy(Toy(STATE, render=lambda: np.zeros((48, 64, 7), np.uint8)))
    assert "expected uint8 (H, W, 3), got uint8 (48, 64, 7)" in one_line_error(env.render)
