"""Heads of every distribution that Pyro exports: shapes, gradients, extremes, copies, and densities against SciPy."""

from __future__ import annotations

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import constraints

from pyro_genexact import heads
from pyro_genexact.families.in_support import contains, log_prob_everywhere
from pyro_genexact.heads import Normal, Parametric
from pyro_genexact.heads.catalogue import markdown
from support.families import DISCRETE, HEADS, ROWS, SCALARS, ends, noise
from support.values import draws

EVERY = pytest.mark.parametrize("name", HEADS)


def test_at_least_sixty():
    assert len(HEADS) >= 60
    assert all(row.reason for row in ROWS if row.head is None)
    assert markdown().count("\n") == len(ROWS) + 4


@EVERY
def test_shapes_and_start(name):
    head = HEADS[name]
    d = head(torch.zeros(2, 3, head.num_params, dtype=torch.float64))
    value = draws(d, 5)
    assert d.batch_shape == (2, 3) and d.event_shape == head.site_shape and value.shape == (5, 2, 3, *head.site_shape)
    assert head.support.event_dim == len(head.site_shape) and d.has_rsample == head.has_rsample
    assert contains(head.support, value).all()
    assert d.log_prob(value).isfinite().all() and d.log_prob(value).shape == (5, 2, 3)
    one = head(torch.zeros(1, head.num_params, dtype=torch.float64))
    assert torch.allclose(one.log_prob(value[:, 0, :1]), d.log_prob(value)[:, 0, :1])
    base = d.base_dist if len(head._lead) else d
    for part in head._plan:  # nothing saturated, scales of 1
        start = getattr(base, part.name, None)
        if start is not None:
            assert start.abs().max() <= 4.0
            if "scale" in part.name and "tril" not in part.name:
                assert torch.equal(start, torch.ones_like(start))


@EVERY
def test_every_parameter_has_a_gradient(name):
    head = HEADS[name]
    phi = noise(head, 8, 3).requires_grad_()
    d = head(phi)
    if head.num_params:
        d.log_prob(draws(d)).sum().backward()
        assert (phi.grad.abs().amax((0, 1)) > 0).all()
    if head.has_rsample and head.num_params:
        (grad,) = torch.autograd.grad(
            (head(phi).rsample() * noise(head, 8, 3, seed=5).sum(-1).reshape(8, 3, *[1] * len(head.site_shape)))
            .cos()
            .sum(),
            phi,
        )
        assert grad.isfinite().all() and (grad.abs().amax((0, 1)) > 0).all()


@EVERY
def test_samples_follow_the_density(name):
    """The mean of the score, d log p / d phi, is 0 if they do."""
    head = HEADS[name]
    rows = 100 if name == "SineBivariateVonMises" else 2000  # whose normaliser is slow
    phi = noise(head, 1, 1).expand(rows, 1, -1).clone().requires_grad_()
    if not head.num_params:
        return
    d = head(phi)
    value = draws(d)
    assert not value.requires_grad
    (score,) = torch.autograd.grad(d.log_prob(value).sum(), phi)
    score = score[:, 0]
    assert (score.mean(0).abs() < 4.5 * score.std(0) / math.sqrt(rows) + 1e-12).all()


@EVERY
@pytest.mark.parametrize("size", [1e4, -1e4, 1e8, -1e8, None])
def test_extreme_parameters(name, size):
    head = HEADS[name]
    value = draws(head(torch.zeros(4, 3, head.num_params, dtype=torch.float64)))
    phi = noise(head, 4, 3, spread=1e8) if size is None else torch.full((4, 3, head.num_params), size).double()
    log_prob = head(phi.requires_grad_()).log_prob(value)
    # exp(-exp(1e8)) is no number
    assert log_prob.isfinite().all() or (name == "Gumbel" and not log_prob.isnan().any())
    if head.num_params:
        log_prob.sum().backward()
        assert phi.grad.isfinite().all()


FAR = {
    "line": [1e4, -1e4, 1e8, -1e8, 1e30],
    "half": [1e-300, 1e-30, 1e-8, 1e4, 1e8, 1e30],
    "interval": [1e-9, 1 - 1e-9],
    "counts": [0.0, 1e4, 1e6, 1e8],
}


@pytest.mark.parametrize("name", SCALARS)
def test_far_values(name):
    head = HEADS[name]
    low, high = ends(head.support)
    if name in DISCRETE:
        values = FAR["counts"] if high == math.inf and head.support is not constraints.boolean else []
    elif math.isfinite(high):
        values = [low + (high - low) * v for v in FAR["interval"]]
    else:
        values = [low + v for v in FAR["half"]] if math.isfinite(low) else FAR["line"]
    for value in values:
        phi = noise(head, 3, 1).requires_grad_()
        log_prob = head(phi).log_prob(torch.tensor(value, dtype=torch.float64))
        beyond = name == "Gumbel" and value < 0  # exp(-exp(1e4)) is no number
        assert torch.equal(log_prob, torch.full_like(log_prob, -math.inf)) if beyond else log_prob.isfinite().all()
        if head.num_params:
            log_prob.sum().backward()
            assert phi.grad.isfinite().all()


@pytest.mark.parametrize("name", ["AffineBeta", "Beta", "Chi2", "Gamma", "Kumaraswamy", "RelaxedBernoulli", "Uniform"])
def test_ends(name):
    """Densities may be infinite at the ends, which are no part of the support."""
    support = HEADS[name].support
    for end in ends(support)[:: -1 if name == "Uniform" else 1][: 1 if name == "Uniform" else 2]:
        if math.isfinite(end):
            log_prob = log_prob_everywhere(HEADS[name](noise(HEADS[name], 1, 1)), torch.tensor(end).double(), support)
            assert float(log_prob) == -math.inf
    for vectors in ("Dirichlet", "RelaxedOneHotCategorical"):
        assert not HEADS[vectors].support.check(torch.tensor([1.0, 0.0, 0.0]))
        assert HEADS[vectors].support.check(torch.tensor([0.5, 0.25, 0.25]))


@EVERY
def test_outside(name):
    head = HEADS[name]
    phi = noise(head, 3, 2).requires_grad_()
    d = head(phi)
    inside = draws(d).double()
    low, high = ends(head.support)
    outside = [torch.full_like(inside, math.inf), inside * math.nan]
    if name in DISCRETE:
        outside += [inside + 0.5, inside - 100]
    elif math.isfinite(low) or math.isfinite(high):
        outside += [torch.full_like(inside, low - 1 if math.isfinite(low) else high + 1)]
    if head.site_shape and (name in DISCRETE or not isinstance(head.support, constraints.independent)):
        outside += [inside * 0, inside * 2]
    for value in outside:
        log_prob = log_prob_everywhere(head(phi), value, head.support)
        assert torch.equal(log_prob, torch.full_like(log_prob, -math.inf))
        if head.num_params:
            (grad,) = torch.autograd.grad(log_prob.sum(), phi)
            assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.allclose(log_prob_everywhere(d, inside, head.support), d.log_prob(inside))


@EVERY
def test_copies_and_dtypes(name):
    head = HEADS[name]
    phi = noise(head, 2, 3)
    d = head(phi)
    value = draws(d)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), copy.deepcopy(head).double()):
        assert torch.allclose(twin(phi).log_prob(value), d.log_prob(value)) and repr(twin) == repr(head)
        assert contains(twin.support, value).all()
    single = head(phi.float())
    small = draws(single)
    assert small.dtype in (torch.float32, torch.int64) and single.log_prob(small).dtype == torch.float32
    assert torch.allclose(single.log_prob(small).double(), d.log_prob(small.to(value)), rtol=1e-3, atol=1e-3)
    if name != "SineBivariateVonMises":  # makes tensors on the default device
        with torch.device("meta"):
            assert torch.allclose(head(phi).log_prob(value), d.log_prob(value))
    assert set(head.state_dict()) <= {setting.split("=")[0] for setting in head._settings}


SCIPY = {
    "AffineBeta": lambda d: st.beta(d.concentration1, d.concentration0, -1, 3),
    "AsymmetricLaplace": lambda d: st.laplace_asymmetric(d.asymmetry, d.loc, d.scale),
    "Bernoulli": lambda d: st.bernoulli(d.probs),
    "Beta": lambda d: st.beta(d.concentration1, d.concentration0),
    "BetaBinomial": lambda d: st.betabinom(7, d.concentration1, d.concentration0),
    "Binomial": lambda d: st.binom(7, d.probs),
    "Cauchy": lambda d: st.cauchy(d.loc, d.scale),
    "Chi2": lambda d: st.chi2(d.df),
    "Exponential": lambda d: st.expon(scale=1 / d.rate),
    "FisherSnedecor": lambda d: st.f(d.df1, d.df2),
    "Gamma": lambda d: st.gamma(d.concentration, scale=1 / d.rate),
    "GammaPoisson": lambda d: st.nbinom(d.concentration, d.rate / (1 + d.rate)),
    "GeneralizedPareto": lambda d: st.genpareto(d.concentration, d.loc, d.scale),
    "Geometric": lambda d: st.geom(d.probs, loc=-1),
    "Gumbel": lambda d: st.gumbel_r(d.loc, d.scale),
    "HalfCauchy": lambda d: st.halfcauchy(scale=d.scale),
    "HalfNormal": lambda d: st.halfnorm(scale=d.scale),
    "InverseGamma": lambda d: st.invgamma(d.concentration, scale=d.rate),
    "Laplace": lambda d: st.laplace(d.loc, d.scale),
    "LogNormal": lambda d: st.lognorm(d.scale, scale=d.loc.exp()),
    "Logistic": lambda d: st.logistic(d.loc, d.scale),
    "NegativeBinomial": lambda d: st.nbinom(d.total_count, 1 - d.probs),
    "Normal": lambda d: st.norm(d.loc, d.scale),
    "Pareto": lambda d: st.pareto(d.alpha, scale=d.scale),
    "Poisson": lambda d: st.poisson(d.rate),
    "StudentT": lambda d: st.t(d.df, d.loc, d.scale),
    "Uniform": lambda d: st.uniform(-1, 3),
    "VonMises": lambda d: st.vonmises(d.concentration, d.loc),
    "Weibull": lambda d: st.weibull_min(d.concentration, scale=d.scale),
}


@pytest.mark.parametrize("name", [name for name in SCIPY if name in HEADS])
def test_scipy(name):
    d = HEADS[name](noise(HEADS[name], 5, 3, spread=0.7))
    value = draws(d)
    theirs = SCIPY[name](d)
    theirs = theirs.logpmf(value) if name in DISCRETE else theirs.logpdf(value)
    # torch's Bessel functions of VonMises are good to 1e-7
    assert torch.allclose(
        d.log_prob(value), torch.as_tensor(theirs), rtol=1e-8, atol=1e-6 if name == "VonMises" else 1e-8
    )


def test_scipy_of_larger_vectors():
    head = Parametric(dist.MultivariateNormal, (5,))
    phi = noise(head, 1, 1, spread=0.7)
    d = head(phi)
    value = draws(d)
    factor = torch.diag((10 * torch.tanh(phi[0, 0, 5:10] / 10)).exp())
    factor[torch.tril_indices(5, 5, -1).unbind()] = phi[0, 0, 10:]
    theirs = st.multivariate_normal(phi[0, 0, :5], factor @ factor.T).logpdf(value[0, 0])
    assert abs(float(d.log_prob(value)) - theirs) < 1e-10
    head = Parametric(dist.MultivariateStudentT, (4,), df=3.0)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    theirs = st.multivariate_t(d.loc[0, 0], d.scale_tril[0, 0] @ d.scale_tril[0, 0].T, df=3).logpdf(value)
    assert abs(float(d.log_prob(value)) - theirs) < 1e-10
    head = Parametric(dist.LowRankMultivariateNormal, (5,), rank=2)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    cov = d.cov_factor[0, 0] @ d.cov_factor[0, 0].T + d.cov_diag[0, 0].diag()
    assert abs(float(d.log_prob(value)) - st.multivariate_normal(d.loc[0, 0], cov).logpdf(value)) < 1e-10
    head = Parametric(dist.Dirichlet, (5,))
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    assert abs(float(d.log_prob(value)) - st.dirichlet(d.concentration[0, 0]).logpdf(value / value.sum())) < 1e-8
    head = Parametric(dist.Multinomial, (5,), total_count=9)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    assert abs(float(d.log_prob(value)) - st.multinomial(9, d.probs[0, 0]).logpmf(value.long().numpy())) < 1e-10


def test_parameters_follow_the_equation():
    phi = torch.tensor([[[0.4, 1.3]]], dtype=torch.float64)
    d = Normal()(phi)
    assert torch.equal(d.loc, phi[..., 0])
    assert torch.allclose(d.scale, (10 * torch.tanh(phi[..., 1] / 10)).exp())
    df = Parametric(dist.StudentT)(torch.zeros(1, 3)).df
    assert torch.allclose(df, torch.tensor([4.0]))
    d = heads.MultivariateNormal(2)(torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.5]]))
    assert torch.equal(d.scale_tril, torch.tensor([[[1.0, 0.0], [2.5, 1.0]]]))


def test_vector_sites():
    head = Parametric(dist.Categorical, (3, 4))
    phi = noise(head, 2, 5)
    assert head.site_shape == (3,) and head.num_params == 12
    value = draws(head(phi))
    expected = phi.reshape(2, 5, 3, 4).log_softmax(-1).gather(-1, value[..., None]).sum((-1, -2))
    assert torch.allclose(head(phi).log_prob(value), expected)
    head = Parametric(dist.Binomial, (3,), total_count=torch.tensor([1, 5, 9]))
    assert head.support.check(torch.tensor([1.0, 5.0, 9.0])) and not head.support.check(torch.tensor([2.0, 5.0, 9.0]))
    assert head(noise(head, 2, 5)).log_prob(torch.tensor([1.0, 5.0, 9.0])).shape == (2, 5)


def test_counts_add_up():
    for name in ("Multinomial", "DirichletMultinomial"):
        d, support = HEADS[name](torch.zeros(1, 3)), HEADS[name].support
        values = torch.tensor([[[4.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]], [[2.0, 2.0, 1.0]], [[4.5, -0.5, 0.0]]])
        inside = log_prob_everywhere(d, values, support).isfinite().flatten().tolist()
        assert inside == [True, False, False, False]


def test_repaired_log_probs():
    """Where Pyro's own log_prob or its gradient fails."""
    one = torch.ones((), dtype=torch.float64)
    a, x = torch.tensor(2e4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    head = HEADS["Kumaraswamy"]
    assert dist.Kumaraswamy(a, one, validate_args=False).log_prob(x) == -math.inf
    ours = head.family(a, one, validate_args=False).log_prob(x)
    assert torch.allclose(ours, a.log() + (a - 1) * x.log())
    for name in ("Kumaraswamy", "RelaxedBernoulli", "SoftAsymmetricLaplace", "Weibull"):
        head = HEADS[name]
        phi, options = noise(head, 5, 3), head._options()
        ours = head(phi)
        values = {part.name: getattr(ours, part.name) for part in head._plan}
        fixed = {"temperature": 0.7 * one} if name == "RelaxedBernoulli" else {}
        theirs = getattr(dist, name)(**values, **fixed, **options)
        value = draws(theirs)
        assert torch.allclose(ours.log_prob(value), theirs.log_prob(value), rtol=1e-9, atol=1e-9)
    tail = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    unit_one = HEADS["SoftAsymmetricLaplace"](torch.zeros(1, 4, dtype=torch.float64))
    log_prob = unit_one.log_prob(tail)
    (slope,) = torch.autograd.grad(log_prob.sum(), tail)
    assert torch.allclose(log_prob, torch.tensor(-1e4 + 0.5 - math.log(2), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(slope, torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_the_graph_of_a_category_keeps_one_copy_of_the_logits():
    phi = torch.randn(4, 1, 1000, dtype=torch.float64, requires_grad=True)
    y, kept = torch.tensor([[0], [1], [2], [999]]), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        log_prob = heads.Categorical(1000)(phi).log_prob(y)
    assert sum(kept.values()) < 1.1 * phi.numel() * 8
    (grad,) = torch.autograd.grad(log_prob.sum(), phi)
    torch.testing.assert_close(
        grad.squeeze(1), torch.eye(1000, dtype=torch.float64)[y.squeeze(1)] - phi.softmax(-1)[:, 0]
    )
