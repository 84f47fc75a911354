"""The contexts of conditioners: one vector, one vector per site, or a sequence of its own; and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .core.checks import check_like, check_sizes
from .core.lengths import checked_lengths


@dataclass(frozen=True)
class Steps:
    """A context of one vector of covariates a site, known in advance: ``context=Steps(C)`` expects (*batch, T, C).

    Example:
        >>> Steps(3)
        Steps(features=3)
    """

    features: int

    def __post_init__(self) -> None:
        check_sizes(1, features=self.features)

    def __str__(self) -> str:
        return f"Steps({self.features})"


@dataclass(frozen=True)
class Source:
    """A context that is a sequence of its own, of any length S: ``context=Source(C)`` expects (*batch, S, C).

    Conditioners read it by attention. Sources of several lengths are padded to one tensor; distributions and their modules
    take the lengths as ``source_lengths``, conditioners take both as :class:`Padded`.

    Example:
        >>> Source(3)
        Source(features=3)
    """

    features: int

    def __post_init__(self) -> None:
        check_sizes(1, features=self.features)

    def __str__(self) -> str:
        return f"Source({self.features})"


class Padded(NamedTuple):
    """Sequences of several lengths, padded to one tensor.

    Attributes:
        values: (*batch, S, C); what stands from a row's length on is never read.
        lengths: (*batch) integers 0 ... S.
    """

    values: Tensor
    lengths: Tensor


def check_context(module: Any, context: Any) -> None:
    """Raises a ValueError unless the context is what the module was built for, in width, dtype and device."""
    name, width, sites = type(module).__name__, module.context, ""
    if isinstance(width, Source) and isinstance(context, Padded):
        context = context.values
    if isinstance(width, (Steps, Source)):
        width, sites = width.features, "T, " if isinstance(width, Steps) else "S, "
    if (context is None) != (width == 0):
        expected = f"a context (*batch, {sites}{width})" if width else "no context"
        got = "none" if context is None else f"one of shape {tuple(getattr(context, 'shape', ()))}"
        raise ValueError(f"Expected {expected} ({name} built with context={module.context}); got {got}.")
    if context is None:
        return
    if not isinstance(context, Tensor):
        raise TypeError(f"Expected context to be a tensor; got {type(context).__name__}.")
    if context.dim() < (2 if sites else 1) or context.shape[-1] != width:
        raise ValueError(
            f"Expected context.shape[-1] == {width} ({name} built with context={module.context}); got {tuple(context.shape)}."
        )
    check_like("context", context, next((p for p in module.parameters() if p.is_floating_point()), context))


def checked_source(module: Any, context: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The lengths of sources (*batch, S, C); a ValueError where the module reads none, or outside 0 ... S."""
    if lengths is None:
        return None
    if not isinstance(module.context, Source) or context is None:
        raise ValueError(
            f"Expected no source_lengths ({type(module).__name__} built with context={module.context}); got some."
        )
    return checked_lengths(lengths, context.shape[-2], "source_lengths", "steps of the source")
