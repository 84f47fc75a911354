"""Flows of one real number, with exact cdf and quantile function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..contexts import PaddedSequence
from ..core.independent import with_check
from ..families.cdf import cdf, icdf
from ..numerics.fixed_point import Solver
from ..transforms.base import Chain, RememberingTransform
from ..transforms.support import Interior, ToSupport
from .base import Flow, over_reals, standard_normal
from .build import Support
from .transformed import TransformedDistribution


def univariate(
    recipe: Callable[..., Flow],
    context: int = 0,
    base: Distribution | nn.Module | None = None,
    *,
    support: Support | None = None,
    standardize: Tensor | None = None,
    **options: Any,
) -> UnivariateFlow:
    """Flow of one real number from any recipe, with exact cdf and quantile function.

    All transforms of a recipe are increasing in one dimension, so their composition is an increasing map y(x) of the
    base, and P(Y <= y) = P_base(X <= x(y)). With a context the flow is a non-linear distributional regression.

    Args:
        recipe: a recipe of this module, or a callable (features, context, **options) that returns a flow of increasing
            transforms ending with :class:`~pyro_genexact.transforms.ToSupport`.
        context: C, the number of context features; 0 for none.
        base: univariate distribution over the reals, or a module that returns one; standard normal by default.
        support: support of the data, a constraint of scalars; the reals by default.
        standardize: data (N,) or (N, 1) whose mean and scale standardise the values in unconstrained space.
        options: further options of the recipe, such as ``transforms``, ``hidden`` or ``inverse``.

    Returns:
        A module whose call returns a :class:`UnivariateDistribution` of batch shape (*batch).

    Raises:
        TypeError: if ``recipe`` does not return such a flow.
        ValueError: if the base is not univariate or not over all real numbers, or an option is invalid for the recipe.

    Reference: Papamakarios et al., "Normalizing Flows for Probabilistic Modeling and Inference", JMLR 2021, section 2.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from pyro_genexact.flows import maf
        >>> wage = univariate(maf, context=2, support=constraints.positive)
        >>> d = wage(torch.zeros(5, 2))
        >>> d.batch_shape, d.event_shape
        (torch.Size([5]), torch.Size([]))
        >>> torch.allclose(d.cdf(d.icdf(torch.tensor(0.9))), torch.tensor(0.9))
        True
    """
    if isinstance(base, Distribution):
        _checked(base)
    if isinstance(support, (list, tuple)) and len(support) == 1:
        support = support[0]
    if isinstance(standardize, Tensor) and standardize.dim() == 1:
        standardize = standardize.unsqueeze(-1)
    if support is not None:
        options["support"] = support
    if standardize is not None:
        options["standardize"] = standardize
    flow = recipe(1, context, **options)
    last = getattr(flow.transforms[-1], "value", None) if isinstance(flow, Flow) else flow
    if not isinstance(last, ToSupport):
        raise TypeError(f"Expected recipe to make a Flow that ends with ToSupport; got {type(last).__name__}.")
    return UnivariateFlow(flow, standard_normal() if base is None else base)


class UnivariateFlow(Flow):
    """Flow of one feature as a module whose call returns a :class:`UnivariateDistribution`, see :func:`univariate`.

    The map onto a support that is bounded only above is decreasing. In that case the base is negated first, so that the
    composition is increasing.

    Args:
        flow: flow over vectors of one feature whose last transform is ``ToSupport``.
        base: univariate distribution over the reals, or a module that returns one.

    Raises:
        ValueError: if the base is not univariate or not over all real numbers (when called).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_genexact.flows import iaf
        >>> UnivariateFlow(iaf(1), dist.Laplace(0.0, 1.0))().sample((3,)).shape
        torch.Size([3])
    """

    def __init__(self, flow: Flow, base: Distribution | nn.Module) -> None:
        super().__init__(list(flow.transforms), base)

    def forward(
        self,
        context: Tensor | PaddedSequence | None = None,
        lengths: Tensor | None = None,
        source_lengths: Tensor | None = None,
        solver: Solver = None,
    ) -> UnivariateDistribution:
        """Returns the distribution of batch shape (*batch).

        Args:
            context: the context (*batch, C), or None.
            lengths: must be None.
            source_lengths: lengths (*batch) of the rows of a source.
            solver: as for :class:`Flow`; it makes no difference for one feature.
        """
        if lengths is not None:
            raise ValueError("Univariate flows do not accept `lengths`.")
        base, parts = self.parts(context, source_lengths, solver)
        turned = [dist.transforms.AffineTransform(0.0, -1.0)] if parts[-1].bijection.sign < 0 else []  # type: ignore[attr-defined]
        return UnivariateDistribution(_checked(base), [UnivariateTransform(Chain([*turned, *parts]))])


def _checked(base: Any) -> Any:
    if base.event_shape:
        raise ValueError(f"Expected base.event_shape == () (univariate); got {tuple(base.event_shape)}.")
    if not over_reals(base):
        raise ValueError(f"Expected base.support to be all real numbers; got {base.support} of {type(base).__name__}.")
    return base


class UnivariateDistribution(TransformedDistribution):
    """Univariate base under an increasing transform, with exact cdf and quantile function.

    ``cdf`` inverts the transform and evaluates the base's cdf; ``icdf`` evaluates the base's quantile and the
    transform. One of the two directions is a network pass, the other one inverts the heads. Both support every base
    that ``families.cdf.cdf`` supports.

    Raises:
        TypeError: in ``cdf`` and ``icdf``, if the value is not a tensor.
        NotImplementedError: in ``cdf`` and ``icdf``, if the base does not have them.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from pyro_genexact.flows import maf, univariate
        >>> d = univariate(maf, support=constraints.unit_interval)()
        >>> d.cdf(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 1.0]
    """

    transforms: list[Any]

    def cdf(self, value: Tensor) -> Tensor:
        """Returns P(Y <= value) with the shape of ``value``, differentiable and accurate in the left tail."""
        _check_tensor(value)
        t = self.transforms[0]
        below = cdf(self.base_dist, t.inv(value))
        outside = torch.where(value.isnan(), value, (value > t.interior(value)).to(value))
        return torch.where(t.codomain.check(value), below, outside)

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the y with P(Y <= y) = value, for values in [0, 1]; the ends of the support at 0 and 1."""
        _check_tensor(value)
        x = icdf(self.base_dist, value)
        ends = [getattr(self.support, end, default) for end, default in _ENDS.items()]
        y = self.transforms[0](torch.where(x.isinf(), 0.0, x))
        low, high = (torch.as_tensor(end, dtype=y.dtype, device=y.device) for end in ends)
        return torch.where(x.isinf(), torch.where(x < 0, low, high), y)


def _check_tensor(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected value to be a tensor; got {type(value).__name__}.")


_ENDS = {"lower_bound": -torch.inf, "upper_bound": torch.inf}


class UnivariateTransform(RememberingTransform):
    """Adapts an increasing transform of vectors of one feature to scalars.

    Args:
        chain (pyro_genexact.transforms.Chain): its last part is a :class:`~pyro_genexact.transforms.ToSupport`.
        cache_size: 1 to cache the last value, 0 for no cache.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from pyro_genexact.transforms import Chain, ToSupport
        >>> UnivariateTransform(Chain([ToSupport(constraints.positive, 1)]))(torch.zeros(3))
        tensor([1., 1., 1.])
    """

    domain = constraints.real
    sign = 1

    def __init__(self, chain: Chain, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.chain = chain

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return with_check(self._onto.support.base_constraint, Interior(self))  # type: ignore[no-any-return]

    def interior(self, like: Tensor) -> Tensor:
        """Returns a value inside the support, with the dtype and device of ``like``."""
        return self._onto.interior(like)[0]  # type: ignore[no-any-return]

    @property
    def _onto(self) -> Any:
        return self.chain.parts[-1]

    def contains(self, y: Tensor) -> Tensor:
        """Returns a Boolean tensor: whether each y lies in the interior of the support."""
        inside: Tensor = self._onto.contains(y.unsqueeze(-1))
        return inside

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.chain.call_and_ladj(x.unsqueeze(-1))
        return y.squeeze(-1), ladj

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.chain.inverse_and_ladj(y.unsqueeze(-1))
        return x.squeeze(-1), ladj

    def watched(self) -> Any:
        return self.chain.watched()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.chain.forward_shape(torch.Size((*shape, 1)))[:-1]

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.chain.inverse_shape(torch.Size((*shape, 1)))[:-1]
