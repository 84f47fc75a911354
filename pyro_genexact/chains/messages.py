"""Forward and backward messages of a batch of linear chains, for all queries of a CRF.

All computations are in float64 if the device supports it, so that a float32 chain of a thousand sites loses no
precision.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.compiling import Lazy
from ..core.functional import visible
from .padding import flip_within_lengths, mask_padding, padding_mask
from .semirings import ChainPotentials, Draw, LogSumExp, Semiring, draw, fold, mean, trace

RESCALED_EVERY = (8, 1)
"""Number of steps between two rescalings in exp space, in the order in which they are tried."""


class Messages(Protocol):
    """Quantities of B chains of N sites, computed from their messages; 0 at padding."""

    @property
    def log_partition(self) -> Tensor:
        """The log-normaliser log Z in nats, (B,); -inf where nothing is possible."""

    def marginals(self) -> Tensor:
        """Returns p(y_t), (B, N, V)."""

    def pair_marginals(self) -> Tensor:
        """Returns p(y_t, y_{t+1}), (B, N - 1, V, V)."""

    def expected_steps(self, weight: Tensor) -> Tensor:
        """Returns the pair marginals summed over sites and over rows with weights (B,), (V, V)."""

    def mean(self, values: ChainPotentials) -> Tensor:
        """Returns the mean (B,) of a sum of finite values, which have the shapes of the potentials."""

    def sample(self, count: int) -> Tensor:
        """Returns sampled labels (count, B, N)."""


@torch.no_grad()
def messages_of(
    chain: ChainPotentials, attempts: tuple[int, ...] = RESCALED_EVERY, usual: Tensor | None = None
) -> Messages:
    """Returns the messages of B chains.

    Rows are computed in exp space if that is exact to rounding. Other rows are rescaled more often, and finally
    computed in log space. Reading which rows these are waits for a device; log space for all rows, which would not,
    takes nine times as many operations.

    Args:
        chain: unary (B, N, V), transition (V, V) or (B, N - 1 or 1, V, V), initial and final (B, V), lengths (B,).
        attempts: the numbers of steps between rescalings to try.
        usual: Boolean (B,), or None. If one is False, the messages are no :class:`ScaledMessages`.
    """
    if not attempts:
        return LogMessages(chain.map(Tensor.detach))
    scaled = ScaledMessages(chain, attempts[0])
    exact = scaled.exact if usual is None else scaled.exact & usual
    if not visible(exact) or bool(exact.all()):
        return scaled
    bad, good = (~exact).nonzero().squeeze(-1), exact.nonzero().squeeze(-1)
    rest = messages_of(select_rows(chain, bad), attempts[1:])
    if not len(good):
        return rest if usual is None else MergedMessages([(bad, rest)])
    return MergedMessages([(good, ScaledMessages(select_rows(chain, good), attempts[0])), (bad, rest)])


class ScaledMessages:
    """Messages in exp space: both directions in one recursion of matrix products, with occasional rescaling.

    With forward messages x_t and backward messages z_t, both including the factor of site t, and E = exp(transition),

        x_{t+1} = (x_t E) exp(unary_{t+1}),   z_t = (E z_{t+1}) exp(unary_t),   p(y_t) = x_t (E z_{t+1}) / s_t.

    No term is negative, so rounding errors stay relative. Only underflow loses precision: at most N V^2 times the
    smallest positive number, relative to the messages before rescaling and to s_t. ``exact`` marks rows where that is
    below rounding.
    """

    def __init__(self, chain: ChainPotentials, every: int) -> None:
        batch, sites, labels = chain.unary.shape
        self.padding, self.last = padding_mask(chain.lengths, sites), last_site(chain)

        unary, top = shifted(absorb_ends(chain), (-1,))
        transition, top_of_step = shifted(double_precision(chain.transition), (-2, -1))
        one = unary.new_ones(labels)
        self.weights = ChainPotentials(unary.exp_(), transition.exp_(), one, one, chain.lengths)
        backward = self.weights.reversed()
        x = torch.stack([self.weights.unary.transpose(0, 1), backward.unary.transpose(0, 1)], 1)  # (N, 2, B, V)
        scales = forward_backward(x, self.weights, backward, every)
        if self.padding is not None:  # both directions reach padding last, with arbitrary values
            padding = self.padding.T.unsqueeze(1)  # (N, 1, B)
            x.masked_fill_(padding.unsqueeze(-1), 1.0)
            scales[1:].masked_fill_(padding[every::every], 1.0)
        sums = x.sum(-1)
        x /= sums.unsqueeze(-1)

        self.forward = x[:, 0].transpose(0, 1)  # (B, N, V)
        self.backward = flip_within_lengths(x[:, 1].transpose(0, 1), chain.lengths)
        after = torch.ones_like(self.backward)
        after[:, :-1] = backward_step(self.weights.transition, self.backward[:, 1:])
        if chain.lengths is not None:
            after.scatter_(1, self.last.unsqueeze(-1).expand(-1, 1, labels), 1.0)
        self.joint = after.mul_(self.forward)
        self.total = self.joint.sum(-1)  # s_t

        ends = (sums[:, 0].T * self.total).take_along_dim(self.last, 1).squeeze(1)
        log_partition = ends.log() + scales[:, 0].log().sum(0) + mask_padding(self.padding, top.squeeze(-1)).sum(-1)
        log_partition += mask_padding(self.padding, top_of_step[..., 0, 0].expand(batch, sites - 1), 1).sum(-1)
        smallest = torch.minimum(sums.amin((0, 1)), scales.amin((0, 1)))
        least = mask_padding(self.padding, self.total, fill=1.0).amin(-1) * smallest
        info = torch.finfo(least.dtype)
        exact = least > sites * labels**2 * info.tiny / info.eps
        if chain.lengths is not None:
            log_partition, exact = log_partition.masked_fill(chain.lengths == 0, 0.0), exact | (chain.lengths == 0)
        self.log_partition, self.exact = log_partition, exact

    def marginals(self) -> Tensor:
        return self.joint * mask_padding(self.padding, 1 / self.total).unsqueeze(-1)

    def pair_marginals(self) -> Tensor:
        return (self._left(1.0).unsqueeze(-1) * self.backward[:, 1:].unsqueeze(-2)).mul_(self.weights.transition)

    def expected_steps(self, weight: Tensor) -> Tensor:
        left = self._left(weight.unsqueeze(-1))
        return self.weights.transition * (left.flatten(0, 1).mT @ self.backward[:, 1:].flatten(0, 1))

    def mean(self, values: ChainPotentials) -> Tensor:
        left, weighted = self._left(1.0), self.weights.transition * values.transition
        into = left @ weighted if weighted.dim() == 2 else (left.unsqueeze(-2) @ weighted).squeeze(-2)
        return (self.marginals() * absorb_ends(values)).sum((-2, -1)) + (into * self.backward[:, 1:]).sum((-2, -1))

    def sample(self, count: int) -> Tensor:
        few = count < 2 * self.forward.shape[-1]  # measured crossover
        if few or self.forward.dtype != torch.float64:  # the tables store row indices in this dtype
            return trace(_Weights(), self.weights, self.forward.unbind(1), (count,))
        return draw_by_tables(self.forward, self.weights, count)

    def _left(self, weight: float | Tensor) -> Tensor:
        """Returns the left factor of each pair times a weight per row, (B, N - 1, V); 0 if the right site is padding."""
        return self.forward[:, :-1] * mask_padding(self.padding, weight / self.total[:, :-1], 1).unsqueeze(-1)


class LogMessages:
    """Messages in log space, for any potentials.

    Cost: tensors (B, V, V) per step, with their logarithms and exponentials.
    """

    def __init__(self, chain: ChainPotentials) -> None:
        self.chain, self.padding = chain.map(double_precision), padding_mask(chain.lengths, chain.unary.shape[-2])

    @Lazy
    def _folded(self) -> tuple[Tensor, list[Tensor]]:
        return fold(LogSumExp(), self.chain)

    @property
    def log_partition(self) -> Tensor:
        return self._folded[0]

    @property
    def forward(self) -> Tensor:
        """Log-weights (B, N, V) summed over all labels of the earlier sites, by the label of this site."""
        return torch.stack(self._folded[1], -2)

    @Lazy
    def backward(self) -> Tensor:
        """Log-weights (B, N, V) summed over all labels of the later sites, by the label of this site."""
        backward = fold(LogSumExp(), self.chain.reversed())[1]
        return flip_within_lengths(torch.stack(backward, -2), self.chain.lengths)

    def marginals(self) -> Tensor:
        unary = self.chain.unary
        joint = (self.forward + self.backward - unary).masked_fill(unary == -torch.inf, -torch.inf)
        return mask_padding(self.padding, joint.softmax(-1))

    def pair_marginals(self) -> Tensor:
        joint = self.forward[:, :-1].unsqueeze(-1) + self.chain.transition + self.backward[:, 1:].unsqueeze(-2)
        return mask_padding(self.padding, joint.flatten(-2).softmax(-1).unflatten(-1, joint.shape[-2:]), 1)

    def expected_steps(self, weight: Tensor) -> Tensor:
        return torch.einsum("b,btij->ij", weight, self.pair_marginals())

    def mean(self, values: ChainPotentials) -> Tensor:
        return mean(self.chain, values)[1]

    def sample(self, count: int) -> Tensor:
        return trace(Draw(), self.chain, self._folded[1], (count,))


class LogGradients(LogMessages):
    """Differentiable messages in log space: plain operations only, with marginals as gradients of log Z.

    The cost of gradients of any order is linear in N, because no gradient of a part has the size of the whole.
    """

    def marginals(self) -> Tensor:
        return self._gradient(self.chain.unary, "unary")

    def pair_marginals(self) -> Tensor:
        batch, sites, labels = self.chain.unary.shape
        return self._gradient(self.chain.transition.expand(batch, sites - 1, labels, labels), "transition")

    def _gradient(self, potentials: Tensor, kind: str) -> Tensor:
        def total(potentials: Tensor) -> Tensor:
            return fold(LogSumExp(), self.chain._replace(**{kind: potentials}))[0].sum()

        return torch.func.grad(total)(potentials)


class MergedMessages:
    """Merges the messages of rows that were computed in different ways.

    Args:
        parts: pairs of row indices (B',) and their messages.
    """

    def __init__(self, parts: list[tuple[Tensor, Any]]) -> None:
        self.rows, self.parts = zip(*parts, strict=True)
        self.inverse = torch.cat(self.rows).argsort()
        self.log_partition = self._joined(lambda part: part.log_partition)

    def marginals(self) -> Tensor:
        return self._joined(lambda part: part.marginals())

    def pair_marginals(self) -> Tensor:
        return self._joined(lambda part: part.pair_marginals())

    def expected_steps(self, weight: Tensor) -> Tensor:
        return sum(part.expected_steps(weight[index]) for index, part in zip(self.rows, self.parts, strict=True))

    def mean(self, values: ChainPotentials) -> Tensor:
        parts = [part.mean(select_rows(values, index)) for index, part in zip(self.rows, self.parts, strict=True)]
        return torch.cat(parts, -1).index_select(-1, self.inverse)

    def sample(self, count: int) -> Tensor:
        return self._joined(lambda part: part.sample(count), 1)

    def _joined(self, query: Callable[[Any], Tensor], dim: int = 0) -> Tensor:
        return torch.cat([query(part) for part in self.parts], dim).index_select(dim, self.inverse)


class _Weights(Semiring):
    """Weights in exp space, from which a trace samples."""

    def times(self, a: Tensor, lifted: Tensor) -> Tensor:
        return a * lifted

    def choose(self, candidates: Tensor) -> Tensor:
        return draw(candidates)


def draw_by_tables(forward: Tensor, chain: ChainPotentials, count: int) -> Tensor:
    """Samples labels (count, B, N) as :func:`trace` with :class:`_Weights` does, but faster for many samples per row.

    For each site and next label it tabulates the cumulative probabilities, V^2 numbers per row. A sample reads one row
    of the table in two steps of about sqrt(V) numbers: first the block that contains its label, then the label in the
    block.
    """
    batch, sites, labels = forward.shape
    width = isqrt(labels - 1) + 1
    forward = pad(forward, (0, width**2 - labels))  # padded with probability zero
    into = pad(chain.transition.mT.contiguous(), (0, width**2 - labels))
    ends = None if chain.lengths is None else chain.lengths.repeat_interleave(count)
    if ends is not None:  # an additional row, for sites without a next label
        into = pad(into, (0, 0, 0, 1), value=1.0)
    height = into.shape[-2]
    first = (height * torch.arange(batch, device=forward.device)).repeat_interleave(count)
    offset, ones = first.to(forward), forward.new_ones(width)
    row = draw(forward[:, -1:].expand(-1, count, -1)).flatten() + offset  # (B * count,), row of the label in the tables
    drawn = []
    each = max(1, 2**16 // (batch * height * width**2))  # number of sites whose tables fit in the processor's cache
    for stop in range(sites - 1, 0, -each):
        start = max(stop - each, 0)
        steps = into if into.dim() == 2 else into[:, start:stop] if into.shape[1] > 1 else into
        shares = (forward[:, start:stop, None] * steps).cumsum_(-1)
        shares /= shares[..., -1:].clone()  # makes the last one exactly 1
        shares = shares.transpose(0, 1).reshape(stop - start, -1, width).contiguous()
        blocks = shares[..., -1].reshape(stop - start, -1, width).contiguous()
        # in (0, 1], so that labels of probability zero are never drawn
        levels = 1 - torch.rand(stop - start, batch * count, 1, dtype=shares.dtype, device=shares.device)
        tables = list(zip(blocks.unbind(0), shares.unbind(0), levels.unbind(0), strict=True))
        for t in range(stop - 1, start - 1, -1):
            if ends is not None:
                row = torch.where(ends <= t + 1, labels + offset, row)
            block, share, level = tables[t - start]
            drawn.append(row.long())
            place = row.addmv(block.index_select(0, drawn[-1]).lt_(level), ones, beta=width)
            place = place.addmv_(share.index_select(0, place.long()).lt_(level), ones, beta=width)
            row = place.sub_(row, alpha=width**2).add_(offset)
    strings = torch.stack([row.long(), *drawn[::-1]]).sub_(first).reshape(sites, batch, count).permute(2, 1, 0)
    ends = None if ends is None else ends.reshape(batch, count).T
    return mask_padding(padding_mask(ends, sites), strings.contiguous())


def forward_backward(x: Tensor, forward: ChainPotentials, backward: ChainPotentials, every: int) -> Tensor:
    """Multiplies the factors x (N, 2, B, V) of both directions along the sites, in place.

    Returns:
        The scales (K, 2, B), of which the first is 1.
    """
    shared = forward.transition.dim() == 2
    both = torch.stack([forward.transition, backward.transition]) if shared else None
    steps = [] if shared else list(zip(forward.steps(), backward.steps(), strict=True))
    factors, scales = x.unbind(0), [x.new_ones(*x.shape[1:3], 1)]
    for t in range(1, len(factors)):
        last, here = factors[t - 1], factors[t]
        if both is not None:
            here *= torch.bmm(last, both)
        else:
            for d, step in enumerate(steps[t - 1]):
                here[d] *= (last[d].unsqueeze(-2) @ step).squeeze(-2)
        if t % every == 0:
            scales.append(here.sum(-1, keepdim=True))
            here /= scales[-1]
    return torch.cat(scales, -1).permute(2, 0, 1)


def backward_step(transition: Tensor, after: Tensor) -> Tensor:
    """Returns E z for weights E (V, V) or (B, M or 1, V, V) and messages z (B, M, V)."""
    return after @ transition.mT if transition.dim() == 2 else (transition @ after.unsqueeze(-1)).squeeze(-1)


def absorb_ends(chain: ChainPotentials) -> Tensor:
    """Returns a copy of the unary potentials (B, N, V) in double precision, with those of the ends added."""
    unary = chain.unary.to(double_precision(chain.unary).dtype, copy=True)
    unary[:, 0] += chain.initial
    last = last_site(chain).unsqueeze(-1).expand(-1, 1, unary.shape[-1])
    return unary.scatter_add_(1, last, chain.final.to(unary).unsqueeze(1))


def last_site(chain: ChainPotentials) -> Tensor:
    """Returns the index of the last site, (B, 1); 0 for empty rows."""
    if chain.lengths is None:
        return torch.full((len(chain.unary), 1), chain.unary.shape[1] - 1, device=chain.unary.device)
    return (chain.lengths - 1).clamp(min=0).unsqueeze(-1)


def select_rows(chain: ChainPotentials, index: Tensor) -> ChainPotentials:
    """Returns the rows (B',) of a chain; a shared transition is not copied."""
    unary, transition, initial, final = chain[:4]
    initial, final = initial.index_select(-2, index), final.index_select(-2, index)
    transition = transition if transition.dim() == 2 else transition.index_select(-4, index)
    lengths = None if chain.lengths is None else chain.lengths[index]
    return ChainPotentials(unary.index_select(-3, index), transition, initial, final, lengths)


def shifted(potentials: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns potentials with maximum 0 over the dims, and the shift; potentials that are all -inf are not shifted."""
    top = potentials.amax(dims, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    return potentials - top, top


def double_precision(potentials: Tensor) -> Tensor:
    """Casts potentials to float64, except on devices without float64."""
    return potentials if potentials.device.type == "mps" else potentials.double()
