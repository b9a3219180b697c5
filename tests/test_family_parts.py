"""Parts of the older versions of Dreamer, with numbers that can be checked by hand."""

import collections
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import ops.distributions as dists
from behaviors import make_behavior as behavior_of
from behaviors.cem import CEM, search
from explorers import perturb
from modalities.image.nets import ImageEncoder, TransposedDecoder, quantize
from models import CLIPS, frozen, kl_losses
from networks import Head
from ops import normals
from ops.layers import MLP, Conv2d, ConvTranspose2d, Linear, Style
from replay.sampling import Replay
from rssm import GRU, RSSM, DenseGRU, GaussianLatent, NormGRU, OneHotLatent, ResetFirstGRU, State, make_rssm
from specs import ActionSpec
from tests.factories import family_config as make_config
from tests.factories import one_line_error, shake
from tests.test_replay import LAYOUT, make_episode, steps_of
from tools import UserError

# ---------------------------------------------------------------------------
# Latents and their KL

PAIR = OneHotLatent(groups=1, classes=2, unimix=0.0)
KLS = [0.8 * math.log(1.6) + 0.2 * math.log(0.4), 0.99 * math.log(1.98) + 0.01 * math.log(0.02)]  # 0.193, 0.637


def make_pairs():
    """Return the logits of posteriors (0.8, 0.2) and (0.99, 0.01) and of two uniform priors: (1, 2, 2) each."""
    post = torch.tensor([[[0.8, 0.2], [0.99, 0.01]]]).log().requires_grad_()
    return post, torch.zeros(1, 2, 2, requires_grad=True)


@pytest.mark.parametrize(
    "rule, free, losses, pulled",
    [
        ("step", 0.4, [0.4, KLS[1]], [False, True]),
        ("mean", 0.4, [sum(KLS) / 2] * 2, [True, True]),  # 0.415 is above 0.4: also what is below it is pulled
        ("mean", 0.5, [0.5] * 2, [False, False]),
    ],
)
def test_free_nats_of_a_step_and_of_the_mean(rule, free, losses, pulled):
    post, prior = make_pairs()
    dyn, rep, kl = kl_losses(PAIR, PAIR.dist(post), PAIR.dist(prior), free, CLIPS[rule])
    assert kl[0].tolist() == pytest.approx(KLS, rel=1e-5)
    for loss, side in ((dyn, prior), (rep, post)):
        assert loss[0].tolist() == pytest.approx(losses, rel=1e-5)
        (grad,) = torch.autograd.grad(loss.mean(), side)
        assert grad[0].any(-1).tolist() == pulled


@pytest.mark.parametrize("rule", CLIPS)
@pytest.mark.parametrize("version, shares", [("dreamerv1", (1, 1)), ("dreamerv2", (0.8, 0.2))])
def test_the_two_sides_of_the_kl_are_weighed_as_each_version_does(version, shares, rule):
    post, prior = make_pairs()
    dyn, rep, _ = kl_losses(PAIR, PAIR.dist(post), PAIR.dist(prior), 0.0, CLIPS[rule])
    scales = make_config(version).loss_scales
    ours = torch.autograd.grad((scales.dyn * dyn + scales.rep * rep).mean(), (prior, post))
    whole = torch.autograd.grad(PAIR.kl(PAIR.dist(post), PAIR.dist(prior)).mean(), (prior, post))
    for grad, full, share in zip(ours, whole, shares, strict=True):
        torch.testing.assert_close(grad, share * full)


def test_gaussian_latents_are_independent_normals():
    latent, params = GaussianLatent(3), torch.randn(2, 5, 7, 6)
    post, prior = (latent.dist(x) for x in params)
    theirs = [torch.distributions.Normal(x[..., :3], nn.functional.softplus(x[..., 3:]) + 0.1) for x in params]
    torch.testing.assert_close(latent.kl(post, prior), torch.distributions.kl_divergence(*theirs).sum(-1))
    torch.testing.assert_close(post.entropy(), theirs[0].entropy())
    noise = latent.noise((5, 7), "cpu")
    assert post.sample(noise).shape == noise.shape == (5, 7, 3, 1)
    torch.testing.assert_close(post.sample(noise)[..., 0], theirs[0].mean + theirs[0].stddev * noise[..., 0])
    torch.testing.assert_close(post.log_prob(post.sample(noise)), theirs[0].log_prob(post.sample(noise)[..., 0]))


# ---------------------------------------------------------------------------
# Distributions of actions and numbers

RAW = torch.tensor([[0.3, -1.0], [-2.0, 0.5], [6.0, -6.0]])  # mean and standard deviation before what bounds them


def truncated(raw):
    return normals.TruncatedNormal(raw[..., :1], raw[..., 1:], 0.1, 2.0)


def squashed(raw):
    return normals.TanhNormal(raw[..., :1], raw[..., 1:], 1e-4, 1.0)


@pytest.mark.parametrize("make, room", [(truncated, 1.0), (squashed, 0.999999)])
def test_densities_of_actions_sum_to_one_and_entropies_are_theirs(make, room):
    # In z = atanh(action) the density of a squashed normal is smooth to the edges.
    z = torch.linspace(-7, 7, 20001).double()
    value, slope = (z.tanh(), 1 - z.tanh() ** 2) if make is squashed else (z / 7, torch.full_like(z, 1 / 7))
    logp = make(RAW[:2]).log_prob((room * value).float()[:, None, None]).double()
    assert torch.trapezoid(logp.exp() * slope[:, None], z, dim=0).tolist() == pytest.approx([1, 1], abs=2e-3)
    entropy = torch.trapezoid(-logp.exp() * logp * slope[:, None], z, dim=0)
    assert make(RAW[:2]).entropy().tolist() == pytest.approx(entropy.tolist(), abs=1e-2)


def test_the_parameters_of_the_action_distributions():
    start = normals.TanhNormal(torch.tensor([100.0]), torch.zeros(1), 1e-4, 5.0)
    assert (start.mean.item(), start.stddev.item()) == pytest.approx((5, 5.0001))
    cut = normals.TruncatedNormal(torch.tensor([0.5, 9.0]), torch.tensor([0.0, -99.0]), 0.1, 2.0)
    assert cut.mean.tolist() == pytest.approx([math.tanh(0.5), 1]) and cut.stddev.tolist() == pytest.approx([1.1, 0.1])
    assert torch.equal(cut.mode(), cut.mean)


def test_tanh_normal_is_a_transformed_normal():
    ours, value = squashed(RAW), torch.tensor([[-0.9], [0.2], [0.99]])
    base = torch.distributions.Normal(ours.mean, ours.stddev)
    theirs = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform())
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value)[..., 0], rtol=1e-4, atol=1e-4)
    assert squashed(RAW).log_prob(torch.tensor([[1.0], [-1.0], [1.0]])).isfinite().all()


def test_truncated_normal_inverts_its_distribution_function_within_the_bounds():
    dist = truncated(RAW)
    whole = torch.distributions.Normal(dist.mean, dist.stddev)
    low, high = whole.cdf(torch.tensor(-1.0)), whole.cdf(torch.tensor(1.0))
    noise = torch.tensor([0.01, 0.5, 0.9])[:, None, None]
    sample = dist.sample(noise)
    torch.testing.assert_close((whole.cdf(sample) - low) / (high - low), noise.expand(3, 3, 1), rtol=1e-3, atol=1e-3)
    ends = dist.sample(torch.tensor([0.0, 1.0])[:, None, None])
    assert ends.abs().max() < 1 and dist.log_prob(ends).isfinite().all()


def test_samples_have_the_gradient_of_their_parameters():
    make = squashed
    raw, noise = RAW.double().requires_grad_(), torch.tensor([[0.2], [0.6], [0.7]])
    make(raw).sample(noise).sum().backward()
    for column in (0, 1):
        step = torch.zeros_like(RAW)
        step[:, column] = 0.01
        slope = (make(RAW + step).sample(noise) - make(RAW - step).sample(noise))[:, 0] / 0.02
        torch.testing.assert_close(raw.grad[:, column].float(), slope, rtol=2e-2, atol=2e-3)


def test_samples_of_the_truncated_normal_move_as_if_the_cut_did_not():
    dist, noise = truncated(RAW), torch.tensor([[0.2], [0.6], [0.999]])
    dist.mean, dist.stddev = dist.mean.requires_grad_(), dist.stddev.requires_grad_()
    sample = dist.sample(noise)
    by_mean, by_stddev = torch.autograd.grad(sample.sum(), (dist.mean, dist.stddev))
    torch.testing.assert_close(by_mean, torch.ones(3, 1))
    torch.testing.assert_close(by_stddev, ((sample - dist.mean) / dist.stddev).detach(), rtol=1e-4, atol=1e-4)


def test_symlog_twohot_shares_by_distance_in_symlog_space():
    bins = torch.linspace(-20, 20, 41)  # one nat apart
    logits = torch.zeros(41)
    logits[21] = 100.0  # sure of the bin at 1
    assert float(dists.SymlogTwoHot(logits, bins).mode()) == pytest.approx(math.e - 1)
    logits[22] = 99.0
    dist, below, above = dists.SymlogTwoHot(logits, bins), *logits.log_softmax(-1)[21:23].tolist()
    value = torch.tensor(math.expm1(1.25))
    assert float(dist.log_prob(value)) == pytest.approx(0.75 * below + 0.25 * above, rel=1e-4)
    assert float(dists.SymlogTwoHot(torch.zeros(41), bins).mode()) == 0


def test_unit_normals_by_hand():
    one, constant = torch.ones(2), 0.5 * math.log(2 * math.pi)
    assert float(dists.UnitNormal(3 * one[:1]).log_prob(one[0])) == pytest.approx(-2 - constant)
    assert float(dists.VectorNormal(torch.tensor([3.0, 0.0])).log_prob(one)) == pytest.approx(-2.5 - 2 * constant)
    image = dists.ImageNormal(torch.full((2, 2, 3), 0.5)).log_prob(torch.full((2, 2, 3), 255))
    assert float(image) == pytest.approx(-12 * (0.125 + constant))


# ---------------------------------------------------------------------------
# Behavior in a linear world: deter' = deter A + action B, and a reward linear in deter

BOX, DISCRETE = ActionSpec({"action": 2}, {}), ActionSpec({"action": 3}, {"action": [3]})
H, D = 15, 3


class LinearWorld(nn.Module):
    def __init__(self, actions):
        super().__init__()
        self.cont = None
        self.a, self.b = nn.Parameter(0.3 * torch.eye(D)), nn.Parameter(0.1 * torch.randn(actions, D))
        self.c = nn.Parameter(torch.randn(D))
        self.rssm, self.cont = self, None  # no head says where episodes end

    def imagine(self, start, policy, horizon):
        states, actions = [start], []
        for _ in range(horizon):
            actions.append(policy(states[-1]))
            states.append(State(states[-1].deter @ self.a + actions[-1] @ self.b, start.stoch))
        return State(*map(torch.stack, zip(*states, strict=True))), torch.stack(actions)

    def discounts(self, feat):
        return torch.full(feat.shape[:-1], 0.9)

    def reward(self, rollout):
        return rollout.feat[..., :D] @ self.c


def make_behavior(version, spec=BOX, **changes):
    torch.manual_seed(0)
    config = make_config(version, {"imag_horizon": H} | changes)
    return shake(behavior_of(config.behavior, D + 2, spec, config)), LinearWorld(spec.size)


def imagined(behavior, world):
    """Return the behavior's losses on two sequences of two states, always with the same draws."""
    torch.manual_seed(1)
    states, zeros = State(torch.randn(2, 2, D), torch.randn(2, 2, 2, 1)), torch.zeros(2, 2)
    with frozen(world):
        rollout = behavior.rollout(world, states)
        return behavior.losses(world, rollout, {"reward": zeros, "is_terminal": zeros}, world.reward)


@pytest.mark.parametrize("spec", [BOX, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("version", ["dreamerv3", "dreamerv3_2023", "dreamerv2", "dreamerv2_atari", "dreamerv1"])
def test_fifteen_imagined_transitions_give_fifteen_targets(version, spec):
    behavior, world = make_behavior(version, spec)
    losses, outs = imagined(behavior, world)
    acted = 14 if version.startswith(("dreamerv2", "dreamerv1")) else 15  # returns there hold the reward of arriving
    returns, weights = (14, 14) if version == "dreamerv1" else (15, 16)  # its last state has a value, and no return
    assert outs["adv"].shape == outs["logpi"].shape == losses["policy"].shape == (acted, 4)
    assert outs["weight"].shape == (weights, 4) and outs["ret"].shape == losses["value"].shape == (returns, 4)
    sum(loss.sum() for loss in losses.values()).backward()
    assert all(param.grad is None and param.requires_grad for param in world.parameters())  # only through the world
    assert all(param.grad.any() for part in (behavior.actor, behavior.critic) for param in part.parameters())
    assert all(param.grad is None for param in behavior.slow.parameters())


@pytest.mark.parametrize("version", ["dreamerv1", "dreamerv2", "dreamerv3_2023"])
def test_the_gradient_through_the_dynamics_is_the_slope_of_the_loss(version):
    exact = {"actor.dist": "tanh_normal"} if version == "dreamerv2" else {}  # its own has another gradient on purpose
    behavior, world = make_behavior(version, **exact)
    first, *rest = behavior.actor.parameters()
    first.data.zero_()  # a policy that does not see the state, whose gradient would stop there
    direction = [0.3 * torch.randn_like(param) for param in rest]
    losses, outs = imagined(behavior, world)
    assert behavior.share == 1 and outs["ret_scale"] == 1
    grads = torch.autograd.grad(losses["policy"].mean(), rest)
    slope = sum((grad * step).sum() for grad, step in zip(grads, direction, strict=True))
    values = []
    for sign in (1, -2):
        for param, step in zip(rest, direction, strict=True):
            param.data.add_(sign * 0.02 * step)
        values.append(imagined(behavior, world)[0]["policy"].mean().detach())
    assert abs(slope) > 1e-3
    torch.testing.assert_close(slope, (values[0] - values[1]) / 0.04, rtol=2e-2, atol=1e-4)


def test_a_discrete_action_passes_the_gradient_of_its_probabilities():
    behavior, world = make_behavior("dreamerv1", DISCRETE, imag_horizon=2)
    out = behavior.actor.heads[0].outs["logits"]
    for param in (out.kernel, out.bias, *behavior.critic.out.parameters()):
        param.data.zero_()  # probabilities of a third, values of zero
    world.c.data[:], world.b.data[:] = 1.0, torch.tensor([[1.0], [2.0], [6.0]]) / D  # the actions are worth 1, 2, 6
    imagined(behavior, world)[0]["policy"].mean().backward()
    assert out.bias.grad.tolist() == pytest.approx([2 / 3, 1 / 3, -1], rel=1e-4)  # (3 - worth) / 3


def test_a_mixed_gradient_is_the_weighted_sum_of_both():
    grads = {}
    for grad in ("reinforce", "dynamics", "mixed"):
        behavior, world = make_behavior("dreamerv3_2023", BOX, actor={"grad": grad, "grad_mix": 0.25})
        loss = imagined(behavior, world)[0]["policy"].mean()
        (grads[grad],) = torch.autograd.grad(loss, behavior.actor.mlp[0].kernel)
    torch.testing.assert_close(grads["mixed"], 0.75 * grads["reinforce"] + 0.25 * grads["dynamics"])


@pytest.mark.parametrize(
    "version, going_on, terminal",
    [
        ("dynamics", [0.8, 0.4, 0.16, 0.032], [0.8, 0.4, 0.16, 0.032]),  # the prediction of the start says it all
        ("dreamerv3_2023", [1, 0.5, 0.2, 0.04], [0, 0, 0, 0]),
    ],
)
def test_weights_by_hand(version, going_on, terminal):
    cont = torch.tensor([0.8, 0.5, 0.4, 0.2])[:, None].expand(4, 2)
    behavior = behavior_of(version, D + 2, BOX, make_config("dreamerv3", {"horizon": 10}))  # a discount of 0.9
    weight = behavior.weigh(cont, torch.tensor([1.0, 0.0]))
    assert weight[:, 0].tolist() == pytest.approx(going_on)
    assert weight[:, 1].tolist() == pytest.approx(terminal)  # the first action, too, comes behind the end


# -- DreamerV2


def valued(rewards, value, conts=None, terminal=(0.0, 1.0), **changes):
    """Return DreamerV2's losses and what came up, where a slow critic says `value` everywhere and the world gives the
    rewards and, if it predicts them, the discounts (H + 1,); the second of two starts is terminal in truth."""
    behavior, world = make_behavior("dreamerv2", imag_horizon=3, horizon=10, **changes)  # a discount of 0.9
    behavior.slow.out.kernel.data.zero_(), behavior.slow.out.bias.data.fill_(value)
    if conts:
        world.cont, world.discounts = True, lambda feat: torch.tensor(conts)[:, None].expand(4, 2)
    states, batch = State(torch.randn(1, 2, D), torch.randn(1, 2, 2, 1)), {"is_terminal": torch.tensor([terminal])}
    rollout = behavior.rollout(world, states)
    return *behavior.losses(world, rollout, batch, lambda rollout: torch.tensor(rewards)[:, None].expand(4, 2)), rollout


def test_a_value_of_dreamerv2_includes_the_reward_of_arriving():
    _, outs, _ = valued([1.0, 10.0, 100.0, 1000.0], 2.0)
    last = 100 + 0.9 * 2  # the reward of the last state is in its value
    middle = 10 + 0.9 * (0.05 * 2 + 0.95 * last)
    expected = [1 + 0.9 * (0.05 * 2 + 0.95 * middle), middle, last]
    assert outs["ret"][:, 0].tolist() == outs["ret"][:, 1].tolist() == pytest.approx(expected)
    assert outs["adv"][:, 0].tolist() == pytest.approx([middle - 2, last - 2])  # of the two actions that count


def test_weights_of_dreamerv2_by_hand():
    weight = valued([0.0] * 4, 2.0, [0.8, 0.5, 0.4, 0.2])[1]["weight"]
    assert weight[:, 0].tolist() == pytest.approx([1, 0.9, 0.45, 0.18])  # the start's discount is the true one
    assert weight[:, 1].tolist() == [1, 0, 0, 0]  # the value of a terminal state is learned: its reward
    ret = valued([5.0, 7.0, 7.0, 7.0], 2.0, [0.8, 0.5, 0.4, 0.2])[1]["ret"]
    assert ret[0, 1] == 5 and ret[0, 0] > 5
    weight = valued([0.0] * 4, 2.0)[1]["weight"]  # no head: nothing ends
    assert weight[:, 1].tolist() == pytest.approx([1, 0.9, 0.81, 0.729])


def test_the_losses_of_dreamerv2_end_two_and_one_before_the_horizon():
    losses, outs, rollout = valued([1.0, 10.0, 100.0, 1000.0], 2.0, **{"actor.grad": "reinforce"})
    behavior, _ = make_behavior("dreamerv2", imag_horizon=3, horizon=10)
    policy, critic = behavior.actor(rollout.feat[:2]), behavior.critic(rollout.feat[:3]).mode()
    objective = policy.log_prob(rollout.actions[:2]) * outs["adv"] + 1e-4 * policy.entropy()
    torch.testing.assert_close(losses["policy"], -outs["weight"][:2] * objective)
    constant = 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(losses["value"], outs["weight"][:3] * (0.5 * (critic - outs["ret"]) ** 2 + constant))
    with pytest.raises(UserError, match="--imag_horizon 1"):
        make_behavior("dreamerv2", imag_horizon=1)


def test_a_mixture_of_dreamerv2_follows_its_actions_in_both_parts():
    losses, _, rollout = valued([1.0] * 4, 2.0, actor={"grad": "mixed"})  # returns that do not depend on the actions
    (grad,) = torch.autograd.grad(losses["policy"].sum(), rollout.actions)
    assert grad[:2].all() and not grad[2].any()


# -- DreamerV3 of 2023


def test_the_2023_form_imagines_whole_ends_and_learns_nothing_from_them():
    world = LinearWorld(2)
    world.cont = Head(D, 1, dists.Bernoulli, 1, 4)
    world.cont.out.kernel.data.zero_(), world.cont.out.bias.data.fill_(0.1)  # a probability of 0.52
    behavior = behavior_of("dreamerv3_2023", D + 2, BOX, make_config("dreamerv3_2023", {"horizon": 10}))
    feat = torch.randn(4, 2, D, requires_grad=True)
    going_on = behavior.discounts(world, feat)
    assert not going_on.requires_grad and going_on.flatten().tolist() == pytest.approx([0.9] * 8)
    world.cont.out.bias.data.fill_(-0.1)
    assert not behavior.discounts(world, feat).any()


@pytest.mark.parametrize("every", [1, 3])
def test_the_slow_critic_of_the_2023_form_becomes_a_copy_once(every):
    changes = {"critic.slow_every": every, "critic.slow_rate": 0.25}
    behavior, _ = make_behavior("dreamerv3_2023", **changes)
    slow, fast = behavior.slow.out.bias, behavior.critic.out.bias
    shares = []
    for _ in range(4):
        slow.data.zero_(), fast.data.fill_(1.0)
        behavior.improve(None)
        shares.append(float(slow.mean()))
    assert shares == ([1, 0.25, 0.25, 0.25] if every == 1 else [1, 0, 0, 0.25])


# ---------------------------------------------------------------------------
# Dreamer


class Listed(LinearWorld):
    """A world whose discounts are listed, so that returns and weights can be checked by hand."""

    def discounts(self, feat):
        return torch.tensor([0.9, 0.5, 0.4, 0.2, 0.1])[:, None].expand(feat.shape[:-1])


def test_the_returns_and_weights_of_dreamer_by_hand():
    behavior, _ = make_behavior("dreamerv1", imag_horizon=4)
    losses, outs = imagined(behavior, Listed(2))
    cont, reward, value = ([*outs[key][:, 0].tolist()] for key in ("cont", "reward", "value"))
    rets, weights, after = [], [1, 0.5, 0.5 * 0.4], value[4]
    for h in (3, 2, 1):  # each with its own reward; the start, 0, has no return
        after = reward[h] + cont[h] * (0.05 * value[h + 1] + 0.95 * after)
        rets.insert(0, after)
    assert outs["ret"][:, 0].tolist() == pytest.approx(rets, rel=1e-5)
    assert outs["weight"][:, 0].tolist() == pytest.approx(weights)
    pairs = list(zip(weights, rets, value[1:4], strict=True))
    assert losses["policy"][:, 0].tolist() == pytest.approx([-w * ret for w, ret, _ in pairs], rel=1e-5)
    errors = [w * (0.5 * (v - ret) ** 2 + 0.5 * math.log(2 * math.pi)) for w, ret, v in pairs]
    assert losses["value"][:, 0].tolist() == pytest.approx(errors, rel=1e-4)  # of imagined states alone


@pytest.mark.parametrize("ends, starts", [(False, 4), (True, 2)])
def test_dreamer_starts_from_no_last_step_if_its_model_predicts_ends(ends, starts):
    behavior, world = make_behavior("dreamerv1", cont_head={"use": ends})
    state = State(torch.arange(4.0).view(2, 2, 1).expand(2, 2, D), torch.zeros(2, 2, 2, 1))
    rollout = behavior.rollout(world, state)
    assert rollout.feat[0, :, 0].tolist() == ([0, 2] if ends else [0, 1, 2, 3])
    assert rollout.actions.shape == (H, starts, 2)


@pytest.mark.parametrize("key, value", [("imag_horizon", 1), ("loss_scales.repval", 0.3)])
def test_what_dreamer_cannot_do_is_said_in_one_line(key, value):
    assert key in one_line_error(behavior_of, "dreamerv1", D + 2, BOX, make_config("dreamerv1", {key: value}))


def test_the_best_action_of_a_wide_squashed_normal_is_nearly_a_bound():
    torch.manual_seed(0)
    raw = torch.tensor([0.3, -0.3]).repeat(200, 1)

    def best(stddev):
        dist = normals.TanhNormal(raw, torch.zeros_like(raw), 0.0, stddev)
        return dist.mode()

    wide, narrow = best(1.0), best(0.05)
    assert wide.shape == (200, 2) and (wide[:, 0] > 0).float().mean() > 0.75
    assert float(wide.abs().median()) == pytest.approx(0.97, abs=0.02)
    assert narrow.mean(0).tolist() == pytest.approx([math.tanh(0.3), -math.tanh(0.3)], abs=0.02)
    assert (best(5.0).abs() > 0.99).float().mean() > 0.95  # with which Dreamer begins


def test_the_best_action_is_the_densest_of_its_samples():
    dist, drawn = squashed(RAW[:2]), []
    dist.noise = lambda shape, device: drawn.append(torch.randn(shape)) or drawn[0]
    best = dist.mode()
    samples = torch.tanh(dist.mean + dist.stddev * drawn[0])
    assert drawn[0].shape == (100, 2, 1)
    densities = dist.log_prob(samples)
    torch.testing.assert_close(dist.log_prob(best), densities.amax(0), rtol=1e-4, atol=1e-4)
    assert all(best[row] in samples[:, row] for row in (0, 1))


# ---------------------------------------------------------------------------
# Planning


def test_a_refit_leaves_a_thousandth_of_spread():
    seen = []

    def score(plans):
        seen.append(plans)
        return -plans.abs().sum((0, -1))

    search(score, (1, 1, 4000, 1), 2, elites=1)  # one elite has no spread of its own
    assert float(seen[1].std()) == pytest.approx(1e-3, rel=0.1)


def test_search_finds_the_best_plan_of_each_problem():
    best = torch.tensor([[[0.5, -0.3]], [[-0.9, 0.1]], [[0.0, 0.8]]]).transpose(0, 1).repeat(4, 1, 1)  # (H, N, A)
    best[3] = -best[3]
    torch.manual_seed(0)
    plan = search(lambda plans: -(plans - best[:, :, None]).square().sum((0, -1)), (4, 3, 400, 2), 10, 40)
    assert plan.shape == (4, 3, 2) and (plan - best).abs().max() < 0.05
    corner = search(lambda plans: plans.sum((0, -1)), (4, 3, 400, 2), 10, 40)
    assert corner.max() <= 1 and corner.min() > 0.95


def test_discrete_plans_are_one_hots_of_the_best_classes():
    spec = ActionSpec({"move": 1, "pick": 5}, {"pick": [2, 3]})
    worth = torch.tensor([[1.0, 0, 3, 0, 1, 2], [-1.0, 3, 0, 2, 1, 0]])  # of each entry of an action, in two problems

    def imagine(start, plans, horizon):
        stoch = (plans * start.deter).sum(-1)[..., None, None]
        states = torch.cat([torch.full_like(stoch[:1], 100.0), stoch])  # that of the start counts for nothing
        return State(start.deter.expand(horizon + 1, -1, -1), states), plans

    def reward(feat):
        return SimpleNamespace(mode=lambda: feat[..., -1])

    world = SimpleNamespace(rssm=SimpleNamespace(imagine=imagine), reward=reward)
    torch.manual_seed(0)
    config = SimpleNamespace(cem=SimpleNamespace(horizon=3, iterations=8, candidates=200, elites=20))
    action, _ = CEM(1, spec, config).act(world, State(worth, torch.zeros(2, 1, 1)), (), "mode")
    assert action[:, 1:].tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]
    assert action[0, 0] > 0.9 and action[1, 0] < -0.9


# ---------------------------------------------------------------------------
# Images

STACK = {"image_dist": "mse", "depth": 2, "mults": (1, 2, 4, 8), "kernel": 4, "blocks": 1, "units": 4}
OLD = Style("none", "elu", "glorot")


@pytest.mark.parametrize("cnn, sizes", [("valid", [31, 14, 6, 2]), ("same", [32, 16, 8, 4])])
def test_sizes_of_the_strided_encoder(cnn, sizes):
    encoder, seen = ImageEncoder({"image": (64, 64, 3)}, SimpleNamespace(cnn=cnn, **STACK), OLD), []
    for conv in encoder.convs:
        conv.register_forward_hook(lambda module, args, out: seen.append(out.shape[1:]))
    out = encoder({"image": torch.zeros(5, 64, 64, 3)}, torch.float32)
    assert seen == [(size, size, 2 * mult) for size, mult in zip(sizes, STACK["mults"], strict=True)]
    assert out.shape == (5, encoder.size) == (5, sizes[-1] ** 2 * 16)


@pytest.mark.parametrize("cnn, sizes", [("valid", [1, 5, 13, 30, 64]), ("same", [4, 8, 16, 32, 64])])
def test_sizes_of_the_transposed_decoder(cnn, sizes):
    shapes = {"front": (64, 64, 3), "back": (64, 64, 1)}
    decoder, seen = TransposedDecoder(shapes, 6, 3, SimpleNamespace(cnn=cnn, **STACK), OLD), []
    for conv in (*decoder.convs, decoder.out):
        conv.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[1:], out.shape[1:])))
    decoder.out.weight.data.zero_()
    outs = decoder(torch.zeros(5, 6), torch.zeros(5, 3))
    channels = [64 if cnn == "valid" else 16, 8, 4, 2, 4]
    stages = [(size, size, count) for size, count in zip(sizes, channels, strict=True)]
    assert seen == list(itertools.pairwise(stages))
    assert all(out.shape == (5, *shapes[key]) and (out == 0.5).all() for key, out in outs.items())


@pytest.mark.parametrize("kernel, valid", [(4, False), (5, False), (4, True)])
def test_the_transposed_convolution_is_the_transpose_of_the_convolution(kernel, valid):
    conv = Conv2d(3, 2, kernel, stride=2, valid=valid, bias=False)
    back = ConvTranspose2d(2, 3, kernel, valid=valid, bias=False)
    back.weight.data = conv.weight.data
    y = torch.randn_like(conv(x := torch.randn(1, 8, 8, 3)))
    torch.testing.assert_close((conv(x) * y).sum(), (x * back(y)).sum(), rtol=1e-4, atol=1e-4)


def test_five_bits_leave_32_levels_with_noise_between_them():
    image = torch.arange(256, dtype=torch.uint8).repeat(100, 1)
    noise = quantize(image, 5) * 32 / 255 - torch.div(image, 8, rounding_mode="floor")  # uniform in [0, 1)
    assert -1e-4 <= noise.min() < noise.max() <= 1 + 1e-4
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0.5, 12**-0.5), abs=0.01)


# ---------------------------------------------------------------------------
# Recurrent cells


def test_a_dense_cell_is_hidden_layers_and_pytorchs_gru():
    cell = DenseGRU(4, 3, 2, hidden=5, layers=2, gru=GRU, style=Style("layer", "elu", "fan_avg"))
    theirs = nn.GRUCell(5, 4)
    for mine, kind in ((cell.gru.inputs, "ih"), (cell.gru.state, "hh")):
        mine.kernel.data = getattr(theirs, f"weight_{kind}").data.T
        mine.bias.data = getattr(theirs, f"bias_{kind}").data
    deter, stoch, action = torch.randn(7, 4), torch.randn(7, 3), torch.rand(7, 2)
    expected = theirs(cell.hidden(torch.cat([stoch, action], -1)), deter)
    torch.testing.assert_close(cell(deter, stoch, cell.prepare(action)), expected)


def test_the_cell_of_planet_resets_before_the_product():
    cell = ResetFirstGRU(1, 1)
    cell.gates.kernel.data = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    cell.cand.kernel.data, cell.cand.bias.data = torch.tensor([[1.0], [3.0]]), torch.tensor([0.25])
    reset, update = (1 / (1 + math.exp(-x)) for x in (1 + 2 * 0.5, 1 - 0.5))
    cand = math.tanh(0.7 + 3 * reset * 0.5 + 0.25)
    deter = cell(torch.tensor([[0.7]]), torch.tensor([[0.5]]))
    assert deter.item() == pytest.approx(update * 0.5 + (1 - update) * cand)


def test_the_cells_of_planet_and_dreamer_at_the_start():
    planet, dreamer = (make_rssm(6, BOX, make_config(version).rssm).cell.gru for version in ("planet", "dreamerv1"))
    assert isinstance(planet, ResetFirstGRU) and isinstance(dreamer, GRU)
    assert planet.gates.bias.tolist() == [1.0] * 64 and not planet.cand.bias.any()  # keeps sigmoid(1) = 73 %
    kernel = dreamer.state.kernel.detach()
    torch.testing.assert_close(kernel @ kernel.T, torch.eye(32), rtol=0, atol=1e-5)
    assert not torch.allclose(dreamer.inputs.kernel @ dreamer.inputs.kernel.T, torch.eye(16), atol=0.1)


def test_norm_gru_by_hand():
    cell = NormGRU(1, 1)
    cell.linear.kernel.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    unit = 1 / math.sqrt(2 / 3 + 1e-3)  # 1, -1 and 0 have mean 0 and variance 2/3
    cand = math.tanh(1 / (1 + math.exp(-unit)) * -unit)
    update = 1 / (1 + math.e)  # a bias of -1 retains most of the state
    deter = cell(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert deter.item() == pytest.approx(update * cand + (1 - update) * 0.5)


def test_a_bias_before_the_norm_shifts_the_gates_of_dreamerv2():
    torch.manual_seed(0)
    cell = make_rssm(3, BOX, make_config("dreamerv2").rssm, Style("none", "elu", "glorot")).cell.gru
    cell.linear.bias.data.normal_()
    x, deter = torch.randn(2, 16), torch.randn(2, 32)
    parts = torch.cat([x, deter], -1) @ cell.linear.kernel + cell.linear.bias
    reset, cand, update = nn.functional.layer_norm(parts, parts.shape[1:], eps=1e-3).chunk(3, -1)
    share = torch.sigmoid(update - 1)
    expected = share * torch.tanh(torch.sigmoid(reset) * cand) + (1 - share) * deter
    torch.testing.assert_close(cell(x, deter), expected)
    assert make_rssm(3, BOX, make_config("dreamerv3_2023").rssm).cell.gru.linear.bias is None


@pytest.mark.parametrize("norm, biased", [("none", True), ("layer", False), ("layer_bias", True)])
def test_the_norm_says_whether_a_bias_stands_before_it(norm, biased):
    shapes, style = {"image": (64, 64, 3)}, Style(norm, "elu", "glorot")
    encoder = ImageEncoder(shapes, SimpleNamespace(cnn="valid", **STACK), style)
    decoder = TransposedDecoder(shapes, 6, 3, SimpleNamespace(cnn="valid", **STACK), style)
    layers = [*encoder.convs, *decoder.convs, MLP(3, 1, 4, style)[0]]
    assert {layer.bias is not None for layer in layers} == {biased}


def test_a_learned_initial_state_stands_where_episodes_begin():
    latent = OneHotLatent(2, 3, 0.01)
    cell = DenseGRU(4, latent.size, 2, hidden=5, layers=1, gru=NormGRU)
    config = SimpleNamespace(deter=4, hidden=5, img_layers=1, obs_layers=1, initial="learned")
    rssm = RSSM(cell, latent, 6, config)
    rssm.start.data = torch.tensor([0.5, -0.5, 1.0, 0.0])
    first = rssm.initial(1, "cpu")
    assert first.deter[0].tolist() == pytest.approx([math.tanh(x) for x in (0.5, -0.5, 1.0, 0.0)])
    assert torch.equal(first.stoch, rssm.predict(first.deter).mode())
    embed, action, is_first = torch.randn(1, 3, 6), torch.rand(1, 3, 2), torch.tensor([[False, False, True]])
    other = State(torch.randn(1, 4), torch.eye(3)[None, :2])
    states, _ = rssm.observe(embed, action, is_first, other)
    for t, before, led in ((0, other, action[:, 0]), (2, first, torch.zeros(1, 2))):
        expected = cell(before.deter, before.stoch.flatten(1), cell.prepare(led))
        torch.testing.assert_close(states.deter[:, t], expected)
    assert torch.autograd.grad(states.deter[:, 2].sum(), rssm.start, retain_graph=True)[0].all()
    prior = torch.autograd.grad(states.deter[:, 2].sum(), [*rssm.prior.parameters()], allow_unused=True)
    assert prior == (None,) * len(prior)  # the initial stoch has no gradient


def test_outputs_of_the_2023_form_start_uniform_and_hidden_layers_normal():
    torch.manual_seed(0)
    layer, style = Linear(300, 200, init=Style("layer", "silu", "fan_avg").init), Style("layer", "silu", "fan_avg")
    head = Head(300, 200, dists.Bernoulli, 1, 300, style=style)
    kernels = layer.kernel.detach(), head.mlp[0].kernel.detach(), head.out.kernel.detach()
    for kernel, widest in zip(kernels, (2 * 1.1368, 2 * 1.1368, 3**0.5), strict=True):
        stddev = (2 / sum(kernel.shape)) ** 0.5
        assert float(kernel.std()) == pytest.approx(stddev, rel=0.02)
        assert float(kernel.abs().max()) == pytest.approx(widest * stddev, rel=0.02)
    shapes = {"image": (64, 64, 3)}
    decoder = TransposedDecoder(shapes, 60, 40, SimpleNamespace(cnn="same", **STACK | {"depth": 16}), style)
    for weight in (decoder.linear.kernel.detach(), decoder.out.weight.detach()):
        assert float(weight.abs().max() / weight.std()) == pytest.approx(3**0.5, rel=0.05)
    assert Style(init="fan_in").out == "fan_in" and Style(init="glorot").out == "glorot"


# ---------------------------------------------------------------------------
# Data


def make_replay(windows, lengths, unfinished=0, capacity=100, length=4):
    """Return a replay of one stream of episodes, whose rewards number the steps; the last may be unfinished."""
    replay, start = Replay(LAYOUT, {}, streams=1, capacity=capacity, length=length, windows=windows), 0
    for number, steps in enumerate([*lengths, unfinished]):
        for step in steps_of(make_episode(start, steps)):
            replay.add(0, step)
        if number < len(lengths):
            replay.streams[0].close_episode(str(number), steps)
        start += steps
    return replay


def begins(replay, count=3000):
    """Return the share of windows that begin at each step."""
    batch, _ = replay.sample(count)
    assert (np.diff(batch["reward"], axis=1) == 1).all() and not {"deter", "stoch"} & batch.keys()
    return {int(step): n / count for step, n in sorted(collections.Counter(batch["reward"][:, 0]).items())}


def test_episodes_have_equal_chances_and_so_have_their_windows():
    shares = begins(make_replay("episode", [5, 3, 12], unfinished=8))  # 3 steps are too few for a window
    assert shares.keys() == {0, 1, *range(8, 17)}
    assert [shares[0], shares[1], shares[8], shares[16]] == pytest.approx([1 / 4, 1 / 4, 1 / 18, 1 / 18], abs=0.03)


def test_ends_of_episodes_have_the_chances_of_windows_beyond_them():
    shares = begins(make_replay("episode_ends", [6]))  # begins 0, 1, 2, and 3 to 6, which count as 2
    assert [shares[0], shares[1], shares[2]] == pytest.approx([1 / 7, 1 / 7, 5 / 7], abs=0.03)


def test_windows_of_dreamer_reach_no_last_step():
    shares = begins(make_replay("episode_but_last", [6, 4, 5]))  # 4 steps have no window that ends before the last
    assert shares.keys() == {0, 1, 10}
    assert [shares[0], shares[1], shares[10]] == pytest.approx([1 / 4, 1 / 4, 1 / 2], abs=0.03)
    assert make_config("dreamerv1").replay_window == "episode_but_last"
    assert not make_replay("episode_but_last", [4]).ready() and make_replay("episode_but_last", [5]).ready()


def test_uniform_windows_cross_the_ends_of_episodes_and_none_is_fresh():
    shares = begins(make_replay("uniform", [5, 3], unfinished=2))
    assert shares == pytest.approx(dict.fromkeys(range(7), 1 / 7), abs=0.03)


def test_only_whole_episodes_are_sampled():
    assert not make_replay("episode", [3], unfinished=20).ready()
    assert make_replay("episode", [4]).ready()
    overwritten = make_replay("episode_ends", [12, 8], capacity=15)  # the first 5 of the 12 steps are gone
    assert begins(overwritten, 100).keys() <= set(range(12, 17))
    assert len(make_replay("uniform", [5] * 50, capacity=20).streams[0].whole) <= 5


def test_perturbed_actions():
    spec = ActionSpec({"move": 1, "pick": 6}, {"pick": [2, 4]})
    action = torch.tensor([0.0, 1, 0, 0, 0, 1, 0]).repeat(20000, 1)
    torch.manual_seed(0)
    move, one, other = perturb(action, spec, 0.4).split([1, 2, 4], -1)
    assert move.abs().max() == 1 and float((move.abs() < 0.4).float().mean()) == pytest.approx(0.683, abs=0.02)
    assert (one.sum(-1) == 1).all() and (other.sum(-1) == 1).all()
    assert one.mean(0).tolist() == pytest.approx([0.6 + 0.4 / 2, 0.4 / 2], abs=0.02)
    assert other.mean(0).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.02)
