"""Products and solutions with matrices that many vectors share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import at_hand


def by_columns(function: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, x: Tensor) -> Tensor:
    """Applies ``function(matrix, columns)``, a product or a solution, to the vectors x (*sample, *batch, n).

    The sample dims, and batch dims along which the matrix (*batch, n, n) is expanded, become columns. Otherwise torch
    would copy the matrix for each vector.

    Example:
        >>> import torch
        >>> by_columns(torch.matmul, 2 * torch.eye(2).expand(3, 2, 2), torch.ones(4, 3, 2)).shape
        torch.Size([4, 3, 2])
    """
    while matrix.dim() > 2 and matrix.shape[0] and not matrix.stride(0):
        matrix = matrix[0]
    more = x.dim() + 1 - matrix.dim()
    columns = x.reshape(x.shape[:more].numel(), *x.shape[more:]).movedim(0, -1)
    return function(matrix, columns).movedim(-1, 0).reshape(x.shape)


def taken(x: Tensor, dim: int, places: list[int]) -> Tensor:
    """Returns ``x.index_select(dim, places)``; on a device without a copy of the places, which would wait."""
    if at_hand(x):
        return x.index_select(dim, torch.tensor(places, device="cpu"))
    starts = [i for i, place in enumerate(places) if not i or place != places[i - 1] + 1]
    runs = zip(starts, [*starts[1:], len(places)], strict=True)
    return torch.cat([x.narrow(dim, places[start], stop - start) for start, stop in runs], dim)


def solve_lower(matrix: Tensor, x: Tensor) -> Tensor:
    """Solves matrix @ y = x in float64, for a lower triangular matrix."""
    return torch.linalg.solve_triangular(matrix.double(), x, upper=False)
