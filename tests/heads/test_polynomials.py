"""Sums of squares and Bernstein polynomials: NumPy's and SciPy's polynomials, linear tails, scales, effort."""

from functools import partial
from math import inf, nan

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy.interpolate import BPoly

from pyro_genexact.heads import Bernstein, SumOfSquares
from support.values import DTYPES, sized, with_ladj

HEADS = {
    "squares": SumOfSquares(),
    "squares low": SumOfSquares(1, 2, bound=3.0),
    "Bernstein": Bernstein(),
    "Bernstein low": Bernstein(3, bound=3.0),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def with_tails(value, slope, bound, x):
    """A polynomial and its derivative on [-bound, bound], continued by straight lines."""
    near = np.clip(x, -bound, bound)
    return value(near) + slope(near) * (x - near), slope(near)


@pytest.mark.parametrize(("count", "degree", "bound"), [(3, 4, 5.0), (1, 0, 2.0), (2, 7, 3.0), (4, 1, 1.0)])
def test_sum_of_squares_is_the_integral_of_its_squares(count, degree, bound):
    head = SumOfSquares(count, degree, bound=bound)
    phi, x = sized(5, head.num_params), torch.linspace(-1.6 * bound, 1.6 * bound, 41, dtype=torch.float64)
    for row, (y, ladj) in zip(
        phi, zip(*(v.unbind(1) for v in with_ladj(head(phi), x.unsqueeze(1))), strict=True), strict=True
    ):
        rows = row[1:].reshape(count, -1).numpy() / bound ** np.arange(degree + 1)
        slope = sum((1 - 1e-3) / count * (1 + Polynomial(a)) ** 2 for a in rows) + 1e-3
        value, derivative = with_tails(slope.integ(k=0), slope, bound, x.numpy())
        np.testing.assert_allclose(y.numpy(), float(row[0]) + value, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(ladj.exp().numpy(), derivative, rtol=1e-10)


@pytest.mark.parametrize(("degree", "bound"), [(16, 5.0), (1, 2.0), (5, 3.0), (40, 1.0)])
def test_bernstein_is_the_polynomial_of_scipy(degree, bound):
    head = Bernstein(degree, bound=bound)
    phi, x = sized(5, head.num_params), torch.linspace(-1.6 * bound, 1.6 * bound, 41, dtype=torch.float64)
    for row, (y, ladj) in zip(
        phi, zip(*(v.unbind(1) for v in with_ladj(head(phi), x.unsqueeze(1))), strict=True), strict=True
    ):
        slopes = np.exp(5 * np.tanh(row[1:].numpy() / 5))
        coefficients = np.concatenate([[0.0], 2 * bound / degree * slopes.cumsum()])
        coefficients += float(row[0]) - coefficients[-1] / 2
        polynomial = BPoly(coefficients[:, None], [-bound, bound])
        value, derivative = with_tails(polynomial, polynomial.derivative(), bound, x.numpy())
        np.testing.assert_allclose(y.numpy(), value, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(ladj.exp().numpy(), derivative, rtol=1e-10)


@heads
def test_zero_is_the_identity(head):
    for dtype in (torch.float64, torch.float32):
        x, eps = torch.linspace(-9, 9, 73, dtype=dtype), torch.finfo(dtype).eps
        y, ladj = with_ladj(head(torch.zeros(head.num_params, dtype=dtype)), x)
        torch.testing.assert_close(y, x, rtol=16 * eps, atol=16 * eps)
        torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0, atol=16 * eps)


@pytest.mark.parametrize("head", [SumOfSquares(degree=0), SumOfSquares(1, 0), Bernstein(1)])
def test_the_lowest_degree_is_affine(head):
    t, x = head(sized(4, head.num_params)), torch.linspace(-50, 50, 11, dtype=torch.float64).unsqueeze(1)
    y, ladj = with_ladj(t, x)
    torch.testing.assert_close(y, y[5] + x * ladj[5].exp(), rtol=1e-12, atol=1e-12)
    assert ladj.std(0).max() < 1e-12 < ladj.std()


@heads
@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("factor", [0, 1, 10])
def test_round_trips_at_any_scale(head, dtype, tol, factor):
    sizes = 10 ** torch.linspace(-6, 4, 41, dtype=torch.float64)
    y = torch.cat([-sizes, sizes, torch.linspace(-8, 8, 81, dtype=torch.float64)]).to(dtype).unsqueeze(-1)
    t = head((factor * sized(30, head.num_params)).to(dtype))
    with torch.no_grad():
        again = t(t.inv(y).clone())
    assert ((again - y).abs() / y.abs().clamp(min=1)).max() < tol


@heads
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_extreme_parameters_and_values(head, far):
    x = torch.cat([torch.linspace(-6, 6, 49), torch.tensor([1e4, -1e8])]).double().unsqueeze(-1)
    signs = torch.where(sized(3, head.num_params, seed=4) > 0, 1.0, -1.0).double()
    for dtype in (torch.float64, torch.float32):
        for phi in (far * signs, torch.full_like(signs, far)):
            phi = phi.to(dtype).requires_grad_()
            y, ladj = with_ladj(head(phi), x.to(dtype))
            assert y.isfinite().all() and ladj.isfinite().all() and (y[:49].diff(dim=0) > 0).all()
            back = head(phi).inv(y.detach())
            grads = torch.autograd.grad((y + ladj).sum() + back[:49].sum(), phi)
            assert all(t.isfinite().all() for t in (back, *grads))
    t = head(torch.ones(head.num_params))
    assert t(torch.tensor(nan)).isnan() and t.inv(torch.tensor(nan)).isnan()
    assert torch.equal(t.inv(torch.tensor([inf, -inf])), torch.tensor([inf, -inf]))


@pytest.mark.parametrize("head", [Bernstein(), Bernstein(1), Bernstein(60), Bernstein(3, bound=3.0)])
def test_flat_tails_do_not_cancel_in_float32(head):
    generator = torch.Generator().manual_seed(1)
    phi = torch.randn(400, 1, head.num_params, generator=generator)
    y = torch.cat([torch.randn(50, generator=generator) * 10 ** torch.linspace(0, 3, 50), torch.tensor([1e6, -1e6])])
    x = torch.linspace(-12, 12, 400).expand(400, -1)
    with torch.no_grad():
        t = head(10 * phi)
        again = t(t.inv(y.expand(400, -1)).clone())
        assert ((again - y).abs() / (1 + y.abs())).max() < 1e-4
        for factor in (10, 100, 1000):
            assert (head(factor * phi)(x).diff() > 0).all()


def test_the_slope_of_a_sum_of_squares_does_not_cancel_at_a_double_root():
    phi = torch.tensor([0.0, 2.0, -12.0, 12.0], dtype=torch.float64)  # 1 + p = 3 (1 - 2 u)^2
    head = SumOfSquares(1, 2, bound=1.0)
    u = torch.tensor([0.5, 0.5 + 1e-3, 0.5 - 1e-4], dtype=torch.float64)
    expected = 0.999 * 9 * (1 - 2 * u) ** 4 + 1e-3
    torch.testing.assert_close(with_ladj(head(phi), u)[1].exp(), expected, rtol=1e-13, atol=0)


@heads
def test_values_rise_to_rounding(head):
    t = head(sized(20, head.num_params).float())
    for start in (-4.9, -1.0, -1e-3, 0.3, 2.99, 4.99, 5.0):
        x = (torch.tensor(start).view(torch.int32) + torch.arange(200)).int().view(torch.float32).sort().values
        y = t(x.unsqueeze(-1))
        assert (y.diff(dim=0) >= -16 * torch.finfo(y.dtype).eps * (1 + y[1:].abs())).all()


@heads
def test_a_search_takes_few_evaluations(head):
    """The guess is good: Newton's method from y itself needs twice as many."""
    for dtype in (torch.float64, torch.float32):
        t, calls = head((0.2 * sized(200, head.num_params)).to(dtype)), []
        function = t.function
        t.function = lambda *inputs, f=function, calls=calls: (calls.append(1), f(*inputs))[1]
        y = sized(200, seed=1).to(dtype)
        with torch.no_grad():
            x = t.invert(y)
        torch.testing.assert_close(function(x, *t.parameters, *t.shared)[0], y, rtol=1e-5, atol=1e-5)
        guess = t.guess(y, *t.parameters, *t.shared)
        assert len(calls) <= 4 and (guess - x.clamp(-head.bound, head.bound)).abs().max() < 0.02
    assert isinstance(t.guess, partial)


@heads
def test_the_guess_holds_at_any_scale(head):
    t = head(3 * sized(50, head.num_params))
    y = torch.tensor([-1e6, -30.0, -1.0, 0.0, 2.0, 1e3], dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        x = t.inv(y.expand(6, 50))
    guess = t.guess(y.expand(6, 50), *t.parameters, *t.shared)
    assert (guess - x.clamp(-head.bound, head.bound)).abs().max() < 0.5 * head.bound


@heads
def test_under_functorch(head):
    x, phi = sized(5), 0.5 * sized(5, head.num_params, seed=1)

    def f(x, phi):
        y = head(phi)(x)
        return y.sin() + head(phi).log_abs_det_jacobian(x, y) + head(phi).inv(x * 0.9)

    got = torch.func.vmap(torch.func.grad(f, (0, 1)))(x, phi)
    inputs = [v.clone().requires_grad_() for v in (x, phi)]
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SumOfSquares(0), "Expected polynomials to be an integer >= 1; got 0"),
        (lambda: SumOfSquares(degree=-1), "Expected degree to be an integer >= 0; got -1"),
        (lambda: SumOfSquares(bound=-1.0), "Expected bound to be positive and finite; got -1.0"),
        (lambda: Bernstein(0), "Expected degree to be an integer >= 1; got 0"),
        (lambda: Bernstein(bound=nan), "Expected bound to be positive and finite; got nan"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
