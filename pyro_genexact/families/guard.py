"""log_prob that is -inf outside the support, whatever the family does there."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from ..core.functional import transformed
from ..core.leaves import tensors_in
from ..core.settable import Settable
from ..core.values import checked_value, floating


def guarded_log_prob(d: Distribution, value: Tensor, support: Any = None) -> Tensor:
    """log_prob (of the broadcast batch shape), -inf with gradient zero where the value lies outside the support.

    The family itself only ever meets values inside: outside, its :func:`anchor` stands in.
    """
    support = d.support if support is None else support
    inside = contains(support, value)
    log_prob = d.log_prob(torch.where(_wide(inside, d.event_shape), value, anchor(support, value)))
    return torch.where(inside, log_prob, -torch.inf)


def guarded(d: Any, support: Any) -> Any:
    """The distribution d, of a subclass of its family whose support is the given one: outside, log_prob is -inf or raises.

    Validation is what it is elsewhere, on unless switched off, whatever d was made with.
    """
    if getattr(d, "_unguarded", None) is not None:  # a model within a head has guarded it
        d, _ = d._unguarded
    new = copy.copy(d)
    part = new
    while hasattr(part, "base_dist"):
        part.base_dist = part = copy.copy(part.base_dist)
        part.__dict__.pop("_validate_args", None)
    new.__dict__.pop("_validate_args", None)
    family: Any = type(d)
    new.__class__, new._unguarded = _guarded_class(family), (d, support)
    return new


@cache
def _guarded_class(family: Any) -> Any:
    known = {}
    for name in ("is_discrete", "event_dim"):  # the same for all of the family, where the class has it
        with suppress(NotImplementedError, AttributeError):
            known[name] = getattr(family.support, name)

    def support(self: Any) -> Any:
        return super(guard, self).support if self._unguarded is None else self._unguarded[1]

    fields = {"__module__": family.__module__, "support": constraints.dependent_property(support, **known)}
    guard = type(family)(family.__name__, (_Guarded, family), fields)
    return guard


class _Guarded:
    _unguarded: tuple[Any, Any] | None = None  # none where Pyro made another one of the class from parameters
    _validate_args: bool

    @Settable
    def has_rsample(self) -> bool:
        return super().has_rsample  # type: ignore[misc, no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._unguarded is None:
            return super().log_prob(value)  # type: ignore[misc]
        d, support = self._unguarded
        value = checked_value(self, value)
        if not value.is_floating_point():  # else the tensors need not be searched for
            value = floating(value, tensors_in(d))
        return guarded_log_prob(d, value, support)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if self._unguarded is None:
            return super().expand(batch_shape, _instance)  # type: ignore[misc]
        d, support = self._unguarded
        new = guarded(d.expand(torch.Size(batch_shape)), support)
        new.__dict__.update(self._settings())
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (
            super().__reduce_ex__(protocol) if self._unguarded is None else (guarded, self._unguarded, self._settings())
        )

    def _settings(self) -> dict[str, Any]:
        """What was set after :func:`guarded` made this."""
        return {name: value for name, value in self.__dict__.items() if name in ("_validate_args", "has_rsample")}


def contains(support: Any, value: Tensor) -> Tensor:
    """Whether values are finite and inside the support, of their shape without its event dims."""
    inside = support.check(value)
    if value.is_floating_point() and not support.is_discrete:  # torch's constraints.real admits infinities
        finite = value.isfinite()
        inside = inside & (finite.flatten(-support.event_dim).all(-1) if support.event_dim else finite)
    return inside


def surely_inside(support: Any, value: Tensor) -> bool:
    """Whether all values are inside, where that is at hand: on an accelerator the wait would cost more than to mask."""
    if value.device.type != "cpu" or transformed():
        return False
    if type(support) is type(constraints.boolean):
        return torch.equal(value, value.bool().to(value.dtype))  # half the time of the check
    return bool(contains(support, value).all())


def anchor(support: Any, like: Tensor) -> Tensor:
    """Some value inside the support, that broadcasts with ``like``."""
    event = like.shape[like.dim() - support.event_dim :]
    if hasattr(support, "anchor"):
        return support.anchor(like)
    if isinstance(support, constraints.cat):
        parts = zip(support.cseq, like.split(support.lengths, support.dim), strict=True)
        return torch.cat([anchor(part, values).expand_as(values) for part, values in parts], support.dim)
    if hasattr(support, "base_constraint"):  # independent, or torch's of mixtures
        return anchor(support.base_constraint, like)
    if type(support) is type(constraints.boolean):  # copies and pickles are other objects
        return like.new_zeros(())
    for bound in ("lower_bound", "upper_bound"):
        if support.is_discrete and support.event_dim == 0 and hasattr(support, bound):
            return torch.as_tensor(getattr(support, bound), dtype=like.dtype, device=like.device)
    if support.is_discrete and support.event_dim == 1:  # one-hot or counts: all in the first place
        total = torch.as_tensor(getattr(support, "upper_bound", 1), dtype=like.dtype, device=like.device)
        return total.unsqueeze(-1) * (torch.arange(event[0], device=like.device) == 0)
    to_support = biject_to(support)
    return to_support(like.new_zeros(to_support.inverse_shape(event)))


def _wide(inside: Tensor, event_shape: torch.Size) -> Tensor:
    return inside.reshape(inside.shape + (1,) * len(event_shape))
