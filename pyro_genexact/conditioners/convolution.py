"""CausalConv: dilated causal convolutions over sites, with a ring buffer per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Site
from ..contexts import Covariates, Source
from ..core.checks import check_sizes, check_widths
from .encoding import dropped, share
from .rings import shifted, written
from .steps import Memory, StepNetwork


class CausalConv(StepNetwork):
    """Dilated causal convolutions with gates and residual connections, over sites of any length.

        h_t = linear([y_{t-1}, x]),
        h_t <- h_t + linear(tanh(a_t) * sigmoid(b_t)),      [a_t, b_t] = sum_{j < k} U_j norm(h_{t - j d}) + u,
        phi_t = linear(norm(h_t))

    The second line is one layer. There is a layer for each entry d of ``dilations``, and k is the kernel size. The
    convolutions read zeros before the first step. Site t reads only the ``receptive_field`` =
    1 + (k - 1) * sum(dilations) sites before it. A learned start vector replaces y_0, so that the parameters of the
    first site are also a non-linear function of the context x. With ``context=Covariates(C)``, step t reads the
    covariates x_t in place of x. With ``context=Source(C)``, the last layer attends to the steps of the source, as in
    :class:`Recurrent`.

    Cost: ``forward`` takes O(B T L k W^2) operations for L layers of width W, in parallel over the sites. Each step of
    ``extend`` takes O(B L k W^2) operations at any length, because a ring buffer per layer holds the last (k - 1) * d
    inputs: (receptive_field - 1) * W numbers per row in all. Without grad the buffers are written in place; with grad
    they are copied at each step.

    Args:
        site: kind of a site: ``()`` for a real number and ``(k,)`` for a real vector, which a linear layer reads, or an
            integer V for categories 0 ... V-1, which are embedded.
        num_params: P, the number of parameters per site.
        width: W, the width of each layer.
        kernel: k, the number of inputs of each convolution.
        dilations: d, the distance between these inputs, for each layer.
        dropout: dropout rate in training mode, after the inputs and after each layer.
        context: C, the number of features of a context vector that every step reads; ``Covariates(C)`` for covariates,
            where site t reads those of the ``receptive_field`` sites up to t; or ``Source(C)`` for a source
            sequence that all sites attend to, passed as a :class:`~pyro_genexact.PaddedSequence` if its rows have
            different lengths.

    Attributes:
        receptive_field: the number of earlier sites that each site reads.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if a size is not a positive integer, ``dilations`` is empty, or ``dropout`` is outside [0, 1). In
            calls, for categories out of range, a context of another width, a number of rows other than the state's, and
            more sites than covariates.

    References: van den Oord et al., "WaveNet: a generative model for raw audio", 2016; Bai, Kolter, Koltun, "An
    empirical evaluation of generic convolutional and recurrent networks for sequence modeling", 2018; Le Paine et al.,
    "Fast WaveNet generation algorithm", 2016 (buffers).

    Example:
        >>> import torch
        >>> net = CausalConv((), 2, width=16, kernel=2, dilations=(1, 2, 4, 8))
        >>> net.receptive_field, net(torch.zeros(7, 9)).shape
        (16, torch.Size([7, 9, 2]))
        >>> phi, state = net.start(None, batch_size=7)
        >>> phi, state = net.extend(torch.zeros(7, 1), state)
        >>> phi.shape
        torch.Size([7, 1, 2])
    """

    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        width: int = 64,
        kernel: int = 2,
        dilations: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        dropout: float = 0.0,
        context: int | Covariates | Source = 0,
    ) -> None:
        check_sizes(1, kernel=kernel)
        check_widths(1, dilations=dilations)
        if not dilations:
            raise ValueError(f"Expected dilations of at least one layer; got {dilations}.")
        super().__init__(site, num_params, width, context, dropout)
        self.add_readout(width)
        self.width, self.kernel, self.dilations = width, kernel, tuple(dilations)
        self.read = nn.Linear(self.inputs, width)
        self.layers: Any = nn.ModuleList(GatedConv(width, kernel, d, len(dilations), self.dropout) for d in dilations)
        self.norm = nn.LayerNorm(width)

    @property
    def receptive_field(self) -> int:
        """The number of earlier sites that each site reads."""
        return 1 + (self.kernel - 1) * sum(self.dilations)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, width={self.width}, kernel={self.kernel}, dilations={self.dilations}, "
            f"dropout={self.dropout}, context={self.context}"
        )

    def initial(self, rows: int) -> Memory:
        return tuple(self.begin.new_zeros(rows, layer.before, self.width) for layer in self.layers)

    def steps(self, inputs: Tensor, memory: Memory, weights: list[Any], first: int) -> tuple[Tensor, Memory]:
        rings: list[Tensor] = []
        x = dropped(self.read(inputs), self)
        for layer, ring in zip(self.layers, memory, strict=True):
            x, ring = layer(x, ring, first)
            rings.append(ring)
        return self.norm(x), tuple(rings)


class GatedConv(nn.Module):
    """A layer of :class:`CausalConv`: a dilated convolution of the normalised inputs, a gate and a residual connection."""

    def __init__(self, width: int, kernel: int, dilation: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.kernel, self.dilation, self.before, self.dropout = kernel, dilation, (kernel - 1) * dilation, dropout
        self.norm, self.conv = nn.LayerNorm(width), nn.Linear(kernel * width, 2 * width)
        self.mix = share(width, width, depth)

    def forward(self, x: Tensor, ring: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Maps steps (B, S, W) to outputs (B, S, W), and returns the ring (B, (k - 1) d, W) after them."""
        h = self.norm(x)
        taps = [shifted(h, ring, first, j * self.dilation) for j in range(self.kernel - 1, 0, -1)]
        value, gate = self.conv(torch.cat([*taps, h], -1)).chunk(2, -1)
        x = x + dropped(self.mix(torch.tanh(value) * torch.sigmoid(gate)), self)
        return x, written(ring, h, first)
