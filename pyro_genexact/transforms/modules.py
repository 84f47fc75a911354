"""BijectionModule and Inverse, modules whose call returns a transform; ConditionedTransform, the base of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from ..contexts import PaddedSequence, checked_source, kind_of
from ..core.binding import Bound, held_tensors
from ..core.buffers import WithDerived
from ..core.checks import check_like
from ..core.compiling import Lazy
from ..core.shapes import broadcast_shapes
from ..numerics.fixed_point import FixedPoint, Solver
from .base import RememberingTransform


@ConditionalTransformModule.register
class BijectionModule(WithDerived):
    """Base class of learned bijections: the call with a context (or none) returns a transform.

    Attributes:
        context: C, the number of context features that the call expects; 0 for none.
        takes_solver: whether the call has an argument ``solver``, see :class:`~pyro_genexact.numerics.FixedPoint`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_genexact.transforms import Affine
        >>> class Shift(BijectionModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.tensor(1.0))
        ...     def forward(self, context=None):
        ...         return Affine(self.shift, torch.zeros(()))
        >>> Shift().inv()(torch.tensor(3.0)).item()
        2.0
    """

    context: Any = 0
    takes_solver = False

    def condition(self, context: Tensor | PaddedSequence | None = None, **options: Any) -> Any:
        """Calls the module; this is Pyro's name for it."""
        return self(context, **options)

    @property
    def inv(self) -> nn.Module:
        """The module whose call returns the inverse transform, y -> x."""
        return Inverse(self)


class Inverse(BijectionModule):
    """Inverse of a transform module: its call returns the inverse of the module's transform.

    Args:
        transform: a module that is a transform, or whose call returns one (with a context if its ``context`` is not 0).

    Example:
        >>> import torch
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
        """The original module."""
        return self.transform

    @property
    def takes_solver(self) -> bool:  # type: ignore[override]
        return takes_solver(self.transform)

    def forward(self, context: Tensor | PaddedSequence | None = None, solver: Solver = None) -> Transform:
        return transform_of(self.transform, context, solver).inv


def takes_solver(module: nn.Module) -> bool:
    """Returns whether the call of a module has an argument ``solver``."""
    return bool(getattr(module, "takes_solver", False))


def transform_of(module: nn.Module, context: Tensor | PaddedSequence | None, solver: Solver = None) -> Transform:
    """Returns the transform of a module: a bound copy if the module is a transform, else the result of its call.

    Raises:
        ValueError: if there is a solver, and the module's call does not take it.
    """
    takes = solver is not None and takes_solver(module)
    if FixedPoint.of(solver) is not None and not takes:
        raise ValueError(
            f"Expected solver=None (only autoregressive transforms take a solver); got {solver!r} for "
            f"{type(module).__name__}."
        )
    if isinstance(module, Transform):
        bound = Bound(module).copy()
        if bound is not module:
            bound._inv = None  # the cached inverse belongs to the original
        return bound
    return result_of(module, context, **({"solver": solver} if takes else {}))  # type: ignore[no-any-return]


def result_of(module: nn.Module, context: Tensor | PaddedSequence | None, **options: Any) -> Any:
    """Calls a module, with the context if it has one."""
    return module(context, **options) if getattr(module, "context", 0) else module(**options)


class ConditionedTransform(RememberingTransform):
    """Base class of bijections that use a module with a context and the weights that it has at construction.

    A subclass declares an attribute :class:`~pyro_genexact.core.binding.Held` for each of its modules.

    Args:
        module: the module that reads the context.
        context: the context (*batch, C), covariates (*batch, T, C), or a source (*batch, S, C) or ``PaddedSequence``;
            None if the module has no context.
        cache_size: 1 to cache the last call, 0 for no cache.

    Raises:
        ValueError: if the context has another size, dtype or device than the module's.
    """

    def __init__(self, module: nn.Module, context: Tensor | PaddedSequence | None, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.context, self.source_lengths = checked_source(module, context, None)
        self._kind = kind_of(module.context)
        self._lengths: Tensor | None = None

    @Lazy
    def _tensors(self) -> list[Tensor]:
        return held_tensors(self)

    def watched(self) -> Sequence[Tensor]:
        given = self.context, self.source_lengths, self._lengths
        return [*(t for t in given if t is not None), *self._tensors]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        given = [t.shape for t in (self.source_lengths, self._lengths) if t is not None]
        if self.context is not None:
            given.append(self.context.shape[: -self._kind.dims])
        if not given:
            return shape
        cut = len(shape) - self.domain.event_dim
        return broadcast_shapes(shape[:cut], *given) + shape[cut:]

    def _broadcast(self, value: Tensor) -> Tensor:
        """Broadcasts the value with the context; raises a ValueError for another dtype or device than the weights'."""
        check_like("value", value, next((t for t in self._tensors if t.is_floating_point()), value))
        shape = self.forward_shape(value.shape)
        return value if shape == value.shape else value.expand(shape)
