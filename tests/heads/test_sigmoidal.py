"""Heads of sigmoids: against mpmath, plain formulas, the affine limit and torch's own transforms."""

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import pyro_genexact as gx
from pyro_genexact import heads
from pyro_genexact.heads.sigmoidal import deep_sigmoid, logistic_mixture

HEADS = {
    "dsf": lambda: heads.DeepSigmoid(5),
    "ddsf": lambda: heads.DeepSigmoid(3, layers=3),
    "mixture": lambda: heads.LogisticMixtureCDF(4),
}


def numbers(head, *batch, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*batch, head.num_params, generator=generator, dtype=torch.float64).to(dtype)


def exact(layers, x):
    """y and log dy/dx of one value by mpmath, from the head's own numbers."""
    with mpmath.workdps(60):
        h, slopes = [mpmath.mpf(x)], [mpmath.mpf(1)]
        for a, b, _, log_w in (layers[i : i + 4] for i in range(0, len(layers), 4)):
            K = a.shape[-1]
            h, slopes = h * (K // len(h)), slopes * (K // len(slopes))
            z = [mpmath.mpf(a[k].item()) * h[k] + mpmath.mpf(b[k].item()) for k in range(K)]
            up = [1 / (1 + mpmath.exp(-v)) for v in z]
            down = [1 / (1 + mpmath.exp(v)) for v in z]
            new, rates = [], []
            for row in log_w.view(-1, K):
                w = [mpmath.exp(mpmath.mpf(v.item())) for v in row]
                p, q = (sum(wk * s for wk, s in zip(w, side, strict=True)) for side in (up, down))
                new.append(mpmath.log(p) - mpmath.log(q))
                rate = sum(w[k] * up[k] * down[k] * mpmath.mpf(a[k].item()) * slopes[k] for k in range(K))
                rates.append(rate * sum(w) / (p * q))
            h, slopes = new, rates
        return float(h[0]), float(mpmath.log(slopes[0]))


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", ["dsf", "ddsf"])
def test_values_and_log_derivatives_by_mpmath(name, scale):
    head = HEADS[name]()
    t = head(numbers(head, 1, scale=scale))
    for x in (0.0, 0.3, -2.0, 11.0, -300.0, 1e5, -1e8):
        y, slope = t.call_and_ladj(torch.tensor([x], dtype=torch.float64))
        expected = exact([p[0] for p in t.parameters], x)
        assert y.item() == pytest.approx(expected[0], rel=1e-10, abs=1e-10 * scale)
        assert slope.item() == pytest.approx(expected[1], rel=1e-9, abs=1e-8 if abs(x) < 1e3 else 1e-2)


def test_mixture_by_its_formula():
    head = heads.LogisticMixtureCDF(3, bound=2.0)
    phi = numbers(head, 7)
    x = torch.linspace(-4, 4, 7, dtype=torch.float64)
    m, raw, logits, mu = phi.split([1, 4, 3, 3], -1)
    s = 2 * torch.tanh(raw / 2)
    mu = mu + torch.tensor([-2 / 3, 0, 2 / 3], dtype=torch.float64)
    p = (logits.softmax(-1) * torch.sigmoid((x[:, None] - mu) / s[:, 1:].exp())).sum(-1)
    expected = s[:, 0].exp() * torch.logit(p) + m[:, 0]
    assert torch.allclose(head(phi)(x), expected, rtol=1e-12, atol=1e-12)


def test_one_unit_is_affine():
    phi = torch.tensor([[0.7, -1.2, 3.0]], dtype=torch.float64)
    x = torch.linspace(-1e3, 1e3, 9, dtype=torch.float64)
    t = heads.DeepSigmoid(1)(phi.expand(9, 3))
    a = torch.exp(5 * torch.tanh(phi[0, 0] / 5))
    assert torch.allclose(t(x), a * x - 1.2, rtol=1e-12, atol=1e-9)
    mixture = heads.LogisticMixtureCDF(1)(torch.zeros(9, 5, dtype=torch.float64))
    assert torch.allclose(mixture(x), x, rtol=1e-12, atol=1e-12)


def test_units_and_layers_add_up():
    assert heads.DeepSigmoid(8).num_params == 24
    assert heads.DeepSigmoid(4, layers=3).num_params == 3 * 12 + 2 * 12
    assert heads.LogisticMixtureCDF(8).num_params == 26


def test_layers_compose_to_the_function_of_two_heads():
    """With rows of W alike, all units of the first layer are one and the same head of one layer."""
    K = 3
    two, one = heads.DeepSigmoid(K, layers=2), heads.DeepSigmoid(K)
    phi = numbers(two, 5)
    row = phi[:, 2 * K : 3 * K]
    phi = torch.cat([phi[:, : 2 * K], row.repeat(1, K), phi[:, -3 * K :]], 1)
    x = torch.linspace(-3, 3, 5, dtype=torch.float64)
    first, second = one(phi[:, : 3 * K]), one(phi[:, -3 * K :])
    middle = first(x)
    y, slope = two(phi).call_and_ladj(x)
    assert torch.allclose(y, second(middle), rtol=1e-12)
    assert torch.allclose(slope, first.call_and_ladj(x)[1] + second.call_and_ladj(middle)[1], rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("name", HEADS)
def test_round_trips(name, scale, dtype, tol):
    head = HEADS[name]()
    t = head(numbers(head, 200, 1, scale=scale, dtype=dtype))
    y = torch.tensor([0.0, 1e-3, 1.0, -7.0, 100.0, -1e3, 1e4, -1e4], dtype=dtype).expand(200, 8)
    x = t.inv(y)
    slope = t.log_abs_det_jacobian(x, y).exp()
    rounding = 4 * torch.finfo(dtype).eps * x.abs() * slope  # no x is nearer
    assert ((t(x.clone()) - y).abs() <= tol * y.abs() + tol + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", HEADS)
def test_finite_however_far_and_slopes_within_their_bounds(name, scale, dtype):
    head = HEADS[name]()
    phi = numbers(head, 300, 1, scale=scale, dtype=dtype).requires_grad_()
    x = torch.tensor([0.0, 3.0, -40.0, 1e4, -1e4, 1e8, -1e8], dtype=dtype).expand(300, 7)
    y, slope = head(phi).call_and_ladj(x)
    assert y.isfinite().all() and slope.isfinite().all()
    most = {"dsf": 5.0, "ddsf": 15.0, "mixture": 10.0}[name]
    assert slope.max() < most + 1e-3
    if scale == 1 or name == "dsf":  # in the tails a mean of the a_k, which begin at b / a
        assert slope[:, 5:].min() > -most - 1e-3
    (grad,) = torch.autograd.grad((y / (1 + x.abs())).sum() + slope.sum(), phi)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_derivatives_to_second_order_of_both_directions(name):
    head = HEADS[name]()
    phi, x = numbers(head, 3).requires_grad_(), torch.tensor([-1.0, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    for way in (lambda x, phi: head(phi).call_and_ladj(x), lambda y, phi: head(phi).inv.call_and_ladj(y)):
        assert gradcheck(way, (x, phi), fast_mode=True)
        assert gradgradcheck(way, (x, phi), fast_mode=True)


@pytest.mark.parametrize("name", HEADS)
def test_empty_batches(name):
    head = HEADS[name]()
    phi = numbers(head, 0, 3).requires_grad_()
    t = head(phi)
    y, slope = t.call_and_ladj(torch.zeros(0, 3, dtype=torch.float64))
    assert y.shape == slope.shape == t.inv(y).shape == (0, 3)
    assert torch.autograd.grad(y.sum() + slope.sum(), phi)[0].shape == phi.shape
    assert gx.flows.naf(3)().rsample((0,)).shape == (0, 3)


def test_functions_broadcast_and_map():
    head = heads.DeepSigmoid(3, layers=2)
    phi, x = numbers(head, 4), torch.randn(6, 4, dtype=torch.float64)
    t = head(phi)
    y, slope = t.call_and_ladj(x)
    for i in range(6):
        assert torch.equal(y[i], t.call_and_ladj(x[i])[0])
    mapped = vmap(lambda row: deep_sigmoid(row, *t.parameters))(x)
    assert torch.allclose(mapped[0], y) and torch.allclose(mapped[1], slope)
    mixture = heads.LogisticMixtureCDF(3)
    parameters = mixture(numbers(mixture, 4)).parameters
    assert torch.allclose(
        vmap(lambda row: logistic_mixture(row, *parameters)[0])(x), logistic_mixture(x, *parameters)[0]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.DeepSigmoid(0), "units to be an integer >= 1; got 0"),
        (lambda: heads.DeepSigmoid(4, layers=0), "layers to be an integer >= 1; got 0"),
        (lambda: heads.DeepSigmoid(4, bound=0.0), "bound to be positive and finite; got 0.0"),
        (lambda: heads.LogisticMixtureCDF(0), "components to be an integer >= 1; got 0"),
        (lambda: heads.LogisticMixtureCDF(bound=-1.0), "bound to be positive and finite; got -1.0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
