"""Requirements of CUDA graphs on an update, as far as they can be checked without a GPU."""

import pytest
import torch

from networks import State
from ops.graphs import WARMUP, Captured
from tests.factories import Watch, act, initial, make_agent, make_batch, make_obs

VERSIONS = {
    "dreamerv3": (),
    "dreamerv3_2023": ("--configs", "dreamerv3_2023", "debug"),
    "dreamerv2": ("--configs", "dreamerv2", "debug"),
    "dreamerv1": ("--configs", "dreamerv1", "debug"),
    "planet": ("--configs", "planet", "debug"),
    "ppo": ("--behavior", "ppo"),
    "hierarchical": ("--configs", "hierarchical", "debug", "--expl_behavior", "plan2explore"),
    "plan2explore": ("--expl_behavior", "plan2explore", "--expl_noise", "0.1"),
}


def stand_in(function, generator):
    """Replace `record_cuda`, which needs a GPU: call the Python function again instead of replaying a recording."""
    recorded.append(function)
    results = {key: value.clone() for key, value in function().items()}

    def replay():
        for key, value in function().items():
            results[key].copy_(value)

    return replay, results


recorded = []


def test_the_fourth_call_records_and_later_ones_replay():
    recorded.clear()
    called = []

    def double(batch, state):
        called.append(batch["x"])
        return {"y": 2 * batch["x"] + state.deter}

    captured = Captured(double, record=stand_in)
    results = []
    for number in range(WARMUP + 3):
        batch = {"x": torch.full((2,), float(number))}
        results.append(captured(batch, State(torch.ones(2), torch.zeros(2)))["y"])
        assert len(recorded) == (number >= WARMUP)
        assert (called[-1] is batch["x"]) == (number < WARMUP)  # a recording knows its own memory only
    assert len({x.data_ptr() for x in called[WARMUP:]}) == 1
    assert [y.tolist() for y in results] == [[2 * n + 1.0] * 2 for n in range(WARMUP + 3)]  # each of its own memory
    with pytest.raises(AssertionError, match="inputs changed"):
        captured({"x": torch.zeros(3)}, State(torch.ones(3), torch.zeros(3)))


def state_of(agent):
    """Return all tensors that outlive an update: parameters, buffers, the optimizer's."""
    tensors = dict(agent.nets.named_parameters()) | dict(agent.nets.named_buffers())
    opt = agent.opt
    if hasattr(opt, "flat"):
        return tensors | {name: getattr(opt, name) for name in ("flat", "grad", "nu", "mu", "count")}
    states = [adam.state[param] for adam in opt.adams.values() for param in adam.state]
    return tensors | {f"adam {i} {key}": value for i, state in enumerate(states) for key, value in state.items()}


@pytest.mark.parametrize("kind", ["proprio", "pixels"])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_update_and_acting_are_fit_to_be_recorded(version, kind, monkeypatch):
    flags = VERSIONS[version]
    if kind == "pixels" and "debug" in flags:
        flags = (*flags, "--encoder.cnn", "same", "--decoder.cnn", "same")  # these images are not 64x64
    agent, batch = make_agent(kind, *flags), make_batch(kind)
    state = initial(agent)
    agent.update(batch, state)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # the form of it that can be recorded needs a GPU
    places = {name: tensor.data_ptr() for name, tensor in state_of(agent).items()}
    with Watch() as watch:
        agent.update(batch, state)
        _, carry = act(agent, make_obs(kind), mode="explore")
        for mode in ("noisy", "sample", "mode"):
            agent.act(make_obs(kind), carry, mode)
    assert watch.found == []
    assert {name: tensor.data_ptr() for name, tensor in state_of(agent).items()} == places
