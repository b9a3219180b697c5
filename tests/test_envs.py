"""Every suite conforms to `envs.Env`, and every mistake of the user ends in a one-line error."""

import os
import sys
import textwrap

import numpy as np
import pytest
from gymnasium import spaces

import envs.opengl
from envs import make_env, wrappers
from modalities import obs_spec
from tests.factories import (
    check_conformance,
    check_value,
    draw_action,
    end_of_episode,
    one_line_error,
    play,
    run_python,
    same,
)
from tests.factories import env_config as make_config

# ---------------------------------------------------------------------------
# Conformance

TASKS = {
    "dummy_vector": {},
    "dummy_discrete": {},
    "dummy_pixels": {"size": (48, 64)},
    "dummy_multi": {},
    "gym_CartPole-v1": {},
    "gym_Pendulum-v1": {"time_limit": 30},
    "dmc_cartpole_balance": {"cnn_keys": "$^", "action_repeat": 40},
}


@pytest.mark.parametrize("task", TASKS)
def test_conformance(task):
    env = make_env(make_config(task, **TASKS[task]), "train", 0)
    check_conformance(env)
    env.close()
    env.close()


def test_conformance_of_dmc_vision():
    config = make_config("dmc_cartpole_balance", mlp_keys="$^", size=(64, 48), action_repeat=100)
    if not envs.opengl.choose_renderer():
        assert "apt-get install libosmesa6" in one_line_error(make_env, config, "train", 0)
        return
    env = make_env(config, "train", 0)
    assert env.obs_space.keys() == {"image"} and env.obs_space["image"].shape == (64, 48, 3)
    stream = check_conformance(env, steps=25)
    assert stream[0]["image"].std() > 1  # not a black picture
    assert not np.array_equal(stream[0]["image"], stream[5]["image"])
    assert env.render().shape == (256, 256, 3)
    env.close()
    env.close()


@pytest.mark.parametrize("task", [task for task in TASKS if task != "dummy_discrete"])
def test_seeds(task):
    def stream(mode, index, seed=0, **later):
        env = make_env(make_config(task, **TASKS[task], seed=seed), mode, index, **later)
        observations = play(env, 80)  # several episodes: small environments have few states to start from
        env.close()
        return observations

    first = stream("train", 0)
    assert same(first, stream("train", 0))
    assert not same(first, stream("train", 1))
    assert not same(first, stream("eval", 0))
    assert not same(first, stream("train", 0, seed=1))
    assert not same(first, stream("train", 0, restart=1))
    assert not same(first, stream("train", 0, behind=1))
    assert not same(stream("train", 0, restart=1), stream("train", 0, restart=2))


# ---------------------------------------------------------------------------
# Episodes: terminal or out of time, action repeat


LEFT, RIGHT = {"action": np.float32([1, 0])}, {"action": np.float32([0, 1])}


def test_corridor_by_hand():
    env = make_env(make_config("dummy_discrete"), "train", 0)
    steps, rewards, last = end_of_episode(env, RIGHT)
    assert (steps, rewards, bool(last["is_terminal"]), int(last["position"])) == (4, [0, 0, 0, 1], True, 4)
    steps, rewards, last = end_of_episode(env, LEFT)
    assert (steps, sum(rewards), bool(last["is_terminal"]), int(last["position"])) == (20, 0, False, 0)


def test_multi_by_hand():
    env = make_env(make_config("dummy_multi"), "train", 0)
    obs = env.reset()
    point = obs["state"].astype(float)
    for phase in (0, 1, 2):
        assert obs["phase"] == phase
        move = np.float32([0.25, -3])  # clipped to -1
        obs = env.step({"move": move, "mode": np.eye(3, dtype=np.float32)[1]})
        point = np.clip(point + np.array([0.05, -0.2]), -1, 1)
        assert np.allclose(obs["state"], point, atol=1e-6)
        assert obs["reward"] == pytest.approx((phase == 1) - np.abs(point).max(), abs=1e-6)
        assert obs["log_steps"] == phase + 1


def test_own_time_limit_is_not_terminal():
    env = make_env(make_config("gym_Pendulum-v1", action_repeat=50), "train", 0)
    steps, _, last = end_of_episode(env, {"action": np.zeros(1, np.float32)})
    assert (steps, bool(last["is_terminal"])) == (4, False)  # 200 frames, truncated by Gymnasium


@pytest.mark.parametrize("repeat, steps", [(1, 6), (2, 3), (4, 1), (50, 1)])
def test_time_limit_counts_frames(repeat, steps):
    env = make_env(make_config("gym_CartPole-v1", time_limit=6, action_repeat=repeat), "train", 0)
    for _ in range(2):  # each episode has its own count
        taken, rewards, last = end_of_episode(env, RIGHT)
        assert taken == steps
        if repeat < 50:
            assert not last["is_terminal"] and sum(rewards) == steps * repeat


def test_falling_is_terminal_also_under_a_time_limit():
    env = make_env(make_config("gym_CartPole-v1", time_limit=100), "train", 0)
    steps, _, last = end_of_episode(env, RIGHT)
    assert steps < 20 and last["is_terminal"]


@pytest.mark.parametrize("repeat", [100, 300])
def test_dmc_runs_for_1000_frames(repeat):
    env = make_env(make_config("dmc_cartpole_balance", cnn_keys="$^", action_repeat=repeat), "train", 0)
    steps, rewards, last = end_of_episode(env, {"action": np.zeros(1, np.float32)})
    assert (steps, bool(last["is_terminal"])) == (-(-1000 // repeat), False)
    assert 0 < sum(rewards) <= 1000
    env.close()


@pytest.mark.parametrize("task, repeat", [("dmc_cartpole_balance", 4), ("dummy_discrete", 3), ("dummy_multi", 2)])
def test_action_repeat_sums_rewards(task, repeat):
    single = make_env(make_config(task, cnn_keys="$^"), "train", 0)
    repeated = make_env(make_config(task, cnn_keys="$^", action_repeat=repeat), "train", 0)
    single.reset(), repeated.reset()
    actions = [{**draw_action(single.act_space, np.random.default_rng(i))} for i in range(2)]
    if task == "dummy_discrete":
        actions = [RIGHT, RIGHT]  # terminal after one frame of the second action
    for action in actions:
        total = 0
        for _ in range(repeat):
            obs = single.step(action)
            total += float(obs["reward"])
            if obs["is_last"]:
                break
        rest = repeated.step(action)
        assert rest["reward"] == pytest.approx(total, rel=1e-6)
        assert same([{**obs, "reward": 0}], [{**rest, "reward": 0}])
    single.close(), repeated.close()


# ---------------------------------------------------------------------------
# Observations


class Reuser:
    """Write every state and image into the same two arrays, the image column by column."""

    obs_space = {"state": spaces.Box(-1, 9, (2,), np.float32), "image": spaces.Box(0, 255, (2, 3, 1), np.uint8)}
    act_space = {"action": spaces.Discrete(2)}
    state, image = np.zeros(2, np.float32), np.zeros((3, 2, 1), np.uint8).transpose(1, 0, 2)

    def reset(self):
        self.state[:] = 0
        return {"state": self.state, "image": self.image, **wrappers.flags(is_first=True)}

    def step(self, action):
        self.state += 1
        self.image += 1
        return {"state": self.state, "image": self.image, **wrappers.flags()}


def test_what_was_observed_stays():
    env = wrappers.PlainObs(Reuser(), make_config("any", size=(2, 3)))
    stream = [env.reset(), env.step({}), env.step({})]
    assert [obs["state"].tolist() for obs in stream] == [[0, 0], [1, 1], [2, 2]]
    assert [obs["image"].tolist() for obs in stream] == [np.full((2, 3, 1), i).tolist() for i in range(3)]
    for obs in stream:
        check_value(env.obs_space["image"], obs["image"])


def test_frame_stack():
    def stream(frames):
        env = make_env(make_config("dummy_pixels", frame_stack=frames), "train", 0)
        assert env.obs_space["image"] == spaces.Box(0, 255, (64, 64, 3 * frames), np.uint8)
        return play(env, 20)  # more than one episode

    history = []
    for one, stacked in zip(stream(1), stream(3), strict=True):
        history = [one["image"]] * 3 if one["is_first"] else [*history[1:], one["image"]]
        assert all(np.array_equal(stacked["image"][..., 3 * i : 3 * i + 3], history[i]) for i in range(3))
        assert stacked["image"].flags.c_contiguous
        assert same([{**one, "image": 0}], [{**stacked, "image": 0}])


# ---------------------------------------------------------------------------
# dmc


def test_proprio_never_renders(monkeypatch):
    from dm_control import mujoco

    def render(*args, **kwargs):
        raise AssertionError("rendered")

    monkeypatch.setattr(mujoco.Physics, "render", render)
    env = make_env(make_config("dmc_cartpole_balance", cnn_keys="$^"), "train", 0)
    assert env.obs_space.keys() == {"position", "velocity"}
    assert all("image" not in obs for obs in play(env, 3))
    with pytest.raises(AssertionError, match="rendered"):  # the patch works
        env.render()
    env.close()


def test_dmc_names():
    with_scalar = make_env(make_config("dmc_walker_walk", cnn_keys="$^"), "train", 0)
    assert with_scalar.obs_space["height"].shape == (1,)
    shapes = [
        make_env(make_config(task, cnn_keys="$^"), "train", 0).act_space["action"].shape
        for task in ("dmc_cup_catch", "dmc_ball_in_cup_catch", "dmc_point_mass_easy")
    ]
    assert shapes == [(2,)] * 3
    assert "'walker_walk'" in one_line_error(make_env, make_config("dmc_walker_wlak", "$^"), "train", 0)
    assert "cameras 0 to" in one_line_error(make_env, make_config("dmc_walker_walk", "$^", camera=9), "train", 0)


VISION = """
    import os
    from tests.test_envs import make_config, make_env
    env = make_env(make_config("dmc_cartpole_balance", mlp_keys="$^"), "train", 0)
    print(os.environ["MUJOCO_GL"], env.reset()["image"].std() > 1)
"""


@pytest.mark.parametrize("backend", ["osmesa", None])
def test_mujoco_gl(backend):
    """Use MUJOCO_GL if set, else choose it; either way an environment left open prints nothing at exit."""
    works = {"egl": envs.opengl.egl_works(), "osmesa": envs.opengl.osmesa_works()}
    result = run_python(VISION, **({"MUJOCO_GL": backend} if backend else {}))
    if works[backend] if backend else any(works.values()):
        expected = backend or ("egl" if works["egl"] else "osmesa")
        assert result.stdout.split() == [expected, "True"], result.stderr
        assert result.stderr == ""
    else:
        hint = f"MUJOCO_GL is {backend}" if backend else "apt-get install libosmesa6"
        assert hint in result.stderr.splitlines()[-1]


COMPILED = """
    import torch
    from envs import make_envs
    from tests.test_envs import make_config
    config = make_config("dmc_cartpole_balance", mlp_keys="$^", parallel=False, env_timeout=60)
    envs = make_envs(config, "train", 1)
    import triton
    print(envs.obs_space["image"].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
@pytest.mark.parametrize("backend", ["osmesa", None])
def test_triton_is_loaded_before_mesa(backend):
    """A process that draws by Mesa can compile by Triton, whose LLVM ends it where Mesa's was loaded first."""
    if not (envs.opengl.osmesa_works() if backend else envs.opengl.choose_renderer()):
        pytest.skip("nothing to draw with")
    result = run_python(COMPILED, **({"MUJOCO_GL": backend} if backend else {}))
    assert result.stdout.split() and result.returncode == 0, result.stderr


def test_no_renderer_is_one_line(monkeypatch):
    proprio = make_config("dmc_cartpole_balance", cnn_keys="$^")
    make_env(proprio, "train", 0).close()  # dm_control is imported with a renderer, if the machine has one
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(envs.opengl, "find_library", lambda name: None)
    pixels = make_config("dmc_cartpole_balance", mlp_keys="$^")
    assert "apt-get install libosmesa6" in one_line_error(make_env, pixels, "train", 0)
    make_env(proprio, "train", 0).close()
    assert "MUJOCO_GL" not in os.environ


# ---------------------------------------------------------------------------
# Mistakes


def test_unknown_names():
    assert "'dmc'" in one_line_error(make_env, make_config("dcm_walker_walk"), "train", 0)
    assert "'dummy'" in one_line_error(make_env, make_config("dumy"), "train", 0)
    assert "'multi'" in one_line_error(make_env, make_config("dummy_mutli"), "train", 0)
    assert "'CartPole-v1'" in one_line_error(make_env, make_config("gym_CartPol-v1"), "train", 0)


@pytest.mark.parametrize(
    "module, task, hint",
    [
        ("dm_control", "dmc_walker_walk", "pip install -r requirements/dmc.txt"),
        ("ale_py", "gym_ALE/Pong-v5", "pip install -r requirements/atari.txt"),
        ("Box2D", "gym_LunarLander-v3", "-r requirements/box2d.txt"),
    ],
)
def test_missing_package(monkeypatch, module, task, hint):
    monkeypatch.setitem(sys.modules, module, None)
    assert hint in one_line_error(make_env, make_config(task, cnn_keys="$^"), "train", 0)


def test_suites_are_imported_when_asked_for():
    code = """
        import sys
        from envs import make_env
        from training.config import CONFIGS, load_config
        make_env(load_config(["--task", "dummy_multi"], CONFIGS), "train", 0)
        print({"dm_control", "mujoco", "cv2", "torch", "envs.from_gym"} & sys.modules.keys())
    """
    assert run_python(code).stdout.strip() == "set()"


def test_selection():
    def keys(cnn_keys, mlp_keys):
        env = make_env(make_config("dummy_multi", cnn_keys, mlp_keys), "train", 0)
        assert env.reset().keys() >= env.obs_space.keys()
        assert not (env.reset().keys() & ({"image", "state", "phase"} - env.obs_space.keys()))
        return set(env.obs_space)

    assert keys(".*", ".*") == {"image", "state", "phase"}
    assert keys("image", "$^") == {"image"}
    assert keys("$^", "state|phase") == {"state", "phase"}
    assert keys("state", "stat") == {"state"}  # a prefix is enough, as with re.match
    message = one_line_error(keys, "state", "image")
    assert "['image']" in message and "['phase', 'state']" in message


# ---------------------------------------------------------------------------
# Classes of the user's own

CUSTOM = """
    import gymnasium
    import numpy as np
    from gymnasium import spaces


    class Everything(gymnasium.Env):
        observation_space = spaces.Dict({
            "picture": spaces.Box(0, 255, (8, 6, 3), np.uint8),
            "gray": spaces.Box(0, 255, (64, 64), np.uint8),
            "nested": spaces.Dict({
                "matrix": spaces.Box(-1, 1, (2, 3), np.float64),
                "scalar": spaces.Box(0, 1, ()),
            }),
            "dice": spaces.Discrete(6, start=1),
            "cards": spaces.MultiDiscrete([4, 13], start=[0, 1]),
            "bits": spaces.MultiBinary(3),
        })
        action_space = spaces.Dict({
            "arm": spaces.Dict({"torque": spaces.Box(np.float32([0, -np.inf]), np.float32([10, np.inf]))}),
            "half": spaces.Box(np.float32([5, -np.inf]), np.float32([np.inf, -5])),
            "keys": spaces.MultiDiscrete([2, 3]),
            "buttons": spaces.MultiBinary(2),
            "gear": spaces.Discrete(3, start=-1),
        })

        def _observe(self):
            picture = np.zeros((8, 6, 3), np.uint8)
            picture[:4] = 200
            nested = {"matrix": np.arange(6.0).reshape(2, 3), "scalar": 0.5}
            gray = np.full((64, 64), 7, np.uint8)
            return {
                "picture": picture, "gray": gray, "nested": nested,
                "dice": 6, "cards": np.array([3, 13]), "bits": np.array([1, 0, 1], np.int8),
            }

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self._observe(), {}

        def step(self, action):
            Everything.action = action
            assert self.action_space.contains(action), action
            return self._observe(), 1, False, False, {}


    class Duck:
        observation_space = spaces.Box(0, 255, (8, 8), np.uint8)
        action_space = spaces.Discrete(2)

        def reset(self, seed=None):
            return np.zeros((8, 8), np.uint8), {}

        def step(self, action):
            return np.full((8, 8), action, np.uint8), action, action == 1, True, {}


    class OldStep(Duck):
        def step(self, action):
            return np.zeros((8, 8), np.uint8), 0.0, False, {}


    class OldReset(Duck):
        def reset(self, seed=None):
            return np.zeros((8, 8), np.uint8)


    class Unseeded(Duck):
        def reset(self):
            return np.zeros((8, 8), np.uint8), {}


    class Needy(Duck):
        def __init__(self, level):
            pass


    class Told(Duck):
        observation_space = spaces.Dict({"mission": spaces.Text(10), "gray": Duck.observation_space})

        def reset(self, seed=None):
            return {"mission": "go", "gray": np.zeros((8, 8), np.uint8)}, {}


    class Unknown(Told):
        observation_space = spaces.Dict(mission=spaces.Sequence(spaces.Text(9)), gray=Duck.observation_space)


    class Clashes(Duck):
        observation_space = spaces.Dict({"reward": spaces.Box(0, 1, (1,))})


    class Filed(Duck):
        observation_space = spaces.Dict({"file": spaces.Box(0, 1, (1,)), "log_price": spaces.Box(0, 1, (1,))})


    class Acts(Duck):
        observation_space = spaces.Dict({"action": spaces.Box(0, 1, (2,))})
        action_space = spaces.Dict({"a": spaces.Discrete(2), "deter": spaces.Discrete(2)})


    class Elsewhere(Duck):
        observation_space = spaces.Dict({"../up": spaces.Box(0, 1, (1,))})


    class Board(Duck):
        observation_space = spaces.Box(0, 2, (8, 8), np.uint8)


    class Layers(Duck):
        observation_space = spaces.Box(0, 255, (4, 4, 6), np.uint8)


    class Short(Duck):
        observation_space = spaces.Box(-1, 1, (4,))

        def reset(self, seed=None):
            return np.zeros(1, np.float32), {}


    class Lacks(Duck):
        observation_space = spaces.Dict({"x": spaces.Box(0, 1, (1,)), "y": spaces.Box(0, 1, (1,))})

        def reset(self, seed=None):
            return {"x": np.zeros(1)}, {}


    class Draws(Duck):
        def step(self, action):
            return np.zeros((8, 8), np.uint8), np.array([2.5]), False, False, {}

        def render(self):
            raise ValueError("no display")


    class Floats(Duck):
        def render(self):
            return np.zeros((8, 8, 3))


    class NoEnv:
        pass
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Return a function that makes the config of a class in a module of the working directory."""
    (tmp_path / "my_envs.py").write_text(textwrap.dedent(CUSTOM))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    return lambda name, **changes: make_config(f"custom_my_envs:{name}", **changes)


def test_every_space(custom):
    env = make_env(custom("Everything", size=(4, 4), time_limit=10), "train", 0)
    check_conformance(env)
    obs = env.reset()
    assert {key: space.shape for key, space in env.obs_space.items()} == {
        "picture": (4, 4, 3),
        "gray": (4, 4, 1),
        "nested/matrix": (6,),
        "nested/scalar": (1,),
        "dice": (),
        "cards": (2,),
        "bits": (3,),
    }
    assert (obs["picture"][:2] == 200).all() and (obs["picture"][2:] == 0).all() and (obs["gray"] == 7).all()
    assert obs["nested/matrix"].tolist() == [0, 1, 2, 3, 4, 5] and obs["nested/scalar"].tolist() == [0.5]
    assert (int(obs["dice"]), obs["cards"].tolist(), obs["bits"].tolist()) == (5, [3, 12], [1, 0, 1])

    assert env.act_space == {
        "arm/torque": spaces.Box(-1, 1, (2,)),
        "half": spaces.Box(-1, 1, (2,)),
        "keys": spaces.MultiDiscrete([2, 3]),
        "buttons": spaces.MultiDiscrete([2, 2]),
        "gear": spaces.Discrete(3),
    }
    action = {
        "arm/torque": np.float32([0.5, 0.5]),
        "half": np.float32([-0.5, 0.5]),
        "keys": np.float32([0, 1, 0, 0, 1]),
        "buttons": np.float32([0, 1, 1, 0]),
        "gear": np.float32([1, 0, 0]),
    }
    env.step(action)
    native = sys.modules["my_envs"].Everything.action
    assert native["arm"]["torque"].tolist() == [7.5, 0.5]  # scaled where bounded, as it is where not
    assert native["half"].tolist() == [5.5, -5.5]
    assert native["keys"].tolist() == [1, 2] and native["buttons"].tolist() == [1, 0] and native["gear"] == -1
    env.step({**action, "arm/torque": np.float32([-9, 9])})
    assert sys.modules["my_envs"].Everything.action["arm"]["torque"].tolist() == [0, 1]


def test_duck_typed_class(custom):
    env = make_env(custom("Duck", size=(8, 8)), "train", 0)
    assert env.obs_space == {"image": spaces.Box(0, 255, (8, 8, 1), np.uint8)}
    env.reset()
    left, right = env.step(LEFT), env.step(RIGHT)
    assert (bool(left["is_last"]), bool(left["is_terminal"]), float(left["reward"])) == (True, False, 0)
    assert (bool(right["is_last"]), bool(right["is_terminal"]), float(right["reward"])) == (True, True, 1)
    assert "cannot be rendered" in one_line_error(env.render)
    env.close()


def test_an_observation_may_be_left_out(custom):
    env = make_env(custom("Unknown", mlp_keys="$^", size=(8, 8)), "train", 0)
    assert env.obs_space.keys() == {"gray"} and "mission" not in env.reset()
    assert make_env(custom("Told", size=(8, 8)), "train", 0).obs_space.keys() == {"gray", "mission"}


@pytest.mark.parametrize(
    "name, hint",
    [
        ("Dukc", "'Duck'"),
        ("Unseeded", "seed"),
        ("Needy", "level"),
        ("Unknown", "'mission' is a Sequence space, not supported"),
        ("Clashes", "['reward']"),
        ("Filed", "['file']"),
        ("Acts", "['action', 'deter']"),
        ("Elsewhere", "['../up']"),
        ("NoEnv", "observation_space"),
    ],
)
def test_classes_that_cannot_be_used(custom, name, hint):
    assert hint in one_line_error(make_env, custom(name), "train", 0)


def test_old_api_is_told_so(custom):
    assert "(observation, info)" in one_line_error(make_env(custom("OldReset"), "train", 0).reset)
    env = make_env(custom("OldStep"), "train", 0)
    env.reset()
    assert "terminated, truncated" in one_line_error(env.step, LEFT)


@pytest.mark.parametrize("name, hint", [("Short", "shape (1,) where its space has (4,)"), ("Lacks", "'y'")])
def test_observations_that_break_their_space(custom, name, hint):
    assert hint in one_line_error(make_env(custom(name), "train", 0).reset)


def test_what_is_an_image(custom):
    """Frame stacks are images, whatever their channels; the same space directly from an environment is not."""
    env = make_env(custom("Layers"), "train", 0)
    assert env.obs_space["state"].shape == (4 * 4 * 6,)
    env = make_env(custom("Duck", size=(4, 4), frame_stack=6), "train", 0)
    assert env.obs_space["image"] == spaces.Box(0, 255, (4, 4, 6), np.uint8)
    spec = obs_spec(env.obs_space)
    assert {key: (seen.kind, seen.shape) for key, seen in spec.items()} == {"image": ("image", (4, 4, 6))}
    assert check_conformance(env, 5)[0]["image"].shape == (4, 4, 6)


def test_a_board_of_small_numbers_is_no_image(custom):
    assert make_env(custom("Board"), "train", 0).obs_space["state"].shape == (64,)


def test_pictures_that_cannot_be_had_are_one_line_and_a_reward_may_be_an_array(custom):
    env = make_env(custom("Draws", size=(8, 8)), "train", 0)
    env.reset()
    assert float(env.step(LEFT)["reward"]) == 2.5
    assert "no display" in one_line_error(env.render)
    assert "expected uint8 (H, W, 3), got float64 (8, 8, 3)" in one_line_error(
        make_env(custom("Floats"), "train", 0).render
    )


def test_module_that_is_not_there(custom):
    assert "no_such" in one_line_error(make_env, make_config("custom_no_such.module:Class"), "train", 0)
    assert "custom_package.module:Class" in one_line_error(make_env, make_config("custom_my_envs"), "train", 0)
