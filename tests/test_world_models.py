"""World Models: V, M and C by numbers computed by hand, the order of the stages, and resuming in each of them."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import dreamer
import export
import inference_video
from agents.world_models import Carry, WorldModels
from agents.world_models.controller import Controller, Evolution
from agents.world_models.memory import LEAST_LOGSTD, MDNRNN, Memory, Prediction, log_density, sample
from agents.world_models.stages import Auditions, Stages
from agents.world_models.vision import draw, kl
from modalities import obs_spec
from ops.random import drawing_from
from specs import act_spec
from tests.test_run import checkpoint, differ
from tools import UserError
from training.config import CONFIGS, load_config

TINY = """--size 64 64 --encoder.layers 1 --encoder.units 8 --decoder.layers 1 --decoder.units 8 --stages.z 3
--stages.hidden 5 --stages.mixtures 2 --stages.collect 40 --stages.v_updates 4 --stages.m_updates 4
--stages.generations 4 --stages.score_every 2 --stages.score_episodes 2 --stages.population 4 --stages.rollouts 2
--stages.dream_length 6 --batch_size 2 --batch_length 4 --eval_every 0 --video_pred_log false --save_every 0"""
OBS, ACT = {"state": Box(-9, 9, (4,))}, {"action": Discrete(2)}


def config(*more):
    return load_config(["--configs", "debug", "world_models", *TINY.split(), *more], CONFIGS)


def make(*more, obs=OBS, act=ACT):
    return WorldModels(obs_spec(obs), act_spec(act), config(*more))


def prediction(logits, mean, logstd):
    """Return a Prediction of one latent number by three lists of numbers of the Gaussians."""
    parts = (torch.tensor([numbers], dtype=torch.float32) for numbers in (logits, mean, logstd))
    logits, mean, logstd = parts
    return Prediction(logits.log_softmax(-1), mean, logstd, torch.zeros(()), torch.zeros(()))


# ---------------------------------------------------------------------------
# V


def test_the_kl_is_that_of_two_normals():
    mean, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(4.0)]])
    by_hand = 0.5 * (1 + 1 - 0 - 1) + 0.5 * (4 + 4 - math.log(4) - 1)
    assert kl(mean, logvar).item() == pytest.approx(by_hand)


def test_latents_are_drawn_so_that_gradients_reach_mean_and_variance():
    torch.manual_seed(0)
    mean, logvar = (
        torch.full((20000,), 3.0, requires_grad=True),
        torch.full((20000,), math.log(4.0), requires_grad=True),
    )
    z = draw(mean, logvar)
    assert z.mean().item() == pytest.approx(3, abs=0.05) and z.std().item() == pytest.approx(2, abs=0.05)
    z.sum().backward()
    assert torch.equal(mean.grad, torch.ones(20000))
    assert torch.allclose(logvar.grad, (z - mean).detach() / 2, atol=1e-5)  # d exp(l / 2) / dl = exp(l / 2) / 2


def test_what_is_left_out_by_chance_is_left_out_where_it_learns_to_encode():
    vision = make("--encoder.drop", "0.5").vision
    with drawing_from(lambda kind, shape: torch.zeros(shape)):  # all is left out
        learned, _ = vision.encode({"state": torch.randn(2, 3, 4)}, learning=True)
        seen, _ = vision.encode({"state": torch.randn(2, 3, 4)})
        none, some = (vision.loss({"state": torch.full((2, 3, 4), value)})[1]["kl_loss"] for value in (1.0, 2.0))
    assert torch.allclose(learned, learned[0, 0]) and not torch.allclose(seen, seen[0, 0])
    assert torch.allclose(none, some)


def test_a_kl_within_the_tolerance_costs_nothing():
    agent = make("--stages.kl_tolerance", "1000")
    loss, metrics = agent.vision.loss({"state": torch.zeros(2, 3, 4)})
    assert loss.item() == pytest.approx(metrics["reconstruction_loss"].item() + 3 * 1000)


# ---------------------------------------------------------------------------
# M


def test_the_density_of_a_mixture_is_that_computed_by_hand():
    found = prediction([math.log(1.0), math.log(3.0)], [0.0, 2.0], [0.0, math.log(0.5)])
    normal = lambda x, mean, std: math.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))  # noqa: E731
    by_hand = math.log(0.25 * normal(1.5, 0, 1) + 0.75 * normal(1.5, 2, 0.5))
    assert log_density(found, torch.tensor([1.5])).item() == pytest.approx(by_hand, rel=1e-5)


def test_at_temperature_zero_a_dream_takes_the_mean_of_the_likeliest_gaussian():
    found = prediction([0.0, 0.1, -1.0], [5.0, 7.0, 9.0], [2.0, 2.0, 2.0])
    assert {sample(found, 0.0).item() for _ in range(20)} == {7.0}


def test_temperature_scales_the_noise_by_its_root_and_flattens_the_mixture():
    torch.manual_seed(0)
    one = Prediction(*(part.expand(20000, *part.shape) for part in prediction([0.0], [1.0], [math.log(0.5)])[:3]), 0, 0)
    assert sample(one, 4.0).std().item() == pytest.approx(0.5 * 2, rel=0.03)
    two = prediction([math.log(0.8), math.log(0.2)], [0.0, 1.0], [LEAST_LOGSTD, LEAST_LOGSTD])
    two = Prediction(*(part.expand(20000, *part.shape) for part in two[:3]), 0, 0)
    for temperature in (1.0, 2.0):
        share = (sample(two, temperature).round() == 1).float().mean().item()
        by_hand = 0.2 ** (1 / temperature) / (0.2 ** (1 / temperature) + 0.8 ** (1 / temperature))
        assert share == pytest.approx(by_hand, abs=0.02)


def test_the_memory_starts_anew_with_an_episode_and_first_steps_are_not_predicted():
    torch.manual_seed(0)
    memory = MDNRNN(3, 2, 5, 2, change=False)
    z, action = torch.randn(1, 6, 3), torch.randn(1, 6, 2)
    first = torch.tensor([[True, False, False, True, False, False]])
    whole, parts = memory.observe(z, action, first), memory.observe(z[:, 3:], action[:, 3:], first[:, 3:])
    assert torch.allclose(whole.mean[:, 3:], parts.mean)
    rest = torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.bool), first
    other = z.clone()
    other[:, 3] += 100  # the step that begins the second episode
    losses = [memory.loss(x, action, *rest)[1]["mdn_loss"] for x in (z, other)]
    second = [memory.loss(x[:, 3:], action[:, 3:], *(y[:, 3:] for y in rest))[1]["mdn_loss"] for x in (z, other)]
    first_only = memory.loss(z[:, :3], action[:, :3], *(y[:, :3] for y in rest))[1]["mdn_loss"]
    assert losses[0].item() == pytest.approx((first_only + second[0]).item() / 2, rel=1e-5)
    assert losses[1].item() == pytest.approx((first_only + second[1]).item() / 2, rel=1e-5)


def test_the_forget_gate_begins_open():
    bias = MDNRNN(3, 2, 5, 2, change=False).cell
    assert torch.equal((bias.bias_ih + bias.bias_hh)[5:10], torch.ones(5))


# ---------------------------------------------------------------------------
# C


def test_the_controller_of_car_racing_has_867_parameters():
    assert Controller(32 + 256, act_spec({"action": Box(-1, 1, (3,))})).size == 867


def test_the_controller_is_one_linear_layer_of_its_own_for_each_environment():
    controller = Controller(2, act_spec({"move": Box(-1, 1, (1,)), "turn": Discrete(2)}))
    weights = torch.tensor([[1.0, 0, 0, 0, 2, 0, 0, 0, 0.6], [0.0] * 6 + [0, 1, 0]])
    actions = controller.act(torch.tensor([[0.5], [3.0]]), torch.tensor([[0.25], [3.0]]), weights)
    assert torch.allclose(actions, torch.tensor([[math.tanh(0.5), 0, 1], [0, 1, 0]]))


def test_the_controller_sees_the_memory_before_it_takes_in_the_present():
    agent = make()
    obs = {"state": np.ones((1, 4), np.float32), "is_first": np.array([True])}
    _, carry, _ = agent.act(obs, agent.initial(1), "mode")
    assert not carry.memory.h.any() and carry.z.any()  # nothing has led here
    obs["is_first"][:] = False
    _, after, _ = agent.act(obs, carry, "mode")
    assert torch.equal(after.memory.h, agent.memory.step(carry.z, carry.action, carry.memory).h)
    assert isinstance(after, Carry) and isinstance(after.memory, Memory)


def test_without_its_memory_the_controller_sees_the_latent_alone():
    agent = make("--stages.inputs", "z")
    assert agent.controller.size == (3 + 1) * 2  # z and a bias, for two choices
    z, weights = torch.tensor([[1.0, 2.0, 3.0]]), torch.randn(1, 8)
    acts = [agent.controller.act(z, h, weights) for h in (torch.zeros(1, 5), torch.full((1, 5), 99.0))]
    assert torch.equal(*acts)


def test_a_new_round_collects_with_the_controller_of_the_last():
    agent = make("--stages.rounds", "2")
    agent.stages.name, agent.stages.generations = "score", 4
    agent.evolution.tell(np.arange(4.0))
    agent.auditions = Auditions(agent.evolution.mean[None], 2)
    agent.auditions.scores[:] = 7
    agent.conclude()
    assert (agent.stages.name, agent.stages.round, agent.score) == ("collect", 1, 7) and agent.best.any()
    assert np.array_equal(agent.weights(1, collecting=True)[0], agent.best)
    agent.evolution.tell(np.arange(4.0))  # a generation of this round, in which nothing has a score yet
    assert np.array_equal(agent.weights(1, collecting=True)[0], agent.evolution.mean)


def test_the_strategy_finds_the_optimum_of_a_quadratic():
    evolution, target = Evolution(3, 12, 0.5, seed=1), np.array([1.0, -2.0, 0.5])
    for _ in range(60):
        evolution.tell(-((evolution.candidates - target) ** 2).sum(1))
    assert np.abs(evolution.mean - target).max() < 1e-2


def test_a_strategy_that_is_loaded_asks_for_the_same_candidates_and_leaves_the_global_generator_alone():
    one = Evolution(5, 6, 0.1, seed=3)
    np.random.seed(0)
    for _ in range(4):
        one.tell(one.candidates.sum(1))
    other = Evolution(5, 6, 0.1, seed=3)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(one.candidates, other.candidates) and one.step_size == other.step_size
    drawn = np.random.rand()
    np.random.seed(0)
    assert drawn == np.random.rand()


# ---------------------------------------------------------------------------
# Stages


def order(*more):
    """Return the stages of a run, (name, learn calls) each, where acting brings at once what they wait for."""
    stages, seen, step = Stages(config(*more).stages), [], 0
    while stages.name != "done":
        name, calls = stages.name, 0
        while stages.name == name and stages.due(step):
            stages.tick()
            calls += 1
        step += 10
        if stages.name == name and name in ("play", "score"):
            stages.scored()
        if stages.name != name or not seen or seen[-1][0] != name:
            seen.append((name, calls))
    return [entry for entry in seen if entry[0] != "collect" or entry[1] == 0]


def test_in_the_dream_generations_follow_each_other_and_the_mean_is_scored_in_between():
    names = [name for name, _ in order("--stages.train_in", "dream")]
    assert list(dict.fromkeys(names)) == ["collect", "vision", "memory", "evolve", "score"]
    assert names.count("score") == 2


def test_a_stage_tells_its_name_and_its_share():
    stages = Stages(config("--stages.train_in", "env", "--stages.rounds", "2").stages)
    stages.due(0)
    stages.due(10)
    assert stages.stage() == ("data", 10 / 40)
    stages.due(40)
    stages.tick()
    assert stages.stage() == ("V", 1 / 4)
    for _ in range(3):
        stages.tick()
    assert stages.stage() == ("M", 0.0)
    for _ in range(4):
        stages.tick()
    stages.played = 0.5  # of the first of four generations
    assert stages.stage() == ("C", 0.5 / 4)
    for _ in range(4):
        stages.scored()
        stages.tick()
        if stages.name == "score":
            stages.scored()
    assert stages.stage() == ("data of round 2", 0.0) and not stages.finished()
    stages.name = "done"
    assert stages.stage() == ("done", 1.0) and stages.finished()


def test_in_the_environment_candidates_play_before_each_generation():
    names = [name for name, _ in order("--stages.rounds", "2")]
    assert names.count("play") == 8 and names.count("evolve") == 8 and names.count("score") == 4
    assert names.count("vision") == 2


def test_a_score_that_a_restart_cut_off_does_not_count():
    auditions = Auditions(np.array([[1.0], [2.0]]), 1)
    auditions.begin(0)
    auditions.begin(1)
    assert [auditions.weights_of(env)[0] for env in (0, 1)] == [1, 2]
    auditions.reward(0, 5.0, False)
    auditions.begin(0)  # without an end: the worker was restarted
    auditions.reward(0, 1.0, True)
    auditions.reward(1, 7.0, False)
    resumed = Auditions.read(auditions.state_dict())
    assert resumed.scores[0, 0] == 1 and np.isnan(resumed.scores[1, 0]) and not resumed.complete()
    resumed.begin(0)
    resumed.reward(0, 3.0, True)
    assert resumed.complete() and resumed.scores.tolist() == [[1.0], [3.0]]


# ---------------------------------------------------------------------------
# Runs


def run(logdir, *more, steps=300):
    argv = ["--configs", "debug", "world_models", *TINY.split(), "--task", "dummy_vector", *more]
    return dreamer.main([*argv, "--steps", str(steps), "--logdir", str(logdir)])


def metrics(logdir):
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("where", ["dream", "env"])
def test_a_run_goes_through_all_stages_and_logs_each(where, tmp_path):
    assert run(tmp_path, "--stages.train_in", where, "--log_every", "1", steps=1500) == 0
    saved = checkpoint(tmp_path)["agent"]
    assert saved["stages"]["name"] == "done" and len(saved["evolution"]["told"]) == 4
    seen = {name for row in metrics(tmp_path) for name in row}
    assert seen >= {"vae_loss", "kl_loss", "mdn_loss", "done_loss", "fitness_mean", "fitness_best", "sigma"}
    assert np.isfinite(saved["best"]["score"])


@pytest.mark.parametrize("call", [2, 6, 10])
def test_a_run_that_is_stopped_in_v_m_or_the_dream_goes_on_bit_for_bit(call, tmp_path, monkeypatch):
    flags = "--stages.train_in", "dream"
    assert run(tmp_path / "whole", *flags) == 0
    learn, calls = WorldModels.learn, []

    def stopping(self, replay):
        calls.append(self.stages.name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, replay)

    monkeypatch.setattr(WorldModels, "learn", stopping)
    assert run(tmp_path / "parts", *flags) == 128 + signal.SIGTERM
    assert calls[-1] == {2: "vision", 6: "memory", 10: "evolve"}[call]
    monkeypatch.undo()
    assert run(tmp_path / "parts", *flags) == 0
    one, other = (checkpoint(tmp_path / name)["agent"] for name in ("whole", "parts"))
    assert differ(one["model"], other["model"]) == [] and differ(one["evolution"], other["evolution"]) == []


def test_a_generation_in_the_environment_goes_on_with_its_candidates_and_finished_scores(tmp_path, monkeypatch):
    act, calls = WorldModels.act, []

    def stopping(self, obs, carry, mode="sample"):
        result = act(self, obs, carry, mode)
        playing = self.auditions and self.stages.name == "play" and not calls
        if playing and np.isfinite(self.auditions.scores).sum() == 3:
            calls.append(self.auditions.state_dict())
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(WorldModels, "act", stopping)
    assert run(tmp_path, "--stages.train_in", "env") == 128 + signal.SIGTERM
    saved, told = checkpoint(tmp_path)["agent"]["auditions"], []
    assert torch.equal(saved["weights"], calls[-1]["weights"]) and saved["played"].sum() >= 3
    monkeypatch.undo()
    evolve = WorldModels.evolve
    monkeypatch.setattr(WorldModels, "evolve", lambda self, replay: told.append(self.auditions) or evolve(self, replay))
    assert run(tmp_path, "--stages.train_in", "env") == 0
    assert np.array_equal(told[0].weights, saved["weights"].numpy())
    assert np.array_equal(told[0].scores[saved["played"].numpy()], saved["scores"].numpy()[saved["played"].numpy()])


def test_a_finished_run_ends_early_is_filmed_and_acts_and_says_that_it_has_no_export(tmp_path, capfd):
    logdir = tmp_path / "run"
    words = ("--stages.train_in", "dream", "--stages.generations", "1", "--task", "dummy_pixels")
    assert run(logdir, *words, steps=100_000) == 0
    saved = checkpoint(logdir)
    assert saved["agent"]["stages"]["name"] == "done" and saved["counters"]["agent_steps"] < 1000
    assert run(logdir, *words, steps=100_000) == 0 and "already finished" in capfd.readouterr().err
    policy = dreamer.load_agent(logdir)
    action, state = policy.act({"image": np.zeros((64, 64, 3), np.uint8)})
    again, _ = policy.act({"image": np.zeros((64, 64, 3), np.uint8)}, state)
    assert action.keys() == again.keys()
    flags = ["--checkpoint", str(logdir), "--output", str(tmp_path / "film"), "--openloop", "--episodes", "1"]
    assert inference_video.main(flags) == 0
    assert any("openloop_image" in path.name for path in (tmp_path / "film").iterdir())
    assert export.main(["--checkpoint", str(logdir), "--format", "torch"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith("load_agent lets them act")


def test_a_checkpoint_of_other_generations_is_refused_in_one_line():
    saved, other = make().state_dict(), make("--stages.population", "6")
    with pytest.raises(UserError, match=r"a generation is \(4,\) there and \(6,\) here"):
        other.load_state_dict(saved)
    other = make("--stages.inputs", "z")
    with pytest.raises(UserError, match="C is"):
        other.load_state_dict(saved)


def test_images_are_reconstructed_and_dreamt(tmp_path):
    agent = make(obs={"image": Box(0, 255, (64, 64, 3), np.uint8)})
    arrays = {
        "image": np.zeros((2, 5, 64, 64, 3), np.uint8),
        "action": np.eye(2, dtype=np.float32)[np.zeros((2, 5), int)],
        "is_first": np.zeros((2, 5), bool),
    }
    panels = agent.report(arrays, 3)["image"]
    assert [panel.shape for panel in panels] == [(2, 5, 64, 64, 3)] * 3


def test_a_film_goes_on_in_the_memory_that_acting_has(monkeypatch):
    agent = make(obs={"image": Box(0, 255, (64, 64, 3), np.uint8)})
    rng, carry, steps = np.random.default_rng(0), agent.initial(1), []
    for t in range(6):
        obs = {"image": rng.integers(0, 255, (1, 64, 64, 3), dtype=np.uint8), "is_first": np.array([t == 0])}
        steps.append((obs, carry))
        _, carry, _ = agent.act(obs, carry, "mode")
    arrays = {key: np.stack([obs[key] for obs, _ in steps[3:]], 1) for key in ("image", "is_first")}
    arrays["action"] = np.stack([carry.action.numpy() for _, carry in steps[3:]], 1)  # that led to each
    seen, predict = [], agent.memory.predict
    monkeypatch.setattr(agent.memory, "predict", lambda z, h: seen.append(h) or predict(z, h))
    agent.report(arrays, 2, steps[3][1])
    assert torch.allclose(seen[0], carry.memory.h, atol=1e-6)  # of the last step, which it is to expect
