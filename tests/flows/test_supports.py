"""Supports and standardisation of flows: changes of variables by hand, and mass."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from support.checks import close
from support.recipes import maf_and_iaf
from support.values import F64, normal_weights

# Supports


@maf_and_iaf
def test_positive_support_is_a_change_of_variables(recipe):
    """log p(y) = log p_real(log y) - sum log y, with torch.distributions' own exp transform."""
    torch.manual_seed(2)
    flow = normal_weights(recipe(3, hidden=(8,), support=constraints.positive))
    torch.manual_seed(2)
    real = normal_weights(recipe(3, hidden=(8,)))
    by_torch = dist.TransformedDistribution(real(), [torch.distributions.ExpTransform()])
    y = torch.randn(50, 3, dtype=F64).mul(2).exp()
    close(flow().log_prob(y), real().log_prob(y.log()) - y.log().sum(-1))
    close(flow().log_prob(y), by_torch.log_prob(y))
    draws = flow().sample((100,))
    assert draws.shape == (100, 3) and (draws > 0).all()
    assert flow().support.check(draws).all()


@maf_and_iaf
def test_interval_support_is_a_change_of_variables(recipe):
    torch.manual_seed(2)
    flow = normal_weights(recipe(2, hidden=(8,), support=constraints.interval(-1.0, 3.0)))
    torch.manual_seed(2)
    real = normal_weights(recipe(2, hidden=(8,)))
    y = 4 * torch.rand(50, 2, dtype=F64) - 1
    u = (y + 1) / 4
    close(flow().log_prob(y), real().log_prob(u.logit()) - (4 * u * (1 - u)).log().sum(-1))
    # far into the tails, where a sigmoid would round to 1
    tiny = torch.tensor([[-1 + 1e-12, 0.0]], dtype=F64)
    u = ((tiny + 1) / 4).clamp(min=1e-300)
    expected = real().log_prob(u.log() - (1 - u).log()) - (4 * u * (1 - u)).log().sum(-1)
    assert expected.isfinite().all()
    close(flow().log_prob(tiny), expected, 1e-9)


@maf_and_iaf
def test_simplex_has_mass_one(recipe):
    """Of 3, with the density of the first two coordinates, as for the Dirichlet; midpoint rule in logit coordinates."""
    flow = normal_weights(recipe(3, hidden=(8,), transforms=2, support=constraints.simplex), 0.3)
    n = 500
    with torch.no_grad():
        edge = torch.linspace(-25, 25, n, dtype=F64)
        a, b = (g.flatten().sigmoid() for g in torch.meshgrid(edge, edge, indexing="ij"))
        y = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1)
        area = (1 - a) * a * (1 - a) * b * (1 - b) * (50 / (n - 1)) ** 2
        mass = (flow().log_prob(y).exp() * area).sum().item()
    assert mass == pytest.approx(1.0, abs=2e-4)
    draws = flow().sample((50,))
    assert draws.shape == (50, 3) and (draws > 0).all()
    close(draws.sum(-1), torch.ones(50, dtype=F64))
    assert flow().event_shape == (3,)


@maf_and_iaf
def test_interval_and_list_have_mass_one(recipe):
    flow = normal_weights(
        recipe(2, hidden=(8,), transforms=2, support=[constraints.positive, constraints.unit_interval]), 0.3
    )
    n = 500
    with torch.no_grad():
        edge = torch.linspace(-25, 25, n, dtype=F64)
        a, b = torch.meshgrid(edge, edge, indexing="ij")
        y = torch.stack([a.exp(), b.sigmoid()], -1)
        area = a.exp() * b.sigmoid() * (-b).sigmoid() * (50 / (n - 1)) ** 2
        assert (flow().log_prob(y).exp() * area).sum().item() == pytest.approx(1.0, abs=2e-4)


@maf_and_iaf
def test_list_of_supports(recipe):
    supports = [
        constraints.real,
        constraints.positive,
        constraints.positive,
        constraints.interval(0.0, 2.0),
        constraints.less_than(5.0),
    ]
    torch.manual_seed(2)
    flow = normal_weights(recipe(5, hidden=(8,), support=supports), 0.3)
    torch.manual_seed(2)
    real = normal_weights(recipe(5, hidden=(8,)), 0.3)
    x = torch.randn(20, 5, dtype=F64)
    y = torch.stack([x[:, 0], x[:, 1].exp(), x[:, 2].exp(), 2 * x[:, 3].sigmoid(), 5 - x[:, 4].exp()], 1)
    ladj = x[:, 1] + x[:, 2] + (2 * x[:, 3].sigmoid() * (-x[:, 3]).sigmoid()).log() + x[:, 4]
    close(flow().log_prob(y), real().log_prob(x) - ladj)
    draws = flow().sample((200,))
    for column, support in zip(draws.unbind(1), supports, strict=True):
        assert support.check(column).all()


# Standardisation


@maf_and_iaf
@pytest.mark.parametrize("support", [None, constraints.positive])
def test_standardize(recipe, support):
    """Shift and scale of the rows in unconstrained space, by hand."""
    rows = (torch.randn(200, 3, dtype=F64) * torch.tensor([3.0, 0.1, 1.0]) + torch.tensor([10.0, -1.0, 0.0])).double()
    if support is not None:
        rows = rows.div(4).exp()
    x = rows if support is None else rows.log()
    shift, scale = x.mean(0), x.std(0, correction=0)
    torch.manual_seed(2)
    flow = normal_weights(recipe(3, hidden=(8,), support=support, standardize=rows))
    torch.manual_seed(2)
    plain = normal_weights(recipe(3, hidden=(8,)))
    expected = plain().log_prob((x - shift) / scale) - scale.log().sum() - (0 if support is None else x.sum(-1))
    close(flow().log_prob(rows), expected, 1e-9)
    assert {"transforms.5.transform.shift", "transforms.5.transform.scale"} <= set(flow.state_dict())


def test_a_start_near_the_identity_fits_standardised_rows():
    rows = 1000 + 50 * torch.randn(500, 4)
    flow = gx.flows.maf(4, standardize=rows)
    nats = flow().log_prob(rows).mean().item()
    assert nats == pytest.approx(-4 * (math.log(50) + 0.5 * math.log(2 * math.pi) + 0.5), abs=0.8)


@pytest.mark.parametrize("value", [0.1, 3.3, 1e-3, 1e5 + 0.1])
def test_a_constant_column_is_found_despite_rounding(value):
    """Its mean rounds, so that its deviations are not exactly zero; a scale of 1e-9 would give meaningless nats."""
    rows = torch.randn(7, 2)
    rows[:, 1] = value
    with pytest.raises(ValueError, match=r"at features \[1\]"):
        gx.flows.maf(2, standardize=rows)
