"""The compiled update is the eager one: same numbers, same checkpoints, and it is really compiled."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import machine
from tests.test_agent import make_agent, make_batch, make_obs, shake
from tools import UserError


def update(agent, batch):
    """The losses and gradients of one update from fixed random numbers."""
    torch.manual_seed(7)
    state = agent.world.rssm.initial(len(batch["reward"]), "cpu")
    agent.opt.zero_grad()
    losses, _, _ = agent.loss(batch, state)
    agent.reduce(losses).backward()
    return {name: loss.detach() for name, loss in losses.items()}, agent.opt.grad.clone()


def test_compiled_update_equals_eager_update():
    eager, compiled = shake(make_agent("proprio", "--imag_horizon", "2")), make_agent("proprio", "--imag_horizon", "2")
    compiled.load(eager.save())
    compiled.compile()
    batch = make_batch("proprio")
    counters.clear()
    expected_losses, expected_grad = update(eager, batch)
    assert not counters["stats"]
    losses, grad = update(compiled, batch)
    assert counters["stats"]["unique_graphs"] >= 4  # a step of each scan, the policy and the behaviour's loss
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-4, atol=1e-5)
    assert (grad - expected_grad).abs().max() <= 1e-4 * expected_grad.abs().max()

    graphs = counters["stats"]["unique_graphs"]
    update(compiled, batch)
    compiled.act(make_obs("proprio", count=2))  # another batch size and mode: acting must not compile anything
    assert counters["stats"]["unique_graphs"] == graphs

    assert list(compiled.state_dict()) == list(eager.state_dict())  # no name tells that it was compiled
    eager.load(compiled.save())


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"g\+\+.*--compile false"):
        machine.check_compiler()
