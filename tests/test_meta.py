"""Learning rates and constants that learn: against differences, by hand, and what does not change without them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from behaviors.meta import LEARNED, ActorLoss, MetaGradients, halves
from explorers import Rewards
from models import Rollout, frozen
from ops.layers import Norm, RMSNorm
from ops.optim import Adams, LaProp, OwnAdam
from ops.rates import LearnedRates
from rssm import State
from tests.factories import initial, make_agent, make_batch, make_config, shake
from tools import UserError


def learned(*names, kind="proprio", updates=3, flags=()):
    """Return an agent whose constants of these names learn, after some updates, and a batch."""
    agent = make_agent(kind, "--meta.learn", *names, "--batch_size", "4", "--actor.grad", "reinforce", *flags)
    batch = make_batch(kind, (4, 6))
    for _ in range(updates):
        agent.update(dict(batch), initial(agent, 4))
    return agent, batch


def equal(one, other):
    """True if two dicts of tensors hold the same."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The gradient of a gradient


def test_the_gradient_of_the_fused_norm_has_the_gradient_of_the_plain_one():
    torch.manual_seed(0)
    inputs, results = torch.randn(5, 8), []
    for module in (Norm(8), nn.Sequential(RMSNorm(8), nn.SiLU())):
        x = inputs.clone().requires_grad_()
        (grad,) = torch.autograd.grad((module(x) ** 3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((grad**2).sum(), [x, *module.parameters()]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# Learning rates


class Wrapped:
    """An optimizer of PyTorch as `LearnedRates` takes it."""

    def __init__(self, opt):
        self.opt, self.zero_grad = opt, opt.zero_grad

    def rate(self, name):
        return self.opt.param_groups[0]["lr"]

    def step(self):
        self.opt.step()
        return {}


def loss_of(params, seed):
    """The loss of a policy over three actions and of its critic, on random states, actions and returns."""
    rng = torch.Generator().manual_seed(seed)
    states, returns = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((64, 4), (64,)))
    actions = torch.randint(3, (64,), generator=rng)
    value = (states @ params["critic"]).squeeze(-1)
    logpi = (states @ params["actor"]).log_softmax(-1)[torch.arange(64), actions]
    return -(logpi * (returns - value).detach()).mean() + (value - returns).square().mean()


def toy_after(factor, steps=3):
    """Return parameters and their LearnedRates after steps of which the last was taken with a factor of the actor."""
    torch.manual_seed(0)
    params = {name: torch.randn(4, size).double().requires_grad_() for name, size in (("actor", 3), ("critic", 1))}
    rates = LearnedRates(
        Wrapped(torch.optim.Adam(params.values(), 0.05)), {"actor": {"actor": params["actor"]}}, 0.0, 100.0
    )
    for seed in range(steps):
        if seed == steps - 1:
            rates.factors["actor"].fill_(factor)
        rates.zero_grad()
        loss_of(params, seed).backward()
        rates.step()
    return params, rates


def test_the_derivative_in_a_rate_is_that_of_differences_in_double():
    params, rates = toy_after(1.0)
    rates.zero_grad()
    loss_of(params, 9).backward()
    high, low = (loss_of(toy_after(1.0 + h)[0], 9).item() for h in (1e-4, -1e-4))
    assert float(rates.derivative("actor")) == pytest.approx((high - low) / 2e-4, rel=1e-3)


def test_the_derivative_in_a_rate_is_that_of_differences_on_the_agent():
    def loss_after(factor):
        agent, batch = learned("actor_lr", flags=("--opt.lr", "1e-3"))
        agent.opt.factors["actor"].fill_(factor)
        agent.opt.rate = 0.0
        agent.update(dict(batch), initial(agent, 4))
        world, behavior = agent.world, copy.deepcopy(agent.behavior)
        with torch.no_grad():
            rollout = behavior.rollout(world, batch_states(agent, batch))
        return agent, behavior, rollout

    agent, _, rollout = loss_after(1.0)
    _, batch = learned("actor_lr", updates=0)

    def loss(behavior):
        behavior.return_norm.rate = 0.0
        with frozen(agent.world):
            losses, _ = behavior.losses(agent.world, rollout, batch, agent.world.rewards)
        return losses["policy"].double().mean()

    agent.opt.zero_grad()
    copied = copy.deepcopy(agent.behavior)
    grads = torch.autograd.grad(loss(copied), list(copied.actor.parameters()))
    for param, grad in zip(agent.behavior.actor.parameters(), grads, strict=True):
        param.grad.copy_(grad)
    high, low = (loss(loss_after(1.0 + h)[1]).item() for h in (0.5, -0.5))
    assert float(agent.opt.derivative("actor")) == pytest.approx(high - low, rel=5e-2)


def batch_states(agent, batch):
    """Return posterior states of a batch, drawn the same at every call."""
    torch.manual_seed(3)
    prepared = agent.world.prepare({**batch, "action": agent.act_spec.join(batch)})
    embed = agent.world.encode(prepared)
    return agent.world.rssm.observe(embed, prepared["action"], batch["is_first"], initial(agent, 4))[0]


@pytest.mark.parametrize("kind", ["laprop", "adam"])
def test_a_factor_of_one_changes_nothing_and_another_scales_the_step(kind):
    def run(factor):
        torch.manual_seed(0)
        params = {"a": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(3))}
        settings = make_config("--meta.learn", "actor_lr").model_opt
        opt = LaProp(params, lr=0.01, warmup=0) if kind == "laprop" else Adams({"model": params}, {"model": settings})
        rates = LearnedRates(opt, {"actor": {"a": params["a"]}}, 0.0, 10.0) if factor else opt
        if factor:
            rates.factors["actor"].fill_(factor)
        rates.zero_grad()
        (params["a"].square().sum() + params["b"].square().sum()).backward()
        before = {name: param.detach().clone() for name, param in params.items()}
        rates.step()
        return {name: param.detach() - before[name] for name, param in params.items()}

    plain, one, three = run(0), run(1.0), run(3.0)
    torch.testing.assert_close(one["a"], plain["a"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(three["a"], 3 * plain["a"], rtol=1e-4, atol=1e-7)
    assert torch.equal(three["b"], plain["b"])


def test_a_rate_grows_on_a_slope_and_shrinks_where_steps_overshoot():
    for curvature, rises in ((1e-6, True), (1e6, False)):
        param = nn.Parameter(torch.tensor([1.0, -1.0]))
        rates = LearnedRates(LaProp({"x": param}, lr=0.3, warmup=0, agc=0), {"actor": {"x": param}}, 0.1, 5.0)
        for _ in range(100):
            rates.zero_grad()
            (curvature * param.square() + (param if rises else 0)).sum().backward()
            rates.step()
        assert (float(rates.factors["actor"]) == 5.0) if rises else (float(rates.factors["actor"]) < 0.9)


# Constants of the loss


class Toy(nn.Module):
    """A policy over three actions in double precision, with the rule of the default behavior and rewards of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.actor = nn.Linear(4, 3).double()
        self.return_norm = nn.Identity()
        self.entropy, self.lam = 0.3, 0.8

    def losses(self, world, rollout, batch, rewards):
        logits = self.actor(rollout.feat[:-1]).log_softmax(-1)
        logpi, entropy = (logits * rollout.actions).sum(-1), -(logits.exp() * logits).sum(-1)
        reward, value = rewards(rollout), rollout.feat[..., 0]
        ret, rets = value[-1], []
        for t in reversed(range(len(reward) - 1)):
            ret = reward[t + 1] + 0.9 * ((1 - self.lam) * value[t + 1] + self.lam * ret)
            rets.append(ret)
        adv = torch.stack(rets[::-1]) - value[:-1]
        return {"policy": -(logpi * adv + self.entropy * entropy)}, {}


def judged(meta, numbers, world, rollout, outs, batch, rewards, scales):
    """Return L0(theta'(eta)) of numbers: what `MetaGradients.gradient` is the gradient of."""
    eta = {name: LEARNED[name][0](x) for name, x in zip(meta.names, numbers, strict=True)}
    theta = {name: param.detach().requires_grad_() for name, param in meta.holders[0].actor.named_parameters()}
    loss, (first, second) = ActorLoss(meta.behavior[0], meta.holders), halves(rollout, outs, batch)
    grads = torch.autograd.grad(loss(theta, eta, world, *first, rewards)[0], theta.values())
    moved = {name: p.detach() - scales[name] * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    return float(loss(moved, meta.judge, world, *second, rewards, meta.task_critic)[0].detach().double())


def differences(meta, step, *args):
    """Return the central differences of `judged` around the numbers of meta."""
    found = []
    for place in range(len(meta.numbers)):
        shift = torch.zeros_like(meta.numbers)
        shift[place] = step
        high, low = (judged(meta, meta.numbers + sign * shift, *args) for sign in (1, -1))
        found.append((high - low) / (2 * step))
    return found


def test_constants_have_the_derivative_of_differences_in_double():
    behavior = Toy()
    meta = MetaGradients(behavior, ["entropy", "lam"], make_config("--batch_size", "4")).double()
    meta.attach(behavior)
    feat, action = torch.randn(6, 8, 4).double(), torch.eye(3).double()[torch.randint(3, (5, 8))]
    rollout = Rollout(State(feat, feat), action, feat)
    reward = torch.randn(6, 8).double()
    rewards = Rewards({"extr": lambda rollout: reward[:, : rollout.feat.shape[1]]})
    scales = {name: torch.full_like(param, 0.1) for name, param in behavior.actor.named_parameters()}
    args = None, rollout, {}, {"reward": torch.zeros(4, 2)}, rewards, scales
    assert meta.gradient(*args).tolist() == pytest.approx(differences(meta, 1e-4, *args), rel=1e-3)


NORMAL = ["--loss_scales.repval", "0", "--reward_head.dist", "normal", "--critic.dist", "normal"]


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("proprio", ()),
        ("pixels", ("--intrinsic", "icm")),
        ("proprio", ("--behavior", "ppo", "--intrinsic", "icm")),
        ("pixels", ("--behavior", "hierarchical_ppo", "--intrinsic", "icm", "--imag_horizon", "10")),
        ("proprio", ("--behavior", "dreamerv1", "--loss_scales.repval", "0")),
        ("proprio", ("--behavior", "dreamerv2", *NORMAL, "--intrinsic", "icm")),
        ("proprio", ("--behavior", "dreamerv3_2023", "--loss_scales.repval", "0", "--intrinsic", "icm")),
    ],
)
def test_constants_have_the_derivative_of_differences_on_the_agent(kind, flags):
    names = ("entropy", "lam", *(["intr_scale"] if "--intrinsic" in flags else []))
    agent, batch = learned(*names, kind=kind, flags=("--actor.entropy", "0.1", *flags))
    torch.manual_seed(7)
    for module in (agent.nets, agent.meta.task_critic) if "intr_scale" in names else (agent.nets,):
        shake(module, 0.03)  # so that values differ from state to state
    behavior, world = agent.behavior, agent.world
    rollout = behavior.rollout(world, batch_states(agent, batch).map(torch.Tensor.detach))
    learner = agent.meta.holders[0]
    scale = 0.1 if "dreamerv2" in flags else 1.0  # DreamerV2 divides its returns by nothing
    scales = {name: torch.full_like(param, scale) for name, param in learner.actor.named_parameters()}
    learner.return_norm.rate = 1.0
    with frozen(world):
        _, outs = behavior.losses(world, rollout, batch, agent.rewards)
    learner.return_norm.rate = 0.0  # what it does to the normalizer is left out of the gradient
    args = world, rollout, outs, batch, agent.rewards, scales
    assert agent.meta.gradient(*args).tolist() == pytest.approx(differences(agent.meta, 0.1, *args), rel=5e-2, abs=3e-7)


def test_a_step_of_the_constants_leaves_behavior_and_normalizer_as_they_are():
    agent, batch = learned("entropy", "lam", updates=1)
    before = copy.deepcopy(agent.behavior.state_dict())
    rollout = agent.behavior.rollout(agent.world, batch_states(agent, batch).map(torch.Tensor.detach))
    agent.meta.step(agent.world, rollout, {}, batch, agent.rewards, agent.opt)
    assert equal(before, agent.behavior.state_dict())
    assert agent.behavior.entropy.data_ptr() == agent.meta.constants.data_ptr()


def test_the_losses_read_the_constants_that_were_learned():
    agent, _ = learned("entropy", "lam")
    assert agent.behavior.entropy.data_ptr() == agent.meta.constants.data_ptr()
    assert float(agent.behavior.entropy) != pytest.approx(3e-4, rel=1e-4)
    assert 0 < float(agent.behavior.lam) < 1


@pytest.mark.parametrize("steps", [1, 4])
def test_the_slow_critic_of_the_task_moves_as_often_as_the_behaviors(steps):
    flags = ("--intrinsic", "icm", "--critic.slow_every", str(steps), "--critic.slow_rate", "1")
    agent, batch = learned("intr_scale", updates=1, flags=flags)
    slow, moved = agent.meta.task_critic.slow, []
    for _ in range(4):
        before = [param.clone() for param in slow.parameters()]
        agent.update(dict(batch), initial(agent, 4))
        moved.append(any(not torch.equal(old, new) for old, new in zip(before, slow.parameters(), strict=True)))
    assert sum(moved) == 4 // steps


PAID = {"extr": 0.0, "icm": 5.0}


@pytest.mark.parametrize("flags", [(), ("--behavior", "ppo")])
def test_an_actor_is_judged_by_a_critic_of_the_tasks_rewards_alone(flags):
    agent, batch = learned("intr_scale", updates=0, flags=("--intrinsic", "icm", *flags))
    agent.rewards.parts.update({name: lambda at, paid=paid: 0 * at.feat[..., 0] + paid for name, paid in PAID.items()})
    rollout = agent.behavior.rollout(agent.world, batch_states(agent, batch).map(torch.Tensor.detach))
    with frozen(agent.world):
        _, outs = agent.behavior.losses(agent.world, rollout, batch, agent.rewards)
    critic, found = agent.meta.task_critic, []
    critic.opt.lr = 1e-2
    for module in (critic.critic, critic.slow):
        shake(module, 0.1)
    for _ in range(60):
        agent.meta.step(agent.world, rollout, outs, batch, agent.rewards, agent.opt)
        found.append(critic.critic(rollout.feat).mode().abs().mean().item())
    assert found[0] > 0.02 and found[-1] < found[0] / 2 and outs["ret"].mean() > 5


def test_without_a_weight_that_learns_the_judge_seeks_what_the_actor_does():
    agent, _ = learned("entropy", updates=0, flags=("--intrinsic", "icm"))
    assert agent.meta.judge.keys() == {"entropy", "lam"} and agent.meta.task_critic is None


def test_constants_and_rates_stay_within_their_limit():
    flags = ("--meta.limit", "1.001", "--meta.lr", "1", "--meta.rate", "1")
    agent, _ = learned("actor_lr", "entropy", updates=6, flags=flags)
    assert 3e-4 / 1.002 < float(agent.behavior.entropy) < 3e-4 * 1.002
    assert 0.998 < float(agent.opt.factors["actor"]) < 1.002


# Saving, errors


@pytest.mark.parametrize("flags, rate", [(("--opt.warmup", "0"), 4e-3), (("--optimizer", "adam"), 2e-3)])
def test_rates_that_learn_are_logged_themselves(flags, rate):
    flags = ("--opt.lr", "4e-3", "--actor_opt.lr", "2e-3", "--meta.start", "0.5", "--meta.rate", "0", *flags)
    agent, batch = learned("actor_lr", updates=0, flags=flags)
    _, metrics = agent.update(dict(batch), initial(agent, 4))
    assert float(metrics["meta/actor_lr"]) == pytest.approx(rate / 2)
    assert float(metrics["meta/actor_factor"]) == 0.5


@pytest.mark.parametrize("behavior", ["ppo", "hierarchical_ppo"])
def test_rates_of_a_behavior_that_trains_itself_learn_too(behavior):
    flags = ("--behavior", behavior, "--imag_horizon", "10")
    agent, batch = learned("actor_lr", "critic_lr", updates=4, flags=flags)
    own = [module for module in agent.behavior.modules() if hasattr(module, "actor_opt")]
    factors = [float(opt.factor) for module in own for opt in (module.actor_opt, module.critic_opt)]
    assert all(np.isfinite(factor) and factor != 1 for factor in factors) and len(factors) == (
        2 if behavior == "ppo" else 4
    )
    _, metrics = agent.update(dict(batch), initial(agent, 4))
    assert sum(name.endswith("actor_factor") for name in metrics) == len(own)
    assert sum(name.endswith("actor_lr") for name in metrics) == len(own)


def test_the_factor_of_an_own_adam_moves_as_that_of_learned_rates():
    torch.manual_seed(0)
    start, factors = torch.randn(6), []
    for own in (True, False):
        param = nn.Parameter(start.clone())
        if own:
            opt = OwnAdam([param], 0.05, eps=1e-8, clip=1e9, learned=(0.1, 10.0, 2.0))
        else:
            adam = Wrapped(torch.optim.Adam([param], 0.05, eps=1e-8))
            opt = LearnedRates(adam, {"actor": {"x": param}}, 0.1, 10.0, 2.0)
        for scale in (1.0, 2.0, -0.5, 3.0):
            loss = (scale * param).sin().sum()
            if own:
                opt.step(loss)
            else:
                opt.zero_grad(), loss.backward(), opt.step()
        factors.append(torch.cat([(opt.factor if own else opt.factors["actor"])[None], param.detach()]))
    torch.testing.assert_close(*factors, rtol=1e-5, atol=1e-6)
    assert float(factors[0][0]) != 2


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adam"), ("--behavior", "ppo")])
def test_a_loaded_agent_goes_on_with_the_same_rates_and_constants(flags):
    names = "actor_lr", "critic_lr", "entropy", "lam"
    agent, batch = learned(*names, flags=flags)
    other, _ = learned(*names, updates=0, flags=flags)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for each in (agent, other):
        torch.manual_seed(5)
        each.update(dict(batch), initial(each, 4))
    assert equal(agent.nets.state_dict(), other.nets.state_dict())
    constants = [each.state_dict()["meta"] for each in (agent, other)]
    assert constants[0].pop("learn") == constants[1].pop("learn") == ["entropy", "lam"]
    assert equal(*constants)
    assert getattr(agent.opt, "factors", None) == getattr(other.opt, "factors", None)


@pytest.mark.parametrize("behavior", ["ppo", "hierarchical_ppo"])
def test_the_rates_of_a_behavior_that_trains_itself_can_begin_and_cease_to_learn(behavior):
    flags = ("--behavior", behavior, "--imag_horizon", "10")
    plain, (agent, batch) = make_agent("proprio", *flags), learned("actor_lr", flags=flags)
    own = next(module for module in agent.behavior.modules() if hasattr(module, "actor_opt"))
    assert float(own.actor_opt.factor) != 1
    plain.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert all(torch.equal(value, agent.nets.state_dict()[name]) for name, value in plain.nets.state_dict().items())
    other, _ = learned("actor_lr", updates=0, flags=(*flags, "--meta.start", "2"))
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    own = next(module for module in other.behavior.modules() if hasattr(module, "actor_opt"))
    assert float(own.actor_opt.factor) == 2
    other.update(dict(batch), initial(other, 4))


@pytest.mark.parametrize("other", [["lam"], ["entropy", "lam"]])
def test_the_numbers_of_other_constants_are_refused(other):
    saved = make_agent("proprio", "--meta.learn", "entropy", "--actor.grad", "reinforce").state_dict()
    with pytest.raises(UserError, match=f"--meta.learn moved entropy there and {' '.join(other)} here"):
        make_agent("proprio", "--meta.learn", *other, "--actor.grad", "reinforce").load_state_dict(saved)
    saved["meta"].pop("learn")  # as an older version has saved
    if len(other) > 1:
        with pytest.raises(UserError, match=r"--meta\.learn moved others there"):
            make_agent("proprio", "--meta.learn", *other, "--actor.grad", "reinforce").load_state_dict(saved)


def test_an_agent_that_begins_to_learn_constants_starts_them_where_they_were():
    plain = make_agent("proprio", "--actor.grad", "reinforce")
    agent, _ = learned("actor_lr", "entropy", updates=0)
    agent.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert float(agent.behavior.entropy) == pytest.approx(3e-4) and float(agent.opt.factors["actor"]) == 1


IMAGINED = "--loss_scales.repval", "0"  # Dreamer has no critic on replayed data


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--actor.grad", "dynamics", "--meta.learn", "entropy"), "REINFORCE"),
        (("--behavior", "cem", "--optimizer", "adam", "--meta.learn", "lam"), "REINFORCE"),
        (("--behavior", "cem", "--optimizer", "adam", "--meta.learn", "actor_lr"), "no actor"),
        (("--intrinsic", "rnd", "--expl_critics", "separate", "--meta.learn", "lam"), "one critic"),
        (("--batch_size", "3", "--meta.learn", "lam"), "even"),
        (("--meta.learn", "intr_scale"), "no intrinsic reward"),
        (("--intrinsic", "rnd", "--behavior", "dreamerv1", "--meta.learn", "intr_scale", *IMAGINED), "slow critic"),
        (("--imag_horizon", "1", "--meta.learn", "lam"), "mixes"),
        (("--imag_horizon", "2", "--behavior", "dreamerv2", "--meta.learn", "lam"), "mixes"),
        (("--imag_horizon", "5", "--behavior", "hierarchical_ppo", "--meta.learn", "lam"), "mixes"),
        (("--lam", "1", "--meta.learn", "lam"), "nothing to start from"),
        (("--actor.entropy", "0", "--meta.learn", "entropy"), "nothing to start from"),
        (("--meta.learn", "actor_lr", "--meta.start", "0.01", "--meta.limit", "10"), "from 0.1 to 10"),
    ],
)
def test_what_cannot_learn_is_said_in_a_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        make_agent("proprio", *flags)
    assert "\n" not in str(error.value)
