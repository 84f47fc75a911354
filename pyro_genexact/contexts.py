"""The contexts of conditioners: one vector, one vector per site, or a sequence of its own; and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .core.checks import check_like, check_sizes
from .core.lengths import checked_lengths
from .core.precision import widened


@dataclass(frozen=True)
class Features:
    """A context of one vector for the whole event, (*batch, C): what ``context=C`` means, with 0 for no context.

    Attributes:
        features: C.
        dims: of the tensor after its batch dims.
        axis: what the first of two dims counts: T sites or S steps.
        by_site: whether every site has a vector of its own.
        joined: the features joined to the input of every site.
        attended: the features of a step that sites attend to.
    """

    features: int
    dims: ClassVar[int] = 1
    axis: ClassVar[str] = ""
    by_site: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(1 if self.axis else 0, features=self.features)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.features})" if self.axis else str(self.features)

    @property
    def joined(self) -> int:
        return self.features

    @property
    def attended(self) -> int:
        return 0


class Covariates(Features):
    """A context of one vector of covariates per site, known in advance: ``context=Covariates(C)`` expects (*batch, T, C).

    Example:
        >>> Covariates(3)
        Covariates(features=3)
    """

    dims, axis, by_site = 2, "T, ", True


class Source(Features):
    """A context that is a sequence of its own, of any length S: ``context=Source(C)`` expects (*batch, S, C).

    Conditioners read it by attention. Sources of several lengths are padded to one tensor; distributions and their modules
    take the lengths as ``source_lengths``, conditioners take both as :class:`PaddedSequence`.

    Example:
        >>> Source(3)
        Source(features=3)
    """

    dims, axis = 2, "S, "

    @property
    def joined(self) -> int:
        return 0

    @property
    def attended(self) -> int:
        return self.features


def kind_of(context: Any, *allowed: type[Features]) -> Features:
    """What a network's ``context`` means; a ValueError unless it is a size, or of one of the allowed kinds."""
    if type(context) is int and context >= 0:
        return _of_size(context)
    if isinstance(context, allowed or Features):
        return context
    check_sizes(0, context=context)
    return Features(context)


_of_size = cache(Features)


class PaddedSequence(NamedTuple):
    """Sequences of several lengths, padded to one tensor.

    Attributes:
        values: (*batch, S, C); what stands from a row's length on is never read.
        lengths: (*batch) integers 0 ... S.
    """

    values: Tensor
    lengths: Tensor


def unpadded(context: Any) -> tuple[Any, Tensor | None]:
    """The values of a context and, where it is :class:`PaddedSequence`, its lengths."""
    return context if isinstance(context, PaddedSequence) else (context, None)


def check_context(module: Any, context: Any) -> Any:
    """The values of a context; a ValueError unless they are what the module was built for, in width, dtype and device.

    Under autocast narrower values, as an encoder predicts them, are widened.
    """
    if context is None and module.context == 0:
        return None
    name, kind = type(module).__name__, kind_of(module.context)
    if kind.attended:
        context, _ = unpadded(context)
    if (context is None) != (kind.features == 0):
        expected = f"a context (*batch, {kind.axis}{kind.features})" if kind.features else "no context"
        got = "none" if context is None else f"one of shape {tuple(getattr(context, 'shape', ()))}"
        raise ValueError(f"Expected {expected} ({name} built with context={kind}); got {got}.")
    if context is None:
        return None
    if not isinstance(context, Tensor):
        raise TypeError(f"Expected context to be a tensor; got {type(context).__name__}.")
    if context.dim() < kind.dims or context.shape[-1] != kind.features:
        raise ValueError(
            f"Expected context.shape[-1] == {kind.features} ({name} built with context={kind}); got {tuple(context.shape)}."
        )
    like = next((p for p in module.parameters() if p.is_floating_point()), context)
    context = widened(context, like.dtype)
    check_like("context", context, like)
    return context


def checked_source(module: Any, context: Any, lengths: Tensor | None) -> tuple[Any, Tensor | None]:
    """The values of a context and the lengths of its sources, of which a :class:`PaddedSequence` context has its own.

    Raises:
        ValueError: for a context that the module was not built for, lengths given twice, given without sources, or outside 0 ... S.
    """
    _, own = unpadded(context)
    if own is not None and lengths is not None:
        raise ValueError("Expected no source_lengths beside a PaddedSequence context, which has them; got some.")
    values = check_context(module, context)
    lengths = own if lengths is None else lengths
    if lengths is None:
        return values, None
    if not kind_of(module.context).attended:
        raise ValueError(
            f"Expected no source_lengths ({type(module).__name__} built with context={module.context}); got some."
        )
    return values, checked_lengths(lengths, values.shape[-2], "source_lengths", "steps of the source")
