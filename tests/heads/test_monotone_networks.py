"""Heads with networks of their own: against plain networks and SciPy's quad; slopes, panels, gradients, errors."""

import copy
from functools import partial

import pytest
import scipy.integrate
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap

from pyro_genexact import heads, numerics
from pyro_genexact.heads import networks
from pyro_genexact.testing import redraw

KINDS = {"monotone": heads.MonotoneNetwork, "integrated": heads.IntegratedPositive}


def made(kind, *sizes, fresh=False, **options):
    torch.manual_seed(0)
    head = KINDS[kind](*(sizes or (3, (7, 5))), **options).double()
    return head if fresh else redraw(head)


def numbers(head, *batch, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*batch, head.num_params, generator=generator, dtype=torch.float64)


def shares(head, phi):
    return (phi[..., 3:] @ head.shares.weight.mT + head.shares.bias).split(head.hidden, -1)


def test_increasing_network_by_a_plain_one():
    head = made("monotone", 3, (7, 5, 4))
    phi, x = numbers(head, 9), torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True)
    h = x[:, None]
    for i, (w, share) in enumerate(zip(head.weights, shares(head, phi), strict=False)):
        weight = nn.functional.softplus(w) * (1 if i == 0 else 6 / w.shape[1])
        h = torch.tanh(h @ weight.mT + share)
    net = (h * nn.functional.softplus(head.weights[-1])).mean(-1)
    s, r = 5 * torch.tanh(phi[:, 1] / 5), 3 * torch.tanh(phi[:, 2] / 3)
    expected = phi[:, 0] + s.exp() * x + torch.exp(r - 1) * net
    y, slope = head(phi).call_and_ladj(x)
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    (derivative,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(slope, derivative.log(), rtol=1e-12, atol=1e-12)


def log_g(head, phi, t):
    """By a plain network, for one row of phi and many points."""
    h = (t.clamp(-head.bound, head.bound) * 8 / head.bound)[:, None]
    limited = [4 * torch.tanh(head.weights[0] / 4)]
    between = len(head.hidden) - 1
    for w, most in zip(head.weights[1:], [8.0 ** (1 / max(between, 1))] * between + [3.0], strict=True):
        limited.append(w / (1 + w.abs().sum(1, keepdim=True) / most))
    for weight, share in zip(limited, shares(head, phi), strict=False):
        h = torch.sin(h @ weight.mT + share)
    return 5 * torch.tanh(phi[1] / 5) + 3 * torch.tanh(phi[2] / 3) * (h @ limited[-1][0])


@pytest.mark.parametrize("bound", [8.0, 2.5])
def test_integral_by_scipy(bound):
    head = made("integrated", 3, (7, 5), bound=bound)
    phi = numbers(head, 6)
    for row in phi:
        for x in (0.0, 0.4, -1.0, 2.0, -2.7, 7.99, -9.0, 1e3):
            inside = max(-bound, min(bound, x))
            points = [k for k in range(-8, 9) if min(0, inside) < k < max(0, inside)]

            def g(t, row=row):
                return log_g(head, row, torch.tensor([t], dtype=torch.float64)).exp().item()

            with torch.no_grad():
                area = scipy.integrate.quad(g, 0, inside, points=points or None, epsabs=1e-13, epsrel=1e-13, limit=400)[
                    0
                ]
                expected = row[0].item() + area + (x - inside) * g(inside)
                y, slope = head(row).call_and_ladj(torch.tensor(x, dtype=torch.float64))
            assert y.item() == pytest.approx(expected, rel=1e-11, abs=1e-11)
            assert slope.exp().item() == pytest.approx(g(inside), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_log_derivative_is_the_central_difference_of_the_function(kind, scale):
    head = made(kind)
    t = head(numbers(head, 300, scale=scale))
    x = 2 * torch.randn(300, dtype=torch.float64)
    step = 1e-4
    near = [t(x + k * step) for k in (-2, -1, 1, 2)]
    difference = (8 * (near[2] - near[1]) - (near[3] - near[0])) / (12 * step)
    slope = t.call_and_ladj(x)[1].exp()
    assert ((difference / slope - 1).abs() < 1e-7 + 1e-11 / slope).all()


def test_slope_of_an_integral_is_g_at_the_edges_of_panels_too():
    head = made("integrated", bound=8.0)
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0, -7.0, 7.5, 8.0, -8.0, 20.0], dtype=torch.float64, requires_grad=True)
    phi = numbers(head, 1).expand(10, -1)
    y, slope = head(phi).call_and_ladj(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(derivative, slope.exp(), rtol=1e-11)
    beside = head(phi).call_and_ladj(x + 1e-9)[0] - y
    assert torch.allclose(beside / 1e-9, slope.exp(), rtol=1e-5)


def test_constant_slope_beyond_the_bound():
    head = made("integrated", bound=3.0)
    t = head(numbers(head, 1).expand(4, -1))
    y, slope = t.call_and_ladj(torch.tensor([3.0, 5.0, 1e6, 1e8], dtype=torch.float64))
    assert torch.equal(slope, slope[:1].expand(4))
    assert torch.allclose(y[1:] - y[0], slope[0].exp() * torch.tensor([2.0, 1e6 - 3, 1e8 - 3], dtype=torch.float64))


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_is_as_accurate_as_it_says(seed):
    head = made("integrated", 8, (16, 16), fresh=True)
    phi, x = numbers(head, 500, seed=seed), 2 * torch.randn(500, dtype=torch.float64)
    exact = head(phi)(x)
    got = copy.deepcopy(head).float()(phi.float())(x.float())
    size = (exact - phi[:, 0]).abs() + phi[:, 0].abs()
    assert ((got - exact).abs() <= 3e-6 * (size + 0.1)).all()


@pytest.mark.parametrize("hidden", [(8,), (8, 8), (4, 4, 4), (4, 4, 4, 4), (4,) * 7])
@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_integrals_of_any_depth_with_large_weights(hidden, factor):
    """Against many more panels, of the same tensors in float64, where log g varies as far as it may."""
    for seed in range(3):
        torch.manual_seed(seed)
        head = heads.IntegratedPositive(4, hidden).double()
        with torch.no_grad():
            for p in head.parameters():
                p.mul_(factor)
        phi, x = numbers(head, 60, seed=seed), 5 * torch.randn(60, dtype=torch.float64)
        phi[:, 0], phi[:, 2] = 0, 10
        for dtype, most in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
            with torch.no_grad():
                t = copy.deepcopy(head).to(dtype)(phi.to(dtype))
                got = t(x.to(dtype)).double()
                tensors = [v.double() for v in (*t.parameters, *t.shared)]
                with pytest.MonkeyPatch.context() as patch:
                    fine = partial(numerics.integrate, tol=1.0, panels=64)
                    patch.setattr(networks, "integrate", lambda g, low, high, fine=fine, **_: fine(g, low, high))
                    exact = t.function(x.to(dtype).double(), *tensors)[0]
            assert ((got - exact).abs() <= most * exact.abs()).all()


@pytest.mark.parametrize("hidden", [(8,), (4, 4, 4, 4)])
def test_the_slope_of_log_g_is_bounded_whatever_the_weights(hidden):
    head = heads.IntegratedPositive(4, hidden, bound=8.0).double()
    with torch.no_grad():
        for p in head.parameters():
            p.fill_(1e3)
    x = torch.linspace(-7.9, 7.9, 400, dtype=torch.float64, requires_grad=True)
    phi = numbers(head, 1, scale=1e3).abs().expand(400, -1)
    (slope,) = torch.autograd.grad(head(phi).call_and_ladj(x)[1].sum(), x)
    assert 0 < slope.abs().max() < 3 * 3 * 4 * 8


@pytest.mark.parametrize(("dtype", "points"), [(torch.float32, 16), (torch.float64, 31)])
def test_the_first_try_of_the_quadrature_suffices(dtype, points, monkeypatch):
    shapes, plain = [], networks._log_integrand

    def counted(t, *rest):
        shapes.append(tuple(t.shape))
        return plain(t, *rest)

    monkeypatch.setattr(networks, "_log_integrand", counted)
    torch.manual_seed(0)
    head = heads.IntegratedPositive().to(dtype)
    x = torch.randn(400, dtype=dtype)
    head(torch.randn(400, head.num_params, dtype=dtype))(x)
    panels = int((x.abs() / 1.5).ceil().sum())
    assert shapes == [(panels, points)]


def test_an_integrand_that_quadrature_cannot_resolve_is_an_error():
    head = made("integrated")
    t = head(numbers(head, 3))
    unit, inner, *others = t.shared
    with pytest.raises(numerics.ConvergenceError, match="Expected an integral with an error"):
        networks.integrated_positive(torch.ones(3, dtype=torch.float64), *t.parameters, unit, 1e5 * inner, *others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_strictly_increasing_and_finite_whatever_the_weights(kind, factor):
    head = made(kind)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(factor)
        far = torch.tensor([1e4, 1e6, 1e8], dtype=torch.float64)
        x = torch.cat([-far.flip(0), torch.linspace(-9, 9, 60, dtype=torch.float64), far])
        y, slope = head(numbers(head, 5, 1, scale=factor)).call_and_ladj(x)
    assert (y.diff() > 0).all() and y.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_round_trips(kind, dtype, tol, scale):
    head = made(kind).to(dtype)
    t = head(numbers(head, 20, 1, scale=scale).to(dtype))
    y = torch.tensor([0.0, 1e-3, 1.0, -7.0, 100.0, -1e3, 1e4, -1e4], dtype=dtype).expand(20, 8)
    with torch.no_grad():
        x = t.inv(y)
        slope = t.log_abs_det_jacobian(x, y).exp()
        rounding = 4 * torch.finfo(dtype).eps * x.abs() * slope  # no x is nearer
        assert ((t(x.clone()) - y).abs() <= tol * y.abs() + tol + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_identity_at_the_start(kind):
    head = made(kind, 16, (64, 64), fresh=True)
    x = torch.linspace(-5, 5, 50, dtype=torch.float64)
    assert (head(numbers(head, 50, scale=0.05))(x) - x).abs().max() < 0.6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_its_gradient_in_both_directions(kind, training):
    head = made(kind).train(training)
    phi, x = numbers(head, 6).requires_grad_(), torch.linspace(-2, 2, 6, dtype=torch.float64)
    for way in ("call_and_ladj", "inverse_and_ladj"):
        value, slope = getattr(head(phi), way)(x)
        grads = torch.autograd.grad(value.sin().sum() + slope.sum(), [phi, *head.parameters()])
        assert all((g != 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_to_second_order_by_weights_of_both_directions(kind):
    head = made(kind, 2, (3, 2))
    names = [name for name, _ in head.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in head.parameters()]
    phi, x = numbers(head, 2).requires_grad_(), torch.tensor([-1.2, 0.7], dtype=torch.float64, requires_grad=True)
    for way in ("call_and_ladj", "inverse_and_ladj"):

        def f(x, phi, *weights, way=way):
            return getattr(torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (phi,)), way)(x)

        assert gradcheck(f, (x, phi, *weights), fast_mode=True)
        assert gradgradcheck(f, (x, phi, *weights), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func_and_broadcasting(kind):
    head = made(kind)
    t, x = head(numbers(head, 4)), 2 * torch.randn(6, 4, dtype=torch.float64)
    y, slope = t.call_and_ladj(x)
    tensors = (*t.parameters, *t.shared)
    for got in (
        vmap(lambda row: t.function(row, *tensors))(x),
        [torch.stack(v) for v in zip(*map(t.call_and_ladj, x), strict=True)],
    ):
        assert torch.allclose(got[0], y, rtol=1e-12, atol=1e-12) and torch.allclose(
            got[1], slope, rtol=1e-12, atol=1e-12
        )
    jacobian = jacrev(lambda row: t.function(row, *tensors)[0])(x[0])
    assert torch.allclose(jacobian, torch.diag(slope[0].exp()), rtol=1e-10)
    one = t.function(x[:1, :1], *tensors)[0]
    assert torch.allclose(one, t.call_and_ladj(x[0, 0].expand(4))[0])
    assert t.call_and_ladj(x[:0])[0].shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(kind):
    head = made(kind)
    y, slope = head(numbers(head, 2)).call_and_ladj(torch.tensor([torch.nan, 1.0], dtype=torch.float64))
    assert y.isnan().tolist() == slope.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.MonotoneNetwork(0), "signal to be an integer >= 1; got 0"),
        (lambda: heads.MonotoneNetwork(4, hidden=(8, 0)), r"hidden to be a sequence of integers >= 1; got \(8, 0\)"),
        (lambda: heads.MonotoneNetwork(4, hidden=()), "hidden to hold at least one width; got none"),
        (lambda: heads.IntegratedPositive(-1), "signal to be an integer >= 1; got -1"),
        (lambda: heads.IntegratedPositive(4, hidden=()), "hidden to hold at least one width; got none"),
        (lambda: heads.IntegratedPositive(bound=0.0), "bound to be positive and finite; got 0.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
