"""Roots and integrals, against SciPy on ten thousand random functions, closed forms and finite differences."""

from __future__ import annotations

import pickle
from math import inf, nan

import numpy
import pytest
import scipy.integrate
import scipy.optimize
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, vmap
from torch.func import grad as func_grad
from torch.nn.utils import parametrize

from pyro_genexact.numerics import ConvergenceError, bisect, find, implicit, integrate, root

F64 = torch.float64
COUNT = 1000  # functions a family


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def t(*values):
    return torch.tensor(values, dtype=F64)


def cubic(x, a):
    return x**3 + a * x, (3 * x * x + a).log()


# each in u = x / scale, for torch and numpy alike (m), and how large the terms are that cancel in it
def sigmoids(m, u, p):
    return (p[..., :4] / (1 + m.exp(-(u[..., None] * m.exp(2 * p[..., 4:8]) + 3 * p[..., 8:])))).sum(-1) + 1e-4 * u


def polynomial(m, u, p):
    return p[..., 0] * u + p[..., 1] * u**3 + p[..., 2] * u**5 + p[..., 3] * u**9


def exponentials(m, u, p):
    return p[..., 0] * u + p[..., 1] * m.expm1(u) - p[..., 2] * m.expm1(-5 * u)


def kinks(m, u, p):
    return (p[..., :6] * (8 * p[..., 6:] > 1) * (abs(u[..., None] - 8 * p[..., 6:] + 4) + u[..., None])).sum(
        -1
    ) + 1e-3 * u


def flats(m, u, p):
    steps = m.clip(u[..., None] - 6 * p[..., :6] + 3, 0, 0.1)
    return 100 * steps.sum(-1) + m.clip(u + 8, -inf, 0) + m.clip(u - 8, 0, inf)


def cusp(m, u, p):
    return m.sign(u) * abs(u) ** (1 / 9) * p[..., 0] + 1e-3 * u


def ninth_power(m, u, p):
    return (u - 4 * p[..., 0]) ** 9 + 1e-6 * p[..., 1] * u


def steep(m, u, p):
    return m.tanh((u - 6 * p[..., 0] + 3) * 10 ** (8 * p[..., 1])) + p[..., 2] * u


FAMILIES = {
    sigmoids: (12, 2),
    polynomial: (4, 2),
    exponentials: (3, 2),
    kinks: (12, 100),
    flats: (6, 100),
    cusp: (1, 1),
    ninth_power: (2, 1),
    steep: (3, 2),
}


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


QUADRATURES = {
    "exponential": lambda m, x, p: m.exp(2 * p[..., 0, None] * x) + p[..., 1, None] * x,
    "oscillating": lambda m, x, p: m.sin(6 * p[..., 0, None] * x + p[..., 1, None]) + p[..., 2, None],
}


@pytest.mark.parametrize("name", QUADRATURES)
def test_integrals_are_those_of_quad(name):
    p, bounds = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1)).clamp(-2, 2), None
    bounds = 2 * torch.randn(2, COUNT, generator=torch.Generator().manual_seed(2))
    value, error = integrate(lambda x: QUADRATURES[name](torch, x, p), *bounds)
    rows = p.numpy()
    for i in range(COUNT):

        def f(x, i=i):
            return float(QUADRATURES[name](numpy, numpy.asarray([x]), rows[i])[0])

        theirs, uncertain = scipy.integrate.quad(f, *bounds[:, i].tolist(), epsabs=1e-13, epsrel=1e-13)
        assert abs(float(value[i]) - theirs) <= float(error[i]) + uncertain


def test_the_error_of_an_integral_is_not_underestimated():
    a = torch.linspace(-3, 3, 101)
    low, high = torch.full_like(a, -1), torch.full_like(a, 2)

    def wave(x):
        return torch.cos(a[:, None] * x)

    for tol in (1e-2, 1e-5, 1e-12):
        value, error = integrate(wave, low, high, tol=tol)
        exact = torch.where(a == 0, 3.0, ((2 * a).sin() + a.sin()) / torch.where(a == 0, 1, a))
        assert ((value - exact).abs() <= error).all()
    for kink in (0.3, 0.7, 1.21):  # within the tolerance, or an error
        exact = ((1 + kink) ** 2 + (2 - kink) ** 2) / 2
        value, error = integrate(lambda x, kink=kink: (x - kink).abs(), t(-1).squeeze(), t(2).squeeze(), tol=1e-3)
        assert abs(value - exact) < 3 * error
        with pytest.raises(ConvergenceError, match=r"Expected an integral with an error up to 1e-12 of its size; got"):
            integrate(lambda x, kink=kink: (x - kink).abs(), t(-1), t(2))


def test_bounds_of_an_integral():
    low, high = t(0.0, 2.0, 1.0, nan), t(2.0, 0.0, 1.0, 1.0)
    value, error = integrate(torch.exp, low, high)
    assert torch.allclose(value[:2], (high.exp() - low.exp())[:2], rtol=1e-14) and value[2] == 0 == error[2]
    assert value[3].isnan()
    with pytest.raises(ValueError, match="Expected finite bounds of the integral; got infinite ones"):
        integrate(lambda x: torch.exp(-x), t(0.0), t(inf))
    with pytest.raises(ConvergenceError) as caught:
        integrate(lambda x: 1 / x, t(1.0, 0.0), t(2.0, 1.0), doublings=2)
    assert caught.value.index == (1,) and caught.value.bracket == (0.0, 1.0) and caught.value.residual > 1e-12
    with pytest.raises(ConvergenceError):
        integrate(lambda x: x / 0, t(0.0), t(1.0), doublings=1)
    assert integrate(torch.exp, torch.empty(0, 3), torch.empty(3))[0].shape == (0, 3)
    assert integrate(torch.exp, t(0.0).float(), t(1.0).float())[0].dtype == torch.float32


def test_derivatives_of_integrals():
    inputs = (t(0.1, -0.4).requires_grad_(), t(1.3, -1.0).requires_grad_(), t(0.7).requires_grad_())

    def value(low, high, a):
        return integrate(lambda x: torch.exp(a * x).sin(), low, high)[0]

    assert gradcheck(value, inputs) and gradgradcheck(value, inputs)
    assert not integrate(lambda x: inputs[2] * x, *inputs[:2])[1].requires_grad


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
    with pytest.raises(ValueError, match="Expected every tensor with gradient among parameters and shared"):
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


INPUTS = [(5.0, -2.0), (0.7, 1.9), (0.4, -0.3)]


@pytest.mark.parametrize("alone", [False, True])
def test_derivatives(alone):
    y, a, w = (t(*values).requires_grad_() for values in INPUTS)

    def f(x, a, w):
        value, log_slope = cubic(x, a)
        value, slope = value + x * w.square().sum(), log_slope.exp() + w.square().sum()
        return value if alone else (value, slope.log())

    def solve(y, a, w):
        return root(f, y, a, shared=[w])

    assert gradcheck(solve, (y, a, w)) and gradgradcheck(solve, (y, a, w))
    assert gradgradcheck(lambda a, w: root(f, y.detach(), a[:1], shared=[w]), (a, w))  # a broadcasts
    x = root(lambda x: (x**3, (3 * x * x).log()), t(8.0).requires_grad_())
    y = t(8.0).requires_grad_()
    x = root((lambda x: x**3) if alone else (lambda x: (x**3, (3 * x * x).log())), y)
    for expected in (1 / 12, -1 / 144, 5 / 3456, -5 / 10368):  # of y^(1/3) at 8
        (x,) = grad(x.sum(), y, create_graph=True)
        assert torch.allclose(x, t(expected), rtol=1e-12)


def test_derivatives_of_rows():
    w = torch.eye(3) * 2 + 0.2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    def f(x, w):
        return (x @ w.mT) + 0.1 * (x @ w.mT) ** 3

    def solve(y, w):
        inner = root(lambda z: z + 0.1 * z**3, y.detach())
        return implicit(f, torch.linalg.solve(w.detach(), inner.mT).mT, y, w, event_dim=1)

    inputs = (t([0.3, -1.0, 2.0], [1.0, 0.0, 0.5]).requires_grad_(), w.requires_grad_())
    assert torch.allclose(f(solve(*inputs), w), inputs[0]) and gradcheck(solve, inputs) and gradgradcheck(solve, inputs)
    first, second = (
        jacrev(solve, 1)(*(v.detach() for v in inputs)),
        torch.autograd.functional.jacobian(solve, inputs)[1],
    )
    assert torch.allclose(first, second)


def test_parameters_that_changed_are_noticed():
    a = t(1.0).requires_grad_()
    kept = a * 2
    x = root(cubic, t(5.0), kept)
    kept.data.add_(0)
    kept.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_transforms_of_torch_func():
    y, a = t(5.0, -2.0, 12.0), t(4.0, 1.0, 0.5)

    def solve(y, a):
        return root(cubic, y, a)

    plain = root(cubic, y, a)
    assert torch.allclose(vmap(solve)(y, a), plain, rtol=1e-13)
    assert torch.allclose(vmap(solve, (None, 0))(torch.tensor(5.0), a), root(cubic, torch.full_like(a, 5.0), a))
    assert vmap(lambda y: root(torch.tanh, y))(t(2.0, 0.5)).isnan().tolist() == [True, False]
    ya = y.clone().requires_grad_(), a.clone().requires_grad_()
    (by_a,) = grad(solve(*ya).sum(), ya[1], create_graph=True)
    second, *_ = grad(by_a.sum(), ya[1], create_graph=True)
    third, *_ = grad(second.sum(), ya[1])
    each = func_grad(solve, 1)
    assert torch.allclose(vmap(each)(y, a), by_a) and torch.allclose(vmap(func_grad(each, 1))(y, a), second)
    assert torch.allclose(vmap(func_grad(func_grad(each, 1), 1))(y, a), third)
    assert torch.allclose(torch.stack([hessian(solve, 1)(*row) for row in zip(y, a, strict=True)]), second)
    assert torch.allclose(
        jacrev(lambda a: root(lambda x: x**3 + x, a))(y).diagonal(), 1 / (3 * root(lambda x: x**3 + x, y) ** 2 + 1)
    )


def test_inference_mode_and_other_devices():
    with torch.inference_mode():
        y, a = t(5.0, 12.0), t(4.0, 4.0)
        expected = root(cubic, y, a)
        assert torch.allclose(root(lambda x, a: x**3 + a * x, y, a), expected)
    assert torch.allclose(root(lambda x, a: x**3 + a * x, y.clone(), a), expected)
    with torch.device("meta"):
        y, a = torch.tensor([5.0, 1e9], device="cpu"), torch.tensor([4.0, 1.0], device="cpu")
        assert root(cubic, y, a).device == y.device == root(lambda x, a: cubic(x, a)[0], y, a).device
        assert integrate(torch.exp, 0 * a, a)[0].device == y.device
        assert root(cubic, y.to("meta"), a.to("meta")).is_meta
        assert integrate(torch.exp, y.to("meta"), a.to("meta"))[0].is_meta


class Tower(nn.Module):
    """With tied weights, a parametrised one and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.first.weight = nn.Parameter(t([0.8]))
        self.second.weight = self.first.weight
        self.free = nn.Linear(1, 1)
        self.free.weight = nn.Parameter(t([0.2]))
        parametrize.register_parametrization(self.free, "weight", nn.Softplus())
        self.register_buffer("slope", t(0.5))

    def forward(self, x, shift):
        x = x[..., None]
        return (self.second(self.first(x)) * self.slope + self.free(x).sinh() + shift * x)[..., 0]


def test_modules():
    tower, y, shift = Tower(), t(1.0, -2.0), t(0.3).requires_grad_()
    weights = dict(tower.named_parameters())
    assert len(weights) == 3
    x = root(tower, y, shared=[shift])
    assert torch.allclose(tower(x, shift), y, rtol=1e-13)
    names, values = zip(*weights.items(), strict=True)

    def solve(*values):
        def f(x, *v):
            return functional_call(tower, dict(zip(names, v, strict=True)), (x, shift.detach()))

        return root(f, y, shared=values)

    expected = torch.autograd.functional.jacobian(lambda *v: solve(*v).sum(), values)
    found = grad(x.sum(), values, create_graph=True)
    assert all(torch.allclose(a, b) and a.abs().min() > 0 for a, b in zip(found, expected, strict=True))
    second = grad(sum(g.sum() for g in found), [*values, shift])

    def first_sum(*v):
        return sum(
            g.sum() for g in torch.autograd.functional.jacobian(lambda *w: solve(*w).sum(), v, create_graph=True)
        )

    assert all(
        torch.allclose(a, b)
        for a, b in zip(second, torch.autograd.functional.jacobian(first_sum, values), strict=False)
    )
    by_shift = []
    for step in (1e-5, -1e-5):
        moved = root(tower, y, shared=[shift.detach() + step])
        by_shift.append(sum(g.sum() for g in grad(moved.sum(), values)))
    torch.testing.assert_close(second[-1].squeeze(), (by_shift[0] - by_shift[1]).squeeze() / 2e-5, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert not root(tower, y, shared=[shift]).requires_grad


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
