"""The rollout loop and evaluations, on scripted environments."""

from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box

from modalities import obs_spec
from specs import act_spec, step_layout
from training.driver import Driver, Episode
from training.evaluation import LONGEST, Evaluation, evaluate

ACTIONS = act_spec({"action": Box(-1, 1, (2,))})


class Scripted:
    """Environments that follow scripts, one letter per step: f the first of an episode, l the last, . the rest.

    Environment i sees the number 1000 i + t at time t and is rewarded with it, but for first steps.
    """

    def __init__(self, *scripts):
        self.scripts, self.time, self.sent, self.resets = scripts, -1, [], 0
        self.obs_space = {"number": Box(0, 9999, (1,)), "image": Box(0, 255, (4, 6, 3), np.uint8)}
        self.layout = step_layout(self.obs_space, ACTIONS)
        self.events, self.idle, self.longest = [], True, 10**6

    def __len__(self):
        return len(self.scripts)

    def reset(self):
        assert self.idle
        self.resets += 1
        return self.observe()

    def send(self, actions):
        assert self.idle
        self.idle = False
        self.sent.append(actions["action"].copy())

    def receive(self):
        assert not self.idle
        self.idle = True
        return self.observe()

    def observe(self):
        self.time += 1
        letters = np.array([script[self.time] for script in self.scripts])
        number = (1000 * np.arange(len(self)) + self.time).astype(np.float32)
        return {
            "number": number[:, None],
            "image": np.broadcast_to((number % 256).astype(np.uint8)[:, None, None, None], (len(self), 4, 6, 3)).copy(),
            "reward": number * (letters != "f"),
            "is_first": letters == "f",
            "is_last": letters == "l",
            "is_terminal": letters == "l",
            "log_time": np.full(len(self), self.time, np.float32),
        }


class Counting:
    """An agent that acts with the number of its call, which it also carries and stores."""

    def __init__(self, begin=0):
        self.begin, self.carries, self.modes = begin, [], []

    def initial(self, count):
        return self.begin

    def act(self, obs, carry, mode):
        self.carries.append(carry)
        self.modes.append(mode)
        stored = {"call": np.full(len(obs["is_first"]), carry + 1)} if mode == "explore" else None
        return {"action": np.full((len(obs["is_first"]), 2), carry + 1, np.float32)}, carry + 1, stored


def drive(*scripts, mode="sample"):
    """Return a driver, and lists of what it reports: observations, steps and episodes."""
    envs, told = Scripted(*scripts), ([], [], [])
    on_obs, on_step, on_episode = ([entries.append] for entries in told)
    driver = Driver(envs, ACTIONS, envs.layout, on_obs, [lambda *args: on_step[0](args)], on_episode)
    return driver, Counting(), told


def test_returns_and_lengths_are_those_of_the_episodes_under_way():
    driver, agent, (_, _, episodes) = drive("f..lf.l", "flf....")
    returns, lengths, counted = [], [], []
    for _ in range(7):
        counted.append(driver.step(agent, "sample"))
        returns.append(driver.returns.tolist())
        lengths.append(driver.lengths.tolist())
    assert [pair[0] for pair in returns] == [0, 1, 1 + 2, 1 + 2 + 3, 0, 5, 5 + 6]
    assert [pair[1] for pair in returns] == [0, 1001, 0, 1003, 2007, 3012, 4018]
    assert [pair[0] for pair in lengths] == [0, 1, 2, 3, 0, 1, 2]
    assert [pair[1] for pair in lengths] == [0, 1, 0, 1, 2, 3, 4]
    assert counted == [2, 1, 2, 1, 2, 2, 1]  # an action on an episode's last observation is none
    assert episodes == [
        Episode(1, 1001.0, 1, {"log_time": 1.0}),
        Episode(0, 6.0, 3, {"log_time": 3.0}),
        Episode(0, 11.0, 2, {"log_time": 6.0}),
    ]


def test_a_worker_that_was_restarted_begins_anew_and_its_episode_is_not_told():
    driver, agent, (_, _, episodes) = drive("f..f.l")  # at time 3 a first follows that no last went before
    lengths = [driver.step(agent, "sample") and int(driver.lengths[0]) for _ in range(6)]
    assert lengths[:5] == [0, 1, 2, 0, 1]
    assert episodes == [Episode(0, 4.0 + 5.0, 2, {"log_time": 5.0})]


def test_a_step_is_an_observation_the_action_that_led_to_it_and_what_the_agent_stores():
    driver, agent, (observed, steps, _) = drive("f.lf", "f...")
    for _ in range(4):
        driver.step(agent, "explore")
    assert [obs["number"][0, 0] for obs in observed] == [0, 1, 2, 3]
    own = [[entry[1:] for entry in steps if entry[0] == index] for index in range(2)]
    assert all(step.keys() == driver.layout.keys() for step, _ in own[0])
    assert [step["number"][0] for step, _ in own[1]] == [1000, 1001, 1002, 1003]
    assert [step["action"].tolist() for step, _ in own[0]] == [[0, 0], [1, 1], [2, 2], [0, 0]]  # zeros at each first
    assert [step["action"].tolist() for step, _ in own[1]] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert [stored for _, stored in own[0]] == [{"call": call} for call in (1, 2, 3, 4)]
    assert [actions[0, 0] for actions in driver.envs.sent] == [1, 2, 3, 4]


def test_another_agent_takes_over_with_a_carry_of_its_own():
    driver, agent, (_, steps, _) = drive("f.....")
    other = Counting(10)
    for actor, mode in ((agent, "sample"), (agent, "explore"), (other, "noisy"), (other, "noisy"), (agent, "sample")):
        driver.step(actor, mode)
    assert agent.carries == [0, 1, 0] and agent.modes == ["sample", "explore", "sample"]
    assert other.carries == [10, 11] and other.modes == ["noisy"] * 2
    assert [step["action"][0] for _, step, _ in steps] == [0, 1, 2, 11, 12]  # whichever agent chose it
    assert [stored for *_, stored in steps] == [None, {"call": 2}, None, None, None]


def test_a_driver_that_rests_leaves_its_environments_free_and_begins_with_a_reset():
    driver, agent, _ = drive("f..f..")
    driver.rest()  # nothing is under way
    driver.step(agent, "sample")
    assert not driver.envs.idle
    driver.rest()
    driver.rest()
    assert driver.envs.idle and driver.envs.resets == 1
    driver.step(agent, "sample")
    assert driver.envs.resets == 2


def test_an_episode_that_nobody_wants_does_not_begin():
    driver, agent, (_, _, episodes) = drive("f..lf.")
    while not episodes:
        driver.step(agent, "sample", lambda: not episodes)
    assert driver.envs.idle and len(driver.envs.sent) == 3
    driver.step(agent, "sample")
    assert driver.envs.resets == 2


# ---------------------------------------------------------------------------
# Evaluations


def evaluation(episodes, *scripts, **told):
    envs = Scripted(*scripts)
    return Evaluation(envs, ACTIONS, envs.layout, episodes, "mode", **told)


def test_each_environment_plays_its_share_of_an_evaluation_and_no_more_counts():
    steps, episodes = [], []
    played = evaluation(
        3, "f.lf..l.", "flflflfl", on_step=[lambda *args: steps.append(args[:2])], on_episode=[episodes.append]
    )
    agent = Counting()
    found = played.play(agent)
    assert found == played.played == episodes
    assert [(episode.env, episode.length) for episode in found] == [(1, 1), (0, 2), (0, 3)]
    assert len([index for index, _ in steps if index == 0]) == 3 + 4 and len([i for i, _ in steps if i == 1]) == 2
    assert set(agent.modes) == {"mode"} and played.driver.envs.idle


def test_an_evaluation_ends_early_when_it_is_told_to():
    going = iter([True] * 4 + [False])
    played = evaluation(4, "f.lf.l...", "f........")
    assert [episode.env for episode in played.play(Counting(), lambda: next(going))] == [0]
    assert played.driver.envs.idle


def test_an_evaluation_keeps_the_frames_of_its_first_episode_and_none_of_the_next():
    played = evaluation(2, "f..lf.l.", watched=["image"])
    played.play(Counting())
    assert [int(frame[0, 0, 0]) for frame in played.frames["image"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_an_evaluation_keeps_no_more_than_500_frames_and_none_that_holds_on_to_others(count):
    scripts = ["f" + "." * 700 + "l."] * count
    played = evaluation(count, *scripts, watched=["image"])
    played.play(Counting())
    frames = played.frames["image"]
    assert len(frames) == LONGEST == 500
    assert all(frame.base is None and frame.shape == (4, 6, 3) for frame in frames)
    assert [int(frame[0, 0, 0]) for frame in frames] == [time % 256 for time in range(500)]


def test_an_evaluation_that_is_not_watched_keeps_no_frame():
    played = evaluation(1, "f.l.")
    played.play(Counting())
    assert played.frames == {}


def test_an_evaluation_logs_the_means_of_what_its_last_steps_logged(tmp_path):
    found = {}
    logger = SimpleNamespace(scalars=lambda values, step: found.update(values), flush=lambda: None)
    nothing = dict.fromkeys(("score", "say", "say_restarts"), lambda *args: None)
    out = SimpleNamespace(logdir=tmp_path, logger=logger, **nothing)
    config = SimpleNamespace(
        dataset_size=100, batch_length=4, eval_episode_num=2, eval_mode="mode", video_pred_log=False
    )
    envs = Scripted("f.l...", "f...l.")
    envs.obs_space.pop("image")
    evaluate(Counting(), envs, config, out, (obs_spec(envs.obs_space), ACTIONS), 0)
    assert found["eval_episodes"] == 2 and found["eval_log_time"] == (2 + 4) / 2
