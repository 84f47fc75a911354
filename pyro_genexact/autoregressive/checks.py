"""Checks of the arguments of autoregressive distributions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..core.checks import check_kind
from ..core.leaves import tensors_in
from ..families.per_site import PerSiteConstraint


def sites_of(conditioner: Conditioner, head: Head, event_shape: torch.Size, given: int) -> torch.Size:
    """Returns the dims of the event that are sites; raises a ValueError if conditioner, head and event do not match."""
    if conditioner.num_params != head.num_params:
        raise ValueError(
            f"Expected conditioner.num_params == {head.num_params} (num_params of the head); got {conditioner.num_params}."
        )
    site_shape = tuple(head.site_shape)
    cut = len(event_shape) - len(site_shape)
    if cut < 1 or event_shape[cut:] != site_shape:
        raise ValueError(
            f"Expected event_shape == (*sites, {', '.join(map(str, site_shape))}) (the site shape of the head last); "
            f"got {tuple(event_shape)}."
        )
    sites = given + prod(event_shape[:cut])
    if conditioner.num_sites not in (None, sites):
        raise ValueError(
            f"Expected event_shape of {conditioner.num_sites} sites (conditioner.num_sites); got {tuple(event_shape)}, "
            f"which has {sites}."
        )
    if conditioner.max_len is not None and sites > conditioner.max_len:
        raise ValueError(f"Expected at most {conditioner.max_len} sites (conditioner.max_len); got {sites}.")
    if head.num_sites not in (None, sites):
        raise ValueError(f"Expected a head of {sites} sites (sites of the event); got one of {head.num_sites} sites.")
    site = conditioner.site
    if site_shape != (site if isinstance(site, tuple) else ()):
        raise ValueError(f"Expected conditioner.site == {site_shape} (the site shape of the head); got {site}.")
    kinds = site if isinstance(site, list) else [site]
    if any(isinstance(kind, int) for kind in kinds):
        supports = head.support.parts if isinstance(head.support, PerSiteConstraint) else [head.support]
        many = max(len(kinds), len(supports))  # 1 if all sites are of the same kind
        for kind, support in zip(kinds * (many // len(kinds)), supports * (many // len(supports)), strict=True):
            if isinstance(kind, int) and not _is_category(support, kind):
                raise ValueError(
                    f"Expected a head of categories 0 ... {kind - 1} (conditioner.site == {site}); got support {support}."
                )
    return event_shape[:cut]


def _is_category(support: Any, categories: int) -> bool:
    """Returns whether all values of the support are in 0 ... categories - 1."""
    if type(support) is type(constraints.boolean):
        return categories >= 2
    low, high = getattr(support, "lower_bound", -1), getattr(support, "upper_bound", categories)
    return support.is_discrete and support.event_dim == 0 and _holds(low >= 0) and _holds(high < categories)


def _holds(condition: Any) -> bool:
    """Returns whether a condition holds; True for meta tensors, which have no values."""
    return bool(getattr(condition, "is_meta", False) or condition)


def check_uniforms(u: Any) -> None:
    """Raises a TypeError or ValueError if u is not a floating-point tensor of single precision at least."""
    check_kind("u", u, Tensor)
    if not u.is_floating_point():
        raise TypeError(f"Expected u to be a tensor of floating-point numbers; got {u.dtype}.")
    if u.dtype.itemsize < 4:  # half precision rounds most uniforms to another value
        raise ValueError(f"Expected u.dtype to be torch.float32 or torch.float64; got {u.dtype}.")


def check_ends(head: Head, eos: int | None) -> None:
    """Raises a TypeError or ValueError if the head cannot end a sequence."""
    name, support = type(head).__name__, head.support
    if head.num_sites is not None:
        raise ValueError(f"Expected a head that is the same at all sites; got {name}.")
    if head.has_ends:
        if eos is not None:
            raise ValueError(f"Expected eos=None ({name} models the end itself); got {eos}.")
    elif not isinstance(eos, int) or isinstance(eos, bool):
        raise TypeError(f"Expected eos to be an integer ({name} does not model the end); got {eos!r}.")
    elif support.event_dim or not support.is_discrete or not _holds(_within(support, eos)):
        raise ValueError(f"Expected eos within the support of the head, {support}; got {eos}.")
    else:
        for part in head.modules():
            if isinstance(part, Head) and part.eos not in (None, eos):
                name = type(part).__name__
                raise ValueError(f"Expected {name} with eos == {eos} (eos of the sequence); got {part.eos}.")


def _within(support: Any, number: int) -> Tensor:
    bounds = tensors_in(support)
    inside: Tensor = support.check(torch.tensor(number, device=bounds[0].device if bounds else "cpu"))
    return inside


def shape_of_prefix(prefix: Any, site_shape: tuple[int, ...]) -> tuple[torch.Size, int]:
    """Returns the batch shape and the number of sites k of a prefix (*batch, k, *site_shape).

    Raises:
        TypeError: if the prefix is not a tensor.
        ValueError: if it has another shape or no sites.
    """
    check_kind("prefix", prefix, Tensor)
    cut = prefix.dim() - len(site_shape)
    if cut < 1 or tuple(prefix.shape[cut:]) != site_shape:
        raise ValueError(
            f"Expected prefix.shape == ({', '.join(['*batch', 'k', *map(str, site_shape)])}) (k sites of the head); "
            f"got {tuple(prefix.shape)}."
        )
    if not prefix.shape[cut - 1]:
        raise ValueError(f"Expected a prefix of at least one site; got prefix.shape == {tuple(prefix.shape)}.")
    return prefix.shape[: cut - 1], prefix.shape[cut - 1]


def steps_in_order(context: Tensor, order: Tensor | None, given: int, sites: int) -> Tensor:
    """Reorders covariates (*batch, T, C) to visiting order; the first ``given`` ones are already in order."""
    if context.shape[-2] != sites:
        raise ValueError(
            f"Expected context.shape[-2] == {sites} (covariates of all sites); got {tuple(context.shape)}."
        )
    if order is None:
        return context
    return torch.cat([context[..., :given, :], context[..., given:, :].index_select(-2, order.to(context.device))], -2)
