"""Exact Kullback-Leibler divergences of chains of labels, registered with torch.distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, OneHotCategorical, register_kl

from ..core.functional import visible
from ..core.shapes import broadcast_batches
from .crf import LinearChainCRF
from .messages import double_precision
from .semirings import Max, fold


def of_crfs(p: LinearChainCRF, q: LinearChainCRF) -> Tensor:
    """Returns KL(p | q) = E_p[score_p - score_q] - log Z_p + log Z_q in nats, (*batch); inf if p allows what q forbids.

    Raises:
        ValueError: if devices, numbers of sites or labels, or lengths differ, or the batch shapes do not broadcast.
            Under torch.func, where lengths cannot be compared, the divergence of different lengths is inf.
    """
    sizes = [(*d.event_shape, d.num_labels) for d in (p, q)]
    if p.unary.device != q.unary.device:
        raise ValueError(f"Expected distributions on the same device; got {p.unary.device} and {q.unary.device}.")
    if sizes[0] != sizes[1]:
        raise ValueError(f"Expected the same numbers of sites and labels; got {sizes[0]} and {sizes[1]}.")
    batch_shape = broadcast_batches(p=p.batch_shape, q=q.batch_shape)
    one, other = p.inference, q.inference
    shape = broadcast_batches(p=one.rows, q=other.rows)
    totals = one.log_partition(), other.log_partition()
    ours, theirs = (i.potentials(shape).map(double_precision) for i in (one, other))
    lengths = [
        torch.as_tensor(p.event_shape[0], device=p.unary.device) if c.lengths is None else c.lengths
        for c in (ours, theirs)
    ]
    unequal = lengths[0] != lengths[1]
    if visible(unequal) and unequal.any():
        got = " and ".join(str(int(n.expand(unequal.shape)[unequal][0])) for n in lengths)
        raise ValueError(f"Expected distributions of equal lengths; got {got}.")
    values = ours.map(lambda a, b: torch.where((a > -torch.inf) & (b > -torch.inf), a - b, 0.0), theirs)
    difference = one.query(lambda messages, values: messages.mean(values), ours, values).reshape(shape)
    # 1 where q forbids a factor of a sequence that p allows
    forbidden = ours.map(lambda a, b: torch.where(a > -torch.inf, (b == -torch.inf).to(b), -torch.inf), theirs)
    leaks = (fold(Max(), forbidden)[0] > 0) | unequal
    divergence = torch.where(leaks.reshape(shape), torch.inf, difference - totals[0] + totals[1]).to(p.unary.dtype)
    return divergence.expand(batch_shape)


register_kl(LinearChainCRF, LinearChainCRF)(of_crfs)
register_kl(LinearChainCRF, Independent)(lambda p, q: of_crfs(p, as_crf(q, p)))
register_kl(Independent, LinearChainCRF)(lambda p, q: of_crfs(as_crf(p, q), q))


def as_crf(d: Independent[Any], like: LinearChainCRF) -> LinearChainCRF:
    """Converts independent categories or one-hot vectors (*batch, N) to a chain with the lengths of ``like``.

    All transitions have log-weight 0.

    Raises:
        ValueError: if ``d`` is another distribution.
    """
    base = d.base_dist
    if not isinstance(base, (Categorical, OneHotCategorical)) or d.reinterpreted_batch_ndims != 1:
        raise ValueError(
            f"Expected Categorical or OneHotCategorical with to_event(1), to compare with a LinearChainCRF; got {d}."
        )
    # torch replaces the logarithm of a probability of 0 by that of a small number
    zero = (base.probs == 0) & (base.logits > math.log(torch.finfo(base.logits.dtype).tiny))
    logits = base.logits.masked_fill(zero, -torch.inf)
    return LinearChainCRF(
        logits,
        logits.new_zeros(logits.shape[-1], logits.shape[-1]),
        lengths=like.lengths,
        validate_args=False,
    )
