"""Closed forms of cdfs and quantiles, accurate in the left tail, and the incomplete beta and gamma functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, pi, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, sigmoid
from torch.autograd import Function
from torch.nn.functional import logsigmoid, softplus

from ..numerics.errors import ConvergenceError, worst_of

_FRACTION_STEPS = 20_000  # the continued fraction takes about sqrt(max(a, b)) of them


def betainc(a: Tensor, b: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""Computes the regularised incomplete beta function I_x(a, b).

        I_x(a, b) = \int_0^x t^{a-1} (1-t)^{b-1} dt / B(a, b)

    A continued fraction is evaluated by Lentz's method, for I_y(b, a) = 1 - I_x(a, b) if that converges faster. The
    relative error is at most 5e-12 for a and b between 1e-2 and 1e6. Computation is in float64, and the result has the
    dtype of x. It is differentiable with respect to a, b and x.

    Args:
        a: positive numbers; a, b and x broadcast.
        b: positive numbers.
        x: numbers in [0, 1].
        y: 1 - x, if it is known more precisely than by subtraction.

    Raises:
        ConvergenceError: if the fraction does not converge.

    References: DiDonato, Morris (1992), "Significant digit computation of the incomplete beta function ratios", ACM
    TOMS 18, eq. 9 (the fraction); Loader (2000), "Fast and accurate computation of binomial probabilities" (its factor,
    which does not cancel for large a and b).

    Example:
        >>> betainc(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5))
        tensor(0.6875)
    """
    if y is None:
        y = 1 - x.double()
    else:  # dx = -dy, and derivatives are more accurate with respect to the smaller one
        x = torch.where(x < y, x, x.detach() + (y.detach() - y))
    log_beta = torch.lgamma(a.double()) + torch.lgamma(b.double()) - torch.lgamma(a.double() + b)
    density = torch.exp(torch.special.xlogy(a - 1, x.double()) + torch.special.xlogy(b - 1, y.double()) - log_beta)
    below = plain_betainc(a.detach(), b.detach(), x.detach(), y.detach()).to(x)
    exact = y.detach()

    def evaluate(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return plain_betainc(a, b, x, exact + (x.detach() - x))  # y with gradient -1 by x

    return Smooth.apply(x, below, density.to(x), evaluate, a, b)


def gammainc(a: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """Computes the regularised lower or upper incomplete gamma function, also differentiable with respect to a."""
    a, x = torch.broadcast_tensors(a, x)
    function = torch.special.gammaincc if upper else torch.special.gammainc
    result = function(a.detach().double(), x.detach().double()).to(x)
    density = dist.Gamma(a, torch.ones_like(a), validate_args=False).log_prob(x).exp()
    sign = -1 if upper else 1
    return Smooth.apply(x, result, sign * density, lambda x, a: sign * _lower_gamma(x, a), a)


def student_cdf(z: Tensor, df: Tensor) -> Tensor:
    """Returns the cdf of the standard Student distribution."""
    density = dist.StudentT(df, validate_args=False).log_prob(z).exp()
    return Smooth.apply(z, _plain_student(z.detach(), df.detach()).to(z), density, _plain_student, df)


def _plain_student(z: Tensor, df: Tensor) -> Tensor:
    square = torch.where(z == 0, 1, z.double() ** 2)
    tail = 0.5 * plain_betainc(df / 2, torch.full_like(df, 0.5), 1 / (1 + square / df), 1 / (1 + df / square))
    peak = dist.StudentT(df, validate_args=False).log_prob(torch.zeros_like(df)).exp()  # for the slope at 0
    return torch.where(z == 0, 0.5 + z * peak, torch.where(z > 0, 1 - tail, tail))


def tilted_cdf(logits: Tensor, x: Tensor) -> Tensor:
    """Returns (exp(x l) - 1) / (exp(l) - 1), the cdf on [0, 1] of a density proportional to exp(x l)."""
    near = logits.abs() < 1e-4
    far = torch.where(near, 1, logits)
    size = far.abs()
    ratio = torch.exp(torch.where(far > 0, (x - 1) * far, 0)) * torch.expm1(-size * x) / torch.expm1(-size)
    low = torch.where(near, logits, 0)
    series = x * (1 + (x - 1) * low / 2 * (1 + (2 * x - 1) * low / 6 + x * (x - 1) * low**2 / 12))
    return torch.where(near, series, ratio)


def symmetric_cdf(left: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Extends the cdf at z <= 0 of a distribution that is symmetric about 0 to all z."""

    def cdf(z: Tensor) -> Tensor:
        tail = left(torch.where(z < 0, z, -z))
        return torch.where(z < 0, tail, 1 - tail)

    return cdf


def symmetric_quantile(left: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Extends the quantile function at u <= 1/2 of a distribution that is symmetric about 0 to all u."""

    def quantile(u: Tensor) -> Tensor:
        tail = left(torch.where(u < 0.5, u, 1 - u))
        return torch.where(u < 0.5, tail, -tail)

    return quantile


def tan_half_pi(u: Tensor) -> Tensor:
    """Returns tan(pi u / 2), infinite at 1."""
    return torch.where(u < 0.5, torch.tan(pi / 2 * u), 1 / torch.tan(pi / 2 * (1 - u)))


def normal_cdf(z: Tensor) -> Tensor:
    """Returns the standard normal cdf, by erfc because torch.special.ndtr underflows in the left tail."""
    return torch.special.erfc(-z / sqrt(2)) / 2


class Smooth(Function):
    """Adds gradients to a cdf that was computed without gradient.

    The derivative with respect to the value is the density. Those with respect to shape parameters are computed by
    autograd through ``evaluate(value, *shape_parameters)``, only if they are needed.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, result: Tensor, density: Tensor, evaluate: Any, *shapes: Tensor) -> Tensor:
        ctx.save_for_backward(value, density, *shapes)
        ctx.evaluate = evaluate
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, density, *shapes = ctx.saved_tensors
        with torch.enable_grad():  # new graph nodes, in case one tensor is given twice or was computed from another
            shapes = [t.view_as(t) for t in shapes]
        by_shape = needed_grads(lambda: ctx.evaluate(value, *shapes).to(grad), shapes, ctx.needs_input_grad[4:], grad)
        return (grad * density).sum_to_size(value.shape), None, None, None, *by_shape


def needed_grads(
    evaluate: Callable[[], Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Returns the gradient of ``evaluate()`` by each input, None if it is not needed. For use in a backward pass."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    if not wanted:
        return [None] * len(needed)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        result = evaluate()
    found = iter(torch.autograd.grad(result, wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


def plain_betainc(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Computes :func:`betainc` in float64, without the density as derivative by x."""
    a, b, x, y = torch.broadcast_tensors(a.double(), b.double(), x.double(), y.double())
    low, high = x == 0, y == 0
    x, y = (torch.where(low | high, 0.5, t) for t in (x, y))
    swap = x > (a + 1) / (a + b + 2)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    x, y = torch.where(swap, y, x), torch.where(swap, x, y)
    below = torch.exp(_log_front(a, b, x, y)) / a * _fraction(a, b, x, y)
    return torch.where(low, 0, torch.where(high, 1, torch.where(swap, 1 - below, below)))


def _log_front(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns log(x^a y^b / B(a, b)), by Stirling's formula and deviances, so that large terms do not cancel."""
    n = a + b
    # a log(n x / a) + b log(n y / b), each minus its linear part; the linear parts add up to 0
    deviance = _deviance(a, n * x) + _deviance(b, n * y)
    return deviance + 0.5 * torch.log(a / n * b / (2 * pi)) + _remainder(n) - _remainder(a) - _remainder(b)


def _deviance(a: Tensor, mean: Tensor) -> Tensor:
    """Returns the deviance a (log(mean / a) - (mean / a - 1))."""
    excess = (mean - a) / a
    near = excess.abs() < 0.5
    return a * (torch.where(near, torch.log1p(torch.where(near, excess, 0)), torch.log(mean / a)) - excess)


def _remainder(a: Tensor) -> Tensor:
    """Returns lgamma(a) minus Stirling's formula."""
    large = a > 10
    big, small = torch.where(large, a, 10), torch.where(large, 10, a)
    r = 1 / big**2
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r * (1 / 1188 - r * 691 / 360360))))) / big
    return torch.where(
        large, series, torch.lgamma(small) - (small - 0.5) * torch.log(small) + small - 0.5 * log(2 * pi)
    )


def log_gamma_ratio(a: Tensor, h: float) -> Tensor:
    """Returns lgamma(a + h) - lgamma(a) for h >= 0, without cancellation for large a."""
    b = a + h
    return _remainder(b) - _remainder(a) + (a - 0.5) * torch.log1p(h / a) + h * torch.log(b) - h


def _fraction(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns a B(a, b) I_x(a, b) / (x^a y^b) by its continued fraction, for x up to about the mean a / (a + b)."""
    excess = a * y - b * x + 1  # large terms may cancel here, but an exact y keeps the error within rounding

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
    index, worst = worst_of(~(error < 2e-15), error)
    raise ConvergenceError(
        f"Expected the continued fraction of betainc to converge in {_FRACTION_STEPS} steps; got a change of "
        f"{worst:.1e} at a={a[index].item()}, b={b[index].item()}, x={x[index].item()}.",
        worst,
        index,
        (0.0, x[index].item()),
    )


def _lower_gamma(x: Tensor, a: Tensor) -> Tensor:
    """Computes the regularised lower incomplete gamma function by series and continued fraction (Press et al., 6.2)."""
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
        error = torch.maximum(term / total, (c * d - 1).abs())
        index, worst = worst_of(~(error < 2e-15), error)
        raise ConvergenceError(
            f"Expected the series of gammainc to converge in {_FRACTION_STEPS} steps; got a change of {worst:.1e} at "
            f"a={a[index].item()}, x={x[index].item()}.",
            worst,
            index,
            (0.0, x[index].item()),
        )
    series, fraction = (torch.exp(_log_gamma_front(a, t)) * v for t, v in ((near, total), (far, value)))
    return torch.where(zero, 0, torch.where(below, series, 1 - fraction))


def _log_gamma_front(a: Tensor, x: Tensor) -> Tensor:
    """Returns log(x^a e^-x / Gamma(a))."""
    return _deviance(a, x) + 0.5 * torch.log(a / (2 * pi)) - _remainder(a)


def _fisher(d: Any, value: Tensor) -> Tensor:
    ratio = d.df1 * value / d.df2
    return betainc(d.df1 / 2, d.df2 / 2, 1 / (1 + 1 / ratio), 1 / (1 + ratio))


def _binomial(d: Any, value: Tensor) -> Tensor:
    failures = d.total_count - value
    some = failures > 0
    p, q = sigmoid(d.logits), sigmoid(-d.logits)
    return torch.where(some, betainc(torch.where(some, failures, 1), value + 1, q, p), 1)


def _kumaraswamy(d: Any, value: Tensor) -> Tensor:
    end = value == 1
    power = torch.where(end, 0, value) ** d.concentration1
    far = power > 0.5  # where 1 - y^a cancels
    log_above = torch.where(
        far,
        torch.log(-torch.expm1(d.concentration1 * torch.log(torch.where(far, value, 0.5)))),
        torch.log1p(-torch.where(far, 0.5, power)),
    )
    return torch.where(end, 1, -torch.expm1(d.concentration0 * log_above))


def skew_logistic_quantile(d: Any, u: Tensor) -> Tensor:
    """Returns the quantiles of a SkewLogistic."""
    log_p = torch.log(u) / d.asymmetry
    return d.loc + d.scale * (log_p - torch.log(-torch.expm1(log_p)))


def generalized_pareto_cdf(d: Any, value: Tensor) -> Tensor:
    """Returns the cdf of a GeneralizedPareto, also for concentration 0."""
    z, zero = (value - d.loc) / d.scale, d.concentration == 0
    power = torch.where(zero, 1, d.concentration)
    return -torch.expm1(-torch.where(zero, z, torch.log1p(power * z) / power))


def generalized_pareto_quantile(d: Any, u: Tensor) -> Tensor:
    """Returns the quantiles of a GeneralizedPareto, also for concentration 0."""
    zero, log_above = d.concentration == 0, torch.log1p(-u)
    power = torch.where(zero, 1, d.concentration)
    return d.loc + d.scale * torch.where(zero, -log_above, torch.expm1(-power * log_above) / power)


Form = Callable[[Any, Tensor], Tensor]
# the cdf and the quantile function of each location-scale family with location 0 and scale 1
_STANDARD: dict[type, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    torch.distributions.Normal: (normal_cdf, torch.special.ndtri),
    torch.distributions.Laplace: (symmetric_cdf(lambda z: z.exp() / 2), symmetric_quantile(lambda u: torch.log(2 * u))),
    torch.distributions.Cauchy: (
        lambda z: torch.atan2(torch.ones_like(z), -z) / pi,
        symmetric_quantile(lambda u: -1 / torch.tan(pi * u)),
    ),
    dist.SoftLaplace: (
        symmetric_cdf(lambda z: z.exp().atan() * (2 / pi)),
        lambda u: torch.log(tan_half_pi(u)),
    ),
    torch.distributions.HalfNormal: (lambda z: torch.erf(z / sqrt(2)), lambda u: torch.erfinv(u) * sqrt(2)),
    torch.distributions.HalfCauchy: (lambda z: torch.atan(z) * (2 / pi), tan_half_pi),
    # torch clamps the uniform base of Gumbel at the smallest positive number
    torch.distributions.Gumbel: (lambda z: torch.exp(-torch.exp(-z)), lambda u: -torch.log(-torch.log(u))),
}


def _standardised(standard: Callable[[Tensor], Tensor]) -> Form:
    return lambda d, y: standard((y - getattr(d, "loc", 0)) / d.scale)


def _relocated(standard: Callable[[Tensor], Tensor]) -> Form:
    return lambda d, u: getattr(d, "loc", 0) + d.scale * standard(u)


CDFS: dict[type, Form] = {
    **{family: _standardised(forms[0]) for family, forms in _STANDARD.items()},
    torch.distributions.StudentT: lambda d, y: student_cdf((y - d.loc) / d.scale, d.df),
    torch.distributions.Beta: lambda d, y: betainc(d.concentration1, d.concentration0, y),
    torch.distributions.FisherSnedecor: _fisher,
    torch.distributions.Gamma: lambda d, y: gammainc(d.concentration, d.rate * y),
    torch.distributions.InverseGamma: lambda d, y: gammainc(d.concentration, d.rate / y, upper=True),
    torch.distributions.Exponential: lambda d, y: -torch.expm1(-d.rate * y),
    torch.distributions.ContinuousBernoulli: lambda d, y: tilted_cdf(d.logits, y),
    torch.distributions.Kumaraswamy: _kumaraswamy,
    dist.SkewLogistic: lambda d, y: torch.exp(d.asymmetry * logsigmoid((y - d.loc) / d.scale)),
    torch.distributions.Poisson: lambda d, y: torch.special.gammaincc(y + 1, d.rate),
    torch.distributions.Geometric: lambda d, y: -torch.expm1(-(y + 1) * softplus(d.logits)),
    torch.distributions.Binomial: _binomial,
    torch.distributions.NegativeBinomial: lambda d, y: betainc(
        d.total_count, y + 1, sigmoid(-d.logits), sigmoid(d.logits)
    ),
    dist.GammaPoisson: lambda d, y: betainc(d.concentration, y + 1, d.rate / (1 + d.rate), 1 / (1 + d.rate)),
}
QUANTILES: dict[type, Form] = {
    **{family: _relocated(forms[1]) for family, forms in _STANDARD.items()},
    torch.distributions.Exponential: lambda d, u: -torch.log1p(-u) / d.rate,
    torch.distributions.Kumaraswamy: lambda d, u: (
        (-torch.expm1(torch.log1p(-u) / d.concentration0)) ** (1 / d.concentration1)
    ),
    dist.SkewLogistic: skew_logistic_quantile,
}
if hasattr(torch.distributions, "GeneralizedPareto"):  # since torch 2.8
    CDFS[torch.distributions.GeneralizedPareto] = generalized_pareto_cdf
    QUANTILES[torch.distributions.GeneralizedPareto] = generalized_pareto_quantile
