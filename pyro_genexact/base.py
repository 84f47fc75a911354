"""The base classes Conditioner, Head and DistributionModule, and Constant, which wraps a fixed value as a module.

Symbols in every docstring: B flattened batch rows, T sites, S sites of a chunk, P parameters per site
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
from .core.functional import compiling
from .core.leaves import map_leaves
from .core.rows import take_rows

Site = int | tuple[int, ...]
"""The kind of values at one site: ``()`` for real numbers, ``(k,)`` for real vectors, an integer V for V categories."""


class Conditioner(WithDerived):
    """Encodes the context and the history of each site into the P parameters of that site.

    A subclass defines :meth:`start` and :meth:`extend`; :meth:`forward` and :meth:`reorder` have defaults that use
    them. ``forward`` must equal ``start`` followed by ``extend`` for every way of cutting y into chunks, and the
    parameters of a site must depend on earlier sites only. A state is a NamedTuple with the fields ``position`` (the
    number of sites read so far) and ``version`` (from :meth:`new_version`). The other fields are batch-first tensors,
    unless the class overrides :meth:`reorder`. A subclass may also define the reverse sweep :meth:`adjoint`; it then
    overrides ``has_adjoint``.

    Under ``torch.autocast`` only the conditioner may compute in lower precision. Heads receive its parameters in the
    dtype of the values, and results for different chunks agree up to that lower precision.

    Attributes:
        num_params: P, the number of parameters predicted for each site.
        site: the kind of values at one site, see :data:`~pyro_genexact.base.Site`.
        context: an integer C for a context vector of C features, :class:`Covariates` for one vector per site,
            :class:`Source` for a sequence of its own length, or 0 for no context.
        num_sites: T, or None if the conditioner takes sequences of any length.
        max_len: the largest number of sites that it reads, or None for no limit.

    Example:
        >>> import torch
        >>> from pyro_genexact.conditioners import MADE
        >>> conditioner, y = MADE(3, num_params=2), torch.randn(4, 3)
        >>> first, state = conditioner.start(None, batch_size=4)
        >>> others, state = conditioner.extend(y[:, :2], state)
        >>> torch.allclose(conditioner(y)[:, 1:], others, atol=1e-5)
        True
    """

    num_params: int
    site: Site | Sequence[Site] = ()
    context: int | Covariates | Source = 0
    num_sites: int | None = None
    max_len: int | None = None

    @property
    def has_adjoint(self) -> bool:
        """Whether gradients through a sequential evaluation are computed by ``adjoint`` in the current mode."""
        return False

    def adjoint(
        self, state: Any, g: Tensor, gain: Tensor, drive: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Computes gradients of a sequential evaluation, see :meth:`pyro_genexact.conditioners.MADE.adjoint`."""
        raise TypeError(f"{type(self).__name__} must define adjoint(state, g, gain, drive, context)")

    def native_loop(self, head: Head, given: Tensor, context: Any, keep: bool = False) -> Any:
        """Computes all sites by the operator of :mod:`pyro_genexact.native`, or returns None if it does not apply.

        Only :class:`~pyro_genexact.conditioners.MADE` has it; see there.
        """
        return None

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, Any]:
        """Returns the parameters (B, P) of the first site, given the context (B, C), and the state before any site."""
        raise TypeError(f"{type(self).__name__} must define start(context, batch_size)")

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads S more sites y (B, S, *site_shape); returns the parameters of the sites after each, and the new state.

        The parameters have shape (B, S, P). The given state is consumed, since its buffers may be written in place;
        using it again raises a RuntimeError.
        """
        raise TypeError(f"{type(self).__name__} must define extend(y, state)")

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters (B, T, P) of all sites of y (B, T, *site_shape), given context and earlier sites."""
        phi, state = self.start(context, y.shape[0])
        if y.shape[1] == 1:
            return phi.unsqueeze(1)
        return torch.cat([phi.unsqueeze(1), self.extend(y[:, :-1], state)[0]], 1)

    def reorder(self, state: Any, index: Tensor) -> Any:
        """Returns a copy of the batch rows ``index`` (B',) of a state. The given state is not consumed."""
        self.advance(state, 0)
        return type(state)(*(take_rows(field, index) for field in state))

    def order_of(self, dims: Sequence[int]) -> Tensor | None:
        """Returns the order (T,) in which the conditioner visits sites that are arranged in an array of these dims.

        Entry i is the index of the i-th site to visit, in raster order of the array. None stands for raster order.
        Networks of images raise a ValueError for the dims of another image.
        """
        return None

    def permuted(self, order: Tensor) -> Conditioner:
        """Returns the conditioner that visits variables in another order (T,), with the same weights per variable."""
        raise ValueError(f"Expected a conditioner whose weights belong to variables; got {type(self).__name__}.")

    @staticmethod
    def new_version() -> list[int]:
        """Returns a counter of the sites read. A state and its successors share it, which detects consumed states."""
        return [0]

    @staticmethod
    def advance(state: Any, sites: int) -> Any:
        """Consumes a state and returns it with ``sites`` added to its position.

        Raises:
            RuntimeError: if the state was consumed before.
        """
        if state.version[0] != state.position:
            raise RuntimeError(
                f"Expected a fresh state; got one at site {state.position} whose buffers were extended to site "
                f"{state.version[0]} (branch with conditioner.reorder before extend)."
            )
        state.version[0] += sites
        return state._replace(position=state.position + sites)


class Head(WithDerived):
    """Maps the P parameters of a site to a distribution of its value or to a strictly monotone bijection of it.

    A subclass defines ``num_params`` and :meth:`forward`.

    Attributes:
        num_params: P, the number of parameters per site.
        site_shape: the shape of one site's value.
        support: the support of a site's value, for heads of distributions; it does not depend on phi.
        domain: the constraint of each number of a site's value and of its image, for heads of bijections.
        num_sites: T if the head treats sites differently, else None.
        eos: the end-of-sequence token if the head treats it differently, else None.
        has_ends: whether the head defines :meth:`ends`.
        truncates: whether phi determines which values of the support have positive probability.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from torch.distributions import constraints
        >>> class Positive(Head):
        ...     num_params, support = 2, constraints.positive
        ...
        ...     def forward(self, phi, first=0):
        ...         return dist.LogNormal(phi[..., 0], phi[..., 1].exp())
        >>> Positive()(torch.zeros(5, 3, 2)).sample().shape
        torch.Size([5, 3])
    """

    num_params: int
    site_shape: tuple[int, ...] = ()
    support: constraints.Constraint = constraints.real
    domain: constraints.Constraint = constraints.real
    num_sites: int | None = None
    eos: int | None = None
    has_ends: bool = False
    truncates: bool = False

    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """Returns the distribution or transform of S sites from phi (*batch, S, P).

        ``first`` is the index of the first of these sites.
        """
        raise TypeError(f"{type(self).__name__} must define forward(phi, first)")

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of the head in :mod:`pyro_genexact.native`; None if it is not among its heads."""
        return None

    def ends(self, y: Tensor) -> Tensor:
        """Whether each of the sites y (*batch, *site_shape) ends its sequence, of shape (*batch)."""
        raise TypeError(f"{type(self).__name__} must define ends(y)")

    def permuted(self, order: Tensor) -> Head:
        """Returns the head for sites visited in another order: the same head unless it treats sites differently."""
        return self


@ConditionalDistribution.register
class DistributionModule(WithDerived):
    """A learnable distribution: calling it with a context (or without one) returns a Pyro distribution.

    The returned distribution belongs to one forward pass, with the parameters that the module has at the call.

    Attributes:
        context: an integer C for a context vector of C features, :class:`Covariates` for one vector per site,
            :class:`Source` for a sequence of its own length, or 0 for no context.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> class LinearNormal(DistributionModule):
        ...     context = 3
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = torch.nn.Linear(3, 1)
        ...
        ...     def forward(self, context):
        ...         return dist.Normal(self.loc(context).squeeze(-1), 1.0)
        >>> LinearNormal()(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    context: int | Covariates | Source = 0

    def forward(self, context: Tensor | None = None) -> Any:
        """Returns the distribution given the context (*batch, C)."""
        raise TypeError(f"{type(self).__name__} must define forward(context)")

    def condition(self, *context: Any, **options: Any) -> Any:
        """Calls the module. This is the method name that Pyro uses for conditional distributions."""
        return self(*context, **options)

    def for_validation(self) -> DistributionModule:
        """Returns the module that :func:`~pyro_genexact.fit` evaluates on validation rows, by default this module."""
        return self


class Constant(WithDerived):
    """A module whose call returns a fixed distribution or transform; its tensors are buffers of the module.

    The tensors follow the module's device and dtype and are part of its ``state_dict``. Plain numbers, such as the
    bound of ``greater_than(0.0)``, are not. Attributes that torch computes lazily, such as ``covariance_matrix``, are
    saved if they have been computed before, so pass a distribution that has not been used yet.

    Args:
        value: a distribution or transform, or a collection of these.
        persistent: if False, the tensors are not saved; they are rebuilt when a state is loaded.

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
        """The distribution or transform, with the current tensors of the module."""
        return self()

    def forward(self) -> Any:
        if not (self._buffers or compiling()):  # the compiler would see that torch's transforms keep their inverse
            return self._template
        return map_leaves(lambda slot: self._buffers[slot.name], self._template, Slot)


class Slot(NamedTuple):
    """Marks the place of a tensor in the template of a :class:`Constant`.

    Attributes:
        name: the name of the buffer.
    """

    name: str
