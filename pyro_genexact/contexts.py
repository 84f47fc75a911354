"""The kinds of contexts of conditioners (one vector, one vector per site, a source sequence) and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .core.checks import check_like, check_sizes
from .core.compiling import cached
from .core.leaves import parameters_of
from .core.lengths import checked_lengths
from .core.precision import widened


@dataclass(frozen=True)
class Features:
    """A context of one vector (*batch, C) for the whole event, as ``context=C`` specifies; 0 means no context.

    Attributes:
        features: C, the number of features.
        dims: the number of dims after the batch dims.
        axis: the symbol of the first of two dims: T for sites, S for steps of a source.
        by_site: whether every site has its own vector.
        joined: the number of features that are concatenated to the input of every site.
        attended: the number of features of each step that sites attend to.
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
    """A context of one vector of covariates per site, known in advance.

    A network with ``context=Covariates(C)`` expects a context of shape (*batch, T, C).

    Args:
        features: C, at least 1.

    Raises:
        ValueError: if ``features`` is not a positive integer.

    Example:
        >>> Covariates(3)
        Covariates(features=3)
    """

    dims, axis, by_site = 2, "T, ", True


class Source(Features):
    """A context that is itself a sequence, of any length S.

    A network with ``context=Source(C)`` expects a context of shape (*batch, S, C) and reads it by attention. Sources of
    different lengths are padded to one tensor. Distributions and their modules take the lengths as ``source_lengths``;
    conditioners take the tensor and the lengths together as a :class:`PaddedSequence`.

    Args:
        features: C, at least 1.

    Raises:
        ValueError: if ``features`` is not a positive integer.

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
    """Returns the kind of context that a network's argument ``context`` specifies.

    Raises:
        ValueError: if it is neither a size nor one of the allowed kinds.
    """
    if type(context) is int and context >= 0:
        return _of_size(context)
    if isinstance(context, allowed or Features):
        return context
    check_sizes(0, context=context)
    return Features(context)


@cached
def _of_size(features: int) -> Features:
    return Features(features)


class PaddedSequence(NamedTuple):
    """Sequences of different lengths, padded to one tensor.

    Attributes:
        values: (*batch, S, C); entries beyond a row's length are never read.
        lengths: (*batch) integers between 0 and S.

    Example:
        >>> import torch
        >>> PaddedSequence(torch.zeros(2, 5, 3), torch.tensor([5, 2])).values.shape
        torch.Size([2, 5, 3])
    """

    values: Tensor
    lengths: Tensor


def unpadded(context: Any) -> tuple[Any, Tensor | None]:
    """Returns the values of a context and, if it is a :class:`PaddedSequence`, its lengths, else None."""
    return context if isinstance(context, PaddedSequence) else (context, None)


def padded(values: Any, lengths: Tensor | None) -> Any:
    """Returns the values of a context as a :class:`PaddedSequence` if there are lengths; inverts :func:`unpadded`."""
    return values if lengths is None else PaddedSequence(values, lengths)


def check_context(module: Any, context: Any) -> Any:
    """Returns the values of a context after checking its width, dtype and device against the module.

    Under autocast, values of lower precision, such as the output of an encoder, are converted to the module's dtype.

    Raises:
        TypeError: if the context is not a tensor.
        ValueError: if the module was built for another context.
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
    like = next((p for p in parameters_of(module) if p.is_floating_point()), context)
    context = widened(context, like.dtype)
    check_like("context", context, like)
    return context


def checked_source(module: Any, context: Any, lengths: Tensor | None) -> tuple[Any, Tensor | None]:
    """Returns the values of a context and the lengths of its sources, after checking both.

    The lengths are those of a :class:`PaddedSequence` context or the argument ``lengths``.

    Raises:
        ValueError: if the module was built for another context, or if lengths are given twice, without a source, or
            outside 0 ... S.
    """
    _, own = unpadded(context)
    if own is not None and lengths is not None:
        raise ValueError("Expected no source_lengths with a PaddedSequence context, which contains them; got both.")
    values = check_context(module, context)
    lengths = own if lengths is None else lengths
    if lengths is None:
        return values, None
    if not kind_of(module.context).attended:
        raise ValueError(
            f"Expected no source_lengths ({type(module).__name__} built with context={module.context}); "
            f"got lengths of shape {tuple(getattr(lengths, 'shape', ()))}."
        )
    return values, checked_lengths(lengths, values.shape[-2], "source_lengths", "steps of the source")
