r"""Roots of increasing functions and integrals, elementwise over any batch: right to rounding, or an error.

Everything in this package that has no formula goes through these: :func:`root` and :func:`implicit` for what is inverted,
:func:`integrate` for what is integrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

Increasing = Callable[..., Any]
_NEWTON_STEPS = 8  # without a bracket, all rows together
_MAX_STEPS = 200  # two for each halving of 64 bits, and the expansion of the bracket
_ROUND = 6  # steps of the bracketed search between two looks at which elements are left
_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


class ConvergenceError(RuntimeError):
    """A root or an integral was not found to the accuracy that was asked for.

    Attributes:
        residual: the worst |f(x) - y|, or the worst estimate of an integral's error.
        index: of the worst element, a tuple.
        bracket: (low, high) around the root, or the bounds of the integral.

    Example:
        >>> root(torch.tanh, torch.tensor([0.5, 2.0]))
        Traceback (most recent call last):
        ...
        pyro_genexact.numerics.ConvergenceError: Expected a root of f(x) = y; got |f(x) - y| = 1 at index (1,), for y = 2 and x between 3.4028235e+38 and inf.
    """

    def __init__(self, message: str, residual: float, index: tuple[int, ...], bracket: tuple[float, float]) -> None:
        super().__init__(message)
        self.residual, self.index, self.bracket = residual, index, bracket

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.residual, self.index, self.bracket)


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

    Newton's method for all elements together, then, for those that it left, a bracket that is expanded geometrically
    around the guess and narrowed by Newton's step, or by halving the floating point numbers in it where that step leaves
    the bracket or is not half of the one before: about 2 * 64 evaluations at most, on the elements that are left.
    Differentiable to any order by y, the parameters, ``shared`` and the parameters of a module (:func:`implicit`).

    Args:
        f: maps x and the tensors to values of the shape of x, or to (values, log of the derivative); without the latter,
            autograd finds it; or an ``nn.Module``, whose parameters count as ``shared``. Tensors that f encloses must be
            without gradient, and do for all elements at once.
        y: (*batch) the targets; infinite ones give that infinity, NaN gives NaN.
        parameters: (*batch, ...) one for each element; dims of size 1 broadcast.
        shared: of any shape, the same for all elements.
        guess: (*batch), where to begin; by default y itself.
        low: (*batch) a lower end that is known to lie below the root; by default, none.
        high: (*batch) an upper end that is known to lie above it; by default, none.
        tol: a root has |f(x) - y| <= tol (1 + |y|), and a step of Newton's to go, which is then done, of at most
            sqrt(eps) (1 + |y|); by default 4 eps, eps the rounding of the dtype. With 0, the smallest number x with
            f(x) >= y, to the last bit.

    Returns:
        (*batch).

    Raises:
        ConvergenceError: where f does not reach y on either side up to the largest number, is NaN or has no root.
        ValueError: if a tensor with gradient is hidden in f, or values have another shape than x.

    Reference: Press et al., "Numerical Recipes", 3rd ed., section 9.4 (Newton's method with a bracket).

    Example:
        >>> a = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = root(lambda x, a: x**3 + a * x, torch.tensor([2.0, 12.0]), a)
        >>> x
        tensor([1., 2.], grad_fn=<_ImplicitBackward>)
        >>> torch.autograd.grad(x.sum(), a)[0]  # -x / (3 x^2 + a)
        tensor([-0.2500, -0.1429])
    """
    _checked(y, parameters)
    tensors = list(shared)
    if isinstance(f, nn.Module):
        f, tensors = _of_module(f, tensors)
    with torch.no_grad():
        x = find(f, y, parameters, tensors, guess, low, high, tol)
    if not torch.is_grad_enabled():
        return x
    detached = [t.detach() for t in (*parameters, *tensors)]
    if _value(f(x.detach(), *detached)).requires_grad:
        raise ValueError("Expected every tensor with gradient among parameters and shared; got one hidden in f.")
    return implicit(f, x, y, *parameters, *tensors)


def implicit(f: Increasing, x: Tensor, y: Tensor, *tensors: Tensor, event_dim: int = 0) -> Tensor:
    r"""The root x of f(x, *tensors) = y, found before, as a differentiable function of y and the tensors.

        dx = J^{-1} (dy - sum_i df/dtheta_i dtheta_i),      J = df/dx

    For elementwise functions J is diagonal. With ``event_dim=1``, x and y are rows (*batch, D) and J of a row is a matrix,
    for which f is differentiated D times.

    Args:
        f, tensors: as in :func:`root`; with ``event_dim=1`` f gives values alone.
        x: (*batch) the root, a constant.
        y: what f(x) equals.
        event_dim: 0 or 1.

    Returns:
        x, of the same value.

    Example:
        >>> y = torch.tensor(8.0, requires_grad=True)
        >>> x = implicit(lambda x: x**3, torch.tensor(2.0), y)
        >>> torch.autograd.grad(x, y)[0]
        tensor(0.0833)
    """
    if not torch.is_grad_enabled() or not (_functorch() or any(t.requires_grad for t in (y, *tensors))):
        return x
    if not _functorch():
        return _Implicit.apply(f, event_dim, x, y, *tensors)
    constants = [t.detach() for t in tensors]  # with a fixed slope, each step adds one order of exact derivatives
    for _ in range(2):
        x = x + _over_jacobian(f, x.detach(), constants, y - _value(f(x, *tensors)), event_dim)
    return x


def integrate(
    f: Callable[..., Tensor],
    low: Tensor,
    high: Tensor,
    *,
    tol: float | None = None,
    panels: int = 1,
    doublings: int = 6,
) -> tuple[Tensor, Tensor]:
    r"""The integral of f from low to high, elementwise, and an estimate of its error.

    Gauss-Kronrod quadrature with 7 and 15 nodes on each of ``panels`` panels of equal width, which are doubled, for all
    elements, until the error is small. Differentiable by the bounds and by whatever f computes with.

    Args:
        f: maps points (*batch, n) to values (*batch, n).
        low: (*batch) finite.
        high: (*batch) finite; may lie below ``low``.
        tol: the error allowed, relative to the integral of \|f\|; by default 1e-12 in float64, 1e-6 in float32.
        panels: to begin with.
        doublings: how many more times to try.

    Returns:
        The integral (*batch) and the estimated error (*batch), without gradient.

    Raises:
        ConvergenceError: where the error is larger after the last doubling, or f is not finite.

    Reference: Piessens et al., "QUADPACK", Springer 1983 (rules and estimate).

    Example:
        >>> value, error = integrate(torch.exp, torch.tensor(0.0), torch.tensor(1.0))
        >>> value
        tensor(1.7183)
    """
    low, high = torch.broadcast_tensors(low, high)
    tol = {torch.float64: 1e-12}.get(low.dtype, 8 * torch.finfo(low.dtype).eps) if tol is None else tol
    nodes, kronrod, gauss = kronrod_rule(low.dtype, low.device)
    for k in range(doublings + 1):
        count = panels * 2**k
        half = (high - low).unsqueeze(-1) / (2 * count)
        middles = low.unsqueeze(-1) + half * (2 * torch.arange(count, dtype=low.dtype, device=low.device) + 1)
        points = middles.unsqueeze(-1) + half.unsqueeze(-1) * nodes
        values = f(points.flatten(-2)).unflatten(-1, (count, len(nodes)))
        parts = (values * kronrod).sum(-1)
        with torch.no_grad():
            error = (_kronrod_error(values, parts, kronrod, gauss) * half.abs()).sum(-1)
            size = ((values.abs() * kronrod).sum(-1) * half.abs()).sum(-1)
            bad = ~(error <= tol * size) & ~(low.isnan() | high.isnan())
        if _functorch() or bad.is_meta or not bad.any():
            return (parts * half).sum(-1), error
    index, worst = _worst(bad, error / size)
    bounds = low[index].item(), high[index].item()
    raise ConvergenceError(
        f"Expected an integral with an error up to {tol:.3g} of its size; got {worst:.3g} at index {index}, from "
        f"{bounds[0]:.8g} to {bounds[1]:.8g}, with {count} panels.",
        worst,
        index,
        bounds,
    )


@lru_cache
def kronrod_rule(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 15 nodes on [-1, 1], Kronrod's weights, and those of Gauss's rule of 7 nodes within them."""
    nodes = [0.991455371120812639206854697526329, 0.949107912342758524526189684047851,
             0.864864423359769072789712788640926, 0.741531185599394439863864773280788,
             0.586087235467691130294144691693013, 0.405845151377397166906606412076961,
             0.207784955007898467600689403773245, 0.0]  # fmt: skip
    kronrod = [0.022935322010529224963732008058970, 0.063092092629978553290700663189204,
               0.104790010322250183839876322541518, 0.140653259715525918745189590510238,
               0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
               0.204432940075298892414161999234649, 0.209482141084727828012999174891714]  # fmt: skip
    gauss = [0.0, 0.129484966168869693270611432679082, 0.0, 0.279705391489276667901467771423780,
             0.0, 0.381830050505118944950369775488975, 0.0, 0.417959183673469387755102040816327]  # fmt: skip
    rows = [-v for v in nodes] + nodes[-2::-1], kronrod + kronrod[-2::-1], gauss + gauss[-2::-1]
    with torch.inference_mode(False):  # kept, and used under grad too
        a, b, c = (torch.tensor(row, dtype=dtype, device=device) for row in rows)
    return a, b, c


def _kronrod_error(values: Tensor, parts: Tensor, kronrod: Tensor, gauss: Tensor) -> Tensor:
    """QUADPACK's estimate: what Gauss's rule is off, raised to a power where both are close."""
    gap = (parts - (values * gauss).sum(-1)).abs()
    spread = ((values - parts.unsqueeze(-1) / 2).abs() * kronrod).sum(-1)
    scaled = (200 * gap / spread).clamp(max=1) ** 1.5 * spread
    return torch.where(spread > 0, scaled, gap)


class _Implicit(Function):
    """:func:`implicit`; its own output is the x of the backward pass, so that derivatives of any order follow."""

    @staticmethod
    def forward(ctx: Any, f: Increasing, event_dim: int, x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.f, ctx.event_dim, ctx.shape = f, event_dim, y.shape
        x = x.clone()
        ctx.save_for_backward(x, *tensors)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            parts = [t.view_as(t) for t in tensors]  # each apart from those it was computed from
            x = x if again else x.detach()
        pull = _over_jacobian(ctx.f, x, parts, grad, ctx.event_dim, transposed=True)
        needed = ctx.needs_input_grad[4:]
        wanted = [t for t, need in zip(parts, needed, strict=True) if need]
        found: Any = iter(())
        if wanted:
            with torch.enable_grad():
                value = _value(ctx.f(x, *parts))
            found = iter(torch.autograd.grad(value, wanted, -pull, create_graph=again, allow_unused=True))
        return None, None, None, pull.sum_to_size(ctx.shape), *(next(found) if need else None for need in needed)


def _over_jacobian(
    f: Increasing, x: Tensor, tensors: Sequence[Tensor], g: Tensor, event_dim: int, transposed: bool = False
) -> Tensor:
    """J^{-1} g, or with the transpose of J, at x."""
    if not event_dim:
        return g / _value_and_slope(f, x, tensors)[1]
    if _functorch():
        basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape, -1)
        pulls = [torch.func.vjp(lambda x: f(x, *tensors), x)[1](row)[0] for row in basis.unbind(-2)]
    else:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            columns = [column.sum() for column in f(x, *tensors).unbind(-1)]
        pulls = [
            torch.autograd.grad(c, x, create_graph=again, retain_graph=True, materialize_grads=True)[0] for c in columns
        ]
    jacobian = torch.stack(pulls, -2)
    return torch.linalg.solve(jacobian.mT if transposed else jacobian, g.unsqueeze(-1)).squeeze(-1)


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
    """:func:`root` as a constant: without checks of the arguments, for calls under ``no_grad``."""
    tol = 4 * torch.finfo(y.dtype).eps if tol is None else tol
    x, left = y if guess is None else guess, torch.ones_like(y, dtype=torch.bool)
    if tol > 0 and low is None and high is None:
        bound, small = _bounds(y, tol)
        for _ in range(_NEWTON_STEPS):
            value, slope = _value_and_slope(f, x, [*parameters, *shared])
            residual = value - y
            step = residual / slope
            near, last, x = (residual.abs() <= bound) & (step.abs() <= small), x, x - step
            if _all(near):
                break
        x = torch.where(x.isfinite(), x, last)  # where a flat function has no step to take
        left = ~near
        if _all(near):
            return x
    ends = [None if end is None else end.expand(y.shape) for end in (low, high)]
    start = _bracket(y, y if guess is None else guess.expand(y.shape), ends, _unknown(y, parameters, shared))
    if not parameters or _functorch():  # f may enclose tensors for all elements
        return torch.where(left, _search(f, start, parameters, shared, tol).answer, x)
    rows = left.nonzero(as_tuple=True)
    some = [p.expand(y.shape + p.shape[y.dim() :])[rows] for p in parameters]
    return x.expand(y.shape).index_put(rows, _rounds(f, start.take(rows), some, shared, tol, rows))


class _Bracket(NamedTuple):
    """Where a search stands, for each element; its numbers are integers in the order of the floating point numbers."""

    y: Tensor
    a: Tensor  # f < y there, and f >= y at b
    b: Tensor
    c: Tensor  # the next number to try, between them
    firm_a: Tensor  # whether f was seen at a, or a was given
    firm_b: Tensor
    reach: Tensor  # the next step of an expansion
    step: Tensor  # the size of the step of Newton's that led here, infinite if it was none
    worst: Tensor  # |f - y|
    answer: Tensor
    done: Tensor

    def take(self, rows: Any) -> _Bracket:
        return _Bracket(*(field[rows] for field in self))


def _bracket(y: Tensor, guess: Tensor, ends: Sequence[Tensor | None], unknown: Tensor) -> _Bracket:
    limits = [torch.full_like(y, limit) if end is None else end for end, limit in zip(ends, (-inf, inf), strict=True)]
    a, b = (_ordered(limit) for limit in limits)
    c = torch.maximum(torch.minimum(_ordered(torch.where(guess.isfinite(), guess, 0)), b - 1), a + 1)
    firm = [torch.full_like(unknown, end is not None) for end in ends]
    reach = torch.full_like(c, round(1 / torch.finfo(y.dtype).eps))  # a factor of two
    far = torch.full_like(y, inf)
    return _Bracket(
        y, a, b, c, *firm, reach, far, far, torch.where(y.isinf() & ~unknown, y, torch.nan), unknown | y.isinf()
    )


def _rounds(
    f: Increasing,
    at: _Bracket,
    parameters: Sequence[Tensor],
    shared: Sequence[Tensor],
    tol: float,
    rows: tuple[Tensor, ...],
) -> Tensor:
    """The search on fewer and fewer elements."""
    answer, place = torch.empty_like(at.y), torch.arange(len(at.y), device=at.y.device)
    for steps in range(0, _MAX_STEPS, _ROUND):
        last = steps + _ROUND >= _MAX_STEPS
        at = _search(f, at, parameters, shared, tol, _ROUND, [r[place] for r in rows], last)
        answer[place] = at.answer
        keep = ~at.done
        if not keep.any():
            break
        at, parameters, place = at.take(keep), [p[keep] for p in parameters], place[keep]
    return answer


def _search(
    f: Increasing,
    at: _Bracket,
    parameters: Sequence[Tensor],
    shared: Sequence[Tensor],
    tol: float,
    steps: int = _MAX_STEPS,
    rows: Sequence[Tensor] | None = None,
    last: bool = True,
) -> _Bracket:
    """So many steps of the bracketed search; ConvergenceError where there is no root, or, at last, none was found."""
    bound, small = _bounds(at.y, tol)
    for _ in range(steps):
        x = _number(at.c, at.y.dtype)
        value, slope = _value_and_slope(f, x, [*parameters, *shared])
        residual = value - at.y
        lost = residual.isnan()  # an overflow, so beyond the root
        residual = torch.where(lost, torch.where(x > 0, inf, -inf), residual)
        below, size, step = residual < 0, residual.abs(), -residual / slope
        a, b = torch.where(below, at.c, at.a), torch.where(below, at.b, at.c)
        firm_a, firm_b = torch.where(below, ~lost, at.firm_a), torch.where(below, at.firm_b, ~lost)
        near, tight = (size <= bound) & (step.abs() <= small) & (tol > 0), a + 1 >= b
        found = torch.where(near, x + step, _number(b, x.dtype))
        answer = torch.where(at.done | ~(near | tight & firm_a & firm_b), at.answer, found)
        done, worst = at.done | near | tight & firm_a & firm_b, torch.where(at.done, at.worst, size)
        c, reach, step = _next(at, x, step, below, a, b)
        at = _Bracket(at.y, a, b, torch.where(done, at.c, c), firm_a, firm_b, reach, step, worst, answer, done)
        if _all(done) or _any(tight & ~done):
            break
    failed = ~at.done & (last | (at.a + 1 >= at.b))
    if _any(failed):
        _fail(at, failed, rows)
    return at


def _next(at: _Bracket, x: Tensor, step: Tensor, below: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The number to try next, the reach, and the size of Newton's step where it is one: if it halves the one before.

    That step goes a little too far, so that the root comes to lie between. Else one goes outwards, or to the middle.
    """
    newton = x + step
    target = _ordered(torch.where(newton.isfinite(), newton, x)) + torch.where(below, 1, -1)
    usable = newton.isfinite() & (target > a) & (target < b) & (step.abs() <= at.step / 2)
    top = _ordered(x.new_tensor(inf))
    outwards = torch.where(below, b == top, a == -top) & ((at.c < top - at.reach) & (at.c > at.reach - top))
    middle = (a & b) + ((a ^ b) >> 1)  # the mean, without overflow
    jump = torch.where(outwards, at.c + torch.where(below, at.reach, -at.reach), middle)
    reach = torch.where(outwards & ~usable & (at.reach < top // 2), 2 * at.reach, at.reach)
    return torch.where(usable, target, jump), reach, torch.where(usable, step.abs(), inf)


def _bounds(y: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Of the residual of a root, and of the step of Newton's that remains."""
    size = 1 + y.abs()
    return tol * size, torch.finfo(y.dtype).eps ** 0.5 * size


def _fail(at: _Bracket, failed: Tensor, rows: Sequence[Tensor] | None) -> None:
    place, worst = _worst(failed, at.worst)
    index = place if rows is None else tuple(int(r[place]) for r in rows)
    low, high = (_number(end, at.y.dtype)[place].item() for end in (at.a, at.b))
    raise ConvergenceError(
        f"Expected a root of f(x) = y; got |f(x) - y| = {worst:.6g} at index {index}, for y = {at.y[place].item():.8g} and x "
        f"between {low:.8g} and {high:.8g}.",
        worst,
        index,
        (low, high),
    )


def _worst(bad: Tensor, residual: Tensor) -> tuple[tuple[int, ...], float]:
    """The index of the largest residual among the bad ones, NaN first, and that residual."""
    scores = torch.where(bad, residual.nan_to_num(nan=inf), -1.0)
    index = tuple(int(i) for i in torch.unravel_index(scores.argmax(), bad.shape))
    return index, residual[index].item()


def _unknown(y: Tensor, parameters: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """Where the target or a parameter is NaN, so that the root is."""
    unknown = y.isnan()
    for p in parameters:
        unknown = unknown | p.isnan().flatten(y.dim()).any(-1) if p.dim() > y.dim() else unknown | p.isnan()
    return unknown | torch.stack([t.isnan().any() for t in shared]).any() if shared else unknown


def _value(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _value_and_slope(f: Increasing, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    output = f(x, *tensors)
    if isinstance(output, tuple):
        return output[0], output[1].exp()
    if _functorch():
        value, pull = torch.func.vjp(lambda x: f(x, *tensors), x)
        return value, pull(torch.ones_like(value))[0]
    again = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        x = x if again else x.detach().clone().requires_grad_()
        value = f(x, *tensors)
        if value.shape != x.shape:
            raise ValueError(f"Expected f(x).shape == {tuple(x.shape)} (that of x); got {tuple(value.shape)}.")
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=again, materialize_grads=True)
    return (value, slope) if again else (value.detach(), slope)


def _of_module(module: nn.Module, shared: Sequence[Tensor]) -> tuple[Increasing, list[Tensor]]:
    """The module as a function of its parameters too."""
    names, weights = zip(*module.named_parameters(), strict=True) if [*module.parameters()] else ((), ())
    count = len(shared)

    def f(x: Tensor, *tensors: Tensor) -> Any:
        own = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
        return torch.func.functional_call(module, own, (x, *tensors[: len(tensors) - len(names)]))

    return f, [*shared[:count], *weights]


def _checked(y: Tensor, parameters: Sequence[Tensor]) -> None:
    if not isinstance(y, Tensor) or y.dtype not in _INTEGERS:
        raise TypeError(f"Expected y to be a tensor of floating point numbers; got {getattr(y, 'dtype', type(y))}.")
    for i, p in enumerate(parameters):
        lead = tuple(p.shape[: y.dim()])
        if p.dim() < y.dim() or any(n not in (1, m) for n, m in zip(lead, y.shape, strict=True)):
            raise ValueError(
                f"Expected parameters[{i}].shape to begin with {tuple(y.shape)} or sizes of 1 (that of y); got {tuple(p.shape)}."
            )


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the floating point numbers, neighbours to neighbours, 0 to 0."""
    bits = x.contiguous().view(_INTEGERS[x.dtype])
    return torch.where(bits < 0, -(bits & torch.iinfo(bits.dtype).max), bits)


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_ordered`, up to the sign of zero."""
    return torch.where(order < 0, -order | torch.iinfo(order.dtype).min, order).view(dtype)


def _functorch() -> bool:
    """Whether the code runs under a transform of torch.func, which can't branch on values."""
    return torch._C._are_functorch_transforms_active()


def _all(mask: Tensor) -> bool:
    return not (_functorch() or mask.is_meta) and bool(mask.all())


def _any(mask: Tensor) -> bool:
    return not (_functorch() or mask.is_meta) and bool(mask.any())
