"""Environments in worker processes behave as they do in this one, and leave nothing behind."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from gymnasium import spaces

from envs import make_env, make_envs
from envs.parallel import RESET, Envs, Local, Worker
from envs.wrappers import flags
from tests.factories import draw_action
from tests.factories import env_config as make_config
from tools import UserError


def play(envs, steps):
    rng = np.random.default_rng(0)
    stream = [envs.reset()]
    for _ in range(steps):
        actions = [draw_action(envs.act_space, rng) for _ in range(len(envs))]
        stream.append(envs.step({key: np.stack([action[key] for action in actions]) for key in actions[0]}))
    stream.append(envs.reset())  # in the middle of episodes
    return stream


def test_parallel_equals_serial():
    streams = []
    for parallel in (False, True):
        envs = make_envs(make_config("dummy_multi", parallel=parallel), "train", 2)
        assert len(envs) == 2
        streams.append(play(envs, 40))
        kept = [{key: value.copy() for key, value in obs.items()} for obs in streams[-1]]
        play(envs, 20)
        envs.close()
        envs.close()
        for obs, copy in zip(streams[-1], kept, strict=True):  # later steps do not change what was handed out
            assert all(value.flags.owndata and np.array_equal(value, copy[key]) for key, value in obs.items())
    serial, parallel = streams
    assert sum(obs["is_last"].sum() for obs in serial) >= 2
    for one, other in zip(serial, parallel, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]), key
    assert not np.array_equal(serial[0]["state"][0], serial[0]["state"][1])


def test_stacked_types_and_automatic_resets():
    envs = make_envs(make_config("dummy_multi"), "train", 3)
    fresh = np.ones(3, bool)
    for obs in play(envs, 40)[:-1]:
        assert (obs["image"].dtype, obs["image"].shape) == (np.uint8, (3, 64, 64, 3))
        assert (obs["state"].dtype, obs["state"].shape) == (np.float32, (3, 2))
        assert (obs["phase"].dtype, obs["phase"].shape) == (np.int32, (3,))
        assert (obs["log_steps"].dtype, obs["log_steps"].shape) == (np.float32, (3,))
        assert (obs["reward"].dtype, obs["reward"].shape) == (np.float32, (3,))
        assert all(obs[key].dtype == bool and obs[key].shape == (3,) for key in ("is_first", "is_last"))
        assert np.array_equal(obs["is_first"], fresh)
        assert (obs["reward"][fresh] == 0).all() and (obs["log_steps"][fresh] == 0).all()
        fresh = obs["is_last"]
    assert envs.render(1).shape == (64, 64, 3)
    envs.close()


# ---------------------------------------------------------------------------
# Environments that misbehave, at module level because a worker imports them by name


class Odd:
    """Count steps in `state`, log `log_odd` on odd ones, and misbehave as the action tells."""

    obs_space = {
        "state": spaces.Box(-np.inf, np.inf, (1,)),
        "dice": spaces.Discrete(6),
        "cards": spaces.MultiDiscrete([4, 300]),
        "image": spaces.Box(0, 255, (2, 3, 1), np.uint8),
        "nothing": spaces.Box(-np.inf, np.inf, (0,)),
    }
    act_space = {"action": spaces.Box(-1, 1, (1,)), "keys": spaces.MultiDiscrete([2, 3])}

    def __init__(self, restart=0, folder=None):
        self._restart = restart
        self._folder = folder

    def reset(self):
        self._steps = 0
        return self._observe()

    def step(self, action):
        behavior = action["action"]
        if behavior == WAIT:
            (self._folder / "begun").touch()
            wait_until((self._folder / "go").exists)
        if behavior == FAIL:
            raise ConnectionError("the environment\nbroke")
        if behavior == DIE:
            os._exit(3)
        if behavior == HANG:
            threading.Event().wait()
        if behavior == REFUSE:
            raise UserError("no such action")
        self._steps += 1
        return self._observe(action["keys"].argmax())

    def _observe(self, key=0):
        obs = {"state": [self._steps], "dice": 5, "cards": [3, 299], "image": np.full((2, 3, 1), 250 + key)}
        logs = {"log_odd": 5.0} if self._steps % 2 else {}
        first = self._steps == 0
        return {**obs, "nothing": [], **flags(0 if first else self._restart, is_first=first), **logs}

    def render(self, size=None):
        if size is None:
            raise UserError("no picture")
        return np.full((*size, 3), self._steps, np.uint8)

    def close(self):
        if self._folder:
            (self._folder / "closed").touch()


class Fragile(Odd):
    """Raise whenever it is made again."""

    def __init__(self, restart):
        if restart:
            raise OSError(f"restart {restart} failed")
        super().__init__()


class Brief(Odd):
    """Raise at the third step of every episode."""

    def step(self, action):
        if self._steps == 2:
            raise ConnectionError("again")
        return super().step(action)


def refuse(restart):
    raise UserError("this environment\nneeds a package")


def broken(restart):
    raise OSError("the simulator is not there")


def hung(restart):
    threading.Event().wait()


FINE, WAIT, FAIL, DIE, HANG, REFUSE = range(6)


def actions(*behaviors):
    keys = np.tile(np.float32([0, 1, 0, 0, 1]), (len(behaviors), 1))
    return {"action": np.float32(behaviors)[:, None], "keys": keys}


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_logs_that_are_missing_are_zero():
    envs = Envs(Local, [Odd, Odd])
    assert "log_odd" not in envs.reset()
    assert envs.step(actions(FINE, FINE))["log_odd"].tolist() == [5, 5]
    envs._handles[0].send(RESET)
    assert envs.step(actions(FINE, FINE))["log_odd"].tolist() == [5, 0]
    with pytest.raises(ConnectionError):  # for a debugger
        envs.step(actions(FINE, FAIL))


@pytest.mark.parametrize("kind", [Local, Worker])
def test_user_errors_arrive(kind):
    with pytest.raises(UserError, match="needs a package") as caught:
        Envs(kind, [Odd, refuse])
    assert kind is Local or str(caught.value) == "this environment needs a package"
    assert not multiprocessing.active_children()


def test_a_worker_makes_and_refuses_as_make_env_does():
    with pytest.raises(UserError, match="did you mean 'multi'"):
        make_envs(make_config("dummy_mutli", parallel=True), "train", 1)
    assert not multiprocessing.active_children()


def test_a_step_runs_between_send_and_receive(tmp_path):
    make = functools.partial(Odd, folder=tmp_path)
    envs = Envs(Worker, [make, make])
    assert envs.reset().keys() == {*Odd.obs_space, *flags()}
    with pytest.raises(UserError, match=r"^no picture$"):
        envs.render(0)  # must be harmless

    envs.send(actions(WAIT, WAIT))  # returns, although neither step can end before `go` is there
    wait_until((tmp_path / "begun").exists)
    for ask in (envs.reset, functools.partial(envs.render, 0), functools.partial(envs.send, actions(FINE, FINE))):
        with pytest.raises(RuntimeError, match="under way"):
            ask()
    (tmp_path / "go").touch()
    obs = envs.receive()
    types = {key: (value.dtype.name, value.shape, value.reshape(-1)[0]) for key, value in obs.items() if value.size}
    assert types == {
        "log_odd": ("float32", (2,), 5),
        "state": ("float32", (2, 1), 1),
        "dice": ("int32", (2,), 5),
        "cards": ("int32", (2, 2), 3),
        "image": ("uint8", (2, 2, 3, 1), 251),
        "reward": ("float32", (2,), 0),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), ("bool", (2,), False)),
    }
    assert obs["cards"].tolist() == [[3, 299]] * 2 and obs["nothing"].shape == (2, 0)
    with pytest.raises(RuntimeError, match="nothing to receive"):
        envs.receive()

    (tmp_path / "go").unlink()
    (tmp_path / "begun").unlink()
    envs.send(actions(FINE, WAIT))
    wait_until((tmp_path / "begun").exists)
    (tmp_path / "go").touch()
    envs.close()
    assert (tmp_path / "closed").exists()
    assert not multiprocessing.active_children()


LISTS_MODULES = """
    import pathlib
    import sys
    import numpy as np
    from gymnasium import spaces

    def packages():
        return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

    class Modules:
        observation_space = spaces.Box(0, 1, (2,))
        action_space = spaces.Discrete(2)

        def reset(self, seed=None):
            pathlib.Path("modules").write_text(" ".join(packages()))
            return np.zeros(2), {}

        def step(self, action):
            return np.zeros(2), 0.0, False, False, {}

    if __name__ == "__main__":
        print(*packages())
"""
TRAINS = """
    from envs import make_envs
    from training.config import CONFIGS, load_config

    def main():
        import torch

        config = load_config(["--task", "custom_lists:Modules", "--parallel", "true"], CONFIGS)
        envs = make_envs(config, "train", 1)
        envs.reset()
        envs.close()

    if __name__ == "__main__":
        main()
"""


def test_a_worker_imports_little(tmp_path):
    """Workers import NumPy, Gymnasium and YAML, but not PyTorch, which takes seconds and memory."""
    (tmp_path / "lists.py").write_text(textwrap.dedent(LISTS_MODULES))
    (tmp_path / "trains.py").write_text(textwrap.dedent(TRAINS))
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}

    def run(script):
        return subprocess.run([sys.executable, script], cwd=tmp_path, env=environ, check=True, capture_output=True)

    least = set(run("lists.py").stdout.decode().split())
    run("trains.py")
    loaded = set((tmp_path / "modules").read_text().split())
    assert {"numpy", "gymnasium"} <= least
    assert {"envs", "modalities", "training"} < loaded - least
    assert loaded - least <= {"envs", "modalities", "specs", "tools", "training", "lists", "__mp_main__", "ruamel"}


@pytest.mark.parametrize("kind", [Local, Worker])
def test_a_picture_has_the_size_that_is_wished_for(kind):
    envs = Envs(kind, [Odd, Odd])
    envs.reset()
    for steps in range(1, 3):
        envs.step(actions(FINE, FINE))
        for index, size in ((0, (40, 30)), (1, (500, 700))):
            image = envs.render(index, size)
            assert (image.shape, image.dtype) == ((*size, 3), np.uint8) and (image == steps).all()
    envs.close()


# ---------------------------------------------------------------------------
# Restarts


def kill(envs, index):
    os.kill(envs._handles[index]._process.pid, signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_the_other_goes_on():
    config = make_config("dummy_multi", parallel=True)
    serial, workers = (make_envs(make_config("dummy_multi", parallel=flag), "train", 2) for flag in (False, True))
    rng = np.random.default_rng(0)
    undisturbed, disturbed = [serial.reset()], [workers.reset()]
    for step in range(1, 30):
        drawn = [draw_action(serial.act_space, rng) for _ in range(2)]
        chosen = {key: np.stack([action[key] for action in drawn]) for key in drawn[0]}
        undisturbed.append(serial.step(chosen))
        if step == 10:
            kill(workers, 1)
        disturbed.append(workers.step(chosen))
    workers.close()
    serial.close()
    assert workers.restarts == 1
    assert workers.events == ["environment 1 was restarted: it died (exit code -9)"]
    for step, (one, other) in enumerate(zip(undisturbed, disturbed, strict=True)):
        same = [0, 1] if step < 10 else [0]
        assert all(np.array_equal(one[key][same], other[key][same]) for key in one), step
    first = make_env(config, "train", 1, restart=1).reset()
    assert all(np.array_equal(disturbed[10][key][1], first[key]) for key in first)
    assert first["is_first"] and first["reward"] == 0 and not disturbed[9]["is_last"][1]
    assert not np.array_equal(first["state"], undisturbed[0]["state"][1])


def test_workers_that_fail_are_replaced(tmp_path):
    envs = Envs(Worker, [Odd, functools.partial(Odd, folder=tmp_path)], timeout=3)
    envs.reset()
    rewards, states = [], []
    for behaviors in ((FINE, FINE), (FINE, WAIT), (FINE, FINE), (HANG, FAIL), (FINE, FINE)):
        envs.send(actions(*behaviors))
        if WAIT in behaviors:
            wait_until((tmp_path / "begun").exists)
            kill(envs, 1)
        obs = envs.receive()
        rewards.append(obs["reward"].tolist())
        states.append(obs["state"][:, 0].tolist())
        assert obs["is_first"].tolist() == [state == 0 for state in states[-1]] and not obs["is_last"].any()
    assert states == [[1, 1], [2, 0], [3, 1], [0, 0], [1, 1]]
    assert rewards == [[0, 0], [0, 0], [0, 1], [0, 0], [1, 2]]  # how often they were restarted
    assert envs.restarts == 3
    assert envs.events == [
        "environment 1 was restarted: it died (exit code -9)",
        "environment 0 was restarted: it gave no answer in time (env_timeout)",
        "environment 1 was restarted: it raised ConnectionError: the environment broke",
    ]
    with pytest.raises(UserError, match=r"^no such action$"):
        envs.step(actions(FINE, REFUSE))
    envs.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_over_and_over_ends_the_run(monkeypatch):
    monkeypatch.setattr("envs.parallel.TRIES", 2)
    envs = Envs(Worker, [Fragile])
    envs.reset()
    with pytest.raises(RuntimeError, match=r"(?s)environment 0 raised OSError: restart 2 failed\nTraceback"):
        envs.step(actions(DIE))
    assert envs.events == [
        "environment 0 was restarted: it died (exit code 3)",
        "environment 0 was restarted: it raised OSError: restart 1 failed",
    ]
    envs.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_in_every_episode_ends_the_run(monkeypatch):
    monkeypatch.setattr("envs.parallel.TRIES", 2)
    envs = Envs(Worker, [Brief])
    envs.reset()
    with pytest.raises(RuntimeError, match=r"(?s)environment 0 raised ConnectionError: again\nTraceback"):
        for _ in range(20):
            envs.step(actions(FINE))
    assert envs.restarts == 2
    envs.close()


def test_a_worker_that_cannot_start_ends_the_run(monkeypatch):
    with pytest.raises(RuntimeError, match=r"(?s)environment 0 raised OSError: the simulator.*Traceback"):
        Envs(Worker, [broken])
    monkeypatch.setattr("envs.parallel.START", 0)
    with pytest.raises(RuntimeError, match="environment 0 gave no answer in time"):
        Envs(Worker, [hung], timeout=0)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------
# Endings

SCRIPT = """
    import multiprocessing, os, time
    import numpy as np
    from types import SimpleNamespace as Config
    from envs import make_envs

    encoder = Config(cnn_keys=".*", mlp_keys=".*", text_keys=".*", audio_keys=".*")
    config = Config(task="dummy_vector", encoder=encoder, seed=0, parallel=True, env_timeout=600)
    config.modalities = Config(to_dict=dict)
    config.size, config.action_repeat, config.time_limit, config.frame_stack = (64, 64), 1, 0, 1

    if __name__ == "__main__":
        envs = make_envs(config, "train", 1)
        envs.reset()
        print(multiprocessing.active_children()[0].pid, flush=True)
        ENDING
"""


def run_script(tmp_path, ending):
    """Start a script with one environment in a worker; return its process and the worker's id."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("ENDING", ending))
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, script], env=environ, stdout=pipe, stderr=pipe, text=True)
    return process, int(process.stdout.readline())


def wait_for_end(pid):
    deadline = time.time() + 10
    while is_alive(pid):
        assert time.time() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ending", ["envs.close(); print(len(multiprocessing.active_children()))", "print(0)"])
def test_nothing_is_left_or_printed(tmp_path, ending):  # in the middle of a step
    process, pid = run_script(tmp_path, f"envs.send({{'action': np.zeros((1, 2))}}); {ending}")
    assert (process.stdout.read(), process.stderr.read(), process.wait()) == ("0\n", "", 0)
    wait_for_end(pid)


def shared_memory(pid):
    """Return the shared memory that a process has mapped, as the kernel lists it."""
    with open(f"/proc/{pid}/maps") as maps:
        return [line for line in maps if "/dev/shm" in line]


def test_workers_die_with_their_parent_and_ignore_interrupts(tmp_path):
    process, pid = run_script(tmp_path, "time.sleep(60)")
    # Memory that has no name while it is in use cannot stay behind, however its users end.
    for user in (process.pid, pid) if os.path.isdir("/dev/shm") else ():
        assert [line.split()[-1] for line in shared_memory(user)] == ["(deleted)"]
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert is_alive(pid)
    process.kill()
    process.wait()
    wait_for_end(pid)
    assert process.stderr.read() == ""
