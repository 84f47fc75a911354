"""Independent: a conditioner that ignores the history (mean field)."""

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
    """State of an :class:`Independent` conditioner.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        phi: the parameters (B, T, P) of all sites.
    """

    position: int
    version: list[int]
    phi: Tensor


class Independent(Conditioner):
    """Conditioner that ignores the history (mean field): phi_t is a function of the context, or a free parameter.

    With ``context=C`` one network predicts all T * P parameters from the context. With ``context=Covariates(C)`` one
    network, shared by all sites, predicts the P parameters of each site from its covariates. Without context, the
    parameters of the distribution are the parameters of the module.

    Cost: ``forward`` and ``start`` are one pass of the network; ``extend`` reads from its result.

    Args:
        num_sites: T, the number of sites.
        num_params: P, the number of parameters per site.
        site: kind of a site: ``()``, ``(k,)``, an integer, or a list of ``()`` and integers, one per site.
        context: C, the number of context features, or ``Covariates(C)``.
        hidden: widths of the hidden layers.
        activation: elementwise activation of the hidden layers.

    Raises:
        ValueError: if a size is not a positive integer. In calls, for another number of sites or covariates, and a
            number of rows other than the state's.

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
        # random values, because equal parameters would keep the components of a mixture equal
        self.phi = None if width else nn.Parameter(0.1 * torch.randn(num_sites, num_params))
        outputs = num_params if each else num_sites * num_params
        self.net = Dense(width, outputs, hidden, activation) if width else None

    def extra_repr(self) -> str:
        return f"{self.num_sites}, {self.num_params}, site={self.site}, context={self.context}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns phi (B, T, P) given the context (B, C) or (B, T, C); only the shape of y (B, T, *site_shape) matters."""
        check_sites(self, y)
        return self._all(context, y.shape[0])

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, IndependentState]:
        """Returns the parameters (B, P) of the first site, and a state with those of all sites."""
        phi = self._all(context, batch_size)
        return phi[:, 0], IndependentState(0, self.new_version(), phi)

    def extend(self, y: Tensor, state: IndependentState) -> tuple[Tensor, IndependentState]:
        """Accepts y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, len(state.phi))
        state = self.advance(resumed(state), y.shape[1])
        return state.phi[:, state.position - y.shape[1] + 1 : state.position + 1], state

    def permuted(self, order: Tensor) -> Independent:
        """Returns a bound copy for variables visited in another order: site i is variable ``order[i]``.

        The parameters of each variable move to the site where the order puts it. Gradients reach this module's
        parameters. With ``Covariates`` nothing moves, because all sites share one network; permute the covariates
        yourself.

        Args:
            order: (T,) a permutation of 0 ... T-1.

        Raises:
            ValueError: if ``order`` is not a permutation, or the sites are of several kinds.

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
                f"Expected context.shape[1] == {self.num_sites} (covariates of all sites); got {tuple(context.shape)}."
            )
        phi = self.net(context)
        return phi if context.dim() == 3 else phi.unflatten(1, (self.num_sites, self.num_params))
