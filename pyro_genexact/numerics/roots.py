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

_NEWTON_STEPS = 7  # all elements together
_GUARDED_STEPS = 32  # of Newton's method between the numbers that were seen, for elements that are left
_ROUGH = 4  # times the tolerance


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
    r"""x with f(x, *parameters, *shared) = y, elementwise, for a function that increases in x.

    Seven steps of Newton's method for all elements together; then 32 at most, for those that it left, between the numbers
    where f was seen to pass y; then, for those that are left by now (kinks, flats, scales far from 1), a bracket that is
    expanded geometrically around the guess and narrowed by Newton's step, or by halving the floating point numbers in it:
    130 at most. Smooth functions near the identity take some six evaluations. With ``low``, ``high`` or tol=0 the bracket is
    all. If f takes parameters, elements that are done are dropped before the second and third stage, and in the third when
    they are half. Differentiable to any order by y, the parameters, ``shared`` and the parameters of a module
    (:func:`implicit`).

    Under the transforms of ``torch.func``, which cannot branch on values, all steps are done, and what would be a
    ConvergenceError is NaN; derivatives are right up to the third order.

    Args:
        f: maps x and the tensors to values of the shape of x, or to (values, log of the derivative); without the latter,
            autograd finds it; or an ``nn.Module``, whose parameters count as ``shared``. Tensors that f encloses must be
            without gradient, and do for all elements at once.
        y: (*batch) the targets; infinite ones give that infinity, NaN gives NaN.
        parameters: (*batch, ...) one for each element; dims of size 1 broadcast.
        shared: of any shape, the same for all elements.
        guess: (*batch), where to begin; by default y itself.
        low: (*batch) the least number at which f is defined; by default, the least there is.
        high: (*batch) the largest number at which f is defined; by default, the largest there is.
        tol: how near f(x) must come to y, as a share of 1 + |y|: so absolutely where y is small; scale f where that is not
            meant. Also, the step of Newton's from x must be rounding of x (it is done then), or, for the second time within
            tol, at most sqrt(eps) (1 + |y|), eps the rounding of the dtype. By default 4 eps. Where f is rougher than that,
            4 tol will do, if Newton's step has passed y from within 4 tol; and where f is so steep that rounding of x is more, a
            number within that of the root. Where f is too steep or flat for all that, and
            everywhere with tol=0: the smallest number x with f(x) >= y, to the last bit.

    Returns:
        (*batch).

    Raises:
        ConvergenceError: where f is below or above y at all numbers, or NaN around the root.
        ValueError: if a tensor with gradient is hidden in f, or values have another shape than x.

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
        raise ValueError("Expected every tensor with gradient among parameters and shared; got one hidden in f.")
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
    """:func:`root` as a constant, without checks of the arguments and without modules; to be called under ``no_grad``.

    For classes that call :func:`implicit` on their own.

    Example:
        >>> import torch
        >>> find(lambda x: (x**3, torch.log(3 * x**2)), torch.tensor(8.0))
        tensor(2.)
    """
    if y.is_meta:
        return torch.empty_like(y)
    tol = 4 * torch.finfo(y.dtype).eps if tol is None else tol
    sloped, x = Sloped(f), y if guess is None else guess
    whole = not parameters or not y.dim() or transformed()  # f may enclose tensors for all elements
    near = torch.zeros_like(y, dtype=torch.bool)
    if tol > 0 and low is None and high is None:
        x, near = _newton(sloped, y, x, parameters, shared, tol, _NEWTON_STEPS)
        if visible(near) and near.all():
            return x
        x = torch.where(x.isfinite(), x, y if guess is None else guess)  # some step was too far
        rows = None if whole else (~near).nonzero(as_tuple=True)
        at_y, at_x, *some = (_of_rows(t, near.shape, rows) for t in (y, x, *parameters))
        moved, found = _newton(sloped, at_y, at_x, some, shared, tol, _GUARDED_STEPS, guarded=True)
        x, near = _put(x, near, rows, moved), _put(near, near, rows, found)
        if visible(near) and near.all():
            return x
    rows = None if whole else (~near).nonzero(as_tuple=True)
    at_y, *some = (_of_rows(t, near.shape, rows) for t in (y, *parameters))
    guess, low, high = (
        None if t is None else _of_rows(t.expand(y.shape), near.shape, rows) for t in (guess, low, high)
    )
    unknown = _unknown(at_y, some, shared)
    start = bracket(at_y, guess, low, high, near | unknown if whole else unknown)
    return _put(x.expand(near.shape), near, rows, search(sloped, start, some, shared, tol, rows))


def _of_rows(t: Tensor, shape: torch.Size, rows: tuple[Tensor, ...] | None) -> Tensor:
    """A tensor that broadcasts with the shape, or begins so, of these rows; of all as it is."""
    return t if rows is None else t.expand(shape + t.shape[len(shape) :])[rows]


def _put(t: Tensor, near: Tensor, rows: tuple[Tensor, ...] | None, found: Tensor) -> Tensor:
    """What was found, in the place of the rows that were left."""
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
) -> tuple[Tensor, Tensor]:
    """So many steps of Newton's method at most, and whether each element is a root by now.

    Guarded: a step that leaves the numbers between which f was seen to pass y, or is more than half of the one before, goes
    to their middle instead, or outwards by as much again while there is no bracket.
    """
    bound, residual, done = tol * (1 + y.abs()), torch.full_like(y, inf), torch.zeros_like(y, dtype=torch.bool)
    low, high = torch.full_like(y, -inf), torch.full_like(y, inf)
    length, earlier = high, x  # of the step before, if it was Newton's; and where that began
    for steps in range(count):
        value, slope = f(x, [*parameters, *shared])
        before, residual = residual, value - y
        if guarded:  # NaN by overflow: beyond the root
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
                pinned = _pinned(x, residual, slope, high - low) & ~near
                held = torch.where(pinned & (moved >= low) & (moved <= high), moved, held)
                near = near | pinned
            if last or (visible(near) and near.all()):
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
    """Where a condition becomes true between low, where it is taken to be false, and high, where it is taken to be true.

    For what has no slope to go by, or steps; one evaluation a step.

    Args:
        above: maps numbers (*batch) to booleans (*batch).
        low, high: (*batch) finite, in either order.
        steps: how often to halve the interval.

    Returns:
        (*batch) the end at which it is true, (high - low) / 2^steps from one at which it is not.

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
    """Whether x is a root, given the residuals there and earlier, and whether the step of Newton's from it shall be taken.

    Within the tolerance, that step must be rounding of x or, for the second time, small. Where rounding of f is more than
    the tolerance, the residual must be within _ROUGH of it for the second time, now on the other side; the step is taken if it stays
    between.
    """
    eps, size, off, prior = torch.finfo(x.dtype).eps, step.abs(), residual.abs(), before.abs()
    tiny, fine = size <= 8 * eps * x.abs(), off < bound  # which is infinite for infinite y
    moved = x - step
    passed = (residual * before <= 0) & (torch.maximum(off, prior) < _ROUGH * bound)
    between = passed & ((moved - x) * (moved - earlier) <= 0)
    return (fine & (tiny | ((prior < bound) & (size <= eps**0.5 * (1 + y.abs()))))) | passed, tiny | between


def _pinned(x: Tensor, residual: Tensor, slope: Tensor, width: Tensor) -> Tensor:
    """Whether f passes y within the rounding of x, and the residual is what its slope makes of that."""
    return (width <= 2 * torch.finfo(x.dtype).eps * x.abs()) & (residual.abs() <= 8 * slope * width)


def _unknown(y: Tensor, parameters: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """Where the target or a parameter is NaN, so that the root is."""
    unknown = y.isnan()
    for p in parameters:
        unknown = unknown | p.isnan().flatten(y.dim()).any(-1) if p.dim() > y.dim() else unknown | p.isnan()
    return unknown | torch.stack([t.isnan().any() for t in shared]).any() if shared else unknown


def _of_module(module: nn.Module, shared: Sequence[Tensor]) -> tuple[Increasing, list[Tensor]]:
    """The module as a function of its parameters too."""
    own = dict(module.named_parameters())

    def f(x: Tensor, *tensors: Tensor) -> Any:
        cut = len(tensors) - len(own)
        weights = dict(zip(own, tensors[cut:], strict=True))
        return torch.func.functional_call(module, weights, (x, *tensors[:cut]))

    return f, [*shared, *own.values()]


def _check(y: Tensor, parameters: Sequence[Tensor], tol: float | None, **starts: Tensor | None) -> None:
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
        raise ValueError("Expected low <= high; got others, or NaN.")
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(f"Expected parameters[{i}] to be a tensor; got {type(p).__name__}.")
        lead = tuple(p.shape[: y.dim()])
        if p.dim() < y.dim() or any(n not in (1, m) for n, m in zip(lead, y.shape, strict=True)):
            raise ValueError(
                f"Expected parameters[{i}].shape to begin with {tuple(y.shape)} or sizes of 1 (that of y); got {tuple(p.shape)}."
            )
