"""SequenceDistribution: sequences of random length, each of which stops at its first end."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..conditioners.site_loop import COMPACT_BELOW
from ..core.checks import check_sizes
from ..core.functional import visible
from ..core.lengths import checked_lengths, expand_mask
from ..core.shapes import broadcast_batches, shape_of
from ..core.values import numbers
from ..families.categorical import continuing
from .chain_rule import ChainRule
from .checks import check_ends, check_uniforms, shape_of_prefix, sites_of
from .layout import SequenceLayout
from .site_by_site import ChainRuleDistribution, EventConstraint


class TerminationCurve(NamedTuple):
    """How probable it is that a sequence ends in time.

    Attributes:
        probability: (*batch, T), [t] that one of the sites 0 ... t is an end: of a length of at most t (of t + 1 with
            ``eos=None``, where the end counts).
        standard_error: (*batch, T), 0 where all samples agree to rounding, as they do where the probability is exact.
    """

    probability: Tensor
    standard_error: Tensor


class SequenceDistribution(ChainRuleDistribution):
    r"""Sequences of random length: p(y | x) = prod_{t <= n} p(y_t | x, y_{<t}), n the first site that is an end.

    An event is an array of max_len sites. After the first ``eos`` all of it is ``eos``; an array without one stands for all
    sequences that are longer, so that the probabilities of all arrays add up to 1. With ``eos=None`` the head marks which
    sites are ends (:class:`~pyro_genexact.heads.Stopped`), and zeros follow them.

    Cost: ``log_prob`` is one parallel pass of the conditioner. ``sample`` extends one state site by site, of the rows that go
    on, until none does.

    Args:
        conditioner: reads the sites; the weights that it has now are used from here on.
        head: makes the distribution of each site.
        eos: the symbol that ends a sequence; None where the head marks it.
        max_len: T, sites of an array.
        context: (*batch, C), with ``Covariates`` (*batch, T, C), with ``Source`` (*batch, S, C) or a ``PaddedSequence`` of it and its
            lengths, or None.
        source_lengths: (*batch) integers 0 ... S, how long a row's ``Source`` is; by default S.
        prefix: (*batch, k, *site_shape), the sites before those of the event.
        prefix_lengths: (*batch) integers 0 ... k, how many of them a row has; by default k.
        limit: the largest support that is enumerated.
        validate_args: whether values are checked; without, arrays that are no sequences have log_prob -inf.

    Raises:
        TypeError: for an ``eos`` that is no integer, and for a head that marks no ends where it is None.
        ValueError: for a conditioner, head and max_len that do not fit each other, an ``eos`` outside the support, and (when
            validating) a prefix or value that is no sequence.

    Shapes: the batch shape is that of context, source_lengths, prefix and prefix_lengths, broadcast.

    Reference: Du et al., "A measure-theoretic characterization of tight language models", ACL 2023.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Categorical(3)
        >>> d = SequenceDistribution(conditioners.Recurrent(3, head.num_params, hidden=8), head, eos=0, max_len=4)
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
        limit: int = 2**16,
        validate_args: bool | None = None,
    ) -> None:
        check_sizes(1, max_len=max_len)
        check_ends(head, eos)
        site_shape = tuple(head.site_shape)
        if prefix_lengths is not None and prefix is None:
            raise ValueError("Expected no prefix_lengths without a prefix; got some.")
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
        super().__init__(chain, layout, limit, validate_args)

    eos = property(attrgetter("layout.eos"), doc="The symbol that ends a sequence; None where the head marks it.")
    max_len = property(attrgetter("layout.count"), doc="T, sites of an array.")
    prefix_lengths = property(
        attrgetter("layout.prefix_lengths"), doc="(*batch), of the prefix, or None where all are k."
    )

    _arguments = ("eos", "max_len", "prefix_lengths")

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Arrays that are sequences: nothing but ends after the first."""
        return EventConstraint(self)

    def lengths_of(self, value: Tensor) -> Tensor:
        """How many sites (*) stand before the first ``eos``; with ``eos=None`` up to the end, which counts. At most max_len."""
        value = numbers("value", value)
        self._batch_of("value", value)
        before = (self.layout.ends(value).cumsum(-1) == 0).sum(-1)
        if self.eos is not None:
            return before
        lengths, over = (before + 1).clamp(max=self.max_len), self.layout.over(self.batch_shape)
        return lengths if over is None else torch.where(over.reshape(self.batch_shape), 0, lengths)

    def with_head(self, head: Head) -> SequenceDistribution:
        """The same conditioner under another head of as many parameters, such as a filter of this one's."""
        return self._like_this(head=head)

    def conditional_on_prefix(
        self, prefix: Tensor, lengths: Tensor | None = None, max_len: int | None = None
    ) -> SequenceDistribution:
        """The exact distribution of what follows the first sites.

        Args:
            prefix: (*batch, k, *site_shape), the first k sites. What follows an end is an array of ends.
            lengths: (*batch) integers 0 ... k, how many of them a row has; by default k.
            max_len: sites of the arrays that follow; by default as many as are left after k.

        Returns:
            The distribution over (max_len, *site_shape); its batch shape is broadcast with the prefix's.

        Raises:
            ValueError: for a prefix that is no sequence, that leaves no site, or of another batch.
        """
        batch, given = shape_of_prefix(prefix, tuple(self.head.site_shape))
        if max_len is None and given >= self.max_len:
            raise ValueError(f"Expected a prefix of 1 to {self.max_len - 1} sites (of {self.max_len}); got {given}.")
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
        r"""The probability that a sequence has at most t sites before its end, for t = 0 ... max_len - 1.

            P(length > t) = E[prod_{s <= t} (1 - p(end | x, y_{<s}))],

        the mean over sequences that are drawn as if none ended. Where the probability of an end ignores the history all
        summands are equal and the curve is exact; else it is unbiased, with the standard error of the mean, which is 0 where
        all samples agree to rounding, be it by chance. A limit below 1 means that mass is lost to sequences that never end: the model is not tight.

        Args:
            max_len: T of the curve; by default that of the distribution.
            num_samples: how many sequences are drawn for a row.

        Raises:
            NotImplementedError: for an ``eos`` among infinitely many symbols.

        Cost: one sample of num_samples rows, to the last site.

        Reference: Du et al., "A measure-theoretic characterization of tight language models", ACL 2023.

        Example:
            >>> from pyro_genexact import conditioners, heads
            >>> head = heads.Categorical(2)
            >>> d = SequenceDistribution(conditioners.Independent(4, 2, site=2), head, eos=0, max_len=4)
            >>> curve = d.termination_curve()  # of fair coins, but for the small weights at the start
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
            # by hand, without a warning if there are no rows
            variance = (both - mean.unsqueeze(1)).square().sum(1) / (num_samples - 1)
            of_survival, of_end = variance.sqrt()
            spread = torch.where(mean[0] < mean[1], of_survival, of_end)  # the same, but for rounding
            rounding = 64 * torch.finfo(spread.dtype).eps * torch.special.entr(mean).sum(0)
            return TerminationCurve(mean[1], torch.where(spread <= rounding, 0.0, spread / num_samples**0.5))

    def from_uniform(self, u: Tensor) -> Tensor:
        """The inverse of ``to_uniform``, site by site; u (*sample, *batch, T), of which sites after the end do not matter.

        Raises:
            NotImplementedError, ValueError: as that of :class:`~pyro_genexact.distributions.AutoregressiveDistribution`.
        """
        check_uniforms(u)
        missing = u.isnan()
        y = super().from_uniform(torch.where(missing, 0.5, u))
        _, present, shape = self.rows_of(y)
        if present is not None and (missing & self.layout.of_event(present, shape).reshape(y.shape)).any():
            raise ValueError("Expected u between 0 and 1 up to the end of a sequence; got NaN.")
        return y

    def site_by_site(self, draw: Callable[[Any, Any, Any], Tensor], sample_shape: Any = ()) -> Tensor:
        chain, layout, batch_shape, count = self.chain, self.layout, self.batch_shape, prod(sample_shape)
        prefix, starts, over = layout.prefix_rows(batch_shape), layout.starts(batch_shape), layout.over(batch_shape)
        first, stop = layout.span(batch_shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # a sixth faster than no_grad
            loop = chain.loop(batch_shape, stop, None if prefix is None else prefix[:, :first])
            rows = torch.arange(count * len(loop.phi), device=loop.phi.device)
            of = rows % max(len(loop.phi), 1)
            at: Any = slice(None) if starts is None else rows  # while these are all, a slice is faster
            done = torch.zeros_like(rows, dtype=torch.bool) if over is None else over[of]
            some_done = over is not None
            if count != 1:
                loop.take(of)
            for t, phi in loop:
                site: Any = t - first if starts is None else layout.site_of(t, starts[of])
                y = draw(chain.site(phi, t), site, at)
                if starts is not None and prefix is not None and t < layout.given:
                    y = torch.where(expand_mask((t < starts[of]).unsqueeze(1), y), prefix[of, t].unsqueeze(1).to(y), y)
                if t == first:  # one column more, for what is drawn beyond a row's own sites
                    out = layout.filler(y, len(rows), layout.count + 1)
                if some_done:
                    y = torch.where(expand_mask(done.unsqueeze(1), y), layout.filler(y), y)
                out[at, site] = y.squeeze(1)
                if t == stop - 1:
                    break
                done = done | layout.ends(y).squeeze(1)
                if starts is not None:
                    done = done | (site == layout.count - 1)
                left = len(rows) - int(done.sum()) if visible(done) else len(rows)
                if not left:
                    break
                some_done, kept = left < len(rows) or not visible(done), None
                if left <= COMPACT_BELOW * len(rows):
                    at = rows = rows[kept := (~done).nonzero().squeeze(1)]
                    of, done, some_done, y = of[kept], done[kept], False, y.index_select(0, kept)
                loop.read(chain.read(y), kept)
        return layout.events(out[:, : layout.count].clone(), torch.Size(sample_shape) + batch_shape)
