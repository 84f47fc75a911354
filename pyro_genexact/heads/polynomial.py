"""Heads whose bijections are increasing polynomials on an interval, with linear tails."""

from __future__ import annotations

from functools import partial
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..base import Head
from ..core.checks import check_positive, check_sizes
from ..core.compiling import cached
from ..core.precision import full_precision
from ..transforms.monotone import Monotone
from ..transforms.spline import RationalQuadratic
from .parameters import bounded

_FLATTEST = 1e-3  # the smallest slope of a sum of squares, relative to that at phi = 0
_STEEPEST = 5.0  # the bound of the log-slopes of Bernstein polynomials
_POINTS = 9  # the number of knots of the spline that approximates the inverse of a sum of squares


class SumOfSquares(Head):
    """A sum-of-squares polynomial y = c + int_0^x g(t) dt, where g is a mean of squared polynomials.

        g(t) = m + (1 - m) mean_k (1 + sum_j a_kj u^j)^2,    u = clamp(t / bound, -1, 1),    m = 0.001

    g is constant beyond ±bound, so y is linear there (a polynomial of degree 2 L + 1 would overflow in the second
    transform of a flow) and increases from -inf to inf. phi contains c and the a_kj, so P = 1 + K (L + 1); phi = 0
    gives the identity. The integral is computed by Gauss's rule with L + 1 nodes, which is exact here. It adds squares
    only, so neither y nor log g cancels.

    Cost: about twenty operations; the inverse takes two to seven evaluations, starting from a spline approximation.

    Args:
        polynomials: K, the number of polynomials.
        degree: L, the degree of each; 0 gives an affine bijection.
        bound: where the linear tails begin, positive; standardised data lie well inside.

    Raises:
        ValueError: if ``polynomials`` is not positive, ``degree`` is negative, or ``bound`` is not positive and finite.

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

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of the head in the native loop, unless a subclass changed the head."""
        if type(self).forward is not SumOfSquares.forward:
            return None
        rules = _gauss(self.polynomials, self.degree, torch.float64, torch.device("cpu"))[1]
        return "sum_of_squares", [self.polynomials, self.degree, self.bound, _FLATTEST, *rules.flatten().tolist()]

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        identity, rules, _ = _gauss(self.polynomials, self.degree, phi.dtype, phi.device)
        # products of strided rows take 60 times as long
        shift, free = phi.contiguous().split([1, self.num_params - 1], -1)
        coefficients = torch.add(identity, free, alpha=((1 - _FLATTEST) / self.polynomials) ** 0.5)
        function, guess = partial(_sum_of_squares, bound=self.bound), partial(_sum_of_squares_guess, bound=self.bound)
        return Monotone(function, [shift, coefficients], [rules], guess)


@full_precision
def _sum_of_squares(
    x: Tensor, shift: Tensor, coefficients: Tensor, rules: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Returns y and log g, given sqrt((1 - m) / K) times the coefficients (*batch, K (L + 1)) of the polynomials."""
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
    """A Bernstein polynomial with increasing coefficients on [-bound, bound], and linear tails.

        dy/dx = sum_k s_k C(n - 1, k) u^k (1 - u)^{n - 1 - k},    u = clamp((x + bound) / (2 bound), 0, 1)

    phi contains a shift and n numbers phi_k with s_k = exp(5 tanh(phi_k / 5)), so P = n + 1; the coefficients of y
    increase by 2 bound s_k / n. The tails continue value and slope, and phi = 0 gives the identity. Inside, y is
    computed as the sum of x and a correction.

    Cost: about thirty operations; the inverse takes two to seven evaluations, starting from a spline approximation, and
    more if neighbouring slopes differ by a factor of a hundred.

    Args:
        degree: n; 1 gives an affine bijection.
        bound: where the linear tails begin, positive; standardised data lie well inside.

    Raises:
        ValueError: if ``degree`` is not positive, or ``bound`` is not positive and finite.

    References: Sick, Hothorn, Dürr, "Deep Transformation Models", ICPR 2020; Ramasinghe et al., "Robust Normalizing
    Flows using Bernstein-type Polynomials", 2021.

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

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of the head in the native loop, unless a subclass changed the head."""
        if type(self).forward is not Bernstein.forward:
            return None
        return "bernstein", [self.degree, self.bound, *(comb(self.degree - 1, k) for k in range(self.degree))]

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        phi = phi.contiguous()  # products of strided rows take 60 times as long
        slopes = bounded(phi, _STEEPEST).exp()[..., 1:]
        excess = slopes - 1
        total = excess.cumsum(-1)  # offsets are the coefficients minus those of the identity, with mean 0 at the ends
        offsets = (total - excess - total[..., -1:] / 2) * (2 * self.bound / self.degree)
        choose, _ = _binomials(self.degree, phi.dtype, phi.device)
        function, guess = partial(_bernstein, bound=self.bound), partial(_bernstein_guess, bound=self.bound)
        return Monotone(function, [phi[..., :1], slopes, offsets], [choose], guess)


def _bernstein(
    x: Tensor, shift: Tensor, slopes: Tensor, offsets: Tensor, choose: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Returns y and log dy/dx, by the basis of degree n - 1 and one step of de Casteljau's algorithm.

    The terms that vary in the tails, and then the shift, are added last, so that rounding keeps y non-decreasing.
    """
    share = x.clamp(-bound, bound) / (2 * bound) + 0.5
    # the point at which the basis is evaluated; y is continued linearly from there to x
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
    """Returns an approximate root: the inverse of the spline through these points, clamped to their range."""
    knots = torch.stack([x.expand_as(values), values, slopes], -2)
    return RationalQuadratic(knots).invert(y.clamp(values[..., 0], values[..., -1]))


def _powers(x: Tensor, count: int) -> Tensor:
    """Returns the powers 0 ... count - 1 of x, (*batch, count), by repeated squaring."""
    x = x.unsqueeze(-1)
    powers = torch.ones_like(x)
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers[..., : count - powers.shape[-1]] * x], -1)
        x = x * x
    return powers


@cached
def _points(count: int, bound: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor is also used under grad
        return torch.linspace(-bound, bound, count, dtype=dtype, device=device)


@cached
def _gauss(count: int, degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns constant tensors for ``count`` polynomials of degree L, computed from Gauss's rule on [0, 1].

    The first holds the coefficients of the identity. The second, (L + 2, L + 1), maps the terms of a polynomial at u to
    sqrt(w_i) times its values at t_i u, for nodes t_i and weights w_i, followed by its value at u. The third,
    (_POINTS (L + 2), L + 1), maps the coefficients to these values for all u of a grid.
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


@cached
def _binomials(degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the n binomial coefficients of degree n - 1 and its Bernstein basis (n + 1, n) at n + 1 points."""
    with torch.inference_mode(False):
        choose = torch.tensor([comb(degree - 1, k) for k in range(degree)], dtype=torch.float64, device="cpu")
        share = torch.linspace(0, 1, degree + 1, dtype=torch.float64, device="cpu")
        basis = choose * _powers(share, degree) * _powers(1 - share, degree).flip(-1)
        return choose.to(device, dtype), basis.to(device, dtype)
