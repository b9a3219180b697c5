"""A scan equals a plain loop, but computes the gradient of each weight in one product."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops.scan
from benchmarks import kernels
from ops.layers import BlockLinear, Linear, Norm
from ops.scan import Scan, call_step, product
from tests.factories import make_agent, make_batch, shake, world_losses

VERSIONS = {
    "block_gru": ("--rssm.dyn_layers", "2", "--rssm.obs_layers", "2"),
    "norm_gru": ("--rssm.cell", "norm_gru", "--rssm.dyn_layers", "2", "--rssm.initial", "learned"),
    "norm_gru_bias": ("--rssm.cell", "norm_gru_bias", "--norm", "layer_bias"),
    "gru": ("--rssm.cell", "gru", "--rssm.latent", "gaussian", "--replay_context", "false"),
    "layer_norm": ("--rssm.cell", "norm_gru", "--norm", "layer"),  # hidden layers without a bias
}


class PlainLoop:
    """Plain loop equivalent to `Scan`, with autograd's backpropagation through time."""

    def __init__(self, step, length, example, call):
        self.step = step

    def __call__(self, *args):
        return self.step(*args)


def losses_and_gradients(agent, batch):
    torch.manual_seed(3)
    losses, states = world_losses(agent.world, {**batch, "action": agent.act_spec.join(batch)})
    params = dict(agent.world.named_parameters())
    total = sum(loss.mean() for loss in losses.values()) + (states.deter.float() ** 2).mean()
    grads = torch.autograd.grad(total, params.values(), allow_unused=True)
    return states, dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("precision, tolerance", [("32", 1e-5), ("bf16", 4e-2)])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_are_those_of_a_plain_loop(version, precision, tolerance, monkeypatch):
    agent = shake(make_agent("proprio", *VERSIONS[version]))
    agent.dtype = agent.world.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = make_batch("proprio")
    states, grads = losses_and_gradients(agent, batch)
    monkeypatch.setattr(ops.scan, "Scan", PlainLoop)
    expected_states, expected = losses_and_gradients(agent, batch)
    torch.testing.assert_close(states, expected_states, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).abs().max() <= tolerance * expected[name].abs().max() + 1e-8, name
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "rssm" in name and not name.endswith("start"))


class Shapes(TorchDispatchMode):
    """Record the shapes of the results of all matrix products."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen.append(tuple(out.shape))
        return out

    seen: list


def test_each_kernel_has_one_product_for_its_gradient():
    linear, blocks = Linear(6, 6), BlockLinear(6, 6, blocks=2)
    start = torch.randn(4, 6)

    def step(x):
        return torch.tanh(blocks(linear(x).view(4, 2, 3)).flatten(1))

    def run(step):
        x = start
        for _ in range(10):
            x = step(x)
        shapes = Shapes()
        shapes.seen = []
        with shapes:
            grads = torch.autograd.grad(x.sum(), [linear.kernel, linear.bias, blocks.kernel, blocks.bias])
        return grads, (shapes.seen.count((6, 6)), shapes.seen.count((2, 3, 3)))

    plain, counts = run(step)
    assert counts == (10, 10)
    scanned, counts = run(Scan(step, 10, (start,), call_step))
    assert counts == (1, 1)
    torch.testing.assert_close(scanned, plain)


def test_a_product_may_use_part_of_a_kernel_and_a_kernel_twice():
    linear = Linear(5, 3)
    xs = torch.randn(4, 2, 5)

    def step(carry, x):
        return torch.sin(linear.first(x[:, :2]) + linear.last(x[:, 2:]) + product(carry, linear.kernel[:3]))

    def gradients(step):
        carry = torch.zeros(2, 3)
        for x in xs:
            carry = step(carry, x)
        return torch.autograd.grad(carry.sum(), [linear.kernel, linear.bias])

    torch.testing.assert_close(gradients(Scan(step, 4, (torch.zeros(2, 3), xs[0]), call_step)), gradients(step))


def test_rows_may_lie_on_several_axes():
    linear, x = Linear(3, 3), torch.randn(2, 4, 3)

    def gradients(step):
        return torch.autograd.grad(step(step(x)).sum(), [linear.kernel, linear.bias])

    def step(x):
        return torch.sin(linear(x))

    torch.testing.assert_close(gradients(Scan(step, 2, (x,), call_step)), gradients(step))


def test_blocks_may_share_an_input():
    blocks, x = BlockLinear(4, 6, blocks=2), torch.randn(5, 4)
    back = Linear(6, 4)

    def gradients(step):
        y = step(step(x))
        return y, *torch.autograd.grad(y.sum(), [blocks.kernel, blocks.bias, back.kernel])

    def step(x):  # half of a slice's inputs are its own, which are zeros here, and half are shared
        return torch.sin(back(blocks.last(x[:, :1]).flatten(1)))

    whole = torch.cat([torch.zeros(5, 2, 1), x[:, None, :1].expand(-1, 2, -1)], -1)
    torch.testing.assert_close(blocks.last(x[:, :1]), blocks(whole))
    torch.testing.assert_close(gradients(Scan(step, 2, (x,), call_step)), gradients(step))


def test_other_weights_have_one_sum_for_their_gradient():
    norm, x = Norm(6), torch.randn(4, 6)

    def run(step):
        y = x
        for _ in range(10):
            y = step(y)
        with kernels.Kernels() as counted:
            grads = torch.autograd.grad(y.square().sum(), [norm.scale])
        return grads, counted.counts["add"]

    plain, adds = run(norm)
    scanned, fewer = run(Scan(norm, 10, (x,), call_step))
    assert adds == 9 and fewer == 0
    torch.testing.assert_close(scanned, plain)


def test_an_error_within_a_step_leaves_layers_as_they_were():
    linear = Linear(2, 2)
    x = torch.ones(1, 2)

    def step(x):
        linear(x)
        if x.sum() > 2:
            raise RuntimeError("within")
        return x

    with pytest.raises(RuntimeError, match="within"):
        Scan(step, 1, (x,), call_step)(3 * x)
    torch.testing.assert_close(linear(x), x @ linear.kernel + linear.bias)


def test_a_scan_within_a_step_leaves_the_outer_one_in_place():
    outer, inner, x = Linear(3, 3), Linear(3, 3), torch.randn(2, 3)

    def gradients(step):
        return torch.autograd.grad(step(step(x)).sum(), [outer.kernel, outer.bias, inner.kernel, inner.bias])

    def within(x):
        return torch.tanh(inner(x))

    def nested(x):
        y = torch.sin(outer(x))
        return outer(Scan(within, 1, (y,), call_step)(y))  # this product is the outer scan's again

    scan = Scan(nested, 2, (x,), call_step)
    assert len(scan.inputs) == 2  # both products of the outer layer are its own
    scanned = gradients(scan)
    torch.testing.assert_close(scanned, gradients(lambda x: outer(within(torch.sin(outer(x))))))
