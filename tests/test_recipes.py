"""The recipes of flows: mass by adaptive quadrature, densities by autograd's Jacobian, their options, bases and networks."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import flows, heads
from pyro_genexact.conditioners import MADE, Independent, Markov, Recurrent
from pyro_genexact.conditioners.encoding import Dense
from pyro_genexact.testing import redraw

F64 = torch.float64
RECIPES = {
    "maf": flows.maf,
    "iaf": flows.iaf,
    "nsf": partial(flows.nsf, bins=3),
    "naf": partial(flows.naf, units=4),
    "naf deep": partial(flows.naf, units=3, layers=2),
    "umnn": partial(flows.umnn, signal=3, network=(6,)),
    "sospf": partial(flows.sospf, polynomials=2, degree=2),
    "bpf": partial(flows.bpf, degree=6),
    "bnaf": partial(flows.bnaf, hidden=(4,)),
    "realnvp": flows.realnvp,
    "nice": flows.nice,
    "glow_vector": flows.glow_vector,
    "coupling_nsf": partial(flows.coupling_nsf, bins=3),
    "autoregressive": partial(flows.autoregressive, partial(heads.MonotoneNetwork, 3, hidden=(6,))),
    "coupling": partial(flows.coupling, partial(heads.LogisticMixtureCDF, 3)),
}
COUPLINGS = ("realnvp", "nice", "glow_vector", "coupling_nsf", "coupling")
BOTH = [(name, inverse) for name in RECIPES if name != "iaf" for inverse in (False, True)]
recipes = pytest.mark.parametrize("name", RECIPES)
both = pytest.mark.parametrize("name, inverse", BOTH)
couplings = pytest.mark.parametrize("name", COUPLINGS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name, features, context=0, spread=0.5, **options):
    """A small smooth flow in float64, far from the identity but without spikes."""
    options = {"transforms": 2, **({} if name == "bnaf" else {"hidden": (6,), "activation": torch.tanh}), **options}
    flow = redraw(RECIPES[name](features, context, **options).double(), spread=spread)
    with torch.no_grad():
        for part in flow.modules():
            if isinstance(part, Dense) and not isinstance(part, gx.Conditioner):
                for p in part.last.parameters():
                    p.mul_(0.6 * spread)
    return flow


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def normal_log_prob(x):
    return (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum(-1)


def by_jacobian(d, y):
    """log N(x(y)) + log|det dx/dy| of rows y (N, D), by autograd."""
    chain = d.transforms[0]
    jacobian = torch.stack([torch.autograd.functional.jacobian(chain.inv, row) for row in y])
    return normal_log_prob(chain.inv(y)) + torch.linalg.slogdet(jacobian)[1]


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


def masses(density, ends, order=10, tol=1e-10, levels=40):
    """The integrals between neighbouring ends: Gauss-Legendre, halved where that matters."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(order))
    middles, halves = (ends[1:] + ends[:-1]) / 2, ends.diff() / 2
    total, piece = torch.zeros_like(middles), torch.arange(len(middles))

    def integrals(middles, halves):
        return halves * (density(middles.unsqueeze(-1) + halves.unsqueeze(-1) * nodes) * weights).sum(-1)

    coarse = integrals(middles, halves)
    for _ in range(levels):
        halves = halves / 2
        middles = torch.stack([middles - halves, middles + halves], -1)
        fine = integrals(middles, halves.unsqueeze(-1).expand_as(middles))
        rough = (fine.sum(-1) - coarse).abs() > tol
        total.index_add_(0, piece[~rough], fine[~rough].sum(-1))
        coarse, middles, halves, piece = (
            t.flatten() for t in (fine[rough], middles[rough], *(v[rough, None].expand(-1, 2) for v in (halves, piece)))
        )
        if not len(piece):
            break
    return total.index_add(0, piece, coarse)


@both
def test_mass_in_one_dimension_with_parameters_scaled_by_ten(name, inverse):
    """Adaptive, between quantiles, which lie where the density does, however sharp; each piece has the mass it should."""
    flow = flows.univariate(RECIPES[name], transforms=1, inverse=inverse)
    redraw(flow.double(), spread=0.3)
    with torch.no_grad():
        for part in flow.modules():
            if isinstance(part, (MADE, Independent, flows.recipes.Diagonal, gx.transforms.BlockAutoregressive)):
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


# Steps


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


# Options


@recipes
def test_support_and_standardize(name):
    """Changes of variables by hand, from the flow over the reals with the same weights."""
    rows = torch.randn(100, 3, dtype=F64) * torch.tensor([3.0, 0.1, 1.0], dtype=F64) + torch.tensor([10.0, -1.0, 0.0])
    flow, plain = make(name, 3, support=constraints.positive, standardize=rows.div(4).exp()), make(name, 3)
    x = rows / 4
    shift, scale = x.mean(0), x.std(0, correction=0)
    expected = plain().log_prob((x - shift) / scale) - scale.log().sum() - x.sum(-1)
    close(flow().log_prob(x.exp()), expected, 1e-8)
    assert (flow().sample((100,)) > 0).all()
    simplex = make(name, 3, support=constraints.simplex)()
    draws = simplex.sample((100,))
    assert draws.shape == (100, 3) and simplex.support.check(draws).all()
    assert simplex.log_prob(draws).isfinite().all()


@recipes
def test_options_of_sizes_and_names(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden'"):
        RECIPES[name](3, hiden=(8,))
    with pytest.raises(ValueError, match=r"Expected features to be an integer >= 1; got 0\."):
        RECIPES[name](0)
    with pytest.raises(ValueError, match=r"Expected transforms to be an integer >= 1; got 0\."):
        RECIPES[name](3, transforms=0)


def test_options_of_heads():
    shapes = {name: p.shape for name, p in flows.nsf(3, bins=5, hidden=(8,), transforms=1).named_parameters()}
    assert shapes["transforms.0.transform.conditioner.layers.1.bias"].numel() == 3 * (3 * 5 - 1)
    assert (
        flows.bpf(3, degree=9).transforms[0].transform.head.num_params
        != flows.bpf(3).transforms[0].transform.head.num_params
    )
    assert (
        flows.sospf(2, polynomials=2, degree=1).transforms[0].transform.head.num_params
        == heads.SumOfSquares(2, 1).num_params
    )
    assert flows.umnn(2, signal=5).transforms[0].transform.head.num_params == heads.IntegratedPositive(5).num_params
    x = torch.tensor([3.0, -20.0])
    close(flows.nsf(2, bound=2.0)().transforms[0].inv(x), x)  # beyond the bound, the identity; reversed twice


# Networks


AUTOREGRESSIVE = [name for name in RECIPES if name not in (*COUPLINGS, "bnaf")]


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize(
    "net",
    [
        lambda P, C: Recurrent((), P, context=C, hidden=5),
        lambda P, C: Markov((), P, order=1, context=C, hidden=(5,), activation=torch.tanh),
        lambda P, C: Independent(3, P, context=C, hidden=(5,), activation=torch.tanh),
        lambda P, C: MADE(3, P, context=C, hidden=(5,), direct=True, activation=torch.tanh),
    ],
    ids=["recurrent", "markov", "independent", "direct"],
)
def test_conditioner_of_an_autoregressive_flow(name, net):
    made = []

    def conditioner(P, C):
        made.append(net(P, C))
        return made[-1]

    flow, c, y = (
        make(name, 3, context=2, conditioner=conditioner),
        torch.randn(2, 2, dtype=F64),
        torch.randn(2, 3, dtype=F64),
    )
    assert len(made) == 2 and all(any(m is n for m in flow.modules()) for n in made)
    expected = torch.cat([by_jacobian(flow(row), value[None]) for row, value in zip(c, y, strict=True)])
    close(flow(c).log_prob(y), expected, 1e-8)


@couplings
def test_conditioner_of_a_coupling(name):
    made = []

    def conditioner(P, C):
        made.append((P, C))
        return Independent(1, P, context=C, hidden=(5,), activation=torch.tanh)

    flow, c, y = (
        make(name, 5, context=2, conditioner=conditioner),
        torch.randn(2, 2, dtype=F64),
        torch.randn(2, 5, dtype=F64),
    )
    assert len(made) == 2 and {C for _, C in made} == {4}  # two features and the context
    expected = torch.cat([by_jacobian(flow(row), value[None]) for row, value in zip(c, y, strict=True)])
    close(flow(c).log_prob(y), expected, 1e-8)


def test_conditioners_that_are_none():
    text = r"Expected no conditioner \(the network of bnaf is itself the bijection.*; got function\."
    with pytest.raises(ValueError, match=text):
        flows.bnaf(3, conditioner=lambda P, C: MADE(3, P, context=C))
    for recipe in (flows.maf, flows.nsf, flows.realnvp, flows.glow_vector):
        with pytest.raises(
            TypeError, match=r"Expected conditioner\(num_params, context\) to be a Conditioner; got Linear\."
        ):
            recipe(3, conditioner=lambda P, C: nn.Linear(3, P))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(2, 0\); got \(5, 0\)\."
    ):
        flows.maf(3, conditioner=lambda P, C: MADE(3, 5))


def test_heads_that_are_none():
    for builder in (flows.autoregressive, flows.coupling):
        with pytest.raises(TypeError, match=r"Expected head to be a callable that makes a head; got Affine\."):
            builder(heads.Affine(), 3)
        with pytest.raises(TypeError, match=r"Expected head to be a callable that makes a head; got Linear\."):
            builder(lambda: nn.Linear(2, 2), 3)


# Bases


def mixture_base(features, context=0):
    head = heads.Mixture(heads.Normal(), 3)
    net = MADE(features, head.num_params, context=context, hidden=(6,), activation=torch.tanh)
    return gx.Autoregressive(net, head, (features,))


def student_base(features, context=0):
    return gx.Autoregressive(Independent(features, 3, context=context, hidden=(6,)), heads.StudentT(), (features,))


BASES = {"mixture": mixture_base, "student": student_base}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "bnaf", "realnvp"])
@pytest.mark.parametrize("context", [0, 2])
def test_learned_bases(base, name, context):
    """log p(y) = log p_base(x(y)) + log|dx/dy|, with gradients to the base, onto a support too."""
    flow = make(name, 2, context=context, base=BASES[base](2, context), support=constraints.positive)
    c = torch.randn(4, 2, dtype=F64) if context else None
    d, y = flow(c) if context else flow(), torch.randn(4, 2, dtype=F64).exp()
    x = d.transforms[0].inv(y)
    base_dist = flow.base(c) if context else flow.base()
    plain = make(name, 2, context=context, support=constraints.positive)
    plain.transforms.load_state_dict(flow.transforms.state_dict())
    normal = plain(c) if context else plain()
    close(d.log_prob(y), base_dist.log_prob(x) + normal.log_prob(y) - normal_log_prob(x), 1e-9)
    grads = torch.autograd.grad(d.log_prob(y).sum(), [*flow.base.parameters()])
    assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    draws = d.sample((50,))
    assert draws.shape == (50, *d.batch_shape, 2) and (draws > 0).all()
    assert d.has_rsample == (base == "student")
    if d.has_rsample:
        grads = torch.autograd.grad(d.rsample((5,)).log().sum(), [*flow.base.parameters()])
        assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


def test_a_student_base_keeps_heavy_tails():
    """Far out log p falls as -(df + 1) log|y|, since the tails of affine flows and splines are straight."""
    for recipe in (flows.maf, flows.nsf):
        flow = redraw(recipe(1, base=student_base(1), hidden=(6,)).double())
        d = flow()
        df = heads.StudentT().double()(flow.base.conditioner(torch.zeros(1, 1, dtype=F64))).df.item()
        y = torch.tensor([[1e6], [1e7]], dtype=F64)
        fall = d.log_prob(y).diff() / math.log(10)
        assert fall.item() == pytest.approx(-(df + 1), rel=1e-3)


def test_a_mixture_base_fits_what_one_transform_can_not():
    """Two far clusters: a normal base under one affine transform stays unimodal (the MAF-MoG's own point)."""
    sign = torch.randint(2, (1500, 1)) * 2.0 - 1
    y = 0.3 * torch.randn(1500, 2) + sign * torch.tensor([2.0, -2.0])
    scores = {}
    for name, base in (("normal", None), ("mixture", mixture_base(2))):
        flow = flows.maf(2, base=base, transforms=1, hidden=(16,), activation=torch.tanh)
        gx.fit(flow, y[:1000], epochs=30, batch_size=100, lr=1e-2, progress=False)
        scores[name] = flow().log_prob(y[1000:]).mean().item()
    best = 2 * dist.Normal(0.0, 0.3).entropy().item() + math.log(2)
    assert scores["mixture"] > -best - 0.1
    assert scores["normal"] < scores["mixture"] - 0.3


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


# Errors


def test_bases_over_less_than_the_reals():
    for base, support in (
        (dist.Uniform(torch.zeros(3), torch.ones(3)).to_event(1), "Interval"),
        (dist.Exponential(torch.ones(3)).to_event(1), "GreaterThanEq"),
        (dist.Poisson(torch.ones(3)).to_event(1), "IntegerGreaterThan"),
    ):
        for recipe in (flows.maf, flows.realnvp, flows.bnaf):
            with pytest.raises(ValueError, match=rf"Expected base\.support to be all real vectors; got .*{support}"):
                recipe(3, base=base)
    flows.maf(3, base=dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))  # vectors as they are
    flows.maf(3, base=flows.maf(3)())


def test_heads_of_distributions():
    text = r"Expected head to make bijections; got {}, whose call returns "
    for builder in (flows.autoregressive, flows.coupling):
        with pytest.raises(TypeError, match=text.format("Parametric") + "Normal"):
            builder(heads.Normal, 3)
    with pytest.raises(TypeError, match=text.format("Parametric") + "Categorical"):
        gx.transforms.Coupling(3, heads.Categorical(4))
    with pytest.raises(TypeError, match=r"Expected head to be of class Head; got Linear\."):
        gx.transforms.Coupling(3, nn.Linear(2, 2))


def test_conditioners_that_are_no_callables_or_read_another_context():
    text = r"Expected conditioner to be a callable \(num_params, context\) that makes one; got MADE\."
    for recipe in (flows.maf, flows.realnvp, flows.glow_vector):
        with pytest.raises(TypeError, match=text):
            recipe(3, conditioner=MADE(3, 2))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(2, 2\); got \(2, 0\)\."
    ):
        flows.maf(3, 2, conditioner=lambda P, C: MADE(3, P))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(\d, 1\); got \(\d, 0\)\."
    ):
        flows.realnvp(3, conditioner=lambda P, C: Independent(1, P))


def test_widths_that_are_no_sequence():
    for recipe in (flows.bnaf, flows.maf, flows.realnvp):
        with pytest.raises(ValueError, match=r"Expected hidden to be a sequence of integers >= 1; got 8\."):
            recipe(3, hidden=8)


@pytest.mark.parametrize("name", ["autoregressive", "coupling", "bnaf", "glow_vector"])
def test_unknown_options_name_the_recipe(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'hiden'"):
        RECIPES[name](3, hiden=(8,))
