"""Checks of heads that are arguments of other heads and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from ..base import Head
from ..core.checks import check_kind
from ..core.devices import zeros_for


def check_distribution_head(head: Any) -> Any:
    """Checks that a head is a head of distributions, and returns its distribution at phi = 0 for one row and site.

    Raises:
        TypeError: if it is not a head of distributions.
    """
    check_kind("head", head, Head)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a model within the head may draw a random order
        made = head(zeros_for(head, 1, head.num_sites or 1, head.num_params))
    if not isinstance(made, Distribution):
        raise TypeError(
            f"Expected a head of distributions; got {type(head).__name__}, which returns {type(made).__name__}."
        )
    return made


def checked_heads(name: str, heads: Any) -> list[Head]:
    """Returns one or more heads of distributions as a list, after checking that they have the same site_shape.

    Raises:
        TypeError: if ``heads`` is not a sequence of heads of distributions.
        ValueError: if there are no heads, or their site shapes differ.
    """
    if not isinstance(heads, (Sequence, nn.ModuleList)):
        raise TypeError(f"Expected {name} to be a sequence of heads; got {type(heads).__name__}.")
    if not heads:
        raise ValueError(f"Expected {name} to hold at least one head; got none.")
    for h in heads:
        if not isinstance(h, Head):
            raise TypeError(f"Expected {name} to be of class Head; got {type(h).__name__}.")
        if h.site_shape != heads[0].site_shape:
            raise ValueError(
                f"Expected heads in {name} with equal site_shape; got {heads[0].site_shape} and {h.site_shape}."
            )
    for h in dict.fromkeys(heads):
        check_distribution_head(h)
    return list(heads)
