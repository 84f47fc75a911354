"""Transforms: inverses, log-determinants, derivatives and what they remember."""

import pytest
import torch
from torch.distributions import Transform, constraints

from pyro_genexact import heads, testing, transforms
from pyro_genexact.conditioners import MADE
from support import registry
from support.values import built, sized


def test_inverse(transform):
    testing.inverse(*transform)


def test_log_det(transform, transform_name):
    testing.log_det(*transform, triangular=transform_name in registry.TRIANGULAR)


def test_derivatives(transform):
    testing.derivatives(*transform)


def test_cache(transform):
    testing.cache(*transform)


class Cubic(Transform):
    """y = x^3 + x: right, until a subclass breaks something."""

    bijective, domain, codomain, factor = True, constraints.real, constraints.real, 1.0

    def _call(self, x):
        return x**3 + x

    def _inverse(self, y):
        x = y / (1 + y.abs() ** (2 / 3))
        for _ in range(60):
            x = x - (x**3 + x - y) / (3 * x**2 + 1)
        return x

    def log_abs_det_jacobian(self, x, y):
        return self.factor * (3 * x**2 + 1).log()


class WrongInverse(Cubic):
    def _inverse(self, y):
        return super()._inverse(y) * 1.001


class WrongDeterminant(Cubic):
    factor = 1.001


class DetachedDeterminant(Cubic):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x.detach(), y)


class InverseWithoutGradient(Cubic):
    def _inverse(self, y):
        return super()._inverse(y.detach()) + 0 * y


class PairOfOtherSigns(Cubic):
    def call_and_ladj(self, x):
        y = self(x)
        return y, -self.log_abs_det_jacobian(x, y)


class NothingToRemember(Cubic):
    def __init__(self):
        super().__init__(cache_size=0)

    def with_cache(self, cache_size=1):
        return self


class NoWithCache(Cubic):
    """torch's with_cache makes no transform whose constructor it doesn't know."""

    def __init__(self):
        super().__init__(cache_size=0)


@pytest.mark.parametrize("double", [Cubic, NothingToRemember])
def test_right_double_is_lawful(double):
    for law in (testing.inverse, testing.log_det, testing.derivatives, testing.cache):
        law(double(), sized(4))


@pytest.mark.parametrize(
    ("law", "double", "message"),
    [
        (testing.inverse, WrongInverse, r"inverse broken \[t.inv\(t\(x\)\)\]"),
        (testing.inverse, PairOfOtherSigns, r"inverse broken \[call_and_ladj of t, log-determinant\]"),
        (testing.inverse, NoWithCache, r"inverse broken \[with_cache\(1\)\]"),
        (testing.log_det, WrongDeterminant, r"log-determinant broken \[of y by autograd\]"),
        (testing.derivatives, DetachedDeterminant, r"derivatives broken \[gradcheck of t\]"),
        (testing.derivatives, InverseWithoutGradient, r"derivatives broken \[gradcheck of t.inv\]"),
    ],
)
def test_laws_have_power(law, double, message):
    with pytest.raises(AssertionError, match=message):
        law(double(), sized(4))


class Mixing(Transform):
    bijective, domain, codomain = True, constraints.real_vector, constraints.real_vector
    weight = torch.tensor([[1.0, 0.0, 0.2], [0.5, 1.0, 0.0], [0.0, 0.5, 1.0]], dtype=torch.float64)

    def _call(self, x):
        return x @ self.weight.mT

    def _inverse(self, y):
        return torch.linalg.solve(self.weight, y.mT).mT

    def log_abs_det_jacobian(self, x, y):
        return torch.linalg.slogdet(self.weight)[1].expand(x.shape[:-1])


def test_triangularity_has_power():
    testing.log_det(Mixing(), sized(2, 3))
    with pytest.raises(AssertionError, match=r"triangularity broken \[of y by autograd\]: 0.2, not 0"):
        testing.log_det(Mixing(), sized(2, 3), triangular=True)


class ByIdentityAlone(transforms.ConditionedAutoregressive):
    """Remembers by identity alone, as Pyro's transforms do."""

    def _stamp(self, x, y):
        return True


class ForgetsParameters(transforms.ConditionedAutoregressive):
    def watched(self):
        return ()


class ForgetsGradMode(transforms.ConditionedAutoregressive):
    def _stamp(self, x, y):
        stamp = super()._stamp(x, y)
        return stamp and stamp[1:]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByIdentityAlone, "x edited in place"),
        (ForgetsParameters, "parameters updated"),
        (ForgetsGradMode, "without grad, then with"),
    ],
)
def test_cache_has_power(kind, message):
    class Module(transforms.AutoregressiveTransform):
        def forward(self, context=None):
            return kind(self.conditioner, self.head, context)

    module = built(Module(MADE(3, 2, hidden=(8,)), heads.Affine()))
    with pytest.raises(AssertionError, match=f"cache broken .{message}"):
        testing.cache(module, sized(3, 3))
