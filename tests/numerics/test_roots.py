"""Roots, against SciPy on ten thousand random functions: accuracy, special cases, effort, errors."""

from __future__ import annotations

import pickle
from math import inf, nan

import numpy
import pytest
import scipy.integrate
import scipy.optimize
import torch

from pyro_genexact.numerics import ConvergenceError, bisect, find, integrate, root
from support.functions import FAMILIES, cubic, ninth_power
from support.values import F64
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")

COUNT = 1000  # functions a family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_roots_are_those_of_brentq(family):
    width, size = FAMILIES[family]
    generator = torch.Generator().manual_seed(width)
    p = torch.rand(COUNT, width, generator=generator) + 1e-3
    scale = 10 ** (24 * torch.rand(COUNT, 1, generator=generator) - 12)
    truth = 2 * torch.randn(COUNT, generator=generator)
    calls = []

    def f(x, p, scale):
        calls.append(len(x))
        return family(torch, x / scale[..., 0], p)

    y = f(truth * scale[:, 0], p, scale)
    calls.clear()
    x = root(f, y, p, scale)
    assert len(calls) < 169 and sum(calls) < 80 * COUNT
    residual = (f(x, p, scale) - y).abs()
    power = 9 if family is ninth_power else 1  # by which it multiplies the rounding of u
    rounding = 1e-15 * (1 + power * y.abs() + size * (1 + (x / scale[:, 0]).abs()))
    beside = [f(x.nextafter(torch.full_like(x, side)), p, scale) for side in (-inf, inf)]
    assert ((residual <= rounding) | ((beside[0] <= y) & (beside[1] >= y))).all()
    ours, rows = (x / scale[:, 0]).numpy(), p.numpy()
    for i in range(COUNT):
        least = float(y[i])

        def value(u, i=i, least=least):
            return float(family(numpy, numpy.asarray(u), rows[i])) - least

        theirs = scipy.optimize.brentq(value, float(truth[i]) - 5, float(truth[i]) + 7, xtol=1e-300, rtol=1e-15)
        if abs(ours[i] - theirs) > 1e-12 * max(1, abs(theirs)):  # a flat part, or one that is nearly so
            assert abs(value(ours[i])) <= abs(value(theirs)) + float(rounding[i])


BOUNDED = [
    (torch.tanh, 2.0, 1.0, 1.7976931348623157e308, inf),
    (torch.tanh, -3.0, 2.0, -inf, -1.7976931348623157e308),
    (torch.exp, -0.5, 0.5, -inf, -1.7976931348623157e308),
    (lambda x: 0 * x + 2, 3.0, 1.0, 1.7976931348623157e308, inf),
]


@pytest.mark.parametrize(("f", "y", "residual", "low", "high"), BOUNDED)
@pytest.mark.parametrize("explicit", [False, True])
def test_no_root_is_an_error_that_tells_where(f, y, residual, low, high, explicit):
    targets = torch.full((2, 3), 0.5 if f(t(0.0)) < 2 else 2.0)
    targets[1, 2] = y
    parameters = [torch.ones(3)[None]] if explicit else []
    with pytest.raises(ConvergenceError) as caught:
        root(lambda x, *one: f(x) * (one[0] if one else 1), targets, *parameters)
    error = caught.value
    assert (error.residual, error.index, error.bracket) == (pytest.approx(residual), (1, 2), (low, high))
    assert str(error) == (
        f"Expected a root of f(x) = y; got |f(x) - y| = {residual:g} at index (1, 2), for y = {y:g} and x between "
        f"{low:.8g} and {high:.8g}."
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.residual, again.index, again.bracket) == (str(error), residual, (1, 2), (low, high))


def test_a_function_that_is_nan_has_no_root():
    with pytest.raises(ConvergenceError) as caught:
        root(lambda x: x * nan, t(1.0))
    assert caught.value.index == (0,) and caught.value.residual != caught.value.residual
    overflows = root(lambda x: torch.exp(x) - torch.exp(-x), t(1e9, -3.0))  # inf - inf nowhere, but inf
    assert torch.allclose(overflows, t(1e9, -3.0).div(2).asinh(), rtol=1e-14)
    assert torch.allclose(root(lambda x: torch.where(x < 30, x, torch.nan) ** 3, t(1e4)) ** 3, t(1e4))


def test_a_constant_or_a_step_at_the_target():
    assert root(lambda x: 0 * x + 2, t(2.0)).isfinite()
    stairs = root(lambda x: x.floor(), t(3.0, 2.5, -1.0))
    assert torch.equal(stairs, t(3.0, 3.0, -1.0))  # the smallest number that is at least so high

    def ramp(x):
        return (x + 1).clamp(max=0) + (x - 1).clamp(min=0)

    assert torch.equal(root(ramp, t(0.0), tol=0), t(-1.0))


def test_special_targets_and_parameters():
    y, a = t(inf, -inf, nan, 1.0, 5.0), t(1.0, 1.0, 1.0, nan, 4.0)
    for f in (cubic, lambda x, a: cubic(x, a)[0]):
        assert torch.equal(root(f, y, a).nan_to_num(7.0, inf, -inf), t(inf, -inf, 7.0, 7.0, 1.0))
        assert root(lambda x, w, f=f: f(x, w.sum()), y[3:], shared=[t(nan, 1.0)]).isnan().all()
        assert root(f, torch.empty(0, 2), torch.empty(1, 2)).shape == (0, 2)
        assert root(f, torch.tensor(5.0), torch.tensor(4.0)) == 1
        wide = root(f, 5 * torch.ones(3, 4).T, torch.rand(1, 3))
        assert wide.shape == (4, 3) and torch.equal(wide, wide[:1].expand(4, 3))
        steps = root(f, 1e30 * torch.ones(2, 3, 2)[:, 1], torch.rand(2, 1))
        assert torch.allclose(steps, torch.full_like(steps, 1e10), rtol=1e-14)
    vector = root(lambda x, w: cubic(x, w.square().sum(-1)), t(5.0, 3.0, 12.0), torch.ones(3, 2))
    assert torch.allclose(vector**3 + 2 * vector, t(5.0, 3.0, 12.0), rtol=1e-14)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 3e-7), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tol):
    y = torch.linspace(-30, 30, 61, dtype=dtype)
    for f in (lambda x: x**3 + x, lambda x: (x**3 + x, (3 * x * x + 1).log())):
        x = root(f, y)
        truth = root(lambda x: x**3 + x, y.double())
        assert x.dtype == dtype and torch.allclose(x.double(), truth, rtol=tol, atol=tol)
    with pytest.raises(TypeError, match=r"Expected y to be a tensor of floating point numbers; got torch\.int64"):
        root(cubic, torch.tensor([1]), t(1.0))
    with pytest.raises(TypeError, match="got <class 'float'>"):
        root(cubic, 1.0, t(1.0))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"parameters\[1\].shape to begin with \(3,\) or sizes of 1 .*got \(2,\)"):
        root(lambda x, a, b: a * x + b, torch.ones(3), torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match=r"Expected f\(x\).shape == \(3,\) \(that of x\); got \(2, 3\)"):
        root(lambda x: x + torch.ones(2, 1), torch.ones(3))
    hidden = t(2.0).requires_grad_()
    with pytest.raises(ValueError, match="Expected all tensors that require gradients among parameters and shared"):
        root(lambda x: hidden * x, t(1.0))


def test_identity_at_any_size():
    y = torch.cat([10.0 ** torch.arange(-300, 300, 7), -(10.0 ** torch.arange(-300, 300, 7)), t(0.0)])
    assert torch.equal(root(lambda x: (x, torch.zeros_like(x)), y), y)
    x = root(cubic, y, torch.full_like(y, 0.5))
    middle = y.abs() < 1e290
    assert torch.allclose(cubic(x, 0.5)[0][middle], y[middle], rtol=3e-15, atol=0)


def test_ends_guess_and_last_bit():
    y, a = t(0.25, 0.75, 0.9), t(2.0, 3.0, 4.0)

    def f(x, a):
        return torch.where((x >= 0) & (x <= 1), x, torch.nan) ** a

    ends = {"low": torch.zeros(()), "high": torch.ones(())}
    x = root(f, y, a, **ends)
    assert torch.allclose(x, y ** (1 / a), rtol=1e-14)
    exact = root(f, y, a, tol=0, guess=t(0.5), **ends)
    assert (f(exact, a) >= y).all() and (f(exact.nextafter(t(0.0)), a) < y).all()
    with pytest.raises(ConvergenceError, match="x between 1 and"):
        root(f, t(2.0), t(3.0), **ends)
    assert torch.equal(find(f, y, [a], guess=t(0.5), low=torch.zeros(3), high=torch.ones(3)), x)
    for z in (1e-300, -3.0, 1e200):
        (x,) = root(torch.sinh if abs(z) < 1e100 else lambda x: x**3, t(z), tol=0)
        assert (x.sinh() if abs(z) < 1e100 else x**3) >= z


def test_elements_that_are_done_cost_no_more():
    rows = []

    def f(x, a):
        rows.append(len(x))
        return torch.where(a > 0, x, (1e9 * x) ** 9), torch.where(a > 0, 1 + 0 * x, 9e9 * (1e9 * x) ** 8).log()

    a = torch.ones(1000)
    a[:3] = 0
    find(f, torch.linspace(1, 2, 1000), [a])
    assert rows[:7] == [1000] * 7 and max(rows[7:]) == 3 and len(rows) < 80
    rows.clear()
    find(f, torch.linspace(1, 2, 1000), [torch.ones(1000)])
    assert rows == [1000] * 2 or rows == [1000]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, a: torch.where(x < a, 1e-200 * (x - a), 1e200 * (x - a)),
        lambda x, a: (x - a).sign(),
        lambda x, a: (x - a).sign() * (x - a).abs() ** (1 / 9),
        lambda x, a: torch.expm1(torch.expm1(x - a)),
        lambda x, a: (x - a) ** 9,
        lambda x, a: (x - a, 40 * (x * 1e3).sin()),  # with a derivative that is wrong
    ],
)
def test_worst_case(f):
    calls = []
    a = torch.cat([10.0 ** torch.arange(-12, 13, 4), -(10.0 ** torch.arange(-12, 13, 4)), t(0.0)])
    x = root(lambda x, a: calls.append(1) or f(x, a), torch.zeros_like(a), a)
    assert len(calls) <= 8 + 130 + 2

    def value(x):
        return f(x, a)[0] if isinstance(f(x, a), tuple) else f(x, a)

    below, above = value(x.nextafter(t(-inf))), value(x.nextafter(t(inf)))
    assert ((value(x).abs() < 1e-15) | ((below <= 0) & (above >= 0))).all()


def test_bisection():
    low, high = t(-4.0, 7.0), t(9.0, 2.0)
    found = bisect(lambda x: torch.stack([x[0] >= 1.25, x[1] <= 3.5]), low, high, 50)
    assert torch.allclose(found, t(1.25, 3.5), rtol=1e-14) and found[0] >= 1.25 and found[1] <= 3.5


def plateau(x):
    ends = 1e-9 * (torch.relu(x - 5) - torch.relu(-x - 5))
    return 100 * (torch.tanh(100 * (x - 5)) + torch.tanh(100 * (x + 5))) + ends


def test_a_rough_function_with_a_flat_side():
    """Newton's step from the flat side of a root whose residual is rounding may lead anywhere, and is not taken."""
    generator = torch.Generator().manual_seed(0)
    y = 2.8e-14 * (torch.rand(3000, generator=generator) - 0.5)
    x = root(plateau, y, guess=10 * (torch.rand(3000, generator=generator) - 0.5))
    assert x.isfinite().all() and (plateau(x) - y).abs().max() < 3e-14
    for dtype, slope, offset, tol in ((torch.float32, 1e-4, 100, 1e-5), (F64, 1.3e-12, 75, 2e-14)):

        def kink(x, slope=slope, offset=offset):
            return (torch.where(x > 0, slope * x, x) + offset) - offset

        y = tol / 5 * torch.randn(2000, generator=generator, dtype=dtype)
        x = root(kink, y, guess=torch.randn(2000, generator=generator, dtype=dtype))
        assert (kink(x) - y).abs().max() <= 2 * tol


def test_an_overflow_is_no_end():
    calls = []

    def f(x):
        calls.append(x)
        return torch.expm1(x), x

    x = root(f, t(1e4))
    torch.testing.assert_close(x, t(1e4).log1p(), rtol=1e-14, atol=0)
    assert len(calls) < 45 and torch.stack(calls)[7:].isfinite().all()


def test_arguments_of_root_and_integrate():
    y, f = torch.ones(2), torch.sinh
    for error, text, call in (
        (ValueError, r"Expected tol >= 0; got -1", lambda: root(f, y, tol=-1.0)),
        (
            ValueError,
            r"Expected guess.shape to broadcast with \(2,\) .*; got \(3,\)",
            lambda: root(f, y, guess=torch.ones(3)),
        ),
        (TypeError, "Expected low to be a tensor of torch.float64", lambda: root(f, y, low=0.0)),
        (ValueError, "Expected low <= high", lambda: root(f, y, low=y, high=-y)),
        (TypeError, r"Expected parameters\[0\] to be a tensor; got float", lambda: root(f, y, 1.0)),
        (ValueError, r"Expected f\(x\).shape == \(2,\)", lambda: root(lambda x: (x[:, None], x[:, None]), y)),
        (ValueError, "Expected panels to be an integer >= 1; got 0", lambda: integrate(f, y, y, panels=0)),
        (ValueError, "Expected doublings", lambda: integrate(f, y, y, doublings=-1)),
        (ValueError, "Expected tol > 0; got -1", lambda: integrate(f, y, y, tol=-1.0)),
        (TypeError, "Expected high to be a tensor of floating", lambda: integrate(f, y, 1.0)),
        (ValueError, r"Expected f\(x\).shape == \(2, 15\)", lambda: integrate(lambda x: x.sum(-1), y, y + 1)),
    ):
        with pytest.raises(error, match=text):
            call()
