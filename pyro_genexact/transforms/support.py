"""Bijections from the reals onto half lines, intervals and simplices, accurate up to the boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor
from torch.distributions import CatTransform, Transform, constraints
from torch.distributions.transforms import identity_transform
from torch.nn.functional import logsigmoid, pad

from ..core.checks import check_last, check_numbers, check_sizes, check_widths
from ..core.functional import all_finite
from ..core.independent import REAL_VECTOR, independent, with_check
from ..core.shapes import sum_rightmost
from ..core.values import filled_like, floating, numbers
from .base import PlainTransform, RememberingTransform


class HalfLine(PlainTransform):
    """Bijection y = bound + sign exp(x) onto the open half line above or below a bound; log|dy/dx| = x.

    Values that would round to the bound are replaced by the number next to it. x is clamped to ±log(eps max), with eps
    and max of the dtype, and has gradient 0 beyond, because products of gradients with y or 1 / y would overflow.

    Args:
        bound: the end of the half line, a number or a tensor that broadcasts.
        sign: 1 for the half line above the bound, -1 for the one below.

    Raises:
        TypeError: if ``bound`` is neither a number nor a tensor.
        ValueError: if ``bound`` is a number that is not finite.

    Example:
        >>> import torch
        >>> HalfLine(1.0)(torch.tensor(0.0))
        tensor(2.)
    """

    domain = constraints.real

    def __init__(self, bound: float | Tensor = 0.0, sign: int = 1) -> None:
        super().__init__()
        _check_ends(bound=bound)
        self.bound, self._sign = bound, sign

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return (constraints.greater_than if self._sign > 0 else constraints.less_than)(self.bound)

    @property
    def sign(self) -> int:
        return self._sign

    def _call(self, x: Tensor) -> Tensor:
        y = self.bound + self._sign * _bounded(x).exp()
        return _inside(y, self.bound, inf) if self._sign > 0 else _inside(y, -inf, self.bound)

    def _inverse(self, y: Tensor) -> Tensor:
        return (self._sign * (y - self.bound)).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns x."""
        return x


class Interval(PlainTransform):
    """Bijection y = low + (high - low) sigmoid(x) onto an open interval; log|dy/dx| = log(high - low) + log sigmoid'(x).

    The inverse is log(y - low) - log(high - y), accurate up to both ends. Values that would round to an end are
    replaced by the number next to it, and x is clamped as by :class:`HalfLine`.

    Args:
        low: the lower end, a number or a tensor that broadcasts.
        high: the upper end, a number or a tensor that broadcasts.

    Raises:
        TypeError: if an end is neither a number nor a tensor.
        ValueError: if an end is a number that is not finite.

    Example:
        >>> import torch
        >>> Interval(-1.0, 1.0)(torch.tensor(0.0))
        tensor(0.)
    """

    domain = constraints.real
    sign = 1

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__()
        _check_ends(low=low, high=high)
        self.low, self.high = low, high

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(self.low, self.high)

    def _call(self, x: Tensor) -> Tensor:
        width, x = self.high - self.low, _bounded(x)
        # each half is computed from its own end, so that small distances to both ends are accurate
        y = torch.where(x < 0, self.low + width * torch.sigmoid(x), self.high - width * torch.sigmoid(-x))
        return _inside(y, self.low, self.high)

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.low).log() - (self.high - y).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log(high - low) + log sigmoid(x) + log sigmoid(-x)."""
        return filled_like(self.high - self.low, x).log() + logsigmoid(x) + logsigmoid(-x)


class Simplex(PlainTransform):
    """Bijection y = softmax(x_1 ... x_{k-1}, 0) onto the open simplex (additive log-ratio); log|dy/dx| = sum_i log y_i.

    It maps (*batch, k - 1) to (*batch, k). The density is that of the first k - 1 coordinates, as for the Dirichlet
    distribution. Elements of y are clamped to at least 1 / (eps max), with eps and max of the dtype, and have gradient
    0 there, because products of gradients with their inverse would overflow.

    Reference: Aitchison, "The Statistical Analysis of Compositional Data", JRSS B 1982.

    Example:
        >>> import torch
        >>> Simplex()(torch.zeros(1))
        tensor([0.5000, 0.5000])
    """

    domain = REAL_VECTOR
    codomain = constraints.simplex

    def _call(self, x: Tensor) -> Tensor:
        return pad(x, (0, 1)).softmax(-1).clamp(min=exp(-_largest(x)))

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1].log() - y[..., -1:].log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns sum_i log softmax(x, 0)_i."""
        return pad(x, (0, 1)).log_softmax(-1).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


@dataclass(frozen=True)
class Interior:
    """Check of the interior of a support: calls ``contains`` of the transform onto it."""

    onto: Any

    def __call__(self, value: Tensor) -> Tensor:
        return self.onto.contains(value)  # type: ignore[no-any-return]


class ToSupport(RememberingTransform):
    """Bijection from real vectors or images onto the interior of a support; its codomain accepts only the interior.

    A value outside the interior (on the boundary, infinite or beyond) has no inverse. For such a value the inverse
    returns x = 0 with log|dy/dx| = +inf, so that its density is 0. NaN gives NaN.

    Args:
        support: a scalar constraint for all features, a vector constraint such as ``constraints.simplex``, or a list of
            one scalar constraint per feature.
        features: D, the size of the vectors in the support, or the shape of images, such as (C, H, W), whose support is
            a scalar constraint of all pixels.
        cache_size: 1 to cache the last call, 0 for no cache.

    Raises:
        ValueError: for a discrete or unknown support, one whose events are not vectors, a list of another length, or a
            shape that is not of positive integers.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> t = ToSupport(constraints.positive, 2)
        >>> t.codomain.check(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
        tensor([ True, False])
    """

    def __init__(
        self,
        support: constraints.Constraint | Sequence[constraints.Constraint],
        features: int | tuple[int, ...] | list[int],
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.features = features
        if isinstance(features, (tuple, list)):
            check_widths(1, features=features)
            if not features:
                raise ValueError(f"Expected features to have at least one dim; got {features}.")
            self.shape, dims = tuple(features), len(features)
            self.bijection, self.support = _scalar_bijection(support), independent(support, dims)
        else:
            check_sizes(1, features=features)
            self.shape, dims = (features,), 1
            self.bijection, self.support = _bijection_onto(support, features)
        self._dims = tuple(range(-dims, 0))
        self._real = support is constraints.real

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return REAL_VECTOR if len(self._dims) == 1 else independent(constraints.real, len(self._dims))  # type: ignore[no-any-return]

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return with_check(self.support, Interior(self))  # type: ignore[no-any-return]

    def contains(self, y: Tensor) -> Tensor:
        """Returns whether y (*batch, *event) is in the interior, Boolean (*batch,); raises a TypeError for complex y."""
        y = floating(numbers("value", y), ())
        with torch.no_grad():
            x = self.bijection.inv(y)
            inside = (x - x).sum(self._dims) == 0  # True if all elements are finite
            return inside if self._real else inside & self.support.check(y)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bijection(x)
        return y, self._ladj(x, y)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        for dim, size in zip(self._dims, self.shape, strict=True):
            check_last(y, size, "features of the flow", dim)
        y = numbers("value", y)
        dims = len(self._dims)
        if self._real and y.is_floating_point() and all_finite(y):
            return y, y.new_zeros(y.shape[:-dims])
        inside = self.contains(y)
        none = -y.detach().amax(self._dims).clamp(min=torch.inf)  # -inf or NaN
        y = torch.where(inside[(...,) + (None,) * dims], y, self.interior(y))  # keeps gradients finite
        x = self.bijection.inv(y)
        return x, torch.where(inside, -self._ladj(x, y), none)

    def interior(self, like: Tensor) -> Tensor:
        """Returns an event in the interior, with the dtype and device of ``like``."""
        with torch.no_grad():
            zeros = like.new_zeros(self.inverse_shape(torch.Size(self.shape)))
            return zeros if self._real else self.bijection(zeros)

    def _ladj(self, x: Tensor, y: Tensor) -> Tensor:
        dims = len(self._dims) - self.bijection.domain.event_dim
        return sum_rightmost(self.bijection.log_abs_det_jacobian(x, y), dims)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.bijection.forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.bijection.inverse_shape(shape)


def _bijection_onto(support: Any, features: int) -> tuple[Transform, constraints.Constraint]:
    """Returns a bijection from real vectors and the constraint of its image."""
    if isinstance(support, constraints.independent) and support.event_dim == 1:
        support = support.base_constraint
    if type(support) is constraints.cat and not support.event_dim:
        support = [s for s, n in zip(support.cseq, support.lengths, strict=True) for _ in range(n)]
    if isinstance(support, (list, tuple)):
        if len(support) != features or not all(
            isinstance(s, constraints.Constraint) and not s.event_dim for s in support
        ):
            raise ValueError(
                f"Expected support to list {features} scalar constraints, one per feature; got {list(support)}."
            )
        groups = [(s, len(list(run))) for s, run in groupby(support, key=lambda s: s)]
        parts, lengths = [_scalar_bijection(s) for s, _ in groups], [n for _, n in groups]
        constraint = constraints.cat([s for s, _ in groups], -1, lengths)
        return CatTransform(parts, -1, lengths), independent(constraint, 1)
    if support is constraints.simplex:
        check_sizes(2, features=features)
        return Simplex(), support
    return _scalar_bijection(support), independent(support, 1)


def _scalar_bijection(support: Any) -> Transform:
    """Returns a bijection from the reals onto the interior of a continuous scalar support."""
    kind, known = type(support), isinstance(support, constraints.Constraint)
    if not known:
        raise ValueError(f"Expected support to be a constraint or a list of constraints; got {support}.")
    if support.is_discrete:
        raise ValueError(f"Expected support to be continuous; got {support}.")
    if support is constraints.real:
        return identity_transform
    if kind in (constraints.greater_than, constraints.greater_than_eq):
        return HalfLine(support.lower_bound)
    if kind is constraints.less_than:
        return HalfLine(support.upper_bound, -1)
    if kind in (constraints.interval, constraints.half_open_interval):
        return Interval(support.lower_bound, support.upper_bound)
    raise ValueError(
        f"Expected support to be the reals, a half line, an interval or the simplex; got {support}, for which no exact "
        "bijection is known."
    )


def _check_ends(**ends: Any) -> None:
    """Raises a TypeError for ends that are neither numbers nor tensors, and a ValueError for numbers not finite."""
    for name, end in ends.items():
        if not isinstance(end, Tensor):
            check_numbers(**{name: end})
            if not isfinite(end):
                raise ValueError(f"Expected {name} to be finite; got {end}.")


def _largest(x: Tensor) -> float:
    """Returns log(eps max) of the dtype: products of gradients with numbers up to eps max rarely overflow."""
    number = torch.finfo(x.dtype)
    return log(number.eps * number.max)


def _bounded(x: Tensor) -> Tensor:
    """Clamps x to ±log(eps max), with gradient 0 beyond."""
    return x.clamp(-_largest(x), _largest(x))


def _inside(y: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Replaces values at or beyond an end by the number next to it."""
    ends = (filled_like(end, y).detach() for end in (low, high))
    low, high = ends
    return y.clamp(torch.nextafter(low, high), torch.nextafter(high, low))
