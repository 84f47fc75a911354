"""Padding of label sequences: masks of sites after a row's length, and reversal within lengths."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..core.lengths import expand_mask, site_mask


def padding_mask(lengths: Tensor | None, sites: int) -> Tensor | None:
    """Returns the mask (*lengths, N) of padding; None without lengths."""
    return None if lengths is None else ~site_mask(lengths, sites)


def mask_padding(padding: Tensor | None, values: Tensor, first: int = 0, fill: float = 0.0) -> Tensor:
    """Replaces values (*, N - first, ...) of the sites from ``first`` on by ``fill`` at padding (*, N)."""
    return values if padding is None else values.masked_fill(expand_mask(padding[..., first:], values), fill)


def without_padding(backward: list[Tensor], lengths: Tensor | None) -> Tensor:
    """Stacks labels, given from the last site to the first, to (*, N), with 0 at padding."""
    labels = torch.stack(backward[::-1]).movedim(0, -1).contiguous()  # faster than to stack along the last dim
    padding = padding_mask(lengths, len(backward))
    return labels if padding is None else labels.masked_fill(padding, 0)


def flip_within_lengths(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses values (*, N, V) within the length (*) of each row; padding stays at the end, in some order."""
    if lengths is None:
        return values.flip(-2)
    *batch, sites, size = values.shape
    backward = (lengths.unsqueeze(-1) - 1 - torch.arange(sites, device=values.device)) % sites
    first = torch.arange(0, prod(batch) * sites, sites, device=values.device).reshape(*batch, 1)
    return values.reshape(-1, size).index_select(0, (first + backward).flatten()).reshape(values.shape)
