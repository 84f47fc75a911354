"""AutoregressiveDistribution: the chain rule over a fixed number of sites, with a prefix or lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..core.checks import check_sizes, permutation
from ..core.independent import independent
from ..core.lengths import checked_lengths
from ..core.settable import Settable
from ..core.shapes import broadcast_batches, shape_of
from ..core.values import at_least_single
from ..families.per_site import PerSiteConstraint
from .chain_rule import ChainRule
from .checks import shape_of_prefix, sites_of
from .layout import Layout
from .reparameterised import can_sweep, sweep
from .site_by_site import ChainRuleDistribution, EventConstraint


class AutoregressiveDistribution(ChainRuleDistribution):
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
        context: (*batch, C), with ``Covariates`` (*batch, T, C) in the order of the event, with ``Source`` (*batch, S, C)
            or a ``PaddedSequence`` of it and its lengths, or None where the conditioner takes none.
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
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Bernoulli()
        >>> d = AutoregressiveDistribution(conditioners.MADE(6, head.num_params), head, (2, 3))
        >>> d.sample((4,)).shape, d.log_prob(torch.ones(2, 3)).shape
        (torch.Size([4, 2, 3]), torch.Size([]))
        >>> bool((d.log_prob(d.enumerate_support()).logsumexp(0).abs() < 1e-5).all())
        True
    """

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
        event_shape = shape_of(event_shape)
        given = 0 if prefix is None else shape_of_prefix(prefix, tuple(head.site_shape))[1]
        dims = sites_of(conditioner, head, event_shape, given)
        total = given + prod(dims)
        order = None if order is None else permutation(order, prod(dims))
        lengths = None if lengths is None else checked_lengths(lengths, total)
        chain = ChainRule.of(conditioner, head, context, source_lengths, total, order, given)
        layout = Layout(
            chain.head,
            dims,
            None if prefix is None else chain.typed("prefix", prefix),
            None if order is None else order.to(chain.like.device),
            lengths,
        )
        super().__init__(chain, layout, limit, validate_args)

    _arguments = ("event_shape", "order", "lengths")

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Of the event; with lengths it looks at no padding."""
        site: Any = self.head.support
        if self.lengths is None and not isinstance(site, PerSiteConstraint):
            return independent(site, len(self.event_shape) - site.event_dim)
        if self.lengths is None and len(self.layout.dims) == 1 and not (self.order is not None and self.order.is_meta):
            return PerSiteConstraint(site.parts[self.layout.given :]).joint(self.order)
        return EventConstraint(self)

    order = property(attrgetter("layout.order"), doc="(T,), the site visited as number i, or None for raster order.")
    lengths = property(
        attrgetter("layout.lengths"), doc="(*batch), how many sites a row has, or None where all have all."
    )

    @Settable
    def has_rsample(self) -> bool:
        """Whether the head's family is reparameterised."""
        return bool(self.chain.probe.has_rsample)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """The same as ``sample``, with gradients through the whole history, where the head's family is reparameterised."""
        chain, layout = self.chain, self.layout
        if self.prefix is not None or not chain.probe.has_rsample or not can_sweep(self.conditioner):
            return super().rsample(sample_shape)
        shape = torch.Size(sample_shape) + self.batch_shape
        y = sweep(chain, chain.contexts(shape, layout.present(shape)), layout.length_rows(shape), prod(shape))
        return layout.events(at_least_single(y), shape)

    def site_by_site(self, draw: Callable[[Any, Any, Any], Tensor], sample_shape: Any = ()) -> Tensor:
        chain, layout, every = self.chain, self.layout, slice(None)
        shape = torch.Size(sample_shape) + self.batch_shape
        first, stop = layout.span(shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # a sixth faster than no_grad
            prefix, present = layout.prefix_rows(self.batch_shape), layout.present(self.batch_shape)
            loop = chain.loop(self.batch_shape, stop, prefix, present)
            if (count := prod(sample_shape)) != 1:
                loop.take(torch.arange(len(loop.phi), device=loop.phi.device).repeat(count))
            lengths = layout.length_rows(shape)
            ys = chain.draw(loop, lambda phi, t: draw(chain.site(phi, t), t - first, every), lengths)
        return layout.events(torch.cat(ys, 1), shape)  # a normal tensor, unlike those made in inference mode

    def conditional_on_prefix(self, prefix: Tensor) -> AutoregressiveDistribution:
        """The exact distribution of the remaining sites given the first ones.

        Args:
            prefix: (*batch, k, *site_shape), the first k sites in visiting order, k < T.

        Returns:
            The distribution over (T - k, *site_shape), in visiting order; its batch shape is broadcast with the prefix's.

        Raises:
            ValueError: for a prefix as long as the event, longer, or outside the support.
        """
        batch, given = shape_of_prefix(prefix, tuple(self.head.site_shape))
        left = self.layout.count - given
        if left < 1:
            raise ValueError(f"Expected a prefix of 1 to {left + given - 1} sites (of {left + given}); got {given}.")
        if self.layout.prefix_batch:
            batch = broadcast_batches(distribution=self.layout.prefix_batch, prefix=batch)
        prefix = self.layout.after_prefix(prefix, batch)
        return self._like_this(event_shape=(left, *self.head.site_shape), prefix=prefix, order=None)
