"""BijectionModule and Inverse: modules whose call returns a transform; ConditionedTransform."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from ..contexts import PaddedSequence, checked_source, kind_of
from ..core.binding import Bound, held_tensors
from ..core.buffers import WithDerived
from ..core.checks import check_like
from ..core.shapes import broadcast_shapes
from .base import RememberingTransform


@ConditionalTransformModule.register
class BijectionModule(WithDerived):
    """A learnable bijection: calling it with a context (or none) returns a transform of one forward pass.

    Attributes:
        context: C, the features that the call expects; 0 for a call without context.
    """

    context: Any = 0

    def condition(self, context: Tensor | PaddedSequence | None = None) -> Any:
        """The same as calling the module, under Pyro's name."""
        return self(context)

    @property
    def inv(self) -> nn.Module:
        """A module whose call returns the inverse, y -> x."""
        return Inverse(self)


class Inverse(BijectionModule):
    """The inverse of a transform module: its call returns the inverse of what the module's call returns.

    Args:
        transform: a module that is a transform, or whose call (with a context, if it has ``context`` features) returns one.

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
        """The module that this one inverts."""
        return self.transform

    def forward(self, context: Tensor | PaddedSequence | None = None) -> Transform:
        return transform_of(self.transform, context).inv


def transform_of(module: nn.Module, context: Tensor | PaddedSequence | None) -> Transform:
    """What a module contributes to a chain: itself as it is now if it is a transform, else what its call returns."""
    if isinstance(module, Transform):
        bound = Bound(module).copy()
        if bound is not module:
            bound._inv = None  # its inverse must be that of the copy
        return bound
    return result_of(module, context)  # type: ignore[no-any-return]


def result_of(module: nn.Module, context: Tensor | PaddedSequence | None) -> Any:
    """What the call of a module returns: with the context, if it reads one."""
    return module(context) if getattr(module, "context", 0) else module()


class ConditionedTransform(RememberingTransform):
    """A bijection by modules, with the weights that they have now and a context: what the call of a module returns.

    A subclass sets an attribute declared as :class:`~pyro_genexact.core.binding.Held` for each of its modules.

    Args:
        module: which reads the context.
        context: (*batch, C), with ``Covariates`` (*batch, T, C), with ``Source`` (*batch, S, C) or a ``PaddedSequence`` of it and its
            lengths, or None where the module takes none.

    Raises:
        ValueError: for a context of another size, dtype or device than the module's.
    """

    def __init__(self, module: nn.Module, context: Tensor | PaddedSequence | None, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.context, self.source_lengths = checked_source(module, context, None)
        self._kind = kind_of(module.context)
        self._lengths: Tensor | None = None

    @cached_property
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
        """The value, broadcast with the context; a ValueError for another dtype or device than that of the weights."""
        check_like("value", value, next((t for t in self._tensors if t.is_floating_point()), value))
        shape = self.forward_shape(value.shape)
        return value if shape == value.shape else value.expand(shape)
