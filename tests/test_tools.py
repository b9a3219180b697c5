import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tools
from ops.math import lambda_return, symexp, symlog
from tools import Every, Ratio, UserError, atomic_write, derive_seed, locked
from training import rng
from training.checkpoint import atomic_save

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


def test_every_may_ring_by_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tools, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock, slow = Every("10s", first=False), Every("1.5m", first=False)
    rings = []
    for now[0] in (100.0, 109.0, 110.5, 111.0, 120.0, 121.0, 190.0):
        rings.append((clock(0), slow(0)))  # whatever the step
    assert [ring for ring, _ in rings] == [False, False, True, False, False, True, True]
    assert [ring for _, ring in rings] == [False] * 6 + [True]
    other, frames = Every("10s", first=False), Every(10, first=False)
    other.load_state_dict(clock.state_dict())  # a resumed run starts a new interval
    frames.load_state_dict(clock.state_dict())
    assert not other(0) and frames(3) and not frames(4)


def test_every_time_that_a_ratio_asked_for_and_was_not_told_of_is_asked_for_again():
    clock, other = Ratio(1.0, burst=4, first=3), Ratio(1.0, burst=4, first=3)
    assert clock.due(5) == clock.due(5) == 3
    clock.tick()
    assert clock.due(5) == clock.due(9) == 2  # what is due later comes after
    other.load_state_dict(clock.state_dict())
    assert [times(other, step) for step in (9, 9, 12, 14)] == [2 + 4, 0, 0, 4]


def times(clock, step):
    """Return how many updates a Ratio asks for at a step, and report each as done."""
    count = 0
    while clock.due(step):
        clock.tick()
        count += 1
    return count


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 1.0, 2.3])
def test_ratio_is_exact_however_the_calls_fall(ratio):
    strides = random.Random(0).choices(range(5), k=999)
    clock, step, total = Ratio(ratio), 7, 0
    times(clock, step)
    for stride in strides:
        step += stride
        total += times(clock, step)
        assert total == int(ratio * (step - 7) + 1e-6)  # 0.1 * 30 is a hair below 3 for a computer


def test_ratio_goes_on_from_its_state():
    clock, other = Ratio(0.4), Ratio(0.4)
    times(clock, 100), times(clock, 102)  # 0.8 of an update is owed
    other.load_state_dict(clock.state_dict())
    assert [times(other, 103), times(other, 105)] == [1, 1]


@pytest.mark.parametrize("before, after", [(0.1, 2.0), (2.0, 0.1), (0.0, 1.0)])
def test_another_ratio_counts_from_where_it_begins(before, after):
    clock, other = Ratio(before), Ratio(after)
    times(clock, 0), times(clock, 1000)
    other.load_state_dict(clock.state_dict())
    assert [times(other, step) for step in (1000, 1010, 1020)] == [0, int(10 * after), int(10 * after)]


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

    rng.seed_everything(0)
    draw()  # an odd number of normal draws leaves one in the cache of each generator: it must be saved too
    torch.save(rng.get_rng_state(), tmp_path / "rng.pt")
    expected = draw()
    rng.seed_everything(1)
    assert draw() != expected
    rng.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_seed_everything_decides_every_generator():
    draws = []
    for _ in range(2):
        rng.seed_everything(5)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_generators_survive_a_checkpoint(tmp_path, kind):
    def make(seed):
        return {"act": torch.Generator().manual_seed(seed) if kind == "torch" else np.random.default_rng(seed)}

    def draw(generators):
        generator = generators["act"]
        return torch.rand(3, generator=generator).tolist() if kind == "torch" else generator.random(3).tolist()

    one, other = make(0), make(1)
    draw(one)
    torch.save(rng.generator_states(one), tmp_path / "rng.pt")
    expected = draw(one)
    rng.set_generator_states(other, torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw(other) == expected
    rng.set_generator_states(other, {})  # older checkpoints have none
    assert draw(other) != expected


def test_what_is_undisturbed_draws_as_if_nothing_had_been():
    own = {"act": torch.Generator().manual_seed(3), "replay": np.random.default_rng(3)}

    def draw():
        numbers = [random.random(), np.random.rand(), float(torch.rand(())), own["replay"].random()]
        return [*numbers, float(torch.rand((), generator=own["act"]))]

    rng.seed_everything(0)
    with rng.undisturbed(own):
        first = draw()
    with pytest.raises(ZeroDivisionError), rng.undisturbed(own):
        raise ZeroDivisionError(draw())
    assert draw() == first


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
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing there"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_atomic_save_is_read_by_torch(tmp_path):
    atomic_save(tmp_path / "x.pt", {"x": torch.arange(3)})
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].tolist() == [0, 1, 2]
