"""Base classes of transforms: value and log-determinant in one call, the cache, Chain."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from math import isfinite, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from ..core.functional import visible
from ..core.independent import independent
from ..core.leaves import FORGOTTEN, tensors_in
from ..core.precision import full_precision
from ..core.shapes import sum_rightmost
from ..core.versions import versions_of


class Inverted(_InverseTransform):
    """The inverse of one of the transforms of this package, with their methods."""

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


class Bijection(Transform):
    """What transforms of this package, and their inverses, have beside what torch's have: values with log-determinants.

    The two methods of a pair are each other's for the inverse: ``t.inv.call_and_ladj`` is ``t.inverse_and_ladj``.

    Attributes:
        keeps_volume: whether log|dy/dx| is 0 everywhere.
    """

    bijective = True
    keeps_volume = False
    _inv: Any

    @property
    def inv(self) -> Any:
        """The inverse, whose ``inv`` is the transform itself."""
        inverse = self._inv and self._inv()
        if inverse is None:
            inverse = Inverted(self)
            self._inv = weakref.ref(inverse)  # as torch's: two that hold each other would keep their graphs
        return inverse

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx| from x, in one evaluation."""
        y = self._call(x)
        return y, self.log_abs_det_jacobian(x, y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dx/dy| from y, in one evaluation."""
        x = self._inverse(y)
        return x, -self.log_abs_det_jacobian(x, y)

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """x alone from y, in the cheapest way; ``known`` is its value without gradient, where that was found before."""
        return self._inverse(y)  # type: ignore[no-any-return]

    def watched(self) -> Sequence[Tensor]:
        """The tensors that the transform computes with beside its argument."""
        return tensors_in(self)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """That of x from that of y: as ``forward_shape``, unless events change their size."""
        return self.forward_shape(shape)


class PlainTransform(Bijection):
    """A bijection that is cheap in both directions, so that there is nothing to remember.

    A subclass defines ``_call``, ``_inverse`` and ``log_abs_det_jacobian``, as those of torch's ``Transform`` do.
    """

    def with_cache(self, cache_size: int = 1) -> PlainTransform:
        """The transform itself."""
        return self


class Adapted(PlainTransform):
    """A transform of another library as one of this package's."""

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
        pair = getattr(self.transform, "call_and_ladj", super().call_and_ladj)  # zuko's have it too
        return pair(x)  # type: ignore[no-any-return]


def adapted(transform: Any) -> Any:
    """A transform with the methods of :class:`Bijection`: itself if it is one of this package's."""
    return transform if isinstance(transform, (Bijection, Inverted)) else Adapted(transform)


class RememberingTransform(Bijection):
    """A bijection that finds y and log|dy/dx| together and remembers its last (x, y, log|dy/dx|) by identity.

    So ``rsample`` then ``log_prob`` evaluates a network once, and ``log_abs_det_jacobian`` is free after a call of either
    direction. What is remembered is served only for the very tensors of that call, in the grad mode of that call, and
    only if neither they nor the tensors that the transform computes with (``watched``) changed in between.

    A subclass defines ``_call_and_ladj`` and ``_inverse_and_ladj``, which remember nothing; ``invert`` too if x alone is
    cheaper than the pair.
    """

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self._last: tuple[Tensor, Tensor, Tensor, Any] | None = None
        self._watched: Sequence[Tensor] | None = None

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx| from x."""
        raise TypeError(f"{type(self).__name__} must define _call_and_ladj(x)")

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dx/dy| from y."""
        raise TypeError(f"{type(self).__name__} must define _inverse_and_ladj(y)")

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        return self._inverse_and_ladj(y)[0]

    def _call(self, x: Tensor) -> Tensor:
        """y from x, as torch has it of every transform; remembers nothing."""
        return self._call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        """x from y, in the same way."""
        return self.invert(y)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx| from x: those of the last call if it was of this x, else found in one evaluation."""
        last = self._recall(x=x)
        return last[1:3] if last else self._call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dx/dy| from y, in the same way."""
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
        """log|dy/dx| at x, of the batch shape."""
        last = self._recall(x, y)
        return last[2] if last else self._call_and_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> RememberingTransform:
        """The same transform, remembering its last call (1) or not (0)."""
        if cache_size not in (0, 1):
            raise ValueError(f"Expected cache_size to be 0 or 1; got {cache_size}.")
        if cache_size == self._cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def clear_cache(self) -> None:
        """Forgets the last call."""
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {name: forgotten for name, forgotten in FORGOTTEN.items() if name in state}

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        self._last = (x, y, ladj, self._stamp(x, y)) if self._cache_size else None

    def _recall(self, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Any] | None:
        """The last call, if it was of this x and this y (as far as they are given) and nothing changed since.

        The record is read once: another thread may replace it at any time.
        """
        last = self._last
        if last is None or (x is not None and last[0] is not x) or (y is not None and last[1] is not y):
            return None
        return last if last[3] == self._stamp(last[0], last[1]) else None

    def _stamp(self, x: Tensor, y: Tensor) -> Sequence[Any]:
        """What must not have changed."""
        if self._watched is None:
            self._watched = self.watched()
        return [torch.is_grad_enabled(), *versions_of((x, y, *self._watched))]


class _Plan(NamedTuple):
    """Of a chain: its parts, each with the number of rightmost dims its log-determinants are summed over, and its ends."""

    steps: list[tuple[Any, int]]
    domain: Any
    codomain: Any


class Chain(RememberingTransform):
    """The composition of transforms, first to last, that sums their log-determinants on the way and remembers one call.

    Args:
        parts: transforms, at least one; each is evaluated once a call.

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
            raise ValueError("Expected parts to hold at least one transform; got none.")
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
        """What follows from the parts, found when it is asked for."""
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

    @property
    def sign(self) -> Any:
        """1 or -1, the product of the parts'; NotImplementedError where one of them has none."""
        return prod(part.sign for part in self.parts)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _run(x, ((part.call_and_ladj, part, part.keeps_volume, dims) for part, dims in self._planned().steps))

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        steps = reversed(self._planned().steps)
        x, ladj = _run(y, ((part.inverse_and_ladj, part.invert, part.keeps_volume, dims) for part, dims in steps))
        return (x, ladj) if all_finite(x) else self._without_overflow(y, x, ladj)

    def _without_overflow(self, y: Tensor, x: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Where x overflowed the density is 0: x = 0 and log|dx/dy| = -inf. NaN that came in stays NaN."""
        if visible(x) and not all(t.isfinite().all() for t in self.watched()):
            return x, ladj
        dims = self.domain.event_dim
        finite = sum_rightmost((x - x).detach(), dims) == 0
        kept = finite | sum_rightmost(y != y, self.codomain.event_dim).bool()
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


def all_finite(x: Tensor) -> bool:
    """Whether all numbers are known to be finite, by one look at them: False too where no look is possible."""
    return visible(x) and isfinite(x.detach().sum().item())


def _run(x: Tensor, steps: Iterable[tuple[Any, Any, bool, int]]) -> tuple[Tensor, Tensor]:
    """What the last step makes of x, and the sum of the log-determinants on the way.

    Each step is a function to value and log-determinant, one to the value, whether the volume stays, and of how many
    rightmost dims the log-determinants are summed.
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
