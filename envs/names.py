"""Whether a task exists, found out before PyTorch is imported, and most simulators: what is misspelt is told at once.

What a suite makes says so again, in the same words; here are only those names that can be had in a moment. Text of
dm_control and MiniGrid is read, not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium

from envs import check_options
from envs.errors import unknown
from envs.tasks import NAMED, SUITES, atari_games, split_task
from tools import UserError

# suite -> the package without which it has no tasks
PACKAGES = {
    "atari": "ale_py",
    "atari100k": "ale_py",
    "bsuite": "bsuite",
    "crafter": "crafter",
    "dmc": "dm_control",
    "memorymaze": "memory_maze",
    "minigrid": "minigrid",
    "popgym": "popgym",
    "procgen": "procgen",
}
CUP = {"cup_catch"}  # another name of ball_in_cup_catch
REGISTERED = re.compile(r'"((?:MiniGrid|BabyAI)-[\w-]+)"')
ADDED = re.compile(r"@SUITE\.add\([^)]*\)\s*def (\w+)\(")


def check_task(config: Any, meant: Callable[[str], str] = lambda name: "") -> None:
    """Raise UserError if the task of a configuration does not exist, as far as that can be told in a moment.

    Nothing but the suite is checked where a checkpoint may name the task, and not the name where actors elsewhere make
    the environments. meant: as in `envs.check_options`.
    """
    suite, name = split_task(config.task)
    if config.script == "eval_only" and "task" not in config.explicit:
        return
    check_options(config, suite, meant)
    if config.remote.actors:
        return
    package = PACKAGES.get(suite)
    if package and importlib.util.find_spec(package) is None:
        why = f"No module named '{package}'"
        raise UserError(f"task '{config.task}' cannot be made ({why}): pip install {SUITES[suite][2]}")
    if suite == "gym":
        check_id(name)
    elif suite in KNOWN:
        what, names, spelled = KNOWN[suite]
        known, asked = list(names()), spelled(name)
        if known and asked not in known and not asked.startswith("MiniGrid-WFC-"):
            raise unknown(what, asked, [each for each in known if each not in CUP])


def check_id(name: str) -> None:
    """Raise UserError for an id that Gymnasium does not know, unless a module of the user's registers it."""
    from envs.from_gym import REGISTERED_BY, unknown_id

    if ":" in name:
        return
    for prefix, (module, _) in REGISTERED_BY.items():
        if re.match(prefix, name):
            if importlib.util.find_spec(module) is None:
                return  # which the suite tells
            importlib.import_module(module)
    if name not in gymnasium.registry:
        raise unknown_id(name)


def bsuite_tasks() -> Iterable[str]:
    """Return the suite's `name/number`, all of them, for which half a second of imports is needed."""
    return importlib.import_module("bsuite.sweep").SWEEP


def dmc_tasks() -> Iterable[str]:
    """Return the suite's `domain_task`, and what another name stands for."""
    files = (folder("dm_control") / "suite").glob("*.py")
    tasks = [f"{file.stem}_{name}" for file in files for name in ADDED.findall(file.read_text(encoding="utf-8"))]
    return [*tasks, *CUP] if tasks else []


def minigrid_tasks() -> Iterable[str]:
    """Return the ids that MiniGrid registers, but for those of wave function collapse (WFC), which it composes."""
    return REGISTERED.findall((folder("minigrid") / "__init__.py").read_text(encoding="utf-8"))


def dummy_tasks() -> Iterable[str]:
    """Return the names of the environments for tests."""
    from envs.dummy import tasks_of

    return tasks_of("train")


def dmlab_levels() -> Iterable[str]:
    """Return the names of DeepMind Lab's levels."""
    from envs.dmlab import levels

    return levels()


def popgym_tasks() -> Iterable[str]:
    """Return the ids that POPGym registers, without its name."""
    importlib.import_module("popgym.envs")
    return [name.removeprefix("popgym-") for name in gymnasium.registry if name.startswith("popgym-")]


def folder(package: str) -> pathlib.Path:
    """Return where a package lies, which is not imported."""
    spec = importlib.util.find_spec(package)
    return pathlib.Path(next(iter(spec.submodule_search_locations or []), "") if spec else "")


def of(module: str, attribute: str) -> Callable[[], Iterable[str]]:
    """Return a function that returns the names which a file of ours, that needs no simulator, lists."""
    return lambda: getattr(importlib.import_module(module), attribute)


def same(name: str) -> str:
    """Return a name as it is."""
    return name


def game(name: str) -> str:
    """Return the name of a game's ROM where underscores do not count."""
    return {rom.replace("_", ""): rom for rom in atari_games()}.get(name.replace("_", ""), name)


def full_id(name: str) -> str:
    """Return the id of a task of MiniGrid, which may be written without the package's name."""
    return name if name.startswith(("MiniGrid-", "BabyAI-")) else f"MiniGrid-{name}"


def versioned(name: str) -> str:
    """Return the name of a task of POPGym with its version."""
    return name if name.endswith("-v0") else f"{name}-v0"


# suite -> what its tasks are called, a function that returns them, a function that makes a name one of them
KNOWN: dict[str, tuple[str, Callable[[], Iterable[str]], Callable[[str], str]]] = {
    "atari": ("atari game", atari_games, game),
    "atari100k": ("atari game", atari_games, game),
    "bsuite": ("bsuite task", bsuite_tasks, same),
    "crafter": ("crafter task", lambda: NAMED["crafter"], same),
    "dmc": ("dmc task", dmc_tasks, same),
    "dmlab": ("dmlab level", dmlab_levels, same),
    "dummy": ("dummy task", dummy_tasks, same),
    "memorymaze": ("memorymaze task", of("envs.memorymaze", "TASKS"), same),
    "minecraft": ("minecraft task", of("envs.minecraft", "TASKS"), same),
    "minigrid": ("minigrid task", minigrid_tasks, full_id),
    "popgym": ("popgym task", popgym_tasks, versioned),
    "procgen": ("procgen game", of("envs.procgen", "TIMEOUTS"), same),
}
