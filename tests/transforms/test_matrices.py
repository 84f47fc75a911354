"""Matrices of linear bijections: their properties, products, inverses and derivatives, and where parameters are large."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import pyro_genexact as gx
from pyro_genexact.transforms import Householder, Inverse, LULinear, Rotation
from support.values import built, sized

KINDS = [LULinear, Rotation, Householder]
ORTHOGONAL = [Rotation, Householder]
ONE = torch.eye(5, dtype=torch.float64)


def scaled(module, scale):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_identity_with_gradients(kind):
    t = kind(5).double()
    torch.testing.assert_close(t.weight, ONE, atol=1e-12, rtol=0)
    x = sized(7, 5)
    y = t(x)
    torch.testing.assert_close(y, x)
    (y * sized(7, 5, seed=1)).sum().backward()
    gradients = [p.grad for name, p in t.named_parameters() if name != "log_diagonal"]
    assert all(g.abs().max() > 0.1 for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_values_inverse_and_determinant(kind, shape):
    t, x = built(kind(5)), sized(*shape)
    y = t(x)
    bias = getattr(t, "bias", torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(y, torch.einsum("ij,...j->...i", t.weight, x) + bias)
    torch.testing.assert_close(t.inv(y.clone()), x, rtol=1e-9, atol=1e-9)
    ladj = t.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(t.weight)[1].expand(shape[:-1]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_parameters(kind):
    t, x = built(kind(3)), sized(2, 3)
    names, weights = zip(*t.named_parameters(), strict=True)
    inverse = Inverse(t)

    def there(x, *weights):
        return functional_call(t, dict(zip(names, weights, strict=True)), (x,))

    def back(y, *weights):
        given = {f"transform.{name}": w for name, w in zip(names, weights, strict=True)}
        return functional_call(inverse, given, ())(y)

    inputs = [v.detach().clone().requires_grad_() for v in (x, *weights)]
    for f in (there, back):
        assert gradcheck(f, inputs) and gradgradcheck(f, inputs)


@pytest.mark.parametrize("kind", ORTHOGONAL)
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e3, 1e150])
def test_orthogonal_at_any_scale(kind, scale):
    weight = scaled(built(kind(5)), scale).weight
    torch.testing.assert_close(weight @ weight.mT, ONE, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_round_trip_in_float32(kind):
    t = scaled(built(kind(16)), 10.0).float()
    y = sized(50, 16).float() * torch.logspace(-2, 4, 16)
    error = (t(t.inv(y)) - y).norm(dim=-1) / y.norm(dim=-1)
    assert error.max() < 1e-5


def test_rotation_is_cayleys():
    t = built(Rotation(5))
    lower = 100 * torch.tanh(t.skew / 100).tril(-1)
    skew = lower - lower.mT
    torch.testing.assert_close(t.weight, (ONE + skew) @ torch.linalg.inv(ONE - skew))
    torch.testing.assert_close(torch.linalg.det(t.weight), torch.ones((), dtype=torch.float64))
    angle = torch.tensor(0.7, dtype=torch.float64)
    plane = Rotation(2).double()
    plane.skew.data[1, 0] = 100 * torch.atanh(torch.tan(angle / 2) / 100)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    torch.testing.assert_close(plane.weight, expected)


@pytest.mark.parametrize("reflections", [1, 2, 3, 8])
def test_householder_is_the_product(reflections):
    t = built(Householder(5, reflections))
    expected = ONE
    for v in t.vectors:
        expected = expected @ (ONE - 2 * torch.outer(v, v) / (v @ v))
    torch.testing.assert_close(t.weight, expected)
    torch.testing.assert_close(torch.linalg.det(t.weight), torch.tensor((-1.0) ** reflections, dtype=torch.float64))


def test_householder_default_and_odd_starts():
    assert len(Householder(4).vectors) == 4 and len(Householder(5).vectors) == 6
    values = torch.linalg.eigvalsh(Householder(5, 3).double().weight)
    torch.testing.assert_close(values, torch.tensor([-1.0, 1, 1, 1, 1], dtype=torch.float64))


def test_lu_factors():
    t = built(LULinear(5))
    lower = t.factors.tril(-1) + ONE
    upper = t.factors.triu(1) + ONE
    torch.testing.assert_close(t.weight, lower @ upper @ torch.diag((7 * torch.tanh(t.log_diagonal / 7)).exp()))


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
def test_lu_is_accurate_at_any_log_scale(scale):
    t = built(LULinear(5)).float()
    with torch.no_grad():
        t.log_diagonal.mul_(scale)
    y = sized(20, 5).float() * 1e4
    error = (t(t.inv(y)) - y).norm(dim=-1) / y.norm(dim=-1)
    assert error.max() < 1e-5
    assert t.log_abs_det_jacobian(y, y).abs().max() <= 35


def test_in_a_flow_with_a_permutation():
    parts = [
        gx.transforms.Permute(torch.tensor([2, 0, 1])),
        built(LULinear(3)),
        built(Rotation(3)),
        built(Householder(3)),
    ]
    flow = gx.Flow(parts, torch.distributions.Independent(torch.distributions.Normal(sized(3), 1.0), 1))
    matrix = parts[3].weight @ parts[2].weight @ parts[1].weight @ torch.eye(3, dtype=torch.float64)[[2, 0, 1]]
    shift = parts[3].weight @ parts[2].weight @ parts[1].bias
    normal = torch.distributions.MultivariateNormal(matrix @ sized(3) + shift, matrix @ matrix.mT)
    y = sized(6, 3, seed=3)
    torch.testing.assert_close(flow().log_prob(y), normal.log_prob(y))


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind):
    with pytest.raises(ValueError, match=r"Expected features to be an integer >= 1; got 0"):
        kind(0)
    t = kind(3)
    for way in (t, t.inv):
        with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 3 .*; got \(2, 4\)"):
            way(torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 3 .*; got \(\)"):
            way(torch.zeros(()))
        with pytest.raises(ValueError, match=r"Expected value.dtype == torch.float32 .*; got torch.float64"):
            way(sized(2, 3))


def test_errors_of_householder():
    with pytest.raises(ValueError, match=r"Expected reflections to be an integer >= 1; got 0"):
        Householder(3, 0)
    t = Householder(3, 2)
    t.vectors.data[1] = 0
    with pytest.raises(ValueError, match=r"Expected vectors other than zero .*; got zero at \[1\]"):
        t(torch.zeros(3))
