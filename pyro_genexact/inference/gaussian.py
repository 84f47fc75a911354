"""The last layers of AutoFlow: a full-covariance Gaussian (affine map) and sinh-arcsinh tails."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ..core.independent import REAL_VECTOR
from ..core.precision import full_precision
from ..transforms.base import Chain, PlainTransform


class Gaussian(nn.Module):
    """The affine map x -> center + root (loc + L x) as a module: its call returns it.

    L is lower triangular with the diagonal exp(log_scale). Center and root are not learned: where they are a posterior's mean
    and a root of its covariance, the weights are in its units, and an optimiser needs to know nothing of its scales.

    Args:
        center: (D,).
        scale: the diagonal of L at the start; elsewhere it is 0, as loc is, and root is the identity.
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
        """Sets center (D,) and root (D, D), lower triangular with a positive diagonal, and the rest to the identity."""
        self.center.copy_(center)
        self.root.copy_(root)
        for weight in self.parameters():
            weight.zero_()

    def forward(self) -> Transform:
        scale = self.log_scale.exp().diag_embed() + self.lower.tril(-1)
        return Chain([CholeskyAffine(self.loc, scale), CholeskyAffine(self.center, self.root)])


class CholeskyAffine(PlainTransform):
    """y = loc + L x, with L lower triangular and its diagonal positive."""

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
        """The sum of the logarithms of L's diagonal."""
        return self.scale_tril.diagonal().log().sum().expand(y.shape[:-1])


class Tails(nn.Module):
    """:class:`SinhArcsinh` of D numbers, the identity at the start, as a module: its call returns it."""

    context = 0

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.skewness = nn.Parameter(torch.zeros_like(like))
        self.log_tail = nn.Parameter(torch.zeros_like(like))

    def forward(self) -> Transform:
        return SinhArcsinh(self.skewness, self.log_tail)


class SinhArcsinh(PlainTransform):
    """y = sinh(exp(log_tail) arcsinh(x) + skewness) of each number: a normal's tails become heavier, lighter or skew.

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
        """The sum of log_tail + log cosh(arcsinh y) - log cosh(arcsinh x)."""
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return (self.log_tail + torch.hypot(y, one).log() - torch.hypot(x, one).log()).sum(-1)
