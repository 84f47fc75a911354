"""The networks of an amortised guide, and the distribution of all latents that they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import log
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..core.checks import check_sizes
from .latent_block import Block, Encoded
from .latent_space import Group
from .observations import Inputs

WIDTH, DEPTH = 128, 3  # of the networks between the observations and the flow


class Member(nn.Module):
    """One posterior: q(globals | observations) and q(locals of a row | its observations, globals).

    If there are rows, the globals are given the mean of a network's output over the rows and the log of their number.

    Args:
        groups: the global and the local latents; either may have none.
        inputs: encodes the observations of a row, or all of them.
        outside: encodes the observations outside of the row plate, if there are any.
        recipe: of the flows.
        options: keyword arguments of the recipe.
    """

    def __init__(
        self, groups: tuple[Group, Group], rows: bool, inputs: Inputs, outside: Inputs | None, recipe: Any, options: Any
    ) -> None:
        super().__init__()
        self.rows, (of_all, of_row) = rows, groups
        more = outside.features if outside is not None else 0
        self.embed = _mlp(inputs.features + more)
        self.pool = _mlp(WIDTH) if rows and of_all.size else None
        linear = inputs.linear + (outside.linear if outside is not None else 0)
        context = WIDTH + (1 if rows else inputs.features + more)
        self.of_all = Block(of_all, linear, context, recipe, options) if of_all.size else None
        given = of_all.features
        self.of_row = (
            Block(of_row, linear + given, inputs.features + more + WIDTH + given, recipe, options)
            if of_row.size
            else None
        )

    def encoded(self, linear: Tensor, features: Tensor) -> tuple[Encoded, Encoded]:
        """Returns what the globals and what the locals are given; of rows, if there are any (*batch, R, F)."""
        embedded = self.embed(features)
        each = Encoded(linear, torch.cat([features, embedded], -1))
        if self.pool is None:  # no rows, or only local latents
            return each, each
        size = features.new_full((*features.shape[:-2], 1), float(features.shape[-2])).log()
        return Encoded(linear.mean(-2), torch.cat([self.pool(embedded).mean(-2), size], -1)), each

    def log_prob(self, of_all: Tensor, of_rows: Tensor, given: tuple[Encoded, Encoded]) -> Tensor:
        """Returns the log density (*batch,) of packed globals (*batch, G) and packed rows (*batch, R, L)."""
        total, row = of_rows.new_zeros(of_rows.shape[:-2]), given[1]
        if self.of_all is not None:
            total, features = self.of_all.log_prob(of_all, given[0])
            row = row.joined(features.unsqueeze(-2)) if self.of_row is not None else row
        return total if self.of_row is None else total + self.of_row.log_prob(of_rows, row)[0].sum(-1)

    def sample(self, given: tuple[Encoded, Encoded], differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns packed globals (*batch, G) and rows (*batch, R, L), and their log density as :meth:`Block.sample`."""
        row = given[1]
        of_all = row.context[..., :0] if not self.rows else row.context[..., 0, :0]
        of_rows, total = of_all.unsqueeze(-2), of_all.new_zeros(of_all.shape[:-1])
        if self.of_all is not None:
            of_all, features, total = self.of_all.sample(given[0], differentiable)
            row = row.joined(features.unsqueeze(-2)) if self.of_row is not None else row
        if self.of_row is not None:
            of_rows, _, each = self.of_row.sample(row, differentiable)
            total = total + each.sum(-1)
        return of_all, of_rows, total

    def standardise(self, of_all: Tensor, of_rows: Tensor, given: tuple[Encoded, Encoded]) -> None:
        """Fits the linear maps of the blocks to simulations (N, G) and (N, R, L)."""
        row = given[1]
        if self.of_all is not None:
            features = self.of_all.standardise(of_all, given[0])
            row = row.joined(features.unsqueeze(-2)) if self.of_row is not None else row
        if self.of_row is not None:
            self.of_row.standardise(of_rows.flatten(0, 1), Encoded(*(x.flatten(0, 1) for x in row)))


def _mlp(inputs: int) -> nn.Module:
    sizes = [inputs, *[WIDTH] * DEPTH]
    return nn.Sequential(*(part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.SiLU())))


class Posterior(nn.Module):
    """Returns the distribution of all latents, given the observations by name.

    Args:
        make: a function that returns a new :class:`Member`.
        groups: the global and the local latents.
        has_rows: whether the model has a row plate.
        inputs: encodes the observations of a row, or all of them.
        outside: encodes the observations outside of the row plate.
        ensemble: K, the number of members.
    """

    def __init__(
        self,
        make: Callable[[], Member],
        groups: tuple[Group, Group],
        has_rows: bool,
        inputs: Inputs,
        outside: Inputs | None,
        ensemble: int,
    ) -> None:
        super().__init__()
        check_sizes(1, ensemble=ensemble)
        self.groups, self.has_rows, self.inputs, self.outside = groups, has_rows, inputs, outside
        self.members = nn.ModuleList(make() for _ in range(ensemble))

    @property
    def features(self) -> int:
        """The number of features of the observations, or of those of one row."""
        return self.inputs.features + (self.outside.features if self.outside is not None else 0)

    def forward(self, **observations: Any) -> AmortizedPosterior:
        """Returns the distribution, of the batch shape of the observations."""
        return self.given(observations)

    def given(self, observations: Mapping[str, Any], mean: bool = False) -> AmortizedPosterior:
        """Returns the distribution; with ``mean``, its log_prob is the mean of those of the members."""
        linear, features = self.encode(observations)
        given = [member.encoded(linear, features) for member in self.members]  # type: ignore[operator]
        rows = features.shape[-2] if self.has_rows else 1
        batch = features.shape[: -2 if self.has_rows else -1]
        posterior = AmortizedPosterior(self, given, rows, batch, mean)
        posterior.features = features
        return posterior

    def encode(self, observations: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the inputs (*batch, [R,] L) of the regression and the features (*batch, [R,] F) of the observations."""
        linear, features = self.inputs(observations)
        if self.outside is None:
            return linear, features
        more = [x.unsqueeze(-2).expand(*features.shape[:-1], -1) for x in self.outside(observations)]
        return torch.cat([linear, more[0]], -1), torch.cat([features, more[1]], -1)

    def split(self, packed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Returns the packed globals (*batch, G) and rows (*batch, R, L)."""
        of_all, of_row = (group.size for group in self.groups)
        return packed[..., :of_all], packed[..., of_all:].unflatten(-1, (rows, of_row)) if of_row else packed[
            ..., None, :0
        ]

    @torch.no_grad()
    def standardise(self, packed: Tensor, observations: Mapping[str, Any]) -> None:
        """Fits shifts and scales to simulations."""
        self.inputs.standardise(observations)
        if self.outside is not None:
            self.outside.standardise(observations)
        linear, features = self.encode(observations)
        rows = features.shape[-2] if self.has_rows else 1
        for member in self.members:
            member.standardise(*self.split(packed, rows), member.encoded(linear, features))  # type: ignore[operator]


class AmortizedPosterior(TorchDistribution):
    """The joint distribution of all latents of a model, as packed vectors.

    Args:
        network: the networks.
        given: what each member is given.
        rows: R, the number of rows of the row plate; 1 without one.
        batch_shape: the batch shape of the observations.
        mean: whether ``log_prob`` is the mean of the members' (for training) instead of that of their mixture.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    features: Tensor  # (*batch, [R,] F), of the observations

    def __init__(self, network: Posterior, given: Any, rows: int, batch_shape: Size, mean: bool = False) -> None:
        self.network, self.given, self.rows, self.mean_of_members = network, given, rows, mean
        of_all, of_row = network.groups
        self._drawn: Any = None  # the last value of rsample, its version, whether it has a graph, and its log density
        super().__init__(batch_shape, Size((of_all.size + rows * of_row.size,)), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return not any(group.d for group in self.network.groups)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of the mixture in nats, (*sample, *batch)."""
        if (known := self._known(value)) is not None:
            return known
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        parts = self.network.split(value.expand(*batch, -1), self.rows)
        pairs = zip(self.network.members, self.given, strict=True)
        found = [member.log_prob(*parts, given) for member, given in pairs]  # type: ignore[operator]
        if len(found) == 1:
            return found[0]  # type: ignore[no-any-return]
        each = torch.stack(found)
        return each.mean(0) if self.mean_of_members else each.logsumexp(0) - log(len(found))

    def _known(self, value: Tensor) -> Tensor | None:
        """Returns the log density of the last value of ``rsample``; None for others, and if it lacks a graph."""
        if self._drawn is None or value is not self._drawn[0]:
            return None
        _, version, has_graph, log_prob = self._drawn
        same: bool = value._version == version and (has_graph or not torch.is_grad_enabled())
        return log_prob if same else None

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(Size(sample_shape), False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws reparameterised samples; each comes from a member that is drawn at random."""
        return self._draw(Size(sample_shape), True)

    def _draw(self, sample_shape: Size, differentiable: bool) -> Tensor:
        shape, size, members = (
            Size((*sample_shape, *self.batch_shape)),
            self.batch_shape.numel(),
            [*self.network.members],
        )
        if len(members) == 1:
            given = [Encoded(*(x.expand(*sample_shape, *x.shape) for x in one)) for one in self.given[0]]
            of_all, of_rows, log_prob = members[0].sample(given, differentiable)  # type: ignore[operator]
            value = torch.cat([of_all, of_rows.flatten(-2)], -1).reshape(*shape, *self.event_shape)
            if differentiable and self.has_rsample and not value.is_inference():
                self._drawn = value, value._version, torch.is_grad_enabled(), log_prob
            return value
        like = self.given[0][1].context
        which = torch.randint(len(members), (shape.numel(),), device=like.device)
        found, order = [like.new_empty(0, *self.event_shape)], which.argsort(stable=True)
        rows = order.split(which.bincount(minlength=len(members)).tolist())
        for member, given, row in zip(members, self.given, rows, strict=True):
            if len(row):
                index, dims = row % size, len(self.batch_shape)
                taken = [Encoded(*(x.reshape(size, *x.shape[dims:])[index] for x in one)) for one in given]
                of_all, of_rows, _ = member.sample(taken, differentiable)  # type: ignore[operator]
                found.append(torch.cat([of_all, of_rows.flatten(-2)], -1))
        return torch.cat(found)[order.argsort()].reshape(*shape, *self.event_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AmortizedPosterior:
        batch_shape = Size(batch_shape)
        new = [
            [Encoded(*(x.expand(*batch_shape, *x.shape[len(self.batch_shape) :]) for x in one)) for one in given]
            for given in self.given
        ]
        return type(self)(self.network, new, self.rows, batch_shape, self.mean_of_members)
