"""Samples and quantiles of chain rules by parallel passes equal those of the loop over sites."""

import copy
import math
import pickle
import threading

import pyro
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.conditioners import parallel
from pyro_genexact.core.random import uniforms
from pyro_genexact.families.cdf import quantile
from pyro_genexact.numerics import ConvergenceError, FixedPoint
from support.registry import DISTRIBUTIONS
from support.small_models import CONTEXT, ORDER, binary, real
from support.values import F64, built, sized

NO_QUANTILES = [f"Autoregressive {name}" for name in ("nested", "vectors", "simplex", "flow")] + ["Sequence stopped"]
SOLVED = [
    name for name in DISTRIBUTIONS if name.startswith(("Autoregressive", "Sequence")) and name not in NO_QUANTILES
]
BLOCKS = [None, 1, 2, 4]


def called(name, **options):
    module, context = DISTRIBUTIONS[name]()
    return module(**options) if context is None else module(context, **options)


def noise(d, *shape):
    torch.manual_seed(0)
    return torch.rand(*shape, *d.batch_shape, *d.event_shape, dtype=F64)


@pytest.mark.parametrize("name", SOLVED)
def test_passes_give_the_quantiles_of_the_loop(name):
    loop = called(name)
    u = noise(loop, 20)
    expected = loop.from_uniform(u)
    for block in BLOCKS:
        d = called(name, solver=FixedPoint(block=block))
        y = d.from_uniform(u)
        assert y.dtype == expected.dtype and d.passes <= math.prod(d.event_shape)
        assert y.requires_grad == expected.requires_grad
        if d.support.is_discrete:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NO_QUANTILES)
def test_families_without_quantiles_are_named(name):
    with pytest.raises(NotImplementedError, match=r"has an icdf \(solver='fixed_point'\); got [A-Z]"):
        called(name, solver="fixed_point").sample()


@pytest.mark.parametrize(
    "name", ["Autoregressive image", "Autoregressive categories", "OrderEnsemble", "Sequence made", "Sequence filtered"]
)
def test_the_same_seed_gives_the_same_discrete_sample(name):
    samples = []
    for solver in ("sequential", "fixed_point"):
        torch.manual_seed(3)
        samples.append(called(name, solver=solver).sample((50,)))
    assert torch.equal(*samples)


def test_order_lengths_prefix_and_source():
    u = torch.rand(8, 6, dtype=F64)
    for options in ({"lengths": torch.tensor([6, 0, 3])}, {}):
        loop, d = (binary(ORDER)(CONTEXT, solver=s, **options) for s in (None, "fixed_point"))
        uniform = u.unsqueeze(1).expand(8, 3, 6)
        assert torch.equal(d.from_uniform(uniform), loop.from_uniform(uniform))
        assert torch.equal(d.expand((8, 3)).from_uniform(uniform), loop.from_uniform(uniform))
    rest = [real()(solver=s).conditional_on_prefix(sized(3, 2)) for s in (None, FixedPoint(1), FixedPoint())]
    y, *solved = (d.from_uniform(noise(d, 5)) for d in rest)
    for x in solved:
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [torch.tensor([3, 1, 2]), torch.tensor([0, 0, 1])])
@pytest.mark.parametrize("name", ["Sequence recurrent", "Sequence made", "Sequence source"])
def test_prefixes_of_several_lengths(name, lengths):
    prefix, found = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 0, 0]]), []
    for solver in (None, "fixed_point", FixedPoint(2)):
        d = called(name, solver=solver)
        d = d.conditional_on_prefix(prefix.unsqueeze(1).expand(3, *d.batch_shape[:1] or (1,), 3), lengths[:, None], 3)
        torch.manual_seed(1)
        found.append(d.sample((30,)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sources_of_several_lengths():
    module, context = DISTRIBUTIONS["Sequence source"]()
    loop, d = (module(context, source_lengths=torch.tensor([3, 1]), solver=s) for s in (None, "fixed_point"))
    assert torch.equal(d.from_uniform(noise(d, 9)), loop.from_uniform(noise(d, 9)))


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 0, 2])])
def test_gradients_of_rsample(lengths):
    model, context = real(context=2), CONTEXT.clone().requires_grad_()
    inputs = [context, *model.parameters()]

    torch.manual_seed(2)
    u = uniforms((5, 3), context.device)[:4].t()
    d = model(context, lengths=lengths, solver="fixed_point")
    torch.manual_seed(2)
    y, expected = d.rsample(), model(context, lengths=lengths).from_uniform(u)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    first, wanted = (torch.autograd.grad(x.sin().sum(), inputs, create_graph=True) for x in (y, expected))
    plain = torch.autograd.grad(d.from_uniform(u).sin().sum(), inputs)
    for got, graph, want in zip(plain, first, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(graph, want, rtol=1e-8, atol=1e-8)
    second = [torch.autograd.grad(sum(g.square().sum() for g in gs), context)[0] for gs in (first, wanted)]
    torch.testing.assert_close(*second, rtol=1e-6, atol=1e-6)
    assert second[0].abs().max() > 1e-3


def test_gradient_of_a_prefix():
    prefix = sized(3, 2).requires_grad_()
    u, grads = noise(real()(), 3)[:, :2], []
    for solver in (None, "fixed_point"):
        y = real()(solver=solver).conditional_on_prefix(prefix).from_uniform(u)
        grads.append(torch.autograd.grad(y.sin().sum(), prefix)[0])
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order, most", [(0, 2), (1, 12)])
def test_few_passes_where_sites_depend_on_few(order, most):
    net = conditioners.Independent(12, 2) if not order else conditioners.Markov((), 2, order=1, hidden=(8,))
    d = built(gx.Autoregressive(net, heads.Normal(), (12,)))(solver="fixed_point")
    d.sample((10,))
    assert 1 < d.passes <= most


def test_too_few_passes_are_reported():
    d = binary()(CONTEXT, solver=FixedPoint(max_passes=1))
    with pytest.raises(ConvergenceError, match=r"fixed point; got values [01] and [01] at \(row, site\)") as error:
        d.sample((20,))
    assert error.value.residual == 1 and len(error.value.index) == 2
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("solver, error", [(None, ValueError), ("fixed_point", ConvergenceError)])
@pytest.mark.parametrize("head", [heads.Bernoulli(), heads.Categorical(3)])
def test_parameters_of_nan_raise(head, solver, error):
    model = gx.Autoregressive(conditioners.Independent(3, head.num_params), head, (3,))
    for p in model.parameters():
        torch.nn.init.constant_(p, torch.nan)
    with pytest.raises(error, match="NaN"):
        model(solver=solver).sample((2,))
    with pytest.raises(error, match="NaN"):
        model(solver=solver).from_uniform(torch.full((3,), 0.5))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"Expected solver to be None, .* got 'newton'"):
        real()(solver="newton")
    with pytest.raises(ValueError, match=r"block to be an integer >= 1; got 0"):
        FixedPoint(block=0)
    with pytest.raises(ValueError, match=r"max_passes to be an integer >= 1; got -2"):
        FixedPoint(max_passes=-2)
    with pytest.raises(ValueError, match=r"tol >= 0; got -1"):
        FixedPoint(tol=-1.0)
    with pytest.raises(TypeError, match=r"tol to be a number; got 'small'"):
        FixedPoint(tol="small")
    with pytest.raises(ValueError, match="finite quantiles"):
        real()(solver="fixed_point").from_uniform(torch.ones(4, dtype=F64))


def test_in_float32_rounding_changes_at_most_one_row_in_1000():
    model = binary().float()
    samples = []
    for solver in (None, FixedPoint()):
        torch.manual_seed(0)
        samples.append(model(CONTEXT.float(), solver=solver).sample((1000,)).flatten(0, 1))
    assert (samples[0] != samples[1]).any(1).sum() <= 3  # of 3000


def test_categories_of_probability_zero_are_never_drawn(monkeypatch):
    head = heads.TopK(heads.Categorical(4), 2)
    model = built(gx.Autoregressive(conditioners.Independent(2, 4, site=4), head, (2,)))
    kept = head(model.conditioner(torch.zeros(1, 2, dtype=torch.long))).probs[0] > 0
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 1.0], dtype=F64))
    ends = uniforms((), torch.device("cpu"))
    monkeypatch.setattr(
        gx.autoregressive.site_by_site, "uniforms", lambda shape, *_: ends.expand(*shape[:1], 2).contiguous()
    )
    for solver in (None, "fixed_point"):
        y = model(solver=solver).sample((2,))
        assert kept.gather(1, y.t()).all() and (y[0] != y[1]).all()
    for p in (0.0, 1.0):
        assert (quantile(pyro.distributions.Bernoulli(torch.tensor(p)), ends) == p).all()


def test_in_a_plate_in_inference_mode_in_threads_and_copied():
    model, found = binary(), []
    d = model(CONTEXT, solver="fixed_point")
    with pyro.plate("rows", 3):
        assert pyro.sample("y", d).shape == (3, 6)
    with torch.inference_mode():
        assert d.sample((2,)).shape == (2, 3, 6)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert other.solver == FixedPoint() and other.passes == d.passes
        assert other.sample().shape == (3, 6)
    u = noise(d, 4)
    expected = d.from_uniform(u)
    threads = [threading.Thread(target=lambda: found.append(d.from_uniform(u))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for y in found) and len(found) == 3


def test_values_that_cannot_be_read_use_the_loop(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    monkeypatch.setattr(parallel, "solve_sites", None)
    assert binary().to("meta")(CONTEXT.to("meta"), solver="fixed_point").sample((2,)).shape == (2, 3, 6)


def test_sites_of_several_families():
    head = heads.PerSite([heads.Bernoulli(), heads.Normal(), heads.Poisson()])
    model = built(gx.Autoregressive(conditioners.MADE(3, head.num_params), head, (3,)))
    u = noise(model(), 50)
    torch.testing.assert_close(model(solver="fixed_point").from_uniform(u), model().from_uniform(u))
    assert model(solver="fixed_point").sample((5,)).dtype == model().sample((5,)).dtype == F64
    torch.nn.init.constant_(model.conditioner.layers[-1].bias, torch.nan)
    with pytest.raises(ConvergenceError, match="NaN"):
        model(solver="fixed_point").sample()


def test_no_rows():
    assert real()(solver="fixed_point").rsample((0,)).shape == (0, 4)
