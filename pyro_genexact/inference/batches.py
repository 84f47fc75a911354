"""Data of fit: tensors, arrays, tables, Datasets and loaders, checked, split, cut into batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from ..core.random import generator
from .ranks import Ranks

Context = Any  # a tensor, an array or a table (N, ...), a dict of such, or None
SHOWN = 10  # rows that an error message lists


@dataclass(frozen=True)
class Batch:
    """B rows; ``rows`` (B,) are their numbers in the user's data. The key of a positional context is None."""

    rows: Tensor
    data: Any
    context: dict[str | None, Any]
    weights: Tensor | None = None

    def map(self, function: Callable[[Any], Any]) -> Batch:
        context = {key: function(value) for key, value in self.context.items()}
        weights = None if self.weights is None else function(self.weights)
        return Batch(function(self.rows), function(self.data), context, weights)

    def take(self, rows: Tensor) -> Batch:
        return self.map(lambda x: _taken(x, rows))

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """What DataLoader asks for."""
        return self.map(lambda x: x.pin_memory())

    def check(self, name: str) -> Batch:
        """Raises for a tensor of another number of rows, or with NaN or infinity; name is the argument."""
        prefix = "context" if name == "data" else f"{name} context"
        named = {prefix + ("" if key is None else f"[{key!r}]"): value for key, value in self.context.items()}
        for label, x in {name: self.data, **named}.items():
            if not isinstance(x, (Tensor, np.memmap)):
                raise TypeError(f"Expected {label} to be a tensor; got {type(x).__name__}.")
            if x.shape[:1] != self.rows.shape:
                raise ValueError(
                    f"Expected {label}.shape[0] == {len(self.rows)} (rows of {name}); got {tuple(x.shape)}."
                )
            # a finite sum has finite terms only, and costs a tenth of looking at each
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.sum().isfinite():
                continue
            if not x.isfinite().all():
                bad = self.rows[~x.isfinite().reshape(len(x), -1).all(1).to(self.rows.device)].tolist()
                raise ValueError(f"Expected {label} to be finite; got NaN or infinity, first in rows {bad[:SHOWN]}.")
        return self


def _taken(x: Any, rows: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().index_select(0, rows.to(x.device))
    return _from_numpy(x[rows.cpu().numpy()])  # a copy: indices, not a slice


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy where torch cannot share the memory: of arrays that are reversed, read-only, or of another byte order."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


class Columns(Dataset[Batch]):
    """Tensors, and arrays on disk, of the same rows; an item is the batch of some rows.

    Args:
        columns: all rows.
        name: the argument that gave them.
        dtype: of the module: that of numbers with a fraction in arrays on disk.
    """

    def __init__(self, columns: Batch, name: str, dtype: torch.dtype) -> None:
        self.columns, self.name, self.dtype = columns.check(name), name, dtype
        self.weights = columns.weights
        values = (columns.data, *columns.context.values())
        self.lazy = any(not isinstance(x, Tensor) for x in values)  # read, converted and checked batch by batch

    def __getitem__(self, rows: Tensor) -> Batch:
        batch = self.columns.take(rows)
        if not self.lazy:
            return batch
        return replace(batch.map(self._converted), rows=rows, weights=batch.weights).check(self.name)

    def _converted(self, x: Tensor) -> Tensor:
        return x.to(self.dtype if x.is_floating_point() else torch.bool if x.dtype == torch.bool else torch.int64)


class Items(Dataset[Batch]):
    """A map-style Dataset whose items are a row or a (row, context) tuple; an item is the batch of some rows."""

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
            for row in rows:  # one by one, the row that raises is named
                self._item(row)
            raise
        if isinstance(items[0], list):
            raise TypeError(f"Expected items of {self.name} to be a row or a tuple (row, context); got a list.")
        try:
            return default_collate(items)
        except RuntimeError as error:
            raise ValueError(
                f"Expected items of {self.name} of one shape; got others in rows {rows}: {error}"
            ) from error

    def _item(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:
            error.add_note(f"Raised by row {row} of {self.name}.")
            raise


def _seed_worker(rows: Tensor) -> None:
    """Seeds what a worker process draws by its rows, so that a fit that was continued draws the same."""
    worker = get_worker_info()
    if worker is not None:
        seed = hash((worker.seed - worker.id, *rows.tolist())) % 2**32  # without the id: that of all workers
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def batch_of(items: Any, rows: Tensor | None, name: str, weights: Tensor | None = None) -> Batch:
    """The batch of collated items: rows, or rows and their contexts."""
    # a TensorDataset of one tensor has 1-tuples
    row, *context = items if isinstance(items, (tuple, list)) else (items,)
    if len(context) > 1:
        raise TypeError(f"Expected items of {name} to be a row or (row, context); got {len(items)} parts.")
    if rows is None:
        rows = torch.arange(len(row) if isinstance(row, Tensor) and row.dim() else 0, device="cpu")
    return Batch(rows, row, keyed(*context), weights).check(name)


def keyed(context: Any = None) -> dict[str | None, Any]:
    if context is None:
        return {}
    return dict(context) if isinstance(context, Mapping) else {None: context}


class Order(Sampler[Tensor]):
    """The rows of each batch of an epoch, of one of several processes.

    In random order where there is a seed: all processes cut the same permutation into joint batches and take their share
    of each. A last joint batch with fewer rows than processes is part of the one before.

    Args:
        index: the rows (N,).
        batch_size: rows in a batch of a process.
        ranks: the processes.
        seed: of the permutations, which differ from epoch to epoch; None for the order of the index.
    """

    def __init__(self, index: Tensor, batch_size: int, ranks: Ranks, seed: int | None) -> None:
        self.index, self.ranks, self.seed = index, ranks, seed
        joint = batch_size * ranks.size
        self.cuts = list(range(joint, len(index) - ranks.size + 1, joint))
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def __iter__(self) -> Iterator[Tensor]:
        index = self.index
        if self.seed is not None:
            order = torch.randperm(len(index), generator=generator(self.seed, self.epoch), device="cpu")
            index = index[order.to(index.device)]
        for joint in index.tensor_split(self.cuts)[self.start :]:
            yield joint.tensor_split(self.ranks.size)[self.ranks.rank]


@dataclass(frozen=True)
class Rows:
    """The rows ``index`` (N,) of a source; ``name`` is the argument that gave them."""

    source: Columns | Items
    index: Tensor
    name: str

    def loader(
        self, batch_size: int, ranks: Ranks, device: torch.device, seed: int | None = None, num_workers: int = 0
    ) -> Loader:
        """Their batches, in random order where there is a seed."""
        index = self.index
        if isinstance(self.source, Columns) and num_workers == 0 and not self.source.lazy:
            index = index.to(self.source.columns.data.device)  # once, not once a batch
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
        """Batches in the order of the index."""
        return (self.source[rows].to(device) for rows in self.index.split(batch_size))


class Loader:
    """Batches on a device, epoch by epoch.

    Args:
        loader: yields batches, or collated items.
        name: the argument that gave them.
        device: where batches go.
        order: that of the loader, where it is ours.

    Attributes:
        batches: how many an epoch has, or None where that is not known.
    """

    def __init__(self, loader: Iterable[Any], name: str, device: torch.device, order: Order | None = None) -> None:
        self.loader, self.name, self.device, self.order = loader, name, device, order
        try:
            self.batches: int | None = len(loader)  # type: ignore[arg-type]
        except TypeError:
            self.batches = None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from one on."""
        if self.order is not None:
            self.order.epoch, self.order.start = number, start
        else:
            _set_epoch(self.loader, number)
        with torch.device("cpu"):  # where DataLoader draws its seed
            items = iter(self.loader)
        if self.order is None:
            next(islice(items, start, start), None)  # the seeds of samplers, too, are drawn here
        return map(self._batch, self._alive(items))

    def _alive(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items; a worker that died while it sent one is named."""
        try:
            yield from items
        except (ConnectionError, EOFError) as error:
            if "DataLoader worker" in str(error):  # raised by the user's Dataset
                raise
            raise RuntimeError(f"DataLoader worker of {self.name} died. Was it killed, or out of memory?") from error

    def close(self) -> None:
        """Ends the workers; left to the garbage collector after an error, that takes ten seconds."""
        iterator = getattr(self.loader, "_iterator", None) if self.order is not None else None
        if iterator is not None:
            iterator._shutdown_workers()

    def rows(self, start: int, batches: int) -> int | None:
        """Rows of all processes in some batches from one on, where that is known."""
        if self.order is None:
            return None
        cuts = [0, *self.order.cuts, len(self.order.index)]
        return cuts[min(start + batches, len(cuts) - 1)] - cuts[start]

    def states(self) -> list[Tensor]:
        """The states of the generators that a user's loader brings; torch's own is not among them."""
        return [g.get_state() for g in self._generators()]

    def restore(self, states: list[Tensor]) -> None:
        """Restores what :meth:`states` returned."""
        for g, state in zip(self._generators(), states, strict=True):
            g.set_state(state.clone())

    def _generators(self) -> list[torch.Generator]:
        if self.order is not None:
            return []
        sampler, batches = (getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))
        parts = (self.loader, sampler, batches, getattr(batches, "sampler", None))
        found = (getattr(part, "generator", None) for part in parts)
        return [*dict.fromkeys(g for g in found if isinstance(g, torch.Generator))]

    def _batch(self, item: Any) -> Batch:
        return (item if isinstance(item, Batch) else batch_of(item, None, self.name)).to(self.device)


def _set_epoch(loader: Any, number: int) -> None:
    """Tells samplers that shuffle by the number of the epoch."""
    if hasattr(loader, "_num_iter_calls"):  # by which Fabric's loaders do this themselves
        loader._num_iter_calls = number
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(number)


def source_of(data: Any, context: Any, weights: Any, name: str, dtype: torch.dtype) -> Rows | Iterable[Any]:
    """Rows of what the user gave, or a loader of them, checked as far as can be without reading a Dataset.

    Args:
        data, context, weights: as the user gave them.
        name: the argument that gave them.
        dtype: of the module: that of arrays and tables of numbers with a fraction.
    """
    data = column(data, name, dtype)
    if isinstance(data, (DataLoader, IterableDataset)) or type(data).__name__ == "_FabricDataLoader":
        for other, value in (("context", context), ("weights", weights)):
            if value is not None:
                raise ValueError(f"Expected {other}=None with a {type(data).__name__} of {name}; got one.")
        return data
    return rows_of(data, context, name, dtype, weights)


def rows_of(data: Any, context: Any, name: str, dtype: torch.dtype = torch.float32, weights: Any = None) -> Rows:
    """All rows of what the user gave, checked as far as can be without reading a Dataset."""
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
    weights = _weights(weights, len(data), dtype)
    if columns:
        contexts = {
            key: column(value, "context" + ("" if key is None else f"[{key!r}]"), dtype)
            for key, value in keyed(context).items()
        }
        return Rows(Columns(Batch(index, data, contexts, weights), name, dtype), index, name)
    if context is not None:
        raise ValueError("Expected context=None with a Dataset (its items may be (row, context)); got one.")
    return Rows(Items(data, name, weights), index, name)


def column(x: Any, name: str, dtype: torch.dtype) -> Any:
    """Arrays and tables as tensors of the module's dtype or of integers; those on disk, and all else, as they are."""
    if isinstance(x, (Tensor, Dataset, np.memmap)):
        return x
    array = x.to_numpy() if hasattr(x, "to_numpy") else x
    if not isinstance(array, np.ndarray):
        return x
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"Expected {name} of numbers; got {type(x).__name__} of dtype {array.dtype}. Encode categories as integers "
            "from 0, e.g. by pandas.factorize, and give columns of several kinds as one array of floats."
        )
    if array.dtype.kind in "iu":
        array = array.astype(np.int64, copy=False)
    tensor = _from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _weights(weights: Any, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Row weights with mean 1."""
    if weights is None:
        return None
    values = torch.as_tensor(column(weights, "weights", dtype), device="cpu").to(dtype)
    if values.shape != (rows,):
        raise ValueError(f"Expected weights.shape == ({rows},), one a row; got {tuple(values.shape)}.")
    if not (values.isfinite().all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError("Expected weights finite, not negative and not all 0; got others.")
    return values / values.mean()


def hold_out(train: Any, validation: Any, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """What to train on, and what to validate on, or None."""
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
        raise ValueError(f"Expected validation rows of their own with a {type(rows).__name__}; got {fraction}.")
    total = len(rows.index)
    if not 0 < fraction < 1:
        raise ValueError(f"Expected 0 < validation < 1 (a fraction of data); got {fraction}.")
    if not 0 < round(fraction * total) < total:
        raise ValueError(f"Expected validation to leave rows on both sides; got {fraction} of {total} rows.")
    order = torch.randperm(total, generator=generator(seed), device="cpu")
    held_out, kept = order.tensor_split([round(fraction * total)])
    weights = rows.source.weights
    if weights is not None:
        if not (weights[kept].any() and weights[held_out].any()):
            raise ValueError(f"Expected weights not all 0 in either part of the split; got validation={fraction}.")
        weights /= weights[kept].mean()  # validation takes a weighted mean, whatever their scale
    return replace(rows, index=kept), replace(rows, index=held_out)
