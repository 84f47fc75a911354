"""Data of fit: rows of tensors or of a Dataset, checked, split, cut into batches, moved to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Context = Tensor | Mapping[str, Tensor] | None
SHOWN = 10  # rows that an error message lists


@dataclass(frozen=True)
class Batch:
    """B rows; ``rows`` (B,) are their numbers in the user's data. The key of a positional context is None."""

    rows: Tensor
    data: Tensor
    context: dict[str | None, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        context = {key: function(value) for key, value in self.context.items()}
        return Batch(function(self.rows), function(self.data), context)

    def take(self, rows: Tensor) -> Batch:
        return self.map(lambda x: x.detach().index_select(0, rows.to(x.device)))

    def check(self, name: str) -> Batch:
        """Raises for a tensor of another number of rows, or with NaN or infinity; name is the argument."""
        prefix = "context" if name == "data" else f"{name} context"
        named = {prefix + ("" if key is None else f"[{key!r}]"): value for key, value in self.context.items()}
        for label, x in {name: self.data, **named}.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"Expected {label} to be a tensor; got {type(x).__name__}.")
            if x.shape[:1] != self.rows.shape:
                raise ValueError(
                    f"Expected {label}.shape[0] == {len(self.rows)} (rows of {name}); got {tuple(x.shape)}."
                )
            if x.is_floating_point() and not x.isfinite().all():
                bad = self.rows[~x.isfinite().reshape(len(x), -1).all(1).to(self.rows.device)].tolist()
                raise ValueError(f"Expected {label} to be finite; got NaN or infinity, first in rows {bad[:SHOWN]}.")
        return self


@dataclass(frozen=True)
class Rows:
    """The rows ``index`` (N,) of tensors or of a Dataset; ``name`` is the argument that gave them."""

    source: Batch | Dataset[Any]
    index: Tensor
    name: str

    def batches(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Batches on the device, in random order where a generator is given."""
        order = self.index if generator is None else self.index[_permutation(len(self.index), generator)]
        if isinstance(self.source, Batch):
            order = order.to(self.source.data.device)  # once an epoch, not once a batch
        for rows in torch.split(order, batch_size):
            yield self.take(rows).map(lambda x: x.to(device))

    def take(self, rows: Tensor) -> Batch:
        if isinstance(self.source, Batch):
            return self.source.take(rows)
        batch = default_collate([self.source[row] for row in rows.tolist()])
        # a TensorDataset of one tensor has 1-tuples
        row, *context = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(context) > 1:
            raise TypeError(f"Expected items of {self.name} to be a row or (row, context); got {len(batch)} parts.")
        return Batch(rows, row, _keyed(*context)).check(self.name)


def _keyed(context: Any = None) -> dict[str | None, Tensor]:
    if context is None:
        return {}
    return dict(context) if isinstance(context, Mapping) else {None: context}


def _permutation(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")


def rows_of(data: Any, context: Any, name: str) -> Rows:
    """All rows of what the user gave, checked as far as can be without reading a Dataset."""
    if not isinstance(data, Tensor) and not (isinstance(data, Dataset) and hasattr(data, "__len__")):
        raise TypeError(f"Expected {name} to be a tensor or a map-style Dataset; got {type(data).__name__}.")
    if (isinstance(data, Tensor) and data.dim() == 0) or len(data) == 0:
        got = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else "an empty Dataset"
        raise ValueError(f"Expected {name} with at least one row; got {got}.")
    index = torch.arange(len(data), device="cpu")
    if isinstance(data, Tensor):
        return Rows(Batch(index, data, _keyed(context)).check(name), index, name)
    if context is not None:
        raise ValueError("Expected context=None with a Dataset (its items may be (row, context)); got one.")
    return Rows(data, index, name)


def hold_out(train: Rows, validation: Any, generator: torch.Generator) -> tuple[Rows, Rows | None]:
    """Rows for training and rows for validation."""
    if validation is None:
        return train, None
    if isinstance(validation, (int, float)):
        return _split(train, validation, generator)
    pair = validation if isinstance(validation, (tuple, list)) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"Expected validation to be a (data, context) pair; got {len(pair)} parts.")
    held_out = rows_of(pair[0], pair[1], "validation")
    one, other = train.take(train.index[:1]), held_out.take(held_out.index[:1])
    if other.context.keys() != one.context.keys():
        raise ValueError(
            f"Expected validation with {_describe(one)} (as data has), e.g. as (data, context); got {_describe(other)}."
        )
    shape, got = tuple(one.data.shape[1:]), tuple(other.data.shape[1:])
    if got != shape:
        raise ValueError(f"Expected validation.shape[1:] == {shape} (that of data); got {got}.")
    return train, held_out


def _describe(batch: Batch) -> str:
    keys = list(batch.context)
    return "no context" if not keys else "a context" if keys == [None] else f"a context of {keys}"


def _split(rows: Rows, fraction: float, generator: torch.Generator) -> tuple[Rows, Rows]:
    total = len(rows.index)
    if not 0 < fraction < 1:
        raise ValueError(f"Expected 0 < validation < 1 (a fraction of data); got {fraction}.")
    if not 0 < round(fraction * total) < total:
        raise ValueError(f"Expected validation to leave rows on both sides; got {fraction} of {total} rows.")
    held_out, kept = _permutation(total, generator).tensor_split([round(fraction * total)])
    return replace(rows, index=kept), replace(rows, index=held_out)
