"""Every version of Dreamer as a whole agent: gradients, acting, saving, exploring, and whole runs."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box

import dreamer
from explorers import explorer_rewards
from explorers.plan2explore import SPREADS
from models import Rollout
from ops.normals import HALF_LOG_2PI
from ops.optim import Adams, TFAdams
from tests.factories import (
    FAMILY,
    VERSIONS,
    act,
    every_kind,
    every_version,
    initial,
    make_dreamer,
    make_sequences,
    observations,
    parameters,
    shake,
)
from tests.factories import family_agent as make_agent
from tests.factories import family_config as make_config
from tools import Ratio, UserError


def update(agent, kind, seed=0):
    """Do one update on a batch and random draws that the seed determines; return the metrics."""
    torch.manual_seed(seed)
    return agent.update(make_sequences(kind, seed), initial(agent))[1]


def named(agent, *prefixes):
    """Return the names of the trained parameters that begin with one of the prefixes."""
    return {name for name, param in agent.nets.named_parameters() if param.requires_grad and name.startswith(prefixes)}


def reached(agent, losses):
    """Return the names of the parameters with a nonzero gradient of the sum of some losses."""
    trained = {name: param for name, param in agent.nets.named_parameters() if param.requires_grad}
    grads = torch.autograd.grad(agent.total(losses), trained.values(), retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(trained, grads, strict=True) if grad is not None and grad.any()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------
# Learning

BEHAVIOR = ("policy", "value", "repval")
SLOW_SHARES = {  # of the critic that the slow one takes over in the first updates: at first it becomes a copy
    "dreamerv3_2023": [1.0, 0.02],
    "dreamerv2": [1.0, 0.0],
    "dreamerv2_atari": [1.0, 0.0],
}


@every_kind
@every_version
def test_each_loss_moves_its_own_part(version, kind):
    agent = make_agent(version, kind)
    losses, _, _ = agent.loss(make_sequences(kind), initial(agent))
    assert all(loss.isfinite().all() for loss in losses.values())
    learned = set() if version == "planet" else {"policy", "value"} | ({"repval"} if version == "dreamerv3" else set())
    assert losses.keys() & {*BEHAVIOR} == learned
    model = {name: loss for name, loss in losses.items() if name not in BEHAVIOR}
    assert reached(agent, model) == named(agent, "world.")
    if version == "planet":
        return
    assert reached(agent, {"policy": losses["policy"]}) == named(agent, "behavior.actor.")
    assert reached(agent, {"value": losses["value"]}) == named(agent, "behavior.critic.")
    assert named(agent, "behavior.") == named(agent, "behavior.actor.", "behavior.critic.")
    if version == "dreamerv3":
        through = reached(agent, {"repval": losses["repval"]})
        assert named(agent, "behavior.critic.") < through <= named(agent, "behavior.critic.", "world.")


@every_kind
@every_version
def test_updates_move_all_that_is_trained_and_the_slow_critic_by_its_own_rule(version, kind):
    agent = make_agent(version, kind)
    for count in range(2):
        before = parameters(agent)
        metrics = update(agent, kind, seed=count)
        after = parameters(agent)
        assert all(value.shape == () and value.isfinite() for value in metrics.values())
        assert {name for name in moved(before, after) if ".slow." not in name} == named(agent, "")
        for name in (name for name in after if ".slow." in name):
            share = SLOW_SHARES.get(version, [0.02, 0.02])[count]
            expected = torch.lerp(before[name], after[name.replace(".slow.", ".critic.")], share)
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)


def test_discounts_of_heads_that_hold_the_discount_or_not_and_of_none():
    feat = torch.randn(4, 2, 32 + 16)
    for version, expected in {"dreamerv3_2023": 0.5 * (1 - 1 / 333), "dreamerv2_atari": 0.5, "dreamerv2": 0.99}.items():
        world = make_agent(version, "proprio").world
        for param in world.cont.out.parameters() if world.cont else ():
            param.data.zero_()  # a probability of one half
        torch.testing.assert_close(world.discounts(feat), torch.full((4, 2), expected))


def test_what_the_model_makes_of_a_batch():
    batch = {"image": torch.full((1, 1, 64, 64, 3), 255, dtype=torch.uint8), "reward": torch.ones(1, 1)}
    atari, planet = (make_agent(version, "pixels").world.prepare(batch) for version in ("dreamerv2_atari", "planet"))
    assert float(atari["reward"]) == pytest.approx(math.tanh(1)) and torch.equal(atari["image"], batch["image"])
    assert float(planet["reward"]) == 1 and 247 < planet["image"].min() < planet["image"].max() < 255.01


# ---------------------------------------------------------------------------
# Acting


@every_kind
@every_version
def test_acting(version, kind):
    agent = make_agent(version, kind, {"expl_noise": 0.3})
    first, then = observations(kind, is_first=True), observations(kind, seed=1)
    for mode in ("mode", "sample", "noisy", "explore"):
        actions, carry = act(agent, first, None, mode, seed=0)
        action = actions["action"]
        assert action.shape == (3, agent.act_spec.size) and action.dtype == np.float32
        assert np.array_equal(carry.action.numpy(), action)
        if kind == "pixels":
            assert np.array_equal(np.sort(action, 1), np.eye(5)[[4] * 3])  # a single 1 in each
        elif mode != "sample" or not version.startswith("dreamerv3"):  # whose samples the environment clips
            assert np.abs(action).max() <= 1

        def deter(obs, before, mode=mode):
            return act(agent, obs, before, mode)[1].state.deter

        other = carry._replace(state=carry.state.map(lambda x: x.flip(0)))
        assert not torch.equal(deter(then, carry), deter(then, other))
        restart = {**then, "is_first": np.array([True] * 3)}
        assert torch.equal(deter(restart, carry), deter(restart, None))


def test_a_mode_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'modes' is none of mode, sample, noisy, explore"):
        act(make_agent("dreamerv3", "proprio"), observations("proprio", is_first=True), None, "modes")


@every_version
def test_exploration_noise_is_added_to_the_action_chosen_and_nowhere_else(version):
    agent = make_agent(version, "proprio", {"expl_noise": 0.3})
    obs, actions = observations("proprio", is_first=True), []
    for mode in ("sample", "sample", "noisy", "explore"):
        actions.append(act(agent, obs, None, mode, seed=0)[0]["action"])
    assert np.array_equal(actions[0], actions[1]) and np.array_equal(actions[2], actions[3])  # there is no explorer
    inside = np.abs(actions[2]) < 1
    assert 0.05 < np.abs(actions[2] - actions[0])[inside].std() < 0.6 and not np.array_equal(actions[0], actions[2])


# ---------------------------------------------------------------------------
# Optimizers and clocks


def make_adams(kind=Adams, **changes):
    settings = SimpleNamespace(**{"lr": 0.1, "eps": 0.2, "clip": 1.0, "decay": 0.0, **changes})
    names = {"model": "world.weight", "actor": "behavior.actor.weight", "critic": "behavior.critic.bias"}
    groups = {group: {name: nn.Parameter(torch.tensor([1.0, 2.0]))} for group, name in names.items()}
    opt = kind(groups, dict.fromkeys(groups, settings))
    return [param for params in groups.values() for param in params.values()], opt


def test_adams_clip_each_group_alone_and_decay_whatever_the_learning_rate():
    params, opt = make_adams(decay=0.5)
    for param, grad in zip(params, ([3.0, 4.0], [0.3, 0.4], [0.0, 0.0]), strict=True):
        param.grad = torch.tensor(grad)
    norms = {"model_grad_norm": 5.0, "actor_grad_norm": 0.5, "critic_grad_norm": 0.0}
    assert {name: float(value) for name, value in opt.step().items()} == pytest.approx(norms)
    world, actor, critic = (param.tolist() for param in params)  # the half of it, and lr g / (|g| + eps)
    assert world == pytest.approx([0.5 - 0.1 * 0.6 / 0.8, 1 - 0.1 * 0.8 / 1.0])  # of the clipped gradient
    assert actor == pytest.approx([0.5 - 0.1 * 0.3 / 0.5, 1 - 0.1 * 0.4 / 0.6]) and critic == [0.5, 1]


def test_adams_are_adam():
    params, opt = make_adams(clip=1e9, eps=1e-5)
    theirs = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([theirs], lr=0.1, eps=1e-5)
    for _ in range(3):
        for param in (*params, theirs):
            param.grad = 2 * param.detach() - 1
        opt.step(), adam.step()
    for param in params:
        torch.testing.assert_close(param, theirs)
    with pytest.raises(ValueError, match="other parameters"):
        opt.load_state_dict(make_agent("planet", "proprio").opt.state_dict())


def test_tf_adams_do_not_unbias_eps():
    params, opt = make_adams(clip=1e9, eps=1e-3, decay=0.5, kind=TFAdams)
    x, mean, square = 2.0, 0.0, 0.0
    for t in range(1, 4):
        for param in params:
            param.grad = 0.01 * param.detach()
        grad = 0.01 * x
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        rate = 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        x = 0.5 * x - rate * mean / (math.sqrt(square) + 1e-3)
        opt.step()
        assert [float(param.detach()[1]) for param in params] == pytest.approx([x] * 3, rel=1e-5)


def test_the_optimizers_of_dreamer_and_planet_are_tensorflows():
    for version, eps in {"dreamerv1": 1e-7, "planet": 1e-4}.items():
        agent = make_agent(version, "proprio")
        assert type(agent.opt) is TFAdams and agent.opt.settings["model"].eps == eps


def test_tf_adams_take_the_moments_of_adams():
    agent, other = (make_agent("dreamerv1", "proprio", {"optimizer": kind}) for kind in ("adam", "tf_adam"))
    update(agent, "proprio")
    other.load_state_dict(saved(agent))
    ours, theirs = agent.opt.state_dict()["moments"], other.opt.state_dict()["moments"]
    assert all(torch.equal(ours[name][moment], theirs[name][moment]) for name in ours for moment in ours[name])


def test_the_clock_of_planet_makes_a_hundred_updates_an_episode_of_a_thousand_frames():
    for repeat in (2, 4, 8):  # as the preset's comment says
        config = make_config("planet", {"batch_size": 50, "batch_length": 50, "train_burst": 100})
        clock = make_agent("planet", "proprio").clock(config.replace(train_ratio=250 * repeat))
        start, counts = 5000 // repeat, []
        for step in range(start, start + 3 * 1000 // repeat + 1):
            counts.append(clock.due(step))
            for _ in range(counts[-1]):
                clock.tick()
        assert [counts[i * 1000 // repeat] for i in (1, 2, 3)] == [100] * 3 and sum(counts[1:]) == 300


def test_bursts_come_when_they_are_due_and_pretraining_at_once():
    def take(clock, step):
        """Return how many updates are due at a step, and do them."""
        count = clock.due(step)
        for left in range(count, 0, -1):
            assert clock.due(step) == left
            clock.tick()
        return count

    clock, total = Ratio(0.2, burst=100, first=30), []
    for step in range(2500, 4010):
        total += [(step, count)] if (count := take(clock, step)) else []
    assert total == [(2500, 30), (3000, 100), (3500, 100), (4000, 100)]
    other = Ratio(0.2, burst=100, first=30)
    other.load_state_dict(clock.state_dict())
    assert [take(other, 4499), take(other, 4500), take(other, 5600)] == [0, 100, 200]


# ---------------------------------------------------------------------------
# Saving


def saved(agent):
    """Return `state_dict()`, saved to and loaded from a file."""
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
@every_version
def test_a_loaded_agent_learns_on_bit_for_bit(version, kind):
    agent, other = make_agent(version, kind), make_agent(version, kind, seed=1)
    update(agent, kind)
    other.load_state_dict(saved(agent))
    for seed in (1, 2):
        assert moved(update(agent, kind, seed), update(other, kind, seed)) == set()
    assert moved(agent.nets.state_dict(), other.nets.state_dict()) == set()


@pytest.mark.parametrize("ours, theirs", [("laprop", "adam"), ("adam", "laprop")])
def test_the_state_of_another_optimizer_is_refused_in_one_line(ours, theirs):
    agent, other = (make_agent("dreamerv3", "proprio", {"optimizer": name}) for name in (ours, theirs))
    shake(other)
    before = parameters(agent)
    with pytest.raises(UserError, match="optimizer"):
        agent.load_state_dict(other.state_dict())
    assert moved(before, parameters(agent)) == set()


def test_a_loaded_agent_keeps_its_own_learning_rate():
    agent = make_agent("dreamerv1", "proprio", {"model_opt.lr": 0.125})
    other = make_agent("dreamerv1", "proprio")
    update(other, "proprio")
    agent.load_state_dict(other.state_dict())
    assert [group["lr"] for group in agent.opt.adams["model"].param_groups] == [0.125]


# ---------------------------------------------------------------------------
# Plan2Explore

EXPLORE = {"expl_behavior": "plan2explore"}


@every_kind
@every_version
def test_the_explorer_learns_by_losses_of_its_own_and_leaves_the_task_alone(version, kind):
    results = []
    for changes in ({}, EXPLORE):
        agent = make_agent(version, kind, changes)
        if changes:  # shaken by other numbers than the agent without
            own = {name: value for name, value in agent.nets.state_dict().items() if name.startswith("expl")}
            agent.nets.load_state_dict(own | results[0][2])
        start = {name: value.clone() for name, value in agent.nets.state_dict().items()}
        torch.manual_seed(3)
        losses, _, _ = agent.loss(make_sequences(kind), initial(agent))
        task = {name: loss for name, loss in losses.items() if name not in ("disag", "expl_policy", "expl_value")}
        trained = [p for n, p in agent.nets.named_parameters() if p.requires_grad and not n.startswith("expl")]
        grads = torch.autograd.grad(agent.total(losses), trained, retain_graph=True, allow_unused=True)
        results.append((task, grads, start))
    (before, before_grads, _), (after, after_grads, _) = results
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(before_grads, after_grads, strict=True))

    assert reached(agent, {"disag": losses["disag"]}) == named(agent, "explorer.ensemble.")
    assert reached(agent, {"expl_policy": losses["expl_policy"]}) == named(agent, "expl_behavior.actor.")
    assert reached(agent, {"expl_value": losses["expl_value"]}) == named(agent, "expl_behavior.critic.")


@pytest.mark.parametrize("version", ["dreamerv3", "dreamerv1"])
def test_an_update_of_the_task_is_the_same_beside_an_explorer(version):
    # With a clip this tight, a gradient that shares its norm with another's would shrink.
    tight = {"model_opt.clip": 0.001, "model_opt.eps": 1.0}
    agent, explorer = make_agent(version, "proprio", tight), make_agent(version, "proprio", tight | EXPLORE)
    explorer.nets.load_state_dict(explorer.nets.state_dict() | agent.nets.state_dict())
    for one in (agent, explorer):
        update(one, "proprio")
    ours, theirs = parameters(agent), parameters(explorer)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert named(explorer, "explorer.") and not named(agent, "explorer.")


@every_version
def test_low_precision(version):
    torch.manual_seed(0)
    agent = make_dreamer(*FAMILY["pixels"], make_config(version, EXPLORE), dtype=torch.bfloat16)
    metrics = agent.update(make_sequences("pixels"), initial(agent))[1]
    assert all(value.isfinite() for value in metrics.values())
    _, carry = act(agent, observations("pixels", is_first=True), None, "explore")
    assert carry.state.deter.dtype == torch.bfloat16


TARGETS = "stoch", "deter", "feat", "embed"


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_the_ensemble(target, log):
    version = [name for name in VERSIONS if name != "dreamerv2_atari"][TARGETS.index(target) + log]
    agent = make_agent(version, "proprio", EXPLORE | {"disag_target": target, "disag_log": log})
    metrics = update(agent, "proprio")
    assert metrics["disag_loss"] > 0 and metrics["expl_adv_std"] > 0
    assert all(value.isfinite() for value in metrics.values())
    widths = {"stoch": agent.world.rssm.latent.size, "deter": 32, "embed": 16}
    assert agent.explorer.ensemble[0][-1].kernel.shape[1] == widths.get(target, widths["stoch"] + 32)


@every_version
def test_the_ensemble_learns_a_repeated_batch(version):
    agent = make_agent(version, "proprio", EXPLORE | {"expl_opt.lr": 0.02, "opt.lr": 0.02})
    for param in agent.world.parameters():
        param.requires_grad_(False)  # so that what is to be predicted stays
    losses = [float(update(agent, "proprio")["disag_loss"]) for _ in range(5)]
    least = len(agent.explorer.ensemble) * HALF_LOG_2PI * agent.world.rssm.latent.size * 0.8  # of 12 of 15 steps
    assert losses[-1] - least < 0.9 * (losses[0] - least)


def test_disagreement_is_the_variance_on_arriving_and_the_scales_weigh_the_rewards():
    scales = {"disag_log": False, "expl_intr_scale": 2.0, "expl_extr_scale": 3.0}
    agent = make_agent("dreamerv1", "proprio", EXPLORE | scales)
    feat, actions = torch.randn(4, 2, 32 + 4), torch.randn(3, 2, 6)
    rollout = Rollout(None, actions, feat)
    novelty = agent.explorer.disagreement(rollout)
    predicted = agent.explorer.predict(feat[:-1], actions)
    assert predicted.shape == (3, 3, 2, 4) and novelty.shape == (4, 2)
    torch.testing.assert_close(novelty[1:], predicted.var(0, unbiased=True).mean(-1))
    assert not novelty[0].any()  # no action led to the start
    assert agent.explorer.rewards() == {"disag": agent.explorer.disagreement}
    agent.explorer.spread = SPREADS["std"]  # of DreamerV2's code
    stddev = agent.explorer.disagreement(rollout)
    torch.testing.assert_close(stddev[1:], predicted.var(0, unbiased=False).sqrt().mean(-1))
    agent.explorer.log = True
    torch.testing.assert_close(agent.explorer.disagreement(rollout)[1:], stddev[1:].log())
    agent.explorer.spread, agent.explorer.log = SPREADS["variance"], False
    agent.world.rewards = lambda rollout: torch.full((4, 2), 2.0)
    assert {name: agent.expl_rewards.scale(name) for name in ("disag", "extr")} == {"disag": 2.0, "extr": 3.0}
    rewards = explorer_rewards(agent.world, agent.explorer, make_config("dreamerv1", EXPLORE | scales))
    torch.testing.assert_close(rewards(rollout), 2 * novelty + 6)


def test_the_2023_form_rewards_the_standard_deviation_of_its_models():
    agent = make_agent("dreamerv3_2023", "proprio", EXPLORE)
    feat, actions = torch.randn(4, 2, 32 + 16), torch.randn(3, 2, 6)
    predicted = agent.explorer.predict(feat[:-1], actions)
    expected = predicted.std(0, unbiased=False).mean(-1)
    torch.testing.assert_close(agent.explorer.disagreement(Rollout(None, actions, feat))[1:], expected)
    assert {name: agent.expl_rewards.scale(name) for name in ("disag", "extr")} == {"disag": 0.1, "extr": 1.0}
    assert [group["eps"] for group in agent.opt.adams["expl_model"].param_groups] == [5e-6]


def test_the_ensemble_predicts_across_no_border_of_episodes():
    agent = make_agent("dreamerv2", "proprio", EXPLORE)
    feat, action, target = torch.randn(1, 4, 32 + 16), torch.randn(1, 4, 6), torch.randn(1, 4, 16)
    error = agent.explorer.ensemble_loss(feat, action, target, torch.tensor([[True, False, True, False]]))
    predicted = agent.explorer.predict(feat[:, :3], action[:, 1:])  # action[t + 1] led from step t to step t + 1
    expected = (0.5 * (predicted - target[:, 1:]).square() + HALF_LOG_2PI).sum(-1).sum(0)  # over the models
    assert error.shape == (1, 3) and error[0, 1] == 0
    torch.testing.assert_close(error[0, [0, 2]], expected[0, [0, 2]])


def test_curiosity_rewards_what_is_new_and_never_punishes_it():
    agent = make_agent("dreamerv3", "proprio", EXPLORE)
    rollout = Rollout(None, torch.randn(3, 2, 6), torch.randn(4, 2, agent.world.feat_size))
    assert (agent.explorer.disagreement(rollout)[1:] > 0).all()  # a negative reward is one for ending the episode
    forms = {version: make_config(version).disag_form for version in ("dreamerv3", "dreamerv2")}
    assert forms == {"dreamerv3": "variance", "dreamerv2": "std"}


def test_the_ensemble_of_an_older_form_has_an_adam_of_its_own():
    for version, rate in {"dreamerv2": 3e-4, "dreamerv2_atari": 3e-4}.items():
        opt = make_agent(version, "proprio", EXPLORE).opt
        assert opt.settings["expl_model"].lr == opt.adams["expl_model"].param_groups[0]["lr"] == rate
        assert opt.settings["model"].lr == {"dreamerv2": 3e-4, "dreamerv2_atari": 2e-4}[version]


def test_the_explorer_acts_only_when_exploring():
    agent = make_agent("dreamerv1", "proprio", EXPLORE | {"expl_noise": 0.0})
    obs = observations("proprio", is_first=True)
    own = act(agent, obs, None, "noisy", seed=0)[0]["action"]
    assert not np.array_equal(act(agent, obs, None, "explore", seed=0)[0]["action"], own)
    agent.expl_behavior.actor.load_state_dict(agent.behavior.actor.state_dict())
    assert np.array_equal(act(agent, obs, None, "explore", seed=0)[0]["action"], own)


# ---------------------------------------------------------------------------
# What fits together


def test_a_batch_can_be_learned_twice():
    agent = make_agent("dreamerv3_2023", "proprio")
    batch, state = agent.batch({key: value.numpy() for key, value in make_sequences("proprio").items()})
    assert batch["is_first"][:, 0].all() and state.deter.shape == (3, 32)
    for _ in range(2):
        assert agent.update(batch, state)[1]["loss"].isfinite()


def test_a_window_of_dreamer_begins_with_the_action_that_led_there():
    arrays = {key: value.numpy() for key, value in make_sequences("proprio").items()}
    arrays["is_first"][:] = False
    for version in ("dreamerv1", "planet", "dreamerv2", "dreamerv3_2023"):
        agent, deters = make_agent(version, "proprio"), []
        for scale in (1.0, 0.5):
            changed = {
                **arrays,
                "action": np.concatenate([scale * arrays["action"][:, :1], arrays["action"][:, 1:]], 1),
            }
            batch, state = agent.batch({key: value.copy() for key, value in changed.items()})
            torch.manual_seed(0)
            deters.append(agent.loss(batch, state)[1].deter)
        assert batch["is_first"][:, 0].all() == (version != "dreamerv1")
        assert torch.equal(*deters) == (version != "dreamerv1")


def test_dreamer_learns_where_ends_are_predicted():
    agent = make_agent("dreamerv1", "proprio", EXPLORE | {"cont_head.use": True})
    losses, _, _ = agent.loss(make_sequences("proprio"), initial(agent))
    assert losses["policy"].shape == losses["expl_value"].shape == (3, 4)  # from four of five steps
    assert update(agent, "proprio")["loss"].isfinite()


@pytest.mark.parametrize("latent", ["onehot", "gaussian"])
def test_every_latent_knows_how_it_is_stored(latent):
    agent = make_agent("dreamerv3", "proprio", {"rssm.latent": latent})
    state = agent.update(make_sequences("proprio"), initial(agent))[0]
    stored = agent.world.rssm.pack(state)
    for key, (shape, dtype) in agent.stored.items():
        assert stored[key].shape == (3, 5, *shape)
        stored[key] = torch.from_numpy(stored[key].numpy().astype(dtype))
    again = agent.world.rssm.unpack(stored, torch.float32)
    torch.testing.assert_close(again, state, rtol=1e-3, atol=1e-3)


def test_blocks_bind_only_what_is_made_of_blocks():
    assert make_agent("dreamerv1", "pixels", {"rssm.deter": 30}).world.rssm.deter == 30


def test_images_that_the_decoder_cannot_draw_are_named():
    spaces = {"image": Box(0, 255, (96, 96, 3), np.uint8)}, FAMILY["pixels"][1]
    with pytest.raises(UserError, match=r"96x96.*64x64"):
        make_dreamer(*spaces, make_config("dreamerv2"))


# ---------------------------------------------------------------------------
# Whole runs

RUNS = {
    "dreamerv3_2023": "--task dummy_pixels",
    "dreamerv2": "--task dummy_vector --expl_behavior plan2explore --expl_until 45",
    "dreamerv1": "--task dummy_vector",
    "planet": "--task dummy_multi",
}
BRIEF = "--prefill 40 --eval_every 0 --eval_episode_num 1 --video_pred_log false --log_every 10 --train_ratio 16"


@pytest.mark.parametrize("version", RUNS)
def test_a_run_learns_and_goes_on_where_it_was(version, tmp_path, capsys):
    def run(steps):
        words = f"{RUNS[version]} {BRIEF} --logger tensorboard --steps {steps} --logdir {tmp_path}"
        assert dreamer.main(["--configs", *VERSIONS[version], "debug", *words.split()]) == 0, capsys.readouterr().err
        return torch.load(tmp_path / "latest.pt", weights_only=True)

    first, second = run(50), run(60)
    assert 3 <= first["counters"]["updates"] <= 5  # half an update for each step behind the prefill
    assert second["counters"]["updates"] - first["counters"]["updates"] == 5
    assert moved(first["agent"]["model"], second["agent"]["model"]) >= {"world.reward.out.kernel"}
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    metrics = {name for entry in entries for name in entry}
    expected = {"reward_loss", "kl", "model_loss", "model_grad_norm"}
    expected |= set() if version == "planet" else {"policy_loss", "value_loss", "imag_return", "actor_grad_norm"}
    expected |= {"disag_loss", "expl_policy_loss", "expl_imag_reward"} if "plan2explore" in RUNS[version] else set()
    assert metrics >= expected
