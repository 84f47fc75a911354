"""exact_mode: the most probable value by depth-first branch and bound, proven or with its gap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_sizes
from .prefix_search import PrefixSearch
from .search import beams


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
    search = PrefixSearch(d)
    pool = beams(search, width)
    strings, best = pool.found()[:, 0].clone(), pool.log_p[:, 0].clone()
    left = torch.full((search.rows,), budget, device=best.device)
    missed = torch.full_like(best, -torch.inf)  # the most probable prefix that was not extended
    loop, rows = search.loop(), search.open().nonzero().squeeze(1)
    loop.take(rows)
    node = _Block(search.first, rows, best.new_zeros(len(rows)), strings[rows, :0], rows, loop.state)
    stack = _branches(search, node, loop.phi, loop.state, strings, best, block)
    while stack:
        node = stack.pop()
        node = node.at(node.log_p > best[node.rows])
        spent = _rank(node.rows) < left[node.rows]
        rest = node.at(~spent)
        missed = missed.scatter_reduce(0, rest.rows, rest.log_p, "amax")
        node = node.at(spent)
        if len(node.rows):
            left = left.index_add(0, node.rows, torch.full_like(node.rows, -1))
            phi, state = search.extend(node.strings[:, -1], node.state, node.parents)
            stack += _branches(search, node, phi, state, strings, best, block)
    if (none := torch.maximum(best, missed) == -torch.inf).any():
        raise ValueError(
            f"Expected complete sequences of {search.sites} sites with positive probability; got none for row "
            f"{int(none.nonzero()[0])}."
        )
    gap = torch.where(missed > best, missed - best, 0.0)
    shape = d.batch_shape
    return Mode(search.event(strings), best.reshape(shape), gap.reshape(shape))


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
    search: PrefixSearch, node: _Block, phi: Tensor, state: Any, strings: Tensor, best: Tensor, block: int
) -> list[_Block]:
    """The successors of prefixes that may lead to something better, the most probable last; complete ones improve ``best``."""
    t, rows = node.t, node.rows
    if not len(rows):
        return []
    values, factors = search.factors(phi, t, rows)
    total = node.log_p.unsqueeze(-1) + factors
    ends, last = search.ends(values.expand(total.shape), t, rows), (search.sizes(t, rows) == search.sites).unsqueeze(-1)
    complete = ends if search.layout.has_ends else ends | last
    log_p, value = torch.where(complete, total, -torch.inf).max(1)
    top = torch.full_like(best, -torch.inf).scatter_reduce(0, rows, log_p, "amax")
    for row in (top > best).nonzero().flatten().tolist():
        at = int(((rows == row) & (log_p == top[row])).nonzero()[0])
        strings[row] = search.filled(torch.cat([node.strings[at], values[value[at]].unsqueeze(0)]))
        best[row] = top[row]
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
