import io

import pytest
import torch
import torch.nn as nn

from ops.optim import LaProp
from tests.golden_math import ScheduledLaProp


def make(values, kind=LaProp, **options):
    """Return an optimizer with one parameter per value, named by its key."""
    params = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    return params, kind(params, **{"agc": 0.0, "warmup": 0, **options})


def step(params, opt, **grads):
    opt.zero_grad()
    sum((params[name] * torch.tensor(grad)).sum() for name, grad in grads.items()).backward()
    return opt.step()


def test_agc_clips_each_tensor_to_a_share_of_its_norm():
    params, opt = make({"big": [3.0, 4.0], "small": [3.0, 4.0], "zero": [0.0, 0.0]}, agc=0.3)
    metrics = step(params, opt, big=[0.0, 30.0], small=[0.6, 0.8], zero=[1.0, 0.0])
    assert params["big"].grad.tolist() == pytest.approx([0, 0.3 * 5])
    assert params["small"].grad.tolist() == pytest.approx([0.6, 0.8])  # its norm 1 is below 1.5
    assert params["zero"].grad.tolist() == pytest.approx([0.3 * 1e-3, 0])  # the norm counts as at least 1e-3
    assert float(metrics["grad_norm"]) == pytest.approx((30**2 + 1 + 1) ** 0.5)  # before the clipping


def test_without_agc_gradients_stay():
    params, opt = make({"x": [3.0, 4.0]}, agc=0.0)
    step(params, opt, x=[0.0, 30.0])
    assert params["x"].grad.tolist() == [0, 30]


def test_two_steps_by_hand():
    # step 1: v = 0.5 * 2^2 = 2, unbiased 4, u = 2 / 2 = 1;  m = 0.5, unbiased 1;  x = 1 - 0.1
    # step 2: v = 1 + 0.5 = 1.5, unbiased 2, u = -1 / sqrt(2);  m = 0.25 - 0.35355, unbiased (over 0.75) -0.13807
    params, opt = make({"x": [1.0]}, lr=0.1, beta1=0.5, beta2=0.5)
    step(params, opt, x=[2.0])
    assert params["x"].item() == pytest.approx(0.9)
    step(params, opt, x=[-1.0])
    assert params["x"].item() == pytest.approx(0.9 + 0.1 * 0.13807, abs=1e-6)


@pytest.mark.parametrize("size", [1e-15, 1e-17, 1e-18, 1e-19, 1e-30])
def test_no_gradient_is_so_small_that_its_step_becomes_large(size):
    torch.set_flush_denormal(True)
    try:
        params, opt = make({"x": [0.0]}, lr=0.1)
        for _ in range(20):
            step(params, opt, x=[size])
        assert 0 <= -params["x"].item() <= 20 * 0.1 * 1.001
    finally:
        torch.set_flush_denormal(False)


def test_the_first_update_has_rate_zero_and_warm_up_is_linear():
    params, opt = make({"x": [1.0]}, lr=0.4, warmup=4)
    rates = []
    for _ in range(6):
        before = params["x"].item()
        rates.append(float(step(params, opt, x=[1.0])["lr"]))
        assert before - params["x"].item() == pytest.approx(rates[-1], abs=1e-5)  # a constant gradient moves by lr
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_anneal_ends_at_a_tenth():
    params, opt = make({"x": [1.0]}, ScheduledLaProp, lr=1.0, warmup=2, anneal=6)
    rates = [float(step(params, opt, x=[1.0])["lr"]) for _ in range(8)]
    assert rates == pytest.approx([0, 0.5, 1, 0.775, 0.55, 0.325, 0.1, 0.1])


def test_weight_decay_spares_what_is_no_weight():
    values = {"net.weight": [1.0], "net.kernel": [1.0], "net.bias": [1.0]}
    params, opt = make(values, ScheduledLaProp, lr=0.1, decay=0.5)
    opt.step()  # all gradients are zero
    values = [param.item() for param in params.values()]
    assert values == pytest.approx([1 - 0.1 * 0.5, 1 - 0.1 * 0.5, 1])


def test_a_zero_gradient_moves_nothing():
    params, opt = make({"x": [1.0, 2.0]}, agc=0.3)
    step(params, opt, x=[0.0, 0.0])
    assert params["x"].tolist() == [1, 2]


def random_steps(model, opt, seed, count=3):
    torch.manual_seed(seed)
    for _ in range(count):
        opt.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        opt.step()


def test_a_saved_state_goes_on_identically():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    opt, other_opt = (LaProp(dict(m.named_parameters()), lr=0.01, warmup=2) for m in (model, other))
    random_steps(model, opt, seed=0)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    random_steps(model, opt, seed=1)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    random_steps(other, other_opt, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert opt.count == other_opt.count == 6


@pytest.mark.parametrize("theirs", [{"y": [1.0, 2.0]}, {"x": [1.0]}, {"x": [1.0, 2.0], "y": [1.0]}])
def test_the_state_of_other_parameters_is_refused(theirs):
    _, opt = make({"x": [1.0, 2.0]})
    before = opt.nu.clone()
    with pytest.raises(ValueError, match="other parameters"):
        opt.load_state_dict(make(theirs)[1].state_dict())
    assert torch.equal(opt.nu, before)
