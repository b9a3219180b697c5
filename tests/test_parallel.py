"""Environments in worker processes behave as they do in this one, and leave nothing behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from gymnasium import spaces

from envs import make_envs
from envs.parallel import Envs, Local, Worker
from envs.wrappers import flags
from tests.test_envs import draw_action, make_config
from tools import UserError


def play(envs, steps):
    rng = np.random.default_rng(0)
    stream = [envs.reset()]
    for _ in range(steps):
        actions = [draw_action(envs.act_space, rng) for _ in range(len(envs))]
        stream.append(envs.step({key: np.stack([action[key] for action in actions]) for key in actions[0]}))
    stream.append(envs.reset())  # in the midst of episodes
    return stream


def test_parallel_equals_serial():
    streams = []
    for parallel in (False, True):
        envs = make_envs(make_config("dummy_multi", parallel=parallel), "train", 2)
        assert len(envs) == 2
        streams.append(play(envs, 40))
        envs.close()
        envs.close()
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
# Environments that misbehave. They stand here because a worker imports them by name


class Odd:
    """Counts steps in `state`, logs `log_odd` on odd ones, and misbehaves as the action says."""

    obs_space = {"state": spaces.Box(-np.inf, np.inf, (1,))}
    act_space = {"action": spaces.Box(-1, 1, (1,))}

    def reset(self):
        self._steps = 0
        return self._observe()

    def step(self, action):
        if action["action"] == SLEEP:
            time.sleep(0.5)
        if action["action"] == FAIL:
            raise ConnectionError("the environment broke")
        if action["action"] == DIE:
            os._exit(3)
        self._steps += 1
        return self._observe()

    def _observe(self):
        logs = {"log_odd": 5.0} if self._steps % 2 else {}
        return {"state": np.float32([self._steps]), **flags(is_first=self._steps == 0), **logs}

    def render(self):
        raise UserError("no picture")

    def close(self):
        pass


def refuse():
    raise UserError("this environment\nneeds a package")


FINE, SLEEP, FAIL, DIE = range(4)


def actions(*behaviours):
    return {"action": np.float32(behaviours)[:, None]}


def test_logs_that_are_missing_are_zero():
    envs = Envs(Local, [Odd, Odd])
    assert "log_odd" not in envs.reset()
    assert envs.step(actions(FINE, FINE))["log_odd"].tolist() == [5, 5]
    envs._handles[0].send("reset")
    assert envs.step(actions(FINE, FINE))["log_odd"].tolist() == [5, 0]


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


def test_pictures_failures_and_deaths_in_workers():
    envs = Envs(Worker, [Odd, Odd])
    envs.reset()
    with pytest.raises(UserError, match=r"^no picture$"):
        envs.render(0)  # which harms nobody

    start = time.time()
    assert envs.step(actions(SLEEP, SLEEP))["state"].tolist() == [[1], [1]]
    assert 0.5 <= time.time() - start < 0.95, "workers do not step at once"

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*the environment broke"):
        envs.step(actions(FINE, FAIL))
    with pytest.raises(RuntimeError, match=r"died \(exit code 3\)"):
        envs.step(actions(DIE, FINE))
    envs.close()
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------
# Endings

SCRIPT = """
    import multiprocessing, os, time
    from types import SimpleNamespace as Config
    from envs import make_envs

    encoder = Config(cnn_keys=".*", mlp_keys=".*")
    config = Config(task="dummy_vector", encoder=encoder, seed=0, parallel=True)
    config.size, config.action_repeat, config.time_limit = (64, 64), 1, 0

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
def test_nothing_is_left_or_printed(tmp_path, ending):
    process, pid = run_script(tmp_path, ending)
    assert (process.stdout.read(), process.stderr.read(), process.wait()) == ("0\n", "", 0)
    wait_for_end(pid)


def test_workers_die_with_their_parent_and_ignore_interrupts(tmp_path):
    process, pid = run_script(tmp_path, "time.sleep(60)")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert is_alive(pid)
    process.kill()
    process.wait()
    wait_for_end(pid)
    assert process.stderr.read() == ""
