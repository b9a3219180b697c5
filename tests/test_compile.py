"""The compiled update is the eager one: same numbers, same checkpoints, and it is really compiled."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from tests.test_agent import make_batch, make_obs
from tests.test_family import make_agent
from tools import UserError
from training import machine


def update(agent, batch):
    """The losses and gradients of one update from fixed random numbers."""
    torch.manual_seed(7)
    state = agent.world.rssm.initial(len(batch["reward"]), "cpu")
    agent.opt.zero_grad()
    losses, _, _ = agent.loss(batch, state)
    agent.reduce(losses).backward()
    grads = {name: param.grad.clone() for name, param in agent.named_parameters() if param.requires_grad}
    return {name: loss.detach() for name, loss in losses.items()}, grads


# Dreamer's actor has its gradient through the compiled steps of the scan.
@pytest.mark.parametrize("version", ["dreamerv3", "dreamerv1"])
def test_compiled_update_equals_eager_update(version):
    eager, compiled = (make_agent(version, "proprio", {"imag_horizon": 2}, seed) for seed in (0, 1))
    compiled.load(eager.save())
    compiled.compile()
    batch = make_batch("proprio")
    counters.clear()
    expected_losses, expected_grads = update(eager, batch)
    assert not counters["stats"]
    losses, grads = update(compiled, batch)
    assert counters["stats"]["unique_graphs"] >= 4  # a step of each scan, the policy and the behaviour's loss
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() > 0, name

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
