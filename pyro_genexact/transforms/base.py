"""Transforms that evaluate value and log-determinant together and remember their last call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from ..contexts import Padded
from ..core.binding import bind
from ..core.functional import transformed
from ..core.independent import independent
from ..core.leaves import tensors_in
from ..core.shapes import sum_rightmost


class PlainTransform(Transform):
    """A bijection that is cheap in both directions, so that there is nothing to remember."""

    bijective = True

    def with_cache(self, cache_size: int = 1) -> PlainTransform:
        """The transform itself."""
        return self


class RememberingTransform(Transform):
    """A bijection that finds y and log|dy/dx| together and remembers its last (x, y, log|dy/dx|) by identity.

    So ``rsample`` then ``log_prob`` evaluates a network once, and ``log_abs_det_jacobian`` is free after a call of either
    direction. What is remembered is served only for the very tensors of that call, in the grad mode of that call, and
    only if neither they nor the tensors that the transform computes with (:meth:`watched`) changed in between.

    A subclass defines :meth:`evaluate` and :meth:`solve`.
    """

    bijective = True

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self._last: tuple[Tensor, Tensor, Tensor, Any] | None = None
        self._watched: Sequence[Tensor] | None = None

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx| from x."""
        raise TypeError(f"{type(self).__name__} must define evaluate(x)")

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dy/dx| from y."""
        raise TypeError(f"{type(self).__name__} must define solve(y)")

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """x alone from y; ``known`` is its value without gradient, where that was found before."""
        return self.solve(y)[0]

    def _call(self, x: Tensor) -> Tensor:
        """y from x, as torch has it of every transform; remembers nothing."""
        return self.evaluate(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        """x from y, in the same way."""
        return self.solve(y)[0]

    def watched(self) -> Sequence[Tensor]:
        """The tensors that the transform computes with beside its argument."""
        if self._watched is None:
            self._watched = tensors_in(self)
        return self._watched

    def __call__(self, x: Tensor) -> Tensor:
        if last := self._recall(x=x):
            return last[1]
        y, ladj = self.evaluate(x)
        self._remember(x, y, ladj)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if last := self._recall(y=y):
            return last[0]
        x, ladj = self.solve(y)
        self._remember(x, y, ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|dy/dx| at x, of the batch shape."""
        if last := self._recall(x, y):
            return last[2]
        return self.evaluate(x)[1]

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
        return {**super().__getstate__(), "_last": None, "_inv": None, "_watched": None}

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

    def _stamp(self, x: Tensor, y: Tensor) -> tuple[Any, ...] | None:
        """What must not have changed."""
        return torch.is_grad_enabled(), *(_mark(t) for t in (x, y, *self.watched()))


class _Values:
    """A copy of an inference tensor, which counts no versions, to see whether it was changed in place."""

    def __init__(self, t: Tensor) -> None:
        self.copy = t.clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and torch.equal(self.copy, other.copy)


def _mark(t: Tensor) -> Any:
    """What tells whether a tensor is what it was: its version and, unless it is of torch.func, its storage."""
    if t.is_inference():
        return _Values(t)
    try:
        return t._version, t.requires_grad, t.data_ptr()
    except RuntimeError:
        return t._version, t.requires_grad


class Chain(RememberingTransform):
    """The composition of transforms, first to last, that sums their log-determinants on the way and remembers one call.

    Args:
        parts: transforms, at least one; each is evaluated once a call.

    Example:
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
        compose = torch.distributions.ComposeTransform(self.parts)
        self._domain, self._codomain = independent(compose.domain), independent(compose.codomain)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._codomain

    @property
    def sign(self) -> Any:
        """1 or -1, the product of the parts'; NotImplementedError where one of them has none."""
        return prod(part.sign for part in self.parts)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, self.parts, self.domain.event_dim)

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._run(y, [part.inv for part in reversed(self.parts)], self.codomain.event_dim)
        return self._without_overflow(y, x, -ladj)

    def _without_overflow(self, y: Tensor, x: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Where x overflowed the density is 0: x = 0 and log|dy/dx| = inf. NaN that came in stays NaN."""
        dims = self.domain.event_dim
        finite = sum_rightmost((x - x).detach(), dims) == 0
        if not (finite.is_meta or transformed()) and (
            finite.all() or not all(t.isfinite().all() for t in self.watched())
        ):
            return x, ladj
        kept = finite | sum_rightmost(y != y, self.codomain.event_dim).bool()
        return x.where(kept[(...,) + (None,) * dims], 0.0), ladj.where(kept, torch.inf)

    def watched(self) -> Sequence[Tensor]:
        if self._watched is None:
            parts = [part.inv if isinstance(part, _InverseTransform) else part for part in self.parts]
            found = [part.watched() if isinstance(part, RememberingTransform) else tensors_in(part) for part in parts]
            self._watched = [tensor for tensors in found for tensor in tensors]
        return self._watched

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return shape

    @staticmethod
    def _run(x: Tensor, parts: Sequence[Transform], event_dim: int) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for part in parts:
            x, ladj = call_with_ladj(part, x)
            total = total + sum_rightmost(ladj, event_dim - part.domain.event_dim)
            event_dim += part.codomain.event_dim - part.domain.event_dim
        return x, total


def call_with_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and log|dy/dx| of any transform, in one evaluation where the transform can."""
    if isinstance(transform, RememberingTransform):
        return transform.evaluate(x)
    if isinstance(transform.inv, RememberingTransform):
        y, ladj = transform.inv.solve(x)
        return y, -ladj
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse_of(transform: Transform, y: Tensor, known: Tensor | None = None) -> Tensor:
    """x alone, as :meth:`RememberingTransform.invert`, for any transform."""
    return transform.invert(y, known) if isinstance(transform, RememberingTransform) else transform.inv(y)


@ConditionalTransformModule.register
class Inverse(nn.Module):
    """The inverse of a transform module: its call returns the inverse of what the module's call returns.

    Args:
        transform: a module that is a transform, or whose call (with a context, if it has ``context`` features) returns one.

    Example:
        >>> from pyro_genexact.transforms import Standardize
        >>> shift = Standardize(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> Inverse(shift)()(torch.zeros(1))
        tensor([1.])
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform
        self.context = getattr(transform, "context", 0)

    @property
    def inv(self) -> nn.Module:
        """The module that this one inverts."""
        return self.transform

    def forward(self, context: Tensor | Padded | None = None) -> Transform:
        return transform_of(self.transform, context).inv

    def condition(self, context: Tensor | Padded | None = None) -> Transform:
        """The same as calling the module, under Pyro's name."""
        return self(context)


def transform_of(module: nn.Module, context: Tensor | Padded | None) -> Transform:
    """What a module contributes to a chain: itself as it is now if it is a transform, else what its call returns."""
    if isinstance(module, Transform):
        bound, _ = bind(module)
        bound._inv = None  # its inverse must be that of the copy
        return bound
    return module(context) if getattr(module, "context", 0) else module()
