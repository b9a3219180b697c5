"""Minecraft with a stand-in for MineRL, whose worlds follow a script simple enough to check by hand."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces

import envs.minecraft
from envs import make_env
from envs.minecraft import DIAMOND_ACTIONS, MILESTONES
from tests.factories import check_conformance, one_line_error, same
from tests.factories import env_config as make_config

ITEMS = ["air", "dirt", "log", "log2", *MILESTONES[1:]]
KEYS = {"forward": "17", "back": "31", "left": "30", "right": "32", "jump": "57", "sneak": "42", "attack": "-100"}
NAMES = {
    "POVObservation": "pov",
    "FlatInventoryObservation": "inventory",
    "EquippedItemObservation": "equipped_items",
    "ObservationFromCurrentLocation": "location_stats",
    "ObservationFromLifeStats": "life_stats",
    "CameraAction": "camera",
    "PlaceBlock": "place",
    "EquipAction": "equip",
    "CraftAction": "craft",
    "CraftNearbyAction": "nearbyCraft",
    "SmeltItemNearby": "nearbySmelt",
}
UNNAMED = (
    *("KeybasedCommandAction", "AgentStartBreakSpeedMultiplier", "TimeInitialCondition", "SpawningInitialCondition"),
    *("DefaultWorldGenerator", "ServerQuitWhenAnyAgentFinishes"),
)
FRESH = {"life": 20.0, "food": 20, "breath": 300, "ypos": 64.0, "held": "air", "done": False, "info": {}}
VITALS = {"life": "life", "food": "food", "air": "breath"}  # "air" is an item in scripts


class Handler:
    """Stand-in for every handler that records its arguments."""

    def __init__(self, kind, *args, **kwargs):
        self.kind, self.args, self.kwargs = kind, args, kwargs
        self.name = NAMES.get(kind) or (args[0] if args else kind)


class Enum(spaces.Discrete):
    """A sorted choice of names, as in `minerl.herobraine.hero.spaces`."""

    def __init__(self, values):
        super().__init__(len(values))
        self.values = np.array(sorted(values))


class EnvSpec:
    """Stand-in for `minerl.herobraine.env_spec.EnvSpec` of MineRL 0.4.4, with all of its abstract methods.

    A subclass says what the game is made of; `make` gives the game, which is not yet started.
    """

    world = None  # the fixture's

    def __init__(self, name):
        made = {}
        for part in ("observables", "actionables", "rewardables", "agent_start", "agent_handlers", "monitors"):
            made[part] = getattr(self, f"create_{part}")()
        for part in ("initial_conditions", "decorators", "world_generators", "quit_producers"):
            made[part] = getattr(self, f"create_server_{part}")()
        assert not (self.is_from_folder("") or self.determine_success_from_rewards([]) or self.get_docstring())
        assert all(isinstance(handler, Handler) for handlers in made.values() for handler in handlers)
        self.parts = {part: {handler.name: handler for handler in handlers} for part, handlers in made.items()}
        seen = self.parts["observables"]
        width, height = seen["pov"].args[0]
        held = Enum({*seen["equipped_items"].args[0], *seen["equipped_items"].kwargs.values()})
        counts = {item: spaces.Box(0, 2304, ()) for item in seen["inventory"].args[0]}
        self.observation_space = spaces.Dict(
            {
                "pov": spaces.Box(0, 255, (height, width, 3), np.uint8),
                "inventory": spaces.Dict(counts),
                "equipped_items": spaces.Dict({"mainhand": spaces.Dict({"type": held})}),
            }
        )

    def make(self):
        return Game(self)


class Game:
    """Stand-in for the Gym environment that `EnvSpec.make` returns; behaves like `minerl.env._singleagent`.

    A world's script lists the changes at each frame of an episode. Mistakes are recorded in `world.mistakes`, for the
    code under test takes every exception for a game that died.
    """

    def __init__(self, spec):
        self.spec, self.world = spec, EnvSpec.world
        self.seeded, self.running, self.done = None, False, True
        self.world.games.append(self)

    def seed(self, seed=None, seed_spaces=True):
        self.check(type(seed) is int and not seed_spaces, f"seed {seed!r}")
        self.seeded = seed

    def reset(self):
        self.check(self.seeded is not None, "a reset without a seed of its own")
        self.world.seeds.append(self.seeded)
        self.seeded = None
        self.running = True  # also when it hangs later on
        if self.world.failures:
            self.world.failures -= 1
            raise RuntimeError("Something went wrong\n resetting the environment!")
        self.frame, self.done = 0, False
        self.counts, self.state = dict.fromkeys(ITEMS, 0), dict(FRESH)
        return self.advance()

    def step(self, action):
        self.check(not self.done, "a step after the end")
        names = self.spec.parts["actionables"]
        self.check(action.keys() == names.keys(), f"action of {sorted(action)}")
        for name, value in action.items():
            if name == "camera":
                legal = len(value) == 2 and max(np.abs(value)) <= 180
            else:
                legal = value in (0, 1) if name in KEYS else value in names[name].args[0]
            self.check(legal, f"{name} {value!r}")
        self.world.actions.append(action)
        self.frame += 1
        obs = self.advance()
        self.done = self.state["done"]
        return obs, 0.0, self.done, self.state["info"]

    def advance(self):
        for name, value in self.world.script.get(self.frame, {}).items():
            if name == "raise":
                raise value
            (self.counts if name in ITEMS else self.state)[name] = value
        shape = self.spec.observation_space["pov"].shape
        return {
            "pov": np.full(shape, self.frame, np.uint8),
            "inventory": {item: np.array(count) for item, count in self.counts.items()},
            "equipped_items": {"mainhand": {"type": self.state["held"]}},
            "life_stats": {to: np.array(self.state[name]) for to, name in VITALS.items()},
            "location_stats": {"ypos": np.array(self.state["ypos"])},
        }

    def close(self):
        self.running = False

    def check(self, right, mistake):
        if not right:
            self.world.mistakes.append(mistake)


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """Provide the script of all worlds, `{frame: {what: its new value}}`, and the record of actions in them."""
    state = SimpleNamespace(script={}, failures=0, games=[], seeds=[], actions=[], mistakes=[])
    monkeypatch.setattr(EnvSpec, "world", state)
    handlers = SimpleNamespace(**{kind: functools.partial(Handler, kind) for kind in (*NAMES, *UNNAMED)})
    hero = {"handlers": handlers, "mc": SimpleNamespace(ALL_ITEMS=ITEMS, INVERSE_KEYMAP=KEYS)}
    contents = {"": {}, ".herobraine": {}, ".herobraine.env_spec": {"EnvSpec": EnvSpec}, ".herobraine.hero": hero}
    for name, entries in contents.items():
        module = ModuleType(f"minerl{name}")
        vars(module).update(entries)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(envs.minecraft, "RETRY_WAIT", 0)
    for name in ("int", "float"):  # gone now, and again after the test
        monkeypatch.setattr(np, name, None, raising=False)
        monkeypatch.delattr(np, name)
    yield state
    assert state.mistakes == []


def config(task="diamond", changes=(), **options):
    defaults = {"break_speed": 100.0, "sticky_attack": 30, "sticky_jump": 10, "pitch_limit": [-60, 60], "length": 36000}
    return make_config(f"minecraft_{task}", minecraft=SimpleNamespace(**{**defaults, **options}), **dict(changes))


def make(*args, index=0, **options):
    return make_env(config(*args, **options), "train", index)


def act(env, name="noop"):
    """Take the action of that name."""
    index = list(DIAMOND_ACTIONS).index(name)
    return env.step({"action": np.eye(env.act_space["action"].n, dtype=np.float32)[index]})


def rewards(env, steps):
    return [float(env.reset()["reward"]), *[float(act(env)["reward"]) for _ in range(steps)]]


# ---------------------------------------------------------------------------


def test_conformance(world):
    world.script = {2: {"log": 1, "held": "log"}, 7: {"life": 0.0, "done": True}}
    env = make(changes={"size": (48, 64)})
    assert world.games == []  # nothing starts before the first episode
    stream = check_conformance(env, steps=25)
    assert len(world.games) == 1 and world.games[0].running
    shapes = {"image": (48, 64, 3), "inventory": (14,), "inventory_max": (14,), "equipped": (16,)}  # of 15 items
    vitals = dict.fromkeys(("health", "hunger", "breath"), (1,))
    assert {key: space.shape for key, space in env.obs_space.items()} == {**shapes, **vitals}
    assert np.array_equal(env.render(), stream[-1]["image"])
    env.close()
    env.close()
    assert not world.games[0].running


def test_what_the_game_is_made_of(world):
    env = make("diamond", {"size": (48, 64)}, break_speed=7.0)
    env.reset()
    parts = world.games[0].spec.parts
    assert [handler.args for handler in parts["agent_start"].values()] == [(7.0,)]
    assert parts["observables"]["pov"].args == ((64, 48),)  # MineRL names the width first
    assert parts["world_generators"]["DefaultWorldGenerator"].kwargs == {"force_reset": True}
    assert parts["quit_producers"].keys() == {"ServerQuitWhenAnyAgentFinishes"}
    keys = {name: handler.args for name, handler in parts["actionables"].items() if name in KEYS}
    assert keys == {key: (key, code) for key, code in KEYS.items()}


def test_25_actions_that_the_game_knows(world):
    assert len(DIAMOND_ACTIONS) == 25
    env = make(sticky_jump=0)
    assert env.act_space["action"].n == 25
    env.reset()
    for name in DIAMOND_ACTIONS:
        act(env, name)  # the stand-in records illegal actions as mistakes
    taken = [tuple(sorted(action.items())) for action in world.actions]
    assert len(set(taken)) == 25
    noop = dict(taken[0])
    assert set(noop.values()) == {0, "none", (0, 0)}
    assert dict(taken[-1]) == {**noop, "nearbySmelt": "iron_ingot"}
    assert make("wood").act_space["action"].n == make("climb").act_space["action"].n == 12


# ---------------------------------------------------------------------------
# Rewards


def test_a_milestone_counts_once_in_an_episode(world):
    world.script = {
        1: {"diamond": 1},  # any order will do
        2: {"log": 2, "dirt": 5},
        3: {"log": 0, "planks": 8, "stick": 4},
        4: {"log": 3},  # again
        5: {"diamond": 2},
    }
    env = make()
    for _ in range(2):
        assert rewards(env, 6) == [0, 1, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("order", [MILESTONES, MILESTONES[::-1]])
def test_there_are_twelve_milestones(world, order):
    world.script = {frame: {item: 1} for frame, item in enumerate(order, 1)}
    env = make()
    assert rewards(env, 14) == [0, *[1] * 12, 0, 0]
    obs = act(env)
    assert all(obs[f"log_achievement_{item}"] == 1 for item in MILESTONES)


def test_the_wood_of_all_trees_is_a_log(world):
    world.script = {1: {"log2": 2}, 2: {"log": 1}}
    env = make()
    assert rewards(env, 2) == [0, 1, 0]
    assert act(env)["log_achievement_log"] == 3


def test_health(world):
    world.script = {1: {"life": 15.0}, 3: {"life": 17.0, "log": 1}, 4: {"food": 2, "breath": 75}}
    env = make()
    assert rewards(env, 3) == pytest.approx([0, -0.0025, 0, 1 + 0.001])  # a hundredth of a whole life of 20
    obs = act(env)
    assert [float(obs[name][0]) for name in ("health", "hunger", "breath")] == pytest.approx([0.85, 0.1, 0.25])


def test_wood_and_climb(world):
    world.script = {1: {"log": 2, "ypos": 65.5}, 2: {"log": 1, "ypos": 63.5}, 3: {"log": 4}}
    assert rewards(make("wood"), 3) == [0, 2, 0, 3]
    assert rewards(make("climb"), 3) == [0, 1.5, -2, 0]


# ---------------------------------------------------------------------------
# Observations


def test_inventory(world):
    world.script = {1: {"log": 5, "held": "log"}, 2: {"log": 2, "dirt": 40}, 3: {"held": "other"}}
    env = make()
    first = env.reset()
    names = [item for item in world.games[0].spec.observation_space["inventory"].spaces if item != "log2"]

    def read(obs, key):
        return {name: int(count) for name, count in zip(names, obs[key], strict=True) if count}

    assert read(first, "inventory") == read(first, "inventory_max") == {}
    assert read(act(env), "inventory") == {"log": 5}
    obs = act(env)
    assert read(obs, "inventory") == {"log": 2, "dirt": 40} and read(obs, "inventory_max") == {"log": 5, "dirt": 40}
    held = sorted([*ITEMS, "other"])
    assert obs["equipped"].tolist() == [float(name == "log") for name in held]
    assert act(env)["equipped"].tolist() == [float(name == "other") for name in held]
    assert same([env.reset()], [first])


# ---------------------------------------------------------------------------
# Controls


def held(world, key):
    return [action[key] for action in world.actions]


def test_attack_sticks(world):
    env = make(break_speed=1.0)
    env.reset()
    for name in ["attack", *["noop"] * 9, "jump", "forward", *["noop"] * 20]:
        act(env, name)
    assert held(world, "attack") == [1] * 30 + [0, 0]
    assert held(world, "jump") == [0] * 32  # no jump begins during an attack
    assert held(world, "forward") == [0] * 10 + [1, 1] + [0] * 20


def test_attack_sticks_anew_and_not_into_the_next_episode(world):
    env = make(break_speed=1.0, sticky_attack=3)
    env.reset()
    for name in ["attack", "noop", "attack", "noop", "noop", "noop", "attack"]:
        act(env, name)
    assert held(world, "attack") == [1, 1, 1, 1, 1, 0, 1]
    env.reset()
    act(env)
    assert held(world, "attack")[-1] == 0


def test_attack_does_not_stick_where_blocks_break_fast(world):
    env = make(break_speed=100.0)
    env.reset()
    act(env, "attack"), act(env)
    assert held(world, "attack") == [1, 0]


def test_jump_sticks(world):
    env = make()
    env.reset()
    for name in ["jump", "back", *["noop"] * 10]:
        act(env, name)
    assert held(world, "jump") == held(world, "forward") == [1] * 10 + [0, 0]
    assert held(world, "back") == [0, 1] + [0] * 10
    act(env, "jump")
    env.reset()
    act(env)
    assert held(world, "jump")[-1] == 0


def test_pitch_has_limits(world):
    env = make(pitch_limit=[-60, 30])
    env.reset()
    for name in ["turn_down"] * 4 + ["turn_left"] + ["turn_up"] * 7:
        act(env, name)
    cameras = held(world, "camera")
    assert cameras[:5] == [(15, 0), (15, 0), (0, 0), (0, 0), (0, -15)]
    assert cameras[5:] == [(-15, 0)] * 6 + [(0, 0)]  # from 30 to -60
    env.reset()
    act(env, "turn_up")
    assert held(world, "camera")[-1] == (-15, 0)  # a new episode looks straight ahead


def test_repeated_frames_only_walk_and_dig(world):
    world.script = {2: {"log": 1}, 3: {"stick": 1}, 5: {"planks": 1, "life": 0.0, "done": True}, 6: {"diamond": 1}}
    env = make("diamond", {"action_repeat": 3})
    env.reset()
    assert act(env, "jump")["reward"] == 2
    assert (held(world, "jump"), held(world, "forward")) == ([1, 0, 0], [1, 1, 1])
    last = act(env, "craft_planks")
    assert held(world, "craft")[3:] == ["planks", "none"]  # dead at frame 5
    assert last["is_terminal"] and last["reward"] == pytest.approx(1 - 0.01)


# ---------------------------------------------------------------------------
# Ends


@pytest.mark.parametrize("length, repeat, steps", [(6, 1, 6), (6, 4, 1), (1, 4, 1)])
def test_time_runs_out(world, length, repeat, steps):
    env = make("diamond", {"action_repeat": repeat}, length=length)
    for _ in range(2):
        env.reset()
        stream = [act(env) for _ in range(steps)]
        assert [bool(obs["is_last"]) for obs in stream] == [False] * (steps - 1) + [True]
        assert not stream[-1]["is_terminal"]


@pytest.mark.parametrize("death", [{"life": 0.0}, {"done": True}, {"life": 0.0, "done": True}])
def test_death_is_terminal(world, death):
    world.script = {2: death}
    env = make()
    env.reset()
    before, last = act(env), act(env)
    assert not before["is_last"] and last["is_last"] and last["is_terminal"]


@pytest.mark.parametrize("failure", [{"raise": OSError("broken pipe")}, {"info": {"error": "Connection timed out!"}}])
def test_a_game_that_dies_is_a_time_out(world, failure):
    world.script = {1: {"log": 1}, 2: {**failure, "diamond": 1}}
    env = make()
    env.reset()
    before, last = act(env), act(env)
    assert last["is_last"] and not last["is_terminal"] and last["reward"] == 0 and last["log_restarts"] == 1
    assert all(np.array_equal(last[key], before[key]) for key in env.obs_space)
    assert env.reset()["is_first"]
    assert [game.running for game in world.games] == [False, True]


def test_failed_starts_are_tried_again(world):
    world.failures = 2
    env = make()
    obs = env.reset()
    assert obs["is_first"] and obs["log_restarts"] == 2
    assert [game.running for game in world.games] == [False, False, True]


def test_starts_that_go_on_failing_are_one_line(world):
    world.failures = 9
    message = one_line_error(make().reset)
    assert "in 3 attempts" in message and "Something went wrong resetting" in message and "Java 8" in message
    assert world.failures == 6 and not any(game.running for game in world.games)


def test_every_world_has_a_seed_of_its_own(world):
    streams = []
    for index, seed in [(0, 0), (0, 0), (1, 0), (0, 1)]:
        env = make("diamond", {"seed": seed}, index=index)
        env.reset(), env.reset(), env.reset()
        streams.append(tuple(world.seeds[-3:]))
    assert streams[0] == streams[1]
    assert len({seed for stream in streams[1:] for seed in stream}) == 9


# ---------------------------------------------------------------------------


def test_numpy_has_the_names_that_minerl_uses():
    assert not hasattr(np, "float")
    make()
    assert np.zeros(1, np.float).dtype == np.float64 and np.bool(1) and np.int(2.5) == 2


def test_mistakes_are_one_line(monkeypatch):
    assert "'diamond'" in one_line_error(make, "daimond")
    assert "first episode" in one_line_error(make().render)
    for name in [name for name in sys.modules if name.startswith("minerl")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install minerl==0.4.4" in one_line_error(make)
