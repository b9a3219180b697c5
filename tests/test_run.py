"""Tiny runs of dreamer.py: their output files, and resuming after interruptions and failures."""

import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dreamer
import envs
import envs.dmc
import envs.dummy
import replay.episodes
import replay.sampling
import tools
import training.driver
import training.evaluation
import training.run
from agents.dreamer import Dreamer
from agents.random import Random
from tests.factories import act, make_agent, make_batch, make_obs
from tools import locked
from training.config import load_config, load_presets
from training.videos import MARGIN, STRIP

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "--size 16 16"  # of images, the least that the networks take


def command(logdir, words="", preset="debug"):
    return ["--configs", *preset.split(), "--logdir", str(logdir), *words.split()]


def train(logdir, words="", preset="debug"):
    """Run in this process; it must succeed."""
    assert dreamer.main(command(logdir, words, preset)) == 0
    return logdir


def launch(logdir, words):
    """Run dreamer.py as a user does; return the completed process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, ROOT / "dreamer.py", *command(logdir, words)]
    return subprocess.run(argv, env=environment, cwd=logdir.parent, capture_output=True, text=True, timeout=200)


# Processes to be killed are forked off one that has imported all it needs, which saves seconds each.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])


def run_alone(logdir, words, prepare, *args):
    """Run in a new process and process group, after `prepare(*args)` there; returns exit status and stderr."""
    errors = logdir.with_suffix(".err")
    process = FORK.Process(target=_run_alone, args=(command(logdir, words), errors, prepare, args))
    process.start()
    process.join(200)
    return process.exitcode, errors.read_text()


def _run_alone(argv, errors, prepare, args):
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    prepare(*args)
    sys.exit(dreamer.main(argv))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(logdir, mode):
    return [entry for entry in lines(logdir / "scores.jsonl") if entry["mode"] == mode]


def episodes(folder):
    """Return the episode files of a folder, oldest first: [{key: array}]."""
    loaded = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            loaded.append({key: file[key] for key in file.files})
    return loaded


def checkpoint(logdir):
    return torch.load(logdir / "latest.pt", weights_only=True)


def differ(one, other, path=""):
    """Return the places where two trees of dicts, lists and tensors differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differ(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [place for i, pair in enumerate(zip(one, other, strict=True)) for place in differ(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if one == other else [path]


def same_episodes(one, other):
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.fixture(scope="module")
def multi(tmp_path_factory):
    """Return the logdir of a run on every kind of observation and action, made in a separate process."""
    logdir = tmp_path_factory.mktemp("multi") / "run"
    done = launch(logdir, f"{SMALL} --steps 160")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return logdir


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    """Return a function of further flags that returns the logdir of a run without images, made once."""
    made = {}

    def run(words=""):
        if words not in made:
            logdir = tmp_path_factory.mktemp("vector") / "run"
            made[words] = train(logdir, f"--task dummy_vector --steps 80 --opt.warmup 0 {words}")
        return made[words]

    return run


# ---------------------------------------------------------------------------
# What a run leaves behind

LEARNING = """
    fps updates updates_per_second lr grad_norm model_loss image_loss state_loss phase_loss reward_loss cont_loss
    dyn_loss rep_loss policy_loss value_loss repval_loss kl prior_ent post_ent actor_entropy imag_return return_scale
"""
ACTING = "train_return train_length eval_return eval_length"
METRICS = {*LEARNING.split(), *ACTING.split()}


def test_a_run_leaves_what_the_readme_promises(multi):
    names = {path.name for path in multi.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "scores.jsonl", "latest.pt", "train_eps", "eval_eps", "openloop"}
    assert not list(multi.rglob("*.tmp"))
    assert load_config(["--config", str(multi / "config.yaml")], dreamer.CONFIGS).steps == 160


def test_metrics_are_in_both_forms(multi):
    entries = lines(multi / "metrics.jsonl")
    last = {name: value for entry in entries for name, value in entry.items()}
    assert last.keys() >= METRICS
    assert all(isinstance(value, (int, float)) for entry in entries for value in entry.values())
    board = EventAccumulator(str(multi), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert {name.split("/")[1] for name in board.Tags()["scalars"]} >= METRICS
    keys = ["openloop/image", "openloop/phase", "openloop/state"]
    assert sorted(board.Tags()["images"]) == ["eval_policy/image", "film/episode", *keys]
    assert all(min(event.width, event.height) >= 240 for name in board.Tags()["images"] for event in board.Images(name))
    for name in ("world/image_loss", "eval/eval_return"):
        flat = name.split("/")[1]
        written = [(entry["step"], np.float32(entry[flat])) for entry in entries if flat in entry]
        assert [(event.step, np.float32(event.value)) for event in board.Scalars(name)] == written


def test_every_episode_has_its_score_and_its_file(multi):
    for mode in ("train", "eval"):
        files = episodes(multi / f"{mode}_eps")
        finished = [file for file in files if file["is_last"][-1]]
        entries = scores(multi, mode)
        assert len(entries) == len(finished)
        for entry, file in zip(entries, finished, strict=True):
            assert entry["length"] == entry["log_steps"] == len(file["reward"]) - 1
            assert entry["score"] == pytest.approx(file["reward"].sum(), abs=1e-4)
    assert len(scores(multi, "eval")) == 4  # two at step 100, two at the end
    assert all(len(path.stem.split("-")) == 3 for path in multi.glob("*_eps/*.npz"))


def test_evaluations_are_means_of_their_episodes(multi):
    played = iter(scores(multi, "eval"))
    for entry in lines(multi / "metrics.jsonl"):
        if "eval_return" in entry:
            part = list(itertools.islice(played, 2))
            assert entry["eval_episodes"] == 2 and entry["step"] == part[0]["step"]
            assert entry["eval_return"] == pytest.approx(np.mean([p["score"] for p in part]))
            assert entry["eval_length"] == np.mean([p["length"] for p in part])


def test_an_action_stands_beside_what_it_led_to(multi):
    for file in episodes(multi / "train_eps") + episodes(multi / "eval_eps"):
        before, move, phase = file["state"][:-1], file["move"], np.arange(len(file["reward"]) - 1) % 3
        assert not move[0].any() and not file["mode"][0].any() and file["reward"][0] == 0
        np.testing.assert_allclose(file["state"][1:], np.clip(before + np.clip(move[1:], -1, 1) / 5, -1, 1), atol=1e-6)
        right = file["mode"][1:].argmax(1) == phase
        np.testing.assert_allclose(file["reward"][1:], right - np.abs(file["state"][1:]).max(1), atol=1e-6)
        assert file["is_first"].tolist() == [True] + [False] * len(phase)


def test_time_outs_are_last_but_not_terminal(multi):
    files = [file for file in episodes(multi / "train_eps") if file["is_last"][-1]]
    ends = {(len(file["reward"]) - 1 == 12, bool(file["is_terminal"][-1])) for file in files}
    assert (True, False) in ends
    for file in files:
        out = np.abs(file["state"]).max(1) >= 1
        np.testing.assert_array_equal(file["is_terminal"], out)
        assert out[-1] or len(out) == 13
        assert not file["is_last"][:-1].any()


def test_train_and_eval_environments_differ(multi):
    starts = [tuple(file["state"][0]) for mode in ("train", "eval") for file in episodes(multi / f"{mode}_eps")]
    assert len(set(starts)) == len(starts)


def rows_of(video):
    """Return truth, model and error of an open-loop video of 16x16 images: (T, 80, B 80, 3) each, without borders."""
    frames = np.asarray(video)[:, STRIP:, MARGIN:, :3].astype(float)  # a panel has 80 pixels and a border of 3
    inside = np.arange(frames.shape[2]).reshape(-1, 86)[:, 3:-3].ravel()
    return (part[:, 3:-3, inside] for part in np.split(frames, 3, 1))


def test_open_loop_videos_show_truth_model_and_error(multi):
    files = sorted((multi / "openloop" / "image").glob("*.gif"))
    assert [file.stem for file in files] == ["000000100", "000000160"]
    video = imageio.imread(files[-1], index=None)
    assert video.shape[:3] == (8, STRIP + 3 * 86, MARGIN + 4 * 86)  # batch_length frames, batch_size sequences
    truth, model, error = rows_of(video)
    assert set(np.unique(truth.round(-1))) >= {0, 260} and model.std() > 1
    assert np.abs(error - (model - truth + 255) / 2).mean() < 8  # exact but for the palette of a GIF


def test_open_loop_videos_of_vectors_are_curves(multi):
    for key in ("state", "phase"):
        files = sorted((multi / "openloop" / key).glob("*.gif"))
        assert [file.stem for file in files] == ["000000100", "000000160"]
        assert len(imageio.imread(files[-1], index=None)) == 8


def test_the_agent_is_filmed(multi):
    (file,) = (multi / "videos").glob("*.mp4")
    video = imageio.imread(file, plugin="FFMPEG")
    assert video.shape[1:] == (240, 240, 3) and 1 <= len(video) <= 12 and video.std() > 1
    (score,) = re.fullmatch(r"000000160_score_(-?\d+\.\d)", file.stem).groups()
    board = EventAccumulator(str(multi)).Reload()
    (event,) = board.Images("film/episode")
    assert (event.step, event.width, event.height) == (160, 240, 240) and -12 <= float(score) <= 12
    assert lines(multi / "metrics.jsonl")[-1].keys() == {"step", "film_seconds"}


def test_the_checkpoint_holds_the_counters(multi):
    saved = checkpoint(multi)
    assert saved["counters"] == {"agent_steps": 160, "updates": 30, "episodes": len(scores(multi, "train"))}
    assert all(torch.isfinite(value).all() for value in saved["agent"]["model"].values())
    assert [path.name for path in multi.glob("replay-*.pt")] == [saved["replay"]]


# ---------------------------------------------------------------------------
# Clocks and seeds


@pytest.mark.parametrize("words", ["--envs 1", "--envs 3 --train_ratio 40", "--train_ratio 10 --log_every 7"])
def test_the_train_ratio_is_exact(vector, words):
    logdir = vector(words)
    config = load_config(["--config", str(logdir / "config.yaml")], dreamer.CONFIGS)
    ratio = config.train_ratio / (config.batch_size * config.batch_length)
    saved = checkpoint(logdir)
    start = saved["clocks"]["ratio"]["start"]
    assert 40 <= start < 40 + config.envs and 80 <= saved["counters"]["agent_steps"] < 80 + config.envs
    entries = [entry for entry in lines(logdir / "metrics.jsonl") if "updates" in entry]
    assert len(entries) > 2
    for entry in entries:
        assert entry["updates"] == max(0, math.floor(ratio * (entry["step"] - start)))
    assert saved["counters"]["updates"] == math.floor(ratio * (saved["counters"]["agent_steps"] - start)) > 9


def test_frames_count_the_action_repeat(tmp_path):
    train(tmp_path, "--task dummy_vector --action_repeat 2 --steps 100 --prefill 30 --eval_every 0")
    assert checkpoint(tmp_path)["counters"] == {"agent_steps": 50, "updates": 5, "episodes": 4}
    assert [(entry["step"], entry["length"]) for entry in scores(tmp_path, "train")] == [
        (20, 10),
        (40, 10),
        (60, 10),
        (80, 10),
    ]


def test_the_seed_decides_everything(vector, tmp_path):
    one, other = vector(), vector("--seed 1")
    again = train(tmp_path, "--task dummy_vector --steps 80 --opt.warmup 0")
    assert (one / "scores.jsonl").read_text() == (again / "scores.jsonl").read_text()
    assert not differ(checkpoint(one), checkpoint(again))
    assert same_episodes(episodes(one / "train_eps"), episodes(again / "train_eps"))
    for mode in ("train", "eval"):
        assert scores(one, mode)[0]["score"] != scores(other, mode)[0]["score"]
    weights = [name for name, value in checkpoint(one)["agent"]["model"].items() if value.dim() == 2 and value.any()]
    changed = differ(checkpoint(one)["agent"]["model"], checkpoint(other)["agent"]["model"])
    assert len(weights) > 9 and {f"/{name}" for name in weights} <= set(changed)


def test_worker_processes_change_nothing(vector):
    alone, workers = (vector(f"--envs 2 --eval_envs 1 --parallel {parallel}") for parallel in ("false", "true"))
    assert (alone / "scores.jsonl").read_text() == (workers / "scores.jsonl").read_text()
    assert not differ(checkpoint(alone), checkpoint(workers))


def test_evaluation_leaves_training_alone(vector):
    often, never = vector("--eval_every 15 --eval_episode_num 3"), vector("--eval_every 0")
    assert len(scores(often, "eval")) == 18 and len(scores(never, "eval")) == 2
    assert all(entry["length"] == 20 for entry in scores(often, "eval"))
    assert scores(often, "train") == scores(never, "train")
    assert same_episodes(episodes(often / "train_eps"), episodes(never / "train_eps"))
    assert not differ(checkpoint(often)["agent"], checkpoint(never)["agent"])


class OneBatch:
    """A replay that always returns the same batch."""

    def sample(self, count):
        return make_batch("proprio"), []

    def refresh(self, places, stored):
        """Ignore the latents."""


def test_acting_changes_no_update_and_an_update_no_action():
    learner, actor, both = (make_agent("proprio", "--opt.lr", "0") for _ in range(3))  # else updates do change actions
    obs = make_obs("proprio")
    for _ in range(3):
        assert not differ(learner.learn(OneBatch()), both.learn(OneBatch()))
        assert not differ(*(act(agent, obs)[0]["action"].tolist() for agent in (actor, both)))
    assert not differ(learner.state_dict()["model"], both.state_dict()["model"])
    for name in ("act", "learn"):
        both.generators[name].manual_seed(0)  # so that both of them were drawn from
    assert differ(learner.learn(OneBatch()), both.learn(OneBatch()))
    assert differ(*(act(agent, obs)[0]["action"].tolist() for agent in (actor, both)))


def test_what_an_environment_does_to_the_global_generators_changes_nothing(vector, tmp_path, monkeypatch):
    step = envs.dummy.Vector.step

    def meddling(*args):
        torch.manual_seed(0)
        np.random.seed(0)
        return step(*args)

    monkeypatch.setattr(envs.dummy.Vector, "step", meddling)
    train(tmp_path, "--task dummy_vector --steps 80 --opt.warmup 0")
    assert (tmp_path / "scores.jsonl").read_text() == (vector() / "scores.jsonl").read_text()
    assert not differ(checkpoint(tmp_path)["agent"], checkpoint(vector())["agent"])


def test_checkpoints_may_be_asked_for_by_time(tmp_path, monkeypatch):
    now, saves, learn, save = [0.0], [], Dreamer.learn, training.run.save_checkpoint

    def slow(*args):
        now[0] += 0.25
        return learn(*args)

    monkeypatch.setattr(tools, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Dreamer, "learn", slow)
    monkeypatch.setattr(training.run, "save_checkpoint", lambda *args: saves.append(args[-1]) or save(*args))
    train(tmp_path, "--task dummy_vector --steps 80 --eval_every 0 --save_every 1s")
    assert saves == [4, 8, 10]  # updates: of each a quarter of a second, and the last
    assert load_config(["--config", str(tmp_path / "config.yaml")], dreamer.CONFIGS).save_every == "1s"


def test_what_is_learned_while_no_frames_pass_is_logged_and_saved(vector, tmp_path, monkeypatch):
    folder, saves, save = vector() / "train_eps", [], training.run.save_checkpoint
    monkeypatch.setattr(training.run, "save_checkpoint", lambda *args: saves.append(args[-1]) or save(*args))
    for name in ("LONGEST_UNLOGGED", "LONGEST_UNSAVED"):
        monkeypatch.setattr(training.run, name, -1)
    words = f"--task dummy_vector --script train_offline --offline_traindir {folder} --pretrain 3"
    train(tmp_path, f"{words} --steps 1 --eval_every 0")
    assert saves == [1, 2, 3, 3]
    assert [entry["updates"] for entry in lines(tmp_path / "metrics.jsonl") if "updates" in entry][:3] == [1, 2, 3]


# ---------------------------------------------------------------------------
# Interruptions


def die_at_update(number):
    learn, count = Dreamer.learn, itertools.count()

    def dying(agent, replay):
        if next(count) == number:
            die()
        return learn(agent, replay)

    Dreamer.learn = dying


@pytest.fixture(scope="module")
def offline(multi, tmp_path_factory):
    """Return flags to learn from a fixed directory, 10 updates to step 20, and an uninterrupted run of 40 steps."""
    words = f"{SMALL} --script train_offline --offline_traindir {multi / 'train_eps'} --train_ratio 16 --save_every 20 "
    words += "--eval_every 15 --opt.warmup 0 --opt.lr 1e-3"
    return words, train(tmp_path_factory.mktemp("offline"), f"{words} --steps 40")


def assert_equal_runs(one, other):
    """Assert that checkpoints and the stored latents are equal to the last bit."""
    assert checkpoint(one)["counters"]["updates"] == 20
    assert not differ(checkpoint(one), checkpoint(other))
    latents = [torch.load(logdir / "replay-20.pt", weights_only=True) for logdir in (one, other)]
    assert not differ(*latents)
    assert latents[0]["streams"][0]["deter"].any(1).float().mean() > 0.8


def test_n_updates_kill_resume_n_updates_equal_2n_updates(offline, tmp_path):
    words, whole = offline
    status, _ = run_alone(tmp_path / "run", f"{words} --steps 40", die_at_update, 13)
    assert status == -signal.SIGKILL
    half = checkpoint(tmp_path / "run")
    assert half["counters"]["updates"] == 10 and half["counters"]["agent_steps"] == 20
    assert len(differ(half["agent"]["model"], checkpoint(whole)["agent"]["model"])) > 30
    train(tmp_path / "run", f"{words} --steps 40")
    assert_equal_runs(whole, tmp_path / "run")


def test_a_run_that_ended_goes_on_when_steps_are_added(offline, tmp_path):
    words, whole = offline
    train(tmp_path, f"{words} --steps 20")
    train(tmp_path, f"{words} --steps 40")
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize("words, total", [("--pretrain 15", 15 + 30), ("--train_burst 15", 30)])
def test_a_signal_within_many_updates_ends_after_the_one_in_hand_and_the_rest_follow(
    vector, tmp_path, monkeypatch, words, total
):
    learn, count = Dreamer.learn, itertools.count(1)

    def interrupted(*args):
        if next(count) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args)

    words += f" --task dummy_vector --script train_offline --offline_traindir {vector() / 'train_eps'} --train_ratio 16"
    words += " --steps 60 --eval_every 15 --opt.warmup 0"
    train(tmp_path / "whole", words)
    monkeypatch.setattr(Dreamer, "learn", interrupted)
    assert dreamer.main(command(tmp_path / "parts", words)) == 128 + signal.SIGTERM
    assert next(count) == 10 and checkpoint(tmp_path / "parts")["counters"]["updates"] == 9
    train(tmp_path / "parts", words)
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["counters"]["updates"] == total and not differ(whole, parts)
    latents = [torch.load(tmp_path / name / f"replay-{total}.pt", weights_only=True) for name in ("whole", "parts")]
    assert not differ(*latents)


def test_a_run_that_goes_on_meets_other_episodes_than_it_began_with(tmp_path):
    words = "--task gym_CartPole-v1 --prefill 1000 --eval_every 0 --eval_episode_num 1"  # starts are drawn by the seed
    for name in ("one", "other"):
        train(tmp_path / name, f"{words} --steps 30")
        train(tmp_path / name, f"{words} --steps 60")
    one, other = (episodes(tmp_path / name / "train_eps") for name in ("one", "other"))
    starts = [episode["state"][0].tolist() for episode in one]
    assert len(set(map(tuple, starts))) == len(starts) > 1
    assert same_episodes(one, other)


def collecting(then):
    """Return a Driver.step that calls `then(driver, agent steps so far)` after each step in training environments."""
    step, total = training.driver.Driver.step, 0

    def counted(driver, agent, mode, *going):
        nonlocal total
        steps = step(driver, agent, mode, *going)
        if mode != "mode":  # which is how evaluations act
            total += steps
            then(driver, total)
        return steps

    return counted


def signal_at_step(step, kill, number):
    training.driver.Driver.step = collecting(lambda _, total: total == step and kill(os.getpid(), number))


@pytest.mark.parametrize(
    "number, kill, parallel",
    [
        (signal.SIGTERM, os.kill, "false"),
        (signal.SIGINT, os.killpg, "true"),  # as Ctrl-C in a terminal, which worker processes get as well
    ],
)
def test_a_signal_ends_a_run_in_good_order(tmp_path, number, kill, parallel):
    logdir, words = tmp_path / "run", "--task dummy_vector --prefill 30 --eval_envs 1"
    status, errors = run_alone(logdir, f"{words} --steps 1e6 --parallel {parallel}", signal_at_step, 52, kill, number)
    assert status == 128 + number, errors
    assert "Traceback" not in errors and "Error" not in errors
    saved = checkpoint(logdir)
    assert saved["counters"] == {"agent_steps": 52, "updates": 5, "episodes": 2}
    files = episodes(logdir / "train_eps")
    assert [len(file["reward"]) for file in files] == [21, 21, 12]  # 20 + 20 + 12 actions; the last result is not seen
    assert [bool(file["is_last"][-1]) for file in files] == [True, True, False]
    train(logdir, f"{words} --steps 60")
    assert checkpoint(logdir)["counters"] == {"agent_steps": 60, "updates": 7, "episodes": 2}
    assert all(entry["step"] >= 52 for entry in lines(logdir / "metrics.jsonl")[-2:])


def test_a_killed_worker_costs_its_episode_and_nothing_else(tmp_path, monkeypatch, capfd):
    def disturb(driver, total):
        if total == 70:  # 15 steps into the second episodes, while the third has not begun
            os.kill(driver.envs._handles[1]._process.pid, signal.SIGKILL)

    monkeypatch.setattr(training.driver.Driver, "step", collecting(disturb))
    train(tmp_path, "--task dummy_vector --envs 2 --parallel true --prefill 60 --eval_every 0 --steps 160")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "environment 1 was restarted: it died (exit code -9)" in warnings[0]
    last = [row for row in lines(tmp_path / "metrics.jsonl") if "env_restarts" in row][-1]
    assert last["env_restarts"] == 1
    saved, files = checkpoint(tmp_path)["counters"], episodes(tmp_path / "train_eps")
    assert saved["agent_steps"] == 160 and saved["updates"] > 20
    finished = [file for file in files if file["is_last"][-1]]
    assert [entry["length"] for entry in scores(tmp_path, "train")] == [20] * saved["episodes"]
    assert [len(file["reward"]) for file in finished] == [21] * saved["episodes"]
    assert len(files) == len(finished) + 3  # the one that was cut off, and those at the end of the run
    assert sum(len(file["reward"]) for file in files) == last["replay_steps"]
    for file in files:
        assert file["is_first"].tolist() == [True] + [False] * (len(file["reward"]) - 1)


def die_in_second_save(stage):
    """Die while the second save writes latents or the checkpoint, or before its last rename."""
    save, replace, count = torch.save, os.replace, itertools.count(1)
    fatal = {"latents": 3, "checkpoint": 4}.get(stage)

    def dying_save(state, file):
        memory = io.BytesIO()
        save(state, memory)
        if next(count) == fatal:
            file.write(memory.getvalue()[:1000])
            file.flush()
            die()
        file.write(memory.getvalue())

    def dying_replace(source, target):
        if stage == "rename" and target.endswith("latest.pt") and os.path.exists(target):
            die()
        replace(source, target)

    torch.save, os.replace = dying_save, dying_replace


@pytest.mark.parametrize("stage", ["latents", "checkpoint", "rename"])
def test_a_kill_in_the_midst_of_a_save_leaves_the_one_before(tmp_path, stage):
    logdir, words = tmp_path / "run", "--task dummy_vector --steps 90 --save_every 44 --eval_every 0"
    status, errors = run_alone(logdir, words, die_in_second_save, stage)
    assert status == -signal.SIGKILL, errors
    saved = checkpoint(logdir)
    assert saved["counters"]["agent_steps"] == 44
    torch.load(logdir / saved["replay"], weights_only=True)
    train(logdir, words)
    assert checkpoint(logdir)["counters"]["agent_steps"] == 90


def test_a_checkpoint_without_its_latents_still_resumes(vector, tmp_path):
    shutil.copytree(vector() / "train_eps", tmp_path / "train_eps")
    shutil.copy(vector() / "latest.pt", tmp_path)
    train(tmp_path, "--task dummy_vector --steps 88")
    assert checkpoint(tmp_path)["counters"]["updates"] == 12


def test_a_checkpoint_with_damaged_latents_says_so_and_resumes(vector, tmp_path, capfd):
    shutil.copytree(vector(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / checkpoint(tmp_path)["replay"]
    path.write_bytes(path.read_bytes()[:300])
    train(tmp_path, "--task dummy_vector --steps 84")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert checkpoint(tmp_path)["counters"]["updates"] == 11


def test_a_damaged_episode_file_is_named_once_and_the_run_goes_on(vector, tmp_path, capfd):
    shutil.copytree(vector(), tmp_path, dirs_exist_ok=True)
    path = min((tmp_path / "train_eps").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:300])
    train(tmp_path, "--task dummy_vector --steps 84")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert checkpoint(tmp_path)["counters"]["updates"] == 11


# ---------------------------------------------------------------------------
# A loss that is not finite


def test_a_non_finite_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capfd):
    loss, kept = Dreamer.loss, []

    def broken(agent, *args):
        losses, *rest = loss(agent, *args)
        if agent.opt.count == 12:
            kept.append((tmp_path / "latest.pt").read_bytes())
            losses["reward"] = losses["reward"] * math.inf
        return losses, *rest

    monkeypatch.setattr(Dreamer, "loss", broken)
    words = "--task dummy_vector --steps 200 --save_every 60 --eval_every 0"
    assert dreamer.main(command(tmp_path, words)) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dreamer.py: ")]
    assert len(error) == 1
    assert "not finite at step 92" in error[0] and "reward_loss inf" in error[0] and "cont_loss 0." in error[0]
    assert str(tmp_path / "latest.pt") in error[0]
    assert (tmp_path / "latest.pt").read_bytes() == kept[0]
    saved = checkpoint(tmp_path)
    assert saved["counters"]["updates"] == 5
    assert all(torch.isfinite(value).all() for value in saved["agent"]["model"].values())


@pytest.mark.parametrize("key, value", [("state", np.nan), ("state", np.inf), ("reward", np.nan)])
def test_an_environment_that_gives_what_is_not_finite_is_named(tmp_path, monkeypatch, capfd, key, value):
    step = envs.dummy.Vector.step

    def broken(env, action):
        obs = step(env, action)
        env.steps = getattr(env, "steps", 0) + 1
        return obs | {key: obs[key] * np.float32(value)} if env.steps == 30 else obs

    monkeypatch.setattr(envs.dummy.Vector, "step", broken)
    assert dreamer.main(command(tmp_path, "--task dummy_vector --steps 60 --eval_every 0")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    what = {"state": "observation 'state'", "reward": "the reward"}[key]
    assert f"dummy_vector (train environment 0) at step 10 of its episode: {what} is not finite" in error
    assert checkpoint(tmp_path)["counters"]["agent_steps"] >= 28  # all that came before
    assert all(np.isfinite(episode[key]).all() for episode in episodes(tmp_path / "train_eps"))


@pytest.mark.parametrize("what", ["act", "render"])
def test_what_an_environment_breaks_costs_no_data(tmp_path, monkeypatch, what):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    words = "--task dummy_vector --steps 60 --eval_every 0 --save_every 0"
    if what == "render":
        monkeypatch.setattr(training.evaluation, "film", broken)
        steps = 60
    else:
        step, count = envs.dummy.Vector.step, itertools.count(1)
        monkeypatch.setattr(envs.dummy.Vector, "step", lambda *args: broken() if next(count) == 35 else step(*args))
        steps = 34
    with pytest.raises(ZeroDivisionError):
        dreamer.main(command(tmp_path, words))
    assert abs(checkpoint(tmp_path)["counters"]["agent_steps"] - steps) <= 1
    assert sum(len(e["reward"]) - 1 for e in episodes(tmp_path / "train_eps")) >= steps - 1
    monkeypatch.undo()
    train(tmp_path, "--task dummy_vector --steps 64")


def test_an_evaluation_that_breaks_costs_no_updates_of_an_offline_run(vector, tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    shutil.copytree(vector() / "train_eps", tmp_path / "train_eps")
    monkeypatch.setattr(envs.dummy.Vector, "step", broken)
    words = "--task dummy_vector --steps 40 --script train_offline --eval_every 20 --save_every 0"
    with pytest.raises(ZeroDivisionError):
        dreamer.main(command(tmp_path, words))
    assert checkpoint(tmp_path)["counters"]["updates"] > 0


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    code, error = run_alone(tmp_path / "run", "--task dummy_vector --steps 40 --eval_every 0", small_files)
    assert code == 1 and "Traceback" not in error
    assert "File too large; there is no checkpoint yet" in error
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("words", ["--eval_every 0 --steps 60", "--script eval_only"])
def test_a_disk_that_takes_no_more_episodes_is_one_line(vector, tmp_path, monkeypatch, capfd, words):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = vector()
    monkeypatch.setattr(replay.episodes, "save_episode", full)
    words += f" --task dummy_vector --from_checkpoint {path}"
    assert dreamer.main(command(tmp_path, words)) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dreamer.py: ")]
    assert len(error) == 1 and f"--logdir {tmp_path}: No space left on device; " in error[0]


# ---------------------------------------------------------------------------
# Suites, presets and scripts


def presets():
    config = dreamer.CONFIGS.read_text().splitlines()
    return [line.split(":")[0] for line in config if line[:1].isalpha() and not line.startswith(("defaults", "debug"))]


def test_debug_makes_every_preset_tiny_wherever_it_stands_and_keeps_its_task():
    assert len(presets()) > 8
    tiny, own = load_config(["--configs", "debug"], dreamer.CONFIGS), load_presets(dreamer.CONFIGS)
    for preset in presets():
        config = load_config(["--configs", preset, "debug"], dreamer.CONFIGS)
        assert config == load_config(["--configs", "debug", preset], dreamer.CONFIGS)
        assert config.task == own[preset].get("task", tiny.task)
        for name in (
            "device",
            "steps",
            "time_limit",
            "envs",
            "logdir",
            "rssm.deter",
            "rssm.hidden",
            "actor.units",
            "encoder.depth",
        ):
            assert config[name] == tiny[name], (preset, name)


@pytest.mark.parametrize("preset", ["dmc_vision", "quickstart"])
def test_suite_presets_run_with_debug(tmp_path, preset):
    train(tmp_path, f"{SMALL} --steps 60 --eval_every 0", f"{preset} debug")
    assert checkpoint(tmp_path)["counters"]["updates"] == 5


def test_a_proprioceptive_task_renders_and_stores_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(envs.dmc.DMC, "_draw", lambda *_: pytest.fail("a frame was rendered"))
    monkeypatch.setattr(training.evaluation, "record_film", lambda *_: None)
    words = "--task dmc_cartpole_balance --time_limit 30 --steps 60 --eval_every 40"
    train(tmp_path, words, "dmc_proprio debug")
    assert checkpoint(tmp_path)["counters"]["updates"] == 5
    keys = {"position", "velocity", "action", "reward", "is_first", "is_last", "is_terminal"}
    files = episodes(tmp_path / "train_eps") + episodes(tmp_path / "eval_eps")
    assert len(files) == 6 and all(file.keys() == keys for file in files)
    assert {path.name for path in (tmp_path / "openloop").iterdir()} == {"position", "velocity"}  # as curves


@pytest.mark.parametrize("limit, terminal", [(5, False), (0, True)])
def test_a_time_limit_of_the_user_is_no_death(tmp_path, limit, terminal):
    words = f"--task gym_CartPole-v1 --time_limit {limit} --steps 150 --prefill 1000"
    train(tmp_path, words)
    files = [file for file in episodes(tmp_path / "train_eps") if file["is_last"][-1]]
    assert len(files) > 2
    assert all(bool(file["is_terminal"][-1]) == terminal for file in files)
    assert all((len(file["reward"]) == 6) != terminal for file in files)


def test_offline_episodes_fill_the_replay_and_stand_for_the_prefill(multi, tmp_path):
    folder = multi / "train_eps"
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    train(tmp_path, f"{SMALL} --offline_traindir {folder} --prefill 10000 --steps 20 --eval_every 0")
    assert checkpoint(tmp_path)["counters"]["updates"] == 5
    held = [entry["replay_steps"] for entry in lines(tmp_path / "metrics.jsonl") if "replay_steps" in entry]
    assert held[-1] >= 20 + sum(len(episode["reward"]) for episode in episodes(folder))
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before
    assert sum(len(episode["reward"]) for episode in episodes(tmp_path / "train_eps")) <= 22


def test_exploration_at_random_ends_at_expl_until(tmp_path, monkeypatch):
    act, calls = Random.act, []
    monkeypatch.setattr(Random, "act", lambda *args: calls.append(1) or act(*args))
    words = "--task dummy_vector --expl_behavior random --expl_until 63 --prefill 40 --steps 84 --eval_every 0"
    train(tmp_path, words)
    assert len(calls) == 63 + 3  # and in the last steps of three episodes, which are no agent steps


def test_the_explorer_hands_over_at_expl_until_and_the_noise_stays(tmp_path, monkeypatch):
    act, modes = Dreamer.act, []
    monkeypatch.setattr(Dreamer, "act", lambda *args: modes.append(args[3]) or act(*args))
    words = "--task dummy_vector --expl_behavior plan2explore --expl_until 63 --prefill 40 --steps 84 --eval_every 0"
    train(tmp_path, words)
    collected = [mode for mode in modes if mode != "mode"]
    # One more at each of the episodes' ends, 40, 60 and 80, which are no agent steps.
    assert collected == ["explore"] * (63 - 40 + 2) + ["noisy"] * (84 - 63 + 1) and "mode" in modes


def test_episodes_too_short_for_a_window_are_warned_of(tmp_path, capfd):
    words = "--task dummy_vector --batch_length 30 --replay_window episode --replay_context false --steps 60"
    train(tmp_path, f"{words} --eval_every 0")
    assert "nothing is learned before an episode is as long as --batch_length 30" in capfd.readouterr().err
    assert checkpoint(tmp_path)["counters"]["updates"] == 0


def test_pretraining_needs_no_prefill_where_data_is_given(multi, tmp_path):
    folder = multi / "train_eps"
    train(tmp_path, f"{SMALL} --offline_traindir {folder} --pretrain 3 --steps 20 --eval_every 0")
    assert checkpoint(tmp_path)["counters"]["updates"] == 3 + 5


@pytest.mark.parametrize("file", ["latest.pt", ""])
def test_eval_only_plays_the_agent_of_a_checkpoint(vector, tmp_path, monkeypatch, file):
    evaluate, agents = training.evaluation.evaluate, []
    monkeypatch.setattr(training.evaluation, "evaluate", lambda *args: agents.append(args[0]) or evaluate(*args))
    train(tmp_path, f"--task dummy_vector --script eval_only --eval_episode_num 3 --from_checkpoint {vector() / file}")
    (agent,) = agents
    assert not differ(agent.state_dict(), checkpoint(vector())["agent"])
    (entry,) = lines(tmp_path / "metrics.jsonl")
    assert entry["eval_episodes"] == 3 and entry["eval_length"] == 20
    assert [score["mode"] for score in lines(tmp_path / "scores.jsonl")] == ["eval"] * 3
    assert not (tmp_path / "latest.pt").exists() and not (tmp_path / "train_eps").exists()


def test_eval_only_makes_no_training_environment_and_reads_no_episode(multi, tmp_path, monkeypatch):
    shutil.copytree(multi, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in (tmp_path / "train_eps").iterdir()}
    make, modes = envs.make_envs, []
    monkeypatch.setattr(envs, "make_envs", lambda *args: modes.append(args[1]) or make(*args))
    for module, name in ((replay.sampling, "load_episode"), (replay.sampling, "Replay"), (np, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("what was collected was asked for"))
    train(tmp_path, f"{SMALL} --script eval_only --eval_episode_num 3")
    monkeypatch.undo()
    assert modes == ["eval"]
    assert {path: path.read_bytes() for path in (tmp_path / "train_eps").iterdir()} == before
    assert len(scores(tmp_path, "eval")) == 4 + 3 and len(episodes(tmp_path / "eval_eps")) == 4 + 3


@pytest.mark.parametrize("count", [1, 4, 8])
def test_open_loop_videos_of_eval_only_are_of_its_first_long_episodes(multi, tmp_path, monkeypatch, count):
    report, shown = Dreamer.report, []
    monkeypatch.setattr(Dreamer, "report", lambda *args: shown.append(args[1]) or report(*args))
    words = f"{SMALL} --script eval_only --eval_envs {count} --eval_episode_num 12 --from_checkpoint {multi}"
    train(tmp_path, words)
    (arrays,) = shown
    played = {tuple(file["state"][0]): file for file in episodes(tmp_path / "eval_eps") if len(file["reward"]) >= 8}
    assert 1 < len(arrays["reward"]) <= 6 and arrays["reward"].shape[1] == 8
    for row, start in enumerate(map(tuple, arrays["state"][:, 0])):
        for key, value in played[start].items():
            if key in arrays:
                np.testing.assert_array_equal(arrays[key][row], value[:8])
    (file,) = (tmp_path / "openloop" / "image").iterdir()
    assert imageio.imread(file, index=None).shape[:3] == (8, STRIP + 3 * 86, MARGIN + 86 * len(arrays["reward"]))


def test_no_evaluation_and_no_film_where_none_is_asked_for(tmp_path, monkeypatch, capfd):
    make, modes = envs.make_envs, []
    monkeypatch.setattr(envs, "make_envs", lambda *args: modes.append(args[1]) or make(*args))
    train(tmp_path, "--task dummy_vector --steps 60 --eval_every 20 --eval_episode_num 0")
    assert modes == ["train"] and checkpoint(tmp_path)["counters"]["updates"] == 5
    assert not scores(tmp_path, "eval")
    assert not any((tmp_path / name).exists() for name in ("eval_eps", "videos", "openloop"))
    words = "--task dummy_vector --script eval_only --eval_episode_num 0"
    assert dreamer.main(command(tmp_path, words)) == 2
    assert "needs an --eval_episode_num of at least 1" in capfd.readouterr().err


def test_the_random_agent_runs_resumes_and_is_evaluated(tmp_path):
    words = f"{SMALL} --agent random --eval_every 40"
    train(tmp_path, f"{words} --steps 60")
    assert checkpoint(tmp_path)["counters"] == {
        "agent_steps": 60,
        "updates": 0,
        "episodes": len(scores(tmp_path, "train")),
    }
    assert [entry["step"] for entry in scores(tmp_path, "eval")] == [40, 40, 60, 60]
    train(tmp_path, f"{words} --steps 90")
    assert checkpoint(tmp_path)["counters"]["agent_steps"] == 90
    assert [entry["step"] for entry in scores(tmp_path, "eval")] == [40, 40, 60, 60, 80, 80, 90, 90]
    train(tmp_path, f"{words} --script eval_only")
    assert [entry["step"] for entry in scores(tmp_path, "eval")][8:] == [90, 90]
    moves = np.concatenate([episode["move"][1:] for episode in episodes(tmp_path / "train_eps")])
    assert len(np.unique(moves)) == moves.size  # each is a new draw
    obs = {key: episodes(tmp_path / "train_eps")[0][key][0] for key in ("image", "state", "phase")}
    assert dreamer.load_agent(tmp_path, "cpu").act(obs)[0]["move"].shape == (2,)


def test_eval_only_plays_what_is_asked_for_and_not_what_is_there(vector, tmp_path, capfd):
    train(tmp_path / "there", "--task dummy_vector --steps 20 --eval_every 0")
    capfd.readouterr()
    train(tmp_path / "there", f"--task dummy_vector --script eval_only --from_checkpoint {vector()}")
    step, said = checkpoint(vector())["counters"]["agent_steps"], capfd.readouterr().err
    assert f"step {step}: eval_return" in said and f"evaluating at step {step}" in said and "at step 0" not in said
    block = dict(re.findall(r"^([a-z]+(?: on)?)  +(.*)$", said, re.MULTILINE))
    assert block["checkpoint"] == f"{vector() / 'latest.pt'}: step {step}" and block["runs on"].startswith("cpu, ")
    assert block["planned"] == "2 episodes in 2 environments" and block["model"].endswith(" parameters")


def test_a_runs_own_episodes_are_all_learned_from_offline(vector, tmp_path):
    shutil.copytree(vector() / "train_eps", tmp_path / "train_eps")
    steps = sum(len(episode["reward"]) for episode in episodes(tmp_path / "train_eps"))
    train(tmp_path, "--task dummy_vector --steps 2 --script train_offline --eval_every 2")
    held = [entry["replay_steps"] for entry in lines(tmp_path / "metrics.jsonl") if "replay_steps" in entry]
    assert held == [steps] * len(held) and held
    assert [score["step"] for score in scores(tmp_path, "eval")] == [2, 2]  # of one evaluation


# ---------------------------------------------------------------------------
# Mistakes of the user

MISTAKES = {
    "--enws 2": "did you mean --envs?",
    "--actor.layrs 2": "did you mean --actor.layers?",
    "--envs two": "expected a whole number",
    "--precision 17": "expected one of 32, bf16, auto",
    "--device cuda:99": "CUDA devices",
    "--configs debgu": "did you mean debug?",
    "--task atary_pong": "did you mean 'atari'?",
    "--task atari_pogn": "did you mean 'pong'?",
    "--task dummy_vektor": "did you mean 'vector'?",
    "--task gym_CartPoel-v1": "did you mean 'CartPole-v1'?",
    "--task dmc_walker_wlak": "did you mean 'walker_walk'?",
    "--task custom_no.such.module:Env": "cannot be imported",
    "--encoder.mlp_keys $^ --encoder.cnn_keys $^": "no observation is left",
    "--encoder.cnn_keys (": "--encoder.cnn_keys (",
    "--size 20 20": "multiple of 16",
    "--rssm.deter 33": "no multiple of --rssm.blocks",
    "--batch_size 0": "--batch_size: expected at least 1, got 0",
    "--batch_length 1": "--batch_length: expected at least 2, got 1",
    "--envs 0": "--envs: expected at least 1, got 0",
    "--envs -1": "--envs: expected at least 1, got -1",
    "--seed -1": "--seed: expected at least 0, got -1",
    "--actor.layers 0": "--actor.layers: expected at least 1, got 0",
    "--encoder.mults 2 0": "--encoder.mults: expected at least 1, got 0",
    "--dataset_size 8": "too few for windows of 9",
    "--dataset_size 1e12 --steps 1e12": "do not fit into",
    "--script train_offline": "--offline_traindir or",
    "--offline_traindir /no/such/folder": "--offline_traindir /no/such/folder: no such directory",
    "--offline_traindir docs": "docs must hold 9 steps of this task",
    "--task gym_CartPole": "did you mean 'CartPole-v1'?",
    "--size 64": "--size: expected 2 values, got [64]",
    "--size 64 64 3": "--size: expected 2 values",
    "--encoder.mults ,": "--encoder.mults: expected at least one number",
    "--train_ratio inf": "--train_ratio: expected a finite number, got inf",
    "--opt.lr nan": "--opt.lr: expected a finite number, got nan",
    "--return_norm.low 200": "--return_norm.low: expected 0 to 100, got 200",
    "--return_norm.low 96": "--return_norm.low 96.0 is above --return_norm.high 95.0",
    "--rssm.unimix -0.1": "--rssm.unimix: expected 0 to 1, got -0.1",
    "--critic.slow_rate 7": "--critic.slow_rate: expected 0 to 1, got 7",
    "--actor.min_std -1": "--actor.min_std: expected at least 0, got -1",
    "--behavior cem --cem.candidates 20 --cem.elites 50": "--cem.elites 50 are more than --cem.candidates 20",
    "--size 48 48 --decoder.mults 2 2 2 2 2": "must be a multiple of 32",
    "--size 16 16 --encoder.cnn valid --encoder.kernel 4": "--encoder.cnn valid needs at least 46x46",
    "--logdir=": "--logdir: expected a path",
    "--configs bsuite debug --task bsuite_catch/0 --rssm.deter 33": "no multiple of --rssm.blocks",
    "--from_checkpoint /no/such/file.pt": "/no/such/file.pt cannot be loaded: no such file",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_logdir(tmp_path, capfd, words):
    logdir = tmp_path / "run"
    assert dreamer.main(command(logdir, words)) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("dreamer.py: ") and error.count("\n") == 1 and error.endswith("\n")
    assert MISTAKES[words] in error
    assert not logdir.exists()


def test_a_mistake_is_the_exit_status_of_the_process(tmp_path):
    done = launch(tmp_path / "run", "--precision 17")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_question_or_a_mistake_on_the_command_line_does_not_wait_for_torch():
    code = """
import contextlib, sys, dreamer
heavy = {"torch", "numpy", "gymnasium"}
assert not heavy & sys.modules.keys(), "import dreamer"
for words, status in ((["--help"], 0), (["--enws", "2"], 2), (["--configs", "debgu"], 2), (["--envs", "two"], 2)):
    try:
        assert dreamer.main(words) == status, words
    except SystemExit as end:
        assert (end.code or 0) == status, words
    assert not heavy & sys.modules.keys(), words
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--train_ratio" in done.stdout and done.stderr.count("dreamer.py: ") == 3


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.partition(".")[0] == "dm_control"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dm_control", None)
    assert dreamer.main(command(tmp_path / "run", "--task dmc_walker_walk --encoder.cnn_keys $^")) == 2
    error = capfd.readouterr().err
    assert "pip install -r requirements/dmc.txt" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_logdir_that_cannot_be_made_is_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert dreamer.main(command(tmp_path / "file" / "run", "--task dummy_vector")) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words, reason",
    {
        "--rssm.deter 64": "the checkpoint is of another agent",
        "--task dummy_discrete": "has dummy_vector; give another --logdir",
        "--action_repeat 2": "has 1; give another --logdir",
        "--agent random": "another",
    }.items(),
)
def test_a_logdir_of_another_agent_is_refused_unharmed(vector, tmp_path, capfd, words, reason):
    shutil.copytree(vector(), tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert dreamer.main(command(tmp_path, f"--task dummy_vector --steps 90 {words}")) == 2
    error = capfd.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("agent, other", [("dreamer", "random"), ("random", "dreamer")])
@pytest.mark.parametrize("words", ["--steps 30", "--script eval_only"])
def test_what_another_kind_of_agent_has_learned_is_refused(tmp_path, capfd, agent, other, words):
    train(tmp_path / "there", f"--task dummy_vector --steps 20 --eval_every 0 --agent {agent}")
    words += f" --task dummy_vector --agent {other} --from_checkpoint {tmp_path / 'there'}"
    assert dreamer.main(command(tmp_path / "here", words)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "the checkpoint is of another agent" in error
    assert not (tmp_path / "here").exists()


def test_two_runs_do_not_share_a_logdir(vector, tmp_path, capfd):
    shutil.copytree(vector(), tmp_path, dirs_exist_ok=True)
    with locked(tmp_path):
        assert dreamer.main(command(tmp_path, "--task dummy_vector --steps 90")) == 2
    error = capfd.readouterr().err
    assert f"{tmp_path}: another run is writing there" in error and error.count("\n") == 1
    train(tmp_path, "--task dummy_vector --steps 81")
    with locked(tmp_path):  # it lets go at its end
        pass


def test_what_is_no_checkpoint_is_refused(tmp_path, capfd):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    assert dreamer.main(command(tmp_path / "run", f"--task dummy_vector --from_checkpoint {path}")) == 2
    error = capfd.readouterr().err
    assert f"{path} cannot be loaded: it is no checkpoint of this project" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_replay_that_is_copied_to_the_device_makes_no_difference(tmp_path, monkeypatch):
    words = f"--task dummy_multi {SMALL} --steps 120 --envs 2 --eval_every 0 --dataset_size 70"
    train(tmp_path / "host", words)
    monkeypatch.setattr(
        replay.sampling, "resident", lambda *args: torch.device("cpu")
    )  # as on a GPU, but for where it lies
    train(tmp_path / "device", words)
    one, other = checkpoint(tmp_path / "host"), checkpoint(tmp_path / "device")
    assert one["counters"]["updates"] > 10
    assert differ(one, other) == []
    latents = [torch.load(tmp_path / name / one["replay"], weights_only=True)["streams"] for name in ("host", "device")]
    for stream, copied in zip(*latents, strict=True):
        assert torch.equal(stream["deter"], copied["deter"]) and stream["deter"].any()
