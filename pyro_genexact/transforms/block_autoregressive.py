"""Block autoregressive flow: a masked network that is itself a bijection, increasing in each site."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.binding import Held
from ..core.checks import check_last, check_sizes, check_widths
from ..core.functional import transformed
from ..core.independent import REAL_VECTOR
from .block_network import FORMS, BlockLinear, Solve, Start, bounded, parallel, site_by_site
from .modules import BijectionModule, ConditionedTransform

_NARROW = 0.03  # slope of the first layer without residual connection, for a start near the identity


class ConditionedBlockAutoregressive(ConditionedTransform):
    """Bijection x -> y over T sites by a :class:`BlockAutoregressive` network, given a context.

    It keeps using the weights that the module has at construction.

    Cost: ``t(x)`` is one parallel pass, in which log|det dy/dx| is the product of positive blocks and slopes along the
    network. ``t.inv(y)`` goes site by site. Finished sites contribute to the units of a site by one small product per
    layer, and :mod:`pyro_genexact.numerics` solves the remaining increasing function of one number. Both directions are
    twice differentiable in the argument, the context and all parameters.

    Args:
        module: the network.
        context: the context (*batch, C), or None if the module has no context.
        cache_size: 1 to cache the last call, 0 for no cache.

    x and y have shape (*batch, T); values broadcast with the batch shape of the context.

    Raises:
        ValueError: if the context or a value has another size, dtype or device than the module's.
        ConvergenceError: if the inverse is not found to rounding precision.

    Example:
        >>> import torch
        >>> t = ConditionedBlockAutoregressive(BlockAutoregressive(3))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        True
    """

    domain = codomain = REAL_VECTOR

    module = Held()

    def __init__(self, module: BlockAutoregressive, context: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(module, context, cache_size)
        self.module = module

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns, context, shape = self._flatten(x)
        y, ladj = parallel(self.module, columns, context)
        return y.mT.contiguous().view(shape), ladj.view(shape[:-1])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        columns, context, shape = self._flatten(y)
        functorch = transformed()  # torch.func differentiates plain operations, not autograd Functions
        if torch.is_grad_enabled() and not functorch and any(t.requires_grad for t in (y, *self.watched())):
            x, ladj = Solve.apply(self.with_cache(0), columns, context, *self._tensors)
        elif functorch:
            x, ladj = site_by_site(self.module, columns, context)
        else:
            with torch.inference_mode():  # faster than no_grad
                found = site_by_site(self.module, columns, context)
            x, ladj = (value.clone() for value in found)
        return x.mT.contiguous().view(shape), -ladj.view(shape[:-1])

    def _flatten(self, value: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Returns the columns (T, B) of the value, the rows (B, C) of the context, and the broadcast shape."""
        sites = self.module.num_sites
        check_last(value, sites, "the sites of the transform")
        value = self._broadcast(value)
        columns, shape = value.reshape(-1, sites).mT, value.shape
        if self.context is None:
            return columns, None, shape
        width = self.context.shape[-1]
        return columns, self.context.expand(*shape[:-1], width).reshape(-1, width), shape


class BlockAutoregressive(BijectionModule):
    """Block neural autoregressive flow: a network that is itself a bijection; its call returns the transform x -> y.

    Each layer has a block of units per site. Weights from a site to itself are positive and those from earlier sites
    are free, so y_t increases in x_t and depends on x_1 ... x_t. ``residual`` chooses the form of the output:

    * ``"gated"``: y = a x + (1 - a) net(x) with a parameter 0 < a < 1, and tanh units;
    * ``"normal"``: y = x + net(x), and tanh units;
    * ``None``: y = net(x), and units 0.1 x + 0.9 tanh(x).

    All forms map the real line onto itself at each site. A network with only tanh or sigmoid units would have bounded
    outputs, so that most data would have density 0; therefore it is not offered.

    The context shifts the units of the first layer, so that y_1 is also a non-linear function of the context. The
    module starts near the identity. Logarithms of positive weights and scales, and the logit of a, are softly bounded
    by ±5.

    Cost: the parallel direction is one pass of a dense network of widths T n; the inverse takes one such pass and T
    scalar solves.

    Args:
        num_sites: T, the number of sites.
        hidden: n, the units per site of each hidden layer; at least one layer.
        context: C, the number of context features; 0 for none.
        residual: the form of the output, see above.

    Raises:
        ValueError: if a size is too small, ``hidden`` is empty, or ``residual`` is unknown.

    Reference: De Cao, Titov, Aziz, "Block Neural Autoregressive Flow", UAI 2019.

    Example:
        >>> import torch
        >>> module = BlockAutoregressive(3, hidden=(4,), context=2)
        >>> module(torch.zeros(4, 2)).forward_shape((3,))
        torch.Size([4, 3])
    """

    gate: Tensor | None

    def __init__(
        self,
        num_sites: int,
        *,
        hidden: Sequence[int] = (8, 8),
        context: int = 0,
        residual: Literal["gated", "normal"] | None = "gated",
    ) -> None:
        super().__init__()
        check_sizes(1, num_sites=num_sites)
        check_widths(1, hidden=hidden)
        check_sizes(0, context=context)
        if not hidden:
            raise ValueError(f"Expected hidden to hold at least one layer; got {hidden}.")
        if residual not in FORMS:
            raise ValueError(f'Expected residual to be "gated", "normal" or None; got {residual!r}.')
        self.num_sites, self.hidden, self.context, self.residual = num_sites, tuple(hidden), context, residual
        # the whole starts with slope 1, or a small one if x is added; without x, units start in their linear range
        first, whole, noise = {"gated": (1.0, 1.0, 0.5), "normal": (1.0, 0.1, 0.5), None: (_NARROW, 1.0, 0.02)}[
            residual
        ]
        scales = [first, *(width**-0.5 for width in hidden)]
        scales[-1] *= whole / first
        self.layers = nn.ModuleList(
            BlockLinear(num_sites, below, above, 0 if i else context, Start(scale, noise, 0.0 if i else first))
            for i, ((below, above), scale) in enumerate(zip(pairwise([1, *hidden, 1]), scales, strict=True))
        )
        self.gate = nn.Parameter(torch.tensor(4.0)) if residual == "gated" else None

    def gates(self) -> list[Tensor]:
        """Returns a list with the gate a, or an empty list if there is none."""
        return [] if self.gate is None else [torch.sigmoid(bounded(self.gate))]

    def forward(self, context: Tensor | None = None) -> ConditionedBlockAutoregressive:
        """Returns the transform given the context (*batch, C)."""
        return ConditionedBlockAutoregressive(self, context)
