"""Compare the versions of Dreamer on one small task, and Plan2Explore with random acting in a maze.

python3 benchmarks/family.py learn --out logdir/family --write docs/family.md
python3 benchmarks/family.py explore --out logdir/explore --write docs/family.md

Runs dreamer.py for every version and seed (existing ones are not run again), prints a table, puts it
between its markers in a page, and draws OUT.png.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from agents.random import Random
from benchmarks.pages import markdown, mean_and_error, put_between, write_between
from envs import make_envs
from envs.dummy import Maze
from specs import act_spec, step_layout
from tools import Parser, UserError, derive_seed
from training.config import CONFIGS, load_config
from training.evaluation import Evaluation

ROOT = pathlib.Path(__file__).resolve().parent.parent

VERSIONS = {"planet": "PlaNet", "dreamerv1": "Dreamer", "dreamerv2": "DreamerV2"}
VERSIONS |= {"dreamerv3_2023": "DreamerV3, 2023", "": "DreamerV3"}
# All at the size of quickstart, so that a run takes minutes, with rates as much faster as there. Four numbers that are
# easily predicted, of which hundredths matter, hardly contribute to the loss at unit variance, beside the KL: so they
# are weighted as with a deviation of 0.1, and the reward ten times as much as one of unit variance.
LEARN = """--task dmc_cartpole_balance --encoder.cnn_keys $^ --action_repeat 8 --steps 24000 --train_ratio 256
--compile true --eval_every 4000 --log_every 2000 --video_pred_log false --horizon 33 --free_nats 1
--loss_scales.rec 100 --loss_scales.reward 10 --actor.max_std 1 --model_opt.lr 1e-3 --actor_opt.lr 2e-4
--critic_opt.lr 5e-4 --cem.candidates 100 --cem.elites 10 --cem.iterations 5"""
# Dreamer climbs through its model's gradient with a policy that saturates: it needs more data, longer windows, as it
# stores no latents, its own wide start, and smaller steps. Its preset's batch of 50 would leave a third of the updates.
OWN = {
    "dreamerv1": """--steps 48000 --batch_size 16 --batch_length 32 --prefill 1000 --actor.max_std 5
    --actor_opt.lr 1e-4 --critic_opt.lr 2e-4"""
}
EPISODES = 40  # of each of BASELINES
EXPLORERS = {"random": "--expl_behavior random --train_ratio 0", "Plan2Explore": "--expl_behavior plan2explore"}
EXPLORE = """--task dummy_maze --steps 4000 --eval_every 0 --video_pred_log false --compile true --disag_target embed
--disag_log true --disag_layers 2 --disag_units 64 --disag_models 5 --loss_scales.rec 10 --horizon 33
--actor.entropy 1e-2"""


class Still(Random):
    """An agent whose actions are all zeros."""

    def act(self, obs, carry=(), mode="sample"):
        return self.act_spec.zeros(len(obs["is_first"])), (), None


BASELINES = {"random": Random, "no action": Still}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go; the plot is OUT.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--write", metavar="PAGE", help="put the table between its markers in this file")
    try:
        args = parser.parse_args(argv)
        if args.write:  # so that a missing marker is reported before the runs
            put_between(pathlib.Path(args.write).read_text(encoding="utf-8"), args.command, "")
        text = COMMANDS[args.command](args)
        print(text)
        if args.write:
            write_between(args.write, args.command, text)
    except (UserError, OSError) as error:
        print(f"family.py: {error}", file=sys.stderr)
        return 2
    return 0


def run_all(jobs, processes):
    """Run dreamer.py for each {logdir: flags} that has not run yet."""

    def run(job):
        logdir, flags = job
        done = logdir / "done"
        if done.exists():
            return
        logdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "dreamer.py"), *flags, "--logdir", str(logdir)]
        with open(logdir / "output.txt", "w") as output:
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        if code:
            raise UserError(f"{logdir}/output.txt: exit status {code}")
        done.touch()

    with concurrent.futures.ThreadPoolExecutor(processes) as threads:
        list(threads.map(run, jobs.items()))


def lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------
# Learning


def learn(args):
    """Compare the returns of every version with those of a random agent and of one that does nothing."""
    logdirs = {
        version: [args.out / f"{version or 'dreamerv3'}_{seed}" for seed in range(args.seeds)] for version in VERSIONS
    }
    jobs = {
        logdir: ["--configs", *version.split(), "quickstart", *settings(version), "--seed", str(seed)]
        for version, found in logdirs.items()
        for seed, logdir in enumerate(found)
    }
    run_all(jobs, args.processes)
    levels = {name: mean_and_error(play(agent)) for name, agent in BASELINES.items()}
    chance, chance_error = levels["random"]
    rows, curves = [], {}
    for version, name in VERSIONS.items():
        evals = curves[name] = [eval_curve(logdir) for logdir in logdirs[version]]
        final, error = mean_and_error([returns[-1] for _, returns in evals])
        above = (final - chance) / (error**2 + chance_error**2) ** 0.5
        each = ", ".join(f"{returns[-1]:.0f}" for _, returns in evals)
        frames = f"{evals[0][0][-1]:,}"
        cells = [each, f"{final:.0f} ± {error:.0f}", f"{above:+.1f}"]
        rows.append([name, f"`{version}`" if version else "", frames, *cells])
    heights = {name: mean for name, (mean, _) in levels.items()}
    draw(args.out, curves, heights, "environment frames", "return of ten evaluation episodes")
    head = ("version", "preset", "frames", "final return, by seed", "mean ± s.e.", "s.e. above random")
    note = ", ".join(f"{name} {mean:.0f} ± {error:.0f}" for name, (mean, error) in levels.items())
    return f"{markdown(head, rows)}\n\nWithout learning, over {EPISODES} episodes: {note}."


def settings(version):
    """Return the flags of a version's runs, to append to its presets."""
    return [*LEARN.split(), *OWN.get(version, "").split()]


def play(agent):
    """Return the returns of EPISODES episodes of the task, with one of BASELINES as the agent."""
    config = load_config(["--configs", "quickstart", *LEARN.split()], CONFIGS)
    with contextlib.closing(make_envs(config, "eval", 1)) as envs:
        spec = act_spec(envs.act_space)
        evaluation = Evaluation(envs, spec, step_layout(envs.obs_space, spec), EPISODES, "sample")
        return [episode.score for episode in evaluation.play(agent(spec, derive_seed(config.seed, 3)))]


def eval_curve(logdir):
    """Return the frames of the evaluations and their mean returns."""
    rows = [row for row in lines(logdir / "metrics.jsonl") if "eval_return" in row]
    return [row["step"] for row in rows], [row["eval_return"] for row in rows]


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
    run_all(jobs, args.processes)
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
        grid = np.linspace(max(steps[0] for steps, _ in seeds), min(steps[-1] for steps, _ in seeds), 100)
        values = np.stack([np.interp(grid, steps, found) for steps, found in seeds])
        (line,) = axes.plot(grid, values.mean(0), label=name)
        axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    for name, height in levels.items():
        axes.axhline(height, color="gray", linestyle=":")
        axes.annotate(name, (0.99, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    most = max(map(len, curves.values()))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f"lines: means of {most} seeds; bands: from the lowest to the highest", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(loc="upper left", edgecolor="none", framealpha=1)
    figure.savefig(f"{out}.png", dpi=130)


COMMANDS = {"learn": learn, "explore": explore}

if __name__ == "__main__":
    sys.exit(main())
