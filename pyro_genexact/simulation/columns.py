"""A conditional distribution of events whose entries are counts, categories or real numbers, around a linear regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf, prod
from types import SimpleNamespace
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import silu

from ..base import DistributionModule
from ..contexts import check_context
from ..core.binding import Bound
from ..core.checks import check_kind, check_sizes
from ..core.independent import independent
from ..core.leaves import tensors_in
from ..core.precision import full_precision
from ..core.settable import Settable
from ..core.values import checked_value
from ..families.enumeration import ByEnumeration, in_batch
from ..families.per_site import side_by_side
from ..families.supports import innermost
from ..flows.base import Flow
from ..flows.build import autoregressive
from ..heads.bijections import Affine
from ..heads.spline import RationalQuadraticSpline
from .count_block import CountBlock
from .latent_block import Block, Encoded
from .latent_space import Group, Latent

WIDTH = 64  # of the network of the context
LIMIT = 2**16  # the largest support to enumerate
CATEGORIES = 32  # the largest number of integers that are categories; wider ranges are counts


def affine_splines(features: int, context: int = 0, **options: Any) -> Flow:
    """Returns a flow of spline layers, two or in one dimension one, after an affine layer.

    The affine layer adapts location and scale of the data to the context.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features.
        options: keyword arguments of :func:`~pyro_genexact.flows.autoregressive`.
    """
    heads = [*(RationalQuadraticSpline() for _ in range(min(features, 2))), Affine()]  # from the base to the data
    options = {"transforms": len(heads), "activation": silu, **options}
    return autoregressive(partial(heads.pop, 0), features, context, **options)


class Columns(DistributionModule):
    """The distribution of an event given a context vector, by the chain rule over its counts, categories and real numbers.

    Calling the module returns a distribution with this event shape and support. Counts come first, then categories, then
    numbers on intervals, half lines, simplices and the reals, which are mapped to real numbers.

    Args:
        support: the support of the event, or one constraint per entry of a vector.
        event_shape: the shape of an event.
        context: C, the number of context features.
        recipe: a function that is called as ``recipe(D, context=C)`` and returns a flow over D real numbers.
        dtype: the dtype of samples.
    """

    def __init__(
        self,
        support: Any,
        event_shape: Size,
        context: int,
        recipe: Callable[..., Any] = affine_splines,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, context=context)
        self.event_shape, self.context, self.dtype = Size(event_shape), context, dtype
        parts = _parts(support, self.event_shape)
        alone = len(parts) == 1 and not isinstance(support, (list, tuple))
        joint = support if alone else side_by_side([part.support for part in parts])
        self.support = independent(joint, len(self.event_shape) - joint.event_dim)
        kinds: dict[str, list[_Part]] = {"counts": [], "categories": [], "reals": []}
        for part in parts:
            kinds[part.kind].append(part)
        self._order = [place for kind in kinds.values() for part in kind for place in part.places]
        self._places = sorted(range(len(self._order)), key=self._order.__getitem__)
        self._categories = [part.values for part in kinds["categories"] for _ in part.places]
        ranges = [part.ends for part in kinds["counts"] for _ in part.places]
        self._ranges = ranges + [part.ends for part in kinds["categories"] for _ in part.places]
        group = Group([part.latent() for kind in ("categories", "reals") for part in kinds[kind]])
        self.real_places = [place for part in kinds["reals"] for place in part.places]
        self.num_counts, self.num_categories = len(ranges), group.d
        self.is_real = not (ranges or group.d)
        self.embed = nn.Sequential(nn.Linear(context, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.counts = CountBlock(ranges, context, context + WIDTH) if ranges else None
        n = len(ranges)
        self.block = Block(group, context + n, context + WIDTH + n, recipe, {}) if group.size else None

    @full_precision
    def forward(self, context: Tensor | None = None) -> ColumnsDistribution:
        """Returns the distribution given the context (*batch, C)."""
        context = check_context(self, context)
        return ColumnsDistribution(self, Encoded(context, torch.cat([context, self.embed(context)], -1)))

    def pack(self, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns events (*batch, *event) as counts (*batch, n) and other entries (*batch, D), and whether these are in the support.

        Categories are replaced by their places. Entries outside the support are replaced by others.
        """
        batch = value.shape[: value.dim() - len(self.event_shape)]
        flat = value.reshape(*batch, len(self._order)).to(dtype)[..., self._order]
        counts, labels, reals = flat.split(
            [self.num_counts, self.num_categories, flat.shape[-1] - self.num_counts - self.num_categories], -1
        )
        inside = torch.ones(flat.shape[:-1], dtype=torch.bool, device=flat.device)
        if self.counts is not None:
            valid = (counts >= self.counts.low) & (counts <= self.counts.high) & (counts % 1 == 0) & counts.isfinite()
            counts, inside = torch.where(valid, counts, self.counts.low), inside & valid.all(-1)
        places = []
        for i, values in enumerate(self._categories):
            same = labels[..., i, None] == values.to(flat)
            places.append(same.int().argmax(-1).to(dtype))
            inside = inside & same.any(-1)
        return counts, torch.cat([*(p.unsqueeze(-1) for p in places), reals], -1), inside

    def number_of_values(self) -> float:
        """Returns the number of values in the support; infinity for counts without a bound and for real numbers."""
        return prod((high - low + 1 for low, high in self._ranges), start=1.0) if not self.real_places else inf

    def values(self) -> Tensor:
        """Returns all values (N, *event) of a finite support, on the CPU."""
        columns = [torch.arange(low, high + 1, device="cpu") for low, high in self._ranges]
        return torch.cartesian_prod(*columns).reshape(-1, len(columns))[:, self._places].reshape(-1, *self.event_shape)

    @full_precision
    def log_prob(self, value: Tensor, given: Encoded) -> Tensor:
        """Returns the log density (*batch,) of events (*batch, *event), -inf outside the support."""
        counts, others, inside = self.pack(value, given.context.dtype)
        total = given.context.new_zeros(())
        if self.counts is not None:
            total, features = self.counts.log_prob(counts, given)
            given = given.joined(features)
        if self.block is not None:
            total = total + self.block.log_prob(others, given)[0]
        return torch.where(inside, total, -inf) if not self.is_real else total

    @full_precision
    def sample(self, given: Encoded, differentiable: bool) -> Tensor:
        """Returns events (*batch, *event), one for each row of what is given."""
        found = []
        if self.counts is not None:
            counts, features = self.counts.sample(given)
            given = given.joined(features)
            found.append(counts)
        if self.block is not None:
            packed = self.block.sample(given, differentiable)[0]
            found += [v.to(packed)[packed[..., i].long()].unsqueeze(-1) for i, v in enumerate(self._categories)]
            found.append(packed[..., self.num_categories :])
        flat = torch.cat(found, -1)[..., self._places]
        flat = flat if self.dtype is None or self.dtype.is_floating_point else flat.to(self.dtype)
        return flat.reshape(*flat.shape[:-1], *self.event_shape)

    @torch.no_grad()
    def standardise(self, value: Tensor, context: Tensor) -> None:
        """Starts the regressions at those of N events (N, *event) on contexts (N, C)."""
        given = self(context).given
        counts, others, _ = self.pack(value, context.dtype)
        if self.counts is not None:
            given = given.joined(self.counts.standardise(counts, given))
        if self.block is not None:
            self.block.standardise(others, given)


class ColumnsDistribution(ByEnumeration, TorchDistribution):
    """The distribution of :class:`Columns` given a context.

    Args:
        module: the module.
        given: the encoded context, of batch shape (*batch).
        batch_shape: a larger batch shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, module: Columns, given: Encoded, batch_shape: Size | None = None) -> None:
        self._bound, self.given = Bound(module), given
        batch = given.context.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(batch, module.event_shape, validate_args=None)

    @property
    def module(self) -> Columns:
        """The module with the parameters that it had at the call."""
        return self._bound.module

    @constraints.dependent_property
    def support(self) -> Any:  # type: ignore[override]
        return self.module.support

    @Settable
    def has_rsample(self) -> bool:
        return self.module.is_real

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.module.number_of_values() <= LIMIT

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the values (N, *batch, *event), or (N, 1, ..., *event) without ``expand``, of a finite support of up to 65536."""
        if not self.has_enumerate_support:
            raise NotImplementedError(f"Expected a support of at most {LIMIT} values to enumerate; got {self.support}.")
        return in_batch(self.module.values().to(self.given.context), self, expand)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats, (*sample, *batch)."""
        value = checked_value(self, value)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        return self.module.log_prob(value.expand(Size((*batch, *self.event_shape))), self.given)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape, False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws reparameterised samples, if all entries are real numbers."""
        if not self.module.is_real:
            raise NotImplementedError("Expected continuous entries only for rsample; got discrete ones.")
        return self._draw(sample_shape, True)

    def _draw(self, sample_shape: Any, differentiable: bool) -> Tensor:
        given = self.given.expand(Size((*sample_shape, *self.batch_shape)))
        return self.module.sample(given, differentiable)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ColumnsDistribution:
        return type(self)(self.module, self.given, torch.broadcast_shapes(Size(batch_shape), self.batch_shape))


class _Part:
    """Entries of an event with a joint constraint: their places in the flattened event, and their kind.

    Attributes:
        support: the constraint.
        places: the places.
        kind: "counts", "categories" or "reals".
        values: the values (K,) of a category.
        ends: the smallest and the largest count.
    """

    def __init__(self, support: Any, places: Sequence[int], shape: Size) -> None:
        self.support, self.places, self.shape = support, list(places), shape
        self.kind, self.values, self.ends = "reals", torch.empty(0, device="cpu"), (0.0, inf)
        if innermost(support).is_discrete:
            low, high = _integers(innermost(support))
            self.kind, self.ends = "counts", (low, high)
            if high - low < CATEGORIES:
                self.kind, self.values = "categories", torch.arange(low, high + 1, device="cpu")

    def latent(self) -> Latent:
        """Returns the entries as a latent of a group."""
        name = f"entries {self.places[0]} to {self.places[-1]} of the observed site"
        if self.kind == "categories":
            return Latent(name, self.shape, len(self.shape), (), None, self.values, None)
        fn = SimpleNamespace(support=self.support, event_dim=len(self.shape))
        site = {"name": name, "fn": fn, "value": torch.empty(self.shape, device="cpu"), "cond_indep_stack": ()}
        return Latent.of(site, None)


def _parts(support: Any, shape: Size) -> list[_Part]:
    for one in support if isinstance(support, (list, tuple)) else [support]:
        check_kind("support", one, constraints.Constraint)
    if not isinstance(support, (list, tuple)):
        if support.event_dim > len(shape):
            raise ValueError(f"Expected support of events of shape {tuple(shape)}; got {support}.")
        return [_Part(support, range(shape.numel()), shape)]
    if len(shape) != 1 or len(support) != shape[0]:
        raise ValueError(
            f"Expected support to be one constraint or a list of one per entry of a vector; got a list of {len(support)} for "
            f"events of shape {tuple(shape)}."
        )
    return [_Part(one, [i], Size()) for i, one in enumerate(support)]


def _integers(support: Any) -> tuple[float, float]:
    """Returns the smallest and the largest value of a discrete support."""
    ends: tuple[Any, Any] = (getattr(support, "lower_bound", None), getattr(support, "upper_bound", inf))
    if support is constraints.boolean:
        ends = 0.0, 1.0
    if support.event_dim or ends[0] is None or any(bool((t != t.flatten()[0]).any()) for t in tensors_in(support)):
        raise ValueError(
            f"Expected an observed site of numbers, or with support= boolean, integer_interval(low, high) or nonnegative_integer; "
            f"got {support}. Pass module= for other events, such as one-hot vectors."
        )
    low, high = (float(end.flatten()[0] if isinstance(end, Tensor) else end) for end in ends)
    return low, high
