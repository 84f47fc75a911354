"""NADE: one hidden layer, whose pre-activation is summed site by site (Larochelle & Murray 2011)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..base import Conditioner, Site
from ..contexts import check_context
from ..core.binding import Bound
from ..core.buffers import register_derived
from ..core.checks import check_like, check_sizes
from ..core.functional import checkable
from .checks import check_callable, check_chunk, check_sites
from .encoding import labels_of, resumed, site_kinds, site_widths, visits, with_tensors

_TILE = 1 << 18  # number of elements in the hidden layer of a panel: 1 MB in float32


class NADEState(NamedTuple):
    """State of a :class:`NADE`.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        total: (B, H), the pre-activation of the hidden layer.
        context: (B, C) or None.
    """

    position: int
    version: list[int]
    total: Tensor
    context: Tensor | None


class NADE(Conditioner):
    """Neural autoregressive distribution estimator: a hidden layer shared by all sites, and an output layer per site.

        h_t = act(c + U x + W_{<t} y_{<t}),      phi_t = V_t h_t + B_t x + b_t

    Cost: ``forward`` takes O(B T H P) operations, in panels of 4 to 64 sites that carry the sum W_{<t} y_{<t} forward.
    Its memory is the hidden layer of one panel; with grad, autograd keeps the hidden layer of each site, B * T * H
    numbers. ``extend`` takes O(B S H P) operations for S sites, because the state keeps the sum.

    Args:
        num_sites: T, the number of sites.
        num_params: P, the number of parameters per site.
        site: kind of a site: ``()`` for a real number, ``(k,)`` for a real vector, an integer V for categories 0 ...
            V-1, each with its own row of W, or a list of ``()`` and integers, one per site.
        context: C, the number of features of the context x; 0 for none.
        hidden: H, the width of the hidden layer.
        activation: elementwise activation of the hidden layer.

    Raises:
        ValueError: if a size is not a positive integer. In calls, for categories out of range, another number of sites,
            a number of rows other than the state's, and a context of another width.

    References: Larochelle, Murray, "The Neural Autoregressive Distribution Estimator", AISTATS 2011; Uria, Côté,
    Gregor, Murray, Larochelle, "Neural Autoregressive Distribution Estimation", JMLR 2016.

    Example:
        >>> import torch
        >>> net = NADE(5, 1, site=2, context=3)
        >>> net(torch.zeros(7, 5), torch.zeros(7, 3)).shape
        torch.Size([7, 5, 1])
    """

    num_sites: int
    context: int
    weight: Tensor
    hidden_context: Any  # a Parameter or None
    readout_context: Any
    _firsts: Tensor  # _ends as a tensor
    _counts: Tensor  # number of categories of each site, 0 for a real site

    def __init__(
        self,
        num_sites: int,
        num_params: int,
        *,
        site: Site | Sequence[Site] = (),
        context: int = 0,
        hidden: int = 128,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        check_sizes(1, num_sites=num_sites, num_params=num_params, hidden=hidden)
        check_sizes(0, context=context)
        check_callable(activation)
        self.num_sites, self.num_params, self.site, self.context = num_sites, num_params, site, context
        self.hidden, self.activation = hidden, activation
        self._kinds, widths = site_kinds(site, num_sites), site_widths(site, num_sites)
        self._mixed = isinstance(site, list)
        self._ends = [0, *accumulate(widths)]  # site t has the rows _ends[t] ... _ends[t + 1] - 1 of W
        counts = [kind if isinstance(kind, int) else 0 for kind in self._kinds]
        for name, values in (("_firsts", self._ends[:-1]), ("_counts", counts)):
            register_derived(self, name, torch.tensor(values, dtype=torch.long, device="cpu"))
        reads = sum(1 if count else width for count, width in zip(counts, widths, strict=True))

        def uniform(*shape: int, fan: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape) - 1) * fan**-0.5)

        self.weight = uniform(sum(widths), hidden, fan=reads + context)
        self.hidden_bias = uniform(hidden, fan=reads + context)
        self.hidden_context = uniform(hidden, context, fan=reads + context) if context else None
        self.readout = uniform(num_sites, hidden, num_params, fan=100 * (hidden + context))  # heads start near phi = 0
        self.bias = nn.Parameter(torch.zeros(num_sites, num_params))
        shape = num_sites, context, num_params
        self.readout_context = uniform(*shape, fan=100 * (hidden + context)) if context else None

    def extra_repr(self) -> str:
        return f"{self.num_sites}, {self.num_params}, site={self.site}, context={self.context}, hidden={self.hidden}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context (B, C) to phi (B, T, P); the last site of y is never read."""
        check_sites(self, y)
        total = self._before(context, y.shape[0])
        phis = [self._phi(total.unsqueeze(0), context, 0)]
        if self.num_sites > 1:
            phis += self._sweep(y[:, :-1], 0, total, context)[0]
        return torch.cat(phis, 1)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, NADEState]:
        """Returns the parameters (B, P) of the first site and the state before any site."""
        total = self._before(context, batch_size)
        phi = self._phi(total.unsqueeze(0), context, 0).squeeze(1)
        return phi, NADEState(0, self.new_version(), total, context)

    def extend(self, y: Tensor, state: NADEState) -> tuple[Tensor, NADEState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow, T - 1 sites in all."""
        check_chunk(self, y, state.position, len(state.total))
        state = resumed(state)
        phis, total = self._sweep(y, state.position, state.total, state.context)
        phi = phis[0] if len(phis) == 1 else torch.cat(phis, 1)  # avoids an operation for single sites
        return phi, self.advance(state, y.shape[1])._replace(total=total)

    def permuted(self, order: Tensor) -> NADE:
        """Returns a bound copy for variables visited in another order: site i is variable ``order[i]``.

        The rows of W, V, B and b that belong to a variable move to the site where the order puts it. Gradients reach
        this module's parameters. Cost: a copy of the weights.

        Args:
            order: (T,) a permutation of 0 ... T-1.

        Raises:
            ValueError: if ``order`` is not a permutation, or the sites are of several kinds.

        Reference: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", ICML 2014.

        Example:
            >>> import torch
            >>> NADE(3, 2).permuted(torch.tensor([2, 0, 1]))(torch.zeros(5, 3)).shape
            torch.Size([5, 3, 2])
        """
        net = Bound(self).copy()
        sites, rows = visits(self, order, net.weight, 1, len(net.weight) // self.num_sites)
        parts = {name: getattr(net, name)[sites] for name in ("readout", "bias", *["readout_context"][: self.context])}
        return with_tensors(net, weight=net.weight[rows], **parts)

    def _before(self, context: Tensor | None, batch_size: int) -> Tensor:
        """Returns the pre-activation (B, H) of the hidden layer before any site."""
        check_context(self, context)
        if context is None:
            return self.hidden_bias.expand(batch_size, -1)
        return linear(context, self.hidden_context, self.hidden_bias)

    def _sweep(self, y: Tensor, first: int, total: Tensor, context: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Reads S sites from ``first`` on; returns the parameters of the following sites in panels, and the sum (B, H)."""
        inputs, size, phis = self._inputs(y, first), self._panel(total), []
        for start in range(0, y.shape[1], size):
            labels, values = (
                part if part is None or len(part) <= size else part[start : start + size] for part in inputs
            )
            totals, total = self._add(total, labels, values, first)
            phis.append(self._phi(totals, context, first + 1))
            first += len(totals)
        return phis, total

    def _panel(self, total: Tensor) -> int:
        """Returns the number of sites per panel: few if B * H is large, so that panels fit in cache; more otherwise."""
        if total.is_cuda:
            return 64
        return min(max(_TILE // max(total.numel(), 1), 4), 32)

    def _inputs(self, y: Tensor, first: int) -> tuple[Tensor | None, Any]:
        """Returns, sites first, the row of W of each site (S, B) and its factor (S, B, 1).

        Without categories, returns None and the values (S, B, k).
        """
        S, kind = y.shape[1], self._kinds[first]
        if self._mixed and S > 1:
            return self._mixed_inputs(y, slice(first, first + S))
        if isinstance(kind, int):  # V times cheaper than a product with one-hot vectors
            return (labels_of(y, kind) + self._firsts[first : first + S]).t(), None
        if self._mixed:
            y = y.to(self.weight.dtype)
        check_like("y", y, self.weight)
        return None, (y if kind else y.unsqueeze(-1)).transpose(0, 1)

    def _mixed_inputs(self, y: Tensor, sites: slice) -> tuple[Tensor, Tensor]:
        real = self._counts[sites] == 0
        categories = torch.where(real, 0, y)
        labels = categories.long()
        if (
            checkable(y)
            and ((labels != categories) | (labels < 0) | (labels >= self._counts[sites].clamp(min=1))).any()
        ):
            for i, kind in enumerate(self._kinds[sites]):  # raises for one of the sites
                if isinstance(kind, int):
                    labels_of(y[:, i], kind)
        values = torch.where(real, y.to(self.weight.dtype), 1.0)
        return (labels + self._firsts[sites]).t(), values.t().unsqueeze(-1)

    def _add(self, total: Tensor, labels: Tensor | None, values: Any, first: int) -> tuple[Tensor, Tensor]:
        """Returns the pre-activations after each of S sites (S, B, H), and after the last of them (B, H)."""
        if labels is not None:
            added = embedding(labels, self.weight)
            added = added if values is None else added * values
        else:
            S, k = len(values), values.shape[2]
            rows = self.weight[self._ends[first] : self._ends[first + S]]
            if k == 1:
                return self._add_numbers(total, values.squeeze(2).t(), rows)
            added = values @ rows.unflatten(0, (S, k))
        totals = total + (added if len(added) == 1 else added.cumsum(0))
        return totals, totals[-1]

    @staticmethod
    def _add_numbers(total: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_add`, by a product of the S prefixes of y (B, S) with S rows of W, which is faster than a cumsum."""
        last, S = torch.addmm(total, y, rows), y.shape[1]
        if S == 1:
            return last.unsqueeze(0), last
        return total + y.unsqueeze(1).expand(-1, S, -1).tril().transpose(0, 1) @ rows, last

    def _phi(self, total: Tensor, context: Tensor | None, first: int) -> Tensor:
        """Maps pre-activations (S, B, H) to the parameters (B, S, P) of the sites from ``first`` on."""
        sites = slice(first, first + len(total))
        offset = self.bias[sites].unsqueeze(1)
        if context is not None:
            offset = offset + context @ self.readout_context[sites]
        # transposed, because a product with few columns and V on the right takes several times as long on CPUs
        readout = self.readout[sites].mT.contiguous()
        return torch.baddbmm(offset.mT, readout, self.activation(total).mT).permute(2, 0, 1)
