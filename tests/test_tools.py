import os
import random

import numpy as np
import pytest
import torch

import tools
from ops.math import lambda_return, symexp, symlog
from tools import Every, Ratio, atomic_save, atomic_write, derive_seed

# ---------------------------------------------------------------------------
# Mathematics


def test_symlog_squeezes_both_sides_alike_and_symexp_undoes_it():
    e = torch.e
    x = torch.tensor([1 - e, -0.0, 0.0, e - 1, e**2 - 1])
    assert symlog(x).tolist() == pytest.approx([-1, 0, 0, 1, 2], abs=1e-6)
    wide = torch.linspace(-1e4, 1e4, 101)
    torch.testing.assert_close(symexp(symlog(wide)), wide)
    tiny = torch.tensor([1e-7, -1e-7])  # log(1 + x) without log1p gives 1.19e-7 here
    torch.testing.assert_close(symlog(tiny), tiny)


# Discount and lambda are 1/2. Without flags, from the end: 4 + 40/2 = 24, 2 + (10 + 12)/2 = 13, 1 + (5 + 6.5)/2 = 6.75.
RETURNS = {
    "no flags": ([0, 0, 0, 0], [0, 0, 0, 0], [6.75, 13, 24]),
    "terminal at 2": ([0, 0, 1, 0], [0, 0, 1, 0], [1 + (5 + 1) / 2, 2, 24]),  # nothing follows the reward of 2
    "time-out at 2": ([0, 0, 1, 0], [0, 0, 0, 0], [1 + (5 + 6) / 2, 2 + 20 / 2, 24]),  # only the value of 2 follows
    "half a terminal at 2": ([0, 0, 0, 0], [0, 0, 0.5, 0], [1 + (5 + 3.75) / 2, 2 + (10 + 12) / 4, 24]),
}


@pytest.mark.parametrize("case", RETURNS)
def test_lambda_return_by_hand(case):
    last, term, expected = (torch.tensor(x, dtype=torch.float32) for x in RETURNS[case])
    reward, boot = torch.tensor([100.0, 1, 2, 4]), torch.tensor([100.0, 10, 20, 40])  # the first entries have no use
    torch.testing.assert_close(lambda_return(last, term, reward, boot, 0.5, 0.5), expected)
    batched = [torch.stack([x, x]) for x in (last, term, reward, boot)]
    torch.testing.assert_close(lambda_return(*batched, 0.5, 0.5), torch.stack([expected, expected]))


def test_lambda_return_names_shapes_that_do_not_fit():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[2, 3\]"):
        lambda_return(x, x, x, x[:, 1:], 0.5, 0.5)


# ---------------------------------------------------------------------------
# Clocks


def test_every_rings_once_for_each_multiple_passed():
    steps = [0, 3, 9, 10, 11, 35, 39, 40]
    assert [step for step in steps if Every(10)(step)] == steps  # a fresh clock rings at once
    clock = Every(10)
    assert [step for step in steps if clock(step)] == [0, 10, 35, 40]
    clock = Every(10, first=False)
    assert [step for step in steps if clock(step)] == [10, 35, 40]
    assert not any(Every(0)(step) for step in steps)


def test_every_goes_on_from_its_state():
    clock, other = Every(10), Every(10)
    clock(17)
    other.load_state_dict(clock.state_dict())
    assert [other(19), other(20)] == [False, True]


def test_every_waits_no_longer_than_its_period_when_that_was_shortened():
    clock, other, never = Every(1000), Every(10), Every(0)
    clock(17)
    for resumed in (other, never):
        resumed.load_state_dict(clock.state_dict())
    assert [other(19), other(20), never(2000)] == [False, True, False]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 1.0, 2.3])
def test_ratio_is_exact_however_the_calls_fall(ratio):
    strides = random.Random(0).choices(range(5), k=999)
    clock, step, total = Ratio(ratio), 7, 0
    clock(step)
    for stride in strides:
        step += stride
        total += clock(step)
        assert total == int(ratio * (step - 7) + 1e-6)  # 0.1 * 30 is a hair below 3 for a computer


def test_ratio_goes_on_from_its_state():
    clock, other = Ratio(0.4), Ratio(0.4)
    clock(100), clock(102)  # 0.8 of an update is owed
    other.load_state_dict(clock.state_dict())
    assert [other(103), other(105)] == [1, 1]


@pytest.mark.parametrize("before, after", [(0.1, 2.0), (2.0, 0.1), (0.0, 1.0)])
def test_another_ratio_counts_from_where_it_begins(before, after):
    clock, other = Ratio(before), Ratio(after)
    clock(0), clock(1000)
    other.load_state_dict(clock.state_dict())
    assert [other(1000), other(1010), other(1020)] == [0, int(10 * after), int(10 * after)]


# ---------------------------------------------------------------------------
# Randomness


def test_derived_seeds_differ_for_every_mode_and_index():
    seeds = [derive_seed(seed, mode, index) for seed in (0, 1) for mode in range(2) for index in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(3, 1, 2) == derive_seed(3, 1, 2)


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.normal(), *torch.rand(3).tolist()]

    tools.seed_everything(0)
    draw()  # an odd number of normal draws leaves one in the cache of each generator: it must be saved too
    torch.save(tools.get_rng_state(), tmp_path / "rng.pt")
    expected = draw()
    tools.seed_everything(1)
    assert draw() != expected
    tools.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_seed_everything_decides_every_generator():
    draws = []
    for _ in range(2):
        tools.seed_everything(5)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1]


# ---------------------------------------------------------------------------
# Files


def test_atomic_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "latest.pt"
    atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["latest.pt"]


def test_atomic_write_shows_nothing_before_it_is_complete(tmp_path):
    path = tmp_path / "latest.pt"
    atomic_write(path, lambda file: file.write(str(path.exists()).encode()))
    assert path.read_bytes() == b"False"


def test_a_directory_is_held_once(tmp_path):
    release = tools.hold(tmp_path)
    with pytest.raises(tools.UserError, match="another run is writing there"):
        tools.hold(tmp_path)
    release()
    tools.hold(tmp_path)()


def test_atomic_save_is_read_by_torch(tmp_path):
    atomic_save(tmp_path / "x.pt", {"x": torch.arange(3)})
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].tolist() == [0, 1, 2]
