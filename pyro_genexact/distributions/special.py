"""Incomplete beta and gamma functions, differentiable by all arguments, which torch lacks."""

from __future__ import annotations

from math import log, pi
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd import Function

_FRACTION_STEPS = 20_000  # the continued fraction takes about sqrt(max(a, b)) of them


def betainc(a: Tensor, b: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""The regularised incomplete beta function I_x(a, b), for a and b from 1e-2 to 1e6 and more, to 5e-12 relative.

        I_x(a, b) = \int_0^x t^{a-1} (1-t)^{b-1} dt / B(a, b),

    by a continued fraction (evaluated by Lentz's method), of I_y(b, a) = 1 - I_x(a, b) where that converges faster. Computed in float64,
    given back in the dtype of x. Differentiable by a, b and x.

    Args:
        a: positive; a, b and x broadcast.
        b: positive.
        x: in [0, 1].
        y: 1 - x, where it is known better than x tells.

    Raises:
        RuntimeError: for a fraction that has not converged.

    References: DiDonato, Morris (1992), "Significant digit computation of the incomplete beta function ratios", ACM TOMS
    18, eq. 9 (the fraction); Loader (2000), "Fast and accurate computation of binomial probabilities" (the factor
    before it, without cancellation for large a and b).

    Example:
        >>> betainc(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5))
        tensor(0.6875)
    """
    y = 1 - x if y is None else y
    log_beta = torch.lgamma(a.double()) + torch.lgamma(b.double()) - torch.lgamma(a.double() + b)
    density = torch.exp(torch.special.xlogy(a - 1, x.double()) + torch.special.xlogy(b - 1, y.double()) - log_beta)
    below = plain_betainc(a.detach(), b.detach(), x.detach(), y.detach()).to(x)
    return Smooth.apply(x, below, density.to(x), lambda x, a, b: plain_betainc(a, b, x, 1 - x), a, b)


def gammainc(a: Tensor, x: Tensor) -> Tensor:
    """torch.special.gammainc, differentiable by a too."""
    a, x = torch.broadcast_tensors(a, x)
    density = dist.Gamma(a, torch.ones_like(a), validate_args=False).log_prob(x).exp()
    return Smooth.apply(x, torch.special.gammainc(a.detach(), x.detach()), density, _lower_gamma, a)


class Smooth(Function):
    """A cdf computed without gradient: the density is its derivative by the value, autograd runs through
    ``evaluate(value, *shape_parameters)`` where one by a shape parameter is asked for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, result: Tensor, density: Tensor, evaluate: Any, *shapes: Tensor) -> Tensor:
        ctx.save_for_backward(value, density, *shapes)
        ctx.evaluate = evaluate
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, density, *shapes = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        by_shape: list[Tensor | None] = [None] * len(shapes)
        if any(needed):
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                result = ctx.evaluate(value, *shapes).to(grad)
                wanted = [shape for shape, need in zip(shapes, needed, strict=True) if need]
                found = iter(torch.autograd.grad(result, wanted, grad, create_graph=again))
            by_shape = [next(found) if need else None for need in needed]
        return (grad * density).sum_to_size(value.shape), None, None, None, *by_shape


def plain_betainc(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    a, b, x, y = torch.broadcast_tensors(a.double(), b.double(), x.double(), y.double())
    low, high = x == 0, y == 0
    x, y = (torch.where(low | high, 0.5, t) for t in (x, y))
    swap = x > (a + 1) / (a + b + 2)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    x, y = torch.where(swap, y, x), torch.where(swap, x, y)
    below = torch.exp(_log_front(a, b, x, y)) / a * _fraction(a, b, x, y)
    return torch.where(low, 0, torch.where(high, 1, torch.where(swap, 1 - below, below)))


def _log_front(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log(x^a y^b / B(a, b)), by Stirling's formula and deviances, so that large terms never cancel."""
    n = a + b
    # a log(n x / a) + b log(n y / b), each less its linear part: the two parts add up to 0
    deviance = _deviance(a, n * x) + _deviance(b, n * y)
    return deviance + 0.5 * torch.log(a / n * b / (2 * pi)) + _remainder(n) - _remainder(a) - _remainder(b)


def _deviance(a: Tensor, mean: Tensor) -> Tensor:
    """a (log(mean / a) - (mean / a - 1))."""
    excess = (mean - a) / a
    near = excess.abs() < 0.5
    return a * (torch.where(near, torch.log1p(torch.where(near, excess, 0)), torch.log(mean / a)) - excess)


def _remainder(a: Tensor) -> Tensor:
    """lgamma(a) less Stirling's formula."""
    large = a > 10
    big, small = torch.where(large, a, 10), torch.where(large, 10, a)
    r = 1 / big**2
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r * (1 / 1188 - r * 691 / 360360))))) / big
    return torch.where(
        large, series, torch.lgamma(small) - (small - 0.5) * torch.log(small) + small - 0.5 * log(2 * pi)
    )


def _fraction(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """a B(a, b) I_x(a, b) / (x^a y^b) by its continued fraction, for x up to about the mean a / (a + b) of the law."""
    excess = a * y - b * x + 1  # the only place where large terms meet: exact to rounding by y

    def partial(n: int) -> Tensor:
        return n + n * (b - n) * x / (a + (2 * n - 1)) + (a + n) * (excess + n * (1 + y)) / (a + (2 * n + 1))

    value = c = a * excess / (a + 1)
    d = torch.zeros_like(x)
    for n in range(1, _FRACTION_STEPS):
        numerator = (a + (n - 1)) * (a + b + (n - 1)) * n * (b - n) * (x / (a + (2 * n - 1))) ** 2
        term = partial(n)
        d = 1 / (term + numerator * d)
        c = term + numerator / c
        value = value * (c * d)
        if n % 8 == 0:
            error = (c * d - 1).abs()
            if bool((error < 2e-15).all()):
                return a / value
    worst = int(error.argmax())
    raise RuntimeError(
        f"Expected the continued fraction of betainc to converge in {_FRACTION_STEPS} steps; got a change of "
        f"{error.flatten()[worst].item():.1e} at a={a.flatten()[worst].item()}, b={b.flatten()[worst].item()}, "
        f"x={x.flatten()[worst].item()}."
    )


def _lower_gamma(x: Tensor, a: Tensor) -> Tensor:
    """The regularised lower incomplete gamma function, by its series and its continued fraction (Press et al., 6.2)."""
    a, x = torch.broadcast_tensors(a.double(), x.double())
    below, zero = x < a + 1, x == 0
    near, far = torch.where(below & ~zero, x, a), torch.where(below, a + 1, x)
    term = total = 1 / a
    d = c = value = 1 / (far + 1 - a)
    c = torch.full_like(d, 1e300)
    for n in range(1, _FRACTION_STEPS):
        term = term * near / (a + n)
        total = total + term
        step = far + (2 * n + 1) - a
        d = 1 / (step - n * (n - a) * d)
        c = step - n * (n - a) / c
        value = value * (c * d)
        if n % 8 == 0 and bool(((term < 1e-17 * total) & ((c * d - 1).abs() < 2e-15)).all()):
            break
    else:
        raise RuntimeError(
            f"Expected the series of gammainc to converge in {_FRACTION_STEPS} steps; got a up to {a.max()}."
        )
    series, fraction = (torch.exp(_log_gamma_front(a, t)) * v for t, v in ((near, total), (far, value)))
    return torch.where(zero, 0, torch.where(below, series, 1 - fraction))


def _log_gamma_front(a: Tensor, x: Tensor) -> Tensor:
    """log(x^a e^-x / Gamma(a))."""
    return _deviance(a, x) + 0.5 * torch.log(a / (2 * pi)) - _remainder(a)
