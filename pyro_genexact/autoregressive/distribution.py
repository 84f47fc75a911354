"""The chain rule as one Pyro distribution: conditioner + distribution head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..contexts import Padded, Source, Steps, check_context, checked_source
from ..core.binding import bind
from ..core.checks import check_like, check_sizes, permutation
from ..core.independent import independent
from ..core.lengths import checked_lengths
from ..core.settable import Settable
from ..core.shapes import broadcast_batches, broadcast_shapes, shape_of
from ..core.values import numbers
from ..families.cdf import icdf, probability_integral
from ..families.enumeration import ByEnumeration
from ..families.guard import contains, feasible_point, known_to_contain
from ..families.per_site import PerSite, PerSiteConstraint
from .checks import check_uniforms, sites_of, sites_of_prefix, steps_in_order
from .reparameterised import can_sweep, sweep


class AutoregressiveDistribution(ByEnumeration, TorchDistribution):
    r"""p(y | x) = prod_t p(y_t | x, y_{<t}), each factor a distribution whose parameters a network predicts.

    The T sites of an event are its leading dims in raster order, or visited in ``order``; its trailing dims are those of a
    site (``head.site_shape``). With ``lengths`` the sites from a row's length on are padding: no value there matters,
    none gets a gradient, samples hold zeros. With a ``prefix`` the event is what follows it.

    Cost: ``log_prob`` is one parallel pass of the conditioner; ``sample`` extends one state site by site.

    A conditioner in half precision, or under autocast, predicts parameters that the head reads in single precision:
    log-probabilities and samples are in float32, and values may be of either dtype.

    Args:
        conditioner: reads the sites; the weights that it has now are used from here on.
        head: makes the distribution of each site.
        event_shape: sites, then ``head.site_shape``.
        context: (*batch, C), with ``Steps`` (*batch, T, C) in the order of the event, with ``Source`` (*batch, S, C)
            or a ``Padded`` of it and its lengths, or None where the conditioner takes none.
        order: (T,) integers, ``order[i]`` the site visited as number i; by default raster order.
        lengths: (*batch) integers 0 ... T, how many sites (in visiting order) a row has.
        source_lengths: (*batch) integers 0 ... S, how long a row's ``Source`` is; by default S.
        prefix: (*batch, k, *site_shape), values of k sites before those of the event.
        limit: the largest support that is enumerated.
        validate_args: whether values are checked; without, those outside the support have log_prob -inf.

    Raises:
        ValueError: for a conditioner, head and event that do not fit each other, lengths outside 0 ... T, a prefix outside
            the support, and values outside the support when validating.

    Shapes: the batch shape is that of context, lengths and prefix, broadcast.

    Example:
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Bernoulli()
        >>> d = AutoregressiveDistribution(conditioners.MADE(6, head.num_params), head, (2, 3))
        >>> d.sample((4,)).shape, d.log_prob(torch.ones(2, 3)).shape
        (torch.Size([4, 2, 3]), torch.Size([]))
        >>> bool((d.log_prob(d.enumerate_support()).logsumexp(0).abs() < 1e-5).all())
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        conditioner: Conditioner,
        head: Head,
        event_shape: Sequence[int],
        context: Tensor | None = None,
        *,
        order: Tensor | None = None,
        lengths: Tensor | None = None,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        limit: int = 2**16,
        validate_args: bool | None = None,
    ) -> None:
        check_sizes(1, limit=limit)
        event_shape, site_shape = shape_of(event_shape), tuple(head.site_shape)
        if isinstance(context, Padded):
            if source_lengths is not None:
                raise ValueError("Expected no source_lengths beside a Padded context, which has them; got some.")
            context, source_lengths = context
        self._given = 0 if prefix is None else sites_of_prefix(prefix, site_shape)
        self._sites = sites_of(conditioner, head, event_shape, self._given)
        check_context(conditioner, context)
        self._context_dims = 2 if isinstance(conditioner.context, (Steps, Source)) else 1
        self.conditioner, of_conditioner = bind(conditioner, one_draw=True)
        self.head, of_head = bind(head, one_draw=True)
        self._bound = of_conditioner + of_head
        numbers = (t for t in (*self._bound, context) if t is not None and t.is_floating_point())
        self._like = next(numbers, torch.empty(0, device="cpu"))
        total = self._given + prod(self._sites)
        self.order = None if order is None else permutation(order, prod(self._sites)).to(self._like.device)
        self._lengths = None if lengths is None else checked_lengths(lengths, total)
        if context is not None and isinstance(conditioner.context, Steps):
            context = steps_in_order(context, self.order, self._given, total)
        self.context, self.limit = context, limit
        self.source_lengths = checked_source(conditioner, context, source_lengths)
        self.prefix = None if prefix is None else self._typed(prefix, "prefix")
        batch_shape = broadcast_batches(
            context=() if context is None else context.shape[: -self._context_dims],
            lengths=() if lengths is None else lengths.shape,
            source_lengths=() if source_lengths is None else source_lengths.shape,
            prefix=() if prefix is None else prefix.shape[: prefix.dim() - 1 - len(site_shape)],
        )
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if prefix is not None and self._validate_args:
            self._check_prefix()

    def __repr__(self) -> str:
        parts = f"{type(self.conditioner).__name__}, {type(self.head).__name__}"
        return f"{type(self).__name__}({parts}, {tuple(self.batch_shape)}, {tuple(self.event_shape)})"

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Of the event; with lengths it looks at no padding."""
        site: Any = self.head.support
        if self._lengths is None and not isinstance(site, PerSiteConstraint):
            return independent(site, len(self.event_shape) - site.event_dim)
        if self._lengths is None and len(self._sites) == 1 and not (self.order is not None and self.order.is_meta):
            return PerSiteConstraint(site.parts[self._given :]).joint(self.order)
        return _Events(self)

    @property
    def lengths(self) -> Any:
        """How many sites a row has, (*batch), or None where all have all."""
        return self._lengths

    @cached_property
    def _tensors(self) -> list[Tensor]:
        """What the modules compute with, each once."""
        return list({id(t): t for t in self._bound}.values())

    @cached_property
    def _probe(self) -> Any:
        """The distribution of all sites at phi = 0: what family it is does not depend on phi."""
        with torch.no_grad():  # tensors on a graph could not be copied
            return self._site(self._like.new_zeros(1, self._given + prod(self._sites), self.head.num_params))

    @cached_property
    def _half_head(self) -> bool:
        """Whether the head's own weights are in half precision, so that its parameters must be."""
        return any(p.dtype.itemsize < 4 for p in self.head.parameters())

    def _site(self, phi: Tensor, first: int = 0) -> Any:
        """The distributions of S sites from ``first`` on, of parameters in single precision at least."""
        # a call of the head as a module would cost as much as an operation
        return self.head.forward(phi if phi.dtype.itemsize >= 4 or self._half_head else phi.float(), first)

    @Settable
    def has_rsample(self) -> bool:
        """Whether the head's family is reparameterised."""
        return bool(self._probe.has_rsample)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the head's family has a finite support."""
        return self._lengths is None and bool(self._probe.has_enumerate_support)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveDistribution:
        """The same with another batch shape; rows are drawn independently."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_batch_shape"})
        shape = torch.Size(batch_shape)
        if len(shape) < len(self.batch_shape) or any(
            n not in (1, m) for n, m in zip(reversed(self.batch_shape), reversed(shape), strict=False)
        ):
            raise ValueError(f"Expected batch_shape that {tuple(self.batch_shape)} broadcasts to; got {tuple(shape)}.")
        new._batch_shape = shape
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of the batch shape broadcast with the value's."""
        factors, shape = self._factors(value)
        return factors.sum(1).reshape(shape)

    def log_prob_sites(self, value: Tensor) -> Tensor:
        """log p(y_t | x, y_{<t}) of each site, in nats: (*batch, *sites). Their sum over sites is :meth:`log_prob`.

        Padding has 0. From the first site outside the support on, factors are -inf: their history is impossible.
        """
        factors, shape = self._factors(value)
        return self._to_event(factors).reshape(shape + self._sites)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Values (*sample_shape, *batch, *event), site by site from one state of the conditioner."""
        with torch.no_grad():
            return self._sequence(torch.Size(sample_shape), lambda d, *_: d.sample())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The same with gradients through the whole history, where the head's family is reparameterised."""
        if not self._probe.has_rsample:
            raise NotImplementedError(f"Expected a head whose family is reparameterised; got {self._family}.")
        if self.prefix is None and can_sweep(self.conditioner):
            shape = self._extended_shape(sample_shape)[: len(sample_shape) + len(self.batch_shape)]
            return self._event(_at_least_single(sweep(self, self._batch(shape)[0], prod(shape))), shape)
        return self._sequence(torch.Size(sample_shape), lambda d, *_: d.rsample())

    def conditional_on_prefix(self, prefix: Tensor) -> AutoregressiveDistribution:
        """The exact distribution of the remaining sites given the first ones.

        Args:
            prefix: (*batch, k, *site_shape), the first k sites in visiting order, k < T.

        Returns:
            The distribution over (T - k, *site_shape), in visiting order; its batch shape is broadcast with the prefix's.

        Raises:
            ValueError: for a prefix as long as the event, longer, or outside the support.
        """
        site_dims = len(self.head.site_shape)
        given, sites = sites_of_prefix(prefix, tuple(self.head.site_shape)), prod(self._sites)
        if not 0 < given < sites:
            raise ValueError(f"Expected a prefix of 1 to {sites - 1} sites (of {sites}); got {given}.")
        if self.prefix is not None:
            dim = prefix.dim() - 1 - site_dims
            before = self.prefix.shape[: self.prefix.dim() - 1 - site_dims]
            batch = broadcast_batches(distribution=before, prefix=prefix.shape[:dim])
            prefix = torch.cat(
                [p.expand(*batch, *p.shape[-1 - site_dims :]) for p in (self.prefix, prefix)], len(batch)
            )
        return AutoregressiveDistribution(
            self.conditioner,
            self.head,
            (sites - given, *self.head.site_shape),
            self.context,
            lengths=self._lengths,
            source_lengths=self.source_lengths,
            prefix=prefix,
            limit=self.limit,
            validate_args=self._validate_args,
        ).expand(broadcast_batches(distribution=self.batch_shape, prefix=prefix.shape[: prefix.dim() - 1 - site_dims]))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All N values of the event, (N, *batch, *event), the last site fastest; batch dims of 1 without ``expand``.

        Raises:
            NotImplementedError: if the head's support is not finite, and with lengths.
            ValueError: if N exceeds ``limit``.
        """
        if not self.has_enumerate_support:
            got = "lengths" if self._lengths is not None else self._family
            raise NotImplementedError(f"Expected a head that enumerates a finite support, and no lengths; got {got}.")
        zero = self._like.new_zeros(1, 1, self.head.num_params)
        sites = range(self._given, self._given + prod(self._sites))
        values, count = [], 1
        for t in sites:
            values.append(self._site(zero, t).enumerate_support()[:, 0, 0])
            count *= len(values[-1])
            if count > self.limit:
                raise ValueError(f"Expected a support of at most {self.limit} values (limit); got {count} or more.")
        index = torch.arange(count, device=zero.device)
        columns = []
        for value in reversed(values):
            columns.append(value[index % len(value)])
            index = index.div(len(value), rounding_mode="floor")
        support = self._to_event(torch.stack(columns[::-1], 1))
        support = support.reshape(count, *[1] * len(self.batch_shape), *self.event_shape)
        return support.expand(count, *self.batch_shape, *self.event_shape) if expand else support

    def to_uniform(self, value: Tensor) -> Tensor:
        r"""The Rosenblatt transform u_t = F_t(y_t | y_{<t}): independent uniforms if the values come from this distribution.

        For discrete families u_t = F(y_t-) + v p(y_t) with uniform noise v, so that calibration is exact there too. Padding
        has NaN.

        Raises:
            NotImplementedError: if the head's family has no cdf.

        Reference: Rosenblatt, "Remarks on a multivariate transformation", 1952; Smith, "Diagnostic checks of
        non-standard time series models", 1985.
        """
        d, y, inside, present, shape = self._evaluate(value)
        u = d.each(probability_integral, y) if isinstance(d, PerSite) else probability_integral(d, y)
        for mask in (inside, present):
            u = u if mask is None else torch.where(_wide(mask, u), u, torch.nan)
        return self._to_event(self._of_event(u, shape)).reshape(shape + self.event_shape)

    def from_uniform(self, u: Tensor) -> Tensor:
        """The inverse of :meth:`to_uniform`: y_t = F_t^{-1}(u_t | y_{<t}), site by site; u (*sample, *batch, *event).

        Raises:
            NotImplementedError: if the head's family has no icdf.
            TypeError: for u that is no tensor of floating-point numbers.
            ValueError: for u in half precision or outside [0, 1], and where a quantile is infinite.
        """
        check_uniforms(u)
        self._check_event("u", u)
        shape = broadcast_shapes(u.shape[: u.dim() - len(self.event_shape)], self.batch_shape)
        rows = self._to_order(u.expand(shape + self.event_shape).reshape(prod(shape), *self._layout))
        lengths = self._batch(shape)[1]
        if lengths is not None:
            rows = torch.where(_wide(self._present(lengths)[:, self._given :], rows), rows, 0.5)
        if not ((rows >= 0) & (rows <= 1)).all():
            raise ValueError("Expected u between 0 and 1; got values outside.")

        rows = torch.cat([rows, torch.full_like(rows[:, :1], 0.5)], 1)  # for what is no site

        def quantile(d: Any, t: Any, kept: Any) -> Tensor:
            y = icdf(d, rows[kept, t].unsqueeze(1))
            if not y.isfinite().all():
                raise ValueError(
                    f"Expected u with finite quantiles; got 0 or 1, or next to them, at site {t} (in visiting order)."
                )
            return y

        return self._sequence(shape[: len(shape) - len(self.batch_shape)], quantile)

    @property
    def _family(self) -> str:
        return type(getattr(self._probe, "base_dist", self._probe)).__name__

    @property
    def _layout(self) -> tuple[int, ...]:
        return (prod(self._sites), *self.head.site_shape)

    def _sequence(self, sample_shape: torch.Size, draw: Callable[[Any, Any, Any], Tensor]) -> Tensor:
        """Values (*sample_shape, *batch, *event), each site drawn from its distribution given those before it.

        ``draw`` is also told which site of the event it is, and of which rows.
        """
        every = slice(None)
        count = prod(sample_shape)
        context, _, prefix = self._batch(self.batch_shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # a sixth faster than no_grad
            phi, state = self.conditioner.start(context, prod(self.batch_shape))
            phi = phi.unsqueeze(1)
            if prefix is not None:
                phi, state = self.conditioner.extend(self._read(prefix), state)
                phi = phi[:, -1:]
            if count != 1:
                index = torch.arange(len(phi), device=phi.device).repeat(count)
                phi, state = phi.index_select(0, index), self.conditioner.reorder(state, index)
            ys, _ = self._walk(phi, state, lambda phi, t: draw(self._site(phi, t), t - self._given, every))
        return self._event(torch.cat(ys, 1), sample_shape + self.batch_shape)

    def _walk(self, phi: Tensor, state: Any, draw: Callable[[Tensor, int], Tensor]) -> tuple[list[Tensor], Any]:
        """The event's sites (B, 1, *site_shape) one by one, from the first one's parameters and state; the last state.

        Padding is drawn at phi = 0 and set to 0 before the network reads it. Drawn like other sites it could overflow, and its
        gradient would be NaN.
        """
        ys: list[Tensor] = []
        lengths = self._batch(self.batch_shape)[1]
        if lengths is not None:
            lengths = lengths.repeat(len(phi) // max(len(lengths), 1)).reshape(-1, 1, 1)
        for t in range(self._given, self._given + self._layout[0]):
            if ys:
                phi, state = self.conditioner.extend(self._read(ys[-1]), state)
            if lengths is None:
                ys.append(draw(phi, t))
            else:
                y = draw(torch.where(t < lengths, phi, phi.new_zeros(())), t)
                ys.append(torch.where(_wide((t < lengths).squeeze(2), y), y, y.new_zeros(())))
        return ys, state

    def _event(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Rows in visiting order as values (*shape, *event), with zeros for padding."""
        lengths = self._batch(shape)[1]
        if lengths is not None:
            y = torch.where(_wide(self._present(lengths)[:, self._given :], y), y, y.new_zeros(()))
        return self._to_event(y).reshape(shape + self.event_shape)

    def _factors(self, value: Tensor) -> tuple[Tensor, torch.Size]:
        """log p of the event's sites in visiting order, (B, T), and the batch shape that B rows have."""
        d, y, inside, present, shape = self._evaluate(value)
        log_prob = _at_least_single(d.log_prob(y))
        if present is not None:
            log_prob = torch.where(present, log_prob, 0.0)
        if inside is not None:
            log_prob = torch.where(inside.cummin(1)[0], log_prob, -torch.inf)
        return self._of_event(log_prob, shape), shape

    def _of_event(self, sites: Tensor, shape: torch.Size) -> Tensor:
        """Of what belongs to all sites (B, sites, ...) that of the event's, of B rows of a batch of this shape."""
        return sites[:, self._given :] if self._given else sites

    def _evaluate(self, value: Tensor) -> tuple[Any, Tensor, Tensor | None, Tensor | None, torch.Size]:
        """The distributions of all sites given the earlier ones, by one parallel pass.

        Returns:
            They, (B, sites); their values, replaced where outside the support or padding; which sites are inside (or
            padding) and which are present, (B, sites) or None where all are; the batch shape that B rows have.
        """
        y, present, shape = self._rows(value)
        mask = None if present is None and known_to_contain(self.head.support, y) else self._inside(y, present)
        if self._validate_args and mask is not None:
            self._check_inside(y, mask)
            mask = None
        read = y
        good = present if mask is None else mask if present is None else mask & present
        if good is not None:
            good = _wide(good, y)
            read, y = torch.where(good, y, y.new_zeros(())), torch.where(good, y, feasible_point(self.head.support, y))
        phi = self.conditioner(self._read(read), self._covariates(self._batch(shape)[0], present))
        return self._site(phi), y, mask, present, shape

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Prefix and value as rows (B, sites, *site_shape) in visiting order, which sites are present, the batch shape."""
        dims = len(self.event_shape)
        value = self._typed(value, "value")
        self._check_event("value", value)
        shape = broadcast_shapes(value.shape[: value.dim() - dims], self.batch_shape)
        y = self._to_order(value.expand(shape + self.event_shape).reshape(prod(shape), *self._layout))
        _, lengths, prefix = self._batch(shape)
        if prefix is not None:
            y = torch.cat([prefix, y], 1)
        return y, None if lengths is None else self._present(lengths), shape

    def _check_event(self, name: str, value: Tensor) -> None:
        dims = len(self.event_shape)
        if value.shape[value.dim() - dims :] != self.event_shape or value.dim() < dims:
            raise ValueError(
                f"Expected {name}.shape[-{dims}:] == {tuple(self.event_shape)} (event_shape); got {tuple(value.shape)}."
            )

    def _typed(self, value: Tensor, name: str) -> Tensor:
        """Values in the dtype of the conditioner, or single for half precision; integers and Booleans for numbers of the same value."""
        value = numbers(name, value)
        if value.is_floating_point():
            if isinstance(self.conditioner.site, tuple):
                single = value.dtype == torch.float32 and self._like.dtype.itemsize < 4
                check_like(name, value, self._like.float() if single else self._like)
            return value
        return value.long() if isinstance(self.conditioner.site, int) else value.to(self._like.dtype)

    def _inside(self, y: Tensor, present: Tensor | None) -> Tensor:
        inside = contains(self.head.support, y)
        return inside if present is None else inside | ~present

    def _check_inside(self, y: Tensor, inside: Tensor, name: str = "value") -> None:
        if not torch._is_all_true(inside):  # which vmap knows, unlike all()
            row, site = (~inside).nonzero()[0].tolist()
            raise ValueError(
                f"Expected {name} within the support of the head, {self.head.support}; got {y[row, site].tolist()} at site "
                f"{site} (in visiting order)."
            )

    def _check_prefix(self) -> None:
        _, lengths, prefix = self._batch(self.batch_shape)
        y = prefix.new_zeros(len(prefix), self._given + self._layout[0], *self.head.site_shape)
        y = feasible_point(self.head.support, y).expand(y.shape).to(prefix.dtype)
        y = torch.cat([prefix, y[:, self._given :]], 1)
        self._check_inside(y, self._inside(y, None if lengths is None else self._present(lengths)), "prefix")

    def _batch(self, shape: torch.Size) -> tuple[Any, ...]:
        """Context, lengths and prefix, or None, as one row each of a batch of this shape; no covariates of padding."""

        def rows(tensor: Tensor | None, dims: int) -> Any:
            if tensor is None:
                return None
            event = tensor.shape[tensor.dim() - dims :]
            return tensor.expand(shape + event).reshape(prod(shape), *event)

        context, lengths = rows(self.context, self._context_dims), rows(self._lengths, 0)
        context = self._covariates(context, None if lengths is None else self._present(lengths))
        if self.source_lengths is not None:
            context = Padded(context, rows(self.source_lengths, 0))
        return context, lengths, rows(self.prefix, 1 + len(self.head.site_shape))

    def _covariates(self, context: Any, present: Tensor | None) -> Any:
        """The context, with zeros for the covariates of sites (B, T) that are not present."""
        if present is None or not isinstance(self.conditioner.context, Steps):
            return context
        return torch.where(present.unsqueeze(2), context, 0.0)

    def _present(self, lengths: Tensor) -> Tensor:
        return torch.arange(self._given + self._layout[0], device=lengths.device) < lengths.unsqueeze(1)

    def _read(self, y: Tensor) -> Tensor:
        """Sites as the conditioner reads them: numbers in its dtype, categories as they are."""
        return y.to(self._like.dtype) if isinstance(self.conditioner.site, tuple) else y

    def _to_order(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows.index_select(1, self.order)

    def _to_event(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows.index_select(1, self.order.argsort())


class _Events(constraints.Constraint):
    """Events whose sites, padding left out, lie in the support of their head."""

    def __init__(self, d: AutoregressiveDistribution) -> None:
        self.d, self.event_dim, self.is_discrete = d, len(d.event_shape), d.head.support.is_discrete

    def check(self, value: Tensor) -> Tensor:
        y, present, shape = self.d._rows(value)
        return self.d._inside(y, present).all(1).reshape(shape)

    def feasible_point(self, like: Tensor) -> Tensor:
        """Some value inside, of the shape of ``like`` broadcast with the batch."""
        y, _, shape = self.d._rows(like)
        y = self.d._of_event(feasible_point(self.d.head.support, y).expand_as(y), shape)
        return self.d._to_event(y).reshape(shape + self.d.event_shape)


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision as single, which is enough for sums over sites."""
    return x if x.dtype.itemsize >= 4 or not x.is_floating_point() else x.float()


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) as (B, T, 1, ...), for sites of any shape."""
    return mask.reshape(*mask.shape, *[1] * (like.dim() - 2))
