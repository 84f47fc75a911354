"""Mixtures of distributions of one or several families, with scalar or vector events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ..core.independent import REAL_VECTOR
from ..core.leaves import map_leaves, tensors_in
from ..core.random import chosen
from ..core.values import checked_value
from .cdf import cdf
from .enumeration import ByEnumeration, in_batch
from .in_support import feasible_point, log_prob_everywhere, support_ends
from .parametrised import Parametrised
from .supports import innermost


class Mixture(ByEnumeration, Parametrised, TorchDistribution):
    """A mixture p(y) = sum_k w_k p_k(y) of K distributions with weights w = softmax(logits).

    ``log_prob`` is computed by log-sum-exp, in nats. Components whose support does not contain the value contribute
    nothing; outside all supports, ``log_prob`` is -inf with gradient zero. A sample draws from all K components and
    selects one of the draws, so it costs K times as much as a sample of one component.

    Args:
        logits: (*batch, K) unnormalised log weights.
        components: a list of K distributions of any families, each of batch shape (*batch), or one distribution of
            batch shape (K, *batch), evaluated in one call. Batch shapes broadcast with each other and with the logits.
        supports: a list of supports for a list of components, or one support for a single distribution. They replace
            the families' own, some of which are wider than the set with positive mass (``VonMises``).

    Raises:
        TypeError: if a component is not a distribution.
        ValueError: if the numbers of components and logits differ, if event shapes differ, or, with validation, if some
            components are discrete and others continuous.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> d = Mixture(torch.zeros(2), [dist.Normal(0.0, 1.0), dist.Exponential(1.0)])
        >>> d.log_prob(torch.tensor([-1.0, 1.0])).exp()
        tensor([0.1210, 0.3049])
        >>> Mixture(torch.zeros(5, 2), dist.Normal(torch.zeros(2, 5), 1.0)).sample((3,)).shape
        torch.Size([3, 5])
    """

    arg_constraints = {"logits": REAL_VECTOR}
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        components: Distribution | Sequence[Distribution],
        supports: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_shapes, event_shape = _component_shapes(logits, components)
        batch_shape = torch.broadcast_shapes(logits.shape[:-1], *batch_shapes)
        self.logits = logits.expand(*batch_shape, -1)
        # the number of batch dims of the components; K comes before these, and further dims of the mixture before K
        self._inner = max(map(len, batch_shapes))
        self.components = _expanded(components, batch_shape[len(batch_shape) - self._inner :])
        self.supports = supports
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args and len({support.is_discrete for support in self._component_supports()}) > 1:
            raise ValueError("Expected components to be all discrete or all continuous; got some of both.")

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density log sum_k w_k p_k(value) in nats, (*sample, *batch)."""
        value = checked_value(self, value)
        log_weights = self.logits.log_softmax(-1).movedim(-1, self._dim)
        terms = log_weights + self._each_at(log_prob_everywhere, value)
        impossible = (terms == -torch.inf).all(self._dim, keepdim=True)
        total = terms.masked_fill(impossible, 0.0).logsumexp(self._dim)  # its gradient would be NaN if all are -inf
        return total.masked_fill(impossible.squeeze(self._dim), -torch.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws exact samples (*sample, *batch, *event), without gradient."""
        events, shape = len(self.event_shape), (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            outer = Size((*sample_shape, *self.batch_shape[: len(self.batch_shape) - self._inner]))
            draws = self._each(lambda d: d.sample(outer))
            probs = self.logits.softmax(-1).expand(*shape, -1)
            index = chosen(probs).squeeze(-1).unsqueeze(self._dim)
            dim = self._dim - events
            return draws.take_along_dim(index.reshape(*index.shape, *[1] * events), dim).squeeze(dim)

    def cdf(self, value: Tensor) -> Tensor:
        """Returns sum_k w_k P_k(y <= value) for any real value, if events are scalars and all components have a cdf."""
        weights = self.logits.softmax(-1).movedim(-1, self._dim)
        return (weights * self._each_at(cdf, value)).sum(self._dim)

    @property
    def mean(self) -> Tensor:
        return self._average(self._each(lambda d: d.mean))

    @property
    def variance(self) -> Tensor:
        """The mean of the variances plus the variance of the means, (*batch, *event)."""
        means = self._each(lambda d: d.mean)
        off = means - self._average(means).unsqueeze(self._dim - len(self.event_shape))
        return self._average(self._each(lambda d: d.variance) + off.square())

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The union of the components' supports, or their common support if all are equal."""
        return union(self._component_supports())

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return all(d.has_enumerate_support for d in self._list())

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the union of the enumerated supports, (N, *batch, *event), or (N, 1, ..., *event)."""
        values = [d.enumerate_support(expand=False).reshape(-1, *self.event_shape) for d in self._list()]
        distinct = values[0] if len(values) == 1 else torch.cat(values).unique(dim=0)
        return in_batch(distinct, self, expand)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Mixture:
        new: Mixture = super().expand(batch_shape, _instance)
        new.components = _expanded(self.components, new.batch_shape[len(new.batch_shape) - self._inner :])
        return new

    @property
    def _dim(self) -> int:
        """The negative index of the dim K in a tensor (K, *batch)."""
        return -1 - self._inner

    def _list(self) -> list[Distribution]:
        return [self.components] if isinstance(self.components, Distribution) else self.components

    def _each(self, quantity: Callable[[Any], Tensor]) -> Tensor:
        """Returns a quantity (*batch, *event) of every component, with dim K before the batch."""
        if isinstance(self.components, Distribution):
            return quantity(self.components)
        return torch.stack([quantity(d) for d in self.components], self._dim - len(self.event_shape))

    def _each_at(self, quantity: Callable[..., Tensor], value: Tensor) -> Tensor:
        """Returns ``quantity(component, value, support)`` (*sample, *batch) of every component, with dim K added."""
        least = self._inner + len(self.event_shape)
        value = value.reshape((1,) * (least - value.dim()) + value.shape).unsqueeze(-1 - least)
        if isinstance(self.components, Distribution):
            return quantity(self.components, value, self.supports)
        supports = [None] * len(self.components) if self.supports is None else self.supports
        pairs = zip(self.components, supports, strict=True)
        return torch.cat([quantity(d, value, support) for d, support in pairs], self._dim)

    def _average(self, values: Tensor) -> Tensor:
        events = len(self.event_shape)
        weights = self.logits.softmax(-1).movedim(-1, self._dim)
        return (weights.reshape(*weights.shape, *[1] * events) * values).sum(self._dim - events)

    def _component_supports(self) -> list[Any]:
        """Returns the supports of the components; a single one for a stack, unless its bounds are tensors."""
        if self.supports is not None:
            return [self.supports] if isinstance(self.components, Distribution) else list(self.supports)
        found: list[Any] = [d.support for d in self._list()]
        if isinstance(self.components, Distribution) and tensors_in(found[0]):
            return [_component(found[0], k, self._inner) for k in range(self.logits.shape[-1])]
        return found


cdf.register(Mixture, lambda d, value, support=None: d.cdf(value))  # the union of the supports may have a gap


class UnionConstraint(constraints.Constraint):
    """The constraint of values that satisfy at least one of several constraints of equal ``event_dim``.

    Args:
        parts: the constraints.

    Example:
        >>> from torch.distributions import constraints
        >>> import torch
        >>> c = UnionConstraint([constraints.less_than(0.0), constraints.interval(1.0, 2.0)])
        >>> c.check(torch.tensor([0.5, 1.5]))
        tensor([False,  True])
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.is_discrete = all(part.is_discrete for part in parts)
        self.event_dim = parts[0].event_dim

    def check(self, value: Tensor) -> Tensor:
        inside = self.parts[0].check(value)
        for part in self.parts[1:]:
            inside = inside | part.check(value)
        return inside

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns a value inside that broadcasts with ``like``."""
        return feasible_point(self.parts[0], like)

    def __repr__(self) -> str:
        return " | ".join(map(str, self.parts))


@support_ends.register(UnionConstraint)
def _(support: UnionConstraint, like: Tensor) -> tuple[Tensor, Tensor]:
    lows, highs = zip(*(support_ends(part, like) for part in support.parts), strict=True)
    low, high = (torch.stack(torch.broadcast_tensors(*ends)) for ends in (lows, highs))
    return low.amin(0), high.amax(0)


def union(parts: Sequence[Any]) -> Any:
    """Returns the union of constraints: one of the parts if it contains all others, else a :class:`UnionConstraint`."""
    different: list[Any] = []
    for part in parts:
        if type(innermost(part)) is type(constraints.real):
            return part
        if not any(same_constraint(part, other) for other in different):
            different.append(part)
    return different[0] if len(different) == 1 else UnionConstraint(different)


def same_constraint(a: Any, b: Any) -> bool:
    """Whether two constraints (or attributes of constraints) have the same class and equal bounds."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and not (a.is_meta or b.is_meta) and bool((a == b).all())
    if isinstance(a, constraints.Constraint) or is_dataclass(a):  # dataclasses are checks of constraints
        return same_constraint(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_constraint(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_constraint, a, b))
    return bool(a == b)


def _component(support: Any, k: int, inner: int) -> Any:
    """Returns the support of component k of a stack whose components have ``inner`` batch dims."""
    return map_leaves(lambda bound: bound[k] if bound.dim() > inner else bound, support)


def _component_shapes(logits: Tensor, components: Any) -> tuple[list[Size], Size]:
    """Returns the batch shapes of the components, without K, and their event shape."""
    stacked = isinstance(components, Distribution)
    parts = [components] if stacked else list(components)
    for part in parts:
        if not isinstance(part, Distribution):
            raise TypeError(f"Expected components to be distributions; got {type(part).__name__}.")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"Expected logits of shape (*batch, K) with K >= 1; got {tuple(logits.shape)}.")
    count = logits.shape[-1]
    if stacked and components.batch_shape[:1] != (count,):
        raise ValueError(
            f"Expected components.batch_shape[0] == {count} (logits.shape[-1]); got {tuple(components.batch_shape)}."
        )
    if not stacked and len(parts) != count:
        raise ValueError(f"Expected len(components) == {count} (logits.shape[-1]); got {len(parts)}.")
    for part in parts:
        if part.event_shape != parts[0].event_shape:
            raise ValueError(
                f"Expected components of one event_shape; got {tuple(parts[0].event_shape)} and {tuple(part.event_shape)}."
            )
    return [part.batch_shape[1:] if stacked else part.batch_shape for part in parts], parts[0].event_shape


def _expanded(components: Any, batch_shape: Size) -> Any:
    """Expands the components to the batch shape (*batch), or a stack to (K, *batch)."""
    if not isinstance(components, Distribution):
        return [d if d.batch_shape == batch_shape else d.expand(batch_shape) for d in components]
    shape = components.batch_shape[:1] + batch_shape
    return components if components.batch_shape == shape else components.expand(shape)
