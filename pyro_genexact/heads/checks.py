"""Checks of the heads that other heads and models are made of."""

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
    """Raises a TypeError for what is no head of distributions; returns the one at phi = 0, of one row and site."""
    check_kind("head", head, Head)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a model within a head may draw an order
        made = head(zeros_for(head, 1, head.num_sites or 1, head.num_params))
    if not isinstance(made, Distribution):
        raise TypeError(
            f"Expected a head of distributions; got {type(head).__name__}, which makes {type(made).__name__}."
        )
    return made


def checked_heads(name: str, heads: Any) -> list[Head]:
    """One or more heads of distributions, of one site_shape, as a list; raises for anything else."""
    if not isinstance(heads, (Sequence, nn.ModuleList)):
        raise TypeError(f"Expected {name} to be a sequence of heads; got {type(heads).__name__}.")
    if not heads:
        raise ValueError(f"Expected {name} to hold at least one head; got none.")
    for h in heads:
        if not isinstance(h, Head):
            raise TypeError(f"Expected {name} to be of class Head; got {type(h).__name__}.")
        if h.site_shape != heads[0].site_shape:
            raise ValueError(f"Expected {name} of one site_shape; got {heads[0].site_shape} and {h.site_shape}.")
    for h in dict.fromkeys(heads):
        check_distribution_head(h)
    return list(heads)
