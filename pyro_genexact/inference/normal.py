"""A multivariate normal distribution and a mixture of these, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """A multivariate normal distribution with mean (D,) and a lower triangular root (D, D) of the covariance."""

    mean: Tensor
    root: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def dense(self) -> Normal:
        """Returns the distribution itself."""
        return self

    def at(self, noise: Tensor) -> Tensor:
        """Returns mean + root noise, (S, D)."""
        return self.mean + noise @ self.root.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log densities (S,) at points (S, D)."""
        noise = torch.linalg.solve_triangular(self.root, (z - self.mean).mT, upper=False)
        return self.log_prob_at(noise.mT)

    def log_prob_at(self, noise: Tensor) -> Tensor:
        """Returns log densities (S,) at mean + root noise."""
        constant = len(self.mean) * math.log(2 * math.pi) / 2 + self.root.diagonal().log().sum()
        return -noise.square().sum(1) / 2 - constant


class Pushed(NamedTuple):
    """The distribution of an affine transform of D standard normal numbers."""

    transform: Any

    @property
    def dim(self) -> int:
        """D."""
        return len(self.transform.loc)

    def dense(self) -> Normal:
        """Returns the distribution with a triangular root (D, D)."""
        return Normal(self.transform.loc, self.transform.lower())

    def at(self, noise: Tensor) -> Tensor:
        """Returns the transform of the noise, (S, D)."""
        return self.transform(noise)  # type: ignore[no-any-return]

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log densities (S,) at points (S, D)."""
        return self.log_prob_at(self.transform.inv(z))

    def log_prob_at(self, noise: Tensor) -> Tensor:
        """Returns log densities (S,) at the transform of the noise."""
        ladj = self.transform.log_abs_det_jacobian(noise, noise)
        return -noise.square().sum(1) / 2 - noise.shape[1] * math.log(2 * math.pi) / 2 - ladj  # type: ignore[no-any-return]


class Normals:
    """A mixture of multivariate normal distributions with equal weights."""

    def __init__(self, parts: Sequence[Normal | Pushed]) -> None:
        self.parts = parts

    def sample(self, size: int) -> Tensor:
        """Returns draws (S, D), as many of each component, up to rounding."""
        sizes = [len(range(k, size, len(self.parts))) for k in range(len(self.parts))]
        noise = torch.randn(size, self.parts[0].dim, dtype=torch.float64, device="cpu")
        return torch.cat([part.at(x) for part, x in zip(self.parts, noise.split(sizes), strict=True)])

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log densities (S,) at points (S, D)."""
        return torch.stack([part.log_prob(z) for part in self.parts]).logsumexp(0) - math.log(len(self.parts))
