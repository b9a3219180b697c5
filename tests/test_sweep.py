"""Tests of sweep.py: its file, what is searched, trials that end, fail, are pruned, killed and gone on with."""

import collections
import contextlib
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import optuna
import pytest

import sweep
import sweeps.conduct
import sweeps.study
from sweeps.plan import Choice, Range, read_plan
from sweeps.study import open_study
from tests.factories import ROOT, one_line_error
from tools import locked

BASE = {"configs": "debug", "task": "dummy_vector", "eval_every": 25}


def write(folder, section=None, **keys):
    """Write a sweep's file beside its logdirs; return its path."""
    path = folder / "sweep.json"
    logdir = str(folder / "runs" / "{trial}" / "{seed}")
    path.write_text(json.dumps({**BASE, "logdir": logdir, "sweep": section or {}, **keys}))
    return str(path)


# ---------------------------------------------------------------------------
# The file


def test_a_list_is_a_grid_a_mapping_a_range_and_a_single_value_is_for_all(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"sweep: {{method: tpe, trials: 4}}\nconfigs: [debug]\nlogdir: {tmp_path}/{{task}}/{{trial}}-{{imag_horizon}}\n"
        "opt: {lr: {low: 1e-5, high: 1e-3, log: true}}\nimag_horizon: [3, 5]\nactor.layers: {low: 1, high: 3}\n"
        "size: [16, 16]\nencoder: {mults: [[1, 2], [2, 2]]}\nreturn_norm: {low: 10}\nenv.level: [1, hard]\nsteps: 60\n"
    )
    plan = read_plan(str(file), ["--batch_size", "2"])
    assert plan.search == {
        "opt.lr": Range(1e-5, 1e-3, True),
        "imag_horizon": Choice((3, 5)),
        "actor.layers": Range(1, 3, False),
        "encoder.mults": Choice(((1, 2), (2, 2))),
        "env.level": Choice((1, "hard")),
    }
    assert plan.base.size == (16, 16) and plan.base.return_norm.low == 10.0 and plan.base.batch_size == 2
    assert plan.folder == tmp_path / "dummy_multi" and plan.trials == 4
    config = plan.config(7, {"imag_horizon": 5, "opt.lr": 1e-4}, seed=3)
    assert (config.seed, config.imag_horizon, config.opt.lr) == (3, 5, 1e-4)
    assert config.logdir == f"{tmp_path}/dummy_multi/007-5"


def test_the_file_that_comes_along_is_right_and_is_the_one_that_the_page_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan("sweep.yaml")
    assert list(plan.search) == ["opt.lr", "imag_horizon"] and plan.trials == 10 and plan.base.task == "gym_CartPole-v1"
    assert f"```yaml\n{(ROOT / 'sweep.yaml').read_text()}```" in (ROOT / "docs" / "sweeps.md").read_text()


MISTAKES = {
    "opt.lrr: unknown key": {"opt.lrr": [1e-4, 1e-3]},
    "sweep.trails: unknown key": {"sweep": {"trails": 3}},
    "sweep.method: expected one of grid, random, tpe": {"sweep": {"method": "bayes"}},
    "opt.lr: expected a number": {"opt": {"lr": [1e-4, "high"]}},
    "imag_horizon: expected a whole number": {"imag_horizon": [3, 4.5]},
    "opt.lr: expected a value, a list of values, or {low": {"opt.lr": {"low": 1e-4, "high": 1e-3, "lag": True}},
    "opt.lr: expected low < high": {"opt.lr": {"low": 1e-3, "high": 1e-4}},
    "opt.lr: expected low < high, and 0 < low,": {"opt.lr": {"low": 0, "high": 1e-4, "log": True}},
    "opt.lr: a grid takes lists": {"opt.lr": {"low": 1e-4, "high": 1e-3}},
    "compile: expected a value or a list of values": {"compile": {"low": 0, "high": 1}},
    "imag_horizon: a value is given twice": {"imag_horizon": [3, 3]},
    "opt.lr: given twice": {"opt.lr": 1e-4, "opt": {"lr": 1e-3}},
    "sweep: trials: say how many": {"sweep": {"method": "tpe"}, "imag_horizon": [3, 4]},
    "sweep: no key has a list": {"sweep": {"method": "tpe", "trials": 3}},
    "unknown suite 'dumy'": {"task": ["dumy_vector", "dummy_vector"]},
    "logdir: expected a path with {trial}": {"logdir": "./logdir/x"},
    "logdir: expected a path with {seed}": {"logdir": "./logdir/x/{trial}", "seed": [0, 1]},
    "no placeholder {lr}": {"logdir": "./logdir/x/{trial}/{lr}", "opt.lr": [1e-4, 1e-3]},
    "without evaluations": {"eval_episode_num": 0},
    "--configs debgu: unknown preset": {"configs": "debgu"},
    "configs: expected text": {"configs": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_file_is_told_in_one_line_and_nothing_is_started(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["--config", write(tmp_path, **MISTAKES[message])]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_a_key_that_is_searched_cannot_be_given_in_the_command_too(tmp_path):
    file = write(tmp_path, imag_horizon=[3, 4])
    assert "--imag_horizon: " in one_line_error(read_plan, file, ["--imag_horizon", "5"])


def test_processes_share_the_threads_of_the_cpu_and_take_the_devices_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    file = write(tmp_path, {"at_once": 3}, threads=0, configs=[], device=["cpu", "cuda:1"])
    plan = read_plan(file)
    assert plan.base.threads == 2 and plan.devices == ("cpu", "cuda:1") and not plan.search
    assert read_plan(file, ["--threads", "5"]).base.threads == 5


# ---------------------------------------------------------------------------
# Trials, with a stand-in for the processes that train


class Process:
    """Trains at once: an evaluation at each of three steps, `score(keys)` times the step."""

    def __init__(self, argv, log, score):
        self.keys = json.loads(pathlib.Path(argv[-1]).read_text())
        self.score, self.logdir, self.steps = score, pathlib.Path(self.keys["logdir"]), iter((25, 50, 100))
        self.logdir.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.signals = []

    def poll(self):
        if self.signals:
            return 143
        step = next(self.steps, None)
        if step is None:
            return 0
        score = self.score(self.keys)
        if isinstance(score, int):
            self.log.write_text(f"dreamer.py: a line\nstatus {score}\n")
            return score
        with open(self.logdir / "scores.jsonl", "a") as file:
            for part in (-1, 1):
                entry = {"step": step, "mode": "eval", "score": score * step + part, "length": 5}
                file.write(json.dumps(entry) + "\n")
        return None

    def send_signal(self, number):
        self.signals.append(number)

    kill = send_signal


class Launcher:
    def __init__(self, score):
        self.score, self.started = score, []

    def start(self, argv, log):
        self.started.append(Process(argv, log, self.score))
        return self.started[-1]


def conduct(file, score, stopped=None, monkeypatch=None):
    """Carry out a plan; return the Sweep, its study's rows {number: row}, and the processes."""
    plan = read_plan(file)
    plan.folder.mkdir(parents=True, exist_ok=True)
    study, launcher = open_study(plan), Launcher(score)
    sweeps.conduct.Sweep(plan, study, launcher).run(SimpleNamespace(stopped=stopped, again=0))
    return {row.number: row for row in study.rows()}, launcher.started, study


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Wait for nothing, and keep searches in memory, one for each folder."""
    kept = collections.defaultdict(optuna.storages.InMemoryStorage)
    monkeypatch.setattr(sweeps.conduct, "POLL", 0.0)
    monkeypatch.setattr(sweeps.study, "storage_of", lambda plan: kept[plan.folder])


def test_a_grid_is_played_to_its_end_with_the_mean_of_the_seeds(tmp_path):
    file = write(tmp_path, {"at_once": 3}, imag_horizon=[3, 4], encoder={"mults": [[1, 2], [2, 2]]}, seed=[0, 1])
    rows, started, _ = conduct(file, lambda keys: keys["imag_horizon"] + 0.1 * keys["seed"])
    assert [row.state for row in rows.values()] == ["complete"] * 4 and len(started) == 8
    values = {(row.values["imag_horizon"], row.values["encoder.mults"]): row.value for row in rows.values()}
    assert values == {(h, m): pytest.approx(100 * h + 5) for h in (3, 4) for m in ((1, 2), (2, 2))}
    assert {tuple(map(round, row.seeds)) for row in rows.values()} == {(300, 310), (400, 410)}
    again, started, _ = conduct(file, lambda keys: 0.0)
    assert again == rows and not started  # it is done


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_values_are_drawn_from_ranges_and_differ_after_a_resumption(method, tmp_path):
    keys = {"opt.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "actor.layers": {"low": 1, "high": 4}}
    rows, _, _ = conduct(write(tmp_path, {"method": method, "trials": 3}, **keys), lambda keys: keys["opt.lr"])
    more, _, study = conduct(write(tmp_path, {"method": method, "trials": 6}, **keys), lambda keys: keys["opt.lr"])
    drawn = [row.values["opt.lr"] for row in more.values()]
    assert len(rows) == 3 and len(more) == len(set(drawn)) == 6
    assert all(1e-5 <= lr <= 1e-3 for lr in drawn)
    assert all(row.values["actor.layers"] in (1, 2, 3, 4) for row in more.values())
    assert study.importances().keys() == keys.keys()


def test_a_trial_below_the_median_is_ended_by_sigterm_at_its_evaluation(tmp_path):
    file = write(tmp_path, {"prune": "median", "prune_from": 30}, **{"opt.lr": [7.0, 6.0, 5.0, 4.0, 3.0, 1.0]})
    rows, started, _ = conduct(file, lambda keys: keys["opt.lr"])
    assert [rows[number].state for number in range(6)] == ["complete"] * 5 + ["pruned"]
    assert started[-1].signals == [signal.SIGTERM]
    scores = (started[-1].logdir / "scores.jsonl").read_text()
    assert '"step": 50' in scores and '"step": 100' not in scores


def test_a_failed_trial_is_told_with_its_last_line_and_three_in_a_row_end_the_sweep(tmp_path, capsys):
    file = write(tmp_path, imag_horizon=[2, 3, 4, 5, 6, 7])
    rows, started, _ = conduct(file, lambda keys: 1.0 if keys["imag_horizon"] == 3 else 2)
    assert [rows[number].state for number in range(5)] == ["fail", "complete", "fail", "fail", "fail"]
    assert len(started) == 5
    said = capsys.readouterr().err
    assert "trial 0 is failed: status 2" in said and "gave up after 3 trials" in said


def test_a_training_that_is_killed_starts_again_a_few_times(tmp_path, capsys):
    kills = iter([-9, -9, 1.0, 1.0, 1.0])
    rows, started, _ = conduct(write(tmp_path), lambda keys: next(kills))
    assert rows[0].state == "complete" and rows[0].value == 100 and len(started) == 3
    rows, started, _ = conduct(write(tmp_path, logdir=str(tmp_path / "again" / "{trial}")), lambda keys: -9)
    assert rows[0].state == "fail" and len(started) == 4


def test_a_trial_that_a_kill_left_without_values_or_owner_is_gone_on_with(tmp_path):
    plan = read_plan(write(tmp_path, imag_horizon=[3, 4]))
    plan.folder.mkdir()
    left = open_study(plan).study.ask()  # as if killed right behind this
    rows, _, _ = conduct(write(tmp_path, imag_horizon=[3, 4]), lambda keys: float(keys["imag_horizon"]))
    assert [(row.state, row.values["imag_horizon"]) for row in rows.values()] == [("complete", 4), ("complete", 3)]
    assert left.number == 0


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    conduct(write(tmp_path, imag_horizon=[3]), lambda keys: 1.0)
    for change in ({"imag_horizon": [3, 4]}, {"imag_horizon": 5}, {"imag_horizon": 3, "steps": 50}):
        plan = read_plan(write(tmp_path, **change))
        assert "give another logdir" in one_line_error(open_study, plan)


def test_a_logdir_in_which_a_process_of_before_still_trains_is_waited_for(tmp_path, capsys):
    file = write(tmp_path)
    plan = read_plan(file)
    logdir = pathlib.Path(plan.config(0, {}, 0).logdir)
    logdir.mkdir(parents=True)
    study, launcher = open_study(plan), Launcher(lambda keys: 1.0)
    conducted = sweeps.conduct.Sweep(plan, study, launcher)
    with locked(logdir):
        for _ in range(3):
            conducted.fill()
        assert not launcher.started
    conducted.fill()
    assert len(launcher.started) == 1 and capsys.readouterr().err.count("another run is writing there") == 1


# ---------------------------------------------------------------------------
# Processes

STAND_IN = """
import json, pathlib, signal, sys, time
keys = json.loads(pathlib.Path(sys.argv[-1]).read_text())
logdir = pathlib.Path(keys["logdir"])
logdir.mkdir(parents=True, exist_ok=True)
count = logdir / "count"
step = int(count.read_text()) if count.exists() else 0
ended = []
signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
while step < 8:
    time.sleep(0.05)
    step += 1
    if ended:
        count.write_text(str(step))  # its checkpoint
        sys.exit(143)
    with open(logdir / "scores.jsonl", "a") as file:
        for _ in range(2):
            file.write(json.dumps({"step": step, "mode": "eval", "score": step + keys["imag_horizon"]}) + "\\n")
"""
MAIN = "import sys, sweep, sweeps.conduct as c; c.PROGRAM = (sys.argv.pop(1),); sys.exit(sweep.main())"


def start(folder, file):
    (folder / "stand_in.py").write_text(STAND_IN)
    argv = [sys.executable, "-c", MAIN, str(folder / "stand_in.py"), "--config", file]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_sweep_that_is_killed_or_ended_leaves_checkpoints_and_goes_on_to_its_table(tmp_path):
    file = write(tmp_path, {"at_once": 2}, imag_horizon=[2, 3, 4])
    checkpoint = tmp_path / "runs" / "000" / "0" / "count"
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        running = start(tmp_path, file)
        scores = tmp_path / "runs" / ("000" if status == -9 else "002") / "0" / "scores.jsonl"
        deadline = time.monotonic() + 60
        while not scores.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(number)
        assert running.wait(60) == status
        running.communicate()
        while not checkpoint.exists() and time.monotonic() < deadline:  # written after the sweep was dead
            time.sleep(0.02)
        assert checkpoint.exists()
    ended = start(tmp_path, file)
    out, _ = ended.communicate(timeout=200)
    assert ended.returncode == 0
    rows = out.splitlines()
    assert rows[0].split() == ["trial", "state", "return", "imag_horizon"]
    assert [row.split() for row in rows[1:4]] == [
        [str(number), "complete", f"{8.0 + value}", str(value)] for number, value in ((2, 4), (1, 3), (0, 2))
    ]
    assert rows[4] == f"best: trial 2, return 12.0, in {tmp_path}/runs/002/0" and "importances" in rows[5]
    with open(tmp_path / "runs" / "results.csv") as table:
        assert [row["return"] for row in csv.DictReader(table)] == ["12.0", "11.0", "10.0"]
    assert (tmp_path / "runs" / "importances.png").stat().st_size > 1000


def test_a_trial_of_the_real_program_trains_and_its_evaluation_counts(tmp_path):
    assert sweep.main(["--config", write(tmp_path, steps=50, agent="random")]) == 0
    logdir = tmp_path / "runs" / "000" / "0"
    scores = [json.loads(line) for line in (logdir / "scores.jsonl").read_text().splitlines()]
    last = [entry["score"] for entry in scores if entry["mode"] == "eval"][-2:]
    with open(tmp_path / "runs" / "results.csv") as table, contextlib.closing(table):
        assert float(next(csv.DictReader(table))["return"]) == pytest.approx(sum(last) / 2)
