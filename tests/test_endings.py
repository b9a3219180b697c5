"""What ends a run saves it: signals, environments that exit, hang, never end, close badly or change the process."""

import contextlib
import gc
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import dreamer
import envs
import envs.parallel
import training.signals
from agents.random import Random
from envs.foreign import Foreign
from specs import act_spec
from tests.factories import env_config, make_config
from tools import UserError
from training.evaluation import film

HERE = "custom_tests.test_endings"


class Twelve(gym.Env):
    """Episodes of twelve steps; `trick` is called with the number of each step."""

    observation_space = spaces.Box(-1, 1, (3,))
    action_space = spaces.Discrete(2)
    alive = 0

    def __init__(self):
        self.steps = 0

    def trick(self, step):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.time += 1
        self.steps += 1
        self.trick(self.steps)
        return np.zeros(3, np.float32), 1.0, self.time >= 12, False, {}


class Exits(Twelve):
    def trick(self, step):
        if step > 60:
            sys.exit("window closed")


class ExitsWhenMade(Twelve):
    def __init__(self):
        sys.exit()


class Interrupts(Twelve):
    def trick(self, step):
        if step > 60:
            raise KeyboardInterrupt


class Signals(Twelve):
    """Sends this process the signals of a dict {step: signal}."""

    plan: dict[int, int] = {}

    def trick(self, step):
        if step in self.plan:
            os.kill(os.getpid(), self.plan[step])


class Hangs(Twelve):
    """Never answers from step 61 on; while it is waited for, Ctrl-C comes twice."""

    def trick(self, step):
        if step > 60:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(100)


class Endless(Twelve):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


class ClosesBadly(Twelve):
    def close(self):
        raise RuntimeError("already closed")


class Single(Twelve):
    """There can be one of them at a time."""

    def __init__(self):
        super().__init__()
        gc.collect()
        if Twelve.alive:
            raise RuntimeError("the port is taken")
        Twelve.alive += 1

    def close(self):
        Twelve.alive -= 1


class Moves(Twelve):
    def trick(self, step):
        os.chdir("/")


class Doubles(Twelve):
    """Sets modes of PyTorch for all of the process, and expects to find them again."""

    def __init__(self):
        super().__init__()
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)

    def trick(self, step):
        assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()


class Starts(Twelve):
    """Has a process of its own, as simulators do."""

    def __init__(self):
        super().__init__()
        self.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,), daemon=True)
        self.process.start()

    def step(self, action):
        assert self.process.is_alive()
        return super().step(action)

    def close(self):
        self.process.kill()


class Grows(Twelve):
    render_mode = "rgb_array"

    def render(self):
        return np.zeros((48 + 2 * self.time, 64, 3), np.uint8)


def run(logdir, env, words="--steps 100"):
    """Run a class of this file in this process; return the exit status."""
    task = f"{HERE}:{env.__name__}"
    return dreamer.main(["--configs", "debug", "--logdir", str(logdir), "--task", task, *words.split()])


def saved(logdir):
    return torch.load(logdir / "latest.pt", weights_only=True)["counters"]


def lengths(folder):
    """Lengths of the episode files of a folder, of which each says its own."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("*.npz"))


@pytest.mark.parametrize("env", [Exits, Interrupts])
def test_an_environment_that_exits_ends_the_run_in_one_line_after_all_is_saved(env, tmp_path, capfd):
    assert run(tmp_path, env) == 2
    said = capfd.readouterr().err
    assert "(train environment 0) would have ended the run" in said and "Traceback" not in said
    assert ("window closed" in said) == (env is Exits)
    assert saved(tmp_path)["agent_steps"] == 61 and sum(lengths(tmp_path / "train_eps")) == 60 + 5


def test_an_environment_that_exits_when_it_is_made_is_one_line(tmp_path, capfd):
    assert run(tmp_path / "run", ExitsWhenMade) == 2
    assert "SystemExit" in capfd.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_runs_saves_this_one(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Signals, "plan", {60: getattr(signal, name)})
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests were started by nohup
    try:
        assert run(tmp_path, Signals) == 128 + getattr(signal, name)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved(tmp_path)["agent_steps"] == 60
    assert f"{name}: the run saves and ends after this " in capfd.readouterr().err


def test_a_hang_up_that_is_ignored_stays_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Signals, "plan", {60: signal.SIGHUP})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, Signals) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigusr1_saves_and_the_run_goes_on(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Signals, "plan", {60: signal.SIGUSR1})
    monkeypatch.setattr(
        training.run, "save_checkpoint", lambda logdir, state, *_: steps.append(state["counters"]["agent_steps"])
    )
    assert run(tmp_path, Signals, "--steps 100 --save_every 0") == 0
    assert steps == [60, 100]


def test_a_second_ctrl_c_leaves_an_environment_that_hangs_and_saves(tmp_path, capfd):
    assert run(tmp_path, Hangs) == 130
    assert saved(tmp_path)["agent_steps"] == 61 and sum(lengths(tmp_path / "train_eps")) == 65
    assert "Traceback" not in capfd.readouterr().err


def test_a_third_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    def slow(*_):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(dreamer, "learn", slow)
    assert run(tmp_path, Twelve) == 130
    said = capfd.readouterr().err
    assert "ends the run at once" in said and "no checkpoint yet" in said and "Traceback" not in said


def test_ctrl_c_before_there_is_a_run_is_one_line(tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dreamer, "load_config", interrupted)
    assert run(tmp_path / "run", Twelve) == 130
    assert capfd.readouterr().err == "dreamer.py: ended before it began\n" and not (tmp_path / "run").exists()


def test_an_update_that_fails_while_the_run_is_ending_is_given_up(tmp_path, monkeypatch, capfd):
    def learn(self, replay):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("the compiler was terminated")

    monkeypatch.setattr("agents.dreamer.Dreamer.learn", learn)
    assert run(tmp_path, Twelve) == 128 + signal.SIGTERM
    assert saved(tmp_path)["updates"] == 0 and "was given up" in capfd.readouterr().err


@pytest.mark.parametrize("words", ["--time_limit 0 --steps 60", "--time_limit 0 --script eval_only"])
def test_an_environment_that_never_ends_an_episode_is_warned_of(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(envs, "ENDLESS", 30)
    logdir = tmp_path / "run"
    if "eval_only" in words:
        run(tmp_path / "trained", Twelve, "--steps 12 --eval_episode_num 0")
        words += f" --eval_episode_num 1 --from_checkpoint {tmp_path / 'trained'}"
    assert run(logdir, Endless, words) == 0
    assert "--time_limit" in capfd.readouterr().err
    entries = [json.loads(line) for line in (logdir / "scores.jsonl").read_text().splitlines()]
    assert [(entry["mode"], entry["length"]) for entry in entries] == [("eval", 30)] * len(entries) and entries


def test_limits_that_are_known_bound_an_episode():
    def longest(*words):
        return envs.longest_episode(make_config(*words))

    assert longest("--task", "atari_pong", "--action_repeat", "4", "--time_limit", "0") == 27000
    assert longest("--task", "dummy_vector", "--action_repeat", "2", "--time_limit", "0") == envs.ENDLESS
    assert longest("--task", "dummy_vector", "--action_repeat", "2", "--time_limit", "1000") == 500


def test_environments_that_close_badly_are_warned_of(tmp_path, capfd):
    assert run(tmp_path, ClosesBadly, "--steps 20 --eval_episode_num 1") == 0
    said = capfd.readouterr().err
    assert said.count("could not be closed: it raised RuntimeError: already closed") == 2


@pytest.mark.parametrize("words", ["--eval_every 0", "--eval_episode_num 0"])
def test_one_instance_of_an_environment_suffices(words, tmp_path, monkeypatch):
    monkeypatch.setattr(Twelve, "alive", 0)
    assert run(tmp_path, Single, f"--steps 40 {words}") == 0
    entries = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert any(entry["mode"] == "eval" for entry in entries) == ("eval_every" in words)


def test_a_relative_logdir_stays_where_it_is_when_an_environment_changes_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(pathlib.Path("run"), Moves, "--steps 40") == 0
    assert saved(tmp_path / "run")["agent_steps"] == 40 and lengths(tmp_path / "run" / "train_eps")


def test_modes_of_pytorch_that_an_environment_sets_are_its_own(tmp_path):
    assert run(tmp_path, Doubles, "--steps 80 --eval_episode_num 0") == 0
    assert saved(tmp_path)["updates"] > 0
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_what_derives_from_keyboard_interrupt_passes_the_boundary():
    with pytest.raises(training.signals.Interrupted), Foreign("it"):
        raise training.signals.Interrupted
    with pytest.raises(UserError, match="it would have ended the run: it raised SystemExit"), Foreign("it"):
        sys.exit(3)


def test_a_worker_may_have_processes_of_its_own(tmp_path):
    assert run(tmp_path, Starts, "--steps 30 --parallel true --eval_episode_num 0") == 0
    assert lengths(tmp_path / "train_eps")


def test_a_worker_that_exits_is_restarted(tmp_path, capfd):
    assert run(tmp_path, Exits, "--steps 90 --parallel true --eval_episode_num 0") == 0
    assert "was restarted: it raised SystemExit: window closed" in capfd.readouterr().err


def test_pictures_that_change_their_size_make_a_film_of_one_size(tmp_path):
    assert run(tmp_path, Grows, "--steps 20") == 0
    assert len(list(tmp_path.rglob("*.mp4"))) == 1


def test_an_environment_whose_pictures_have_several_sizes_cannot_be_filmed(monkeypatch):
    made = envs.make_envs(make_config("--task", "dummy_vector"), "eval", 1)
    sizes = iter(range(16, 100))
    monkeypatch.setattr(made, "render", lambda index, size=None: np.zeros((next(sizes), 16, 3), np.uint8))
    actions = act_spec(made.act_space)
    with pytest.raises(UserError, match="several sizes"):
        film(made, actions, Random(actions, 0), "mode")


def test_little_shared_memory_is_no_obstacle(monkeypatch):
    temporary = tempfile.TemporaryFile
    asked = []

    def full(dir=None):
        asked.append(dir)
        if dir == "/dev/shm":
            raise OSError(28, "No space left on device")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with contextlib.closing(envs.parallel._anonymous_file(100)) as file:
        assert asked == ["/dev/shm", None] and file.seek(0, 2) == 100


HANGING = f"""
import os, signal, sys, time
sys.path.insert(0, {os.getcwd()!r})
import envs.parallel
from tests.test_endings import hanging_workers
if __name__ == "__main__":
    hanging_workers()
"""


class Sleeps(Twelve):
    def trick(self, step):
        print(os.getpid(), flush=True)
        time.sleep(1000)


def hanging_workers():
    """Make a worker hang, and die."""
    config = env_config(f"{HERE}:Sleeps", parallel=True)
    made = envs.make_envs(config, "train", 1)
    made.reset()
    made.send({"action": np.array([[1, 0]], np.float32)})
    time.sleep(100)


def test_a_worker_that_hangs_ends_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HANGING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        if not pathlib.Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on")
