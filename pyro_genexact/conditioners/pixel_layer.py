"""PixelLayer: a layer of the vertical and the horizontal stack of a PixelCNN.

Features are last, (B, rows, columns, F), which is the layout in which convolutions on CPUs are fastest. Matrix products over
all pixels are convolutions, too, because these take about half the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, glu

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
        self.left = nn.Conv2d(width, 2 * width, (1, before + 1), bias=False)
        self.mix = share(width, width, depth, bias=False)

    def weights(self) -> Tensors:
        """Returns the matrices of the horizontal stack."""
        return matrix(self.left), self.mix.weight.t()

    def vertical(self, x: Tensor, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps rows v (B, R, W, D), which x (B, n + R, W, D) ends with, to rows and terms of the gates."""
        gates = convolved(x, self.above)
        if context is not None:
            context = context[:, None, None]
            gates = gates + context[..., : gates.shape[-1]]
        v = v + product(dropped(glu(gates), self), self.mix_above)
        terms = product(v, self.down)
        return v, terms if context is None else terms + context[..., gates.shape[-1] :]

    def horizontal(self, x: Tensor, h: Tensor, terms: Tensor, weights: Tensors) -> Tensor:
        """Maps pixels h (B, R, m, D), which x (B, R, n + m, D) ends with, to pixels, given the terms (B, R, m, 2 D)."""
        if h.shape[1:3] == (1, 1):
            gates = torch.addmm(terms.flatten(0, 2), x.flatten(1), weights[0])
            out = torch.addmm(h.flatten(0, 2), dropped(glu(gates), self), weights[1])
            return out.unflatten(0, h.shape[:3])
        gates = terms + convolved(x, self.left)
        return h + product(dropped(glu(gates), self), self.mix)


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolves x (B, rows, columns, F)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    """Applies a linear layer to x (B, rows, columns, F)."""
    return conv2d(x.permute(0, 3, 1, 2), linear.weight[..., None, None], linear.bias).permute(0, 2, 3, 1)


def matrix(conv: nn.Conv2d) -> Tensor:
    """Returns the weights of a convolution with kernel (1, k) as a matrix (k * F, outputs)."""
    return conv.weight.squeeze(2).permute(2, 1, 0).flatten(0, 1)
