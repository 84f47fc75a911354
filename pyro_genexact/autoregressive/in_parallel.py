"""Quantiles of all sites of a chain rule, solved by parallel passes."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor

from ..conditioners.parallel import Problem, solve_sites, solved
from ..conditioners.site_loop import SiteLoop
from ..contexts import padded, unpadded
from ..core.lengths import expand_mask
from ..families.draws import unchecked_icdf
from ..families.per_site import PerSiteConstraint
from ..numerics.errors import ConvergenceError, worst_of
from ..numerics.fixed_point import FixedPoint
from .chain_rule import ChainRule
from .layout import Layout


def solve_quantiles(
    chain: ChainRule, layout: Layout, u: Tensor, shape: torch.Size, solver: FixedPoint
) -> tuple[Tensor, int]:
    """Solves y_t = F_t^{-1}(u_t | y_{<t}) for rows of uniform numbers u (B, T, *site_shape), in visiting order.

    Returns:
        y (B, T, *site_shape), differentiable by context, prefix and parameters, and the number of passes.

    Raises:
        ConvergenceError: see :class:`FixedPoint`.
        NotImplementedError: if the head's family has no icdf.
    """
    present, (first, stop) = layout.present(shape), layout.span(shape)
    u = layout.placed(u, 0.5, shape)
    given, lengths = unpadded(chain.contexts(shape, present))
    prefix = layout.prefix_rows(shape)
    prefix = None if prefix is None else chain.read(prefix[:, :first])
    phis: list[Tensor] = []
    exact, passes = chain.head.support.is_discrete, [stop - first]
    some_discrete = exact or isinstance(chain.head.support, PerSiteConstraint)

    def loop(context: Any, prefix: Tensor | None) -> SiteLoop:
        return SiteLoop(chain.conditioner, padded(context, lengths), len(u), stop, prefix)

    def values(phi: Tensor, before: Tensor | None) -> Tensor:
        t = 0 if before is None else before.shape[1]
        at = slice(t, t + phi.shape[1])
        if present is not None:  # as in ChainRule.draw
            phi = torch.where(expand_mask(present[:, at], phi), phi, phi.new_zeros(()))
        return layout.completed(_quantile(chain, chain.site(phi, t), u[:, at]), before, shape)

    def solve(context: Any, prefix: Tensor | None) -> tuple[Tensor]:
        found = solve_sites(loop(context, prefix), values, solver, chain.read, exact)
        passes.append(found.passes)
        phis[:] = [found.phi]
        return (found.y,)

    def once(y: Tensor, context: Any, prefix: Tensor | None) -> tuple[Tensor]:
        read = chain.read(y)
        read = read if prefix is None else torch.cat([prefix, read], 1)
        return (values(chain.conditioner(read, padded(context, lengths))[:, first:], prefix),)

    def in_turn(context: Any, before: Tensor | None) -> tuple[Tensor]:
        sites = loop(context, before)
        phis.clear()
        for _, phi in sites:
            if some_discrete:
                phis.append(phi)
            y = values(phi, before)
            sites.read(chain.read(y))
            before = y if before is None else torch.cat([before, y], 1)
        assert before is not None
        return (before[:, first:],)

    with torch.set_grad_enabled(torch.is_grad_enabled() and not exact):
        (y,) = solved(Problem(solve, once, in_turn, solver), [given, prefix], chain.tensors)
    if some_discrete:
        _check_known(torch.cat(phis, 1))
    phis.clear()
    every = torch.cat([y.new_zeros(y.shape[0], first, *y.shape[2:]), y], 1) if first else y
    return layout.of_event(every, shape), passes[-1]


def _check_known(phi: Tensor) -> None:
    """Raises a ConvergenceError if parameters (B, T, P) are NaN, which real values show, but categories do not."""
    unknown = phi.isnan().any(2)
    if unknown.any():
        index, _ = worst_of(unknown, torch.zeros_like(unknown, dtype=torch.float32))
        raise ConvergenceError(
            f"Expected a fixed point; got parameters of NaN at (row, site) {index}.", nan, index, (nan, nan)
        )


def _quantile(chain: ChainRule, d: Any, u: Tensor) -> Tensor:
    try:
        return unchecked_icdf(d, u)
    except NotImplementedError:
        raise NotImplementedError(
            f"Expected a head whose family has an icdf (solver='fixed_point'); got {chain.family}."
        ) from None
