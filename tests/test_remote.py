"""Collecting elsewhere: the ratio, credit, equality with collecting here, and a cluster whose actors and nodes die."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import agents.actor
import dreamer
import envs.dummy
from agents.actor import Actor
from replay.episodes import episode_files
from tests.factories import ROOT, one_line_error
from tools import UserError
from training.config import CONFIGS, load_config
from training.remote import Chunk, Collector, Fleet

SMALL = "--configs debug --task dummy_vector --eval_every 0 --eval_episode_num 0 --log_every 20"


def load(words):
    return load_config(words.split(), CONFIGS)


# ---------------------------------------------------------------------------
# Without Ray: actors of this process, or scripted ones


class Here:
    """A Fleet whose actors are in this process, and do at once what they are asked for."""

    def __init__(self, config, behind):
        self.actors = [Actor(config, number, 0, behind, os.getcwd()) for number in range(config.remote.actors)]
        vars(self).update(self.actors[0].about(), each=config.remote.envs, events=[], restarts=0, chunks=deque())

    def __len__(self):
        return len(self.actors) * self.each

    def put(self, weights):
        return {name: value.copy() for name, value in weights.items()}

    def ask(self, number, *what):
        self.chunks.append((number, self.actors[number].collect(*what)))

    def wait(self, going):
        return self.chunks.popleft() if self.chunks and going() else None

    def close(self):
        for actor in self.actors:
            actor.close()


def run(logdir, words, monkeypatch):
    """Run in this process with a fleet that is here; return the checkpoint."""
    monkeypatch.setattr(agents.actor, "open_fleet", lambda config, behind, stack: Here(config, behind))
    assert dreamer.main([*SMALL.split(), "--logdir", str(logdir), *words.split()]) == 0
    return torch.load(logdir / "latest.pt", weights_only=True)


def episodes(logdir):
    """Return the episodes of a run in the order in which they were written, as bytes."""
    found = []
    for path in sorted(episode_files(logdir / "train_eps")):
        with np.load(path) as file:
            found.append({key: file[key].tobytes() for key in file})
    return found


def logged(logdir, name):
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_an_actor_at_lag_0_equals_collecting_here_step_for_step(tmp_path, monkeypatch):
    here = run(tmp_path / "here", "--envs 2", monkeypatch)
    words = "--remote.actors 1 --remote.envs 2 --remote.length 1 --remote.lag 0 --remote.sync 1"
    there = run(tmp_path / "there", words, monkeypatch)
    assert here["counters"] == there["counters"] and here["counters"]["updates"] > 10
    for name, value in here["agent"]["model"].items():
        assert torch.equal(value, there["agent"]["model"][name]), name
    assert episodes(tmp_path / "here") == episodes(tmp_path / "there") != []
    assert logged(tmp_path / "there", "policy_age")[-1] == 0.0


def test_with_many_actors_ahead_steps_and_updates_are_those_that_the_ratio_says(tmp_path, monkeypatch):
    words = "--remote.actors 3 --remote.envs 2 --remote.length 5 --remote.lag 2 --remote.sync 4 --steps 120"
    saved = run(tmp_path / "run", words, monkeypatch)
    steps, clock = saved["counters"]["agent_steps"], saved["clocks"]["ratio"]
    assert 120 <= steps < 122
    assert clock["done"] == saved["counters"]["updates"] == int((steps - clock["start"]) * 8 / (4 * 8) + 1e-9)
    assert 0 < logged(tmp_path / "run", "policy_age")[-1] < 40
    lines = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    finished = [episode for episode in episodes(tmp_path / "run") if episode["is_last"][-1]]
    assert saved["counters"]["episodes"] == len(lines) > 0 and len(finished) >= len(lines)
    more = run(tmp_path / "run", words.replace("120", "150").replace("actors 3", "actors 2"), monkeypatch)
    assert 150 <= more["counters"]["agent_steps"] < 152  # with another number of actors


def test_a_run_that_is_told_to_end_saves_before_it_asks_for_what_has_arrived(tmp_path, monkeypatch):
    """The signal may have been its node's, too; without that, Ray ends the process at the next call."""
    saved = []

    def drain(collector):
        saved.append(torch.load(tmp_path / "latest.pt", weights_only=True)["counters"])
        return 0

    def wait(fleet, going):
        if len(fleet.chunks) and fleet.restarts == 40:  # chunks later
            os.kill(os.getpid(), signal.SIGTERM)
        fleet.restarts += 1
        return fleet.chunks.popleft() if going() else None

    monkeypatch.setattr(Collector, "drain", drain)
    monkeypatch.setattr(Here, "wait", wait)
    monkeypatch.setattr(agents.actor, "open_fleet", lambda config, behind, stack: Here(config, behind))
    words = f"--remote.actors 1 --remote.envs 2 --remote.length 1 --save_every 0 --logdir {tmp_path} --steps 1000"
    assert dreamer.main([*SMALL.split(), *words.split()]) == 128 + signal.SIGTERM
    (counters,) = saved
    assert counters["updates"] > 5 and counters["agent_steps"] > 70


class Script:
    """A fleet of two actors that notes what it is asked; its chunks have two environments and three steps."""

    def __init__(self):
        self.asked, self.put_out, self.versions = deque(), 0, []

    def __len__(self):
        return 4

    def put(self, weights):
        self.put_out += 1
        return weights

    def ask(self, number, handle, version, who, mode, length):
        self.asked.append((number, version, who))
        self.versions.append(version)

    def wait(self, going):
        number, version, _ = self.asked.popleft()
        steps = {key: np.zeros((2, 3), bool) for key in ("is_first", "is_terminal")}
        steps |= {"is_last": np.array([[False, True, False], [False] * 3]), "reward": np.ones((2, 3), np.float32)}
        return number, Chunk(version, steps, {}, {}, 0, [])


@pytest.mark.parametrize("lag", [0, 2])
def test_actors_are_ahead_by_their_credit_and_weights_go_out_once_for_all(lag):
    fleet, learner, told = Script(), object(), []
    remote = load("--configs debug --remote.envs 2 --remote.sync 4 " + f"--remote.lag {lag}").remote
    updates = 0
    parts = {"remote": remote, "learner": learner, "weights": dict, "updates": lambda: updates, "going": lambda: True}
    actions = type("Actions", (), {"zeros": lambda self, count: {}})()
    collector = Collector(fleet, actions, {}, [lambda index, step, stored: told.append(index)], [], **parts)
    assert collector.step(object(), "sample") == 2
    assert [entry[1:] for entry in fleet.asked] == [(-1, "random")] * (1 + 2 * lag)
    assert [collector.step(learner, "noisy") for _ in range(2)] == [1, 2]
    for _ in range(12):
        updates += 1
        collector.step(learner, "noisy")
        assert max(collector.open) == 1 + lag and sum(collector.open) == len(fleet.asked) + (
            collector.chunk is not None
        )
    assert sorted(set(told)) == [0, 1, 2, 3] and len(told) == 30
    versions = sorted({version for version in fleet.versions if version >= 0})
    assert len(versions) == fleet.put_out > 1 and min(np.diff(versions)) >= 4


class Dead(Exception):
    pass


class Raised(Exception):
    def __init__(self, cause):
        super().__init__("a traceback")
        self.cause = cause


class Answer:
    def __init__(self, value):
        self.value = value


class Ray:
    """A stand-in for the module: actors whose answers are scripted, by place and by how many came before there."""

    exceptions = SimpleNamespace(RayError=Dead, RayTaskError=Raised)

    def __init__(self, script):
        self.script, self.made, self.killed = script, [], []

    def remote(self, number, restart):
        self.made.append((number, restart))
        answers = iter(self.script.get((number, restart), []))
        about = SimpleNamespace(remote=lambda: Answer(SPACES))
        return SimpleNamespace(about=about, collect=SimpleNamespace(remote=lambda *what: Answer(next(answers, CHUNK))))

    def wait(self, references, timeout):
        ready = [reference for reference in references if reference.value is not LATE][:1]
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor):
        self.killed.append(actor)


SPACES = dict.fromkeys(("obs_space", "act_space", "own", "left_out", "longest"))
CHUNK, LATE = Chunk(0, {}, {}, {}, 2, ["environment 0 was restarted"]), object()


def fleet_of(script, patience=600.0):
    ray = Ray(script)
    return Fleet(ray, ray, lambda number, restart: (number, restart), 2, 2, patience), ray


def test_what_a_dead_actor_was_asked_for_is_done_by_another_in_its_place():
    fleet, ray = fleet_of({(0, 0): [CHUNK, Dead(), Dead()], (1, 0): [Raised(OSError("no disk"))]})
    for number in (0, 0, 0, 1):
        fleet.ask(number, "a chunk")
    assert [fleet.wait(lambda: True) for _ in range(4)] == [(0, CHUNK), (1, CHUNK), (0, CHUNK), (0, CHUNK)]
    assert ray.made == [(0, 0), (1, 0), (1, 1), (0, 1)] and len(ray.killed) == 2
    assert "actor 1 was replaced: it raised OSError: no disk" in fleet.events
    assert "actor 0 was replaced: it died (Dead)" in fleet.events
    assert fleet.restarts == 2 + 2 * 2 and fleet.wait(lambda: False) is None


def test_an_actor_that_hangs_is_replaced_and_one_that_dies_over_and_over_ends_the_run():
    fleet, _ = fleet_of({(1, 0): [CHUNK, LATE]}, patience=0.0)
    fleet.ask(1)
    fleet.ask(1)
    assert fleet.wait(lambda: True) == fleet.wait(lambda: True) == (1, CHUNK)
    assert "gave no answer in 0 s" in fleet.events[1]
    fleet, _ = fleet_of({(0, restart): [Dead("the reason")] for restart in range(9)})
    fleet.ask(0)
    with pytest.raises(RuntimeError, match="actor 0 died"):
        fleet.wait(lambda: True)
    fleet, _ = fleet_of({(0, 0): [Raised(UserError("no such game"))]})
    fleet.ask(0)
    assert one_line_error(fleet.wait, lambda: True) == "no such game"
    fleet.close()
    fleet.close()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--envs 3 --remote.actors 2", "--envs 3: with --remote.actors"),
        ("--configs world_models --remote.actors 2", "--remote.actors is not for --agent world_models"),
    ],
)
def test_what_cannot_be_done_elsewhere_is_told(words, message, tmp_path):
    assert message in one_line_error(dreamer.sized, load(words))


# ---------------------------------------------------------------------------
# With Ray


class Signed(envs.dummy.Vector):
    """Takes a few milliseconds a step, and leaves the number of its process in a folder."""

    def __init__(self, folder):
        super().__init__(np.random.default_rng(), (16, 16))
        self.path = pathlib.Path(folder) / f"{os.getpid()}-{time.time()}"
        self.path.touch()
        self.observation_space, self.action_space = self.obs_space["state"], self.act_space["action"]

    def reset(self, *, seed=None, options=None):
        return super().reset()["state"], {}

    def step(self, action):
        time.sleep(0.004)
        obs = super().step({"action": action})
        return obs["state"], float(obs["reward"]), False, bool(obs["is_last"]), {}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of a head without room for actors, and two nodes with room for one each; this process is in it."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.others = [nodes.add_node(num_cpus=1) for _ in range(2)]
    ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_when_a_node_dies_another_actor_goes_on_elsewhere_and_the_run_comes_to_its_end(cluster, tmp_path, capfd):
    from ray._private.state import available_resources_per_node

    pids, logdir = tmp_path / "pids", tmp_path / "run"
    pids.mkdir()
    scores, going = logdir / "scores.jsonl", threading.Event()

    def until(holds):
        deadline = time.monotonic() + 200
        while not holds() and going.is_set() and time.monotonic() < deadline:
            time.sleep(0.02)

    def attack():
        until(lambda: scores.exists() and len(scores.read_text().splitlines()) > 3)
        left = available_resources_per_node()
        (busy,) = (node for node in cluster.others if left[node.node_id].get("CPU", 0) < 1)
        cluster.remove_node(busy, allow_graceful=False)

    thread = threading.Thread(target=attack)
    going.set()
    thread.start()
    words = f"--remote.actors 1 --remote.envs 2 --remote.length 4 --steps 600 --env.folder {pids} --train_ratio 1"
    words += " --eval_envs 0 --task custom_tests.test_remote:Signed"
    try:
        assert dreamer.main([*SMALL.split(), *words.split(), "--logdir", str(logdir)]) == 0
    finally:
        going.clear()
        thread.join()
    assert "actor 0 was replaced: it died" in capfd.readouterr().err
    assert len({path.name.partition("-")[0] for path in pids.iterdir()}) == 2 == len(list(pids.iterdir())) / 2
    saved = torch.load(logdir / "latest.pt", weights_only=True)
    steps, clock = saved["counters"]["agent_steps"], saved["clocks"]["ratio"]
    assert 600 <= steps < 602
    assert saved["counters"]["updates"] == int((steps - clock["start"]) / 32 + 1e-9)
    finished = [episode for episode in episodes(logdir) if episode["is_last"][-1]]
    told = [json.loads(line) for line in scores.read_text().splitlines()]
    assert saved["counters"]["episodes"] == len(told) > 20
    assert sum(len(episode["reward"]) == 4 * (20 + 1) for episode in finished) == len(told)  # none is lost
    assert logged(logdir, "env_restarts")[-1] == 1


def test_what_this_machine_runs_for_ray_is_not_hit_by_a_signal_for_the_whole_group(tmp_path):
    pytest.importorskip("ray")
    words = f"--remote.actors 1 --remote.envs 2 --eval_envs 0 --steps 1000000 --logdir {tmp_path / 'run'}"
    command = [sys.executable, "dreamer.py", *SMALL.split(), *words.split()]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and "model_loss" in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children and process.pid not in [os.getsid(int(child)) for child in children]
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and (tmp_path / "run" / "latest.pt").exists(), said
