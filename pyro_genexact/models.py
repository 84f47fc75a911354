"""Models: modules whose call returns a distribution (Autoregressive, Sequence, OrderEnsemble, Conditional)."""

from __future__ import annotations

import collections.abc
import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .autoregressive.checks import check_ends, sites_of
from .autoregressive.distribution import AutoregressiveDistribution
from .autoregressive.sequence import SequenceDistribution
from .base import Conditioner, DistributionModule, Head
from .contexts import check_context
from .core.buffers import register_given
from .core.checks import check_kind, check_sizes, permutation
from .core.precision import at_least
from .core.shapes import shape_of
from .families.in_support import with_support
from .families.mixture import Mixture
from .heads.checks import check_distribution_head
from .numerics.fixed_point import Solver


class Autoregressive(DistributionModule):
    """Autoregressive model of vectors, images or series, p(y) = prod_t p(y_t | y_<t, x).

    Calling the model, ``model()`` or ``model(context)``, returns an
    :class:`~pyro_genexact.distributions.AutoregressiveDistribution`, whose ``log_prob`` is in nats.

    Cost: ``log_prob`` takes one parallel pass of the conditioner; ``sample`` extends the conditioner site by site.

    Args:
        conditioner: predicts ``head.num_params`` parameters per site from the context x and the earlier sites.
        head: maps these parameters to the distribution of a site.
        event_shape: shape of a value: the sites, such as (T,) or (H, W), followed by ``head.site_shape``.
        order: integers (T,) where ``order[i]`` is the index of the i-th site to visit; by default that of the
            conditioner, which is raster order except for images (:class:`~pyro_genexact.conditioners.PixelCNN` visits
            the channels of a pixel together). Heads of ``PerSite`` and kinds of ``site`` are in visiting order.
        limit: size of the largest support that ``enumerate_support`` enumerates.

    Raises:
        TypeError: if ``conditioner`` or ``head`` is of another class.
        ValueError: if conditioner, head, order and event_shape do not match.

    References: Bengio, Bengio, "Modeling high-dimensional discrete data with multi-layer neural networks", NeurIPS
    1999; Uria, Murray, Larochelle, "RNADE: The real-valued neural autoregressive density-estimator", NeurIPS 2013.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Bernoulli()
        >>> net = conditioners.MADE(784, head.num_params, hidden=(500,))
        >>> model = Autoregressive(net, head, (28, 28))
        >>> model().log_prob(torch.ones(5, 28, 28)).shape
        torch.Size([5])
        >>> net = conditioners.Recurrent((88,), 88)
        >>> music = Autoregressive(net, heads.Bernoulli((88,)), (100, 88))
        >>> music(num_sites=64).sample((5,)).shape
        torch.Size([5, 64, 88])
    """

    order: Tensor | None

    def __init__(
        self,
        conditioner: Conditioner,
        head: Head,
        event_shape: collections.abc.Sequence[int],
        order: Tensor | collections.abc.Sequence[int] | None = None,
        limit: int = 2**16,
    ) -> None:
        super().__init__()
        check_kind("conditioner", conditioner, Conditioner)
        check_distribution_head(head)
        check_sizes(1, limit=limit)
        self.conditioner, self.head, self.event_shape, self.limit = conditioner, head, shape_of(event_shape), limit
        self.context = conditioner.context
        dims = sites_of(conditioner, head, self.event_shape, 0)
        if order is None:
            conditioner.order_of(dims)  # raises early for another image
        register_given(self, "order", None if order is None else permutation(order, prod(dims)))

    def forward(
        self,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        source_lengths: Tensor | None = None,
        num_sites: int | None = None,
        solver: Solver = None,
    ) -> AutoregressiveDistribution:
        """Returns the distribution of batch shape (*batch).

        Args:
            context: the context (*batch, C), covariates (*batch, T, C) or a source (*batch, S, C).
            lengths: integers (*batch); a row of length n has the distribution of its first n sites.
            source_lengths: integers (*batch), the lengths of the rows of a source.
            num_sites: number of sites of the events, by default that of ``event_shape``. It requires a model of series
                and a conditioner of any length, and avoids padding beyond the longest row of a batch.
            solver: how to draw samples: None or "sequential" for a loop over the sites, "fixed_point" or a
                :class:`~pyro_genexact.numerics.FixedPoint` for passes over all sites.
        """
        return AutoregressiveDistribution(
            self.conditioner,
            self.head,
            self.event_shape if num_sites is None else self._event_of(num_sites),
            context,
            order=self.order,
            lengths=lengths,
            source_lengths=source_lengths,
            solver=solver,
            limit=self.limit,
        )

    def _event_of(self, num_sites: int) -> torch.Size:
        check_sizes(1, num_sites=num_sites)
        if self.order is not None:
            raise ValueError(f"Expected num_sites=None (the model has an order of its sites); got {num_sites}.")
        if len(self.event_shape) != 1 + len(self.head.site_shape):
            raise ValueError(
                f"Expected num_sites=None (the sites of event_shape {tuple(self.event_shape)} have several dims); "
                f"got {num_sites}."
            )
        return torch.Size((num_sites, *self.head.site_shape))


class Sequence(DistributionModule):
    """Model of variable-length sequences.

    Calling the model, ``model()`` or ``model(context)``, returns a
    :class:`~pyro_genexact.distributions.SequenceDistribution`, whose ``log_prob`` is in nats.

    Cost: ``log_prob`` takes one parallel pass of the conditioner; ``sample`` extends the conditioner site by site.

    Args:
        conditioner: predicts ``head.num_params`` parameters per site from the context and the earlier sites.
        head: maps these parameters to the distribution of a site.
        eos: category that ends a sequence; None if the head models the end (:class:`~pyro_genexact.heads.Stopped`).
        max_len: default number of sites of the arrays; for a fixed-size conditioner (MADE), its number of sites.
        limit: size of the largest support that ``enumerate_support`` enumerates.

    Raises:
        TypeError: if ``conditioner`` or ``head`` is of another class.
        ValueError: as :class:`~pyro_genexact.distributions.SequenceDistribution`.

    Reference: Bengio et al., "A neural probabilistic language model", JMLR 2003.

    Example:
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Categorical(28)
        >>> net = conditioners.Recurrent(28, head.num_params, hidden=16)
        >>> model = Sequence(net, head, eos=0, max_len=12)
        >>> words = model().sample((5,))
        >>> model().log_prob(words).shape, model(max_len=3).sample().shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, conditioner: Conditioner, head: Head, eos: int | None, max_len: int, limit: int = 2**16) -> None:
        super().__init__()
        check_kind("conditioner", conditioner, Conditioner)
        check_distribution_head(head)
        check_sizes(1, max_len=max_len, limit=limit)
        check_ends(head, eos)
        sites_of(conditioner, head, shape_of((max_len, *head.site_shape)), 0)
        self.conditioner, self.head, self.eos, self.max_len, self.limit = conditioner, head, eos, max_len, limit
        self.context = conditioner.context

    def forward(
        self,
        context: Tensor | None = None,
        max_len: int | None = None,
        source_lengths: Tensor | None = None,
        solver: Solver = None,
    ) -> SequenceDistribution:
        """Returns the distribution over arrays of ``max_len`` sites, of batch shape (*batch).

        Args:
            context: the context (*batch, C), covariates (*batch, T, C) or a source (*batch, S, C).
            max_len: number of sites of the arrays, by default that of the model.
            source_lengths: integers (*batch), the lengths of the rows of a source.
            solver: how to draw samples: None or "sequential" for a loop over the sites, "fixed_point" or a
                :class:`~pyro_genexact.numerics.FixedPoint` for passes over all sites.
        """
        return SequenceDistribution(
            self.conditioner,
            self.head,
            self.eos,
            self.max_len if max_len is None else max_len,
            context,
            source_lengths=source_lengths,
            solver=solver,
            limit=self.limit,
        )

    def with_head(self, head: Head) -> Sequence:
        """Returns a model with the same conditioner, sharing its weights, and another head, such as a decoding filter."""
        return Sequence(self.conditioner, head, self.eos, self.max_len, self.limit)


class OrderEnsemble(DistributionModule):
    """Uniform mixture of one model over K orders of its sites, p(y) = 1/K sum_k p(y | order_k).

    All orders share the weights of the model; the weights that belong to a variable move with it. In eval mode the call
    returns the exact mixture. In training mode it returns the model under one random order. Maximising that log_prob is
    the training objective of EoNADE, a lower bound on the log_prob of the mixture. During :func:`~pyro_genexact.fit`,
    validation rows are scored by the mixture over the first ``validation`` orders, so that early stopping takes that
    many passes instead of K.

    Cost: K passes for ``log_prob`` and for ``sample`` in eval mode, one in training mode. Each pass first copies the
    weights that the order permutes. ``rsample`` keeps an autograd graph of T steps.

    Args:
        autoregressive: an :class:`Autoregressive` without ``order``, whose conditioner and head support ``permuted``
            (MADE and NADE do).
        orders: integers (K, T), each row a permutation of the sites; or K, for K random permutations.
        validation: how many of the orders score validation rows in :func:`~pyro_genexact.fit`.

    Raises:
        TypeError: if ``autoregressive`` or ``orders`` is of another type.
        ValueError: if ``orders`` are not permutations, the model has an order, or the conditioner's weights cannot be
            permuted.

    Reference: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", ICML 2014.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Bernoulli()
        >>> model = Autoregressive(conditioners.NADE(6, head.num_params), head, (6,))
        >>> ensemble = OrderEnsemble(model, 4).eval()
        >>> ensemble().log_prob(torch.ones(5, 6)).shape
        torch.Size([5])
    """

    orders: Tensor

    def __init__(self, autoregressive: Autoregressive, orders: int | Tensor, validation: int = 4) -> None:
        super().__init__()
        check_sizes(1, validation=validation)
        check_kind("autoregressive", autoregressive, Autoregressive)
        if autoregressive.order is not None:
            raise ValueError("Expected autoregressive.order to be None (the ensemble sets the orders); got an order.")
        self.autoregressive, self.context, self.validation = autoregressive, autoregressive.context, validation
        sites = prod(sites_of(autoregressive.conditioner, autoregressive.head, autoregressive.event_shape, 0))
        if isinstance(orders, int):
            check_sizes(1, orders=orders)
            orders = torch.stack([torch.randperm(sites, device="cpu") for _ in range(orders)])
        elif not isinstance(orders, (Tensor, list, tuple)):
            raise TypeError(
                f"Expected orders to be an integer, a tensor (K, {sites}) or a list of orders; got {orders!r}."
            )
        elif (isinstance(orders, Tensor) and orders.dim() != 2) or not len(orders):
            got = tuple(orders.shape) if isinstance(orders, Tensor) else orders
            raise ValueError(f"Expected orders of shape (K, {sites}) with K >= 1 and {sites} sites; got {got}.")
        self.register_buffer(
            "orders", torch.stack([permutation(order, sites, f"orders[{k}]") for k, order in enumerate(orders)])
        )
        # raises early if a part cannot be permuted
        autoregressive.conditioner.permuted(self.orders[0]), autoregressive.head.permuted(self.orders[0])

    def forward(self, context: Tensor | None = None, solver: Solver = None) -> AutoregressiveDistribution | Mixture:
        """Returns the mixture given the context (*batch, C); in training mode, the model under one random order.

        ``solver`` is that of each order, as for :class:`Autoregressive`.
        """
        if self.training:
            chosen = int(torch.randint(len(self.orders), (), device="cpu"))
            return self._under(self.orders[chosen], context, solver)
        components = [self._under(order, context, solver) for order in self.orders]
        logits = components[0].chain.like.new_zeros(*components[0].batch_shape, len(components))
        return Mixture(logits, components)

    def for_validation(self) -> OrderEnsemble:
        """Returns the ensemble over the first ``validation`` orders, sharing its weights."""
        new = copy.copy(self)
        new._buffers = {**self._buffers, "orders": self.orders[: self.validation]}
        return new

    def _under(self, order: Tensor, context: Tensor | None, solver: Solver) -> AutoregressiveDistribution:
        model = self.autoregressive
        return AutoregressiveDistribution(
            _InOrder(model.conditioner, order),
            model.head.permuted(order),
            model.event_shape,
            context,
            order=order,
            solver=solver,
            limit=model.limit,
        )


class _InOrder(Conditioner):
    """Applies a permutation to a conditioner's weights at each use, so that it follows their updates."""

    def __init__(self, net: Conditioner, order: Tensor) -> None:
        super().__init__()
        self.net, self.order = net, order
        self.num_params, self.num_sites = net.num_params, net.num_sites
        self.site, self.context = net.site, net.context

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, tuple[Conditioner, Any]]:
        net = self.net.permuted(self.order)
        phi, state = net.start(context, batch_size)
        return phi, (net, state)

    def extend(self, y: Tensor, state: tuple[Conditioner, Any]) -> tuple[Tensor, tuple[Conditioner, Any]]:
        phi, inner = state[0].extend(y, state[1])
        return phi, (state[0], inner)

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net.permuted(self.order)(y, context)

    def reorder(self, state: tuple[Conditioner, Any], index: Tensor) -> tuple[Conditioner, Any]:
        return state[0], state[0].reorder(state[1], index)


class Conditional(DistributionModule):
    """Predicts the parameters of a distribution from the context by a network, p(y | x) = head(network(x)).

    Args:
        network: any module that maps the context (*batch, C) to (*batch, ``head.num_params``).
        head: maps these parameters to the distribution of a value.
        context: C; by default the ``in_features`` of the network, if it is or starts with an ``nn.Linear``.

    Raises:
        TypeError: if ``network`` is not a module or, when called, does not return a floating-point tensor.
        ValueError: if C cannot be inferred, or, when called, the network does not return ``head.num_params`` features.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_genexact import heads
        >>> head = heads.MultivariateNormal(2)  # mean and Cholesky factor
        >>> network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, head.num_params))
        >>> model = Conditional(network, head)
        >>> model(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, head: Head, context: int | None = None) -> None:
        super().__init__()
        check_kind("network", network, nn.Module)
        check_distribution_head(head)
        if head.num_sites is not None:
            raise ValueError(f"Expected a head of one site; got {type(head).__name__} of {head.num_sites} sites.")
        self.network, self.head = network, head
        if context is None:
            first = network[0] if isinstance(network, nn.Sequential) and len(network) else network
            if not isinstance(first, nn.Linear):
                raise ValueError("Expected context=C (the network does not start with nn.Linear); got None.")
            context = first.in_features
        check_sizes(1, context=context)
        self.context = context

    def forward(self, context: Tensor | None = None) -> Any:
        """Returns the distribution of batch shape (*batch), given the context (*batch, C)."""
        context = check_context(self, context)
        phi = self.network(context)
        if not isinstance(phi, Tensor) or not phi.is_floating_point():
            got = phi.dtype if isinstance(phi, Tensor) else type(phi).__name__
            raise TypeError(f"Expected the network's outputs to be a tensor of floating-point numbers; got {got}.")
        if phi.shape[-1:] != (self.head.num_params,):
            raise ValueError(
                f"Expected the network's outputs (*batch, {self.head.num_params}) (num_params of the head); "
                f"got {tuple(phi.shape)}."
            )
        return with_support(self.head(at_least(phi, context)), self.head.support)
