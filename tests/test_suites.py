"""Crafter, Memory Maze, bsuite, MiniGrid, POPGym and Gymnasium's own families conform to `envs.Env`."""

import csv
import sys
import urllib.error

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs.from_gym
import envs.opengl
from envs import make_env
from envs.from_gym import FromGym
from envs.wrappers import PlainActions, PlainObs
from tests.factories import check_conformance, one_line_error, play, run_python, same
from tests.factories import env_config as make_config
from tools import derive_seed


def start(task, mode="train", **changes):
    return make_env(make_config(task, **{"logdir": "unused", **changes}), mode, 0)


def one_hot(index, count):
    return {"action": np.eye(count, dtype=np.float32)[index]}


# ---------------------------------------------------------------------------
# Conformance

TASKS = {  # task: (agent steps in which an episode ends, by itself or by a limit of frames, the changed options)
    "crafter_reward": (8, {"time_limit": 6}),
    "crafter_noreward": (8, {"time_limit": 12, "action_repeat": 2, "size": (48, 64)}),
    "memorymaze_9x9": (4, {"time_limit": 6, "action_repeat": 2}),
    "bsuite_catch/0": (40, {}),
    "bsuite_deep_sea_stochastic/0": (40, {}),
    "bsuite_memory_len/5": (40, {}),
    "bsuite_umbrella_distract/2": (60, {}),
    "minigrid_MiniGrid-DoorKey-5x5-v0": (20, {"time_limit": 15}),
    "minigrid_BabyAI-GoToRedBall-v0": (20, {"time_limit": 15}),
    "popgym_AutoencodeEasy": (120, {}),
    "popgym_BattleshipEasy": (80, {}),
    "popgym_ConcentrationEasy": (120, {}),
    "popgym_NoisyPositionOnlyPendulumEasy": (60, {"action_repeat": 5}),
    "gym_Acrobot-v1": (20, {"time_limit": 15}),
    "gym_Blackjack-v1": (60, {}),
    "gym_FrozenLake-v1": (60, {}),
    "gym_MountainCarContinuous-v0": (20, {"time_limit": 15}),
    "gym_BipedalWalker-v3": (20, {"time_limit": 15}),
    "gym_CarRacing-v3": (6, {"time_limit": 5}),
    "gym_LunarLander-v3": (150, {}),
    "gym_Ant-v5": (20, {"time_limit": 15}),
    "gym_HalfCheetah-v5": (20, {"time_limit": 15}),
    "gym_Hopper-v5": (60, {}),
    "gym_Humanoid-v5": (60, {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_conformance(task, tmp_path):
    steps, changes = TASKS[task]
    env = start(task, **changes, logdir=tmp_path)
    stream = check_conformance(env, steps)
    env.close()
    env.close()

    def part(mode):
        env = start(task, mode, **changes, logdir=tmp_path)
        observations = play(env, steps // 2)
        env.close()
        return observations

    assert same(part("train"), stream[: steps // 2 + 1])
    assert not same(part("eval"), stream[: steps // 2 + 1])


@pytest.mark.parametrize(
    "task, nearest",
    [
        ("crafter_rewards", "'reward'"),
        ("memorymaze_9x8", "'9x9'"),
        ("bsuite_cathc/0", "'catch/0'"),
        ("minigrid_DoorKey-5x5-v1", "'MiniGrid-DoorKey-5x5-v0'"),
        ("popgym_RepeatPrevEasy", "'RepeatPreviousEasy-v0'"),
    ],
)
def test_unknown_task(task, nearest):
    assert f"did you mean {nearest}?" in one_line_error(start, task)


@pytest.mark.parametrize(
    "package, task, hint",
    [
        ("bsuite", "bsuite_catch/0", "-r requirements/bsuite.txt"),
        ("crafter", "crafter_reward", "-r requirements/crafter.txt"),
        ("memory_maze", "memorymaze_9x9", "-r requirements/memorymaze.txt"),
        ("minigrid", "minigrid_Empty-5x5-v0", "-r requirements/minigrid.txt"),
        ("popgym", "popgym_RepeatFirstEasy", "-r requirements/popgym.txt"),
    ],
)
def test_missing_package(package, task, hint, monkeypatch):
    monkeypatch.delitem(sys.modules, f"envs.{package}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert one_line_error(start, task).endswith(f"pip install {hint}")


@pytest.mark.parametrize("task, packages", [("gym_LunarLander-v3", "box2d"), ("gym_Ant-v5", "dmc")])
def test_a_family_of_gymnasiums_that_is_not_installed_names_our_requirements(task, packages, monkeypatch):
    def missing(entry):
        raise gymnasium.error.DependencyNotInstalled("it is not installed, you can install it by run `pip install ...`")

    monkeypatch.setattr(envs.from_gym, "load_env_creator", missing)
    said = one_line_error(start, task)
    assert said.endswith(f"pip install -r requirements/{packages}.txt") and "you can" not in said


# ---------------------------------------------------------------------------
# Crafter

NOOP, PLACE_STONE = one_hot(0, 17), one_hot(7, 17)


def test_crafter_is_the_published_one():
    import crafter

    env = start("crafter_reward")
    stream = play(env, 9)
    bare = crafter.Env(seed=derive_seed(0, 1, 0))
    assert np.array_equal(stream[0]["image"], bare.reset())
    rng = np.random.default_rng(0)
    for obs in stream[1:]:
        image, reward, _, info = bare.step(rng.integers(17))
        assert np.array_equal(obs["image"], image) and obs["reward"] == pytest.approx(reward)
        counts = {key.removeprefix("log_achievement_"): n for key, n in obs.items() if key.startswith("log_")}
        assert counts == info["achievements"] and len(counts) == 22


def test_crafter_counts_achievements_and_ends():
    env = start("crafter_noreward", action_repeat=2)
    assert env.reset()["log_achievement_place_stone"] == 0
    bare = env._env
    player, world = bare._player, bare._world

    def place():
        player.inventory["stone"] = 1
        world[player.pos + player.facing] = "grass"
        return env.step(PLACE_STONE)

    logs = [(obs["reward"], obs["log_achievement_place_stone"], obs["log_reward"]) for obs in (place(), place())]
    assert logs == [(0, 1, 1), (0, 2, 1)]  # the first of a kind is rewarded; all are counted, nothing is summed twice

    bare._length = bare._step + 3
    assert not env.step(NOOP)["is_last"]
    obs = env.step(NOOP)  # one frame, then time is up
    assert obs["is_last"] and not obs["is_terminal"] and obs["log_achievement_place_stone"] == 2

    obs = env.reset()
    assert obs["log_achievement_place_stone"] == obs["log_reward"] == 0
    bare._player.health = 0
    obs = env.step(NOOP)
    assert obs["is_last"] and obs["is_terminal"]


def test_crafter_creatures_vanish_in_the_same_order():
    from crafter import objects

    from envs.crafter import Reproducible

    def left(order):
        env = Reproducible(seed=0)
        env._world.reset(seed=1)
        env._world.daylight = 1  # by day a zombie is too many
        env._player = objects.Player(env._world, (32, 32))
        zombies = [objects.Zombie(env._world, (2 * i, 2 * i), env._player) for i in range(5)]
        for zombie in zombies:
            env._world.add(zombie)
        for _ in range(6):
            env._balance_chunk((0, 12, 0, 12), [zombies[i] for i in order if not zombies[i].removed])
        return [not zombie.removed for zombie in zombies]

    first = left([0, 1, 2, 3, 4])
    assert 1 <= sum(first) <= 4
    assert left([4, 3, 2, 1, 0]) == left([2, 4, 0, 3, 1]) == first


def test_crafter_is_not_changed_by_looking():
    env = start("crafter_reward")
    env.reset()
    world = env._env._world
    world.daylight = 0.0  # noisy pictures
    _, numbers, *place = world.random.get_state()
    assert env.render((50, 90)).shape == (50, 90, 3) and env.render().shape == (256, 256, 3)
    _, numbers_now, *place_now = world.random.get_state()
    assert np.array_equal(numbers, numbers_now) and place == place_now


# ---------------------------------------------------------------------------
# Memory Maze

MAZE = """
    import os, sys
    from tests.test_suites import one_hot, start
    env = start("memorymaze_9x9")
    obs = env.reset()
    image = obs["image"]
    print(os.environ["MUJOCO_GL"], image.shape, env.act_space["action"].n, "gym" in sys.modules)
    border = [image[i] for i in (0, 1, -2, -1)] + [image[:, i] for i in (0, 1, -2, -1)]
    print(all((line == image[0, 0]).all() for line in border), (image[2:-2, 2:-2] != image[0, 0]).any())
    print(env.render().shape, (env.render()[0] == image[0, 0]).all())
    env._env.physics.data.time = 249.6  # of 250 s, at four steps a second
    for _ in range(2):
        obs = env.step(one_hot(1, 6))
        print(obs["is_last"], obs["is_terminal"])
"""


def test_memory_maze():
    """Run in a separate process: an environment that was left open must not print anything at exit."""
    result = run_python(MAZE)
    backend = "egl" if envs.opengl.egl_works() else "osmesa"
    expected = [
        f"{backend} (64, 64, 3) 6 False",
        "True True",
        "(256, 256, 3) True",
        "False False",
        "True False",
    ]
    assert result.stdout.splitlines() == expected, result.stderr
    assert result.stderr == ""


MAZES = """
    import numpy as np
    from envs import memorymaze, opengl
    opengl.choose_renderer()
    opengl.import_suite()
    tasks, drawn = memorymaze._import_tasks(), []
    arena = tasks.MazeWithTargetsArena
    for make in (tasks.memory_maze_9x9, lambda **settings: memorymaze.load("9x9", **settings)):
        env = make(seed=3, image_only_obs=True)
        images = [env.reset().observation for _ in range(2)] + [env.step(1).observation for _ in range(5)]
        drawn.append(np.stack(images))
        print(env.physics.model.ntex)
    print((drawn[0] == drawn[1]).all(), (drawn[0][0] != drawn[0][1]).any(), tasks.MazeWithTargetsArena is arena)
"""


def test_memory_maze_holds_each_picture_once():
    """Draw what the package draws, and leave the package as it was."""
    result = run_python(MAZES)
    assert result.stdout.splitlines() == ["88", "16", "True True True"], result.stderr


# ---------------------------------------------------------------------------
# bsuite


def follow_ball(env, episodes):
    """Return the rewards of Catch if the paddle always moves towards the column of the ball."""
    rewards = []
    for _ in range(episodes):
        obs = env.reset()
        column = int(obs["state"].reshape(10, 5)[0].argmax())
        while not obs["is_last"]:
            paddle = int(obs["state"].reshape(10, 5)[9].argmax())
            obs = env.step(one_hot(1 + np.sign(column - paddle), 3))
            rewards.append(float(obs["reward"]))
        assert obs["is_terminal"]
    return rewards


def test_bsuite_records_the_first_training_environment(tmp_path):
    config = make_config("bsuite_catch/0", logdir=tmp_path)
    for mode, index in (("train", 1), ("eval", 0), ("eval", 1)):
        play(make_env(config, mode, index), 30)
    assert not (tmp_path / "bsuite").exists()
    assert follow_ball(make_env(config, "train", 0), 3) == [0, 0, 0, 0, 0, 0, 0, 0, 1] * 3
    follow_ball(make_env(config, "train", 0), 1)  # a resumed run leaves alone what is there
    lengths = []
    for number in (0, 1):
        with open(tmp_path / "bsuite" / str(number) / "bsuite_id_-_catch-0.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        lengths.append(len(rows))
        last = {key: float(value) for key, value in rows[-1].items()}
        expected = {"steps": 9 * len(rows), "episode": len(rows), "total_return": len(rows), "total_regret": 0}
        assert {key: last[key] for key in expected} == expected
    assert lengths == [3, 1]


def test_bsuite_records_a_run_that_goes_on(tmp_path):
    """After a resume or a restart the environment has another seed, but still is the first one."""
    config = make_config("bsuite_catch/0", logdir=tmp_path)
    for number, later in enumerate(({}, {"behind": 300}, {"behind": 300, "restart": 1})):
        follow_ball(make_env(config, "train", 0, **later), 2)
        with open(tmp_path / "bsuite" / str(number) / "bsuite_id_-_catch-0.csv", newline="") as file:
            assert [int(row["episode"]) for row in csv.DictReader(file)] == [1, 2]
    play(make_env(config, "train", 1, behind=300), 30)
    assert len(list((tmp_path / "bsuite").iterdir())) == 3


def test_bsuite_numbers_have_streams_of_their_own():
    zero, one = (play(start(f"bsuite_catch/{number}", "eval"), 40) for number in (0, 1))
    assert not same(zero, one)


def test_bsuite_without_its_data(monkeypatch):
    from bsuite.utils import datasets

    def fail(*args):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets, "_download", fail)
    assert "bsuite_mnist/0 downloads its data" in one_line_error(start, "bsuite_mnist/0", "eval")


# ---------------------------------------------------------------------------
# MiniGrid

LEFT, RIGHT, FORWARD = (one_hot(index, 7) for index in range(3))


def test_minigrid_by_hand():
    env = start("minigrid_Empty-5x5-v0")
    obs = env.reset()
    assert {key: space.shape for key, space in env.obs_space.items()} == {"image": (64, 64, 3), "direction": ()}
    assert obs["direction"] == 0 and obs["image"].std() > 1
    stream = [env.step(action) for action in (FORWARD, FORWARD, RIGHT, FORWARD, FORWARD)]
    assert [int(obs["direction"]) for obs in stream] == [0, 0, 1, 1, 1]
    assert [float(obs["reward"]) for obs in stream] == pytest.approx([0, 0, 0, 0, 1 - 0.9 * 5 / 100])
    assert stream[-1]["is_terminal"] and env.render().shape == (160, 160, 3)

    env = start("minigrid_MiniGrid-Empty-5x5-v0", action_repeat=30)
    env.reset()
    stream = [env.step(LEFT) for _ in range(4)]  # 100 frames
    assert [bool(obs["is_last"]) for obs in stream] == [False, False, False, True]
    assert not stream[-1]["is_terminal"]


def test_minigrid_cannot_make_all():
    assert "without the pictures" in one_line_error(start, "minigrid_WFC-MazeSimple-v0")


# ---------------------------------------------------------------------------
# POPGym


def test_popgym_has_42_tasks():
    import gymnasium
    import popgym.envs  # noqa: F401

    names = [name.removeprefix("popgym-") for name in gymnasium.registry if name.startswith("popgym-")]
    assert len(names) == 42
    for name in names:
        env = start(f"popgym_{name}")
        assert play(env, 3)[0].keys() >= env.obs_space.keys()
        assert env.obs_space.keys() == ({"state/0", "state/1"} if "Autoencode" in name else {"state"})


def test_popgym_by_hand():
    env = start("popgym_RepeatFirstEasy")
    obs = env.reset()
    first, rewards = int(obs["state"]), []
    while not obs["is_last"]:
        obs = env.step(one_hot(first, 4))
        rewards.append(float(obs["reward"]))
    assert len(rewards) == 51 and sum(rewards) == pytest.approx(1) and obs["is_terminal"]

    env = start("popgym_PositionOnlyPendulumEasy", action_repeat=50)
    env.reset()
    stream = [env.step({"action": np.zeros(1, np.float32)}) for _ in range(4)]
    assert [bool(obs["is_last"]) for obs in stream] == [False, False, False, True]
    assert not stream[-1]["is_terminal"] and env.render().std() > 1


# ---------------------------------------------------------------------------
# Gymnasium's own


class Tuples:
    observation_space = spaces.Tuple(
        (spaces.Discrete(3, start=1), spaces.Dict({"far": spaces.Tuple((spaces.Box(-1, 1, (2,)),))}))
    )
    action_space = spaces.Tuple((spaces.Discrete(3), spaces.Dict({"push": spaces.Box(0, 10, (1,))})))

    def reset(self, seed=None):
        return (3, {"far": (np.float32([0.5, -0.5]),)}), {}

    def step(self, action):
        assert isinstance(action, tuple)
        self.action = action
        return (1, {"far": (np.float32([1, 1]),)}), 0.0, False, False, {}


def test_tuples_are_flattened():
    bare = Tuples()
    env = PlainActions(PlainObs(FromGym(bare, 0), make_config("any")))
    obs = env.reset()
    assert {key: obs[key].tolist() for key in env.obs_space} == {"state/0": 2, "state/1/far/0": [0.5, -0.5]}
    env.step({"action/0": np.float32([0, 0, 1]), "action/1/push": np.float32([0.5])})
    assert bare.action == (2, {"push": np.float32([7.5])})


@pytest.mark.parametrize("found", [True, False])
def test_mujoco_pictures_without_a_screen(found):
    """Without OpenGL they are refused. An environment left open at exit is closed silently."""
    code = f"""
        import os
        import envs.opengl
        from tests.test_suites import one_line_error, start
        if not {found}:
            envs.opengl.egl_works = envs.opengl.osmesa_works = lambda: False
        env = start("gym_InvertedPendulum-v5")
        env.reset()
        drawn = env.render().std() > 1 if {found} else "cannot be rendered" in one_line_error(env.render)
        print(drawn, "MUJOCO_GL" in os.environ)
    """
    result = run_python(code)
    assert result.stdout.split() == ["True", str(found)], result.stderr
    assert result.returncode == 0 and "GLFW" not in result.stderr and "Traceback" not in result.stderr
