"""The observed sites of an amortised guide: checks of their values, and their encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils.data import default_collate

from ..contexts import PaddedSequence, padded, unpadded
from ..core.lengths import checked_lengths, site_mask
from ..encoders.base import Encoder
from ..encoders.vectors import Joint, Standardized

SEEN, LENGTHS = "$$$seen", "$$$lengths"  # appended to the name of a site, see ``tensors_of``


class Observed(nn.Module):
    """Checks and encodes the values of one observed site.

    An encoder with ``event_dim`` 1 reads all elements of the site as one vector (F,), and one with ``event_dim`` 2 reads
    items (N, F) or, if F is 1, (N,); their number N may differ from that in the model. Other encoders read values of the
    site's shape; if these are real numbers and the encoder has no method ``standardize``, they are standardised by the mean
    and scale of all elements.

    Args:
        name: the name of the site.
        shape: the shape of its value in one run of the model, or in one row of the row plate.
        axis: the dim of the row plate in the value, a negative index; None outside of this plate.
        encoder: the encoder; by default :class:`~pyro_genexact.encoders.Standardized`.
    """

    def __init__(self, name: str, shape: Size, axis: int | None, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.name, self.shape, self.axis = name, shape, axis
        self.encoder: Any = Standardized(max(1, shape.numel())) if encoder is None else encoder
        self.event_dim: int | None = getattr(self.encoder, "event_dim", None)
        plain = self.event_dim is None and not hasattr(self.encoder, "standardize")
        self.scaler = Standardized(1) if plain else None
        self.linear = type(self.encoder) is Standardized
        self.reads_missing = isinstance(self.encoder, Encoder) and not self.linear
        self._check_shape()

    def _check_shape(self) -> None:
        inputs, shape = getattr(self.encoder, "inputs", None), tuple(self.shape)
        if self.event_dim == 1 and isinstance(inputs, int) and inputs != self.shape.numel():
            raise ValueError(
                f"Expected the encoder of {self.name!r} with inputs={self.shape.numel()}, the number of elements of a value "
                f"of shape {shape} (or an encoder of sets, if these are items); got inputs={inputs}."
            )
        if self.event_dim == 2:
            items = (len(shape) == 1 and inputs in (None, 1)) or (len(shape) == 2 and inputs in (None, shape[-1]))
            if not items:
                raise ValueError(
                    f"Expected {self.name!r} of shape (N, F), or (N,) for F = 1, since its encoder reads items of F={inputs} "
                    f"entries; got {shape}."
                )

    @property
    def expected(self) -> tuple[Any, ...]:
        """The shape of a value in one run of the model; sizes that may change are names."""
        shape: list[Any] = list(self.shape)
        if self.event_dim == 2:
            shape[0] = "N"
        if self.axis is not None:
            shape.insert(len(shape) + 1 + self.axis, "rows")
        return tuple(shape)

    @property
    def dims(self) -> int:
        """The number of dims of the value of one row after ``checked``."""
        return len(self.shape) if self.event_dim is None else self.event_dim

    def checked(self, value: Any, like: Tensor) -> Any:
        """Returns values (*batch, ...) as (*batch, [R,] *event), on the device of ``like`` and, if real, of its dtype.

        Raises:
            ValueError: if they have another shape than in the model.
        """
        value, lengths = unpadded(value) if self.event_dim == 2 else (value, None)
        if isinstance(value, PaddedSequence):
            raise ValueError(
                f"Expected observations[{self.name!r}] of one size, since its encoder is not one of sets or series; got a "
                "PaddedSequence."
            )
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        value = value.to(like.device, like.dtype if value.is_floating_point() else None)
        expected = self.expected
        tail = value.shape[value.dim() - len(expected) :]
        if value.dim() < len(expected) or any(
            not isinstance(e, str) and e != n for e, n in zip(expected, tail, strict=True)
        ):
            text = ", ".join(map(str, ["*batch", *expected]))
            raise ValueError(
                f"Expected observations[{self.name!r}] of shape ({text}), as in the model; got {tuple(value.shape)}."
            )
        if self.axis is not None:
            value = value.movedim(self.axis, -len(self.shape) - 1)
        if self.event_dim is not None:
            lead = value.shape[: value.dim() - len(self.shape)]
            kept = len(lead) + self.event_dim - 1
            value = value.reshape(*value.shape[:kept], value.shape[kept:].numel())
        if lengths is None:
            return value
        lengths = checked_lengths(lengths.to(like.device), value.shape[-2], "lengths", f"items of {self.name!r}")
        if lengths.shape != value.shape[:-2]:
            raise ValueError(
                f"Expected lengths of {self.name!r} of shape {tuple(value.shape[:-2])}; got {tuple(lengths.shape)}."
            )
        return PaddedSequence(torch.where(site_mask(lengths, value.shape[-2]).unsqueeze(-1), value, 0.0), lengths)

    def usable(self, value: Any) -> Tensor:
        """Returns which of the checked values (*batch, [R,] *event) can be read, (*batch,).

        These are the finite ones, and, if the encoder reads missing entries, those with NaN in place of some entries.
        """
        x, _ = unpadded(value)
        lead = x.dim() - self.dims - (self.axis is not None)
        flat = x.reshape(*x.shape[:lead], x.shape[lead:].numel())
        if not self.reads_missing:
            return flat.isfinite().all(-1)
        return ~flat.isinf().any(-1) & (flat.isfinite().any(-1) | ~flat.isnan().any(-1))

    def forward(self, value: Any) -> Tensor:
        """Returns features (*lead, F) of checked values (*lead, *event)."""
        lead = unpadded(value)[0].shape
        lead = lead[: len(lead) - self.dims]
        if self.scaler is not None and value.is_floating_point():
            value = self.scaler(value.unsqueeze(-1)).squeeze(-1)
        found: Tensor = self.encoder(value)
        if not isinstance(found, Tensor) or found.shape != (*lead, self.encoder.features):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"Expected the encoder of {self.name!r} to return a tensor of shape {(*lead, self.encoder.features)} (batch, "
                f"features); got {got}."
            )
        return found

    @torch.no_grad()
    def standardise(self, value: Any) -> None:
        """Standardises by checked simulations (N, [R,] *event)."""
        if self.scaler is not None and value.is_floating_point():
            self.scaler.standardize(value.unsqueeze(-1))
        elif hasattr(self.encoder, "standardize"):
            self.encoder.standardize(value)


class Inputs(nn.Module):
    """Encodes observed sites as one vector.

    Args:
        sites: the sites.
    """

    def __init__(self, sites: Iterable[Observed]) -> None:
        super().__init__()
        sites = [*sites]
        self.sites: Any = nn.ModuleList(sites)
        self.linear: int = sum(site.encoder.features for site in sites if site.linear)
        self.features: int = sum(site.encoder.features for site in sites)

    def forward(self, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the standardised elements (*batch, L) of sites without other encoder, and all features (*batch, F)."""
        found = [(site.linear, site(values[site.name])) for site in self.sites]
        found.sort(key=lambda pair: not pair[0])
        features = torch.cat([part for _, part in found], -1)
        return features[..., : self.linear], features

    def standardise(self, values: Mapping[str, Any]) -> None:
        """Sets shifts and scales by checked simulations."""
        for site in self.sites:
            site.standardise(values[site.name])


def encoders_by_site(encoder: Any, observed: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the encoders of an argument ``encoder`` by site.

    Raises:
        TypeError: if an encoder is not a module with an integer attribute ``features``.
        ValueError: if a site is not observed, or if one encoder is given for several sites.
    """
    if encoder is None:
        return {}
    if isinstance(encoder, Joint):
        encoder = dict(zip(encoder.names, encoder.encoders, strict=True))
    if isinstance(encoder, nn.Module) and not isinstance(encoder, nn.ModuleDict):
        if len(observed) > 1:
            raise ValueError(
                f"Expected encoder to be a dict with several observed sites {list(observed)}; got one module."
            )
        encoder = {observed[0]: encoder}
    found = dict(encoder.items())
    if unknown := sorted(set(found) - set(observed)):
        raise ValueError(f"Expected encoder to be a dict of observed sites, {list(observed)}; got {unknown}.")
    for name, module in found.items():
        if not isinstance(module, nn.Module) or not isinstance(getattr(module, "features", None), int):
            raise TypeError(
                f"Expected encoder of {name!r} to be a module with an integer attribute features; got {type(module).__name__}."
            )
    return found


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to a tensor, or to both tensors of a :class:`~pyro_genexact.PaddedSequence`."""
    return PaddedSequence(*map(function, value)) if isinstance(value, PaddedSequence) else function(value)


def joined(values: Iterable[Any]) -> Any:
    """Concatenates checked values (N, ...) of a site; sets and series of different sizes are padded."""
    parts = [unpadded(value) for value in values]
    shapes = {x.shape[1:] for x, _ in parts}
    if len(shapes) == 1 and all(lengths is None for _, lengths in parts):
        return torch.cat([x for x, _ in parts])
    size = max(x.shape[-2] for x, _ in parts)
    full = [x.shape[-2] if lengths is None else lengths for x, lengths in parts]
    lengths = [torch.as_tensor(n, device=x.device).expand(x.shape[:-2]) for n, (x, _) in zip(full, parts, strict=True)]
    wide = [nn.functional.pad(x, (0, 0, 0, size - x.shape[-2])) for x, _ in parts]
    return PaddedSequence(torch.cat(wide), torch.cat(lengths))


def stacked(items: Any) -> dict[str, Any]:
    """Returns the items of a Dataset as values (N, ...) by site; sets and series of different sizes are padded."""
    rows, found = [items[i] for i in range(len(items))], {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        sizes = [getattr(value, "shape", None) for value in values]
        if len({*sizes}) == 1:
            found[name] = default_collate(values)
            continue
        tensors = [torch.as_tensor(value) for value in values]
        lengths = torch.tensor([len(t) for t in tensors], device=tensors[0].device)
        found[name] = PaddedSequence(nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths)
    return found


def tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns checked values as finite tensors by name: masks of missing entries and lengths are tensors of their own."""
    found = {}
    for name, value in values.items():
        x, lengths = unpadded(value)
        if lengths is not None:
            found[name + LENGTHS] = lengths
        if (missing := x.isnan()).any():
            found[name + SEEN] = ~missing
            x = x.nan_to_num()
        found[name] = x
    return found


def values_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverts :func:`tensors_of`."""
    found = {}
    for name, x in tensors.items():
        if not name.endswith((SEEN, LENGTHS)):
            seen = tensors.get(name + SEEN)
            found[name] = padded(x if seen is None else torch.where(seen, x, torch.nan), tensors.get(name + LENGTHS))
    return found
