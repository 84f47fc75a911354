"""Data with fresh random noise at each access, and the removal of Gaussian noise from samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..core.checks import check_positive
from .batches import column


class Augmented(Dataset[Any]):
    """A map-style Dataset whose rows pass through a random function, anew at each access.

    :func:`~pyro_genexact.fit` takes it as data, so that each epoch sees other noise. Examples are Gaussian noise,
    the dequantisation of levels, and shifts of images.

    Args:
        data: a tensor or an array (N, *event) on the CPU, or a map-style Dataset whose items are a row or a
            (row, context) tuple.
        function: a function of a batch of rows (B, *event) that returns B new rows. It may use torch's random numbers,
            which ``fit`` seeds.
        context: a tensor or an array (N, C) that the rows carry along, or None.

    Raises:
        TypeError: if ``data`` is of another kind, or ``function`` is not callable.
        ValueError: if there are several contexts, or of another number of rows. At an access, if the function returns
            another number of rows.

    Example:
        >>> import torch
        >>> levels = torch.randint(17, (20, 8, 8))
        >>> data = Augmented(levels, lambda x: (x + torch.rand(x.shape)) / 17)
        >>> bool((data[0] == data[0]).any()), data[0].shape
        (False, torch.Size([8, 8]))
    """

    def __init__(self, data: Any, function: Callable[[Tensor], Tensor], context: Any = None) -> None:
        dtype = torch.get_default_dtype()
        self.data, self.context = column(data, "data", dtype), column(context, "context", dtype)
        if not isinstance(self.data, (Tensor, Dataset)) or not hasattr(self.data, "__len__"):
            raise TypeError(f"Expected data to be a tensor, an array or a Dataset; got {type(data).__name__}.")
        if not callable(function):
            raise TypeError(f"Expected function to be a function; got {type(function).__name__}.")
        if self.context is not None and isinstance(self.data, Dataset):
            raise ValueError("Expected context=None with a Dataset, whose items may be (row, context); got a context.")
        if self.context is not None and len(self.context) != len(self.data):
            raise ValueError(f"Expected context with {len(self.data)} rows (those of data); got {len(self.context)}.")
        self.function = function

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """Returns the new rows, or (row, context) tuples; torch's DataLoader calls this method."""
        if isinstance(self.data, Tensor):
            index = torch.as_tensor(rows, device="cpu")
            old, context = self.data[index], None if self.context is None else self.context[index]
        else:
            many = getattr(self.data, "__getitems__", lambda rows: [self.data[row] for row in rows])
            items = default_collate(many(rows))
            old, context = items if isinstance(items, (tuple, list)) else (items, None)
        new = self.function(old)
        if len(new) != len(rows):
            raise ValueError(f"Expected function to return {len(rows)} rows, as it was given; got {len(new)}.")
        return list(new) if context is None else list(zip(new, context, strict=True))


def denoised(distribution: Any, y: Tensor, scale: float) -> Tensor:
    """Returns the mean of x given y = x + scale noise, with standard normal noise and y of the given distribution.

        E[x | y] = y + scale^2 d log p(y) / dy                        (Tweedie's formula)

    A flow that was fitted to noisy rows generates noisy rows, from which this removes the noise.

    Args:
        distribution: a distribution over real vectors or images with a differentiable log_prob.
        y: values (*sample, *batch, *event), such as its samples.
        scale: the standard deviation of the noise.

    Returns:
        A tensor of the shape of y, without gradient.

    Raises:
        TypeError: if ``scale`` is not a number.
        ValueError: if ``scale`` is not positive and finite.

    Cost: one ``log_prob`` and its gradient.

    References: Robbins, "An Empirical Bayes Approach to Statistics", 1956; Efron, "Tweedie's Formula and Selection
    Bias", JASA 2011.

    Example:
        >>> import torch
        >>> from pyro.distributions import Normal
        >>> denoised(Normal(torch.zeros(3), 2**0.5), torch.tensor([0.0, 1.0, 2.0]), scale=1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    check_positive(scale=scale)
    with torch.inference_mode(False), torch.enable_grad():
        y = y.detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(distribution.log_prob(y).sum(), y)
    return y.detach() + scale**2 * score
