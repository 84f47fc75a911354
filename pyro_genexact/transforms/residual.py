"""Planar, radial and Sylvester flows, y = x + g(x), with exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioners.encoding import Dense
from ..core.binding import Held
from ..core.buffers import register_derived
from ..core.checks import check_last, check_sizes
from ..core.independent import REAL_VECTOR
from ..core.precision import at_least, full_precision
from ..numerics.derivatives import implicit
from ..numerics.roots import find
from .matrices import reflected
from .modules import BijectionModule, ConditionedTransform


class ConditionedResidual(ConditionedTransform):
    """Bijection x -> y of vectors by a :class:`Planar`, :class:`Radial` or :class:`Sylvester`, given a context.

    Both directions are twice differentiable in the argument, the context and all parameters. It keeps using the weights
    that the module has at construction.

    Args:
        module: the module.
        context: the context (*batch, C), or None if the module has no context.
        cache_size: 1 to cache the last call, 0 for no cache.

    x and y have shape (*batch, D); values broadcast with the batch shape of the context, each row of which has its own
    transform.

    Raises:
        ValueError: if the context or a value has another size, dtype or device than the module's.

    Example:
        >>> import torch
        >>> t = ConditionedResidual(Radial(3, context=2), torch.zeros(5, 2))
        >>> t.forward_shape((3,)), t(torch.zeros(3)).shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    domain = codomain = REAL_VECTOR

    module = Held()

    def __init__(self, module: _Residual, context: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(module, context, cache_size)
        self.module = module

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.push(self._checked(x), self.module.numbers(self.context))  # type: ignore[no-any-return]

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.module.pull(self._checked(y), self.module.numbers(self.context))
        return x, -ladj

    def _checked(self, value: Tensor) -> Tensor:
        check_last(value, self.module.features, "features")
        return self._broadcast(value)


class _Residual(BijectionModule):
    """Base class of residual flows: holds or predicts N parameters.

    A subclass passes the initial parameters to the constructor, and defines ``push`` and ``pull``. ``push`` maps x
    (*batch, D) and the parameters (*batch, N) to y and log|det dy/dx|; ``pull`` maps y and the parameters to x and the
    same log|det dy/dx|.
    """

    phi: Any  # a Parameter or None
    net: Any
    push: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    pull: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __init__(
        self,
        features: int,
        start: Tensor,
        context: int,
        hidden: Sequence[int],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        check_sizes(0, context=context)
        self.features, self.context = features, context
        self.phi = None if context else nn.Parameter(start)
        self.net = Dense(context, len(start), hidden, activation) if context else None
        if context:
            with torch.no_grad():
                self.net.last.bias.copy_(start)

    def extra_repr(self) -> str:
        return f"{self.features}, context={self.context}"

    def numbers(self, context: Tensor | None) -> Tensor:
        """Returns the parameters (N,), or (*batch, N) given a context (*batch, C)."""
        return self.phi if context is None else at_least(self.net(context), context)

    def forward(self, context: Tensor | None = None) -> ConditionedResidual:
        """Returns the transform given the context (*batch, C)."""
        return ConditionedResidual(self, context)


class Planar(_Residual):
    r"""Planar flow y = x + u tanh(w^T x + b), which changes x along one direction.

        log|det dy/dx| = log(1 + w^T u (1 - tanh^2(w^T x + b))),      w^T u > -1

    A free v gives u = v + w \|v\|^2 / (1 + sqrt(1 + \|w\|^2 \|v\|^2)). This is a bijection between all v and all u with
    w^T u > -1, and it is smooth at w = 0, where the paper's form has a pole; v = 0 is the identity. The inverse solves
    z + w^T u tanh z = w^T y + b for the number z; then x = y - u tanh z.

    Cost: O(D) in both directions; the inverse also takes about six evaluations of a scalar function.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features from which a network predicts v, w and b; 0 for free parameters.
        hidden: widths of the network's hidden layers.
        activation: elementwise activation of the hidden layers.

    Raises:
        ValueError: if a size is not a positive integer; in calls, for vectors of another size.

    Reference: Rezende, Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Example:
        >>> import torch
        >>> t = Planar(3)()
        >>> y = torch.tensor([1.0, -2.0, 1e4])
        >>> torch.allclose(t(t.inv(y).clone()), y)
        True
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (),
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        check_sizes(1, features=features)
        v, w = torch.randn(2, features) * features**-0.5
        super().__init__(features, torch.cat([0.1 * v, w, torch.zeros(1)]), context, hidden, activation)

    def push(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and log|det dy/dx| given x (*batch, D) and parameters (*batch, N)."""
        u, w, b, slope = self._read(phi)
        z = (w * x).sum(-1) + b
        return x + u * z.tanh().unsqueeze(-1), _slope(z, slope).log()

    def pull(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dy/dx| given y (*batch, D) and parameters (*batch, N)."""
        u, w, b, slope = self._read(phi)
        z = _unbend((w * y).sum(-1) + b, slope)
        return y - u * z.tanh().unsqueeze(-1), _slope(z, slope).log()

    def _read(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns u (*batch, D), w (*batch, D), b (*batch) and 1 + w^T u (*batch)."""
        v, w, b = phi.split([self.features, self.features, 1], -1)
        gain, slope = _admissible((v * v).sum(-1), (w * w).sum(-1), (v * w).sum(-1))
        return torch.addcmul(v, w, gain.unsqueeze(-1)), w, b.squeeze(-1), slope


class Radial(_Residual):
    r"""Radial flow y = x + beta (x - c) / (alpha + r), r = \|x - c\|, which contracts or expands around a centre c.

        log|det dy/dx| = (D - 1) log(1 + beta / (alpha + r)) + log(1 + alpha beta / (alpha + r)^2)

    with alpha > 0 and beta > -alpha. alpha and 1 + beta / alpha are exp(arsinh) of free parameters, so that zeros give
    the identity. The inverse is the positive root of a quadratic in r, computed without cancellation.

    Cost: O(D) in both directions.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features from which a network predicts the parameters; 0 for free parameters.
        hidden: widths of the network's hidden layers.
        activation: elementwise activation of the hidden layers.

    Raises:
        ValueError: if a size is not a positive integer; in calls, for vectors of another size.

    Reference: Rezende, Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Example:
        >>> import torch
        >>> t = Radial(3)()
        >>> y = torch.tensor([1.0, -2.0, 1e4])
        >>> torch.allclose(t(t.inv(y).clone()), y)
        True
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (),
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        check_sizes(1, features=features)
        super().__init__(features, 0.1 * torch.randn(features + 2), context, hidden, activation)

    def push(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and log|det dy/dx| given x (*batch, D) and parameters (*batch, N)."""
        centre, alpha, kappa = self._read(phi)
        ray = x - centre
        factor, ladj = self._factor(torch.linalg.vector_norm(ray, dim=-1) / alpha, kappa)
        return torch.addcmul(centre, ray, factor.unsqueeze(-1)), ladj

    def pull(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dy/dx| given y (*batch, D) and parameters (*batch, N)."""
        centre, alpha, kappa = self._read(phi)
        ray = y - centre
        far = torch.linalg.vector_norm(ray, dim=-1) / alpha  # = rho (kappa + rho) / (1 + rho), rho = r / alpha
        gap = far - kappa
        above = gap > 0
        total = (gap.square() + 4 * far).sqrt() + torch.where(above, gap, -gap)
        factor, ladj = self._factor(torch.where(above, total / 2, 2 * far / total), kappa)
        return centre + ray / factor.unsqueeze(-1), ladj

    def _read(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns c (*batch, D), alpha (*batch) and kappa = 1 + beta / alpha (*batch)."""
        alpha, kappa = phi[..., self.features :].asinh().exp().unbind(-1)
        return phi[..., : self.features], alpha, kappa

    def _factor(self, rho: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Returns |y - c| / |x - c| and log|det dy/dx|, as sums of positive terms."""
        near = 1 / (1 + rho)
        away = rho * near
        factor = away + kappa * near
        ladj = (away * (1 + near) + kappa * near.square()).log()
        return factor, ladj + (self.features - 1) * factor.log()


class Sylvester(_Residual):
    """Sylvester flow y = x + Q R tanh(S Q^T x + b), which changes x along M orthonormal directions.

        log|det dy/dx| = sum_i log(1 + R_ii S_ii (1 - tanh_i^2)),      R_ii S_ii > -1

    Q (D, M) consists of the first columns of a product of H Householder reflections. R and S (M, M) are upper
    triangular; S_ii is free, and R_ii follows from a free number as u does in :class:`Planar`. The inverse solves z + S
    R tanh z = S Q^T y + b for z, from the last row to the first; then x = y - Q R tanh z.

    Cost: O(D M + M^2) in both directions, and O(D H (H + M)) for Q. The inverse also solves M scalar equations, with
    about six evaluations each.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features from which a network predicts Q, R, S and b; 0 for free parameters.
        rank: M <= D; by default D.
        reflections: H; by default M, which allows any directions.
        hidden: widths of the network's hidden layers.
        activation: elementwise activation of the hidden layers.

    Raises:
        ValueError: if a size is not a positive integer, or ``rank`` is above D. In calls, for vectors of another size,
            and for a reflection whose normal vector is zero.

    Reference: van den Berg et al., "Sylvester normalizing flows for variational inference", UAI 2018.

    Example:
        >>> import torch
        >>> t = Sylvester(3, rank=2)()
        >>> y = torch.tensor([1.0, -2.0, 1e4])
        >>> torch.allclose(t(t.inv(y).clone()), y)
        True
    """

    axes: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        rank: int | None = None,
        reflections: int | None = None,
        hidden: Sequence[int] = (),
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        rank = features if rank is None else rank
        reflections = rank if reflections is None else reflections
        check_sizes(1, features=features, rank=rank, reflections=reflections)
        if rank > features:
            raise ValueError(f"Expected rank <= {features} (features); got {rank}.")
        scales = torch.ones(rank, rank + 1).tril() * (rank**-0.5 - 0.1) + 0.1  # R starts small, S does not
        parts = [torch.randn(reflections * features) * features**-0.5, (scales * torch.randn(rank, rank + 1)).flatten()]
        super().__init__(features, torch.cat([*parts, torch.zeros(rank)]), context, hidden, activation)
        self.rank, self.reflections = rank, reflections
        # phi is added to unit vectors, so that phi = 0 gives valid reflections
        axes = torch.eye(features, device="cpu").repeat(-(-reflections // features), 1)[:reflections]
        register_derived(self, "axes", axes)

    @full_precision
    def push(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and log|det dy/dx| given x (*batch, D) and parameters (*batch, N)."""
        q, r, s, b, slope = self._read(phi)
        z = _times(_times(x, q), s.mT) + b
        return x + _times(_times(z.tanh(), r.mT), q.mT), _slope(z, slope).log().sum(-1)

    @full_precision
    def pull(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dy/dx| given y (*batch, D) and parameters (*batch, N)."""
        q, r, s, b, slope = self._read(phi)
        z = _unmix(_times(_times(y, q), s.mT) + b, s @ r, slope)
        return y - _times(_times(z.tanh(), r.mT), q.mT), _slope(z, slope).log().sum(-1)

    def _read(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns Q (*batch, D, M), R and S (*batch, M, M), b and 1 + R_ii S_ii (*batch, M)."""
        m = self.rank
        normals, square, b = phi.split([self.reflections * self.features, m * (m + 1), m], -1)
        normals = normals.unflatten(-1, (self.reflections, self.features)) + self.axes
        square = square.unflatten(-1, (m, m + 1))
        r, s = square[..., 1:].triu(), square[..., :m].tril().mT
        v, w = r.diagonal(dim1=-2, dim2=-1), s.diagonal(dim1=-2, dim2=-1)
        gain, slope = _admissible(v * v, w * w, v * w)
        return reflected(normals, m), r + torch.diag_embed(w * gain), s, b, slope


def _unmix(target: Tensor, matrix: Tensor, slope: Tensor) -> Tensor:
    """Solves z + A tanh z = target for rows z (*batch, M), with A upper triangular and slope = 1 + A_ii."""
    found: list[Tensor] = []
    for i in reversed(range(target.shape[-1])):
        found.append(_unbend(target[..., i], slope[..., i]))
        target = target[..., :i] - matrix[..., :i, i] * found[-1].tanh().unsqueeze(-1)
    return torch.stack(found[::-1], -1)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Returns x^T A for vectors (*batch, n) and matrices (*batch, n, m)."""
    return x @ matrix if matrix.dim() == 2 else (x.unsqueeze(-2) @ matrix).squeeze(-2)


def _admissible(vv: Tensor, ww: Tensor, vw: Tensor) -> tuple[Tensor, Tensor]:
    """Returns g such that u = v + g w has w^T u > -1, and 1 + w^T u, given the inner products of v and w."""
    both = vv * ww
    # vw + sqrt(1 + both) > 0 without cancellation for vw < 0; both >= vw^2 except for rounding
    scale = (1 + (both - vw.square()).clamp(min=0)).sqrt()
    return vv / (1 + (1 + both).sqrt()), scale * (vw / scale).asinh().exp()


def _slope(z: Tensor, slope: Tensor) -> Tensor:
    """Returns 1 + (slope - 1) (1 - tanh^2 z) as a sum of positive terms."""
    return z.tanh().square() + 4 * slope * (2 * z).sigmoid() * (-2 * z).sigmoid()


def _bend(z: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z + (slope - 1) tanh z and the log of its derivative; the derivative at 0 is ``slope``."""
    return z + (slope - 1) * z.tanh(), _slope(z, slope).log()


def _unbend(target: Tensor, slope: Tensor) -> Tensor:
    """Solves z + (slope - 1) tanh z = target; the initial guess replaces tanh by a clamped identity."""
    with torch.no_grad():
        guess = target - (slope - 1) * (target / slope).clamp(-1, 1)
        z = find(_bend, target, [slope], guess=guess)
    return implicit(_bend, z, target, slope)
