"""Compare the versions of Dreamer on small tasks, and Plan2Explore with random acting in a maze.

python3 benchmarks/family.py learn --out logdir/family --write docs/family.md
python3 benchmarks/family.py learn_images --out logdir/family_images --write docs/family.md
python3 benchmarks/family.py explore --out logdir/explore --write docs/family.md

Runs dreamer.py for every version and seed: finished runs are left alone, others begin or go on. Prints a table, puts
it between its markers in a page, and draws OUT.png.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/family.py")  # before the first package is imported

import numpy as np

from agents.random import Random
from benchmarks import goal
from benchmarks.pages import markdown, mean_and_error, publish
from envs import make_envs
from envs.dummy import Maze
from specs import act_spec, step_layout
from tools import Parser, UserError, derive_seed
from training.config import CONFIGS, load_config
from training.evaluation import Evaluation

ROOT = pathlib.Path(__file__).resolve().parent.parent

VERSIONS = {"planet": "PlaNet", "dreamerv1": "Dreamer", "dreamerv2": "DreamerV2"}
VERSIONS |= {"dreamerv3_2023": "DreamerV3, 2023", "": "DreamerV3"}
# At the size of quickstart, so that a run takes minutes, with rates as much faster as there. docs/family.md says why.
SHARED = """--video_pred_log false --train_ratio 64 --opt.lr 1e-3 --model_opt.lr 1e-3
--actor_opt.lr 2e-4 --critic_opt.lr 5e-4 --cem.candidates 50 --cem.elites 8 --cem.iterations 4"""
LEARN = {  # flags of all versions, and of some
    "all": f"""{SHARED} --task gym_Pendulum-v1 --action_repeat 2 --steps 16000 --batch_size 8 --batch_length 32
    --horizon 40 --imag_horizon 15 --eval_every 2000 --log_every 1000""",
    "planet": """--action_repeat 4 --steps 20000 --train_ratio 128 --free_nats 0.3 --loss_scales.rec 100
    --loss_scales.reward 1""",
    "dreamerv1": "--steps 24000 --free_nats 1 --loss_scales.rec 10 --actor.entropy 1",
    "dreamerv2": "--steps 24000 --train_ratio 128 --loss_scales.rec 10",
}
IMAGES = {
    "all": f"""{SHARED} --task custom_benchmarks.goal:Goal --steps 2400 --batch_size 16 --batch_length 8
    --horizon 20 --eval_every 400 --eval_episode_num 20
    --encoder.depth 4 --decoder.depth 4""",
}
MISSING = "-"  # what is not finished
EPISODES = 20  # of each of the baselines
EXPLORERS = {"random": "--expl_behavior random --train_ratio 0", "Plan2Explore": "--expl_behavior plan2explore"}
EXPLORE = """--task dummy_maze --steps 4000 --eval_every 0 --video_pred_log false --compile true --disag_target embed
--disag_log true --disag_layers 2 --disag_units 64 --disag_models 5 --loss_scales.rec 10 --horizon 33
--actor.entropy 1e-2"""


class Still(Random):
    """An agent whose actions are all zeros."""

    def act(self, obs, carry=(), mode="sample"):
        return self.act_spec.zeros(len(obs["is_first"])), (), None


class SwingUp(Random):
    """A hand-made controller of Pendulum-v1: pumps energy until the pole is near upright, and balances it there."""

    def act(self, obs, carry=(), mode="sample"):
        cos, sin, speed = obs["state"].T
        pump = np.where(speed < 0, -1, 1) * 3 * (5 - 5 * cos - speed**2 / 6)  # toward the energy of standing upright
        torque = np.where(cos > 0.8, -10 * np.arctan2(sin, cos) - 2 * speed, pump)
        return {"action": np.clip(torque / 2, -1, 1).astype(np.float32)[:, None]}, (), None


class Seeing(Random):
    """A hand-made player of benchmarks/goal.py, which reads the picture."""

    def act(self, obs, carry=(), mode="sample"):
        mark, place = goal.places(obs["image"])
        return {"action": np.clip((mark - place) * 5, -1, 1).astype(np.float32)[:, None]}, (), None


LEARN_LEVELS = {"random": Random, "no action": Still, "hand-made": SwingUp}
IMAGE_LEVELS = {"random": Random, "no action": Still, "hand-made": Seeing}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go; the plot is OUT.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    return publish(parser, argv, lambda args: COMMANDS[args.command](args))


def run_all(jobs, args):
    """Run dreamer.py for each {logdir: flags} that is not finished, unless `args` say not to."""

    def run(job):
        logdir, flags = job
        if args.finished or is_done(logdir):
            return
        logdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "dreamer.py"), *flags, "--logdir", str(logdir)]
        with open(logdir / "output.txt", "a") as output:
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        if code:
            raise UserError(f"{logdir}/output.txt: exit status {code}")
        (logdir / "done").touch()

    with concurrent.futures.ThreadPoolExecutor(args.processes) as threads:
        list(threads.map(run, jobs.items()))


def is_done(logdir):
    """True if a run is finished."""
    return (logdir / "done").exists()


def lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------
# Learning


def learn(args):
    """Compare the returns of every version with those of agents that do not learn."""
    logdirs = run_versions(args, LEARN)
    levels = {name: mean_and_error(play(agent, LEARN)) for name, agent in LEARN_LEVELS.items()}
    rows, curves = [], {}
    for version, name in VERSIONS.items():
        curves[name] = [eval_curve(logdir) for logdir in filter(is_done, logdirs[version])]
        finals = {logdir: eval_curve(logdir)[1][-1] for logdir in filter(is_done, logdirs[version])}
        each = ", ".join(f"{finals[logdir]:.0f}" if logdir in finals else MISSING for logdir in logdirs[version])
        rows.append([*described(version, finals), each, *compared(list(finals.values()), levels["random"])])
    head = ("version", "preset", "frames", "updates", "final return, by seed", "mean ± s.e.", "s.e. above random")
    return tell(args, head, rows, curves, levels, "return of ten evaluation episodes")


def learn_images(args):
    """Compare one run of every version from images with agents that do not learn, by the last evaluation's episodes."""
    args.seeds = 1
    logdirs = run_versions(args, IMAGES)
    levels = {name: mean_and_error(play(agent, IMAGES)) for name, agent in IMAGE_LEVELS.items()}
    rows, curves = [], {}
    for version, name in VERSIONS.items():
        done = list(filter(is_done, logdirs[version]))
        curves[name] = [eval_curve(logdir) for logdir in done]
        scores = [score for logdir in done for score in final_scores(logdir)]
        rows.append([*described(version, done), *compared(scores, levels["random"], ".1f")])
    head = ("version", "preset", "frames", "updates", "final return ± s.e.", "s.e. above random")
    return tell(args, head, rows, curves, levels, f"return of {EPISODES} evaluation episodes", ".1f")


def run_versions(args, flags):
    """Run every version and seed that is not finished; return {version: [logdir of each seed]}."""
    logdirs = {
        version: [args.out / f"{version or 'dreamerv3'}_{seed}" for seed in range(args.seeds)] for version in VERSIONS
    }
    jobs = {
        logdirs[version][seed]: ["--configs", *version.split(), "quickstart", *settings(version, flags, seed)]
        for seed in range(args.seeds)  # one of each version comes first
        for version in VERSIONS
    }
    run_all(jobs, args)
    return logdirs


def settings(version, flags, seed=0):
    """Return the flags of a version's run, to append to its presets: `flags` is LEARN or IMAGES."""
    return [*flags["all"].split(), *flags.get(version, "").split(), "--seed", str(seed)]


def play(agent, flags):
    """Return the returns of EPISODES episodes of a task, with one of the levels as the agent."""
    config = load_config(["--configs", "quickstart", *flags["all"].split()], CONFIGS)
    with contextlib.closing(make_envs(config, "eval", 1)) as envs:
        spec = act_spec(envs.act_space)
        evaluation = Evaluation(envs, spec, step_layout(envs.obs_space, spec), EPISODES, "sample")
        return [episode.score for episode in evaluation.play(agent(spec, derive_seed(config.seed, 3)))]


def described(version, done):
    """Return the first cells of a row: a version, its preset, and the frames and updates of its finished runs."""
    ends = [next(row for row in reversed(lines(logdir / "metrics.jsonl")) if "updates" in row) for logdir in done]
    frames, updates = (f"{ends[0][key]:,.0f}" if ends else MISSING for key in ("step", "updates"))
    return [VERSIONS[version], f"`{version}`" if version else "", frames, updates]


def compared(returns, chance, form=".0f"):
    """Return the cells of a mean with its standard error, and of how many such it is above `chance`, such a pair."""
    if len(returns) < 2:
        return [f"{returns[0]:{form}}" if returns else MISSING, MISSING]
    mean, error = mean_and_error(returns)
    above = (mean - chance[0]) / math.hypot(error, chance[1])
    return [f"{mean:{form}} ± {error:{form}}", f"{above:+.1f}"]


def tell(args, head, rows, curves, levels, ylabel, form=".0f"):
    """Draw the curves; return the table and a note of the levels {name: (mean, error)}."""
    draw(args.out, curves, {name: mean for name, (mean, _) in levels.items()}, "environment frames", ylabel)
    note = ", ".join(f"{name} {mean:{form}} ± {error:{form}}" for name, (mean, error) in levels.items())
    return f"{markdown(head, rows)}\n\nWithout learning, over {EPISODES} episodes: {note}."


def eval_curve(logdir):
    """Return the frames of the evaluations and their mean returns."""
    curve = {row["step"]: row["eval_return"] for row in lines(logdir / "metrics.jsonl") if "eval_return" in row}
    return list(curve), list(curve.values())  # what a resumed run repeated counts once


def final_scores(logdir):
    """Return the returns of the last evaluation's episodes."""
    rows = [row for row in lines(logdir / "scores.jsonl") if row["mode"] == "eval"]
    return [row["score"] for row in rows if row["step"] == rows[-1]["step"]][-EPISODES:]


# ---------------------------------------------------------------------------
# Exploring


def explore(args):
    """Compare how many cells of the maze are visited by curiosity and at random."""
    logdirs = {name: [args.out / f"{name.lower()}_{seed}" for seed in range(args.seeds)] for name in EXPLORERS}
    jobs = {
        logdir: ["--configs", "quickstart", *EXPLORE.split(), *EXPLORERS[name].split(), "--seed", str(seed)]
        for name, found in logdirs.items()
        for seed, logdir in enumerate(found)
    }
    run_all(jobs, args)
    rows, curves = [], {}
    for name, found in logdirs.items():
        curves[name] = [cell_curve(logdir) for logdir in found]
        cells = [seen[-1] for _, seen in curves[name]]
        mean, error = mean_and_error(cells)
        rows.append([name, ", ".join(f"{count:.0f}" for count in cells), f"{mean:.0f} ± {error:.0f}"])
    chance, curious = (statistics.mean(seen[-1] for _, seen in curves[name]) for name in EXPLORERS)
    draw(args.out, curves, {"all cells": Maze.cells}, "environment frames", "distinct cells visited")
    table = markdown(("collected by", "cells visited, by seed", "mean ± s.e."), rows)
    return f"{table}\n\nRatio: {curious / chance:.2f}, of {Maze.cells} cells."


def cell_curve(logdir):
    """Return the frames at the ends of episodes and how many cells had been visited by then."""
    rows = [row for row in lines(logdir / "scores.jsonl") if row["mode"] == "train"]
    return [row["step"] for row in rows], [row["log_cells"] for row in rows]


# ---------------------------------------------------------------------------
# The plot


def draw(out, curves, levels, xlabel, ylabel):
    """Draw means over seeds with the range between the seeds; levels: {name: height} of dotted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, seeds in curves.items():
        if not seeds:
            continue
        grid = np.linspace(max(steps[0] for steps, _ in seeds), min(steps[-1] for steps, _ in seeds), 100)
        values = np.stack([np.interp(grid, steps, found) for steps, found in seeds])
        (line,) = axes.plot(grid, values.mean(0), label=name)
        axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    for place, (name, height) in enumerate(levels.items()):  # side by side, as some are level with each other
        axes.axhline(height, color="gray", linestyle=":")
        axes.annotate(
            name,
            (0.99 - 0.12 * place, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="gray",
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    most = max(map(len, curves.values()))
    if most > 1:
        axes.set_title(f"lines: means of {most} seeds; bands: from the lowest to the highest", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.5)
    if most:
        figure.legend(loc="outside lower center", ncols=5, edgecolor="none")
    figure.savefig(f"{out}.png", dpi=130)


COMMANDS = {"learn": learn, "learn_images": learn_images, "explore": explore}

if __name__ == "__main__":
    sys.exit(main())
