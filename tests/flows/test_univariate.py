"""Flows on one axis: cdf and icdf against quadrature, derivatives, samples, supports, bases and Pyro."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from scipy import stats
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import flows, heads
from pyro_genexact.conditioners import Independent
from pyro_genexact.families.cdf import cdf, icdf
from pyro_genexact.testing import redraw
from support.checks import close
from support.recipes import RECIPES, both, masses
from support.values import F64

SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "interval": constraints.interval(-1.0, 3.0),
    "below": constraints.less_than(2.0),
    "listed": [constraints.greater_than(-2.0)],
}
supports = pytest.mark.parametrize("support", SUPPORTS)


def make(name="naf", context=0, spread=0.4, **options):
    options = {"transforms": 2, **({} if name == "bnaf" else {"hidden": (6,), "activation": torch.tanh}), **options}
    return redraw(flows.univariate(RECIPES[name], context, **options).double(), spread=spread)


U = torch.tensor([1e-14, 1e-8, 1e-3, 0.1, 0.3, 0.5, 0.8, 0.99, 1 - 1e-9], dtype=F64)


@both
def test_quantiles_and_the_distribution_function(name, inverse):
    """Inverse to each other, relative to the tail; the derivative of the one is the density."""
    d = make(name, inverse=inverse)()
    y = d.icdf(U)
    assert (y.diff() > 0).all()
    close(d.cdf(y)[:-1], U[:-1], 1e-9)
    assert ((d.cdf(y) / U).log().abs() < 1e-6).all()
    y = y.detach().requires_grad_()
    (slope,) = torch.autograd.grad(d.cdf(y).sum(), y, create_graph=True)
    close(slope.log(), d.log_prob(y), 1e-8)
    u = U.clone().requires_grad_()
    (width,) = torch.autograd.grad(d.icdf(u).sum(), u)
    close(width.log(), -d.log_prob(d.icdf(U)), 1e-6)


@pytest.mark.parametrize("name", ["maf", "nsf", "naf", "sospf", "bnaf", "coupling_nsf"])
@supports
def test_cdf_is_the_integral_of_the_density(name, support):
    d = make(name, support=SUPPORTS[support])()
    with torch.no_grad():
        ends = d.icdf(torch.cat([torch.tensor([1e-12, 1e-8, 1e-4]), torch.linspace(0.001, 0.999, 100)]).double())
        found = masses(lambda y: d.log_prob(y.flatten()).exp().view(y.shape), ends).cumsum(0)
        close(found, d.cdf(ends[1:]), 1e-8)


@supports
@pytest.mark.parametrize("name, inverse", [("nsf", False), ("naf", True), ("glow_vector", False)])
def test_samples(name, inverse, support):
    """Kolmogorov and Smirnov's distance of samples to the cdf; of their cdf to uniform, for each context."""
    d = make(name, 2, inverse=inverse, support=SUPPORTS[support])(torch.randn(3, 2, dtype=F64))
    with torch.no_grad():
        y = d.sample((2000,))
        u = d.cdf(y)
    assert y.shape == (2000, 3) and d.support.check(y).all()
    for row in u.unbind(1):
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4
    assert (y[:, 0] != y[:, 1]).all()


@supports
def test_outside_of_the_support(support):
    d = make("nsf", support=SUPPORTS[support])()
    inf, nan = math.inf, math.nan
    below, above = {
        "real": ([-inf], [inf]),
        "positive": ([-inf, -3.0, 0.0], [inf]),
        "interval": ([-inf, -4.0, -1.0], [3.0, 5.0, inf]),
        "below": ([-inf], [2.0, 5.0, inf]),
        "listed": ([-inf, -4.0, -2.0], [inf]),
    }[support]
    for values, expected in ((below, 0.0), (above, 1.0)):
        y = torch.tensor(values, dtype=F64)
        assert (d.cdf(y) == expected).all() and (cdf(d, y) == expected).all()
        plain = flows.UnivariateDistribution(d.base_dist, d.transforms, validate_args=False)
        assert (plain.log_prob(y) == -inf).all()
    assert d.cdf(torch.tensor(nan, dtype=F64)).isnan()
    ends = d.icdf(torch.tensor([0.0, 1.0], dtype=F64)).tolist()
    assert ends == [below[-1], above[0]]
    for strange in (-0.1, 1.1):
        with pytest.raises(ValueError, match="Expected u to lie in"):
            d.icdf(torch.tensor([0.5, strange], dtype=F64))


@supports
def test_the_packages_own_functions_agree(support):
    d = make("maf", 2, support=SUPPORTS[support])(torch.randn(3, 2, dtype=F64))
    u = U.view(-1, 1).expand(-1, 3)
    close(icdf(d, u), d.icdf(u), 1e-12)
    close(cdf(d, d.icdf(u)), d.cdf(d.icdf(u)), 1e-12)
    assert d.cdf(d.icdf(u)).shape == (9, 3)


def test_it_is_the_flow_of_one_feature():
    """With the weights of the recipe over vectors, and for a support bounded above alone with the base turned round."""
    for support in (constraints.positive, constraints.less_than(2.0)):
        one = make("nsf", support=support)
        flow = RECIPES["nsf"](1, transforms=2, hidden=(6,), activation=torch.tanh, support=support).double()
        flow.transforms.load_state_dict(one.transforms.state_dict())
        y = one().sample((20,))
        close(one().log_prob(y), flow().log_prob(y.unsqueeze(-1)))


@pytest.mark.parametrize("name", RECIPES)
def test_shapes(name):
    d = make(name, 2)(torch.randn(4, 1, 2, dtype=F64))
    assert (d.batch_shape, d.event_shape) == ((4, 1), ())
    assert d.expand([4, 3]).sample((5,)).shape == (5, 4, 3)
    assert d.expand([2, 4, 3]).log_prob(torch.zeros(3, dtype=F64)).shape == (2, 4, 3)
    assert d.log_prob(torch.zeros(6, 4, 7, dtype=F64)).shape == (6, 4, 7)
    assert d.cdf(torch.zeros(7, dtype=F64)).shape == (4, 7) and d.icdf(torch.full((7,), 0.3).double()).shape == (4, 7)
    free = make(name)()
    assert (free.batch_shape, free.event_shape) == ((), ())
    wide = free.expand((6,))
    assert isinstance(wide, flows.UnivariateDistribution) and wide.sample().unique().numel() == 6
    close(wide.cdf(torch.zeros(6, dtype=F64)), free.cdf(torch.zeros(6, dtype=F64)))


@pytest.mark.parametrize("name", RECIPES)
def test_gradients(name):
    """Of cdf, icdf, rsample and log_prob, in every parameter that matters, against finite differences."""
    flow, c = make(name, 2), torch.randn(3, 2, dtype=F64)
    y, u = torch.randn(3, dtype=F64), torch.tensor([0.1, 0.5, 0.8], dtype=F64)

    def values():
        torch.manual_seed(3)
        d = flow(c)
        return torch.cat([d.cdf(y), d.icdf(u), d.rsample(), d.log_prob(y)])

    total = lambda: values().sin().sum()  # noqa: E731
    names, parameters = zip(*flow.named_parameters(), strict=True)
    grads = torch.autograd.grad(total(), parameters, allow_unused=True, materialize_grads=True)
    for label, p, g in zip(names, parameters, grads, strict=True):
        step, start = torch.randn_like(p), p.detach().clone()
        with torch.no_grad():
            ends = [(p.copy_(start + h * step), total())[1] for h in (1e-6, -1e-6)]
            p.copy_(start)
        assert (g * step).sum().item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), abs=1e-5), label


def student():
    return gx.Conditional(nn.Linear(2, 3), heads.StudentT())


@pytest.mark.parametrize("base", [dist.Laplace(0.0, 1.0), dist.StudentT(3.0), dist.Gumbel(0.0, 1.0)], ids=repr)
def test_bases(base):
    flow = make("nsf", base=base, support=constraints.positive)
    d = flow()
    close(d.cdf(d.icdf(U))[:-1], U[:-1], 1e-7)
    y = d.icdf(U[2:-1]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(d.cdf(y).sum(), y)
    close(slope.log(), d.log_prob(y), 1e-6)


def test_a_learned_base_with_the_context():
    flow = redraw(flows.univariate(RECIPES["maf"], 2, base=student(), hidden=(6,)).double())
    c, y = torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    d = flow(c)
    x = d.transforms[0].inv(y)
    ladj = d.transforms[0].log_abs_det_jacobian(x, y)
    close(d.log_prob(y), flow.base(c).log_prob(x) - ladj)
    close(d.cdf(y), cdf(flow.base(c), x))
    d.cdf(y).sum().backward()
    assert all(p.grad is not None for p in flow.base.parameters())


def test_errors():
    with pytest.raises(ValueError, match=r"Expected base\.event_shape == \(\) \(univariate\); got \(1,\)\."):
        flows.univariate(flows.maf, base=dist.Normal(torch.zeros(1), 1.0).to_event(1))
    vectors = gx.Autoregressive(Independent(1, 3), heads.StudentT(), (1,))
    with pytest.raises(ValueError, match=r"Expected base\.event_shape == \(\) \(univariate\); got \(1,\)\."):
        flows.univariate(flows.maf, base=vectors)()
    with pytest.raises(TypeError, match=r"Expected recipe to make a Flow that ends with ToSupport; got Linear\."):
        flows.univariate(lambda features, context: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Expected no context"):
        flows.univariate(flows.maf)(torch.zeros(2))
    with pytest.raises(ValueError, match="Expected features to be an integer >= 2"):
        flows.univariate(flows.maf, support=constraints.simplex)


def test_bases_over_less_than_the_reals():
    text = r"Expected base\.support to be all real numbers; got .* of {}\."
    for base in (dist.Uniform(0.0, 1.0), dist.Poisson(3.0), dist.Gamma(1.0, 1.0)):
        with pytest.raises(ValueError, match=text.format(type(base).__name__)):
            flows.univariate(flows.maf, base=base)
    module = gx.Conditional(nn.Linear(2, heads.Gamma().num_params), heads.Gamma())
    with pytest.raises(ValueError, match=text.format("")[:-4]):
        flows.univariate(flows.maf, 2, base=module)(torch.zeros(2))


def test_values_that_are_no_tensors():
    d = make("maf")()
    for method in (d.cdf, d.icdf):
        with pytest.raises(TypeError, match=r"Expected value to be a tensor; got float\."):
            method(0.5)


def test_copies():
    flow = make("naf", 2, support=constraints.positive)
    c, y = torch.randn(3, 2, dtype=F64), torch.rand(3, dtype=F64)
    d = flow(c)
    expected = d.log_prob(y)
    for again in (pickle.loads(pickle.dumps(flow))(c), pickle.loads(pickle.dumps(d))):
        close(again.log_prob(y), expected)
        assert again.support.check(y).all() and again.transforms[0].sign == 1


def test_fit_recovers_quantiles():
    """A skewed regression whose quantiles are known: y = exp(sin x + 0.3 z)."""
    x = 4 * torch.rand(1500, 1) - 2
    y = (torch.sin(x[:, 0]) + 0.3 * torch.randn(1500)).exp()
    flow = flows.univariate(flows.nsf, 1, transforms=1, hidden=(16,), support=constraints.positive, standardize=y)
    gx.fit(flow, y, x, epochs=15, batch_size=100, lr=5e-3, progress=False)
    at = torch.tensor([[-1.0], [0.0], [1.0]])
    for u in (0.1, 0.5, 0.9):
        truth = torch.sin(at[:, 0]) + 0.3 * dist.Normal(0.0, 1.0).icdf(torch.tensor(u))
        assert (flow(at).icdf(torch.tensor(u)).log() - truth).abs().max() < 0.15


def test_standardize_takes_data_of_scalars():
    rows = torch.rand(50, dtype=F64) + 0.5
    for given in (rows, rows[:, None]):
        flow = flows.univariate(flows.nsf, support=constraints.positive, standardize=given)
        scaling = flow.transforms[-2].transform
        close(scaling.shift, rows.log().mean()[None])
        close(scaling.scale, rows.log().std(correction=0)[None])
    for wrong in (torch.rand(5, 2), torch.rand(5, 1, 1)):
        with pytest.raises(ValueError, match=r"Expected standardize\.shape\[1:\] == \(1,\)"):
            flows.univariate(flows.maf, standardize=wrong)


def test_in_a_plate_and_under_nuts():
    flow = make("nsf", 2, support=constraints.positive).float()
    c, y = torch.randn(30, 2), torch.rand(30) + 0.1

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", 30, subsample_size=10) as i:
            pyro.sample("y", flow(c[i]), obs=y[i])

    pyro.clear_param_store()
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    first = sum(svi.step() for _ in range(5))
    for _ in range(100):
        svi.step()
    assert sum(svi.step() for _ in range(5)) < first
    pyro.clear_param_store()
    d = make("maf", support=constraints.positive, spread=0.25)()

    def prior():
        pyro.sample("z", d)

    mcmc = MCMC(NUTS(prior, jit_compile=False), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    u = d.cdf(mcmc.get_samples()["z"]).detach()
    assert abs(u.mean().item() - 0.5) < 0.15 and np.ptp(u.numpy()) > 0.7


def test_independent_conditioner_is_a_free_density():
    flow = flows.univariate(flows.bpf, conditioner=lambda P, C: Independent(1, P))
    assert flow().cdf(torch.tensor(0.0)).item() == pytest.approx(0.5, abs=0.2)
