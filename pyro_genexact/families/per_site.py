"""The distribution of independent sites of different families, and the constraint of their values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ..core.columns import taken
from ..core.independent import independent
from ..core.leaves import map_leaves, tensors_in
from ..core.settable import Settable
from ..core.values import checked_value
from .cdf import cdf, icdf
from .in_support import feasible_point, log_prob_everywhere
from .mixture import same_constraint
from .parametrised import Parametrised
from .supports import innermost


class PerSite(Parametrised, TorchDistribution):
    """Independent sites of different families, with batch shape (*batch, S).

    Each part is a distribution of some of the sites.

    Args:
        parts: distributions of equal event shape; part i has batch shape (*batch, len(sites[i])).
        sites: the site indices of each part, which together are 0 ... S - 1.
        dtype: the dtype of samples, means and modes; by default the promoted dtype of the parts.
        supports: the supports of the parts. They replace the families' own, some of which are wider than the set with
            positive mass (``VonMises``).

    Raises:
        ValueError: if the batch or event shapes of the parts do not fit, or the sites are not 0 ... S - 1.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> parts = [dist.Normal(torch.zeros(4, 2), 1.0), dist.Bernoulli(torch.ones(4, 1) / 2)]
        >>> d = PerSite(parts, sites=[[0, 2], [1]])
        >>> d.log_prob(torch.tensor([0.0, 1.0, 0.5])).shape
        torch.Size([4, 3])
        >>> d.support.check(torch.tensor([0.0, 0.5, 0.5]))
        tensor([ True, False,  True])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        parts: Sequence[Distribution],
        sites: Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        supports: Sequence[Any] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.parts, self.sites, self.dtype = list(parts), [list(group) for group in sites], dtype
        self.supports = supports
        count = sum(map(len, self.sites))
        if sorted(t for group in self.sites for t in group) != list(range(count)) or not count:
            raise ValueError(f"Expected sites to contain each of 0 ... {count - 1} once; got {self.sites}.")
        if len(self.parts) != len(self.sites):
            raise ValueError(f"Expected len(parts) == {len(self.sites)} (len(sites)); got {len(self.parts)}.")
        batch, event = parts[0].batch_shape[:-1], parts[0].event_shape
        for part, group in zip(self.parts, self.sites, strict=True):
            if part.batch_shape != (*batch, len(group)) or part.event_shape != event:
                raise ValueError(
                    f"Expected a part with batch_shape == {(*batch, len(group))} and event_shape == {tuple(event)}; "
                    f"got {tuple(part.batch_shape)} and {tuple(part.event_shape)}."
                )
        super().__init__(Size((*batch, count)), event, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each site in nats, (*sample, *batch, S), -inf outside the site's support."""
        value = checked_value(self, value)
        return self.each(log_prob_everywhere, value, *self._limits())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._all(lambda part: part.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws reparameterised samples, if all parts support this."""
        return self._all(lambda part: part.rsample(Size(sample_shape)))

    @Settable
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    def cdf(self, value: Tensor) -> Tensor:
        """Returns P(y_t <= value_t) of each site, (*sample, *batch, S), for any real values."""
        return self.each(cdf, value, *self._limits())

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the quantiles of each site, (*sample, *batch, S)."""
        return self.each(icdf, value).to(dtype=self.dtype)

    @property
    def mean(self) -> Tensor:
        return self._all(lambda part: part.mean)

    @property
    def variance(self) -> Tensor:
        return self._all(lambda part: part.variance)

    @property
    def mode(self) -> Tensor:
        return self._all(lambda part: part.mode)

    def entropy(self) -> Tensor:
        """Returns the entropy of each site in nats, (*batch, S)."""
        return _in_order([part.entropy() for part in self.parts], self.sites, -1)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint of the sites, one per site."""
        supports: list[Any] = [None] * self.batch_shape[-1]
        for part, group, given in zip(self.parts, self.sites, self.supports or [None] * len(self.parts), strict=True):
            support: Any = part.support if given is None else given
            for i, t in enumerate(group):
                supports[t] = _site_of(support, i, len(self.batch_shape)) if tensors_in(support) else support
        return side_by_side(supports)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return all(part.has_enumerate_support for part in self.parts)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the values of each site, (N, *batch, S, *event), or (N, 1, ..., S, *event) without ``expand``.

        Raises:
            NotImplementedError: if the supports of the sites differ in size.
        """
        sizes = [len(part.enumerate_support(expand=False)) for part in self.parts]
        if len(set(sizes)) > 1:
            raise NotImplementedError(f"Expected supports of equal size for enumeration; got sizes {sizes}.")
        values = self._all(lambda part: part.enumerate_support())
        return values if expand else values[(slice(None), *[slice(1)] * (len(self.batch_shape) - 1))]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PerSite:
        batch_shape = Size(batch_shape)
        if batch_shape[-1:] != self.batch_shape[-1:]:
            raise ValueError(
                f"Expected batch_shape[-1] == {self.batch_shape[-1]} (the number of sites); got {tuple(batch_shape)}."
            )
        new: PerSite = super().expand(batch_shape, _instance)
        new.parts = [part.expand((*batch_shape[:-1], part.batch_shape[-1])) for part in self.parts]
        return new

    def _all(self, quantity: Callable[[Any], Tensor]) -> Tensor:
        """Returns a quantity (..., S, *event) of all parts, in the order of the sites and the dtype of samples."""
        found = [quantity(part) for part in self.parts]
        return _in_order(found, self.sites, -1 - len(self.event_shape)).to(dtype=self.dtype)

    def each(self, quantity: Callable[..., Tensor], value: Tensor, *more: Sequence[Any]) -> Tensor:
        """Returns ``quantity(part, values of its sites, ...)`` for all parts, (*sample, *batch, S), in site order.

        Args:
            quantity: a function of a part, its values, and one entry of each further sequence.
            value: (*sample, *batch, S, *event).
            *more: further sequences with one entry per part.
        """
        values = _split(value, self.sites, len(self.event_shape))
        found = [quantity(*arguments) for arguments in zip(self.parts, values, *more, strict=True)]
        return _in_order(found, self.sites, -1)

    def _limits(self) -> list[Sequence[Any]]:
        return [] if self.supports is None else [self.supports]


class PerSiteConstraint(constraints.Constraint):
    """A constraint of values (*batch, T, *site_shape) with one constraint per site.

    ``check`` returns one Boolean per site, (*batch, T), and ``event_dim`` is that of one site. :meth:`joint` returns
    the constraint of the whole vector, which ``biject_to`` supports if all sites are continuous scalars.

    Args:
        parts: T constraints of equal ``event_dim``; equal constraints are checked in one call.

    Raises:
        ValueError: if there are no constraints, or if they differ in ``event_dim``.

    Example:
        >>> from torch.distributions import constraints
        >>> import torch
        >>> c = PerSiteConstraint([constraints.positive, constraints.boolean])
        >>> c.check(torch.tensor([[2.0, 1.0], [0.0, 0.5]]))
        tensor([[ True,  True],
                [False, False]])
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        if not parts or len({part.event_dim for part in parts}) > 1:
            raise ValueError(f"Expected at least one constraint, and all of equal event_dim; got {list(parts)}.")
        self.parts = list(parts)
        self.event_dim = parts[0].event_dim
        self.is_discrete = all(part.is_discrete for part in parts)
        self._different: list[Any] = []
        self._sites: list[list[int]] = []
        for t, part in enumerate(parts):
            i = next((i for i, c in enumerate(self._different) if same_constraint(c, part)), len(self._different))
            if i == len(self._different):
                self._different.append(part)
                self._sites.append([])
            self._sites[i].append(t)

    def check(self, value: Tensor) -> Tensor:
        checks = [c.check(v) for c, v in self._pairs(value)]
        return _in_order(checks, self._sites, -1)

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns values inside, of the shape of ``like`` (*batch, T, *site_shape)."""
        points = [feasible_point(c, v).expand_as(v) for c, v in self._pairs(like)]
        return _in_order(points, self._sites, -1 - self.event_dim)

    def joint(self, order: Tensor | None = None) -> Any:
        """Returns the constraint of the whole vector in which entry ``order[i]`` belongs to site i."""
        places = range(len(self.parts)) if order is None else order.argsort().tolist()
        return independent(side_by_side([self.parts[i] for i in places]), 1)

    def permuted(self, order: Sequence[int]) -> PerSiteConstraint:
        """Returns the constraint whose site i is site ``order[i]`` of this one."""
        new, place = copy.copy(self), sorted(range(len(order)), key=order.__getitem__)
        new.parts = [self.parts[t] for t in order]
        new._sites = [sorted(place[t] for t in group) for group in self._sites]
        return new

    def __repr__(self) -> str:
        return f"PerSiteConstraint({self.parts})"

    def _pairs(self, value: Tensor) -> list[tuple[Any, Tensor]]:
        return list(zip(self._different, _split(value, self._sites, self.event_dim), strict=True))


def side_by_side(parts: Sequence[Any]) -> Any:
    """Returns a constraint with one part per site: torch's ``cat`` for scalars, which ``biject_to`` supports."""
    dims = parts[0].event_dim
    runs: list[tuple[Any, int]] = []
    for part in map(innermost, parts):
        if part.event_dim:
            return PerSiteConstraint(parts)
        same = runs and same_constraint(part, runs[-1][0])
        runs[-1:] = [(part, runs[-1][1] + 1)] if same else [*runs[-1:], (part, 1)]
    joined = constraints.cat([part for part, _ in runs], -1 - dims, [n for _, n in runs])
    return independent(joined, dims)


def _split(value: Tensor, sites: list[list[int]], events: int) -> list[Tensor]:
    """Splits values that broadcast with (*batch, S, *event) into those of each group of sites."""
    dim, count = -1 - events, sum(map(len, sites))
    if value.dim() <= events:
        value = value.unsqueeze(0)
    if value.shape[dim] not in (1, count):
        raise ValueError(f"Expected value.shape[{dim}] == {count} (the number of sites); got {tuple(value.shape)}.")
    value = value.expand(*value.shape[:dim], count, *value.shape[value.dim() - events :])
    if _ordered(sites):
        return list(value.split([len(group) for group in sites], dim))
    return [taken(value, dim, group) for group in sites]


def _in_order(parts: list[Tensor], sites: list[list[int]], dim: int) -> Tensor:
    """Concatenates the tensors of groups of sites, in the order of the sites."""
    joined = torch.cat(parts, dim)
    if _ordered(sites):
        return joined
    order = [t for group in sites for t in group]
    place = sorted(range(len(order)), key=order.__getitem__)
    return taken(joined, dim, place)


def _ordered(sites: list[list[int]]) -> bool:
    order = [t for group in sites for t in group]
    return order == list(range(len(order)))


def _site_of(support: Any, i: int, batch_dims: int) -> Any:
    """Returns the constraint of site i of a constraint whose bounds are tensors (*batch, S)."""
    return map_leaves(lambda b: b.narrow(batch_dims - 1, i, 1) if b.dim() >= batch_dims else b, support)
