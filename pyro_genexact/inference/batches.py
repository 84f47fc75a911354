"""Checked batches of rows of tensors, arrays, tables and Datasets, for ``fit``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

Context = Any  # a tensor, an array or a table (N, ...), a dict of these, or None
SHOWN = 10  # rows that an error message lists


@dataclass(frozen=True)
class Batch:
    """B rows and their indices ``rows`` (B,) in the user's data. The key of a positional context is None."""

    rows: Tensor
    data: Any
    context: dict[str | None, Any]
    weights: Tensor | None = None

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """Applies a function to every tensor of the batch."""
        context = {key: function(value) for key, value in self.context.items()}
        weights = None if self.weights is None else function(self.weights)
        return Batch(function(self.rows), function(self.data), context, weights)

    def take(self, rows: Tensor) -> Batch:
        """Returns the rows with these positions in the batch."""
        return self.map(lambda x: _taken(x, rows))

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Returns the batch in pinned memory; DataLoader calls this method."""
        return self.map(lambda x: x.pin_memory())

    def check(self, name: str) -> Batch:
        """Raises if a tensor has another number of rows, or contains NaN or infinity; ``name`` is the user's argument."""
        prefix = "context" if name == "data" else f"{name} context"
        named = {prefix + ("" if key is None else f"[{key!r}]"): value for key, value in self.context.items()}
        for label, x in {name: self.data, **named}.items():
            if not isinstance(x, (Tensor, np.memmap)):
                raise TypeError(f"Expected {label} to be a tensor; got {type(x).__name__}.")
            if x.shape[:1] != self.rows.shape:
                raise ValueError(
                    f"Expected {label}.shape[0] == {len(self.rows)} (rows of {name}); got {tuple(x.shape)}."
                )
            # a finite sum implies finite elements, and costs a tenth of a check of each element
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.sum().isfinite():
                continue
            if not x.isfinite().all():
                bad = self.rows[~x.isfinite().reshape(len(x), -1).all(1).to(self.rows.device)].tolist()
                raise ValueError(f"Expected {label} to be finite; got NaN or infinity, first in rows {bad[:SHOWN]}.")
        return self


def _taken(x: Any, rows: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().index_select(0, rows.to(x.device))
    return _from_numpy(x[rows.cpu().numpy()])  # indexing with an array copies


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Returns a tensor; copies only reversed and read-only arrays and those of another byte order."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


class Columns(Dataset[Batch]):
    """A Dataset of tensors and memory-mapped arrays with the same rows; an item is the batch of some rows.

    Args:
        columns: all rows.
        name: the user's argument.
        dtype: the module's dtype, to which floating-point numbers of memory-mapped arrays are converted.
    """

    def __init__(self, columns: Batch, name: str, dtype: torch.dtype) -> None:
        self.columns, self.name, self.dtype = columns.check(name), name, dtype
        self.weights = columns.weights
        values = (columns.data, *columns.context.values())
        self.lazy = any(not isinstance(x, Tensor) for x in values)  # converted and checked batch by batch

    def __getitem__(self, rows: Tensor) -> Batch:
        batch = self.columns.take(rows)
        if not self.lazy:
            return batch
        return replace(batch.map(self._converted), rows=rows, weights=batch.weights).check(self.name)

    def _converted(self, x: Tensor) -> Tensor:
        return x.to(self.dtype if x.is_floating_point() else torch.bool if x.dtype == torch.bool else torch.int64)


class Items(Dataset[Batch]):
    """A Dataset of batches made from the user's map-style Dataset, whose items are a row or a (row, context) tuple."""

    def __init__(self, dataset: Dataset[Any], name: str, weights: Tensor | None) -> None:
        self.dataset, self.name, self.weights = dataset, name, weights

    def __getitem__(self, rows: Tensor) -> Batch:
        _seed_worker(rows)
        weights = None if self.weights is None else self.weights[rows]
        return batch_of(self._collated(rows.tolist()), rows, self.name, weights)

    def _collated(self, rows: list[int]) -> Any:
        at_once = getattr(self.dataset, "__getitems__", None)
        try:
            items = at_once(rows) if at_once else [self.dataset[row] for row in rows]
        except Exception:
            for row in rows:  # finds the row that raises
                self._item(row)
            raise
        if isinstance(items[0], list):
            raise TypeError(f"Expected items of {self.name} to be a row or a tuple (row, context); got a list.")
        try:
            return default_collate(items)
        except RuntimeError as error:
            raise ValueError(
                f"Expected items of {self.name} to have the same shape; got different ones in rows {rows}: {error}"
            ) from error

    def _item(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:
            error.add_note(f"Raised by row {row} of {self.name}.")
            raise


def _seed_worker(rows: Tensor) -> None:
    """Seeds a worker process by the rows of its batch, so that a continued fit draws the same random numbers."""
    worker = get_worker_info()
    if worker is not None:
        # worker.seed minus the id is the same in all workers
        seed = hash((worker.seed - worker.id, *rows.tolist())) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def batch_of(items: Any, rows: Tensor | None, name: str, weights: Tensor | None = None) -> Batch:
    """Returns the batch of collated items, which are rows or (rows, contexts)."""
    # a TensorDataset of one tensor has 1-tuples as items
    row, *context = items if isinstance(items, (tuple, list)) else (items,)
    if len(context) > 1:
        raise TypeError(f"Expected items of {name} to be a row or (row, context); got {len(items)} parts.")
    if rows is None:
        rows = torch.arange(len(row) if isinstance(row, Tensor) and row.dim() else 0, device="cpu")
    return Batch(rows, row, keyed(*context), weights).check(name)


def keyed(context: Any = None) -> dict[str | None, Any]:
    """Returns the context as a dict; the key of a positional context is None."""
    if context is None:
        return {}
    return dict(context) if isinstance(context, Mapping) else {None: context}


def column(x: Any, name: str, dtype: torch.dtype) -> Any:
    """Converts arrays and tables to tensors of the module's dtype or int64; returns memory maps and other objects unchanged."""
    if isinstance(x, (Tensor, Dataset, np.memmap)):
        return x
    array = x.to_numpy() if hasattr(x, "to_numpy") else x
    if not isinstance(array, np.ndarray):
        return x
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"Expected {name} of numbers; got {type(x).__name__} of dtype {array.dtype}. Encode categories as integers "
            "from 0, e.g. with pandas.factorize, and convert columns of mixed dtypes to one array of floats."
        )
    if array.dtype.kind in "iu":
        array = array.astype(np.int64, copy=False)
    tensor = _from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def weights_of(weights: Any, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Returns checked row weights, scaled to mean 1."""
    if weights is None:
        return None
    values = torch.as_tensor(column(weights, "weights", dtype), device="cpu").to(dtype)
    if values.shape != (rows,):
        raise ValueError(f"Expected weights.shape == ({rows},), one per row; got {tuple(values.shape)}.")
    if not (values.isfinite().all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(
            f"Expected weights to be finite, not negative and not all 0; got {values.min()} to {values.max()}."
        )
    return values / values.mean()
