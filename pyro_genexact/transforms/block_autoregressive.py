"""Block autoregressive flow: the network itself is the bijection, increasing in each own site."""

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

_NARROW = 0.03  # slope of the first layer where the start must be near the identity by itself


class ConditionedBlockAutoregressive(ConditionedTransform):
    r"""The bijection x -> y of T sites that a :class:`BlockAutoregressive` network is, given a context.

    ``t(x)`` is one parallel pass, with log|dy/dx| as the product of positive blocks and slopes along the network.
    ``t.inv(y)`` goes site by site: what finished sites contribute to the units of a site is one small product a layer, and
    what remains is an increasing function of one number, solved by :mod:`pyro_genexact.numerics`. Both directions are
    differentiable twice in the argument, the context and all parameters.

    Args:
        module: the network; the weights it has now are used from here on.
        context: (*batch, C), or None where the module takes none.

    Shapes: x and y (*batch, T), broadcast with the context's batch.

    Raises:
        ValueError: for a context or a value of another size, dtype or device than the module's.
        ConvergenceError: if the inverse of a value is not found to rounding.

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
        functorch = transformed()  # which differentiates by transforming plain operations
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
        """The columns (T, B) of the value, the rows (B, C) of the context, and the shape of the broadcast value."""
        sites = self.module.num_sites
        check_last(value, sites, "the sites of the transform")
        value = self._broadcast(value)
        columns, shape = value.reshape(-1, sites).mT, value.shape
        if self.context is None:
            return columns, None, shape
        width = self.context.shape[-1]
        return columns, self.context.expand(*shape[:-1], width).reshape(-1, width), shape


class BlockAutoregressive(BijectionModule):
    r"""A block neural autoregressive flow: the network is the bijection. Its call returns the transform x -> y.

    Unit blocks of T sites a layer; weights from a site to itself are positive, those from earlier sites are free, so y_t
    increases in x_t and depends on x_1 ... x_t. Then, with ``residual``

    * ``"gated"``: y = a x + (1 - a) net(x), 0 < a < 1 a parameter, units tanh;
    * ``"normal"``: y = x + net(x), units tanh;
    * ``None``: y = net(x), units 0.1 x + 0.9 tanh(x).

    Each maps the real line of a site onto all of it. A net of tanh or sigmoid units alone would not: its outputs are bounded,
    most y would have no x, and most data no density. It is not offered.

    The context shifts the units of the first layer, so that already y_1 is a non-linear function of it. The module starts
    near the identity. Logarithms of positive weights and scales stay within ±5 smoothly, and so does the logit of a.

    Cost: parallel as a dense network of widths T n; inverse as one such pass and T scalar solves.

    Args:
        num_sites: T.
        hidden: n, units a site of each hidden layer, at least one layer.
        context: C, features of the context; 0 for none.
        residual: the form, see above.

    Raises:
        ValueError: if a size is too small, or there is no such form.

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
        # the slope of the whole is 1, or small where it is added to x; without x, units are in their linear part
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
        """a, if there is one."""
        return [] if self.gate is None else [torch.sigmoid(bounded(self.gate))]

    def forward(self, context: Tensor | None = None) -> ConditionedBlockAutoregressive:
        """The transform given the context (*batch, C)."""
        return ConditionedBlockAutoregressive(self, context)
