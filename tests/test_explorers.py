"""Sources of intrinsic reward: numbers checked by hand, what they learn, and how their rewards are mixed and saved."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

import dreamer
from explorers import EXPLORERS, Rewards, received
from explorers.empowerment import Empowerment, Plans
from explorers.icm import ICM
from explorers.rnd import RND
from explorers.scale import Moments, ReturnScale
from models import Rollout
from ops.layers import DREAMERV3
from ops.random import drawing_from
from rssm import State, feature
from specs import ActionSpec
from tests.factories import (
    SPACES,
    VERSIONS,
    act,
    family_agent,
    initial,
    make_agent,
    make_batch,
    make_config,
    make_dreamer,
    make_sequences,
    observations,
    shake,
)
from training.config import CONFIGS, load_config

every_explorer = pytest.mark.parametrize("name", EXPLORERS)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))


def stand_in(embed, feat, discount=0.9):
    """Stand in for a world model of which only sizes are asked."""
    return SimpleNamespace(encoder=SimpleNamespace(size=embed), feat_size=feat, discount=discount)


def linear(kernel, bias):
    layer = nn.Linear(*np.shape(kernel))
    layer.weight.data, layer.bias.data = torch.tensor(kernel).T.float(), torch.tensor(bias).float()
    return layer


# ---------------------------------------------------------------------------
# Statistics


def test_moments_are_those_of_all_that_was_seen():
    moments, samples = Moments(3), torch.randn(7 * 4, 3) * 2 + 1
    for part in samples.split([4, 16, 8]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, samples.mean(0))
    torch.testing.assert_close(moments.std(), samples.std(0, correction=0))


def test_moments_forget_what_was_long_ago():
    moments = Moments()
    for number in range(80):  # batches of one sample: all as important until the twentieth
        moments.add(torch.tensor([float(number == 10)]))
    assert moments.mean.item() == pytest.approx(0.05 * 0.95**60, rel=1e-3)


def test_a_reward_is_divided_by_the_deviation_of_its_discounted_sums():
    scale = ReturnScale(0.5)
    scaled = scale(torch.tensor([[1.0, 2.0, 3.0]]))  # sums 1, 2.5, 4.25
    torch.testing.assert_close(scaled, torch.tensor([[1.0, 2.0, 3.0]]) / np.std([1.0, 2.5, 4.25]))
    scaled = scale(torch.tensor([[4.0, 0.0]]))  # sums 4, 2
    torch.testing.assert_close(scaled, torch.tensor([[4.0, 0.0]]) / np.std([1.0, 2.5, 4.25, 4.0, 2.0]))


# ---------------------------------------------------------------------------
# ICM and RND


def icm_by_hand(eta):
    """Return an ICM whose features are the embedding and whose forward model adds the action to it, and a batch."""
    icm = ICM(stand_in(2, 3), ActionSpec({"action": 2}, {"action": [2]}), make_config("--icm.eta", str(eta)))
    icm.features, icm.size = nn.Identity(), 2
    icm.forward_model = linear(np.tile(np.eye(2), (2, 1)), [0, 0])
    icm.inverse = linear(np.zeros((4, 2)), [1, 0])  # the first choice has odds of e to 1
    batch = {
        "embed": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 5.0]]]),
        "action": torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]),
        "is_first": torch.tensor([[True, False, False, True]]),
    }
    return icm, batch, State(torch.randn(1, 4, 2), torch.randn(1, 4, 1, 1))


def test_icm_has_the_losses_and_the_bonus_of_the_paper():
    # [1, 0] and the first action are said to lead to [2, 0], which is [0, 1]: (4 + 1) / 2. [0, 1] and the second are
    # said to lead to [0, 2], which is [2, 2]: 4 / 2. The last step begins another episode.
    icm, batch, states = icm_by_hand(eta=0.01)
    losses, outs = icm.losses(None, states, batch)
    inverse = torch.tensor([[math.log1p(math.exp(-1)), math.log1p(math.exp(1)), 0.0]])
    forward = torch.tensor([[2.5, 2.0, 0.0]])
    torch.testing.assert_close(losses["intrinsic/icm"], 10 * (0.8 * inverse + 0.2 * forward))
    torch.testing.assert_close(outs["icm_reward"], 0.01 * forward)
    expected = -icm.head(feature(states)[:, 1:3]).log_prob(0.01 * forward[:, :2])  # what a head learns of it
    torch.testing.assert_close(losses["intrinsic/icm_head"], torch.cat([expected, torch.zeros(1, 1)], 1))


def test_the_bonus_of_icm_is_the_mean_error_over_the_deviation_of_its_sums():
    icm, batch, states = icm_by_hand(eta=0)
    _, outs = icm.losses(None, states, batch)
    mean = torch.tensor([[2.5, 2.0, 0.0]])  # of two numbers: 5 / 2, 4 / 2
    sums = [2.5, 0.9 * 2.5 + 2.0, 0.9 * (0.9 * 2.5 + 2.0)]
    torch.testing.assert_close(outs["icm_reward"], mean / np.std(sums).astype(np.float32))


def test_continuous_actions_are_told_by_a_normal_of_unit_variance():
    spec = ActionSpec({"a": 2, "b": 3}, {"b": [3]})
    icm = ICM(stand_in(4, 3), spec, make_config())
    icm.inverse = linear(np.zeros((16, 5)), [0.5, 0, 0, 0, 0])
    action = torch.tensor([[1.0, 2.0, 0.0, 1.0, 0.0]])
    loss = icm.inverse_loss(torch.randn(1, 8), torch.randn(1, 8), action)
    assert loss.item() == pytest.approx(0.5 * (0.25 + 4.0) + math.log(2 * math.pi) + math.log(3))


def test_the_features_of_icm_learn_by_the_inverse_model_alone():
    agent, batch = make_agent("proprio", "--intrinsic", "icm"), make_batch("proprio")
    icm = agent.explorers["icm"]
    icm.inverse_loss = lambda before, after, action: 0 * before.sum(-1)
    losses, _, _ = agent.loss(batch, initial(agent))
    params = dict(icm.named_parameters())
    grads = torch.autograd.grad(losses["intrinsic/icm"].sum(), params.values(), allow_unused=True)
    moved = {name.split(".")[0] for name, grad in zip(params, grads, strict=True) if grad is not None and grad.any()}
    assert moved == {"forward_model"}


def test_rnd_rewards_the_error_on_whitened_embeddings_over_its_scale():
    rnd = RND(stand_in(2, 3), None, make_config())
    rnd.predictor, rnd.target = linear(np.eye(2), [0, 0]), linear(2 * np.eye(2), [0, 0])
    states, batch = State(torch.randn(1, 2, 2), torch.randn(1, 2, 1, 1)), {"embed": torch.tensor([[[1.0, 0], [3, 8]]])}
    losses, outs = rnd.losses(None, states, batch)
    # mean (2, 4), deviation (1, 4): both steps are at one deviation, where the networks differ by 1 in each number
    torch.testing.assert_close(losses["intrinsic/rnd"], torch.ones(1, 2))
    bonus = torch.ones(1, 2) / np.float32(np.std([1.0, 1.9]))
    torch.testing.assert_close(outs["rnd_reward"], bonus)
    torch.testing.assert_close(losses["intrinsic/rnd_head"], -rnd.head(feature(states)).log_prob(bonus))
    far = rnd.errors(torch.tensor([[2.0, 4.0], [1e3, 4.0]]))  # the mean, and beyond the limit of 5
    torch.testing.assert_close(far, torch.tensor([0.0, 25 / 2]))


@pytest.mark.parametrize("name", ["icm", "rnd"])
def test_what_was_observed_is_carried_into_imagination_by_a_head(name):
    explorer = EXPLORERS[name](stand_in(4, 3), ActionSpec({"action": 2}, {}), make_config())
    opt, torch_states = torch.optim.Adam(explorer.head.parameters(), 3e-3), torch.eye(3)[:, None]
    states = State(torch_states[..., :2], torch_states[..., 2:, None])
    for _ in range(300):
        loss = explorer.head_loss(states, torch.tensor([[0.0], [1.0], [3.0]])).mean()
        opt.zero_grad(), loss.backward(), opt.step()
    paid = explorer.reward(Rollout(None, None, feature(states)))
    torch.testing.assert_close(paid, torch.tensor([[0.0], [1.0], [3.0]]), atol=0.1, rtol=0)


def test_the_random_network_stays_as_it_was_made():
    agent = make_agent("proprio", "--expl_behavior", "rnd")
    target = [param.clone() for param in agent.explorer.target.parameters()]
    agent.update(make_batch("proprio"), initial(agent))
    assert all(torch.equal(a, b) for a, b in zip(target, agent.explorer.target.parameters(), strict=True))


# ---------------------------------------------------------------------------
# Empowerment


def room(side):
    """Return a world model's stand-in, a square room whose states are one-hot cells, and its table (cells, 5)."""
    cells = list(itertools.product(range(side), repeat=2))
    inside = {cell: number for number, cell in enumerate(cells)}
    table = torch.tensor([[inside.get((r + a, c + b), inside[r, c]) for a, b in MOVES] for r, c in cells])

    def imagine(start, plans, steps):
        deters = [start.deter]
        for action in plans:
            deters.append(torch.eye(len(cells))[table[deters[-1].argmax(-1), action.argmax(-1)]])
        return State(torch.stack(deters), start.stoch.expand(steps + 1, *start.stoch.shape)), plans

    world = stand_in(len(cells), len(cells) + 1)
    world.rssm = SimpleNamespace(imagine=imagine)
    return world, table


def learn_empowerment(world, cells, updates):
    """Return an explorer after updates on random cells, whose embedding is the cell."""
    torch.manual_seed(0)
    config = make_config("--empowerment.width", "48", "--empowerment.anneal", "100")
    explorer = Empowerment(world, ActionSpec({"action": 5}, {"action": [5]}), config)
    opt = torch.optim.Adam(explorer.parameters(), 5e-3)
    never = torch.zeros(8, 12, dtype=torch.bool)
    for _ in range(updates):
        deter = torch.eye(cells)[torch.randint(cells, (8, 12))]
        batch = {"embed": deter, "is_first": never, "is_terminal": never}
        losses, _ = explorer.losses(world, State(deter, torch.zeros(8, 12, 1, 1)), batch)
        opt.zero_grad()
        sum(loss.mean() for loss in losses.values()).backward()
        opt.step()
    return explorer


def test_empowerment_of_a_grid_is_the_logarithm_of_the_cells_that_can_be_reached():
    world, table = room(3)
    explorer = learn_empowerment(world, len(table), 200)
    states = torch.cat([torch.eye(9), torch.zeros(9, 1)], -1)
    found = explorer.reward(Rollout(None, None, states)).detach()
    reachable = torch.tensor([len(set(row.tolist())) for row in table])  # 5 in the middle, 4 at a wall, 3 in a corner
    torch.testing.assert_close(found, reachable.float().log(), atol=0.15, rtol=0)
    levels = {count: found[reachable == count] for count in (3, 4, 5)}
    assert levels[3].max() < levels[4].min() and levels[4].max() < levels[5].min()


def test_the_probabilities_of_all_plans_add_up_to_one_and_depend_on_the_actions_before():
    torch.manual_seed(0)
    plans = Plans(4, ActionSpec({"action": 3}, {"action": [3]}), 2, 1, 16, DREAMERV3)
    for param in plans.parameters():
        nn.init.normal_(param)
    context, choices = torch.randn(1, 4), torch.eye(3)
    pairs = torch.stack([torch.stack([a, b]) for a in choices for b in choices], 1)  # (2, 9, 3)
    probs = plans.log_prob(context.expand(9, 4), pairs).exp().view(3, 3)
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.matrix_rank(probs, atol=1e-4) > 1  # not a product of one distribution for each step
    with torch.no_grad():
        drawn = plans.sample(context.expand(4000, 4)).argmax(-1)
    shares = torch.bincount(3 * drawn[0] + drawn[1], minlength=9).view(3, 3) / 4000
    torch.testing.assert_close(shares, probs.detach(), atol=0.03, rtol=0)


def test_what_is_not_seen_of_a_state_bounds_how_well_outcomes_are_told_apart():
    world, _ = room(3)
    explorer = Empowerment(world, ActionSpec({"action": 5}, {"action": [5]}), make_config())
    start = State(torch.eye(9), torch.zeros(9, 1, 1))
    missed = torch.arange(9.0)[:, None].expand(9, 9)
    explorer.seen = nn.Sequential(linear(np.eye(10)[:, :9], np.zeros(9)))
    found = explorer.outcome(world, start, torch.eye(5)[4].expand(1, 9, 5), missed)
    found = found - torch.eye(9)  # staying leads where one was; each is wrong by what is missed in another
    assert sorted(found[:, 0].round().tolist()) == list(range(9))
    torch.testing.assert_close(found, found[:, :1].expand(9, 9))


def test_nothing_is_left_to_choose_in_a_terminal_state():
    agent, batch = make_agent("proprio", "--intrinsic", "empowerment"), make_batch("proprio")
    batch["is_last"][:] = batch["is_terminal"][:] = True
    losses, _, outs = agent.loss(batch, initial(agent))
    assert not losses["intrinsic/empowerment_planner"].any() and not losses["intrinsic/empowerment_source"].any()
    assert not outs["explorers"]["empowerment_bound"].any()


def test_the_source_heeds_the_planner_more_and_more():
    explorer = make_agent("proprio", "--intrinsic", "empowerment", "--empowerment.anneal", "4").explorers["empowerment"]
    found = []
    for explorer.updates in torch.arange(6.0):
        found.append(explorer.beta().item())
    assert found == pytest.approx([0.01, 0.25, 0.5, 0.75, 1.0, 1.0])


# ---------------------------------------------------------------------------
# Mixing


def test_rewards_are_weighed_by_name():
    parts = {"extr": lambda rollout: rollout + 1, "icm": lambda rollout: 10 * rollout}
    rewards = Rewards(parts, {"extr": 2.0, "icm": 0.5})
    x = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(rewards(x), 2 * (x + 1) + 5 * x)
    torch.testing.assert_close(rewards.only("icm")(x), 5 * x)
    torch.testing.assert_close(rewards.unweighed("icm")(x), 10 * x)


def test_replayed_rewards_are_mixed_and_shares_add_up():
    rewards = Rewards({"extr": None, "icm": lambda rollout: rollout.feat.sum(-1)}, {"extr": 2.0, "icm": 0.5})
    states = State(torch.tensor([[[3.0], [1.0], [5.0]]]), torch.zeros(1, 3, 1, 1))
    batch = {"reward": torch.tensor([[1.0, -1.0, 1.0]]), "action": torch.zeros(1, 3, 2)}
    batch["is_first"] = torch.tensor([[False, False, True]])
    outs = {}
    found = received(rewards, states, batch, outs)
    torch.testing.assert_close(found["reward"], torch.tensor([[2 + 1.5, -2 + 0.5, 2.0]]))
    torch.testing.assert_close(found["rewards"], {"extr": batch["reward"], "icm": torch.tensor([[3.0, 1.0, 0.0]])})
    means = {name: value.item() for name, value in outs["shares"].items()}
    share = (0.5 * 4 / 3) / (2.0 + 0.5 * 4 / 3)
    assert means == pytest.approx({"intrinsic/icm_reward": 4 / 3, "intrinsic/icm_share": share})


EVERYTHING = {"intrinsic": ("icm", "rnd", "empowerment", "plan2explore"), "expl_behavior": "icm"}


@pytest.mark.parametrize("critics", ["joint", "separate"])
@pytest.mark.parametrize("version", [name for name in VERSIONS if name != "dreamerv2_atari"])
def test_every_version_learns_from_intrinsic_rewards(version, critics):
    agent = family_agent(version, "proprio", EVERYTHING | {"expl_critics": critics, "empowerment.steps": 2})
    _, metrics = agent.update(make_sequences("proprio"), initial(agent))
    assert all(value.isfinite() for value in metrics.values())
    assert agent.explorer is agent.explorers["icm"] and set(agent.nets["intrinsic"]) == EXPLORERS.keys() - {"icm"}
    names = {
        f"intrinsic/{name}_{what}" for name in ("icm", "rnd", "empowerment", "disag") for what in ("reward", "share")
    }
    names |= {"intrinsic/icm_loss", "intrinsic/rnd_loss", "intrinsic/empowerment", "disag_loss"}
    assert metrics.keys() >= names
    assert sum(float(metrics[name]) for name in names if name.endswith("share")) <= 1
    act(agent, observations("proprio", is_first=True), None, "noisy")


@every_explorer
def test_an_explorer_learns_beside_the_task_and_leaves_its_gradients_alone(name):
    def gradients(agent):
        torch.manual_seed(3)
        losses, _, _ = agent.loss(make_batch("mixed"), initial(agent))
        agent.total(losses).backward()
        return {name: param.grad.clone() for name, param in agent.nets.named_parameters() if param.requires_grad}

    agent, other = make_agent("mixed"), make_agent("mixed", "--expl_behavior", name)
    other.nets.load_state_dict(other.nets.state_dict() | agent.nets.state_dict())
    without, beside = gradients(agent), gradients(other)
    assert all(torch.equal(grad, beside[name]) for name, grad in without.items())
    assert any(grad.any() for name, grad in beside.items() if name.startswith("explorer."))
    assert beside["expl_behavior.actor.mlp.0.kernel"].any()


def test_a_lone_reward_is_all_that_its_behavior_seeks():
    _, metrics = (agent := make_agent("proprio", "--expl_behavior", "icm")).update(
        make_batch("proprio"), initial(agent)
    )
    assert metrics["intrinsic/icm_share"] == 1 and metrics["intrinsic/icm_reward"] > 0
    assert "intrinsic/extr_share" not in metrics and "imag_return_icm" not in metrics


def test_separate_critics_weigh_what_each_reward_asks_of_the_actor():
    flags = "--intrinsic", "rnd", "--expl_critics", "separate", "--expl_intr_scale", "0.5", "--expl_extr_scale", "2"
    agent, batch = shake(make_agent("proprio", *flags)), make_batch("proprio")  # else nothing pays yet
    _, _, outs = agent.loss(batch, initial(agent))
    behavior, rollout = agent.behavior, outs["rollout"]
    parts = dict(behavior.parts)
    assert parts["extr"].actor is parts["rnd"].actor and parts["extr"].critic is not parts["rnd"].critic
    ranges = {name: part.return_norm.range.clone() for name, part in parts.items()}
    for part in parts.values():
        part.return_norm.rate = 0.0
    losses, found = behavior.losses(agent.world, rollout, batch, agent.rewards)
    expected = 0
    for name, scale in {"extr": 2.0, "rnd": 0.5}.items():
        out = found[name]
        expected = expected - scale * out["weight"][:-1] * out["logpi"] * out["adv"]
        torch.testing.assert_close(out["reward"], agent.rewards.parts[name](rollout))
    entropy = make_config().actor.entropy * found["rnd"]["weight"][:-1] * found["rnd"]["entropy"]  # once
    torch.testing.assert_close(losses["policy"], expected - entropy)
    assert any(not torch.equal(ranges["extr"], other) for other in ranges.values())
    _, metrics = agent.update(batch, initial(agent))
    assert {"imag_return_rnd", "return_scale_rnd", "repval_loss"} <= metrics.keys()


def test_a_planner_plans_for_what_is_new_only_to_collect():
    agent = family_agent("planet", "proprio", {"intrinsic": ("rnd",), "expl_noise": 0.0})
    asked = []
    agent.rewards.parts["rnd"] = lambda rollout: asked.append(rollout.actions.shape) or rollout.feat.sum(-1)
    for mode in ("mode", "sample"):
        act(agent, observations("proprio", is_first=True), None, mode)
    assert not asked
    act(agent, observations("proprio", is_first=True), None, "noisy")
    assert asked == [(3, 3 * 20, 6)] * 2


@pytest.mark.parametrize("flags", [("--intrinsic", "rnd"), ("--expl_behavior", "rnd")])
def test_explorers_see_what_learning_leaves_out(flags, monkeypatch):
    """An observation that `encoder.drop` masks, at random, is no news."""
    agent, batch = make_agent("mixed", "--encoder.drop", "0.9", *flags), make_batch("mixed")
    explorer, seen = agent.explorers["rnd"], []
    losses = explorer.losses

    def recorded(world, states, batch):
        seen.append(torch.equal(batch["embed"], world.encode(batch)))
        return losses(world, states, batch)

    monkeypatch.setattr(explorer, "losses", recorded)
    for _ in range(3):
        agent.update(dict(batch), initial(agent, len(batch["reward"])))
    assert seen == [True] * 3


@pytest.mark.parametrize("preset", ["curious_icm", "curious_rnd", "empowered", "hierarchical_full"])
def test_an_agent_that_is_curious_can_be_loaded_elsewhere(preset, tmp_path):
    """Its configuration is read from a file there, where every key is given."""
    config = load_config(["--configs", "debug", preset, "--task", "dummy_vector", "--logdir", str(tmp_path)], CONFIGS)
    config.save(tmp_path / "config.yaml")
    again = load_config(["--config", str(tmp_path / "config.yaml")], CONFIGS)
    rewards = [make_dreamer(*SPACES["proprio"], each).rewards for each in (config, again)]
    assert len(rewards[0].parts) > 1
    assert [each.scale("extr") for each in rewards] == [1.0, 1.0]


def test_the_tasks_reward_cannot_be_left_out_of_the_tasks_behavior():
    rewards = make_agent("proprio", "--intrinsic", "rnd", "--expl_extr_scale", "0").rewards
    assert rewards.scale("extr") == 1.0
    flags = "--intrinsic", "rnd,icm", "--expl_intr_scale", "0.5", "--icm.scale", "4"
    rewards = make_agent("proprio", *flags).rewards
    assert {name: rewards.scale(name) for name in rewards.parts} == {"extr": 1.0, "rnd": 0.5, "icm": 2.0}


# ---------------------------------------------------------------------------
# Saving


def advanced(agent, updates):
    """Return what an agent's state is after updates on the same batch, by the draws of its own generator."""
    with drawing_from(agent.generators["learn"]):
        for _ in range(updates):
            agent.update(make_batch("mixed"), initial(agent))
    return {"agent": agent.state_dict(), "draws": agent.generators["learn"].get_state()}


@pytest.mark.parametrize("critics", ["joint", "separate"])
def test_a_saved_agent_goes_on_bit_for_bit_with_all_explorers(critics):
    words = ["--intrinsic", "icm,rnd,empowerment,plan2explore", "--expl_behavior", "rnd", "--expl_critics"]
    whole = advanced(make_agent("mixed", *words, critics), 4)
    half = advanced(make_agent("mixed", *words, critics), 2)
    agent = make_agent("mixed", *words, critics, seed=1)
    agent.load_state_dict(half["agent"])
    agent.generators["learn"].set_state(half["draws"])
    rest = advanced(agent, 2)
    pairs = zip(tree_leaves(whole), tree_leaves(rest), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("preset", ["curious_icm", "curious_rnd", "empowered"])
def test_a_preset_runs_and_logs_what_it_is_rewarded_by(preset, tmp_path, capsys):
    words = f"--prefill 20 --steps 30 --eval_every 0 --eval_episode_num 0 --log_every 5 --logdir {tmp_path}"
    assert dreamer.main(["--configs", preset, "debug", *words.split()]) == 0, capsys.readouterr().err
    metrics = {name for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    name = {"curious_icm": "icm", "curious_rnd": "rnd"}.get(preset, "empowerment")
    assert {f"intrinsic/{name}_reward", f"intrinsic/{name}_share", "imag_return"} <= metrics
    assert "intrinsic/empowerment" in metrics or f"intrinsic/{name}_loss" in metrics
