"""Coupling: a network reads some sites and predicts the bijections of all others in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..base import Conditioner, Head
from ..conditioners.encoding import Dense, new_conditioner
from ..conditioners.independent import Independent
from ..core.binding import Held
from ..core.buffers import register_derived
from ..core.checks import check_kind, check_sizes
from ..core.devices import zeros_for
from ..core.independent import independent
from ..core.precision import at_least
from .base import adapted
from .modules import BijectionModule, ConditionedTransform


class ConditionedCoupling(ConditionedTransform):
    """Bijection x -> y over T sites that copies some sites and transforms the others given them.

        y_p = x_p,      y_t = head(phi_t(x_p, context))(x_t)

    log|det dy/dx| is the sum of the head's log-derivatives. It keeps using the weights that the module has at
    construction.

    Cost: each direction is one call of the network, and one of the head or its inverse, for all sites together. Both
    are twice differentiable in the argument, the context and all parameters.

    Args:
        coupling: the module.
        context: the context (*batch, C), or None if the module has no context.
        cache_size: 1 to cache the last call, 0 for no cache.

    x and y have shape (*batch, T, *site_shape); values broadcast with the batch shape of the context.

    Raises:
        ValueError: if the context or a value has another size, dtype or device than the module's.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> t = ConditionedCoupling(Coupling(4, heads.Affine()))
        >>> x = torch.randn(5, 4)
        >>> y = t(x)
        >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(t.inv(y.clone()), x, atol=1e-5)
        (True, True)
    """

    coupling, _head = Held(), Held()
    domain = codomain = constraints.dependent(is_discrete=False)  # instances override it

    def __init__(self, coupling: Coupling, context: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(coupling, context, cache_size)
        head, order = coupling.head, coupling.order
        self.coupling, self._head = coupling, head if order is None else head.permuted(order)
        self.domain = self.codomain = independent(head.domain, 1 + len(head.site_shape))

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(y, inverse=True)

    def _run(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Applies the transform or its inverse; returns the image and the log-determinant."""
        of, head, dims = self.coupling, self._head, self.domain.event_dim
        expected = (of.num_sites, *head.site_shape)
        if tuple(value.shape[-dims:]) != expected:
            raise ValueError(
                f"Expected value.shape[-{dims}:] == {expected} (the sites of the coupling); got {tuple(value.shape)}."
            )
        value = self._broadcast(value)
        if of.order is not None:
            value = value.index_select(-dims, of.order)
        passing, rest = value.narrow(-dims, 0, of.passing), value.narrow(-dims, of.passing, of.num_sites - of.passing)
        phi = of.parameters_of(passing if dims == 1 else passing.flatten(-dims), self.context)
        transform = adapted(head(phi, of.passing))
        image, ladj = transform.inverse_and_ladj(rest) if inverse else transform.call_and_ladj(rest)
        image = torch.cat([passing, image], -dims)
        return image if of.restore is None else image.index_select(-dims, of.restore), ladj.sum(-1)


class Coupling(BijectionModule):
    """Coupling layer: its call returns the transform x -> y, which has the same cost in both directions.

    The layer copies the sites where ``mask`` is True. A network reads them and the context, and predicts
    ``head.num_params`` parameters for each other site. With :class:`~pyro_genexact.heads.Affine` this is RealNVP, with
    :class:`~pyro_genexact.heads.Shift` NICE, and with splines a coupling NSF.

    By default the layer copies the first T // 2 sites. With :class:`~pyro_genexact.transforms.Reverse` between layers,
    at least every other layer transforms each site, also if T is odd. If T is 1, the context determines the transform
    of the only site, or free parameters do if there is no context.

    Args:
        num_sites: T, the number of sites.
        head: makes a strictly monotone bijection for each transformed site.
        mask: Boolean (T,), True for the sites to copy. It is not saved in ``state_dict``.
        context: C, the number of context features; 0 for none.
        hidden: widths of the hidden layers.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns a :class:`~pyro_genexact.Conditioner` to use in place
            of the dense network. Its context is the copied values followed by the context, and its first site
            (``start``) predicts the parameters of all transformed sites.

    Raises:
        TypeError: if ``head`` is not a head of bijections, or ``conditioner`` does not return a conditioner.
        ValueError: if a size is not a positive integer, ``mask`` has another shape or is True everywhere, or the
            conditioner has other sizes.

    References: Dinh, Krueger, Bengio, "NICE", ICLR workshop 2015; Dinh, Sohl-Dickstein, Bengio, "Density estimation
    using Real NVP", ICLR 2017.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> mask = torch.tensor([True, False, True, False])
        >>> module = Coupling(4, heads.Affine(), mask=mask, context=2)
        >>> module(torch.zeros(5, 2)).forward_shape((4,))
        torch.Size([5, 4])
    """

    order: Tensor | None
    restore: Tensor | None

    def __init__(
        self,
        num_sites: int,
        head: Head,
        *,
        mask: Tensor | None = None,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[Tensor], Tensor] = torch.relu,
        conditioner: Callable[[int, int], Conditioner] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, num_sites=num_sites)
        check_sizes(0, context=context)
        mask = _checked(mask, num_sites)
        check_bijection(head, num_sites - int(mask.sum()), int(mask.sum()))
        order = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
        sorted_already = bool((order.diff() > 0).all())
        register_derived(self, "order", None if sorted_already else order)
        register_derived(self, "restore", None if sorted_already else order.argsort())
        self.num_sites, self.head, self.context, self.passing = num_sites, head, context, int(mask.sum())
        self.reads = self.passing * prod(head.site_shape)
        sizes = (num_sites - self.passing) * head.num_params, self.reads + context
        if conditioner is None and sizes[1]:
            self.network: nn.Module = Dense(sizes[1], sizes[0], hidden, activation)
        else:
            self.network = FirstSite(new_conditioner(conditioner or _constants, *sizes))

    def extra_repr(self) -> str:
        return f"{self.num_sites}, passing={self.passing}, context={self.context}"

    def parameters_of(self, passing: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns phi (*batch, S, P) of the S transformed sites given the copied values (*batch, d) and the context."""
        batch = passing.shape[:-1]
        inputs = passing if context is None else torch.cat([passing, context.expand(*batch, self.context)], -1)
        return at_least(self.network(inputs), inputs).reshape(
            *batch, self.num_sites - self.passing, self.head.num_params
        )

    def forward(self, context: Tensor | None = None) -> ConditionedCoupling:
        """Returns the transform given the context (*batch, C)."""
        return ConditionedCoupling(self, context)


class FirstSite(nn.Module):
    """Wraps a conditioner as a network from its context (*batch, C) to the parameters (*batch, P) of its first site."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, inputs: Tensor) -> Tensor:
        *batch, width = inputs.shape
        phi, _ = self.conditioner.start(inputs.reshape(-1, width) if width else None, prod(batch))
        return phi.reshape(*batch, self.conditioner.num_params)


def check_bijection(head: Any, sites: int = 1, first: int = 0) -> None:
    """Raises a TypeError if the head, called with parameters of ``sites`` sites, does not return a transform."""
    check_kind("head", head, Head)
    with torch.no_grad():
        made = head(zeros_for(head, 1, sites, head.num_params), first)
    if not isinstance(made, Transform):
        raise TypeError(
            f"Expected head to make bijections; got {type(head).__name__}, whose call returns {type(made).__name__}."
        )


def _constants(num_params: int, context: int) -> Conditioner:
    return Independent(1, num_params)


def _checked(mask: Tensor | None, num_sites: int) -> Tensor:
    if mask is None:
        return torch.arange(num_sites, device="cpu") < num_sites // 2
    mask = torch.as_tensor(mask, device="cpu")
    if mask.shape != (num_sites,) or mask.dtype != torch.bool:
        raise ValueError(
            f"Expected mask to be Boolean of shape ({num_sites},); got {mask.dtype} of {tuple(mask.shape)}."
        )
    if mask.all():
        raise ValueError("Expected mask to be False somewhere (for sites to transform); got True everywhere.")
    return mask
