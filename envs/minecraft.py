"""Minecraft through MineRL 0.4.4: the Diamond task of DreamerV3 (arXiv:2301.04104), and two simpler ones.

Actions, observations, rewards and constants are those of the environment that its authors released beside the paper
(diamond_env 1.0.3), unless a comment says otherwise.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import one_line, unknown
from envs.wrappers import TimeLimit, flags
from tools import UserError

ATTEMPTS = 3  # to start an episode; Minecraft's launches fail now and then
RETRY_WAIT = 20  # seconds before another, for ports and files to be free again
MAX_LIFE, MAX_FOOD, MAX_AIR = 20, 20, 300
HEALTH_SCALE = 0.01


def make(task: str, config: Any, place: Place) -> Env:
    """Make `diamond`, `wood` or `climb`; the game itself starts with the first episode.

    Args:
      config: beside what every suite reads, `minecraft` with `break_speed` (how many times faster blocks break),
        `sticky_attack` and `sticky_jump` (agent steps that these keys stay down), `pitch_limit` (lowest and highest
        angle of the camera in degrees) and `length` (frames of an episode, ended as a time-out).
    Raises: UserError for an unknown task.
    """
    if task not in TASKS:
        raise unknown("minecraft task", task, TASKS)
    options = config.minecraft
    spec = make_spec(tuple(config.size), options.break_speed)
    # Blocks that break at the first blows need no key held down; the authors drop it then as well.
    sticky_attack = options.sticky_attack if options.break_speed == 1 else 0
    controls = Controls(sticky_attack, options.sticky_jump, options.pitch_limit)
    actions, rewards = TASKS[task]
    env = Minecraft(spec, actions, rewards, controls, config.action_repeat, np.random.default_rng(place.seed))
    return TimeLimit(env, max(1, options.length // config.action_repeat))


# ---------------------------------------------------------------------------
# The game: what MineRL is asked to build


def make_spec(size: tuple[int, int], break_speed: float) -> Any:
    """Describe to MineRL a fresh world that hands out images of `size` (H, W); `make()` of it gives the game."""
    _restore_numpy_names()
    from minerl.herobraine.env_spec import EnvSpec
    from minerl.herobraine.hero import handlers, mc

    items = ["none", *mc.ALL_ITEMS]

    class Spec(EnvSpec):
        def create_observables(self):
            return [
                handlers.POVObservation(size[::-1]),  # width first
                handlers.FlatInventoryObservation(mc.ALL_ITEMS),
                handlers.EquippedItemObservation(mc.ALL_ITEMS, _default="air", _other="other"),
                handlers.ObservationFromCurrentLocation(),
                handlers.ObservationFromLifeStats(),
            ]

        def create_actionables(self):
            keys = [handlers.KeybasedCommandAction(key, mc.INVERSE_KEYMAP[key]) for key in KEYS]
            kinds = (
                handlers.PlaceBlock,
                handlers.EquipAction,
                handlers.CraftAction,
                handlers.CraftNearbyAction,
                handlers.SmeltItemNearby,
            )
            return [*keys, handlers.CameraAction(), *[kind(items, _other="none", _default="none") for kind in kinds]]

        def create_agent_start(self):
            return [handlers.AgentStartBreakSpeedMultiplier(break_speed)]

        def create_server_initial_conditions(self):
            return [
                handlers.TimeInitialCondition(allow_passage_of_time=True, start_time=0),
                handlers.SpawningInitialCondition(allow_spawning=True),
            ]

        def create_server_world_generators(self):
            return [handlers.DefaultWorldGenerator(force_reset=True)]

        def create_server_quit_producers(self):
            return [handlers.ServerQuitWhenAnyAgentFinishes()]

        def nothing(self):
            return []

        create_rewardables = create_agent_handlers = create_monitors = create_server_decorators = nothing

        def is_from_folder(self, folder):
            return False

        def determine_success_from_rewards(self, rewards):
            return False

        def get_docstring(self):
            return ""

    return Spec("Dreamer-v1")


def _restore_numpy_names():
    """Let MineRL 0.4.4 call Python's types by names that NumPy 1.24 took away."""
    for name, kind in {"bool": bool, "int": int, "float": float}.items():
        if not hasattr(np, name):
            setattr(np, name, kind)


# ---------------------------------------------------------------------------
# Actions

KEYS = ("forward", "back", "left", "right", "jump", "sneak", "attack")
REPEATED = ("forward", "back", "left", "right", "attack")  # all else happens in the first of repeated frames
NOOP = {
    **dict.fromkeys(KEYS, 0),
    "camera": (0, 0),  # degrees: pitch down, yaw to the right
    **dict.fromkeys(("place", "equip", "craft", "nearbyCraft", "nearbySmelt"), "none"),
}
BASIC_ACTIONS = {
    "noop": {},
    "attack": {"attack": 1},
    "turn_up": {"camera": (-15, 0)},
    "turn_down": {"camera": (15, 0)},
    "turn_left": {"camera": (0, -15)},
    "turn_right": {"camera": (0, 15)},
    "forward": {"forward": 1},
    "back": {"back": 1},
    "left": {"left": 1},
    "right": {"right": 1},
    "jump": {"jump": 1, "forward": 1},
    "place_dirt": {"place": "dirt"},
}
DIAMOND_ACTIONS = {
    **BASIC_ACTIONS,
    "craft_planks": {"craft": "planks"},
    "craft_stick": {"craft": "stick"},
    "craft_crafting_table": {"craft": "crafting_table"},
    "place_crafting_table": {"place": "crafting_table"},
    "craft_wooden_pickaxe": {"nearbyCraft": "wooden_pickaxe"},
    "craft_stone_pickaxe": {"nearbyCraft": "stone_pickaxe"},
    "craft_iron_pickaxe": {"nearbyCraft": "iron_pickaxe"},
    "equip_stone_pickaxe": {"equip": "stone_pickaxe"},
    "equip_wooden_pickaxe": {"equip": "wooden_pickaxe"},
    "equip_iron_pickaxe": {"equip": "iron_pickaxe"},
    "craft_furnace": {"nearbyCraft": "furnace"},
    "place_furnace": {"place": "furnace"},
    "smelt_iron_ingot": {"nearbySmelt": "iron_ingot"},
}


class Controls:
    """From the action chosen to the keys held: some stay down for a while, and the camera keeps its limits.

    An attack or jump of `sticky_*` agent steps counts the one in which it was chosen; choosing it again starts the
    count anew. No jump starts during an attack.
    """

    def __init__(self, sticky_attack: int, sticky_jump: int, pitch_limit: tuple[int, int]):
        self._sticky_attack = sticky_attack
        self._sticky_jump = sticky_jump
        self._pitch_limit = pitch_limit
        self.reset()

    def reset(self):
        self._attack = self._jump = 0  # steps for which the key stays down
        self._pitch = 0

    def __call__(self, chosen: dict) -> dict:
        """`chosen` is an entry of a table above; the result has every key of NOOP."""
        keys = {**NOOP, **chosen}
        if keys["attack"]:
            self._attack = self._sticky_attack
        if self._attack:
            self._attack -= 1
            keys.update(attack=1, jump=0)
        if keys["jump"]:
            self._jump = self._sticky_jump
        if self._jump:
            self._jump -= 1
            keys.update(jump=1, forward=1)
        pitch, yaw = keys["camera"]
        low, high = self._pitch_limit
        if not low <= self._pitch + pitch <= high:
            pitch = 0
        self._pitch += pitch
        return {**keys, "camera": (pitch, yaw)}


# ---------------------------------------------------------------------------
# What the agent sees, and what it is rewarded for


class Sight(NamedTuple):
    """The state that the game shows after a frame, in the game's own units.

    Attributes:
      image: (H, W, 3) uint8
      counts: how many of each item are carried
      most: the largest of these counts in the episode
      held: name of the item in the main hand
      life, food, air: up to 20, 20 and 300
      height: meters
    """

    image: np.ndarray
    counts: dict[str, int]
    most: dict[str, int]
    held: str
    life: float
    food: float
    air: float
    height: float


def see(obs: dict, before: Sight | None) -> Sight:
    """Return the sight of an observation of MineRL's. `before` is the previous one of the episode, if there is one."""
    counts = {item: int(count) for item, count in obs["inventory"].items()}
    counts["log"] += counts.pop("log2")  # the wood of two more trees
    most = {item: max(count, before.most[item]) for item, count in counts.items()} if before else counts
    life = obs["life_stats"]
    vitals = (float(life[name]) for name in ("life", "food", "air"))
    held = obs["equipped_items"]["mainhand"]["type"]
    return Sight(obs["pov"], counts, most, held, *vitals, float(obs["location_stats"]["ypos"]))


MILESTONES = (
    "log",
    "planks",
    "stick",
    "crafting_table",
    "wooden_pickaxe",
    "cobblestone",
    "stone_pickaxe",
    "furnace",
    "iron_ore",
    "iron_ingot",
    "iron_pickaxe",
    "diamond",
)


def reach_milestones(before: Sight, now: Sight) -> float:
    """Return 1 for each milestone that the episode has not seen before, in whatever order."""
    return sum(now.most[item] > 0 and before.most[item] == 0 for item in MILESTONES)


def stay_healthy(before: Sight, now: Sight) -> float:
    """Return 0.01 for a whole life regained, as in the released code; the paper has 0.01 for each of ten hearts."""
    return HEALTH_SCALE * (now.life - before.life) / MAX_LIFE


def gather_wood(before: Sight, now: Sight) -> float:
    """Return 1 for each log more."""
    return max(0, now.counts["log"] - before.counts["log"])


def climb(before: Sight, now: Sight) -> float:
    """Return 1 for each meter up, -1 for each down."""
    return now.height - before.height


# task -> (its actions, its rewards, which are added up)
TASKS = {
    "diamond": (DIAMOND_ACTIONS, (reach_milestones, stay_healthy)),
    "wood": (BASIC_ACTIONS, (gather_wood, stay_healthy)),
    "climb": (BASIC_ACTIONS, (climb, stay_healthy)),
}


# ---------------------------------------------------------------------------


class Minecraft:
    """A world of its own for every episode. The game is a Java process that `close` ends.

    `inventory` and `inventory_max` are the counts of all 391 items now and at most in the episode (large: the model
    squashes them by symlog), `equipped` one-hot, `health`, `hunger` and `breath` 1 when full. For the logger, beside
    the milestones, `log_restarts` counts the games that died and were started anew.
    """

    def __init__(self, spec, actions, rewards, controls, repeat: int, rng):
        self._spec = spec
        self._game = None
        self._actions = tuple(actions.values())
        self._rewards = rewards
        self._controls = controls
        self._repeat = repeat
        self._rng = rng
        self._restarts = 0
        shown = spec.observation_space.spaces
        self._items = [item for item in shown["inventory"].spaces if item != "log2"]
        self._holdable = list(shown["equipped_items"].spaces["mainhand"].spaces["type"].values)
        counts = spaces.Box(0, np.inf, (len(self._items),))
        self.obs_space = {
            "image": spaces.Box(0, 255, shown["pov"].shape, np.uint8),
            "inventory": counts,
            "inventory_max": counts,
            "equipped": spaces.Box(0, 1, (len(self._holdable),)),
            **{name: spaces.Box(0, 1, ()) for name in ("health", "hunger", "breath")},
        }
        self.act_space = {"action": spaces.Discrete(len(actions))}
        self._sight = None

    def reset(self):
        self._controls.reset()
        self._sight = see(self._start(), None)
        return {**self._observe(), **flags(is_first=True)}

    def step(self, action):
        keys = self._controls(self._actions[action["action"]])
        held = {**NOOP, **{key: keys[key] for key in REPEATED}}
        before = self._sight
        for frame in (keys, *[held] * (self._repeat - 1)):
            try:
                obs, _, done, info = self._game.step(frame)
                if "error" in info:  # MineRL goes on with a made-up observation
                    raise ConnectionError(info["error"])
            except Exception:  # sockets, the game's end, and mistakes in the handling of both
                self._discard()
                return {**self._observe(), **flags(is_last=True)}  # the world is lost, but nobody died
            self._sight = see(obs, self._sight)
            # The mission knows no other end than death.
            dead = bool(done) or self._sight.life <= 0
            if dead:
                break
        reward = sum(rule(before, self._sight) for rule in self._rewards)
        return {**self._observe(), **flags(reward, is_last=dead, is_terminal=dead)}

    def render(self, size=None):
        if self._sight is None:
            raise UserError("Minecraft shows nothing before its first episode")
        return self._sight.image

    def close(self):
        if self._game is not None:
            with contextlib.suppress(Exception):  # a game that died cannot be told to
                self._game.close()
        self._game = None

    def _discard(self):
        self.close()
        self._restarts += 1

    def _start(self):
        """Return MineRL's first observation of a new world. Raises UserError after a few failures in a row."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(RETRY_WAIT)
            try:
                if self._game is None:
                    self._game = self._spec.make()
                self._game.seed(int(self._rng.integers(2**31)), seed_spaces=False)  # of the world, for one episode
                return self._game.reset()
            except Exception as error:
                failure = error
                self._discard()
        message = f"Minecraft did not start in {ATTEMPTS} attempts ({one_line(failure)}): is Java 8 installed?"
        raise UserError(message) from failure

    def _observe(self):
        sight = self._sight
        held = self._holdable.index(sight.held)
        return {
            "image": sight.image,
            "inventory": np.array([sight.counts[item] for item in self._items], np.float32),
            "inventory_max": np.array([sight.most[item] for item in self._items], np.float32),
            "equipped": np.eye(len(self._holdable), dtype=np.float32)[held],
            "health": sight.life / MAX_LIFE,
            "hunger": sight.food / MAX_FOOD,
            "breath": sight.air / MAX_AIR,
            **{f"log_achievement_{item}": np.float32(sight.most[item]) for item in MILESTONES},
            "log_restarts": np.float32(self._restarts),
        }
