"""What a chain of labels is made of: its support and its tables."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Steps
from ..semirings import Chain, LogSumExp, flip_own, fold
from .messages import within


class LabelStrings(constraints.Constraint):
    """Integers 0 ... V - 1 up to a row's length, anything after it.

    Example:
        >>> LabelStrings(3, torch.tensor([2, 1])).check(torch.tensor([[0, 5], [2, -100]]))
        tensor([False,  True])
    """

    is_discrete, event_dim = True, 1

    def __init__(self, num_labels: int, lengths: Tensor) -> None:
        self.num_labels, self.lengths = num_labels, lengths

    def __repr__(self) -> str:
        return f"LabelStrings(num_labels={self.num_labels})"

    def check(self, value: Tensor) -> Tensor:
        gone = torch.arange(value.shape[-1], device=value.device) >= self.lengths.unsqueeze(-1)
        return ((value % 1 == 0) & (value >= 0) & (value < self.num_labels) | gone).all(-1)

    def anchor(self, like: Tensor) -> Tensor:
        """Some value inside, that broadcasts with ``like``."""
        return like.new_zeros(())


class Lookup(Conditioner):
    """Parameters of a label by the label before it, from tables (B, N, V * V) that are the context; the first from row 0."""

    class State(NamedTuple):
        position: int
        clock: list[int]
        tables: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.site = self.num_params = num_labels
        self.context = Steps(num_labels**2)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, State]:
        assert context is not None
        tables = context.unflatten(-1, (self.num_params, self.num_params))
        return tables[:, 0, 0], self.State(0, self.clock(), tables)

    def extend(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        tables = state.tables[:, state.position + 1 : state.position + 1 + y.shape[1]]
        return tables.take_along_dim(y.long()[..., None, None], -2).squeeze(-2), self.advance(state, y.shape[1])


def conditionals(chain: Chain) -> Tensor:
    """The logits (B, N, V, V) of a label by the label before it, which the first site lacks: rows alike there."""
    labels = chain.unary.shape[-1]
    backward = torch.stack(fold(LogSumExp(), chain.reversed())[1], -2)
    later = flip_own(backward, chain.lengths).unsqueeze(-2)  # (B, N, 1, V)
    first = (chain.initial.unsqueeze(-2) + later[:, 0]).expand(-1, labels, -1)
    tables = torch.cat([first.unsqueeze(1), chain.transition + later[:, 1:]], 1)
    # normalised here, where numbers are wide; what no history leads to is never looked up
    tables = tables.masked_fill((tables == -torch.inf).all(-1, keepdim=True), 0.0).log_softmax(-1)
    return within(chain.lengths, tables)


def pick(potentials: Tensor, labels: Tensor) -> Tensor:
    """potentials (*, M, K) at labels (*, M), of shapes that broadcast; without copies of the potentials."""
    own = potentials.shape[:-1]
    start = torch.arange(0, potentials.numel(), potentials.shape[-1], device=labels.device).reshape(own)
    index = start + labels
    return potentials.reshape(-1).index_select(0, index.flatten()).reshape(index.shape)
