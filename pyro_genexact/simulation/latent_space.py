"""The latents of a model as vectors of categories and real numbers: their names, shapes, supports and plates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, biject_to, constraints

from ..core.leaves import map_leaves, tensors_in
from ..families.supports import innermost
from ..transforms.support import ToSupport

Site = dict[str, Any]
_ORDERED = tuple(type(getattr(dist.constraints, name)) for name in ("ordered_vector", "positive_ordered_vector"))


class Plate(NamedTuple):
    """A vectorised plate of a latent: its name, its dim, a negative index, and its size in the first run."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Latent:
    """A latent site of a model.

    Attributes:
        name: the name of the site.
        shape: the shape of its value in one run of the model, with 1 for the dim of the row plate.
        event_dim: the number of dims to the right of the plates.
        frames: the plates of the site.
        row: the dim of the row plate in the value, a negative index; None for a global latent.
        values: the support (K,) of each element of a discrete latent; None for a continuous one.
        onto: the map from real numbers onto the support of a continuous latent.
    """

    name: str
    shape: Size
    event_dim: int
    frames: tuple[Plate, ...]
    row: int | None
    values: Tensor | None
    onto: Any

    @classmethod
    def of(cls, site: Site, row_dim: int | None) -> Latent:
        """Returns the latent of a site; ``row_dim`` is the dim of the row plate if the site is in it."""
        name, fn, shape = site["name"], site["fn"], list(site["value"].shape)
        row = None if row_dim is None else row_dim - fn.event_dim
        if row is not None:
            shape[row] = 1
        discrete = innermost(fn.support).is_discrete
        values = _categories(name, fn) if discrete else None
        onto = None if discrete else _onto(name, _of_one_row(name, fn.support, row), Size(shape))
        frames = tuple(Plate(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized)
        return cls(name, Size(shape), fn.event_dim, frames, row, values, onto)

    @property
    def size(self) -> int:
        """The number of elements in one row."""
        return prod(self.shape)

    @property
    def real_size(self) -> int:
        """The number of real numbers that a continuous latent is mapped to."""
        return prod(self.onto.inverse_shape(Size((self.size,))))

    def flat(self, value: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Returns a value (*sample, *shape) as (*sample, R, size); R is 1 for a global latent.

        Discrete values are replaced by their places in ``values``.

        Raises:
            ValueError: if the value has another shape, or a discrete one is not in the support.
        """
        dims, shape = len(self.shape), list(self.shape)
        if self.row is not None:
            shape[self.row] = rows
        if list(value.shape[value.dim() - dims :]) != shape or value.dim() < dims:
            raise ValueError(f"Expected {self.name} of shape (..., {str(shape)[1:-1]}); got {tuple(value.shape)}.")
        sample = value.shape[: value.dim() - dims]
        if self.row is not None:
            value = value.movedim(self.row, len(sample))
        value = value.reshape(*sample, rows if self.row is not None else 1, self.size)
        if self.values is None:
            return value.to(dtype)
        same = value.unsqueeze(-1) == self.values.to(value.device)
        if not same.any(-1).all():
            raise ValueError(
                f"Expected values of {self.name} in {self.values.tolist()}; got {value[~same.any(-1)][0]}."
            )
        return same.int().argmax(-1).to(dtype)

    def unflat(self, flat: Tensor, batch: Size, merged: bool = False) -> Tensor:
        """Returns (*batch, R, size) as a value (*batch, *shape).

        Args:
            flat: the elements.
            batch: the batch shape.
            merged: whether the rightmost dims of the batch are those of the plates, of size 1, as in a vectorised guide.
        """
        value = flat if self.values is None else self.values.to(flat.device)[flat.long()]
        shape = list(self.shape)
        if self.row is not None:
            shape.pop(self.row)
            value = value.reshape((*batch, flat.shape[-2], *shape)).movedim(len(batch), self.row)
            shape = list(value.shape[len(batch) :])
        if merged:
            batch = batch[: max(0, len(batch) - (len(shape) - self.event_dim))]
        return value.reshape((*batch, *shape))


class Group:
    """Some latents as vectors of d categories followed by c numbers.

    Args:
        latents: the latents.
    """

    def __init__(self, latents: Sequence[Latent]) -> None:
        discrete = [x for x in latents if x.values is not None]
        self.continuous = [x for x in latents if x.values is None]
        self.latents = discrete + self.continuous
        self.categories = [len(x.values) for x in discrete for _ in range(x.size)]  # type: ignore[arg-type]
        self.sizes = [x.size for x in self.latents]
        self.size, self.d = sum(self.sizes), len(self.categories)
        self.real_size = sum(x.real_size for x in self.continuous)
        self.features = sum(self.categories) + self.real_size

    def pack(self, values: Mapping[str, Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        """Returns the values of one group as (*sample, R, size)."""
        return broadcast([x.flat(values[x.name], rows, dtype) for x in self.latents], 2)

    def unpack(self, packed: Tensor, batch: Size, merged: bool = False) -> dict[str, Tensor]:
        """Returns the values by name, given (*batch, R, size); ``merged`` as in :meth:`Latent.unflat`."""
        parts = packed.split(self.sizes, -1)
        return {x.name: x.unflat(part, batch, merged) for x, part in zip(self.latents, parts, strict=True)}

    def encoded(self, labels: Tensor) -> Tensor:
        """Returns the categories (..., d) as one-hot vectors (..., sum K)."""
        parts = [labels[..., i, None] == torch.arange(k, device=labels.device) for i, k in enumerate(self.categories)]
        return torch.cat(parts, -1).to(labels.dtype) if parts else labels[..., :0]

    def to_real(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the real numbers of continuous values (..., c), and log|dx/dy| (...,); -inf outside the support."""
        found, total = [], values.new_zeros(values.shape[:-1])
        for x, part in zip(self.continuous, values.split([x.size for x in self.continuous], -1), strict=True):
            real, ladj = _on(x.onto, values.device).inverse_and_ladj(part)
            found.append(real)
            total = total + ladj
        return torch.cat(found, -1), total

    def from_real(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the continuous values (..., c) of real numbers, and log|dx/dy| (...,)."""
        parts = real.split([x.real_size for x in self.continuous], -1)
        found = [_on(x.onto, real.device).call_and_ladj(part) for x, part in zip(self.continuous, parts, strict=True)]
        return torch.cat([value for value, _ in found], -1), sum(ladj for _, ladj in found)  # type: ignore[return-value]


def broadcast(parts: Sequence[Tensor], dims: int) -> Tensor:
    """Concatenates tensors along the last dim; all but ``dims`` rightmost dims broadcast."""
    batch = torch.broadcast_shapes(*(part.shape[:-dims] for part in parts))
    return torch.cat([part.expand(*batch, *part.shape[-dims:]) for part in parts], -1)


class Flattened:
    """The bijection of ``biject_to`` on flattened values.

    Args:
        support: the support of values of this shape.
        shape: the shape of a value.
    """

    def __init__(self, support: Any, shape: Size) -> None:
        self.support, self.shape, self.bijection = support, shape, biject_to(support)
        self.real_shape = self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        return Size((self.real_shape.numel(),))

    def inverse_and_ladj(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        batch = flat.shape[:-1]
        y = flat.reshape((*batch, *self.shape))
        inside = self.support.check(y).reshape(*batch, -1).all(-1)
        inner = self.bijection(y.new_zeros(self.real_shape))
        y = torch.where(inside.reshape(*batch, *[1] * len(self.shape)), y, inner)
        x = self.bijection.inv(y)
        ladj = self.bijection.log_abs_det_jacobian(x, y).reshape(*batch, -1).sum(-1)
        x = x.reshape(*batch, -1)
        inside = inside & x.isfinite().all(-1)  # infinite on the boundary
        return torch.where(inside.unsqueeze(-1), x, 0.0), torch.where(inside, -ladj, -torch.inf)

    def call_and_ladj(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        batch = flat.shape[:-1]
        x = flat.reshape((*batch, *self.real_shape))
        y = self.bijection(x)
        if isinstance(innermost(self.support), _ORDERED):
            y = _increasing(y)
        return y.reshape(*batch, -1), self.bijection.log_abs_det_jacobian(x, y).reshape(*batch, -1).sum(-1)


def _increasing(y: Tensor) -> Tensor:
    """Replaces elements that round to the one before them by the number next to it."""
    parts = [y[..., 0]]
    for part in y.unbind(-1)[1:]:
        above = parts[-1].detach()
        parts.append(torch.maximum(part, torch.nextafter(above, above.new_full((), torch.inf))))
    return torch.stack(parts, -1)


def _of_one_row(name: str, support: Any, row: int | None) -> Any:
    """Returns the support of one row, given that of all rows.

    Raises:
        ValueError: if its bounds differ between the rows.
    """

    def first(t: Tensor) -> Tensor:
        if row is None or t.dim() < -row or t.shape[row] == 1:
            return t
        if (t != t.narrow(row, 0, 1)).any():
            raise ValueError(
                f"Expected {name} with the same support in every row of its plate; got bounds {t.tolist()}. Sample it on a "
                "fixed support and rescale it."
            )
        return t.narrow(row, 0, 1)

    return map_leaves(first, support) if tensors_in(support) else support


def _onto(name: str, support: Any, shape: Size) -> Any:
    """Returns the map from real vectors onto flattened values of this shape."""
    inner = innermost(support)
    if not inner.event_dim:
        flat = inner
        if tensors_in(inner):
            flat = map_leaves(lambda t: t.expand(shape).flatten() if t.dim() else t, inner)
        try:
            return ToSupport(flat, shape.numel(), cache_size=0)
        except ValueError:
            pass
    if inner is constraints.simplex and len(shape) and shape.numel() == shape[-1]:
        return ToSupport(inner, shape[-1], cache_size=0)
    try:
        return Flattened(support, shape)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected {name} with a support that biject_to maps from real numbers, one to one; got {support}."
        ) from error


def _on(onto: Any, device: torch.device) -> Any:
    tensors = tensors_in(onto.support)
    return onto if all(t.device == device for t in tensors) else map_leaves(lambda t: t.to(device), onto)


def _categories(name: str, fn: Distribution) -> Tensor:
    """Returns the values (K,) of each element of a discrete distribution.

    Raises:
        ValueError: if the support is not finite, or its elements are vectors.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(f"Expected {name} with a finite support or a continuous one; got {fn.support}.") from error
    if fn.event_shape:
        raise ValueError(f"Expected {name} with a support of numbers, if it is discrete; got {fn.support}.")
    return values.flatten().cpu()
