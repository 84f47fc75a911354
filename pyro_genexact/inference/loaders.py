"""Loaders for ``fit``: the order of rows, and batches on a device, in one or several processes."""

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
    """A sampler of the rows of each batch of an epoch, for one of several processes.

    All processes cut the same permutation into joint batches and take their share of each. If the last joint batch has
    fewer rows than there are processes, it is merged with the one before.

    Args:
        index: the rows (N,).
        batch_size: the number of rows per batch and process.
        ranks: the processes.
        seed: the seed of the permutations, which differ between epochs; None for the order of ``index``.
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
    """Yields the batches of each epoch on a device.

    Args:
        loader: an iterable of batches or collated items.
        name: the user's argument.
        device: the device of the batches.
        order: the sampler of the loader; None for the user's own loaders.

    Attributes:
        batches: the number of batches per epoch, or None if it is unknown.
    """

    def __init__(self, loader: Iterable[Any], name: str, device: torch.device, order: Order | None = None) -> None:
        self.loader, self.name, self.device, self.order = loader, name, device, order
        try:
            self.batches: int | None = len(loader)  # type: ignore[arg-type]
        except TypeError:
            self.batches = None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Returns the batches of an epoch, from batch ``start`` on."""
        if self.order is not None:
            self.order.epoch, self.order.start = number, start
        else:
            _set_epoch(self.loader, number)
        with torch.device("cpu"):  # DataLoader draws its seed on the CPU
            items = iter(self.loader)
        if self.order is None:
            next(islice(items, start, start), None)  # skips batches; samplers draw their seeds here
        return map(self._batch, self._alive(items))

    def _alive(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yields the items; raises an error that names the argument if a worker process died."""
        try:
            yield from items
        except (ConnectionError, EOFError) as error:
            if "DataLoader worker" in str(error):  # raised by the user's Dataset
                raise
            raise RuntimeError(f"DataLoader worker of {self.name} died: it was killed or ran out of memory.") from error

    def close(self) -> None:
        """Ends the worker processes. After an error, the garbage collector would take ten seconds to do so."""
        iterator = getattr(self.loader, "_iterator", None) if self.order is not None else None
        if iterator is not None:
            iterator._shutdown_workers()

    def rows(self, start: int, batches: int) -> int | None:
        """Returns the number of rows in ``batches`` joint batches from ``start`` on, or None if it is unknown."""
        if self.order is None:
            return None
        cuts = [0, *self.order.cuts, len(self.order.index)]
        return cuts[min(start + batches, len(cuts) - 1)] - cuts[start]

    def states(self) -> list[Tensor]:
        """Returns the states of the generators of the user's loader, without torch's global one."""
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
    """Sets the epoch of samplers whose order depends on it."""
    if hasattr(loader, "_num_iter_calls"):  # from which Fabric's loaders set the epoch themselves
        loader._num_iter_calls = number
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(number)
