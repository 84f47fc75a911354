"""Searches for probable values: greedy, by beams, by stochastic beams, exhaustive."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..autoregressive.sequence import DROPPED
from ..core.checks import check_numbers, check_sizes
from ..families.categorical import log_probs
from .walk import Walk


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
    walk = Walk(d)
    # one column more, for what is drawn beyond a row's own sites
    factors = _wide_like(d).new_zeros(walk.rows, walk.sites + 1)

    def best(site: Any, t: Any, rows: Any) -> Tensor:
        log_p, index = log_probs(site).max(-1)
        factors[rows, t] = log_p.squeeze(1).to(factors.dtype)
        return index if isinstance(site, Categorical) else site.enumerate_support(expand=False).flatten()[index]

    sequences = d._sequence(torch.Size(), best)
    _, present, _ = d._rows(sequences)
    factors = factors[:, : walk.sites]
    if present is not None:
        factors = factors.masked_fill(~d._of_event(present, d.batch_shape), 0.0)
    return Decoded(sequences, factors.sum(1).reshape(d.batch_shape))


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
        unfinished: whether arrays without an end may be returned, which stand for all longer sequences: their ``d.lengths``
            is max_len.

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
    pool = _beams(Walk(d), width, length_penalty, unfinished)
    sequences, log_prob = pool.best(1 if k is None else k)
    return Decoded(sequences[0], log_prob[0]) if k is None else Decoded(sequences, log_prob)


def _beams(walk: Walk, width: int, length_penalty: float = 0.0, unfinished: bool = False) -> _Pool:
    d, pool = walk.d, _Pool(walk, width, length_penalty)
    phi, state = walk.start()
    rows = walk.open().nonzero().squeeze(1)
    phi, state = phi.index_select(0, rows), d.conditioner.reorder(state, rows)
    log_p = pool.log_p.new_zeros(len(rows), 1)  # (n, W') of the prefixes
    strings: Tensor | None = None  # (n, W', sites so far)
    for t in range(walk.first, walk.stop):
        if not len(rows):
            break
        beams = log_p.shape[1]
        values, factors = walk.factors(phi, t, rows.repeat_interleave(beams))
        total = (log_p.unsqueeze(-1) + factors.reshape(len(rows), beams, -1)).flatten(1)
        score, index = total.topk(min(2 * width, total.shape[1]), 1)
        parent, value = index // len(values), values[index % len(values)]
        ahead = value.unsqueeze(-1)
        if strings is not None:
            ahead = torch.cat([strings.take_along_dim(parent.unsqueeze(-1), 1), ahead], -1)
        ended, last = walk.ends(value, t, rows), walk.last(t, rows).unsqueeze(-1)
        complete = ended | last if unfinished or not hasattr(d, "eos") else ended
        among = torch.arange(score.shape[1], device=score.device) < width
        pool.add(rows, ahead, torch.where(complete & among, score, -torch.inf), walk.sizes(t, rows))
        if t == walk.stop - 1:
            break
        # those that go on, in their order
        going, place = torch.where(ended | last, -torch.inf, score).topk(min(width, score.shape[1]), 1)
        on = ~pool.settled(rows, going[:, 0])
        if on.sum() <= DROPPED * len(rows):
            rows, going, place, parent, ahead = (x[on] for x in (rows, going, place, parent, ahead))
            offset = on.nonzero() * beams
        else:
            offset = torch.arange(0, len(rows) * beams, beams, device=rows.device).unsqueeze(-1)
        if not len(rows):
            break
        parent = parent.take_along_dim(place, 1) + offset
        strings, log_p = ahead.take_along_dim(place.unsqueeze(-1), 1), going
        state = d.conditioner.reorder(state, parent.flatten())
        phi, state = walk.extend(strings[..., -1].flatten(), state)
    return pool


class _Pool:
    """The best complete values of each row so far."""

    def __init__(self, walk: Walk, width: int, length_penalty: float) -> None:
        self.walk, self.penalty = walk, length_penalty
        self.log_p = _wide_like(walk.d).new_full((walk.rows, width), -torch.inf)
        self.score = self.log_p.clone()
        self.log_p[~walk.open(), 0] = self.score[~walk.open(), 0] = 0.0  # nothing follows an end but ends
        self.strings: Tensor | None = None

    def add(self, rows: Tensor, strings: Tensor, log_p: Tensor, sizes: Tensor) -> None:
        """Strings (n, M, L) of these rows, with -inf for those that are none."""
        walk = self.walk
        if self.strings is None:
            self.strings = walk.filler(*self.log_p.shape, walk.stop - walk.first)
        score = log_p / sizes.clamp(min=1).to(log_p).unsqueeze(-1) ** self.penalty
        score, best = torch.cat([self.score[rows], score], 1).topk(self.score.shape[1], 1)
        if torch.equal(score, self.score[rows]):
            return
        room = walk.filler(*strings.shape[:2], walk.stop - walk.first - strings.shape[2])
        both = torch.cat([self.strings[rows], torch.cat([strings, room], -1)], 1)
        self.strings[rows] = both.take_along_dim(best.unsqueeze(-1), 1)
        self.log_p[rows] = torch.cat([self.log_p[rows], log_p], 1).take_along_dim(best, 1)
        self.score[rows] = score

    def settled(self, rows: Tensor, log_p: Tensor) -> Tensor:
        """Whether prefixes of at most this log-probability (n) can no longer enter the pool of their rows."""
        # a longer value has less log_prob, divided by more where the penalty is positive
        size = float(self.walk.sites) if self.penalty > 0 else 1.0
        return (log_p == -torch.inf) | (self.score[rows, -1] >= log_p / size**self.penalty)

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        walk, found = self.walk, self.found()
        if (none := self.score[:, 0] == -torch.inf).any():
            raise ValueError(
                f"Expected complete sequences among {self.score.shape[1]} beams of {walk.sites} sites; got none for row "
                f"{int(none.nonzero()[0])} (unfinished=True returns arrays without an end)."
            )
        shape = (k, *walk.d.batch_shape)
        return walk.event(found[:, :k].transpose(0, 1), (k,)), self.log_p[:, :k].T.reshape(shape)

    def found(self) -> Tensor:
        """(B, W, sites from the first one on), fillers where there is none."""
        if self.strings is None:  # all prefixes had ended
            return self.walk.filler(*self.log_p.shape, self.walk.stop - self.walk.first)
        return torch.where((self.score == -torch.inf).unsqueeze(-1), self.walk.filler(), self.strings)


def _wide_like(d: Any) -> Tensor:
    """A number of the distribution's dtype, of float32 at least."""
    return d._like.new_empty((), dtype=torch.promote_types(d._like.dtype, torch.float32))


class StochasticBeam(NamedTuple):
    """A sample without replacement.

    Attributes:
        sequences: (k, *batch, *event), in the order in which they would be drawn one after the other.
        log_prob: (k, *batch) under the model; -inf where the support has fewer than k values.
        gumbels: (k, *batch) the perturbed log-probabilities, descending.
        threshold: (*batch) the (k + 1)-th largest of all perturbed log-probabilities; -inf where there is none.
        log_inclusion: (k, *batch) the log-probability that a value is among the k, given the threshold.
    """

    sequences: Tensor
    log_prob: Tensor
    gumbels: Tensor
    threshold: Tensor
    log_inclusion: Tensor


@torch.no_grad()
def stochastic_beam_search(d: Any, k: int) -> StochasticBeam:
    r"""k different values, an exact sample without replacement, by a beam search over perturbed log-probabilities.

    Each value y has G(y) = log p(y) + Gumbel noise, and the k largest are found top-down: the noise of a prefix is the maximum
    over all that begins with it. With the threshold kappa, sum_i f(y_i) p(y_i) / q(y_i) over the k values, q(y) = P(G(y) > kappa) =
    1 - exp(-exp(log p(y) - kappa)), is an unbiased estimate of E[f].

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` over numbers of a
            finite support. Arrays without an end are values too.
        k: how many.

    Cost: a beam search of width k + 1.

    Reference: Kool, van Hoof, Welling, "Stochastic beams and where to find them: the Gumbel-top-k trick for sampling
    sequences without replacement", ICML 2019.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> head = gx.heads.Categorical(3)
        >>> model = gx.Sequence(gx.conditioners.Recurrent(3, 3, hidden=8), head, eos=0, max_len=4)
        >>> beam = stochastic_beam_search(model(), 6)
        >>> weights = (beam.log_prob - beam.log_inclusion).exp()
        >>> mean_length = (weights * model().lengths(beam.sequences)).sum(0)
    """
    check_sizes(1, k=k)
    walk = Walk(d)
    phi, state = walk.start()
    rows = torch.arange(walk.rows, device=phi.device)
    log_p = _wide_like(d).new_zeros(walk.rows, 1)
    noisy = -torch.empty_like(log_p).exponential_().log()  # the largest of all
    done = ~walk.open().unsqueeze(-1)
    strings = walk.filler(walk.rows, 1, 0)
    for t in range(walk.first, walk.stop):
        beams = log_p.shape[1]
        values, factors = walk.factors(phi, t, rows.repeat_interleave(beams))
        factors = factors.reshape(walk.rows, beams, len(values))
        # an ended prefix has one successor, itself
        stays = torch.full_like(factors, -torch.inf)
        stays[..., 0] = 0.0
        ahead = log_p.unsqueeze(-1) + torch.where(done.unsqueeze(-1), stays, factors)
        perturbed = torch.where(done.unsqueeze(-1), noisy.unsqueeze(-1) + stays, _below(noisy, ahead))
        noisy, index = perturbed.flatten(1).topk(min(k + 1, beams * len(values)), 1)
        log_p, parent = ahead.flatten(1).take_along_dim(index, 1), index // len(values)
        done = done.take_along_dim(parent, 1)
        value = torch.where(done, walk.filler(), values[index % len(values)])
        strings = torch.cat([strings.take_along_dim(parent.unsqueeze(-1), 1), value.unsqueeze(-1)], -1)
        done = done | (log_p == -torch.inf) | walk.ends(value, t, rows) | walk.last(t, rows).unsqueeze(-1)
        if t == walk.stop - 1 or done.all():
            break
        offset = torch.arange(0, walk.rows * beams, beams, device=rows.device).unsqueeze(-1)
        state = d.conditioner.reorder(state, (parent + offset).flatten())
        phi, state = walk.extend(value.flatten(), state)
    room = walk.filler(*strings.shape[:2], walk.stop - walk.first - strings.shape[2])
    strings = torch.cat([strings, room], -1)
    missing = max(k + 1 - log_p.shape[1], 0)
    if missing:
        log_p, noisy = (torch.nn.functional.pad(x, (0, missing), value=-torch.inf) for x in (log_p, noisy))
        strings = torch.cat([strings, strings[:, :1].expand(-1, missing, -1)], 1)
    threshold = noisy[:, k]
    log_p, noisy, strings = log_p[:, :k], noisy[:, :k], strings[:, :k]
    inclusion = torch.where(log_p == -torch.inf, 0.0, (-(-(log_p - threshold.unsqueeze(1)).exp()).expm1()).log())
    shape = d.batch_shape
    by_rank = [x.T.reshape(k, *shape) for x in (log_p, noisy, inclusion)]
    sequences = walk.event(strings.transpose(0, 1), (k,))
    return StochasticBeam(sequences, by_rank[0], by_rank[1], threshold.reshape(shape), by_rank[2])


def _below(top: Tensor, log_p: Tensor) -> Tensor:
    """Gumbel noise with locations log_p (n, W, K), given that the largest of each K is ``top`` (n, W)."""
    gumbel = log_p - torch.empty_like(log_p).exponential_().log()
    largest = gumbel.amax(-1, keepdim=True)
    # -log(exp(-top) - exp(-largest) + exp(-gumbel)), without overflow
    gap = largest - gumbel
    top = top.unsqueeze(-1)
    v = top - gumbel + torch.log(-torch.expm1(-gap))
    found = top - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    found = torch.where(gap == 0, top, found)
    return torch.where(log_p == -torch.inf, -torch.inf, found)


class Mode(NamedTuple):
    """What :func:`exact_mode` found.

    Attributes:
        sequences: (*batch, *event), the best complete value found.
        log_prob: (*batch) its log-probability under the model, in nats; -inf where the budget ran out before any was found.
        gap: (*batch) by how many nats a better one can still be ahead: 0 where the value is proven to be the mode.
    """

    sequences: Tensor
    log_prob: Tensor
    gap: Tensor


@torch.no_grad()
def exact_mode(d: Any, budget: int = 10_000, width: int = 5, block: int = 256) -> Mode:
    """The most probable complete value, by depth-first branch and bound: proven, or with how far it may be off.

    No value is more probable than its prefix. So the best value of a beam search bounds the search from below, and prefixes that
    are less probable are cut, the most probable ones followed first.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` over numbers of a
            finite support. Arrays without an end stand for many sequences, and are none.
        budget: how many prefixes of a row may be extended.
        width: of the beam search.
        block: how many prefixes are extended at once.

    Raises:
        TypeError: for another distribution.
        ValueError: for sizes that are no positive integers, and where no complete value of a row has a positive probability.

    Cost: one row of the conditioner for each prefix; at most T states of ``block`` rows are held.

    Reference: Stahlberg, Byrne, "On NMT search errors and model errors: cat got your tongue?", EMNLP 2019.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> head = gx.heads.Categorical(3)
        >>> model = gx.Sequence(gx.conditioners.Recurrent(3, 3, hidden=8), head, eos=0, max_len=4)
        >>> exact_mode(model()).gap
        tensor(0.)
    """
    check_sizes(1, budget=budget, width=width, block=block)
    walk = Walk(d)
    pool = _beams(walk, width)
    strings, best = pool.found()[:, 0].clone(), pool.log_p[:, 0].clone()
    left = torch.full((walk.rows,), budget, device=best.device)
    missed = torch.full_like(best, -torch.inf)  # the most probable prefix that was not extended
    phi, state = walk.start()
    rows = walk.open().nonzero().squeeze(1)
    node = _Block(walk.first, rows, best.new_zeros(len(rows)), strings[rows, :0], rows, state)
    stack = _branches(walk, node, phi.index_select(0, rows), d.conditioner.reorder(state, rows), strings, best, block)
    while stack:
        node = stack.pop()
        node = node.at(node.log_p > best[node.rows])
        spent = _rank(node.rows) < left[node.rows]
        rest = node.at(~spent)
        missed = missed.scatter_reduce(0, rest.rows, rest.log_p, "amax")
        node = node.at(spent)
        if len(node.rows):
            left = left.index_add(0, node.rows, torch.full_like(node.rows, -1))
            state = d.conditioner.reorder(node.state, node.parents)
            phi, state = walk.extend(node.strings[:, -1], state)
            stack += _branches(walk, node, phi, state, strings, best, block)
    if (none := torch.maximum(best, missed) == -torch.inf).any():
        raise ValueError(
            f"Expected complete sequences of {walk.sites} sites with positive probability; got none for row "
            f"{int(none.nonzero()[0])}."
        )
    gap = torch.where(missed > best, missed - best, 0.0)
    shape = d.batch_shape
    return Mode(walk.event(strings), best.reshape(shape), gap.reshape(shape))


class _Block(NamedTuple):
    """Prefixes of one length, of any rows, and the rows of the state that they extend."""

    t: int
    rows: Tensor
    log_p: Tensor
    strings: Tensor
    parents: Tensor
    state: Any

    def at(self, index: Tensor) -> _Block:
        return self._replace(**{name: getattr(self, name)[index] for name in ("rows", "log_p", "strings", "parents")})


def _branches(
    walk: Walk, node: _Block, phi: Tensor, state: Any, strings: Tensor, best: Tensor, block: int
) -> list[_Block]:
    """The successors of prefixes that may lead to something better, the most probable last; complete ones improve ``best``."""
    t, rows = node.t, node.rows
    if not len(rows):
        return []
    values, factors = walk.factors(phi, t, rows)
    total = node.log_p.unsqueeze(-1) + factors
    ends, last = walk.ends(values.expand(total.shape), t, rows), walk.last(t, rows).unsqueeze(-1)
    complete = ends if hasattr(walk.d, "eos") else ends | last
    log_p, value = torch.where(complete, total, -torch.inf).max(1)
    top = torch.full_like(best, -torch.inf).scatter_reduce(0, rows, log_p, "amax")
    for row in (top > best).nonzero().flatten().tolist():
        at = int(((rows == row) & (log_p == top[row])).nonzero()[0])
        string = torch.cat([node.strings[at], values[value[at]].unsqueeze(0)])
        strings[row] = walk.filler(strings.shape[1])
        strings[row, : len(string)], best[row] = string, top[row]
    going = torch.where(ends | last, -torch.inf, total)
    parent, value = (going > best[rows].unsqueeze(-1)).nonzero().unbind(1)
    log_p, order = going[parent, value].sort(descending=True)
    parent, value = parent[order], values[value[order]]
    ahead = torch.cat([node.strings[parent], value.unsqueeze(-1)], -1)
    child = _Block(t + 1, rows[parent], log_p, ahead, parent, state)
    return [child.at(index) for index in torch.arange(len(parent), device=rows.device).split(block)][::-1]


def _rank(rows: Tensor) -> Tensor:
    """Which one of its row each entry (n) is, in their order."""
    ordered, order = rows.sort(stable=True)
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter(0, order, rank)
