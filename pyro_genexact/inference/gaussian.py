"""The last two layers of ``AutoFlow``: sinh-arcsinh tails and an affine map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ..core.independent import REAL_VECTOR
from ..core.precision import full_precision
from ..transforms.base import Chain, PlainTransform


class Gaussian(nn.Module):
    """A module whose call returns the affine map y = center + root (loc + L x).

    L is lower triangular with diagonal exp(log_scale). ``center`` and ``root`` are fixed. With the mean and a root of the
    covariance of an approximate posterior, they standardise the latents, so that all learned weights have similar scales.

    Args:
        center: (D,). The root is the identity at first.
        scale: initial diagonal of L; its other elements and loc are 0 at first.
    """

    context = 0
    center: Tensor
    root: Tensor

    def __init__(self, center: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("center", center.detach().clone())
        self.register_buffer("root", torch.eye(len(center)).to(center))
        self.loc = nn.Parameter(torch.zeros_like(self.center))
        self.log_scale = nn.Parameter(torch.full_like(self.center, math.log(scale)))
        self.lower = nn.Parameter(torch.zeros_like(self.root))

    @torch.no_grad()
    def put(self, center: Tensor, root: Tensor) -> None:
        """Sets center (D,) and root (D, D), which is lower triangular with a positive diagonal; L becomes the identity, loc 0."""
        self.center.copy_(center)
        self.root.copy_(root)
        for weight in self.parameters():
            weight.zero_()

    def forward(self) -> Transform:
        scale = self.log_scale.exp().diag_embed() + self.lower.tril(-1)
        return Chain([CholeskyAffine(self.loc, scale), CholeskyAffine(self.center, self.root)])


class CholeskyAffine(PlainTransform):
    """The affine map y = loc + L x with a lower triangular matrix L that has a positive diagonal."""

    domain = codomain = REAL_VECTOR
    sign = 1

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.loc, self.scale_tril = loc, scale_tril

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        return self.loc + x @ self.scale_tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        z = (y - self.loc).reshape(-1, y.shape[-1])
        return torch.linalg.solve_triangular(self.scale_tril.mT, z, upper=True, left=False).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the logarithms of L's diagonal."""
        return self.scale_tril.diagonal().log().sum().expand(y.shape[:-1])


class Tails(nn.Module):
    """A module whose call returns a :class:`SinhArcsinh` transform of D numbers; it is the identity at first."""

    context = 0

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.skewness = nn.Parameter(torch.zeros_like(like))
        self.log_tail = nn.Parameter(torch.zeros_like(like))

    def forward(self) -> Transform:
        return SinhArcsinh(self.skewness, self.log_tail)


class SinhArcsinh(PlainTransform):
    """The elementwise map y = sinh(exp(log_tail) arcsinh(x) + skewness), which changes the tails and skewness of a normal.

    Reference: Jones, Pewsey, "Sinh-arcsinh distributions", Biometrika 2009.
    """

    domain = codomain = REAL_VECTOR
    sign = 1

    def __init__(self, skewness: Tensor, log_tail: Tensor) -> None:
        super().__init__()
        self.skewness, self.log_tail = skewness, log_tail

    def _call(self, x: Tensor) -> Tensor:
        return torch.sinh(self.log_tail.exp() * torch.asinh(x) + self.skewness)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh(y) - self.skewness) / self.log_tail.exp())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of log_tail + log cosh(arcsinh y) - log cosh(arcsinh x)."""
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return (self.log_tail + torch.hypot(y, one).log() - torch.hypot(x, one).log()).sum(-1)
