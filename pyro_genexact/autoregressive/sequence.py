"""Sequences whose length is random: the chain rule with an end that absorbs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..core.checks import check_sizes
from ..core.functional import visible
from ..core.lengths import checked_lengths
from ..core.shapes import broadcast_batches, broadcast_shapes
from ..core.values import numbers
from ..families.categorical import continuing
from ..families.guard import contains
from .checks import check_ends, check_uniforms, sites_of_prefix
from .distribution import AutoregressiveDistribution, _Events, _wide

DROPPED = 0.8
"""Rows that have ended leave the work once no more than this share of the rows goes on: to copy the others costs a step or two."""


class TerminationCurve(NamedTuple):
    """How probable it is that a sequence ends in time.

    Attributes:
        probability: (*batch, T), [t] that one of the sites 0 ... t is an end: of a length of at most t (of t + 1 with
            ``eos=None``, where the end counts).
        standard_error: (*batch, T), 0 where all samples agree to rounding, as they do where the probability is exact.
    """

    probability: Tensor
    standard_error: Tensor


class SequenceDistribution(AutoregressiveDistribution):
    r"""Sequences of random length: p(y | x) = prod_{t <= n} p(y_t | x, y_{<t}), n the first site that is an end.

    An event is an array of max_len sites. After the first ``eos`` all of it is ``eos``; an array without one stands for all
    sequences that are longer, so that the probabilities of all arrays add up to 1. With ``eos=None`` the head tells which
    sites are ends (:class:`~pyro_genexact.heads.Stopped`), and zeros follow them.

    Cost: ``log_prob`` is one parallel pass of the conditioner. ``sample`` extends one state site by site, of the rows that go
    on, until none does.

    Args:
        conditioner: reads the sites; the weights that it has now are used from here on.
        head: makes the distribution of each site.
        eos: the symbol that ends a sequence; None where the head tells it.
        max_len: T, sites of an array.
        context: (*batch, C), with ``Steps`` (*batch, T, C), with ``Source`` (*batch, S, C) or a ``Padded`` of it and its
            lengths, or None.
        source_lengths: (*batch) integers 0 ... S, how long a row's ``Source`` is; by default S.
        prefix: (*batch, k, *site_shape), the sites before those of the event.
        prefix_lengths: (*batch) integers 0 ... k, how many of them a row has; by default k.
        limit: the largest support that is enumerated.
        validate_args: whether values are checked; without, arrays that are no sequences have log_prob -inf.

    Raises:
        TypeError: for an ``eos`` that is no integer, and for a head that tells no ends where it is None.
        ValueError: for a conditioner, head and max_len that do not fit each other, an ``eos`` outside the support, and (when
            validating) a prefix or value that is no sequence.

    Shapes: the batch shape is that of context, source_lengths, prefix and prefix_lengths, broadcast.

    Reference: Du et al., "A measure-theoretic characterization of tight language models", ACL 2023.

    Example:
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Categorical(3)
        >>> d = SequenceDistribution(conditioners.Recurrent(3, head.num_params, hidden=8), head, eos=0, max_len=4)
        >>> d.sample((5,)).shape, d.lengths(torch.tensor([[2, 1, 0, 0], [1, 1, 2, 1]]))
        (torch.Size([5, 4]), tensor([2, 4]))
        >>> strings = d.enumerate_support()
        >>> len(strings), bool(d.log_prob(strings).logsumexp(0).abs() < 1e-5)
        (31, True)
    """

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
        self.eos, self.max_len = eos, max_len
        self.prefix_lengths = None
        if prefix_lengths is not None:
            if prefix is None:
                raise ValueError("Expected no prefix_lengths without a prefix; got some.")
            given, dim = sites_of_prefix(prefix, tuple(head.site_shape)), prefix.dim() - 1 - len(head.site_shape)
            self.prefix_lengths = checked_lengths(prefix_lengths, given, "prefix_lengths", "sites of the prefix")
            batch = broadcast_batches(prefix=prefix.shape[:dim], prefix_lengths=prefix_lengths.shape)
            prefix = prefix.expand(*batch, *prefix.shape[dim:])
        super().__init__(
            conditioner,
            head,
            (max_len, *head.site_shape),
            context,
            source_lengths=source_lengths,
            prefix=prefix,
            limit=limit,
            validate_args=validate_args,
        )

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Arrays that are sequences: nothing but ends after the first."""
        return Sequences(self)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the head's family has a finite support, and no prefix has ended."""
        return bool(self._probe.has_enumerate_support) and not self._any_over()

    def lengths(self, value: Tensor) -> Tensor:  # type: ignore[override]
        """How many sites (*) stand before the first ``eos``; with ``eos=None`` up to the end, which counts. At most max_len."""
        value = numbers("value", value)
        self._check_event("value", value)
        before = (self._ends(value).cumsum(-1) == 0).sum(-1)
        if self.eos is not None:
            return before
        lengths = (before + 1).clamp(max=self.max_len)
        return lengths if self.prefix is None else torch.where(self._over(), 0, lengths)

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
        site_dims = len(self.head.site_shape)
        given = sites_of_prefix(prefix, tuple(self.head.site_shape))
        if max_len is None and given >= self.max_len:
            raise ValueError(f"Expected a prefix of 1 to {self.max_len - 1} sites (of {self.max_len}); got {given}.")
        if lengths is not None:
            lengths = checked_lengths(lengths, given, "lengths", "sites of the prefix")
        batch = broadcast_batches(
            distribution=self.batch_shape,
            prefix=self._batch_of(prefix),
            **({} if lengths is None else {"lengths": lengths.shape}),
        )
        if self.prefix is not None:
            old, new = (p.expand(*batch, *p.shape[-1 - site_dims :]) for p in (self.prefix, prefix))
            before = (
                old.new_tensor(self._given, dtype=torch.long) if self.prefix_lengths is None else self.prefix_lengths
            )
            if self.prefix_lengths is not None or lengths is not None:
                lengths = before + (given if lengths is None else lengths)
            prefix = after(old, before.expand(batch), new)
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
        if self.eos is not None and not self._probe.has_enumerate_support:
            raise NotImplementedError(f"Expected a head that enumerates a finite support; got {self._family}.")
        d = self if max_len is None else self._like_this(max_len=max_len)
        shape = (num_samples, *d.batch_shape)
        dtype = torch.promote_types(d._like.dtype, torch.float32)
        going_on = d._like.new_full((prod(shape), d.max_len + 1), -torch.inf, dtype=dtype)

        def draw(site: Any, t: Any, rows: Tensor) -> Tensor:
            rest, log_p = site.continuing() if d.eos is None else continuing(site, d.eos)
            going_on[rows, t] = log_p.squeeze(1)
            return rest.sample()

        with torch.no_grad():
            d._sequence(torch.Size([num_samples]), draw)
            log_survival = going_on[:, : d.max_len].cumsum(1).reshape(*shape, d.max_len)
            if d.prefix is not None:
                log_survival = torch.where(d._over().unsqueeze(-1), -torch.inf, log_survival)
            both = torch.stack([log_survival.exp(), -log_survival.expm1()])
            mean = both.mean(1)
            variance = (both - mean.unsqueeze(1)).square().sum(1) / (
                num_samples - 1
            )  # without a warning if there are no rows
            of_survival, of_end = variance.sqrt()
            spread = torch.where(mean[0] < mean[1], of_survival, of_end)  # the same, but for rounding
            rounding = 64 * torch.finfo(spread.dtype).eps * torch.special.entr(mean).sum(0)
            return TerminationCurve(mean[1], torch.where(spread <= rounding, 0.0, spread / num_samples**0.5))

    def from_uniform(self, u: Tensor) -> Tensor:
        """The inverse of :meth:`to_uniform`, site by site; u (*sample, *batch, T), of which sites after the end do not matter.

        Raises:
            NotImplementedError, ValueError: as that of :class:`AutoregressiveDistribution`.
        """
        check_uniforms(u)
        missing = u.isnan()
        y = super().from_uniform(torch.where(missing, 0.5, u))
        _, present, shape = self._rows(y)
        if (missing & self._of_event(present, shape).reshape(y.shape)).any():
            raise ValueError("Expected u between 0 and 1 up to the end of a sequence; got NaN.")
        return y

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All N arrays that are sequences, (N, *batch, *event); batch dims of 1 without ``expand``.

        Raises:
            NotImplementedError: if the head's support is not finite, or if a prefix has ended.
            ValueError: if N exceeds ``limit``.
        """
        if not self.has_enumerate_support:
            got = "a prefix that has ended" if self._any_over() else self._family
            raise NotImplementedError(
                f"Expected a head that enumerates a finite support, and prefixes that go on; got {got}."
            )
        zero = self._like.new_zeros(1, 1, self.head.num_params)
        values = self._site(zero).enumerate_support()[:, 0]  # (K, 1, *site_shape)
        going, ended = values[:1, :0], list[Tensor]()
        for t in range(self.max_len):
            if (count := sum(map(len, ended)) + len(going) * len(values)) > self.limit:
                raise ValueError(f"Expected a support of at most {self.limit} values (limit); got {count} or more.")
            grown = [going.repeat_interleave(len(values), 0), values.repeat(len(going), *[1] * (values.dim() - 1))]
            all_ = torch.cat(grown, 1)
            ends = self._ends(all_[:, -1:]).squeeze(1)
            stopped = all_[ends]
            ended.append(torch.cat([stopped, self._filler(len(stopped), self.max_len - t - 1, stopped)], 1))
            going = all_[~ends]
        support = torch.cat([*ended, going])
        support = support.reshape(len(support), *[1] * len(self.batch_shape), *self.event_shape)
        return support.expand(len(support), *self.batch_shape, *self.event_shape) if expand else support

    def _like_this(self, **changes: Any) -> SequenceDistribution:
        fields = ["conditioner", "head", "eos", "max_len", "context", "limit"]
        fields += ["source_lengths", "prefix", "prefix_lengths"]
        given = {name: getattr(self, name) for name in fields} | {"validate_args": self._validate_args} | changes
        new = type(self)(**given)
        return new.expand(broadcast_shapes(self.batch_shape, new.batch_shape))

    def _batch_of(self, sites: Tensor) -> torch.Size:
        return sites.shape[: sites.dim() - 1 - len(self.head.site_shape)]

    def _ends(self, y: Tensor) -> Tensor:
        """Which sites (*, T, *site_shape) are ends, (*, T)."""
        return self.head.ends(y) if self.eos is None else y == self.eos  # type: ignore[operator]

    def _filler(self, rows: int, sites: int, like: Tensor) -> Tensor:
        return like.new_full((rows, sites, *self.head.site_shape), self.eos or 0)

    def _gone(self, y: Tensor) -> Tensor:
        """Which sites (B, T) stand after the first end."""
        ends = self._ends(y)
        return ends.cumsum(1) > ends

    def _ended(self, prefix: Tensor, starts: Tensor | None) -> Tensor:
        """Which prefixes (B, k, *site_shape) hold an end, (B)."""
        ends = self._ends(prefix)
        return (ends if starts is None else ends & _before(starts, ends)).any(1)

    def _over(self) -> Tensor:
        """Which rows (*batch) have a prefix that has ended."""
        prefix = self._batch(self.batch_shape)[2]
        return self._ended(prefix, self._starts(self.batch_shape)).reshape(self.batch_shape)

    def _any_over(self) -> bool:
        return self.prefix is not None and visible(self.prefix) and bool(self._over().any())

    def _starts(self, shape: torch.Size) -> Tensor | None:
        """(B) how many sites of the prefix a row has; None where all have as many."""
        return None if self.prefix_lengths is None else self.prefix_lengths.expand(shape).reshape(-1)

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        y, _, shape = super()._rows(value)
        starts = self._starts(shape)
        if starts is not None:
            y = after(y[:, : self._given], starts, y[:, self._given :])
            y = torch.where(_wide(_before(starts + self.max_len, y), y), y, self._filler(1, 1, y))
        return y, self._present_in(y, starts), shape

    def _present_in(self, y: Tensor, starts: Tensor | None) -> Tensor:
        present = ~self._gone(y)
        return present if starts is None else present & _before(starts + self.max_len, y)

    def _of_event(self, sites: Tensor, shape: torch.Size) -> Tensor:
        if (starts := self._starts(shape)) is None:
            return super()._of_event(sites, shape)
        index = starts.unsqueeze(1) + torch.arange(self.max_len, device=starts.device)
        return sites.take_along_dim(_wide(index, sites), 1)

    def _sequence(self, sample_shape: torch.Size, draw: Callable[[Any, Any, Any], Tensor]) -> Tensor:
        T, last = self.max_len, self._given + self.max_len - 1
        prefix, starts = self._batch(self.batch_shape)[2], self._starts(self.batch_shape)
        with torch.inference_mode(not torch.is_grad_enabled()):  # a sixth faster than no_grad
            first, phi, state = self._begin(prefix, starts)
            rows = torch.arange(prod(sample_shape) * len(phi), device=phi.device)
            at: Any = slice(None) if starts is None else rows  # while these are all, a slice is faster
            of = rows % max(len(phi), 1)
            done = torch.zeros_like(rows, dtype=torch.bool) if prefix is None else self._ended(prefix, starts)[of]
            some_done = prefix is not None
            if prod(sample_shape) != 1:
                phi, state = phi.index_select(0, of), self.conditioner.reorder(state, of)
            for t in range(first, last + 1):
                site = t - self._given if starts is None else self._site_of(t, starts[of])
                y = draw(self._site(phi, t), site, at)
                if starts is not None and t < self._given:
                    y = torch.where(_wide((t < starts[of]).unsqueeze(1), y), prefix[of, t].unsqueeze(1).to(y), y)
                if t == first:  # one column more, for what is drawn beyond a row's own sites
                    out = self._filler(len(rows), T + 1, y)
                if some_done:
                    y = torch.where(_wide(done.unsqueeze(1), y), self._filler(1, 1, y), y)
                out[at, site] = y.squeeze(1)
                if t == last:
                    break
                done = done | self._ends(y).squeeze(1)
                if starts is not None:
                    done = done | (site == T - 1)
                left = len(rows) - int(done.sum()) if visible(done) else len(rows)
                if not left:
                    break
                some_done = left < len(rows) or not visible(done)
                if left <= DROPPED * len(rows):
                    at = rows = rows[kept := (~done).nonzero().squeeze(1)]
                    of, done, some_done = of[kept], done[kept], False
                    y, state = y.index_select(0, kept), self.conditioner.reorder(state, kept)
                phi, state = self.conditioner.extend(self._read(y), state)
        return self._event(out[:, :T].clone(), sample_shape + self.batch_shape)

    def _begin(self, prefix: Tensor | None, starts: Tensor | None) -> tuple[int, Tensor, Any]:
        """The first site that some row draws, its parameters (B, 1, P), and the state before it."""
        rows = prod(self.batch_shape)
        phi, state = self.conditioner.start(self._batch(self.batch_shape)[0], rows)
        first = self._given if starts is None else int(starts.min()) if rows and visible(starts) else 0
        if prefix is None or not first:
            return first, phi.unsqueeze(1), state
        phi, state = self.conditioner.extend(self._read(prefix[:, :first]), state)
        return first, phi[:, -1:], state

    def _site_of(self, t: int, starts: Tensor) -> Tensor:
        """Which site of the event (B) site t is for rows of these starts; max_len where it is none."""
        return torch.where((t >= starts) & (t < starts + self.max_len), t - starts, self.max_len)

    def _check_prefix(self) -> None:
        _, _, prefix = self._batch(self.batch_shape)
        starts, inside = self._starts(self.batch_shape), self._inside(prefix, ~self._gone(prefix))
        self._check_inside(prefix, inside if starts is None else inside | ~_before(starts, inside), "prefix")

    def _inside(self, y: Tensor, present: Tensor | None) -> Tensor:
        """Present sites in the support of the head; the others fillers."""
        assert present is not None
        filled = y == self._filler(1, 1, y)
        filled = filled if filled.dim() == 2 else filled.flatten(2).all(2)
        return torch.where(present, contains(self.head.support, y), filled)

    def _check_inside(self, y: Tensor, inside: Tensor, name: str = "value") -> None:
        if visible(inside) and not inside.all():
            row, site = (~inside).nonzero()[0].tolist()
            if self._gone(y)[row, site]:
                filler, end = self._filler(1, 1, y)[0, 0].tolist(), "end" if self.eos is None else f"eos ({self.eos})"
                raise ValueError(
                    f"Expected {name} to be {filler} after the first {end}; got {y[row, site].tolist()} at site {site}."
                )
        super()._check_inside(y, inside, name)


class Sequences(_Events):
    """Arrays of sites in the support of their head, with nothing but fillers after the first end."""


def after(first: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    """Sites (*batch, k + T, *site_shape): of each row the first ``starts`` (*batch) of one tensor, then those of another."""
    dim = starts.dim()
    both = torch.cat([first, second], dim)
    place = torch.arange(both.shape[dim], device=both.device)
    index = torch.where(place < starts.unsqueeze(-1), place, first.shape[dim] + place - starts.unsqueeze(-1))
    index = index.clamp(max=both.shape[dim] - 1)
    return both.take_along_dim(index.reshape(*index.shape, *[1] * (both.dim() - dim - 1)), dim)


def _before(stop: Tensor, like: Tensor) -> Tensor:
    """(B, sites): whether a site of ``like`` (B, sites, ...) comes before its row's stop (B)."""
    return torch.arange(like.shape[1], device=stop.device) < stop.unsqueeze(1)
