"""Linear bijections of features with learned matrices: LU factors, rotations and reflections."""

from __future__ import annotations

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.linalg import solve_triangular
from torch.nn.functional import linear

from ..core.checks import check_last, check_like, check_sizes
from ..core.functional import checkable
from ..core.independent import REAL_VECTOR
from ..core.precision import full_precision
from .base import PlainTransform

_BOUND = 7.0  # soft bound of log-scales
_TANGENT = 100.0  # soft bound of the tangents of half angles


class LULinear(PlainTransform, TransformModule):
    """Linear bijection y = L U D x + b with unit triangular L (lower) and U (upper), and D = diag(exp s).

        log|det dy/dx| = sum_i s_i,        s_i = 7 tanh(d_i / 7)

    It starts at the identity. D is applied first, so that the accuracy of the inverse does not depend on the scales; it
    depends on the condition of L and U. There is no pivoting: to permute features, put a :class:`Permute` before it.

    Cost: a call takes one product of matrices (L U) and one with the values; the inverse solves two triangular systems.

    Args:
        features: D, the number of features.

    x and y have shape (*batch, D).

    Attributes:
        factors: (D, D), L below the diagonal and U above it.
        log_diagonal: d (D,).
        bias: b (D,).

    Raises:
        ValueError: if ``features`` is not a positive integer, or a value has another size, dtype or device.

    References: Oliva et al., "Transformation Autoregressive Networks", ICML 2018; Kingma, Dhariwal, "Glow", NeurIPS
    2018.

    Example:
        >>> import torch
        >>> t = LULinear(3)
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> t(x).tolist(), t.log_abs_det_jacobian(x, t(x)).item()
        ([1.0, 2.0, 3.0], 0.0)
    """

    domain = codomain = REAL_VECTOR

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(1, features=features)
        self.factors = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def weight(self) -> Tensor:
        """The matrix L U D (D, D)."""
        return self._mix() * self._log_scales().exp()

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        return linear(_checked(x, self.bias) * self._log_scales().exp(), self._mix(), self.bias)

    def _inverse(self, y: Tensor) -> Tensor:
        rows = (_checked(y, self.bias) - self.bias).reshape(-1, y.shape[-1])
        rows = solve_triangular(self.factors.mT, rows, upper=True, left=False, unitriangular=True)  # L^T only
        rows = solve_triangular(self.factors.mT, rows, upper=False, left=False, unitriangular=True)
        return rows.reshape(y.shape) / self._log_scales().exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns sum_i s_i, of the batch shape."""
        return self._log_scales().sum().expand(x.shape[:-1])

    def _log_scales(self) -> Tensor:
        return torch.tanh(self.log_diagonal / _BOUND) * _BOUND

    @full_precision
    def _mix(self) -> Tensor:
        """Returns L U (D, D)."""
        one = torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        upper = self.factors.triu(1) + one
        return torch.addmm(upper, self.factors.tril(-1), upper)


class _Orthogonal(PlainTransform, TransformModule):
    """Base class of y = W x with orthogonal W; the inverse is the transpose, and volumes do not change."""

    keeps_volume = True
    domain = codomain = REAL_VECTOR
    weight: Tensor

    @full_precision
    def _call(self, x: Tensor) -> Tensor:
        weight = self.weight
        return linear(_checked(x, weight), weight)

    @full_precision
    def _inverse(self, y: Tensor) -> Tensor:
        weight = self.weight
        return linear(_checked(y, weight), weight.mT)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape."""
        return x.new_zeros(x.shape[:-1])


class Rotation(_Orthogonal):
    """Rotation y = W x with W = (1 - A)^{-1} (1 + A) and A skew-symmetric (Cayley transform); log|det dy/dx| = 0.

    It represents all rotations except those near a half turn in some plane. The entries of A are softly bounded by
    ±100, which in a plane is 178.85 degrees, so that W is orthogonal to rounding. The matrix exponential also reaches
    half turns, but takes about ten products of matrices, of twice the size for each order of derivatives, instead of
    one solve. The module starts at the identity.

    Args:
        features: D, the number of features.

    x and y have shape (*batch, D).

    Attributes:
        skew: a (D, D); the entries of A below the diagonal are 100 tanh(a / 100).

    Raises:
        ValueError: if ``features`` is not a positive integer, or a value has another size, dtype or device.

    Reference: Cayley, "Sur quelques propriétés des déterminants gauches", Journal für die reine und angewandte
    Mathematik 32, 1846.

    Example:
        >>> import torch
        >>> t = Rotation(2)
        >>> with torch.no_grad():
        ...     _ = t.skew[1, 0].fill_(1.0)  # the tangent of half the angle
        >>> torch.allclose(t(torch.tensor([1.0, 0.0])), torch.tensor([0.0, 1.0]), atol=1e-3)
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(1, features=features)
        self.skew = nn.Parameter(torch.zeros(features, features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rotation W (D, D)."""
        lower = torch.tanh(self.skew / _TANGENT).tril(-1) * _TANGENT
        skew, one = lower - lower.mT, torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_ex(one - skew, one + skew)[0]  # 1 - skew is never singular


class Householder(_Orthogonal):
    """Product of reflections y = H_1 ... H_K x, H_k = 1 - 2 v_k v_k^T / v_k^T v_k; log|det dy/dx| = 0.

    The product is computed as one matrix, 1 - V S^{-1} V^T, where V has the columns v_k / |v_k| and S is the strictly
    upper triangle of V^T V with 1/2 on the diagonal. D reflections represent every orthogonal matrix of determinant
    (-1)^D. Initially, reflections come in equal pairs, whose product is the identity; if K is odd, one reflection
    remains.

    Args:
        features: D, the number of features.
        reflections: K; by default D, or D + 1 if D is odd.

    x and y have shape (*batch, D).

    Attributes:
        vectors: v (K, D), of any length except zero.

    Raises:
        ValueError: if a size is not a positive integer, a value has another size, dtype or device, or a vector is zero.

    References: Tomczak, Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016; Joffrain et al.,
    "Accumulating Householder transformations, revisited", ACM TOMS 32, 2006 (the product).

    Example:
        >>> import torch
        >>> t, x = Householder(3, 2), torch.tensor([1.0, 2.0, 3.0])
        >>> torch.allclose(t(x), x, atol=1e-5)
        True
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        reflections = features + features % 2 if reflections is None else reflections
        check_sizes(1, features=features, reflections=reflections)
        pairs = torch.randn((reflections + 1) // 2, features)
        self.vectors = nn.Parameter(pairs.repeat_interleave(2, 0)[:reflections])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product of the reflections (D, D)."""
        return reflected(self.vectors, self.vectors.shape[1])


@full_precision
def reflected(normals: Tensor, columns: int) -> Tensor:
    """Returns the first columns of the product of reflections with the normal vectors (*batch, K, D), first to last.

    The product is 1 - V^T S^{-1} V, where V has unit rows and S is the strictly upper triangle of V V^T with 1/2 on the
    diagonal.
    """
    largest = normals.detach().abs().amax(-1, keepdim=True)  # avoids overflow and underflow of squares
    if checkable(largest) and (largest == 0).any():
        index = (largest == 0).nonzero()[0, :-1].tolist()
        raise ValueError(f"Expected vectors other than zero (they are normals of reflections); got zero at {index}.")
    v = normals / largest
    v = v / v.norm(dim=-1, keepdim=True)
    half = torch.full_like(v[..., 0], 0.5).diag_embed()
    one = torch.eye(v.shape[-1], columns, dtype=v.dtype, device=v.device)
    return one - v.mT @ solve_triangular((v @ v.mT).triu(1) + half, v[..., :columns], upper=True)


def _checked(value: Tensor, like: Tensor) -> Tensor:
    """Returns the value; raises a ValueError if it has another size, dtype or device than the parameters."""
    check_last(value, like.shape[-1], "the features of the transform")
    check_like("value", value, like)
    return value
