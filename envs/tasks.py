"""The suites, and what the user may have meant by a task that is none."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

import gymnasium

from tools import UserError, nearest, plain

# suite -> (module, the function in it that makes a task, what pip installs for it).
# Nothing is imported before its suite is asked for.
SUITES = {
    "atari": ("envs.atari", "make", "-r requirements/atari.txt"),
    "atari100k": ("envs.atari", "make", "-r requirements/atari.txt"),
    "bsuite": ("envs.bsuite", "make", "-r requirements/bsuite.txt"),
    "crafter": ("envs.crafter", "make", "-r requirements/crafter.txt"),
    "custom": ("envs.from_gym", "make_custom", "-r requirements.txt"),
    "dmc": ("envs.dmc", "make", "-r requirements/dmc.txt"),
    "dmlab": ("envs.dmlab", "make", "the wheel that https://github.com/google-deepmind/lab builds"),
    "dummy": ("envs.dummy", "make", "-r requirements.txt"),
    "gym": ("envs.from_gym", "make", "-r requirements.txt"),
    "memorymaze": ("envs.memorymaze", "make", "-r requirements/memorymaze.txt"),
    "minecraft": ("envs.minecraft", "make", "minerl==0.4.4, which needs a Java 8 JDK"),
    "minigrid": ("envs.minigrid", "make", "-r requirements/minigrid.txt"),
    "popgym": ("envs.popgym", "make", "-r requirements/popgym.txt"),
    "procgen": ("envs.procgen", "make", "--no-deps -r requirements/procgen.txt"),
}
ALIASES = {  # what other code calls them, as `tools.plain` writes it
    "dmcontrol": "dmc",
    "dmcontrolsuite": "dmc",
    "deepmindcontrol": "dmc",
    "ale": "atari",
    "gymnasium": "gym",
    "openai": "gym",
    "openaigym": "gym",
    "babyai": "minigrid",
    "memmaze": "memorymaze",
    "minerl": "minecraft",
    "deepmindlab": "dmlab",
}
DOMAINS = (
    *("acrobot", "ball_in_cup", "cartpole", "cheetah", "cup", "dog", "finger", "fish", "hopper", "humanoid", "lqr"),
    *("manipulator", "pendulum", "point_mass", "quadruped", "reacher", "stacker", "swimmer", "walker"),
)
VERSION = re.compile(r"(-?ram)?(NoFrameskip|Deterministic|FrameSkip\d*)?-v\d+$")  # the end of a Gymnasium id
SNAKE = ("dmc", "procgen", "crafter", "memorymaze")  # suites with names in lower case
NAMED = {  # what names a task without its suite
    "crafter": ("reward", "noreward"),
    "dummy": ("vector", "discrete", "pixels", "multi", "maze", "instruction", "instruction_new", "tone", "all"),
    "memorymaze": ("9x9", "11x11", "13x13", "15x15"),
    "minecraft": ("diamond",),
    "procgen": (
        *("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot", "heist"),
        *("jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot"),
    ),
}


def split_task(task: str) -> tuple[str, str]:
    """Return the suite and the rest of a task's name. Raises UserError, with what may be meant, if it is no suite."""
    suite, _, name = task.partition("_")
    if suite in SUITES:
        return suite, name
    hint = next(suggestions(task), None) or nearest(suite, SUITES, 0.65)
    hint = f"did you mean '{hint}'?" if hint else f"a task is suite_name, with suite one of {', '.join(SUITES)}"
    raise UserError(f"unknown suite '{suite}': {hint}")


def suggestions(task: str) -> Iterator[str]:
    """Yield tasks that another name may mean, likely ones first. No suite is imported but Gymnasium's and Atari's."""
    if re.fullmatch(r"(?!gym:)[\w.]+:([\w-]+/)?[\w-]+-v\d+", task):  # an id, with the module that registers it
        yield f"gym_{task}"
        return
    if task.count(":") == 1 and not task.endswith(":") and not task.startswith("gym"):
        yield f"custom_{task}"
        return
    known = {plain(suite): suite for suite in SUITES} | ALIASES
    first, name = re.fullmatch(r"([^_/.\-:]*)[_/.\-:]*(.*)", re.sub("^dm[_-]control", "dmc", task)).groups()
    suite = known.get(plain(first))
    bare = VERSION.sub("", name if suite else task)
    snake = re.sub(r"[-/ .]+", "_", bare).lower()
    if suite in SNAKE:
        yield f"{suite}_{snake}"
    elif suite and suite not in ("gym", "atari", "atari100k"):
        yield f"{suite}_{name}"
    ids = list(gymnasium.registry)  # before Atari's come to them
    if game := {plain(game): game for game in atari_games()}.get(plain(bare)):
        yield f"{suite if suite == 'atari100k' else 'atari'}_{game}"
    spellings = {plain(VERSION.sub("", each)): each for each in ids} | {plain(each): each for each in ids}
    for spelled in (name if suite else task, bare):
        if found := spellings.get(plain(spelled)):
            yield f"gym_{found}"
    if any(snake.startswith(f"{domain.lower()}_") for domain in DOMAINS):
        yield f"dmc_{snake}"
    for start, own in {"MiniGrid-": "minigrid_MiniGrid-", "BabyAI-": "minigrid_BabyAI-", "popgym-": "popgym_"}.items():
        if task.startswith(start):
            yield own + task.removeprefix(start)
    for suite, tasks in NAMED.items():
        for each in tasks:
            if plain(each) == plain(bare) or plain(f"{suite}{each}") == plain(VERSION.sub("", task)):
                yield f"{suite}_{each}"


def atari_games() -> list[str]:
    """Return the names of the games whose ROMs are there, none where the package is missing."""
    if importlib.util.find_spec("ale_py") is None:
        return []
    from ale_py import roms

    return list(roms.get_all_rom_ids())
