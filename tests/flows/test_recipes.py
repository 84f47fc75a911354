"""The recipes of flows: mass by adaptive quadrature, densities by autograd's Jacobian, directions, orders, and that each learns."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import flows
from pyro_genexact.conditioners import MADE, Independent
from pyro_genexact.conditioners.encoding import Dense
from pyro_genexact.testing import redraw
from support.checks import close
from support.recipes import BOTH, COUPLINGS, RECIPES, both, by_jacobian, couplings, make, masses, recipes
from support.values import F64

# Mass


def mass(density, boxes, edge=6.5, order=7, tol=1e-8, levels=8):
    """The integral over the plane, in sinh-spaced coordinates: Gauss-Legendre on squares, quartered where that matters."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(order))
    grid, weights = (torch.cartesian_prod(a, a) for a in (nodes, weights))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 2)

    def integrals(middles, half):
        v = middles.unsqueeze(1) + half * grid
        values = torch.cat([density(part) for part in v.sinh().flatten(0, 1).split(50_000)])
        return half**2 * (values.view(v.shape[:-1]) * v.cosh().prod(-1) * weights.prod(-1)).sum(-1)

    half, total = edge / boxes, 0.0
    ticks = (2 * torch.arange(boxes, dtype=F64) + 1) * half - edge
    middles = torch.cartesian_prod(ticks, ticks)
    coarse = integrals(middles, half)
    for _ in range(levels):
        half = half / 2
        middles = (middles.unsqueeze(1) + half * corners).flatten(0, 1)
        fine = integrals(middles, half).view(-1, 4)
        rough = (fine.sum(-1) - coarse).abs() > tol
        total += fine[~rough].sum().item()
        middles, coarse = middles.view(-1, 4, 2)[rough].flatten(0, 1), fine[rough].flatten()
        if not len(middles):
            break
    return total + coarse.sum().item()


@both
def test_mass_in_two_dimensions(name, inverse):
    wide = {"boxes": 24, "tol": 1e-9} if name == "glow_vector" else {"boxes": 12}
    slow = name in ("umnn", "naf deep")  # to invert, or to integrate, at every point
    flow = make(name, 2, inverse=inverse, transforms=1 if slow else 2, spread=0.25 if "nsf" in name or slow else 0.5)
    with torch.no_grad():
        middle = flow().sample((1000,)).median(0)[0]
        total = mass(lambda y: flow().log_prob(y + middle).exp(), **({"edge": 4.0, "boxes": 7} if slow else wide))
    assert total == pytest.approx(1.0, abs=1e-6)


@both
def test_mass_in_one_dimension_with_parameters_scaled_by_ten(name, inverse):
    """Adaptive, between quantiles, which lie where the density does, however sharp; each piece has the mass it should."""
    flow = flows.univariate(RECIPES[name], transforms=1, inverse=inverse)
    redraw(flow.double(), spread=0.3)
    with torch.no_grad():
        for part in flow.modules():
            if isinstance(
                part, (MADE, Independent, flows.coupling_recipes.Diagonal, gx.transforms.BlockAutoregressive)
            ):
                for p in (part.layers[-1] if isinstance(part, MADE) else part).parameters():
                    p.mul_(10)
        d = flow()
        u = torch.cat([torch.tensor([1e-12, 1e-9, 1e-6], dtype=F64), torch.linspace(0.001, 0.999, 100, dtype=F64)])
        u = torch.cat([u, 1 - u[:3].flip(0)])
        found = masses(lambda y: d.log_prob(y.flatten()).exp().view(y.shape), d.icdf(u))
    close(found, u.diff(), 1e-8)
    assert found.sum().item() == pytest.approx(1 - 2e-12, abs=1e-6)


# Densities and directions


@both
def test_log_prob_is_autograds(name, inverse):
    d = make(name, 3, inverse=inverse)()
    y = 1.5 * torch.randn(4, 3, dtype=F64)
    close(d.log_prob(y), by_jacobian(d, y), 1e-9)


@recipes
def test_log_prob_is_autograds_given_a_context(name):
    flow, y, c = make(name, 3, context=2), torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    d = flow(c)
    assert flow.context == 2 and d.batch_shape == (4,) and d.event_shape == (3,)
    close(
        d.log_prob(y), torch.cat([by_jacobian(flow(row), value[None]) for row, value in zip(c, y, strict=True)]), 1e-9
    )
    assert (d.log_prob(y) - flow(c.roll(1, 0)).log_prob(y)).abs().min() > 1e-6
    draws = d.rsample((2000,))
    assert (draws[:, 0] != draws[:, 1]).all()
    grads = torch.autograd.grad(d.log_prob(draws[:5].detach()).sum() + draws.sin().sum(), [*flow.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("iaf", "nice", "glow_vector")])
def test_inverse_is_the_other_direction(name):
    """One transform with the same weights, once pushed through and once pulled back."""
    there, back = (make(name, 3, transforms=1, inverse=inverse) for inverse in (False, True))
    back.load_state_dict(dict(zip(back.state_dict(), there.state_dict().values(), strict=True)))
    x = torch.randn(5, 3, dtype=F64)
    close(there().transforms[0](back().transforms[0](x)), x, 1e-9)


def test_iaf_is_the_inverse_direction_of_maf():
    state, x = make("iaf", 3).state_dict(), torch.randn(5, 3, dtype=F64)
    flow = make("maf", 3, inverse=True)
    flow.load_state_dict(state)
    other = make("iaf", 3)
    other.load_state_dict(state)
    close(flow().log_prob(x), other().log_prob(x), 0.0)
    with pytest.raises(TypeError, match="inverse"):
        flows.iaf(3, inverse=False)


@pytest.mark.parametrize("name, inverse", [(name, inverse) for name, inverse in BOTH if name != "bnaf"])
def test_fast_directions(name, inverse):
    """Evaluations of networks: one a transform in the parallel direction; of couplings in both."""
    flow, calls = make(name, 4, inverse=inverse), []

    def counted(forward):
        return lambda *inputs: (calls.append(1), forward(*inputs))[1]

    for net in [m for m in flow.modules() if isinstance(m, (MADE, Dense))]:
        net.forward = counted(net.forward)
    if name in COUPLINGS or not inverse:
        flow().log_prob(torch.randn(3, 4, dtype=F64))
        assert len(calls) == 2
    if name in COUPLINGS or inverse:
        calls.clear()
        flow().sample((3,))
        assert len(calls) == 2


# Covariates


@recipes
def test_each_transform_has_parameters_of_its_own(name):
    one, three = (RECIPES[name](3, transforms=n) for n in (1, 3))
    count = [sum(p.numel() for p in {*flow.parameters()}) for flow in (one, three)]
    extra = 6 if name == "nice" else 0  # the scale, once
    assert count[1] - extra == 3 * (count[0] - extra)


@both
def test_orders_alternate(name, inverse):
    """With two transforms every feature depends on every other, with one it does not."""
    for transforms in (1, 2):
        d = make(name, 2, transforms=transforms, inverse=inverse)()
        jacobian = torch.autograd.functional.jacobian(d.transforms[0].inv, torch.tensor([0.3, -0.2], dtype=F64))
        off = torch.stack([jacobian[0, 1], jacobian[1, 0]]).abs()
        assert (off > 1e-6).sum() >= transforms or name == "glow_vector"
        assert transforms == 2 or name == "glow_vector" or (off == 0).any()


def test_nice_changes_volumes_by_its_scale_alone():
    flow = make("nice", 4)
    t = flow().transforms[0]
    x = torch.randn(6, 4, dtype=F64)
    scale = 7 * torch.tanh(flow.transforms[0].log_scale / 7)
    close(t.log_abs_det_jacobian(x, t(x)), scale.sum().expand(6))
    assert scale.abs().min() > 0.01


def test_glow_steps():
    kinds = [type(getattr(m, "transform", m)).__name__ for m in flows.glow_vector(4, transforms=2).transforms]
    assert kinds == ["Coupling", "LULinear", "Diagonal", "Reverse", "Coupling", "LULinear", "Diagonal", "Constant"]
    kinds = [type(m).__name__ for m in flows.glow_vector(4, transforms=2, inverse=True).transforms]
    assert kinds == ["Diagonal", "LULinear", "Coupling", "Reverse", "Diagonal", "LULinear", "Coupling", "Constant"]


@couplings
def test_one_feature_is_transformed_by_the_context(name):
    """Nothing else is left to read; of affine and additive couplings this is a normal with that mean and scale."""
    flow, c = make(name, 1, context=2), torch.randn(5, 2, dtype=F64)
    y = torch.linspace(-3, 3, 7, dtype=F64).view(7, 1, 1).expand(7, 5, 1)
    lp = flow(c).log_prob(y)
    assert lp.shape == (7, 5)
    curve = lp.diff(dim=0).diff(dim=0)  # constant along a parabola
    if name in ("realnvp", "nice", "glow_vector"):
        close(curve, curve[:1].expand_as(curve), 1e-9)
        mean = flow(c).sample((4000,)).mean(0)
        assert mean.std() > 0.05  # another one for each context
    else:
        assert curve.std(0).min() > 1e-4
    free = make(name, 1)
    with torch.no_grad():
        x = free().sample((1000,))
    assert free().log_prob(x).shape == (1000,)
    assert all(p.grad is None for p in free.parameters())
    free().log_prob(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in free.parameters())


@recipes
def test_every_recipe_learns(name):
    """A ring: each recipe gains on the normal of the same moments, from standardised rows in raw units."""
    angle = 2 * math.pi * torch.rand(600)
    rows = 100 + 20 * torch.stack([angle.cos(), angle.sin()], 1) + 2 * torch.randn(600, 2)
    options = {} if name == "bnaf" else {"hidden": (16,)}
    flow = RECIPES[name](2, standardize=rows, **options)
    before = flow().log_prob(rows).mean().item()
    epochs = {"nice": 40, "bnaf": 12}.get(name, 4)  # which learn slowly
    gx.fit(flow, rows, epochs=epochs, batch_size=50, lr=2e-2 if name == "bnaf" else 1e-2, progress=False)
    normal = dist.MultivariateNormal(rows.mean(0), rows.T.cov()).log_prob(rows).mean().item()
    after = flow().log_prob(rows).mean().item()
    assert after > max(normal, before)
