"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023) from pixels, as their papers' agents see the world.

The mission is a sentence. It is an observation where it may change from one episode to the next (Fetch, GoToDoor,
GoToObject, PutNear and all of BabyAI): it then tells what to do. Where it is always the same it tells nothing.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import minigrid  # noqa: F401, registers the tasks
from gymnasium.wrappers import FilterObservation
from minigrid.core.mission import MissionSpace
from minigrid.wrappers import RGBImgPartialObsWrapper

from envs.env import Env, Place
from envs.errors import unknown
from envs.from_gym import FromGym
from envs.wrappers import ActionRepeat
from tools import UserError

FAMILIES = ("MiniGrid-", "BabyAI-")


def make(task: str, config: Any, place: Place) -> Env:
    """Make the environment of a Gymnasium id such as `MiniGrid-DoorKey-5x5-v0`, or `DoorKey-5x5-v0` for short.

    Observations: `image`, what lies ahead of the agent (7 x 7 tiles, walls hide what is behind them), `direction` (0
    east, 1 south, 2 west, 3 north), and a `mission` that changes. An episode that runs out of steps is truncated.
    Raises UserError for an unknown task, and for those of wave function collapse, which the package cannot make.
    """
    ids = [name for name in gymnasium.registry if name.startswith(FAMILIES)]
    name = task if task.startswith(FAMILIES) else FAMILIES[0] + task
    if name not in ids:
        raise unknown("minigrid task", name, ids)
    if name.startswith("MiniGrid-WFC-"):
        raise UserError(f"minigrid_{task} cannot be made: the package comes without the pictures it would imitate")
    env = gymnasium.make(name, disable_env_checker=True, render_mode="rgb_array")
    tile = -(-max(config.size) // env.unwrapped.agent_view_size)  # pixels: tiles are shrunk, never blown up
    told = ("mission",) if changes(env.observation_space["mission"]) else ()
    env = FilterObservation(RGBImgPartialObsWrapper(env, tile), ("image", "direction", *told))
    return ActionRepeat(FromGym(env, place.seed, config), config.action_repeat)


def changes(mission: Any) -> bool:
    """True if a space of missions has more than one: BabyAI's does not tell, and MiniGrid's is a sentence with gaps."""
    return type(mission) is not MissionSpace or bool(mission.ordered_placeholders)
