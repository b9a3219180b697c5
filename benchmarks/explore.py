"""Compare the explorers in a maze: cells found, empowerment of where they go, and whether a television holds them.

python3 benchmarks/explore.py cells --out logdir/explore --plot --write docs/motivation.md
python3 benchmarks/explore.py empowerment --out logdir/explore_empowerment --write docs/motivation.md
python3 benchmarks/explore.py television --out logdir/explore_tv --write docs/motivation.md

Runs dreamer.py for every explorer and seed, one after the other: finished runs are left alone, others begin or go on.
Prints a table, puts it between its markers in a page, and draws OUT.png.
"""

import argparse
import functools
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/explore.py")  # before the first package is imported

import numpy as np

from benchmarks.family import MISSING, cell_curve, draw, is_done, lines, run_all
from benchmarks.pages import markdown, mean_and_error, publish
from envs.dummy import MAZES, Maze
from tools import Parser

# At the size of quickstart. Positions weigh ten times as much: cells are a ninth apart. 33 steps are half an episode.
BASE = """--steps 4000 --eval_every 0 --eval_episode_num 0 --video_pred_log false --compile true --loss_scales.rec 10
--horizon 33 --actor.entropy 1e-2"""
# A bonus that is divided by the deviation of its discounted sums is about a tenth; ten times that is about 1, the least
# scale of DreamerV3's returns. Plan2Explore is as in docs/family.md.
NOVEL = "--expl_intr_scale 10"
EXPLORERS = {  # name: flags
    "random": "--expl_behavior random --train_ratio 0",
    "Plan2Explore": """--expl_behavior plan2explore --disag_target embed --disag_log true --disag_layers 2
    --disag_units 64 --disag_models 5""",
    "ICM": f"--expl_behavior icm --icm.width 64 --icm.features 32 {NOVEL}",
    "RND": f"--expl_behavior rnd --rnd.width 64 --rnd.features 32 {NOVEL}",
    # What a step leads to is told from what other steps do only where places are known to less than a cell.
    "empowerment": f"""--expl_behavior empowerment --empowerment.width 64 --empowerment.anneal 300
    --loss_scales.rec 100 {NOVEL}""",
}
# Open floor and a wall differ by 0.22 nats: the estimate has to come nearer than that to what is true, and soon; and a
# better place is a few steps away.
PLACES = "--opt.lr 1e-3 --horizon 10"
TELEVISIONS = {"maze_tv": "changes by itself", "maze_remote": "is controlled"}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go; the plot is OUT.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, one with a television (default: 3)")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    parser.add_argument("--plot", action="store_true", help="draw OUT.png")
    return publish(parser, argv, lambda args: COMMANDS[args.command](args), processes=1)


def flags_of(name, task, seed, more=""):
    """Return the flags of a run: an explorer's name, a task and a seed; more: flags of the command's own."""
    flags = f"{BASE} {EXPLORERS[name]} {more}".split()
    return ["--configs", "quickstart", "--task", task, *flags, "--seed", str(seed)]


def run(args, names, tasks=("dummy_maze",), seeds=None, more=""):
    """Run what is not finished, the first seed of each first; return {(name, task): [logdir of each finished run]}."""
    logdirs = {
        (name, task, seed): args.out / f"{name.lower()}_{task.removeprefix('dummy_')}_{seed}"
        for seed in range(seeds or args.seeds)
        for task in tasks
        for name in names
    }
    run_all({logdir: flags_of(*job, more) for job, logdir in logdirs.items()}, args)
    return {
        (name, task): [logdir for job, logdir in logdirs.items() if job[:2] == (name, task) and is_done(logdir)]
        for name in names
        for task in tasks
    }


# ---------------------------------------------------------------------------
# Commands


def cells(args):
    """Tell how many cells of the maze each explorer finds in 4,000 steps, and how often the random one's."""
    logdirs = run(args, EXPLORERS)
    curves = {name: [cell_curve(logdir) for logdir in logdirs[name, "dummy_maze"]] for name in EXPLORERS}
    counts = {name: [seen[-1] for _, seen in found] for name, found in curves.items()}
    chance = np.mean(counts["random"]) if counts["random"] else math.nan
    rows = []
    for name, found in counts.items():
        ratio = f"{np.mean(found) / chance:.2f}" if found and chance == chance else MISSING
        rows.append([name, ", ".join(f"{count:.0f}" for count in found) or MISSING, told(found, ".0f"), ratio])
    if args.plot:
        draw(args.out, curves, {"all cells": Maze.cells}, "environment frames", "distinct cells visited")
    head = ("collected by", f"cells of {Maze.cells}, by seed", "mean ± s.e.", "times random")
    return markdown(head, rows)


def empowerment(args):
    """Compare the true empowerment of the cells where an empowered agent and a random one are, in standard errors."""
    task = "dummy_maze_stay"
    logdirs = run(args, ("random", "empowerment"), (task,), more=PLACES)
    means = {name: [true_empowerment(logdir, task) for logdir in found] for (name, _), found in logdirs.items()}
    rows = [
        [name, ", ".join(f"{x:.3f}" for x in found) or MISSING, told(found, ".3f")] for name, found in means.items()
    ]
    table = markdown(("collected by", "mean true empowerment, by seed", "mean ± s.e."), rows)
    if min(map(len, means.values())) < 2:
        return table
    (random, its_error), (mean, error) = (mean_and_error(means[name]) for name in ("random", "empowerment"))
    apart = (mean - random) / math.hypot(error, its_error)
    return f"{table}\n\nThe difference is {apart:.1f} standard errors. Open floor has {math.log(5):.3f} nats."


def television(args):
    """Tell which explorers stay in front of a television: the share of all steps that they spend there."""
    tasks = [f"dummy_{name}" for name in TELEVISIONS]
    logdirs = run(args, EXPLORERS, tasks, seeds=1)
    rows = []
    for name in EXPLORERS:
        found = [logdirs[name, task] for task in tasks]
        rows.append([name, *(cell for runs in found for cell in (watched(runs), found_cells(runs)))])
    head = ["collected by"]
    for about in TELEVISIONS.values():
        head += [f"share of steps at one that {about}", "cells"]
    return markdown(head, rows)


def told(values, form):
    """Return a mean with its standard error, as far as there are values."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else MISSING
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}}"


def watched(runs):
    """Return the share of steps before the television in the last episode's count of the only run."""
    return f"{trained(runs[0])[-1]['log_tv']:.1%}" if runs else MISSING


def found_cells(runs):
    """Return the number of cells that the only run found."""
    return f"{cell_curve(runs[0])[1][-1]:.0f}" if runs else MISSING


def trained(logdir):
    """Return the rows of the training episodes."""
    return [row for row in lines(logdir / "scores.jsonl") if row["mode"] == "train"]


def true_empowerment(logdir, task, steps=1):
    """Return the mean over all steps of a run of the logarithm of how many cells could be reached from where it was."""
    maze = MAZES[task.removeprefix("dummy_")](np.random.default_rng(0), (64, 64))
    reach = functools.cache(lambda place: math.log(maze.reachable(place, steps)))
    found = []
    for path in sorted((logdir / "train_eps").glob("*.npz")):
        with np.load(path) as episode:
            places = np.rint((episode["position"] + 1) / 2 * (maze.size - 1)).astype(int)
        found += [reach(tuple(place)) for place in places[1:].tolist()]  # the start is nobody's choice
    return float(np.mean(found))


COMMANDS = {"cells": cells, "empowerment": empowerment, "television": television}

if __name__ == "__main__":
    sys.exit(main())
