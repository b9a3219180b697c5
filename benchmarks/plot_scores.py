"""Plot learning curves of runs beside the published ones; write them as a table.

python3 benchmarks/plot_scores.py 'logdir/walker_*' 'mine=logdir/cheetah_*' --out scores

Reads config.yaml and scores.jsonl of each logdir, or a file of recorded runs (benchmarks/data/authors_cartpole.json),
and writes scores.png and scores.csv. Runs whose configurations differ in nothing but seed and logdir are the seeds of
one curve; with the same name (or the same settings) on several tasks they also go into their group's aggregate. Scores
are those of training episodes, as in the published curves: averaged in equal bins of environment steps (action repeat
counted), a bin ends where its point is drawn.
"""

import csv
import itertools
import math
import pathlib
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/plot_scores.py")  # before the first package is imported

import numpy as np

from benchmarks.scores import (
    METHODS,
    STATISTICS,
    Curve,
    atari_scores,
    bin_means,
    crafter_score,
    group_of,
    human_normalized,
    interval,
    mean_and_std,
    name_runs,
    published,
    published_curves,
    read_runs,
    settings,
    warn,
)
from tools import Parser, UserError
from training.config import CONFIGS, load_presets

STEPS = "environment steps (action repeat counted)"
RETURN, NORMALIZED, CRAFTER = "return", "human-normalized return", "Crafter score (%)"
# Colors of Okabe and Ito, without the yellow that is too faint for lines. Ours also differ in dashes and markers.
OURS = (("#0072B2", "#D55E00", "#009E73"), ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v"))
PUBLISHED = {  # {method: (color, dashes)}
    "dreamerv3": ("#000000", (0, (4, 1.5))),
    "ppo_fixhp": ("#E69F00", (0, (1, 1))),
    "d4pg": ("#56B4E9", (0, (4, 1, 1, 1))),
    "drqv2": ("#CC79A7", (0, (7, 2))),
}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("logdirs", nargs="+", metavar="[NAME=]GLOB", help="logdirs, as patterns; NAME labels the curve")
    parser.add_argument("--out", default="scores", help="writes OUT.png and OUT.csv (default: scores)")
    parser.add_argument("--bin", type=int, default=0, help="environment steps of a bin; 0 for those of the published")
    try:
        args = parser.parse_args(argv)
        if args.bin < 0:
            raise UserError(f"--bin: expected at least 0, got {args.bin}")
        import_extras()
        panels, notes = make_panels(read_runs(args.logdirs), args.bin)
        written = write(panels, notes, args.out)
    except UserError as error:
        print(f"plot_scores.py: {error}", file=sys.stderr)
        return 2
    for (name, unit), curves in panels.items():
        print(f"{name}, {unit}:")
        for curve in curves:
            print(f"  {curve.name}: {last_point(curve)}")
    print(f"written: {' '.join(written)}")
    return 0


def import_extras():
    """Raise UserError unless matplotlib and SciPy are installed."""
    try:
        import matplotlib
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements/plots.txt") from None
    matplotlib.use("Agg")  # no screen


# ---------------------------------------------------------------------------
# Panels


def make_panels(runs, width=0):
    """Return {(title, unit): [Curve]} of each task and of each group of several tasks, and notes for the caption.

    width: environment steps of a bin; 0 takes the published bins, or else what `bin_width` finds.
    """
    named = name_runs(runs)
    panels, aggregates, notes = {}, {}, []
    for group in dict.fromkeys(group_of(run.config) for run in runs):
        own = [run for run in runs if group_of(run.config) == group]
        size = width or bin_width(group, own)
        ends = size * np.arange(1, math.ceil(max(run.steps.max() for run in own) / size) + 1)
        others = {run.config["task"]: published_curves(group, run.config["task"]) for run in own}
        rows = {}  # {name: {task: (seeds, bins)}}
        for task, name in itertools.product(others, named):
            seeds = named[name].get((group, task), [])
            if seeds:
                rows.setdefault(name, {})[task] = np.array(
                    [bin_means(run.steps, run.scores, size, len(ends)) for run in seeds]
                )
                curve = seed_curve(name, ends, rows[name][task])
                panels.setdefault((title(group, task), RETURN), []).append(curve)
            if any(run.unlocked for run in seeds):
                scores = np.array([crafter_score(run.unlocked, run.steps, ends) for run in seeds])
                panels.setdefault((title(group, task), CRAFTER), []).append(seed_curve(name, ends, scores))
        for task, curves in others.items():
            panels[title(group, task), RETURN] += curves
        aggregates |= group_panels(group, ends, rows, others)
        notes += group_notes(group, size, own, any(others.values()))
    return panels | aggregates, [*notes, *(aggregate_notes() if aggregates else [])]


def title(group, task):
    """Return the heading of a task's panel, with the kind of observations if that matters."""
    return f"{task} ({group[4:]})" if group.startswith("dmc_") else task


def seed_curve(name, steps, rows):
    """Return the Curve of (seeds, bins): their mean, and one standard deviation to either side."""
    mean, std = mean_and_std(rows)
    return Curve(name, steps, mean, mean - std, mean + std, (~np.isnan(rows)).sum(0))


def bin_width(group, runs):
    """Return the environment steps of a bin: as published, or a 25th of the longest run, or what leaves none empty."""
    methods = published().get(group, {}).values()
    if methods:
        return next(iter(methods))["env_steps"][0]
    gaps = [np.diff(run.steps, prepend=0).max() for run in runs]
    return math.ceil(max(1, *gaps, max(run.steps.max() for run in runs) / 25))


def group_panels(group, ends, rows, others):
    """Return the aggregates of a group over the tasks that all its curves have: {(title, unit): [Curve]}.

    ends: (bins) environment steps; rows: {name: {task: (seeds, bins)}}; others: {task: [published Curve]}.
    """
    suite = group.removesuffix("100k").partition("_")[0]
    if len(others) < 2:
        return {}
    if suite not in ("dmc", "atari"):
        warn(f"no aggregate of {group}: returns of its tasks have no scale in common")
        return {}
    known = {task for task in others if suite != "atari" or task.removeprefix("atari_") in atari_scores()}
    if known < set(others):
        warn(f"aggregate of {group}: no human score is known of {', '.join(sorted({*others} - known))}")
    tasks = [task for task in others if task in known and all(task in own for own in rows.values())]
    if len(tasks) < 2:
        warn(f"no aggregate of {group}: it takes two tasks that every curve has")
        return {}
    if left := sorted(known - set(tasks)):
        warn(f"aggregate of {group}: left out, for not every curve has them: {', '.join(left)}")
    scale = human_normalized if suite == "atari" else lambda task, scores: scores
    unit = NORMALIZED if suite == "atari" else RETURN
    common = set.intersection(*({curve.name for curve in others[task]} for task in tasks))
    panels = {}
    for what, statistic in STATISTICS.items():
        lines = panels[f"{group}: {what} of {len(tasks)} tasks", unit] = []
        for name, own in rows.items():
            scores = [scale(task, own[task]) for task in tasks]
            columns = [[seeds[~np.isnan(seeds[:, i]), i] for seeds in scores] for i in range(len(ends))]
            points = [aggregate(statistic, column) for column in columns]
            runs = np.array([sum(map(len, column)) for column in columns])
            lines.append(Curve(name, ends, *np.array(points).T, runs))
        # Only means per task are published, from which neither IQM over runs nor intervals can be computed.
        for name in sorted(common) if what != "IQM" else ():
            found = [(task, next(curve for curve in others[task] if curve.name == name)) for task in tasks]
            value = statistic(*(scale(task, curve.value)[:, None] for task, curve in found))
            none = np.full(len(value), np.nan)
            runs = sum(curve.runs for _, curve in found)
            lines.append(Curve(name, found[0][1].steps, value, none, none, runs, True))
    return panels


def aggregate(statistic, tasks):
    """Return value, low and high of a statistic of [(seeds)]; nan where a task has no data."""
    return (statistic(*tasks), *interval(statistic, tasks)) if all(map(len, tasks)) else (np.nan,) * 3


def group_notes(group, size, runs, compared):
    """Yield the caption's notes about a group."""
    yield f"{group}: bins of {size:,.0f} environment steps."
    if group.startswith("dmc") and compared:
        ours = sorted({describe(run.config) for run in runs})
        yield (
            "Published dmc curves were made with action repeat 2, train ratio 512 and size12m, and compare under "
            f"those settings only; here: {'; '.join(ours)}."
        )


def aggregate_notes():
    """Yield the caption's notes about aggregates."""
    yield (
        "Aggregates: bands are 95% intervals of a bootstrap over seeds, within each task (none with one seed). "
        "IQM: interquartile mean over all runs; none of published curves, of which only the means are at hand."
    )


def describe(config):
    """Describe action repeat, train ratio and size of a configuration in words."""
    repeat, ratio = config.get("action_repeat", "?"), config.get("train_ratio", math.nan)
    return f"action repeat {repeat}, train ratio {ratio:g}, {size_name(config)}"


def size_name(config):
    """Return the preset of configs.yaml, size1m to size400m, that a configuration has, or another description."""
    ours = settings(config)
    for name, preset in load_presets(CONFIGS).items():
        if name.startswith("size") and all(ours.get(key) == value for key, value in preset.items()):
            return name
    return f"deter {ours.get('rssm.deter')}"


def last_point(curve):
    """Describe the end of a curve in words."""
    known = np.flatnonzero(~np.isnan(curve.value))
    if not len(known):
        return "no data"
    i = known[-1]
    spread = "" if np.isnan(curve.low[i]) else f" [{curve.low[i]:.4g}, {curve.high[i]:.4g}]"
    return (
        f"{curve.value[i]:.4g}{spread} at {curve.steps[i]:,.0f}, {curve.runs[i]} run{'s' if curve.runs[i] > 1 else ''}"
    )


# ---------------------------------------------------------------------------
# Writing


def write(panels, notes, out):
    """Write OUT.png and OUT.csv; return their paths."""
    paths = [f"{out}.png", f"{out}.csv"]
    figure = draw(panels, notes)
    try:
        figure.savefig(paths[0], dpi=150)
        with open(paths[1], "w", newline="") as file:
            write_table(panels, file)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return paths


def write_table(panels, file):
    """Write one line per point. low, high: one standard deviation over seeds, or the 95% interval of an aggregate."""
    table = csv.writer(file)
    table.writerow(["panel", "unit", "curve", "published", "env_steps", "runs", "value", "low", "high"])
    for (panel, unit), curves in panels.items():
        for curve in curves:
            points = zip(curve.steps, curve.runs, curve.value, curve.low, curve.high, strict=True)
            for step, runs, *numbers in points:
                shown = ["" if np.isnan(number) else f"{number:.6g}" for number in numbers]
                table.writerow([panel, unit, curve.name, int(curve.published), int(step), runs, *shown])


def draw(panels, notes):
    """Return a figure with a panel for each entry of `panels`, one legend, and a caption."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    columns = min(4, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    width = max(7.0, 4.0 * columns)
    figure = Figure(figsize=(width, 3.0 * rows + 1.4), layout="constrained")
    styles = make_styles(itertools.chain(*panels.values()))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles = {}
    for axes, ((heading, unit), curves) in zip(grid, panels.items(), strict=False):
        # Ours come last, on top.
        for curve in sorted(curves, key=lambda curve: not curve.published):
            handles[curve.name] = draw_curve(axes, curve, styles[curve.name])
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel(STEPS, fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    names = [name for name in styles if name in handles]
    lines = [handles[name] for name in names]
    figure.legend(lines, names, loc="outside upper center", ncols=columns + 1, fontsize=8, frameon=False)
    caption = " ".join(
        ["Training episodes; lines of tasks are means over seeds, bands one standard deviation.", *notes]
    )
    figure.supxlabel("\n".join(textwrap.wrap(caption, int(17 * width))), fontsize=7, x=0.01, ha="left")
    return figure


def make_styles(curves):
    """Return {name: keywords of `Axes.plot`}, in the order of the legend: ours, then the published."""
    ours = dict.fromkeys(curve.name for curve in curves if not curve.published)
    styles = {
        name: {"color": color, "linestyle": dashes, "marker": marker, "markersize": 3.5, "linewidth": 1.8}
        for name, color, dashes, marker in zip(ours, *map(itertools.cycle, OURS), strict=False)
    }
    for method, (color, dashes) in PUBLISHED.items():
        styles[METHODS[method]] = {"color": color, "linestyle": dashes, "linewidth": 1.4}
    return styles


def draw_curve(axes, curve, style):
    """Draw line and band, across bins without data; return the line."""
    known = ~np.isnan(curve.value)
    steps = curve.steps[known]
    axes.fill_between(steps, curve.low[known], curve.high[known], color=style["color"], alpha=0.15, linewidth=0)
    return axes.plot(steps, curve.value[known], **style)[0]


if __name__ == "__main__":
    sys.exit(main())
