"""Data with fresh random noise at each access, and the removal of Gaussian noise from samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import Dataset

from ..core.checks import check_kind, check_positive
from ..flows.base import over_reals
from .sources import rows_of


class Augmented(Dataset[Any]):
    """A map-style Dataset whose rows pass through a random function, anew at each access.

    :func:`~pyro_genexact.fit` takes it as data, so that each epoch sees other noise. Examples are Gaussian noise,
    the dequantisation of levels, and shifts of images.

    Args:
        data: a tensor, an array or a table (N, *event), or a map-style Dataset, as for ``fit``.
        function: a function of a batch of rows (B, *event) that returns a tensor of B new rows. It may use torch's
            random numbers, which ``fit`` seeds.
        context: a tensor, array or table (N, ...), or a dict of these, as for ``fit``.

    Raises:
        TypeError: if ``data`` or ``context`` is of another kind, or ``function`` is not callable.
        ValueError: if ``data`` has no rows, ``context`` has another number of rows, or one of them is not finite. At an
            access, if the function does not return a tensor of as many rows.

    Example:
        >>> import torch
        >>> levels = torch.randint(17, (20, 8, 8))
        >>> data = Augmented(levels, lambda x: (x + torch.rand(x.shape)) / 17)
        >>> bool((data[0] == data[0]).any()), data[0].shape
        (False, torch.Size([8, 8]))
    """

    def __init__(self, data: Any, function: Callable[[Tensor], Tensor], context: Any = None) -> None:
        self.rows, self.function = rows_of(data, context, "data", torch.get_default_dtype()), function
        if not callable(function):
            raise TypeError(f"Expected function to be a function; got {type(function).__name__}.")

    def __len__(self) -> int:
        return len(self.rows.index)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """Returns the new rows, or (row, context) tuples; torch's DataLoader calls this method."""
        batch = self.rows.source[self.rows.index[list(rows)]]
        new = self.function(batch.data)
        if not isinstance(new, Tensor) or new.shape[:1] != (len(rows),):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"Expected function to return a tensor of {len(rows)} rows, as it was given; got {got}.")
        if not batch.context:
            return list(new)
        contexts = ({key: x[row] for key, x in batch.context.items()} for row in range(len(rows)))
        return [(row, context.get(None, context)) for row, context in zip(new, contexts, strict=True)]


def denoised(distribution: Any, y: Tensor, scale: float) -> Tensor:
    """Returns the mean of x given y = x + scale noise, with standard normal noise and y of the given distribution.

        E[x | y] = y + scale^2 d log p(y) / dy                        (Tweedie's formula)

    A flow that was fitted to noisy rows generates noisy rows, from which this removes the noise.

    Args:
        distribution: a distribution over real vectors or images with a differentiable log_prob.
        y: values (*sample, *batch, *event), such as its samples; they broadcast with the batch shape.
        scale: the standard deviation of the noise.

    Returns:
        A tensor (*sample, *batch, *event), without gradient.

    Raises:
        TypeError: if ``distribution`` is not a distribution, ``y`` is not a floating-point tensor, or ``scale`` is not a
            number.
        ValueError: if ``scale`` is not positive and finite, or the support is not all real values, where no distribution
            with such noise has its support.

    Cost: one ``log_prob`` and its gradient.

    References: Robbins, "An Empirical Bayes Approach to Statistics", 1956; Efron, "Tweedie's Formula and Selection
    Bias", JASA 2011.

    Example:
        >>> import torch
        >>> from pyro.distributions import Normal
        >>> denoised(Normal(torch.zeros(3), 2**0.5), torch.tensor([0.0, 1.0, 2.0]), scale=1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    check_kind("distribution", distribution, Distribution)
    check_positive(scale=scale)
    if not over_reals(distribution):
        raise ValueError(f"Expected distribution.support to be all real values; got {distribution.support}.")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"Expected y to be a floating-point tensor; got {getattr(y, 'dtype', type(y).__name__)}.")
    shape = distribution.batch_shape + distribution.event_shape
    with torch.inference_mode(False), torch.enable_grad():
        y = y.detach().expand(torch.broadcast_shapes(y.shape, shape)).clone().requires_grad_()
        (score,) = torch.autograd.grad(distribution.log_prob(y).sum(), y)
    return y.detach() + scale**2 * score
