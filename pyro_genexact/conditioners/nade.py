"""NADE: one hidden layer whose sum over sites grows site by site (Larochelle & Murray 2011)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..base import Conditioner, Site, bind, check_context, check_like
from .encoding import (
    check_callable,
    check_chunk,
    check_counts,
    check_sites,
    labels_of,
    readable,
    site_kinds,
    site_widths,
    visits,
    with_tensors,
)


class NADEState(NamedTuple):
    """What a :class:`NADE` has summed up.

    Attributes:
        position: sites read so far.
        clock: sites read by any successor of this state.
        total: (B, H) of the hidden layer before its activation.
        context: (B, C) or None.
    """

    position: int
    clock: list[int]
    total: Tensor
    context: Tensor | None


class NADE(Conditioner):
    r"""The neural autoregressive distribution estimator: a hidden layer shared by all sites, an output layer each.

        h_t = act(c + U x + W_{<t} y_{<t}),      phi_t = V_t h_t + B_t x + b_t

    Cost: ``forward`` takes O(B T H P) operations and the memory of its hidden layer at every site, B * T * H numbers
    (W_{<t} y_{<t} is a cumulative sum); ``extend`` by S sites O(B S H P), since a state keeps the sum so far.

    Args:
        num_sites: T.
        num_params: P, parameters a site.
        site: what one site looks like: ``()`` a real number, ``(k,)`` a real vector, an integer V one of the categories
            0 ... V-1, each with its own row of W, or a list of ``()`` and integers, one a site.
        context: C, features of the context vector x.
        hidden: H.
        activation: of the hidden layer.

    Raises:
        ValueError: for sizes that are no positive integers; in calls for categories that there are not, another number
            of sites, and a context of another width.

    References: Larochelle, Murray, "The Neural Autoregressive Distribution Estimator", AISTATS 2011; Uria, Côté, Gregor,
    Murray, Larochelle, "Neural Autoregressive Distribution Estimation", JMLR 2016.

    Example:
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
    _counts: Tensor  # categories of each site, 0 where it is real

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
        check_counts(1, num_sites=num_sites, num_params=num_params, hidden=hidden)
        check_counts(0, context=context)
        check_callable(activation)
        self.num_sites, self.num_params, self.site, self.context = num_sites, num_params, site, context
        self.hidden, self.activation = hidden, activation
        self._kinds, widths = site_kinds(site, num_sites), site_widths(site, num_sites)
        self._mixed = isinstance(site, list)
        self._ends = [0, *accumulate(widths)]  # the rows of W that belong to site t are _ends[t] ... _ends[t + 1] - 1
        counts = [kind if isinstance(kind, int) else 0 for kind in self._kinds]
        for name, values in (("_firsts", self._ends[:-1]), ("_counts", counts)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)
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
        """(B, T, *site_shape) and (B, C) to (B, T, P), by a cumulative sum; the last site is never read."""
        check_sites(self, y)
        total = self._before(context, len(y)).unsqueeze(1)
        if self.num_sites > 1:
            total = torch.cat([total, total + self._read(y[:, :-1], 0).cumsum(1)], 1)
        return self._phi(total, context, 0)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, NADEState]:
        """The first site's parameters (B, P), and the state before any site."""
        total = self._before(context, batch_size)
        phi = self._phi(total.unsqueeze(1), context, 0).squeeze(1)
        return phi, NADEState(0, self.clock(), total, context)

    def extend(self, y: Tensor, state: NADEState) -> tuple[Tensor, NADEState]:
        """Reads y (B, S, *site_shape): the parameters (B, S, P) of the sites after them; at most T - 1 sites in all."""
        check_chunk(self, y, state.position)
        added = self._read(y, state.position)
        total = state.total.unsqueeze(1) + (added if y.shape[1] == 1 else added.cumsum(1))
        phi = self._phi(total, state.context, state.position + 1)
        return phi, self.advance(state, y.shape[1])._replace(total=total[:, -1])

    def permuted(self, order: Tensor) -> NADE:
        """The same weights, tied per variable, for variables visited in another order: site i is variable ``order[i]``.

        A bound copy in which a variable's rows of W, V, B and b stand where the order puts it; gradients reach the
        parameters here. Cost: a copy of the weights.

        Args:
            order: (T,) a permutation of 0 ... T-1.

        Raises:
            ValueError: for other orders, and for sites of several kinds.

        Reference: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", ICML 2014.

        Example:
            >>> NADE(3, 2).permuted(torch.tensor([2, 0, 1]))(torch.zeros(5, 3)).shape
            torch.Size([5, 3, 2])
        """
        net, _ = bind(self)
        sites, rows = visits(self, order, net.weight, 1, len(net.weight) // self.num_sites)
        parts = {name: getattr(net, name)[sites] for name in ("readout", "bias", *["readout_context"][: self.context])}
        return with_tensors(net, weight=net.weight[rows], **parts)

    def _before(self, context: Tensor | None, batch_size: int) -> Tensor:
        """(B, H) of the hidden layer before any site."""
        check_context(self, context)
        if context is None:
            return self.hidden_bias.expand(batch_size, -1)
        return linear(context, self.hidden_context, self.hidden_bias)

    def _read(self, y: Tensor, first: int) -> Tensor:
        """(B, S, H): what each of S sites from ``first`` on adds to the hidden layer."""
        S = y.shape[1]
        if self._mixed and S > 1:
            return self._read_mixed(y, slice(first, first + S))
        kind = self._kinds[first]
        if isinstance(kind, int):  # a product with one-hot vectors would take V times as much
            return embedding(labels_of(y, kind) + self._firsts[first : first + S], self.weight)
        if self._mixed:
            y = y.to(self.weight.dtype)
        check_like("y", y, self.weight)
        rows = self.weight[self._ends[first] : self._ends[first + S]]
        if kind in ((), (1,)):
            return (y if kind else y.unsqueeze(-1)) * rows
        return (y.transpose(0, 1) @ rows.unflatten(0, (S, -1))).transpose(0, 1)

    def _read_mixed(self, y: Tensor, sites: slice) -> Tensor:
        real = self._counts[sites] == 0
        categories = torch.where(real, 0, y)
        labels = categories.long()
        if readable(y) and ((labels != categories) | (labels < 0) | (labels >= self._counts[sites].clamp(min=1))).any():
            for i, kind in enumerate(self._kinds[sites]):  # one of them raises
                if isinstance(kind, int):
                    labels_of(y[:, i], kind)
        scale = torch.where(real, y.to(self.weight.dtype), 1.0)
        return embedding(labels + self._firsts[sites], self.weight) * scale.unsqueeze(-1)

    def _phi(self, total: Tensor, context: Tensor | None, first: int) -> Tensor:
        """(B, S, H) of the hidden layer before its activation to the parameters (B, S, P) of sites ``first`` on."""
        sites = slice(first, first + total.shape[1])
        offset = self.bias[sites].unsqueeze(1)
        if context is not None:
            offset = offset + context @ self.readout_context[sites]
        return torch.baddbmm(offset, self.activation(total).transpose(0, 1), self.readout[sites]).transpose(0, 1)
