"""What a config.yaml may name that came with a checkpoint from elsewhere: nothing that would run code unasked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection
from importlib.machinery import PathFinder
from typing import Any

from tools import UserError

OURS = "envs.car_racing"  # which the preset carracing names, and envs/making.py imports from nowhere else


def check_foreign(config: Any, folder: pathlib.Path, given: Collection[str] = ()) -> None:
    """Raise UserError if a configuration that was read from a folder would have code imported that is not the user's.

    The user's are modules in the working directory and on PYTHONPATH, but for what lies in that folder itself. Python's
    own and installed packages are not: with arguments from a file, some of their functions do anything.

    Args:
      config: the whole configuration; folder: that its config.yaml is in.
      given: keys that the user gave by flags, which are trusted.
    """
    suite, _, rest = config.task.partition("_")
    named = {"task": [rest] if suite == "custom" or (suite == "gym" and ":" in rest) else []}
    named["wrappers"] = list(config.to_dict().get("wrappers", []))
    for key, entries in named.items():
        for entry in entries if key not in given else ():
            module = str(entry).partition(":")[0]
            if not is_own(module, folder):
                why = f"names the module {module!a}, which is not in {os.getcwd()} or on PYTHONPATH"
                cure = f"start from the folder that holds it, or give --{key} {entry if key != 'task' else config.task}"
                raise UserError(f"{folder / 'config.yaml'} {why}: {cure} if it is to run")


def is_own(module: str, folder: pathlib.Path) -> bool:
    """True if a module lies in the working directory or on PYTHONPATH, and not in a folder."""
    if module == OURS:
        return True
    top = module.partition(".")[0]
    places = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    spec = PathFinder.find_spec(top, places) if top.isidentifier() else None
    files = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    found = [pathlib.Path(file).resolve() for file in files if file]
    return bool(found) and not any(file.is_relative_to(folder.resolve()) for file in found)
