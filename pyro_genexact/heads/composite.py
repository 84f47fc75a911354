"""Heads that are composed of others: one head per site, or a whole model as a head."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from ..base import Constant, Head
from ..core.checks import check_sizes
from ..core.columns import taken
from ..core.devices import zeros_for
from ..families.per_site import PerSite as PerSiteDistribution
from ..families.per_site import PerSiteConstraint
from .checks import checked_heads
from .filters import MinLength
from .parametric import Parametric


class PerSite(Head):
    """A separate head for each of T sites, for instance for the columns of a table.

    ``num_params`` is the largest of the ``num_params`` of the heads. Head t reads the first parameters of site t, as many
    as it needs. Sites that share a head, as in ``[head] * 10``, are evaluated in one call, and so are sites of different
    heads with equal settings and no learnable state.

    Args:
        heads: T heads of distributions with the same site_shape.

    Attributes:
        num_sites: T.
        supports: the supports of the T sites.
        support: the :class:`~pyro_genexact.distributions.PerSiteConstraint` of values (*batch, T, *site_shape).

    Raises:
        TypeError: if ``heads`` is not a sequence of heads of distributions.
        ValueError: if there are no heads, if their site shapes differ, or if one of them is a ``PerSite`` or contains a
            ``MinLength``.

    Example:
        >>> import torch
        >>> from pyro_genexact.heads.mixture import DiscretizedLogistic
        >>> head = PerSite([DiscretizedLogistic(16), DiscretizedLogistic(4, K=2)])
        >>> head.num_params, head(torch.zeros(5, 2, 6)).log_prob(torch.tensor([15.0, 3.0])).shape
        (6, torch.Size([5, 2]))
    """

    num_sites: int
    supports: list[Any]
    support: PerSiteConstraint
    _which: list[int]

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        heads = checked_heads("heads", heads)
        if any(isinstance(head, PerSite) for head in heads):
            raise ValueError("Expected heads of single sites; got a PerSite among them.")
        if any(isinstance(part, MinLength) for head in heads for part in head.modules()):
            raise ValueError(
                "Expected heads that treat all sites alike; got a MinLength among them, which counts sites."
            )
        place = {head: i for i, head in enumerate(dict.fromkeys(heads))}
        self.heads = nn.ModuleList(place)
        self._places = [place[head] for head in heads]
        self.num_sites = len(heads)
        self.num_params, self.site_shape = max(head.num_params for head in heads), heads[0].site_shape
        grouping = Grouping()
        self.register_load_state_dict_post_hook(grouping)
        grouping(self)

    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """Returns the distribution, of batch shape (*batch, S), of the sites first ... first + S - 1.

        For a single site it is the distribution of that site's head.

        Args:
            phi: (*batch, S, P) parameters.
            first: the index of the first of these sites.

        Raises:
            ValueError: if a site is not below T.
        """
        count = phi.shape[-2]
        if not 0 <= first <= self.num_sites - count:
            raise ValueError(
                f"Expected sites 0 ... {self.num_sites - 1} (PerSite of {self.num_sites} heads); "
                f"got {first} ... {first + count - 1}."
            )
        if count == 1:
            return self._read(self._which[first], phi)
        groups: dict[int, list[int]] = {}
        for t, which in enumerate(self._which[first : first + count]):
            groups.setdefault(which, []).append(t)
        if len(groups) == 1:
            return self._read(self._which[first], phi)
        parts = [self._read(which, taken(phi, -2, sites)) for which, sites in groups.items()]
        supports = [self.supports[first + sites[0]] for sites in groups.values()]
        return PerSiteDistribution(parts, list(groups.values()), phi.dtype, supports, validate_args=False)

    def permuted(self, order: Tensor) -> PerSite:
        """Returns a shallow copy for sites visited in another order (T,). Each site keeps its head."""
        # the values of a meta tensor are unknown, and do not matter
        sites = list(range(self.num_sites)) if order.is_meta else order.tolist()
        new = object.__new__(type(self))
        new.__dict__.update(
            self.__dict__,
            _modules=dict(self._modules),
            _places=[self._places[t] for t in sites],
            _which=[self._which[t] for t in sites],
            supports=[self.supports[t] for t in sites],
            support=self.support.permuted(sites),
        )
        return new

    def _read(self, which: int, phi: Tensor) -> Any:
        head: Any = self.heads[which]
        return head(phi if head.num_params == self.num_params else phi[..., : head.num_params])


class Grouping:
    """Groups the sites whose heads have equal settings; also a hook of ``load_state_dict``, which may change these."""

    def __call__(self, head: PerSite, *_: Any) -> None:
        first: dict[Hashable, int] = {}
        alike = [first.setdefault(_settings(one), i) for i, one in enumerate(head.heads)]  # type: ignore[arg-type]
        head._which = [alike[place] for place in head._places]
        head.supports = [head.heads[place].support for place in head._places]
        head.support = PerSiteConstraint(head.supports)


class _Settings(pickle.Pickler):
    """Pickles the settings of a head: tensors by value, without hooks. Fails for anything learnable or changeable."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, PyroModule) or (isinstance(value, Tensor) and value.requires_grad):
            raise pickle.PicklingError("learnable")
        if isinstance(value, nn.Module):
            saved = value._buffers.keys() - value._non_persistent_buffers_set
            if isinstance(value, (Constant, Parametric)):
                saved = set()  # their buffers are settings
            if saved or any(p is not None for p in value._parameters.values()):
                raise pickle.PicklingError("changeable")
            return copyreg.__newobj__, (type(value),), {n: v for n, v in vars(value).items() if "_hooks" not in n}  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            return torch.tensor, (value.tolist(), value.dtype, value.device)
        return NotImplemented


def _settings(head: Head) -> Hashable:
    """Returns a key that is equal for stateless heads with equal settings; the head itself if it has a state."""
    try:
        _Settings(buffer := io.BytesIO()).dump(head)
    except Exception:  # a head that cannot be pickled is grouped with no other
        return head
    return buffer.getvalue()


class ConditionalHead(Head):
    """Uses a distribution module as a head: phi is the context of the module.

    A site can so have an autoregressive model over its features, or a flow, as its conditional distribution. P = C.

    Args:
        module: a :class:`~pyro_genexact.DistributionModule` with C context features whose events are scalars or
            vectors. It becomes a submodule of the head. Its support must not depend on the context.

    Raises:
        TypeError: if ``module`` is not a module with an attribute ``context``.
        ValueError: if ``module.context`` is not a positive integer, if events have more than one dim, or if the batch
            shape is not that of the context.

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> flow = gx.flows.maf(features=2, transforms=1, hidden=(8,), context=5)
        >>> head = ConditionalHead(flow)
        >>> head.num_params, head.site_shape, head(torch.zeros(4, 3, 5)).batch_shape
        (5, (2,), torch.Size([4, 3]))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module) or not hasattr(module, "context"):
            raise TypeError(f"Expected module to be a DistributionModule; got {type(module).__name__}.")
        context: Any = module.context
        check_sizes(1, **{"module.context": context})
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # an OrderEnsemble draws an order in train mode
            d = module(zeros_for(module, context))
        if d.batch_shape != () or len(d.event_shape) > 1:
            raise ValueError(
                "Expected module(context) to have batch_shape context.shape[:-1] and event_shape () or (k,); "
                f"got {tuple(d.batch_shape)} and {tuple(d.event_shape)} for a context of shape ({context},)."
            )
        self.module = module
        self.num_params, self.site_shape = context, tuple(d.event_shape)
        self.support: constraints.Constraint = d.support

    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """Returns the module's distribution, of batch shape (*batch, S), for phi (*batch, S, C)."""
        return self.module(phi)
