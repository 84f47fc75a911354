"""Heads whose bijection is a rational-quadratic spline: of real numbers, and of angles."""

from __future__ import annotations

from functools import lru_cache
from math import pi

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Head
from ..core.checks import check_positive, check_sizes
from ..transforms.spline import CircularRationalQuadratic, RationalQuadratic
from .parameters import bounded

_SPREAD = 2.0  # of log-sizes of bins; steeper splines would lose a round trip in single precision


class RationalQuadraticSpline(Head):
    r"""An increasing rational-quadratic spline on [-bound, bound], and the identity outside.

    The numbers of a site are K of the widths of the bins, K of their heights and K - 1 of the slopes at inner knots,
    e = exp(2 tanh(phi / 2)): widths and heights are e, normalised to 2 bound, and slopes e^2. At both ends the slope is
    1. So slopes are bounded smoothly, no bin vanishes, and phi = 0 is the identity. Both directions have a formula, of
    some thirty elementwise operations.

    Args:
        bins: K.
        bound: where the identity begins, positive; standardized data lie well inside.

    Raises:
        ValueError: for fewer than 2 bins, or a bound that is not positive and finite.

    Reference: Durkan et al., "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> t = RationalQuadraticSpline(bins=4)(torch.ones(2, 11))
        >>> t.inv(torch.tensor([2.5, 1e6]))
        tensor([2.5000e+00, 1.0000e+06])
    """

    def __init__(self, bins: int = 8, bound: float = 5.0) -> None:
        super().__init__()
        _check_bins(bins, "a single bin with unit slopes is the identity")
        check_positive(bound=bound)
        self.bins, self.bound, self.num_params = bins, float(bound), 3 * bins - 1

    def forward(self, phi: Tensor, first: int = 0) -> RationalQuadratic:
        """phi (*batch, S, P) to the transform of values (*batch, S)."""
        sizes, slopes = _positive(phi).split([2 * self.bins, self.bins - 1], -1)
        slopes = torch.constant_pad_nd(slopes.square(), (1, 1), 1.0)
        return RationalQuadratic(_knots(sizes, slopes, self.bound))


class CircularSpline(Head):
    r"""A bijection of the circle, of angles in [-pi, pi): an increasing spline with periodic slopes, then a rotation.

    The numbers of a site are K of widths, K of heights and K of slopes, as in :class:`RationalQuadraticSpline`, the first
    slope that at the seam -pi = pi, and the angle of the rotation. Densities are continuous over the seam, and phi = 0 is
    the identity. The base lives on the circle too: ``Uniform(-pi, pi)``, or ``VonMises``.

    A conditioner that reads angles as they are jumps where *they* cross the seam: wrap it in
    :class:`pyro_genexact.conditioners.Angles`, which reads cosine and sine.

    Args:
        bins: K.

    Raises:
        ValueError: for fewer than 2 bins.

    Reference: Rezende et al., "Normalizing Flows on Tori and Spheres", ICML 2020.

    Example:
        >>> import torch
        >>> from math import pi
        >>> t = CircularSpline(bins=4)(torch.full((1, 13), 3.0))
        >>> t(torch.tensor([-pi])), t(torch.tensor([pi]))
        (tensor([-0.1416]), tensor([-0.1416]))
    """

    domain = constraints.interval(-pi, pi)

    def __init__(self, bins: int = 8) -> None:
        super().__init__()
        _check_bins(bins, "a single bin has no width to choose")
        self.bins, self.num_params = bins, 3 * bins + 1

    def forward(self, phi: Tensor, first: int = 0) -> CircularRationalQuadratic:
        """phi (*batch, S, P) to the transform of angles (*batch, S)."""
        shape, angle = phi.split([3 * self.bins, 1], -1)
        sizes, slopes = _positive(shape).split([2 * self.bins, self.bins], -1)
        slopes = torch.cat([slopes, slopes[..., :1]], -1).square()
        return CircularRationalQuadratic(_knots(sizes, slopes, pi), angle.squeeze(-1))


def _check_bins(bins: int, reason: str) -> None:
    check_sizes(1, bins=bins)
    if bins < 2:
        raise ValueError(f"Expected bins >= 2; got {bins} ({reason}).")


def _positive(phi: Tensor) -> Tensor:
    return bounded(phi, _SPREAD).exp()


def _knots(sizes: Tensor, slopes: Tensor, bound: float) -> Tensor:
    """(*batch, 3, K + 1): of bins of sizes in proportion to these (*batch, 2 K), with slopes (*batch, K + 1)."""
    bins = slopes.shape[-1] - 1
    # many times faster than softmax, which is slow on short rows
    before, total = sizes.unflatten(-1, (2, bins)).cumsum(-1).split([bins - 1, 1], -1)
    inner = torch.constant_pad_nd(before / total, (1, 1))
    both = torch.add(_starts(bins, bound, slopes.dtype, slopes.device), inner, alpha=2 * bound)
    return torch.cat([both, slopes.unsqueeze(-2)], -2)


@lru_cache
def _starts(bins: int, bound: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and used under grad too
        return torch.tensor([-bound] * bins + [bound], dtype=dtype, device=device)
