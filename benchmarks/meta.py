"""Spoil constants of the actor and see whether meta-gradients bring it back to what a tuned one reaches.

    python3 benchmarks/meta.py --out logdir/meta --write docs/motivation.md

Trains the small agent of quickstart on gym_CartPole-v1 with rates of actor and critic ten times too small and an
entropy's weight a hundred times too large, with and without learning these three. Finished runs are left alone, others
begin or go on. Prints a table, puts it between its markers in a page, and draws OUT.png.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/meta.py")  # before the first package is imported

from benchmarks.family import draw, eval_curve, is_done, lines, run_all
from benchmarks.pages import markdown, publish
from tools import Parser

# Evaluations draw actions, as acting does: the likeliest one tells nothing of an entropy that is too large.
SPOILED = """--video_pred_log false --eval_mode sample --meta.start 0.1 --actor.entropy 0.03
--meta.learn actor_lr critic_lr"""
WAYS = {  # name -> (folder, flags)
    "spoiled": ("spoiled", f"{SPOILED} --meta.rate 0"),
    "spoiled, learned": ("learned", f"{SPOILED} entropy"),
}
GOAL = 195


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go; the plot is OUT.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    return publish(parser, argv, compare, "meta")


def compare(args):
    """Run what is not finished; return the table."""
    places = {name: [args.out / f"{folder}_{seed}" for seed in range(args.seeds)] for name, (folder, _) in WAYS.items()}
    jobs = {
        places[name][seed]: ["--configs", "quickstart", *flags.split(), "--seed", str(seed)]
        for seed in range(args.seeds)
        for name, (_, flags) in WAYS.items()
    }
    run_all(jobs, args)
    rows, curves = [], {}
    for name, found in places.items():
        done = [logdir for logdir in found if is_done(logdir)]
        curves[name] = [eval_curve(logdir) for logdir in done]
        finals = [curve[1][-1] for curve in curves[name]]
        ends = [[end_of(logdir, key) for logdir in done] for key in ("meta/actor_factor", "meta/critic_factor")]
        entropy = [end_of(logdir, "meta/entropy") or 0.03 for logdir in done]
        cells = [[f"{value:.0f}" for value in finals], *([f"{value:.2f}" for value in row] for row in ends)]
        cells.append([f"{value:.1e}" for value in entropy])
        rows.append([name, *(", ".join(cell) for cell in cells), f"{sum(f >= GOAL for f in finals)} of {len(finals)}"])
    draw(args.out, curves, {"solved": GOAL}, "environment frames", "return of ten evaluation episodes")
    head = "constants", "final return, by seed", "factor of the actor's rate", "of the critic's", "entropy's weight"
    return markdown((*head, f"{GOAL} or more"), rows)


def end_of(logdir, key):
    """Return the last value of a metric, or None."""
    return next((row[key] for row in reversed(lines(logdir / "metrics.jsonl")) if key in row), None)


if __name__ == "__main__":
    sys.exit(main())
