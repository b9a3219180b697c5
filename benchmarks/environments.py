"""Measure the speed of environments, the overhead of wrappers and workers, and returns of a random agent.

python3 benchmarks/environments.py speed --write docs/environments.md
python3 benchmarks/environments.py overhead --write docs/environments.md
python3 benchmarks/environments.py checks --write docs/reliability.md
python3 benchmarks/environments.py random --write docs/environments.md

Each prints a table, and --write puts it between its markers in a page. Environments are made from the presets of
configs.yaml. Every measurement runs in its own process; an environment that cannot be made becomes a row with
the reason. Timings need idle cores: the line below each table gives the load at the start.
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import pathlib
import sys
import tempfile
import time
import timeit
import traceback
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/environments.py")  # before the first package is imported

import numpy as np
from gymnasium import spaces

from agents.random import Random
from benchmarks.pages import all_cores, digits, machine, markdown, mean_and_error, put_between, write_between
from benchmarks.races import (
    alone,
    bare_pong,
    bare_walker,
    draw_actions,
    make_config,
    pin,
    race_bare,
    race_workers,
    seconds_per_step,
    together,
)
from benchmarks.scores import ACHIEVEMENT, atari_scores, crafter_score, published_curves
from envs import SUITES, make_env, make_envs
from envs.checks import Checked
from envs.errors import one_line
from modalities import kind_of
from specs import act_spec, step_layout
from tools import Parser, UserError, atomic_write, derive_seed
from training.evaluation import Evaluation

TASKS = (  # (presets, an example)
    ("atari", "atari_pong"),
    ("atari100k", "atari100k_pong"),
    ("dmc_proprio", "dmc_walker_walk"),
    ("dmc_vision", "dmc_walker_walk"),
    ("", "dmc_walker_walk"),
    ("crafter", "crafter_reward"),
    ("memorymaze", "memorymaze_9x9"),
    ("memorymaze", "memorymaze_15x15"),
    ("procgen", "procgen_coinrun"),
    ("bsuite", "bsuite_catch/0"),
    ("minigrid", "minigrid_DoorKey-5x5-v0"),
    ("popgym", "popgym_RepeatPreviousEasy-v0"),
    ("", "gym_CartPole-v1"),
    ("", "gym_LunarLander-v3"),
    ("", "gym_HalfCheetah-v5"),
    ("", "dummy_multi"),
    ("dmlab", "dmlab_rooms_collect_good_objects_train"),
    ("minecraft", "minecraft_diamond"),
)
PACKAGES = {"gym_LunarLander-v3": "-r requirements/box2d.txt", "gym_HalfCheetah-v5": "-r requirements/dmc.txt"}
GAMES = "pong", "breakout", "boxing", "freeway", "seaquest", "ms_pacman"
CONTROL = "cartpole_balance", "cartpole_swingup", "walker_walk", "cheetah_run", "ball_in_cup_catch"
RANDOM = (  # (presets, a task, factor on the number of episodes: success rates need more than returns)
    *(("atari100k", f"atari100k_{game}", 1) for game in GAMES),
    ("crafter", "crafter_reward", 10),
    *(("dmc_proprio", f"dmc_{task}", 1) for task in CONTROL),
)
CHECKED = {  # name: (presets, task, flags)
    "walker_walk from proprioception, repeat 1": ("dmc_proprio", "dmc_walker_walk", "--action_repeat", "1"),
    "Pong, repeat 4": ("atari", "atari_pong"),
}
CRAFTER_RETURN, CRAFTER_SCORE = 2.1, 1.6  # of a random agent (Hafner 2021, arXiv:2109.06780, table 1)
ACHIEVEMENTS = 22


def main(argv=None):
    """Run the command line; return the exit status."""
    try:
        args = parse(argv)
        measure, table = COMMANDS[args.command]
        if getattr(args, "seconds", 1) <= 0 or getattr(args, "episodes", 2) < 2 or getattr(args, "processes", 1) < 1:
            raise UserError("--seconds must be above 0, --episodes at least 2 and --processes at least 1")
        if args.write:  # so that a missing marker is reported before the measurements
            put_between(pathlib.Path(args.write).read_text(encoding="utf-8"), args.command, "")
        about = machine() + (f", {args.seconds:g} s a measurement" if "seconds" in args else "")
        results = measure(args)
        text = f"{table(results)}\n\n{about}."
        print(text)
        if args.json:
            found = {"command": args.command, "machine": about, "results": results}
            atomic_write(args.json, lambda file: file.write(json.dumps(found, indent=2).encode() + b"\n"))
        if args.write:
            write_between(args.write, args.command, text)
    except (UserError, OSError) as error:
        print(f"environments.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def parse(argv):
    """Return the parsed command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (measure, _) in COMMANDS.items():
        command = commands.add_parser(name, help=measure.__doc__.split("\n")[0])
        command.add_argument("--write", metavar="PAGE", help="put the table between its markers in this file")
        command.add_argument("--json", metavar="OUT", help="write the numbers to this file")
        if name not in ("overhead", "checks"):
            command.add_argument("tasks", nargs="*", metavar="TASK", help="these instead of those of the page")
        if name != "random":
            command.add_argument("--seconds", type=float, default=5, help="of each measurement (default: 5)")
    command.add_argument("--episodes", type=int, default=30, help="of each task, ten times as many in Crafter")
    command.add_argument("--processes", type=int, default=1, help="tasks that run at the same time")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------
# Environments and processes


def rows_of(table, tasks):
    """Return the rows of TASKS or RANDOM; given `tasks`, only theirs, or rows like those of the same suite."""
    if not tasks:
        return list(table)
    found = {}
    for task in tasks:
        like = [row for row in table if row[1] == task]
        like = like or [row for row in table if row[1].partition("_")[0] == task.partition("_")[0]]
        rows = [(row[0], task, *row[2:]) for row in like] or [("", task, *table[0][2:])]
        found |= dict.fromkeys(rows)
    return list(found)


def attempt(function, *args, cores=()):
    """Return `function(*args)`, called in a separate process, or {"failed": why} if that fails.

    cores: of the process from its start, as packages may start threads when they are imported.
    """
    before = all_cores()
    pin(cores)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except UserError as error:
        return {"failed": one_line(error)}
    except Exception as error:  # the other rows are still useful
        traceback.print_exception(error)
        return {"failed": f"{type(error).__name__}: {one_line(error)}"}
    finally:
        pin(before)


# ---------------------------------------------------------------------------
# Speed


def speed(args):
    """Measure the agent steps per second of a task of every suite, and describe its spaces and protocol."""
    results = []
    for presets, task in rows_of(TASKS, args.tasks):
        print(f"{task} {presets}", file=sys.stderr, flush=True)
        packages = PACKAGES.get(task) or SUITES.get(task.partition("_")[0], ("", "", "?"))[2]
        cores = all_cores()
        found = attempt(time_task, presets, task, args.seconds, cores, cores=cores[:1])
        results.append({"task": task, "presets": presets, "packages": packages, **found})
    return results


def time_task(presets, task, seconds, cores):
    """Measure a row: in this process on the first of `cores`, with two workers on the first two."""
    with tempfile.TemporaryDirectory() as logdir:  # bsuite records its episodes there
        pin(cores[:1])
        config = make_config(presets, task, "--parallel", "false", "--envs", "1", "--logdir", logdir)
        with contextlib.closing(make_envs(config, "train", 1)) as envs:
            row = {
                "observations": describe(envs.obs_space),
                "actions": describe(envs.act_space),
                "protocol": protocol(config, envs.obs_space),
                "steps_per_second": steps_per_second(envs, seconds),
                "reset_ms": 1e3 * np.median([clock(envs.reset) for _ in range(5)]),
            }
        pin(cores[:2])
        with contextlib.closing(make_envs(config.replace(parallel=True, envs=2), "train", 2)) as envs:
            return row | {"steps_per_second_2_workers": steps_per_second(envs, seconds)}


def steps_per_second(envs, seconds):
    """Return the agent steps per second of all `envs`, with random actions; resets take time but are not counted."""
    step = together(envs, draw_actions(envs.act_space, len(envs)))
    seconds_per_step(step, seconds / 5)
    return 1 / seconds_per_step(step, seconds)


def clock(function):
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def describe(group):
    """Describe {key: space} in words: `image 64x64x3, position 8`, `action discrete 18`."""

    def size(space):
        if isinstance(space, spaces.Box):
            return "x".join(map(str, space.shape))
        return "discrete " + "·".join(map(str, np.atleast_1d(getattr(space, "nvec", getattr(space, "n", None)))))

    return ", ".join(f"{key} {size(space)}" for key, space in group.items())


def protocol(config, obs_space):
    """Describe the protocol that presets set for the task: general keys, then those of the suite's own section."""
    words = {"repeat": config.action_repeat, "limit": config.time_limit or "the task's own"}
    if any(kind_of(space) == "image" for space in obs_space.values()):
        words["size"] = "x".join(map(str, config.size))
    suite = config.task.partition("_")[0]
    for name, section in config.to_dict().items():
        if isinstance(section, dict) and suite.startswith(name):  # `atari` is the section of atari100k too
            words |= section
    return ", ".join(f"{key} {str(value).lower()}" for key, value in words.items())


def speed_table(results):
    """Return the table of `speed`."""
    words = ("observations", "actions", "protocol")
    numbers = ("steps_per_second", "steps_per_second_2_workers", "reset_ms")
    rows = []
    for row in results:
        here = f"no: {row['failed']}" if "failed" in row else "yes"
        cells = [f"`{row['task']}`", row["presets"] or "none", *(row.get(key, "-") for key in words)]
        rows.append([*cells, row["packages"], here, *(digits(row.get(key, math.nan)) for key in numbers)])
    head = ("task", "presets", *words, "packages", "run here")
    return markdown((*head, "steps/s, one core", "steps/s, 2 workers on 2 cores", "reset, ms"), rows)


# ---------------------------------------------------------------------------
# Overhead


def overhead(args):
    """Measure the overhead of make_env and a worker over the bare environment, and the speedup of four workers."""
    cores = all_cores()
    walker = ["dmc_proprio", "dmc_walker_walk", "--action_repeat", "2"]
    races = {
        "Pong, repeat 4, two frames looked at and resized": (race_bare, bare_pong, ["atari", "atari_pong"]),
        "walker_walk from proprioception, repeat 2": (race_bare, bare_walker, walker),
        "walker_walk from pixels": (race_workers, 4, ["dmc_vision", "dmc_walker_walk"]),
    }
    results = []
    for name, (race, what, flags) in races.items():
        print(name, file=sys.stderr, flush=True)
        results.append({"race": name, **attempt(race, what, flags, args.seconds, cores, cores=cores[:1])})
    return results


def overhead_table(results):
    """Return the table of `overhead`."""
    rows = []
    for row in results:
        if "failed" in row:
            rows.append([row["race"], row["failed"], *["-"] * 4])
        for name, (low, middle, high) in row.get("ratio", {}).items():
            more = " to ".join(f"{100 * (ratio - 1):+.0f}" for ratio in (low, high))
            cells = [digits(row["us"][name]), digits(1e6 / row["us"][name])]
            rows.append([row["race"], name, *cells, f"{100 * (middle - 1):+.0f} % ({more})", f"{1 / middle:.2f}"])
    return markdown(("", "", "µs per agent step", "steps/s", "more time than the first", "times its steps/s"), rows)


# ---------------------------------------------------------------------------
# Checks


def checks(args):
    """Measure what it costs, in a step, to check what an environment gives."""
    results = []
    for name, flags in CHECKED.items():
        print(name, file=sys.stderr, flush=True)
        results.append({"task": name, **attempt(time_checks, flags, args.seconds, cores=all_cores()[:1])})
    return results


def time_checks(flags, seconds):
    """Measure a row: CPU seconds of an unchecked step, and of the checks alone."""
    with contextlib.closing(make_env(make_config(*flags, "--envs", "1"), "train", 0)) as env:
        checked = env
        while not isinstance(checked, Checked):
            checked = checked.env
        step = alone(env, draw_actions(env.act_space, 1))
        kept = [given(checked.env, step) for _ in range(50)][-1]
        start, steps = time.process_time(), 0
        while (elapsed := time.process_time() - start) < seconds:
            steps += step()
    times = timeit.repeat(lambda: checked._checked(kept), number=2000, repeat=40, timer=time.process_time)
    each = min(times) / 2000
    return {"step": elapsed / steps - each, "checks": each}


def given(env, step):
    """Take a step; return what `env`, which is a part of it, gave."""
    seen = []

    def noted(take):
        def give(*args):
            obs = take(*args)
            seen.append(dict(obs))  # which the wrappers around may change
            return obs

        return give

    with mock.patch.object(env, "step", noted(env.step)), mock.patch.object(env, "reset", noted(env.reset)):
        step()
    return seen[-1]


def checks_table(results):
    """Return the table of `checks`."""
    rows = []
    for row in results:
        step, each = (row.get(key, math.nan) for key in ("step", "checks"))
        rows.append([row["task"], digits(1e6 * step), digits(1e6 * each), row.get("failed", f"{each / step:.2%}")])
    return markdown(("", "µs of a step without them", "µs of the checks", "share"), rows)


# ---------------------------------------------------------------------------
# The random agent


def random(args):
    """Measure the returns of the random agent, to compare with published ones."""

    def run(row):
        presets, task, times = row
        print(f"{task} {presets}", file=sys.stderr, flush=True)
        return {"task": task, "presets": presets, **attempt(play, presets, task, times * args.episodes)}

    with concurrent.futures.ThreadPoolExecutor(args.processes) as threads:
        return list(threads.map(run, rows_of(RANDOM, args.tasks)))


def play(presets, task, episodes, seed=0):
    """Play episodes with the random agent; return a row of the table, with the published values."""
    config = make_config(presets, task, "--seed", str(seed), "--envs", "1", "--parallel", "false")
    with contextlib.closing(make_envs(config, "eval", 1)) as envs:
        spec, words = act_spec(envs.act_space), protocol(config, envs.obs_space)
        evaluation = Evaluation(envs, spec, step_layout(envs.obs_space, spec), episodes, "sample")
        played = evaluation.play(Random(spec, derive_seed(seed, 3)))
    mean, error = mean_and_error([episode.score for episode in played])
    lengths = [episode.length * config.action_repeat for episode in played]
    found = {"protocol": words, "episodes": episodes, "mean": mean, "error": error}
    found |= {"frames": float(np.mean(lengths)), "longest": max(lengths), **published(task)}
    if not task.startswith("crafter"):
        return found
    return found | crafter([{key: n > 0 for key, n in e.logs.items() if ACHIEVEMENT.match(key)} for e in played])


def crafter(unlocked):
    """Return the Crafter score of episodes [{achievement: bool}] in percent, and its standard error by a bootstrap."""
    names = sorted(set().union(*unlocked))
    if len(names) != ACHIEVEMENTS:
        raise UserError(f"Crafter has {ACHIEVEMENTS} achievements, but episodes log {len(names)}")
    done = np.array([[episode.get(name, False) for episode in unlocked] for name in names])  # (names, episodes)

    def score(picked):
        chosen = dict(zip(names, done[:, picked], strict=True))
        return crafter_score(chosen, np.zeros(len(picked)), [0])[0]

    count = len(unlocked)
    rng = np.random.default_rng(0)
    again = [score(rng.integers(count, size=count)) for _ in range(1000)]
    return {"score": float(score(np.arange(count))), "score_error": float(np.std(again))}


def published(task):
    """Return published values for a task, if any: {"published": return, "by": whom}, in Crafter also the score.

    In DMC that is the first point of PPO, which has hardly learned by then.
    """
    suite, _, name = task.partition("_")
    if suite.startswith("atari") and name in atari_scores():
        return {"published": atari_scores()[name][0], "by": "random"}
    if task == "crafter_reward":
        return {"published": CRAFTER_RETURN, "published_score": CRAFTER_SCORE, "by": "random"}
    for curve in published_curves("dmc_proprio", task):
        if curve.name.startswith("PPO"):
            return {"published": float(curve.value[0]), "by": f"PPO, first {curve.steps[0]:,.0f} frames"}
    return {}


def random_table(results):
    """Return the table of `random`."""
    head = ("task", "presets", "protocol", "episodes", "frames (longest)", "return", "published", "apart")
    rows = []
    for row in results:
        cells = [f"`{row['task']}`", row["presets"] or "none"]
        if "failed" in row:
            rows.append([*cells, row["failed"], *["-"] * 5])
            continue
        length = f"{row['frames']:,.0f} ({row['longest']:,})"
        rows.append([*cells, row["protocol"], str(row["episodes"]), length, *beside(row, "mean", "error", "published")])
        if "score" in row:
            cells[0] += ", score in %"
            rows.append([*cells, "", "", "", *beside(row, "score", "score_error", "published_score")])
    return markdown(head, rows)


def beside(row, value, error, known):
    """Return cells of a value and its standard error, of the published one, and of the standard errors between them."""
    cells = [f"{row[value]:.2f} ± {row[error]:.2f}"]
    if known not in row:
        return [*cells, "-", "-"]
    if row["by"] != "random":
        return [*cells, f"{row[known]:g} ({row['by']})", "-"]
    return [*cells, f"{row[known]:g}", f"{(row[value] - row[known]) / row[error]:+.1f} s.e." if row[error] else "-"]


COMMANDS = {  # {name: (measures, makes the table)}
    "speed": (speed, speed_table),
    "overhead": (overhead, overhead_table),
    "checks": (checks, checks_table),
    "random": (random, random_table),
}

if __name__ == "__main__":
    sys.exit(main())
