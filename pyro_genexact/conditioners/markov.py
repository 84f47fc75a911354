"""Markov: a network of the last few sites, shared by all sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..base import Conditioner, Site
from ..contexts import Covariates, check_context, kind_of
from ..core.checks import check_sizes, check_widths
from .checks import check_chunk, check_sites
from .encoding import Dense, SiteEncoder, joined


class MarkovState(NamedTuple):
    """State of a :class:`Markov` conditioner.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        window: (B, order, features + 1), the encoded last sites, each with a flag.
        context: (B, C), (B, T, C) or None.
    """

    position: int
    version: list[int]
    window: Tensor
    context: Tensor | None


class Markov(Conditioner):
    """Dense network of the last k = ``order`` sites, shared by all sites; it accepts any length.

        phi_t = net(y_{t-k}, ..., y_{t-1}, x)

    Before the first site, the window is filled with zeros. Each position of the window has a flag that is 1 if it holds
    a site, so that the network can distinguish zeros from missing history.

    Cost: ``forward`` evaluates the network on T windows in parallel, with inputs (B, T, k * features). Each step of
    ``extend`` evaluates it on one window.

    Args:
        site: kind of a site: ``()`` for a real number, ``(k,)`` for a real vector, or an integer V for categories
            0 ... V-1, which are embedded.
        num_params: P, the number of parameters per site.
        order: k, the number of previous sites that each site reads.
        context: C, the number of context features; or ``Covariates(C)`` for covariates, of which each site reads its
            own.
        hidden: widths of the hidden layers.
        activation: elementwise activation of the hidden layers.
        width: width of the embedding of categories; by default ``hidden[0]``, or V without hidden layers.

    Raises:
        ValueError: if a size is not a positive integer. In calls, for categories out of range, a context of another
            width, a number of rows other than the state's, and more sites than covariates.

    Reference (for categories): Bengio et al., "A neural probabilistic language model", JMLR 2003.

    Example:
        >>> import torch
        >>> net = Markov((), 2, order=3, context=4)
        >>> net(torch.zeros(7, 9), torch.zeros(7, 4)).shape
        torch.Size([7, 9, 2])
    """

    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        order: int,
        context: int | Covariates = 0,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[Tensor], Tensor] = torch.relu,
        width: int | None = None,
    ) -> None:
        super().__init__()
        check_widths(1, hidden=hidden)
        check_sizes(1, num_params=num_params, order=order)
        self.site, self.num_params, self.context, self.order = site, num_params, context, order
        widest = hidden[0] if hidden else site if isinstance(site, int) else 1
        self.encoder = SiteEncoder(site, widest if width is None else width)
        inputs = order * (self.encoder.features + 1) + kind_of(context, Covariates).features
        self.net = Dense(inputs, num_params, hidden, activation)

    def extra_repr(self) -> str:
        return f"{self.site}, {self.num_params}, order={self.order}, context={self.context}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context to phi (B, T, P), in parallel over the sites.

        The context has shape (B, C), or (B, T or more, C) for covariates.
        """
        check_sites(self, y)
        check_context(self, context)
        window = self._empty(y.shape[0])
        return self._phi(torch.cat([window, self._flagged(y[:, :-1], window)], 1), context, 0)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, MarkovState]:
        """Returns the parameters (B, P) of the first site, and a state with an empty window."""
        check_context(self, context)
        window = self._empty(batch_size)
        return self._phi(window, context, 0).squeeze(1), MarkovState(0, self.new_version(), window, context)

    def extend(self, y: Tensor, state: MarkovState) -> tuple[Tensor, MarkovState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, len(state.window))
        sites = torch.cat([state.window[:, 1:], self._flagged(y, state.window)], 1)
        phi = self._phi(sites, state.context, state.position + 1)
        return phi, self.advance(state, y.shape[1])._replace(window=sites[:, -self.order :])

    def _phi(self, sites: Tensor, context: Tensor | None, first: int) -> Tensor:
        """Returns the parameters of the sites from ``first`` on, given their windows in (B, order - 1 + S, features)."""
        windows = sites.unfold(1, self.order, 1).transpose(2, 3).flatten(2)  # the oldest site first
        return self.net(joined(windows, context, first))

    def _flagged(self, y: Tensor, like: Tensor) -> Tensor:
        return pad(self.encoder(y, like), (0, 1), value=1.0)

    def _empty(self, batch_size: int) -> Tensor:
        return self.net.last.weight.new_zeros(batch_size, self.order, self.encoder.features + 1)
