"""Masked dense layers, and their masks from the sites that each site may read and the degrees of the units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

BANDED = 256  # from this width on, leaving out what the mask makes zero saves a tenth to a fifth of a layer's time
Bands = list[tuple[int, int]]


class _BandedLinear(torch.autograd.Function):
    """x (mask * weight)^T + offset in four bands of rows, each without the columns that are zero from some column on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mask: Tensor, offset: Tensor, bands: Bands) -> Tensor:  # type: ignore[override]
        parts, low = [], 0
        for high, end in bands:
            masked = weight[low:high, :end] * mask[low:high, :end]
            parts.append(torch.addmm(offset[..., low:high], x[:, :end], masked.t()))
            low = high
        return torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.bands = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mask, offset = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            parts, left, above = [], 0, 0
            for high, end in ctx.bands:  # columns left ... end - 1 are zero in the rows above
                parts.append(g[:, above:] @ (weight[above:, left:end] * mask[above:, left:end]))
                left, above = end, high
            of_x = torch.cat([*parts, g.new_zeros(len(g), x.shape[1] - left)], 1)
        if ctx.needs_input_grad[1]:
            low, grads = 0, []
            for high, end in ctx.bands:
                grads.append((g[:, low:high].t() @ x[:, :end]) * mask[low:high, :end])
                low = high
            of_weight, low = grads[0].new_zeros(weight.shape), 0
            for (high, end), grad in zip(ctx.bands, grads, strict=True):
                of_weight[low:high, :end] = grad
                low = high
        return of_x, of_weight, None, g.sum(0) if offset.dim() == 1 else g, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, mask, _ = ctx.saved_tensors
        of_x, of_weight, _, of_offset, _ = tangents
        total = torch.zeros((), dtype=x.dtype, device=x.device) if of_offset is None else of_offset
        total = total if of_x is None else total + of_x @ (weight * mask).t()
        total = total if of_weight is None else total + x @ (of_weight * mask).t()
        return total.expand(len(x), len(weight))


def _bands(mask: Tensor) -> Bands:
    """Four bands of rows (last row + 1, last column that is not zero + 1)."""
    ends = torch.where(mask.any(1), mask.shape[1] - mask.flip(1).int().argmax(1), 0).cummax(0)[0]
    cuts = [len(mask) * i // 4 for i in range(1, 5)]
    return [(cut, int(ends[cut - 1])) for cut in cuts]


class MaskedLinear(nn.Module):
    """A linear layer whose weight is masked wherever it is used, with a linear term in the context beside it.

    y = (mask * weight) x + context_weight c + bias

    Args:
        mask: (out, in) Boolean, which inputs an output may read.
        context: C, features of the context; 0 for none.
        bias: whether there is a bias.
        scale: the start's weights are uniform within scale / sqrt(inputs that the output reads).

    Example:
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> layer(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    mask: Tensor
    bias: Any  # a Parameter or None
    context_weight: Any

    def __init__(self, mask: Tensor, context: int = 0, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self._bands = _bands(mask) if bias and min(mask.shape) >= BANDED else None
        mask = mask.to(torch.empty(()))
        bound = scale * (mask.sum(1, keepdim=True) + context).clamp(min=1).rsqrt()

        def uniform(columns: int) -> Tensor:
            return (2 * torch.rand(len(mask), columns) - 1) * bound

        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(uniform(mask.shape[1]) * mask)
        self.bias = nn.Parameter(uniform(1).squeeze(1)) if bias else None
        self.context_weight = nn.Parameter(uniform(context)) if context else None

    def masked(self) -> Tensor:
        """The weight (out, in), zero where the mask forbids a connection."""
        return self.weight * self.mask

    def offset(self, context: Tensor | None) -> Any:
        """What does not depend on x: (B, out) from a context (B, C), else the bias (out,) or None."""
        return self.bias if context is None else linear(context, self.context_weight, self.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, in) and (B, C) to (B, out)."""
        if self._bands is not None:
            out: Tensor = _BandedLinear.apply(x, self.weight, self.mask, self.offset(context), self._bands)
            return out
        if context is None:
            return linear(x, self.masked(), self.bias)
        return torch.addmm(self.offset(context), x, self.masked().t())


def reads_of(adjacency: Tensor | None, num_sites: int) -> Tensor:
    """(T, T) Boolean: which sites a site reads; all earlier ones, or the checked ``adjacency``."""
    earlier = torch.ones(num_sites, num_sites, dtype=torch.bool, device="cpu").tril(-1)
    if adjacency is None:
        return earlier
    reads = torch.as_tensor(adjacency, device="cpu")
    if reads.shape != earlier.shape or reads.dtype != torch.bool:
        raise ValueError(
            f"Expected adjacency to be a Boolean matrix of shape {tuple(earlier.shape)}; "
            f"got {reads.dtype} of shape {tuple(reads.shape)}."
        )
    if (reads & ~earlier).any():
        row, column = (reads & ~earlier).nonzero()[0].tolist()
        raise ValueError(
            f"Expected a strictly lower triangular adjacency (a site reads earlier sites only); got adjacency[{row}, {column}]."
        )
    return reads


def degrees_of(widths: Sequence[int], num_sites: int, lowest: int) -> list[list[int]]:
    """Non-decreasing degrees ``lowest`` ... T-1, spread evenly over the units of each hidden layer, first to last."""
    count = num_sites - lowest
    return [
        [
            lowest + (u * count // width if width >= count else u * (count - 1) // max(width - 1, 1))
            for u in range(width)
        ]
        for width in widths
    ]


def masks_of(
    reads: Tensor, sites: Sequence[int], hidden: Sequence[Sequence[int]], outputs: Sequence[int]
) -> list[Tensor]:
    """The mask (out, in) of each layer: inputs that belong to ``sites``, units of the given degrees, outputs of sites.

    A unit of degree d reads the sites that site d reads, and lower units that read no more than those.
    """
    levels = [torch.tensor(level, dtype=torch.long, device="cpu") for level in (*hidden, outputs)]
    masks = [reads[levels[0]][:, list(sites)]]
    if hidden:
        count = reads.to(torch.float64)
        within = (count @ (1 - count).t() == 0).t() & torch.ones_like(
            reads
        ).tril()  # within[t, d]: d reads no more than t
        masks += [within[above][:, below] for below, above in pairwise(levels)]
    return masks


def check_connected(reads: Tensor, masks: Sequence[Tensor], hidden: Sequence[int]) -> None:
    """Raises a ValueError if a site that may read others reads none of them through the hidden layers."""
    reached = masks[0].to(torch.float32)
    for mask in masks[1:]:
        reached = (mask.to(torch.float32) @ reached > 0).to(torch.float32)
    cut = reads.any(1) & ~(reached > 0).any(1)[:: len(masks[-1]) // len(reads)]
    if cut.any():
        raise ValueError(
            f"Expected hidden layers wide enough that every site reads an earlier one; got hidden={tuple(hidden)}, with "
            f"which site {int(cut.nonzero()[0])} of {len(reads)} reads none (widen them, or direct=True)."
        )
