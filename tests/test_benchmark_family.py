"""The comparison of versions: numbers checked by hand, flags that dreamer.py accepts, one-line errors."""

import json

import numpy as np

from benchmarks import family
from training.config import CONFIGS, load_config


def give_run(logdir, evals=(), scores=()):
    """Write a finished run: evals {step: return}, scores {step: (score, cells)}."""
    logdir.mkdir(parents=True)
    rows = [{"step": step, "eval_return": value} for step, value in dict(evals).items()]
    rows += [{"step": max(evals or [0]), "updates": 77}]
    (logdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"step": step, "mode": "train", "score": score, "log_cells": cells}
        for step, (score, cells) in dict(scores).items()
    ]
    rows += [{"step": 1, "mode": "eval", "score": 1e6, "log_cells": 1e6}]  # must be ignored
    (logdir / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (logdir / "done").touch()


def give_levels(monkeypatch, levels):
    """Stand in for the agents that do not learn: levels {class: returns of its episodes}."""
    monkeypatch.setattr(family, "play", lambda agent, flags: levels[agent])


def test_learning_is_told_in_standard_errors_above_chance(tmp_path, capsys, monkeypatch):
    out = tmp_path / "learn"
    for version in family.VERSIONS:
        for seed, final in enumerate((40.0, 50.0, 60.0)):
            give_run(out / f"{version or 'dreamerv3'}_{seed}", {1000: 10.0, 2000: final})
    give_levels(
        monkeypatch, {family.Random: [8.0, 12.0], family.Still: [19.0, 21.0], family.SwingUp: [80.0, 80.0, 80.0]}
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- learn:begin -->\nold\n<!-- learn:end -->\nafter\n")
    assert family.main(["learn", "--out", str(out), "--write", str(page)]) == 0
    text = page.read_text()
    # mean 50 +- 10/sqrt(3) = 5.77, chance 10 +- 2: (50 - 10) / sqrt(5.77^2 + 2^2) = 6.5
    assert "| DreamerV2 | `dreamerv2` | 2,000 | 77 | 40, 50, 60 | 50 ± 6 | +6.5 |" in text
    assert "random 10 ± 2, no action 20 ± 1, hand-made 80 ± 0." in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (tmp_path / "learn.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("40, 50, 60") == len(family.VERSIONS)


def test_what_is_not_finished_is_told_as_missing(tmp_path, capsys, monkeypatch):
    out = tmp_path / "learn"
    for seed, final in enumerate((40.0, 60.0, 50.0)):
        give_run(out / f"dreamerv1_{seed}", {1000: 10.0, 2000: final})
    (out / "dreamerv1_1" / "done").unlink()
    give_run(out / "planet_2", {1000: 30.0})
    give_levels(monkeypatch, dict.fromkeys(family.LEARN_LEVELS.values(), (8.0, 12.0)))
    assert family.main(["learn", "--out", str(out), "--finished"]) == 0
    text = capsys.readouterr().out
    assert "| Dreamer | `dreamerv1` | 2,000 | 77 | 40, -, 50 | 45 ± 5 |" in text
    assert "| PlaNet | `planet` | 1,000 | 77 | -, -, 30 | 30 | - |" in text
    assert "| DreamerV3 |  | - | - | -, -, - | - | - |" in text


def test_a_run_from_images_is_told_by_its_last_episodes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "images"
    give_run(out / "planet_0", {400: 1.0, 800: 12.0})
    rows = [{"step": step, "mode": "eval", "score": score} for step, score in ((400, 1.0), (800, 11.0), (800, 13.0))]
    (out / "planet_0" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    give_levels(monkeypatch, dict.fromkeys(family.IMAGE_LEVELS.values(), (1.0, 3.0)))
    assert family.main(["learn_images", "--out", str(out), "--finished"]) == 0
    # 12 +- 1 above 2 +- 1: 10 / sqrt(2) = 7.1
    assert "| PlaNet | `planet` | 800 | 77 | 12.0 ± 1.0 | +7.1 |" in capsys.readouterr().out


def test_no_level_solves_a_task_but_the_hand_made_one(monkeypatch):
    monkeypatch.setattr(family, "EPISODES", 5)
    returns = {name: np.mean(family.play(agent, family.LEARN)) for name, agent in family.LEARN_LEVELS.items()}
    assert max(returns["random"], returns["no action"]) < -900 and returns["hand-made"] > -200
    returns = {name: np.mean(family.play(agent, family.IMAGES)) for name, agent in family.IMAGE_LEVELS.items()}
    assert max(returns["random"], returns["no action"]) < 6 and returns["hand-made"] > 13


def test_exploring_is_told_in_cells(tmp_path, capsys):
    out = tmp_path / "explore"
    for seed in range(2):
        give_run(out / f"random_{seed}", scores={60: (0, 20), 120: (0, 100)})
        give_run(out / f"plan2explore_{seed}", scores={60: (0, 30), 120: (0, 240 + 20 * seed)})
    assert family.main(["explore", "--out", str(out), "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert "| random | 100, 100 | 100 ± 0 |" in text and "| Plan2Explore | 240, 260 | 250 ± 10 |" in text
    assert "Ratio: 2.50, of 328 cells." in text


def test_every_flag_is_known_to_dreamer():
    tasks = (family.LEARN, "gym_Pendulum-v1"), (family.IMAGES, "custom_benchmarks.goal:Goal")
    for version in family.VERSIONS:
        for flags, task in tasks:
            config = load_config(
                ["--configs", *version.split(), "quickstart", *family.settings(version, flags)], CONFIGS
            )
            assert config.task == task
    for flags in family.EXPLORERS.values():
        config = load_config(["--configs", "quickstart", *family.EXPLORE.split(), *flags.split()], CONFIGS)
        assert config.task == "dummy_maze"


def test_a_page_without_markers_is_refused_before_anything_runs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no markers\n")
    assert family.main(["learn", "--out", str(tmp_path / "learn"), "--write", str(page)]) == 2
    assert "<!-- learn:begin -->" in capsys.readouterr().err and not (tmp_path / "learn").exists()


def test_a_run_that_fails_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family, "EXPLORE", "--task dummy_nowhere")
    assert family.main(["explore", "--out", str(tmp_path / "e"), "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "random_0/output.txt: exit status 2" in error
    assert "dummy_nowhere" not in error and "nowhere" in (tmp_path / "e" / "random_0" / "output.txt").read_text()
    assert not (tmp_path / "e" / "random_0" / "done").exists()
