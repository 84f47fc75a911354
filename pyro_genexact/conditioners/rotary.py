"""Rotary position embeddings of a sequence, or of the rows and columns of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_widths

Grid = tuple[int, int] | None  # rows and columns; None for a sequence


def checked_grid(grid: tuple[int, int], max_len: int | None) -> tuple[int, int]:
    """Returns the rows and columns; raises a ValueError unless these are two positive integers, without ``max_len``."""
    check_widths(1, grid=grid)
    if len(grid) != 2:
        raise ValueError(f"Expected grid == (H, W) (rows and columns of the sites); got {tuple(grid)}.")
    if max_len is not None:
        raise ValueError(f"Expected max_len=None (a grid has H * W sites); got {max_len}.")
    return grid[0], grid[1]


def speeds(size: int, grid: Grid, like: Tensor) -> Tensor:
    """Returns the angles per position (3, 1, size / 2) of queries, keys and values of ``size`` numbers.

    Values do not turn. The first half of the angles of a grid is per row, and the second half per column. Its slowest
    angle is larger, because images have fewer rows than sequences have sites.
    """
    kind = torch.promote_types(like.dtype, torch.float32)
    if grid is None:
        speed = 1e4 ** (torch.arange(0, size, 2, dtype=kind, device=like.device) / -size)
    else:
        speed = (1e2 ** (torch.arange(0, size, 4, dtype=kind, device=like.device) / -size)).repeat(2)
    return torch.stack([speed, speed, torch.zeros_like(speed)]).unsqueeze(1)


def turns(speed: Tensor, first: int, sites: int, grid: Grid) -> Tensor:
    """Returns the rotations (S, 3, 1, size / 2), complex numbers of modulus 1, of S sites, the first at ``first``."""
    places = torch.arange(first, first + sites, dtype=speed.dtype, device=speed.device)[:, None, None, None]
    if grid is not None:
        row = (places / grid[1]).floor()
        places = torch.cat([row, places - grid[1] * row], -1).repeat_interleave(speed.shape[-1] // 2, -1)
    return torch.polar(speed.new_ones(()), places * speed)
