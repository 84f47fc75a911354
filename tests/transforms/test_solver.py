"""The inverse of autoregressive transforms by parallel passes equals that of the loop over sites."""

import copy
import pickle

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact.conditioners import parallel
from pyro_genexact.numerics import ConvergenceError, FixedPoint
from pyro_genexact.transforms.modules import transform_of
from support.registry import TRANSFORMS
from support.values import F64, built, sized

MADE_OF = [name for name in TRANSFORMS if name.startswith("Autoregressive") and not name.endswith("inverse")]


def results(module, context, solver, y):
    """Of the inverse: x, log|dx/dy|, and gradients."""
    context = None if context is None else context.clone().requires_grad_()
    inputs = [y, *([] if context is None else [context]), *module.parameters()]
    t = transform_of(module, context, solver)
    x, ladj = t.inv.call_and_ladj(y)
    loss = x.sin().sum() + ladj.square().sum()
    return t, [x, ladj, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", MADE_OF)
def test_passes_give_the_inverse_and_its_gradients(name):
    module, x, context = TRANSFORMS[name]()
    y = transform_of(module, context)(x).detach().requires_grad_()
    _, expected = results(module, context, None, y)
    for block in (None, 2):
        t, found = results(module, context, FixedPoint(block), y)
        assert t.passes == t.inv.passes <= x.shape[1]
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
            assert got.dtype == want.dtype


def flow(**options):
    return built(gx.flows.maf(5, context=2, transforms=2, hidden=(12,), **options))


def test_second_derivatives():
    module, x = gx.transforms.AutoregressiveTransform(gx.conditioners.MADE(4, 2, hidden=(8,)), gx.heads.Affine()), []
    module, y = built(module), sized(3, 4).requires_grad_()
    for solver in (None, "fixed_point"):
        (g,) = torch.autograd.grad(module(solver=solver).inv(y).sin().sum(), y, create_graph=True)
        x += torch.autograd.grad(g.square().sum(), [y, *module.parameters()])[:3]
    for got, want in zip(x[3:], x[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2, 0])])
def test_a_flow_passes_the_solver_on(lengths):
    model, context = flow(), sized(3, 2)
    samples, log_probs = [], []
    for solver in ("sequential", "fixed_point", FixedPoint(block=2)):
        torch.manual_seed(0)
        d = model(context, lengths=lengths, solver=solver)
        samples.append(d.rsample((4,)))
        assert d.passes is None if solver == "sequential" else len(d.passes) == 2 and max(d.passes) <= 6
        inverse = gx.Flow(
            [t if isinstance(t, gx.Constant) else gx.transforms.Inverse(t) for t in model.transforms[:-1]], model.base
        )
        log_probs.append(inverse(context, lengths=lengths, solver=solver).log_prob(samples[0].detach()))
    for x in (samples, log_probs):
        torch.testing.assert_close(x[1], x[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x[2], x[0], rtol=1e-8, atol=1e-8)


def test_bad_solvers():
    with pytest.raises(ValueError, match=r"with an AutoregressiveTransform \(solver='fixed_point'\); got \["):
        gx.flows.realnvp(4)(solver="fixed_point")
    with pytest.raises(ValueError, match="Expected solver to be None"):
        gx.flows.maf(2)(solver=3)
    with pytest.raises(ValueError, match=r"only autoregressive transforms take a solver"):
        transform_of(gx.transforms.Reverse(), None, "fixed_point")
    assert gx.flows.realnvp(4)(solver="sequential").sample().shape == (4,)
    model = flow()
    with pytest.raises(ConvergenceError, match=r"in the last two of 1 passes"):
        model(sized(3, 2), solver=FixedPoint(max_passes=1)).sample()


@pytest.mark.parametrize("block", [None, 2])
def test_large_values_and_nan_are_those_of_the_loop(block):
    model = built(gx.flows.iaf(3, hidden=(8,), transforms=1))
    large = [[1.0, 2.0, 3.0], [1e200, 1.0, 2.0], [1.0, torch.nan, 2.0], [1e300, -1e300, 1e300]]
    y, found = torch.tensor(large, dtype=F64, requires_grad=True), []
    for solver in (None, FixedPoint(block)):
        d = model(solver=solver)
        x = d.transforms[0].inv(y)
        found.append(
            [
                x,
                d.log_prob(y[[0, 1, 3]]),
                *torch.autograd.grad(x[:2].sum(), [y, *model.parameters()], allow_unused=True),
            ]
        )
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert x[1].isfinite().all() and found[0][1][2] == -torch.inf


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}])
def test_the_loop_solves_what_does_not_settle(options):
    """Searched inverses of a row may be rounded differently in each pass."""
    torch.manual_seed(0)
    head = gx.heads.Bernstein()
    net = gx.conditioners.MADE(6, head.num_params, **options)
    t = gx.transforms.AutoregressiveTransform(net, head).double()
    for p in t.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    x = sized(50, 6)
    y = t()(x).detach()
    d = t(solver="fixed_point")
    if options:
        with pytest.raises(ConvergenceError, match="in the last two of 6 passes"):
            t(solver=FixedPoint(max_passes=6)).inv(y)
        assert d.inv(y).shape == x.shape and d.passes == 6
    else:
        torch.testing.assert_close(d.inv(y), x, rtol=1e-8, atol=1e-8)


def test_float32_differs_by_rounding():
    model = flow().float()
    x = []
    for solver in (None, "fixed_point"):
        torch.manual_seed(0)
        x.append(model(sized(3, 2).float(), solver=solver).sample((1000,)))
    off = (x[0] - x[1]).abs() / (1 + x[0].abs())
    assert (off > 1e-4).any(-1).float().mean() <= 1e-3  # rows that amplify every rounding error


def test_copies_cache_inference_mode_and_torch_func(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    model, context = flow(), sized(3, 2)
    d = model(context, solver="fixed_point")
    with torch.inference_mode():
        assert d.sample((2,)).shape == (2, 3, 5)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert other.passes == d.passes and other.sample().shape == (3, 5)
    y = d.rsample()
    torch.testing.assert_close(d.log_prob(y), model(context).log_prob(y.detach()))
    monkeypatch.setattr(parallel, "solve_sites", None)
    t = gx.transforms.AutoregressiveTransform(gx.conditioners.MADE(3, 2), gx.heads.Affine()).double()
    x = sized(4, 3)
    torch.testing.assert_close(torch.func.vmap(t(solver="fixed_point").inv)(t()(x.clone())), x)
    assert t.to("meta")(solver="fixed_point").inv(x.to("meta")).shape == (4, 3)


def test_no_rows_and_no_sites():
    net = gx.conditioners.Recurrent((), 2, hidden=3)
    t = gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())
    assert t(solver="fixed_point").inv(torch.zeros(3, 0)).shape == (3, 0)
    t = gx.transforms.AutoregressiveTransform(gx.conditioners.MADE(3, 2), gx.heads.Affine())(solver="fixed_point")
    y = torch.zeros(0, 3, requires_grad=True)
    t.inv(y).sum().backward()
    assert y.grad.shape == (0, 3)


def test_gradients_belong_to_the_weights_of_the_call():
    module, y, found = flow().transforms[0], sized(3, 5), []
    weights = {name: (2 * p).detach().requires_grad_() for name, p in module.named_parameters()}
    for solver in (None, "fixed_point"):
        t = torch.func.functional_call(module, weights, (sized(3, 2),), {"solver": solver})
        found.append(torch.autograd.grad(t(y).sin().sum(), list(weights.values())))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
