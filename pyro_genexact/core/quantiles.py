"""Quantiles of draws along the first dimension."""

from __future__ import annotations

from torch import Tensor


def quantiles(draws: Tensor, q: Tensor) -> Tensor:
    """Linearly interpolated quantiles (Q, ...) of draws (S, ...), for probabilities q (Q,) in [0, 1].

    ``torch.quantile`` raises for inputs of more than 16 million elements; this function has no such limit.
    """
    ranked, place = draws.sort(0).values, q * (len(draws) - 1)
    low = place.floor()
    part = (place - low).to(draws.dtype).reshape(-1, *[1] * (draws.dim() - 1))
    return ranked[low.long()].lerp(ranked[place.ceil().long()], part)
