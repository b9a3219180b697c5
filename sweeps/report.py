"""What came of a sweep: a table, and a plot of which keys matter."""

from __future__ import annotations

import csv
import io
import sys

from sweeps.conduct import shown
from sweeps.plan import Plan
from sweeps.study import Study
from tools import UserError, atomic_write
from training.console import print_line


def report(plan: Plan, study: Study) -> None:
    """Print the table of trials, best first; write it as results.csv, and importances.png beside it."""
    keys = list(plan.search)
    head = ["trial", "state", "return", *(["seeds"] if len(plan.seeds) > 1 else []), *keys]
    rows = study.rows()
    table = [head]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.1f}"
        seeds = [" ".join(f"{each:.1f}" for each in row.seeds) or "-"] if len(plan.seeds) > 1 else []
        table.append([str(row.number), row.state, value, *seeds, *(shown(row.values.get(key, "-")) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print_line("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), sys.stdout)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["trial", "state", "return", "seeds", *keys])
    for row in rows:
        writer.writerow([row.number, row.state, row.value, " ".join(map(str, row.seeds)), *map(row.values.get, keys)])
    atomic_write(plan.folder / "results.csv", lambda out: out.write(file.getvalue().encode()))
    if rows and rows[0].state == "complete":
        best = rows[0]
        logdir = plan.config(best.number, best.values, plan.seeds[0]).logdir
        print_line(f"best: trial {best.number}, return {best.value:.1f}, in {logdir}", sys.stdout)
    draw(plan, study.importances())


def draw(plan: Plan, importances: dict[str, float]) -> None:
    """Write importances.png, a bar for each key; say them in a line, too."""
    if not importances:
        return
    said = ", ".join(f"{key} {share:.2f}" for key, share in importances.items())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install -r requirements/sweep.txt") from None
    figure = Figure(figsize=(7, 1 + 0.4 * len(importances)), layout="constrained")
    axes = figure.subplots()
    keys = list(importances)[::-1]
    axes.barh(keys, [importances[key] for key in keys], color="#0072b2")
    axes.set_xlabel("importance (PED-ANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    path = plan.folder / "importances.png"
    figure.savefig(path, dpi=120)
    print_line(f"importances: {said}; drawn in {path}", sys.stdout)
