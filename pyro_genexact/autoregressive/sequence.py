"""SequenceDistribution: sequences of random length, which stop at their first end."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..conditioners.site_loop import COMPACT_BELOW
from ..core.checks import check_sizes
from ..core.functional import at_hand, visible
from ..core.lengths import checked_lengths, expand_mask
from ..core.shapes import broadcast_batches, shape_of
from ..core.values import numbers
from ..families.categorical import continuing
from ..numerics.fixed_point import Solver
from .chain_rule import ChainRule
from .checks import check_ends, check_uniforms, shape_of_prefix, sites_of
from .layout import SequenceLayout
from .site_by_site import ChainRuleDistribution, EventConstraint


class TerminationCurve(NamedTuple):
    """Probability that a sequence has ended, by site.

    Attributes:
        probability: (*batch, T), where [t] is the probability that one of the sites 0 ... t is an end, that is, of a
            length of at most t (at most t + 1 with ``eos=None``, where the end counts as a site).
        standard_error: (*batch, T), the Monte Carlo error of ``probability``; 0 where all samples agree to rounding, as
            they do if the probability is exact.
    """

    probability: Tensor
    standard_error: Tensor


class SequenceDistribution(ChainRuleDistribution):
    """Sequences of random length: p(y | x) = prod_{t <= n} p(y_t | x, y_{<t}), where n is the first site that is an end.

    An event is an array of max_len sites. All sites after the first ``eos`` are ``eos``. An array without ``eos``
    represents all longer sequences that start with it, so that the probabilities of all arrays sum to 1. With
    ``eos=None`` the head models which sites are ends (:class:`~pyro_genexact.heads.Stopped`), and the sites after an
    end are 0.

    ``log_prob`` is in nats. The batch shape is that of context, source_lengths, prefix and prefix_lengths, broadcast.

    Cost: ``log_prob`` is one parallel pass of the conditioner. ``sample`` extends the conditioner's state site by site,
    for the rows that have not ended, until all have.

    Args:
        conditioner: predicts the parameters of each site. The distribution keeps using its present weights.
        head: makes the distribution of each site. The distribution keeps using its present weights.
        eos: the category that ends a sequence; None if the head models the end.
        max_len: T, the number of sites of an array.
        context: the context (*batch, C), covariates (*batch, T, C), or a source (*batch, S, C) or ``PaddedSequence``;
            None if the conditioner has no context.
        source_lengths: integers (*batch) in 0 ... S, the length of each row's ``Source``; by default S.
        prefix: (*batch, k, *site_shape), the sites before those of the event.
        prefix_lengths: integers (*batch) in 0 ... k, the number of prefix sites of each row; by default k.
        solver: how to draw samples: None or "sequential" for a loop over the sites, "fixed_point" or a
            :class:`~pyro_genexact.numerics.FixedPoint` for passes over all sites, which require a head with an icdf.
            ``passes`` is then the number of passes of the last draw.
        limit: size of the largest support that ``enumerate_support`` enumerates.
        validate_args: whether to check values. Without checks, arrays that are not sequences have log_prob -inf.

    Raises:
        TypeError: if ``eos`` is not an integer, or is None although the head does not model the end.
        ValueError: if conditioner, head and max_len do not match, or ``eos`` is outside the support. When validating,
            also for a prefix or value that is not a sequence.

    Reference: Du et al., "A measure-theoretic characterization of tight language models", ACL 2023.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Categorical(3)
        >>> net = conditioners.Recurrent(3, head.num_params, hidden=8)
        >>> d = SequenceDistribution(net, head, eos=0, max_len=4)
        >>> d.sample((5,)).shape, d.lengths_of(torch.tensor([[2, 1, 0, 0], [1, 1, 2, 1]]))
        (torch.Size([5, 4]), tensor([2, 4]))
        >>> strings = d.enumerate_support()
        >>> len(strings), bool(d.log_prob(strings).logsumexp(0).abs() < 1e-5)
        (31, True)
    """

    layout: SequenceLayout
    has_rsample = False  # lengths are discrete

    def __init__(
        self,
        conditioner: Conditioner,
        head: Head,
        eos: int | None,
        max_len: int,
        context: Tensor | None = None,
        *,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        solver: Solver = None,
        limit: int = 2**16,
        validate_args: bool | None = None,
    ) -> None:
        check_sizes(1, max_len=max_len)
        check_ends(head, eos)
        site_shape = tuple(head.site_shape)
        if prefix_lengths is not None and prefix is None:
            raise ValueError("Expected prefix_lengths=None without a prefix; got prefix_lengths.")
        batch, given = (torch.Size(), 0) if prefix is None else shape_of_prefix(prefix, site_shape)
        if prefix is not None and prefix_lengths is not None:
            prefix_lengths = checked_lengths(prefix_lengths, given, "prefix_lengths", "sites of the prefix")
            joint = broadcast_batches(prefix=batch, prefix_lengths=prefix_lengths.shape)
            prefix = prefix.expand(joint + prefix.shape[len(batch) :])
        check_sizes(1, limit=limit)
        dims = sites_of(conditioner, head, shape_of((max_len, *site_shape)), given)
        chain = ChainRule.of(conditioner, head, context, source_lengths, given + max_len, given=given)
        prefix = None if prefix is None else chain.typed("prefix", prefix)
        layout = SequenceLayout(chain.head, dims, prefix, eos=eos, prefix_lengths=prefix_lengths)
        super().__init__(chain, layout, solver, limit, validate_args)

    eos = property(
        lambda self: self.layout.eos, doc="The category that ends a sequence; None if the head models the end."
    )
    max_len = property(lambda self: self.layout.count, doc="T, the number of sites of an array.")
    prefix_lengths = property(
        lambda self: self.layout.prefix_lengths, doc="The number of prefix sites of each row (*batch), or None for k."
    )

    _arguments = ("eos", "max_len", "prefix_lengths")

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint of arrays that are sequences: only ``eos`` (or 0) after the first end."""
        return EventConstraint(self)

    def lengths_of(self, value: Tensor) -> Tensor:
        """Returns the number of sites (*) before the first ``eos``; with ``eos=None``, up to and including the end.

        The length is at most max_len.
        """
        value = numbers("value", value)
        self._batch_of("value", value)
        before = (self.layout.ends(value).cumsum(-1) == 0).sum(-1)
        if self.eos is not None:
            return before
        lengths, over = (before + 1).clamp(max=self.max_len), self.layout.over(self.batch_shape)
        return lengths if over is None else torch.where(over.reshape(self.batch_shape), 0, lengths)

    def with_head(self, head: Head) -> SequenceDistribution:
        """Returns the distribution with the same conditioner and another head, such as a decoding filter."""
        return self._like_this(head=head)

    def conditional_on_prefix(
        self, prefix: Tensor, lengths: Tensor | None = None, max_len: int | None = None
    ) -> SequenceDistribution:
        """Returns the exact distribution of the remaining sites given the first ones.

        Args:
            prefix: (*batch, k, *site_shape), the first k sites. After a prefix with an end, all sites are ends.
            lengths: integers (*batch) in 0 ... k, the number of prefix sites of each row; by default k.
            max_len: number of sites of the new arrays; by default the number of sites left after k.

        Returns:
            The distribution over (max_len, *site_shape). Its batch shape is broadcast with the prefix's.

        Raises:
            TypeError: if the prefix is not a tensor.
            ValueError: if the prefix is not a sequence, leaves no site, or has a batch shape that does not broadcast.
        """
        batch, given = shape_of_prefix(prefix, tuple(self.head.site_shape))
        if max_len is None and given >= self.max_len:
            raise ValueError(
                f"Expected a prefix of 1 to {self.max_len - 1} of {self.max_len} sites; got {given} sites."
            )
        if lengths is not None:
            lengths = checked_lengths(lengths, given, "lengths", "sites of the prefix")
        batch = broadcast_batches(
            distribution=self.batch_shape,
            prefix=batch,
            **({} if lengths is None else {"lengths": lengths.shape}),
        )
        before: Any = self.layout.given if self.prefix_lengths is None else self.prefix_lengths
        if self.prefix_lengths is not None or lengths is not None:
            lengths = before + (given if lengths is None else lengths)
        prefix = self.layout.after_prefix(prefix, batch)
        left = self.max_len - given if max_len is None else max_len
        return self._like_this(prefix=prefix, prefix_lengths=lengths, max_len=left)

    def termination_curve(self, max_len: int | None = None, num_samples: int = 1000) -> TerminationCurve:
        """Estimates the probability that a sequence has at most t sites before its end, for t = 0 ... max_len - 1.

            P(length > t) = E[prod_{s <= t} (1 - p(end | x, y_{<s}))],

        where the expectation is over sequences drawn as if they never ended. If the probability of an end does not
        depend on the history, all terms are equal and the curve is exact. Otherwise it is unbiased, and
        ``standard_error`` is the standard error of the mean; it is 0 where all samples agree to rounding, possibly by
        chance. If the curve converges to less than 1, sequences that never end have positive probability: the model is
        not tight.

        Cost: one sample of num_samples rows up to the last site.

        Args:
            max_len: T of the curve; by default that of the distribution.
            num_samples: number of sequences to draw for each row.

        Returns:
            The probabilities and their standard errors, (*batch, max_len).

        Raises:
            NotImplementedError: if ``eos`` is one of infinitely many values.
            ValueError: if num_samples is less than 2.

        Example:
            >>> from pyro_genexact import conditioners, heads
            >>> head = heads.Categorical(2)
            >>> net = conditioners.Independent(4, 2, site=2)  # nearly fair coins
            >>> d = SequenceDistribution(net, head, eos=0, max_len=4)
            >>> curve = d.termination_curve()
            >>> curve.probability.shape, bool((curve.standard_error < 1e-6).all())
            (torch.Size([4]), True)
        """
        check_sizes(2, num_samples=num_samples)
        if self.eos is not None and not self.chain.probe.has_enumerate_support:
            raise NotImplementedError(f"Expected a head that enumerates a finite support; got {self.chain.family}.")
        d = self if max_len is None else self._like_this(max_len=max_len)
        shape = (num_samples, *d.batch_shape)
        dtype = torch.promote_types(d.chain.like.dtype, torch.float32)
        going_on = d.chain.like.new_full((prod(shape), d.max_len + 1), -torch.inf, dtype=dtype)

        def draw(site: Any, t: Any, rows: Tensor) -> Tensor:
            rest, log_p = site.continuing() if d.eos is None else continuing(site, d.eos)
            going_on[rows, t] = log_p.squeeze(1)
            return rest.sample()

        with torch.no_grad():
            d.site_by_site(draw, (num_samples,))
            log_survival = going_on[:, : d.max_len].cumsum(1).reshape(*shape, d.max_len)
            if (over := d.layout.over(d.batch_shape)) is not None:
                log_survival = torch.where(over.reshape(*d.batch_shape, 1), -torch.inf, log_survival)
            both = torch.stack([log_survival.exp(), -log_survival.expm1()])
            mean = both.mean(1)
            # not torch.var, which warns if there are no rows
            variance = (both - mean.unsqueeze(1)).square().sum(1) / (num_samples - 1)
            of_survival, of_end = variance.sqrt()
            spread = torch.where(mean[0] < mean[1], of_survival, of_end)  # equal except for rounding
            rounding = 64 * torch.finfo(spread.dtype).eps * torch.special.entr(mean).sum(0)
            return TerminationCurve(mean[1], torch.where(spread <= rounding, 0.0, spread / num_samples**0.5))

    def from_uniform(self, u: Tensor) -> Tensor:
        """Inverts ``to_uniform`` site by site, for u (*sample, *batch, T); values after the end are ignored.

        Raises:
            NotImplementedError: if the head's family has no icdf.
            TypeError: if u is not a floating-point tensor.
            ValueError: if u is in half precision, outside [0, 1] or NaN before the end, and where a quantile is
                infinite.
        """
        check_uniforms(u)
        missing = u.isnan()
        y = super().from_uniform(torch.where(missing, 0.5, u))
        _, present, shape = self.rows_of(y)
        if present is not None and (missing & self.layout.of_event(present, shape).reshape(y.shape)).any():
            raise ValueError("Expected u between 0 and 1 up to the end of a sequence; got NaN.")
        return y

    def site_by_site(self, draw: Callable[[Any, Any, Any], Tensor], sample_shape: Any = ()) -> Tensor:
        """Draws samples (*sample_shape, *batch, *event); rows leave the computation when they end."""
        chain, layout, batch_shape, count = self.chain, self.layout, self.batch_shape, prod(sample_shape)
        prefix, starts, over = layout.prefix_rows(batch_shape), layout.starts(batch_shape), layout.over(batch_shape)
        first, stop = layout.span(batch_shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # about 15% faster than no_grad
            loop = chain.loop(batch_shape, stop, None if prefix is None else prefix[:, :first])
            rows = torch.arange(count * len(loop.phi), device=loop.phi.device)
            of = rows % max(len(loop.phi), 1)
            at: Any = slice(None) if starts is None else rows  # a slice is faster while all rows remain
            done = torch.zeros_like(rows, dtype=torch.bool) if over is None else over[of]
            some_done, free, readable = over is not None, at_hand(done), visible(done)
            if count != 1:
                loop.take(of)
            for t, phi in loop:
                site: Any = t - first if starts is None else layout.site_of(t, starts[of])
                y = draw(chain.site(phi, t), site, at)
                if starts is not None and prefix is not None and t < layout.given:
                    y = torch.where(expand_mask((t < starts[of]).unsqueeze(1), y), prefix[of, t].unsqueeze(1).to(y), y)
                if t == first:  # the additional column receives draws outside a row's own sites
                    out = layout.filler(y, len(rows), layout.count + 1)
                if some_done:
                    y = torch.where(expand_mask(done.unsqueeze(1), y), layout.filler(y), y)
                out[at, site] = y.squeeze(1)
                if t == stop - 1:
                    break
                done = done | layout.ends(y).squeeze(1)
                if starts is not None:
                    done = done | (site == layout.count - 1)
                look = free or (readable and _waits_after(t + 1 - first))
                left = len(rows) - int(done.sum()) if look else len(rows)
                if not left:
                    break
                some_done, kept = left < len(rows) or not look, None
                if left <= COMPACT_BELOW * len(rows):
                    # a device would wait for the number of rows
                    kept = (~done).nonzero().squeeze(1) if free else done.int().argsort(stable=True)[:left]
                    at = rows = rows[kept]
                    of, done, some_done, y = of[kept], done[kept], False, y.index_select(0, kept)
                loop.read(chain.read(y), kept)
        return layout.events(out[:, : layout.count].clone(), torch.Size(sample_shape) + batch_shape)


def _waits_after(sites: int) -> bool:
    """Whether a loop on a device waits for the ends of its rows after so many sites: 1, ..., 8, 10, ..., 16, 20, ...

    If all rows have ended, it has computed at most a quarter too many sites.
    """
    return sites % (1 << max(sites.bit_length() - 3, 0)) == 0
