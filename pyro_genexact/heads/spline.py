"""Heads whose bijections are rational-quadratic splines, of real numbers or of angles."""

from __future__ import annotations

from math import pi, prod

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Head
from ..core.checks import check_positive, check_sizes, check_widths
from ..core.compiling import cached
from ..transforms.spline import CircularRationalQuadratic, RationalQuadratic
from .parameters import bounded

_SPREAD = 2.0  # the bound of the log-sizes of bins; round trips of steeper splines are inaccurate in single precision


class RationalQuadraticSpline(Head):
    """An increasing rational-quadratic spline on [-bound, bound], and the identity outside, of each number of a site.

    For each of the n numbers of a site, phi contains K numbers for the widths of the bins, K for their heights and K - 1
    for the slopes at inner knots, so P = n (3 K - 1). With e = exp(2 tanh(phi / 2)), widths and heights are e, normalised
    to a sum of 2 bound, and slopes are e^2. The slope at both ends is 1. Slopes are thus bounded smoothly, no bin
    vanishes, and phi = 0 gives the identity. Both directions have a closed form with about thirty elementwise operations.

    Args:
        bins: K, at least 2.
        bound: where the identity begins, positive; standardised data lie well inside.
        shape: the shape of a site, ``()`` or ``(k,)``.

    Raises:
        ValueError: if ``bins`` is below 2, ``bound`` is not positive and finite, or ``shape`` contains anything but
            positive integers.

    Reference: Durkan et al., "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> t = RationalQuadraticSpline(bins=4)(torch.ones(2, 11))
        >>> t.inv(torch.tensor([2.5, 1e6]))
        tensor([2.5000e+00, 1.0000e+06])
    """

    def __init__(self, bins: int = 8, bound: float = 5.0, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        _check_bins(bins, "a single bin with unit slopes is the identity")
        check_positive(bound=bound)
        check_widths(1, shape=shape)
        self.site_shape, self.bins, self.bound = tuple(shape), bins, float(bound)
        self.num_params = prod(shape) * (3 * bins - 1)

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of the head in the native loop, unless a subclass changed the head."""
        unchanged = type(self).forward is RationalQuadraticSpline.forward
        return ("spline", [self.bins, self.bound]) if unchanged else None

    def forward(self, phi: Tensor, first: int = 0) -> RationalQuadratic:
        """Returns the transform of values (*batch, S, *shape) for phi (*batch, S, P)."""
        if self.site_shape:
            phi = phi.unflatten(-1, (*self.site_shape, -1))
        sizes, slopes = _positive(phi).split([2 * self.bins, self.bins - 1], -1)
        slopes = torch.constant_pad_nd(slopes.square(), (1, 1), 1.0)
        return RationalQuadratic(_knots(sizes, slopes, self.bound), event_dim=len(self.site_shape))


class CircularSpline(Head):
    """A bijection of angles in [-pi, pi): an increasing spline with periodic slopes, followed by a rotation.

    phi contains K numbers for the widths, K for the heights and K for the slopes of the bins, as in
    :class:`RationalQuadraticSpline`, and the angle of the rotation, so P = 3 K + 1. The first slope is that at the
    point -pi = pi. Densities are continuous there, and phi = 0 gives the identity. Use a base distribution on the
    circle, such as ``Uniform(-pi, pi)`` or ``VonMises``. Both directions have a closed form.

    The parameters that a conditioner predicts from plain angles are discontinuous at pi. Wrap the conditioner in
    :class:`pyro_genexact.conditioners.Angles`, which reads cosine and sine.

    Args:
        bins: K, at least 2.

    Raises:
        ValueError: if ``bins`` is below 2.

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
        _check_bins(bins, "a single bin has a fixed width")
        self.bins, self.num_params = bins, 3 * bins + 1

    def forward(self, phi: Tensor, first: int = 0) -> CircularRationalQuadratic:
        """Returns the transform of angles (*batch, S) for phi (*batch, S, P)."""
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
    """Returns the knots (*batch, 3, K + 1) of bins with proportional sizes (*batch, 2 K) and slopes (*batch, K + 1)."""
    bins = slopes.shape[-1] - 1
    # many times faster than softmax on short rows
    before, total = sizes.unflatten(-1, (2, bins)).cumsum(-1).split([bins - 1, 1], -1)
    inner = torch.constant_pad_nd(before / total, (1, 1))
    both = torch.add(_starts(bins, bound, slopes.dtype, slopes.device), inner, alpha=2 * bound)
    return torch.cat([both, slopes.unsqueeze(-2)], -2)


@cached
def _starts(bins: int, bound: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor is also used under grad
        return torch.tensor([-bound] * bins + [bound], dtype=dtype, device=device)
