"""Large float32 products on AMD's processors with AVX-512: those of oneDNN equal PyTorch's, gradients included."""

import pytest
import torch

from benchmarks import timing
from ops import products
from ops.products import is_amd_with_avx512, matmul, takes_onednn
from ops.scan import product
from tests.factories import make_agent, make_batch, shake
from tests.test_scan import losses_and_gradients

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """Let every product go to oneDNN, whatever the processor; return [(shape of x, shape of y)] of those that did."""
    found, linear = [], products.linear
    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "ROWS", 0)
    monkeypatch.setattr(products, "SUMMED", 0)
    monkeypatch.setattr(
        products, "linear", lambda x, weight: found.append((x.shape, weight.shape)) or linear(x, weight)
    )
    return found


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)


FACTORS = {
    "matrices": (lambda x: x, lambda y: y, (32, 24), (24, 16)),
    "wider than long": (lambda x: x, lambda y: y, (32, 8), (8, 48)),
    "leading dimensions": (lambda x: x, lambda y: y, (4, 8, 24), (24, 16)),
    "transposed": (lambda x: x.T, lambda y: y.T, (24, 32), (16, 24)),
    "columns of a wider matrix": (lambda x: x[:, 3:27], lambda y: y[:, 2:18], (32, 40), (24, 20)),
    "blocks": (lambda x: x, lambda y: y, (4, 32, 24), (4, 24, 16)),
    "blocks of rows": (lambda x: x.transpose(0, 1), lambda y: y.mT, (32, 4, 24), (4, 16, 24)),
    "blocks that share": (lambda x: x.expand(4, *x.shape), lambda y: y, (32, 24), (4, 24, 16)),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients_are_those_of_double_precision(name, biased, onednn):
    of_x, of_y, x_shape, y_shape = FACTORS[name]
    leaves = [numbers(*x_shape), numbers(*y_shape)]
    y = of_y(leaves[1])
    leaves += [numbers(*y.shape[:-2], *(1,) * (y.ndim - 2), y.shape[-1])] if biased else []

    def compute(multiply, *leaves):
        x, y, *bias = leaves
        out = multiply(of_x(x), of_y(y), *bias)
        return out, *torch.autograd.grad(out.tanh().square().sum(), leaves)

    found = compute(matmul, *leaves)
    assert len(onednn) == 3 * (y.shape[0] if y.ndim == 3 else 1)  # the product, and one for each gradient
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for each, expected in zip(found, compute(lambda x, y, bias=0: x @ y + bias, *leaves), strict=True):
        assert each.shape == expected.shape
        assert (each - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_of_gradients(onednn):
    x, y = numbers(32, 24), numbers(24, 16)

    def twice(multiply):
        def inner(y):
            return torch.func.grad(lambda y: multiply(x.detach(), y).tanh().square().sum())(y).square().sum()

        return torch.func.grad(inner)(y.detach())

    found = twice(matmul)
    assert onednn
    torch.testing.assert_close(found, twice(torch.matmul), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapes", [((32, 24), (24, 16)), ((4, 32, 24), (4, 24, 16))])
def test_compiled(shapes, onednn):
    x, y = (numbers(*shape) for shape in shapes)

    def compute(multiply):
        return torch.autograd.grad(multiply(x, y).tanh().square().sum(), (x, y))

    found = compute(torch.compile(matmul, fullgraph=True))
    assert onednn
    torch.testing.assert_close(found, compute(torch.matmul), rtol=1e-4, atol=1e-4)


def test_the_gradients_of_a_world_model_are_the_same(onednn, monkeypatch):
    """Compare every kind of product in a scan and outside, with offsets and in blocks."""
    agent, batch = shake(make_agent("proprio")), make_batch("proprio")
    _, found = losses_and_gradients(agent, batch)
    assert onednn
    monkeypatch.setattr(products, "ONEDNN", False)
    _, expected = losses_and_gradients(agent, batch)
    for name, grad in found.items():
        assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-8, name


def test_flops_are_counted(onednn):
    x, kernel = numbers(7, 3), numbers(3, 5)
    assert timing.count_flops(lambda: product(x, kernel).sum().backward()) == 3 * 2 * 7 * 3 * 5
    assert onednn


def test_which_products_go_there(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)
    long, kernel = torch.empty(1024, 512), torch.empty(512, 64)
    assert takes_onednn(long, kernel)
    assert takes_onednn(long.T, torch.empty(1024, 64))
    assert takes_onednn(torch.empty(8, 1024, 256), torch.empty(8, 256, 64))
    assert not takes_onednn(torch.empty(8, 256, 256), torch.empty(8, 256, 64))
    assert not takes_onednn(long[:256].T, torch.empty(256, 64))  # of 2**23, as the next
    assert takes_onednn(long[:256], torch.empty(512, 64))
    assert not takes_onednn(torch.empty(512, 16).T, torch.empty(16, 4096).T.contiguous().T)
    assert not takes_onednn(long.bfloat16(), kernel.bfloat16())  # PyTorch gives these to oneDNN itself
    assert not takes_onednn(long.to("meta"), kernel.to("meta"))
    assert not takes_onednn(long[:16], kernel)
    assert not takes_onednn(torch.empty(1, 4096), torch.empty(4096, 4096))
    monkeypatch.setattr(products, "ONEDNN", False)
    assert not takes_onednn(long, kernel)


def test_exported_policies_have_operators_that_others_know(onednn):
    step = torch.nn.Linear(24, 16)
    step.forward = lambda x: matmul(x, step.weight.T, step.bias)
    program = torch.export.export(step, (torch.ones(32, 24),))
    assert not onednn
    assert "dreamer" not in str(program.graph)


CPUINFO = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: some\nflags\t\t: fpu sse2 {}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO.format("AuthenticAMD", "avx2 avx512f avx512_bf16"), True),
        (CPUINFO.format("AuthenticAMD", "avx2 fma"), False),
        (CPUINFO.format("GenuineIntel", "avx2 avx512f"), False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_processors(text, expected, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert is_amd_with_avx512(path) is expected
