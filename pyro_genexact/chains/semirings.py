"""The recursion over a linear chain in any semiring, and the way back: Viterbi, k best, draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.lengths import expand_mask, site_mask


class ChainPotentials(NamedTuple):
    """Log-potentials of a linear chain of N sites with V labels; -inf forbids.

    Attributes:
        unary: (*, N, V), of a label at a site.
        transition: (V, V) the same for all rows and steps, or (*, N - 1, V, V) or (*, 1, V, V); [..., i, j] of the step from i to j.
        initial: (*, V), of the first label.
        final: (*, V), of the last one.
        lengths: (*) integers 0 ... N, or None where all sites count; potentials past the length must be finite.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(3), torch.zeros(3))
        >>> fold(LogSumExp(), chain)[0].exp()  # 3 ** 4 labellings of weight 1
        tensor(81.0000)
    """

    unary: Tensor
    transition: Tensor
    initial: Tensor
    final: Tensor
    lengths: Tensor | None = None

    def steps(self) -> Sequence[Tensor]:
        """The potentials (*, V, V) of each of the N - 1 steps."""
        count = self.unary.shape[-2] - 1
        if self.transition.dim() == 2:
            return [self.transition] * count
        if self.transition.shape[-3] not in (1, count):
            got = tuple(self.transition.shape)
            raise ValueError(f"Expected transition.shape[-3] to be 1 or {count} (steps between sites); got {got}.")
        parts = self.transition.unbind(-3)  # at once: the gradient of a part of a tensor is as large as the tensor
        return parts * count if len(parts) == 1 else parts

    def map(self, function: Callable[..., Tensor], *others: ChainPotentials) -> ChainPotentials:
        """A function of each of the four kinds of potentials, of this chain and of others."""
        unary, transition, initial, final = map(function, self[:4], *(other[:4] for other in others))
        return ChainPotentials(unary, transition, initial, final, self.lengths)

    def reversed(self) -> ChainPotentials:
        """The chain read from its end, each row from its own; the total stays."""
        sites, transition = self.unary.shape[-2], self.transition
        if transition.dim() > 2 and transition.shape[-3] > 1:
            steps = None if self.lengths is None else (self.lengths - 1) % sites
            batch = () if steps is None else torch.broadcast_shapes(transition.shape[:-3], steps.shape)
            transition = transition.expand(*batch, *transition.shape[-3:]) if batch else transition
            transition = flip_within_lengths(transition.flatten(-2), steps).unflatten(-1, transition.shape[-2:])
        return ChainPotentials(
            flip_within_lengths(self.unary, self.lengths), transition.mT, self.final, self.initial, self.lengths
        )


class Semiring:
    """What "plus" and "times" mean. A new query is a subclass; its elements are tensors, with further dims in front at will.

    Example:
        The worst labelling's score, and the labelling:

        >>> import torch
        >>> class Min(Semiring):
        ...     def plus(self, a, dim):
        ...         return a.amin(dim)
        ...     def choose(self, candidates):
        ...         return candidates.argmin(-1)
        >>> chain = ChainPotentials(torch.eye(2), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2))
        >>> worst, messages = fold(Min(), chain)
        >>> worst, trace(Min(), chain, messages)
        (tensor(0.), tensor([1, 0]))
    """

    def lift(self, potentials: Tensor) -> Tensor:
        """Elements of log-potentials."""
        return potentials

    def times(self, a: Tensor, lifted: Tensor) -> Tensor:
        """Elements times lifted potentials, elementwise and broadcast."""
        return a + lifted

    def plus(self, a: Tensor, dim: int) -> Tensor:
        """The sum of elements over a dim (counted from the right)."""
        raise TypeError(f"{type(self).__name__} must define plus(a, dim)")

    def choose(self, candidates: Tensor) -> Tensor:
        """Which of the summands along the last dim :func:`trace` follows."""
        raise TypeError(f"{type(self).__name__} must define choose(candidates) to be traced")


class LogSumExp(Semiring):
    """Log-weights under addition of weights: the total is the log-normaliser log Z, in nats.

    Differentiable to any order; a sum of zeros alone is -inf with gradient zero.

    Example:
        >>> import torch
        >>> LogSumExp().plus(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]), -1)
        tensor([0.6931,   -inf])
    """

    def plus(self, a: Tensor, dim: int) -> Tensor:
        top = a.detach().amax(dim, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        total = (a - top).exp().sum(dim)
        dead = total == 0
        return total.masked_fill(dead, 1.0).log().masked_fill(dead, -torch.inf) + top.squeeze(dim)


class Draw(LogSumExp):
    """Like :class:`LogSumExp`; a trace draws a labelling with its exact probability.

    Example:
        >>> import torch
        >>> Draw().choose(torch.tensor([-torch.inf, 3.0]))
        tensor(1)
    """

    def choose(self, candidates: Tensor) -> Tensor:
        return draw((candidates - candidates.amax(-1, keepdim=True)).exp())


class Max(Semiring):
    """Scores under maximum: the total is the best score, a trace is its labelling (Viterbi 1967).

    Example:
        >>> import torch
        >>> Max().plus(torch.tensor([1.0, 3.0]), -1)
        tensor(3.)
    """

    def plus(self, a: Tensor, dim: int) -> Tensor:
        return a.amax(dim)

    def choose(self, candidates: Tensor) -> Tensor:
        return candidates.argmax(-1)


class KMax(Semiring):
    """The k best scores, sorted: elements (k, *), filled up with -inf where there are fewer.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(torch.tensor([[0.0, 1.0]]), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2))
        >>> fold(KMax(3), chain)[0]
        tensor([1., 0., -inf])
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def lift(self, potentials: Tensor) -> Tensor:
        return potentials.unsqueeze(0)

    def plus(self, a: Tensor, dim: int) -> Tensor:
        summands = a.movedim(dim, 0).flatten(0, 1)
        missing = summands.new_full((max(self.k - len(summands), 0), *summands.shape[1:]), -torch.inf)
        return torch.cat([summands, missing]).topk(self.k, 0).values


class Expectation(Semiring):
    """Pairs (2, *) of a log-weight and the mean of an additive value: the total is (log Z, E[value]).

    Potentials are such pairs too, of finite values, with batch dims spelled out: (2, *batch, N, V), (2, *batch, 1, V, V) and
    (2, *batch, V). :func:`mean` makes them of two chains. ``-log_potential`` as the value gives the entropy log Z + E[-score]
    (Eisner 2002).

    Example:
        How many ones three fair coins show:

        >>> import torch
        >>> def pair(value):
        ...     return torch.stack([torch.zeros_like(value), value])
        >>> ones = torch.tensor([0.0, 1.0]).expand(3, 2)
        >>> fold(Expectation(), ChainPotentials(pair(ones), pair(torch.zeros(1, 2, 2)), *[pair(torch.zeros(2))] * 2))[0][1]
        tensor(1.5000)
    """

    def plus(self, a: Tensor, dim: int) -> Tensor:
        log_weight, value = a
        total = LogSumExp().plus(log_weight, dim)
        dead = (total == -torch.inf).unsqueeze(dim)
        # not exp(log_weight - total), whose sum is 1 to the rounding of large numbers alone
        share = log_weight.masked_fill(dead, 0.0).softmax(dim)
        return torch.stack([total, (share * value).sum(dim)])


def mean(chain: ChainPotentials, values: ChainPotentials) -> tuple[Tensor, Tensor]:
    """log Z (*) and the mean (*) of a value that is a sum of finite values (of the shapes of the potentials) of the same factors."""
    events = (2, 3, 1, 1)
    batch = max(p.dim() - d for c in (chain, values) for p, d in zip(c[:4], events, strict=True))

    def paired(potential: Tensor, value: Tensor, event: int) -> Tensor:
        pair = torch.stack(torch.broadcast_tensors(potential, value))  # which stands before all batch dims
        return pair.reshape(2, *[1] * (batch + event + 1 - pair.dim()), *pair.shape[1:])

    unary, transition, initial, final = map(paired, chain[:4], values[:4], events)
    total, value = fold(Expectation(), ChainPotentials(unary, transition, initial, final, chain.lengths))[0]
    return total, value


class Count(Semiring):
    """The number of labellings that nothing forbids, in float64: exact to 2**53.

    Example:
        >>> import torch
        >>> no_repeats = torch.zeros(3, 3).fill_diagonal_(-torch.inf)
        >>> fold(Count(), ChainPotentials(torch.zeros(4, 3), no_repeats, torch.zeros(3), torch.zeros(3)))[0]
        tensor(24., dtype=torch.float64)
    """

    def lift(self, potentials: Tensor) -> Tensor:
        return (potentials > -torch.inf).to(torch.float64)

    def times(self, a: Tensor, lifted: Tensor) -> Tensor:
        return a * lifted

    def plus(self, a: Tensor, dim: int) -> Tensor:
        return a.sum(dim)


def fold(semiring: Semiring, chain: ChainPotentials) -> tuple[Tensor, list[Tensor]]:
    """The sum over all labellings of the products of their factors.

    Returns:
        The total (*), and for each site t the messages (*, V), sums over labellings of the sites up to t by the label of
        t. Past a row's length its messages stay.

    Cost: N steps on tensors (*, V, V).
    """
    unary, lengths = semiring.lift(chain.unary).unbind(-2), chain.lengths
    start = semiring.times(semiring.lift(chain.initial), unary[0])
    message = semiring.plus(start.unsqueeze(-1), -1)  # brings it to the form of a sum
    into = _transposed(semiring, chain).steps()
    messages = [message]
    for t in range(1, len(unary)):
        new = semiring.plus(semiring.times(message.unsqueeze(-2), into[t - 1]), -1)
        new = semiring.times(new, unary[t])
        message = new if lengths is None else torch.where((lengths > t).unsqueeze(-1), new, message)
        messages.append(message)
    total = semiring.plus(semiring.times(message, semiring.lift(chain.final)), -1)
    if lengths is not None:  # the empty labelling has weight one
        empty = semiring.plus(semiring.lift(torch.zeros_like(chain.unary[..., :1, 0])), -1)
        total = torch.where(lengths > 0, total, empty)
    return total, messages


def trace(
    semiring: Semiring, chain: ChainPotentials, messages: Sequence[Tensor], shape: tuple[int, ...] = ()
) -> Tensor:
    """Labels (*shape, *, N), chosen from the last site to the first by ``semiring.choose``; 0 past the length.

    Args:
        semiring: what a choice is.
        chain: that of the fold.
        messages: of the fold.
        shape: further dims, for more than one labelling.
    """
    into = _transposed(semiring, chain).steps()
    final, lengths = semiring.lift(chain.final), chain.lengths
    here = torch.broadcast_shapes(messages[-1].shape, final.shape)
    label = semiring.choose(semiring.times(messages[-1], final).expand(*shape, *here))
    labels = [label]
    for t in range(len(messages) - 2, -1, -1):
        weights = _rows(into[t], label)
        if lengths is not None:
            weights = torch.where((lengths == t + 1).unsqueeze(-1), final, weights)
        label = semiring.choose(semiring.times(messages[t], weights))
        labels.append(label)
    return without_padding(labels, lengths)


def trace_k(semiring: KMax, chain: ChainPotentials, messages: list[Tensor]) -> Tensor:
    """The labels (k, *, N) of the k best labellings, from the messages of a fold; 0 past the length.

    Where there are fewer than k, further rows hold some labels of score -inf.
    """
    labels_ = chain.unary.shape[-1]

    def best(candidates: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Of candidates (*, k, V) the label and the rank there of the one in a place (*) of the order."""
        order = candidates.flatten(-2).topk(semiring.k).indices
        place = order.take_along_dim(rank.unsqueeze(-1), -1).squeeze(-1)
        return place % labels_, place // labels_

    stacked = [m.movedim(0, -2) for m in messages]  # (*, k, V)
    rank = torch.arange(semiring.k, device=chain.unary.device).reshape(-1, *[1] * (stacked[-1].dim() - 2))
    label, rank = best((stacked[-1] + chain.final.unsqueeze(-2)).unsqueeze(0), rank)
    labels = [label]
    into = _transposed(Semiring(), chain).steps()
    for t in range(len(messages) - 2, -1, -1):
        found, place = best(stacked[t] + _rows(into[t], label).unsqueeze(-2), rank)
        if chain.lengths is None:
            label, rank = found, place
        else:
            inside = chain.lengths > t + 1
            label, rank = torch.where(inside, found, label), torch.where(inside, place, rank)
        labels.append(label)
    return without_padding(labels, chain.lengths)


def flip_within_lengths(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Values (*, N, V) read from each row's own end (*); what lies past it stays there, in some order."""
    if lengths is None:
        return values.flip(-2)
    *batch, sites, size = values.shape
    backward = (lengths.unsqueeze(-1) - 1 - torch.arange(sites, device=values.device)) % sites
    first = torch.arange(0, prod(batch) * sites, sites, device=values.device).reshape(*batch, 1)
    return values.reshape(-1, size).index_select(0, (first + backward).flatten()).reshape(values.shape)


def draw(weights: Tensor) -> Tensor:
    """An index along the last dim with probability proportional to its weight; never one of weight zero."""
    cdf = weights.cumsum(-1)
    # in (0, total], so that neither rounding nor a zero at either end can be hit
    level = (1 - torch.rand(cdf.shape[:-1], dtype=cdf.dtype, device=cdf.device)).unsqueeze(-1) * cdf[..., -1:]
    return cdf.lt_(level).sum(-1).long()  # in place: faster than to search, and than to sum booleans


def _transposed(semiring: Semiring, chain: ChainPotentials) -> ChainPotentials:
    """The chain whose lifted transitions have the label that is entered first, so that sums run over neighbours in memory."""
    lifted = semiring.lift(chain.transition).mT
    if lifted.dim() > chain.transition.dim() == 2:  # dims in front of elements stand before those of the batch
        lifted = lifted.reshape(*lifted.shape[:-2], *[1] * (chain.unary.dim() - 1), *lifted.shape[-2:])
    return chain._replace(transition=lifted.contiguous() if chain.transition.dim() == 2 else lifted)


def _rows(matrices: Tensor, label: Tensor) -> Tensor:
    """The rows (*, V) of matrices (*, V, V)."""
    if matrices.dim() == 2:
        return torch.embedding(matrices, label)
    matrices = matrices.reshape(*[1] * (label.dim() + 2 - matrices.dim()), *matrices.shape)
    return matrices.take_along_dim(label[..., None, None], -2).squeeze(-2)


def without_padding(backward: list[Tensor], lengths: Tensor | None) -> Tensor:
    """Labels (*, N) of the sites given from the last to the first, 0 past the length."""
    labels = torch.stack(backward[::-1]).movedim(0, -1).contiguous()  # faster than to stack along the last dim
    padding = padding_mask(lengths, len(backward))
    return labels if padding is None else labels.masked_fill(padding, 0)


def padding_mask(lengths: Tensor | None, sites: int) -> Tensor | None:
    """Which of N sites are padding, (*lengths, N); None without lengths."""
    return None if lengths is None else ~site_mask(lengths, sites)


def mask_padding(padding: Tensor | None, values: Tensor, first: int = 0, fill: float = 0.0) -> Tensor:
    """Values (*, N - first, ...) of the sites from the first on; the fill at padding (*, N)."""
    return values if padding is None else values.masked_fill(expand_mask(padding[..., first:], values), fill)
