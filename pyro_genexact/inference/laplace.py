"""The Laplace approximation: Gaussians at the modes of a log density."""

from __future__ import annotations

import torch
from torch import Tensor

from .density import Density
from .normal import Normal
from .paths import SMALL, Iterate

NEWTON = 20  # maximum number of Newton steps
SAME = 0.01  # nats; log densities at the ends of two paths and between them that differ by less are those of one mode
MODES = 3  # maximum number of modes


def modes(density: Density, paths: list[list[Iterate]]) -> list[Normal]:
    """Returns the Laplace approximations at the distinct ends of paths that have the highest log densities.

    Cost: D gradients per mode and Newton step.
    """
    ends = [group[0][-1] for group in distinct(density, paths)[:MODES]]
    return [normal for end in ends if bool((normal := laplace(density, end.point)).root.isfinite().all())]


def distinct(density: Density, paths: list[list[Iterate]]) -> list[list[list[Iterate]]]:
    """Returns groups of paths with the same end, the highest first.

    Two ends are the same if their log densities are, and if that at the midpoint is not lower. Mirrored modes differ.
    """
    found: list[list[list[Iterate]]] = []
    for path in sorted((path for path in paths if path), key=lambda path: -path[-1].value):
        group = next((group for group in found if _same(density, group[0][-1], path[-1])), None)
        if group is None:
            found.append([path])
        else:
            group.append(path)
    return found


def _same(density: Density, high: Iterate, low: Iterate) -> bool:
    if high.value - low.value > SAME:
        return False
    with torch.no_grad():
        middle = density(((high.point + low.point) / 2)[None]).item()
    return middle > low.value - SAME


def laplace(density: Density, start: Tensor) -> Normal:
    """Takes Newton steps from a point (D,) as long as they increase the log density; returns the Gaussian of the curvature there."""
    z, best = start, -torch.inf
    normal = Normal(z, torch.eye(len(z), dtype=z.dtype, device=z.device))
    for _ in range(NEWTON):
        value, gradient, hessian = derivatives(density, z)
        if not value > best:
            break
        normal, best = Normal(z, inverse_root(-hessian)), value
        scaled = normal.root.mT @ gradient
        if not scaled.square().sum() > SMALL:
            break
        z = z + normal.root @ scaled
    return normal


def derivatives(density: Density, z: Tensor) -> tuple[float, Tensor, Tensor]:
    """Returns the log density at a point (D,), its gradient (D,) and its Hessian (D, D), from D copies of the point."""
    copies = z.detach().repeat(len(z), 1).requires_grad_()
    with torch.enable_grad():
        values = density(copies)
        (gradients,) = torch.autograd.grad(values.sum(), copies, create_graph=True)
        hessian = torch.zeros_like(copies)
        if gradients.requires_grad:  # not linear
            (hessian,) = torch.autograd.grad(gradients.diagonal().sum(), copies)
    return values[0].item(), gradients[0].detach(), hessian


def inverse_root(hessian: Tensor) -> Tensor:
    """Returns lower triangular L (*batch, D, D) with L L' the inverse of symmetric matrices, with eigenvalues made positive."""
    values, vectors = torch.linalg.eigh(hessian.double().nan_to_num())
    values = values.abs()
    values = values.clamp(min=1e-10 * values.amax(-1, keepdim=True).clamp(min=1e-300))
    r = torch.linalg.qr((vectors / values.sqrt().unsqueeze(-2)).mT).R
    return (r.mT * r.diagonal(0, -2, -1).sign().unsqueeze(-2)).to(hessian)
