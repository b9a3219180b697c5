"""The section `sweep` of a sweep's file, and what sweep.py --help prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.config import Config
from training.helptext import table
from training.settings import checked, declare, flatten, merged

DECLARED = {
    "method": {"default": "grid", "choices": ["grid", "random", "tpe"], "help": "how values are chosen"},
    "trials": {"default": 0, "min": 0, "help": "how many there are in all; 0 is the whole grid"},
    "at_once": {"default": 1, "min": 1, "help": "training processes at a time, which share the CPU's threads"},
    "prune": {
        "default": "none",
        "choices": ["none", "median", "halving"],
        "help": "end trials early: those below the median of the others, or all but a quarter at each rung",
    },
    "prune_from": {"default": 0, "min": 0, "help": "frames before which none is ended"},
    "storage": {"default": "", "help": "URL of a database server that holds the search; a file in its folder if empty"},
    "ray": {"default": "", "help": "run the trials on a Ray cluster: auto, local, or its address"},
    "gpus": {"default": 0.0, "min": 0, "help": "GPUs of a training process on Ray"},
}
SETTINGS, _ = declare(DECLARED, "sweep: ")
USAGE = """\
usage: python3 sweep.py --config FILE [--KEY VALUE ...]

  --config FILE   YAML or JSON: keys of dreamer.py, each with a value, a list of values to search,
                  or a range {low, high, log}; configs and presets as for dreamer.py; and the
                  section sweep
  --KEY VALUE     a key of dreamer.py for all trials, over the file

sweep:"""


def read_settings(tree: Any, where: str) -> Config:
    """Return the section `sweep` of a file. Raises UserError, which begins with `where`, for what is wrong in it."""
    leaves = checked(SETTINGS, flatten(tree if tree is not None else {}, f"{where}sweep: "), f"{where}sweep.")
    return Config(merged(SETTINGS, leaves))


def usage() -> str:
    """Return what --help prints."""
    rows = [(f"{name} {setting.default!s}".rstrip(), setting.describe()) for name, setting in SETTINGS.items()]
    return "\n".join([USAGE, *table(rows, rows)])


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a configuration in the types of JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
