"""Corrected versions of torch's and Pyro's families whose log_prob, gradients or samples are wrong in some cases."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from . import categorical, continuous_bernoulli, repaired_vectors, stable, zero_inflated
from .enumeration import ByEnumeration
from .parametrised import Parametrised
from .rounding import Rounded, rounded, rounded_in_unit
from .special import generalized_pareto_cdf, generalized_pareto_quantile, skew_logistic_quantile
from .supports import UNIT


def _draw(like: Tensor, shape: Any) -> Tensor:
    """Draws positive exponential numbers."""
    return rounded(like.new_empty(shape).exponential_())


def _logit_of_exp(log_u: Tensor) -> Tensor:
    """Returns the logit of u, given log u; it is accurate also if u rounds to 1."""
    return log_u - torch.log(-torch.expm1(log_u))


def _minus_exp(rest: Tensor, exponent: Tensor) -> Tensor:
    """Returns rest - exp(exponent), or -inf with gradient zero if the exponential overflows."""
    fits = exponent < math.log(torch.finfo(exponent.dtype).max)
    return torch.where(fits, rest - torch.where(fits, exponent, 0).exp(), -torch.inf)


def _log1p_square(t: Tensor) -> Tensor:
    """Returns log(1 + t²), also if t² overflows."""
    far = t.abs() > 1
    large = torch.where(far, t.abs(), 1)
    return 2 * large.log() + torch.where(far, 1 / large, t).square().log1p()


class Binomial(dist.Binomial):  # type: ignore[name-defined]
    """A Binomial with an entropy also for batches of different total counts."""

    entropy = ByEnumeration.entropy


class ExtendedBinomial(dist.ExtendedBinomial):  # type: ignore[name-defined]
    """An ExtendedBinomial with an entropy."""

    entropy = ByEnumeration.entropy


class FisherSnedecor(Rounded, dist.FisherSnedecor):  # type: ignore[name-defined]
    """A FisherSnedecor whose log_prob does not overflow, as it is computed from logarithms."""

    def log_prob(self, value: Tensor) -> Tensor:
        a, b, log_x = self.df1 / 2, self.df2 / 2, value.log()
        log_odds = self.df1.log() - self.df2.log() + log_x
        return (
            torch.lgamma(a + b)
            - torch.lgamma(a)
            - torch.lgamma(b)
            - log_x
            + a * log_odds
            - (a + b) * softplus(log_odds)
        )


class Gumbel(dist.Gumbel):  # type: ignore[name-defined]
    """A Gumbel whose log_prob has gradient zero, instead of NaN, if it is -inf."""

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return _minus_exp(-z - self.scale.log(), -z)


class InverseGamma(dist.InverseGamma):  # type: ignore[name-defined]
    """An InverseGamma with a finite log_prob near 0, where torch's is +inf because 1 / x² overflows.

    Samples whose square overflows have gradient zero instead of infinity or NaN.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration, self.rate
        return a * b.log() - torch.lgamma(a) - (a + 1) * value.log() - b / value

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        gamma = self.base_dist.rsample(torch.Size(sample_shape))
        small = gamma < torch.finfo(gamma.dtype).tiny ** 0.5
        return torch.where(small, gamma.detach(), gamma).reciprocal()


class Kumaraswamy(Rounded, dist.Kumaraswamy):  # type: ignore[name-defined]
    """A Kumaraswamy whose log_prob is also accurate if 1 - x ** concentration1 rounds to 1.

    Samples are rounded to the nearest number inside the support.
    """

    support = UNIT

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        rest = torch.log(-torch.expm1(a * value.log()))
        return a.log() + b.log() + torch.xlogy(a - 1, value) + (b - 1) * rest

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        e = _draw(self.concentration1, self._extended_shape(torch.Size(sample_shape)))
        power = rounded(-torch.expm1(-e / self.concentration0))
        return rounded_in_unit(torch.exp(power.log() / self.concentration1))


class LogNormal(Rounded, dist.LogNormal):  # type: ignore[name-defined]
    """A LogNormal with samples that are positive and finite."""


class Pareto(Rounded, dist.Pareto):  # type: ignore[name-defined]
    """A Pareto whose log_prob does not overflow and whose samples are finite."""

    def log_prob(self, value: Tensor) -> Tensor:
        return self.alpha.log() + self.alpha * (self.scale.log() - value.log()) - value.log()


class RelaxedBernoulli(dist.RelaxedBernoulli):  # type: ignore[name-defined]
    """A RelaxedBernoulli whose log_prob is finite for large logits."""

    support = UNIT

    def log_prob(self, value: Tensor) -> Tensor:
        jacobian = value.log() + torch.log1p(-value)
        z = self.logits - self.temperature * (value.log() - torch.log1p(-value))
        return self.temperature.log() + z - 2 * softplus(z) - jacobian


class Logistic(dist.Logistic):
    """A Logistic with finite samples."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        log_u = -_draw(self.loc, self._extended_shape(torch.Size(sample_shape)))
        return self.loc + self.scale * _logit_of_exp(log_u)


class SkewLogistic(dist.SkewLogistic):
    """A SkewLogistic with finite samples, and with a log_prob that does not cancel in the left tail."""

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return self.asymmetry.log() + self.asymmetry * logsigmoid(z) + logsigmoid(-z) - self.scale.log()

    def icdf(self, value: Tensor) -> Tensor:
        return skew_logistic_quantile(self, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        log_u = rounded(_draw(self.loc, self._extended_shape(torch.Size(sample_shape))) / self.asymmetry).neg()
        return self.loc + self.scale * _logit_of_exp(log_u)


class SoftAsymmetricLaplace(Parametrised, dist.SoftAsymmetricLaplace):  # type: ignore[name-defined]
    """A SoftAsymmetricLaplace with finite gradients in the tails, where erfc is 0, and with an ``expand``."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        for cached in ("left_scale", "right_scale", "soft_scale"):
            new.__dict__.pop(cached, None)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        x, s = (value - self.loc) / self.scale, self.softness
        left, right = (self._half(side, s, r) for side, r in ((x, self.asymmetry), (-x, self.asymmetry.reciprocal())))
        total = self.asymmetry + self.asymmetry.reciprocal()
        return torch.logaddexp(left, right) - math.log(2) - (total * self.scale).log()

    @staticmethod
    def _half(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """Returns log(exp(x / r + s² / 2r²) erfc(z)), z = (x + s² / r) / s√2, so z² = x² / 2s² + x / r + s² / 2r²."""
        z = (x + s * s / r) / (s * math.sqrt(2))
        far = torch.special.erfcx(z.clamp(min=0)).log() - (x / s).square() / 2
        near = x / r + (s / r).square() / 2 + torch.special.erfc(z.clamp(max=0)).log()
        return torch.where(z > 0, far, near)


class SoftLaplace(dist.SoftLaplace):
    """A SoftLaplace with finite samples."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        u = self.loc.new_empty(self._extended_shape(torch.Size(sample_shape))).uniform_()
        return self.icdf(rounded_in_unit(u))


class StudentT(dist.StudentT):  # type: ignore[name-defined]
    """A StudentT whose log_prob does not overflow in the tails."""

    def log_prob(self, value: Tensor) -> Tensor:
        df, t = self.df, (value - self.loc) / self.scale / self.df.sqrt()
        norm = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df.log() + math.log(math.pi))
        return norm - self.scale.log() - (df + 1) / 2 * _log1p_square(t)


class Weibull(Rounded, dist.Weibull):  # type: ignore[name-defined]
    """A Weibull with finite gradients near 0, where torch divides by the square of a tiny power."""

    def log_prob(self, value: Tensor) -> Tensor:
        k, z = self.concentration, value.log() - self.scale.log()
        return _minus_exp(k.log() + k * z - value.log(), k * z)


if hasattr(dist, "GeneralizedPareto"):  # since torch 2.8

    class GeneralizedPareto(dist.GeneralizedPareto):  # type: ignore[name-defined]
        """A GeneralizedPareto with positive concentration, for every dtype, whose log_prob does not overflow."""

        cdf, icdf = generalized_pareto_cdf, generalized_pareto_quantile

        arg_constraints = {
            "loc": constraints.real,
            "scale": constraints.positive,
            "concentration": constraints.positive,
        }

        @constraints.dependent_property(is_discrete=False, event_dim=0)
        def support(self) -> Any:
            return constraints.greater_than_eq(self.loc)

        def log_prob(self, value: Tensor) -> Tensor:
            c, x = self.concentration, value - self.loc
            far = x * c.clamp(max=1) > self.scale  # then c x / scale may overflow, but its logarithm does not
            log_growth = c.log() + torch.where(far, x, 1).log() - self.scale.log()
            near = torch.log1p(c * torch.where(far, 0, x) / self.scale)
            return -self.scale.log() - (1 / c + 1) * torch.where(far, softplus(log_growth), near)

        def rsample(self, sample_shape: Any = ()) -> Tensor:
            e = _draw(self.loc, self._extended_shape(torch.Size(sample_shape)))
            c = self.concentration
            return rounded(self.loc + self.scale * torch.expm1(c * e) / c, low=-torch.inf)


def _is_repaired(name: str, family: Any) -> bool:
    """Whether a class is a proper subclass of the class that Pyro exports under this name."""
    exported = getattr(dist, name, family)
    return isinstance(family, type) and family is not exported and issubclass(family, exported)


_MODULES = (categorical, continuous_bernoulli, repaired_vectors, stable, zero_inflated)
REPAIRED: dict[str, Any] = {
    name: family
    for classes in (*map(vars, _MODULES), globals().copy())
    for name, family in classes.items()
    if _is_repaired(name, family)
}
"""The corrected families of these modules, by the names of Pyro's classes."""
REPAIRED["StableWithLogProb"] = stable.Stable
