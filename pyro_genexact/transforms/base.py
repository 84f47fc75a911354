"""Base classes of transforms: joint evaluation of value and log-determinant, caching, and Chain."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from ..core.functional import all_finite, at_hand, some_not_finite, visible
from ..core.independent import independent
from ..core.leaves import FORGOTTEN, tensors_in
from ..core.precision import full_precision
from ..core.shapes import sum_rightmost
from ..core.versions import versions_of
from ..numerics.fixed_point import passes_of


class Inverted(_InverseTransform):
    """Inverse of a :class:`Bijection`, with its methods."""

    _inv: Any

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.inverse_and_ladj(x)  # type: ignore[no-any-return]

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.call_and_ladj(y)  # type: ignore[no-any-return]

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        return self._inv.call_and_ladj(y)[0]  # type: ignore[no-any-return]

    def watched(self) -> Sequence[Tensor]:
        return self._inv.watched()  # type: ignore[no-any-return]

    @property
    def keeps_volume(self) -> bool:
        return self._inv.keeps_volume  # type: ignore[no-any-return]

    passes = property(lambda self: self._inv.passes)


class Bijection(Transform):
    """Base class of transforms that compute their value and log-determinant together.

    The methods of a pair swap for the inverse: ``t.inv.call_and_ladj`` is ``t.inverse_and_ladj``.

    Attributes:
        keeps_volume: whether log|det dy/dx| is 0 everywhere.
        passes: the number of passes of the last parallel solve, a list of these for a chain, or None.

    Example:
        >>> import torch
        >>> from pyro_genexact.transforms import Affine
        >>> t = Affine(torch.tensor(1.0), torch.tensor(0.0))
        >>> t.call_and_ladj(torch.tensor(2.0))
        (tensor(3.), tensor(0.))
    """

    bijective = True
    keeps_volume = False
    passes: Any = None
    _inv: Any

    @property
    def inv(self) -> Any:
        """The inverse transform; its ``inv`` is this transform."""
        inverse = self._inv and self._inv()
        if inverse is None:
            inverse = Inverted(self)
            self._inv = weakref.ref(inverse)  # weak as in torch, because a reference cycle would keep autograd graphs
        return inverse

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and log|det dy/dx| in one evaluation."""
        y = self._call(x)
        return y, self.log_abs_det_jacobian(x, y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dx/dy| in one evaluation."""
        x = self._inverse(y)
        return x, -self.log_abs_det_jacobian(x, y)

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """Returns x only, in the cheapest way; ``known`` may pass its value without gradient if it is already known."""
        return self._inverse(y)  # type: ignore[no-any-return]

    def watched(self) -> Sequence[Tensor]:
        """Returns the tensors that the transform uses, other than its argument."""
        return tensors_in(self)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of x given that of y; subclasses override it if the sizes of events differ."""
        return self.forward_shape(shape)


class PlainTransform(Bijection):
    """Base class of bijections that are cheap in both directions and need no cache.

    A subclass defines ``_call``, ``_inverse`` and ``log_abs_det_jacobian``, as for torch's ``Transform``.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> class Double(PlainTransform):
        ...     domain = codomain = constraints.real
        ...     def _call(self, x):
        ...         return 2 * x
        ...     def _inverse(self, y):
        ...         return y / 2
        ...     def log_abs_det_jacobian(self, x, y):
        ...         return torch.full_like(x, 2.0).log()
        >>> Double().call_and_ladj(torch.tensor(3.0))
        (tensor(6.), tensor(0.6931))
    """

    def with_cache(self, cache_size: int = 1) -> PlainTransform:
        """Returns the transform itself."""
        return self


class Adapted(PlainTransform):
    """Adapts a transform of another library to the methods of :class:`Bijection`."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.codomain

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        return self.transform(x)  # type: ignore[no-any-return]

    @full_precision
    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inv(y)  # type: ignore[no-any-return]

    @full_precision
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.transform.log_abs_det_jacobian(x, y)  # type: ignore[no-any-return]

    @full_precision
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pair = getattr(self.transform, "call_and_ladj", super().call_and_ladj)  # zuko's transforms have this method
        return pair(x)  # type: ignore[no-any-return]


def adapted(transform: Any) -> Any:
    """Returns the transform with the methods of :class:`Bijection`, wrapping it if it is of another library."""
    return transform if isinstance(transform, (Bijection, Inverted)) else Adapted(transform)


class RememberingTransform(Bijection):
    """Base class of bijections that compute y and log|det dy/dx| together and cache the last result.

    ``rsample`` followed by ``log_prob`` evaluates a network once, and ``log_abs_det_jacobian`` is free after a call in
    either direction. The cache is used only for the same tensor objects in the same grad mode, and only if neither they
    nor the tensors in ``watched`` have changed since.

    A subclass defines ``_call_and_ladj`` and ``_inverse_and_ladj``, which do not use the cache. It also defines
    ``invert`` if x alone is cheaper to compute than the pair.

    Args:
        cache_size: 1 to cache the last call, 0 for no cache.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> class Double(RememberingTransform):
        ...     domain = codomain = constraints.real
        ...     def _call_and_ladj(self, x):
        ...         return 2 * x, torch.full_like(x, 2.0).log()
        ...     def _inverse_and_ladj(self, y):
        ...         return y / 2, -torch.full_like(y, 2.0).log()
        >>> t, x = Double(), torch.tensor(3.0)
        >>> y = t(x)
        >>> t.inv(y) is x
        True
    """

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self._last: tuple[Tensor, Tensor, Tensor, Any] | None = None
        self._watched: Sequence[Tensor] | None = None

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes y and log|det dy/dx|."""
        raise TypeError(f"{type(self).__name__} must define _call_and_ladj(x)")

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes x and log|det dx/dy|."""
        raise TypeError(f"{type(self).__name__} must define _inverse_and_ladj(y)")

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        return self._inverse_and_ladj(y)[0]

    def _call(self, x: Tensor) -> Tensor:
        """Computes y without the cache, as torch requires of a transform."""
        return self._call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        """Computes x without the cache, as torch requires of a transform."""
        return self.invert(y)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and log|det dy/dx|, from the cache if possible."""
        last = self._recall(x=x)
        return last[1:3] if last else self._call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dx/dy|, from the cache if possible."""
        last = self._recall(y=y)
        return (last[0], -last[2]) if last else self._inverse_and_ladj(y)

    def __call__(self, x: Tensor) -> Tensor:
        if last := self._recall(x=x):
            return last[1]
        y, ladj = self._call_and_ladj(x)
        self._remember(x, y, ladj)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if last := self._recall(y=y):
            return last[0]
        x, ladj = self._inverse_and_ladj(y)
        self._remember(x, y, -ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log|det dy/dx| at x, of the batch shape."""
        last = self._recall(x, y)
        return last[2] if last else self._call_and_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> RememberingTransform:
        """Returns the same transform with a cache of its last call (1) or without one (0)."""
        if cache_size not in (0, 1):
            raise ValueError(f"Expected cache_size to be 0 or 1; got {cache_size}.")
        if cache_size == self._cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def clear_cache(self) -> None:
        """Empties the cache."""
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {name: forgotten for name, forgotten in FORGOTTEN.items() if name in state}

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        self._last = (x, y, ladj, self._stamp(x, y)) if self._cache_size else None

    def _recall(self, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Any] | None:
        """Returns the last call if it was at x and y (each checked if given) and no tensor has changed since.

        ``self._last`` is read only once, because another thread may replace it at any time.
        """
        last = self._last
        if last is None or (x is not None and last[0] is not x) or (y is not None and last[1] is not y):
            return None
        return last if last[3] == self._stamp(last[0], last[1]) else None

    def _stamp(self, x: Tensor, y: Tensor) -> Sequence[Any]:
        """Returns what must be unchanged for the cache to be valid."""
        if self._watched is None:
            self._watched = self.watched()
        return [torch.is_grad_enabled(), *versions_of((x, y, *self._watched))]


class _Plan(NamedTuple):
    """Structure of a chain: its parts, each with the number of dims to sum its log-determinant over; its domains."""

    steps: list[tuple[Any, int]]
    domain: Any
    codomain: Any


class Chain(RememberingTransform):
    """Composition of transforms, applied first to last; it sums their log-determinants and caches one call.

    Args:
        parts: one or more transforms; each call evaluates each part once.
        cache_size: 1 to cache the last call, 0 for no cache.

    Raises:
        ValueError: if ``parts`` is empty.

    Example:
        >>> import torch
        >>> from torch.distributions import AffineTransform
        >>> from pyro_genexact.transforms import Affine
        >>> chain = Chain([Affine(torch.zeros(2), torch.ones(2)), AffineTransform(0.0, 2.0)])
        >>> chain.log_abs_det_jacobian(x := torch.zeros(3, 2), chain(x)).shape
        torch.Size([3, 2])
    """

    def __init__(self, parts: Sequence[Transform], cache_size: int = 1) -> None:
        if not parts:
            raise ValueError("Expected parts to hold at least one transform; got an empty sequence.")
        super().__init__(cache_size=cache_size)
        self.parts = list(parts)
        self._plan: _Plan | None = None

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._planned().domain  # type: ignore[no-any-return]

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._planned().codomain  # type: ignore[no-any-return]

    def _planned(self) -> _Plan:
        """Returns the structure of the chain, computed at first use."""
        if self._plan is None:
            ends = [(part.domain, part.codomain) for part in self.parts]
            dims = [(domain.event_dim, codomain.event_dim) for domain, codomain in ends]
            before = after = dims[-1][1]
            for inner, outer in reversed(dims):
                before = max(before + inner - outer, inner)
            after, steps = before, []
            for part, (inner, outer) in zip(self.parts, dims, strict=True):
                steps.append((adapted(part), after - inner))
                after += outer - inner
            domain, codomain = ends[0][0], ends[-1][1]
            self._plan = _Plan(
                steps, independent(domain, before - dims[0][0]), independent(codomain, after - dims[-1][1])
            )
        return self._plan

    passes = property(lambda self: passes_of(self.parts), doc="The passes of the last parallel solve of each part.")

    @property
    def sign(self) -> Any:
        """1 or -1, the product of the signs of the parts; raises NotImplementedError if one of them has no sign."""
        return prod(part.sign for part in self.parts)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _run(x, ((part.call_and_ladj, part, part.keeps_volume, dims) for part, dims in self._planned().steps))

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        steps = reversed(self._planned().steps)
        x, ladj = _run(y, ((part.inverse_and_ladj, part.invert, part.keeps_volume, dims) for part, dims in steps))
        return (x, ladj) if all_finite(x) else self._without_overflow(y, x, ladj)

    def _without_overflow(self, y: Tensor, x: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Sets the density to 0 where x overflowed: x = 0 and log|dx/dy| = -inf. NaN in y stays NaN."""
        if at_hand(x) and not all(t.isfinite().all() for t in self.watched()):
            return x, ladj
        dims = self.domain.event_dim
        finite = sum_rightmost((x - x).detach(), dims) == 0
        kept = finite | sum_rightmost(y != y, self.codomain.event_dim).bool()
        if visible(x) and not at_hand(x):
            kept = kept | some_not_finite(self.watched(), x)
        return x.where(kept[(...,) + (None,) * dims], 0.0), ladj.where(kept, -torch.inf)

    def watched(self) -> Sequence[Tensor]:
        return [t for part, _ in self._planned().steps for t in part.watched()]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return shape


def _run(x: Tensor, steps: Iterable[tuple[Any, Any, bool, int]]) -> tuple[Tensor, Tensor]:
    """Applies steps to x; returns the result and the sum of the log-determinants.

    A step consists of a function that returns value and log-determinant, a function that returns the value, whether it
    preserves volumes, and the number of rightmost dims to sum the log-determinant over.
    """
    total: Any = None
    for pair, alone, keeps_volume, dims in steps:
        if keeps_volume and total is not None:
            x = alone(x)
        else:
            x, ladj = pair(x)
            ladj = sum_rightmost(ladj, dims)
            total = ladj if total is None else total + ladj
    return x, total
