"""The entmax distribution over categories, some of which have probability 0."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import constraints

from ..core.checks import check_numbers
from ..core.functional import at_hand, compiling
from ..core.independent import REAL_VECTOR
from ..core.values import checked_value
from ..numerics.derivatives import implicit
from ..numerics.roots import find
from .categorical import Categorical
from .in_support import contains


class EntmaxCategorical(Categorical):
    """Categories 0 ... V - 1 with the entmax of the scores s (V,) as probabilities, of which many may be exactly 0.

        p_v = [(alpha - 1) s_v - tau]_+^{1 / (alpha - 1)},

    where tau makes them sum to 1. They maximise p · s - Ω(p), with the Tsallis negentropy Ω(p) =
    (sum_v p_v^alpha - 1) / (alpha (alpha - 1)). alpha = 2 is sparsemax; the limit alpha to 1 is softmax. Categories
    whose score is more than 1 / (alpha - 1) below the largest score have probability 0.

    It is a Categorical of Pyro: ``logits`` are the log-probabilities, -inf for probability 0, with gradient zero. So
    maximum likelihood cannot raise the probability of a category from 0; :meth:`fenchel_young` can.

    tau is computed in float64, by sorting for alpha = 1.5 and 2, and by a bracketed search for other alpha. Its gradient
    is that of the implicit function, of any order. Rounding of tau limits the precision of probabilities below
    1e-16^{1 / (alpha - 1)}, which is 0.02 for alpha = 10.

    Cost: O(V log V) for alpha = 1.5 and 2; up to about 50 evaluations of the sum for other alpha.

    References: Martins, Astudillo (2016), "From softmax to sparsemax", arXiv:1602.02068; Peters, Niculae, Martins
    (2019), "Sparse sequence-to-sequence models", arXiv:1905.05702.

    Args:
        scores: (*batch, V) real numbers; -inf gives probability 0. Without validation, the probabilities of a row with
            NaN, with inf or without a finite score are NaN.
        alpha: a number above 1.

    Raises:
        TypeError: if ``alpha`` is not a number.
        ValueError: if ``alpha`` is not above 1 and finite, or there are no scores; when validating, also if a score is
            NaN or inf, all scores of a row are -inf, or a value is not one of the categories.

    Example:
        >>> import torch
        >>> d = EntmaxCategorical(torch.tensor([2.0, 1.5, 0.0]), alpha=1.5)
        >>> d.probs
        tensor([0.6740, 0.3260, 0.0000])
        >>> d.log_prob(torch.tensor([0, 2])), d.fenchel_young(torch.tensor([0, 2]))
        (tensor([-0.3945,    -inf]), tensor([0.1844, 2.1844]))
    """

    arg_constraints = {"scores": REAL_VECTOR}

    def __init__(self, scores: Tensor, alpha: float = 1.5, validate_args: bool | None = None) -> None:
        if scores.dim() < 1 or not scores.shape[-1]:
            raise ValueError(f"Expected scores (*batch, V) of at least one category; got {tuple(scores.shape)}.")
        self.scores, self.alpha = scores, checked_alpha(alpha)
        log_p = log_entmax(scores, self.alpha)
        super().__init__(logits=log_p, validate_args=validate_args)
        # torch's constructor would normalise again, with a gradient for log-probabilities of -inf
        self.logits = self._param = log_p
        self.probs = torch.where(log_p != -inf, log_p, 0).exp() * (log_p != -inf)
        if self._validate_args and not scores.detach().amax(-1).isfinite().all():
            raise ValueError("Expected scores to have a finite maximum in each row; got a row without one.")

    def expand(self, batch_shape: Any, _instance: Any = None) -> EntmaxCategorical:
        new = self._get_checked_instance(EntmaxCategorical, _instance)
        new.scores, new.alpha = self.scores.expand((*batch_shape, -1)), self.alpha
        expanded: EntmaxCategorical = super().expand(batch_shape, new)
        return expanded

    def fenchel_young(self, value: Tensor) -> Tensor:
        """Returns the Fenchel-Young loss of a category y, (*sample, *batch), which is finite for every finite score.

            L(y) = max_p (p · s - Ω(p)) - s_y >= 0

        It is convex in the scores, its gradient is p minus the one-hot vector of y, and it is 0 if and only if p_y = 1.
        As alpha tends to 1, L is -log p of softmax.
        """
        value = checked_value(self, value)
        inside, scores = contains(constraints.integer_interval(0, self._num_events - 1), value), self.scores.double()
        index = torch.where(inside, value, 0).long().unsqueeze(-1)
        index, scores, log_p = torch.broadcast_tensors(index, scores, self.logits.double())
        own = scores.gather(-1, index[..., :1])
        inside = inside & (own.squeeze(-1) != -inf)
        above, possible = scores - torch.where(own != -inf, own, 0), log_p != -inf
        log_p = torch.where(possible, log_p, 0)
        p = torch.where(possible, log_p.exp(), 0)
        with torch.no_grad():  # sum p^alpha - 1 = sum p (p^(alpha - 1) - 1)
            negentropy = torch.expm1((self.alpha - 1) * log_p) / (self.alpha * (self.alpha - 1))
            loss = (p * (torch.where(possible, above, 0) - negentropy)).sum(-1)
        return torch.where(inside, (_Maximum if compiling() else _MaximumWithTangents).apply(loss, above, p), inf).to(
            self.logits
        )


class _Maximum(Function):
    """Adds the gradient p to the maximum over p of p · s - Ω(p), which is computed without gradient.

    Autograd would add the derivative by p, which is 0 except for rounding, times that of p, which may be large.
    """

    @staticmethod
    def forward(maximum: Tensor, s: Tensor, p: Tensor) -> Tensor:
        return maximum.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad.unsqueeze(-1) * ctx.saved_tensors[0], None


class _MaximumWithTangents(_Maximum):
    """For all but ``torch.compile``, which takes no jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: Any, tangent: Tensor, __: Any) -> Tensor:
        return (tangent * ctx.saved_tensors[0]).sum(-1)


def checked_alpha(alpha: Any) -> float:
    """Returns alpha as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not above 1 and finite.
    """
    check_numbers(alpha=alpha)
    if not 1 < alpha < inf:
        raise ValueError(f"Expected alpha to be above 1 and finite; got {alpha}.")
    return float(alpha)


def log_entmax(scores: Tensor, alpha: float) -> Tensor:
    """Returns the logarithm of the entmax of scores (*batch, V), computed in float64; -inf for probability 0.

    Example:
        >>> log_entmax(torch.tensor([0.2, 0.0, -3.0]), 2.0).exp()
        tensor([0.6000, 0.4000, 0.0000])
    """
    z = (alpha - 1) * (scores.double() - scores.detach().double().amax(-1, keepdim=True))
    power = 1 / (alpha - 1)

    def minus_norm(tau: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns -(sum_v p_v)^(alpha - 1), which is nearly linear in tau, and its log-derivative."""
        gap = z - tau.unsqueeze(-1)
        some = gap > 0
        gap = torch.where(some, gap, 1)
        mass, slope = (torch.where(some, gap**k, 0).sum(-1) for k in (power, power - 1))
        return -(mass ** (alpha - 1)), (alpha - 2) * mass.log() + slope.log()

    target = -torch.ones_like(z[..., 0])
    with torch.no_grad():
        near = _descending(z)
        if alpha == 2:
            tau = _by_sorting(near)
        elif alpha == 1.5:
            tau = _by_sorting_squares(near)
        else:
            highest = -((1.001 * near.shape[-1]) ** (1 - alpha))  # where the sum is below 1
            tau = find(minus_norm, target, [near], low=-torch.ones_like(target), high=torch.full_like(target, highest))
    gap = z - implicit(minus_norm, tau, target, z).unsqueeze(-1)
    some = gap > 0
    log_p = power * torch.where(some, gap, 1).log()
    total = torch.where(some, log_p.detach().exp(), 0).sum(-1, keepdim=True).log()  # 0 except for rounding
    return (torch.where(some, log_p, -inf) - total).to(scores)  # NaN if no category has mass


def _descending(z: Tensor) -> Tensor:
    """Returns the numbers above -1 in descending order, and some of -1; tau is at least -1, so others have no effect."""
    z = z.clamp(min=-1)
    if at_hand(z) and z.numel():  # takes a tenth of the time of sorting for many categories
        return z.topk(max(1, int((z > -1).sum(-1).max())), -1)[0]
    return z.sort(-1, descending=True)[0]


def _by_sorting(z: Tensor) -> Tensor:
    """Returns tau for alpha = 2: sum_v [z_v - tau]_+ = 1, where the first k of the descending numbers are above tau."""
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    taus = (z.cumsum(-1) - 1) / count
    return _last(taus, z > taus)


def _by_sorting_squares(z: Tensor) -> Tensor:
    """Returns tau for alpha = 1.5: sum_v [z_v - tau]_+^2 = 1, a quadratic equation for each number k of categories."""
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = z.cumsum(-1) / count
    variance = z.square().cumsum(-1) / count - mean.square()
    taus = mean - (1 / count - variance).clamp(min=0).sqrt()
    return _last(taus, z > taus)


def _last(taus: Tensor, good: Tensor) -> Tensor:
    """Returns the last of the candidates (*batch, V) that are good, which come first."""
    return taus.gather(-1, (good.sum(-1, keepdim=True) - 1).clamp(min=0)).squeeze(-1)
