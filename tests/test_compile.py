"""The compiled update equals the eager one, in numbers and checkpoints, and is really compiled."""

import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from agents.dreamer import compile_rest
from tests.factories import act, initial, make_batch, make_obs
from tests.factories import family_agent as make_agent
from tests.factories import make_agent as make_small
from tools import UserError
from training import machine


def update(agent, batch):
    """Return the losses and gradients of one update with fixed random numbers."""
    torch.manual_seed(7)
    agent.opt.zero_grad()
    losses, _, _ = agent.loss(batch, initial(agent, len(batch["reward"])))
    agent.total(losses).backward()
    grads = {name: param.grad.clone() for name, param in agent.nets.named_parameters() if param.requires_grad}
    return {name: loss.detach() for name, loss in losses.items()}, grads


# Dreamer's actor has its gradient through the compiled steps of the scan.
@pytest.mark.parametrize("version", ["dreamerv3", "dreamerv2", "dreamerv1"])
def test_compiled_update_equals_eager_update(version, monkeypatch):
    eager, compiled = (make_agent(version, "proprio", {"imag_horizon": 2}, seed) for seed in (0, 1))
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_parts()
    if version == "dreamerv3":  # what a GPU compiles besides, here without the minute of the C++ compiler
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
            compile_rest(compiled)
    batch = make_batch("proprio")
    counters.clear()
    expected_losses, expected_grads = update(eager, batch)
    assert not counters["stats"]
    losses, grads = update(compiled, batch)
    assert counters["stats"]["unique_graphs"] >= 4  # a step of each scan, the policy and the behavior's losses
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() > 0, name

    graphs = counters["stats"]["unique_graphs"]
    update(compiled, batch)
    act(compiled, make_obs("proprio", count=2))  # another batch size and mode: evaluations must not compile anything
    assert counters["stats"]["unique_graphs"] == graphs

    assert list(compiled.nets.state_dict()) == list(eager.nets.state_dict())  # names are not changed by compilation
    eager.load_state_dict(compiled.state_dict())


@pytest.mark.parametrize("version, stored", [("dreamerv3", True), ("dreamerv1", False)])
def test_compiled_acting_to_collect_equals_eager_acting_and_draws_the_same(version, stored, monkeypatch):
    if not stored:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    agents, states = [make_agent(version, "proprio", {"expl_noise": 0.1}) for _ in range(2)], []
    agents[1].compile_parts()
    counters.clear()
    for agent in agents:
        obs, carry = make_obs("proprio", count=2), agent.initial(2)
        for _ in range(3):
            actions, carry, kept = agent.act(obs, carry, "noisy")
        assert (kept is not None) == stored
        states.append((actions, carry.state.deter, agent.generators["act"].get_state()))
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*([actions, deter] for actions, deter, _ in states), rtol=1e-4, atol=1e-5)
    assert torch.equal(states[0][2], states[1][2])


def test_an_encoder_that_reads_and_hears_is_one_graph():
    world, batch = make_small("told", "--encoder.fusion", "attention").world, make_batch("told")
    prepared = world.prepare(batch)
    counters.clear()
    with torch.no_grad():
        found = torch.compile(world.encode, backend="eager", fullgraph=True, dynamic=False)(prepared)
        torch.testing.assert_close(found, world.encode(prepared))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"g\+\+.*--compile false"):
        machine.check_compiler()
