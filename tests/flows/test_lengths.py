"""Flows over sequences of varying length: each row against the flow of exactly as many features, quadrature and Jacobians."""

from __future__ import annotations

import math
from math import nan

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform, TanhTransform, biject_to, constraints

import pyro_genexact as gx
from pyro_genexact import conditioners, flows, heads, transforms
from pyro_genexact.testing import redraw
from pyro_genexact.transforms.prefixes import Prefixes
from support.checks import close
from support.flows_of_lengths import LENGTHS, MASK, context_of, markov, recurrent, transformer
from support.values import F64, built, sized

T = 5
FLOWS = {  # recipe and options, of any number of features
    "maf recurrent": (flows.maf, {"conditioner": recurrent}),
    "iaf recurrent": (flows.iaf, {"conditioner": recurrent, "context": 2}),
    "maf markov": (flows.maf, {"conditioner": markov, "context": gx.Covariates(2), "support": constraints.positive}),
    "iaf markov": (flows.iaf, {"conditioner": markov, "support": constraints.interval(-30.0, 40.0)}),
    "maf transformer": (flows.maf, {"conditioner": transformer, "context": gx.Covariates(2)}),
    "iaf transformer": (flows.iaf, {"conditioner": transformer, "transforms": 2}),
    "maf transformer source": (flows.maf, {"conditioner": transformer, "context": gx.Source(2), "transforms": 2}),
    "nsf": (flows.nsf, {"conditioner": recurrent, "bins": 3, "context": 2}),
    "naf": (flows.naf, {"conditioner": markov, "units": 3, "transforms": 2}),
    "naf inverse": (flows.naf, {"conditioner": markov, "units": 3, "transforms": 2, "inverse": True}),
}


def cut(flow, context, row, n):
    """A row's context in the flow of n features."""
    if context is None:
        return None
    return context[row, :n] if isinstance(flow.context, gx.Covariates) else context[row]


@pytest.fixture(params=FLOWS)
def case(request):
    """The flow of T features, that of n with its weights, and a context."""
    recipe, options = FLOWS[request.param]
    torch.manual_seed(0)
    flow = redraw(recipe(T, **options).double(), spread=0.3)

    def of(n):
        short = recipe(n, **options).double()
        short.load_state_dict(flow.state_dict())
        return short

    return flow, of, context_of(flow)


def draws(flow, context):
    """Values inside the support, of all T sites."""
    with torch.no_grad():
        torch.manual_seed(3)
        return flow(context).sample(() if context is not None else LENGTHS.shape).clone()


@pytest.mark.parametrize("padding", [0.0, nan, 1e30, -math.inf])
def test_density_and_gradients_are_those_of_the_flow_of_n_features(case, padding):
    flow, of, context = case
    y = torch.where(MASK, draws(flow, context), padding).requires_grad_()
    if isinstance(flow.context, gx.Covariates):
        context = torch.where(MASK.unsqueeze(2), context, nan)
    if context is not None:
        context.requires_grad_()
    inputs = [y, *([] if context is None else [context])]
    d = flow(context, lengths=LENGTHS)
    assert (d.batch_shape, d.event_shape) == (LENGTHS.shape, (T,))
    log_prob = d.log_prob(y)
    got = torch.autograd.grad(log_prob.sin().sum(), [*inputs, *flow.parameters()])
    wanted = [torch.zeros_like(g) for g in got]
    for row, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            assert log_prob[row] == 0
            continue
        short = of(n)
        expected = short(cut(flow, context, row, n)).log_prob(y[row, :n])
        close(log_prob[row], expected)
        for total, g in zip(
            wanted,
            torch.autograd.grad(expected.sin(), [*inputs, *short.parameters()], allow_unused=True),
            strict=True,
        ):
            total += 0 if g is None else g
    for g, expected in zip(got, wanted, strict=True):
        close(g, expected, 1e-8)
    assert (got[0][~MASK] == 0).all()
    assert not isinstance(flow.context, gx.Covariates) or (got[1][~MASK] == 0).all()


def test_samples_are_those_of_the_flow_of_n_features(case):
    """The same noise gives the same sites, then zeros; gradients through sample and score are those of the short flows."""
    flow, of, context = case
    d = flow(context, lengths=LENGTHS)
    for draw in (d.sample, d.rsample):
        torch.manual_seed(4)
        y = draw((2,))
        torch.manual_seed(4)
        x = d.base_dist.sample((2,))
        assert y.shape == (2, *LENGTHS.shape, T)
        assert (y[:, ~MASK] == 0).all()
        assert d.support.check(y).all()
    loss = d.log_prob(y) + y.sin().sum(-1)
    got = torch.autograd.grad(loss.sum(), list(flow.parameters()), retain_graph=True)
    close(flow(context, lengths=LENGTHS).log_prob(y.clone()), d.log_prob(y), 1e-8)
    wanted = [torch.zeros_like(g) for g in got]
    for row, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            continue
        short = of(n)
        q = short(cut(flow, context, row, n))
        expected = q.transforms[0](x[:, row, :n])
        close(y[:, row, :n], expected)
        log_prob = q.log_prob(expected)
        close(d.log_prob(y)[:, row], log_prob, 1e-8)
        grads = torch.autograd.grad(
            (log_prob + expected.sin().sum(-1)).sum(), list(short.parameters()), allow_unused=True
        )
        for total, g in zip(wanted, grads, strict=True):
            total += 0 if g is None else g
    for g, expected in zip(got, wanted, strict=True):
        close(g, expected, 1e-7)


def test_log_determinant_is_that_of_the_first_sites(case):
    flow, _, context = case
    t = flow(context, lengths=LENGTHS).transforms[0]
    x = torch.randn(len(LENGTHS), T, dtype=F64)
    y = t(x)
    for f, value in ((t.with_cache(0), x), (t.with_cache(0).inv, y.detach())):
        ladj = f.log_abs_det_jacobian(value, f(value))
        jacobian = torch.autograd.functional.jacobian(lambda v, f=f: f(v), value)
        for row, n in enumerate(LENGTHS.tolist()):
            own = jacobian[row, :, row]
            close(ladj[row], torch.linalg.slogdet(own[:n, :n])[1], 1e-8)
            assert (own[n:] == 0).all() and (own[:, n:] == 0).all()


@pytest.mark.parametrize("name", ["maf recurrent", "iaf markov", "maf transformer"])
def test_mass_is_one(name):
    """Quadrature over the sites that there are."""
    recipe, options = FLOWS[name]
    flow = redraw(recipe(T, **options).double(), spread=0.15)
    context = context_of(flow, 1)
    context = None if context is None else context[0]
    low, high = (-30.0, 40.0) if "support" in options else (-12.0, 12.0)
    side = low + (high - low) * (torch.arange(150, dtype=F64) + 0.5) / 150
    with torch.no_grad():
        for n in (1, 2):
            sites = torch.cartesian_prod(*[side] * n).reshape(-1, n)
            y = torch.cat([sites, sites.new_full((len(sites), T - n), nan)], 1)
            p = flow(context, lengths=torch.tensor(n)).log_prob(y).exp()
            assert float(p.sum() * (side[1] - side[0]) ** n) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("inverse", [False, True])
def test_made_reads_the_own_prefix_reversed(inverse):
    """Fixed-size networks serve since padding comes last: two affine steps by hand, the second on each row's reversed prefix."""
    flow = built(flows.maf(T, context=2, hidden=(8,), transforms=2, activation=torch.tanh, inverse=inverse))
    nets = [part for part in flow.modules() if isinstance(part, conditioners.MADE)]
    context = context_of(flow)
    x = torch.where(MASK, torch.randn(len(LENGTHS), T, dtype=F64), 0.0)
    d = flow(context, lengths=LENGTHS)
    with torch.no_grad():
        y = d.transforms[0](x)
        for row, n in enumerate(LENGTHS.tolist()):
            value, ladj = x[row].clone(), 0.0
            for step, net in enumerate(nets):
                if step:
                    value[:n] = value[:n].flip(0)
                found = value.clone()
                for t in range(n):  # site by site, from the parameters given those before it
                    read = value if inverse else found
                    affine = heads.Affine()(
                        net(torch.where(torch.arange(T) < n, read, 0.0)[None], context[row : row + 1])
                    )
                    forward = affine if inverse else affine.inv
                    found[t] = forward(value[None])[0, t]
                    ladj += (1 if inverse else -1) * affine.log_scale[0, t]
                value = found
            close(y[row, :n], value[:n])
            close(d.log_prob(y)[row], dist.Normal(0.0, 1.0).log_prob(x[row, :n]).sum() - ladj)


def test_each_part_on_prefixes():
    """Elementwise transforms, also one a feature, nested and inverted: each row as the chain of the parts of its size."""
    rows, shift, scale = 2 * sized(20, T, seed=5) + 1, sized(T, seed=6), sized(T, seed=7).exp()
    onto = [
        constraints.real,
        constraints.positive,
        constraints.unit_interval,
        constraints.less_than(3.0),
        constraints.real,
    ]

    def parts(n):
        return [
            transforms.Standardize.from_data(rows[:, :n]),
            ComposeTransform([AffineTransform(shift[:n], scale[:n], 1), transforms.Reverse()]),
            transforms.Affine(shift[:n], scale[:n].log(), 1),
            transforms.Chain(
                [AffineTransform(0.5, -0.1), TanhTransform(), TanhTransform().inv, AffineTransform(0.1, 3.0)]
            ),
            dist.transforms.IndependentTransform(ExpTransform(), 1),
            ExpTransform().inv,
            transforms.ToSupport(onto[:n], n),
        ]

    x = sized(len(LENGTHS), T)
    t = Prefixes(parts(T), LENGTHS)
    y = t(torch.where(MASK, x, nan))
    assert (y[~MASK] == 0).all()
    close(t.inv(torch.where(MASK, y, nan)), torch.where(MASK, x, 0.0))
    ladj = t.log_abs_det_jacobian(x, t(x))
    for row, n in enumerate(LENGTHS.tolist()):
        chain = transforms.Chain(parts(n)) if n else None
        close(y[row, :n], chain(x[row, :n]) if n else y[row, :0])
        close(ladj[row], chain.log_abs_det_jacobian(x[row, :n], y[row, :n]) if n else ladj.new_zeros(()))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_an_autoregressive_transform_alone(shape):
    """``on_prefixes`` of numbers and vectors, both ways: no sum over padding, whatever stands there."""
    net = conditioners.Recurrent(shape, 2 * math.prod(shape), hidden=5, context=gx.Covariates(2))
    module = built(transforms.AutoregressiveTransform(net, heads.Affine(shape)))
    full = module(sized(6, T, 2))
    mask = MASK.reshape(*MASK.shape, *[1] * len(shape))
    x = sized(6, T, *shape)
    for a, b in ((full, full.on_prefixes(LENGTHS)), (full.inv, full.on_prefixes(LENGTHS).inv)):
        got, expected = b(torch.where(mask, x, nan)), torch.where(mask, a(x), 0.0)
        close(got, expected)
        for pair in zip(
            *(torch.autograd.grad(y.sum(), list(module.parameters())) for y in (got, expected)), strict=True
        ):
            close(*pair)
        assert b.domain.check(torch.where(mask, x, nan)).all() and not b.domain.check(nan * x)[LENGTHS > 0].any()
    short = module(sized(6, T, 2)[:1, :3])
    expected = short.log_abs_det_jacobian(x[:1, :3], x[:1, :3])
    close(full.on_prefixes(LENGTHS).log_abs_det_jacobian(x, x)[:1], expected)
    close(-full.on_prefixes(LENGTHS).inv.log_abs_det_jacobian(x, x)[:1], expected)


def test_reverse_of_series_of_vectors():
    x = sized(2, 4, 3)
    t = transforms.Reverse(-2, torch.tensor([3, 0], dtype=torch.uint8))
    expected = torch.stack([torch.cat([x[0, :3].flip(0), torch.zeros(1, 3, dtype=F64)]), torch.zeros(4, 3, dtype=F64)])
    assert torch.equal(t(x), expected)
    assert torch.equal(t.inv(t(x)), torch.where(torch.tensor([[1, 1, 1, 0], [0] * 4]).bool().unsqueeze(2), x, 0.0))
    assert transforms.Reverse(lengths=LENGTHS).forward_shape(torch.Size([2, 1, T])) == (2, 6, T)


def test_values_outside_the_support_have_density_zero_and_padding_does_not_count():
    flow = built(flows.maf(T, conditioner=markov, support=constraints.positive))
    y = torch.tensor([1.0, 2.0, -1.0, 0.0, nan], dtype=F64)
    d = flow(lengths=torch.tensor([0, 1, 2, 3]))
    assert d.support.check(y).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(y)
    d = dist.TransformedDistribution(d.base_dist, d.transforms, validate_args=False)
    assert d.log_prob(y).isfinite().tolist() == [True, True, True, False]
    assert d.log_prob(y)[3] == -math.inf
    z = biject_to(d.support)(sized(4, T))
    assert d.support.check(z).all() and (z > 0).all()


def test_overflow_has_density_zero_whatever_the_padding():
    flow = built(flows.maf(T, conditioner=recurrent))
    y = torch.full((2, T), 1.7e308, dtype=F64)
    y[0, 2:], y[1, 2:] = nan, 0.0
    short = flows.maf(2, conditioner=recurrent).double()
    short.load_state_dict(flow.state_dict())
    assert short().log_prob(y[0, :2]) == -math.inf
    assert flow(lengths=torch.tensor(2)).log_prob(y).tolist() == [-math.inf] * 2


@pytest.mark.parametrize(
    ("batch", "lengths", "value"),
    [((), (), ()), ((4,), (), ()), ((), (4,), (4,)), ((4,), (3, 1), (3, 4)), ((2, 1), (3,), (7, 2, 3)), ((), (2,), ())],
)
def test_shapes(batch, lengths, value):
    flow = built(flows.iaf(T, context=2, conditioner=recurrent))
    n = torch.full(lengths, 3)
    d = flow(torch.zeros(*batch, 2, dtype=F64), lengths=n)
    shape = torch.broadcast_shapes(batch, lengths)
    assert (d.batch_shape, d.event_shape) == (shape, (T,))
    assert d.sample((6, 1)).shape == (6, 1, *shape, T)
    assert d.log_prob(torch.zeros(*value, T, dtype=F64)).shape == torch.broadcast_shapes(shape, value)
    wide = d.expand((2, *shape))
    y = wide.rsample()
    assert y.shape == (2, *shape, T) and (y[..., 3:] == 0).all() and (y[..., :3] != 0).all()
    assert len(y[..., 0].unique()) == y[..., 0].numel()  # noise of its own for each row
    close(wide.log_prob(y), d.log_prob(y.clone()))


def test_samples_have_the_moments_of_the_density():
    """One transform of one site is a normal distribution."""
    flow = built(flows.maf(T, conditioner=markov, transforms=1))
    d = flow(lengths=torch.tensor([1, 3]))
    y = d.sample((4000,))[:, :, 0]
    mean, peak = y.mean(0), torch.zeros(2, T, dtype=F64)
    x = d.transforms[0].inv(peak)[:, 0]  # (0 - loc) / scale
    scale = d.transforms[0].log_abs_det_jacobian(peak, d.transforms[0](peak))[0].exp()
    assert ((mean + x * scale).abs() < 4 * scale / 4000**0.5).all()
    assert ((y.std(0) / scale - 1).abs() < 4 / 8000**0.5).all()
