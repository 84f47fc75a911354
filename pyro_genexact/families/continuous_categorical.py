"""The continuous categorical distribution, whose log density is linear on the simplex."""

from __future__ import annotations

from math import exp, inf, lgamma, log
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd import Function
from torch.distributions import constraints

from ..core.compiling import cached
from ..core.independent import REAL_VECTOR
from ..core.values import checked_value
from .in_support import contains
from .parametrised import Parametrised, ShapesByParameters

# Seven steps reach full precision for every uniform number of 53 bits; the first needs no extra evaluation.
# numerics.root is not used: a convex function needs no bracket, and residuals have rounding errors of the order of the
# largest logit, too large to test x by them.
_NEWTON_STEPS = 9


class ContinuousCategorical(Parametrised, ShapesByParameters, TorchDistribution):
    """A density on the simplex that is log-linear in the value x (k,), with natural parameters ``logits`` (k,).

        p(x) = exp(logits · x) / Z,    Z = exp[logits_1, ..., logits_k],

    with respect to Lebesgue measure on any k - 1 of the k coordinates. Z is the divided difference of exp at the
    logits, and the gradient of log Z is the mean. Adding a constant to all logits does not change the distribution.
    Equal logits give the uniform distribution on the simplex, and k = 2 gives the continuous Bernoulli distribution.
    Unlike the Dirichlet density, this density is finite on the boundary of the simplex.

    log Z is computed without cancellation, for ties and gaps of any size, and its derivatives of every order are
    divided differences as well. Samples invert the conditional survival functions one coordinate at a time, and
    ``rsample`` has gradients of every order. All computations use float64 internally.

    Cost: O(k^3) for ``log_prob``, O(k^4) for its gradient and for a sample.

    Reference: Gordon-Rodriguez, Loaiza-Ganem, Cunningham (2020), "The continuous categorical: a novel simplex-valued
    exponential family", ICML.

    Args:
        logits: (*batch, k) real numbers, k at least 2.

    Raises:
        ValueError: if there are fewer than two logits, or a value does not have k shares.

    Example:
        >>> import torch
        >>> d = ContinuousCategorical(torch.zeros(3, 4))
        >>> d.sample((2,)).shape
        torch.Size([2, 3, 4])
        >>> d.log_prob(torch.full((4,), 0.25)).exp()  # uniform: 3! everywhere
        tensor([6., 6., 6.])
    """

    arg_constraints = {"logits": REAL_VECTOR}
    support = constraints.simplex
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        if logits.dim() < 1 or logits.shape[-1] < 2:
            raise ValueError(f"Expected logits.shape[-1] >= 2; got {tuple(logits.shape)}.")
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    @property
    def log_normalizer(self) -> Tensor:
        """The log normaliser log Z (*batch) in nats; its gradient is the mean."""
        eta = self.logits.double()
        return (_log_mean_exp(eta) - lgamma(eta.shape[-1])).to(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats, (*sample, *batch), of a value (*sample, *batch, k)."""
        value = checked_value(self, value)
        k = self.logits.shape[-1]
        if value.dim() < 1 or value.shape[-1] != k:
            raise ValueError(f"Expected value.shape[-1] == {k} (the number of logits); got {tuple(value.shape)}.")
        inside = contains(self.support, value)
        eta = _centred(self.logits)  # removes the error from values that sum to 1 up to rounding only
        inner = (eta * torch.where(inside.unsqueeze(-1), value, 1 / k)).sum(-1)
        return torch.where(inside, inner - _log_mean_exp(eta) + lgamma(k), -inf).to(self.logits)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample, *batch, k) by inversion, one coordinate at a time from the smallest logit to the largest."""
        shape = self._extended_shape(torch.Size(sample_shape))
        eta, order = self.logits.double().expand(shape).sort(-1)
        # 1 - rand lies in (0, 1]
        log_u = torch.log1p(-torch.rand((*shape[:-1], shape[-1] - 1), dtype=eta.dtype, device=eta.device))
        left, parts = torch.ones_like(log_u[..., 0]), []
        for i in range(shape[-1] - 1):
            # given the earlier coordinates, the shares of the remainder are again a continuous categorical
            w = _Break.apply(left.unsqueeze(-1) * (eta[..., i:] - eta[..., i, None]), log_u[..., i])
            parts.append(-left * torch.expm1(-w))
            left = left * torch.exp(-w)
        ascending = torch.stack([*parts, left], -1)
        return torch.zeros_like(ascending).scatter(-1, order, ascending).to(self.logits)

    @property
    def mean(self) -> Tensor:
        return _mean(_centred(self.logits)).to(self.logits)

    @property
    def mode(self) -> Tensor:
        """The corner of the largest logit, (*batch, k); the first one if several are equal."""
        return torch.nn.functional.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).to(self.logits)

    @property
    def variance(self) -> Tensor:
        eta = _centred(self.logits)
        k, mean = eta.shape[-1], _mean(eta)
        pairs = torch.stack(torch.broadcast_tensors(eta.unsqueeze(-1), eta.unsqueeze(-2)), -1)
        nodes = torch.cat([eta[..., None, None, :].expand(*pairs.shape[:-1], k), pairs], -1)
        second = (_log_mean_exp(nodes) - _log_mean_exp(eta)[..., None, None]).exp() / (k * (k + 1))
        one = torch.eye(k, dtype=eta.dtype, device=eta.device)
        covariance = second * (1 + one) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        # the variance of the largest share is that of the sum of the others; near a corner its own terms cancel
        largest = torch.nn.functional.one_hot(eta.argmax(-1), k).to(eta)
        others = 1 - largest
        rest = (covariance * others.unsqueeze(-1) * others.unsqueeze(-2)).sum((-2, -1))
        variance = covariance.diagonal(dim1=-2, dim2=-1) * others + rest.unsqueeze(-1) * largest
        return variance.to(self.logits)

    def entropy(self) -> Tensor:
        """Returns the differential entropy (*batch) in nats."""
        eta = _centred(self.logits)
        return (_log_mean_exp(eta) - lgamma(eta.shape[-1]) - (eta * _mean(eta)).sum(-1)).to(self.logits)


def _centred(logits: Tensor) -> Tensor:
    return logits.double() - logits.detach().double().amax(-1, keepdim=True)


def _log_mean_exp(eta: Tensor) -> Tensor:
    """Returns log E exp(eta · x) (*batch) for x uniform on the simplex: log of (k-1)! times the divided difference."""
    return _LogMeanExp.apply(eta)


def _mean(eta: Tensor) -> Tensor:
    """Returns the mean, the gradient of :func:`_log_mean_exp`.

    Repeating the i-th node of the divided difference multiplies it by the mean of x_i, up to the factor k.
    """
    k = eta.shape[-1]
    eta = eta - eta.detach().amax(-1, keepdim=True)
    repeated = torch.cat([eta.unsqueeze(-2).expand(*eta.shape, k), eta.unsqueeze(-1)], -1)
    return (_log_mean_exp(repeated) - _log_mean_exp(eta).unsqueeze(-1)).exp() / k


class _LogMeanExp(Function):
    """Implements :func:`_log_mean_exp`. Its derivatives of every order are the same function of repeated nodes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(eta: Tensor) -> Tensor:
        nodes = eta.sort(-1).values.movedim(-1, 0)
        return nodes[-1] + _log_means(nodes)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.unsqueeze(-1) * _mean(*ctx.saved_tensors)


class _Break(Function):
    """Solves log S(w) = log_u for w, where exp(-w) is the share that the first of m + 1 coordinates leaves.

        S(w) = e^{-m w} E exp(e^{-w} z · x) / E exp(z · x),

    with z (*batch, m+1) the logits minus the first one, which is the smallest, times the length of the remainder. As
    z >= 0, log S is a log-sum-exp of decreasing linear functions of w. It is convex, so Newton's method from w = 0
    increases to the root and does not pass it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, log_u: Tensor) -> Tensor:
        nodes, m = z.movedim(-1, 0).contiguous(), z.shape[-1] - 1
        start, rest = _log_means(nodes)
        w = -log_u / (m * torch.exp(rest - start))
        for _ in range(_NEWTON_STEPS - 1):
            whole, rest = _log_means(nodes * torch.exp(-w))
            log_s = nodes[-1] * torch.expm1(-w) - m * w + whole - start
            w = w + (log_s - log_u) / (m * torch.exp(rest - whole))
        return w.clamp_min(0)  # negative only by rounding

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, w = ctx.saved_tensors
        t = torch.exp(-w).unsqueeze(-1)
        mean = t * _mean(t * z)
        grad = grad / (z.shape[-1] - 1 + (z * mean).sum(-1))
        return grad.unsqueeze(-1) * (mean - _mean(z)), -grad


def _log_means(nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log E exp(nodes · x) minus the last node, for ascending nodes (k, *batch), and the same without node 0.

    Computes it for all intervals of nodes in the order of their lengths: by a Taylor series about the first node if the
    nodes are close, else by the recurrence of divided differences. Neither cancels: all terms of the series are
    positive, and the recurrence subtracts at most about half of the minuend.
    """
    k = len(nodes)
    close = float(k - 1)
    level = shorter = torch.zeros_like(nodes)
    steps = nodes[1:] - nodes[:-1]
    series = _series(nodes, close)
    for m in range(1, k):
        gap = nodes[m:] - nodes[:-m]
        shorter, upper = level, level[1:]
        ratio = torch.exp(level[:-1] - steps[m - 1 :] - upper)
        apart = upper + torch.log1p(-ratio) + torch.log(m / gap)
        level = torch.where(gap > close, apart, series[m - 1, : k - m].log() - gap)
    return level[0], shorter[1]


def _series(nodes: Tensor, close: float) -> Tensor:
    """Returns E exp((nodes_i..i+m - nodes_i) · x) at [m - 1, i], (k-1, k-1, *batch); valid for gaps up to ``close``.

    E = sum_n h_{n-m} m! / n!, where h is the complete homogeneous polynomial of the differences, computed by
    h_n[i..j] = h_n[i..j-1] + (node_j - node_i) h_{n-1}[i..j].
    """
    k = len(nodes)
    index = torch.arange(k - 1, device=nodes.device)
    last = nodes[(1 + index.unsqueeze(-1) + index).clamp(max=k - 1)]
    delta = (last - nodes[:-1]).clamp(0, close) / close
    rise = ((index[1:] + 1).to(nodes) / close).reshape(-1, *[1] * nodes.dim())
    term = torch.zeros_like(delta)
    term[0] = 1 / close
    total = term * close
    for scale in _scales(k):
        new = term * delta
        new[1:].addcmul_(term[:-1], rise)
        term = new
        total.add_(term, alpha=scale)
    return total


@cached
def _scales(k: int) -> tuple[float, ...]:
    """Returns close^n / n! for n = 2, 3, ..., until the rest of the series is below rounding."""
    close, more = k - 1, 0  # `more` is the number of terms after the first, for the longest interval
    while more * log(close) - lgamma(more + 1) > log(1e-17):
        more += 1
    return tuple(exp(n * log(close) - lgamma(n + 1)) for n in range(2, k + more))
