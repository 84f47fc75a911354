"""Encoders of vectors: Standardized and Vector; and Joint, which encodes several observed sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.buffers import WithDerived
from ..core.checks import check_sizes
from ..core.functional import checkable
from ..core.shapes import broadcast_batches
from .base import Encoder, Readout


class Standardized(Encoder):
    """Passes vectors on, standardised: c = (x - shift) / scale.

    Flows and heads have networks of their own, so a vector often needs no other encoder.

    Args:
        inputs: F, the number of entries and of features.

    Shapes: values (*batch, F), to features (*batch, F) of the dtype of the buffers. Integers and Booleans are converted.

    Raises:
        TypeError: in calls, if the values are not a tensor.
        ValueError: if F is not a positive integer. In calls, for values of another shape, dtype or device, and for NaN.

    Example:
        >>> import torch
        >>> Standardized(2).standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))(torch.tensor([3.0, 6.0]))
        tensor([1., 1.])
    """

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, inputs)

    def extra_repr(self) -> str:
        return f"{self.inputs}"

    def forward(self, values: Tensor) -> Tensor:
        """Returns features (*batch, F) of vectors (*batch, F)."""
        z, seen = self.entries(values)
        if checkable(seen) and not seen.all():
            raise ValueError(
                f"Expected values without NaN (Vector encodes missing entries); got {int((~seen).sum())} of them."
            )
        return torch.where(seen, z, torch.nan)


class Vector(Encoder):
    """Encodes vectors with missing entries: c = readout([z, seen]).

    Here z are the standardised entries, zero in place of NaN, and seen is 1 for observed entries and 0 for NaN. The
    readout is a linear map plus a network with one hidden layer.

    Args:
        inputs: F, the number of entries.
        features: C, the number of features.
        width: the width of the hidden layer.

    Shapes: values (*batch, F), to features (*batch, C) of the dtype of the parameters. Integers and Booleans are
    converted.

    Raises:
        TypeError: in calls, if the values are not a tensor.
        ValueError: if a size is not a positive integer. In calls, for values of another shape, dtype or device.

    Example:
        >>> import torch
        >>> Vector(3, 8)(torch.tensor([[1.0, torch.nan, 2.0]])).shape
        torch.Size([1, 8])
    """

    def __init__(self, inputs: int, features: int, *, width: int = 64) -> None:
        super().__init__(inputs, features)
        check_sizes(1, width=width)
        self.width, self.readout = width, Readout(2 * inputs, features, width)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.features}, width={self.width}"

    def forward(self, values: Tensor) -> Tensor:
        """Returns features (*batch, C) of vectors (*batch, F)."""
        return self.readout(self.entries(values).inputs)


class Joint(WithDerived):
    """Encodes several observed sites, each by its own encoder, and concatenates their features.

    Args:
        encoders: for each site, a module with an attribute ``features`` that maps the site's value to features
            (*batch, C_i).

    Attributes:
        features: the sum of the C_i.
        names: the names of the sites.

    Raises:
        TypeError: if ``encoders`` is not a dict of modules with ``features``. In calls, if the values are not a dict.
        ValueError: if there is no encoder. In calls, if the values are not those of the encoders' sites, or their batch
            shapes do not broadcast.

    Example:
        >>> import torch
        >>> encoder = Joint({"y": Vector(4, 8), "x": Standardized(2)})
        >>> encoder.features, encoder({"y": torch.randn(5, 4), "x": torch.randn(5, 2)}).shape
        (10, torch.Size([5, 10]))
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping):
            raise TypeError(f"Expected encoders to be a dict; got {type(encoders).__name__}.")
        if not encoders:
            raise ValueError("Expected encoders of at least one site; got an empty dict.")
        for name, encoder in encoders.items():
            if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "features", None), int):
                raise TypeError(
                    f"Expected encoders[{name!r}] to be a module with an integer attribute features; "
                    f"got {type(encoder).__name__}."
                )
        self.names = tuple(encoders)
        self.encoders: Any = nn.ModuleList(encoders.values())
        self.features: int = sum(encoder.features for encoder in self.encoders)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return ", ".join(self.names)

    def standardize(self, values: Mapping[str, Any]) -> Joint:
        """Calls ``standardize`` of each encoder that has it with the simulations of its site; returns the encoder."""
        for encoder, value in self._pairs(values):
            if hasattr(encoder, "standardize"):
                encoder.standardize(value)
        return self

    def forward(self, values: Mapping[str, Any]) -> Tensor:
        """Returns the features (*batch, C) of the values of all sites."""
        found = [encoder(value) for encoder, value in self._pairs(values)]
        shapes = {f"of {name}": part.shape[:-1] for name, part in zip(self.names, found, strict=True)}
        batch = broadcast_batches(**shapes)
        return torch.cat([part.expand(*batch, -1) for part in found], -1)

    def _pairs(self, values: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        if not isinstance(values, Mapping):
            raise TypeError(f"Expected values to be a dict; got {type(values).__name__}.")
        if set(values) != set(self.names):
            raise ValueError(f"Expected values of {sorted(self.names)}; got those of {sorted(values)}.")
        return [(encoder, values[name]) for name, encoder in zip(self.names, self.encoders, strict=True)]
