"""ChainInference: log Z, mode, scores and message queries, cached for all queries of a CRF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from ..core.versions import version_of
from . import checks as check
from .labels import GivenPotentials, log_weight
from .log_partition import log_partition, messages_for, plain_operations_only, with_gradients
from .messages import Messages, ScaledMessages, double_precision
from .padding import mask_padding, padding_mask
from .semirings import ChainPotentials, Max, fold, trace


@dataclass
class ChainInference:
    """The potentials of a chain and the cached results of their recursion.

    Rows are all B combinations of the batch dims of the potentials. Results are in double precision.

    Attributes:
        given: potentials, whose batch dims broadcast.
        lengths: (*), or None.
        rows: the broadcast batch shape of potentials and lengths.
        batch_shape: the batch shape of the results of :meth:`in_batch`; rows broadcast to it.
        cache: messages and modes, valid as long as the potentials do not change.
    """

    given: GivenPotentials
    lengths: Tensor | None
    rows: Size
    batch_shape: Size
    cache: dict[str, Any]

    def potentials(self, rows: Size | None = None) -> ChainPotentials:
        """Returns the potentials of all rows, with 0 at padding.

        Shapes: (B, N, V), (V, V) or (B, N - 1 or 1, V, V), (B, V), (B, V), and lengths (B,).
        """
        rows = self.rows if rows is None else rows
        unary, transition, initial, final = self.given

        def flat(potentials: Tensor, dims: int) -> Tensor:
            shape = potentials.shape[potentials.dim() - dims :]
            return potentials.expand((*rows, *shape)).reshape(prod(rows), *shape)

        lengths = None if self.lengths is None else flat(self.lengths, 0)
        padding = padding_mask(lengths, unary.shape[-2])
        if transition.dim() > 2:
            transition = flat(transition, 3)
            if transition.shape[1] == unary.shape[-2] - 1:
                transition = mask_padding(padding, transition, 1)
        zero = unary.new_zeros(unary.shape[-1])
        initial, final = (flat(zero if p is None else p, 1) for p in (initial, final))
        if lengths is not None:  # an empty row has no ends
            empty = (lengths == 0).unsqueeze(-1)
            initial, final = initial.masked_fill(empty, 0.0), final.masked_fill(empty, 0.0)
        return ChainPotentials(mask_padding(padding, flat(unary, 2)), transition, initial, final, lengths)

    def possible(self) -> ChainPotentials:
        """Returns the potentials in double precision; raises a ValueError if a row has no possible label sequence."""
        chain = self.potentials()
        self.messages(chain)
        return chain.map(double_precision)

    def messages(self, chain: ChainPotentials | None = None) -> Messages:
        """Returns the messages of all rows; ``chain`` may pass :meth:`potentials` if they are already computed.

        Raises:
            ValueError: if a row has no possible label sequence.
        """

        def computed() -> Messages:
            messages = messages_for(self.potentials() if chain is None else chain)
            if not isinstance(messages, ScaledMessages):  # those are exact, and therefore possible
                check.possible(messages.log_partition, self.rows)  # raises before the result is cached
            return messages

        return self._once("messages", computed)

    def query(
        self, query: Callable[..., Tensor], chain: ChainPotentials | None = None, *values: ChainPotentials
    ) -> Tensor:
        """Returns a query of the messages, with gradients with respect to the potentials and the values.

        Args:
            query: function of the messages and the values.
            chain: the :meth:`potentials`, in any precision, of the rows or of rows that repeat them.
            values: further chains, of the shapes of ``chain``.
        """
        chain = self.potentials() if chain is None else chain
        messages = self.messages(chain) if len(chain.unary) == prod(self.rows) else messages_for(chain)
        return with_gradients(query, messages, chain, *values)

    def log_partition(self) -> Tensor:
        """Returns log Z in nats, of the shape of the rows."""
        chain = self.potentials()
        return log_partition(chain, self.messages(chain)).reshape(self.rows)

    def score(self, value: Tensor) -> Tensor:
        """Returns the scores of values (*, N), broadcast with the rows; -inf outside the support."""
        return log_weight(self.given, self.lengths, value)

    def best(self) -> Tensor:
        """Returns the most probable labels (B, N)."""

        def computed() -> Tensor:
            with torch.no_grad():
                chain = self.potentials().map(double_precision)
                score, messages = fold(Max(), chain)
                check.possible(score, self.rows)
                return trace(Max(), chain, messages)

        return self._once("best", computed)

    def in_batch(self, values: Tensor, event_dim: int = 0, sample_dim: int = 0) -> Tensor:
        """Reshapes values (*sample, B, *event) of the rows to the batch shape; floats get the dtype of the potentials."""
        if values.is_floating_point():
            values = values.to(self.given[0].dtype)
        sample, event = values.shape[:sample_dim], values.shape[values.dim() - event_dim :]
        ones = (1,) * (len(self.batch_shape) - len(self.rows))
        return values.reshape((*sample, *ones, *self.rows, *event)).expand((*sample, *self.batch_shape, *event))

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns a cached result; computes it anew if a potential changed, and always under torch.func or tracing."""
        if plain_operations_only():
            return compute()
        state = [None if p is None else version_of(p) for p in (*self.given, self.lengths)]
        if self.cache.get("state") != state:
            self.cache.clear()
        if name not in self.cache:
            self.cache.update({name: compute(), "state": state})
        return self.cache[name]
