"""Models with sparse heads: their Fenchel-Young loss, training from where the likelihood is 0, and all queries."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE, Recurrent
from support.values import F64, built, double, sized

BETA = partial(h.BetaGaussian, alpha=1.5)


def chain(head, sites=3, site=(), **options):
    net = MADE(sites, head.num_params, hidden=(8,), site=site, activation=torch.tanh)
    return built(gx.Autoregressive(net, head, (sites, *head.site_shape)))(**options)


def sites_of(d, y):
    """The distribution of each site of rows y (B, T, ...) given the earlier ones, one at a time."""
    phi, state = d.conditioner.start(None, len(y))
    for t in range(y.shape[1]):
        yield d.head(phi.reshape(len(y), 1, -1), t), y[:, t : t + 1]
        if t + 1 < y.shape[1]:
            phi, state = d.conditioner.extend(y[:, t : t + 1], state)


def summed(d, y):
    return torch.cat([gx.fenchel_young_loss(site, value) for site, value in sites_of(d, y)], 1)


MODELS = {
    "numbers": (BETA(), (), sized(4, 3)),
    "vectors": (h.BetaGaussian((2,)), (2,), sized(4, 3, 2)),
    "joint vectors": (h.MultivariateBetaGaussian(2), (2,), sized(4, 3, 2)),
    "categories": (h.EntmaxCategorical(4), 4, torch.tensor([[0, 3, 2], [1, 1, 1], [3, 0, 3], [2, 2, 0]])),
    "columns": (
        h.PerSite([h.EntmaxCategorical(4), BETA(), h.Poisson()]),
        (),
        double([2.0, 9.0, 3.0], [0.0, -9.0, 1.0]),
    ),
    "stopped": (h.Stopped(BETA()), (2,), torch.stack([sized(4, 3), torch.ones(4, 3).double()], -1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_sum_over_sites(name):
    head, site, y = MODELS[name]
    d = chain(head, 3, site)
    far = y if name in ("categories", "columns") else 5 * y
    if name == "stopped":
        far = torch.cat([far[..., :1], y[..., 1:]], -1)
    losses = gx.fenchel_young_loss(d, far)
    assert losses.isfinite().all() and torch.allclose(losses, summed(d, far).sum(1))
    if name not in ("stopped", "categories"):
        assert (d.log_prob(far) == -math.inf).any()


def test_other_distributions_have_the_loss_of_the_likelihood():
    y = sized(4, 3)
    d = chain(h.Normal())
    assert torch.allclose(gx.fenchel_young_loss(d, y), -d.log_prob(y))
    flow = built(gx.flows.maf(3, transforms=1, hidden=(8,)))()
    assert torch.allclose(gx.fenchel_young_loss(flow, y), -flow.log_prob(y))
    positive = torch.distributions.Exponential(double(1.0), validate_args=False)
    assert gx.fenchel_young_loss(positive, double(-1.0)) == math.inf


def test_masked_values_have_no_loss():
    d, y = BETA()(torch.zeros(3, 2)), torch.tensor([9.0, -8.0, 0.1])
    losses = gx.fenchel_young_loss(d, y)
    for mask in (torch.tensor([True, False, True]), True, False):
        expected = torch.where(torch.as_tensor(mask), losses, 0)
        assert torch.equal(gx.fenchel_young_loss(d.mask(mask), y), expected)


def test_padding_has_no_loss():
    lengths, y = torch.tensor([0, 1, 3, 2]), sized(4, 3)
    d = chain(BETA(), lengths=lengths)
    part = torch.arange(3) < lengths[:, None]
    expected = (summed(chain(BETA()), y) * part).sum(1)
    assert torch.allclose(gx.fenchel_young_loss(d, y), expected)
    head = h.EntmaxCategorical(3)
    text = built(gx.Sequence(Recurrent(3, 3, hidden=5), head, eos=0, max_len=4))()
    y = torch.tensor([[2, 0, 0, 0], [1, 2, 1, 1]])
    losses = summed(text, y)
    losses[0, 2:] = 0
    assert torch.allclose(gx.fenchel_young_loss(text, y), losses.sum(1))
    unvalidated = chain(h.EntmaxCategorical(3), 2, 3)
    unvalidated._validate_args = False
    assert gx.fenchel_young_loss(unvalidated, torch.tensor([7, 0])) == math.inf


@pytest.mark.parametrize("head, y", [(BETA(), double([9.0, -7.0])), (h.EntmaxCategorical(3), torch.tensor([[2, 1]]))])
def test_gradient_of_a_model_by_finite_differences(head, y):
    net = built(MADE(2, head.num_params, hidden=(4,), site=() if y.is_floating_point() else 3, activation=torch.tanh))
    names, weights = zip(*net.named_parameters(), strict=True)

    def loss(*weights):
        net_of = partial(torch.func.functional_call, net, dict(zip(names, weights, strict=True)))
        return head(net_of((y,))).fenchel_young(y).sum()

    assert gradcheck(loss, weights, fast_mode=True)


class Free(nn.Module):
    """The head at learnable numbers."""

    def __init__(self, head, phi):
        super().__init__()
        self.head, self.phi = head, nn.Parameter(phi)

    def forward(self):
        return self.head(self.phi[None])


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_support_moves_to_the_data(alpha):
    """All data lie outside of the support at the start, where the gradient of the likelihood is 0."""
    y, model = 6 + 0.3 * sized(200), Free(h.BetaGaussian(alpha=alpha), torch.zeros(2, dtype=F64))
    lp = model().log_prob(y)
    assert (lp == -math.inf).all() and not grad(lp.sum(), model.phi)[0].any()
    optimizer = torch.optim.LBFGS([model.phi], max_iter=100, line_search_fn="strong_wolfe")

    def evaluate():
        optimizer.zero_grad()
        (loss := gx.fenchel_young_loss(model(), y).mean()).backward()
        return loss

    optimizer.step(evaluate)
    d = model()
    assert torch.allclose(d.mean, y.mean(), rtol=1e-5) and torch.allclose(d.variance, y.var(correction=0), rtol=1e-4)


def test_fit_moves_the_support():
    """Of the factors of an autoregressive model."""
    x = 2.6 + 0.2 * torch.randn(256, 1)
    y = torch.cat([x, x + 0.2 * torch.randn(256, 1)], 1)
    head = BETA()
    model = gx.Autoregressive(MADE(2, head.num_params, hidden=(8,)), head, (2,))
    assert (model().log_prob(y) == -math.inf).all()
    with pytest.raises(FloatingPointError, match="Expected a finite loss; got inf"):
        gx.fit(model, y, epochs=1, progress=False)
    gx.fit(model, y, loss=gx.fenchel_young_loss, epochs=150, lr=0.1, progress=False)
    with torch.no_grad():
        d = model()
        assert (d.log_prob(y) > -math.inf).double().mean() > 0.95
        assert torch.allclose(d.sample((4000,)).mean(0), y.mean(0), atol=0.06)


def test_fit_of_categories():
    """From a distribution that gives the data probability 0 to one that gives them probability 1, exactly."""
    y, model = torch.ones(40, dtype=torch.long), Free(h.EntmaxCategorical(3), torch.tensor([4.0, 0.0, 1.0]))
    assert (model().log_prob(y) == -math.inf).all()
    options = {"loss": gx.fenchel_young_loss, "lr": 0.3, "progress": False}
    before = -gx.fenchel_young_loss(model(), y).mean().item()
    result = gx.fit(model, y, validation=y[:9], epochs=1, **options)
    assert math.isclose(result.train[0], before, rel_tol=1e-3)
    assert math.isclose(result.validation[0], -gx.fenchel_young_loss(model(), y[:9]).mean().item(), rel_tol=1e-5)
    gx.fit(model, y, epochs=70, **options)
    assert model().probs.tolist() == [[0.0, 1.0, 0.0]] and gx.fenchel_young_loss(model(), y[0]) == 0


def test_loss_of_fit_must_be_one_number_per_row():
    model, y = gx.Autoregressive(MADE(2, 2), BETA(), (2,)), torch.randn(8, 2)
    with pytest.raises(ValueError, match=r"Expected loss\(distribution, rows\).shape == \(8,\), .*; got \(\)"):
        gx.fit(model, y, loss=lambda d, y: d.fenchel_young(y).mean(), progress=False)
    with pytest.raises(TypeError, match="Expected loss to return a tensor; got float"):
        gx.fit(model, y, loss=lambda d, y: 0.5, progress=False)
    with pytest.raises(ValueError, match=r"Expected loss\(distribution, rows\) to depend on parameters of module"):
        gx.fit(model, y, loss=lambda d, y: torch.zeros(8), progress=False)
    for name in ("loss", "penalty", "schedule", "optimizer"):
        with pytest.raises(TypeError, match=f"Expected {name} to be callable; got str"):
            gx.fit(model, y, progress=False, **{name: "adam"})


def test_queries_of_models():
    d = chain(BETA())
    y = d.sample((50,))
    assert torch.allclose(d.from_uniform(d.to_uniform(y)), y, atol=1e-9)
    y = d.rsample((5,))
    assert y.requires_grad and d.log_prob(y).isfinite().all()
    text = built(gx.Sequence(Recurrent(3, 3, hidden=5), h.EntmaxCategorical(3, alpha=2), eos=0, max_len=4))
    with torch.no_grad():
        strings = text().enumerate_support()
        lp = text().log_prob(strings)
        assert abs(lp.logsumexp(0)) < 1e-12 and (lp == -math.inf).any()
        best, score = gx.decoding.beam_search(text(), width=31)
        assert torch.allclose(score.max(), lp.max())
        assert (text.with_head(h.TopK(text.head, 1))().log_prob(best.reshape(-1, 4)[0]) == 0).all()
    mixture = h.Mixture(BETA(), 2)(torch.zeros(1, 6))
    assert mixture.log_prob(torch.tensor([0.1])).isfinite() and mixture.log_prob(torch.tensor([9.0])) == -math.inf
    forecast = gx.Conditional(nn.Linear(2, 2), BETA())(torch.zeros(2))
    assert torch.allclose(forecast.cdf(forecast.icdf(torch.tensor(0.3))), torch.tensor(0.3))
    assert forecast.fenchel_young(torch.tensor(9.0)).isfinite()


def test_wrong_arguments():
    for alpha in (1.0, 0.5):
        with pytest.raises(ValueError, match=r"Expected alpha to satisfy GreaterThan\(lower_bound=1.0\); got "):
            h.BetaGaussian(alpha=alpha)
        with pytest.raises(ValueError, match="Expected alpha to be above 1 and finite; got "):
            h.EntmaxCategorical(3, alpha=alpha)
    with pytest.raises(ValueError, match="Expected categories to be an integer >= 1; got 0"):
        h.EntmaxCategorical(0)
    with pytest.raises(ValueError, match=r"Expected size to be an integer >= 1; got 2\.0"):
        h.MultivariateBetaGaussian(2.0)
    with pytest.raises(ValueError, match="got BetaGaussian: its support depends on loc: pass a fixed value"):
        h.Parametric(gx.distributions.BetaGaussian, alpha=1.5)
    with pytest.raises(TypeError, match=r"Expected a head over integers 0 \.\.\. V - 1; got a head of BetaGaussian"):
        h.TopK(BETA(), 2)
