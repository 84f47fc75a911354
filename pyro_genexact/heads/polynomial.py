"""Heads whose bijection is an increasing polynomial on an interval, with linear tails."""

from __future__ import annotations

from functools import lru_cache, partial
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..base import Head
from ..core.checks import check_positive, check_sizes
from ..core.precision import full_precision
from ..transforms.monotone import Monotone
from ..transforms.spline import RationalQuadratic
from .parameters import bounded

_FLATTEST = 1e-3  # the least slope of a sum of squares, as a share of that at phi = 0
_STEEPEST = 5.0  # log-slopes of Bernstein polynomials stay within ±5
_POINTS = 9  # where a sum of squares is evaluated for a guess of the inverse


class SumOfSquares(Head):
    r"""y = c + the integral from 0 to x of g, a sum of squared polynomials; g stays what it is at ±bound beyond.

        g(t) = m + (1 - m) mean_k (1 + sum_j a_kj u^j)^2,    u = clamp(t / bound, -1, 1)

    with m = 0.001, so that y increases from -inf to inf, in a straight line beyond the bound, where a polynomial of degree
    2 L + 1 would overflow in the second transform of a flow. The numbers of a site are c and a_kj; phi = 0 is the
    identity. The integral is Gauss's rule of L + 1 nodes, which is exact here: sums of squares alone, so that neither y
    nor log g cancels. Forward: some twenty operations. Inverse: two to seven evaluations, from a guess by a spline.

    Args:
        polynomials: K, how many are squared.
        degree: L, of each; 0 gives an affine bijection.
        bound: where the tails begin, positive; standardized data lie well inside.

    Raises:
        ValueError: for no polynomials, a negative degree, or a bound that is not positive and finite.

    Reference: Jaini, Selby, Yu, "Sum-of-Squares Polynomial Flow", ICML 2019.

    Example:
        >>> import torch
        >>> t = SumOfSquares(polynomials=2, degree=1)(torch.ones(2, 5))
        >>> t.inv(t(torch.tensor([2.0, 1e6])).clone())
        tensor([2.0000e+00, 1.0000e+06])
    """

    def __init__(self, polynomials: int = 3, degree: int = 4, bound: float = 5.0) -> None:
        super().__init__()
        check_sizes(1, polynomials=polynomials)
        check_sizes(0, degree=degree)
        check_positive(bound=bound)
        self.polynomials, self.degree, self.bound = polynomials, degree, float(bound)
        self.num_params = 1 + polynomials * (degree + 1)

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """phi (*batch, S, P) to the transform of values (*batch, S)."""
        identity, rules, _ = _gauss(self.polynomials, self.degree, phi.dtype, phi.device)
        shift, free = phi.contiguous().split([1, self.num_params - 1], -1)  # strided rows slow products down 60 times
        coefficients = torch.add(identity, free, alpha=((1 - _FLATTEST) / self.polynomials) ** 0.5)
        function, guess = partial(_sum_of_squares, bound=self.bound), partial(_sum_of_squares_guess, bound=self.bound)
        return Monotone(function, [shift, coefficients], [rules], guess)


@full_precision
def _sum_of_squares(
    x: Tensor, shift: Tensor, coefficients: Tensor, rules: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """y and log g, from sqrt((1 - m) / K) times the coefficients (*batch, K (L + 1)) of the polynomials."""
    near = x.clamp(-bound, bound)
    terms = coefficients.unflatten(-1, (-1, rules.shape[1])) * _powers(near / bound, rules.shape[1]).unsqueeze(-2)
    squares = linear(terms, rules).square().sum(-2)
    mean, slope = squares[..., :-1].sum(-1) + _FLATTEST, squares[..., -1] + _FLATTEST
    return torch.addcmul(torch.addcmul(shift.squeeze(-1), near, mean), x - near, slope), slope.log()


@full_precision
def _sum_of_squares_guess(y: Tensor, shift: Tensor, coefficients: Tensor, rules: Tensor, bound: float) -> Tensor:
    nodes, width = rules.shape
    count = coefficients.shape[-1] // width
    grid = _gauss(count, width - 1, y.dtype, y.device)[2]
    squares = linear(coefficients.unflatten(-1, (count, width)), grid).square().sum(-2).unflatten(-1, (_POINTS, nodes))
    x = _points(_POINTS, bound, y.dtype, y.device)
    values = torch.addcmul(shift, x, squares[..., :-1].sum(-1) + _FLATTEST)
    return _by_spline(y, x, values, squares[..., -1] + _FLATTEST)


class Bernstein(Head):
    r"""A Bernstein polynomial with increasing coefficients on [-bound, bound], and straight lines beyond.

        dy/dx = sum_k s_k C(n - 1, k) u^k (1 - u)^{n - 1 - k},    u = clamp((x + bound) / (2 bound), 0, 1)

    with s_k = exp(5 tanh(phi_k / 5)), so that the coefficients of y rise by 2 bound s_k / n. The tails continue value and
    slope. The numbers of a site are a shift and s_k; phi = 0 is the identity. Inside, y is computed as x and what
    the polynomial adds to it. Forward: some thirty operations. Inverse: two to seven evaluations, from a guess by a spline, and
    more where slopes differ a hundredfold between neighbours.

    Args:
        degree: n; 1 gives an affine bijection.
        bound: where the tails begin, positive; standardized data lie well inside.

    Raises:
        ValueError: for a degree below 1, or a bound that is not positive and finite.

    References: Sick, Hothorn, Dürr, "Deep Transformation Models", ICPR 2020; Ramasinghe et al., "Robust Normalizing Flows
    using Bernstein-type Polynomials", 2021.

    Example:
        >>> import torch
        >>> t = Bernstein(degree=3)(torch.ones(2, 4))
        >>> t.inv(t(torch.tensor([2.0, 1e6])).clone())
        tensor([2.0000e+00, 1.0000e+06])
    """

    def __init__(self, degree: int = 16, bound: float = 5.0) -> None:
        super().__init__()
        check_sizes(1, degree=degree)
        check_positive(bound=bound)
        self.degree, self.bound, self.num_params = degree, float(bound), degree + 1

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """phi (*batch, S, P) to the transform of values (*batch, S)."""
        phi = phi.contiguous()  # strided rows slow products down 60 times
        slopes = bounded(phi, _STEEPEST).exp()[..., 1:]
        excess = slopes - 1
        total = excess.cumsum(-1)  # offsets: of the coefficients from those of the identity, of mean 0 at the ends
        offsets = (total - excess - total[..., -1:] / 2) * (2 * self.bound / self.degree)
        choose, _ = _binomials(self.degree, phi.dtype, phi.device)
        function, guess = partial(_bernstein, bound=self.bound), partial(_bernstein_guess, bound=self.bound)
        return Monotone(function, [phi[..., :1], slopes, offsets], [choose], guess)


def _bernstein(
    x: Tensor, shift: Tensor, slopes: Tensor, offsets: Tensor, choose: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """y and log dy/dx, one step of de Casteljau's after the basis of degree n - 1.

    In the tails what varies, and everywhere the shift, is added last: each sum rises, or rounds to what was there before.
    """
    share = x.clamp(-bound, bound) / (2 * bound) + 0.5
    # where the basis is evaluated: what the bound, or rounding, left is a straight line
    near = (share - 0.5) * (2 * bound)
    up, down = _powers(torch.stack([share, 1 - share]), len(choose)).unbind(0)
    basis = choose * up * down.flip(-1)
    slope = (slopes * basis).sum(-1)
    added = torch.add((offsets * basis).sum(-1), (slope - 1) * share, alpha=2 * bound / len(choose))
    return torch.addcmul(near + added, slope, x - near) + shift.squeeze(-1), slope.log()


@full_precision
def _bernstein_guess(y: Tensor, shift: Tensor, slopes: Tensor, offsets: Tensor, choose: Tensor, bound: float) -> Tensor:
    degree = len(choose)
    _, basis = _binomials(degree, y.dtype, y.device)
    x, slope = _points(degree + 1, bound, y.dtype, y.device), linear(slopes, basis)
    values = x + shift + torch.addcmul(linear(offsets, basis), slope - 1, (x + bound) / degree)
    return _by_spline(y, x, values, slope)


def _by_spline(y: Tensor, x: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Close to the root: the inverse of the spline through these points of the function; the nearer end beyond them."""
    knots = torch.stack([x.expand_as(values), values, slopes], -2)
    return RationalQuadratic(knots).invert(y.clamp(values[..., 0], values[..., -1]))


def _powers(x: Tensor, count: int) -> Tensor:
    """x (*batch) to the powers 0 ... count - 1, (*batch, count), by repeated squares."""
    x = x.unsqueeze(-1)
    powers = torch.ones_like(x)
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers[..., : count - powers.shape[-1]] * x], -1)
        x = x * x
    return powers


@lru_cache
def _points(count: int, bound: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and used under grad too
        return torch.linspace(-bound, bound, count, dtype=dtype, device=device)


@lru_cache
def _gauss(count: int, degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What polynomials of a degree L need, of which there are so many.

    The coefficients of the identity; the rules (L + 2, L + 1), rows that take a polynomial's terms at u to sqrt(w_i) times
    its values at t_i u, and at last its value at u, for the nodes t_i and weights w_i of Gauss's rule on [0, 1]; and
    the rows (_POINTS (L + 2), L + 1) that take its coefficients to those values for u of a grid.
    """
    n = degree + 1
    with torch.inference_mode(False):
        k = torch.arange(1, n, dtype=torch.float64, device="cpu")
        beside = k / (4 * k * k - 1).sqrt()
        nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))  # Golub, Welsch 1969
        values = vectors[0].abs().unsqueeze(-1) * _powers((nodes + 1) / 2, n)
        rules = torch.cat([values, torch.ones_like(values[:1])])
        grid = rules * _powers(_points(_POINTS, 1.0, rules.dtype, rules.device), n).unsqueeze(1)
        identity = torch.zeros(count, n, dtype=torch.float64, device="cpu")
        identity[:, 0] = ((1 - _FLATTEST) / count) ** 0.5
        parts = [part.to(device, dtype) for part in (identity.flatten(), rules, grid.flatten(0, 1))]
    return parts[0], parts[1], parts[2]


@lru_cache
def _binomials(degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of degree n - 1: the binomial coefficients (n,), and the Bernstein basis (n + 1, n) at a grid of n + 1 points."""
    with torch.inference_mode(False):
        choose = torch.tensor([comb(degree - 1, k) for k in range(degree)], dtype=torch.float64, device="cpu")
        share = torch.linspace(0, 1, degree + 1, dtype=torch.float64, device="cpu")
        basis = choose * _powers(share, degree) * _powers(1 - share, degree).flip(-1)
        return choose.to(device, dtype), basis.to(device, dtype)
