"""The conditional distribution of a group of latents: a chain rule of categories, and a flow around a linear regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.nn.functional import silu

from ..conditioners.independent import Independent
from ..conditioners.made import MADE
from ..flows.base import Flow, over_reals
from ..heads.bijections import Affine
from ..heads.common_families import Categorical
from ..heads.composite import PerSite
from ..models import Autoregressive
from ..transforms.autoregressive import AutoregressiveTransform
from .latent_space import Group

RIDGE = 1e-4  # of the linear regression on standardised inputs


class Encoded(NamedTuple):
    """What a block of latents is given.

    Attributes:
        linear: (*batch, L), for the linear regression; L may be 0.
        context: (*batch, C), for the networks.
    """

    linear: Tensor
    context: Tensor

    def joined(self, features: Tensor) -> Encoded:
        """Returns both with further features (*batch, F), over the joint batch."""
        batch = torch.broadcast_shapes(features.shape[:-1], self.context.shape[:-1])
        parts = (torch.cat([x.expand(*batch, -1), features.expand(*batch, -1)], -1) for x in self)
        return Encoded(*parts)

    def expand(self, batch: Size) -> Encoded:
        """Returns both, expanded to a batch."""
        return Encoded(*(x.expand(*batch, -1) for x in self))


class Block(nn.Module):
    """The distribution of a group of latents given the encoded observations.

    The categories have a chain rule of categorical heads. Given the categories, the real numbers are
    ``shift + regression @ inputs + scale @ flow(noise)``. ``standardise`` sets the three by linear regression on simulations, so
    that the flow learns residuals with mean 0 and covariance 1. The last transform of the flow is a shift and a scale of each
    residual that are linear in the context. Before training, the flow is the identity.

    Args:
        group: the latents.
        linear: L, the number of inputs of the regression.
        context: C, the number of inputs of the networks.
        recipe: a function that returns a flow over real numbers.
        options: keyword arguments of the recipe.
    """

    shift: Tensor
    regression: Tensor
    scale: Tensor
    mean: Tensor
    sd: Tensor

    def __init__(
        self, group: Group, linear: int, context: int, recipe: Callable[..., Any], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.group, self.discrete, self.flow = group, None, None
        if group.d:
            head = PerSite([Categorical(k) for k in group.categories])
            net = MADE(group.d, head.num_params, site=group.categories, context=context, activation=silu)  # type: ignore[arg-type]
            self.discrete = Autoregressive(net, head, (group.d,))
        hot = sum(group.categories)
        if n := group.real_size:
            self.flow = _located(
                _checked(recipe(n, context=context + hot, **options), n, context + hot), n, context + hot
            )
        self.register_buffer("shift", torch.zeros(n))
        self.register_buffer("regression", torch.zeros(n, linear + hot))
        self.register_buffer("scale", torch.eye(n))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("sd", torch.ones(n))

    def log_prob(self, packed: Tensor, given: Encoded) -> tuple[Tensor, Tensor]:
        """Returns the log density (*batch,) of packed values (*batch, size), and their features (*batch, F)."""
        given = given.expand(packed.shape[:-1])
        labels, values = packed[..., : self.group.d], packed[..., self.group.d :]
        total, hot = packed.new_zeros(packed.shape[:-1]), self.group.encoded(labels)
        if self.discrete is not None:
            total = total + self.discrete(given.context).log_prob(labels)
            given = given.joined(hot)
        if self.flow is None:
            return total, hot
        real, ladj = self.group.to_real(values)
        rest = real - self._centre(given.linear)
        noise = torch.linalg.solve_triangular(self.scale, rest.unsqueeze(-1), upper=False).squeeze(-1)
        log_scale = self.scale.diagonal().log().sum()
        total = total + self.flow(given.context).log_prob(noise) + ladj - log_scale
        return total, torch.cat([hot, (real - self.mean) / self.sd], -1)

    def sample(self, given: Encoded, differentiable: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns packed values (*batch, size) and their features (*batch, F), one for each row of what is given.

        The third tensor is the log density (*batch,) of the values if they are differentiable, and 0 otherwise.
        """
        packed, hot = given.context[..., :0], given.context[..., :0]
        total = packed.new_zeros(packed.shape[:-1])
        if self.discrete is not None:
            packed = self.discrete(given.context).sample().to(packed.dtype)
            hot = self.group.encoded(packed)
            given = given.joined(hot)
        if self.flow is None:
            return packed, hot, total
        flow = self.flow(given.context)
        noise = flow.rsample() if differentiable else flow.sample()
        real = self._centre(given.linear) + (self.scale @ noise.unsqueeze(-1)).squeeze(-1)
        features = torch.cat([hot, (real - self.mean) / self.sd], -1)
        values, ladj = self.group.from_real(real)
        if differentiable:
            total = flow.log_prob(noise) - ladj - self.scale.diagonal().log().sum()
        return torch.cat([packed, values], -1), features, total

    def _centre(self, linear: Tensor) -> Tensor:
        return self.shift + linear @ self.regression.T

    @torch.no_grad()
    def standardise(self, packed: Tensor, given: Encoded) -> Tensor:
        """Sets shift, regression and scale by N packed values (N, size); returns their features (N, F)."""
        labels, values = packed[..., : self.group.d], packed[..., self.group.d :]
        hot = self.group.encoded(labels)
        if self.flow is None:
            return hot
        x = given.joined(hot).linear.double()
        x = x if len(packed) > 20 * x.shape[-1] else x[..., :0]  # too few simulations for a regression
        y = self.group.to_real(values)[0].double()
        slope, shift, rest = regression(x, y)
        covariance = rest.T @ rest / len(x)
        size = covariance.diagonal()
        covariance = covariance + torch.diag(torch.where(size > 0, 1e-6 * size, 1.0))
        self.regression.zero_()
        self.regression[:, : x.shape[-1]].copy_(slope)
        self.shift.copy_(shift)
        self.scale.copy_(torch.linalg.cholesky(covariance))
        self.mean.copy_(y.mean(0))
        self.sd.copy_(torch.where((sd := y.std(0, correction=0)) > 0, sd, 1.0))
        return self.log_prob(packed, given)[1]


def regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the slope (n, L), the shift (n,) and the residuals (N, n) of a linear regression of y (N, n) on x (N, L)."""
    mean, centre = x.mean(0), y.mean(0)
    x, y = x - mean, y - centre
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[-1]).to(x)
    slope = torch.linalg.solve(gram, x.T @ y / len(x)).T
    return slope, centre - slope @ mean, y - x @ slope.T


def _located(flow: Flow, features: int, context: int) -> Flow:
    """Returns the flow under a shift and a scale of each latent that are linear in the context; it starts at the identity."""
    net = Independent(features, 2, context=context, hidden=())
    flow = Flow([*flow.transforms, AutoregressiveTransform(net, Affine())], flow.base)
    for part in flow.modules():
        if isinstance(part, (MADE, Independent)):
            last = part.layers[-1] if isinstance(part, MADE) else part.net
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
    return flow


def _checked(flow: Any, features: int, context: int) -> Flow:
    if not isinstance(flow, Flow):
        raise TypeError(f"Expected recipe to return a Flow; got {type(flow).__name__}.")
    one = flow(torch.zeros(context))
    if one.event_shape != (features,) or not over_reals(one):
        raise ValueError(
            f"Expected recipe to return a flow over {features} real numbers (the model's latents); got event_shape "
            f"{tuple(one.event_shape)} and support {one.support}."
        )
    return flow
