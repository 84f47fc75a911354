"""Checks of the heads that other heads and models are made of."""

from __future__ import annotations

from torch.distributions import Distribution

from ..base import Head
from ..core.checks import check_kind
from ..core.devices import zeros_for


def check_distribution_head(head: Head) -> None:
    """Raises a TypeError for a head of something else than distributions."""
    check_kind("head", head, Head)
    made = head(zeros_for(head, 1, head.num_sites or 1, head.num_params))
    if not isinstance(made, Distribution):
        raise TypeError(
            f"Expected a head of distributions; got {type(head).__name__}, which makes {type(made).__name__}."
        )
