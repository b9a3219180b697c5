import math
from types import SimpleNamespace

import pytest
import torch

from models import ImagBehavior, ReturnNorm, Rollout, WorldModel, kl_losses
from rssm import OneHotLatent, State, feature
from specs import ActionSpec
from tests.factories import initial, make_agent, make_batch, make_config, shake, world_losses

H, N, D, S, K = 15, 4, 8, 2, 3
BOX, DISCRETE = ActionSpec({"action": 2}, {}), ActionSpec({"action": 3}, {"action": [3]})


# ---------------------------------------------------------------------------
# Behavior on imagined trajectories that are given, so that every number can be checked by hand


def make_behavior(spec=BOX, *flags):
    """Return a behavior whose critic starts at exactly 0, so that returns depend on rewards only."""
    torch.manual_seed(0)
    return ImagBehavior(D + S * K, spec, make_config("--imag_horizon", str(H), *flags))


def make_trajectory(spec=BOX):
    torch.manual_seed(1)
    states = State(torch.randn(H + 1, N, D), torch.eye(K)[torch.randint(K, (H + 1, N, S))])
    actions = torch.randn(H, N, 2) if spec is BOX else torch.eye(3)[torch.randint(3, (H, N))]
    return Rollout(states, actions, feature(states))


def world(cont):
    """Return a world whose probability to continue is `cont`, (H + 1, N) or a number."""
    return SimpleNamespace(discounts=lambda feat: torch.as_tensor(cont).expand(H + 1, N))


def reward(value):
    return lambda rollout: torch.as_tensor(value, dtype=torch.float32).expand(H + 1, N)


def test_fifteen_actions_give_fifteen_returns():
    behavior, rollout = make_behavior(), make_trajectory()
    losses, outs = behavior.losses(world(1.0), rollout, {}, reward(1.0))
    assert {name: tuple(loss.shape) for name, loss in losses.items()} == {"policy": (15, N), "value": (15, N)}
    assert outs["ret"].shape == outs["adv"].shape == outs["logpi"].shape == (15, N)
    assert outs["weight"].shape == outs["value"].shape == outs["reward"].shape == (16, N)
    # With values of 0 a return is the sum of rewards discounted by lambda: 1, 1 + 0.95, 1 + 0.95 + 0.95^2, ...
    expected = [(1 - 0.95**n) / (1 - 0.95) for n in range(15, 0, -1)]
    assert outs["ret"][:, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_returns_take_the_reward_on_arriving_and_the_probability_to_go_on():
    behavior, rollout = make_behavior(), make_trajectory()
    rewards, cont = torch.zeros(H + 1, 1), torch.full((H + 1, 1), 0.8)
    rewards[0], rewards[1], rewards[2] = 1000.0, 3.0, 10.0  # that of the start was received before the first action
    _, outs = behavior.losses(world(cont), rollout, {}, reward(rewards))
    assert outs["ret"][:3, 0].tolist() == pytest.approx([3 + 0.8 * 0.95 * 10, 10, 0])


def test_values_of_the_critic_enter_with_one_minus_lambda_and_at_the_end():
    behavior, rollout = make_behavior(), make_trajectory()
    behavior.critic.out.bias.data[21] = 100.0  # all its weight is on the bin after the middle one: e - 1
    _, outs = behavior.losses(world(0.5), rollout, {}, reward(0.0))
    v = math.e - 1
    last = 0.5 * v
    assert outs["ret"][-2:, 0].tolist() == pytest.approx([0.5 * (0.05 * v + 0.95 * last), last], rel=1e-5)
    assert outs["adv"][-1, 0].item() == pytest.approx(last - v, rel=1e-5)  # the scale is at its least, 1


def test_weights_are_the_probability_to_have_come_so_far():
    behavior, rollout = make_behavior(), make_trajectory()
    _, outs = behavior.losses(world(0.5), rollout, {}, reward(0.0))
    assert outs["weight"][:, 0].tolist() == pytest.approx([0.5 ** (t + 1) for t in range(16)])  # the start counts, too


def test_a_terminal_start_teaches_nothing():
    behavior, rollout = make_behavior(), make_trajectory()
    cont = torch.full((H + 1, N), 0.99)
    cont[0, 2] = 1e-6
    losses, outs = behavior.losses(world(cont), rollout, {}, reward(torch.randn(H + 1, N)))
    assert (outs["weight"][:, 2] <= 1e-6).all() and (outs["weight"][:, 1] > 0.8).all()
    for name, loss in losses.items():
        assert loss[:, 2].abs().max() < 1e-4 < loss[:, 1].abs().mean(), name


def policy_gradient(behavior, *args):
    losses, outs = behavior.losses(*args)
    grads = torch.autograd.grad(losses["policy"].mean(), behavior.actor.parameters())
    return torch.cat([grad.flatten() for grad in grads]), outs


@pytest.mark.parametrize("spec", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_the_policy_gradient_does_not_depend_on_the_scale_of_large_returns(spec):
    rewards, trajectory = torch.randn(H + 1, N), make_trajectory(spec)
    small, outs = policy_gradient(make_behavior(spec), world(0.99), trajectory, {}, reward(1e3 * rewards))
    large, other = policy_gradient(make_behavior(spec), world(0.99), trajectory, {}, reward(1e5 * rewards))
    assert outs["ret_scale"] > 1 and other["ret_scale"] / outs["ret_scale"] == pytest.approx(100, rel=1e-4)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-6 * float(small.abs().max()))
    assert small.abs().max() > 0


def test_small_returns_are_not_blown_up():
    _, outs = make_behavior().losses(world(0.99), make_trajectory(), {}, reward(0.01 * torch.randn(H + 1, N)))
    assert outs["ret_scale"] == 1
    torch.testing.assert_close(outs["adv"], outs["ret"])


@pytest.mark.parametrize("spec", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_the_policy_loss_is_reinforce_with_the_entropy_inside_the_weights(spec):
    behavior, rollout = make_behavior(spec, "--actor.entropy", "0.5"), make_trajectory(spec)
    cont = torch.rand(H + 1, N)
    losses, outs = behavior.losses(world(cont), rollout, {}, reward(torch.randn(H + 1, N)))
    policy = behavior.actor(rollout.feat[:-1])
    logpi, entropy = policy.log_prob(rollout.actions), policy.entropy()
    expected = -cont.cumprod(0)[:-1] * (logpi * outs["adv"] + 0.5 * entropy)
    torch.testing.assert_close(losses["policy"], expected)
    bonus, _ = behavior.losses(world(cont), rollout, {}, reward(0.0))  # no advantage: entropy remains
    torch.testing.assert_close(bonus["policy"], -cont.cumprod(0)[:-1] * 0.5 * entropy)


def test_a_good_action_becomes_more_likely():
    behavior, rollout = make_behavior(DISCRETE), make_trajectory(DISCRETE)
    rewards = torch.zeros(H + 1, N)
    rewards[1, 0] = 1.0  # for the first action of the first trajectory
    losses, outs = behavior.losses(world(0.99), rollout, {}, reward(rewards))
    assert outs["adv"][0, 0] == pytest.approx(1) and not outs["adv"].flatten()[1:].any()
    optimizer = torch.optim.SGD(behavior.actor.parameters(), lr=1.0)
    losses["policy"].sum().backward()
    optimizer.step()
    _, after = behavior.losses(world(0.99), rollout, {}, reward(rewards))
    assert after["logpi"][0, 0] > outs["logpi"][0, 0]


def test_the_value_loss_pulls_to_the_return_and_to_the_slow_critic():
    behavior, rollout = make_behavior(), make_trajectory()
    behavior.slow.out.bias.data[21] = 100.0  # it predicts e - 1 everywhere, the critic is uniform over 41 bins
    losses, _ = behavior.losses(world(1.0), rollout, {}, reward(0.0))
    assert losses["value"].flatten().tolist() == pytest.approx([2 * math.log(41)] * H * N)
    losses["value"].mean().backward()
    target = torch.zeros(41)
    target[20] = target[21] = 1.0  # return 0 and value e - 1, a whole unit each
    torch.testing.assert_close(behavior.critic.out.bias.grad, 2 / 41 - target, rtol=0, atol=1e-5)
    assert all(param.grad is None for param in behavior.slow.parameters())


def test_slow_critic_moves_by_two_percent():
    behavior = make_behavior()
    for param in behavior.critic.parameters():
        param.data.add_(1.0)
    before = [param.clone() for param in behavior.slow.parameters()]
    behavior.improve(None)
    for old, slow, fast in zip(before, behavior.slow.parameters(), behavior.critic.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.98 * old + 0.02 * fast)
    assert float(behavior.slow.out.bias[0]) == pytest.approx(0.02)
    behavior.improve(None)
    assert float(behavior.slow.out.bias[0]) == pytest.approx(0.02 + 0.02 * 0.98)


def test_slow_critic_can_move_at_every_other_update():
    behavior = make_behavior(BOX, "--critic.slow_every", "2", "--critic.slow_rate", "0.5")
    behavior.critic.out.bias.data.fill_(1.0)
    values = []
    for _ in range(4):
        behavior.improve(None)
        values.append(float(behavior.slow.out.bias[0]))
    assert values == [0.5, 0.5, 0.75, 0.75]


def test_return_norm_by_hand():
    norm = ReturnNorm(rate=0.01, limit=1.0, low=5.0, high=95.0)
    returns = torch.arange(101.0).view(101, 1)  # the percentiles of 0 ... 100 are 5 and 95
    offset, scale = norm(returns)
    assert (float(offset), float(scale)) == pytest.approx((0.05, 1.0))  # 0.95 - 0.05 is below the limit
    offset, scale = norm(returns)
    assert (float(offset), float(scale)) == pytest.approx((0.05 * 1.99, 0.9 * 1.99))


# ---------------------------------------------------------------------------
# Behavior on replayed sequences


def make_replayed(last=(0, 0, 0, 0), term=(0, 0, 0, 0)):
    states = State(torch.randn(1, 4, D), torch.eye(K)[torch.randint(K, (1, 4, S))])
    batch = {"is_last": torch.tensor([last]).bool(), "is_terminal": torch.tensor([term]).bool()}
    batch["reward"] = torch.tensor([[100.0, 1, 2, 4]])
    return states, batch, torch.tensor([[100.0, 10, 20, 40]])


def test_replayed_returns_by_hand():
    behavior = make_behavior(BOX, "--horizon", "2", "--lam", "0.5")  # discount and lambda are 1/2

    def replayed(**ends):
        states, batch, boot = make_replayed(**ends)
        losses = behavior.replay_losses(None, states, batch, {"ret": boot.view(1, 4)})
        return losses["repval"], behavior.replay_returns(batch, boot)

    loss, ret = replayed()
    assert ret.tolist() == [[6.75, 13, 24]]
    assert loss.shape == (1, 3) and loss.flatten().tolist() == pytest.approx([2 * math.log(41)] * 3)
    _, ret = replayed(last=(0, 0, 1, 0), term=(0, 0, 1, 0))
    assert ret.tolist() == [[4, 2, 24]]
    loss, ret = replayed(last=(0, 0, 1, 0))
    assert ret.tolist() == [[6.5, 12, 24]]
    assert loss[0, 2] == 0 and (loss[0, :2] > 1).all()  # what follows the last step is another episode


# ---------------------------------------------------------------------------
# World model

LATENT = OneHotLatent(groups=2, classes=2, unimix=0.0)
SURE, UNSURE = [20.0, 0.0], [0.0, 0.0]  # the KL of sure from unsure is log 2 = 0.693


def test_free_nats_clip_each_steps_sum_over_the_groups():
    post = torch.tensor([[UNSURE + UNSURE, SURE + UNSURE, SURE + SURE]], requires_grad=True)  # (B, T, S K)
    prior = torch.zeros(1, 3, 4, requires_grad=True)
    dyn, rep, kl = kl_losses(LATENT, LATENT.dist(post), LATENT.dist(prior), 1.0)
    log2 = math.log(2)
    assert kl.flatten().tolist() == pytest.approx([0, log2, 2 * log2], abs=1e-5)
    for loss in (dyn, rep):
        assert loss.flatten().tolist() == pytest.approx([1, 1, 2 * log2], abs=1e-5)
    (grad,) = torch.autograd.grad(dyn.sum(), prior)
    assert not grad[0, :2].any()  # below the free nats nothing pulls
    assert grad[0, 2].tolist() == pytest.approx([-0.5, 0.5, -0.5, 0.5])  # q - p


def test_each_kl_loss_moves_one_side_alone():
    post, prior = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    dyn, rep, _ = kl_losses(LATENT, LATENT.dist(post), LATENT.dist(prior), 0.0)
    torch.testing.assert_close(dyn, rep)
    for loss, moved, still in ((dyn, prior, post), (rep, post, prior)):
        ours, none = torch.autograd.grad(loss.sum(), (moved, still), retain_graph=True, allow_unused=True)
        assert ours.abs().max() > 0 and (none is None or not none.any())


def make_world(kind="mixed"):
    return shake(make_agent(kind)).world


def observed(world, batch, **changes):
    """Return losses and states of the world model on a batch with some entries changed, with the same noise."""
    noise = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    return world_losses(world, {**batch, **changes}, noise)


def make_world_batch(agent, kind="mixed"):
    batch = make_batch(kind)
    batch["is_first"] = torch.zeros(3, 5, dtype=torch.bool)
    return {**batch, "action": agent.act_spec.join(batch)}


def test_time_alignment():
    # action[t] led to step t; reward[t] and is_terminal[t] are predicted from the state of step t.
    agent = shake(make_agent("mixed"))
    batch = make_world_batch(agent)
    losses, states = observed(agent.world, batch)
    action, term, rewards = (batch[key].clone() for key in ("action", "is_terminal", "reward"))
    action[:, 2] = 1 - action[:, 2]
    _, other = observed(agent.world, batch, action=action)
    assert torch.equal(states.deter[:, :2], other.deter[:, :2])
    assert (states.deter[:, 2] != other.deter[:, 2]).any(-1).all()
    term[:, 2], rewards[:, 2] = ~term[:, 2], rewards[:, 2] + 1
    changed, same = observed(agent.world, batch, is_terminal=term, reward=rewards)
    assert torch.equal(states.deter, same.deter)
    for name in ("cont", "reward"):
        assert (losses[name] != changed[name]).any(0).tolist() == [False, False, True, False, False]


def test_the_continuation_target_holds_the_discount():
    agent = make_agent("proprio", "--horizon", "4")
    for param in agent.world.cont.out.parameters():
        param.data.zero_()
    agent.world.cont.out.bias.data.fill_(math.log(3))  # probability 3/4, which is also 1 - 1/4
    batch = make_world_batch(agent, "proprio")
    batch["is_terminal"][:] = torch.tensor([0, 0, 1, 0, 0]).bool()
    losses, _ = observed(agent.world, batch)
    alive = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert losses["cont"][0].tolist() == pytest.approx([alive, alive, -math.log(0.25), alive, alive])


def test_a_step_is_explained_by_itself_and_the_past():
    agent = shake(make_agent("mixed"))
    batch = make_world_batch(agent)
    losses, _ = observed(agent.world, batch)
    image = batch["image"].clone()
    image[:, 3] = 255 - image[:, 3]
    changed, _ = observed(agent.world, batch, image=image)
    for name in losses:
        assert torch.equal(losses[name][:, :3], changed[name][:, :3]), name
    assert (losses["image"][:, 3] != changed["image"][:, 3]).all()


def test_open_loop_sees_the_context_and_then_only_actions():
    agent = shake(make_agent("mixed"), 1.0)
    batch, state = make_world_batch(agent), initial(agent)

    def predict(**changes):
        torch.manual_seed(0)
        return agent.world.open_loop({**batch, **changes}, state, 2)["image"]

    video = predict()
    assert agent.world.open_loop(batch, state, 2).keys() >= {"image", "state"} and video.shape == (3, 5, 16, 32, 3)
    assert video.min() >= 0 and video.max() <= 1
    image, action = batch["image"].clone(), batch["action"].clone()
    image[:, 2:] = 0
    assert torch.equal(predict(image=image), video)
    image[:, 1] = 0
    other = predict(image=image)
    assert torch.equal(other[:, 0], video[:, 0]) and not torch.equal(other[:, 1], video[:, 1])
    action[:, 3] = 1 - action[:, 3]
    other = predict(action=action)
    assert torch.equal(other[:, :3], video[:, :3]) and not torch.equal(other[:, 3], video[:, 3])


def test_open_loop_starts_with_the_reconstruction():
    agent = shake(make_agent("mixed"))
    batch, state = make_world_batch(agent), initial(agent)
    torch.manual_seed(0)
    video = agent.world.open_loop(batch, state, 3)["image"]
    torch.manual_seed(0)
    seen = (agent.world.encode(batch)[:, :3], batch["action"][:, :3], batch["is_first"][:, :3], state)
    states, _ = agent.world.rssm.observe(*seen)
    torch.testing.assert_close(video[:, :3], agent.world.decoder(states)["image"].mode())


# ---------------------------------------------------------------------------
# Both


def gradients(loss, module):
    """Return {name: gradient} of the parameters that a loss reaches."""
    named = dict(module.named_parameters())
    trained = {name: param for name, param in named.items() if param.requires_grad}
    grads = torch.autograd.grad(loss.mean(), trained.values(), retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(trained, grads, strict=True) if grad is not None and grad.any()}


@pytest.mark.parametrize("kind", ["proprio", "pixels"])
def test_which_loss_reaches_what(kind):
    agent = shake(make_agent(kind))
    losses, _, _ = agent.loss(make_batch(kind), initial(agent))
    reached = {name: gradients(loss, agent.nets) for name, loss in losses.items()}
    names = {name for name, param in agent.nets.named_parameters() if param.requires_grad}
    part = {prefix: {name for name in names if name.startswith(prefix)} for prefix in PARTS}
    assert reached["policy"] == part["behavior.actor"]
    assert reached["value"] == part["behavior.critic"]
    filter_ = part["world.encoder"] | part["world.rssm.cell"] | part["world.rssm.posterior"]
    assert reached["repval"] == part["behavior.critic"] | filter_  # the replayed critic shapes the representation
    assert reached["reward"] == part["world.reward"] | filter_
    assert reached["cont"] == part["world.cont"] | filter_
    assert reached["rep"] == filter_
    assert part["world.rssm.prior"] <= reached["dyn"] <= part["world.rssm.prior"] | filter_
    assert not any(name.startswith("behavior.slow") for name in names)


PARTS = (
    "behavior.actor",
    "behavior.critic",
    "world.encoder",
    "world.rssm.cell",
    "world.rssm.posterior",
    "world.rssm.prior",
    "world.reward",
    "world.cont",
)


def test_imagination_starts_from_every_step_of_the_batch():
    agent, batch = shake(make_agent("proprio")), make_batch("proprio")
    starts, rollout = [], agent.behavior.rollout
    agent.behavior.rollout = lambda world, states: starts.append(rollout(world, states)) or starts[0]
    _, states, outs = agent.loss(batch, initial(agent))
    first = starts[0].states.map(lambda x: x[0])
    assert torch.equal(first.deter, states.deter.flatten(0, 1)) and not first.deter.requires_grad
    assert outs["imagined"]["ret"].shape == (5, 15)  # the debug preset imagines five steps, from 3 x 5 states


def test_the_world_model_takes_its_dtype():
    agent = make_agent("mixed")
    torch.manual_seed(0)
    world = WorldModel(agent.obs_spec, agent.act_spec, make_config(), torch.bfloat16)
    losses, states = observed(world, make_world_batch(agent))
    assert states.deter.dtype == torch.bfloat16
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite().all() for loss in losses.values())


def test_a_horizon_of_one_step_discounts_all_that_follows():
    agent = make_agent("proprio", "--horizon", "1")
    _, metrics = agent.update(make_batch("proprio"), initial(agent))
    assert torch.isfinite(metrics["loss"]) and all(torch.isfinite(param).all() for param in agent.nets.parameters())
    assert (agent.world.discounts(torch.randn(4, agent.world.feat_size)) == 0).all()
