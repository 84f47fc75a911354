"""Heads whose bijections are monotone networks with weights of their own."""

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

_SCALE = 5.0  # the bound of log-scales
_STEEP, _HEIGHT = 4.0, 3.0  # bounds of the integrand's weights in the first layer, and of their sum in the last layer
_SUM = 8.0  # the bound of the product, over the other layers, of the largest row sum
_PANELS = 8  # the number of panels of an integral on either side of 0
_AMPLE = 350.0  # the typical ratio of the estimated error to the true error for an analytic integrand


class _OwnNetwork(Head):
    """A head with its own network, with separate weights for x and for a signal that phi contains."""

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
        """Returns shift, log-scale and amplitude, (*batch, S, 1), and the signal's terms in the hidden layers.

        The terms have shape (*batch, S, n) for a layer of n units.
        """
        shift, scale, amplitude, signal = phi.split([1, 1, 1, self.signal], -1)
        shares = list(self.shares(signal).split(self.hidden, -1))
        return shift, bounded(scale, _SCALE), bounded(amplitude, _HEIGHT), shares


class MonotoneNetwork(_OwnNetwork):
    """A monotone network y = m + exp(s) x + exp(r - 1) net(x, signal), where net is increasing and bounded.

    phi contains m, s, r and the signal, so P = signal + 3; s is bounded as 5 tanh(raw / 5) and r as 3 tanh(raw / 3).
    The layers are h = tanh(W h + V signal + b) with weights of the head: V and b are unconstrained, and W is
    softplus(raw) times a constant. The derivative exp(s) + exp(r - 1) dnet/dx is a sum of positive terms and at least
    exp(s), for any number of layers.

    Cost: two passes through the network, for values and derivatives; the inverse takes four to seven times as long. The
    signal's terms are computed once.

    Args:
        signal: the number of entries of phi that the network reads.
        hidden: the widths of the hidden layers.

    Raises:
        ValueError: if a size is not a positive integer, or there is no hidden layer.

    References: Sill, "Monotonic Networks", NeurIPS 1997; Huang, Krueger, Lacoste, Courville, "Neural Autoregressive
    Flows", ICML 2018.

    Example:
        >>> import torch
        >>> head = MonotoneNetwork(signal=4, hidden=(16, 16))
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> y = torch.full((5, 3), 1e3)
        >>> torch.allclose(t(t.inv(y).clone()), y)
        True
    """

    def __init__(self, signal: int = 16, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__(signal, hidden)
        with torch.no_grad():
            for raw in self.weights:
                raw.normal_()
            self.shares.bias.uniform_(-2, 2)
            first = self.shares.bias[: hidden[0]]  # spreads the steep parts of the first layer's units
            first.copy_(softplus(self.weights[0][:, 0]) * torch.empty_like(first).uniform_(-2.5, 2.5))

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        shift, log_scale, log_amplitude, shares = self._split(phi)
        inner, *others, outer = self.weights
        weights = [softplus(inner)[:, 0], *(softplus(w) * (6 / w.shape[1]) for w in others)]
        weights.append(softplus(outer) / outer.shape[1])  # approximately a mean of the units
        parameters = [shift, log_scale.exp(), torch.exp(log_amplitude - 1), *shares]
        return Monotone(monotone_network, parameters, weights)


class IntegratedPositive(_OwnNetwork):
    r"""The integral y = m + int_0^x g(t) dt of a positive network g, with log g(t) = s + r net(t, signal).

    g is constant for \|t\| above ``bound``. phi contains m, s, r and the signal, so P = signal + 3; s is bounded as
    5 tanh(raw / 5), r as 3 tanh(raw / 3), and \|net\| is below 3. phi = 0 gives r = 0 and a constant g. log dy/dx is log g(x).

    The layers are h = sin(W h + V signal + b) with weights of the head. W is bounded smoothly: each entry of the first
    layer by 4, the row sum of the last layer by 3, and the product of the largest row sums of the other layers by 8.
    Hence g is analytic, and log g changes by less than 288 along a panel for any depth, so quadrature converges.

    The integral is a sum over panels of an eighth of the bound. Gauss-Kronrod quadrature is refined on each panel until
    the estimated error, relative to the integral over the panel, is at most 3.5e-10 in float64 and 3.3e-4 in float32
    (see :func:`pyro_genexact.numerics.integrate`). Measured against 128 times as many panels, the true error of the
    integral was up to 6e-16 and 4e-7 with initial weights, and 3e-15 and 1e-5 with weights up to 1000 times as large.

    Cost: the network at 16 points per panel between 0 and x in float32, where one try is nearly always enough, and at
    31 or more in float64. The inverse takes four to seven times as long. The signal's terms are computed once.

    Args:
        signal: the number of entries of phi that the network reads.
        hidden: the widths of the hidden layers.
        bound: where g becomes constant, positive. Standardised data are within the default.

    Raises:
        ValueError: if a size is not a positive integer, there is no hidden layer, or ``bound`` is not positive and
            finite.
        ConvergenceError: by the transform, if the error of an integral is larger than this after all refinements.

    Reference: Wehenkel, Louppe, "Unconstrained Monotonic Neural Networks", NeurIPS 2019.

    Example:
        >>> import torch
        >>> head = IntegratedPositive(signal=4, hidden=(16, 16))
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> y = torch.full((5, 3), 1e3)
        >>> torch.allclose(t(t.inv(y).clone()), y)
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
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        shift, log_scale, amplitude, shares = self._split(phi)
        shares = [share.remainder(2 * pi) for share in shares]  # equal sines with smaller rounding errors
        inner, *others, outer = self.weights
        limit = _SUM ** (1 / max(len(others), 1))
        weights = [bounded(inner[:, 0], _STEEP), *(_limited(w, limit) for w in others), _limited(outer, _HEIGHT)]
        unit = inner.new_full((), self.bound / _PANELS)
        return Monotone(integrated_positive, [shift, log_scale, amplitude, *shares], [unit, *weights])


def _limited(rows: Tensor, limit: float) -> Tensor:
    """Scales rows smoothly so that the sums of their absolute values are below ``limit``."""
    return rows / (1 + rows.abs().sum(1, keepdim=True) / limit)


@full_precision
def monotone_network(
    x: Tensor, shift: Tensor, scale: Tensor, amplitude: Tensor, *layers: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes m + s x + a net(x) and its log-derivative, by forward-mode differentiation through the layers.

    Args:
        x: (*batch) values.
        shift: m, (*batch, 1).
        scale: s, (*batch, 1).
        amplitude: a, (*batch, 1).
        *layers: the signal's terms of the hidden layers, each (*batch, n), then the positive weights: (n,) of the
            first layer, (n, m) of others, and (1, m) of the last.
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
    """Computes m + the integral of g from 0 to x, and log g(x), with log g(t) = s + r net(t / unit) up to 8 units.

    The integral is a sum over panels of one unit between 0 and x, of which only the last is cut at x. A larger x
    therefore adds to the same terms, so rounding hardly makes y decrease.

    Args:
        x: (*batch) values.
        shift: m, (*batch, 1).
        log_scale: s, (*batch, 1).
        amplitude: r, (*batch, 1).
        *layers: the signal's terms of the hidden layers, each (*batch, n), then the unit (), then the weights: (n,) of
            the first layer, (n, m) of others, and (1, m) of the last.
    """
    depth = len(layers) // 2 - 1
    shape = broadcast_shapes(x.shape, shift.shape[:-1])
    (unit, *weights), t = layers[depth:], (x / layers[depth]).expand(shape)
    inside = t.clamp(-_PANELS, _PANELS)
    rows, last, edge, low, high = _panels(inside)
    each = [p.expand(*shape, -1).reshape(-1, p.shape[-1]) for p in (log_scale, amplitude, *layers[:depth])]
    each = [p.index_select(0, rows) for p in each]
    # equal sines with smaller rounding errors
    each[2] = torch.addcmul(each[2], edge.unsqueeze(-1), weights[0]).remainder(2 * pi)
    ends = x

    def g(points: Tensor) -> Tensor:
        nonlocal ends  # log g at the ends of the panels, from the same pass
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
    """Returns s + r net(t) at points t (M, n) of M panels; ``each`` has the tensors (M, ...) of the panels."""
    log_scale, amplitude, first, *shares = each
    h = torch.sin(torch.addcmul(first.unsqueeze(-2), t.unsqueeze(-1), weights[0]))
    for share, weight in zip(shares, weights[1:-1], strict=True):
        h = torch.sin(linear(h, weight).add_(share.unsqueeze(-2)))
    return torch.addcmul(log_scale, amplitude, linear(h, weights[-1]).squeeze(-1))


def _panels(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lays out the M panels between 0 and each t.

    If sizes may not depend on values, every t has all 8 panels, and the panels beyond t have zero width.

    Returns:
        The index of t for each panel (M,), the index of the last panel of each t, the edge of each panel (M,) nearer to
        0, and the lower and the upper bound of each panel relative to this edge (M,).
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
