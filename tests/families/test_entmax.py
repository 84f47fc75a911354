"""The entmax distribution, against a plain sort and a plain bisection; its gradients and Fenchel-Young loss."""

from __future__ import annotations

import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.distributions import kl_divergence

from pyro_genexact.distributions import EntmaxCategorical
from support.values import F64, double, sized

ALPHAS = (1.01, 1.3, 1.5, 2.0, 4.0)
EVERY = pytest.mark.parametrize("alpha", ALPHAS)


def by_plain_sort(row, alpha):
    """Tries every number of categories with mass: tau is the mean of them, minus a root for alpha = 1.5."""
    z = sorted(((alpha - 1) * s for s in row), reverse=True)
    for k in range(len(z), 0, -1):
        mean = sum(z[:k]) / k
        spread = sum((x - mean) ** 2 for x in z[:k])
        tau = mean - 1 / k if alpha == 2 else mean - math.sqrt(max(0.0, (1 - spread) / k))
        if z[k - 1] > tau and (alpha == 2 or spread <= 1):
            return [max(0.0, (alpha - 1) * s - tau) ** (1 / (alpha - 1)) for s in row]
    raise AssertionError


def by_bisection(scores, alpha, steps=200):
    z = (alpha - 1) * scores
    low = z.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(steps):
        tau = (low + high) / 2
        more = ((z - tau).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, tau, low), torch.where(more, high, tau)
    return (z - low).clamp(min=0) ** (1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 100.0])
def test_probabilities_by_a_plain_sort(alpha, spread):
    scores = spread * sized(20, 12)
    scores[:5] = scores[:5].round()  # with ties
    expected = double(*(by_plain_sort(row, alpha) for row in scores.tolist()))
    d = EntmaxCategorical(scores, alpha)
    assert torch.allclose(d.probs, expected, rtol=0, atol=1e-12)
    assert torch.equal(d.probs > 0, d.logits > -math.inf)
    assert torch.allclose(d.probs.sum(-1), torch.ones(20, dtype=F64), rtol=0, atol=1e-14)
    if spread >= 3:
        assert (d.probs == 0).sum() > 100


@EVERY
def test_probabilities_by_bisection(alpha):
    scores = sized(20, 12) * torch.tensor([0.0, 0.1, 1.0, 30.0], dtype=F64).repeat(5)[:, None]
    probs = EntmaxCategorical(scores, alpha).probs
    assert torch.allclose(probs, by_bisection(scores, alpha), rtol=0, atol=1e-10)
    assert torch.equal(probs == 0, by_bisection(scores, alpha) == 0)


def test_known_cases():
    scores = sized(5, 4)
    assert torch.allclose(EntmaxCategorical(scores, 1 + 1e-6).probs, scores.softmax(-1), atol=1e-5)
    assert torch.allclose(EntmaxCategorical(double(0.2, 0.0, -3.0), 2).probs, double(0.6, 0.4, 0.0))
    for alpha in ALPHAS:  # a gap of 1 / (alpha - 1) suffices for one category to have all the mass
        d = EntmaxCategorical(double(0.0, -1.0, -1.5) / (alpha - 1), alpha)
        assert torch.equal(d.probs, double(1.0, 0.0, 0.0))
        assert torch.allclose(
            EntmaxCategorical(torch.zeros(7, dtype=F64), alpha).probs, torch.full((7,), 1 / 7).double()
        )
        assert torch.equal(EntmaxCategorical(double(5.0), alpha).probs, double(1.0))
    assert EntmaxCategorical(double(0.0, -math.inf, 0.1), 1.5).probs[1] == 0


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 4.0])
def test_gradients(alpha):
    """Of probabilities and the loss, once and twice, by finite differences; those of zeros are zero."""
    scores = (sized(3, 4) / (alpha - 1) * double(0.2, 0.7, 1.5)[:, None]).requires_grad_()
    some = EntmaxCategorical(scores.detach(), alpha).probs > 0
    assert 3 < some.sum() < 12
    value = torch.tensor([0, 1, 3])

    def queries(scores):
        d = EntmaxCategorical(scores, alpha)
        return d.probs, d.logits[some], d.entropy(), d.fenchel_young(value)

    assert gradcheck(queries, scores, fast_mode=True)
    assert gradgradcheck(lambda scores: queries(scores)[::3], scores, fast_mode=True)
    d = EntmaxCategorical(scores, alpha)
    (found,) = grad(d.logits[~some].sum(), scores, retain_graph=True)
    assert not found.any()
    (found,) = grad(d.probs[~some].sum(), scores)
    assert not found.any()


@EVERY
def test_fenchel_young_loss(alpha):
    """Its definition; its gradient is p minus one-hot; it is not negative, 0 if and only if p is 1, and convex."""
    scores, value = (3 * sized(40, 5)).requires_grad_(), torch.arange(40) % 5
    d = EntmaxCategorical(scores, alpha)
    losses = d.fenchel_young(value)
    p = d.probs.detach()
    negentropy = ((p**alpha).sum(-1) - 1) / (alpha * (alpha - 1))
    score = scores.gather(1, value[:, None])[:, 0]
    assert torch.allclose(losses, (p * scores).sum(-1) - negentropy - score, atol=1e-10)
    one_hot = torch.nn.functional.one_hot(value, 5)
    assert torch.allclose(grad(losses.sum(), scores)[0], p - one_hot, atol=1e-12)
    sure = d.probs.gather(1, value[:, None])[:, 0] == 1
    assert (losses >= 0).all() and (losses[sure] == 0).all() and (losses[~sure] > 0).all()
    others = 3 * sized(40, 5, seed=1)
    middle, other = (EntmaxCategorical(s, alpha).fenchel_young(value) for s in ((scores + others) / 2, others))
    assert (middle <= (losses + other) / 2 + 1e-12).all()
    shifted = EntmaxCategorical(scores.detach() + 1e3, alpha).fenchel_young(value)
    assert torch.allclose(shifted, losses.detach(), atol=1e-10)


def test_loss_has_a_gradient_where_the_likelihood_has_none():
    scores = double(4.0, 0.0, 0.0).requires_grad_()
    d = EntmaxCategorical(scores, 1.5)
    rare = torch.tensor(1)
    assert d.log_prob(rare) == -math.inf and not grad(d.log_prob(rare), scores, retain_graph=True)[0].any()
    assert torch.equal(grad(d.fenchel_young(rare), scores)[0], double(1.0, -1.0, 0.0))


def test_methods_of_a_categorical():
    d = EntmaxCategorical(double([2.0, 1.5, 0.0], [0.0, 0.0, 9.0]), 1.5)
    assert d.mode.tolist() == [0, 2] and d.enumerate_support().shape == (3, 2)
    assert torch.allclose(d.entropy(), -torch.special.xlogy(d.probs, d.probs).sum(-1))
    assert torch.equal(kl_divergence(d, d), torch.zeros(2, dtype=F64))
    assert kl_divergence(dist.Categorical(torch.ones(3, dtype=F64)), d).tolist() == [math.inf] * 2
    assert kl_divergence(d, dist.Categorical(torch.ones(3, dtype=F64))).isfinite().all()
    counts = torch.stack([(d.sample((20000,)) == v).sum(0) for v in range(3)], -1)
    assert (counts[d.probs == 0] == 0).all()
    assert ((counts - 20000 * d.probs).abs() <= 4.5 * (20000 * d.probs * (1 - d.probs)).sqrt()).all()
    wide = d.expand([4, 2])
    assert wide.scores.shape == (4, 2, 3) and torch.equal(
        wide.log_prob(torch.tensor(0))[0], d.log_prob(torch.tensor(0))
    )
    assert wide.fenchel_young(torch.tensor(2)).shape == (4, 2)
    again = pickle.loads(pickle.dumps(d))
    assert type(again) is EntmaxCategorical and torch.equal(again.probs, d.probs) and again.alpha == 1.5
    assert EntmaxCategorical(torch.zeros(0, 3)).sample((2,)).shape == (2, 0)


def test_gradients_of_each_example():
    def loss(scores, value):
        return EntmaxCategorical(scores, 1.5, validate_args=False).fenchel_young(value)

    scores, value = sized(4, 3), torch.tensor([0, 1, 2, 0])
    found = torch.func.vmap(torch.func.grad(loss))(scores, value)
    expected = EntmaxCategorical(scores, 1.5).probs - torch.nn.functional.one_hot(value, 3)
    assert torch.allclose(found, expected, atol=1e-10)
    curvature = torch.func.vmap(torch.func.hessian(loss))(scores, value)
    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda s: EntmaxCategorical(s).probs, s) for s in scores]
    )
    assert torch.allclose(curvature, expected, atol=1e-10)


def test_gradient_of_the_loss_at_nearly_equal_scores():
    """There the derivative of p by the scores is large, and would amplify rounding."""
    scores = (1e-6 * sized(1000)).float().requires_grad_()
    d = EntmaxCategorical(scores, 4.0)
    (found,) = grad(d.fenchel_young(torch.tensor(3)), scores)
    expected = d.probs.detach() - torch.nn.functional.one_hot(torch.tensor(3), 1000)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_other_dtypes(dtype, tol):
    scores = (3 * sized(5, 6)).to(dtype)
    d, exact = EntmaxCategorical(scores), EntmaxCategorical(scores.double())
    assert d.probs.dtype == d.logits.dtype == dtype
    assert torch.allclose(d.probs.double(), exact.probs, atol=tol) and torch.equal(d.probs > 0, exact.probs > 0)


def test_extreme_scores():
    for size in (1e8, 1e30):
        scores = (size * sized(5, 6)).requires_grad_()
        for alpha in (1.3, 1.5, 2.0):
            d = EntmaxCategorical(scores, alpha)
            lp, losses = d.log_prob(d.mode), d.fenchel_young(torch.tensor(0))
            assert (lp == 0).all() and losses.isfinite().all()
            assert all(g.isfinite().all() for g in grad((lp + losses).sum(), scores))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_infinite_scores(alpha):
    """A category of score -inf has loss inf, without effect on gradients; rows without a finite maximum have NaN."""
    scores = double([0.0, -math.inf, 0.1], [0.0, 0.3, 0.1]).requires_grad_()
    losses = EntmaxCategorical(scores, alpha).fenchel_young(torch.tensor(1))
    assert losses[0] == math.inf and losses[1].isfinite() and grad(losses.sum(), scores)[0].isfinite().all()
    for wrong in ([-math.inf] * 3, [math.inf, 0.0, math.inf], [0.0, 0.0, math.nan]):
        d = EntmaxCategorical(double(wrong, [0.0, 0.3, 0.1]), alpha, validate_args=False)
        for result in (d.probs, d.logits, d.fenchel_young(torch.tensor(0))[:, None] + 0 * d.logits):
            assert result[0].isnan().all() and not result[1].isnan().any()
        with pytest.raises(ValueError, match=r"Expected (parameter scores|scores to have a finite maximum)"):
            EntmaxCategorical(double(wrong), alpha, validate_args=True)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1, math.inf, math.nan])
def test_wrong_alpha(alpha):
    with pytest.raises(ValueError, match="Expected alpha to be above 1 and finite; got "):
        EntmaxCategorical(torch.zeros(3), alpha)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"Expected alpha to be a number; got '1\.5'"):
        EntmaxCategorical(torch.zeros(3), "1.5")
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match=r"Expected scores .* of at least one category; got "):
            EntmaxCategorical(torch.zeros(shape))
    with pytest.raises(ValueError, match="Expected parameter scores"):
        EntmaxCategorical(torch.tensor([0.0, math.nan]), validate_args=True)
    for value in (-1, 3, 0.5):
        with pytest.raises(ValueError, match="within the support"):
            EntmaxCategorical(torch.zeros(3), validate_args=True).fenchel_young(torch.tensor(value))
        assert EntmaxCategorical(torch.zeros(3), validate_args=False).fenchel_young(torch.tensor(value)) == math.inf
    with pytest.raises(TypeError, match="Expected value to be of class Tensor; got int"):
        EntmaxCategorical(torch.zeros(3)).fenchel_young(0)
