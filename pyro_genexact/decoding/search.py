"""Searches for probable values: greedy and by beams."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..conditioners.site_loop import COMPACT_BELOW
from ..core.checks import check_numbers, check_sizes
from ..families.categorical import log_probs
from .prefix_search import PrefixSearch, values_of


class Decoded(NamedTuple):
    """Values that a search found.

    Attributes:
        sequences: (*batch, *event), or (k, *batch, *event) the best first.
        log_prob: (*batch) or (k, *batch), the log-probability of each under the model, in nats; -inf where there are fewer.
    """

    sequences: Tensor
    log_prob: Tensor


@torch.no_grad()
def greedy(d: Any) -> Decoded:
    """The most probable value at each site given those before it: no search.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` over numbers of a
            finite support.

    Returns:
        Values (*batch, *event), which may have no end, and their log_prob (*batch).

    Cost: that of a sample.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> head = gx.heads.Categorical(3)
        >>> model = gx.Sequence(gx.conditioners.Recurrent(3, 3, hidden=8), head, eos=0, max_len=4)
        >>> sequence, log_prob = greedy(model())
        >>> sequence.shape, bool((log_prob - model().log_prob(sequence)).abs() < 1e-5)
        (torch.Size([4]), True)
    """
    search, layout, shape = PrefixSearch(d), d.layout, d.batch_shape
    # one column more, for what is drawn beyond a row's own sites
    factors = search.log_probs(search.rows, search.sites + 1)

    def best(site: Any, t: Any, rows: Any) -> Tensor:
        log_p, index = log_probs(site).max(-1)
        factors[rows, t] = log_p.squeeze(1).to(factors.dtype)
        return index if isinstance(site, Categorical) else values_of(site)[index]

    sequences = d.site_by_site(best)
    factors, (_, present) = factors[:, : search.sites], layout.rows(sequences, shape)
    if present is not None:
        factors = factors.masked_fill(~layout.of_event(present, shape), 0.0)
    return Decoded(sequences, factors.sum(1).reshape(shape))


@torch.no_grad()
def beam_search(
    d: Any, width: int = 5, length_penalty: float = 0.0, *, k: int | None = None, unfinished: bool = False
) -> Decoded:
    r"""The best complete values that are found when only the ``width`` most probable prefixes are kept at each site.

    Values are ranked by log_prob / n^length_penalty, n the number of their sites (the end counts). Prefixes that end among the
    best ``width`` candidates leave the beam; a row's search is over when none that goes on could enter its best ``width``.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` over numbers of a
            finite support.
        width: W, how many prefixes are kept.
        length_penalty: 0 ranks by log_prob; above, longer values are preferred, below shorter ones.
        k: how many values to return, at most ``width``; by default the best alone, without a dim for it.
        unfinished: whether arrays without an end may be returned, which stand for all longer sequences: their
            ``d.lengths_of`` is max_len.

    Returns:
        Values, the best first, with their log_prob under the model, whatever they are ranked by. Where there are fewer than
        k, the rest are fillers of log_prob -inf.

    Raises:
        TypeError: for another distribution, and a length_penalty that is no number.
        ValueError: for sizes that are no positive integers, a length_penalty that is not finite, k beyond the width, and where
            no beam of a row ended.

    Cost: a sample of W rows, whose states are gathered at each site, and a selection of 2 W of W K candidates.

    Reference: Lowerre, "The Harpy speech recognition system", 1976; Wu et al., "Google's neural machine translation system",
    2016, for the penalty (here as in Hugging Face's ``generate``).

    Example:
        >>> import torch, pyro_genexact as gx
        >>> head = gx.heads.Categorical(3)
        >>> model = gx.Sequence(gx.conditioners.Recurrent(3, 3, hidden=8), head, eos=0, max_len=4)
        >>> beam_search(model(), width=5, k=2).log_prob.shape
        torch.Size([2])
    """
    check_sizes(1, width=width, k=1 if k is None else k)
    check_numbers(length_penalty=length_penalty)
    if not isfinite(length_penalty):
        raise ValueError(f"Expected length_penalty to be finite; got {length_penalty}.")
    if k is not None and k > width:
        raise ValueError(f"Expected k <= width ({width}); got {k}.")
    pool = beams(PrefixSearch(d), width, length_penalty, unfinished)
    sequences, log_prob = pool.best(1 if k is None else k)
    return Decoded(sequences[0], log_prob[0]) if k is None else Decoded(sequences, log_prob)


def beams(search: PrefixSearch, width: int, length_penalty: float = 0.0, unfinished: bool = False) -> Pool:
    """The best complete values that a beam search finds."""
    pool, loop = Pool(search, width, length_penalty), search.loop()
    rows = search.open().nonzero().squeeze(1)
    loop.take(rows)
    log_p = search.log_probs(len(rows), 1)  # (n, W') of the prefixes
    strings: Tensor | None = None  # (n, W', sites so far)
    for t, phi in loop if len(rows) else ():
        beams = log_p.shape[1]
        values, factors = search.factors(phi, t, rows.repeat_interleave(beams))
        total = (log_p.unsqueeze(-1) + factors.reshape(len(rows), beams, -1)).flatten(1)
        score, index = total.topk(min(2 * width, total.shape[1]), 1)
        parent, value = index // len(values), values[index % len(values)]
        ahead = value.unsqueeze(-1)
        if strings is not None:
            ahead = torch.cat([strings.take_along_dim(parent.unsqueeze(-1), 1), ahead], -1)
        ended, sizes = search.ends(value, t, rows), search.sizes(t, rows)
        last = (sizes == search.sites).unsqueeze(-1)
        complete = ended if search.layout.has_ends and not unfinished else ended | last
        among = torch.arange(score.shape[1], device=score.device) < width
        pool.add(rows, ahead, torch.where(complete & among, score, -torch.inf), sizes)
        # those that go on, in their order
        log_p, place = torch.where(ended | last, -torch.inf, score).topk(min(width, score.shape[1]), 1)
        offset = torch.arange(0, len(rows) * beams, beams, device=rows.device).unsqueeze(-1)
        on = ~pool.settled(rows, log_p[:, 0])
        if on.sum() <= COMPACT_BELOW * len(rows):
            rows, log_p, place, parent, ahead, offset = (x[on] for x in (rows, log_p, place, parent, ahead, offset))
        if not len(rows):
            break
        strings = ahead.take_along_dim(place.unsqueeze(-1), 1)
        search.read(loop, strings[..., -1].flatten(), (parent.take_along_dim(place, 1) + offset).flatten())
    return pool


class Pool:
    """The best complete values of each row so far."""

    def __init__(self, search: PrefixSearch, width: int, length_penalty: float) -> None:
        self.search, self.penalty = search, length_penalty
        self.log_p = search.log_probs(search.rows, width, fill=-torch.inf)
        self.score = self.log_p.clone()
        self.log_p[~search.open(), 0] = self.score[~search.open(), 0] = 0.0  # nothing follows an end but ends
        self.strings: Tensor | None = None

    def add(self, rows: Tensor, strings: Tensor, log_p: Tensor, sizes: Tensor) -> None:
        """Strings (n, M, L) of these rows, with -inf for those that are none."""
        search = self.search
        if self.strings is None:
            self.strings = search.filler(*self.log_p.shape, search.stop - search.first)
        score = log_p / sizes.clamp(min=1).to(log_p).unsqueeze(-1) ** self.penalty
        score, best = torch.cat([self.score[rows], score], 1).topk(self.score.shape[1], 1)
        if torch.equal(score, self.score[rows]):
            return
        both = torch.cat([self.strings[rows], search.filled(strings)], 1)
        self.strings[rows] = both.take_along_dim(best.unsqueeze(-1), 1)
        self.log_p[rows] = torch.cat([self.log_p[rows], log_p], 1).take_along_dim(best, 1)
        self.score[rows] = score

    def settled(self, rows: Tensor, log_p: Tensor) -> Tensor:
        """Whether prefixes of at most this log-probability (n) can no longer enter the pool of their rows."""
        # a longer value has less log_prob, divided by more where the penalty is positive
        size = float(self.search.sites) if self.penalty > 0 else 1.0
        return (log_p == -torch.inf) | (self.score[rows, -1] >= log_p / size**self.penalty)

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        search, found = self.search, self.found()
        if (none := self.score[:, 0] == -torch.inf).any():
            raise ValueError(
                f"Expected complete sequences among {self.score.shape[1]} beams of {search.sites} sites; got none for row "
                f"{int(none.nonzero()[0])} (unfinished=True returns arrays without an end)."
            )
        shape = (k, *search.d.batch_shape)
        return search.event(found[:, :k].transpose(0, 1), (k,)), self.log_p[:, :k].T.reshape(shape)

    def found(self) -> Tensor:
        """(B, W, sites from the first one on), fillers where there is none."""
        if self.strings is None:  # all prefixes had ended
            return self.search.filler(*self.log_p.shape, self.search.stop - self.search.first)
        return torch.where((self.score == -torch.inf).unsqueeze(-1), self.search.filler(), self.strings)
