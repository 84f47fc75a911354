"""Gaussians of hierarchical posteriors: the rows of a plate are integrated out by Laplace's approximation."""

from __future__ import annotations

import math
import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..transforms.base import Chain
from ..transforms.linear import Permute
from .arrow import Arrow, ArrowAffine
from .density import Density
from .laplace import inverse_root
from .normal import Pushed
from .pathfinder import elbos
from .paths import Iterate, ascend, gaussians

NEWTON = 50  # maximum number of Newton steps of the rows
BOUND = 5.0  # maximum length of a row's step, in standard deviations
HALVINGS = 8  # maximum number of shorter steps
SMALL = 1e-6  # nats that the last step gains, over all rows
LAST = 12  # Gaussians of a path that are compared
ENDS = 3  # paths whose ends have a Gaussian of their own
CANDIDATES = 4
DEPENDENT = (
    "The log density is not a sum over the rows of the plate {!r} given the latents outside of it: rows depend on each other, "
    "and draws of this guide do not. Use the guide without blocks, or with another plate. The guide starts without a warm start."
)


class Integrated:
    """The log density of the globals g of a model, log p(g, l) - 1/2 log det(P / 2 pi), at the mode l of the rows given g.

    P is the negative Hessian of the rows' log density, which has a block for each row. If the rows are Gaussian given
    the globals, this is exact.

    Cost: d + 1 gradients of the model per Newton step of the rows, and gradients of these.

    Args:
        density: the log density of all latents.
        arrow: the layer that has their layout.
        starts: points (S, D) of the latents, at whose rows the Newton steps start.
    """

    def __init__(self, density: Density, arrow: Arrow, starts: Tensor) -> None:
        self.density, self.layout, self.dtype = density, arrow.layout, density.dtype
        self.order = arrow.order.cpu()
        self.back = self.order.argsort()
        self.known = self.layout.split(starts.double().cpu()[:, self.order])

    def __call__(self, every: Tensor, rows: Tensor) -> Tensor:
        """Returns log p (S,) at globals (S, G0) and rows (S, G, d)."""
        return self.density(self.layout.joined(every, rows)[:, self.back])

    def settled(self, every: Tensor) -> Tensor:
        """Returns the modes (S, G, d) of the rows given globals (S, G0), by Newton steps from the nearest known ones."""
        known, rows = self.known
        rows = rows[torch.cdist(every, known).argmin(1)] if self.layout.of_all else rows
        for _ in range(NEWTON):
            value, gradient, precision = self.curvature(every, rows)
            root = inverse_root(precision.detach())
            scaled = _times(root.mT, gradient.detach())
            length = scaled.square().sum(-1, keepdim=True)
            step = _times(root, scaled * (BOUND / length.sqrt().clamp(min=BOUND)))
            rows, better = self._along(every, rows, value.detach(), step)
            if not (better & (length.sum((1, 2)) > SMALL)).any():
                break
        if (found := rows.isfinite().all(-1).all(-1)).any():
            self.known = every[found], rows[found]
        return rows

    def _along(self, every: Tensor, rows: Tensor, value: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows after the longest step that does not decrease the log density, and whether there is one (S,)."""
        better, t = torch.zeros_like(value, dtype=torch.bool), 1.0
        for _ in range(HALVINGS):
            tried = rows + t * step
            with torch.no_grad():
                now = ~better & (self(every, tried) >= value)
            rows, better, t = torch.where(now[:, None, None], tried, rows), better | now, t / 4
            if better.all():
                break
        return rows, better

    @torch.enable_grad()
    def curvature(self, every: Tensor, rows: Tensor, differentiable: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the log density (S,), its gradient (S, G, d) and the blocks (S, G, d, d) of its negative Hessian in the rows."""
        if not rows.requires_grad:
            rows = rows.detach().requires_grad_()
        value = self(every, rows)
        (gradient,) = torch.autograd.grad(value.sum(), rows, create_graph=True)
        columns = [_gradient(part.sum(), rows, differentiable) for part in gradient.unbind(-1)]
        return value, gradient, -torch.stack(columns, -1)

    def gradients(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the integrated log densities (S,) of globals (S, G0) and their gradients (S, G0)."""
        rows = self.settled(points)
        every = points.detach().requires_grad_()
        _, gradient, precision = self.curvature(every, rows)
        root = inverse_root(precision.detach())
        with torch.enable_grad():
            rows = rows + _times(root, _times(root.mT, gradient))  # the derivative of the modes by the globals
            value, _, precision = self.curvature(every, rows, differentiable=True)
            total = value - torch.linalg.slogdet(precision).logabsdet.sum(-1) / 2
            (found,) = torch.autograd.grad(total.sum(), every)
        return total.detach() + rows[0].numel() * math.log(2 * math.pi) / 2, found

    def hessian(self, point: Tensor) -> Tensor:
        """Returns the Hessian (G0, G0) of the integrated log density at globals (G0,), by central differences."""
        h = torch.finfo(self.dtype).eps ** 0.25
        nudges = h * torch.eye(len(point)).to(point)
        _, found = self.gradients(torch.cat([point + nudges, point - nudges]))
        hessian = (found[: len(point)] - found[len(point) :]) / (2 * h)
        return (hessian + hessian.mT) / 2

    def normals(self, every: Tensor, roots: list[Tensor]) -> list[Pushed]:
        """Returns the Gaussians of all latents, given means (S, G0) and roots (G0, G0) of the covariances of the globals."""
        rows = self.settled(every)
        precision, mixed = self._blocks(every, rows)
        local = inverse_root(precision)
        slopes = local @ (local.mT @ mixed)
        permute, means = Permute(self.back), self.layout.joined(every, rows)
        return [
            Pushed(Chain([ArrowAffine(self.layout, mean, root, part, slope @ root), permute]))
            for mean, root, part, slope in zip(means, roots, local, slopes, strict=True)
            if all(x.isfinite().all() for x in (mean, root, part, slope))
        ]

    @torch.enable_grad()
    def _blocks(self, every: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the blocks of the negative Hessian in the rows, and the Hessian (S, G, d, G0) between rows and globals."""
        every, rows = every.detach().requires_grad_(), rows.detach().requires_grad_()
        value, _, precision = self.curvature(every, rows)
        if not self.layout.of_all:
            return precision, rows.new_zeros(*rows.shape, 0)
        (gradient,) = torch.autograd.grad(value.sum(), every, create_graph=True)
        return precision, torch.stack([_gradient(part.sum(), rows) for part in gradient.unbind(-1)], -1)

    def has_independent_rows(self) -> bool:
        """Returns whether the Hessian at the last start has no blocks between rows, by its product with a random vector.

        The last start is random. At the first one, which is the guide's location, dependencies can vanish.
        """
        every, rows = (part[-1:] for part in self.known)
        precision, mixed = self._blocks(every, rows)
        with torch.enable_grad():
            point = every.detach().requires_grad_(), rows.detach().requires_grad_()
            slopes = torch.autograd.grad(self(*point).sum(), point, create_graph=True, materialize_grads=True)
            v = torch.randn_like(every), torch.randn_like(rows)
            found = _gradient(sum((x * y).sum() for x, y in zip(slopes, v, strict=True)), point[1])
        expected = (mixed @ v[0][:, None, :, None]).squeeze(-1) - _times(precision, v[1])
        return not bool((found - expected).norm() > 1e-3 * expected.norm().clamp(min=1e-6))  # also if it is NaN


def by_rows(density: Density, arrow: Arrow, plate: str, starts: Tensor, ends: bool = False) -> list[Pushed]:
    """Returns Gaussians of hierarchical posteriors: the best of each path of the globals, and those of the ends of paths.

    Args:
        density: the log density of all latents.
        arrow: the layer that has their layout.
        plate: the name of the plate of rows.
        starts: points (S, D).
        ends: whether to return those of the ends only.

    Warns:
        UserWarning: if the rows of the plate depend on each other.
    """
    integrated = Integrated(density, arrow, starts)
    if not integrated.has_independent_rows():
        warnings.warn(DEPENDENT.format(plate), stacklevel=2)
        return []
    every = integrated.known[0]
    if not integrated.layout.of_all:
        groups = iter([integrated.normals(every, [torch.zeros(0, 0).to(every)] * len(every))])
    else:
        paths = ascend(integrated, every)  # type: ignore[arg-type]
        along = (_of_path(integrated, path) for path in paths if not ends)
        groups = chain((_of_ends(integrated, paths),), along)
    ranked = [
        max(zip(elbos(density, normals), normals, strict=True), key=lambda pair: pair[0])
        for normals in groups
        if normals
    ]
    return [normal for _, normal in sorted(ranked, key=lambda pair: -pair[0])[:CANDIDATES]]


def _of_path(integrated: Integrated, path: list[Iterate]) -> list[Pushed]:
    means, roots = [], []
    for mean, covariance in list(gaussians(path))[-LAST:]:
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and mean.isfinite().all():
            means.append(mean)
            roots.append(root)
    return integrated.normals(torch.stack(means), roots) if means else []


def _of_ends(integrated: Integrated, paths: list[list[Iterate]]) -> list[Pushed]:
    means, roots = [], []
    for end in sorted((path[-1] for path in paths if path), key=lambda end: -end.value)[:ENDS]:
        root = inverse_root(-integrated.hessian(end.point))
        mean = end.point + root @ (root.mT @ end.gradient)
        means.append(mean)
        roots.append(root)
    return integrated.normals(torch.stack(means), roots) if means else []


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _gradient(total: Any, x: Tensor, differentiable: bool = False) -> Tensor:
    """Returns the gradient, 0 if x is not in the graph."""
    if not total.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(total, x, create_graph=differentiable, retain_graph=True, materialize_grads=True)
    return found  # type: ignore[no-any-return]
