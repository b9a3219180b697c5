import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete

from modalities import obs_spec
from rssm import feature
from specs import act_spec
from tests.factories import (
    SPACES,
    Watch,
    act,
    initial,
    make_agent,
    make_batch,
    make_config,
    make_dreamer,
    make_obs,
    parameters,
    shake,
)
from tools import UserError

# ---------------------------------------------------------------------------
# What the spaces say


def test_specs_follow_the_spaces():
    spec = obs_spec({**SPACES["mixed"][0], "map": Box(0, 9, (4, 4)), "height": Box(-1, 1, ())})
    assert {key: seen.shape for key, seen in spec.of("image").items()} == {"image": (16, 32, 3)}
    vectors = {key: seen.shape for key, seen in spec.of("vector").items()}
    assert vectors == {"phase": (1,), "state": (2,), "cards": (2,), "map": (16,), "height": (1,)}
    assert {key: seen.classes for key, seen in spec.items() if seen.classes} == {"phase": (3,), "cards": (2, 4)}
    assert type(spec).read(spec.plain()) == spec
    spec = act_spec(SPACES["mixed"][1])
    assert list(spec.widths.items()) == [("buttons", 5), ("mode", 3), ("move", 2)]  # sorted: this is the vector's order
    assert spec.classes == {"buttons": [2, 3], "mode": [3]}


@pytest.mark.parametrize(
    "flags, words",
    {
        ("--encoder.mults", "1,1,1,1,1", "--decoder.mults", "1,1,1,1,4"): "16x32",
        ("--rssm.deter", "30"): "rssm.deter 30",
        ("--decoder.depth", "3", "--decoder.blocks", "8"): "decoder.blocks 8",
    }.items(),
)
def test_sizes_that_no_network_can_have_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        make_agent("pixels", *flags)


# ---------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("kind", SPACES)
def test_losses_have_a_value_for_each_step(kind):
    agent, batch = make_agent(kind), make_batch(kind)
    losses, states, _ = agent.loss(batch, initial(agent))
    shapes = {name: tuple(loss.shape) for name, loss in losses.items()}
    assert shapes.pop("repval") == (3, 4)  # the last step has no successor
    assert shapes.keys() == {*SPACES[kind][0], "reward", "cont", "dyn", "rep", "policy", "value"}
    assert set(shapes.values()) == {(3, 5)}
    assert states.deter.shape == (3, 5, 32) and states.stoch.shape == (3, 5, 4, 4)


@pytest.mark.parametrize("kind", SPACES)
def test_updates_move_every_parameter(kind):
    agent, batch = make_agent(kind), make_batch(kind)
    state, start = initial(agent), parameters(agent)
    _, metrics = agent.update(batch, state)
    assert metrics["lr"] == 0  # warm-up begins at zero
    assert all(torch.equal(param, start[name]) for name, param in agent.nets.named_parameters())
    for _ in range(2):  # one for the output layers that start at zero, one for what lies behind them
        states, metrics = agent.update(batch, state)
    still = [name for name, param in agent.nets.named_parameters() if torch.equal(param, start[name])]
    assert still == []
    assert {name: value for name, value in metrics.items() if value.shape or not value.isfinite()} == {}
    assert not states.deter.requires_grad and not states.stoch.requires_grad


def test_the_total_is_the_weighted_sum_of_the_means():
    agent = make_agent("proprio")
    names = {"height": 1, "reward": 1, "cont": 1, "dyn": 1, "rep": 0.1, "policy": 1, "value": 1, "repval": 0.3}
    for name, scale in names.items():
        assert float(agent.total({name: torch.tensor([1.0, 3.0])})) == pytest.approx(2 * scale)
    assert float(agent.total({"rep": torch.ones(2, 3), "repval": torch.ones(2, 2)})) == pytest.approx(0.4)


def test_learning_improves_the_model():
    agent, batch = make_agent("proprio", "--opt.lr", "1e-2"), make_batch("proprio")
    state = initial(agent)
    first, *_, last = [agent.update(batch, state)[1]["model_loss"] for _ in range(15)]
    assert last < 0.9 * first


def test_the_watch_sees_what_it_shall_see():
    x = torch.ones(3)
    for sync in (lambda: x[0].item(), lambda: bool(x.sum() > 1), lambda: x[x > 0], lambda: float(x[1])):
        with Watch() as watch:
            sync()
        assert watch.found


@pytest.mark.parametrize("kind", SPACES)
def test_an_update_never_waits_for_a_number(kind, monkeypatch):
    # On CPU, and only there, F.one_hot reads the range of its indices in order to check it.
    monkeypatch.setattr(F, "one_hot", lambda index, size: index[..., None] == torch.arange(size))
    agent, batch = make_agent(kind), make_batch(kind)
    state = initial(agent)
    with Watch() as watch:
        agent.update(batch, state)
    assert watch.count > 1000 and watch.found == []


def test_updates_repeat_with_their_seed():
    results = []
    for seed in (1, 1, 2):
        agent = make_agent("mixed")
        torch.manual_seed(seed)
        results.append(agent.update(make_batch("mixed"), initial(agent))[1]["loss"])
    assert results[0] == results[1] != results[2]


def test_batch_turns_arrays_and_stored_latents_into_tensors():
    agent = make_agent("proprio")
    arrays = {key: value.numpy() for key, value in make_batch("proprio").items()}
    deter = np.random.default_rng(0).normal(size=(3, 5, 32)).astype(np.float16)
    deter[2] = 0  # a sequence that no agent has seen
    stoch = np.full((3, 5, 4), 2, np.uint8)
    batch, state = agent.batch({**arrays, "deter": deter, "stoch": stoch})
    assert all(np.array_equal(batch[key].numpy(), arrays[key][:, 1:]) for key in arrays)  # the context step is gone
    assert np.array_equal(state.deter.numpy(), deter[:, 0])
    assert state.stoch[:2].argmax(-1).unique().tolist() == [2] and (state.stoch[:2].sum(-1) == 1).all()
    assert not state.stoch[2].any()
    again = agent.world.rssm.pack(state)
    assert np.array_equal(again["deter"], deter[:, 0]) and np.array_equal(again["stoch"][:2], stoch[:2, 0])


def test_open_loop_videos_show_truth_model_and_error():
    agent, batch = make_agent("mixed"), make_batch("mixed", (2, 6))
    shown = agent.report(batch, 3)
    assert shown.keys() == agent.obs_spec.keys() > {"image"}
    for key in shown.keys() - {"image"}:
        (curves,) = shown[key]
        assert curves.shape[:2] == (2, 6) and curves.shape[-1] == 3 and curves.dtype == np.uint8
    assert all(panel.shape == (2, 6, 16, 32, 3) and panel.dtype == np.uint8 for panel in shown["image"])
    truth, model, error = (panel.astype(int) for panel in shown["image"])
    assert np.abs(truth - batch["image"].numpy()).max() <= 1
    assert np.abs(error - (model - truth + 255) / 2).max() <= 2


# ---------------------------------------------------------------------------
# Acting


@pytest.mark.parametrize("mode", ["sample", "mode"])
@pytest.mark.parametrize("kind", SPACES)
def test_actions_are_one_hots_and_bounded_means(kind, mode):
    agent = shake(make_agent(kind))
    actions, _ = act(agent, make_obs(kind, is_first=True), None, mode)
    assert actions.keys() == SPACES[kind][1].keys()
    for key, space in SPACES[kind][1].items():
        action = actions[key]
        assert action.dtype == np.float32 and action.shape == (3, agent.act_spec.widths[key])
        if isinstance(space, Box):  # a sample is a plain normal draw: the environment clips it
            assert np.isfinite(action).all() and (mode == "sample" or np.abs(action).max() <= 1)
            continue
        counts = [space.n] if isinstance(space, Discrete) else space.nvec
        for part in np.split(action, np.cumsum(counts)[:-1], axis=1):
            assert np.array_equal(np.sort(part, 1)[:, :-1], np.zeros((3, part.shape[1] - 1)))
            assert np.array_equal(part.max(1), np.ones(3))


def test_the_mode_is_the_policys_and_a_sample_is_not():
    agent = shake(make_agent("proprio"))
    for mode in ("mode", "sample"):
        actions, carry = act(agent, make_obs("proprio", is_first=True), None, mode)
        policy = agent.behavior.actor(feature(carry.state))
        assert np.array_equal(actions["action"], policy.mode().detach().numpy()) == (mode == "mode")


def test_act_remembers_the_state_and_the_action():
    agent = shake(make_agent("mixed"))
    actions, carry = act(agent, make_obs("mixed", is_first=True))
    state, action = carry.state, carry.action
    assert np.array_equal(action, np.concatenate([actions[key] for key in sorted(actions)], 1))
    assert state.deter.shape == (3, 32) and state.stoch.shape == (3, 4, 4)

    def deter(obs, carry):  # the recurrent state has no noise of its own step
        return act(agent, obs, carry)[1].state.deter

    other_state = carry._replace(state=state.map(lambda x: x.flip(0)))
    other_action = carry._replace(action=1 - action)
    going_on = make_obs("mixed", seed=1)
    assert not torch.equal(deter(going_on, carry), deter(going_on, other_state))
    assert not torch.equal(deter(going_on, carry), deter(going_on, other_action))
    reset = {**going_on, "is_first": np.array([True, False, True])}
    fresh = deter({**going_on, "is_first": np.array([True] * 3)}, None)
    for before in (carry, other_state, other_action):
        assert torch.equal(deter(reset, before)[[0, 2]], fresh[[0, 2]])
    assert not torch.equal(deter(reset, carry)[1], fresh[1])


def test_acting_is_observing():
    # What `act` computes step by step is what learning computes from the stored steps: the same alignment of actions.
    agent = shake(make_agent("mixed"))
    carry, states, actions, steps = None, [], [], []
    for t in range(4):
        obs = make_obs("mixed", is_first=t == 0, seed=t)
        chosen, carry = act(agent, obs, carry, seed=t)
        steps.append(obs)
        actions.append(np.concatenate([chosen[key] for key in sorted(chosen)], 1))
        states.append(carry.state)
    batch = {key: torch.from_numpy(np.stack([step[key] for step in steps], 1)) for key in steps[0]}
    led = torch.from_numpy(np.stack([np.zeros_like(actions[0]), *actions[:-1]], 1))  # action[t] led to step t
    noise = []
    for t in range(4):
        torch.manual_seed(t)
        noise.append(agent.world.rssm.latent.noise((3, 1), "cpu"))
    args = agent.world.encode(batch), led, batch["is_first"], initial(agent), torch.cat(noise, 1)
    seen, _ = agent.world.rssm.observe(*args)
    torch.testing.assert_close(torch.stack([state.deter for state in states], 1), seen.deter)
    torch.testing.assert_close(torch.stack([state.stoch for state in states], 1), seen.stoch)


def test_latents_for_the_replay():
    agent = make_agent("proprio")
    obs, carry = make_obs("proprio", is_first=True), agent.initial(3)
    assert agent.act(obs, carry, "sample")[2] is None  # nothing is collected
    _, carry, stored = agent.act(obs, carry, "noisy")
    assert np.array_equal(stored["deter"], carry.state.deter.half().numpy())
    assert np.array_equal(stored["stoch"], carry.state.stoch.argmax(-1).numpy())
    layout = {key: (value.shape[1:], value.dtype) for key, value in stored.items()}
    assert layout == {"deter": ((32,), np.float16), "stoch": ((4,), np.int64)}
    assert agent.stored == layout | {"stoch": ((4,), np.uint8)}


# ---------------------------------------------------------------------------
# Saving


def test_a_loaded_agent_learns_on_bit_for_bit():
    agent, other = make_agent("mixed", "--opt.lr", "1e-2"), make_agent("mixed", "--opt.lr", "1e-2", seed=1)
    batch, state = make_batch("mixed"), initial(agent)
    for _ in range(3):
        agent.update(batch, state)
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    results = []
    for learner in (agent, other):
        torch.manual_seed(5)
        _, metrics = learner.update(batch, state)
        results.append({**learner.nets.state_dict(), **metrics, "nu": learner.opt.nu, "mu": learner.opt.mu})
    assert results[0].keys() == results[1].keys()
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []
    assert results[0]["behavior.updates"] == 4 and results[0]["behavior.return_norm.range"].any()


def test_a_loaded_agent_still_learns_through_the_flat_buffer():
    # Loading must fill the parameters in place: replaced ones would no longer be the views that the optimizer moves.
    agent = make_agent("proprio", "--opt.lr", "1e-2")
    agent.load_state_dict(copy.deepcopy(agent.state_dict()))
    flat = torch.cat([param.detach().flatten() for param in agent.opt.params])
    assert torch.equal(agent.opt.flat, flat)
    agent.opt.flat.add_(1)
    assert torch.equal(torch.cat([param.detach().flatten() for param in agent.opt.params]), flat + 1)


@pytest.mark.parametrize(
    "flags, kind, words",
    [
        (("--rssm.deter", "64"), "proprio", ("(64, 16) there", "(32, 16) here")),
        (("--actor.units", "24"), "proprio", (", 24)", ", 16)")),
        ((), "pixels", ("orientations is absent there", "(14,) here")),
    ],
)
def test_the_checkpoint_of_another_agent_is_refused_with_both_shapes(flags, kind, words):
    agent = make_agent("proprio")
    before = parameters(agent)
    with pytest.raises(UserError) as caught:
        agent.load_state_dict(make_agent(kind, *flags).state_dict())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert all(torch.equal(param, before[name]) for name, param in agent.nets.named_parameters())


def test_another_action_space_is_refused_by_its_widths():
    obs_space = SPACES["proprio"][0]
    agents = [make_dreamer(obs_space, {"action": Box(-1, 1, (n,))}, make_config()) for n in (6, 4)]
    with pytest.raises(UserError, match="action action is 4 there and 6 here"):
        agents[0].load_state_dict(agents[1].state_dict())


@pytest.mark.parametrize("name", ["value", "model", "embed", "dyn", "deter"])
def test_an_observation_may_not_take_the_name_of_a_loss(name):
    with pytest.raises(UserError, match=f"observation {name}"):
        make_dreamer({name: Box(-1, 1, (2,))}, {"action": Discrete(2)}, make_config())


def test_an_explorers_loss_may_not_replace_an_observations():
    agent = make_agent("proprio", "--expl_behavior", "plan2explore")
    agent.explorer.losses = lambda world, states, batch: ({"height": batch["reward"]}, {})
    with pytest.raises(UserError, match="observation height"):
        agent.loss(make_batch("proprio"), initial(agent))
