"""A run's place: the placeholders in its name, what a run before has left there, and whether to go on from that."""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tools import UserError
from training.config import CONFIGS, Config, load_config
from training.settings import flatten

SAME = ("task", "version", "action_repeat", "seed")  # in all of a logdir's run
SIZES = re.compile(  # keys that the shapes of networks depend on
    r"agent|size|frame_stack|encoder\.(layers|units|cnn|depth|mults|kernel)|rssm\.(deter|hidden|stoch|classes|blocks)"
    r"|rssm\.\w+_layers|decoder\.(layers|units|cnn|depth|mults|kernel|blocks)|(reward|cont)_head\.(layers|units|bins)"
    r"|(actor|critic)\.(layers|units|bins)|disag_(models|layers|units)"
    r"|(icm|rnd|empowerment)\.(layers|width|features|steps)|hierarchy\.(groups|classes|layers|units)"
    r"|encoder\.fusion|text\.(length|tokenizer|embeddings|layers|units|decoder|decoder_layers)"
    r"|audio\.(depth|mults|kernel|stride|mel|window)"
    r"|stages\.(z|hidden|mixtures|inputs|population)"
)
PARTS = re.compile(  # and those that their parts depend on
    r"norm|behavior|expl_behavior|intrinsic|expl_critics|optimizer|encoder\.\w+_keys|rssm\.(cell|latent|initial)"
    r"|cont_head\.use|\w+\.dist"
)
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
NAMED = 8  # changed keys that a line names


# ---------------------------------------------------------------------------
# The name


def placed(config: Config, more: Mapping[str, str] = {}) -> Config:
    """Return a configuration whose logdir is an absolute path with its placeholders filled in.

    What is not a letter, a digit, or one of _ . + - in a value becomes a dash there; {{ and }} are braces. Raises
    UserError for an unknown placeholder. more: {placeholder: text} besides its own.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    values = {"task": config.task, "version": config.version, "seed": str(config.seed), "timestamp": now}
    values |= more
    names = " ".join(f"{{{name}}}" for name in values)

    def fill(match: re.Match) -> str:
        word = match[0]
        if word in ("{{", "}}"):
            return word[0]
        if match[1] not in values:
            reason = f"no placeholder {word}, there are {names}; write {{{{ and }}}} for braces"
            raise UserError(f"--logdir {config.logdir}: {reason}")
        return re.sub(r"[^\w.+-]+", "-", values[match[1]])

    path = pathlib.Path(PLACEHOLDER.sub(fill, config.logdir)).expanduser()
    return config.replace(logdir=str(path.absolute()))  # environments may change the working directory


def save_config(config: Config, logdir: pathlib.Path) -> None:
    """Write the config.yaml of a run; braces in the name of its logdir stand for themselves."""
    config.replace(logdir=re.sub(r"[{}]", r"\g<0>\g<0>", config.logdir)).save(logdir / "config.yaml")


# ---------------------------------------------------------------------------
# What a run before has left


def recorded(logdir: pathlib.Path, warn: Callable[[str], None] = lambda line: None) -> Config | None:
    """Return the configuration in a logdir, `explicit` where it is written there, or None after `warn(line)`."""
    path = logdir / "config.yaml"
    if not path.is_file():
        return None
    try:
        return load_config([], CONFIGS, saved=path, warn=warn)
    except UserError as error:
        warn(f"{error}: cannot tell whether this run goes on from the one before")
        return None


def changes(before: Config | None, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return {key: (value before, value now)} of what a run does otherwise, of keys that both of them have."""
    if not before:
        return {}
    was, now = (dict(flatten(each.to_dict(), "")) for each in (before, config))
    keys = [key for key in now if key in before.explicit and key != "logdir"]
    return {key: (was[key], now[key]) for key in keys if was[key] != now[key]}


def check_logdir(
    config: Config, saved: Mapping[str, Any] | None, warn: Callable[[str], None]
) -> dict[str, tuple[Any, Any]]:
    """Refuse to go on from a run that this one is not; return what else has changed, see `changes`.

    Args:
      saved: the checkpoint in the logdir, or None; warn: function of a line.
    Raises UserError for another task, version, action repeat or seed, and for other sizes than it has learned with.
    """
    logdir = pathlib.Path(config.logdir)
    changed = changes(recorded(logdir, warn), config)
    fits = not any(key in ("task", "version") or SIZES.fullmatch(key) for key in changed)
    left = [name for name in ("scores.jsonl", "metrics.jsonl") if any(True for _ in entries(logdir / name))]
    for key in SAME:
        was, now = changed.pop(key, (config[key], config[key]))
        if saved:  # those from before there were versions do not tell
            was = saved.get(key, now if key == "version" else was)
        if was != now:
            learned = f", with --from_checkpoint {logdir} to start from what it has learned"
            learned = learned if saved and fits and key not in ("task", "version") else ""
            raise UserError(f"--{key} {now}: the run in {logdir} has {was}; give another --logdir{learned}")
    if finished(config, saved) if saved else has_learned(logdir):  # else the networks themselves are compared
        for key in filter(SIZES.fullmatch, changed):
            was, now = map(as_flag, changed[key])
            agent = "the checkpoint is of another agent: " if saved else ""
            raise UserError(f"--{key} {now}: {agent}the run in {logdir} has {was}; give another --logdir")
    if saved is None and left:
        files = " and ".join(left)
        warn(f"{logdir / 'latest.pt'} is gone: the run begins at step 0 and adds to {files} of the one before")
    return changed


def named(error: UserError, config: Config) -> UserError:
    """Return what a checkpoint that does not fit is refused with, after the flags that it may not fit for."""
    found = changes(recorded(pathlib.Path(config.logdir)), config)
    flags = [(key, *map(as_flag, pair)) for key, pair in found.items() if SIZES.fullmatch(key) or PARTS.fullmatch(key)]
    if not flags:
        return error
    words = ", ".join(f"--{key} {now} (it was {was})" for key, was, now in flags[:NAMED])
    return UserError(f"{words}: {error}; give another --logdir")


def changed_line(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return {key: (before, now)} as a line, or nothing."""
    words = [f"{key} {as_flag(was)} → {as_flag(now)}" for key, (was, now) in changed.items()]
    more = [f"and {len(words) - NAMED} more"] if len(words) > NAMED else []
    return "changed: " + ", ".join(words[:NAMED] + more) if words else ""


def as_flag(value: Any) -> str:
    """Return a value of a configuration as it is written on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_flag, value)) or "''"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def finished(config: Config, saved: Mapping[str, Any]) -> bool:
    """True if a run has seen all frames or learned all there is, and the evaluation at the end was played, too."""
    step = saved["counters"]["agent_steps"] * config.action_repeat
    clock = saved["clocks"]["ratio"]
    if (step < config.steps and not clock.get("finished")) or clock.get("pending"):
        return False
    played = sum(score.get("step") == step for score in scores(pathlib.Path(config.logdir), "eval"))
    return played >= config.eval_episode_num


def scores(logdir: pathlib.Path, mode: str = "") -> Iterator[dict[str, Any]]:
    """Yield the entries of scores.jsonl, of one mode if one is named, that can be read."""
    return (entry for entry in entries(logdir / "scores.jsonl") if not mode or entry.get("mode") == mode)


def best_return(logdir: pathlib.Path) -> float | None:
    """Return the highest return of the training episodes so far, or None."""
    return max((entry["score"] for entry in scores(logdir, "train") if is_number(entry.get("score"))), default=None)


def has_learned(logdir: pathlib.Path) -> bool:
    """True if metrics.jsonl tells of updates."""
    return any(is_number(entry.get("updates")) and entry["updates"] > 0 for entry in entries(logdir / "metrics.jsonl"))


def is_number(value: Any) -> bool:
    """True for int and float; JSON has text for what is not finite."""
    return isinstance(value, (int, float))


def entries(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, as far as it can be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                if isinstance(entry, dict):
                    yield entry
    except OSError:
        return
