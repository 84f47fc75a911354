"""MaskedLinear, and the masks of a masked dense network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.buffers import WithDerived, register_derived
from .triangles import masked_linear, masked_weight, panels_of


class MaskedLinear(WithDerived):
    """Linear layer with a masked weight and an unmasked linear term of the context.

        y = (mask * weight) x + context_weight c + bias

    The mask is applied at each use of ``weight``, so that any replaced weight is masked, too. Masked entries of
    ``weight`` have random values, which another order of the sites may use. Penalties, weight decay and priors on
    ``weight`` include them; those on :meth:`masked` do not.

    Args:
        mask: Boolean (out, in), True where an output reads an input.
        context: C, the number of context features; 0 for none.
        bias: whether the layer has a bias.
        scale: initial weights are uniform within ±scale / sqrt(number of inputs that the output reads).

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
        self._panels = panels_of(mask)
        # products in panels convert a small part of the mask, so theirs stays Boolean, in a quarter of the memory
        register_derived(self, "mask", mask, None if self._panels else torch.get_default_dtype())
        bound = scale * (self.mask.sum(1, keepdim=True) + context).clamp(min=1).rsqrt()

        def uniform(columns: int) -> Tensor:
            return torch.rand(len(mask), columns).mul_(2).sub_(1).mul_(bound)

        # masked entries are initialised as well, because another order of the sites may use them
        self.weight = nn.Parameter(uniform(mask.shape[1]))
        self.bias = nn.Parameter(uniform(1).squeeze(1)) if bias else None
        self.context_weight = nn.Parameter(uniform(context)) if context else None

    def masked(self) -> Tensor:
        """Returns the weight (out, in) with zeros at masked entries."""
        return masked_weight(self.weight, self.mask, self._panels)

    def offset(self, context: Tensor | None) -> Any:
        """Returns the part that does not depend on x: (B, out) given a context (B, C), else the bias (out,) or None."""
        return self.bias if context is None else linear(context, self.context_weight, self.bias)

    def columns(self, context: Tensor | None, batch_size: int) -> Tensor:
        """Returns :meth:`offset` transposed to (out, B)."""
        bias = self.bias.unsqueeze(1)
        return bias.expand(-1, batch_size) if context is None else torch.addmm(bias, self.context_weight, context.t())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps x (B, in) and the context (B, C) to y (B, out)."""
        return masked_linear(x, self.weight, self.mask, self.offset(context), self._panels)


def reads_of(adjacency: Tensor | None, num_sites: int) -> Tensor:
    """Returns a Boolean matrix (T, T), the sites that each site reads: ``adjacency``, or all earlier sites."""
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
            f"Expected adjacency to be strictly lower triangular (sites read earlier sites); got True at [{row}, {column}]."
        )
    return reads


def degrees_of(widths: Sequence[int], num_sites: int, lowest: int) -> list[list[int]]:
    """Returns non-decreasing degrees ``lowest`` ... T-1, spread evenly over the units of each hidden layer."""
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
    """Returns the mask (out, in) of each layer, given the sites of the inputs, the degrees and the sites of the outputs.

    A unit of degree d reads the inputs that site d reads, and the lower units whose inputs are a subset of these.
    """
    levels = [torch.tensor(level, dtype=torch.long, device="cpu") for level in (*hidden, outputs)]
    masks = [reads[levels[0]][:, list(sites)]]
    if hidden:
        within = _within(reads)
        masks += [within[above][:, below] for below, above in pairwise(levels)]
    return masks


def _within(reads: Tensor) -> Tensor:
    """Returns a Boolean matrix (T, T) that is True at [t, d] if d <= t and site d reads a subset of what site t reads."""
    earlier = torch.ones_like(reads).tril()
    if torch.equal(reads, earlier.tril(-1)):
        return earlier
    count = reads.to(torch.float32)  # the number of sites that d reads and t does not; exact below 2^24
    return (count @ (1 - count).t() == 0).t() & earlier


def check_connected(reads: Tensor, masks: Sequence[Tensor], hidden: Sequence[int]) -> None:
    """Raises a ValueError if a site has sites to read, but the hidden layers are too narrow to read any of them."""
    reached = masks[0].any(1)  # the units that read a site, possibly through lower units
    for mask in masks[1:]:
        reached = (mask & reached).any(1)
    cut = reads.any(1) & ~reached[:: len(masks[-1]) // len(reads)]
    if cut.any():
        raise ValueError(
            f"Expected hidden layers wide enough for every site to read an earlier one; got hidden={tuple(hidden)}, where "
            f"site {int(cut.nonzero()[0])} of {len(reads)} reads none (increase the widths or set direct=True)."
        )
