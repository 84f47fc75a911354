"""Encoder: the base class of networks that turn one observation into a vector of features."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..contexts import unpadded
from ..core.buffers import WithDerived
from ..core.checks import check_like, check_sizes
from ..core.functional import visible
from ..core.lengths import checked_lengths, site_mask
from ..core.precision import at_least, widened


class Encoder(WithDerived):
    """Turns one observation into a vector of features, the context of a flow or of an amortised guide.

    A subclass defines :meth:`forward`. It may call :meth:`entries`, which checks, standardises and fills in the values.

    Args:
        inputs: F, the number of entries of a vector, an item or a step.
        features: C, the number of features that the encoder returns.

    Attributes:
        inputs: F.
        features: C.
        event_dim: the number of rightmost dims of one observation: 1 for a vector (F,), 2 for a set or a series (N, F).
        shift: (F,), the mean of each entry, a buffer; zero before :meth:`standardize`.
        scale: (F,), the standard deviation of each entry, a buffer; one before :meth:`standardize`.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> import torch
        >>> class Mean(Encoder):
        ...     event_dim = 2
        ...
        ...     def forward(self, values):
        ...         return self.entries(values).z.mean(-2)
        >>> Mean(3, 3)(torch.ones(5, 7, 3)).shape
        torch.Size([5, 3])
    """

    event_dim = 1
    shift: Tensor
    scale: Tensor

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        check_sizes(1, inputs=inputs, features=features)
        self.inputs, self.features = inputs, features
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def forward(self, values: Any) -> Tensor:
        """Returns the features (*batch, C) of the observations (*batch, F) or (*batch, N, F)."""
        raise TypeError(f"{type(self).__name__} must define forward(values)")

    @torch.no_grad()
    def standardize(self, values: Any) -> Self:
        """Sets ``shift`` and ``scale`` to the mean and standard deviation of observed entries; returns the encoder.

        Padding and missing entries do not count. An entry that does not vary is only shifted. An entry that was never
        observed stays as it is.

        Args:
            values: simulations, in the form of the call.

        Raises:
            ValueError: if an entry is infinite.
        """
        x, seen = self._checked(values)
        rows, seen = x.reshape(-1, self.inputs), seen.reshape(-1, self.inputs)
        if visible(rows) and (bad := (seen & rows.isinf()).any(0)).any():
            raise ValueError(
                f"Expected finite values, or NaN for missing ones; got infinity at entry {int(bad.nonzero()[0])}."
            )
        count = seen.sum(0).clamp(min=1)
        # about a value of each entry, so that a constant has variance 0 and a large mean does not cancel digits
        middle = torch.where(seen, rows, -torch.inf).amax(0).nan_to_num(neginf=0.0) if len(rows) else self.shift
        centred = torch.where(seen, rows - middle, 0.0)
        mean = centred.sum(0) / count
        rest = torch.where(seen, centred - mean, 0.0)
        largest = rest.abs().amax(0) if len(rows) else torch.zeros_like(mean)
        largest = torch.where(largest > 0, largest, 1.0)  # squares of the rest itself could overflow or vanish
        deviation = largest * ((rest / largest).square().sum(0) / count).sqrt()
        observed = seen.any(0)
        self.shift.copy_(torch.where(observed, middle + mean, self.shift))
        self.scale.copy_(torch.where(observed & (deviation > 0), deviation, torch.where(observed, 1.0, self.scale)))
        return self

    def entries(self, values: Any) -> Entries:
        """Returns the standardised entries of observations, with zeros in place of padding and missing entries.

        Raises:
            TypeError: if the values are not a tensor or, for sets and series, a
                :class:`~pyro_genexact.PaddedSequence`; or if lengths are not integers.
            ValueError: if the values have another number of entries or dims, dtype or device; or lengths another shape,
                or outside 0 ... N.
        """
        x, seen = self._checked(values)
        return Entries((torch.where(seen, x, self.shift) - self.shift) / self.scale, seen)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.features}"

    def _checked(self, values: Any) -> tuple[Tensor, Tensor]:
        """Returns the values and which of them are observed."""
        x, lengths = unpadded(values) if self.event_dim > 1 else (values, None)
        if not isinstance(x, Tensor):
            kinds = "a tensor" if self.event_dim == 1 else "a tensor or a PaddedSequence"
            raise TypeError(f"Expected values to be {kinds}; got {type(x).__name__}.")
        if x.dim() < self.event_dim or x.shape[-1] != self.inputs:
            expected = f"{'N, ' if self.event_dim > 1 else ''}{self.inputs}"
            raise ValueError(f"Expected values of shape (*batch, {expected}); got {tuple(x.shape)}.")
        x = widened(x, self.shift.dtype) if x.is_floating_point() else x.to(self.shift.dtype)
        check_like("values", x, self.shift)
        if lengths is None:
            return x, ~x.isnan()
        lengths = checked_lengths(lengths, x.shape[-2], "lengths", "items of the values")
        if lengths.shape != x.shape[:-2]:
            raise ValueError(
                f"Expected lengths.shape == {tuple(x.shape[:-2])} (the batch); got {tuple(lengths.shape)}."
            )
        return x, ~x.isnan() & site_mask(lengths, x.shape[-2]).unsqueeze(-1)


class Entries(NamedTuple):
    """Standardised entries of observations.

    Attributes:
        z: (*batch, F) or (*batch, N, F), zero where nothing was observed.
        seen: of the same shape, whether the entry was observed.
    """

    z: Tensor
    seen: Tensor

    @property
    def inputs(self) -> Tensor:
        """The entries, and 1 or 0 for whether each was observed: (*batch, 2F) or (*batch, N, 2F)."""
        return torch.cat([self.z, self.seen.to(self.z.dtype)], -1)


class Readout(nn.Module):
    """Maps summaries (*batch, W) to features (*batch, C): a linear map plus a network with one hidden layer.

    The linear map passes means on without loss: to locate a posterior to a small part of its own width, which is
    that of one item divided by sqrt(n), a network alone must be that precise everywhere.

    Args:
        inputs: W, the number of summaries.
        features: C, the number of features.
        width: the width of the hidden layer.

    Example:
        >>> import torch
        >>> Readout(3, 4, 8)(torch.zeros(5, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(self, inputs: int, features: int, width: int) -> None:
        super().__init__()
        check_sizes(1, width=width)
        self.direct = nn.Linear(inputs, features)
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, features))

    def forward(self, summaries: Tensor) -> Tensor:
        return at_least(self.direct(summaries) + self.layers(summaries), summaries)


def with_size(summaries: Tensor, count: Tensor) -> Tensor:
    """Appends (log(1 + n) - 3) / 2 for each number n of items (*batch) to summaries (*batch, W).

    The logarithm, because scales of posteriors are powers of n; its values for 1 to 1000 items lie between -1.2 and 2.
    """
    return torch.cat([summaries, (count.to(summaries.dtype).log1p().unsqueeze(-1) - 3.0) / 2.0], -1)
