"""Flows of one real number, with exact cdf and quantiles."""

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
from ..transforms.base import Chain, RememberingTransform
from ..transforms.support import Interior, ToSupport
from .base import Flow, over_reals, standard_normal
from .transformed import TransformedDistribution


def univariate(
    recipe: Callable[..., Flow], context: int = 0, base: Distribution | nn.Module | None = None, **options: Any
) -> UnivariateFlow:
    """A flexible density on one axis: any recipe of one feature, as univariate distributions with cdf and icdf.

    Each transform of a recipe rises on its axis, so the whole is one increasing map of the base, and
    P(Y <= y) = P_base(X <= x(y)). Conditioned on a context, it is a non-linear regression of the whole distribution.

    Args:
        recipe: of this module, or any callable (features, context, **options) to a flow of increasing transforms that
            ends with :class:`~pyro_genexact.transforms.ToSupport`.
        context: C, features of the context; 0 for none.
        base: a univariate distribution, or a module whose call returns one; by default standard normal.
        options: of the recipe; ``support`` is a constraint of scalars, the rows of ``standardize`` are (N, 1).

    Raises:
        TypeError: if ``recipe`` makes something else than such a flow.
        ValueError: for a base over vectors or less than the reals, and for the options as the recipe says.

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
    support = options.get("support")
    if isinstance(support, (list, tuple)) and len(support) == 1:
        options["support"] = support[0]
    flow = recipe(1, context, **options)
    last = getattr(flow.transforms[-1], "value", None) if isinstance(flow, Flow) else flow
    if not isinstance(last, ToSupport):
        raise TypeError(f"Expected recipe to make a Flow that ends with ToSupport; got {type(last).__name__}.")
    return UnivariateFlow(flow, standard_normal() if base is None else base)


class UnivariateFlow(Flow):
    """A flow of one feature as a module whose call returns a :class:`UnivariateDistribution`: see :func:`univariate`.

    Onto a support that is bounded above alone the way falls; the base is turned round first, so that the whole rises.

    Args:
        flow: over vectors of one feature, ending with ``ToSupport``.
        base: a univariate distribution, or a module whose call returns one.

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
    ) -> UnivariateDistribution:
        """The univariate distribution given the context (*batch, C), and the lengths (*batch) of its sources."""
        if lengths is not None:
            raise ValueError("Expected no lengths (of one feature); got some.")
        base, parts = self.parts(context, source_lengths)
        turned = [dist.transforms.AffineTransform(0.0, -1.0)] if parts[-1].bijection.sign < 0 else []  # type: ignore[attr-defined]
        return UnivariateDistribution(_checked(base), [UnivariateTransform(Chain([*turned, *parts]))])


def _checked(base: Any) -> Any:
    if base.event_shape:
        raise ValueError(f"Expected base.event_shape == () (univariate); got {tuple(base.event_shape)}.")
    if not over_reals(base):
        raise ValueError(f"Expected base.support to be all real numbers; got {base.support} of {type(base).__name__}.")
    return base


class UnivariateDistribution(TransformedDistribution):
    """A univariate base under an increasing transform, with its exact distribution function and quantiles.

    ``cdf`` costs one inversion of the transform and a cdf of the base, ``icdf`` a quantile of the base and the transform:
    one of them is a pass of the networks, the other one solves the heads. Both know every base that
    ``families.cdf.cdf`` does.

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
        """P(Y <= value) (*sample, *batch); 0 below the support and 1 above it. Differentiable; left tails are exact."""
        _check_tensor(value)
        t = self.transforms[0]
        below = cdf(self.base_dist, t.inv(value))
        outside = torch.where(value.isnan(), value, (value > t.interior(value)).to(value))
        return torch.where(t.codomain.check(value), below, outside)

    def icdf(self, value: Tensor) -> Tensor:
        """The y (*sample, *batch) with P(Y <= y) = value in [0, 1]; at 0 and 1 the ends of the support."""
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
    """An increasing transform of vectors of one feature as one of scalars.

    Args:
        chain (pyro_genexact.transforms.Chain): whose last part is a :class:`~pyro_genexact.transforms.ToSupport`.

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
        """A value inside the support."""
        return self._onto.interior(like)[0]  # type: ignore[no-any-return]

    @property
    def _onto(self) -> Any:
        return self.chain.parts[-1]

    def contains(self, y: Tensor) -> Tensor:
        """Whether y lies in the interior of the support, Boolean."""
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
