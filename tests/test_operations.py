"""Updates and acting dispatch no more operations than before, with no larger results."""

import collections
import json
import pathlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.factories import act, family_agent, initial, make_sequences, observations

# {version/kind: {what: {operation: [calls, elements of their results]}}}, counted when this project began to count.
RECORDED = json.loads((pathlib.Path(__file__).parent / "data" / "operations.json").read_text())
EXPLORING = {"expl_behavior": "plan2explore", "expl_noise": 0.1}


class Operations(TorchDispatchMode):
    """Count the operations that PyTorch dispatches, and the elements of their results."""

    def __init__(self):
        super().__init__()
        self.calls, self.elements = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.calls[name] += 1
        self.elements[name] += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def count(function):
    with Operations() as operations:
        function()
    return operations


@pytest.mark.parametrize("case", RECORDED)
def test_an_update_and_acting_dispatch_no_more_operations_than_recorded(case):
    version, kind = case.split("/")
    exploring = version == "plan2explore"
    agent = family_agent("dreamerv3" if exploring else version, kind, EXPLORING if exploring else {})
    batch, state, obs = make_sequences(kind), initial(agent), observations(kind)
    agent.update(batch, state)
    _, carry = act(agent, obs)
    found = {"update": count(lambda: agent.update(batch, state))}
    found |= {f"act {mode}": count(lambda mode=mode: agent.act(obs, carry, mode)) for mode in ("sample", "mode")}
    for what, recorded in RECORDED[case].items():
        ours = found[what]
        assert sum(ours.calls.values()) <= sum(calls for calls, _ in recorded.values()), what
        work = {name: entry for name, entry in recorded.items() if name not in VIEWS}
        for name, calls in ours.calls.items():
            if name not in VIEWS:
                known = work.get(name, [0, 0])
                assert calls <= known[0] and ours.elements[name] <= known[1], f"{what}: {name}"


# They launch nothing, and one may stand in for another.
VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "detach"}
VIEWS |= {"expand", "permute", "unbind", "alias", "_unsafe_view", "as_strided", "lift_fresh"}
