"""The base classes Conditioner, Head and DistributionModule, and Constant, a fixed value as a module.

Symbols in every docstring: B flattened batch rows, T sites, S sites of a chunk, P parameters a site
(``head.num_params``), C context features, D features of a vector event.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor
from torch.distributions import constraints

from .contexts import Covariates, Source
from .core.buffers import WithDerived, register_derived, register_given
from .core.leaves import map_leaves
from .core.rows import take_rows

Site = int | tuple[int, ...]
"""What one site looks like to a network: ``()`` a real number, ``(k,)`` a real vector, an integer V one of V categories."""


class Conditioner(WithDerived):
    """Encodes the context and the history of a site into the P parameters of that site.

    A conditioner defines :meth:`start` and :meth:`extend`; :meth:`forward` and :meth:`reorder` follow from them.
    ``forward`` must equal ``start`` followed by ``extend`` for every way of cutting y into chunks, and the parameters
    of a site must depend on earlier sites only. A state is a NamedTuple with the fields ``position`` (sites read so far)
    and ``version`` (from :meth:`new_version`), the rest batch-first tensors unless the class overrides :meth:`reorder`.
    A conditioner may also offer :meth:`adjoint`, the reverse sweep, and says so by ``has_adjoint``.

    Under ``torch.autocast`` a conditioner may round, all else does not: heads read its parameters in the dtype of the values, and
    the law of chunks holds up to that rounding.

    Attributes:
        num_params: P, the numbers predicted for each site.
        site: what one site looks like, see :data:`~pyro_genexact.base.Site`.
        context: C, the features of the context vector; :class:`Covariates` of one vector a site; :class:`Source` of a sequence of
            its own; 0 for none.
        num_sites: T, or None where the conditioner takes any length.
        max_len: the most sites it reads, or None for no limit.
    """

    num_params: int
    site: Site | Sequence[Site] = ()
    context: int | Covariates | Source = 0
    num_sites: int | None = None
    max_len: int | None = None

    @property
    def has_adjoint(self) -> bool:
        """Whether gradients through a sequential evaluation in the present mode come from ``adjoint``."""
        return False

    def adjoint(
        self, state: Any, g: Tensor, gain: Tensor, drive: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The reverse sweep through a sequential evaluation (see :meth:`pyro_genexact.conditioners.MADE.adjoint`)."""
        raise TypeError(f"{type(self).__name__} must define adjoint(state, g, gain, drive, context) to have one")

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, Any]:
        """The parameters (B, P) of the first site, from the context (B, C) alone, and the state before any site."""
        raise TypeError(f"{type(self).__name__} must define start(context, batch_size)")

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads S more sites y (B, S, *site_shape): the parameters (B, S, P) of the S sites after them, and the new state.

        The given state is consumed: its buffers may be written in place. Using it again raises a RuntimeError.
        """
        raise TypeError(f"{type(self).__name__} must define extend(y, state)")

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters (B, T, P) of all T sites of y (B, T, *site_shape), each from the context and earlier sites."""
        phi, state = self.start(context, y.shape[0])
        if y.shape[1] == 1:
            return phi.unsqueeze(1)
        return torch.cat([phi.unsqueeze(1), self.extend(y[:, :-1], state)[0]], 1)

    def reorder(self, state: Any, index: Tensor) -> Any:
        """A copy of the batch rows ``index`` (B',) of a state, to branch from it; the state itself stays usable."""
        self.advance(state, 0)
        return type(state)(*(take_rows(field, index) for field in state))

    def permuted(self, order: Tensor) -> Conditioner:
        """The conditioner of variables visited in another order (T,), with the same weights for each variable."""
        raise ValueError(f"Expected a conditioner whose weights belong to variables; got {type(self).__name__}.")

    @staticmethod
    def new_version() -> list[int]:
        """A new counter of the sites read, shared by a state and its successors: how a consumed state is found out."""
        return [0]

    @staticmethod
    def advance(state: Any, sites: int) -> Any:
        """Consumes a state: the same with its position moved on by ``sites``; RuntimeError if it was consumed before."""
        if state.version[0] != state.position:
            raise RuntimeError(
                f"Expected a fresh state; got one at site {state.position} whose buffers were extended to site "
                f"{state.version[0]} (branch with conditioner.reorder before extend)."
            )
        state.version[0] += sites
        return state._replace(position=state.position + sites)


class Head(WithDerived):
    """Says what the P numbers of a site parameterise: a distribution of it or a strictly monotone bijection of it.

    A new head defines ``num_params`` and :meth:`forward`.

    Attributes:
        num_params: P, the numbers a site needs.
        site_shape: the shape of one site's value.
        support: of a site's value, for heads of distributions; the same whatever phi is.
        domain: of a number of a site's value and of its image, for heads of bijections.
        num_sites: T, for heads that treat sites differently; None where all are alike.
        eos: the symbol of an end, for heads that treat it differently; None for others.
        has_ends: whether :meth:`ends` tells which sites end a sequence.
    """

    num_params: int
    site_shape: tuple[int, ...] = ()
    support: constraints.Constraint = constraints.real
    domain: constraints.Constraint = constraints.real
    num_sites: int | None = None
    eos: int | None = None
    has_ends: bool = False

    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """The distribution or transform of S sites from phi (*batch, S, P); ``first`` is the index of the first of them."""
        raise TypeError(f"{type(self).__name__} must define forward(phi, first)")

    def ends(self, y: Tensor) -> Tensor:
        """Whether sites y (*, *site_shape) end their sequence, (*)."""
        raise TypeError(f"{type(self).__name__} must define ends(y) to have them")

    def permuted(self, order: Tensor) -> Head:
        """The head for sites visited in another order: itself, unless it treats sites differently."""
        return self


@ConditionalDistribution.register
class DistributionModule(WithDerived):
    """A learnable distribution: calling it with a context (or none) returns a Pyro distribution of one forward pass.

    Attributes:
        context: C, the features that the call expects; :class:`Covariates` of one vector a site; :class:`Source` of a sequence of
            its own; 0 for a call without context.
    """

    context: int | Covariates | Source = 0

    def forward(self, context: Tensor | None = None) -> Any:
        """The distribution given the context (*batch, C)."""
        raise TypeError(f"{type(self).__name__} must define forward(context)")

    def condition(self, *context: Any, **options: Any) -> Any:
        """The same as calling the module, under Pyro's name."""
        return self(*context, **options)

    def for_validation(self) -> DistributionModule:
        """What :func:`~pyro_genexact.fit` scores validation rows with: the module itself, unless that would cost too much."""
        return self


class Constant(WithDerived):
    """A module whose call returns a fixed distribution or transform; its tensors are buffers of the module.

    So they follow the module's device and dtype, and belong to its ``state_dict``. Plain numbers, such as the bound of
    ``greater_than(0.0)``, are settings, which a state does not hold. Attributes that torch computes lazily (``covariance_matrix``)
    are saved if they were computed before: give a distribution that was not used yet.

    Args:
        value: a distribution or transform, or a collection with such.
        persistent: False for a value that follows from sizes: it is not saved, but rebuilt when a state is loaded.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> base = Constant(dist.Normal(torch.zeros(2), 1.0)).double()
        >>> base().loc.dtype, list(base.state_dict())
        (torch.float64, ['value_0', 'value_1'])
    """

    context = 0

    def __init__(self, value: Any, persistent: bool = True) -> None:
        super().__init__()

        slots: dict[int, Slot] = {}

        def keep(tensor: Tensor) -> Slot:
            if id(tensor) not in slots:
                slots[id(tensor)] = Slot(f"value_{len(slots)}")
                register = register_given if persistent else register_derived
                register(self, slots[id(tensor)].name, tensor)
            return slots[id(tensor)]

        self._template = map_leaves(keep, value)

    @property
    def value(self) -> Any:
        """The distribution or transform, with the tensors that the module has now."""
        return self()

    def forward(self) -> Any:
        return (
            map_leaves(lambda slot: self._buffers[slot.name], self._template, Slot) if self._buffers else self._template
        )


class Slot(NamedTuple):
    """Where a tensor of a template goes."""

    name: str
