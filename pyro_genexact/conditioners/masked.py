"""MaskedLinear, and masks from which sites each site may read and the units' degrees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.buffers import WithDerived, register_derived


class MaskedLinear(WithDerived):
    """A linear layer whose weight is masked wherever it is used, with a linear term in the context beside it.

    y = (mask * weight) x + context_weight c + bias

    Entries of ``weight`` that the mask forbids keep random values, for another order of the sites: penalties, weight decay
    and priors on ``weight`` count them, those on :meth:`masked` do not.

    Args:
        mask: (out, in) Boolean, which inputs an output may read.
        context: C, features of the context; 0 for none.
        bias: whether there is a bias.
        scale: the start's weights are uniform within scale / sqrt(inputs that the output reads).

    Example:
        >>> import torch
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> layer(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    mask: Tensor
    bias: Any  # a Parameter or None
    context_weight: Any

    def __init__(self, mask: Tensor, context: int = 0, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        register_derived(self, "mask", mask, torch.get_default_dtype())
        bound = scale * (self.mask.sum(1, keepdim=True) + context).clamp(min=1).rsqrt()

        def uniform(columns: int) -> Tensor:
            return (2 * torch.rand(len(mask), columns) - 1) * bound

        # entries that the mask forbids too: another order of the sites may use them
        self.weight = nn.Parameter(uniform(mask.shape[1]))
        self.bias = nn.Parameter(uniform(1).squeeze(1)) if bias else None
        self.context_weight = nn.Parameter(uniform(context)) if context else None

    def masked(self) -> Tensor:
        """The weight (out, in), zero where the mask forbids a connection."""
        return self.weight * self.mask

    def offset(self, context: Tensor | None) -> Any:
        """What does not depend on x: (B, out) from a context (B, C), else the bias (out,) or None."""
        return self.bias if context is None else linear(context, self.context_weight, self.bias)

    def columns(self, context: Tensor | None, batch_size: int) -> Tensor:
        """:meth:`offset`, feature-major: (out, B)."""
        bias = self.bias.unsqueeze(1)
        return bias.expand(-1, batch_size) if context is None else torch.addmm(bias, self.context_weight, context.t())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, in) and (B, C) to (B, out)."""
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
