"""The measurements of World Models: flags that dreamer.py accepts, numbers checked by hand, pages whose names exist."""

import ast
import json
import re

import numpy as np
import pytest
import torch

from benchmarks import world_models as benchmark
from tests.factories import ROOT
from training.config import CONFIGS, load_config

FAMILY = (ROOT / "docs" / "family.md").read_text()
PAGE = (ROOT / "docs" / "world_models.md").read_text()


def names_in(file):
    """Return the names of a file's functions and classes, and Class.method of its methods."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_cell_of_the_comparison_with_dreamer_points_at_code_that_is_there():
    section = FAMILY.partition("## World Models (2018)")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for _, *cells in rows:
        for cell in cells:
            (file, name), *more = re.findall(r": `([\w/]+\.py)` (\w+(?:\.\w+)?)", cell)
            assert not more and name in names_in(file), cell


def test_every_row_of_the_family_has_a_cell_for_2018():
    table = [line for line in FAMILY.splitlines() if line.startswith("|")]
    table = table[: next(i for i, line in enumerate(table) if "evaluated by" in line) + 1]
    assert {line.count("|") for line in table} == {10} and "`world_models`" in table[0].split("|")[2]


def test_the_flags_that_are_compared_are_valid_and_each_its_own():
    shown = [load_config(["--configs", "dream", *flags.split()], CONFIGS).stages for flags in benchmark.RUNS.values()]
    assert {stages.temperature for stages in shown} == {0.5, 1.0, 1.15, 1.3}
    assert len({str(stages.to_dict()) for stages in shown}) == len(benchmark.RUNS)
    assert len({benchmark.slug(name) for name in benchmark.RUNS}) == len(benchmark.RUNS)


@pytest.mark.parametrize("name", benchmark.COMMANDS)
def test_the_page_has_a_place_for_each_table(name):
    assert PAGE.count(f"<!-- {name}:begin -->") == PAGE.count(f"<!-- {name}:end -->") == 1
    assert f"benchmarks/world_models.py {name}" in PAGE


def test_a_dream_and_an_environment_are_timed():
    flags = "--stages.population 4 --stages.rollouts 2 --stages.z 4 --stages.hidden 8 --device cpu --configs"
    torch.set_num_threads(1)
    config = load_config([*flags.split(), "debug", "world_models"], CONFIGS)
    assert benchmark.dream_rate(config) > 0
    seen = []
    assert benchmark.env_rate(seen.append) > 0 and len(seen) == benchmark.STEPS and seen[0].shape == (3,)


def test_the_race_is_told_beside_random_actions(tmp_path):
    out = tmp_path / "race"
    for logdir, scores in ((out, (100.0, 140.0)), (tmp_path / "race_whole", (200.0, 240.0))):
        logdir.mkdir()
        rows = [{"step": 9, "mode": mode, "score": score} for mode in ("train", "eval") for score in scores]
        (logdir / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (logdir / "metrics.jsonl").write_text(json.dumps({"step": 9, "score": 50.0}) + "\n")
        (logdir / "done").touch()
    for limit, scores in ((400, [-10.0, -20.0]), (0, [-30.0, -40.0])):
        (tmp_path / f"race_random_{limit}.json").write_text(json.dumps(scores))
    args = benchmark.main(["race", "--out", str(out), "--finished", "--write", str(page(tmp_path))])
    text = page(tmp_path).read_text()
    assert args == 0 and "| 400 frames | -15 ± 5 | 120 ± 20 |" in text
    assert "| 1,000 frames, the task's own | -35 ± 5 | 220 ± 20 |" in text
    assert (tmp_path / "race.png").stat().st_size > 5000


def page(folder):
    """Return a page with the places of the tables."""
    path = folder / "page.md"
    if not path.exists():
        path.write_text(PAGE)
    return path


def test_what_a_run_took_is_the_sum_of_its_parts(tmp_path):
    (tmp_path / "seconds.txt").write_text("10\n32\n")
    assert benchmark.seconds(tmp_path) == 42
    assert benchmark.summed([])[0] == 0 and benchmark.summed([1.0, 3.0]) == (2, 2.0, 1.0)
    assert np.isnan(benchmark.summed([5.0])[1])
