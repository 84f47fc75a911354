"""Solves the sequential direction by parallel passes over sites, and differentiates the solution implicitly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.functional import vjp
from ..numerics.errors import ConvergenceError
from ..numerics.fixed_point import FixedPoint, iterate
from .site_loop import SiteLoop


class Solution(NamedTuple):
    """The sites that a solve computed.

    Attributes:
        y: (B, S, *site_shape), the sites from the first one after the prefix.
        phi: (B, S, P), their parameters.
        passes: the number of passes, summed over blocks.
    """

    y: Tensor
    phi: Tensor
    passes: int


def solve_sites(
    loop: SiteLoop,
    values: Callable[[Tensor, Tensor | None], Tensor],
    solver: FixedPoint,
    read: Callable[[Tensor], Tensor] = lambda y: y,
    exact: bool = False,
) -> Solution:
    """Solves y_t = values(phi_t(y_{<t})) for the sites that a loop would visit, block by block; without gradients.

    Args:
        loop: the loop before its first visit.
        values: maps the parameters (B, S, P) of sites and the sites before them (B, t, *site_shape), or None if there
            are none, to the values (B, S, *site_shape).
        solver: the options.
        read: converts values to the conditioner's input.
        exact: whether the values of the last two passes must be equal, as those of discrete families.

    Raises:
        ConvergenceError: if a block needs more passes than ``max_passes``, by default the number of its sites.
    """
    net, phi, state, before = loop.conditioner, loop.phi, loop.state, loop.prefix
    width = solver.block or max(loop.stop - loop.first, 1)
    every, found, passes = torch.arange(len(phi), device=phi.device), list[tuple[Tensor, Tensor]](), 0
    for first in range(loop.first, max(loop.stop, 1), width):  # one empty block if there are no sites
        sites = min(width, loop.stop - first)
        phis = phi.expand(-1, sites, -1)

        def step(y: Tensor, phi: Tensor = phi, state: Any = state, before: Tensor | None = before) -> Tensor:
            nonlocal phis
            y = read(_readable(y))
            if y.shape[1] == loop.stop and net.num_sites in (None, loop.stop):
                rest = net(y, loop.context)[:, 1:]
            else:
                rest = net.extend(y[:, :-1], net.reorder(state, every))[0]
            # the first site keeps its parameters, because those of the parallel pass may be rounded differently
            phis = torch.cat([phi, rest], 1)
            return values(phis, before)

        y = values(phis, before)
        if sites > 1:
            y, count = iterate(step, y, solver.max_passes or sites, 0.0 if exact else solver.tolerance(y, phi))
            passes += count
        found.append((y, phis))
        before = y if before is None else torch.cat([before, y], 1)
        if first + sites < loop.stop:
            phi, state = net.extend(read(_readable(y)), state)
            phi = phi[:, -1:]
    ys, parameters = zip(*found, strict=True)
    return Solution(torch.cat(ys, 1), torch.cat(parameters, 1), passes)


def _small(y: Tensor) -> Tensor:
    return y.abs() < torch.finfo(y.dtype).max ** 0.5


def _readable(y: Tensor) -> Tensor:
    """Replaces large values and NaN by 0, since a masked weight times an infinite value is NaN, also at earlier sites."""
    return torch.where(_small(y), y, 0.0) if y.is_floating_point() else y


class Problem(NamedTuple):
    """A sequential computation of (y, *others) from tensors ``given``; y (B, T, ...) is the solution of y = once(y).

    Attributes:
        solve: computes (y, *others) from ``given``, without gradients.
        once: computes (y, *others) from y and ``given``, in one parallel pass.
        in_turn: computes (y, *others) from ``given`` site by site, in a differentiable way.
        solver: the options.
    """

    solve: Callable[..., tuple[Tensor, ...]]
    once: Callable[..., tuple[Tensor, ...]]
    in_turn: Callable[..., tuple[Tensor, ...]]
    solver: FixedPoint


def solved(problem: Problem, given: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> Any:
    """Solves a problem, with gradients by ``given`` and by the tensors that the problem uses.

    The backward pass solves the transposed triangular system

        a = g + (dF/dy)^T a,      F(y) = once(y),

    by the same iteration, with one vector-Jacobian product of a parallel pass per iteration, and then takes the
    gradients from F at the solution. With ``create_graph``, it differentiates the loop over sites instead.

    The result is that of the loop over sites if the passes fail without a limit ``max_passes``, or if a site that others
    read is not readable. Passes fail if rounding or dropout changes the values in each pass, or if a search for a value
    fails at the history of an early pass.

    Raises:
        ConvergenceError: as :func:`solve_sites`, also in the backward pass.
    """
    try:
        with torch.no_grad():
            outputs = problem.solve(*given)
    except ConvergenceError:
        if problem.solver.max_passes is not None:
            raise
        return problem.in_turn(*given)
    y = outputs[0][:, :-1]
    if y.is_floating_point() and not _small(y).all():
        return problem.in_turn(*given)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (*given, *tensors)):
        return outputs
    return _Solved.apply(problem, outputs, len(given), *given, *tensors)


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, problem: Problem, outputs: tuple[Tensor, ...], count: int, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.problem, ctx.count = problem, count
        ctx.save_for_backward(outputs[0], *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, *inputs = ctx.saved_tensors  # unpacking lets autograd detect parameters changed in place
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            outputs = ctx.problem.in_turn(*inputs[: ctx.count])
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        else:
            # detached, because a given tensor may itself depend on one of the other tensors
            given = [
                t if t is None else t.detach().requires_grad_(need)
                for t, need in zip(inputs[: ctx.count], needed, strict=False)
            ]
            found = iter(_gradients(ctx.problem, y.detach(), given, inputs[ctx.count :], needed, grads))
        return None, None, None, *(next(found) if need else None for need in needed)


def _gradients(
    problem: Problem,
    y: Tensor,
    given: list[Any],
    tensors: list[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Returns the gradients of the inputs that need them, at the solution y."""
    with torch.enable_grad():
        y.requires_grad_()
        outputs = problem.once(y, *given)
    g = grads[0] + vjp(outputs[1:], [y], grads[1:])[0]

    def step(a: Tensor) -> Tensor:
        return g + vjp(outputs[:1], [y], [a])[0]

    a, _ = iterate(step, g, problem.solver.max_passes or y.shape[1], problem.solver.tolerance(g), _largest)
    wanted = [t for t, need in zip((*given, *tensors), needed, strict=True) if need]
    return vjp(outputs, wanted, [a, *grads[1:]])


def _largest(a: Tensor) -> Tensor:
    """Returns the largest absolute value of each row, (B, 1, ...)."""
    return a.abs().flatten(1).amax(1).reshape(-1, *[1] * (a.dim() - 1))
