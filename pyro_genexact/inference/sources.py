"""The user's data for ``fit`` as rows or as a loader, and the rows held out for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..core.random import generator
from .batches import Batch, Columns, Items, column, keyed, weights_of
from .loaders import Loader, Order
from .ranks import Ranks


@dataclass(frozen=True)
class Rows:
    """The rows ``index`` (N,) of a source; ``name`` is the user's argument."""

    source: Columns | Items
    index: Tensor
    name: str

    def loader(
        self, batch_size: int, ranks: Ranks, device: torch.device, seed: int | None = None, num_workers: int = 0
    ) -> Loader:
        """Returns a loader of batches, in random order if there is a seed."""
        index = self.index
        if isinstance(self.source, Columns) and num_workers == 0 and not self.source.lazy:
            index = index.to(self.source.columns.data.device)  # so that batches need no transfer
        order = Order(index, batch_size, ranks, seed)
        on_cpu = not isinstance(self.source, Columns) or self.source.lazy or not self.source.columns.data.is_cuda
        loader = DataLoader(
            self.source,
            batch_size=None,
            sampler=order,
            num_workers=num_workers,
            pin_memory=device.type == "cuda" and on_cpu,
            persistent_workers=num_workers > 0,
            generator=generator(seed or 0, ranks.rank),
        )
        return Loader(loader, self.name, device, order)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Returns batches in the order of the index."""
        return (self.source[rows].to(device) for rows in self.index.split(batch_size))


def source_of(data: Any, context: Any, weights: Any, name: str, dtype: torch.dtype) -> Rows | Iterable[Any]:
    """Returns the rows of the user's data, or the user's loader, after checks that do not read a Dataset.

    Args:
        data: the user's data.
        context: the user's context.
        weights: the user's weights.
        name: the user's argument.
        dtype: the module's dtype, to which floating-point arrays and tables are converted.
    """
    data = column(data, name, dtype)
    if isinstance(data, (DataLoader, IterableDataset)) or type(data).__name__ == "_FabricDataLoader":
        for other, value in (("context", context), ("weights", weights)):
            if value is not None:
                raise ValueError(
                    f"Expected {other}=None if {name} is a {type(data).__name__}; got {type(value).__name__}."
                )
        return data
    return rows_of(data, context, name, dtype, weights)


def rows_of(data: Any, context: Any, name: str, dtype: torch.dtype = torch.float32, weights: Any = None) -> Rows:
    """Returns all rows of the user's data, after checks that do not read a Dataset."""
    data = column(data, name, dtype)
    columns = isinstance(data, (Tensor, np.memmap))
    if not columns and not (isinstance(data, Dataset) and hasattr(data, "__len__")):
        raise TypeError(
            f"Expected {name} to be a tensor, an array, a table, a Dataset or a DataLoader; got {type(data).__name__}."
        )
    if (columns and data.ndim == 0) or len(data) == 0:
        got = f"shape {tuple(data.shape)}" if columns else "an empty Dataset"
        raise ValueError(f"Expected {name} with at least one row; got {got}.")
    index = torch.arange(len(data), device="cpu")
    weights = weights_of(weights, len(data), dtype)
    if columns:
        contexts = {
            key: column(value, "context" + ("" if key is None else f"[{key!r}]"), dtype)
            for key, value in keyed(context).items()
        }
        return Rows(Columns(Batch(index, data, contexts, weights), name, dtype), index, name)
    if context is not None:
        raise ValueError(
            f"Expected context=None with a Dataset, whose items may be (row, context); got {type(context).__name__}."
        )
    return Rows(Items(data, name, weights), index, name)


def hold_out(train: Any, validation: Any, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the data for training and those for validation or None."""
    if validation is None:
        return train, None
    if isinstance(validation, (int, float)):
        return _split(train, validation, seed)
    pair = validation if isinstance(validation, (tuple, list)) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"Expected validation to be a (data, context) pair; got {len(pair)} parts.")
    held_out = source_of(pair[0], pair[1], None, "validation", dtype)
    if isinstance(train, Rows) and isinstance(held_out, Rows):
        _check_alike(train.source[train.index[:1]], held_out.source[held_out.index[:1]])
    return train, held_out


def _check_alike(one: Batch, other: Batch) -> None:
    if other.context.keys() != one.context.keys():
        raise ValueError(
            f"Expected validation with {_describe(one)} (as data has), e.g. as (data, context); got {_describe(other)}."
        )
    shape, got = tuple(one.data.shape[1:]), tuple(other.data.shape[1:])
    if got != shape:
        raise ValueError(f"Expected validation.shape[1:] == {shape} (that of data); got {got}.")


def _describe(batch: Batch) -> str:
    keys = list(batch.context)
    return "no context" if not keys else "a context" if keys == [None] else f"a context of {keys}"


def _split(rows: Any, fraction: float, seed: int) -> tuple[Rows, Rows]:
    if not isinstance(rows, Rows):
        raise ValueError(f"Expected separate validation rows if data is a {type(rows).__name__}; got {fraction}.")
    total = len(rows.index)
    if not 0 < fraction < 1:
        raise ValueError(f"Expected 0 < validation < 1 (a fraction of data); got {fraction}.")
    if not 0 < round(fraction * total) < total:
        raise ValueError(f"Expected validation to leave rows in both parts; got {fraction} of {total} rows.")
    order = torch.randperm(total, generator=generator(seed), device="cpu")
    held_out, kept = order.tensor_split([round(fraction * total)])
    weights = rows.source.weights
    if weights is not None:
        if not (weights[kept].any() and weights[held_out].any()):
            raise ValueError(
                f"Expected positive weights in both parts of the split; got a part with weights 0 alone for "
                f"validation={fraction}."
            )
        weights /= weights[kept].mean()  # the weighted mean of validation does not depend on the scale
    return replace(rows, index=kept), replace(rows, index=held_out)
