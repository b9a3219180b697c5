"""Collecting on a clock beside the learner: deadlines, weights, the journal, and what is left when one of them dies."""

import itertools
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

import dreamer
from agents.dreamer import Dreamer
from envs import make_env
from envs.from_gym import FromGym
from envs.wrappers import PlainActions
from specs import act_spec, step_layout
from tests.factories import env_config, make_config, one_line_error, play
from tests.test_run import FORK, checkpoint, command, episodes, lines
from tools import Ratio
from training import async_learner
from training.async_actor import Ticks, heard, safe_actions
from training.async_learner import Bounded
from training.distributed import check
from training.journal import FOLDER, Journal, Reader, recover
from training.weights import HEARD, TAKEN, VERSION, Taker, Weights

LAYOUT = {"state": ((2,), np.float32), "reward": ((), np.float32), "is_first": ((), bool), "is_last": ((), bool)}
LAYOUT |= {"is_terminal": ((), bool), "action": ((1,), np.float32)}
LATENT = {"deter": ((3,), np.float16)}
SLOW = "--task custom_benchmarks.async_control:Slow --time_limit 0 --eval_episode_num 0 --collect async"

# ---------------------------------------------------------------------------
# The clock


class Time:
    """A time that passes when somebody sleeps or works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_ticks_are_at_absolute_times_and_what_is_over_is_left_out():
    clock = Time()
    ticks, at, late = Ticks(10, clock, clock.pass_by), [], []
    for work in (0.05, 0.13, 0.05, 0.35, 0.05, 0.0999):
        ticks.wait()
        at.append(round(ticks.at, 6))
        clock.pass_by(work)
        late.append(round(ticks.late(), 6))
    assert at == [0.0, 0.1, 0.2, 0.3, 0.6, 0.7]
    assert late == [0, 0.03, 0, 0.25, 0, 0]  # 0.2 began late, at 0.23, and was done by 0.3


def test_the_ratio_is_an_upper_bound_without_a_debt_at_the_end():
    clock = Bounded(Ratio(1.0))
    assert clock.due(0) == 0  # where the count begins
    made = 0
    for step in (5, 5, 5, 20):
        clock.looked = True
        while clock.due(step):
            clock.tick()
            made += 1
    assert made == 4  # one for each look, of 20
    assert clock.state_dict()["pending"] == 0 and clock.left(100, 0) == 0
    again = Bounded(Ratio(1.0))
    again.load_state_dict(clock.state_dict())
    assert again.due(20) == 1 and again.clock.done == 4


# ---------------------------------------------------------------------------
# Weights


def tensors(value):
    return {"a": torch.full((3, 2), value), "b": torch.full((), int(value)), "c": torch.full((5,), value).half()}


def test_the_newest_weights_are_taken_over_whole_and_nobody_waits():
    weights, net = Weights(tensors(0.0)), tensors(0.0)
    weights.board[TAKEN] = -1
    taker = Taker(weights, net)
    taker.work(np.inf)
    assert taker.version == 0  # there is nothing yet
    published = [weights.publish(tensors(float(n))) for n in (1, 2, 3)]
    assert published == [True, False, False]  # the actor may be reading the first
    taker.work(-np.inf)  # no time: one tensor
    assert weights.publish(tensors(4.0)) is False and (net["a"] == 0).all()
    for _ in range(3):
        taker.work(-np.inf)
    assert all((value == 1).all() for value in net.values()) and weights.board[TAKEN] == 1
    assert [weights.publish(tensors(float(n))) for n in (5, 6)] == [True, True]  # one to be read, one being written
    assert weights.publish(tensors(7.0)) is False
    taker.work(np.inf)
    assert all((value == 6).all() for value in net.values()) and weights.board[VERSION] == 3
    assert [value.dtype for value in net.values()] == [value.dtype for value in tensors(0.0).values()]


# ---------------------------------------------------------------------------
# The journal


def make_step(number, first=False, last=False):
    flags = {"is_first": first, "is_last": last, "is_terminal": False}
    return {"state": np.full(2, number, np.float32), "reward": np.float32(number), "action": [number], **flags}


def write(journal, index, numbers, last=True):
    for number in numbers:
        ends = last and number == numbers[-1]
        stored = {"deter": np.full(3, number)} if number % 2 else None
        journal.add(index, make_step(number, number == numbers[0], ends), stored, {"log_x": 0.5} if ends else {})


@pytest.fixture
def journal(tmp_path):
    (tmp_path / FOLDER).mkdir()
    journal = Journal(tmp_path / FOLDER, LAYOUT, LATENT)
    yield journal
    journal.close()


def test_what_is_written_is_read_once_and_in_order(journal):
    reader = Reader(journal.folder)
    write(journal, 0, [0, 1, 2])
    write(journal, 1, [10, 11], last=False)
    found = list(reader.entries())
    assert [(entry.env, float(entry.step["reward"])) for entry in found] == [(0, 0), (0, 1), (0, 2), (1, 10), (1, 11)]
    assert [entry.stored is not None for entry in found] == [False, True, False, False, True]
    assert found[1].stored["deter"].tolist() == [1, 1, 1] and found[2].logs == {"log_x": 0.5}
    assert found[2].step["is_last"] and found[0].step.keys() == LAYOUT.keys()
    whole = journal.files[1]
    whole.write(b"\x00\x00")  # half of a record
    assert list(reader.entries()) == []


def test_a_file_goes_when_its_steps_stand_in_an_episode_file(journal, tmp_path):
    reader = Reader(journal.folder)
    write(journal, 0, [0, 1, 2])
    write(journal, 0, [3, 4], last=False)
    for entry in reader.entries():
        if entry.step["is_first"] and entry.step["reward"] == 3:
            reader.filed(0, True)  # what came before was cut off
    assert len(list(journal.folder.iterdir())) == 1
    reader.filed(0, False)  # as far as it is
    journal.add(0, make_step(5), None, {})
    assert recover(tmp_path, reader.filed_to) == 1  # and what came later
    (episode,) = episodes(tmp_path / "train_eps")
    assert episode["reward"].tolist() == [5] and not journal.folder.exists()


def test_an_episode_is_in_the_journal_or_in_a_file_and_never_in_both(journal):
    reader = Reader(journal.folder)
    write(journal, 0, [0, 1, 2])
    for entry in reader.entries():
        if entry.step["is_last"]:
            reader.filed(0, False)
    assert list(journal.folder.iterdir()) == []
    write(journal, 0, [3, 4])
    assert [float(entry.step["reward"]) for entry in reader.entries()] == [3, 4]


def test_what_is_left_of_a_journal_becomes_episodes(journal, tmp_path):
    write(journal, 0, [0, 1, 2])
    write(journal, 1, [5, 6, 7, 8], last=False)
    with open(next(journal.folder.glob("*0001.steps")), "ab") as file:
        file.write(b"\x07\x00\x00\x00cut off")
    assert recover(tmp_path) == 7 and recover(tmp_path) == 0
    assert sorted(episode["reward"].tolist() for episode in episodes(tmp_path / "train_eps")) == [
        [0, 1, 2],
        [5, 6, 7, 8],
    ]


def test_what_is_read_and_heard_is_in_the_journal_as_it_came(tmp_path):
    env = make_env(env_config("dummy_all", size=(16, 16)), "train", 0)
    layout, stream = step_layout(env.obs_space, act_spec(env.act_space)), play(env, 20)
    (tmp_path / FOLDER).mkdir()
    journal = Journal(tmp_path / FOLDER, layout, LATENT)
    for obs in stream:
        journal.add(0, obs | {"action": np.zeros(5, np.float32)}, None, {})
    journal.close()
    assert recover(tmp_path) == len(stream)
    found = {key: np.concatenate([episode[key] for episode in episodes(tmp_path / "train_eps")]) for key in layout}
    for key in ("instruction", "tone", "tone/present"):
        assert found[key].dtype == layout[key][1] and any((each == stream[0][key]).all() for each in found[key])
        assert sorted(map(bytes, found[key])) == sorted(bytes(obs[key]) for obs in stream)


# ---------------------------------------------------------------------------
# The safe action


class Robot:
    """An environment with an action of every kind, and a safe one."""

    observation_space = Box(-1, 1, (2,))
    arm = Box(np.float32([0, -4]), np.float32([10, 4]))
    action_space = Dict(arm=arm, grip=Discrete(3, start=1), keys=MultiDiscrete([2, 4]))
    safe_action = {"arm": [2.5, 0.0], "grip": 2, "keys": [1, 3]}

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.action = action
        return np.zeros(2, np.float32), 0.0, False, False, {}


def test_a_safe_action_is_named_in_the_environments_own_form():
    robot = Robot()
    env = PlainActions(FromGym(robot, 0))
    env.reset()
    env.step(env.safe_action)
    assert robot.action["grip"] == 2 and robot.action["keys"].tolist() == [1, 3]
    assert np.allclose(robot.action["arm"], [2.5, 0])
    robot.safe_action = None
    assert env.safe_action is None
    robot.safe_action = robot.reset
    assert "safe_action is no action" in one_line_error(lambda: env.safe_action)


def test_a_learner_that_gives_no_sign_is_not_trusted_for_long():
    board = Weights({}).board
    board[HEARD] = 100.0
    assert heard(board, 160.0, 60) and not heard(board, 160.1, 60) and heard(board, 1e6, 0)


def test_zeros_and_the_first_of_choices_are_safe_where_nothing_is_named():
    spec = act_spec({"move": Box(-1, 1, (2,)), "mode": Discrete(3)})
    envs = type("Two", (), {"safe_action": {"move": np.float32([1, 0])}, "__len__": lambda self: 2})()
    actions = safe_actions(envs, spec)
    assert actions["move"].tolist() == [[1, 0]] * 2 and actions["mode"].tolist() == [[1, 0, 0]] * 2


# ---------------------------------------------------------------------------
# Runs


def run(logdir, words, learn):
    os.setsid()
    torch.set_num_threads(1)
    async_learner.CONTEXT = "fork"  # this process has all that the actor imports, and one thread
    os.dup2(os.open(logdir.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
    Dreamer.learn = learn
    sys.exit(dreamer.main(command(logdir, words)))


def killed_at(number):
    """Return a learn call that kills its own process at a call."""
    learn, calls = Dreamer.learn, itertools.count(1)

    def killed(agent, replay):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(agent, replay)

    return killed


def run_killed(logdir, words, number):
    run(logdir, words, killed_at(number))


def taken(record):
    """Return the first numbers of all actions that the environment was stepped with."""
    return np.frombuffer(record.read_bytes(), np.float32)


def stored(logdir):
    return sum(len(episode["reward"]) - bool(episode["is_first"][0]) for episode in episodes(logdir / "train_eps"))


def test_a_learner_that_is_killed_leaves_the_environment_safe_and_every_step_in_a_file(tmp_path):
    logdir, record = tmp_path / "run", tmp_path / "actions"
    words = f"{SLOW} --control_hz 100 --env.wait_ms 1 --env.length 30 --env.record {record} --steps 10000"
    process = FORK.Process(target=run_killed, args=(logdir, words, 3))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while (logdir / FOLDER).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (logdir / FOLDER).exists()
    actions = taken(record)
    assert len(actions) > 40 and actions[-1] == 0.5
    assert stored(logdir) == len(actions) - 1  # the last is the safe one, whose end nobody has seen
    assert "the learner is gone" in logdir.with_suffix(".err").read_text()


def test_an_actor_that_is_killed_is_replaced_and_every_step_is_stored(tmp_path, monkeypatch, capfd):
    logdir, record = tmp_path / "run", tmp_path / "actions"
    learn, calls, open_envs, made = Dreamer.learn, itertools.count(1), dreamer.open_envs, []

    def kill(agent, replay):
        actor = made[0].collecting
        if next(calls) == 1:
            os.kill(actor.process.pid, signal.SIGKILL)
        elif actor.deaths and actor.weights.board[TAKEN] > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(agent, replay)

    monkeypatch.setattr(dreamer, "open_envs", lambda *args: made.append(open_envs(*args)) or made[0])
    monkeypatch.setattr(Dreamer, "learn", kill)
    monkeypatch.setattr(async_learner, "CONTEXT", "forkserver")  # which has imported all that the actor needs
    words = f"{SLOW} --control_hz 100 --env.wait_ms 1 --env.length 30 --env.record {record} --steps 100000"
    assert dreamer.main(command(logdir, words)) == 128 + signal.SIGTERM
    assert "the actor was restarted: died (exit code -9)" in capfd.readouterr().err
    steps = checkpoint(logdir)["counters"]["agent_steps"]
    assert steps - 2 <= stored(logdir) <= steps  # what was cut off lacks an end
    assert len(taken(record)) - 4 <= stored(logdir) <= len(taken(record)) and taken(record)[-1] == 0.5
    assert not (logdir / FOLDER).exists()
    last = [line for line in lines(logdir / "metrics.jsonl") if "deadlines_met" in line][-1]
    assert last["env_restarts"] == 1 and 0 <= last["deadlines_met"] <= 1 and last["weights_version"] >= 2
    assert last["train_ratio"] <= 8 and last["control_ticks"] > 40 and last["weights_age"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--agent world_models", "--collect async: --agent world_models learns between episodes that it waits for"),
        ("--script train_offline", "--collect async: --script train_offline collects nothing"),
    ],
)
def test_what_cannot_be_collected_so_is_one_line(words, reason):
    assert one_line_error(check, make_config("--collect", "async", *words.split())) == reason


def test_several_ranks_have_no_actor(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave out torchrun" in one_line_error(check, make_config("--collect", "async"))
