"""Affine maps of many numbers: a scale of each number, and a stretch along few directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ..core.independent import REAL_VECTOR
from ..core.precision import full_precision
from ..transforms.base import PlainTransform


class LowRankAffine(PlainTransform):
    """The affine map y = loc + scale (x + U (stretch - 1) U' x), with orthonormal columns of U.

    The covariance of y is that of a diagonal matrix and one of rank r, if x is standard normal.

    Cost: O(D r) in both directions.

    Args:
        loc: (D,).
        scale: (D,), positive.
        basis: U (D, r).
        stretch: (r,), positive.
    """

    domain = codomain = REAL_VECTOR
    sign = 1

    def __init__(self, loc: Tensor, scale: Tensor, basis: Tensor, stretch: Tensor) -> None:
        super().__init__()
        self.loc, self.scale, self.basis, self.stretch = loc, scale, basis, stretch

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.scale * self._stretched(x, self.stretch)

    @full_precision
    def _inverse(self, y: Tensor) -> Tensor:
        return self._stretched((y - self.loc) / self.scale, 1 / self.stretch)

    def _stretched(self, x: Tensor, stretch: Tensor) -> Tensor:
        return x + ((x @ self.basis) * (stretch - 1)) @ self.basis.mT

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the logarithms of scale and stretch."""
        return (self.scale.log().sum() + self.stretch.log().sum()).expand(y.shape[:-1])

    def lower(self) -> Tensor:
        """Returns the lower triangular root (D, D) of the covariance of y. Cost: O(D^3)."""
        root = self(torch.eye(len(self.loc)).to(self.loc)) - self.loc  # its transpose
        r = torch.linalg.qr(root).R
        return r.mT * r.diagonal().sign()


class LowRank(nn.Module):
    """A module whose call returns a learned :class:`LowRankAffine` map, loc + scale (x + U (stretch - 1) U' x).

    U are the orthonormal columns of a learned matrix, by a QR decomposition. ``center`` and ``spread`` are fixed, and
    standardise the latents.

    Cost: O(D r^2) per call for the QR decomposition.

    Args:
        center: (D,), the initial location.
        scale: initial scale of each number.
        rank: r, the number of columns of U, at most D.

    Raises:
        ValueError: if ``rank`` is above D.
    """

    context = 0
    center: Tensor
    spread: Tensor

    def __init__(self, center: Tensor, scale: float, rank: int) -> None:
        super().__init__()
        if rank > len(center):
            raise ValueError(f"Expected rank <= {len(center)}, the number of unconstrained latents; got {rank}.")
        self.register_buffer("center", center.detach().clone())
        self.register_buffer("spread", torch.ones_like(center))
        self.loc = nn.Parameter(torch.zeros_like(self.center))
        self.log_scale = nn.Parameter(torch.full_like(self.center, math.log(scale)))
        self.basis = nn.Parameter(torch.randn(len(center), rank).to(center))
        self.log_stretch = nn.Parameter(torch.zeros(rank).to(center))

    @torch.no_grad()
    def put(self, map: LowRankAffine) -> None:
        """Sets the map to another one, or to its strongest r directions if it has more; further columns of U are random."""
        rank, size = len(self.log_stretch), len(self.center)
        self.center.copy_(map.loc)
        self.spread.copy_(map.scale)
        for weight in (self.loc, self.log_scale, self.log_stretch):
            weight.zero_()
        strength = map.stretch.log()
        kept = strength.abs().topk(min(rank, len(strength))).indices
        self.log_stretch[: len(kept)] = strength[kept].to(self.log_stretch)
        # all elements have a size of about 1, which the steps of Adam fit
        found = map.basis[:, kept].to(self.basis) * math.sqrt(size)
        self.basis.copy_(torch.cat([found, torch.randn_like(self.basis[:, len(kept) :])], 1))

    def forward(self) -> Transform:
        scale = self.spread * self.log_scale.exp()
        basis = torch.linalg.qr(self.basis).Q
        return LowRankAffine(self.center + self.spread * self.loc, scale, basis, self.log_stretch.exp())
