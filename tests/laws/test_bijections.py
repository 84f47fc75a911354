"""The laws of what heads of bijections compute fail on broken ones."""

import math

import pytest
import torch
from torch import nn

from pyro_genexact import Head, testing
from pyro_genexact.transforms import Monotone


def bent(x, a, b, tilt):
    """x + a softplus-like bend: smooth, increasing for tilt > 0, of slope a tilt to tilt."""
    s = torch.sigmoid(x - b[..., 0])
    a = a[..., 0].exp()
    slope = tilt.exp() * (1 + a * s)
    return tilt.exp() * (x + a * torch.nn.functional.softplus(x - b[..., 0])), slope.log()


class Bent(Head):
    """Lawful, with a numeric inverse and a parameter of its own; broken by subclasses."""

    num_params = 2
    kind = Monotone
    function = staticmethod(bent)

    def __init__(self):
        super().__init__()
        self.tilt = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def bounded(self, phi):
        return 3 * torch.tanh(phi / 3)

    def own(self):
        return self.tilt.tanh()

    def forward(self, phi, first=0):
        a, b = self.bounded(phi).split(1, -1)
        return self.kind(self.function, [a, b], [self.own()])


LAWS = (
    testing.monotonicity,
    testing.round_trips,
    testing.slopes,
    testing.precision,
    testing.differentiability,
    testing.learning,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_right_double_is_lawful(law):
    law(Bent())


class ClampedInverse(Bent):
    """As zuko's: a bisection that stays within its bracket."""

    class kind(Monotone):
        def invert(self, y, known=None):
            return super().invert(y, known).clamp(-10, 10)


class Rounded(Bent):
    """An inverse by too few steps of bisection."""

    class kind(Monotone):
        def invert(self, y, known=None):
            return super().invert(y, known) * (1 + 1e-7)


class DetachedInverse(Bent):
    class kind(Monotone):
        def invert(self, y, known=None):
            return super().invert(y.detach(), known).detach() + 0 * y


class ByDifferentInverse(Bent):
    """Right in the first order, as zuko's: the slope is a constant."""

    class kind(Monotone):
        def invert(self, y, known=None):
            x = super().invert(y.detach(), known).detach()
            value, log_slope = self.function(x, *self.parameters, *self.shared)
            return x + (y - value) / log_slope.exp().detach()


class NoSolution(Bent):
    """Bounded, so that there is no inverse."""

    @staticmethod
    def function(x, a, b, tilt):
        x = tilt.exp() * x
        return x.tanh() + 0 * (a + b)[..., 0], tilt - 2 * x.cosh().log() + 0 * (a + b)[..., 0]


class WrongDerivative(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y, log_slope + 1e-3 * torch.sin(x)


class Waves(Bent):
    """Falls where the numbers are large."""

    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        wave = 0.2 * a[..., 0].exp()
        slope = log_slope.exp() + wave * (x - 1.0).cos()
        return y + wave * (x - 1.0).sin(), slope.abs().log()


class FallsInFloat32(Bent):
    """Differences of large numbers."""

    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y + 9 * ((x + 2e6) - 2e6 - x), log_slope


class Overflows(Bent):
    def bounded(self, phi):
        return phi


class OverflowsFarOut(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        a, b, tilt = a[..., 0].exp(), b[..., 0], tilt.exp()
        x = x - b
        return tilt * (x + a * x.sinh()), (tilt * (1 + a * x.cosh())).log()


class LosesGradientsInEval(Bent):
    def own(self):
        return super().own() if self.training else super().own().detach()


class LosesGradientsOfPhiInEval(Bent):
    def bounded(self, phi):
        phi = super().bounded(phi)
        return phi if self.training else torch.cat([phi[..., :1], phi[..., 1:].detach()], -1)


class Unused(Bent):
    def own(self):
        return 0 * super().own()


class OtherInEval(Bent):
    def bounded(self, phi):
        return super().bounded(phi if self.training else phi + 1e-6)


class InfiniteSlopeFarOut(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y, log_slope + x.cosh().log() - (x + torch.nn.functional.softplus(-2 * x) - math.log(2))


class AlwaysWaves(Bent):
    """Each y has many x."""

    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y + 9 * x.sin(), (log_slope.exp() + 9 * x.cos()).abs().log()


class FlatFarOut(Bent):
    """Clamped, with the log-derivative of what is not."""

    @staticmethod
    def function(x, a, b, tilt):
        return bent(x.clamp(-1e7, 1e7), a, b, tilt)[0], bent(x, a, b, tilt)[1]


class FlatInside(Bent):
    """So flat that a floor of rounding hides it."""

    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x - (x.clamp(20, 30) - 20), a, b, tilt)
        return y, torch.where((x > 20) & (x < 30), log_slope - 40, log_slope)


class WrongDerivativeFarOut(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y, log_slope + 1e-3 * (x.abs() > 1e7)


class WrongGradient(Bent):
    """Of the value, so that autograd agrees with the log-derivative."""

    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y + 1e-3 * (x - x.detach()), (log_slope.exp() + 1e-3).log()


class WrongDerivativeInFloat32(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y, log_slope + 0.01 * (x.dtype == torch.float32)


class WrongInFloat32(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        y, log_slope = bent(x, a, b, tilt)
        return y + 0.01 * (x.dtype == torch.float32), log_slope


class TailsLoseGradient(Bent):
    @staticmethod
    def function(x, a, b, tilt):
        far = x.abs() > 6
        pairs = zip(bent(x, a.detach(), b.detach(), tilt.detach()), bent(x, a, b, tilt), strict=True)
        return tuple(torch.where(far, tail, near) for tail, near in pairs)


class LargePhiLosesGradient(Bent):
    def bounded(self, phi):
        return torch.where(phi.abs() > 3, super().bounded(phi).detach(), super().bounded(phi))


class TailsLoseGradientInEval(TailsLoseGradient):
    @property
    def function(self):
        return bent if self.training else TailsLoseGradient.function


class Once(torch.autograd.Function):
    """The identity, with a gradient that has none."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, grad):
            return grad.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("not differentiable twice")

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return Once.Gradient.apply(grad)


class NoSecondDerivative(Bent):
    def bounded(self, phi):
        return Once.apply(super().bounded(phi))


@pytest.mark.parametrize(
    ("law", "head", "message"),
    [
        (testing.round_trips, ClampedInverse, "phi times 0, torch.float64, y -> x -> y"),
        (testing.round_trips, Rounded, "phi times 0, torch.float64, y -> x -> y"),
        (testing.round_trips, NoSolution, "phi times 0, torch.float64.: Expected a root"),
        (testing.round_trips, AlwaysWaves, "phi times 0, torch.float64, x -> y -> x"),
        (testing.slopes, WrongDerivative, "phi times 1, torch.float64, log by autograd"),
        (testing.slopes, WrongDerivativeFarOut, "phi times 1, torch.float64, log by autograd"),
        (testing.slopes, WrongGradient, "phi times 1, torch.float64.:"),
        (testing.slopes, FlatFarOut, "phi times 1, torch.float64, sign by autograd at -1000.*: 0, not 1"),
        (testing.slopes, FlatInside, "phi times 1, torch.float64, sign by autograd at 2.*: 0, not 1"),
        (testing.slopes, AlwaysWaves, "phi times 1, torch.float64, sign by autograd at .*: -1, not 1"),
        (testing.precision, WrongDerivativeInFloat32, "phi times 1, torch.float32, log.dy/dx."),
        (testing.precision, WrongInFloat32, "phi times 1, torch.float32, y"),
        (testing.monotonicity, Waves, "phi times (1|10|100), torch.float64, y at .*: .* less than just before"),
        (testing.monotonicity, FallsInFloat32, "phi times 1, torch.float32, y at .*: .* less than just before"),
        (testing.monotonicity, Overflows, "phi times 100, torch.float32, "),
        (testing.monotonicity, OverflowsFarOut, "phi times 1, torch.float64, y at -1.*: .*, not finite"),
        (testing.monotonicity, InfiniteSlopeFarOut, "phi times 1, torch.float64, log.dy/dx. at -1.*: .*, not finite"),
        (testing.differentiability, TailsLoseGradient, "gradcheck of t, wide"),
        (testing.differentiability, LargePhiLosesGradient, "gradcheck of t, wide"),
        (testing.differentiability, DetachedInverse, "gradcheck of t.inv"),
        (testing.differentiability, ByDifferentInverse, "gradgradcheck of t.inv"),
        (testing.learning, LosesGradientsInEval, "gradient of tilt, t, eval.: none"),
        (testing.learning, LosesGradientsOfPhiInEval, "derivative|matters"),
        (testing.learning, Unused, "gradient of tilt, t, train.: 0, which must be finite"),
        (testing.learning, DetachedInverse, "gradient of (the argument|phi|tilt), t.inv, train"),
        (testing.learning, TailsLoseGradientInEval, "derivative 1 by phi, t, eval as train"),
        (testing.learning, NoSecondDerivative, "second derivative, t, train"),
        (testing.learning, OtherInEval, "derivative 1 by the argument, t, eval as train"),
    ],
)
def test_laws_have_power(law, head, message):
    with pytest.raises(AssertionError, match=f"{law.__name__.replace('_', ' ')} broken .{message}"):
        law(head())
