"""Beta-Gaussian distributions: elliptical densities with a bounded support that their parameters move."""

from __future__ import annotations

from math import inf, log, nan, pi
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from ..core.checks import check_last
from ..core.columns import by_columns, solve_lower
from ..core.independent import REAL_VECTOR
from ..core.shapes import broadcast_batches
from ..core.values import checked_value, numbers
from .cdf import searched
from .in_support import expand_mask
from .parametrised import Parametrised, ShapesByParameters
from .special import betainc, log_gamma_ratio


class _Elliptical(Parametrised, TorchDistribution):
    """The common part of the univariate and the multivariate distribution.

    With k = 1 / (alpha - 1), the squared distance q of a value and the squared radius R^2,

        log p = k log(1 - q / R^2) - log|A| - n log R - log C,    C = pi^{n/2} Gamma(k + 1) / Gamma(k + 1 + n/2).

    A subclass defines :meth:`_square`, :meth:`_moved` and :attr:`_log_det`. All computations use float64.
    """

    has_rsample = True
    loc: Tensor
    alpha: Tensor

    def _square(self, value: Tensor) -> Tensor:
        """Returns the squared distance (*sample, *batch) of a value from loc, in units of the scale."""
        raise NotImplementedError

    def _moved(self, x: Tensor) -> Tensor:
        """Returns the value that belongs to x (*sample, *batch, n) with unit scale and loc 0."""
        raise NotImplementedError

    @property
    def _log_det(self) -> Tensor:
        """The logarithm of the determinant of the scale, (*batch)."""
        raise NotImplementedError

    @property
    def _dims(self) -> int:
        return self._event_shape[0] if self._event_shape else 1

    @property
    def _power(self) -> Tensor:
        return 1 / (self.alpha.double() - 1)

    def _log_ball(self) -> Tensor:
        """Returns log C, of the integral of (1 - |x|^2)^k over the unit ball."""
        n, k = self._dims, self._power
        return n / 2 * log(pi) - log_gamma_ratio(k + 1, n / 2)

    def _excess(self) -> Tensor:
        """Returns log(R^2 / (2 k)), which is small for alpha near 1."""
        n, k = self._dims, self._power
        return -(n * (2 * k).log() + 2 * self._log_det + 2 * self._log_ball()) / (2 * k + n)

    def _square_radius(self) -> Tensor:
        """Returns R^2 in units of the scale."""
        return 2 * self._power * self._excess().exp()

    def _checked(self, value: Any) -> Tensor:
        value = numbers("value", value)
        if self._event_shape:
            check_last(value, self._dims, "the length of loc")
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats, (*sample, *batch); -inf with gradient zero outside the support."""
        value, n = self._checked(checked_value(self, value)), self._dims
        square = self._square_radius()
        inside = (self._square(value.detach()) / square).detach() < 1
        # replaced, since the gradient of infinite values would be NaN
        value = torch.where(expand_mask(inside, self._event_shape), value, self.loc.detach())
        share = torch.where(inside, self._square(value) / square, 0)
        log_p = self._power * torch.log1p(-share) - self._log_det - n / 2 * square.log() - self._log_ball()
        return torch.where(inside, log_p, -inf).to(self.loc)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample, *batch, *event), with the exact pathwise gradient.

        With normal g (n,) and h from a gamma distribution of shape k + 1, R g / sqrt(g · g + 2 h) has the density for
        unit scale and loc 0.
        """
        n, k = self._dims, self._power
        shape = Size(sample_shape) + self._batch_shape
        g = torch.randn((*shape, n), dtype=k.dtype, device=k.device)
        h = torch.distributions.Gamma(k + 1, torch.ones_like(k), validate_args=False).rsample(Size(sample_shape))
        square = self._square_radius()
        x = g * (square / (g.square().sum(-1) + 2 * h)).sqrt().unsqueeze(-1)
        y = self._moved(x).to(self.loc)
        inner = y.detach()  # rounding may move a draw to the boundary, or beyond it
        for nearer in (torch.nextafter(inner, self.loc.detach()), self.loc.detach()):
            inner = torch.where(expand_mask(self._square(inner) < square, self._event_shape), inner, nearer).detach()
        return torch.where(inner == y, y, inner)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    def _square_spread(self) -> Tensor:
        """Returns the variance in units of the scale, R^2 / (2 k + 2 + n)."""
        return self._square_radius() / (2 * self._power + 2 + self._dims)

    def entropy(self) -> Tensor:
        """Returns the differential (Shannon) entropy in nats, (*batch)."""
        n, k = self._dims, self._power
        mean_log = torch.digamma(k + 1) - torch.digamma(k + 1 + n / 2)  # of 1 - q / R^2
        size = self._log_det + n / 2 * self._square_radius().log() + self._log_ball()
        return (size - k * mean_log).to(self.loc)

    def fenchel_young(self, value: Tensor) -> Tensor:
        """Returns the Fenchel-Young loss of a value, (*sample, *batch), which is finite for every real value.

        With the energy f(y) = -q / 2, where q is the squared distance from loc in units of the scale, and the Tsallis
        negentropy Ω(p) = (∫ p^alpha - 1) / (alpha (alpha - 1)),

            L(y) = Ω*(f) - f(y),    Ω*(f) = max_p E_p[f] - Ω(p).

        This is the cross-Ω loss of the paper. It omits the term Ω of the value, which is infinite for continuous
        values, so L is not 0 at its minimum, and may be negative. As alpha tends to 1, L tends to -log p of the normal
        distribution.

        L is convex in the coefficients of y and y y' in f. Its gradients with respect to them are E[Y] - y and
        E[Y Y'] - y y'.
        Therefore the mean loss of data is smallest at the distribution that has the mean and the covariance of the data.
        As with -log p of the normal distribution, the mean loss of equal values has no lower bound: it decreases as the
        scale tends to 0.
        """
        n, k = self._dims, self._power
        of_model = -k * ((2 * k + n) * torch.expm1(self._excess()) + n / (k + 1)) / (2 * k + 2 + n)
        return (of_model + self._square(self._checked(value)) / 2).to(self.loc)


class BetaGaussian(_Elliptical):
    """The beta-Gaussian distribution, whose density is a power of a parabola on an interval and 0 elsewhere.

        p(y) = [(alpha - 1) (-tau - (y - loc)^2 / (2 scale^2))]_+^{1 / (alpha - 1)},

    where tau normalises the density. alpha = 2 is a parabola (Epanechnikov's kernel), alpha = 3/2 the biweight, alpha =
    4/3 the triweight kernel; the limits are the normal distribution (alpha to 1) and the uniform distribution (alpha to
    infinity). beta is 2 - alpha. With k = 1 / (alpha - 1), the support is loc ± radius with

        radius^{2k + 1} = (2k scale^2)^k / B(1/2, k + 1),

    and the standard deviation is radius / sqrt(2k + 3). ``scale`` is the parameter sigma of the paper. It is not the
    standard deviation, and the radius is proportional to scale^{2 / (alpha + 1)}.

    The density is continuous and 0 at the ends of the support. Outside, ``log_prob`` is -inf with gradient zero, so
    maximum likelihood cannot move the support towards a value; :meth:`fenchel_young` can. Samples are reparameterised.
    All computations use float64 internally.

    Cost: O(1) per value; ``icdf`` searches for a root of ``cdf``.

    References: Martins, Treviso, Farinhas, Aguiar, Figueiredo, Blondel, Niculae (2022), "Sparse continuous
    distributions and Fenchel-Young losses", JMLR 23, arXiv:2108.01988.

    Args:
        loc: (*batch) real numbers.
        scale: (*batch) positive numbers, sigma of the paper.
        alpha: (*batch) numbers above 1.

    Raises:
        ValueError: when validating, if a parameter violates its constraint, or a value of ``log_prob`` is outside the
            support.

    Example:
        >>> import torch
        >>> d = BetaGaussian(torch.tensor(1.0), torch.tensor(1.0), alpha=2.0, validate_args=False)
        >>> d.radius, d.stddev
        (tensor(1.1447), tensor(0.5119))
        >>> d.log_prob(torch.tensor([1.0, 2.0, 3.0])).exp()
        tensor([0.6552, 0.1552, 0.0000])
        >>> d.fenchel_young(torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.1069, 0.6069, 2.1069])
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "alpha": constraints.greater_than(1.0),
    }

    def __init__(self, loc: Any, scale: Any, alpha: Any = 2.0, validate_args: bool | None = None) -> None:
        self.loc, self.scale, self.alpha = broadcast_all(loc, scale, alpha)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The interval loc ± radius."""
        return constraints.interval(self.loc - self.radius, self.loc + self.radius)

    @property
    def radius(self) -> Tensor:
        """Half the length of the support, (*batch)."""
        return (self.scale.double() * self._square_radius().sqrt()).to(self.loc)

    @property
    def variance(self) -> Tensor:
        return (self.scale.double().square() * self._square_spread()).to(self.loc)

    def cdf(self, value: Tensor) -> Tensor:
        """Returns P(Y <= value) for any real value, (*sample, *batch), by the incomplete beta function; NaN for NaN."""
        radius, a = self.scale.double() * self._square_radius().sqrt(), self._power + 1
        x = ((torch.where(value.isnan(), self.loc, value).double() - self.loc) / radius).clamp(-1, 1)
        return torch.where(value.isnan(), nan, betainc(a, a, (1 + x) / 2, (1 - x) / 2)).to(self.loc)

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the quantiles of levels in [0, 1], (*sample, *batch); NaN for other levels."""
        # a new instance has the family's own support, which brackets the search
        found = searched(BetaGaussian(self.loc, self.scale, self.alpha, validate_args=False), value)
        return torch.where((value >= 0) & (value <= 1), found, nan)

    def _square(self, value: Tensor) -> Tensor:
        return ((value.double() - self.loc) / self.scale.double()).square()

    def _moved(self, x: Tensor) -> Tensor:
        return self.loc + self.scale.double() * x.squeeze(-1)

    @property
    def _log_det(self) -> Tensor:
        return self.scale.double().log()


class MultivariateBetaGaussian(ShapesByParameters, _Elliptical):
    """The beta-Gaussian distribution of vectors (n,), which is elliptical.

        p(y) = [(alpha - 1) (-tau - q / 2)]_+^{1 / (alpha - 1)},    q = (y - loc)' (A A')^{-1} (y - loc),

    where A is ``scale_tril`` and tau normalises the density. With k = 1 / (alpha - 1), the support is the ellipsoid
    q <= R^2 with

        R^{2k + n} = (2k)^k Gamma(k + 1 + n/2) / (det A pi^{n/2} Gamma(k + 1)),

    and the covariance is R^2 / (2k + 2 + n) A A'.

    See :class:`BetaGaussian` for the special cases, the loss and the reference.

    Args:
        loc: (*batch, n) real numbers.
        scale_tril: (*batch, n, n) A, lower triangular with a positive diagonal.
        alpha: (*batch) numbers above 1.

    Raises:
        ValueError: if the shapes do not fit; when validating, also if a parameter violates its constraint, or a value
            of ``log_prob`` is outside the support.

    Example:
        >>> import torch
        >>> d = MultivariateBetaGaussian(torch.zeros(2), torch.eye(2), alpha=1.5, validate_args=False)
        >>> d.sample((3,)).shape, d.covariance_matrix.diagonal()
        (torch.Size([3, 2]), tensor([0.3102, 0.3102]))
        >>> d.log_prob(torch.tensor([[0.0, 0.0], [2.0, 2.0]])).exp()
        tensor([0.3848, 0.0000])
    """

    arg_constraints = {
        "loc": REAL_VECTOR,
        "scale_tril": constraints.lower_cholesky,
        "alpha": constraints.greater_than(1.0),
    }

    def __init__(self, loc: Tensor, scale_tril: Tensor, alpha: Any = 2.0, validate_args: bool | None = None) -> None:
        if loc.dim() < 1 or scale_tril.shape[-2:] != (loc.shape[-1],) * 2:
            raise ValueError(
                f"Expected loc (*batch, n) and scale_tril (*batch, n, n); got {tuple(loc.shape)} and "
                f"{tuple(scale_tril.shape)}."
            )
        n, alpha = loc.shape[-1], torch.as_tensor(alpha, dtype=loc.dtype, device=loc.device)
        batch = broadcast_batches(loc=loc.shape[:-1], scale_tril=scale_tril.shape[:-2], alpha=alpha.shape)
        self.loc, self.scale_tril = loc.expand(*batch, n), scale_tril.expand(*batch, n, n)
        self.alpha = alpha.expand(batch)
        super().__init__(batch, Size([n]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The ellipsoid."""
        return Ellipsoid(self.loc, self.scale_tril, self.radius)

    @property
    def radius(self) -> Tensor:
        """R, (*batch)."""
        return self._square_radius().sqrt().to(self.loc)

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance matrix, (*batch, n, n)."""
        a = self.scale_tril.double()
        return (self._square_spread()[..., None, None] * (a @ a.mT)).to(self.loc)

    @property
    def variance(self) -> Tensor:
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def _square(self, value: Tensor) -> Tensor:
        return _square_distance(value, self.loc, self.scale_tril)

    def _moved(self, x: Tensor) -> Tensor:
        return self.loc + by_columns(lambda a, x: a.double() @ x, self.scale_tril, x)

    @property
    def _log_det(self) -> Tensor:
        return self.scale_tril.double().diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Ellipsoid(constraints.Constraint):
    """The constraint of vectors (n,) at a distance of at most ``radius`` from ``loc``, in units of ``scale_tril``."""

    event_dim = 1

    def __init__(self, loc: Tensor, scale_tril: Tensor, radius: Tensor) -> None:
        self.loc, self.scale_tril, self.radius = loc, scale_tril, radius

    def check(self, value: Tensor) -> Tensor:
        slack = 1 + 4 * torch.finfo(self.loc.dtype).eps  # values on the boundary are rounded
        return _square_distance(value, self.loc, self.scale_tril) <= (slack * self.radius.double()).square()

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns the centre."""
        return self.loc.to(like)

    def __repr__(self) -> str:
        return "Ellipsoid()"


def _square_distance(value: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    return by_columns(solve_lower, scale_tril, value.double() - loc).square().sum(-1)
