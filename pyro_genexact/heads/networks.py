"""MonotoneNetwork and IntegratedPositive: bijections that are networks of the head's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import pi

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from ..base import Head
from ..core.checks import check_positive, check_sizes, check_widths
from ..core.functional import visible
from ..core.precision import full_precision
from ..core.shapes import broadcast_shapes
from ..numerics.quadrature import integrate
from ..transforms.monotone import Monotone
from .parameters import bounded

_SCALE = 5.0  # bound of logarithms of scales
_STEEP, _HEIGHT = 4.0, 3.0  # bounds of an integrand's weights in the first layer, and of the sum of those in the last
_SUM = 8.0  # bound of the product, over the layers between, of the largest sum of a row
_PANELS = 8  # of an integral, on either side of 0
_AMPLE = 350.0  # by how much the estimated error of an integral mostly exceeds that of an analytic integrand


class _OwnNetwork(Head):
    """A head with a network of its own, whose weights on the path from x are apart from those on a signal."""

    def __init__(self, signal: int, hidden: Sequence[int]) -> None:
        super().__init__()
        check_sizes(1, signal=signal)
        check_widths(1, hidden=hidden)
        if not hidden:
            raise ValueError("Expected hidden to hold at least one width; got none.")
        self.signal, self.hidden, self.num_params = signal, tuple(hidden), signal + 3
        self.weights = nn.ParameterList(torch.empty(n, k) for k, n in pairwise((1, *hidden, 1)))
        self.shares = nn.Linear(signal, sum(hidden))

    def extra_repr(self) -> str:
        return f"{self.signal}, hidden={self.hidden}"

    @full_precision
    def _split(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Three numbers a value, each (*batch, S, 1), and what the signal adds to each hidden layer (*batch, S, n)."""
        shift, scale, amplitude, signal = phi.split([1, 1, 1, self.signal], -1)
        shares = list(self.shares(signal).split(self.hidden, -1))
        return shift, bounded(scale, _SCALE), bounded(amplitude, _HEIGHT), shares


class MonotoneNetwork(_OwnNetwork):
    r"""y = m + exp(s) x + exp(r - 1) net(x, signal), net increasing and bounded, with weights of the head's own.

    phi holds m, s, r and the signal; s is bounded as 5 tanh(raw / 5), r as 3 tanh(raw / 3). The layers are
    h = tanh(W h + V signal + b) with any V and b, and W = softplus(raw) times a constant, for any raw. All terms of
    dy/dx = exp(s) + exp(r - 1) dnet/dx are positive, and it is at least exp(s): no number of layers can make it vanish.

    P = signal + 3. Cost: that of the network twice, for values and derivatives; the inverse is four to seven times that. What
    the signal adds to the layers is computed once.

    Args:
        signal: how many numbers of phi the network reads.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: for sizes that are no positive integers, or no hidden layer.

    References: Sill, "Monotonic Networks", NeurIPS 1997; Huang, Krueger, Lacoste, Courville, "Neural Autoregressive
    Flows", ICML 2018.

    Example:
        >>> import torch
        >>> head = MonotoneNetwork(signal=4, hidden=(16, 16))
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> torch.allclose(t(t.inv(torch.full((5, 3), 1e3)).clone()), torch.tensor(1e3))
        True
    """

    def __init__(self, signal: int = 16, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(signal, hidden)
        with torch.no_grad():
            for raw in self.weights:
                raw.normal_()
            self.shares.bias.uniform_(-2, 2)
            first = self.shares.bias[: hidden[0]]  # where the units of the first layer are steep
            first.copy_(softplus(self.weights[0][:, 0]) * torch.empty_like(first).uniform_(-2.5, 2.5))

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """phi (*batch, S, P) to the transform of values (*batch, S)."""
        shift, log_scale, log_amplitude, shares = self._split(phi)
        inner, *others, outer = self.weights
        weights = [softplus(inner)[:, 0], *(softplus(w) * (6 / w.shape[1]) for w in others)]
        weights.append(softplus(outer) / outer.shape[1])  # a mean of units, more or less
        parameters = [shift, log_scale.exp(), torch.exp(log_amplitude - 1), *shares]
        return Monotone(monotone_network, parameters, weights)


class IntegratedPositive(_OwnNetwork):
    r"""y = m + int_0^x g(t) dt, log g(t) = s + r net(t, signal) for \|t\| up to a bound, and constant beyond.

    phi holds m, s, r and the signal; s is bounded as 5 tanh(raw / 5), r as 3 tanh(raw / 3), net is below 3. The layers are
    h = sin(W h + V signal + b), W bounded smoothly for any weights, in the first layer by 4, in the last by a sum of 3, and in
    all between by a product of 8 of the largest sums of a row: such a g is analytic, and log g changes by less than
    288 along a panel, whatever the depth, which is what quadrature needs. log dy/dx is log g(x) itself; at r = 0, as phi = 0 has it, g is constant.

    The integral is a sum over panels of an eighth of the bound, Gauss-Kronrod quadrature on each, which is refined until
    its estimate of the error is at most 3.5e-10 of a panel in float64 and 3.3e-4 in float32
    (:func:`pyro_genexact.numerics.integrate`): that is what is promised. Measured against 128 times the panels, the
    true error of the integral was up to 6e-16 and 4e-7 with weights as at the start, 3e-15 and 1e-5 with up to 1000 times those.

    P = signal + 3. Cost: the network at 16 points a panel between 0 and x in float32, where one try is nearly always
    enough; at 31 and more in float64. The inverse is four to seven times that. What the signal adds to the layers is computed once.

    Args:
        signal: how many numbers of phi the network reads.
        hidden: widths of the hidden layers.
        bound: positive; where g becomes constant. Standardised data are within the default.

    Raises:
        ValueError: for sizes that are no positive integers, no hidden layer, or a bound that is not positive.
        ConvergenceError: on evaluation, where the error of an integral stays larger.

    Reference: Wehenkel, Louppe, "Unconstrained Monotonic Neural Networks", NeurIPS 2019.

    Example:
        >>> import torch
        >>> head = IntegratedPositive(signal=4, hidden=(16, 16))
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> torch.allclose(t(t.inv(torch.full((5, 3), 1e3)).clone()), torch.tensor(1e3))
        True
    """

    def __init__(self, signal: int = 16, hidden: Sequence[int] = (64, 64), bound: float = 12.0) -> None:
        super().__init__(signal, hidden)
        check_positive(bound=bound)
        self.bound = bound
        with torch.no_grad():
            for raw, deviation in zip(self.weights, (0.7, *(1.5 / n**0.5 for n in hidden)), strict=True):
                raw.normal_(std=deviation)
            self.shares.bias.uniform_(-3, 3)

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """phi (*batch, S, P) to the transform of values (*batch, S)."""
        shift, log_scale, amplitude, shares = self._split(phi)
        shares = [share.remainder(2 * pi) for share in shares]  # the same sines, less rounding
        inner, *others, outer = self.weights
        limit = _SUM ** (1 / max(len(others), 1))
        weights = [bounded(inner[:, 0], _STEEP), *(_limited(w, limit) for w in others), _limited(outer, _HEIGHT)]
        unit = inner.new_full((), self.bound / _PANELS)
        return Monotone(integrated_positive, [shift, log_scale, amplitude, *shares], [unit, *weights])


def _limited(rows: Tensor, limit: float) -> Tensor:
    """Rows whose sums of absolute values are below the limit, much the same where they are far below it."""
    return rows / (1 + rows.abs().sum(1, keepdim=True) / limit)


@full_precision
def monotone_network(
    x: Tensor, shift: Tensor, scale: Tensor, amplitude: Tensor, *layers: Tensor
) -> tuple[Tensor, Tensor]:
    r"""m + s x + a net(x) and the log of its derivative, by the forward mode through the layers.

    Args:
        x: (\*batch).
        shift, scale, amplitude: (\*batch, 1).
        layers: what is added to each hidden layer (\*batch, n), then the positive weights, of the first layer (n,), of others
            (n, m), the last of them (1, m).
    """
    depth = len(layers) // 2
    shares, (inner, *weights) = layers[:depth], layers[depth:]
    x = x.unsqueeze(-1)
    h = torch.tanh(torch.addcmul(shares[0], x, inner))
    d = inner * (1 - h * h)
    for share, weight in zip(shares[1:], weights[:-1], strict=True):
        h = torch.tanh(linear(h, weight).add_(share))
        d = linear(d, weight) * (1 - h * h)
    y = torch.addcmul(torch.addcmul(shift, scale, x), amplitude, linear(h, weights[-1]))
    return y.squeeze(-1), torch.addcmul(scale, amplitude, linear(d, weights[-1])).log().squeeze(-1)


@full_precision
def integrated_positive(
    x: Tensor, shift: Tensor, log_scale: Tensor, amplitude: Tensor, *layers: Tensor
) -> tuple[Tensor, Tensor]:
    r"""m + the integral of g from 0 to x, and log g(x), with log g(t) = s + r net(t / unit) up to the bound of 8 units.

    A sum over panels of one unit, whole ones up to that in which x lies, each by quadrature. So a larger x adds to the same
    numbers, and rounding can hardly make y decrease; and only what lies between 0 and x costs anything.

    Args:
        x: (\*batch).
        shift, log_scale, amplitude: (\*batch, 1).
        layers: what is added to each hidden layer (\*batch, n), then the unit (), then the weights, of the first layer (n,), of
            others (n, m), the last of them (1, m).
    """
    depth = len(layers) // 2 - 1
    shape = broadcast_shapes(x.shape, shift.shape[:-1])
    (unit, *weights), t = layers[depth:], (x / layers[depth]).expand(shape)
    inside = t.clamp(-_PANELS, _PANELS)
    rows, last, edge, low, high = _panels(inside)
    each = [p.expand(*shape, -1).reshape(-1, p.shape[-1]) for p in (log_scale, amplitude, *layers[:depth])]
    each = [p.index_select(0, rows) for p in each]
    each[2] = torch.addcmul(each[2], edge.unsqueeze(-1), weights[0]).remainder(2 * pi)  # the same sines, less rounding
    ends = x

    def g(points: Tensor) -> Tensor:
        nonlocal ends  # log g at the ends of the panels, in the same pass
        found = _log_integrand(torch.cat([points, high.unsqueeze(-1)], -1), each, weights)
        ends = found[:, -1]
        return found[:, :-1].exp()

    double = x.dtype == torch.float64
    tol = _AMPLE * (1e-12 if double else 8 * torch.finfo(x.dtype).eps)
    parts, _ = integrate(g, low, high, tol=tol, panels=2 if double else 1)
    area = parts.new_zeros(shape.numel()).index_add(0, rows, parts).view(shape)
    slope = ends.index_select(0, last).view(shape)
    return torch.addcmul(shift.squeeze(-1), unit, torch.addcmul(area, t - inside, slope.exp())), slope


def _log_integrand(t: Tensor, each: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """s + r net(t), for points t (M, n); each (M, ...) of the M panels."""
    log_scale, amplitude, first, *shares = each
    h = torch.sin(torch.addcmul(first.unsqueeze(-2), t.unsqueeze(-1), weights[0]))
    for share, weight in zip(shares, weights[1:-1], strict=True):
        h = torch.sin(linear(h, weight).add_(share.unsqueeze(-2)))
    return torch.addcmul(log_scale, amplitude, linear(h, weights[-1]).squeeze(-1))


def _panels(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the panels between 0 and each t: whose they are (M,), the last of each t, edges next to 0, bounds from there.

    Where sizes may not depend on values, every t has all panels, repeating its last one, empty, where there are no more.
    """
    t = t.flatten()
    size = t.detach().abs().nan_to_num(1)
    counts = size.ceil().clamp(min=1).long()
    if visible(t):
        rows, stops = torch.repeat_interleave(counts), counts.cumsum(0)
        k = torch.arange(len(rows), device=t.device) - (stops - counts)[rows]
    else:
        every = torch.arange(len(t) * _PANELS, device=t.device)
        rows, k, stops = every // _PANELS, every % _PANELS, _PANELS * torch.arange(1, len(t) + 1, device=t.device)
    t, final = t.index_select(0, rows), counts.index_select(0, rows) - 1
    side = torch.where(t.detach() < 0, -1, 1).to(t.dtype)
    edge = side * torch.minimum(k, final)
    high = torch.where(k < final, side, t - edge)
    return rows, stops - 1, edge, torch.where(k > final, high, 0), high
