"""The inverse of an autoregressive transform, solved site by site or by parallel passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner, Head
from ..conditioners.parallel import Problem, solve_sites, solved
from ..conditioners.site_loop import SiteLoop
from ..contexts import padded, unpadded
from ..core.lengths import expand_mask
from ..core.precision import at_least
from .base import adapted


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    """Sets (B, T, ...) to zero where the mask (B, T) is False."""
    return value if mask is None else torch.where(expand_mask(mask, value), value, 0.0)


def solve_in_turn(
    conditioner: Conditioner, head: Head, y: Tensor, context: Any, mask: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Solves y = t(x) site by site.

    Returns:
        x (B, T, ...), which is 0 where the mask (B, T) is False, log|dx/dy| (B,), and with ``keep`` phi (B, T, P) and the
        last state.
    """
    found = None if mask is not None or torch.is_grad_enabled() else conditioner.native_loop(head, y, context, keep)
    if found is not None:
        return found.values, found.totals, found.phi, found.state
    xs, phis, ys = [], [], y.split(1, 1)
    with torch.inference_mode(not torch.is_grad_enabled()):  # about 15% faster than no_grad
        loop = SiteLoop(conditioner, context, y.shape[0], len(ys))
        for t, phi_t in loop:
            phi_t = at_least(phi_t, y)
            # head.forward instead of head(...) saves the time of about two operations per site
            x_t = adapted(head.forward(phi_t, t)).invert(ys[t])
            x_t = x_t if mask is None else masked(x_t, mask[:, t : t + 1])
            loop.read(x_t)
            xs.append(x_t)
            phis.append(phi_t)
    x, phi = torch.cat(xs, 1), torch.cat(phis, 1)
    return x, -masked(head(phi).log_abs_det_jacobian(x, y), mask).sum(1), phi, loop.state


def solve_in_parallel(
    t: Any, tensors: Sequence[Tensor], y: Tensor, context: Any, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Solves y = t(x) for a :class:`ConditionedAutoregressive` without cache, by its solver.

    Its modules are read from t at each use, because they may be changed before the backward pass.

    Returns:
        x (B, T, ...), which is 0 where the mask (B, T) is False; log|dx/dy| (B,), and the number of passes.
    """
    solver, passes, (given, lengths) = t.solver, [y.shape[1]], unpadded(context)

    def bijection(phi: Tensor, first: int = 0) -> Any:
        return adapted(t.head(at_least(phi, y), first))

    def solve(y: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        def values(phi: Tensor, before: Tensor | None) -> Tensor:
            first = 0 if before is None else before.shape[1]
            at = slice(first, first + phi.shape[1])
            x: Tensor = bijection(phi, first).invert(y[:, at])
            return masked(x, None if mask is None else mask[:, at])

        found = solve_sites(SiteLoop(t.conditioner, padded(context, lengths), y.shape[0], y.shape[1]), values, solver)
        passes.append(found.passes)
        return found.y, ladj_of(bijection(found.phi), found.y, y)

    def once(x: Tensor, y: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        f = bijection(t.conditioner(x, padded(context, lengths)))
        x = masked(f.invert(y, x.detach()), mask)
        return x, ladj_of(f, x, y)

    def in_turn(y: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        return solve_in_turn(t.conditioner, t.head, y, padded(context, lengths), mask)[:2]

    def ladj_of(f: Any, x: Tensor, y: Tensor) -> Tensor:
        return -masked(f.log_abs_det_jacobian(x, y), mask).sum(1)

    x, ladj = solved(Problem(solve, once, in_turn, solver), [y, given], tensors)
    return x, ladj, passes[-1]
