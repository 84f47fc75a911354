"""ConvergenceError, and the worst residual that it reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ConvergenceError(RuntimeError):
    """Raised if a root or an integral cannot be computed to the requested accuracy.

    Attributes:
        residual: the largest |f(x) - y|, or the largest estimated error of an integral.
        index: the index of that element, a tuple.
        bracket: the bracket (low, high) of the root, or the bounds of the integral.

    Example:
        >>> import torch
        >>> from pyro_genexact.numerics import root
        >>> root(torch.tanh, torch.tensor([0.5, 2.0]))
        Traceback (most recent call last):
        ...
        pyro_genexact.numerics.ConvergenceError: Expected a root of f(x) = y; got |f(x) - y| = 1 at index (1,), for y = 2 and x between 3.4028235e+38 and inf.
    """

    def __init__(self, message: str, residual: float, index: tuple[int, ...], bracket: tuple[float, float]) -> None:
        super().__init__(message)
        self.residual, self.index, self.bracket = residual, index, bracket

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.residual, self.index, self.bracket)


def worst_of(bad: Tensor, residual: Tensor) -> tuple[tuple[int, ...], float]:
    """Returns the index and the value of the largest residual of the ``bad`` elements; NaN counts as largest."""
    scores = torch.where(bad, residual.nan_to_num(nan=torch.inf), -1.0)
    index = tuple(int(i) for i in torch.unravel_index(scores.argmax(), bad.shape))
    return index, residual[index].item()
