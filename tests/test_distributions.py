import math

import pytest
import torch
import torch.nn.functional as F

import ops.distributions as dists
from ops.distributions import Classes, Joint, MultiOneHot, OneHot, TwoHot, symexp_bins
from ops.math import symexp
from ops.normals import BoundedNormal


def log(*probs):
    return torch.tensor(probs).log()


# ---------------------------------------------------------------------------
# One-hot variables


def test_unimix_moves_every_probability_towards_uniform():
    dist = OneHot(torch.tensor([0.0, math.log(3)]), unimix=0.1)  # softmax is 1/4, 3/4
    assert dist.probs.tolist() == pytest.approx([0.9 / 4 + 0.05, 0.9 * 3 / 4 + 0.05])
    assert dist.logits.exp().tolist() == pytest.approx(dist.probs.tolist())
    certain = OneHot(torch.tensor([0.0, 100.0]), unimix=0.01)
    assert float(certain.log_prob(torch.tensor([1.0, 0.0]))) == pytest.approx(math.log(0.005))  # never -100


def test_entropy_and_kl_by_hand():
    p, q = OneHot(log(0.5, 0.5)), OneHot(log(0.2, 0.8))
    assert float(p.entropy()) == pytest.approx(math.log(2))
    assert float(p.kl(q)) == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
    assert float(p.kl(p)) == 0


def test_a_grid_of_noise_gives_each_class_its_share():
    probs = [0.1, 0.2, 0.3, 0.4]
    grid = (torch.arange(1000) + 0.5) / 1000
    draws = OneHot(log(*probs).expand(1000, 4)).sample(grid)
    assert draws.sum(0).tolist() == pytest.approx([100, 200, 300, 400], abs=1)
    assert ((draws == 0) | (draws == 1)).all() and (draws.sum(-1) == 1).all()


def test_random_draws_have_the_frequencies_of_the_probabilities():
    torch.manual_seed(0)
    dist = OneHot(torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 3.0]]).expand(20000, 2, 3), unimix=0.01)
    frequencies = dist.sample(OneHot.noise((20000, 2))).mean(0)
    torch.testing.assert_close(frequencies, dist.probs[0], atol=0.015, rtol=0)  # four standard deviations


def test_noise_at_the_ends_gives_the_first_and_the_last_class():
    # In float32 a long cumulative sum can end below the largest uniform number: the draw must still be a class.
    dist = OneHot(torch.zeros(2, 255))
    draws = dist.sample(torch.tensor([0.0, 1 - 2**-24]))
    assert draws.argmax(-1).tolist() == [0, 254] and draws.sum(-1).tolist() == [1, 1]
    impossible = OneHot(torch.tensor([[-200.0, 0.0]]))
    assert impossible.sample(torch.zeros(1)).tolist() == [[0, 1]]


@pytest.mark.parametrize("draw", [lambda dist: dist.sample(torch.tensor([0.7])), lambda dist: dist.mode()])
def test_straight_through_has_hard_values_and_the_gradient_of_the_probabilities(draw):
    logits = torch.tensor([[0.3, -0.5, 1.0]], requires_grad=True)
    cotangent = torch.tensor([[1.0, 2.0, 5.0]])
    dist = OneHot(logits, unimix=0.01)
    sample = draw(dist)
    assert sample.tolist() == [[0, 0, 1]]
    (ours,) = torch.autograd.grad((sample * cotangent).sum(), logits)
    (theirs,) = torch.autograd.grad((OneHot(logits, unimix=0.01).probs * cotangent).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0.1


def test_detach_keeps_the_numbers_and_drops_the_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    dist = OneHot(logits, 0.01)
    assert torch.equal(dist.detach().logits, dist.logits)
    assert not dist.detach().probs.requires_grad and not dist.detach().logits.requires_grad


# ---------------------------------------------------------------------------
# Several variables side by side


def test_multi_one_hot_sums_over_its_variables():
    dist = MultiOneHot(torch.cat([log(0.25, 0.75), log(0.2, 0.3, 0.5)]), [2, 3])
    value = torch.tensor([0.0, 1, 0, 1, 0])
    assert float(dist.log_prob(value)) == pytest.approx(math.log(0.75) + math.log(0.3))
    entropies = [-sum(p * math.log(p) for p in probs) for probs in ((0.25, 0.75), (0.2, 0.3, 0.5))]
    assert float(dist.entropy()) == pytest.approx(sum(entropies))
    assert dist.mode().tolist() == [0, 1, 0, 0, 1]
    assert dist.sample(torch.tensor([0.2, 0.4])).tolist() == [1, 0, 0, 1, 0]  # 0.2 < 1/4; 0.2 < 0.4 < 0.2 + 0.3


def test_multi_one_hot_mixes_each_variable_with_its_own_uniform():
    dist = MultiOneHot(torch.tensor([50.0, 0, 50, 0, 0]), [2, 3], unimix=0.3)
    assert [round(p, 4) for part in dist.parts for p in part.probs.tolist()] == [0.85, 0.15, 0.8, 0.1, 0.1]


def test_joint_of_a_continuous_and_a_multi_discrete_key():
    torch.manual_seed(0)
    move = BoundedNormal(torch.randn(7, 2), torch.randn(7, 2), 0.1, 1.0)
    buttons = MultiOneHot(torch.randn(7, 5), [2, 3])
    joint = Joint([move, buttons], widths=[2, 5], noises=[2, 2])
    noise = torch.cat([torch.randn(7, 2), torch.rand(7, 2)], -1)
    sample = joint.sample(noise)
    assert torch.equal(sample, torch.cat([move.sample(noise[:, :2]), buttons.sample(noise[:, 2:])], -1))
    assert torch.equal(joint.mode(), torch.cat([move.mode(), buttons.mode()], -1))
    torch.testing.assert_close(
        joint.log_prob(sample), move.log_prob(sample[:, :2]) + buttons.log_prob(sample[:, 2:]), rtol=0, atol=0
    )
    torch.testing.assert_close(joint.entropy(), move.entropy() + buttons.entropy(), rtol=0, atol=0)


def test_classes_speaks_of_indices():
    dist = Classes(torch.cat([log(0.25, 0.75), log(0.2, 0.3, 0.5)]).expand(2, 5), [2, 3])
    value = torch.tensor([[0, 1], [1, 2]])
    expected = [math.log(0.25 * 0.3), math.log(0.75 * 0.5)]
    assert dist.log_prob(value).tolist() == pytest.approx(expected)
    assert dist.mode().tolist() == [[1, 2], [1, 2]]
    one = Classes(log(0.1, 0.9).expand(4, 3, 2), [2])  # a Discrete observation comes as (B, T), without a last axis
    assert one.log_prob(torch.ones(4, 3, dtype=torch.int32)).flatten().tolist() == pytest.approx([math.log(0.9)] * 12)


def test_one_hots_side_by_side():
    assert dists.one_hots(torch.tensor([[1, 0], [0, 2]]), [2, 3]).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


# ---------------------------------------------------------------------------
# Real numbers

BINS = torch.tensor([-4.0, -1, 0, 1, 4])
# target: weights of the bins, by distance in raw units, all on the end bin beyond the ends
TWOHOTS = {
    -7.0: [1, 0, 0, 0, 0],
    -4.0: [1, 0, 0, 0, 0],
    -2.5: [0.5, 0.5, 0, 0, 0],
    0.0: [0, 0, 1, 0, 0],
    0.25: [0, 0, 0.75, 0.25, 0],
    3.0: [0, 0, 0, 1 / 3, 2 / 3],
    4.0: [0, 0, 0, 0, 1],
    5.0: [0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("target", TWOHOTS)
def test_twohot_spreads_the_target_on_its_neighbours(target):
    probs = [0.1, 0.15, 0.2, 0.25, 0.3]
    logits = (log(*probs) + 7).requires_grad_()  # a constant changes nothing
    loss = TwoHot(logits, BINS).log_prob(torch.tensor(target))
    weights = TWOHOTS[target]
    assert loss.item() == pytest.approx(sum(w * math.log(p) for w, p in zip(weights, probs, strict=True)))
    loss.backward()  # the gradient of a cross-entropy is the difference between target and probabilities
    assert logits.grad.tolist() == pytest.approx([w - p for w, p in zip(weights, probs, strict=True)], abs=1e-6)


def test_twohot_mode_is_the_mean():
    odd, even = TwoHot(log(0.1, 0.15, 0.2, 0.25, 0.3), BINS), TwoHot(log(0.1, 0.2, 0.3, 0.4), BINS[[0, 1, 3, 4]])
    assert float(odd.mode()) == pytest.approx(-0.1 * 4 - 0.15 + 0.25 + 0.3 * 4)
    assert float(even.mode()) == pytest.approx(-0.1 * 4 - 0.2 + 0.3 + 0.4 * 4)


@pytest.mark.parametrize("count", [3, 4, 40, 41, 255])
def test_uniform_logits_mean_exactly_zero(count):
    # An ordinary sum of numbers up to 5e8 leaves a rest of the order of 10: critic and reward start at 0 only if exact.
    modes = TwoHot(torch.full((5, count), 0.3), symexp_bins(count)).mode()
    assert modes.tolist() == [0] * 5


def test_symexp_bins_are_symmetric_and_ascending():
    assert symexp_bins(5).tolist() == symexp(torch.tensor([-20.0, -10, 0, 10, 20])).tolist()
    for count in (4, 5, 255):
        bins = symexp_bins(count)
        assert len(bins) == count and (bins.diff() > 0).all()
        assert torch.equal(bins, -bins.flip(0))
        torch.testing.assert_close(bins, symexp(torch.linspace(-20, 20, count)), rtol=1e-5, atol=1e-5)


def test_learning_a_twohot_finds_the_target():
    logits = torch.zeros(41, requires_grad=True)
    for _ in range(1000):
        dist = TwoHot(logits, symexp_bins(41))
        (grad,) = torch.autograd.grad(-dist.log_prob(torch.tensor(3.7)), logits)
        logits = (logits - grad).detach().requires_grad_()
    probs = TwoHot(logits, symexp_bins(41)).logits.exp()
    low, high = symexp(torch.tensor([1.0, 2.0])).tolist()  # the neighbors of 3.7 among symexp of whole numbers
    expected = [(high - 3.7) / (high - low), (3.7 - low) / (high - low)]
    assert probs[21:23].tolist() == pytest.approx(expected, abs=0.02)


def test_bernoulli_takes_soft_targets():
    dist = dists.Bernoulli(torch.tensor([[math.log(3)], [-1e4]]))
    assert dist.mean().tolist() == pytest.approx([0.75, 0])
    assert dist.mode().tolist() == [1, 0]
    soft = 0.9 * math.log(0.75) + 0.1 * math.log(0.25)
    assert dist.log_prob(torch.tensor([0.9, 0.0])).tolist() == pytest.approx([soft, 0])
    assert dist.log_prob(torch.tensor(1.0)).tolist() == pytest.approx([math.log(0.75), -1e4])  # finite where sure


def test_bounded_normal_is_a_normal():
    torch.manual_seed(0)
    raw_mean, raw_std, value = 3 * torch.randn(3, 8, 4)
    dist = BoundedNormal(raw_mean, raw_std, 0.1, 1.0)
    stddev = 0.9 * torch.sigmoid(raw_std + 2) + 0.1
    theirs = torch.distributions.Independent(torch.distributions.Normal(raw_mean.tanh(), stddev), 1)
    torch.testing.assert_close(dist.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(dist.entropy(), theirs.entropy())
    assert torch.equal(dist.mode(), raw_mean.tanh())
    torch.testing.assert_close(dist.sample(value), raw_mean.tanh() + stddev * value)  # neither squashed nor clipped


def test_bounded_normal_keeps_its_bounds():
    dist = BoundedNormal(torch.tensor([-99.0, 99]), torch.tensor([-99.0, 99]), 0.1, 1.0)
    assert dist.mean.tolist() == [-1, 1] and dist.stddev.tolist() == pytest.approx([0.1, 1.0])


def test_squared_errors_have_neither_a_half_nor_a_mean():
    vector = dists.SymlogMSE(torch.tensor([1.0, -1.0]))
    e = math.e
    assert vector.mode().tolist() == pytest.approx([e - 1, 1 - e])
    assert float(vector.log_prob(torch.tensor([e**2 - 1, 1 - e]))) == pytest.approx(-1, abs=1e-6)
    scalar = dists.SymlogMSE(torch.zeros(4, 3, 1))  # a Box of shape () comes as (B, T)
    assert scalar.log_prob(torch.full((4, 3), e - 1)).flatten().tolist() == pytest.approx([-1] * 12)
    image = dists.ImageMSE(torch.full((5, 2, 2, 3), 0.5))
    values = torch.tensor([0, 255], dtype=torch.uint8).repeat(6).view(2, 2, 3)
    assert image.log_prob(values).tolist() == pytest.approx([-12 * 0.25] * 5)


def test_low_precision_outputs_are_read_in_float32():
    logits = torch.tensor([[0.1, 2.0, -1.0]], dtype=torch.bfloat16)
    assert OneHot(logits).logits.dtype == torch.float32
    assert TwoHot(logits, BINS).mode().dtype == torch.float32
    exact = F.log_softmax(logits.float(), -1)
    torch.testing.assert_close(OneHot(logits).logits, exact, rtol=0, atol=1e-6)
