"""Checkpoints that stay beside latest.pt: the best, and one for every so many frames."""

import json
import shutil

import pytest
import torch

import dreamer
import inference_video
import training.evaluation
from tests.factories import CONFIGS, one_line_error
from training.config import load_config
from training.keep import Keeper

WORDS = ["--configs", "debug", "--task", "dummy_vector", "--keep", "best,every:40", "--eval_episode_num", "1"]


def train(logdir, *words):
    assert dreamer.main([*WORDS, "--eval_every", "40", "--logdir", str(logdir), *words]) == 0
    return logdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a logdir whose three evaluations had returns of 1, 5 and 2, after 40, 80 and 90 frames."""
    patch, returns = pytest.MonkeyPatch(), iter([1.0, 5.0, 2.0])
    evaluate = training.evaluation.evaluate
    patch.setattr(training.evaluation, "evaluate", lambda *args: evaluate(*args) and next(returns))
    logdir = train(tmp_path_factory.mktemp("keep") / "run", "--steps", "90")
    patch.undo()
    return logdir


def steps(path):
    return torch.load(path, weights_only=True)["counters"]["agent_steps"]


def test_the_best_and_those_of_every_so_many_frames_stay(run):
    kept = sorted(path.name for path in run.glob("*.pt") if "replay" not in path.name)
    assert kept == ["best.pt", "latest.pt", "step_000000040.pt", "step_000000080.pt"]
    assert [steps(run / name) for name in kept] == [80, 90, 40, 80]
    assert torch.load(run / "best.pt", weights_only=True)["eval_return"] == 5.0


def test_the_best_is_remembered_over_resumes(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for score, best in ((4.0, 80), (5.0, 80), (6.0, 96)):
        monkeypatch.setattr(training.evaluation, "evaluate", lambda *_, score=score: score)
        train(tmp_path / "run", "--steps", str(90 + score))
        assert steps(tmp_path / "run" / "best.pt") == best
    assert not list(tmp_path.rglob("step_000000120.pt"))


@pytest.mark.parametrize("name", ["best.pt", "step_000000040.pt"])
def test_what_is_kept_loads_wherever_the_latest_does(run, tmp_path, name):
    assert dreamer.load_agent(run / name, "cpu").obs_spec
    words = ["--checkpoint", str(run / name), "--episodes", "1", "--output", str(tmp_path / "films")]
    assert inference_video.main(words) == 0
    assert json.loads((tmp_path / "films" / "scores.json").read_text())["step"] == steps(run / name)
    from_it = ["--from_checkpoint", str(run / name)]
    train(tmp_path / "eval", *from_it, "--script", "eval_only")
    train(tmp_path / "more", *from_it, "--steps", "20", "--eval_episode_num", "0")


def test_a_run_goes_back_to_what_was_kept(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run / "step_000000040.pt", tmp_path / "run" / "latest.pt")
    train(tmp_path / "run", "--steps", "44", "--eval_episode_num", "0")
    assert steps(tmp_path / "run" / "latest.pt") == 44


def test_a_damaged_best_is_named_and_surpassed(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"PK\3\4 and so on")
    keeper, warnings = Keeper(tmp_path, ["best"], lambda: {"agent": {}}), []
    keeper.begin(0, warnings.append)
    assert len(warnings) == 1 and str(tmp_path / "best.pt") in warnings[0] and "\n" not in warnings[0]
    for score, kept in ((None, None), (-3.0, -3.0), (float("nan"), -3.0), (-4.0, -3.0), (1.0, 1.0)):
        keeper.evaluated(score)
        if kept is not None:
            assert torch.load(tmp_path / "best.pt", weights_only=True)["eval_return"] == kept


def test_without_a_rule_nothing_stays(tmp_path):
    keeper = Keeper(tmp_path, [], lambda: pytest.fail("a checkpoint was asked for"))
    keeper.begin(0, pytest.fail)
    keeper.evaluated(1.0)
    keeper.serve(10**9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["worst", "every", "every:", "every:1.5", "every:-1", "every:0"])
def test_an_unknown_rule_is_one_line(rule):
    assert "--keep: expected one of best, every:N" in one_line_error(load_config, ["--keep", rule], CONFIGS)
