"""PPO in imagination, with numbers that can be checked by hand."""

import copy
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from behaviors.ppo import PPO, AdaptedEntropy, standardized
from models import ImagBehavior, Rollout
from networks import CONTINUOUS
from ops.distributions import MultiOneHot
from ops.optim import OwnAdam
from specs import ActionSpec
from tests.factories import (
    VERSIONS,
    family_agent,
    initial,
    make_config,
    make_sequences,
    parameters,
    shake,
)
from tools import UserError

BOX, DISCRETE = ActionSpec({"action": 2}, {}), ActionSpec({"action": 5}, {"action": [2, 3]})
every_spec = pytest.mark.parametrize("spec", [BOX, DISCRETE], ids=["continuous", "discrete"])
H, N, F = 6, 4, 8


def make_behavior(kind=PPO, spec=BOX, *flags, seed=0):
    torch.manual_seed(seed)
    return shake(kind(F, spec, make_config("--imag_horizon", str(H), *flags)))


def make_rollout(behavior, seed=1):
    """Return a Rollout in random states, with the behavior's own actions, and a world for `losses`, with rewards."""
    torch.manual_seed(seed)
    feat, cont, reward = torch.randn(H + 1, N, F), 0.5 + 0.5 * torch.rand(H + 1, N), torch.randn(H + 1, N)
    actions = behavior.actor(feat[:-1]).sample(behavior.actor.noise((H, N), "cpu")).detach()
    return Rollout(None, actions, feat), SimpleNamespace(discounts=lambda feat: cont), lambda rollout: reward


def given(**values):
    """Return a head whose distribution has the given `mode`, `log_prob` or `entropy`."""
    return lambda feat: SimpleNamespace(**{name: lambda *args, x=value: x for name, value in values.items()})


# ---------------------------------------------------------------------------
# Estimates and losses


def test_advantages_are_discounted_sums_of_surprises():
    behavior = make_behavior(PPO, BOX, "--lam", "0.5", "--ppo.advantage", "none")
    value, slow = torch.tensor([0.5, 1.0, -1.0, 0.25])[:, None], torch.zeros(4, 1)
    reward, cont = torch.tensor([9.0, 1.0, 0.0, 2.0])[:, None], torch.tensor([0.7, 0.9, 0.8, 0.5])[:, None]
    heads = {"critic": given(mode=value), "slow": given(mode=slow)}
    heads["actor"] = given(log_prob=torch.zeros(3, 1), entropy=torch.zeros(3, 1))
    fake = SimpleNamespace(
        **heads, adapted=None, lam=0.5, return_norm=behavior.return_norm, normalize=behavior.normalize
    )
    outs = PPO.estimate(fake, torch.zeros(4, 1, F), torch.zeros(3, 1, 2), reward, cont, cont.cumprod(0))
    # delta: 1 + 0.9 * 1 - 0.5 = 1.4, 0 + 0.8 * -1 - 1 = -1.8, 2 + 0.5 * 0.25 + 1 = 3.125
    expected = [1.4 + 0.45 * (-1.8 + 0.4 * 3.125), -1.8 + 0.4 * 3.125, 3.125]  # 0.45 = lam * 0.9
    assert outs["adv"][:, 0].tolist() == pytest.approx(expected) == [1.1525, -0.55, 3.125]
    assert outs["ret"][:, 0].tolist() == pytest.approx([1.6525, 0.45, 2.125])
    assert outs["weight"][:, 0].tolist() == pytest.approx([0.7, 0.63, 0.504, 0.252])


def test_standardized_advantages_by_hand():
    adv = torch.tensor([[1.0, 3.0], [100.0, 5.0]])
    out = standardized(adv, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), None)  # the state behind the end counts for nothing
    assert out[torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert not standardized(torch.full((2, 2), 3.0), torch.ones(2, 2), None).any()


def test_the_clipped_ratio_by_hand():
    behavior = make_behavior(PPO, BOX)
    ratio, adv = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    fake = SimpleNamespace(
        clip=behavior.clip,
        bonus=lambda policy: 0.5 * policy.entropy(),
        actor=given(log_prob=ratio.log() - 3, entropy=torch.ones(5)),
    )
    old, weight = torch.full((5,), -3.0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5])
    loss, kl, clipped = PPO.policy_loss(fake, None, None, old, adv, weight)
    gains = [1.2, -1.5, 0.5, -0.8, 2.2]
    assert float(loss) == pytest.approx(-sum(w * (g + 0.5) for w, g in zip(weight.tolist(), gains, strict=True)) / 5)
    divergences = [r - 1 - math.log(r) for r in ratio.tolist()]
    assert float(kl) == pytest.approx((sum(divergences[:4]) + 0.5 * divergences[4]) / 4.5, rel=1e-5)
    assert float(clipped) == pytest.approx(0.8)


@every_spec
def test_the_first_gradient_is_that_of_reinforce(spec):
    flags = ["--actor.entropy", "0", "--ppo.advantage", "range", "--ppo.minibatches", "1", "--ppo.epochs", "1"]
    behavior, reinforce = make_behavior(PPO, spec, *flags), make_behavior(ImagBehavior, spec, *flags)
    reinforce.load_state_dict({name: behavior.state_dict()[name] for name in reinforce.state_dict()})
    rollout, world, rewards = make_rollout(behavior)
    losses, theirs = reinforce.losses(world, rollout, {}, rewards)
    expected = torch.autograd.grad(losses["policy"].mean(), reinforce.actor.parameters())
    _, outs = behavior.losses(world, rollout, {}, rewards)
    torch.testing.assert_close(outs["adv"], theirs["adv"])
    found, step = [], behavior.actor_opt.step
    behavior.actor_opt.step = lambda loss, going: (
        found.append(torch.autograd.grad(loss, behavior.actor_opt.params, retain_graph=True)) or step(loss, going)
    )
    behavior.improve(rollout, outs)
    for ours, grad in zip(found[0], expected, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-7)
    assert any(grad.abs().max() > 1e-4 for grad in expected)


def test_a_clipped_value_has_nothing_to_gain():
    now = torch.tensor([0.5, -0.5, 0.1, 0.5], requires_grad=True)  # from 0, towards 1; away from it; little; past it
    ret = torch.tensor([1.0, 1.0, 1.0, 0.2])
    head = SimpleNamespace(mode=lambda: now, log_prob=lambda value: -(now - value).square())
    fake = SimpleNamespace(critic=lambda feat: head, value_clip=0.2, slow_reg=0.0)
    fake.critic_loss = functools.partial(PPO.critic_loss, fake)
    loss = PPO.value_loss(fake, None, ret, torch.zeros(4), torch.zeros(4), torch.ones(4))
    loss.backward()
    assert now.grad.tolist() == pytest.approx([0, -3 / 4, -1.8 / 4, 0.6 / 4])
    assert loss.item() == pytest.approx((2.25 + 0.81 + 0.09) / 4)


# ---------------------------------------------------------------------------
# Learning


def test_the_own_adam_is_that_of_pytorch_and_a_masked_step_is_none():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    opt, reference = OwnAdam(ours.parameters(), 0.1, clip=0.3), torch.optim.Adam(theirs.parameters(), 0.1, eps=1e-5)
    x = torch.randn(4, 5, 3)
    for step in x:
        before = copy.deepcopy((opt.state_dict(), ours.state_dict()))
        opt.step(ours(10 * step).square().mean(), torch.tensor(False))
        after = opt.state_dict(), ours.state_dict()
        assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)
        norm = opt.step(ours(step).square().mean(), torch.tensor(True))
        reference.zero_grad()
        theirs(step).square().mean().backward()
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3))
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@every_spec
def test_an_actor_that_has_gone_too_far_stays_there_and_the_critic_learns_on(spec):
    flags = ["--ppo.kl_stop", "1e-9", "--ppo.actor_lr", "0.01", "--ppo.epochs", "2", "--ppo.minibatches", "3"]
    behavior = make_behavior(PPO, spec, *flags)
    rollout, world, rewards = make_rollout(behavior)
    behavior.improve(rollout, behavior.losses(world, rollout, {}, rewards)[1])  # so that Adam has moments
    outs, actors, critics = behavior.losses(world, rollout, {}, rewards)[1], [], []
    learn_part = behavior.learn_part

    def watched(part, going):
        result = learn_part(part, going)
        for seen, module in ((actors, behavior.actor), (critics, behavior.critic)):
            seen.append(torch.cat([param.detach().flatten() for param in module.parameters()]))
        return result

    behavior.learn_part = watched
    metrics = behavior.improve(rollout, outs)
    assert all(torch.equal(actor, actors[0]) for actor in actors) and len(actors) == 6
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(critics))
    assert float(metrics["actor_steps"]) == pytest.approx(1 / 6) and metrics["actor_kl"] > 1e-9
    assert behavior.actor_opt.count == 1 + 1 and behavior.critic_opt.count == 12
    behavior.kl_stop = math.inf
    assert behavior.learn(rollout.feat, rollout.actions, outs)["actor_steps"] == 1


@every_spec
def test_good_actions_become_more_likely_within_the_clip(spec):
    behavior = make_behavior(PPO, spec, "--ppo.actor_lr", "0.003", "--ppo.kl_stop", "0", "--ppo.epochs", "8")
    rollout, world, rewards = make_rollout(behavior)
    _, before = behavior.losses(world, rollout, {}, rewards)
    metrics = behavior.improve(rollout, before)
    _, after = behavior.losses(world, rollout, {}, rewards)
    change = after["logpi"] - before["logpi"]
    assert (before["weight"][:-1] * before["adv"] * change).sum() > 0 and 0 < metrics["actor_kl"] < 0.2


# ---------------------------------------------------------------------------
# Adapted entropy

HELD = "--ppo.entropy_target", "0.5"


def test_each_entropy_has_a_weight_that_holds_it_near_its_share_of_the_greatest():
    adapted = AdaptedEntropy(make_behavior(PPO, DISCRETE).actor, make_config(*HELD))
    policy = MultiOneHot(torch.tensor([0.0, 0.0, 0.0, 0.0, -99.0]), [2, 3])  # uniform over two of two, two of three
    assert adapted.shares(policy).tolist() == pytest.approx([1, math.log(2) / math.log(3)])
    adapted.weight.copy_(torch.tensor([0.2, 0.4]))
    assert float(adapted(policy)) == pytest.approx(0.2 + 0.4 * math.log(2) / math.log(3))
    metrics = adapted.adapt(torch.tensor([0.44, 0.56]))
    assert adapted.weight.tolist() == pytest.approx([0.2 * 1.1, 0.4 / 1.1])
    assert [float(value) for value in metrics.values()] == pytest.approx([0.5, (0.22 + 0.4 / 1.1) / 2])
    adapted.adapt(torch.tensor([0.46, 0.54]))  # within a tenth
    assert adapted.weight.tolist() == pytest.approx([0.2 * 1.1, 0.4 / 1.1])
    adapted.weight.copy_(torch.tensor([100.0, 1e-5]))
    adapted.adapt(torch.tensor([0.0, 1.0]))
    assert adapted.weight.tolist() == pytest.approx([100, 1e-5])


# Beside each the raw deviation that is the most random, and its share: a wider tanh_normal piles up at the bounds.
WIDEST = [("bounded_normal", 60.0, 1.0), ("truncated_normal", 60.0, 1.0), ("tanh_normal", -0.3, 0.99)]


@pytest.mark.parametrize("dist, widest, share", WIDEST)
def test_shares_of_the_greatest_entropy_grow_with_the_deviation_from_0_to_1(dist, widest, share):
    adapted = AdaptedEntropy(make_behavior(PPO, BOX, "--actor.dist", dist).actor, make_config(*HELD))
    stddev = torch.tensor([-60.0, -3.0, -1.0, widest])[:, None].expand(4, 2)
    policy = CONTINUOUS[dist](torch.zeros(4, 2), stddev, 0.1, 1.0)
    torch.testing.assert_close(policy.entropies().sum(-1), policy.entropy())
    least, small, large, most = adapted.shares(policy)[:, 0].tolist()
    assert least == pytest.approx(0, abs=1e-3) and 0 < small < large < most
    assert most == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_entropy_stays_near_its_share_while_what_is_good_is_learned(target):
    behavior = make_behavior(PPO, DISCRETE, "--ppo.entropy_target", str(target), "--ppo.actor_lr", "0.01")
    for _ in range(150):
        rollout, world, _ = make_rollout(behavior)
        reward = torch.cat([torch.zeros(1, N), rollout.actions[..., 0] + rollout.actions[..., 2]])
        metrics = behavior.improve(rollout, behavior.losses(world, rollout, {}, lambda _, x=reward: x)[1])
    assert float(metrics["entropy_share"]) == pytest.approx(target, abs=0.1)


def test_what_moves_the_weight_of_the_entropy_is_one_thing():
    with pytest.raises(UserError, match="learn entropy"):
        make_behavior(PPO, BOX, *HELD, "--meta.learn", "entropy")
    with pytest.raises(UserError, match="min_std"):
        make_behavior(PPO, BOX, *HELD, "--actor.min_std", "0")
    assert make_behavior(PPO, DISCRETE, *HELD, "--actor.min_std", "0").adapted
    assert make_behavior(PPO, BOX).adapted is None


@pytest.mark.parametrize("flags", [(), HELD], ids=["fixed entropy", "adapted entropy"])
def test_compiled_parts_equal_the_eager_ones(monkeypatch, flags):
    behaviors = [make_behavior(PPO, DISCRETE, "--ppo.minibatches", "1", *flags) for _ in range(2)]
    compiled, results = [], []

    def traced(function, **options):  # without the compiler behind it, which takes minutes
        compiled.append(function.__name__)
        return torch._dynamo.optimize("eager", dynamic=False, nopython=True)(function)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", traced)
        behaviors[1].compile_parts()
    assert compiled == ["policy", "estimate", "policy_loss", "value_loss"]
    for behavior in behaviors:
        rollout, world, rewards = make_rollout(behavior)
        metrics = behavior.improve(rollout, behavior.losses(world, rollout, {}, rewards)[1])
        results.append(metrics | behavior.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_learns_by_it_and_the_agents_optimizer_leaves_it_alone(version):
    kind = {"dreamerv2": "pixels"}.get(version, "proprio")
    agent = family_agent(version, kind, {"behavior": "ppo", "expl_behavior": "plan2explore"})
    assert not any(name.startswith(("behavior", "expl_behavior")) for name in agent.opt.state_dict()["names"])
    before, batch = parameters(agent), make_sequences(kind)
    losses, _, _ = agent.loss(batch, initial(agent))
    assert losses.keys() & {"policy", "value", "repval", "expl_policy"} == set()
    _, metrics = agent.update(batch, initial(agent))
    assert all(value.isfinite() for value in metrics.values())
    assert metrics.keys() >= {"policy_loss", "value_loss", "actor_kl", "expl_policy_loss", "imag_return", "expl_adv"}
    after = parameters(agent)
    for part in ("behavior.actor", "behavior.critic", "behavior.slow", "expl_behavior.actor", "world.rssm"):
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part
