import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from ops.optim import Adams, LaProp, TFAdams
from tests.factories import Watch
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


# ---------------------------------------------------------------------------
# Adam in TensorFlow's form


def make_tf_adams(**changes):
    """Return two parameters in two groups, and their TFAdams."""
    params = {name: nn.Parameter(torch.tensor([1.0, -2.0])) for name in ("a.weight", "b.bias")}
    settings = SimpleNamespace(**{"lr": 0.1, "eps": 0.2, "clip": 1e9, "decay": 0.0, **changes})
    groups = {name[0]: {name: param} for name, param in params.items()}
    return params, TFAdams(groups, dict.fromkeys(groups, settings))


def test_two_steps_in_tensorflows_form_by_hand():
    params, opt = make_tf_adams(decay=0.5)
    mean, square, expected = 0.0, 0.0, 1.0
    for count, grad in enumerate((3.0, -1.0), 1):
        params["a.weight"].grad = torch.tensor([grad, 0.0])
        opt.step()
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        rate = 0.1 * (1 - 0.999**count) ** 0.5 / (1 - 0.9**count)
        expected = 0.5 * expected - rate * mean / (square**0.5 + 0.2)
        assert params["a.weight"].tolist() == pytest.approx([expected, -2 * 0.5**count], rel=1e-4)
    assert params["b.bias"].tolist() == [1, -2]  # no gradient, not even decay


def test_tensorflows_form_is_pytorchs_with_a_larger_epsilon_at_first():
    params, opt = make_tf_adams(eps=1e-3)
    theirs = nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = torch.optim.Adam([theirs], lr=0.1)
    for count in range(1, 4):
        adam.param_groups[0]["eps"] = 1e-3 / (1 - 0.999**count) ** 0.5
        for param in (params["a.weight"], theirs):
            param.grad = 0.01 * (param.detach() - 0.5)
        opt.step(), adam.step()
        torch.testing.assert_close(params["a.weight"], theirs, rtol=1e-4, atol=1e-5)


def test_an_update_in_tensorflows_form_waits_for_nothing_and_stays_in_place():
    params, opt = make_tf_adams()
    for param in params.values():
        param.grad = torch.ones(2)
    opt.step()
    tensors = [value for adam in opt.adams.values() for state in adam.state.values() for value in state.values()]
    places = [tensor.data_ptr() for tensor in (*tensors, *params.values())]
    with Watch() as watch:
        for adam in opt.adams.values():
            adam.step()
    assert watch.found == [] and watch.count
    assert [tensor.data_ptr() for tensor in (*tensors, *params.values())] == places


def test_both_forms_of_adam_read_each_others_state():
    params, opt = make_tf_adams()
    for param in params.values():
        param.grad = torch.tensor([1.0, 2.0])
    opt.step()
    saved = opt.state_dict()
    other = Adams(opt.groups, opt.settings)
    other.load_state_dict(saved)
    again = make_tf_adams()[1]
    again.load_state_dict(other.state_dict())
    for name, moments in saved["moments"].items():
        for key, value in moments.items():
            assert torch.equal(value, again.state_dict()["moments"][name][key])
