"""Semirings on linear chains: the forward recursion, and backward tracing for Viterbi, k best and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .padding import flip_within_lengths, without_padding


class ChainPotentials(NamedTuple):
    """Log-potentials of a linear chain of N sites with V labels; -inf forbids a label or step.

    Attributes:
        unary: (*, N, V), of each label at each site.
        transition: (V, V) for all rows and steps, or (*, N - 1, V, V) or (*, 1, V, V); [..., i, j] is the step from i
            to j.
        initial: (*, V), of the first label.
        final: (*, V), of the last label.
        lengths: integers (*) in 0 ... N, or None if all sites count; potentials at padding must be finite.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(torch.zeros(4, 3), torch.zeros(3, 3), *torch.zeros(2, 3))
        >>> fold(LogSumExp(), chain)[0].exp()  # 3 ** 4 label sequences of weight 1
        tensor(81.0000)
    """

    unary: Tensor
    transition: Tensor
    initial: Tensor
    final: Tensor
    lengths: Tensor | None = None

    def steps(self) -> Sequence[Tensor]:
        """Returns the transition potentials (*, V, V) of each of the N - 1 steps."""
        count = self.unary.shape[-2] - 1
        if self.transition.dim() == 2:
            return [self.transition] * count
        if self.transition.shape[-3] not in (1, count):
            got = tuple(self.transition.shape)
            raise ValueError(f"Expected transition.shape[-3] to be 1 or {count} (steps between sites); got {got}.")
        parts = self.transition.unbind(-3)  # not slices, whose gradients have the size of the whole tensor
        return parts * count if len(parts) == 1 else parts

    def map(self, function: Callable[..., Tensor], *others: ChainPotentials) -> ChainPotentials:
        """Applies a function to each of the four kinds of potentials, of this chain and of others."""
        unary, transition, initial, final = map(function, self[:4], *(other[:4] for other in others))
        return ChainPotentials(unary, transition, initial, final, self.lengths)

    def reversed(self) -> ChainPotentials:
        """Returns the chain in reverse order, within the length of each row; the total does not change."""
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
    """Base class of semirings: defines "plus" and "times" for :func:`fold`, and "choose" for :func:`trace`.

    A subclass defines a new query. Its elements are tensors, which may have additional leading dims.

    Example:
        Compute the lowest score and its label sequence:

        >>> import torch
        >>> class Min(Semiring):
        ...     def plus(self, a, dim):
        ...         return a.amin(dim)
        ...     def choose(self, candidates):
        ...         return candidates.argmin(-1)
        >>> chain = ChainPotentials(torch.eye(2), torch.zeros(2, 2), *torch.zeros(2, 2))
        >>> lowest, messages = fold(Min(), chain)
        >>> lowest, trace(Min(), chain, messages)
        (tensor(0.), tensor([1, 0]))
    """

    def lift(self, potentials: Tensor) -> Tensor:
        """Maps log-potentials to elements of the semiring."""
        return potentials

    def times(self, a: Tensor, lifted: Tensor) -> Tensor:
        """Multiplies elements by lifted potentials, elementwise with broadcasting."""
        return a + lifted

    def plus(self, a: Tensor, dim: int) -> Tensor:
        """Sums elements over a dim, which is negative (counted from the right)."""
        raise TypeError(f"{type(self).__name__} must define plus(a, dim)")

    def choose(self, candidates: Tensor) -> Tensor:
        """Returns the index along the last dim of the summand that :func:`trace` selects."""
        raise TypeError(f"{type(self).__name__} must define choose(candidates) to be traced")


class LogSumExp(Semiring):
    """Sums of weights in log space: the total is log Z in nats.

    It is differentiable to any order; a sum of zeros is -inf with gradient zero.

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
    """As :class:`LogSumExp`; in addition, a trace samples a label sequence with its exact probability.

    Example:
        >>> import torch
        >>> Draw().choose(torch.tensor([-torch.inf, 3.0]))
        tensor(1)
    """

    def choose(self, candidates: Tensor) -> Tensor:
        return draw((candidates - candidates.amax(-1, keepdim=True)).exp())


class Max(Semiring):
    """Maximum of scores: the total is the best score, and a trace is its label sequence (Viterbi 1967).

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
    """The k best scores in descending order; elements are (k, *), padded with -inf if there are fewer than k.

    Args:
        k: the number of scores.

    Example:
        >>> import torch
        >>> unary = torch.tensor([[0.0, 1.0]])
        >>> chain = ChainPotentials(unary, torch.zeros(2, 2), *torch.zeros(2, 2))
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

    The potentials are pairs, too. Their values are finite and their batch dims are explicit: (2, *batch, N, V), (2,
    *batch, 1, V, V) and (2, *batch, V). :func:`mean` constructs them from two chains. With the value -log_potential,
    the entropy is log Z + E[value] (Eisner 2002).

    Example:
        The expected number of ones of three fair coins:

        >>> import torch
        >>> def pair(value):
        ...     return torch.stack([torch.zeros_like(value), value])
        >>> ones = torch.tensor([0.0, 1.0]).expand(3, 2)
        >>> chain = ChainPotentials(
        ...     pair(ones), pair(torch.zeros(1, 2, 2)), *[pair(torch.zeros(2))] * 2
        ... )
        >>> fold(Expectation(), chain)[0][1]
        tensor(1.5000)
    """

    def plus(self, a: Tensor, dim: int) -> Tensor:
        log_weight, value = a
        total = LogSumExp().plus(log_weight, dim)
        dead = (total == -torch.inf).unsqueeze(dim)
        # softmax, because exp(log_weight - total) would sum to 1 only up to the rounding of large numbers
        share = log_weight.masked_fill(dead, 0.0).softmax(dim)
        return torch.stack([total, (share * value).sum(dim)])


def mean(chain: ChainPotentials, values: ChainPotentials) -> tuple[Tensor, Tensor]:
    """Returns log Z (*) and the mean (*) of an additive value.

    Args:
        chain: the potentials.
        values: the finite values of the same factors, of the shapes of the potentials.

    Example:
        >>> import torch
        >>> zeros = [torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)]
        >>> fair, ones = torch.zeros(3, 2), torch.tensor([0.0, 1.0]).expand(3, 2)
        >>> mean(ChainPotentials(fair, *zeros), ChainPotentials(ones, *zeros))[1]
        tensor(1.5000)
    """
    events = (2, 3, 1, 1)
    batch = max(p.dim() - d for c in (chain, values) for p, d in zip(c[:4], events, strict=True))

    def paired(potential: Tensor, value: Tensor, event: int) -> Tensor:
        pair = torch.stack(torch.broadcast_tensors(potential, value))  # the new dim precedes all batch dims
        return pair.reshape(2, *[1] * (batch + event + 1 - pair.dim()), *pair.shape[1:])

    unary, transition, initial, final = map(paired, chain[:4], values[:4], events)
    total, value = fold(Expectation(), ChainPotentials(unary, transition, initial, final, chain.lengths))[0]
    return total, value


class Count(Semiring):
    """Number of label sequences with a finite score, in float64; exact up to 2**53.

    Example:
        >>> import torch
        >>> no_repeats = torch.zeros(3, 3).fill_diagonal_(-torch.inf)
        >>> chain = ChainPotentials(torch.zeros(4, 3), no_repeats, *torch.zeros(2, 3))
        >>> fold(Count(), chain)[0]
        tensor(24., dtype=torch.float64)
    """

    def lift(self, potentials: Tensor) -> Tensor:
        return (potentials > -torch.inf).to(torch.float64)

    def times(self, a: Tensor, lifted: Tensor) -> Tensor:
        return a * lifted

    def plus(self, a: Tensor, dim: int) -> Tensor:
        return a.sum(dim)


def fold(semiring: Semiring, chain: ChainPotentials) -> tuple[Tensor, list[Tensor]]:
    """Sums the products of factors over all label sequences.

    Args:
        semiring: defines sum and product.
        chain: the potentials.

    Returns:
        The total (*), and a list of the messages (*, V) of each site. A message sums over the labels of all earlier
        sites, by the label of this site. Messages do not change after a row's length.

    Cost: N steps on tensors (*, V, V).

    Raises:
        ValueError: if the number of transitions is neither 1 nor N - 1.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(torch.eye(2), torch.zeros(2, 2), *torch.zeros(2, 2))
        >>> total, messages = fold(Max(), chain)
        >>> total, len(messages)
        (tensor(2.), 2)
    """
    unary, lengths = semiring.lift(chain.unary).unbind(-2), chain.lengths
    start = semiring.times(semiring.lift(chain.initial), unary[0])
    message = semiring.plus(start.unsqueeze(-1), -1)  # a sum of one element, which has the shape of a sum
    into = _transposed(semiring, chain).steps()
    messages = [message]
    for t in range(1, len(unary)):
        new = semiring.plus(semiring.times(message.unsqueeze(-2), into[t - 1]), -1)
        new = semiring.times(new, unary[t])
        message = new if lengths is None else torch.where((lengths > t).unsqueeze(-1), new, message)
        messages.append(message)
    total = semiring.plus(semiring.times(message, semiring.lift(chain.final)), -1)
    if lengths is not None:  # the empty sequence has weight one
        empty = semiring.plus(semiring.lift(torch.zeros_like(chain.unary[..., :1, 0])), -1)
        total = torch.where(lengths > 0, total, empty)
    return total, messages


def trace(
    semiring: Semiring, chain: ChainPotentials, messages: Sequence[Tensor], shape: tuple[int, ...] = ()
) -> Tensor:
    """Returns labels (*shape, *, N), selected from the last site to the first by ``semiring.choose``; 0 at padding.

    Args:
        semiring: defines the selection.
        chain: the chain that was folded.
        messages: the messages from :func:`fold`.
        shape: additional leading dims, for several label sequences.

    Raises:
        TypeError: if the semiring does not define ``choose``.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(torch.eye(2), torch.zeros(2, 2), *torch.zeros(2, 2))
        >>> trace(Max(), chain, fold(Max(), chain)[1])
        tensor([0, 1])
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
    """Returns the labels (k, *, N) of the k best label sequences; 0 at padding.

    If there are fewer than k, the remaining rows have arbitrary labels of score -inf.

    Args:
        semiring: the semiring of the fold.
        chain: the chain that was folded.
        messages: the messages from :func:`fold`.

    Example:
        >>> import torch
        >>> chain = ChainPotentials(
        ...     torch.eye(2), torch.zeros(2, 2), torch.zeros(2), torch.tensor([0.1, 0.0])
        ... )
        >>> trace_k(KMax(2), chain, fold(KMax(2), chain)[1])
        tensor([[0, 1],
                [0, 0]])
    """
    labels_ = chain.unary.shape[-1]

    def best(candidates: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Returns label and rank of the candidate (*, k, V) at a place (*) in descending order."""
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


def draw(weights: Tensor) -> Tensor:
    """Samples an index along the last dim with probability proportional to its weight; never one of weight zero."""
    cdf = weights.cumsum(-1)
    # in (0, total], so that indices of weight zero are never drawn
    level = (1 - torch.rand(cdf.shape[:-1], dtype=cdf.dtype, device=cdf.device)).unsqueeze(-1) * cdf[..., -1:]
    return cdf.lt_(level).sum(-1).long()  # faster than a search or a sum of Booleans


def _transposed(semiring: Semiring, chain: ChainPotentials) -> ChainPotentials:
    """Transposes the lifted transitions, so that sums run over adjacent numbers in memory."""
    lifted = semiring.lift(chain.transition).mT
    if lifted.dim() > chain.transition.dim() == 2:  # leading dims of elements precede the batch dims
        lifted = lifted.reshape(*lifted.shape[:-2], *[1] * (chain.unary.dim() - 1), *lifted.shape[-2:])
    return chain._replace(transition=lifted.contiguous() if chain.transition.dim() == 2 else lifted)


def _rows(matrices: Tensor, label: Tensor) -> Tensor:
    """Returns the rows (*, V) of matrices (*, V, V) at the labels (*)."""
    if matrices.dim() == 2:
        return torch.embedding(matrices, label)
    matrices = matrices.reshape(*[1] * (label.dim() + 2 - matrices.dim()), *matrices.shape)
    return matrices.take_along_dim(label[..., None, None], -2).squeeze(-2)
