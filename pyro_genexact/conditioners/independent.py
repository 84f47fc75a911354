"""Independent: parameters from the context alone (mean field); sites do not read each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base import Conditioner, Site
from ..contexts import Covariates, check_context, kind_of
from ..core.binding import Bound
from ..core.checks import check_sizes
from .checks import check_chunk, check_sites
from .encoding import Dense, resumed, site_kinds, visits, with_tensors


class IndependentState(NamedTuple):
    """How many sites an :class:`Independent` conditioner was shown, and the parameters of all.

    Attributes:
        position: sites read so far.
        version: sites read by any successor of this state.
        phi: (B, T, P).
    """

    position: int
    version: list[int]
    phi: Tensor


class Independent(Conditioner):
    r"""Ignores the history (mean field): phi_t is a function of the context, or a free parameter.

    A network of the context predicts all T * P numbers at once; with ``context=Covariates(C)`` one network, shared by all
    sites, predicts P numbers from each site's own covariates; without context they are the parameters themselves.

    Cost: one pass of the network an evaluation; ``extend`` only looks its numbers up.

    Args:
        num_sites: T.
        num_params: P, parameters a site.
        site: what one site looks like: ``()``, ``(k,)``, an integer, or a list of ``()`` and integers, one a site.
        context: C, features of the context vector, or ``Covariates(C)``.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.

    Raises:
        ValueError: for sizes that are no positive integers; in calls for another number of sites or covariates, and other
            rows than those of the state.

    Example:
        >>> import torch
        >>> Independent(5, 2, context=3)(torch.zeros(7, 5), torch.zeros(7, 3)).shape
        torch.Size([7, 5, 2])
    """

    num_sites: int
    phi: Any  # a Parameter or None
    net: Any

    def __init__(
        self,
        num_sites: int,
        num_params: int,
        *,
        site: Site | Sequence[Site] = (),
        context: int | Covariates = 0,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        check_sizes(1, num_sites=num_sites, num_params=num_params)
        site_kinds(site, num_sites)
        self.num_sites, self.num_params, self.site, self.context = num_sites, num_params, site, context
        kind = kind_of(context, Covariates)
        width, each = kind.features, kind.by_site
        # not zeros: the parts of a mixture would be, and stay, the same
        self.phi = None if width else nn.Parameter(0.1 * torch.randn(num_sites, num_params))
        outputs = num_params if each else num_sites * num_params
        self.net = Dense(width, outputs, hidden, activation) if width else None

    def extra_repr(self) -> str:
        return f"{self.num_sites}, {self.num_params}, site={self.site}, context={self.context}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, T, *site_shape), and (B, C) or (B, T, C), to (B, T, P), whatever y is."""
        check_sites(self, y)
        return self._all(context, len(y))

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, IndependentState]:
        """The first site's parameters (B, P), and a state with those of all."""
        phi = self._all(context, batch_size)
        return phi[:, 0], IndependentState(0, self.new_version(), phi)

    def extend(self, y: Tensor, state: IndependentState) -> tuple[Tensor, IndependentState]:
        """Is shown y (B, S, *site_shape): the parameters (B, S, P) of the sites after them; at most T - 1 sites in all."""
        check_chunk(self, y, state.position, len(state.phi))
        state = self.advance(resumed(state), y.shape[1])
        return state.phi[:, state.position - y.shape[1] + 1 : state.position + 1], state

    def permuted(self, order: Tensor) -> Independent:
        """The same numbers, tied per variable, for variables visited in another order: site i is variable ``order[i]``.

        A bound copy in which a variable's parameters stand where the order puts it; gradients reach the parameters here.
        With ``Covariates`` nothing moves: all sites share their network, and the covariates are the caller's to permute.

        Args:
            order: (T,) a permutation of 0 ... T-1.

        Raises:
            ValueError: for other orders, and for sites of several kinds.

        Example:
            >>> import torch
            >>> Independent(3, 2).permuted(torch.tensor([2, 0, 1]))(torch.zeros(5, 3)).shape
            torch.Size([5, 3, 2])
        """
        net = Bound(self).copy()
        sites, rows = visits(self, order, net.phi if net.net is None else net.net.last.weight, 1, self.num_params)
        if net.net is None:
            return with_tensors(net, phi=net.phi[sites])
        if not kind_of(self.context).by_site:
            last = net.net.last
            net.net._modules["last"] = with_tensors(last, weight=last.weight[rows], bias=last.bias[rows])
        return net

    def _all(self, context: Tensor | None, batch_size: int) -> Tensor:
        check_context(self, context)
        if context is None:
            return self.phi.expand(batch_size, -1, -1)
        if context.dim() == 3 and context.shape[1] != self.num_sites:
            raise ValueError(
                f"Expected context.shape[1] == {self.num_sites} (covariates of every site); got {tuple(context.shape)}."
            )
        phi = self.net(context)
        return phi if context.dim() == 3 else phi.unflatten(1, (self.num_sites, self.num_params))
