"""Greedy decoding and beam search."""

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
    """The result of :func:`greedy` and :func:`beam_search`.

    Attributes:
        sequences: values (*batch, *event), or (k, *batch, *event) with the best one first.
        log_prob: (*batch) or (k, *batch), their log-probabilities under the model (nats); -inf if fewer than k were found.
    """

    sequences: Tensor
    log_prob: Tensor


@torch.no_grad()
def greedy(d: Any) -> Decoded:
    """Chooses the most probable value at each site, given the sites before it.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` whose sites have
            a finite support.

    Returns:
        Values (*batch, *event) and their log_prob (*batch). Sequences may have no end.

    Raises:
        TypeError: if ``d`` is another distribution.

    Cost: that of one sample.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> net, head = gx.conditioners.Recurrent(3, 3, hidden=8), gx.heads.Categorical(3)
        >>> model = gx.Sequence(net, head, eos=0, max_len=4)
        >>> sequence, log_prob = greedy(model())
        >>> sequence.shape, bool((log_prob - model().log_prob(sequence)).abs() < 1e-5)
        (torch.Size([4]), True)
    """
    search, layout, shape = PrefixSearch(d), d.layout, d.batch_shape
    # the last column takes the factors beyond a row's own sites
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
    """Searches for probable complete values, keeping the ``width`` most probable prefixes at each site.

    Complete values are ranked by log_prob / n^length_penalty, where n is the number of their sites, including the end
    symbol. A prefix that ends leaves the beam and becomes a result if it is among the best ``width`` candidates. The search
    of a row stops when no remaining prefix can enter its best ``width`` results.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` whose sites have
            a finite support.
        width: W, the number of prefixes to keep.
        length_penalty: 0 ranks by log_prob, positive numbers favour longer values, negative ones shorter values.
        k: the number of values to return, at most ``width``. By default only the best value, without a dim for k.
        unfinished: whether arrays without an end may be returned. They stand for all longer sequences; their
            ``d.lengths_of`` is max_len.

    Returns:
        Values with the best one first, and their log_prob under the model, for every length_penalty. If fewer than k values
        were found, the rest are fillers with log_prob -inf.

    Raises:
        TypeError: if ``d`` is another distribution, or if length_penalty is not a number.
        ValueError: if a size is not a positive integer, if length_penalty is not finite, if k is larger than ``width``, or
            if no prefix of a row ended.

    Cost: that of a sample of W rows, gathering W states per site, and choosing 2 W out of W K candidates per site.

    Reference: Lowerre, "The Harpy speech recognition system", 1976; Wu et al., "Google's neural machine translation system",
    2016, for the penalty (here as in Hugging Face's ``generate``).

    Example:
        >>> import torch, pyro_genexact as gx
        >>> net, head = gx.conditioners.Recurrent(3, 3, hidden=8), gx.heads.Categorical(3)
        >>> model = gx.Sequence(net, head, eos=0, max_len=4)
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
    """Runs a beam search and returns the pool of complete values."""
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
        # the prefixes that continue, in their order
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
        # rows whose given prefix has ended have one value
        self.log_p[~search.open(), 0] = self.score[~search.open(), 0] = 0.0
        self.strings: Tensor | None = None

    def add(self, rows: Tensor, strings: Tensor, log_p: Tensor, sizes: Tensor) -> None:
        """Adds strings (n, M, L) to the rows (n); log_p (n, M) is -inf for strings to leave out."""
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
        """Returns whether prefixes with at most log-probability log_p (n) can no longer enter the pool of their rows (n)."""
        # extending a prefix lowers its log_prob, which a positive penalty divides by a larger number
        size = float(self.search.sites) if self.penalty > 0 else 1.0
        return (log_p == -torch.inf) | (self.score[rows, -1] >= log_p / size**self.penalty)

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """Returns the best values (k, *batch, *event) and their log_prob (k, *batch)."""
        search, found = self.search, self.found()
        if (none := self.score[:, 0] == -torch.inf).any():
            raise ValueError(
                f"Expected complete sequences among {self.score.shape[1]} beams of {search.sites} sites; got none for row "
                f"{int(none.nonzero()[0])}. Use a larger width, or unfinished=True to return arrays without an end."
            )
        shape = (k, *search.d.batch_shape)
        return search.event(found[:, :k].transpose(0, 1), (k,)), self.log_p[:, :k].T.reshape(shape)

    def found(self) -> Tensor:
        """Returns the strings (B, W, sites from the first one on), filled with fillers where there is none."""
        if self.strings is None:  # all given prefixes have ended
            return self.search.filler(*self.log_p.shape, self.search.stop - self.search.first)
        return torch.where((self.score == -torch.inf).unsqueeze(-1), self.search.filler(), self.strings)
