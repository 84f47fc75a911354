"""The law that distributions of one real number have mass 1, checked by adaptive quadrature."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from ..numerics.quadrature import kronrod_rule
from .densities import log_density
from .helpers import broken, made, seeded


def line_mass(
    subject: Any, context: Tensor | None = None, factor: float = 10.0, tol: float = 1e-6, draws: int = 500
) -> None:
    """Checks by adaptive quadrature that the total mass of a distribution of one continuous number is 1.

    The unconstrained line to ±1e13 is divided at quantiles of samples, and geometrically around them, so that no peak is
    missed. Intervals where the Gauss and Kronrod rules differ are halved. The parameters of a module are multiplied first,
    since large parameters make sharp peaks and heavy tails.

    Args:
        subject: a distribution of one number per row, or a module whose call returns one.
        context: (*batch, C) or None.
        factor: the factor of the parameters of a module.
        tol: the tolerance of the mass.
        draws: the number of samples per row.

    Raises:
        AssertionError: if the mass of a row is not 1, or if the quadrature does not converge.
        ValueError: if the distribution has more than one number per row.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> line_mass(dist.Laplace(torch.zeros(2).double(), torch.tensor([1.0, 9.0]).double()))
    """
    if isinstance(subject, nn.Module):
        subject = copy.deepcopy(subject)
        with torch.no_grad():
            for p in subject.parameters():
                p.mul_(factor)
    d = made(subject, context)
    size = biject_to(d.support).inverse_shape(d.event_shape)
    if prod(size) != 1:
        raise ValueError(f"Expected a distribution of one number; got unconstrained values of shape {tuple(size)}.")

    def density(v: Tensor) -> Tensor:
        """Returns the density (N, *batch) at v (N,), where the unconstrained value is sinh v."""
        wide = v.reshape(-1, *[1] * len(d.batch_shape)).expand(-1, *d.batch_shape)
        return log_density(d, wide.sinh().unsqueeze(-1)).exp() * wide.cosh()

    with seeded(17), torch.no_grad():
        u = biject_to(d.support).inv(d.sample((draws,)))
        total, error = _adaptive(density, _edges(u.asinh().reshape(draws, -1)), tol / 10)
    off = ~((total - 1).abs() <= tol + error)
    if not (error <= tol).all():
        broken("line mass", "quadrature", f"an error of {error.max():.3g}, not below {tol:g}")
    if off.any():
        broken("line mass", f"total, row {int(off.flatten().nonzero()[0])}", f"{total[off][0]:.9g}, not 1")


def _edges(draws: Tensor, end: float = 30.0) -> Tensor:
    """Returns quantiles of each column, geometric steps from each quantile to the next, and an even grid."""
    marks = draws.quantile(torch.linspace(0, 1, 21).to(draws), 0)
    ends = torch.full_like(marks[:1], end)
    steps = marks.diff(dim=0) * 8.0 ** torch.arange(20).to(draws).reshape(-1, 1, 1)
    above, below = marks[1:] + steps, marks[:-1] - steps
    above = above[above < torch.cat([marks[2:], ends])]
    below = below[below > torch.cat([-ends, marks[:-2]])]
    edges = torch.cat([marks.flatten(), above, below, torch.linspace(-end, end, 31).to(draws)])
    return edges[edges.abs() <= end].unique()


def _adaptive(f: Callable[[Tensor], Tensor], edges: Tensor, tol: float, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """Returns the integral of f, from (N,) to (N, *batch), between the outer edges, and an estimate of its error."""
    nodes, kronrod, gauss = kronrod_rule(edges.dtype, edges.device)
    low, high = edges[:-1], edges[1:]
    total = error = torch.zeros_like(f(edges[:1])[0])
    for k in range(rounds):
        half = (high - low) / 2
        points = ((low + high) / 2 + nodes.unsqueeze(-1) * half).flatten()
        values = torch.cat([f(part) for part in points.split(4000)]).unflatten(0, (len(nodes), len(half)))
        fine, coarse = (torch.einsum("n,nm...,m->m...", w, values, half) for w in (kronrod, gauss))
        gap = (fine - coarse).abs()
        good = gap.reshape(len(gap), -1).amax(1) <= tol / 500
        good |= half <= 4 * torch.finfo(half.dtype).eps * low.abs()
        if k == rounds - 1 or len(half) > 4000:  # stops; the error is then large
            good = torch.ones_like(good)
        total, error = total + fine[good].sum(0), error + gap[good].sum(0)
        if good.all():
            break
        low, high = low[~good], high[~good]
        middle = (low + high) / 2
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
    return total, error
