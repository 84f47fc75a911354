"""Functions of a support: log_prob of -inf outside, membership, a feasible point, the bounds."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from ..core.compiling import classes, dispatched
from ..core.functional import at_hand
from ..core.leaves import tensors_in
from ..core.settable import Settable
from ..core.values import checked_value, filled_like, floating


def log_prob_everywhere(d: Distribution, value: Tensor, support: Any = None) -> Tensor:
    """Returns the log_prob (of the broadcast batch shape), -inf with gradient zero outside the support.

    The family's own method is only evaluated inside the support; values outside are replaced by :func:`feasible_point`.
    """
    support = d.support if support is None else support
    inside = contains(support, value)
    log_prob = d.log_prob(torch.where(expand_mask(inside, d.event_shape), value, feasible_point(support, value)))
    return torch.where(inside, log_prob, -torch.inf)


def with_support(d: Any, support: Any) -> Any:
    """Returns the distribution with another support, as an instance of a subclass of its family.

    Outside the support ``log_prob`` is -inf, or raises if values are validated. Validation follows the global default,
    regardless of the setting of d.
    """
    if getattr(d, "_supported", None) is not None:  # already replaced, as by a model within a head
        d, _ = d._supported
    new = _unvalidated(_class_with_support(type(d)), d)
    part, new._supported = new, (d, support)
    while hasattr(part, "base_dist"):
        part.base_dist = part = _unvalidated(type(part.base_dist), part.base_dist)
    return new


def _unvalidated(family: Any, d: Any) -> Any:
    """Returns a shallow copy as an instance of the family, whose validation follows the global default."""
    new = object.__new__(family)
    new.__dict__.update({name: part for name, part in d.__dict__.items() if name != "_validate_args"})
    return new


@classes
def _class_with_support(family: Any) -> Any:
    fixed = {}
    for name in ("is_discrete", "event_dim"):  # class attributes, if the support of the class defines them
        with suppress(NotImplementedError, AttributeError):
            fixed[name] = getattr(family.support, name)

    def support(self: Any) -> Any:
        return super(made, self).support if self._supported is None else self._supported[1]

    fields = {"__module__": family.__module__, "support": constraints.dependent_property(support, **fixed)}
    made = type(family)(family.__name__, (_WithSupport, family), fields)
    return made


class _WithSupport:
    _supported: tuple[Any, Any] | None = None  # None if Pyro constructed the instance from parameters
    _validate_args: bool

    @Settable
    def has_rsample(self) -> bool:
        return super().has_rsample  # type: ignore[misc, no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._supported is None:
            return super().log_prob(value)  # type: ignore[misc]
        d, support = self._supported
        value = checked_value(self, value)
        if not value.is_floating_point():  # saves the search for tensors otherwise
            value = floating(value, tensors_in(d))
        return log_prob_everywhere(d, value, support)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if self._supported is None:
            return super().expand(batch_shape, _instance)  # type: ignore[misc]
        d, support = self._supported
        new = with_support(d.expand(torch.Size(batch_shape)), support)
        new.__dict__.update(self._settings())
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._supported is None:
            return super().__reduce_ex__(protocol)
        return with_support, self._supported, self._settings()

    def _settings(self) -> dict[str, Any]:
        """Returns the attributes that were set after :func:`with_support` created this instance."""
        return {name: value for name, value in self.__dict__.items() if name in ("_validate_args", "has_rsample")}


def contains(support: Any, value: Tensor) -> Tensor:
    """Whether values are finite and inside the support, one Boolean per event."""
    inside = support.check(value)
    if value.is_floating_point() and not support.is_discrete:  # torch's constraints.real admits infinities
        finite = value.isfinite()
        inside = inside & (finite.flatten(-support.event_dim).all(-1) if support.event_dim else finite)
    return inside


def known_to_contain(support: Any, value: Tensor) -> bool:
    """Whether all values are inside the support; False if unknown, or on an accelerator, where reading it is slow."""
    if not at_hand(value):
        return False
    if type(support) is type(constraints.boolean):
        return torch.equal(value, value.bool().to(value.dtype))  # takes half the time of the check
    return bool(contains(support, value).all())


@dispatched
def feasible_point(support: Any, like: Tensor) -> Tensor:
    """Returns a value inside the support that broadcasts with ``like``.

    It comes from a function registered for the class of the constraint, from the constraint's own method of this name,
    or from ``biject_to``.
    """
    if hasattr(support, "feasible_point"):
        return support.feasible_point(like)
    if hasattr(support, "base_constraint"):  # independent constraints, and in newer versions of torch mixtures
        return feasible_point(support.base_constraint, like)
    event = like.shape[like.dim() - support.event_dim :]
    for bound in ("lower_bound", "upper_bound"):
        if support.is_discrete and support.event_dim == 0 and hasattr(support, bound):
            return filled_like(getattr(support, bound), like)
    if support.is_discrete and support.event_dim == 1:  # one-hot or counts: put all counts in the first place
        total = filled_like(getattr(support, "upper_bound", 1), like)
        return total.unsqueeze(-1) * (torch.arange(event[0], device=like.device) == 0)
    to_support = biject_to(support)
    return to_support(like.new_zeros(to_support.inverse_shape(event)))


@feasible_point.register(type(constraints.boolean))
def _(support: Any, like: Tensor) -> Tensor:
    return like.new_zeros(())


@feasible_point.register(constraints.cat)
def _(support: Any, like: Tensor) -> Tensor:
    parts = zip(support.cseq, like.split(support.lengths, support.dim), strict=True)
    return torch.cat([feasible_point(part, values).expand_as(values) for part, values in parts], support.dim)


@dispatched
def support_ends(support: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bounds of a support of numbers, infinite if it is unbounded."""
    ends = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    low, high = (filled_like(end, like) for end in ends)
    return low, high


@support_ends.register(type(constraints.boolean))
def _(support: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_zeros(()), like.new_ones(())


def expand_mask(inside: Tensor, event_shape: torch.Size) -> Tensor:
    """Appends dims of size 1 to a mask (*batch), one per event dim."""
    return inside.reshape(inside.shape + (1,) * len(event_shape))
