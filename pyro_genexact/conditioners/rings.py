"""Ring buffers, which hold the last n steps of a sequence: step t is at place t modulo n."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.functional import transformed


def shifted(x: Tensor, ring: Tensor, first: int, shift: int) -> Tensor:
    """Returns steps first - shift ... first + S - 1 - shift, (B, S, W), of a sequence.

    Args:
        x: (B, S, W), the steps from ``first`` on.
        ring: (B, n, W), the n steps before.
        first: index of the first step of x.
        shift: from 1 to n.
    """
    size, sites = ring.shape[1], x.shape[1]
    start, kept = (first - shift) % size, min(shift, sites)
    wrapped = start + kept - size
    parts = [ring[:, start : start + kept]]
    if wrapped > 0:
        parts.append(ring[:, :wrapped])
    if kept < sites:
        parts.append(x[:, : sites - kept])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def written(ring: Tensor, x: Tensor, first: int) -> Tensor:
    """Returns the ring after the steps x (B, S, W) from ``first`` on; without grad, the given ring is overwritten."""
    size, sites = ring.shape[1], x.shape[1]
    if not size:
        return ring
    if sites >= size:
        return x[:, sites - size :].roll((first + sites) % size, 1)
    start = first % size
    end = start + sites
    wrapped = max(end - size, 0)  # the number of steps whose places are at the front
    head, tail = x[:, : sites - wrapped], x[:, sites - wrapped :]
    if torch.is_grad_enabled() or transformed():
        return torch.cat([tail, ring[:, wrapped:start], head, ring[:, end:]], 1)
    if ring.is_inference() and not torch.is_inference_mode_enabled():
        ring = ring.clone()
    ring[:, start:end] = head
    ring[:, :wrapped] = tail
    return ring
