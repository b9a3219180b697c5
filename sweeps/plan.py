"""What a sweep is to do: its file, read and checked against configs.yaml before anything is started."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from envs.tasks import split_task
from sweeps.settings import plain, read_settings
from tools import UserError
from training.config import CONFIGS, Config, load_config, read_tree, settings_of
from training.logdir import as_flag, placed
from training.settings import Settings, find

RANGE = {"low", "high", "log"}
MACHINE = ("logdir", "device", "threads", "log_level", "logger")  # keys that change nothing in what is compared
ASIDE = ("sweep", "configs", "presets")  # what a file holds besides keys


class Choice(NamedTuple):
    """A key's values, of which each trial has one."""

    values: tuple[Any, ...]


class Range(NamedTuple):
    """The numbers from `low` to `high`, both among them; equally likely in their logarithm if `log`."""

    low: float
    high: float
    log: bool


class Plan(NamedTuple):
    """A sweep.

    settings: section `sweep`; presets, files: as for --configs and --presets.
    base: Config of presets, file and flags; given: {key: value} of file and flags.
    search: {key: Choice or Range}; seeds: of each trial; devices: that processes take in turns.
    folder: of the whole sweep.
    """

    settings: Config
    presets: list[str]
    files: list[str]
    base: Config
    given: dict[str, Any]
    search: dict[str, Choice | Range]
    seeds: tuple[int, ...]
    devices: tuple[str, ...]
    folder: pathlib.Path

    @property
    def trials(self) -> int:
        """The number of all trials."""
        whole = math.prod(len(each.values) for each in self.search.values() if isinstance(each, Choice))
        return min(self.settings.trials or whole, whole) if self.settings.method == "grid" else self.settings.trials

    def flags(self) -> list[str]:
        """Return the words of a command line that name the presets."""
        files, presets = ["--presets", *self.files], ["--configs", *self.presets]
        return [*(files if self.files else []), *(presets if self.presets else [])]

    def config(self, number: int, values: Mapping[str, Any], seed: int) -> Config:
        """Return the configuration of a trial's training with one of the seeds."""
        config = self.base.replace(**values, seed=seed)
        return placed(config, placeholders(number, values))

    def identity(self) -> dict[str, Any]:
        """Return what a sweep that goes on has in common with itself before, in the types of JSON."""
        fixed = {key: value for key, value in self.given.items() if key not in MACHINE}
        searched = {
            key: [*map(as_flag, each.values if isinstance(each, Choice) else each)] for key, each in self.search.items()
        }
        about = {"configs": self.presets, "sweep.method": self.settings.method, "seed": list(self.seeds)}
        return plain(fixed) | about | searched


def read_plan(file: str, flags: Sequence[str] = ()) -> Plan:
    """Read a sweep's file, and flags of dreamer.py that go on top. Raises UserError for whatever is wrong in them."""
    where = f"{file}: "
    tree = read_tree(file)
    if not isinstance(tree, dict):
        raise UserError(f"{where}expected a mapping of keys to values, lists and ranges")
    settings = read_settings(tree.get("sweep"), where)
    presets, files = words(tree.get("configs"), f"{where}configs: "), words(tree.get("presets"), f"{where}presets: ")
    base = load_config(
        [*(["--presets", *files] if files else []), *(["--configs", *presets] if presets else []), *flags], CONFIGS
    )
    over = {name: base[name] for name in base.explicit}
    keys = settings_of(base)
    given: dict[str, Any] = {}
    search: dict[str, Choice | Range] = {}
    turns: dict[str, tuple] = {"seed": (base.seed,), "device": (base.device,)}  # lists of these two are not searched
    for name, value in walk(keys, {key: tree[key] for key in tree if key not in ASIDE}):
        if name in given or name in search:
            raise UserError(f"{where}{name}: given twice")
        found = read_value(base, keys, name, value, where)
        if name in over and isinstance(found, (Choice, Range)) and name not in turns:
            raise UserError(f"--{name}: {file} searches it, leave it out of the command")
        if name in turns and name not in over:
            if isinstance(found, Range):
                raise UserError(f"{where}{name}: expected a value or a list of values")
            turns[name] = found.values if isinstance(found, Choice) else (found,)
            given[name] = turns[name][0]
        elif isinstance(found, (Choice, Range)) and name not in turns:
            search[name] = found
        else:
            given[name] = found
    given |= over
    seeds, devices = turns.values()
    plan = Plan(settings, presets, files, base.replace(**given), given, search, seeds, devices, pathlib.Path())
    check(plan, where)
    return shared_out(plan)._replace(folder=folder_of(plan, where))


def words(value: Any, where: str) -> list[str]:
    """Return a text or a list of texts as a list."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    for item in found:
        if not isinstance(item, str):
            raise UserError(f"{where}expected text or a list of text, got {item!r}")
    return found


def walk(keys: Settings, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of a tree of sections, in which a range is a value."""
    for part, value in tree.items():
        name = f"{prefix}{part}"
        section = any(key.startswith(f"{name}.") for key in keys)
        ranged = isinstance(value, dict) and {*value} <= RANGE and not section
        if isinstance(value, dict) and not find(keys, name) and not ranged:
            yield from walk(keys, value, f"{name}.")
        else:
            yield name, value


def read_value(base: Config, keys: Settings, name: str, value: Any, where: str) -> Any:
    """Return the value, Choice or Range of a key. Raises UserError for what dreamer.py would not take."""

    def checked(one: Any) -> Any:
        try:
            return base.replace(**{name: one})[name]
        except UserError as error:
            raise UserError(f"{where}{error}") from None

    setting = find(keys, name)
    if setting and isinstance(value, dict):
        return read_range(setting.default, setting.open, value, checked, f"{where}{name}: ")
    several = isinstance(value, list)
    if several and setting and isinstance(setting.default, tuple) and not setting.open:
        several = bool(value) and all(isinstance(item, list) for item in value)  # its values are lists themselves
    if not several or not setting:
        return checked(value)
    values = tuple(map(checked, value))
    if not values:
        raise UserError(f"{where}{name}: expected at least one value")
    if len({as_flag(item) for item in values}) < len(values):
        raise UserError(f"{where}{name}: a value is given twice")
    return Choice(values) if len(values) > 1 else values[0]


def read_range(default: Any, is_open: bool, tree: dict, checked: Any, where: str) -> Range:
    """Return a Range of a key with this default."""
    number = is_open or (isinstance(default, (int, float)) and not isinstance(default, bool))
    if not {"low", "high"} <= tree.keys() <= RANGE or not isinstance(tree.get("log", False), bool) or not number:
        allowed = "a value, a list of values, or {low: number, high: number, log: true}"
        raise UserError(f"{where}expected {allowed if number else 'a value or a list of values'}, got {tree!r}")
    low, high, log = checked(tree["low"]), checked(tree["high"]), tree.get("log", False)
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, (int, float)):
            raise UserError(f"{where}expected numbers as low and high, got {end!r}")
    if low >= high or (log and low <= 0):
        raise UserError(f"{where}expected low < high{', and 0 < low,' if log else ''} got {low} and {high}")
    return Range(low, high, log)


def check(plan: Plan, where: str) -> None:
    """Raise UserError for a plan that cannot be carried out."""
    settings, base = plan.settings, plan.base
    ranges = [key for key, each in plan.search.items() if isinstance(each, Range)]
    if settings.method == "grid" and ranges:
        raise UserError(f"{where}{ranges[0]}: a grid takes lists; for a range, sweep: {{method: tpe}}, or random")
    if settings.method != "grid" and not (settings.trials and plan.search):
        what = "trials: say how many" if plan.search else "no key has a list of values or a range to search"
        raise UserError(f"{where}sweep: {what}")
    if base.script == "eval_only":
        raise UserError(f"{where}script: expected train or train_offline, got eval_only")
    if not min(base.eval_episode_num, base.eval_envs):
        raise UserError(f"{where}without evaluations (eval_episode_num, eval_envs) there is nothing to compare")
    tasks = plan.search.get("task", Choice((base.task,)))
    for task in tasks.values if isinstance(tasks, Choice) else ():
        split_task(task)


def folder_of(plan: Plan, where: str) -> pathlib.Path:
    """Return the sweep's folder: what comes before the first part of the logdir that is a trial's own."""
    logdir = plan.given.get("logdir", "")
    for word in ("trial", *(["seed"] if len(plan.seeds) > 1 else [])):
        if f"{{{word}}}" not in logdir:
            raise UserError(
                f"{where}logdir: expected a path with {{{word}}}, such as ./logdir/sweep/{{trial}}/{{seed}}"
            )
    if "{timestamp}" in logdir:
        raise UserError(f"{where}logdir: a sweep that goes on would not find {{timestamp}} again; leave it out")
    values = {key: (each.values[0] if isinstance(each, Choice) else each.low) for key, each in plan.search.items()}
    plan.config(0, values, plan.seeds[0])  # there may be an unknown placeholder
    own = "|".join(map(re.escape, ["trial", "seed", *plan.search]))
    parts = pathlib.Path(logdir).parts
    shared = itertools.takewhile(lambda part: not re.search(rf"\{{({own})\}}", part), parts)
    return pathlib.Path(placed(plan.base.replace(logdir=str(pathlib.Path(*shared)))).logdir)


def placeholders(number: int, values: Mapping[str, Any]) -> dict[str, str]:
    """Return {placeholder: text} of a trial."""
    return {"trial": f"{number:03}", **{key: as_flag(value) for key, value in values.items()}}


def shared_out(plan: Plan) -> Plan:
    """Return a plan whose processes share the threads of the CPU, unless the user has said how many each has."""
    if plan.base.threads:
        return plan
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // plan.settings.at_once)
    return plan._replace(base=plan.base.replace(threads=threads), given={**plan.given, "threads": threads})
