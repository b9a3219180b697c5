"""POPGym (Morad et al. 2023): small tasks that need memory, with numbers and cards instead of pictures."""

from __future__ import annotations

from typing import Any

import gymnasium
import popgym.envs  # noqa: F401, registers the tasks

from envs.env import Env, Place
from envs.errors import unknown
from envs.from_gym import FromGym
from envs.wrappers import ActionRepeat


def make(task: str, config: Any, place: Place) -> Env:
    """Make the task of a name with its difficulty, such as `RepeatPreviousEasy`, with or without the version `-v0`.

    An observation is called `state`, and the members of a tuple (Autoencode) `state/0`, `state/1`. The paper's
    agents also see their last action, which a recurrent state-space model has anyway. Time-outs are those that
    the package calls truncations. Raises UserError for an unknown task.
    """
    tasks = {name.removeprefix("popgym-"): name for name in gymnasium.registry if name.startswith("popgym-")}
    versioned = task if task.endswith("-v0") else f"{task}-v0"
    if versioned not in tasks:
        raise unknown("popgym task", versioned, tasks)
    env = gymnasium.make(tasks[versioned], disable_env_checker=True)
    if "rgb_array" in env.metadata["render_modes"]:  # the classes have the mode but take no argument for it
        env.unwrapped.render_mode = "rgb_array"
    return ActionRepeat(FromGym(env, place.seed, config), config.action_repeat)
