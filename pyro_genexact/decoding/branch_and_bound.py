"""``exact_mode``, which finds the most probable value by depth-first branch and bound."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_sizes
from .prefix_search import PrefixSearch
from .search import beams


class Mode(NamedTuple):
    """The result of :func:`exact_mode`.

    Attributes:
        sequences: (*batch, *event), the best complete values found.
        log_prob: (*batch), their log-probabilities under the model (nats); -inf if the budget was spent before a complete
            value was found.
        gap: (*batch), upper bounds of the difference between the mode's log-probability and ``log_prob`` (nats); 0 if the
            value is proven to be the mode.
    """

    sequences: Tensor
    log_prob: Tensor
    gap: Tensor


@torch.no_grad()
def exact_mode(d: Any, budget: int = 10_000, width: int = 5, block: int = 256) -> Mode:
    """Finds the most probable complete value by depth-first branch and bound, or the best within a budget and its gap.

    No value is more probable than its prefixes, so prefixes that are less probable than the best value found so far need
    not be extended. The first such value comes from a beam search; the search extends the most probable prefixes first.

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` whose sites have
            a finite support. Arrays without an end are not complete, since each stands for many sequences.
        budget: the maximum number of prefixes to extend per row.
        width: the width of the beam search.
        block: the number of prefixes to extend at once.

    Returns:
        The best values, their log-probabilities and gaps.

    Raises:
        TypeError: if ``d`` is another distribution.
        ValueError: if a size is not a positive integer, or if no complete value of a row has a positive probability.

    Cost: one row of the conditioner per prefix; memory for at most T states of ``block`` rows.

    Reference: Stahlberg, Byrne, "On NMT search errors and model errors: cat got your tongue?", EMNLP 2019.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> net, head = gx.conditioners.Recurrent(3, 3, hidden=8), gx.heads.Categorical(3)
        >>> model = gx.Sequence(net, head, eos=0, max_len=4)
        >>> exact_mode(model()).gap
        tensor(0.)
    """
    check_sizes(1, budget=budget, width=width, block=block)
    search = PrefixSearch(d)
    pool = beams(search, width)
    strings, best = pool.found()[:, 0].clone(), pool.log_p[:, 0].clone()
    left = torch.full((search.rows,), budget, device=best.device)
    missed = torch.full_like(best, -torch.inf)  # log-probability of the most probable prefix that was not extended
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
    """Prefixes of the same length, from any rows, and the rows ``parents`` of the state that they extend."""

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
    """Returns the successors of prefixes that are more probable than ``best``, in blocks, the most probable block last.

    Updates ``strings`` and ``best`` where a complete successor is better.
    """
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
    """Returns the rank of each entry (n) among the entries of the same row, in their order."""
    ordered, order = rows.sort(stable=True)
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter(0, order, rank)
