"""Bracketed search for a root over the floating-point numbers, the last stage of ``root``."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..core.functional import compiling, visible
from .derivatives import Sloped
from .errors import ConvergenceError, worst_of

_FREE_STEPS = 64  # steps of any kind
_HALVINGS = 66  # then halvings only, enough for the 64 bits of a number
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""The integer dtypes of the same width as each floating-point dtype."""


class Bracket(NamedTuple):
    """The state of a search, per element. Points a, b, c are integers in the order of the floating-point numbers."""

    y: Tensor
    a: Tensor  # f(a) < y and f(b) >= y; initially just outside the allowed interval
    b: Tensor
    c: Tensor  # the next point to evaluate, between a and b
    at_a: Tensor  # f(a) - y, NaN if f has not been evaluated at a
    at_b: Tensor
    runs: Tensor  # the number of consecutive points with f < y; negative for points with f >= y
    step: Tensor  # the size of the Newton step that led to c, infinite for another step, -1 once it is only rounding
    fine: Tensor  # whether that Newton step started within the tolerance
    answer: Tensor  # the root, NaN if it has not been found
    done: Tensor

    def take(self, rows: Tensor) -> Bracket:
        """Returns the state of some elements."""
        return Bracket(*(field[rows] for field in self))


def bracket(y: Tensor, guess: Tensor | None, low: Tensor | None, high: Tensor | None, known: Tensor) -> Bracket:
    """Returns the initial state of a search between ``low`` and ``high``; elements marked ``known`` are skipped."""
    guess, top = y if guess is None else guess, torch.full_like(y, torch.finfo(y.dtype).max)
    low, high = -top if low is None else torch.maximum(low, -top), top if high is None else torch.minimum(high, top)
    a, b = _ordered(low) - 1, _ordered(high) + 1
    c = torch.maximum(torch.minimum(_ordered(torch.where(guess.isfinite(), guess, 0)), b - 1), a + 1)
    unseen, far, no = torch.full_like(y, nan), torch.full_like(y, inf), torch.zeros_like(known)
    answer = torch.where(known, nan, y)
    return Bracket(y, a, b, c, unseen, unseen, torch.zeros_like(c), far, no, answer, known | y.isinf())


def search(
    f: Sloped,
    at: Bracket,
    parameters: Sequence[Tensor],
    shared: Sequence[Tensor],
    tol: float,
    rows: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Searches for the roots, starting from brackets.

    If ``rows`` is given, finished elements are dropped whenever at least half of them are finished.

    Raises:
        ConvergenceError: if an element has no root in its bracket.
    """
    answer, place = at.answer.clone(), None if rows is None else torch.arange(len(at.y), device=at.y.device)
    for steps in range(_FREE_STEPS + _HALVINGS):
        if place is not None and 2 * int(at.done.sum()) >= len(place):
            answer[place] = at.answer
            left = (~at.done).nonzero()[:, 0]
            at, parameters, place = at.take(left), [p[left] for p in parameters], place[left]
        if visible(at.done) and at.done.all():
            break
        before, at = at, _narrowed(f, at, parameters, shared, tol, free=steps < _FREE_STEPS)
        failed = at.done & ~before.done & at.answer.isnan()
        if visible(failed) and failed.any():
            _fail(at, failed, None if place is None else [r[place] for r in rows or ()])
    if place is None:
        return at.answer
    answer[place] = at.answer
    return answer


def _narrowed(
    f: Sloped, at: Bracket, parameters: Sequence[Tensor], shared: Sequence[Tensor], tol: float, free: bool
) -> Bracket:
    """Evaluates f at the next point of each bracket and returns the narrowed brackets.

    The following point is Newton's if the step is at most half of the step before. It is moved a little further, and
    more so the longer the root has been on the same side, so that the bracket closes from both sides. Otherwise the
    point moves away in growing steps while the other end is unknown, and else to the middle of the floating-point
    numbers in the bracket. It is always that middle once Newton steps are only rounding, and if ``free`` is False.
    """
    x = _number(at.c, at.y.dtype)
    value, slope = f(x, [*parameters, *shared])
    residual = value - at.y
    below = (residual < 0) | (residual.isnan() & (x <= 0))  # NaN from overflow lies beyond the root
    a, b = torch.where(below, at.c, at.a), torch.where(below, at.b, at.c)
    at_a, at_b = torch.where(below, residual, at.at_a), torch.where(below, at.at_b, residual)
    runs = torch.where(below, at.runs.clamp(min=0) + 1, at.runs.clamp(max=0) - 1)

    info, one = torch.finfo(x.dtype), torch.where(below, 1, -1).to(a.dtype)
    octave, far, other = round(-log2(info.eps)), runs.abs() - 1, torch.where(below, b, a)
    step = -residual / slope
    size, target = step.abs(), x + step
    tiny = size <= 8 * torch.finfo(x.dtype).eps * x.abs()
    rounded = (at.step < 0) | (tiny & (far == 0) & at.step.isfinite())  # Newton's method passed the root
    half = _number(b, x.dtype) / 2 - _number(a, x.dtype) / 2
    newton = _ordered(torch.where(target.isfinite(), target, x)) + (one << (2 * far).clamp(max=octave - 4))
    usable = (newton > a) & (newton < b) & (size <= half) & (size <= at.step / 2) & size.isfinite() & ~rounded & free

    unseen = torch.where(below, at_b, at_a).isnan()
    onwards = at.c + (one << (octave + far).clamp(max=torch.iinfo(a.dtype).bits - 3))  # may wrap around
    from_0 = torch.where(unseen, one * ((round(log2(info.max)) - 1) << octave), other - (one << octave))  # 1 or -1
    onwards = torch.where(at.c == 0, from_0, onwards)
    wide = (unseen | ((at.c ^ other) < 0) | (at.c == 0) | (other == 0)) & (onwards > a) & (onwards < b) & free
    middle = (a & b) + ((a ^ b) >> 1)  # the mean, without overflow
    c = torch.where(usable, newton, torch.where(wide, onwards, middle))

    bound = tol * (1 + at.y.abs())
    fine = (residual.abs() <= bound) & (tol > 0)
    small = size <= torch.finfo(x.dtype).eps ** 0.5 * (1 + at.y.abs())
    near = fine & (tiny | ((at.fine | ~usable) & small))
    closed = b - 1 <= a
    reached = ~at_b.isnan() & (~at_a.isnan() | (at_b <= bound))  # the latter if f is flat down to the smallest number
    found = torch.where(closed & reached, _number(b, x.dtype), nan)
    found = torch.where(near, torch.where(tiny, target, x), found)
    answer, done = torch.where(at.done, at.answer, found), at.done | near | closed
    step = torch.where(usable, size, torch.where(rounded, -1.0, inf))
    return Bracket(at.y, a, b, torch.where(done, at.c, c), at_a, at_b, runs, step, fine & usable, answer, done)


def _fail(at: Bracket, failed: Tensor, rows: Sequence[Tensor] | None) -> None:
    """Raises a ConvergenceError for the worst of the failed elements."""
    nearer = torch.fmin(at.at_a.abs(), at.at_b.abs())
    place, worst = worst_of(failed, nearer)
    index = place if rows is None else tuple(int(r[place]) for r in rows)
    low, high = (_number(end, at.y.dtype)[place].item() for end in (at.a, at.b))
    raise ConvergenceError(
        f"Expected a root of f(x) = y; got |f(x) - y| = {worst:.6g} at index {index}, for y = {at.y[place].item():.8g} and x "
        f"between {low:.8g} and {high:.8g}.",
        worst,
        index,
        (low, high),
    )


class _Bits(Function):
    """Reinterprets the bits of a tensor in another dtype, without gradient. Torch 2.6 has no vmap rule for this."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.contiguous().view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int | None]:
        return _Bits.apply(x, dtype), in_dims[0]


def _bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().contiguous().view(dtype) if compiling() else _Bits.apply(x, dtype)


def _ordered(x: Tensor) -> Tensor:
    """Maps floating-point numbers to consecutive integers in the same order, with 0 mapped to 0."""
    bits = _bits(x, INTEGERS[x.dtype])
    return torch.where(bits < 0, -(bits & torch.iinfo(bits.dtype).max), bits)


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_ordered`, up to the sign of zero."""
    return _bits(torch.where(order < 0, -order | torch.iinfo(order.dtype).min, order), dtype)
