"""Estimates of the inverse of a negative Hessian from the steps of a path: dense (BFGS), and of limited memory (L-BFGS)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .low_rank import LowRankAffine

CURVED = 1e-8  # minimum cosine of the angle between a step and the change of the gradient
MEMORY = 10  # pairs of steps and changes in the limited form


def is_curved(step: Tensor, change: Tensor) -> bool:
    """Returns whether the curvature along a step is positive; ``change`` is the decrease of the gradient."""
    return bool((step @ change).item() > CURVED * step.norm().item() * change.norm().item())


def dense(inverse: Tensor | None, step: Tensor, change: Tensor) -> Tensor | None:
    """Returns the BFGS update of an estimate (D, D) of the inverse of a negative Hessian, None for none so far.

    Args:
        inverse: the estimate.
        step: s (D,).
        change: y (D,), the decrease of the gradient along the step. Without positive curvature s'y, nothing changes.
    """
    if not is_curved(step, change):
        return inverse
    sy = (step @ change).item()
    if inverse is None:
        inverse = torch.eye(len(step), dtype=step.dtype, device=step.device) * (sy / (change @ change).item())
    hy = inverse @ change
    cross = torch.outer(hy, step)
    return inverse + (1 + (change @ hy) / sy) / sy * torch.outer(step, step) - (cross + cross.mT) / sy


class Limited(NamedTuple):
    """The estimate of L-BFGS: a diagonal matrix with the BFGS updates of the last steps.

    Attributes:
        diagonal: (D,).
        steps: S (D, J).
        changes: Y (D, J), the decreases of the gradients.
    """

    diagonal: Tensor
    steps: Tensor
    changes: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns B (D, 2J) and the symmetric C (2J, 2J) of the matrix, which is the diagonal + B C B'.

        Reference: Byrd, Nocedal, Schnabel, "Representations of quasi-Newton matrices and their use in limited memory
        methods", Mathematical Programming 1994, theorem 2.2.
        """
        products = self.steps.mT @ self.changes
        inverse = torch.linalg.inv(products.triu())
        scaled = self.diagonal[:, None] * self.changes
        inner = products.diagonal().diag() + self.changes.mT @ scaled
        last = torch.cat([-inverse.mT, inverse.mT @ inner @ inverse], 1)
        return torch.cat([scaled, self.steps], 1), torch.cat([torch.cat([0 * inverse, -inverse], 1), last])

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Returns the product with a vector (D,)."""
        outer, inner = self.factors()
        return self.diagonal * vector + outer @ (inner @ (outer.mT @ vector))

    def root(self, mean: Tensor) -> LowRankAffine:
        """Returns the map of noise whose covariance is the matrix. Cost: O(D J^2)."""
        outer, inner = self.factors()
        q, r = torch.linalg.qr(outer / self.diagonal.sqrt()[:, None])
        values, vectors = torch.linalg.eigh(
            (torch.eye(len(r), dtype=r.dtype, device=r.device) + r @ inner @ r.mT).nan_to_num()
        )
        return LowRankAffine(mean, self.diagonal.sqrt(), q @ vectors, values.sqrt())


def limited(inverse: Limited | None, step: Tensor, change: Tensor) -> Limited | None:
    """Returns the update of an estimate by a step; arguments as in :func:`dense`.

    The estimate is that of :func:`dense` as long as no pair has left the memory. When a pair leaves it, the diagonal
    becomes that of the BFGS update of the diagonal by this pair. (The diagonal of Pathfinder's paper also takes its
    scale from the last pair; a step along one flat direction then makes all variances too large.)
    """
    if not is_curved(step, change):
        return inverse
    if inverse is None:
        empty = step.new_zeros(len(step), 0)
        inverse = Limited(torch.ones_like(step) * ((step @ change) / (change @ change)), empty, empty)
    diagonal, steps, changes = inverse
    if steps.shape[1] == MEMORY:
        s, y = steps[:, 0], changes[:, 0]
        diagonal = diagonal + (1 + (y * diagonal) @ y / (s @ y)) / (s @ y) * s.square() - 2 * diagonal * y * s / (s @ y)
        steps, changes = steps[:, 1:], changes[:, 1:]
    return Limited(diagonal, torch.cat([steps, step[:, None]], 1), torch.cat([changes, change[:, None]], 1))
