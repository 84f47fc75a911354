"""Bad input and degenerate cases of bijections and flows: the right value, or an error by its text."""

import pytest
import torch

from pyro_genexact import flows, heads, transforms
from pyro_genexact.numerics import ConvergenceError, integrate, root
from pyro_genexact.testing import redraw
from support.checks import fails
from support.registry.transforms import cubic
from support.values import F64, double

inf, nan = float("inf"), float("nan")


HEADS = {  # a degenerate one of each, and all defaults
    "Affine": heads.Affine,
    "Shift": heads.Shift,
    "RationalQuadraticSpline": heads.RationalQuadraticSpline,
    "RationalQuadraticSpline two bins": lambda: heads.RationalQuadraticSpline(bins=2),
    "SumOfSquares": heads.SumOfSquares,
    "SumOfSquares degree 0": lambda: heads.SumOfSquares(polynomials=1, degree=0),
    "Bernstein": heads.Bernstein,
    "Bernstein degree 1": lambda: heads.Bernstein(degree=1),
    "DeepSigmoid": heads.DeepSigmoid,
    "DeepSigmoid one unit": lambda: heads.DeepSigmoid(units=1),
    "LogisticMixtureCDF": heads.LogisticMixtureCDF,
    "LogisticMixtureCDF one component": lambda: heads.LogisticMixtureCDF(components=1),
    "MonotoneNetwork": lambda: heads.MonotoneNetwork(signal=1, hidden=(1,)),
    "IntegratedPositive": lambda: heads.IntegratedPositive(signal=1, hidden=(1,)),
}
VECTORS = {
    "BlockAutoregressive": transforms.BlockAutoregressive,
    "LULinear": transforms.LULinear,
    "Rotation": transforms.Rotation,
    "Householder": transforms.Householder,
    "Planar": transforms.Planar,
    "Radial": transforms.Radial,
    "Sylvester": transforms.Sylvester,
    "Coupling": lambda features: transforms.Coupling(features, heads.Affine()),
}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: heads.Affine(bound=nan), "Expected bound to be positive and finite; got nan"),
        (lambda: heads.Shift((0,)), "Expected shape to be a sequence of integers >= 1; got (0,)"),
        (lambda: heads.RationalQuadraticSpline(bins=1), "Expected bins >= 2; got 1"),
        (lambda: heads.RationalQuadraticSpline(bins=0), "Expected bins to be an integer >= 1; got 0"),
        (lambda: heads.RationalQuadraticSpline(bound=0.0), "Expected bound to be positive and finite; got 0.0"),
        (lambda: heads.CircularSpline(bins=1), "Expected bins >= 2; got 1"),
        (lambda: heads.SumOfSquares(polynomials=0), "Expected polynomials to be an integer >= 1; got 0"),
        (lambda: heads.SumOfSquares(degree=-1), "Expected degree to be an integer >= 0; got -1"),
        (lambda: heads.SumOfSquares(bound=-1.0), "Expected bound to be positive and finite; got -1.0"),
        (lambda: heads.Bernstein(degree=0), "Expected degree to be an integer >= 1; got 0"),
        (lambda: heads.Bernstein(bound=inf), "Expected bound to be positive and finite; got inf"),
        (lambda: heads.DeepSigmoid(units=0), "Expected units to be an integer >= 1; got 0"),
        (lambda: heads.DeepSigmoid(layers=0), "Expected layers to be an integer >= 1; got 0"),
        (lambda: heads.DeepSigmoid(bound=0), "Expected bound to be positive and finite; got 0"),
        (lambda: heads.LogisticMixtureCDF(components=0), "Expected components to be an integer >= 1; got 0"),
        (lambda: heads.MonotoneNetwork(signal=0), "Expected signal to be an integer >= 1; got 0"),
        (lambda: heads.MonotoneNetwork(hidden=()), "Expected hidden to hold at least one width; got none"),
        (lambda: heads.MonotoneNetwork(hidden=(0,)), "Expected hidden to be a sequence of integers >= 1; got (0,)"),
        (lambda: heads.IntegratedPositive(hidden=()), "Expected hidden to hold at least one width; got none"),
        (lambda: heads.IntegratedPositive(bound=-1), "Expected bound to be positive and finite; got -1"),
        (lambda: transforms.BlockAutoregressive(0), "Expected num_sites to be an integer >= 1; got 0"),
        (lambda: transforms.BlockAutoregressive(2, hidden=()), "Expected hidden to hold at least one layer; got ()"),
        (lambda: transforms.BlockAutoregressive(2, residual="no"), "or None; got 'no'"),
        (lambda: transforms.LULinear(0), "Expected features to be an integer >= 1; got 0"),
        (lambda: transforms.Rotation(0), "Expected features to be an integer >= 1; got 0"),
        (lambda: transforms.Householder(3, 0), "Expected reflections to be an integer >= 1; got 0"),
        (lambda: transforms.Planar(0), "Expected features to be an integer >= 1; got 0"),
        (lambda: transforms.Radial(0), "Expected features to be an integer >= 1; got 0"),
        (lambda: transforms.Sylvester(2, rank=3), "Expected rank <= 2 (features); got 3"),
        (lambda: transforms.Sylvester(2, rank=0), "Expected rank to be an integer >= 1; got 0"),
        (
            lambda: transforms.Coupling(2, heads.Affine(), mask=torch.tensor([True, True])),
            "Expected mask to be False somewhere (for sites to transform); got True everywhere",
        ),
        (
            lambda: transforms.Coupling(2, heads.Affine(), mask=torch.tensor([True])),
            "Expected mask to be Boolean of shape (2,); got torch.bool of (1,)",
        ),
    ],
)
def test_sizes(make, text):
    fails(ValueError, text, make)


@pytest.mark.parametrize(
    "name",
    ["maf", "iaf", "nsf", "naf", "umnn", "sospf", "bpf", "bnaf", "realnvp", "nice", "glow_vector", "coupling_nsf"],
)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"features": 0}, "Expected features to be an integer >= 1; got 0"),
        ({"features": 2, "context": -1}, "Expected context to be an integer >= 0; got -1"),
        ({"features": 2, "transforms": 0}, "Expected transforms to be an integer >= 1; got 0"),
        ({"features": 2, "hidden": (0,)}, "Expected hidden to be a sequence of integers >= 1; got (0,)"),
    ],
)
def test_sizes_of_recipes(name, options, text):
    fails(ValueError, text, lambda: getattr(flows, name)(**options))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_other_size_or_dtype(name):
    module = VECTORS[name](2).double()
    t = module if isinstance(module, torch.distributions.Transform) else module()
    for side in (t, t.inv):
        fails(ValueError, "got (3,)", lambda side=side: side(torch.zeros(3, dtype=F64)))
        fails(ValueError, "Expected value.dtype == torch.float64", lambda side=side: side(torch.zeros(2)))


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("features", [1, 2])
def test_nan_and_all_zero_parameters_of_vectors(name, features):
    module = VECTORS[name](features).double()
    t = module if isinstance(module, torch.distributions.Transform) else module()
    bad = torch.full((3, features), nan, dtype=F64)
    assert t(bad).isnan().all() and t.inv(bad).isnan().all()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    if name == "Householder":
        fails(ValueError, "Expected vectors other than zero", lambda: module(bad))
        return
    t = module if isinstance(module, torch.distributions.Transform) else module()
    x = torch.linspace(-3, 3, 3 * features, dtype=F64).reshape(3, features)
    y = t(x)
    torch.testing.assert_close(t.inv(y.clone()), x, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(t, x[0])
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y)[0], torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("name", HEADS)
def test_nan_stays_where_it_is(name):
    head = HEADS[name]().double()
    t = head(torch.zeros(1, 3, head.num_params, dtype=F64))
    for side in (t, t.inv):
        found = side(double(0.5, nan, -1.0).unsqueeze(0))
        assert found.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", HEADS)
def test_nan_parameters_never_pass_for_numbers(name):
    head = HEADS[name]().double()
    phi = torch.zeros(1, 3, head.num_params, dtype=F64)
    phi[0, 1] = nan
    for side in (lambda t: t, lambda t: t.inv):
        try:
            y = side(head(phi))(double(0.5, 0.5, 0.5).unsqueeze(0))
        except ConvergenceError as error:
            assert error.index
        else:
            assert y.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("far", [0.0, 1e3, -1e3])
def test_equal_parameters_of_any_size(name, far):
    """All zeros, and all at the bounds: equal knots, equal components, saturated slopes."""
    head = redraw(HEADS[name]().double())
    t = head(torch.full((1, 7, head.num_params), far, dtype=F64))
    x = double(-1e4, -5.0, -1.0, 0.0, 0.3, 5.0, 1e4).unsqueeze(0).requires_grad_()
    y = t(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and (y.diff() > 0).all()
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y).exp(), slope, rtol=1e-8, atol=0)
    again = t(t.inv(y.detach().clone()).clone())
    assert ((again - y).abs() <= 1e-9 * (1 + y.abs()) + 1e-14 * slope * (1 + x.abs())).all()


@pytest.mark.parametrize("angle", [0.0, 1.0, torch.pi, 1e3])
def test_circular_spline_of_equal_parameters(angle):
    head = heads.CircularSpline(bins=2)
    phi = torch.zeros(1, head.num_params, dtype=F64)
    phi[..., -1] = angle
    x = torch.linspace(-3.1, 3.1, 9, dtype=F64)
    turned = torch.remainder(x + angle + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(head(phi)(x), turned)
    torch.testing.assert_close(head(phi).inv(turned), x)
    assert head(phi)(double(nan)).isnan().all()


def saturating(x, a):
    return a[..., 0] * x.tanh(), (a[..., 0] / x.cosh() ** 2).log()


def test_monotone_beyond_its_range():
    t = transforms.Monotone(saturating, [torch.ones(3, 1, dtype=F64)])
    fails(ConvergenceError, "at index (1,), for y = 1.5 and x", lambda: t.inv(double(0.5, 1.5, -0.5)))
    torch.testing.assert_close(t.inv(double(0.5, 0.0, -0.5)), double(0.5, 0.0, -0.5).atanh())
    assert t.inv(double(0.5, nan, -0.5)).isnan().tolist() == [False, True, False]


def test_monotone_of_infinite_and_nan():
    t = transforms.Monotone(cubic, [torch.tensor([[0.0], [nan], [0.0], [0.0]], dtype=F64)])
    x = t.inv(double(2.0, 2.0, inf, -inf))
    assert x[0] == 1 and x[1].isnan() and x[2:].tolist() == [inf, -inf]
    fails(RuntimeError, "broadcast", lambda: t.inv(double(1.0, 2.0)))


def test_falling_functions_and_hidden_gradients():
    fails(ConvergenceError, "Expected a root of f(x) = y", lambda: root(lambda x: -x.exp(), double(1.0)))
    a = double(2.0).requires_grad_()
    fails(ValueError, "Expected all tensors that require gradients among", lambda: root(lambda x: a * x, double(1.0)))
    fails(TypeError, "Expected y to be a tensor of floating point numbers", lambda: root(torch.exp, torch.tensor(1)))
    fails(
        ValueError,
        "Expected parameters[0].shape to begin with (2,)",
        lambda: root(cubic, double(1, 2), double(1, 2, 3)),
    )


def test_integrals_that_do_not_exist():
    fails(ConvergenceError, "Expected an integral", lambda: integrate(lambda x: 1 / x, double(0.0), double(1.0)))
    value, error = integrate(torch.exp, double(1.0), double(1.0))
    assert value == 0 and error == 0


@pytest.mark.parametrize("support", ["positive", "unit_interval"])
def test_value_outside_a_bounded_support(support):
    flow = flows.nsf(2, transforms=1, hidden=(4,), support=getattr(torch.distributions.constraints, support)).double()
    for value in (double(-1.0, 0.5), double(0.0, 0.5), double(0.5, inf)):
        fails(ValueError, "Expected value argument", lambda value=value: flow().log_prob(value))
        d = flow()
        d._validate_args = False
        assert d.log_prob(value) == -inf
    d = flow()
    d._validate_args = False
    assert d.log_prob(double(nan, 0.5)).isnan()
