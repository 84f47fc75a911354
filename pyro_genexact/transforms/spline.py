"""Monotone rational-quadratic splines on the real line and on the circle."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from ..core.independent import independent
from ..core.shapes import broadcast_shapes, sum_rightmost
from .base import RememberingTransform


class RationalQuadratic(RememberingTransform):
    """Elementwise increasing rational-quadratic spline; the identity outside the first and last knot.

    Between the knots (x_0, y_0) and (x_1, y_1) with slopes d_0 and d_1, let z = (x - x_0) / (x_1 - x_0) and
    s = (y_1 - y_0) / (x_1 - x_0). Then

        y = y_0 + (y_1 - y_0) z a / (z a + (1 - z) c),    a = s z + d_0 (1 - z),    c = d_1 z + s (1 - z)
        dy/dx = s^2 (z c + (1 - z) a) / (z a + (1 - z) c)^2

    All terms are positive, so there is no cancellation, and the spline passes exactly through its knots. The inverse is
    the root of a quadratic, also computed without cancellation.

    Cost: in each direction, a search for the bin and about twenty operations.

    Args:
        knots: (*batch, 3, K + 1), the rows x, y and slope of K + 1 knots. x and y increase, and have equal first and
            equal last elements. Slopes are positive; they should be 1 at both ends for a continuous derivative.
        cache_size: 1 to cache the last call, 0 for no cache.
        event_dim: number of rightmost dims of x that form an event, over which log|dy/dx| is summed.

    x and y have shape (*batch) and broadcast with the knots.

    Raises:
        ValueError: for knots of another shape. Their order is not checked.

    References: Gregory, Delbourgo, "Piecewise Rational Quadratic Interpolation to Monotonic Data", IMA J. Numer. Anal.
    1982; Durkan et al., "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> rows = [[-1.0, 0.0, 1.0], [-1.0, 0.5, 1.0], [1.0, 0.5, 1.0]]
        >>> t = RationalQuadratic(torch.tensor(rows))
        >>> t(torch.tensor([-2.0, 0.0, 1.0, 1e6]))
        tensor([-2.0000e+00,  5.0000e-01,  1.0000e+00,  1.0000e+06])
        >>> t.inv(torch.tensor([0.5]))
        tensor([0.])
    """

    sign = 1

    def __init__(self, knots: Tensor, cache_size: int = 1, event_dim: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self._event_dim = event_dim
        if knots.dim() < 2 or knots.shape[-2] != 3 or knots.shape[-1] < 2:
            raise ValueError(f"Expected knots.shape[-2:] == (3, K + 1) with K >= 1; got {tuple(knots.shape)}.")
        self.knots = knots

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return independent(constraints.real, self._event_dim)  # type: ignore[no-any-return]

    codomain = domain  # type: ignore[assignment]

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, x0, x1, y0, y1, d0, d1 = self._bin(x, 0)
        width = x1 - x0
        raw = (x - x0) / width
        z = raw.clamp(0, 1)
        y, slope = _between(z, y0, y1, (y1 - y0) / width, d0, d1)
        outside = (raw < 0) | (raw > 1)  # False for NaN
        ladj = torch.where(outside, 0.0, slope.log())
        return torch.where(outside, x, y), sum_rightmost(ladj, self._event_dim)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.invert(y)
        return x, -self._call_and_ladj(x)[1]

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """Returns x only; ``known`` is ignored."""
        y, x0, x1, y0, y1, d0, d1 = self._bin(y, 1)
        height = y1 - y0
        raw = (y - y0) / height
        r = raw.clamp(0, 1)
        left = 1 - r
        s = height / (x1 - x0)
        # z solves a quadratic with discriminant g^2 + 4 s^2 r (1 - r)
        g, part = d0 * left - d1 * r, 2 * s * r
        rest = 2 * s * left
        q = torch.addcmul(g * g, part, rest).sqrt()
        z = torch.where(g >= 0, part / (q + g + part), 1 - rest / (q - g + rest))
        return torch.where((raw < 0) | (raw > 1), y, torch.lerp(x0, x1, z))

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return broadcast_shapes(shape, self.knots.shape[:-2])

    def _bin(self, value: Tensor, row: int) -> tuple[Tensor, ...]:
        """Returns the value, and x, y and slope of the knots around it in the given row of the knots."""
        knots = self.knots
        if value.shape != knots.shape[:-2]:
            shape = broadcast_shapes(value.shape, knots.shape[:-2])
            value, knots = value.expand(shape), knots.expand(*shape, *knots.shape[-2:])
        k = (value.unsqueeze(-1) >= knots[..., row, 1:-1]).sum(-1, keepdim=True)
        index = torch.cat([k, k + 1], -1).unsqueeze(-2).expand(*value.shape, 3, 2)
        return value, *knots.gather(-1, index).flatten(-2).unbind(-1)


class CircularRationalQuadratic(RationalQuadratic):
    """Elementwise bijection of the circle: an increasing spline from -pi to pi, followed by a rotation.

        y = spline(x) + angle,    modulo 2 pi

    Arguments may be any real numbers; results are in [-pi, pi).

    Args:
        knots: (*batch, 3, K + 1), the rows x, y and slope of K + 1 knots. x and y start at -pi and end at pi. The
            slopes at both ends should be equal, so that the derivative is continuous on the circle.
        angle: (*batch), the angle of rotation, any real number.
        cache_size: 1 to cache the last call, 0 for no cache.

    x and y have shape (*batch) and broadcast with the knots.

    Raises:
        ValueError: for knots of another shape. Their order is not checked.

    Reference: Rezende et al., "Normalizing Flows on Tori and Spheres", ICML 2020.

    Example:
        >>> import torch
        >>> from math import pi
        >>> knots = torch.tensor([[-pi, pi], [-pi, pi], [1.0, 1.0]])
        >>> t = CircularRationalQuadratic(knots, torch.tensor(3.0))
        >>> t(torch.tensor([-1.0, 1.0])), t.inv(torch.tensor(2.0))
        (tensor([ 2.0000, -2.2832]), tensor(-1.0000))
    """

    domain = codomain = constraints.interval(-pi, pi)  # type: ignore[assignment]
    sign = Transform.sign  # type: ignore[assignment]  # no sign: the map jumps from pi to -pi

    def __init__(self, knots: Tensor, angle: Tensor, cache_size: int = 1) -> None:
        super().__init__(knots, cache_size=cache_size)
        self.angle = angle

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = super()._call_and_ladj(_wrapped(x))
        return _wrapped(y + _wrapped(self.angle)), ladj

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """Returns x only; ``known`` is ignored."""
        return _wrapped(super().invert(_wrapped(y - _wrapped(self.angle))))


def _wrapped(angle: Tensor) -> Tensor:
    """Returns the same angle in [-pi, pi), without rounding if it is already in this range."""
    angle = angle - 2 * pi * (angle / (2 * pi)).round()
    angle = torch.where(angle >= pi, angle - 2 * pi, angle)
    return torch.where(angle < -pi, angle + 2 * pi, angle)


def _between(z: Tensor, y0: Tensor, y1: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and dy/dx at the fraction z of a bin."""
    a, c = torch.lerp(d0, s, z), torch.lerp(s, d1, z)
    total = torch.lerp(c, a, z)
    return torch.lerp(y0, y1, z * a / total), torch.lerp(a, c, z) * (s / total).square()
