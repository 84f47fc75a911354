"""Quantiles that are searched for: to the last bit, in few steps, and through autoregressive models."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_genexact import Autoregressive
from pyro_genexact.conditioners import MADE
from pyro_genexact.families import special
from pyro_genexact.families.cdf import cdf, icdf
from pyro_genexact.families.mixture import Mixture
from pyro_genexact.heads import Mixture as MixtureHead
from pyro_genexact.heads import Parametric
from support.values import F64
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")


def _mixture(family):
    first, second = torch.tensor([1.0, -1.0]).expand(3, 2), torch.tensor([0.5, 2.0]).expand(3, 2)
    return lambda a, b: dist.MixtureSameFamily(
        dist.Categorical(logits=a[:, None] * first),
        family(b[:, None] * second + (first if family is dist.Normal else 0), second),
    )


ROUND_TRIPS = {
    "normals": _mixture(dist.Normal),
    "gammas": _mixture(dist.Gamma),
    "several": lambda a, b: Mixture(torch.stack([a, b], -1), [dist.Normal(a, 0.1), dist.StudentT(3.0, 4 * b)]),
    "student": lambda a, b: dist.StudentT(1 + b, a, b),
    "beta": lambda a, b: dist.Beta(1.2 + a**2, b),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_from_uniform_goes_through_the_solver_and_back(name):
    """A site after another, with gradients; the mixtures have no closed quantile function."""
    a, b = t(0.4, -1.0, 2.0).requires_grad_(), t(1.0, 0.3, 2.5).requires_grad_()
    u = torch.cat([torch.rand(20, 3), t([1e-9, 0.5, 1 - 1e-9])]).requires_grad_()
    d = ROUND_TRIPS[name](a, b)
    y = icdf(d, u)
    assert torch.allclose(cdf(d, y), u, rtol=1e-9, atol=0)
    assert torch.allclose(icdf(d, cdf(d, y)), y, rtol=1e-6)
    density = d.log_prob(y.detach()).exp().detach()
    by_u, by_a, by_b = torch.autograd.grad(y.sum(), (u, a, b), create_graph=True)
    assert torch.allclose(by_u, 1 / density, rtol=1e-9)
    for found, parameter in ((by_a, a), (by_b, b)):
        (moved,) = torch.autograd.grad(cdf(ROUND_TRIPS[name](a, b), y.detach()), parameter, -1 / density)
        assert torch.allclose(found, moved, rtol=1e-9) and found.all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(by_a.sum() + by_b.sum(), (u, a, b)))


@pytest.mark.parametrize(
    "head",
    [
        Parametric(dist.StudentT),
        Parametric(dist.Beta),
        MixtureHead(Parametric(dist.Normal), 3),
        MixtureHead(Parametric(dist.Gamma), 2),
    ],
)
def test_from_uniform_of_an_autoregressive_distribution(head):
    model = Autoregressive(MADE(3, head.num_params, hidden=(8,)), head, (3,)).double()
    u = 0.02 + 0.96 * torch.rand(5, 3)
    u.requires_grad_()
    y = model().from_uniform(u)
    assert torch.allclose(model().to_uniform(y), u, rtol=1e-9, atol=0)
    grads = torch.autograd.grad(y.sum(), [u, *model.parameters()], allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in grads) and (grads[0] > 0).any()


def _halves(family, *parameters):
    return dist.MixtureSameFamily(
        dist.Categorical(t(0.5, 0.5)), family(*[t(*p) for p in parameters], validate_args=False)
    )


NEEDLES = {  # and an interval of u where the cdf is that of the second half
    "normal 1e3, 1e-6": (lambda: _halves(dist.Normal, (0.0, 1e3), (1.0, 1e-6)), (0.56, 0.99)),
    "normal 1e5, 1e-6": (lambda: _halves(dist.Normal, (0.0, 1e5), (1.0, 1e-6)), (0.56, 0.99)),
    "normal 1e5, 1e-4": (lambda: _halves(dist.Normal, (0.0, 1e5), (1.0, 1e-4)), (0.56, 0.99)),
    "normal -3e5, 1e-3": (lambda: _halves(dist.Normal, (0.0, -3e5), (1.0, 1e-3)), (0.01, 0.45)),
    "gamma 1e10, 1e5": (lambda: _halves(dist.Gamma, (2.0, 1e10), (1.0, 1e5)), (0.56, 0.99)),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_quantiles_are_right_to_the_last_bit(name):
    """The number before has a cdf below u; of the gamma family two, since rounding of its cdf is as large as that."""
    make, ends = NEEDLES[name]
    d, u = make(), torch.linspace(*ends, 44)
    x = icdf(d, u)
    before = x.nextafter(t(-torch.inf))
    if name.startswith("gamma"):
        before = before.nextafter(t(-torch.inf))
    assert (cdf(d, x) >= u).all() and (cdf(d, before) < u).all()


def test_the_quantile_at_a_flat_part_is_where_it_begins():
    for low, high in ((t(0, 2), t(1, 3)), (t(-1, 1e-9), t(0, 3)), (t(-1e5, 7), t(1e-3, 8))):
        d = _halves(dist.Uniform, low.tolist(), high.tolist())
        rounding = 4 * torch.finfo(F64).eps * (high - low)[0]  # of the cdf, and of x
        assert (icdf(d, t(0.5)) - high[0]).abs() <= rounding and cdf(d, icdf(d, t(0.5))) >= 0.5


def test_quantiles_take_few_evaluations(monkeypatch):
    calls = []
    plain = special.plain_betainc
    monkeypatch.setattr(special, "plain_betainc", lambda *args: calls.append(1) or plain(*args))
    u = torch.linspace(0.001, 0.999, 50)
    for d in (dist.StudentT(3.0), dist.Beta(2.0, 3.0), dist.FisherSnedecor(3.0, 5.0)):
        calls.clear()
        icdf(d, u)
        assert len(calls) < 25  # bisection takes 64


def test_quantiles_in_float32_are_rounded_from_float64():
    u = torch.linspace(0.001, 0.999, 200, dtype=torch.float32)
    loc, scale = torch.tensor([1000.0, -2000.0]).float(), torch.tensor([0.1, 10.0]).float()
    for family in (
        lambda loc, scale: dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc)), dist.Normal(loc, scale)),
        lambda loc, scale: dist.StudentT(scale[1], loc[1], scale[0]),
        lambda loc, scale: dist.Gamma(scale[1], scale[0]),
    ):
        y = icdf(family(loc, scale), u)
        assert y.dtype == torch.float32
        assert torch.allclose(y, icdf(family(loc.double(), scale.double()), u.double()).float(), rtol=3e-7)
