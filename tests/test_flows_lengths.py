"""Flows over sequences of varying length: each row against the flow of exactly as many features, quadrature and Jacobians."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import OfPrefixes, built, sized
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform, TanhTransform, biject_to, constraints

import pyro_genexact as gx
from pyro_genexact import conditioners, flows, heads, testing, transforms
from pyro_genexact.testing import redraw
from pyro_genexact.transforms.prefixes import Prefixes

F64 = torch.float64
T = 5
nan = float("nan")
LENGTHS = torch.tensor([3, 0, 5, 1, 4, 2])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)


def recurrent(P, C):
    return conditioners.Recurrent((), P, context=C, hidden=6)


def markov(P, C):
    return conditioners.Markov((), P, order=2, hidden=(8,), context=C, activation=torch.tanh)


def transformer(P, C):
    return conditioners.Transformer((), P, context=C, width=8, depth=2, num_heads=2)


FLOWS = {  # recipe and options, of any number of features
    "maf recurrent": (flows.maf, {"conditioner": recurrent}),
    "iaf recurrent": (flows.iaf, {"conditioner": recurrent, "context": 2}),
    "maf markov": (flows.maf, {"conditioner": markov, "context": gx.Steps(2), "support": constraints.positive}),
    "iaf markov": (flows.iaf, {"conditioner": markov, "support": constraints.interval(-30.0, 40.0)}),
    "maf transformer": (flows.maf, {"conditioner": transformer, "context": gx.Steps(2)}),
    "iaf transformer": (flows.iaf, {"conditioner": transformer, "transforms": 2}),
    "maf transformer source": (flows.maf, {"conditioner": transformer, "context": gx.Source(2), "transforms": 2}),
    "nsf": (flows.nsf, {"conditioner": recurrent, "bins": 3, "context": 2}),
    "naf": (flows.naf, {"conditioner": markov, "units": 3, "transforms": 2}),
    "naf inverse": (flows.naf, {"conditioner": markov, "units": 3, "transforms": 2, "inverse": True}),
}


def context_of(flow, rows=6):
    context = flow.context
    if isinstance(context, (gx.Steps, gx.Source)):
        return sized(rows, T, context.features, seed=1)
    return sized(rows, context, seed=1) if context else None


def cut(flow, context, row, n):
    """A row's context in the flow of n features."""
    if context is None:
        return None
    return context[row, :n] if isinstance(flow.context, gx.Steps) else context[row]


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


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("padding", [0.0, nan, 1e30, -math.inf])
def test_density_and_gradients_are_those_of_the_flow_of_n_features(case, padding):
    flow, of, context = case
    y = torch.where(MASK, draws(flow, context), padding).requires_grad_()
    if isinstance(flow.context, gx.Steps):
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
    assert not isinstance(flow.context, gx.Steps) or (got[1][~MASK] == 0).all()


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


SOURCE_LENGTHS = torch.tensor([1, 4, 0, 5, 2, 3])


@pytest.mark.parametrize("net", [transformer, recurrent])
@pytest.mark.parametrize("recipe", [flows.maf, flows.iaf])
@pytest.mark.parametrize("own", [None, LENGTHS])
def test_each_row_reads_its_own_source(net, recipe, own):
    """As if the source had no more steps, in density, samples and gradients; padding is not read."""
    flow = built(recipe(T, conditioner=net, context=gx.Source(2), transforms=2))
    source, y = sized(6, 7, 2, seed=1), sized(6, T, seed=2)
    padding = torch.arange(7) >= SOURCE_LENGTHS.unsqueeze(1)
    filled = source.masked_fill(padding.unsqueeze(2), nan).requires_grad_()
    ds = flow(filled, own, source_lengths=SOURCE_LENGTHS), flow(gx.Padded(filled, SOURCE_LENGTHS), own)
    log_prob = ds[0].log_prob(y)
    close(ds[1].log_prob(y), log_prob)
    close(flow.condition(filled, own, SOURCE_LENGTHS).log_prob(y), log_prob)
    torch.manual_seed(4)
    drawn = ds[0].rsample((2,))
    torch.manual_seed(4)
    noise = ds[0].base_dist.sample((2,))
    got = torch.autograd.grad((log_prob + drawn.sin().sum((0, 2))).sum(), [filled, *flow.parameters()])
    assert (got[0][padding] == 0).all() and got[0].isfinite().all()
    wanted = [torch.zeros_like(g) for g in got]
    for row, n in enumerate(SOURCE_LENGTHS.tolist()):
        short = source[row, :n].clone().requires_grad_()
        d = flow(short) if own is None else flow(short, own[row])
        expected, sample = d.log_prob(y[row]), d.transforms[0](noise[:, row])
        close(log_prob[row], expected)
        close(drawn[:, row], sample)
        loss = expected + sample.sin().sum()
        grads = torch.autograd.grad(loss, [short, *flow.parameters()], allow_unused=True)
        if grads[0] is not None:
            wanted[0][row, :n] = grads[0]
        for total, g in zip(wanted[1:], grads[1:], strict=True):
            total += 0 if g is None else g
    for g, expected in zip(got, wanted, strict=True):
        close(g, expected, 1e-8)


def test_sources_of_a_batch_of_lengths():
    """Lengths broadcast as contexts do; a length changed in place is no stale value."""
    flow = built(flows.maf(T, conditioner=transformer, context=gx.Source(2), transforms=1))
    source, lengths, y = sized(7, 2), torch.tensor([[2], [7]]), sized(3, T)
    d = flow(source, LENGTHS[:3], lengths)
    assert d.batch_shape == (2, 3) and d.sample((4,)).shape == (4, 2, 3, T)
    close(d.log_prob(y)[0], flow(source[:2], LENGTHS[:3]).log_prob(y))
    close(d.log_prob(y)[1], flow(source, LENGTHS[:3]).log_prob(y))
    close(
        torch.func.vmap(lambda n: flow(source, None, n).transforms[0](y))(lengths[:, 0])[0],
        flow(source[:2]).transforms[0](y),
    )
    module = transforms.AutoregressiveTransform(transformer(2, gx.Source(2)), heads.Affine())
    t = built(module)(gx.Padded(source, lengths))
    with torch.no_grad():
        t(y)
        lengths.sub_(1)
        close(t(y), t.with_cache(0)(y))


def test_wrong_sources():
    flow = flows.maf(3, conditioner=transformer, context=gx.Source(2))
    source, n = torch.zeros(4, 5, 2), torch.tensor([1, 2, 3, 6])
    fails(
        ValueError,
        "Expected source_lengths between 0 and 5 (steps of the source); got 6.",
        lambda: flow(source, None, n),
    )
    fails(ValueError, "Expected source_lengths between 0 and 5", lambda: flow(gx.Padded(source, n)))
    fails(
        ValueError, "Expected no source_lengths beside a Padded", lambda: flow(gx.Padded(source, n), source_lengths=n)
    )
    fails(
        TypeError, "Expected source_lengths to be a tensor of integers", lambda: flow(source, source_lengths=n.float())
    )
    fails(ValueError, "Expected a context (*batch, S, 2)", lambda: flow(source_lengths=n))
    plain = flows.maf(3, conditioner=markov)
    text = "Expected no source_lengths (Flow built with context=0); got some."
    fails(ValueError, text, lambda: plain(source_lengths=n))


def test_a_flow_on_one_axis_reads_sources():
    flow = built(flows.univariate(flows.maf, gx.Source(2), conditioner=transformer))
    source = sized(2, 7, 2)
    d = flow(source, source_lengths=torch.tensor([3, 7]))
    close(d.log_prob(torch.zeros(2).double())[0], flow(source[0, :3]).log_prob(torch.zeros(()).double()))


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
    net = conditioners.Recurrent(shape, 2 * math.prod(shape), hidden=5, context=gx.Steps(2))
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


# Laws


SUBJECTS = {
    "alone": lambda net: [net.inv],
    "maf": lambda net: [net.inv, transforms.Reverse(), gx.Constant(transforms.ToSupport(constraints.positive, 3))],
    "iaf": lambda net: [transforms.Reverse(), net, transforms.Standardize.from_data(sized(9, 3, seed=2))],
}
NETS = {
    "MADE": lambda: conditioners.MADE(3, 2, hidden=(8,), context=2, activation=torch.tanh),
    "Markov": lambda: conditioners.Markov((), 2, order=2, hidden=(6,), context=gx.Steps(2), activation=torch.tanh),
    "Recurrent": lambda: conditioners.Recurrent((), 2, hidden=4, context=2),
}


@pytest.mark.parametrize("parts", SUBJECTS)
@pytest.mark.parametrize("net", NETS)
def test_transforms_of_prefixes_are_lawful(parts, net):
    lengths = torch.tensor([2, 3, 1])
    module = transforms.AutoregressiveTransform(NETS[net](), heads.Affine())
    subject = built(OfPrefixes(SUBJECTS[parts](module), lengths))
    x = torch.where(torch.arange(3) < lengths.unsqueeze(1), sized(3, 3), 0.0)
    context = sized(3, 3, 2, seed=1) if isinstance(module.context, gx.Steps) else sized(3, 2, seed=1)
    testing.inverse(subject, x, context)
    testing.cache(subject, x, context)
    testing.derivatives(subject, x, context)
    testing.conventions(subject, x, context)
    testing.copies(subject, lambda t: t(context)(x))
    t = subject(context)
    with torch.no_grad():
        t(x)
        lengths.sub_(1)
        assert torch.equal(t(x), OfPrefixes(list(subject.parts), lengths)(context)(x))  # nothing stale


def test_lengths_are_those_of_the_call():
    flow = built(flows.maf(T, conditioner=markov))
    lengths, y = LENGTHS.clone(), sized(len(LENGTHS), T)
    d = flow(lengths=lengths)
    expected = flow(lengths=LENGTHS).log_prob(y)
    lengths.fill_(T)
    close(d.log_prob(y), expected, 0.0)


def test_copies_of_flow_and_distribution():
    flow = built(flows.iaf(T, conditioner=recurrent, support=constraints.positive))
    y = sized(len(LENGTHS), T).exp()
    testing.copies(flow, lambda flow: flow(lengths=LENGTHS).log_prob(y))
    with torch.no_grad():
        d = flow(lengths=LENGTHS)
        expected = d.log_prob(y)
        for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            close(other.log_prob(y), expected, 0.0)
            assert other.support.check(torch.where(MASK, y, nan)).all()


def test_vmap_over_lengths():
    flow = built(flows.maf(T, conditioner=markov, support=constraints.positive))
    y = sized(len(LENGTHS), T).exp()

    def score(y, n):
        return flow(lengths=n).log_prob(y)

    previous = torch.distributions.Distribution._validate_args
    with pyro.validation_enabled(False):
        got = torch.func.vmap(torch.func.grad(score))(y, LENGTHS)
    assert torch.distributions.Distribution._validate_args == previous
    y.requires_grad_()
    (expected,) = torch.autograd.grad(flow(lengths=LENGTHS).log_prob(y).sum(), y)
    close(got, expected)


def test_single_precision_stays():
    flow = flows.maf(T, conditioner=markov, support=constraints.positive, standardize=sized(9, T).exp().float())
    d = flow(lengths=LENGTHS)
    y = d.sample()
    assert y.dtype == d.log_prob(y.clone()).dtype == torch.float32


# Pyro and fit


@pytest.mark.parametrize("context", [0, 2])
def test_in_a_plate_with_subsampling(context):
    flow = built(flows.maf(T, context=context, conditioner=recurrent))
    y, c = torch.where(MASK, sized(len(LENGTHS), T), nan), context_of(flow)

    def model(y=None):
        with pyro.plate("data", len(LENGTHS), subsample=torch.tensor([4, 1, 2])) as rows:
            args = () if c is None else (c[rows],)
            return pyro.sample("y", flow(*args, lengths=LENGTHS[rows]), obs=None if y is None else y[rows])

    trace = pyro.poutine.trace(model).get_trace(y)
    expected = flow(c, lengths=LENGTHS).log_prob(y)[[4, 1, 2]].sum() * 2
    close(trace.log_prob_sum(), expected)
    assert (model()[~MASK[[4, 1, 2]]] == 0).all()


def test_as_a_guide():
    """ELBO of an IAF guide over rows of several lengths: that of the present sites alone."""
    q = built(flows.iaf(T, conditioner=markov))

    def model():
        with pyro.plate("rows", len(LENGTHS)):
            sites = dist.Normal(torch.zeros(T, dtype=F64), 1.0).expand([len(LENGTHS), T])
            pyro.sample("z", sites.mask(MASK).to_event(1))

    def guide():
        with pyro.plate("rows", len(LENGTHS)):
            pyro.sample("z", q(lengths=LENGTHS))

    torch.manual_seed(0)
    loss = pyro.infer.Trace_ELBO().loss(model, guide)
    torch.manual_seed(0)
    d = q(lengths=LENGTHS)
    z = d.rsample()
    expected = (d.log_prob(z) - torch.where(MASK, dist.Normal(0.0, 1.0).log_prob(z), 0.0).sum(1)).sum()
    assert loss == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("context", [0, 1])
def test_fit_finds_the_optimum(context):
    """A random walk of random length: the nats of the true process, which has one step of memory."""
    torch.manual_seed(0)
    lengths, c = torch.randint(0, 4, (600,)), torch.randn(600, 1)
    y = (0.5 * torch.randn(600, 3) + (c if context else 0.0)).cumsum(1)
    y = torch.where(torch.arange(3) < lengths.unsqueeze(1), y, 0.0)
    flow = flows.maf(
        3, context, transforms=1, conditioner=lambda P, C: conditioners.Markov((), P, order=1, hidden=(), context=C)
    )
    given = {"lengths": lengths, **({"context": c} if context else {})}
    gx.fit(flow, y, given, epochs=60, lr=0.03, batch_size=100, progress=False)
    steps = y.diff(dim=1, prepend=torch.zeros(600, 1)) - (c if context else 0.0)
    truth = (
        torch.where(torch.arange(3) < lengths.unsqueeze(1), dist.Normal(0.0, 0.5).log_prob(steps), 0.0).sum(1).mean()
    )
    with torch.no_grad():
        assert abs(flow(**given).log_prob(y).mean() - truth) < 0.02


# Errors


def fails(kind, text, call):
    with pytest.raises(kind, match=re.escape(text)):
        call()


N = torch.tensor([2, 3])
MIXING = {
    "Permute": lambda: transforms.Permute(torch.tensor([2, 0, 1])),
    "LULinear": lambda: transforms.LULinear(3),
    "Rotation": lambda: transforms.Rotation(3),
    "Householder": lambda: transforms.Householder(3),
    "ConditionedCoupling": lambda: transforms.Coupling(3, heads.Affine()),
    "ConditionedBlockAutoregressive": lambda: transforms.BlockAutoregressive(3).inv,
    "ConditionedResidual": lambda: transforms.Planar(3),
    "Simplex": lambda: transforms.ToSupport(constraints.simplex, 4),
    "SoftmaxTransform": dist.transforms.SoftmaxTransform,
    "PowerTransform": lambda: dist.transforms.PowerTransform(torch.tensor(0.5)),
}


@pytest.mark.parametrize("name", MIXING)
def test_transforms_that_mix_all_sites(name):
    flow = gx.Flow([transforms.Reverse(), MIXING[name]()], dist.Normal(torch.zeros(3), 1.0).to_event(1))
    text = "Expected transforms that leave the first sites to themselves, with lengths"
    fails(ValueError, text, lambda: flow(lengths=N))
    fails(ValueError, f"got {name}.", lambda: flow(lengths=N))


class Mixed(nn.Module):
    def forward(self):
        return dist.MultivariateNormal(torch.zeros(3), torch.eye(3))


def studentised():
    return gx.Autoregressive(conditioners.Independent(3, 3), heads.StudentT(), (3,))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (Mixed, "MultivariateNormal of event_shape (3,) over"),
        (studentised, "AutoregressiveDistribution of event_shape (3,)"),
        (lambda: dist.Uniform(torch.zeros(3), 1.0).to_event(1), "Uniform of event_shape (3,) over"),
        (lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), "Normal of event_shape (2, 3) over"),
    ],
)
def test_bases_that_are_not_elementwise(base, name):
    flow = gx.Flow([transforms.Reverse()], base())
    fails(ValueError, f"Expected a base of independent real numbers, with lengths; got {name}", lambda: flow(lengths=N))


def test_wrong_lengths():
    flow = flows.maf(3, conditioner=markov)
    fails(ValueError, "Expected lengths between 0 and 3 (sites of the event); got 4", lambda: flow(lengths=N + 1))
    fails(ValueError, "Expected lengths between 0 and 3 (sites of the event); got -1", lambda: flow(lengths=N - 3))
    fails(TypeError, "Expected lengths to be a tensor of integers; got torch.float32", lambda: flow(lengths=N.float()))
    fails(TypeError, "Expected lengths to be a tensor of integers; got list.", lambda: flow(lengths=[2, 3]))
    text = "Expected lengths between 0 and 3 (sites of the event); got 4"
    for t in (Prefixes([transforms.Reverse()], N + 1), Prefixes([transforms.Reverse()], N + 1).inv):
        fails(ValueError, text, lambda t=t: t(torch.zeros(3)))
    fails(RuntimeError, "shape", lambda: flows.maf(3, 2, conditioner=markov)(torch.zeros(5, 2), lengths=N))


def test_other_conditioned_calls():
    flow = flows.maf(3, conditioner=markov)
    y = torch.zeros(2, 3)
    assert torch.equal(flow.condition(None, N).log_prob(y), flow(lengths=N).log_prob(y))
    assert type(flow().transforms[0]) is transforms.Chain


class Doubling(TanhTransform):
    """One's own, that says how."""

    def on_prefixes(self, lengths):
        return Prefixes([AffineTransform(0.0, 2.0)], lengths)


def test_a_transform_of_ones_own():
    t = Prefixes([Doubling(), transforms.Reverse()], torch.tensor(2))
    x = torch.tensor([1.0, 3.0, nan])
    assert t(x).tolist() == [6.0, 2.0, 0.0]
    assert t.log_abs_det_jacobian(x, t(x)) == pytest.approx(2 * math.log(2))
