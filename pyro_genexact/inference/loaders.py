"""Loaders of fit: the order of rows, batches on a device, epoch by epoch, of one or several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..core.random import generator
from .batches import Batch, batch_of
from .ranks import Ranks


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
