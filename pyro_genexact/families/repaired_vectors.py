"""Corrected versions of families of vectors whose log_prob, gradients or samples are wrong in some cases."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Distribution
from torch.nn.functional import normalize

from ..core.columns import by_columns, solve_lower
from ..core.functional import at_hand, compiling
from ..core.independent import REAL_VECTOR, independent
from ..core.random import chosen
from .parametrised import Parametrised, ShapesByParameters
from .rounding import Rounded, rounded_in_unit
from .supports import ANGLE, open_simplex


class _Double(Function):
    """Converts to float64. Gradients are clamped to the range of the original dtype, since infinity times 0 is NaN."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(torch.float64, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        most = torch.finfo(ctx.dtype).max * 1e-6
        return grad.clamp(-most, most).to(ctx.dtype)


class _DoubleWithTangents(_Double):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.to(torch.float64, copy=True)


def _double(x: Tensor) -> Tensor:
    return (_Double if compiling() else _DoubleWithTangents).apply(x)  # torch.compile takes no jvp


class LogisticNormal(Rounded, dist.LogisticNormal):  # type: ignore[name-defined]
    """A LogisticNormal whose support excludes the faces of the simplex."""

    support = open_simplex()


class RelaxedOneHotCategorical(ShapesByParameters, Rounded, dist.RelaxedOneHotCategorical):  # type: ignore[name-defined]
    """A RelaxedOneHotCategorical whose support excludes the faces of the simplex."""

    support = open_simplex()


class OneHotCategorical(dist.OneHotCategorical):  # type: ignore[name-defined]
    """A OneHotCategorical whose samples do not wait for a device."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if at_hand(self.probs) or torch.Size(sample_shape).numel() != 1 or not self.probs.numel():
            return super().sample(sample_shape)  # type: ignore[no-any-return]
        with torch.no_grad():
            probs = self.probs.expand(self._extended_shape(torch.Size(sample_shape)))
            return torch.zeros_like(probs).scatter_(-1, chosen(probs), 1.0)


class MultivariateNormal(dist.MultivariateNormal):  # type: ignore[name-defined]
    """A MultivariateNormal whose log_prob is computed in float64, since standardised values may overflow in float32."""

    support = REAL_VECTOR

    def log_prob(self, value: Tensor) -> Tensor:
        y, log_det = _standardised(self, value)
        return (-0.5 * (self.loc.shape[-1] * math.log(2 * math.pi) + y.square().sum(-1)) - log_det).to(self.loc)


class MultivariateStudentT(dist.MultivariateStudentT):  # type: ignore[name-defined]
    """A MultivariateStudentT whose log_prob is computed in float64, like that of :class:`MultivariateNormal`."""

    support = REAL_VECTOR

    def log_prob(self, value: Tensor) -> Tensor:
        y, log_det = _standardised(self, value)
        df, k = _double(self.df), self.loc.shape[-1]
        norm = torch.lgamma((df + k) / 2) - torch.lgamma(df / 2) - k / 2 * (df.log() + math.log(math.pi))
        return (norm - log_det - (df + k) / 2 * self._log1p_norm(y, df)).to(self.loc)

    @staticmethod
    def _log1p_norm(y: Tensor, df: Tensor) -> Tensor:
        """Returns log(1 + |y|² / df), also if the square overflows."""
        far = y.detach().abs().amax(-1, keepdim=True) > 1e150
        near = torch.where(far, 0, y).square().sum(-1) / df
        large = torch.where(far, y, 1)
        most = large.detach().abs().amax(-1, keepdim=True).clamp(max=1e300)
        log_square = 2 * most.log().squeeze(-1) + (large / most).square().sum(-1).log()
        return torch.where(far.squeeze(-1), log_square - df.log(), near.log1p())


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):  # type: ignore[name-defined]
    """A LowRankMultivariateNormal whose log_prob is computed in float64, as a sum of squares with y = W z + rest.

    Torch computes a difference of two large terms, which cancels.
    """

    support = REAL_VECTOR

    def log_prob(self, value: Tensor) -> Tensor:
        factor, diagonal = (_double(p) for p in (self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag))
        y = (value.double() - _double(self.loc)).unsqueeze(-1)
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
    """Returns L^-1 (value - loc) and log|L|, for the Cholesky factor L."""
    factor = _double(d.scale_tril)
    y = by_columns(solve_lower, factor, value.double() - _double(d.loc))
    return y, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Multinomial(dist.Multinomial):  # type: ignore[name-defined]
    """A Multinomial whose entropy also works after ``expand``."""

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new._binomial = self._binomial  # torch's expand omits this attribute
        return new


class VonMises3D(Parametrised, ShapesByParameters, dist.VonMises3D):  # type: ignore[name-defined]
    """A VonMises3D with reparameterised samples and a log_prob that does not overflow.

    The density is kappa / (4 pi sinh kappa) exp(phi . x) with kappa = |phi|. To sample, a uniform point z of the sphere
    is moved along its meridian: its cosine with the mean direction, uniform in (-1, 1), is mapped to the quantile of
    the cosine of x. This map is smooth in phi, also at 0.

    References: Ulrich (1984), "Computer generation of distributions on the m-sphere"; Jakob (2012), "Numerically stable
    sampling of the von Mises-Fisher distribution on S²".
    """

    arg_constraints = {"concentration": REAL_VECTOR}
    has_rsample = True
    sample = Distribution.sample  # uses rsample

    def _polar(self, bound: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns whether phi is within the bound, (*batch, 1), and kappa and the mean direction.

        If phi is within the bound, the latter are those of an arbitrary vector.
        """
        near = self.concentration.detach().abs().amax(-1, keepdim=True) < bound
        phi = torch.where(near, 1, self.concentration)
        x, y, z = phi.unbind(-1)
        kappa = torch.hypot(torch.hypot(x, y), z)  # squares could overflow
        return near, kappa, phi / kappa.unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
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
        v, kappa = rounded_in_unit((z - mean).square().sum(-1, keepdim=True) / 4), kappa.unsqueeze(-1)
        t = -torch.log1p(v * torch.expm1(-2 * kappa)) / kappa  # 1 - the cosine
        sine = (t * (2 - t)).clamp(min=info.tiny).sqrt()
        across = normalize(z - (z * mean).sum(-1, keepdim=True) * mean, dim=-1)
        return normalize(torch.where(near, at_0, (1 - t) * mean + sine * across), dim=-1)


class _DiagNormals:
    """Adds samples of any shape, also for batches, and removes Pyro's ``rsample``, whose gradient is biased."""

    has_rsample = False
    rsample = Distribution.rsample
    support = REAL_VECTOR

    def sample(self: Any, sample_shape: Any = ()) -> Tensor:
        wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
        with torch.no_grad():
            return super(_DiagNormals, wide).rsample()  # type: ignore[misc]


class MixtureOfDiagNormals(_DiagNormals, dist.MixtureOfDiagNormals):  # type: ignore[name-defined,misc]
    """A MixtureOfDiagNormals with samples for batches, and without the biased ``rsample``."""


class MixtureOfDiagNormalsSharedCovariance(  # type: ignore[name-defined,misc]
    _DiagNormals, dist.MixtureOfDiagNormalsSharedCovariance
):
    """A MixtureOfDiagNormalsSharedCovariance with samples for batches, and without the biased ``rsample``."""


class _OfAngles:
    """Corrects the support, and detaches samples, which are not reparameterised, from the parameters."""

    support = independent(ANGLE, 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return super().sample(torch.Size(sample_shape))  # type: ignore[misc]


class SineBivariateVonMises(_OfAngles, dist.SineBivariateVonMises):  # type: ignore[name-defined]
    """A SineBivariateVonMises with the support [-pi, pi]² and samples without gradient."""


class SineSkewed(_OfAngles, dist.SineSkewed):  # type: ignore[name-defined]
    """A SineSkewed with the support [-pi, pi]^k and samples without gradient."""
