"""The manager, its goals and its worker, with numbers that can be checked by hand."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch

import benchmarks.hierarchy as measured
from agents import make_agent as make_from
from agents.acting import ActingStep, make_decoder
from behaviors.goals import GoalAutoencoder, Novelty, max_cosine
from behaviors.hierarchy import decisions, pieces, staying
from envs import make_envs
from modalities import obs_spec
from models import ImagBehavior, frozen
from ops.random import drawing_from
from specs import act_spec
from tests.factories import (
    VERSIONS,
    act,
    family_agent,
    initial,
    make_agent,
    make_batch,
    make_config,
    make_obs,
    make_sequences,
    one_line_error,
    parameters,
)
from training.config import CONFIGS, load_config
from training.evaluation import film

K = 5  # of the preset debug
FLAGS = ("--configs", "hierarchical", "debug", "--imag_horizon", str(2 * K))
CHANGES = {"behavior": "hierarchical_ppo", "imag_horizon": 2 * K}


def make(kind="proprio", *flags, seed=0):
    return make_agent(kind, *FLAGS, *flags, seed=seed)


# ---------------------------------------------------------------------------
# By hand


def test_max_cosine_by_hand():
    goal = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    state = torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.5, 2.0], [0.0, 2.0], [0.0, 0.0]])
    assert max_cosine(goal, state).tolist() == pytest.approx([1, 0.5, 0.5, 0, 0])  # a cosine would be 1, 1, 1, 0
    assert max_cosine(goal[:1], -state[:1]).item() == pytest.approx(-1)


def test_nearness_is_told_by_what_differs_from_the_usual_state():
    goals = make("proprio").behavior.goals
    states = torch.randn(200, len(goals.usual)) + 50
    for part in states.split(50):
        goals.learn(part)
    torch.testing.assert_close(goals.usual, states.mean(0), rtol=1e-4, atol=1e-4)
    apart = goals.near(states[:100], states[100:])
    assert apart.abs().max() < 0.95 and max_cosine(states[:100], states[100:]).min() > 0.95


def test_rewards_and_discounts_of_decisions_by_hand():
    reward = torch.tensor([100.0, 1.0, 2.0, 4.0, 8.0])[:, None]  # of the start: no decision led there
    cont = torch.tensor([0.9, 0.5, 0.8, 0.25, 0.4])[:, None]
    total, rest = decisions(reward, cont, 2)
    assert total[:, 0].tolist() == pytest.approx([0, 1 + 0.5 * 2, 4 + 0.25 * 8])
    assert rest[:, 0].tolist() == pytest.approx([0.9, 0.5 * 0.8, 0.25 * 0.4])
    weights = cont.cumprod(0)[::2]
    torch.testing.assert_close(weights, rest.cumprod(0))  # the same weights, step by step or choice by choice


def test_a_piece_ends_where_the_next_one_begins():
    states, actions = torch.arange(5)[:, None].expand(5, 2), torch.arange(4)[:, None].expand(4, 2)
    assert pieces(states, 2)[:, ::2].T.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert pieces(actions, 2, 0)[:, ::2].T.tolist() == [[0, 1], [2, 3]]


def test_novelty_is_told_in_standard_deviations_from_the_mean():
    novelty, reward = Novelty(rate=0.25), torch.tensor([[1.0, 3.0]])
    assert novelty(reward).tolist() == [pytest.approx([-1, 1])]
    novelty(1 + reward)  # means 2 and 3, mean squares 5 and 10
    assert (float(novelty.mean), float(novelty.square)) == pytest.approx((2.5, 7.5))
    assert novelty(torch.full((2, 2), 2.5)).abs().max() < 0.5


@pytest.mark.parametrize("share, factor", [(0.0, 1.1), (1.0, 1 / 1.1)])
def test_the_weight_of_the_goals_kl_follows_its_target(share, factor):
    goals = GoalAutoencoder(8, make_config("--hierarchy.goal_kl", str(share)))
    goals.beta.fill_(0.5)
    metrics = goals.learn(torch.randn(6, 8))  # codes of a new encoder are nearly uniform
    assert 0 <= metrics["goal_kl"] < 0.5 and goals.target == pytest.approx(share * 2 * math.log(3))
    assert float(goals.beta) == pytest.approx(0.5 * factor) == float(metrics["goal_beta"])


def test_goals_learn_what_they_are_shown_and_err_on_the_rest():
    torch.manual_seed(0)
    goals = GoalAutoencoder(8, make_config("--hierarchy.goal_lr", "0.01", "--hierarchy.goal_kl", "1"))
    known, other = torch.randn(3, 8).sign()[torch.randint(3, (32,))], torch.randn(32, 8).sign()
    for _ in range(150):
        goals.learn(known)
    assert goals.error(known).mean() < 0.5 * goals.error(other).mean()


# ---------------------------------------------------------------------------
# Acting


def test_a_goal_is_chosen_at_the_start_and_every_k_steps_and_never_outlives_its_episode():
    agent, carry, goals = make(), None, []
    for step in range(2 * K + 2):
        obs = make_obs("proprio", count=2, seed=step)
        obs["is_first"] = np.array([step == 0, step in (0, 3)])  # the second one starts anew in the middle of a goal
        _, carry = act(agent, obs, carry, "sample")
        goals.append(carry.task[0])
    changes = [[i for i in range(1, len(goals)) if not torch.equal(goals[i][n], goals[i - 1][n])] for n in (0, 1)]
    assert changes == [[K, 2 * K], [3, 3 + K]]
    assert all(goal.any(-1).all() for goal in goals)
    assert carry.task[1].tolist() == [2, 2 * K + 2 - 3 - K]


def test_an_explorer_has_no_goals_and_the_hierarchy_takes_over_within_an_episode():
    agent = make("proprio", "--expl_behavior", "plan2explore")
    assert type(agent.expl_behavior) is ImagBehavior
    obs = make_obs("proprio", count=2, is_first=True)
    _, first = act(agent, obs, None, "explore", seed=0)
    assert not first.task[0].any() and first.task[1].tolist() == [0, 0]
    obs["is_first"][:] = False
    _, second = act(agent, obs, first, "mode")
    assert second.task[0].any() and second.task[1].tolist() == [1, 1]


def test_what_a_policy_is_asked_for_its_mode_depends_on_no_draw():
    agent, obs = make(), make_obs("proprio", is_first=True)
    with torch.no_grad():
        state = agent.world.rssm.initial(3, agent.device)
        carry = agent.behavior.initial(3, agent.device)
        one, other = (agent.behavior.act(agent.world, state, carry, "mode") for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1][0], other[1][0])
    assert agent.act(obs, agent.initial(3), "mode")[0]["action"].shape == (3, 6)


def test_the_step_of_an_exported_hierarchy_is_that_of_the_agent():
    agent = make("mixed")
    step = ActingStep(agent, "sample", {key: make_decoder(agent.act_spec, key) for key in agent.act_spec.widths})
    assert step.carried[3:] == ["carry.3", "carry.4"]
    inputs, generator = step.start(2), torch.Generator().manual_seed(0)
    goals = [inputs["carry.3"]]
    for _ in range(K + 1):
        inputs |= step.noise(2, generator)
        inputs |= step.carry_of(step(inputs)) | {"is_first": torch.zeros(2, dtype=torch.bool)}
        goals.append(inputs["carry.3"])
    assert [torch.equal(a, b) for a, b in zip(goals[1:], goals[:-1], strict=True)] == [False, *[True] * (K - 1), False]


# ---------------------------------------------------------------------------
# Imagining and learning


def imagined(agent, seed=1):
    torch.manual_seed(seed)
    batch, world = make_batch("proprio"), agent.world
    with torch.no_grad():
        prepared = world.prepare(batch)
        states, _ = world.rssm.observe(world.encode(prepared), batch["action"], batch["is_first"], initial(agent))
    with frozen(world):
        rollout = agent.behavior.rollout(world, states)
        return rollout, agent.behavior.losses(world, rollout, batch, lambda rollout: torch.ones(2 * K + 1, 15))[1]


def test_an_imagined_trajectory_begins_with_a_fresh_goal_and_acts_for_the_one_it_has():
    agent = make()
    rollout, _ = imagined(agent)
    behavior = agent.behavior
    assert rollout.codes.shape == (2, 15, 6) and rollout.goals.shape == (2, 15, 32)
    torch.testing.assert_close(rollout.goals, behavior.goals.decode(rollout.codes))
    seen, move = [], behavior.move
    behavior.move = lambda deter, stoch, goal, noise: seen.append(goal) or move(deter, stoch, goal, noise)
    again = behavior.rollout(agent.world, rollout.states.map(lambda x: x[:1].transpose(0, 1)))
    for step, goal in enumerate(seen):
        assert torch.equal(goal, again.goals[step // K])
    assert len(seen) == 2 * K and not torch.equal(again.goals[0], again.goals[1])


def test_the_worker_is_paid_for_nearness_and_the_manager_for_the_rewards_of_its_steps():
    agent = make("proprio", "--hierarchy.expl_scale", "0", "--hierarchy.extr_scale", "2", "--ppo.advantage", "none")
    rollout, outs = imagined(agent)
    goals, deter = agent.behavior.goals, rollout.states.deter
    cont = agent.world.discounts(rollout.feat)
    near = goals.near(rollout.goals[1], deter[K + 1])  # on arriving in the second piece's first state
    paid = staying(near, cont[K + 1], agent.world.discount)
    torch.testing.assert_close(outs["worker_reward"][1].view(2, 15)[1], paid)
    under_old = goals.near(rollout.goals[0], deter[K])  # where a piece ends, its own goal counts
    paid = staying(under_old, cont[K], agent.world.discount)
    torch.testing.assert_close(outs["worker_reward"][K].view(2, 15)[0], paid)
    torch.testing.assert_close(outs["near"].view(2, 15)[0], under_old)
    weight = cont.cumprod(0)
    torch.testing.assert_close(outs["worker_weight"].view(K + 1, 2, 15)[2, 1], weight[K + 2])
    paid = 2 * sum(cont[K + 1 : K + i].prod(0) for i in range(1, K + 1))  # rewards of 1
    left, value = cont[K + 1 :].prod(0), outs["manager_value"]
    torch.testing.assert_close(outs["manager_ret"][1], paid + left * value[2])
    torch.testing.assert_close(outs["manager_adv"][1], paid + left * value[2] - value[1])
    torch.testing.assert_close(outs["manager_weight"], weight[::K])
    assert outs["worker_ret"].shape == (K, 30) and outs["manager_ret"].shape == (2, 15)


def test_exploring_pays_the_manager_for_what_its_goals_cannot_tell():
    agent = make("proprio", "--hierarchy.expl_scale", "3", "--hierarchy.extr_scale", "0")
    _, outs = imagined(agent)
    error = outs["error"]
    paid = 3 * (error - error.mean()) / error.std(correction=0)  # the first batch is all that is known
    with torch.no_grad():
        cont = agent.world.discounts(imagined(agent)[0].feat)
    expected, _ = decisions(paid, cont, K)
    torch.testing.assert_close(outs["manager_reward"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("version", ["dreamerv3", "dreamerv1"])
def test_all_parts_learn_and_no_gradient_of_theirs_reaches_the_world_model(version):
    agents = [family_agent(version, "proprio", {**CHANGES, "behavior": name}) for name in ("ppo", "hierarchical_ppo")]
    start, worlds = copy.deepcopy(agents[0].world.state_dict()), []
    for agent in agents:
        agent.world.load_state_dict(start)
        before = parameters(agent)
        agent.generators["learn"].manual_seed(0)
        torch.manual_seed(0)
        _, metrics = agent.update(make_sequences("proprio"), initial(agent))
        assert all(value.isfinite() for value in metrics.values())
        worlds.append({name: value for name, value in parameters(agent).items() if name.startswith("world.")})
    assert all(torch.equal(worlds[0][name], worlds[1][name]) for name in worlds[0])
    after = parameters(agent)
    parts = [f"{who}.{part}" for who in ("worker", "manager") for part in ("actor", "critic", "slow")]
    for part in (*parts, "goals.encoder", "goals.decoder"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(f"behavior.{part}.")), part
    assert metrics.keys() >= {"worker_policy_loss", "manager_value_loss", "goal_loss", "worker_success"}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_explorer_beside_a_hierarchy_learns_in_every_version(version):
    kind = {"dreamerv2": "pixels"}.get(version, "proprio")
    agent = family_agent(version, kind, {**CHANGES, "expl_behavior": "plan2explore"})
    before = parameters(agent)
    _, metrics = agent.update(make_sequences(kind), initial(agent))
    assert all(value.isfinite() for value in metrics.values())
    after = parameters(agent)
    for part in ("behavior.worker.actor", "expl_behavior.actor", "expl_behavior.critic"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(part)), part


def test_a_worker_is_paid_in_a_terminal_state_for_staying_there():
    cont = torch.tensor([0.9, 0.0, 0.45, 0.0])
    paid = staying(torch.tensor([0.5, 0.5, 0.5, -0.2]), cont, 0.9)
    assert paid.tolist() == pytest.approx([0.5, 5.0, 0.5 + 0.5 * 0.9 * 5.0, -2.0])  # 0.5 / (1 - 0.9)


def test_a_horizon_that_goals_do_not_divide_is_refused_in_one_line():
    message = one_line_error(make, "proprio", "--imag_horizon", "7")
    assert "--imag_horizon 7" in message and "--hierarchy.every 5" in message


@pytest.mark.parametrize("flags", [("--behavior", "ppo", "--expl_behavior", "plan2explore"), ()])
def test_learning_goes_on_bit_for_bit_from_what_was_saved(flags):
    one, batch = make("proprio", *flags), make_batch("proprio")

    def learn(agent):
        with drawing_from(agent.generators["learn"]):
            return agent.update(batch, initial(agent))[1]

    for _ in range(2):
        learn(one)
    file = io.BytesIO()
    torch.save((one.state_dict(), one.generators["learn"].get_state()), file)
    file.seek(0)
    state, drawn = torch.load(file, weights_only=True)
    other = make("proprio", *flags, seed=1)
    other.load_state_dict(state)
    other.generators["learn"].set_state(drawn)
    for _ in range(2):
        ours, theirs = learn(one), learn(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pairs = zip(one.nets.state_dict().items(), other.nets.state_dict().values(), strict=True)
    assert [name for (name, a), b in pairs if not torch.equal(a, b)] == []


def test_the_runs_that_are_measured_are_valid():
    for presets, flags, _ in measured.REACHERS.values():
        config = load_config(["--configs", *presets.split(), *measured.REACH.split(), *flags.split()], CONFIGS)
        assert config.imag_horizon % config.hierarchy.every == 0 and config.horizon == 100
    config = load_config(["--configs", "quickstart", "hierarchical", *measured.WORKER.split()], CONFIGS)
    assert config.imag_horizon == config.hierarchy.every and not config.replay_context
    assert load_config(["--configs", "quickstart", *measured.CARTPOLE.split()], CONFIGS).task == "gym_CartPole-v1"
    assert measured.row("not run", [], 195) == ["not run", "-", "-", "-"]


# ---------------------------------------------------------------------------
# Films


def test_films_show_the_goal_beside_the_picture():
    config = make_config(*FLAGS, "--task", "dummy_pixels", "--size", "16", "16")
    with contextlib.closing(make_envs(config, "eval", 1)) as envs:
        specs = obs_spec(envs.obs_space), act_spec(envs.act_space)
        agent = make_from(config, *specs)
        frames, scores = film(envs, specs[1], agent, "sample", longest=3)
        plain = make_from(config.replace(behavior="ppo"), *specs)
        assert plain.pictures(plain.initial(1)) == []
    assert [frame.shape for frame in frames] == [(240, 240 + 6 + 240, 3)] * 3  # enlarged, a border, the goal
    assert len(scores) == 3
    mixed = make("mixed")
    _, carry = act(mixed, make_obs("mixed", is_first=True))
    shapes = [picture.shape for picture in mixed.pictures(carry)]
    assert len(shapes) == 4 and (16, 32, 3) in shapes
