"""ChainRuleDistribution, the base class of the autoregressive distributions: log_prob, samples, Rosenblatt transform."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.expand import ShallowExpand
from ..core.functional import assert_later, at_hand, visible
from ..core.lengths import expand_mask
from ..core.random import uniforms
from ..core.shapes import broadcast_batches, broadcast_shapes
from ..core.values import at_least_single
from ..families.cdf import icdf, probability_integral
from ..families.draws import draws_by_quantile, one_probability, unchecked_icdf
from ..families.enumeration import ByEnumeration
from ..families.fenchel_young import fenchel_young_loss
from ..families.in_support import feasible_point, known_to_contain
from ..families.per_site import PerSite
from ..numerics.fixed_point import FixedPoint, Solver
from .chain_rule import ChainRule
from .checks import check_uniforms
from .in_parallel import solve_quantiles
from .layout import Layout


class ChainRuleDistribution(ByEnumeration, ShallowExpand):
    """Base class of distributions whose sites are visited one by one.

    Args:
        chain: the conditional distributions of the sites.
        layout: maps events to rows of sites.
        solver: how to compute samples and quantiles, see :class:`~pyro_genexact.numerics.FixedPoint`.
        limit: size of the largest support that ``enumerate_support`` enumerates.
        validate_args: whether to check values. Without checks, values outside the support have log_prob -inf.

    Attributes:
        passes: the number of passes of the last parallel solve, or None before one.
    """

    passes: int | None = None
    arg_constraints: dict[str, constraints.Constraint] = {}
    _arguments: tuple[str, ...] = ()  # constructor arguments that only the subclass has
    conditioner = property(
        lambda self: self.chain.conditioner, doc="The conditioner, with its weights at construction."
    )
    head = property(lambda self: self.chain.head, doc="The head, with its weights at construction.")

    def __init__(
        self, chain: ChainRule, layout: Layout, solver: Solver, limit: int, validate_args: bool | None
    ) -> None:
        self.chain, self.layout, self.solver, self.limit = chain, layout, FixedPoint.of(solver), limit
        # the arguments themselves, which expand does not change
        self.context, self.source_lengths, self.prefix = chain.context, chain.source_lengths, layout.prefix
        batch_shape = broadcast_batches(
            context=chain.batch_shape,
            lengths=() if layout.lengths is None else layout.lengths.shape,
            source_lengths=() if chain.source_lengths is None else chain.source_lengths.shape,
            prefix=layout.prefix_batch,
        )
        super().__init__(batch_shape, layout.dims + tuple(chain.head.site_shape), validate_args=validate_args)
        if self._validate_args:
            layout.check_prefix(batch_shape)

    def __repr__(self) -> str:
        parts = f"{type(self.conditioner).__name__}, {type(self.head).__name__}"
        return f"{type(self).__name__}({parts}, {tuple(self.batch_shape)}, {tuple(self.event_shape)})"

    def _like_this(self, **changes: Any) -> Any:
        """Returns the same distribution with some constructor arguments changed."""
        names = ("conditioner", "head", "context", "source_lengths", "prefix", "solver", "limit", *self._arguments)
        given = {name: getattr(self, name) for name in names} | {"validate_args": self._validate_args}
        new = type(self)(**(given | changes))
        return new.expand(broadcast_batches(distribution=self.batch_shape, prefix=new.batch_shape))

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the head's family has a finite support, all rows have all sites, and no prefix has ended."""
        return self.layout.obstacle(self.batch_shape) is None and bool(self.chain.probe.has_enumerate_support)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns all N values of the event, (N, *batch, *event), where the last site varies fastest.

        Without ``expand`` the batch dims have size 1.

        Raises:
            NotImplementedError: if the head's support is not finite, there are lengths, or a prefix has ended.
            ValueError: if N exceeds ``limit``.
        """
        chain, layout = self.chain, self.layout
        if not self.has_enumerate_support:
            got = layout.obstacle(self.batch_shape) or chain.family
            raise NotImplementedError(
                f"Expected a head that enumerates a finite support, and {layout.enumerable}; got {got}."
            )
        going, ended = chain.site_at_zero(layout.given).enumerate_support()[:1, 0, :0], list[Tensor]()
        for t in range(layout.given, chain.sites):
            values = chain.site_at_zero(t).enumerate_support()[:, 0]  # (K, 1, *site_shape)
            if (count := sum(map(len, ended)) + len(going) * len(values)) > self.limit:
                raise ValueError(f"Expected a support of at most {self.limit} values (limit); got {count} or more.")
            new = values.repeat(len(going), *[1] * (values.dim() - 1))
            going = torch.cat([going.repeat_interleave(len(values), 0), new], 1)
            if layout.has_ends:
                ends = layout.ends(going[:, -1:]).squeeze(1)
                stopped, going = going[ends], going[~ends]
                ended.append(torch.cat([stopped, layout.filler(stopped, len(stopped), chain.sites - t - 1)], 1))
        support = torch.cat([*ended, going])
        support = layout.arrange(support, torch.Size((len(support), *[1] * len(self.batch_shape))))
        return support.expand(len(support), *self.batch_shape, *self.event_shape) if expand else support

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) in nats, of the batch shape broadcast with that of the value."""
        factors, shape = self._factors(value)
        return factors.sum(1).reshape(shape)

    def log_prob_sites(self, value: Tensor) -> Tensor:
        """Returns log p(y_t | x, y_{<t}) of each site in nats, (*batch, *sites); the sum over sites is :meth:`log_prob`.

        Padding has 0. From the first site outside the support on, all terms are -inf, because their history is
        impossible.
        """
        return self.layout.arrange(*self._factors(value))

    def fenchel_young(self, value: Tensor) -> Tensor:
        """Returns the sum over sites of their Fenchel-Young losses given the earlier sites, shaped as :meth:`log_prob`.

        It is finite for every value in the support of the head, also where a site has probability 0. See
        :func:`pyro_genexact.fenchel_young_loss`.
        """
        losses, shape = self._factors(value, fenchel_young_loss, torch.inf)
        return losses.sum(1).reshape(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Returns samples (*sample_shape, *batch, *event), drawn site by site from one state of the conditioner.

        Samples of Bernoulli and categorical sites, filtered ones included, are the quantiles of uniform numbers that
        are drawn for all sites first. At one seed, the loop over sites and the ``solver`` therefore return the same
        sample. Samples of other families, and of heads with a family per site, are quantiles of uniform numbers only if
        there is a ``solver``.

        Raises:
            NotImplementedError: if there is a ``solver``, and the head's family has no icdf.
            ValueError: if parameters of Bernoulli or categorical sites are NaN and there is no ``solver``.
            ConvergenceError: see :class:`~pyro_genexact.numerics.FixedPoint`.
        """
        with torch.no_grad():
            if self.solver is None and not self._draws_by_quantile():
                return self.site_by_site(lambda d, *_: d.sample(), sample_shape)
            return self._of_uniforms(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Returns samples with gradients through the whole history, if the head's family is reparameterised.

        Raises:
            NotImplementedError: if it is not; if there is a ``solver``, also if the family has no icdf.
            ConvergenceError: see :class:`~pyro_genexact.numerics.FixedPoint`.
        """
        if not self.chain.probe.has_rsample:
            raise NotImplementedError(f"Expected a head whose family is reparameterised; got {self.chain.family}.")
        if self.solver is not None:
            return self._of_uniforms(sample_shape)
        return self.site_by_site(lambda d, *_: d.rsample(), sample_shape)

    def site_by_site(self, draw: Callable[[Any, Any, Any], Tensor], sample_shape: Any = ()) -> Tensor:
        """Returns values (*sample_shape, *batch, *event), each site chosen given those before it.

        Args:
            draw: called with the distribution (B', 1) of a site, the index of the site in the event in visiting order,
                and the indices of the rows (B',) or a slice of all; returns values (B', 1, *site_shape). Values of rows
                that have ended, and of sites outside a row, are not used.
            sample_shape: the shape of the samples for each row of the batch.
        """
        raise NotImplementedError

    def to_uniform(self, value: Tensor) -> Tensor:
        """Computes the Rosenblatt transform u_t = F_t(y_t | y_{<t}), which is uniform if y comes from this distribution.

        For discrete families u_t = F(y_t-) + v p(y_t) with uniform noise v, so that u is exactly uniform there too. u
        has the shape of the value, and is NaN at padding.

        Raises:
            NotImplementedError: if the head's family has no cdf.

        Reference: Rosenblatt, "Remarks on a multivariate transformation", 1952; Smith, "Diagnostic checks of
        non-standard time series models", 1985.
        """
        d, y, inside, present, shape = self._conditionals(value)
        u = d.each(probability_integral, y) if isinstance(d, PerSite) else probability_integral(d, y)
        for mask in (inside, present):
            u = u if mask is None else torch.where(expand_mask(mask, u), u, torch.nan)
        return self.layout.arrange(self.layout.of_event(u, shape), shape)

    def from_uniform(self, u: Tensor) -> Tensor:
        """Inverts ``to_uniform`` site by site: y_t = F_t^{-1}(u_t | y_{<t}), for u (*sample, *batch, *event).

        Raises:
            ConvergenceError: see :class:`~pyro_genexact.numerics.FixedPoint`.
            NotImplementedError: if the head's family has no icdf.
            TypeError: if u is not a floating-point tensor.
            ValueError: if u is in half precision or outside [0, 1], and where a quantile is infinite. If there is no
                ``solver``, also if parameters of Bernoulli or categorical sites are NaN.
        """
        check_uniforms(u)
        shape = broadcast_shapes(self._batch_of("u", u), self.batch_shape)
        rows, present = self.layout.flat(u, shape), self.layout.present(shape)
        if present is not None:
            rows = torch.where(expand_mask(self.layout.of_event(present, shape), rows), rows, 0.5)
        if not ((rows >= 0) & (rows <= 1)).all():
            raise ValueError("Expected u between 0 and 1; got values outside [0, 1].")

        def checked(d: Any, t: Any, u: Tensor) -> Tensor:
            y = icdf(d, u)
            if not y.isfinite().all():
                raise ValueError(
                    f"Expected u with finite quantiles; got values equal or close to 0 or 1 at site {t} (in visiting order)."
                )
            return y

        y = self._quantiles(torch.cat([rows, torch.full_like(rows[:, :1], 0.5)], 1), shape, checked)
        if self.solver is not None and visible(y) and not y.isfinite().all():
            raise ValueError("Expected u with finite quantiles; got values equal or close to 0 or 1.")
        return y

    def _draws_by_quantile(self) -> bool:
        """Whether the loop draws samples as quantiles of uniform numbers."""
        return self.head.num_sites is None and draws_by_quantile(self.chain.site_at_zero(0))

    def _of_uniforms(self, sample_shape: Any) -> Tensor:
        """Returns the quantiles of uniform numbers, which are drawn for all sites at once."""
        like, shape = self.chain.like, torch.Size(sample_shape) + self.batch_shape
        u = uniforms((self.layout.count + 1, prod(shape), *self.head.site_shape), like.device).transpose(0, 1)
        y = self._quantiles(u, shape, lambda d, t, u: unchecked_icdf(d, u))
        return y.to(torch.promote_types(like.dtype, torch.float32)) if y.is_floating_point() else y

    def _quantiles(self, rows: Tensor, shape: torch.Size, of_site: Callable[[Any, Any, Tensor], Tensor]) -> Tensor:
        """Returns the quantiles of uniform numbers (B, T + 1, *site_shape), of which the last is for sites outside a row.

        Without solver, ``of_site(d, t, u)`` computes those of a site.
        """
        if self.solver is not None and visible(rows):
            y, self.passes = solve_quantiles(self.chain, self.layout, rows[:, :-1], shape, self.solver)
            return self.layout.arrange(y, shape)
        by_quantile, probabilities = self._draws_by_quantile(), list[Tensor]()
        if by_quantile and (found := self._in_one_call(rows, shape)) is not None:
            return self._known(*found)
        columns = rows.transpose(0, 1).unsqueeze(2).contiguous()
        of_all = columns.unbind()  # indexing this takes a tenth of the time

        def draw(d: Any, t: Any, kept: Any) -> Tensor:
            if by_quantile:
                probabilities.append(one_probability(d))
            return of_site(d, t, of_all[t] if isinstance(kept, slice) else columns[t, kept])

        y = self.site_by_site(draw, shape[: len(shape) - len(self.batch_shape)])
        return self._known(y, torch.cat(probabilities)) if probabilities else y

    def _known(self, y: Tensor, probabilities: Tensor) -> Tensor:
        """Returns samples of discrete sites; raises an error if one of the probabilities is NaN."""
        # a comparison with NaN is False, so that NaN would go unnoticed; one test at the end saves waits for the device
        if visible(y):
            good = probabilities.isnan().logical_not_()
            message = "Expected parameters of the sites that are not NaN; got NaN."
            if not (self._validate_args or at_hand(y)):
                assert_later(good, message)
            elif not good.all():
                raise ValueError(message)
        return y

    def _in_one_call(self, rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Returns the result of :meth:`_quantiles` by the native operator, and numbers that are NaN if a parameter is."""
        return None

    def _factors(
        self, value: Tensor, quantity: Callable[..., Tensor] | None = None, outside: float = -torch.inf
    ) -> tuple[Tensor, torch.Size]:
        """Returns a quantity (B, T) of the event's sites in visiting order, and the batch shape of the B rows.

        It is log p by default, 0 at padding, and ``outside`` from the first site outside the support on.
        """
        d, y, inside, present, shape = self._conditionals(value)
        factors = at_least_single(d.log_prob(y) if quantity is None else quantity(d, y))
        if present is not None:
            factors = torch.where(present, factors, 0.0)
        if inside is not None:
            factors = torch.where((~inside).cumsum(1) == 0, factors, outside)
        return self.layout.of_event(factors, shape), shape

    def _conditionals(self, value: Tensor) -> tuple[Any, Tensor, Tensor | None, Tensor | None, torch.Size]:
        """Computes the distributions of all sites given the earlier ones in one parallel pass.

        Returns:
            The distributions (B, sites); the values, replaced at padding and outside the support; the masks (B, sites)
            of valid and of present sites, or None if all are; and the batch shape of the B rows.
        """
        y, present, shape = self.rows_of(value)
        support = self.head.support
        mask = None if present is None and known_to_contain(support, y) else self.layout.inside(y, present)
        if self._validate_args and mask is not None:
            self.layout.check(y, mask)
            mask = None
        read = y
        good = present if mask is None else mask if present is None else mask & present
        if good is not None:
            good = expand_mask(good, y)
            read, y = torch.where(good, y, y.new_zeros(())), torch.where(good, y, feasible_point(support, y))
        chain = self.chain
        d = chain.site(chain.conditioner(chain.read(read), chain.contexts(shape, present)))
        return d, y, mask, present, shape

    def rows_of(self, value: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Returns prefix and value as rows (B, sites, *site_shape), their present sites and the batch shape."""
        value = self.chain.typed("value", value)
        shape = broadcast_shapes(self._batch_of("value", value), self.batch_shape)
        return *self.layout.rows(value, shape), shape

    def _batch_of(self, name: str, value: Tensor) -> torch.Size:
        """Returns the batch shape of a value; raises a ValueError for another event shape."""
        dims = len(self.event_shape)
        cut = value.dim() - dims
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"Expected {name}.shape[-{dims}:] == {tuple(self.event_shape)} (event_shape); got {tuple(value.shape)}."
            )
        return value.shape[:cut]


class EventConstraint(constraints.Constraint):
    """Constraint of events whose present sites are in the support of the head; for sequences, padding must be filled."""

    def __init__(self, d: ChainRuleDistribution) -> None:
        self.d, self.event_dim, self.is_discrete = d, len(d.event_shape), d.head.support.is_discrete

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.d.head.support})"

    def check(self, value: Tensor) -> Tensor:
        y, present, shape = self.d.rows_of(value)
        return self.d.layout.inside(y, present).all(1).reshape(shape)

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns a value that satisfies the constraint, of the shape of ``like`` broadcast with the batch."""
        y, _, shape = self.d.rows_of(like)
        y = self.d.layout.of_event(feasible_point(self.d.head.support, y).expand_as(y), shape)
        return self.d.layout.arrange(y, shape)
