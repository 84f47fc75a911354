"""AutoregressiveDistribution: the chain rule over a fixed number of sites, optionally with a prefix or lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
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
from ..numerics.fixed_point import Solver
from .chain_rule import ChainRule
from .checks import shape_of_prefix, sites_of
from .layout import Layout
from .reparameterised import can_sweep, sweep
from .site_by_site import ChainRuleDistribution, EventConstraint


class AutoregressiveDistribution(ChainRuleDistribution):
    """Autoregressive distribution p(y | x) = prod_t p(y_t | x, y_{<t}); a network predicts the parameters of each factor.

    The leading dims of an event are its T sites, visited in raster order or in ``order``; the trailing dims are those
    of a site (``head.site_shape``). With ``lengths``, the sites from a row's length on are padding: ``log_prob``
    ignores their values, their gradients are zero, and samples are 0 there. With a ``prefix``, the event consists of
    the sites after it.

    ``log_prob`` is in nats. The batch shape is that of context, lengths and prefix, broadcast.

    Cost: ``log_prob`` is one parallel pass of the conditioner; ``sample`` extends the conditioner's state site by site.

    A conditioner in half precision, or under autocast, predicts parameters that the head reads in single precision.
    Then log-probabilities and samples are in float32, and values may have either dtype.

    Args:
        conditioner: predicts the parameters of each site. The distribution keeps using its present weights.
        head: makes the distribution of each site. The distribution keeps using its present weights.
        event_shape: the dims of the sites, followed by ``head.site_shape``.
        context: the context (*batch, C), covariates (*batch, T, C) in the order of the event, or a source (*batch, S,
            C) or ``PaddedSequence``; None if the conditioner has no context.
        order: integers (T,) where ``order[i]`` is the index of the i-th site to visit; by default that of the
            conditioner, which is raster order except for images (``PixelCNN`` visits the channels of a pixel together).
        lengths: integers (*batch) in 0 ... T, the number of sites of each row, in visiting order.
        source_lengths: integers (*batch) in 0 ... S, the length of each row's ``Source``; by default S.
        prefix: (*batch, k, *site_shape), the values of k sites before those of the event.
        solver: how to draw samples: None or "sequential" for a loop over the sites, "fixed_point" or a
            :class:`~pyro_genexact.numerics.FixedPoint` for passes over all sites, which require a head with an icdf.
            ``passes`` is then the number of passes of the last draw.
        limit: size of the largest support that ``enumerate_support`` enumerates.
        validate_args: whether to check values. Without checks, values outside the support have log_prob -inf.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if conditioner, head and event do not match, lengths are outside 0 ... T, or a prefix is outside the
            support. When validating, also for values outside the support.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Bernoulli()
        >>> net = conditioners.MADE(6, head.num_params)
        >>> d = AutoregressiveDistribution(net, head, (2, 3))
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
        solver: Solver = None,
        limit: int = 2**16,
        validate_args: bool | None = None,
    ) -> None:
        check_sizes(1, limit=limit)
        event_shape = shape_of(event_shape)
        given = 0 if prefix is None else shape_of_prefix(prefix, tuple(head.site_shape))[1]
        dims = sites_of(conditioner, head, event_shape, given)
        total = given + prod(dims)
        order = conditioner.order_of(dims) if order is None else permutation(order, prod(dims))
        lengths = None if lengths is None else checked_lengths(lengths, total)
        chain = ChainRule.of(conditioner, head, context, source_lengths, total, order, given)
        layout = Layout(
            chain.head,
            dims,
            None if prefix is None else chain.typed("prefix", prefix),
            None if order is None else order.to(chain.like.device),
            lengths,
        )
        super().__init__(chain, layout, solver, limit, validate_args)

    _arguments = ("event_shape", "order", "lengths")

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint of events; with lengths it ignores padding."""
        site: Any = self.head.support
        if self.lengths is None and not isinstance(site, PerSiteConstraint):
            return independent(site, len(self.event_shape) - site.event_dim)
        if self.lengths is None and len(self.layout.dims) == 1 and not (self.order is not None and self.order.is_meta):
            return PerSiteConstraint(site.parts[self.layout.given :]).joint(self.order)
        return EventConstraint(self)

    order = property(lambda self: self.layout.order, doc="The visiting order (T,), or None for raster order.")
    lengths = property(
        lambda self: self.layout.lengths, doc="The number of sites of each row (*batch), or None for all sites."
    )

    @Settable
    def has_rsample(self) -> bool:
        """Whether the head's family is reparameterised."""
        return bool(self.chain.probe.has_rsample)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Returns samples with gradients through the whole history, if the head's family is reparameterised."""
        chain, layout = self.chain, self.layout
        if (
            self.prefix is not None
            or self.solver is not None
            or not chain.probe.has_rsample
            or not can_sweep(self.conditioner)
        ):
            return super().rsample(sample_shape)
        shape = torch.Size(sample_shape) + self.batch_shape
        y = sweep(chain, chain.contexts(shape, layout.present(shape)), layout.length_rows(shape), prod(shape))
        return layout.events(at_least_single(y), shape)

    def site_by_site(self, draw: Callable[[Any, Any, Any], Tensor], sample_shape: Any = ()) -> Tensor:
        """Draws samples (*sample_shape, *batch, *event); ``draw(site, t, rows)`` returns the values of site t."""
        chain, layout, every = self.chain, self.layout, slice(None)
        shape = torch.Size(sample_shape) + self.batch_shape
        first, stop = layout.span(shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # about 15% faster than no_grad
            prefix, present = layout.prefix_rows(self.batch_shape), layout.present(self.batch_shape)
            loop = chain.loop(self.batch_shape, stop, prefix, present)
            if (count := prod(sample_shape)) != 1:
                loop.take(torch.arange(len(loop.phi), device=loop.phi.device).repeat(count))
            lengths = layout.length_rows(shape)
            ys = chain.draw(loop, lambda phi, t: draw(chain.site(phi, t), t - first, every), lengths)
        return layout.events(torch.cat(ys, 1), shape)  # outside inference mode, so that it is a normal tensor

    def _in_one_call(self, rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        chain, layout = self.chain, self.layout
        if self.prefix is not None or self.lengths is not None or torch.is_grad_enabled():
            return None
        found = chain.conditioner.native_loop(chain.head, rows[:, :-1], chain.contexts(shape))
        return None if found is None else (layout.arrange(found.values, shape), found.totals)

    def conditional_on_prefix(self, prefix: Tensor) -> AutoregressiveDistribution:
        """Returns the exact distribution of the remaining sites given the first ones.

        Args:
            prefix: (*batch, k, *site_shape), the first k sites in visiting order, with k < T.

        Returns:
            The distribution over (T - k, *site_shape), in visiting order. Its batch shape is broadcast with the
            prefix's.

        Raises:
            TypeError: if the prefix is not a tensor.
            ValueError: if the prefix has T or more sites, or is outside the support.
        """
        batch, given = shape_of_prefix(prefix, tuple(self.head.site_shape))
        left = self.layout.count - given
        if left < 1:
            raise ValueError(
                f"Expected a prefix of 1 to {left + given - 1} of {left + given} sites; got {given} sites."
            )
        if self.layout.prefix_batch:
            batch = broadcast_batches(distribution=self.layout.prefix_batch, prefix=batch)
        prefix = self.layout.after_prefix(prefix, batch)
        return self._like_this(event_shape=(left, *self.head.site_shape), prefix=prefix, order=None)
