import copy
import io
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.utils._python_dispatch import TorchDispatchMode

from agents.dreamer import Dreamer
from networks import feature
from specs import act_spec, obs_spec
from tools import UserError
from training.config import load_config

torch.set_num_threads(1)  # these networks are tiny: a second thread only waits for the first

CONFIGS = pathlib.Path(__file__).parents[1] / "configs.yaml"
IMAGE = Box(0, 255, (16, 32, 3), np.uint8)
WALKER = {"orientations": Box(-1, 1, (14,)), "height": Box(-9, 9, (1,)), "velocity": Box(-9, 9, (9,))}
SPACES = {
    "proprio": (WALKER, {"action": Box(-1, 1, (6,))}),
    "pixels": ({"image": IMAGE}, {"action": Discrete(5)}),
    "mixed": (
        {"phase": Discrete(3), "image": IMAGE, "state": Box(-1, 1, (2,)), "cards": MultiDiscrete([2, 4])},
        {"move": Box(-1, 1, (2,)), "mode": Discrete(3), "buttons": MultiDiscrete([2, 3])},
    ),
}


def make_config(*flags):
    """Tiny sizes; warmed up after one update, and without free nats, so that every parameter has a gradient."""
    return load_config(["--configs", "debug", "--opt.warmup", "1", "--free_nats", "0", *flags], CONFIGS)


def make_agent(kind, *flags, seed=0):
    torch.manual_seed(seed)
    return Dreamer(*SPACES[kind], make_config(*flags))


def shake(agent, scale=0.1):
    """Move the parameters away from their initial values, where critic and reward do not depend on the state."""
    with torch.no_grad():
        for param in agent.parameters():
            param.add_(scale * torch.randn_like(param))
    return agent


def make_batch(kind, size=(3, 5), seed=0):
    """A batch as the replay gives it, of random contents, with episodes that end and begin."""
    rng = np.random.default_rng(seed)

    def draw(space):
        if isinstance(space, Box) and space.dtype == np.uint8:
            return rng.integers(0, 256, (*size, *space.shape), np.uint8)
        if isinstance(space, Box):
            return rng.uniform(-1, 1, (*size, *space.shape)).astype(np.float32)
        count = space.n if isinstance(space, Discrete) else space.nvec
        return rng.integers(count, size=(*size, *space.shape)).astype(np.int32)

    def one_hot(space, value):
        if isinstance(space, Box):
            return value
        counts = [space.n] if isinstance(space, Discrete) else space.nvec
        parts = zip(value.reshape(*size, -1).transpose(2, 0, 1), counts, strict=True)
        return np.concatenate([np.eye(n, dtype=np.float32)[part] for part, n in parts], -1)

    obs_space, act_space = SPACES[kind]
    batch = {key: draw(space) for key, space in obs_space.items()}
    batch |= {key: one_hot(space, draw(space)) for key, space in act_space.items()}
    batch["reward"] = rng.normal(size=size).astype(np.float32)
    batch["is_last"] = rng.random(size) < 0.2
    batch["is_terminal"] = batch["is_last"] & (rng.random(size) < 0.5)
    batch["is_first"] = np.concatenate([rng.random((size[0], 1)) < 0.5, batch["is_last"][:, :-1]], 1)
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def make_obs(kind, count=3, is_first=False, seed=0):
    """Observations of `count` environments, as arrays."""
    batch = make_batch(kind, (count, 1), seed)
    obs = {key: batch[key][:, 0].numpy() for key in SPACES[kind][0]}
    return {**obs, "is_first": np.full(count, is_first)}


def parameters(agent):
    return {name: param.detach().clone() for name, param in agent.named_parameters()}


# ---------------------------------------------------------------------------
# What the spaces say


def test_specs_follow_the_spaces():
    spec = obs_spec({**SPACES["mixed"][0], "map": Box(0, 255, (4, 4), np.uint8), "height": Box(-1, 1, ())})
    assert spec.images == {"image": (16, 32, 3)}
    assert spec.vectors == {"phase": (1,), "state": (2,), "cards": (2,), "map": (16,), "height": (1,)}
    assert spec.classes == {"phase": [3], "cards": [2, 4]}
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
    losses, states, _ = agent.loss(batch, agent.world.rssm.initial(3, "cpu"))
    shapes = {name: tuple(loss.shape) for name, loss in losses.items()}
    assert shapes.pop("repval") == (3, 4)  # the last step has no successor
    assert shapes.keys() == {*SPACES[kind][0], "reward", "cont", "dyn", "rep", "policy", "value"}
    assert set(shapes.values()) == {(3, 5)}
    assert states.deter.shape == (3, 5, 32) and states.stoch.shape == (3, 5, 4, 4)


@pytest.mark.parametrize("kind", SPACES)
def test_updates_move_every_parameter(kind):
    agent, batch = make_agent(kind), make_batch(kind)
    state, initial = agent.world.rssm.initial(3, "cpu"), parameters(agent)
    _, metrics = agent.update(batch, state)
    assert metrics["lr"] == 0  # warm-up begins at zero
    assert all(torch.equal(param, initial[name]) for name, param in agent.named_parameters())
    for _ in range(2):  # one for the output layers that start at zero, one for what lies behind them
        states, metrics = agent.update(batch, state)
    still = [name for name, param in agent.named_parameters() if torch.equal(param, initial[name])]
    assert still == []
    assert {name: value for name, value in metrics.items() if value.shape or not value.isfinite()} == {}
    assert not states.deter.requires_grad and not states.stoch.requires_grad


def test_the_total_is_the_weighted_sum_of_the_means():
    agent = make_agent("proprio")
    names = {"height": 1, "reward": 1, "cont": 1, "dyn": 1, "rep": 0.1, "policy": 1, "value": 1, "repval": 0.3}
    for name, scale in names.items():
        assert float(agent.reduce({name: torch.tensor([1.0, 3.0])})) == pytest.approx(2 * scale)
    assert float(agent.reduce({"rep": torch.ones(2, 3), "repval": torch.ones(2, 2)})) == pytest.approx(0.4)


def test_learning_improves_the_model():
    agent, batch = make_agent("proprio", "--opt.lr", "1e-2"), make_batch("proprio")
    state = agent.world.rssm.initial(3, "cpu")
    first, *_, last = [agent.update(batch, state)[1]["model_loss"] for _ in range(15)]
    assert last < 0.9 * first


class Watch(TorchDispatchMode):
    """Records the operations that make the host wait for a number."""

    SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.found += [name] if by_mask or name in self.SYNCS else []
        self.count += 1
        return function(*args, **(kwargs or {}))


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
    state = agent.world.rssm.initial(3, "cpu")
    with Watch() as watch:
        agent.update(batch, state)
    assert watch.count > 1000 and watch.found == []


def test_updates_repeat_with_their_seed():
    results = []
    for seed in (1, 1, 2):
        agent = make_agent("mixed")
        torch.manual_seed(seed)
        results.append(agent.update(make_batch("mixed"), agent.world.rssm.initial(3, "cpu"))[1]["loss"])
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
    again, indices = agent.compress(state)
    assert np.array_equal(again, deter[:, 0]) and np.array_equal(indices[:2], stoch[:2, 0])


def test_open_loop_videos_show_truth_model_and_error():
    agent, batch = make_agent("mixed"), make_batch("mixed", (2, 6))
    video = agent.open_loop(batch, agent.world.rssm.initial(2, "cpu"))["image"]
    assert video.shape == (6, 3 * 16, 2 * 32, 3) and video.dtype == np.uint8
    truth, model, error = np.split(video.astype(int), 3, axis=1)
    side_by_side = torch.cat(list(batch["image"]), 2).numpy()
    assert np.abs(truth - side_by_side).max() <= 1
    assert np.abs(error - (model - truth + 255) / 2).max() <= 2


# ---------------------------------------------------------------------------
# Acting


@pytest.mark.parametrize("mode", ["sample", "mode"])
@pytest.mark.parametrize("kind", SPACES)
def test_actions_are_one_hots_and_bounded_means(kind, mode):
    agent = shake(make_agent(kind))
    actions, _ = agent.act(make_obs(kind, is_first=True), None, mode)
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
        actions, (state, _) = agent.act(make_obs("proprio", is_first=True), None, mode)
        policy = agent.behavior.actor(feature(state))
        assert np.array_equal(actions["action"], policy.mode().detach().numpy()) == (mode == "mode")


def test_act_remembers_the_state_and_the_action():
    agent = shake(make_agent("mixed"))
    actions, (state, action) = agent.act(make_obs("mixed", is_first=True))
    assert np.array_equal(action, np.concatenate([actions[key] for key in sorted(actions)], 1))
    assert state.deter.shape == (3, 32) and state.stoch.shape == (3, 4, 4)

    def deter(obs, memory):  # the recurrent state has no noise of its own step
        return agent.act(obs, memory)[1][0].deter

    other_state = (state.map(lambda x: x.flip(0)), action)
    other_action = (state, 1 - action)
    going_on = make_obs("mixed", seed=1)
    assert not torch.equal(deter(going_on, (state, action)), deter(going_on, other_state))
    assert not torch.equal(deter(going_on, (state, action)), deter(going_on, other_action))
    reset = {**going_on, "is_first": np.array([True, False, True])}
    fresh = deter({**going_on, "is_first": np.array([True] * 3)}, None)
    for memory in ((state, action), other_state, other_action):
        assert torch.equal(deter(reset, memory)[[0, 2]], fresh[[0, 2]])
    assert not torch.equal(deter(reset, (state, action))[1], fresh[1])


def test_acting_is_observing():
    # What `act` computes step by step is what learning computes from the stored steps: the same alignment of actions.
    agent = shake(make_agent("mixed"))
    memory, states, actions, steps = None, [], [], []
    for t in range(4):
        obs = make_obs("mixed", is_first=t == 0, seed=t)
        torch.manual_seed(t)
        chosen, memory = agent.act(obs, memory)
        steps.append(obs)
        actions.append(np.concatenate([chosen[key] for key in sorted(chosen)], 1))
        states.append(memory[0])
    batch = {key: torch.from_numpy(np.stack([step[key] for step in steps], 1)) for key in steps[0]}
    led = torch.from_numpy(np.stack([np.zeros_like(actions[0]), *actions[:-1]], 1))  # action[t] led to step t
    noise = []
    for t in range(4):
        torch.manual_seed(t)
        noise.append(agent.world.rssm.latent.noise((3, 1), "cpu"))
    args = agent.world.encode(batch), led, batch["is_first"], agent.world.rssm.initial(3, "cpu"), torch.cat(noise, 1)
    seen, _ = agent.world.rssm.observe(*args)
    torch.testing.assert_close(torch.stack([state.deter for state in states], 1), seen.deter)
    torch.testing.assert_close(torch.stack([state.stoch for state in states], 1), seen.stoch)


def test_latents_for_the_replay():
    agent = make_agent("proprio")
    _, memory = agent.act(make_obs("proprio", is_first=True))
    deter, stoch = agent.latents(memory)[1]
    assert np.array_equal(deter, memory[0].deter[1].half().numpy())
    assert np.array_equal(stoch, memory[0].stoch[1].argmax(-1).numpy()) and len(agent.latents(memory)) == 3


# ---------------------------------------------------------------------------
# Saving


def test_a_loaded_agent_learns_on_bit_for_bit():
    agent, other = make_agent("mixed", "--opt.lr", "1e-2"), make_agent("mixed", "--opt.lr", "1e-2", seed=1)
    batch, state = make_batch("mixed"), agent.world.rssm.initial(3, "cpu")
    for _ in range(3):
        agent.update(batch, state)
    file = io.BytesIO()
    torch.save(agent.save(), file)
    file.seek(0)
    other.load(torch.load(file, weights_only=True))
    results = []
    for learner in (agent, other):
        torch.manual_seed(5)
        _, metrics = learner.update(batch, state)
        results.append({**learner.state_dict(), **metrics, "nu": learner.opt.nu, "mu": learner.opt.mu})
    assert results[0].keys() == results[1].keys()
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []
    assert results[0]["behavior.updates"] == 4 and results[0]["behavior.return_norm.range"].any()


def test_a_loaded_agent_still_learns_through_the_flat_buffer():
    # Loading must fill the parameters in place: replaced ones would no longer be the views that the optimizer moves.
    agent = make_agent("proprio", "--opt.lr", "1e-2")
    agent.load(copy.deepcopy(agent.save()))
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
        agent.load(make_agent(kind, *flags).save())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert all(torch.equal(param, before[name]) for name, param in agent.named_parameters())


def test_another_action_space_is_refused_by_its_widths():
    obs_space = SPACES["proprio"][0]
    agents = [Dreamer(obs_space, {"action": Box(-1, 1, (n,))}, make_config()) for n in (6, 4)]
    with pytest.raises(UserError, match="action action is 4 there and 6 here"):
        agents[0].load(agents[1].save())


def test_an_observation_may_not_take_the_name_of_a_loss():
    with pytest.raises(UserError, match="observation value"):
        Dreamer({"value": Box(-1, 1, (2,))}, {"action": Discrete(2)}, make_config())
