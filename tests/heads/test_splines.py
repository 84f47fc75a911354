"""Rational-quadratic splines of numbers and of angles: Pyro's formula, knots, scales, the seam of the circle."""

import importlib
from math import inf, nan, pi

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.conditioners import MADE, Angles, Independent
from pyro_genexact.heads import CircularSpline, RationalQuadraticSpline
from pyro_genexact.transforms import AutoregressiveTransform, CircularRationalQuadratic, RationalQuadratic, Reverse
from support.values import DTYPES, built, sized, with_ladj


def scales(dtype):
    sizes = 10 ** torch.linspace(-6, 4, 81, dtype=torch.float64)
    return torch.cat([-sizes, sizes, torch.linspace(-6, 6, 301, dtype=torch.float64)]).to(dtype)


def wrapped(angle):
    return torch.atan2(angle.sin(), angle.cos())


@pytest.mark.parametrize("inverse", [False, True])
def test_values_are_those_of_pyro(inverse):
    formula = importlib.import_module("pyro.distributions.transforms.spline")._monotonic_rational_spline
    widths, heights = (sized(40, 6, seed=s).softmax(-1) for s in (1, 2))
    slopes = sized(40, 5, seed=3).exp()
    least = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0, "eps": 1e-14}
    x = 2.5 * sized(40)
    expected, ladj = formula(x, widths, heights, slopes, inverse=inverse, bound=4.0, **least)
    start, ones = -4 * torch.ones(40, 1, dtype=torch.float64), torch.ones(40, 1, dtype=torch.float64)
    knots = [torch.cat([start, 8 * part.cumsum(-1) - 4], -1) for part in (widths, heights)]
    t = RationalQuadratic(torch.stack([*knots, torch.cat([ones, slopes, ones], -1)], -2))
    y, got = with_ladj(t.inv if inverse else t, x)
    assert (x.abs() > 4).any()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got, ladj, rtol=1e-10, atol=1e-10)


def test_knots_and_ends_are_met_exactly():
    t = RationalQuadraticSpline(6, bound=3.0)(3 * sized(50, 1, 17).float())
    x, y, slopes = t.knots.permute(2, 3, 0, 1)
    value, ladj = with_ladj(t, x)
    assert torch.equal(value, y) and torch.equal(t.inv(y.clone()), x)
    torch.testing.assert_close(ladj.exp(), slopes)
    assert (x[0] == -3).all() and (y[-1] == 3).all() and (slopes[[0, -1]] == 1).all()


def test_the_identity_outside_and_at_zero():
    head = RationalQuadraticSpline(5, bound=2.0)
    outside = torch.tensor([-1e30, -7.3, -2.0, 2.0, 2.1, 1e6, inf, -inf])
    for x, t in ((outside, head(5 * sized(8, 14).float())), (torch.linspace(-3, 3, 8), head(torch.zeros(8, 14)))):
        y, ladj = with_ladj(t, x)
        torch.testing.assert_close(y, x, rtol=0, atol=0 if x is outside else 5e-7)
        torch.testing.assert_close(ladj, torch.zeros(8), rtol=0, atol=0 if x is outside else 1e-6)
        torch.testing.assert_close(t.inv(x.clone()), x, rtol=0, atol=0 if x is outside else 5e-7)


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("factor", [0, 1, 10, 100])
def test_round_trips_at_any_scale(dtype, tol, factor):
    for bins in (2, 8, 30):
        head = RationalQuadraticSpline(bins)
        y = scales(dtype).unsqueeze(-1)
        t = head((factor * sized(40, head.num_params)).to(dtype))
        again = t(t.inv(y).clone())
        assert ((again - y).abs() / y.abs().clamp(min=1)).max() < tol


def test_the_inverse_in_single_precision_does_not_cancel():
    """Bins whose slopes at the knots are far above and below their own slope; z from either side."""
    slopes = torch.tensor([[a, b] for a in (1e-3, 1.0, 1e3) for b in (1e-3, 1.0, 1e3)])
    ends = torch.tensor([0.0, 1.0]).expand(9, 2)
    single = RationalQuadratic(torch.stack([ends, ends, slopes], -2))
    exact = RationalQuadratic(single.knots.double())
    y = torch.cat([10.0 ** torch.arange(-12, 0), torch.linspace(0, 1, 21)]).unsqueeze(-1)
    x, expected = single.inv(y), exact.inv(y.double())
    slope = exact.log_abs_det_jacobian(expected, y).exp()
    assert ((x - expected).abs() <= 1e-6 * expected + 2e-7 / slope).all()  # roundings of x, and of y
    assert (exact(expected.clone()) - y.double()).abs().max() < 1e-13


@pytest.mark.parametrize("head", [RationalQuadraticSpline(4), CircularSpline(4)], ids=["real", "circle"])
@pytest.mark.parametrize("far", [0.0, 1e3, -1e3, 1e8])
def test_extreme_parameters_and_values(head, far):
    bound = pi if isinstance(head, CircularSpline) else 5.0
    x = torch.linspace(-bound, bound, 200, dtype=torch.float64)[:-1].unsqueeze(-1)
    signs = torch.where(sized(3, head.num_params, seed=4) > 0, 1.0, -1.0).double()
    for phi in (far * signs, torch.full_like(signs, far)):
        phi = phi.clone().requires_grad_()
        y, ladj = with_ladj(head(phi), x)
        back = head(phi).inv(y.detach())
        assert all(t.isfinite().all() for t in (y, ladj, back, *torch.autograd.grad((y + ladj + back).sum(), phi)))
        assert wrapped(back - x).abs().max() < 1e-7
    t = head(torch.ones(1, head.num_params))
    assert t(torch.tensor([nan])).isnan() and t.inv(torch.tensor([nan])).isnan()


def test_derivatives_where_the_quadratic_changes_its_form():
    phi = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)  # bin centres, where both roots are as good
    y = torch.tensor([-10 / 3, 0.0, 10 / 3], dtype=torch.float64, requires_grad=True)
    for f in (lambda y, p: RationalQuadraticSpline(3)(p).inv(y.clone()), lambda y, p: RationalQuadraticSpline(3)(p)(y)):
        assert torch.autograd.gradcheck(f, (y, phi)) and torch.autograd.gradgradcheck(f, (y, phi))


@pytest.mark.parametrize("head", [RationalQuadraticSpline(3), CircularSpline(3)], ids=["real", "circle"])
def test_under_functorch(head):
    x, phi = sized(5).tanh(), sized(5, head.num_params, seed=1)

    def f(x, phi):
        y = head(phi)(x)
        return y.sin() + head(phi).log_abs_det_jacobian(x, y) + head(phi).inv(x * 0.9)

    got = torch.func.vmap(torch.func.grad(f, (0, 1)))(x, phi)
    inputs = [v.clone().requires_grad_() for v in (x, phi)]
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_broadcasting():
    t = RationalQuadraticSpline(3)(sized(4, 8))
    x = sized(5, 1, 4)
    assert t(x).shape == (5, 1, 4) and t.forward_shape((7, 1)) == (7, 4) and t(sized(1)).shape == (4,)
    torch.testing.assert_close(t(x)[2, 0], t(x[2, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RationalQuadraticSpline(1),
            r"Expected bins >= 2; got 1 \(a single bin with unit slopes is the identity\)",
        ),
        (lambda: RationalQuadraticSpline(2.5), r"Expected bins to be an integer >= 1; got 2.5"),
        (lambda: RationalQuadraticSpline(bound=0.0), r"Expected bound to be positive and finite; got 0.0"),
        (lambda: RationalQuadraticSpline(bound=inf), r"Expected bound to be positive and finite; got inf"),
        (lambda: CircularSpline(1), r"Expected bins >= 2; got 1 \(a single bin has a fixed width\)"),
        (
            lambda: RationalQuadratic(torch.ones(4, 2, 5)),
            r"Expected knots.shape\[-2:\] == \(3, K \+ 1\).* got \(4, 2, 5\)",
        ),
        (lambda: Angles(MADE(3, 4)), r"Expected conditioner.site == \(2,\) \(cosine and sine\); got \(\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="Expected conditioner to be a Conditioner; got Linear"):
        Angles(torch.nn.Linear(2, 2))


class TestCircle:
    def head(self, rows=1, factor=1.0):
        head = CircularSpline(4)
        return head(factor * sized(rows, head.num_params, seed=2))

    def test_a_turn_changes_nothing_and_results_are_angles(self):
        t = self.head(6)
        x = torch.linspace(-pi, pi, 101, dtype=torch.float64)[:-1].unsqueeze(-1)
        y = t(x)
        for turns in (1, -3):
            torch.testing.assert_close(wrapped(t(x + 2 * pi * turns) - y), torch.zeros_like(y), rtol=0, atol=1e-12)
            torch.testing.assert_close(wrapped(t.inv(y + 2 * pi * turns) - x), torch.zeros_like(y), rtol=0, atol=1e-12)
        assert ((y >= -pi) & (y < pi)).all() and t.codomain.check(y).all()
        lifted = torch.cat([y, y[:1]]).diff(dim=0).remainder(2 * pi)  # once around, always forwards
        assert lifted.min() > 0
        torch.testing.assert_close(lifted.sum(0), torch.full((6,), 2 * pi, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_results_beside_the_seam_lie_inside(self, dtype):
        end = torch.tensor(pi, dtype=dtype)
        near = torch.stack([torch.nextafter(end, end * 0), -end, end, torch.nextafter(-end, end * 0), end * 0])
        head, uniform = CircularSpline(3), dist.Uniform(-end, end)
        for shift in (*near, end / 3):
            t = head(torch.cat([torch.zeros(9, dtype=dtype), shift.unsqueeze(0)]))
            for f in (t, t.inv):
                assert uniform.log_prob(f(near)).isfinite().all()

    def test_zero_is_the_identity_and_the_last_number_a_rotation(self):
        x = torch.linspace(-3, 3, 50, dtype=torch.float64)
        phi = torch.zeros(10, dtype=torch.float64)
        torch.testing.assert_close(CircularSpline(3)(phi)(x), x)
        phi[-1] = 2.0
        torch.testing.assert_close(CircularSpline(3)(phi)(x), wrapped(x + 2))

    def test_log_derivative_is_continuous_over_the_seam(self):
        t = self.head(20, 2.0)
        ends = torch.tensor([[-pi], [pi - 1e-12]], dtype=torch.float64)
        left, right = t.log_abs_det_jacobian(ends, t(ends)).unbind()
        torch.testing.assert_close(left, right, rtol=0, atol=1e-8)
        assert left.std() > 0.3

    def test_it_has_no_sign(self):
        assert RationalQuadratic.sign == 1
        with pytest.raises(NotImplementedError):
            _ = self.head().sign
        assert isinstance(self.head(), CircularRationalQuadratic)


def grid(points):
    return (torch.arange(points, dtype=torch.float64) + 0.5) * (2 * pi / points) - pi


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("base", ["Uniform", "VonMises"])
def test_a_density_on_the_circle(inverse, base):
    head, angle = CircularSpline(4), torch.full((1,), pi, dtype=torch.float64)
    step = AutoregressiveTransform(Independent(1, head.num_params), head)
    of = dist.Uniform(-angle, angle) if base == "Uniform" else dist.VonMises(angle / 2, angle)
    flow = built(gx.Flow([step.inv if inverse else step], of.to_event(1)))
    d = flow()
    assert isinstance(d.support.base_constraint, type(constraints.interval(-pi, pi)))
    y = grid(20000).unsqueeze(-1)
    density = d.log_prob(y).exp()
    assert abs(density.mean() * 2 * pi - 1) < 1e-6
    ends = torch.tensor([[-pi], [pi - 1e-12]], dtype=torch.float64)
    torch.testing.assert_close(*d.log_prob(ends), rtol=0, atol=1e-8)
    samples = d.sample((4000,))
    assert d.support.check(samples).all()
    mean = (density.unsqueeze(-1) * y.cos()).mean() * 2 * pi
    assert abs(samples.cos().mean() - mean) < 5 * samples.cos().std() / 4000**0.5
    with pytest.raises(ValueError, match="support"):
        flow()._validate_sample(torch.tensor([4.0], dtype=torch.float64))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_density_on_the_torus(inverse):
    head, angle = CircularSpline(3), torch.full((2,), pi, dtype=torch.float64)

    def step():
        net = Angles(MADE(2, head.num_params, site=(2,), hidden=(10,), activation=torch.tanh))
        module = AutoregressiveTransform(net, head)
        return module.inv if inverse else module

    flow = built(gx.Flow([step(), Reverse(), step()], dist.Uniform(-angle, angle).to_event(1)))
    d = flow()
    y = torch.cartesian_prod(grid(400), grid(400))
    with torch.no_grad():
        density = d.log_prob(y).exp()
    assert density.std() > 0.01
    assert abs(density.mean() * (2 * pi) ** 2 - 1) < 1e-4
    beside = pi - 1e-12
    for ends in ([[-pi, 0.7], [beside, 0.7]], [[1.9, -pi], [1.9, beside]], [[-pi, -pi], [beside, beside]]):
        torch.testing.assert_close(*d.log_prob(torch.tensor(ends, dtype=torch.float64)), rtol=0, atol=1e-8)
    samples = d.sample((4000,))
    assert d.support.check(samples).all()
    of_samples, of_grid = (v[:, 0].cos() * (v[:, 1] + 1).sin() for v in (samples, y))
    mean = (density * of_grid).mean() * (2 * pi) ** 2
    assert abs(of_samples.mean() - mean) < 5 * of_samples.std() / 4000**0.5
    torch.testing.assert_close(flow().log_prob(samples.clone()), d.log_prob(samples))
