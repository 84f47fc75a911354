"""Roots of increasing functions, elementwise over any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..core.functional import transformed, visible
from .brackets import INTEGERS, bracket, search
from .derivatives import Increasing, Sloped, implicit, value_of

_NEWTON_STEPS = 7  # plain Newton steps, for all elements
_GUARDED_STEPS = 32  # Newton steps within a bracket, for the remaining elements
_ROUGH = 4  # the allowed residual in multiples of the tolerance, if rounding of f is larger than the tolerance


def root(
    f: Increasing,
    y: Tensor,
    *parameters: Tensor,
    shared: Sequence[Tensor] = (),
    guess: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:
    r"""Solves f(x, *parameters, *shared) = y for x, elementwise, for a function f that increases in x.

    The search has three stages:

    1. Seven Newton steps for all elements.
    2. Up to 32 Newton steps within a bracket of evaluated points, for the remaining elements.
    3. A bracket that grows geometrically around the guess and is narrowed by Newton steps, or by halving the
       floating-point numbers in it, for the elements that still remain (because of kinks, flat parts, or scales far
       from 1). It takes at most 130 steps.

    Smooth functions near the identity need about six evaluations. With ``low``, ``high`` or ``tol=0``, only the third
    stage is used. If f has ``parameters``, finished elements are dropped before the second and the third stage, and
    during the third whenever half of them are finished. The root is differentiable to any order with respect to y, the
    parameters, ``shared`` and the parameters of a module, see :func:`implicit`.

    The transforms of ``torch.func`` cannot branch on values. Under them all steps are executed, elements that would
    raise a ConvergenceError are NaN, and derivatives are exact up to the third order.

    Args:
        f: maps x and the tensors to values of the shape of x, or to a pair of values and log-derivatives; without the
            latter, autograd computes the derivative. Can also be an ``nn.Module``, whose parameters are treated as
            ``shared``. Tensors in the closure of f must not require gradients and must apply to all elements.
        y: (*batch) the targets; infinite targets give the same infinity, NaN gives NaN.
        *parameters: (*batch, ...) tensors with one entry per element; dims of size 1 broadcast.
        shared: tensors of any shape that are the same for all elements.
        guess: (*batch) the starting points, by default y.
        low: (*batch) the smallest numbers at which f is defined, by default the smallest finite number.
        high: (*batch) the largest numbers at which f is defined, by default the largest finite number.
        tol: the tolerance, by default 4 eps, where eps is that of the dtype. A result x is accepted if

            - \|f(x) - y\| <= tol (1 + \|y\|), and the Newton step from x is only rounding of x, or for the second time
              within the tolerance and at most sqrt(eps) (1 + \|y\|);
            - rounding of f exceeds the tolerance, and a Newton step passed y between two points within 4 tol; or
            - f is so steep that rounding of x exceeds the tolerance, and x is within that rounding of the root.

            If none of these applies because f is too steep or too flat, and always with ``tol=0``, the result is
            exactly the smallest number x with f(x) >= y. Since the tolerance is absolute for small y, rescale f if its
            values are much smaller than 1.

    Returns:
        The root (*batch).

    Raises:
        ConvergenceError: if f is below y or above y at all numbers, or NaN around the root.
        ValueError: if a tensor in the closure of f requires gradients, if the values of f have another shape than x, if
            a shape does not broadcast, ``tol`` is negative, or ``low`` exceeds ``high``.
        TypeError: if y or one of the other arguments is not a tensor of the expected dtype.

    Reference: Press et al., "Numerical Recipes", 3rd ed., section 9.4 (Newton's method with a bracket).

    Example:
        >>> import torch
        >>> a = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = root(lambda x, a: x**3 + a * x, torch.tensor([2.0, 12.0]), a)
        >>> x
        tensor([1., 2.], grad_fn=<_ImplicitBackward>)
        >>> torch.autograd.grad(x.sum(), a)[0]  # -x / (3 x^2 + a)
        tensor([-0.2500, -0.1429])
    """
    _check(y, parameters, tol, guess=guess, low=low, high=high)
    tensors = list(shared)
    if isinstance(f, nn.Module):
        f, tensors = _of_module(f, tensors)
    with torch.no_grad():
        x = find(f, y, parameters, tensors, guess, low, high, tol)
    if not torch.is_grad_enabled():
        return x
    detached = [t.detach() for t in (*parameters, *tensors)]
    if value_of(f(x.detach(), *detached)).requires_grad:
        raise ValueError(
            "Expected all tensors that require gradients among parameters and shared; got one in the closure of f."
        )
    return implicit(f, x, y, *parameters, *tensors)


def find(
    f: Increasing,
    y: Tensor,
    parameters: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    guess: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:
    """Like :func:`root`, but without gradients, checks of the arguments and support for modules.

    Call it under ``no_grad``. It serves classes that call :func:`implicit` themselves.

    Args:
        f: see :func:`root`.
        y: (*batch) the targets.
        parameters: tensors with one entry per element.
        shared: tensors that are the same for all elements.
        guess: (*batch) the starting points, by default y.
        low: (*batch) the smallest numbers at which f is defined.
        high: (*batch) the largest numbers at which f is defined.
        tol: see :func:`root`.

    Returns:
        The root (*batch), without gradient.

    Raises:
        ConvergenceError: as :func:`root`.

    Example:
        >>> import torch
        >>> find(lambda x: (x**3, torch.log(3 * x**2)), torch.tensor(8.0))
        tensor(2.)
    """
    if y.is_meta:
        return torch.empty_like(y)
    tol = 4 * torch.finfo(y.dtype).eps if tol is None else tol
    sloped, x = Sloped(f), y if guess is None else guess
    whole = not parameters or not y.dim() or transformed()  # the closure of f may have tensors of the shape of y
    near = torch.zeros_like(y, dtype=torch.bool)
    if tol > 0 and low is None and high is None:
        x, found = _newton(sloped, y, x, parameters, shared, tol, _NEWTON_STEPS)
        if found is None:
            return x
        near = found
        x = torch.where(x.isfinite(), x, y if guess is None else guess)  # a step overflowed
        rows = None if whole else (~near).nonzero(as_tuple=True)
        at_y, at_x, *some = (_select_rows(t, near.shape, rows) for t in (y, x, *parameters))
        moved, found = _newton(sloped, at_y, at_x, some, shared, tol, _GUARDED_STEPS, guarded=True)
        x = _merge_rows(x, near, rows, moved)
        if found is None:
            return x
        near = _merge_rows(near, near, rows, found)
    rows = None if whole else (~near).nonzero(as_tuple=True)
    at_y, *some = (_select_rows(t, near.shape, rows) for t in (y, *parameters))
    guess, low, high = (
        None if t is None else _select_rows(t.expand(y.shape), near.shape, rows) for t in (guess, low, high)
    )
    unknown = _unknown(at_y, some, shared)
    start = bracket(at_y, guess, low, high, near | unknown if whole else unknown)
    return _merge_rows(x.expand(near.shape), near, rows, search(sloped, start, some, shared, tol, rows))


def _select_rows(t: Tensor, shape: torch.Size, rows: tuple[Tensor, ...] | None) -> Tensor:
    """Selects rows of a tensor whose leading dims broadcast with ``shape``; all of them if ``rows`` is None."""
    return t if rows is None else t.expand(shape + t.shape[len(shape) :])[rows]


def _merge_rows(t: Tensor, near: Tensor, rows: tuple[Tensor, ...] | None, found: Tensor) -> Tensor:
    """Puts the found roots in the places of the selected rows, or of the elements that are not ``near``."""
    return torch.where(near, t, found) if rows is None else t.index_put(rows, found)


def _newton(
    f: Sloped,
    y: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    shared: Sequence[Tensor],
    tol: float,
    count: int,
    guarded: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Performs up to ``count`` Newton steps; returns the points and whether each is accepted as a root, or None if all are.

    If ``guarded``, a step that leaves the bracket of evaluated points, or is longer than half the step before, is
    replaced by one to the middle of the bracket, or by one outwards that doubles the distance while there is no
    bracket.
    """
    bound, residual, done = tol * (1 + y.abs()), torch.full_like(y, inf), torch.zeros_like(y, dtype=torch.bool)
    low, high = torch.full_like(y, -inf), torch.full_like(y, inf)
    length, earlier = high, x  # the length of the previous Newton step, and the point that it started from
    for steps in range(count):
        value, slope = f(x, [*parameters, *shared])
        before, residual = residual, value - y
        if guarded:  # NaN from overflow lies beyond the root
            seen = ~residual.isnan() | ~x.isfinite()
            residual = residual.where(seen, inf).where(seen | (x > 0), -inf)
        step = residual / slope
        moved = x - step
        last = steps == count - 1
        if guarded or last or steps > 2 or (visible(residual) and (residual.abs() <= bound).all()):
            near, taken = _settled(x, earlier, y, step, residual, before, bound)
            held = torch.where(taken & ~done, moved, x)
            near = near | done
            if guarded:
                low, high = torch.where(residual < 0, x, low), torch.where(residual < 0, high, x)
                pinned = _within_rounding(x, residual, slope, high - low) & ~near
                held = torch.where(pinned & (moved >= low) & (moved <= high), moved, held)
                near = near | pinned
            if visible(near) and near.all():
                return held, None
            if last:
                return held, near
        if guarded:
            size, middle = step.abs(), (low + high) / 2
            middle = torch.where(middle.isfinite(), middle, x - residual.sign() * (1 + x.abs()))
            good = (moved > low) & (moved < high) & (size <= length / 2)
            moved, length = torch.where(good, moved, middle), torch.where(good, size, inf)
            moved, done = torch.where(near, held, moved), near
        earlier, x = x, moved
    raise AssertionError("unreachable")


def bisect(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Finds where a condition changes from false at ``low`` to true at ``high``, by bisection.

    Use it for conditions that have no derivative. Cost: one evaluation per step.

    Args:
        above: maps numbers (*batch) to Booleans (*batch).
        low: (*batch) finite numbers at which the condition is assumed to be false.
        high: (*batch) finite numbers at which it is assumed to be true; they may be smaller than ``low``.
        steps: the number of halvings.

    Returns:
        Numbers (*batch) at which the condition is true, within (high - low) / 2^steps of numbers at which it is false.

    Example:
        >>> import torch
        >>> bisect(lambda x: x.floor() >= 3, torch.tensor(0.0), torch.tensor(8.0), 3)
        tensor(3.)
    """
    for _ in range(steps):
        middle = (low + high) / 2
        up = above(middle)
        low, high = torch.where(up, low, middle), torch.where(up, middle, high)
    return high


def _settled(
    x: Tensor, earlier: Tensor, y: Tensor, step: Tensor, residual: Tensor, before: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns whether x is accepted as a root, and whether to take a last Newton step from it.

    Within the tolerance, that step must be only rounding of x, or small for the second time. If rounding of f exceeds
    the tolerance, the residual must be within ``_ROUGH`` tolerances for the second time and have changed its sign; the
    step is then taken if it stays between the two points.
    """
    eps, size, off, prior = torch.finfo(x.dtype).eps, step.abs(), residual.abs(), before.abs()
    tiny, fine = size <= 8 * eps * x.abs(), off < bound  # the bound is infinite for infinite y
    moved = x - step
    passed = (residual * before <= 0) & (torch.maximum(off, prior) < _ROUGH * bound)
    between = passed & ((moved - x) * (moved - earlier) <= 0)
    return (fine & (tiny | ((prior < bound) & (size <= eps**0.5 * (1 + y.abs()))))) | passed, tiny | between


def _within_rounding(x: Tensor, residual: Tensor, slope: Tensor, width: Tensor) -> Tensor:
    """Whether f passes y within rounding of x, with a residual that the slope of f explains."""
    return (width <= 2 * torch.finfo(x.dtype).eps * x.abs()) & (residual.abs() <= 8 * slope * width)


def _unknown(y: Tensor, parameters: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """Whether the target or a parameter is NaN, and hence the root."""
    unknown = y.isnan()
    for p in parameters:
        unknown = unknown | p.isnan().flatten(y.dim()).any(-1) if p.dim() > y.dim() else unknown | p.isnan()
    return unknown | torch.stack([t.isnan().any() for t in shared]).any() if shared else unknown


def _of_module(module: nn.Module, shared: Sequence[Tensor]) -> tuple[Increasing, list[Tensor]]:
    """Returns the module as a function of x, ``shared`` and its parameters, and these tensors."""
    own = dict(module.named_parameters())

    def f(x: Tensor, *tensors: Tensor) -> Any:
        cut = len(tensors) - len(own)
        weights = dict(zip(own, tensors[cut:], strict=True))
        return torch.func.functional_call(module, weights, (x, *tensors[:cut]))

    return f, [*shared, *own.values()]


def _check(y: Tensor, parameters: Sequence[Tensor], tol: float | None, **starts: Tensor | None) -> None:
    """Checks the arguments of :func:`root`."""
    if not isinstance(y, Tensor) or y.dtype not in INTEGERS:
        raise TypeError(f"Expected y to be a tensor of floating point numbers; got {getattr(y, 'dtype', type(y))}.")
    if tol is not None and not tol >= 0:
        raise ValueError(f"Expected tol >= 0; got {tol}.")
    for name, start in starts.items():
        if start is None:
            continue
        if not isinstance(start, Tensor) or start.dtype != y.dtype:
            got = getattr(start, "dtype", type(start).__name__)
            raise TypeError(f"Expected {name} to be a tensor of {y.dtype} (that of y); got {got}.")
        tail = y.shape[y.dim() - start.dim() :] if start.dim() <= y.dim() else ()
        if len(tail) != start.dim() or any(n not in (1, m) for n, m in zip(start.shape, tail, strict=True)):
            raise ValueError(
                f"Expected {name}.shape to broadcast with {tuple(y.shape)} (that of y); got {tuple(start.shape)}."
            )
    low, high = starts["low"], starts["high"]
    if low is not None and high is not None and visible(low) and not (low <= high).all():
        low, high = torch.broadcast_tensors(low, high)
        wrong = ~(low <= high)
        raise ValueError(f"Expected low <= high; got {low[wrong][0]:.6g} and {high[wrong][0]:.6g}.")
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(f"Expected parameters[{i}] to be a tensor; got {type(p).__name__}.")
        lead = tuple(p.shape[: y.dim()])
        if p.dim() < y.dim() or any(n not in (1, m) for n, m in zip(lead, y.shape, strict=True)):
            raise ValueError(
                f"Expected parameters[{i}].shape to begin with {tuple(y.shape)} or sizes of 1 (that of y); got {tuple(p.shape)}."
            )
