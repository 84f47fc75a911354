"""Affine maps of global numbers and of the rows of a plate, each row given the globals: their matrix has an arrow structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from ..core.independent import REAL_VECTOR
from ..core.precision import full_precision
from ..transforms.base import Chain, PlainTransform
from ..transforms.linear import Permute


class Layout(NamedTuple):
    """The order of D numbers: G0 globals, then the d numbers of each of the G rows of a plate.

    Attributes:
        of_all: G0.
        rows: G.
        of_row: d.
    """

    of_all: int
    rows: int
    of_row: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the globals (..., G0) and the rows (..., G, d) of vectors (..., D)."""
        return x[..., : self.of_all], x[..., self.of_all :].unflatten(-1, (self.rows, self.of_row))

    def joined(self, of_all: Tensor, of_rows: Tensor) -> Tensor:
        """Returns the vectors (..., D) of globals and rows."""
        return torch.cat([of_all, of_rows.flatten(-2)], -1)


def layout_of(sites: Sequence[Any], plate: str) -> tuple[Layout, Tensor]:
    """Returns the layout of latents, and the places (D,) of its numbers in the concatenation of the flat latents.

    Args:
        sites: the latent sites of a trace.
        plate: the name of the plate of rows.

    Raises:
        ValueError: if no latent is in the plate.
    """
    of_all, of_rows, place = [torch.zeros(0, dtype=torch.long)], [], 0
    for site in sites:
        shape = biject_to(site["fn"].support).inv(site["value"]).shape
        index = torch.arange(place, place := place + shape.numel()).reshape(shape)
        frame = next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)
        if frame is None:
            of_all.append(index.flatten())
        else:
            dim = frame.dim - site["fn"].event_dim - len(shape) + site["value"].dim()
            of_rows.append(index.movedim(dim, 0).reshape(frame.size, -1))
    if not of_rows:
        plates = sorted({frame.name for site in sites for frame in site["cond_indep_stack"]})
        raise ValueError(f"Expected blocks to be the plate of some latents, one of {plates}; got {plate!r}.")
    every, rows = torch.cat(of_all), torch.cat(of_rows, 1)
    return Layout(len(every), *rows.shape), torch.cat([every, rows.flatten()])


class ArrowAffine(PlainTransform):
    """The affine map of globals x0 and rows x_g: y0 = c0 + L0 x0 and y_g = c_g + L_g x_g + B_g x0.

    L0 and L_g are lower triangular with positive diagonals.

    Cost: O(D (d + G0)) in both directions.

    Args:
        layout: the order of the D numbers.
        loc: (D,), c0 and all c_g.
        of_all: L0 (G0, G0).
        of_rows: L_g (G, d, d).
        across: B_g (G, d, G0).
    """

    domain = codomain = REAL_VECTOR
    sign = 1

    def __init__(self, layout: Layout, loc: Tensor, of_all: Tensor, of_rows: Tensor, across: Tensor) -> None:
        super().__init__()
        self.layout, self.loc, self.of_all, self.of_rows, self.across = layout, loc, of_all, of_rows, across

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        every, rows = self.layout.split(x)
        moved = _product(self.of_rows, rows).flatten(-2) + every @ self.across.flatten(0, 1).mT
        return self.loc + torch.cat([every @ self.of_all.mT, moved], -1)

    @full_precision
    def _inverse(self, y: Tensor) -> Tensor:
        every, rows = self.layout.split(y - self.loc)
        every = _solve(self.of_all, every)
        rows = rows - (every @ self.across.flatten(0, 1).mT).unflatten(-1, rows.shape[-2:])
        return self.layout.joined(every, _solve(self.of_rows, rows))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the logarithms of the diagonals of L0 and of all L_g."""
        total = sum(matrix.diagonal(0, -2, -1).log().sum() for matrix in (self.of_all, self.of_rows))
        return torch.as_tensor(total).expand(y.shape[:-1])


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Returns the products of matrices (G, d, d) with vectors (..., G, d)."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0] * x
    return torch.einsum("gij,...gj->...gi", matrix, x)


def _solve(matrix: Tensor, y: Tensor) -> Tensor:
    """Solves systems of lower triangular matrices (*batch, d, d) for vectors (..., *batch, d)."""
    if matrix.shape[-1] == 1:
        return y / matrix[..., 0]
    batch = y.shape[: y.dim() - matrix.dim() + 1].numel()
    columns = y.reshape(batch, *matrix.shape[:-1]).movedim(0, -1)
    return torch.linalg.solve_triangular(matrix, columns, upper=False).movedim(-1, 0).reshape(y.shape)


class Arrow(nn.Module):
    """A module whose call returns the affine map of all latents whose matrix is that of a hierarchical Gaussian.

    It is the composition of a learned :class:`ArrowAffine`, a fixed one that standardises, as in
    :class:`~pyro_genexact.parts.Gaussian`, and the permutation from the layout to the order of the latents.

    Args:
        layout: the order of the D numbers.
        order: the places (D,) of the numbers of the layout among the latents.
        center: (D,), the initial location, in the order of the latents.
        scale: the initial diagonal of the learned matrix.
    """

    context = 0
    center: Tensor
    root_of_all: Tensor
    root_of_rows: Tensor
    root_across: Tensor

    def __init__(self, layout: Layout, order: Tensor, center: Tensor, scale: float) -> None:
        super().__init__()
        of_all, rows, of_row = self.layout = layout
        self.permute = Permute(order.argsort())
        self.register_buffer("center", center.detach()[order])
        self.register_buffer("root_of_all", torch.eye(of_all).to(center))
        self.register_buffer("root_of_rows", torch.eye(of_row).repeat(rows, 1, 1).to(center))
        self.register_buffer("root_across", torch.zeros(rows, of_row, of_all).to(center))
        self.loc = nn.Parameter(torch.zeros_like(self.center))
        self.log_scale = nn.Parameter(torch.full_like(self.center, math.log(scale)))
        self.of_all = nn.Parameter(torch.zeros_like(self.root_of_all))
        self.of_rows = nn.Parameter(torch.zeros_like(self.root_of_rows))
        self.across = nn.Parameter(torch.zeros_like(self.root_across))

    @property
    def order(self) -> Tensor:
        """The places (D,) of the numbers of the layout among the latents."""
        return self.permute.permutation.argsort()

    @torch.no_grad()
    def put(self, transform: Chain) -> None:
        """Sets the fixed map to the first part of a chain of an :class:`ArrowAffine` and the permutation of this layer.

        The learned map becomes the identity.
        """
        root: Any = transform.parts[0]
        self.center.copy_(root.loc)
        self.root_of_all.copy_(root.of_all)
        self.root_of_rows.copy_(root.of_rows)
        self.root_across.copy_(root.across)
        for weight in self.parameters():
            weight.zero_()

    def forward(self) -> Transform:
        every, rows = (scale.diag_embed() for scale in self.layout.split(self.log_scale.exp()))
        learned = self.loc, every + self.of_all.tril(-1), rows + self.of_rows.tril(-1), self.across
        fixed = self.center, self.root_of_all, self.root_of_rows, self.root_across
        return Chain([ArrowAffine(self.layout, *learned), ArrowAffine(self.layout, *fixed), self.permute])
