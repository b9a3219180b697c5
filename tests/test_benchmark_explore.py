"""The comparison of explorers: numbers checked by hand, and flags that dreamer.py accepts."""

import math

import numpy as np
import pytest

from benchmarks import explore
from tests.test_benchmark_family import give_run
from training.config import CONFIGS, load_config


def test_cells_are_told_beside_the_random_ones(tmp_path, capsys):
    out = tmp_path / "explore"
    for name, found in {"random": (90, 110), "icm": (140, 160)}.items():
        for seed, count in enumerate(found):
            give_run(out / f"{name}_maze_{seed}", scores={60: (0, 20), 120: (0, count)})
    page = tmp_path / "page.md"
    page.write_text("<!-- cells:begin -->\n<!-- cells:end -->\n")
    words = ["cells", "--out", str(out), "--seeds", "2", "--finished", "--plot", "--write", str(page)]
    assert explore.main(words) == 0
    text = capsys.readouterr().out
    assert "| random | 90, 110 | 100 ± 10 | 1.00 |" in text and "| ICM | 140, 160 | 150 ± 10 | 1.50 |" in text
    assert "| RND | - | - | - |" in text and text.strip() in page.read_text()
    assert (tmp_path / "explore.png").stat().st_size > 10_000


def give_episode(logdir, places):
    """Write an episode that was in these cells."""
    (logdir / "train_eps").mkdir(exist_ok=True)
    position = 2 * np.array(places, np.float32) / 18 - 1
    np.savez(logdir / "train_eps" / f"{len(places)}.npz", position=position)


def test_empowerment_is_that_of_the_cells_where_an_agent_was(tmp_path, capsys):
    corner, wall, floor = (0, 0), (0, 1), (1, 1)  # from which 3, 4 and 5 cells can be reached
    for name, places in {"random": [corner, wall], "empowerment": [wall, floor]}.items():
        for seed in range(2):
            give_run(tmp_path / f"{name}_maze_stay_{seed}")
            give_episode(tmp_path / f"{name}_maze_stay_{seed}", [corner, *places, places[seed]])
    assert explore.main(["empowerment", "--out", str(tmp_path), "--seeds", "2", "--finished"]) == 0
    text = capsys.readouterr().out
    low, high = (2 * math.log(3) + math.log(4)) / 3, (math.log(3) + 2 * math.log(4)) / 3
    assert f"| random | {low:.3f}, {high:.3f} |" in text
    means = (low + high) / 2, (3 * math.log(4) + 3 * math.log(5)) / 6
    errors = [(math.log(b) - math.log(a)) / 6 for a, b in ((3, 4), (4, 5))]
    assert f"The difference is {(means[1] - means[0]) / math.hypot(*errors):.1f} standard errors." in text


def test_who_watches_television_is_told(tmp_path, capsys):
    give_run(tmp_path / "icm_maze_tv_0", scores={60: (0, 50)})
    scores = tmp_path / "icm_maze_tv_0" / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"log_cells": 50', '"log_cells": 50, "log_tv": 0.25', 1))
    assert explore.main(["television", "--out", str(tmp_path), "--finished"]) == 0
    assert "| ICM | 25.0% | 50 | - | - |" in capsys.readouterr().out


@pytest.mark.parametrize("name", explore.EXPLORERS)
def test_every_flag_is_known_to_dreamer(name):
    config = load_config(explore.flags_of(name, "dummy_maze_tv", 2), CONFIGS)
    assert (config.task, config.seed, config.steps, config.horizon) == ("dummy_maze_tv", 2, 4000, 33)
    config = load_config(explore.flags_of(name, "dummy_maze_stay", 2, explore.PLACES), CONFIGS)
    assert (config.task, config.horizon, config.opt.lr) == ("dummy_maze_stay", 10, 1e-3)
