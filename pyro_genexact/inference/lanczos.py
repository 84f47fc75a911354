"""A low-rank Laplace approximation from products of the Hessian with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .density import Density
from .low_rank import LowRankAffine

PROBES = 100  # random vectors in the estimate of the diagonal
STEPS = 40  # least number of steps


def low_rank_laplace(density: Density, point: Tensor, rank: int) -> LowRankAffine:
    """Returns the map of noise to a Gaussian at a mode (D,) whose precision is that of the Hessian along few directions.

    The scale is the root of the inverse of the Hessian's diagonal, estimated by random signs. The directions are the Ritz vectors of
    Lanczos' method for the scaled Hessian, which find both its largest and its smallest eigenvalues.

    Cost: 100 and max(40, 2 r) products of the Hessian with a vector, each two gradients of the model. Memory: O(D r).
    """
    product = _product(density, point)
    signs = torch.randint(0, 2, (PROBES, len(point)), device=point.device).to(point) * 2 - 1
    scale = (signs * product(signs)).mean(0).abs().clamp(min=1e-8).rsqrt()
    basis, images = [torch.nn.functional.normalize(torch.randn_like(point), dim=0)], []
    for _ in range(min(len(point), max(STEPS, 2 * rank))):
        images.append(scale * product((scale * basis[-1])[None])[0])
        known = torch.stack(basis)
        rest = images[-1]
        for _ in range(2):  # the second pass removes what rounding leaves
            rest = rest - known.mT @ (known @ rest)
        if not rest.norm() > 1e-8 * images[-1].norm():
            break
        basis.append(rest / rest.norm())
    known = torch.stack(basis[: len(images)])
    values, vectors = torch.linalg.eigh((known @ torch.stack(images).mT).nan_to_num())
    return LowRankAffine(point, scale, known.mT @ vectors, values.abs().clamp(min=1e-8).rsqrt())


def _product(density: Density, point: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the function that multiplies the negative Hessian by vectors (S, D)."""

    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        z = point.detach().expand(v.shape).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(density(z).sum(), z, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        return -torch.autograd.grad((gradient * v).sum(), z)[0]

    return product
