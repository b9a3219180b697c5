"""Read, name and average the scores of runs and published ones.

Runs whose configurations differ in nothing but seed and logdir are the seeds of one curve. Scores are those of
training episodes, in bins of environment steps, action repeat counted.
"""

import csv
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

from tools import UserError
from training.config import yaml12

DATA = pathlib.Path(__file__).resolve().parent / "data"
ACHIEVEMENT = re.compile(r"(log[_/])?achievement_")  # keys of scores.jsonl that count a Crafter achievement
OWN = {"seed", "logdir"}  # what may differ between the seeds of a curve
METHODS = {  # {method in published_curves.json: its name}
    "dreamerv3": "DreamerV3 (published)",
    "ppo_fixhp": "PPO (published)",
    "d4pg": "D4PG (published)",
    "drqv2": "DrQ-v2 (published)",
}


class Run(NamedTuple):
    """A logdir: its configuration, and its training episodes.

    steps, scores: (N) environment steps at the end of each episode, and its return.
    unlocked: {achievement: (N) bool} of Crafter, empty elsewhere.
    """

    logdir: str
    label: str  # the user's name for it, or ""
    config: dict
    steps: np.ndarray
    scores: np.ndarray
    unlocked: dict


class Curve(NamedTuple):
    """A line of a panel: (N) each; low and high bound its band; nan where there is no data.

    runs: number of runs behind each point.
    """

    name: str
    steps: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: np.ndarray
    published: bool = False


def warn(text):
    """Print a warning to stderr."""
    print(f"plot_scores.py: warning: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------
# Reading


def read_runs(patterns):
    """Return the runs that match any of `patterns`, each "glob" or "name=glob", with at least one training episode.

    A match is a logdir, or a .json file of recorded runs (see `read_recorded`). Raises UserError if there is none.
    """
    runs = {}
    for text in patterns:
        label, equals, pattern = ("", "", text) if os.path.exists(text) else text.rpartition("=")
        if equals and not label:
            raise UserError(f"{text}: the name is missing before '='")
        found = sorted(glob.glob(os.path.expanduser(pattern)))
        if not found:
            raise UserError(f"{pattern}: no such logdir")
        for path in map(os.path.normpath, found):
            own = read_recorded(path, label) if path.endswith(".json") else [read_run(path, label)]
            for run in filter(None, own):
                runs.setdefault(run.logdir, run)
    if not runs:
        raise UserError("no logdir has a finished training episode")
    return list(runs.values())


def read_run(logdir, label=""):
    """Return the Run in a logdir, or None, with a warning, if there is none."""
    try:
        config = yaml12().load(pathlib.Path(logdir, "config.yaml").read_text())
        task = config["task"]
        text = pathlib.Path(logdir, "scores.jsonl").read_text()
    except OSError as error:
        warn(f"{logdir} is skipped: {os.path.basename(error.filename)}: {error.strerror}")
        return None
    except Exception:  # a parser may raise anything
        raise UserError(f"{logdir}/config.yaml is no configuration of a run") from None
    rows, torn = read_scores(text)
    if torn:
        warn(f"{logdir}/scores.jsonl: {torn} unreadable line{'s' * (torn > 1)} skipped")
    if not rows:
        warn(f"{logdir} is skipped: no finished training episode yet")
        return None
    keys = {key for row in rows for key in row if ACHIEVEMENT.match(key)} if task.startswith("crafter") else ()
    unlocked = {key: np.array([row.get(key, 0) > 0 for row in rows]) for key in sorted(keys)}
    steps, scores = (np.array([row[key] for row in rows], float) for key in ("step", "score"))
    return Run(logdir, label, config, steps, scores, unlocked)


def read_recorded(path, label=""):
    """Return the Runs in a file {"task", "runs": [{"seed", "train": [[environment steps, return]]}]}."""
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        config = {"task": data["task"]}
        return [
            Run(f"{path}/{run['seed']}", label or pathlib.Path(path).stem, config, *np.array(run["train"], float).T, {})
            for run in data["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of recorded runs") from None


def read_scores(text):
    """Return the training episodes in the lines of scores.jsonl, and how many lines could not be read."""
    rows, torn = [], 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
            training = row["mode"] == "train"
            whole = all(math.isfinite(row[key]) for key in ("step", "score"))
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            torn += 1
        elif training:
            # A run that was killed and resumed repeats what followed its checkpoint; the repetition replaces it.
            while rows and rows[-1]["step"] > row["step"]:
                rows.pop()
            rows.append(row)
    return rows, torn


def settings(config, *but):
    """Return {dotted key: value} of a configuration, without what may differ between seeds and without `but`."""

    def walk(tree, prefix=""):
        for key, value in tree.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return {key: value for key, value in walk(config) if key not in OWN | set(but)}


def name_runs(runs):
    """Return {name: {(group, task): [Run]}}; runs of the same label, or else of the same settings, share a name."""
    groups = {}
    for run in runs:
        key = run.label or json.dumps(settings(run.config, "task"), sort_keys=True)
        groups.setdefault(key, []).append(run)
    named = {}
    for group in groups.values():
        names = [os.path.basename(run.logdir) for run in group]
        stem = os.path.commonprefix(names)  # noqa: RUF071 (letters, not parts of a path)
        name = group[0].label or (stem.rstrip("-_.0123456789") if len(names) > 1 else stem) or names[0]
        if name in named:
            name = next(new for i in itertools.count(2) if (new := f"{name} ({i})") not in named)
        tasks = named.setdefault(name, {})
        for run in group:
            tasks.setdefault((group_of(run.config), run.config["task"]), []).append(run)
        for (_, task), seeds in tasks.items():
            check_same(name, task, [settings(run.config) for run in seeds])
    return named


def check_same(name, task, configs):
    """Warn if runs that are drawn as seeds of one curve differ in more than the seed."""
    keys = sorted(set().union(*configs))
    differ = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    if differ:
        warn(f"{name}, {task}: taken as seeds of one curve, but they also differ in {', '.join(differ)}")


# ---------------------------------------------------------------------------
# Published


def group_of(config):
    """Return the group in which a run is compared: the set of published curves of its kind if any, or else its suite.

    "dmc_proprio" and "dmc_vision" are for agents that see vectors or images alone; "atari100k" is for short runs.
    """
    suite = config["task"].partition("_")[0]
    if suite == "atari" and float(config.get("steps", 0)) <= 1e6:
        return "atari100k"
    if suite == "dmc":
        encoder = config.get("encoder", {})
        images = bool(re.match(encoder.get("cnn_keys", ".*"), "image"))
        vectors = bool(re.match(encoder.get("mlp_keys", ".*"), "position"))
        return {(True, False): "dmc_vision", (False, True): "dmc_proprio"}.get((images, vectors), "dmc")
    return suite


def published_curves(group, task):
    """Return the Curves of a set, such as "dmc_proprio", that are published for a task."""
    curves = []
    for method, data in published().get(group, {}).items():
        if task in data["tasks"]:
            entry = data["tasks"][task]
            mean, std = (np.array(entry[key], float) for key in ("mean", "std"))  # null becomes nan
            steps = np.array(data["env_steps"], float)
            runs = np.where(np.isnan(mean), 0, entry["seeds"])
            curves.append(Curve(METHODS[method], steps, mean, mean - std, mean + std, runs, True))
    return curves


@functools.cache
def published():
    """Return {set: {method: {"env_steps": [bin ends], "tasks": {task: {"seeds", "mean", "std"}}}}}."""
    return json.loads((DATA / "published_curves.json").read_text())


@functools.cache
def atari_scores():
    """Return {game: (score of a random player, of the human player)}, as DQN's and later papers publish them."""
    with open(DATA / "atari_scores.csv", newline="") as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalized(task, scores):
    """Normalize scores of an Atari task, so that a random player has 0 and the published human player 1."""
    low, high = atari_scores()[task.removeprefix("atari_")]
    return (np.asarray(scores) - low) / (high - low)


# ---------------------------------------------------------------------------
# Numbers


def bin_means(steps, values, width, count):
    """Return the means (count) of values (N) in bins (0, width], (width, 2 width], ... of steps (N); nan if empty."""
    index = np.clip(np.ceil(np.asarray(steps) / width).astype(int) - 1, 0, None)
    total = np.bincount(index, values, minlength=count)[:count]
    number = np.bincount(index, minlength=count)[:count]
    return np.divide(total, number, out=np.full(count, np.nan), where=number > 0)


def mean_and_std(rows):
    """Return mean (bins) and population standard deviation (bins) of (seeds, bins), over the seeds that have data."""
    known = np.ma.masked_invalid(rows)
    return known.mean(0).filled(np.nan), known.std(0).filled(np.nan)


def crafter_score(unlocked, steps, ends):
    """Return the Crafter score in percent over all episodes up to each of `ends` (Hafner 2021, eq. 1): (len(ends)).

    The geometric mean over achievements of their success rates: exp(mean(log(1 + s))) - 1 with s in percent.
    """
    scores = []
    for end in ends:
        rates = [100 * done[steps <= end].mean() for done in unlocked.values()] if (steps <= end).any() else [np.nan]
        scores.append(np.expm1(np.mean(np.log1p(rates))))
    return np.array(scores)


# Aggregates (Agarwal et al. 2021) take the scores of each task along the last axis, (..., seeds) each.


def task_mean(*tasks, axis=-1):
    """Return the mean over tasks of their means."""
    return np.mean([np.mean(scores, axis) for scores in tasks], 0)


def task_median(*tasks, axis=-1):
    """Return the median over tasks of their means."""
    return np.median([np.mean(scores, axis) for scores in tasks], 0)


def task_iqm(*tasks, axis=-1):
    """Return the interquartile mean: of all runs of all tasks together, without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(tasks, axis), 0.25, axis)


STATISTICS = {"mean": task_mean, "median": task_median, "IQM": task_iqm}


def interval(statistic, tasks):
    """Return the 95% interval (low, high) of a statistic of [(seeds)]: the bootstrap resamples seeds within each task.

    A task of one seed has nothing to resample: nan.
    """
    from scipy.stats import bootstrap

    if min(map(len, tasks)) < 2:
        return np.nan, np.nan
    found = bootstrap(
        tasks, statistic, n_resamples=2000, vectorized=True, method="percentile", rng=np.random.default_rng(0)
    )
    return found.confidence_interval
