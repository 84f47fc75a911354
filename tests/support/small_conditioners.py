"""Small conditioners written out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyro_genexact as gx


class Bigram(gx.Conditioner):
    """logits[y_{t-1}], of a table whose last row is for the first site; counts what it reads."""

    class State(gx.conditioners.IndependentState):
        pass

    def __init__(self, table):
        super().__init__()
        self.table, self.num_params, self.site = torch.nn.Parameter(table), table.shape[1], table.shape[1]
        self.work = []

    def start(self, context, batch_size):
        return self.table[-1].expand(batch_size, -1), self.State(
            0, self.new_version(), self.table.new_zeros(batch_size)
        )

    def extend(self, y, state):
        self.work.append(y.numel())
        return self.table[y.long()], self.advance(state, y.shape[1])


class RunningSum(gx.Conditioner):
    """A conditioner of any length with nothing but ``start`` and ``extend``: a small net of sums of what it read."""

    class State(NamedTuple):
        position: int
        version: list[int]
        total: Tensor
        context: Tensor | None

    def __init__(self, num_params, context=0, k=1):
        super().__init__()
        self.num_params, self.context, self.site = num_params, context, (k,) if k > 1 else ()
        self.read = nn.Linear(k, 6)
        self.write = nn.Linear(6 + context, num_params)

    def start(self, context, batch_size):
        total = self.read.weight.new_zeros(batch_size, 1, 6)
        return self._phi(total, context).squeeze(1), self.State(0, self.new_version(), total, context)

    def extend(self, y, state):
        if len(y) != len(state.total):
            raise ValueError(f"Expected y.shape[0] == {len(state.total)} (rows of the state); got {tuple(y.shape)}.")
        features = torch.tanh(self.read(y if y.dim() == 3 else y.unsqueeze(-1)))
        total = state.total + features.cumsum(1)
        return self._phi(total, state.context), self.advance(state, y.shape[1])._replace(total=total[:, -1:])

    def _phi(self, total, context):
        parts = [total] if context is None else [total, context.unsqueeze(1).expand(-1, total.shape[1], -1)]
        return torch.sin(self.write(torch.cat(parts, -1)))
