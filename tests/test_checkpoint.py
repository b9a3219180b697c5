"""Checkpoints that are damaged, foreign or hostile, and the lock on a logdir."""

import copy
import io
import math
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import dreamer
import inference_video
import training.run
from agents.older import check_form, read_specs
from tests.factories import CONFIGS, one_line_error
from tools import UserError, locked, misfit, sweep
from training.archive import check_archive
from training.boards import run_id
from training.checkpoint import RESUMED, atomic_save, load_checkpoint, load_stored
from training.config import load_config
from training.foreign import check_foreign
from training.logger import _JsonLines
from training.videos import check_mp4, write_mp4

ROOT = pathlib.Path(__file__).parents[1]
LOGDIRS = ROOT / "tests" / "data" / "logdirs"
OLD = LOGDIRS / "dreamerv3"  # a whole logdir
REFUSED = r"damaged|no checkpoint"


@pytest.fixture(scope="module")
def saved():
    return torch.load(OLD / "latest.pt", weights_only=True)


# ---------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", ["latest.pt", "replay-12.pt"])
def test_no_damage_is_accepted_wherever_it_is(tmp_path, name):
    content, rng = (OLD / name).read_bytes(), np.random.default_rng(0)
    for offset in rng.integers(len(content) - 16, size=200):
        damaged = bytearray(content)
        damaged[offset : offset + 16] = rng.bytes(16)
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=REFUSED):
            check_archive(tmp_path / name)


@pytest.mark.parametrize("name", ["latest.pt", "replay-12.pt"])
def test_a_file_that_was_cut_short_or_is_longer_is_not_accepted(tmp_path, name):
    content = (OLD / name).read_bytes()
    for length in (1, 3, 4, 30, 300, len(content) // 2, len(content) - 22, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=REFUSED):
            check_archive(tmp_path / name)
    (tmp_path / name).write_bytes(content + b"more")
    with pytest.raises(ValueError, match="damaged"):
        check_archive(tmp_path / name)


@pytest.mark.parametrize("path", sorted(LOGDIRS.glob("*/*.pt")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_ever_written_is_accepted(path):
    check_archive(path)


def test_what_is_written_now_is_accepted(tmp_path):
    state = {"a": torch.zeros(1000), "b": [torch.ones(3, dtype=torch.bfloat16)], "empty": torch.zeros(0), "x": "é"}
    atomic_save(tmp_path / "x.pt", state)
    check_archive(tmp_path / "x.pt")
    atomic_save(tmp_path / "many.pt", {str(i): torch.zeros(1) for i in range(300)})
    check_archive(tmp_path / "many.pt")


class Code:
    """A pickle that runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def legacy(state):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def archive(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


FOREIGN = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "it is no checkpoint of this project"),
    "pickle": (lambda: pickle.dumps(Code()), "it is no checkpoint of this project"),
    "code": (lambda: archive({"agent": Code()}), "code is not run"),
    "legacy": (lambda: legacy({"agent": {}}), "it is no checkpoint of this project"),
    "state dict": (lambda: archive(torch.nn.Linear(2, 2).state_dict()), "it is no checkpoint of this project"),
    "dreamerv3-torch": (
        lambda: archive({"agent_state_dict": {"_wm.x": torch.zeros(2)}, "optims_state_dict": {}}),
        "it is no checkpoint of this project",
    ),
    "list": (lambda: archive([1, 2]), "it is no checkpoint of this project"),
    "half": (lambda: (OLD / "latest.pt").read_bytes()[:150_000], "damaged or was cut short"),
    "agent alone": (lambda: archive({"agent": {}}), "counters is missing"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_one_line_and_runs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, reason = FOREIGN[kind]
    path = tmp_path / "latest.pt"
    path.write_bytes(make())
    error = one_line_error(load_checkpoint, path)
    assert error.startswith(f"{path} cannot be loaded: ") and reason in error and len(error) < 300
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "latest.pt")
    assert "cannot be loaded" in one_line_error(load_checkpoint, tmp_path / "latest.pt")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"nonsense", None])
def test_a_damaged_file_of_the_replay_only_warns(tmp_path, content):
    path, warnings = tmp_path / "replay-3.pt", []
    if content is not None:
        path.write_bytes(content)
    assert load_stored(path, warnings.append) is None
    assert len(warnings) == 1 and str(path) in warnings[0] and warnings[0].endswith("latent states start anew")


# ---------------------------------------------------------------------------
# Form


def changed(tree, place, value):
    """Return a copy of a tree in which a dotted place has another value; ... removes it."""
    tree = copy.deepcopy(tree)
    *above, last = place.split(".")
    part = tree
    for name in above:
        part = part[name]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return tree


WRONG = {  # places: what is wrong there
    "counters": [..., None, 3, []],
    "counters.updates": [..., -1, "12", 1.5, True, None],
    "clocks": [..., {}],
    "clocks.ratio": [..., 3],
    "clocks.ratio.start": ["x", ...],
    "clocks.save.next": [None, ...],
    "rng": [..., {}, None],
    "rng.torch": [torch.zeros(3), torch.zeros(5056, dtype=torch.uint8), None],
    "rng.numpy": [[], ["MT19937", torch.zeros(3), 0, 0, 0.0]],
    "rng.python": [[3, [1, 2], None], {}],
    "random": [..., {}, {"bit_generator": "PCG64"}, torch.zeros(3)],
    "replay": [..., 3, "../../secret.pt", "replay-x.pt"],
    "task": [3],
    "agent": [None, 7],
}


@pytest.mark.parametrize("place", WRONG)
def test_a_checkpoint_of_another_form_is_one_line(tmp_path, saved, place):
    for value in WRONG[place]:
        torch.save(changed(saved, place, value), tmp_path / "latest.pt")
        error = one_line_error(load_checkpoint, tmp_path / "latest.pt", RESUMED)
        assert place.split(".")[0] in error


AGENT = {
    "model": [..., None, {"x": 3}],
    "opt": [..., {}, {"names": []}, 3],
    "opt.names": [..., [3], ["no.such.parameter"], []],
    "opt.nu": [..., torch.zeros(3), None],
    "signature": [..., 3, {"x": 3}],
    "specs": [3, {}, {"observation": {"x": {}}, "action": {}}],
}


@pytest.mark.parametrize("place", AGENT)
def test_an_agent_of_another_form_is_one_line(saved, place):
    for value in AGENT[place]:
        assert "damaged or of another project: agent" in one_line_error(
            check_form, changed(saved["agent"], place, value)
        )


def test_specs_that_tell_no_spaces_are_one_line(saved):
    assert read_specs(saved["agent"])
    for value in (..., {}, {"observation": {}, "action": 3}, {"observation": {"x": {"kind": "smell"}}, "action": {}}):
        one_line_error(read_specs, changed(saved["agent"], "specs", value))


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["model", "opt"])
def test_weights_that_are_not_finite_are_refused_wherever_an_agent_is_loaded(tmp_path, capfd, saved, number, where):
    run = shutil.copytree(OLD, tmp_path / "run")
    broken = copy.deepcopy(saved)
    tensor = broken["agent"]["opt"]["mu"] if where == "opt" else next(iter(broken["agent"]["model"].values()))
    tensor.view(-1)[0] = number
    torch.save(broken, run / "latest.pt")
    assert f"agent.{where}." in one_line_error(dreamer.load_agent, run, "cpu")
    words = ["--config", str(run / "config.yaml"), "--logdir", str(run)]
    before = sorted(run.rglob("*"))
    assert dreamer.main(words) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "is not finite: what it had learned is lost" in errors
    assert sorted(run.rglob("*")) == before


def test_a_model_whose_shapes_are_not_those_that_it_claims_is_another_agent(tmp_path, saved):
    run = shutil.copytree(OLD, tmp_path / "run")
    name = next(key for key, value in saved["agent"]["model"].items() if value.ndim == 2)
    for change in (lambda model: model.pop(name), lambda model: model.update({name: torch.zeros(2, 3)})):
        broken = copy.deepcopy(saved)
        change(broken["agent"]["model"])
        torch.save(broken, run / "latest.pt")
        assert "of other parameters" in one_line_error(dreamer.load_agent, run, "cpu")


def test_a_signature_counts_for_nothing_beside_the_shapes_of_the_model(saved):
    agent = dreamer.load_agent(OLD, "cpu").agent
    state = copy.deepcopy(agent.state_dict())
    name = next(key for key, value in state["model"].items() if value.ndim == 2)
    state["model"][name] = torch.zeros(2, 3)
    assert f"{name} is (2, 3) there" in one_line_error(agent.load_state_dict, state)
    del state["model"][name]
    assert f"{name} is absent there" in one_line_error(agent.load_state_dict, state)


def test_a_form_says_where_a_tree_differs():
    form = {"a": [int], "b?": (str, float | None), "c": {str: bool}}
    assert misfit({"a": [1, 2], "c": {}, "more": 3}, form) is None
    assert misfit({"a": (), "b": ["x", None], "c": {"x": True}}, form) is None
    assert misfit({"c": {}}, form) == "a is missing"
    assert misfit({"a": [1, "2"], "c": {}}, form) == "a[1] is not what belongs there"
    assert misfit({"a": [True], "c": {}}, form) == "a[0] is not what belongs there"
    assert misfit({"a": [], "b": ["x"], "c": {}}, form) == "b has 1 entries instead of 2"
    assert misfit({"a": [], "c": {3: True}}, form) == "c.3 is no such key"
    assert misfit([], form) == "it is not what belongs there"


# ---------------------------------------------------------------------------
# What a logdir holds already


def config(logdir):
    return load_config([], CONFIGS).replace(logdir=str(logdir), task="dummy_vector")


def opened(logdir):
    with dreamer.contextlib.ExitStack() as stack:
        return training.run.open_logdir(config(logdir), stack)[0], sorted(path.name for path in logdir.iterdir())


def test_a_start_that_learned_nothing_is_no_obstacle(tmp_path, capfd):
    words = ["--configs", "debug", "--logdir", str(tmp_path), "--eval_episode_num", "0", "--steps"]
    assert dreamer.main([*words, "0", "--task", "dummy_vector"]) == 0
    path = tmp_path / "latest.pt"
    assert torch.load(path, weights_only=True)["counters"] == {"agent_steps": 0, "updates": 0, "episodes": 0}
    assert dreamer.main([*words, "3", "--task", "dummy_vector", "--rssm.deter", "64"]) == 0
    assert "begins anew at step 0, as nothing was learned there yet" in capfd.readouterr().err
    assert torch.load(path, weights_only=True)["counters"]["agent_steps"] == 3


@pytest.mark.parametrize("name", ["scores.jsonl", "metrics.jsonl"])
def test_a_checkpoint_that_is_gone_is_said(tmp_path, capfd, name):
    (tmp_path / name).write_text("")
    assert opened(tmp_path)[0] is None and not capfd.readouterr().err
    (tmp_path / name).write_text('{"step": 3}\n')
    assert opened(tmp_path)[0] is None
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "latest.pt is gone" in error and name in error


def test_a_logdir_without_a_checkpoint_belongs_to_its_task(tmp_path):
    (tmp_path / "config.yaml").write_text("task: dummy_discrete\n")
    assert "the run in" in one_line_error(opened, tmp_path)


def test_temporary_files_of_a_killed_run_are_swept_and_no_others(tmp_path):
    episode = next((OLD / "train_eps").iterdir()).name
    ours = [f"{name}.0123abcd.tmp" for name in ("latest.pt", "replay-12.pt", "best.pt", "step_000000040.pt", episode)]
    others = ["notes.tmp", "latest.pt.tmp", "latest.pt.0123abcd.tmp.tmp", "my.0123abcd.tmp", "latest.pt.0123ABCD.tmp"]
    for folder in (tmp_path, tmp_path / "train_eps", tmp_path / "eval_eps"):
        folder.mkdir(exist_ok=True)
        for name in ours + others:
            (folder / name).write_text("x")
    opened(tmp_path)
    for folder in (tmp_path, tmp_path / "train_eps", tmp_path / "eval_eps"):
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(others)
    sweep([tmp_path / "no such folder"])


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    logdir = tmp_path / "a" / "b"
    with dreamer.contextlib.ExitStack() as stack:
        assert training.run.open_logdir(config(logdir), stack)[0] is None
        assert one_line_error(opened, logdir).startswith(
            f"{logdir}: another run is writing there: process {os.getpid()}"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_a_logdir_that_no_folder_can_be_called_is_one_line(tmp_path, name):
    with dreamer.contextlib.ExitStack() as stack:
        assert "--logdir" in one_line_error(training.run.open_logdir, config(tmp_path / name), stack)


# ---------------------------------------------------------------------------
# The lock

ORPHAN = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from tools import locked
with locked(sys.argv[1]) as held:
    if not os.fork():  # an environment's process, which outlives the run
        time.sleep(60)
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_whatever_it_has_forked(tmp_path):
    command = [sys.executable, "-c", ORPHAN, str(tmp_path), str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "True\n"
            error = one_line_error(locked(tmp_path).__enter__)
            assert f"{tmp_path}: another run is writing there: process {process.pid} on " in error
            process.kill()
            process.wait()
            time.sleep(0.1)
            with locked(tmp_path) as held:
                assert held
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path):
    (tmp_path / ".lock").mkdir()
    with locked(tmp_path) as held:
        assert not held
    with pytest.raises(UserError, match="mine"), locked(tmp_path):
        raise UserError("mine")


# ---------------------------------------------------------------------------
# Configurations from elsewhere


def foreign(tmp_path, monkeypatch, text, given=()):
    """Check a run's config.yaml, called from tmp_path/mine, which has a module cave; the run has one called evil."""
    for place, name in (("mine", "cave"), ("run", "evil")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / f"{name}.py").write_text("raise AssertionError('it was run')\n")
    (tmp_path / "run" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "mine")
    config = load_config(["--config", str(tmp_path / "run" / "config.yaml")], CONFIGS)
    return lambda: check_foreign(config, tmp_path / "run", given)


@pytest.mark.parametrize(
    "task",
    ["custom_evil:Env", "custom_os:system", "custom_subprocess:run", "custom_.evil:Env", "gym_evil:Env-v0", "custom_:"],
)
def test_a_config_from_elsewhere_imports_nothing_but_the_users_own(tmp_path, monkeypatch, task):
    error = one_line_error(foreign(tmp_path, monkeypatch, f"task: '{task}'\n"))
    assert str(tmp_path / "run" / "config.yaml") in error and f"--task {task}" in error
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "run"))
    one_line_error(foreign(tmp_path, monkeypatch, f"task: '{task}'\n"))
    foreign(tmp_path, monkeypatch, f"task: '{task}'\n", {"task"})()


@pytest.mark.parametrize(
    "task", ["custom_cave:Env", "custom_cave.deep:Env", "gym_cave:Env-v0", "gym_CartPole-v1", "dmc_a_b"]
)
def test_the_users_own_environments_are_still_played(tmp_path, monkeypatch, task):
    foreign(tmp_path, monkeypatch, f"task: '{task}'\n")()


def test_a_folder_that_was_downloaded_is_not_imported_from_within(tmp_path, monkeypatch, capsys):
    run = shutil.copytree(OLD, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^task: .*$", "task: custom_evil:Env", text))
    (run / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
    monkeypatch.chdir(run)
    assert inference_video.main(["--checkpoint", ".", "--episodes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "names the module 'evil'" in error and "--task custom_evil:Env" in error
    assert not (run / "executed").exists()


BOMBS = {
    "brackets": "[" * 100_000,
    "mappings": "{a: " * 1000,
    "indents": "\n".join(" " * i + "a:" for i in range(1500)),
    "aliases": "\n".join(f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}" if i else "x"] * 10) + "]" for i in range(12)),
    "merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [" + ",".join([f"*a{i - 1}"] * 10) + "]}" for i in range(1, 9)),
    "circle": "a: &a {b: *a}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_config_that_would_unfold_without_an_end_is_one_line(tmp_path, kind):
    (tmp_path / "config.yaml").write_text(BOMBS[kind])
    error = one_line_error(load_config, ["--config", str(tmp_path / "config.yaml")], CONFIGS)
    assert "nested too deeply" in error or "aliases unfold to more than" in error


def test_aliases_may_be_used(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: &many 300\nprefill: *many\nencoder: {mlp_keys: '.*'}\n")
    config = load_config(["--config", str(tmp_path / "config.yaml")], CONFIGS)
    assert (config.steps, config.prefill) == (300, 300)


# ---------------------------------------------------------------------------
# What is written


def test_a_last_line_that_only_lacks_its_end_is_kept_and_a_torn_one_is_not(tmp_path):
    path = tmp_path / "scores.jsonl"
    for content, kept in (
        ('{"a": 1}\n{"b": 2}', 2),
        ('{"a": 1}\n{"b": ', 1),
        ('{"a": 1}', 1),
        ("{", 0),
        ("", 0),
        ("\n3", 1),
    ):
        path.write_text(content)
        lines = _JsonLines(path)
        lines.write({"c": 3})
        lines.close()
        assert path.read_text() == "".join(f"{line}\n" for line in content.splitlines()[:kept]) + '{"c": 3}\n'


def test_what_a_full_disk_takes_of_a_line_is_no_line(tmp_path):
    lines = _JsonLines(tmp_path / "x.jsonl")
    lines.write({"a": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, limit[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            lines.write({"b": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    lines.close()
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"a\nb", b"../../x", b"x" * 999])
def test_what_is_no_id_of_a_wandb_run_is_one_line(tmp_path, content):
    path = tmp_path / "wandb_id.txt"
    assert run_id(path) is None
    path.write_bytes(content)
    assert str(path) in one_line_error(run_id, path)
    path.write_bytes(b"a1-b_2\n")
    assert run_id(path) == "a1-b_2"


def test_a_film_that_a_full_disk_cut_short_is_said(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"\0\0\0 ftypisom")
    with pytest.raises(OSError, match="cut short: is the disk full"):
        check_mp4(tmp_path / "x.mp4")
    write_mp4(tmp_path / "films" / "y.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3, 30)


def test_a_logdir_that_vanishes_ends_the_run_in_one_line(tmp_path, monkeypatch, capfd):
    save = training.run.save_checkpoint
    monkeypatch.setattr(training.run, "save_checkpoint", lambda *args: shutil.rmtree(tmp_path / "run") or save(*args))
    words = [
        "--configs",
        "debug",
        "--task",
        "dummy_vector",
        "--steps",
        "20",
        "--eval_episode_num",
        "0",
        "--save_every",
        "10",
    ]
    assert dreamer.main([*words, "--logdir", str(tmp_path / "run")]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dreamer.py: ")]
    assert len(errors) == 1 and "No such file or directory; there is no checkpoint yet" in errors[0]
