"""Curves of runs: numbers checked by hand, picture and table read back."""

import csv
import json
import os
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
from ruamel.yaml import YAML

from benchmarks import plot_scores, scores
from tools import UserError
from training.config import CONFIGS, load_config

BALANCE = "--configs dmc_proprio --task dmc_cartpole_balance"


def make_run(logdir, episodes, flags="--task gym_CartPole-v1", seed=0):
    """Write a logdir of training episodes [(step, score)] with a configuration by flags."""
    logdir.mkdir(parents=True)
    load_config([*flags.split(), "--seed", str(seed), "--logdir", str(logdir)], CONFIGS).save(logdir / "config.yaml")
    rows = [{"step": step, "mode": "train", "score": score, "length": 1} for step, score in episodes]
    (logdir / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return logdir


def panels_of(*patterns, width=0):
    return plot_scores.make_panels(scores.read_runs(map(str, patterns)), width)[0]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Numbers


def test_a_bin_holds_what_ends_at_its_end():
    means = scores.bin_means([0, 1, 10, 11, 20, 45], [1, 2, 6, 10, 30, 7], 10, 5)
    np.testing.assert_array_equal(means, [3, 20, np.nan, np.nan, 7])


def test_mean_and_spread_are_over_the_seeds_that_have_data():
    nan = np.nan
    mean, std = scores.mean_and_std(np.array([[1, 2, nan], [3, nan, nan]]))
    np.testing.assert_array_equal(mean, [2, 2, nan])
    np.testing.assert_array_equal(std, [1, 0, nan])


def test_statistics_by_hand():
    tasks = np.array([1.0, 3.0]), np.array([10.0, 20.0]), np.array([0.0, 100.0])  # means 2, 15, 50
    assert scores.task_mean(*tasks) == pytest.approx(67 / 3)
    assert scores.task_median(*tasks) == 15
    # 0 1 3 10 20 100: a quarter of six is one and a half, one is cut at either end
    assert scores.task_iqm(*tasks) == pytest.approx((1 + 3 + 10 + 20) / 4)


def test_interval_resamples_seeds_within_tasks():
    # Each task gives 0, 1/2 or 1 on average with odds 1:2:1; between tasks nothing is mixed.
    low, high = scores.interval(scores.task_mean, [np.array([0.0, 1.0]), np.array([100.0, 101.0])])
    assert (low, high) == (50, 51)
    one_seed = [np.array([0.0, 1.0]), np.array([5.0])]
    assert np.isnan(scores.interval(scores.task_iqm, one_seed)).all()


def test_interval_of_the_mean_is_that_of_the_normal_distribution():
    returns = np.random.default_rng(0).normal(size=400)
    low, high = scores.interval(scores.task_mean, [returns])
    assert high - low == pytest.approx(2 * 1.96 * returns.std() / 20, rel=0.08)


def test_crafter_score_by_hand():
    unlocked = {"wood": np.array([1, 1, 0, 0]), "stone": np.array([0, 0, 0, 1])}
    score = scores.crafter_score(unlocked, np.array([1, 2, 3, 4]), np.array([0, 2, 4]))
    # until 2: rates 100 and 0 percent; until 4: 50 and 25 percent
    np.testing.assert_allclose(score, [np.nan, np.sqrt(101 * 1) - 1, np.sqrt(51 * 26) - 1])


def test_human_normalized():
    assert len(scores.atari_scores()) == 57
    np.testing.assert_allclose(scores.human_normalized("atari_pong", [-20.7, 14.6, 21]), [0, 1, 41.7 / 35.3])
    games = {task for method in scores.published()["atari100k"].values() for task in method["tasks"]}
    assert {game.removeprefix("atari_") for game in games} <= set(scores.atari_scores())


# Reading


def test_a_resumed_run_replaces_what_it_did_before_the_kill():
    text = '{"step":10,"mode":"train","score":1}\n{"step":20,"mode":"train","score":2}\n'
    text += '{"step":15,"mode":"train","score":3}\n{"step":15,"mode":"eval","score":9}\n{"step":30,"mo'
    rows, torn = scores.read_scores(text + '\n{"step":40,"mode":"train","score":"nan"}\n')
    assert [(row["step"], row["score"]) for row in rows] == [(10, 1), (15, 3)]
    assert torn == 2


def test_seeds_are_one_curve_and_other_settings_another(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"slow_{seed}", [(100, 10.0 * seed)], seed=seed)
        make_run(tmp_path / f"fast_{seed}", [(100, 7.0)], "--task gym_CartPole-v1 --train_ratio 1024", seed)
    ((panel, curves),) = panels_of(tmp_path / "*").items()
    assert panel == ("gym_CartPole-v1", "return")
    found = {c.name: (c.value.tolist(), c.low.tolist(), c.runs.tolist()) for c in curves}
    assert found["fast"] == ([7], [7], [3])
    assert found["slow"] == ([10], [pytest.approx(10 - np.sqrt(200 / 3))], [3])
    labelled = panels_of(f"mine={tmp_path}/slow_*", tmp_path / "fast_0")["gym_CartPole-v1", "return"]
    assert [curve.name for curve in labelled] == ["mine", "fast_0"]


def test_recorded_runs_are_the_seeds_of_a_curve(tmp_path):
    make_run(tmp_path / "ours_0", [(10, 1.0), (20, 2.0)])
    authors = scores.DATA / "authors_cartpole.json"
    (curves,) = panels_of(tmp_path / "ours_0", f"authors={authors}", width=4500).values()
    ours, theirs = curves
    assert (ours.value, ours.runs, theirs.name, theirs.runs) == (1.5, 1, "authors", 7)
    # an episode of CartPole is as long as its return, so that steps are sums of returns
    for run in json.loads(authors.read_text())["runs"]:
        steps, returns = np.array(run["train"]).T
        np.testing.assert_array_equal(steps, returns.cumsum())
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="is no file of recorded runs"):
        panels_of(tmp_path / "other.json")


def test_runs_under_one_name_with_other_settings_are_warned_of(tmp_path, capsys):
    make_run(tmp_path / "a", [(100, 1)])
    make_run(tmp_path / "b", [(100, 3)], "--task gym_CartPole-v1 --actor.layers 5")
    (curve,) = panels_of(f"mine={tmp_path}/*")["gym_CartPole-v1", "return"]
    assert curve.value == [2]
    assert "they also differ in actor.layers" in capsys.readouterr().err


def test_bins_are_wide_enough_for_the_longest_episode(tmp_path):
    make_run(tmp_path / "a", [(10, 1), (510, 2), (1000, 3)])
    (curve,) = panels_of(tmp_path / "a")["gym_CartPole-v1", "return"]
    assert curve.steps.tolist() == [500, 1000] and curve.value.tolist() == [1, 2.5]
    assert panels_of(tmp_path / "a", width=1000)["gym_CartPole-v1", "return"][0].value == [2]


# Published


@pytest.mark.parametrize(
    ("flags", "group"),
    [
        (BALANCE, "dmc_proprio"),
        ("--configs dmc_vision", "dmc_vision"),
        ("--task dmc_walker_walk", "dmc"),
        ("--task atari_pong --steps 4e5", "atari100k"),
        ("--task atari_pong --steps 2e8", "atari"),
        ("--task gym_CartPole-v1", "gym"),
    ],
)
def test_a_run_is_compared_with_its_kind(flags, group):
    assert scores.group_of(load_config(flags.split(), CONFIGS).to_dict()) == group


def test_the_published_curve_stands_beside_a_run(tmp_path):
    make_run(tmp_path / "a", [(20_000, 5), (40_000, 6)], BALANCE)
    ours, *others = panels_of(tmp_path / "a")["dmc_cartpole_balance (proprio)", "return"]
    assert ours.steps.tolist() == [20_000, 40_000]  # the published bins
    assert [curve.name for curve in others] == ["DreamerV3 (published)", "PPO (published)", "D4PG (published)"]
    dreamer = others[0]
    assert (dreamer.steps[-1], dreamer.value[-1], dreamer.high[-1]) == (500_000, 990.6, 994.0)
    assert np.isnan(others[2].value[0])  # null: D4PG has no data in the first bin


def test_aggregates_are_over_the_tasks_that_all_have(tmp_path, capsys):
    for task, score in {"alien": 227.8, "pong": 14.6, "boxing": 6.1}.items():  # human-normalized 0, 1, 1/2
        flags = f"--task atari_{task} --steps 4e5"
        for seed in range(2):
            make_run(tmp_path / f"{task}_{seed}", [(20_000, score)], flags, seed)
    make_run(tmp_path / "tetris", [(20_000, 1)], "--task atari_tetris --steps 4e5")
    panels = panels_of(f"mine={tmp_path}/*")
    assert "no human score is known of atari_tetris" in capsys.readouterr().err
    for what in ("mean", "median", "IQM"):
        ours, *others = panels[f"atari100k: {what} of 3 tasks", "human-normalized return"]
        # seeds are equal, so the interval is a point
        np.testing.assert_allclose([ours.value, ours.low, ours.high], [[0.5]] * 3)
        assert ours.runs == [6]
        assert [c.name for c in others] == ([] if what == "IQM" else ["DreamerV3 (published)", "PPO (published)"])
    entries = scores.published()["atari100k"]["dreamerv3"]["tasks"]
    ends = {task: entries[f"atari_{task}"]["mean"][-1] for task in ("alien", "pong", "boxing")}
    expected = [(ends["alien"] - 227.8) / 6899.9, (ends["pong"] + 20.7) / 35.3, (ends["boxing"] - 0.1) / 12]
    published = panels["atari100k: mean of 3 tasks", "human-normalized return"][1]
    assert published.value[-1] == pytest.approx(np.mean(expected))


def test_crafter_has_a_panel_of_its_score(tmp_path):
    logdir = make_run(tmp_path / "a", [], "--task crafter_reward")
    rows = [{"step": 10, "mode": "train", "score": 1.1, "log_achievement_wood": wood} for wood in (2.0, 0.0)]
    (logdir / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    panels = panels_of(logdir)
    assert panels["crafter_reward", "Crafter score (%)"][0].value == pytest.approx([50])


# The command


def run(capsys, *words):
    status = plot_scores.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_picture_and_table_are_read_back(tmp_path, capsys):
    for seed, score in enumerate((100, 300)):
        make_run(tmp_path / f"runs/balance{seed}", [(20_000, score), (40_000, 2 * score)], BALANCE, seed)
    status, out, err = run(capsys, tmp_path / "runs/*", "--out", tmp_path / "scores")
    assert (status, err) == (0, "")
    assert "balance: 400 [200, 600] at 40,000, 2 runs" in out
    rows = table(tmp_path / "scores.csv")
    assert [list(row.values())[2:] for row in rows[:2]] == [
        ["balance", "0", "20000", "2", "200", "100", "300"],
        ["balance", "0", "40000", "2", "400", "200", "600"],
    ]
    assert rows[2]["curve"] == "DreamerV3 (published)" and rows[2]["value"] == "271.5"
    picture = imageio.imread(tmp_path / "scores.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    blue = np.abs(picture[..., :3].astype(int) - (0x00, 0x72, 0xB2)).max(-1) < 8  # our curve
    black = picture[..., :3].max(-1) < 40  # the published, and text
    assert blue.sum() > 100 and black.sum() > 1000
    assert (picture[..., :3].min(-1) > 250).mean() > 0.5  # on white


def test_the_caption_says_what_may_be_compared(tmp_path):
    make_run(tmp_path / "a", [(20_000, 5)], f"{BALANCE} --action_repeat 2 --train_ratio 256")
    make_run(tmp_path / "b", [(20_000, 5)], f"{BALANCE} --rssm.deter 100")
    _, notes = plot_scores.make_panels(scores.read_runs([str(tmp_path / "*")]))
    assert notes[1].startswith("Published dmc curves were made with action repeat 2, train ratio 512 and size12m")
    assert "action repeat 2, train ratio 256, size1m" in notes[1]
    assert "action repeat 1, train ratio 1024, deter 100" in notes[1]


def test_curves_differ_in_more_than_color():
    none = np.zeros(0)
    styles = plot_scores.make_styles([scores.Curve(str(i), none, none, none, none, none) for i in range(60)])
    assert len({tuple(map(str, style.values())) for style in styles.values()}) == 64
    firsts = [style for name, style in styles.items() if name in "0123" or name.endswith("(published)")]
    assert len({str(style["linestyle"]) for style in firsts}) == 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere*"], "nowhere*: no such logdir"),
        (["=nowhere"], "=nowhere: the name is missing before '='"),
        (["empty"], "no logdir has a finished training episode"),
        (["strange"], "strange/config.yaml is no configuration of a run"),
        (["good", "--bin", "-1"], "--bin: expected at least 0, got -1"),
        (["good", "--out", "nowhere/x"], "--out nowhere/x: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "good", [(10, 1)])
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "strange", [(10, 1)])
    (tmp_path / "strange/config.yaml").write_text("- a\n: b: c")
    status, _, err = run(capsys, *words)
    assert status == 2 and err.splitlines()[-1] == f"plot_scores.py: {line}"
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.csv"))


def test_what_cannot_be_read_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torn = make_run(tmp_path / "torn", [(10, 1), (20, 3)])
    with open(torn / "scores.jsonl", "a") as file:
        file.write('{"step": 30, "mo')
    make_run(tmp_path / "empty", [])
    (tmp_path / "other").mkdir()
    status, _, err = run(capsys, "*", "--out", "x")
    assert status == 0
    warnings = [line.removeprefix("plot_scores.py: warning: ") for line in err.splitlines()]
    assert warnings == [
        "empty is skipped: no finished training episode yet",
        "other is skipped: config.yaml: No such file or directory",
        "torn/scores.jsonl: 1 unreadable line skipped",
    ]


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_is_one_line(tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no', name='{package}')")
    argv = [sys.executable, plot_scores.__file__, "x"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"plot_scores.py: {package} is not installed: pip install -r requirements/plots.txt\n"


def test_old_configurations_are_read(tmp_path):
    # New or retired keys must not exclude an old run from a plot.
    logdir = make_run(tmp_path / "a", [(10, 1)])
    YAML().dump({"task": "gym_CartPole-v1", "gone": 1}, logdir / "config.yaml")
    assert panels_of(logdir)["gym_CartPole-v1", "return"][0].value == [1]
