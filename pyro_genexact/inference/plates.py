"""The plates of a model that correspond to the batch dims of an amortised guide's context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


@dataclass(frozen=True)
class RowPlates:
    """The leftmost plates of a model's latents, one for each batch dim of a context; none without a context.

    Args:
        frames: their frames in Pyro, from left to right.
        dims: the number of batch dims of the latents, including those of the other plates.
    """

    frames: tuple[Any, ...]
    dims: int

    @classmethod
    def of(cls, sites: Iterable[Any], sizes: torch.Size) -> RowPlates:
        """Returns the row plates of latent sites, for a context with batch shape ``sizes``.

        Raises:
            ValueError: if the sizes do not match, if a latent is outside of the row plates, or if a latent is in another
                subsampled plate.
        """
        sites = list(sites)
        found = {frame.name: frame for site in sites for frame in site["cond_indep_stack"]}
        ordered = sorted(found.values(), key=lambda frame: frame.dim)
        plates = cls(tuple(ordered[: len(sizes)]), -ordered[0].dim if ordered else 0)
        adjacent = all(frame.dim == index - plates.dims for index, frame in enumerate(plates.frames))
        if _sizes(plates.frames) != sizes or not adjacent:
            raise ValueError(
                f"Expected context.shape[:-1] to be the sizes of the model's leftmost plates of latents, "
                f"{[(f.name, f.size) for f in ordered]}; got {tuple(sizes)}."
            )
        for site in sites:
            plates._check_site(site)
        return plates

    def _check_site(self, site: Any) -> None:
        name, inside = site["name"], {frame.name for frame in site["cond_indep_stack"]}
        if missing := [row for row in self.names if row not in inside]:
            raise ValueError(
                f"Expected all latents in plate {missing[0]!r}, whose rows are those of the context; got {name!r} "
                "outside of it."
            )
        for frame in site["cond_indep_stack"]:
            if frame.size < 0:
                raise ValueError(
                    f"Expected plates of latents to have a size; got {name!r} in plate {frame.name!r}, which has none."
                )
            if frame.full_size not in (None, frame.size) and frame.name not in self.names:
                raise ValueError(
                    f"Expected no latents in subsampled plates without a context; got {name!r} in plate {frame.name!r} with "
                    f"a subsample of {frame.size} of {frame.full_size}. Amortise the guide with a context."
                )

    @property
    def names(self) -> list[str]:
        """The names of the plates."""
        return [frame.name for frame in self.frames]

    def check(self, sizes: torch.Size) -> None:
        """Raises a ValueError if the number of plates differs from that of a context's batch dims."""
        if len(sizes) != len(self.frames):
            raise ValueError(
                f"Expected context with {len(self.frames)} batch dims, as in the first call; got context.shape[:-1] == "
                f"{tuple(sizes)}."
            )

    def spread(self, x: Tensor) -> Tensor:
        """Reshapes (..., *rows, n) to (..., *rows, 1, ..., 1, n), with a dim of size 1 for each other plate."""
        return x.reshape(*x.shape[:-1], *[1] * (self.dims - len(self.frames)), x.shape[-1])

    def of_one_row(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of a latent (*rows, ...) with all row dims set to 1."""
        return torch.Size([1] * len(self.frames) + list(shape[len(self.frames) :]))

    def now(self, sizes: torch.Size, program: Callable[[], Any]) -> list[pyro.plate]:
        """Returns the plates for this call, after running the model up to its first latent in them.

        Args:
            sizes: the batch shape of the context.
            program: the model, called without arguments.
        """
        if not self.frames:
            return []
        found = _UpToPlates(self.names)
        with torch.no_grad(), torch.random.fork_rng([]), poutine.block(), suppress(_Reached), found:
            program()
        if _sizes(found.frames) != sizes:
            raise ValueError(
                f"Expected context.shape[:-1] == {_sizes(found.frames)}, the sizes of the plates {self.names}; "
                f"got {tuple(sizes)}."
            )
        made = {
            f.name: pyro.plate(f.name, f.full_size or f.size, dim=f.dim, subsample_size=f.size)
            for f in sorted(found.frames)
        }
        return [made[name] for name in self.names]


def _sizes(frames: Iterable[Any]) -> tuple[int, ...]:
    return tuple(frame.size for frame in frames)


class _Reached(Exception):
    """Ends a run of the model early."""


class _UpToPlates(Messenger):
    """Ends a run of a model at the first latent that is in all of some plates, and stores the frames of the plates."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names: Sequence[str] = names
        self.frames: list[Any] = []

    def _pyro_sample(self, msg: Any) -> None:
        frames = {frame.name: frame for frame in msg["cond_indep_stack"]}
        if not msg["is_observed"] and not site_is_subsample(msg) and all(name in frames for name in self.names):
            self.frames = [frames[name] for name in self.names]
            raise _Reached
