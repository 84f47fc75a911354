"""Families whose own log_prob, gradients or samples are wrong in places, repaired."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid, normalize, softplus

from ..core.independent import REAL_VECTOR, independent
from .categorical import Categorical
from .continuous_bernoulli import ContinuousBernoulli
from .special import _generalized_pareto, _generalized_pareto_quantile, _skew_logistic_quantile
from .stable import Stable
from .supports import ANGLE, UNIT, open_simplex
from .vectors import OfVectors
from .without_rows import (
    BetaBinomial,
    Binomial,
    DirichletMultinomial,
    ExtendedBetaBinomial,
    ExtendedBinomial,
    Multinomial,
    OneHotCategorical,
    OrderedLogistic,
    WithoutRows,
)
from .zero_inflated import ZeroInflatedDistribution, ZeroInflatedNegativeBinomial, ZeroInflatedPoisson


class _Repaired:
    """With a log_prob that validates."""

    def log_prob(self: Any, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    def _log_density(self, value: Tensor) -> Tensor:
        return super().log_prob(value)  # type: ignore[misc]


def _rounded(value: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Samples that rounding carried to an end of an open support, rounded to the nearest number inside instead."""
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny if low is None else low, info.max if high is None else high)


def _rounded_in_unit(value: Tensor) -> Tensor:
    return _rounded(value, high=1 - torch.finfo(value.dtype).eps / 2)


class _Rounded(_Repaired):
    """With samples rounded to the nearest number inside the support."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return _rounded(super().rsample(torch.Size(sample_shape)))  # type: ignore[misc]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def _draw(like: Tensor, shape: Any) -> Tensor:
    """Exponential numbers, never 0."""
    return _rounded(like.new_empty(shape).exponential_())


def _logit_of_exp(log_u: Tensor) -> Tensor:
    """The logit of u, which may round to 1."""
    return log_u - torch.log(-torch.expm1(log_u))


def _minus_exp(rest: Tensor, exponent: Tensor) -> Tensor:
    """rest - exp(exponent), -inf with gradient zero where that overflows."""
    fits = exponent < math.log(torch.finfo(exponent.dtype).max)
    return torch.where(fits, rest - torch.where(fits, exponent, 0).exp(), -torch.inf)


def _log1p_square(t: Tensor) -> Tensor:
    """log(1 + t²) without overflow."""
    far = t.abs() > 1
    large = torch.where(far, t.abs(), 1)
    return 2 * large.log() + torch.where(far, 1 / large, t).square().log1p()


class _Double(Function):
    """In float64; a gradient too large for the dtype comes back rounded, so that links may multiply it by 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(torch.float64, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.to(torch.float64, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        most = torch.finfo(ctx.dtype).max * 1e-6
        return grad.clamp(-most, most).to(ctx.dtype)


class FisherSnedecor(_Rounded, dist.FisherSnedecor):  # type: ignore[name-defined]
    """Without overflow."""

    def _log_density(self, value: Tensor) -> Tensor:
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


class Gumbel(_Repaired, dist.Gumbel):  # type: ignore[name-defined]
    """With gradient zero where the density is below the range of numbers."""

    def _log_density(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return _minus_exp(-z - self.scale.log(), -z)


class InverseGamma(_Repaired, dist.InverseGamma):  # type: ignore[name-defined]
    """With a log_prob that holds near 0 (torch's is +inf where the square of 1 / x overflows).

    Draws whose square overflows have gradient 0, where torch's have infinity or NaN.
    """

    def _log_density(self, value: Tensor) -> Tensor:
        a, b = self.concentration, self.rate
        return a * b.log() - torch.lgamma(a) - (a + 1) * value.log() - b / value

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        gamma = self.base_dist.rsample(torch.Size(sample_shape))
        small = gamma < torch.finfo(gamma.dtype).tiny ** 0.5
        return torch.where(small, gamma.detach(), gamma).reciprocal()


class Kumaraswamy(_Rounded, dist.Kumaraswamy):  # type: ignore[name-defined]
    """Where x ** concentration1 is below the precision of 1 too; samples are rounded to the nearest number inside."""

    support = UNIT

    def _log_density(self, value: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        rest = torch.log(-torch.expm1(a * value.log()))
        return a.log() + b.log() + torch.xlogy(a - 1, value) + (b - 1) * rest

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        e = _draw(self.concentration1, self._extended_shape(torch.Size(sample_shape)))
        power = _rounded(-torch.expm1(-e / self.concentration0))
        return _rounded_in_unit(torch.exp(power.log() / self.concentration1))


class LogNormal(_Rounded, dist.LogNormal):  # type: ignore[name-defined]
    pass


class LogisticNormal(WithoutRows, _Rounded, dist.LogisticNormal):  # type: ignore[name-defined]
    support = open_simplex()


class RelaxedOneHotCategorical(OfVectors, WithoutRows, _Rounded, dist.RelaxedOneHotCategorical):  # type: ignore[name-defined]
    support = open_simplex()


class MultivariateNormal(_Repaired, dist.MultivariateNormal):  # type: ignore[name-defined]
    """Computed in float64, as what the factor's inverse blows up leaves the range of float32."""

    support = REAL_VECTOR

    def _log_density(self, value: Tensor) -> Tensor:
        y, log_det = _standardised(self, value)
        return (-0.5 * (self.loc.shape[-1] * math.log(2 * math.pi) + y.square().sum(-1)) - log_det).to(self.loc)


class MultivariateStudentT(_Repaired, dist.MultivariateStudentT):  # type: ignore[name-defined]
    """Computed in float64, as :class:`MultivariateNormal`."""

    support = REAL_VECTOR

    def _log_density(self, value: Tensor) -> Tensor:
        y, log_det = _standardised(self, value)
        df, k = _Double.apply(self.df), self.loc.shape[-1]
        norm = torch.lgamma((df + k) / 2) - torch.lgamma(df / 2) - k / 2 * (df.log() + math.log(math.pi))
        return (norm - log_det - (df + k) / 2 * self._log1p_norm(y, df)).to(self.loc)

    @staticmethod
    def _log1p_norm(y: Tensor, df: Tensor) -> Tensor:
        """log(1 + |y|² / df), also where the square overflows."""
        far = y.detach().abs().amax(-1, keepdim=True) > 1e150
        near = torch.where(far, 0, y).square().sum(-1) / df
        large = torch.where(far, y, 1)
        most = large.detach().abs().amax(-1, keepdim=True).clamp(max=1e300)
        log_square = 2 * most.log().squeeze(-1) + (large / most).square().sum(-1).log()
        return torch.where(far.squeeze(-1), log_square - df.log(), near.log1p())


class LowRankMultivariateNormal(WithoutRows, _Repaired, dist.LowRankMultivariateNormal):  # type: ignore[name-defined]
    """Computed in float64, and as a sum of squares, where torch's difference of two cancels: y = W z + rest."""

    support = REAL_VECTOR

    def _log_density(self, value: Tensor) -> Tensor:
        factor, diagonal = (_Double.apply(p) for p in (self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag))
        y = (value.double() - _Double.apply(self.loc)).unsqueeze(-1)
        scaled = (factor / diagonal.unsqueeze(-1)).mT
        gram = scaled @ factor
        tril = torch.linalg.cholesky(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
        z = torch.linalg.solve_triangular(tril, scaled @ y, upper=False)
        z = torch.linalg.solve_triangular(tril.mT, z, upper=True)
        rest = (y - factor @ z).squeeze(-1)
        square = (rest.square() / diagonal).sum(-1) + z.squeeze(-1).square().sum(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + diagonal.log().sum(-1) / 2
        return (-0.5 * (y.shape[-2] * math.log(2 * math.pi) + square) - log_det).to(self.loc)


def _standardised(d: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 (value - loc) and log|L|."""
    factor = _Double.apply(d.scale_tril)
    centred = value.double() - _Double.apply(d.loc)
    y = torch.linalg.solve_triangular(factor, centred.unsqueeze(-1), upper=False).squeeze(-1)
    return y, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Pareto(_Rounded, dist.Pareto):  # type: ignore[name-defined]
    """Without overflow: samples beyond all numbers are rounded to the largest."""

    def _log_density(self, value: Tensor) -> Tensor:
        return self.alpha.log() + self.alpha * (self.scale.log() - value.log()) - value.log()


class RelaxedBernoulli(_Repaired, dist.RelaxedBernoulli):  # type: ignore[name-defined]
    """With a log_prob that is finite for large logits."""

    support = UNIT

    def _log_density(self, value: Tensor) -> Tensor:
        jacobian = value.log() + torch.log1p(-value)
        z = self.logits - self.temperature * (value.log() - torch.log1p(-value))
        return self.temperature.log() + z - 2 * softplus(z) - jacobian


class Logistic(_Repaired, dist.Logistic):
    """With finite samples."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        log_u = -_draw(self.loc, self._extended_shape(torch.Size(sample_shape)))
        return self.loc + self.scale * _logit_of_exp(log_u)


class SkewLogistic(_Repaired, dist.SkewLogistic):
    """With finite samples, and a density without cancellation in the left tail."""

    def _log_density(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return self.asymmetry.log() + self.asymmetry * logsigmoid(z) + logsigmoid(-z) - self.scale.log()

    def icdf(self, value: Tensor) -> Tensor:
        return _skew_logistic_quantile(self, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        log_u = _rounded(_draw(self.loc, self._extended_shape(torch.Size(sample_shape))) / self.asymmetry).neg()
        return self.loc + self.scale * _logit_of_exp(log_u)


class SoftAsymmetricLaplace(_Repaired, dist.SoftAsymmetricLaplace):  # type: ignore[name-defined]
    """With finite gradients in the tails, where erfc is 0, and an expand of its own."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(SoftAsymmetricLaplace, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _log_density(self, value: Tensor) -> Tensor:
        x, s = (value - self.loc) / self.scale, self.softness
        left, right = (self._half(side, s, r) for side, r in ((x, self.asymmetry), (-x, self.asymmetry.reciprocal())))
        total = self.asymmetry + self.asymmetry.reciprocal()
        return torch.logaddexp(left, right) - math.log(2) - (total * self.scale).log()

    @staticmethod
    def _half(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """log of exp(x / r + s² / 2r²) erfc(z), z = (x + s² / r) / s√2; z² = x² / 2s² + x / r + s² / 2r²."""
        z = (x + s * s / r) / (s * math.sqrt(2))
        far = torch.special.erfcx(z.clamp(min=0)).log() - (x / s).square() / 2
        near = x / r + (s / r).square() / 2 + torch.special.erfc(z.clamp(max=0)).log()
        return torch.where(z > 0, far, near)


class SoftLaplace(_Repaired, dist.SoftLaplace):
    """With finite samples."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        u = self.loc.new_empty(self._extended_shape(torch.Size(sample_shape))).uniform_()
        return self.icdf(_rounded(u, high=1 - torch.finfo(u.dtype).eps / 2))


class StudentT(_Repaired, dist.StudentT):  # type: ignore[name-defined]
    """Without overflow in the tails."""

    def _log_density(self, value: Tensor) -> Tensor:
        df, t = self.df, (value - self.loc) / self.scale / self.df.sqrt()
        norm = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df.log() + math.log(math.pi))
        return norm - self.scale.log() - (df + 1) / 2 * _log1p_square(t)


class VonMises3D(OfVectors, _Repaired, dist.VonMises3D):  # type: ignore[name-defined]
    """The von Mises-Fisher density kappa / (4 pi sinh kappa) exp(phi . x), kappa = |phi|, without overflow, and samples.

    A uniform point z of the sphere moves along its meridian to x: its cosine with the mean direction, uniform in (-1, 1),
    is mapped to the quantile of x's. That is smooth in phi also at 0, so samples are reparameterised (Ulrich, 1984;
    Jakob, Numerically stable sampling of the von Mises-Fisher distribution on S², 2012).
    """

    arg_constraints = {"concentration": REAL_VECTOR}
    has_rsample = True

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(VonMises3D, _instance)
        batch_shape = torch.Size(batch_shape)
        new.concentration = self.concentration.expand((*batch_shape, 3))
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _polar(self, bound: float) -> tuple[Tensor, Tensor, Tensor]:
        """Whether phi is within the bound, with a last dim; kappa and the mean direction of a longer one, else of any."""
        near = self.concentration.detach().abs().amax(-1, keepdim=True) < bound
        phi = torch.where(near, 1, self.concentration)
        x, y, z = phi.unbind(-1)
        kappa = torch.hypot(torch.hypot(x, y), z)  # squares overflow
        return near, kappa, phi / kappa.unsqueeze(-1)

    def _log_density(self, value: Tensor) -> Tensor:
        near, kappa, mean = self._polar(0.5)
        phi = torch.where(near, self.concentration, 0)
        square = phi.square().sum(-1)
        rest = torch.zeros_like(square)
        for n in range(16, 0, -2):  # sinh(kappa) / kappa - 1, to 1e-17
            rest = square / (n * (n + 1)) * (1 + rest)
        at_0 = (phi * value).sum(-1) - torch.log1p(rest) - math.log(2)
        # phi . x - kappa of unit vectors, without cancellation
        exponent = -kappa / 2 * (value - mean).square().sum(-1)
        far = exponent + kappa.log() - torch.log(-torch.expm1(-2 * kappa))
        return torch.where(near.squeeze(-1), at_0, far) - math.log(2 * math.pi)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        info = torch.finfo(self.concentration.dtype)
        z = normalize(self.concentration.new_empty(self._extended_shape(torch.Size(sample_shape))).normal_(), dim=-1)
        near, kappa, mean = self._polar(math.sqrt(info.eps))
        phi = torch.where(near, self.concentration, 0)
        at_0 = z + (phi - (phi * z).sum(-1, keepdim=True) * z) / 2  # to first order
        v, kappa = _rounded_in_unit((z - mean).square().sum(-1, keepdim=True) / 4), kappa.unsqueeze(-1)
        t = -torch.log1p(v * torch.expm1(-2 * kappa)) / kappa  # 1 - the cosine
        sine = (t * (2 - t)).clamp(min=info.tiny).sqrt()
        across = normalize(z - (z * mean).sum(-1, keepdim=True) * mean, dim=-1)
        return normalize(torch.where(near, at_0, (1 - t) * mean + sine * across), dim=-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class Weibull(_Rounded, dist.Weibull):  # type: ignore[name-defined]
    """With finite gradients where torch's divides by the square of a tiny power."""

    def _log_density(self, value: Tensor) -> Tensor:
        k, z = self.concentration, value.log() - self.scale.log()
        return _minus_exp(k.log() + k * z - value.log(), k * z)


class _DiagNormals(_Repaired):
    """With samples of any shape, also of a batch, and without rsample: the gradient of Pyro's is biased."""

    has_rsample = False
    rsample = Distribution.rsample
    support = REAL_VECTOR

    def sample(self: Any, sample_shape: Any = ()) -> Tensor:
        wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
        with torch.no_grad():
            return super(_DiagNormals, wide).rsample()  # type: ignore[misc]


class MixtureOfDiagNormals(_DiagNormals, dist.MixtureOfDiagNormals):  # type: ignore[name-defined,misc]
    pass


class MixtureOfDiagNormalsSharedCovariance(  # type: ignore[name-defined,misc]
    _DiagNormals, dist.MixtureOfDiagNormalsSharedCovariance
):
    pass


class _OfAngles(_Repaired):
    """With samples that carry no gradient, as they are not reparameterised, and the support that they have."""

    support = independent(ANGLE, 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return super().sample(torch.Size(sample_shape))  # type: ignore[misc]


class SineBivariateVonMises(WithoutRows, _OfAngles, dist.SineBivariateVonMises):  # type: ignore[name-defined]
    pass


class SineSkewed(_OfAngles, dist.SineSkewed):  # type: ignore[name-defined]
    pass


REPAIRED: dict[str, type[Distribution]] = {
    family.__name__: family
    for family in (
        BetaBinomial,
        Binomial,
        Categorical,
        ContinuousBernoulli,
        DirichletMultinomial,
        ExtendedBetaBinomial,
        ExtendedBinomial,
        FisherSnedecor,
        Gumbel,
        InverseGamma,
        Kumaraswamy,
        LogNormal,
        Logistic,
        LogisticNormal,
        LowRankMultivariateNormal,
        MixtureOfDiagNormals,
        MixtureOfDiagNormalsSharedCovariance,
        Multinomial,
        MultivariateNormal,
        MultivariateStudentT,
        OneHotCategorical,
        OrderedLogistic,
        Pareto,
        RelaxedBernoulli,
        RelaxedOneHotCategorical,
        SineBivariateVonMises,
        SineSkewed,
        SkewLogistic,
        SoftAsymmetricLaplace,
        SoftLaplace,
        StudentT,
        VonMises3D,
        Weibull,
        ZeroInflatedDistribution,
        ZeroInflatedNegativeBinomial,
        ZeroInflatedPoisson,
    )
}
"""By the name that Pyro exports."""
REPAIRED |= {"Stable": Stable, "StableWithLogProb": Stable}

if hasattr(dist, "GeneralizedPareto"):  # since torch 2.8

    class GeneralizedPareto(_Repaired, dist.GeneralizedPareto):  # type: ignore[name-defined]
        """With positive concentration, without overflow, in every dtype."""

        cdf, icdf = _generalized_pareto, _generalized_pareto_quantile

        arg_constraints = {
            "loc": constraints.real,
            "scale": constraints.positive,
            "concentration": constraints.positive,
        }

        @constraints.dependent_property(is_discrete=False, event_dim=0)
        def support(self) -> Any:
            return constraints.greater_than_eq(self.loc)

        def _log_density(self, value: Tensor) -> Tensor:
            c, x = self.concentration, value - self.loc
            far = x * c.clamp(max=1) > self.scale  # then c x / scale may overflow, and its logarithm does not
            log_growth = c.log() + torch.where(far, x, 1).log() - self.scale.log()
            near = torch.log1p(c * torch.where(far, 0, x) / self.scale)
            return -self.scale.log() - (1 / c + 1) * torch.where(far, softplus(log_growth), near)

        def rsample(self, sample_shape: Any = ()) -> Tensor:
            e = _draw(self.loc, self._extended_shape(torch.Size(sample_shape)))
            c = self.concentration
            return _rounded(self.loc + self.scale * torch.expm1(c * e) / c, low=-torch.inf)

    REPAIRED["GeneralizedPareto"] = GeneralizedPareto
