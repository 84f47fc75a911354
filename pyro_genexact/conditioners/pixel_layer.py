"""PixelLayer: a layer of the vertical and the horizontal stack of a PixelCNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .encoding import dropped, share

Tensors = tuple[Tensor, ...]


class PixelLayer(nn.Module):
    """A layer of both stacks of :class:`PixelCNN`, with a gate and a residual connection in each."""

    def __init__(self, width: int, kernel: int, depth: int, dropout: float) -> None:
        super().__init__()
        before, self.dropout = kernel // 2, dropout
        self.above = nn.Conv2d(width, 2 * width, (before + 1, kernel), padding=(0, before))
        self.mix_above = share(width, width, depth, bias=False)
        self.down = nn.Linear(width, 2 * width)
        self.left = nn.Linear((before + 1) * width, 2 * width, bias=False)
        self.mix = share(width, width, depth, bias=False)

    def weights(self) -> Tensors:
        """Returns the transposed weights of the horizontal stack."""
        return self.left.weight.t(), self.mix.weight.t()

    def vertical(self, x: Tensor, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps R rows v (B, R, columns, W), which x (B, n + R, columns, W) ends with, to rows and terms for the gates."""
        gates = convolved(x, self.above)
        if context is not None:
            context = context[:, None, None]
            gates = gates + context[..., : gates.shape[-1]]
        v = v + self.mix_above(dropped(_gated(gates), self))
        terms = self.down(v)
        return v, terms if context is None else terms + context[..., gates.shape[-1] :]

    def horizontal(self, taps: Tensor, h: Tensor, terms: Tensor, weights: Tensors) -> Tensor:
        """Maps pixels h (N, m, W), from what the convolution reads (N * m, (n + 1) W) and the terms (N, m, 2 W)."""
        gates = torch.addmm(terms.flatten(0, 1), taps, weights[0])
        out = torch.addmm(h.flatten(0, 1), dropped(_gated(gates), self), weights[1])
        return out.unflatten(0, h.shape[:2])


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolves rows (B, n, columns, F); in this layout, the convolution needs no copies."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def taps(x: Tensor, sites: int) -> Tensor:
    """Returns each of the last ``sites`` pixels of x (N, n + m, F) with the n before it, (N * m, (n + 1) F)."""
    if sites == 1:
        return x.flatten(1)
    return torch.cat([x[:, k : k + sites] for k in range(x.shape[1] - sites + 1)], -1).flatten(0, 1)


def _gated(gates: Tensor) -> Tensor:
    value, gate = gates.chunk(2, -1)
    return torch.tanh(value) * torch.sigmoid(gate)
