"""Gradient checkpointing: the same update from less that is kept."""

import pytest
import torch

import ops.remat
from agents.dreamer import remat_parts
from models import frozen
from ops.layers import MLP
from ops.random import drawing_from
from ops.remat import rematerialize
from tests.factories import family_agent, initial, make_sequences


class Kept:
    """Counts the bytes of distinct memory that autograd keeps for the backward pass."""

    def __init__(self):
        self.sizes = {}

    def note(self, tensor):
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self):
        return sum(self.sizes.values())


def update(agent, batch):
    """Return losses and gradients of one update with fixed random numbers, and the bytes kept for its backward pass."""
    agent.opt.zero_grad()
    kept = Kept()
    with drawing_from(torch.Generator().manual_seed(3)):
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            losses, _, _ = agent.loss(batch, initial(agent))
            total = agent.total(losses)
        total.backward()
    found = {f"loss {name}": loss.detach() for name, loss in losses.items()}
    found |= {name: param.grad.clone() for name, param in agent.nets.named_parameters() if param.grad is not None}
    return found, kept.total


# Dreamer's actor has its gradient through the world model, whose heads are frozen then.
@pytest.mark.parametrize("version, kind", [("dreamerv3", "pixels"), ("dreamerv1", "proprio"), ("dreamerv3", "told")])
def test_losses_and_gradients_are_equal_and_less_is_kept(version, kind, monkeypatch):
    plain, batch = family_agent(version, kind), make_sequences(kind)
    names, (expected, much) = list(plain.nets.state_dict()), update(plain, batch)
    equal = 3e-7 if kind == "told" else 0  # what the decoder of sounds rounds otherwise where no gradient is kept
    for chunks, rounding in ((1, equal), (ops.remat.CHUNKS, 3e-5)):  # of sums over parts of the batch
        monkeypatch.setattr(ops.remat, "CHUNKS", chunks)
        remat = family_agent(version, kind)
        remat_parts(remat)
        assert list(remat.nets.state_dict()) == names
        found, less = update(remat, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= rounding * value.abs().max(), name
    assert less < (0.6 if kind == "pixels" else 0.9) * much


def test_parameters_that_others_stand_in_for_or_that_are_frozen_have_their_own_gradients():
    torch.manual_seed(0)
    plain, remat, x = MLP(3, 1, 4), MLP(3, 1, 4), torch.randn(5, 3)
    remat.load_state_dict(plain.state_dict())
    rematerialize(remat)
    others = {name: torch.randn_like(param).requires_grad_() for name, param in plain.named_parameters()}
    found = []
    for module in (plain, remat):
        out = torch.func.functional_call(module, others, (x,)).square().sum()
        found.append(torch.autograd.grad(out, others.values()))
        y = x.clone().requires_grad_()
        with frozen(module):
            out = module(y).square().sum()
        found[-1] += torch.autograd.grad(out, y)  # the parameters are thawed again
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
