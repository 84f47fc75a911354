"""Lévy's stable distributions with an exact density."""

from __future__ import annotations

from math import inf, log, pi
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all

from ..core.functional import at_hand, checkable
from ..core.values import checked_value
from ..numerics.errors import ConvergenceError, worst_of
from ..numerics.quadrature import kronrod_rule
from ..numerics.roots import bisect
from .parametrised import Parametrised

_FARTHEST = 1e60  # the largest distance of a value from loc, in scales
_PANELS = 24
_DOUBLINGS = 3  # the largest number of doublings of the panels
_MOVES = 8  # the number of times that panels are redistributed
_FAR = 300.0  # the largest logit of a path variable, small enough that products of distances do not underflow
_NEGLIGIBLE = 35.0  # parts of the integral this many nats below the largest are neglected
_ROUNDED = 1e10  # below minus this, a log density is that of the peak alone, since rounding loses the phases
_UNDERFLOW = 1e250  # below minus this, a log density is -inf
_GAP = 1e-5  # the allowed difference of Gauss's and Kronrod's rules


class Stable(Parametrised, dist.Stable):  # type: ignore[name-defined]
    r"""Pyro's stable distribution with an exact log_prob and exact samples, also near stability 1.

    With unit scale and loc 0, the characteristic function in Nolan's continuous parametrisation S0 is, for t > 0,

        E exp(i t y) = exp(-t^α (1 + i β tan(πα/2) (t^{1-α} - 1))),    α = stability, β = skew.

    Stability 2 gives the normal distribution of variance 2, stability 1 and skew 0 the Cauchy distribution, stability
    1/2 and skew 1 the Lévy distribution.

    ``log_prob`` is the Fourier integral of this function along the path of steepest descent, on which the integrand
    does not oscillate (Zolotarev's integral), by Gauss-Kronrod quadrature with a fixed number of panels. The density
    does not depend on the path, so autograd differentiates the integrand only. It is smooth in all parameters, also at
    stability 1 and at Zolotarev's singular point. Tails, also those that decay as exp(-exp(y)), lose no precision.

    The error of the log density, relative to max(1, \|log density\|), is about 1e-12 (1e-9 at worst) for \|skew\| up to
    1 - 1e-4 and stability from 0.2, and up to 1e-5 for a skew nearer to ±1. Below -1e10 nats the relative error is
    1e-8.

    ``rsample`` is the method of Chambers, Mallows and Stuck in a form that is continuous at stability 1, where Pyro's
    version interpolates. All computations use float64 internally.

    Cost: ``log_prob`` takes 360 evaluations of the integrand per value and about 1000 of the path, which is about 0.1
    ms and, with gradients, 0.14 MB per value, and at least 8 ms per call.

    References: Zolotarev (1986), "One-dimensional stable distributions"; Nolan (1997), "Numerical calculation of stable
    densities and distribution functions"; Ament, O'Neil (2018), "Accurate and efficient numerical calculation of stable
    densities via optimized quadrature and asymptotics"; Weron (1996), "On the Chambers-Mallows-Stuck method for
    simulating skewed stable random variables".

    Args:
        stability: α (*batch) in (0, 2].
        skew: β (*batch) in [-1, 1].
        scale: (*batch) positive numbers.
        loc: (*batch) real numbers.
        coords: "S0", or "S" for values shifted by scale β tan(πα/2), which is discontinuous at stability 1.

    Raises:
        ValueError: if ``coords`` is neither "S0" nor "S".
        ConvergenceError: by ``log_prob``, if Gauss's and Kronrod's rules differ by more than 1e-5 of the density with
            eight times the panels, to which values are refined if necessary (the error of Kronrod's rule is much
            smaller). This happens if rounding limits the integral: at stability below 1, for \|skew\| between 1 - 1e-11
            and 1, or within rounding of the end of the support. Also if a value is more than 1e60 scales from loc.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> d = Stable(torch.tensor([1.0, 2.0]), torch.zeros(2))
        >>> y = torch.tensor(3.0)
        >>> d.log_prob(y)
        tensor([-3.4473, -3.5155])
        >>> dist.Cauchy(0.0, 1.0).log_prob(y), dist.Normal(0.0, 2**0.5).log_prob(y)
        (tensor(-3.4473), tensor(-3.5155))
    """

    def __init__(
        self,
        stability: Any,
        skew: Any,
        scale: Any = 1.0,
        loc: Any = 0.0,
        coords: str = "S0",
        validate_args: bool | None = None,
    ) -> None:
        if coords not in ("S", "S0"):
            raise ValueError(f"Expected coords to be 'S0' or 'S'; got {coords!r}.")
        super().__init__(stability, skew, scale, loc, coords, validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats, (*sample, *batch); NaN for NaN.

        It is -inf at infinity, and beyond the end of the support, which exists for |skew| 1 and stability below 1.
        """
        value = checked_value(self, value)
        value, loc, scale = value.double(), self.loc.double(), self.scale.double()
        infinite = ((value - loc) / scale).isinf()
        x = (torch.where(infinite, loc, value) - loc) / scale  # keeps infinities out of the gradient
        x, alpha, beta = broadcast_all(x, self.stability.double(), self.skew.double())
        far = x.detach().abs()
        if not checkable(x):
            x = torch.where(far > _FARTHEST, torch.nan, x)
        elif (far > _FARTHEST).any():
            index, worst = worst_of(far > _FARTHEST, far)
            raise ConvergenceError(
                f"Expected |value - loc| / scale <= {_FARTHEST}; got {worst:.3g} at index {index}.",
                inf,
                index,
                (0.0, inf),
            )
        if self.coords == "S":
            x = x - self._shift(alpha, beta)
        return torch.where(infinite, -inf, _log_density(x, alpha, beta) - scale.log()).to(self.scale)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        alpha, beta = self.stability.double(), self.skew.double()
        # rand lies in [0, 1); the clamp keeps the angle inside the open interval
        uniform = torch.rand(shape, dtype=alpha.dtype, device=alpha.device).clamp(min=2.0**-54)
        wait = torch.empty(shape, dtype=alpha.dtype, device=alpha.device).exponential_()
        x = _standard(pi * (uniform - 0.5), wait, alpha, beta)
        if self.coords == "S":
            x = x + self._shift(alpha, beta)
        return self.loc + self.scale * x.to(self.scale)

    @staticmethod
    def _shift(alpha: Tensor, beta: Tensor) -> Tensor:
        """Returns the value in coordinates S minus that in S0, for unit scale."""
        at_1 = alpha == 1
        return torch.where(at_1, 0, -beta * _cot_of_half(torch.where(at_1, 0.5, alpha - 1)))


def _standard(angle: Tensor, wait: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Returns a standard variable in S0, given an angle uniform in ±π/2 and a unit exponential variable."""
    eps = alpha - 1
    k = beta * _eps_cot(eps)
    half = eps * angle / 2
    sine = angle / 2 * _sinc(half)  # sin(half) / eps
    ratio = half.cos().square() - half.sin().square() + 2 * k * sine * half.cos()
    log_u = ratio.clamp(min=2.0**-60).log() - (wait * angle.cos()).log()  # the ratio is positive except for rounding
    power, _ = _expm1_ratio(eps, -log_u / alpha, torch.zeros_like(log_u))
    numerator = (1 + eps * power) * (alpha * angle).sin()
    numerator = numerator + k * (2 * ((1 + alpha) * angle / 2).sin() * sine - power * (alpha * angle).cos())
    return numerator / angle.cos()


def _log_density(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Returns the log of f = 1/π Re ∫ e^{h(t)} dt = -1/π Re ∫ t h'(t) e^{h(t)} dt, integrated along the path.

    Here -h(t) = i t x + ψ(t) = t (c + i d).
    """
    outside = (alpha < 1) & (beta.abs() == 1) & ((x + _cot_of_half(1 - alpha) * beta) * beta <= 0)
    x, beta = torch.where(outside, 0, x), torch.where(outside, 0, beta)
    log_f, gap = _integral(x, alpha, beta, _PANELS)
    for k in range(1, _DOUBLINGS + 1):
        coarse = gap >= _GAP
        if coarse.is_meta or not coarse.any():
            return torch.where(outside, -inf, log_f)
        finer, gap_there = _integral(x[coarse], alpha[coarse], beta[coarse], _PANELS * 2**k)
        log_f = log_f.masked_scatter(coarse, finer)
        gap = gap.masked_scatter(coarse, gap_there)
    if (gap >= _GAP).any():
        index, worst = worst_of(gap >= _GAP, gap)
        raise ConvergenceError(
            f"Expected quadrature rules to differ by less than {_GAP} of the density; got {worst:.3g} at index {index}.",
            worst,
            index,
            (0.0, inf),
        )
    return torch.where(outside, -inf, log_f)


def _integral(x: Tensor, alpha: Tensor, beta: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """Returns the log density by Kronrod's rule and the difference of Gauss's rule (0 if an argument is NaN)."""
    with torch.no_grad():
        nodes, flip = _path(x, alpha - 1, beta, panels)
    c, d, d1 = _exponent(nodes, torch.where(flip, -x, x), alpha, torch.where(flip, -beta, beta))
    minus_h = nodes.t * torch.complex(c, d)
    minus_th = nodes.t * torch.complex(alpha * c, d1)
    peak = -minus_h.real.amin(0)
    top = peak.detach()
    tiny = top < -_ROUNDED  # rounding of the exponent keeps its peak, but loses the phases
    parts = torch.where(tiny, 0, minus_th * nodes.dlog_t * nodes.t) * torch.exp(torch.where(tiny, 0, -minus_h - top))
    _, rule, gauss = kronrod_rule(x.dtype, x.device)
    parts = parts.real.unflatten(0, (panels, len(rule)))
    total = torch.where(tiny, 1, torch.einsum("kn...,n->...", parts, rule))
    log_f = torch.where(tiny, peak, total.log() + top - log(pi))
    with torch.no_grad():  # relative to max(1, |log density|); infinite if the sum is not positive
        gap = torch.einsum("kn...,n->k...", parts, rule - gauss).abs().sum(0) / (total * (1 + top.abs()))
        gap = torch.where((total > 0) & (top < 1), gap, inf)  # Re h < 0 except for rounding
        gap = torch.where((x + alpha + beta).isnan(), 0, gap)
    return torch.where(top < -_UNDERFLOW, -inf, log_f), gap


def _exponent(nodes: _Nodes, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns c and d of -h / t = c + i d, and d' of -h' = α c + i d', each without cancellation.

    With ε = α - 1, ζ = β cot(πε/2), t = r e^{-iφ}, q = π/2 - φ:

        c = r^ε (cos εφ + ζ sin εφ) = r^ε ((1 + β) cos(πε/2) cos εq + (sin² - β cos²)(πε/2) sin(εq) / sin(πε/2))
        d = x - ζ + r^ε (ζ cos εφ - sin εφ),    d' = x - ζ + α r^ε (ζ cos εφ - sin εφ)

    Near ε = 0, where ζ is large, d = x + u and d' = x + εζ + α u with u = ε Im e + εζ Re e, e = (t^ε - 1) / ε.
    """
    eps = alpha - 1
    cosine = torch.where(eps > 0, (pi / 2 * (2 - alpha)).sin(), (pi / 2 * alpha).sin())  # of πε/2
    sine = pi / 2 * _sinc(pi / 2 * eps)  # of πε/2, by ε
    turn, grow = eps * nodes.q, (eps * nodes.log_r).exp()
    c = (1 + beta) * cosine * turn.cos()
    c = c + nodes.q * _sinc(turn) / sine * ((eps * sine).square() - beta * cosine.square())
    near = eps.abs() < 0.1
    k = torch.where(near, beta * _eps_cot(eps), 0)
    re, im = _expm1_ratio(torch.where(near, eps, 0.05), nodes.log_r, -nodes.phi)
    zeta = beta * _cot_of_half(torch.where(near, 0.5, eps))
    u = torch.where(near, eps * im + k * re, grow * (zeta * (eps * nodes.phi).cos() - (eps * nodes.phi).sin()))
    x = torch.where(near, x, x - zeta)
    return c * grow, x + u, x + k + alpha * u


class _Nodes(NamedTuple):
    """Points t = exp(log_r - i phi) of the path, (n, *batch), with q = π/2 - phi and d log t by the panel variable."""

    log_r: Tensor
    phi: Tensor
    q: Tensor
    t: Tensor
    dlog_t: Tensor


class _Path:
    """The path on which Im h(t) = 0: t = r e^{-iφ}, r^ε = (x - ζ) cos φ / (sin αφ - ζ cos αφ), ζ = β cot(πε/2), x > ζ.

    φ runs from the zero of the denominator to π/2; p and q are the distances to these ends, L = p + q, v = log(p / q).
    On the path, -h = g > 0 is monotone in v. M = π - L and A = π - αL are stored because they may be small.
    """

    def __init__(self, x: Tensor, eps: Tensor, beta: Tensor) -> None:
        self.flip = x < beta * _cot_of_half(eps)
        self.x, self.beta = torch.where(self.flip, -x, x), torch.where(self.flip, -beta, beta)
        self.eps, self.alpha = eps, 1 + eps
        self.zeta = self.beta * _cot_of_half(eps)
        self.log_gap = (self.x - self.zeta).clamp(min=1e-30).log()
        self.root = torch.hypot(self.zeta, torch.ones_like(self.zeta))
        sine, cosine = (pi / 2 * eps.abs()).sin(), (pi / 2 * (1 - eps.abs())).sin()
        self.sign = torch.where(eps < 0, 1.0, -1.0).to(eps)
        cross = (1 + self.beta) * cosine * sine
        along = self.sign * (sine.square() - self.beta * cosine.square())
        self.length, self.a = torch.atan2(cross, along) / self.alpha, torch.atan2(cross, -along)
        other = torch.atan2((1 - self.beta) * cosine * sine, sine.square() + self.beta * cosine.square())
        self.m = torch.where(eps > 0, self.a + pi * eps, other) / self.alpha

    def at(self, v: Tensor) -> tuple[Tensor, ...]:
        """Returns p, q, the sines of q, αp and αp + q, and φ, log r, log g."""
        eps, alpha = self.eps, self.alpha
        p, q = self.length * torch.sigmoid(v), self.length * torch.sigmoid(-v)
        sin_q = torch.where(q < pi / 2, q, self.m + p).sin()
        wide = alpha * p
        sin_p = torch.where(wide < pi / 2, wide, self.a + alpha * q).sin()
        both = wide + q
        both = torch.where(both < pi / 2, both, torch.where(eps > 0, self.a + eps * q, self.m - eps * p)).sin()
        phi = pi / 2 - q
        n = self.x * sin_q - (alpha * phi).sin() - 2 * self.zeta * (eps * phi / 2).sin() * ((1 + alpha) * phi / 2).sin()
        size = self.root * sin_p
        ratio = n / size
        direct = self.log_gap + (sin_q / sin_p).log() - self.root.log()
        log_r = (torch.where((ratio.abs() < 0.5) & (size > 1), ratio.log1p(), direct) / eps).clamp(-600, 600)
        log_g = self.log_gap + log_r + (both / sin_p).log()
        return p, q, sin_q, sin_p, both, phi, log_r, log_g

    def parts(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log g and the log of Zolotarev's integrand g e^{-g} dφ/dv."""
        p, q, *_, log_g = self.at(v)
        return log_g, log_g - log_g.exp() + (p * q / self.length).log()


def _path(x: Tensor, eps: Tensor, beta: Tensor, panels: int) -> tuple[_Nodes, Tensor]:
    """Returns quadrature points on the path, and whether it is the path of -x and -beta."""
    # a nearby path suffices; the exact path has a corner at ε = 0 = β, and nearly one for large x with a heavy tail
    heavy = beta * x.sign() > -1
    least = torch.maximum((1e-3 - beta.abs()).clamp(min=1e-13), torch.where(heavy, (1e-9 * x.abs()).clamp(max=1e-3), 0))
    path = _Path(x, torch.where(eps < -least, -1.0, 1.0) * torch.maximum(eps.abs(), least), beta)
    low, high = _ends(path)
    cuts = _cuts(path, low, high, panels)
    half = (cuts[1:] - cuts[:-1]) / 2
    at = kronrod_rule(x.dtype, x.device)[0].reshape(-1, *[1] * x.dim())
    v = ((cuts[:-1] + half).unsqueeze(1) + half.unsqueeze(1) * at).flatten(0, 1)
    p, q, sin_q, sin_p, both, phi, log_r, _ = path.at(v)
    slope = p * q / path.length * half.repeat_interleave(len(at), 0)
    wide = path.alpha * p
    # the derivative of log r by phi: -(cot q + alpha cot wide) / eps
    fall = -(both + path.eps * wide.cos() * sin_q) / (path.eps * sin_q * sin_p)
    t = torch.complex(log_r.exp() * sin_q, -log_r.exp() * q.cos())
    return _Nodes(log_r, phi, q, t, path.sign * torch.complex(fall * slope, -slope)), path.flip


def _ends(path: _Path) -> tuple[Tensor, Tensor]:
    """Returns the points where the integrand becomes negligible, on both sides of its one or two peaks."""
    far = torch.full_like(path.x, _FAR)
    peak = bisect(lambda v: path.sign * path.at(v)[-1] > 0, -far, far, 45)  # the peak for a power tail, at g = 1
    grid = torch.arange(-16.0, 17.0, dtype=far.dtype, device=far.device).reshape(-1, *[1] * far.dim())
    seeds = torch.cat([peak.unsqueeze(0), grid.expand(-1, *far.shape)])
    parts = path.parts(seeds)[1]
    least = parts.amax(0) - _NEGLIGIBLE
    inner = torch.stack([torch.where(parts >= least, side * seeds, inf).amin(0) * side for side in (1, -1)])
    return bisect(lambda v: path.parts(v)[1] >= least, torch.stack([-far, far]), inner, 32).unbind(0)  # type: ignore[return-value]


def _cuts(path: _Path, low: Tensor, high: Tensor, panels: int) -> Tensor:
    """Returns the ends of the panels, (1 + panels, *batch).

    By de Boor's method, the changes of v, log g and the integrand are about the same on every panel.
    """
    share = torch.arange(1 + panels, dtype=low.dtype, device=low.device) / panels
    cuts = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * share
    for _ in range(_MOVES):
        log_g, part = (f.movedim(0, -1) for f in path.parts(cuts.movedim(-1, 0)))
        part = torch.maximum(part, part.amax(-1, keepdim=True) - _NEGLIGIBLE)
        rise = cuts.diff(dim=-1) + log_g.diff(dim=-1).abs() + part.diff(dim=-1).abs() / 4
        height = torch.nn.functional.pad(rise.cumsum(-1), (1, 0))
        level = height[..., :1] + (height[..., -1:] - height[..., :1]) * share[1:-1]
        right = torch.searchsorted(height, level).clamp(1, panels)
        (h0, h1), (v0, v1) = ((c.gather(-1, right - 1), c.gather(-1, right)) for c in (height, cuts))
        inner = v0 + (v1 - v0) * ((level - h0) / (h1 - h0)).nan_to_num(0.5).clamp(0, 1)
        cuts = torch.cat([cuts[..., :1], inner, cuts[..., -1:]], -1)
    return cuts.movedim(-1, 0)


def _cot_of_half(eps: Tensor) -> Tensor:
    """Returns cot(πε/2) = -tan(πα/2)."""
    return (pi / 2 * eps).tan().reciprocal()


def _eps_cot(eps: Tensor) -> Tensor:
    """Returns ε cot(πε/2)."""
    small = eps.abs() < 0.05
    y = (pi / 2 * torch.where(small, eps, 0)).square()
    series = 1 - y * (1 / 3 + y * (1 / 45 + y * (2 / 945 + y * (1 / 4725 + y * 2 / 93555))))
    safe = torch.where(small, 0.5, eps)
    return torch.where(small, 2 / pi * series, safe * _cot_of_half(safe))


def _sinc(y: Tensor) -> Tensor:
    """Returns sin(y) / y, with a gradient that is accurate near 0 (that of torch.sinc cancels)."""
    small = y.abs() < 0.1
    square = torch.where(small, y, 0).square()
    series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72)))
    safe = torch.where(small, 1, y)
    return torch.where(small, series, safe.sin() / safe)


def _expm1_ratio(eps: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the real and imaginary parts of (exp(ε z) - 1) / ε for z = a + i b.

    Near ε = 0 it uses a series, which is accurate for |z| below 150.
    """
    small = eps.abs() < 1e-3
    safe = torch.where(small, 1, eps)
    turn = safe * b
    re = (torch.expm1(safe * a) * turn.cos() - 2 * (turn / 2).sin().square()) / safe
    im = (safe * a).exp() * turn.sin() / safe
    if at_hand(small) and not small.any():
        return re, im
    z = torch.complex(a, b)
    step, series = torch.where(small, eps, 0) * z, torch.ones_like(z)
    for n in range(12, 1, -1):
        series = 1 + step / n * series
    series = z * series
    return torch.where(small, series.real, re), torch.where(small, series.imag, im)
