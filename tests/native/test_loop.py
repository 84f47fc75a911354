"""The native loop over the sites of MADE returns what the loop in Python returns, from the same random numbers."""

from __future__ import annotations

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import native
from pyro_genexact.conditioners import MADE
from pyro_genexact.conditioners.sweeps import Sweeps
from support.native_networks import BIJECTIONS, FAMILIES, NETWORKS, both, given_to, network
from support.values import DTYPES, sized


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("head", BIJECTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_bijections(name, head, dtype, tol):
    head = BIJECTIONS[head]()
    net = network(name, head, head.site_shape, dtype)
    module = gx.transforms.AutoregressiveTransform(net, head)
    for rows in (1, 70):
        y, context = given_to(net, rows, *head.site_shape, dtype=dtype)
        with torch.no_grad():
            assert net.native_loop(head, y, context) is not None

        def inverse(context=context, y=y):
            t = module(context).inv
            x = t(y)
            return x, t.log_abs_det_jacobian(y, x)

        here, there = both(inverse)
        assert all(a.dtype is dtype and a.stride() == b.stride() for a, b in zip(here, there, strict=True))
        scale = there[0].abs().max().clamp(min=1)  # errors grow along the sites
        torch.testing.assert_close(here[0] / scale, there[0] / scale, rtol=10 * tol, atol=10 * tol)
        torch.testing.assert_close(here[1], there[1], rtol=100 * tol, atol=100 * tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_families(name, family, dtype):
    make, site = FAMILIES[family]
    net = network(name, head := make(), site, dtype)
    model = gx.Autoregressive(net, head, (net.num_sites, *head.site_shape))
    _, context = given_to(net, 70, dtype=dtype)
    u = torch.rand(70, net.num_sites, *head.site_shape, dtype=torch.float64)
    with torch.no_grad():
        assert net.native_loop(head, u, context) is not None
    here, there = both(lambda: model(context).sample((3,) if net.context else (70,)))
    assert here.dtype is there.dtype
    assert torch.equal(here, there)
    assert torch.equal(*both(lambda: model(context).from_uniform(u)))


def test_orders_and_broadcasting():
    net = network("tanh, context", head := h.Bernoulli(), ())
    model = gx.Autoregressive(net, head, (4, 5), torch.randperm(20))
    assert torch.equal(*both(lambda: model(sized(2, 1, 3)).expand((2, 3)).sample((5,))))


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("head", ["affine", "affine vectors", "spline"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, head, rows):
    """The native loop leaves a state for the reverse sweep, and the native sweep returns what that in Python returns."""
    head = BIJECTIONS[head]()
    net = network(name, head, head.site_shape)
    module = gx.transforms.AutoregressiveTransform(net, head)
    y, context = given_to(net, rows, *head.site_shape)
    wanted = [y.requires_grad_(), *net.parameters()]
    wanted += [] if context is None else [context.requires_grad_()]

    def gradients(on):
        with native.enabled(on):
            x, ladj = module(context).inv.call_and_ladj(y)
            return torch.autograd.grad(x.sin().sum() + ladj.sum(), wanted)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        scale = b.abs().max().clamp(min=1)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-8, atol=1e-8)


def test_the_sweep_is_native(monkeypatch):
    net = network("tanh, context", head := h.Affine(), ())
    y, context = given_to(net, 3)
    monkeypatch.setattr(Sweeps, "reverse", None)
    module = gx.transforms.AutoregressiveTransform(net, head)
    module(context).inv(y.requires_grad_()).sum().backward()
    assert y.grad.isfinite().all()


def test_parameters_of_nan_raise():
    head = h.Categorical(3)
    net = MADE(2, 3, site=3)
    with torch.no_grad():
        net.layers[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not NaN; got NaN"):
        gx.Autoregressive(net, head, (2,))().sample((2,))


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("head", [h.SumOfSquares, h.Bernstein, h.DeepSigmoid])
def test_steep_roots(head, dtype, tol):
    """The log-derivative at the root times the error of the root is rounding of y, for parameters far from 0."""
    net = MADE(2, (head := head()).num_params, hidden=()).to(dtype)
    with torch.no_grad():
        net.layers[0].weight.zero_()
        net.layers[0].bias.copy_(3 * sized(*net.layers[0].bias.shape))
    y = (sized(200, 2) * 10 ** (2 * sized(200, 1, seed=1))).to(dtype)
    module = gx.transforms.AutoregressiveTransform(net, head)
    with torch.no_grad():
        found = net.native_loop(head, y, None)
        assert found is not None
        back, ladj = module().call_and_ladj(found.values)
    slope = head(net(found.values)).log_abs_det_jacobian(found.values, y).exp()
    error = (back - y).abs() / (1 + y.abs() + slope * found.values.abs())
    assert error.max() < tol / 10
    torch.testing.assert_close(found.totals, -ladj, rtol=tol, atol=tol)


def test_roots_that_are_not_found_are_left_to_python():
    net = network("relu", head := h.SumOfSquares(), ())
    y, _ = given_to(net, 4)
    module = gx.transforms.AutoregressiveTransform(net, head)
    y[0, 19] = torch.nan
    here, there = both(lambda: module().inv(y))
    assert torch.equal(here.isnan(), y.isnan())
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9, equal_nan=True)
    y[2, 3] = torch.inf
    with pytest.raises(gx.ConvergenceError, match="Expected a root"), torch.no_grad():
        module().inv(y)


def test_nan_and_infinity_as_in_python():
    net = network("relu", head := h.RationalQuadraticSpline(), ())
    y, _ = given_to(net, 4)
    y[0, 0], y[1, 19], y[2, 3], y[3, 1] = torch.nan, torch.nan, torch.inf, -1e9
    module = gx.transforms.AutoregressiveTransform(net, head)
    here, there = both(lambda: module().inv(y))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_rows_do_not_depend_on_the_batch_or_on_threads():
    net = network("relu", head := h.Affine(), ())
    y, _ = given_to(net, 300)
    with torch.no_grad():
        every = net.native_loop(head, y, None).values
        assert torch.equal(every[37:38], net.native_loop(head, y[37:38], None).values)
        large = MADE(64, 2, hidden=(512, 512)).double()
        y = sized(300, 64)
        one = large.native_loop(head, y, None).values
        torch.set_num_threads(2)
        try:
            two = large.native_loop(head, y, None).values
        finally:
            torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_fake_tensors():
    net = network("tanh, context", head := h.Affine(), ())
    y, context = given_to(net, 4)
    with torch.no_grad():
        real = net.native_loop(head, y, context, keep=True)
        arguments = (
            [layer.masked() for layer in [*net.layers, net.direct]],
            [sized(len(layer.bias), 4) for layer in net.layers],
        )
        rest = net._sweeps.ends, True, 1, 0, "affine", [7.0], True
        torch.library.opcheck(torch.ops.pyro_genexact.loop.default, (y.unsqueeze(2), *arguments, *rest))
    assert real.phi.shape == (4, 20, 2)
    hidden, weights = [sized(64, 4), sized(64, 4)], arguments[0]
    sweep = sized(4, 20, 1), sized(4, 20, 1, 2), sized(4, 20, 2), hidden, weights, net._sweeps.ends, True, 1
    torch.library.opcheck(torch.ops.pyro_genexact.reverse.default, sweep)
