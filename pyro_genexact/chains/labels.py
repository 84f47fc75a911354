"""Label sequences: their support, their score, and their left-to-right conditionals."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner
from ..contexts import Covariates
from ..core.lengths import site_mask
from ..families.in_support import feasible_point
from .messages import LogMessages, double_precision
from .padding import mask_padding, padding_mask

GivenPotentials = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""unary (*, N, V), transition (V, V) or (*, N - 1 or 1, V, V), initial and final (*, V) or None."""


class PaddedSites(constraints.Constraint):
    """Constraint of sequences whose sites satisfy a constraint up to a row's length, with any values after it.

    Args:
        one: the constraint of a site.
        lengths: integers (*batch).

    Example:
        >>> sites = PaddedSites(constraints.positive, torch.tensor([2, 1]))
        >>> sites.check(torch.tensor([[1.0, -1.0], [1.0, torch.nan]]))
        tensor([False,  True])
    """

    def __init__(self, one: Any, lengths: Tensor) -> None:
        self.one, self.lengths = one, lengths
        self.is_discrete, self.event_dim = one.is_discrete, one.event_dim + 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.one})"

    def check(self, value: Tensor) -> Tensor:
        inside = self.one.check(value)
        return (inside | ~site_mask(self.lengths, inside.shape[-1])).all(-1)

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns a value that satisfies the constraint and broadcasts with ``like``."""
        return feasible_point(self.one, like)


class LabelStrings(PaddedSites):
    """Constraint of integers 0 ... V - 1 up to a row's length, with any values after it.

    Example:
        >>> import torch
        >>> strings = LabelStrings(3, torch.tensor([2, 1]))
        >>> strings.check(torch.tensor([[0, 5], [2, -100]]))
        tensor([False,  True])
    """

    def __init__(self, num_labels: int, lengths: Tensor) -> None:
        super().__init__(constraints.integer_interval(0, num_labels - 1), lengths)
        self.num_labels = num_labels

    def __repr__(self) -> str:
        return f"LabelStrings(num_labels={self.num_labels})"


class ConditionalTables(Conditioner):
    """Looks up the parameters of a label given the previous one in tables (B, N, V * V), which are the context.

    The first site uses row 0.
    """

    class State(NamedTuple):
        """Tables (B, N, V, V) and the position in them."""

        position: int
        version: list[int]
        tables: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.site = self.num_params = num_labels
        self.context = Covariates(num_labels**2)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, State]:
        assert context is not None
        tables = context.unflatten(-1, (self.num_params, self.num_params))
        return tables[:, 0, 0], self.State(0, self.new_version(), tables)

    def extend(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        tables = state.tables[:, state.position + 1 : state.position + 1 + y.shape[1]]
        return tables.take_along_dim(y.long()[..., None, None], -2).squeeze(-2), self.advance(state, y.shape[1])


def conditional_logits(messages: LogMessages) -> Tensor:
    """Returns the logits (B, N, V, V) of each label given the previous one; at the first site all rows are equal."""
    chain, later = messages.chain, messages.backward.unsqueeze(-2)  # (B, N, 1, V)
    first = (chain.initial.unsqueeze(-2) + later[:, 0]).expand(-1, later.shape[-1], -1)
    tables = torch.cat([first.unsqueeze(1), chain.transition + later[:, 1:]], 1)
    # normalised here in double precision; rows that no history reaches are never used
    tables = tables.masked_fill((tables == -torch.inf).all(-1, keepdim=True), 0.0).log_softmax(-1)
    return mask_padding(messages.padding, tables)


def log_weight(potentials: GivenPotentials, lengths: Tensor | None, value: Tensor) -> Tensor:
    """Returns the scores of values (*, N) in double precision, of the broadcast batch shape; -inf for invalid labels.

    Args:
        potentials: potentials, whose batch dims broadcast.
        lengths: (*), or None.
        value: the values; padding is ignored.
    """
    unary, transition, initial, final = potentials
    sites, num_labels = unary.shape[-2:]
    padding = padding_mask(lengths, sites)
    value = value if padding is None else torch.where(padding, 0, value)
    labels = value.long()
    inside = (labels >= 0) & (labels < num_labels) & (labels == value)
    labels = torch.where(inside, labels, 0)
    steps = labels[..., :-1] * num_labels + labels[..., 1:]
    factors = [gather_labels(unary, labels), gather_labels(transition.flatten(-2), steps)]
    if padding is not None:
        factors = [torch.where(padding[..., first:], 0.0, f) for first, f in enumerate(factors)]
    site = torch.arange(sites, device=labels.device)
    last = sites if lengths is None else lengths.unsqueeze(-1)
    for end, here in ((initial, (site == 0) & (last > 0)), (final, site == last - 1)):
        if end is not None:
            factors.append(torch.where(here, gather_labels(end.unsqueeze(-2), labels), 0.0))
    score = sum(double_precision(f).sum(-1) for f in factors)
    return torch.where(inside.all(-1), score, -torch.inf)


def gather_labels(potentials: Tensor, labels: Tensor) -> Tensor:
    """Returns the potentials (*, M, K) at labels (*, M); batch dims broadcast without copies of the potentials."""
    own = potentials.shape[:-1]
    start = torch.arange(0, potentials.numel(), potentials.shape[-1], device=labels.device).reshape(own)
    index = start + labels
    return potentials.reshape(-1).index_select(0, index.flatten()).reshape(index.shape)
