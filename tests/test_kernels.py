"""How many kernels an update launches, and what keeps them few."""

import contextlib

import pytest
import torch
import torch.nn as nn

import models
from benchmarks import kernels
from ops.layers import Linear, Norm, cast_once
from ops.random import drawing_from
from tests.factories import SPACES, initial, make_batch, make_config, make_dreamer, shake


def test_operations_on_lists_take_a_kernel_for_as_many_tensors_as_fit_if_shapes_are_equal():
    some, scalars = [torch.zeros(3)] * 200, [torch.zeros(())] * 200
    assert kernels.launches("mul", (some[0], some[0])) == 1
    assert kernels.launches("_foreach_norm", (some,)) == 2
    assert kernels.launches("_foreach_mul_", (some, some)) == 4
    assert kernels.launches("_foreach_mul_", (some, 2.0)) == 2
    assert kernels.launches("_foreach_mul_", (some, scalars)) == 200


def test_parameters_are_cast_once_in_the_body_and_are_themselves_again_afterwards():
    layer = nn.Sequential(Linear(3, 2), Linear(2, 2, bias=False))
    before = list(layer.parameters())
    with pytest.raises(ZeroDivisionError), cast_once(torch.bfloat16, layer):
        assert {param.dtype for param in (layer[0].kernel, layer[0].bias, layer[1].kernel)} == {torch.bfloat16}
        raise ZeroDivisionError
    assert all(one is other for one, other in zip(layer.parameters(), before, strict=True)) and layer[1].bias is None


def test_an_update_in_bf16_casts_parameters_once_for_all_imagined_steps_and_is_the_same(monkeypatch):
    losses, counts = [], []
    for cast in (models.cast_once, lambda *args: contextlib.nullcontext()):
        monkeypatch.setattr(models, "cast_once", cast)
        torch.manual_seed(0)
        agent = shake(make_dreamer(*SPACES["proprio"], make_config(), dtype=torch.bfloat16))
        with drawing_from(torch.Generator().manual_seed(1)), kernels.Kernels() as counted:
            _, metrics = agent.update(make_batch("proprio"), initial(agent))
        losses.append({name: float(value) for name, value in metrics.items()})
        counts.append(counted.counts)
    assert losses[0] == losses[1]
    assert counts[0]["_to_copy"] < 0.9 * counts[1]["_to_copy"]
    assert (counts[0] - counts[1]).keys() == {"_foreach_copy_"}  # which is launched instead
    assert counts[0]["_foreach_copy_"] == 1


def test_kernels_are_counted_as_a_gpu_gets_them():
    norm, x = Norm(8), torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad(norm(x).square().sum(), [x, norm.scale])
    with kernels.kernels_of_cuda(), kernels.Kernels() as counted:
        found = torch.autograd.grad(norm(x).square().sum(), [x, norm.scale])
    assert counted.counts["rms_norm"] == 1 and counted.counts["rms_norm_backward"] == 2
    torch.testing.assert_close(found, expected)

    torch.manual_seed(0)
    agents = [shake(make_dreamer(*SPACES["proprio"], make_config()))]
    agents.append(make_dreamer(*SPACES["proprio"], make_config()))
    agents[1].load_state_dict(agents[0].state_dict())
    counts = []
    for agent, form in zip(agents, (contextlib.nullcontext, kernels.kernels_of_cuda), strict=True):
        with form(), drawing_from(torch.Generator().manual_seed(1)), kernels.Kernels() as counted:
            for _ in range(2):
                agent.update(make_batch("proprio"), initial(agent))
        counts.append(counted.counts)
    for name, value in agents[0].nets.state_dict().items():
        torch.testing.assert_close(agents[1].nets.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert sum(counts[1].values()) < 0.8 * sum(counts[0].values())
    assert "_foreach_mul_" in counts[0] and "_foreach_mul_" not in counts[1]
