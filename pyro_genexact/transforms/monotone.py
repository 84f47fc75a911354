"""Monotone: an elementwise bijection by an increasing function, inverted by root finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.shapes import broadcast_shapes
from ..numerics.derivatives import implicit
from ..numerics.roots import find
from .base import RememberingTransform


class Monotone(RememberingTransform):
    """Elementwise bijection y = f(x; parameters) for any f that increases from -inf to inf.

    Cost: the forward direction is one evaluation of f. The inverse is :func:`pyro_genexact.numerics.root`, which takes
    about six evaluations for smooth functions, and is exact to the rounding of the dtype for y of any size. Both
    directions are differentiable at least twice.

    Args:
        function: (x, *parameters, *shared) to (y, log dy/dx). It must broadcast, because the solver calls it with x
            and parameters of the rows that are not solved yet. It must be importable if the transform will be pickled.
        parameters: one or more tensors (*batch, n), each with n numbers per value.
        shared: tensors of any shape that all values share, for example the weights of a network.
        guess: (y, *parameters, *shared) to the initial value of x in the search; by default y.
        cache_size: 1 to cache the last call, 0 for no cache.

    x and y have shape (*batch) and broadcast with the parameters.

    Raises:
        ConvergenceError: if the inverse is not found (when called).

    Example:
        >>> import torch
        >>> def cubic(x, a):
        ...     a = a[..., 0].exp()
        ...     return x**3 + a * x, (3 * x**2 + a).log()
        >>> t = Monotone(cubic, [torch.zeros(4, 1)])
        >>> t.inv(torch.tensor([0.0, 2.0, 10.0, 1e6]))
        tensor([ 0.0000,  1.0000,  2.0000, 99.9967])
    """

    domain = codomain = constraints.real
    sign = 1

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        parameters: Sequence[Tensor],
        shared: Sequence[Tensor] = (),
        guess: Callable[..., Tensor] | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.guess = guess
        self.function, self.parameters, self.shared = function, tuple(parameters), tuple(shared)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x, *self.parameters, *self.shared)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.invert(y)
        return x, -self._call_and_ladj(x)[1]

    def invert(self, y: Tensor, known: Tensor | None = None) -> Tensor:
        """Returns x only; ``known`` may pass its value if it is already known."""
        shape = broadcast_shapes(y.shape, *(p.shape[:-1] for p in self.parameters))
        y = y if y.shape == shape else y.expand(shape)
        parameters = [p if p.dim() > len(shape) else p[(None,) * (len(shape) + 1 - p.dim())] for p in self.parameters]
        if known is None:
            with torch.no_grad():
                guess = None if self.guess is None else self.guess(y, *parameters, *self.shared)
                known = find(self.function, y, parameters, self.shared, guess)
        return implicit(self.function, known, y, *parameters, *self.shared)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return broadcast_shapes(shape, *(p.shape[:-1] for p in self.parameters))
