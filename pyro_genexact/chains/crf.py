"""LinearChainCRF: a distribution over label sequences with exact marginals, modes, entropy and conditioning."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints, kl_divergence

from ..autoregressive.distribution import AutoregressiveDistribution
from ..core.checks import check_sizes
from ..core.independent import independent
from ..core.precision import widened
from ..core.shapes import broadcast_batches, broadcast_shapes
from ..core.values import numbers
from ..heads.common_families import Categorical
from . import checks as check
from .distribution import ChainDistribution
from .inference import ChainInference
from .labels import ConditionalTables, LabelStrings, conditional_logits
from .log_partition import log_partition_or_none
from .messages import LogMessages
from .semirings import KMax, fold, trace_k


class LinearChainCRF(ChainDistribution):
    """Linear-chain conditional random field: label sequences y_1 ... y_N with p(y) = exp(score(y)) / Z.

        score(y) = initial[y_1] + sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}] + final[y_N]

    Z is exact, and so are marginals, modes, samples, entropies and conditionals. Potentials are log-weights: real
    numbers, or -inf for impossible labels. An event is a tensor (N,) of integers 0 ... V - 1. With ``lengths``, the
    sites from a row's length on are padding: any label is accepted there, samples and marginals are 0, and gradients
    are zero.

    The batch shape is that of all arguments, broadcast. Log-probabilities and entropies are in nats.

    Cost: log Z and its gradient take one recursion of N products of (B, V) and (V, V) matrices in each direction; all
    queries share it. Modes and second derivatives need tensors (B, V, V) per step.

    Args:
        unary: (*batch, N, V), the log-weight of each label at each site.
        transition: (V, V), where [i, j] is the log-weight of a step from label i to label j; or one matrix per step,
            (*batch, N - 1, V, V); or one per row, (*batch, 1, V, V). Draws (*batch, V, V) from a prior need
            ``unsqueeze(-3)``.
        initial: (V) or (*batch, V), log-weights of the first label; by default 0.
        final: (V) or (*batch, V), log-weights of the last label; by default 0.
        lengths: integers (*batch) in 0 ... N, the number of sites of each row; by default N. The empty sequence has
            log_prob 0.
        validate_args: whether to check potentials and values. Without checks, values outside the support have log_prob
            -inf.

    Raises:
        TypeError: if an argument is not a tensor, or has another type of numbers.
        ValueError: if shapes, dtypes or devices do not match, or lengths are outside 0 ... N. When validating, also for
            potentials that are NaN or +inf, and for labels outside 0 ... V - 1. Queries raise it if a row has no
            possible label sequence.

    Reference: Lafferty, McCallum, Pereira, "Conditional random fields", ICML 2001; Rabiner, "A tutorial on hidden
    Markov models", 1989.

    Example:
        >>> import torch
        >>> crf = LinearChainCRF(torch.zeros(5, 7, 3), torch.eye(3))
        >>> crf.log_prob(crf.sample((4,))).shape, crf.marginals.shape
        (torch.Size([4, 5]), torch.Size([5, 7, 3]))
        >>> crf.mode[0], crf.entropy()[0]
        (tensor([0, 0, 0, 0, 0, 0, 0]), tensor(6.9506))
    """

    events = "label sequences"

    def __init__(
        self,
        unary: Tensor,
        transition: Tensor,
        *,
        initial: Tensor | None = None,
        final: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        unary, transition, initial, final = map(widened, (unary, transition, initial, final))
        check.potentials(unary, transition, initial, final)
        self.num_labels, sites = unary.shape[-1], unary.shape[-2]
        self.unary, self.transition, self.initial, self.final = unary, transition, initial, final
        self.lengths = check.lengths_like(unary, lengths)
        self._rows = check.batch_shape_of(
            unary=unary.shape[:-2],
            transition=transition.shape[:-3],
            initial=() if initial is None else initial.shape[:-1],
            final=() if final is None else final.shape[:-1],
            lengths=() if lengths is None else lengths.shape,
        )
        self._cache: dict[str, Any] = {}  # shared with expanded copies
        super().__init__(self._rows, Size((sites,)), validate_args=validate_args)
        if self._validate_args:
            check.potentials_in_range((unary, transition, initial, final), self.inference.potentials)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({tuple(self.batch_shape)}, {tuple(self.event_shape)}, num_labels={self.num_labels})"
        )

    @property
    def inference(self) -> ChainInference:
        """The potentials of each row, and the messages that all queries share."""
        given = (self.unary, self.transition, self.initial, self.final)
        return ChainInference(given, self.lengths, self._rows, self.batch_shape, self._cache)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint of labels 0 ... V - 1; padding may have any value."""
        if self.lengths is None:
            return independent(constraints.integer_interval(0, self.num_labels - 1), 1)
        return LabelStrings(self.num_labels, self.lengths)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) in nats, of the batch shape broadcast with that of the value."""
        value = self._checked(value)
        if self._validate_args:
            self._validate_sample(value)
        inference = self.inference
        log_prob = inference.score(value) - inference.log_partition()
        return log_prob.to(self.unary.dtype).expand(broadcast_shapes(value.shape[:-1], self.batch_shape))

    @property
    def log_partition(self) -> Tensor:
        """The log-normaliser log Z in nats, (*batch), where Z sums exp(score(y)) over all label sequences."""
        return self.inference.in_batch(self.inference.log_partition())

    def score(self, value: Tensor) -> Tensor:
        """Returns the log-weight of a label sequence, log_prob + log_partition; -inf outside the support."""
        value = self._checked(value)
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.inference.score(value).to(self.unary.dtype).expand(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Returns label sequences (*sample_shape, *batch, N), drawn backwards given the forward messages."""
        shape = Size((*sample_shape, *self.batch_shape))
        rows = (1,) * (len(shape) - len(self._rows)) + self._rows
        dims = sorted(range(len(shape)), key=lambda d: rows[d] == shape[d] and d >= len(shape) - len(self._rows))
        count = prod(shape) // max(prod(self._rows), 1)
        with torch.no_grad():
            labels = self.inference.messages().sample(count)
        labels = labels.reshape(*(shape[d] for d in dims), *self.event_shape)
        back = sorted(range(len(shape)), key=dims.__getitem__)
        return labels.permute(*back, len(shape))

    @property
    def marginals(self) -> Tensor:
        """p(y_t = i), (*batch, N, V): the gradient of log Z with respect to unary; it is itself differentiable."""
        return self.inference.in_batch(self.inference.query(lambda messages: messages.marginals()), 2)

    @property
    def pair_marginals(self) -> Tensor:
        """p(y_t = i, y_{t+1} = j), (*batch, N - 1, V, V)."""
        return self.inference.in_batch(self.inference.query(lambda messages: messages.pair_marginals()), 3)

    @property
    def mode(self) -> Tensor:
        """The most probable label sequence (*batch, N)."""
        return self.inference.in_batch(self.inference.best(), 1)

    @property
    def max_log_prob(self) -> Tensor:
        """The log-probability of the mode in nats, (*batch); its gradients flow through the mode's factors and log Z."""
        inference = self.inference
        score = inference.score(inference.best().reshape(*self._rows, *self.event_shape))
        return inference.in_batch(score - inference.log_partition())

    def k_best(self, k: int) -> tuple[Tensor, Tensor]:
        """Returns the k most probable label sequences (k, *batch, N), best first, and their log_probs (k, *batch) in nats.

        If there are fewer than k, the remaining ones have log_prob -inf and labels 0.

        Cost: N steps, each of which sorts V sets of k V numbers.

        Raises:
            ValueError: if k is not a positive integer.
        """
        check_sizes(1, k=k)
        inference, semiring = self.inference, KMax(k)
        chain = inference.possible()
        scores, messages = fold(semiring, chain)
        labels = trace_k(semiring, chain, messages).masked_fill((scores == -torch.inf).unsqueeze(-1), 0)
        log_prob = scores.reshape(k, *self._rows) - inference.log_partition()
        return inference.in_batch(labels, 1, 1), inference.in_batch(log_prob, 0, 1)

    def entropy(self) -> Tensor:
        """Returns the entropy -sum_y p(y) log p(y) = log Z - E[score] in nats, (*batch)."""
        inference = self.inference
        chain = inference.potentials()
        scores = chain.map(lambda p: p.masked_fill(p == -torch.inf, 0.0))
        mean = inference.query(lambda messages, scores: messages.mean(scores), chain, scores)
        return inference.in_batch(inference.log_partition() - mean.reshape(self._rows))

    def cross_entropy(self, other: Any) -> Tensor:
        """Returns -sum_y p(y) log q(y) in nats, (*batch), where q is a CRF or independent categories."""
        return self.entropy() + kl_divergence(self, other)

    def expectation(self, unary: Tensor, transition: Tensor | None = None) -> Tensor:
        """Returns E[sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}]] of a finite additive function.

        Args:
            unary: values that broadcast with (*features, *batch, N, V).
            transition: (V, V), or (*features, *batch, N - 1 or 1, V, V); by default 0.

        Returns:
            (*features, *batch), with gradients with respect to the potentials and the values.

        Cost: with ``transition``, it computes the pair marginals, B N V^2 numbers.

        Raises:
            ValueError: if the shapes do not match, or (when validating) a value is not finite.
        """
        sites, labels = self.unary.shape[-2:]
        check.fits("unary", unary, self.unary, self.batch_shape, (sites, labels), 0)
        if transition is not None:
            check.fits("transition", transition, self.unary, self.batch_shape, (sites - 1, labels, labels), 2)
        if self._validate_args:
            check.finite(unary=unary, transition=transition)
        pairs = 0.0 if transition is None else (self.pair_marginals * transition).sum((-3, -2, -1))
        return (self.marginals * unary).sum((-2, -1)) + pairs

    def risk(self, labels: Tensor, cost: Tensor | None = None) -> Tensor:
        """Returns the expected cost (*batch) of labels drawn from this distribution if ``labels`` are the true labels.

        Args:
            labels: integers (*batch, N), the true labels.
            cost: (V, V), where [i, j] is the cost of label i if the truth is j; by default 1 if they differ and 0
                otherwise, for which the risk is the expected number of errors.

        Raises:
            ValueError: if ``labels`` or ``cost`` has another shape, or labels are outside 0 ... V - 1.

        Reference: Smith, Eisner, "Minimum risk annealing for training log-linear models", ACL 2006.
        """
        if cost is None:
            cost = 1 - torch.eye(self.num_labels, dtype=self.unary.dtype, device=self.unary.device)
        check.costs(cost, self.unary)
        check.fits("labels", labels, self.unary, self.batch_shape, self.event_shape)
        padding = self.padding()
        check.labels("labels", labels, self.num_labels, padding)
        return self.expectation(cost.T[(labels if padding is None else torch.where(padding, 0, labels)).long()])

    def given(self, labels: Tensor, observed: Tensor | None = None) -> LinearChainCRF:
        """Returns the exact conditional distribution given some of the labels, which is also a CRF.

        Its ``log_partition`` minus this one's is the log-probability of the observation.

        Args:
            labels: integers (*batch, N), or Boolean (*batch, N, V) for the labels that are allowed at each site.
            observed: Boolean (*batch, N), the sites where labels are known; by default all.

        Raises:
            TypeError: if ``observed`` is not Boolean.
            ValueError: if shapes do not match; when validating, also for labels outside 0 ... V - 1, and for observed
                sites without an allowed label.
        """
        sets = isinstance(labels, Tensor) and labels.dtype == torch.bool
        event = self.unary.shape[-2:] if sets else self.event_shape
        check.fits("labels", labels, self.unary, self.batch_shape, event, len(event))
        allowed = labels if sets else labels.unsqueeze(-1) == torch.arange(self.num_labels, device=labels.device)
        free = self.padding()
        if observed is not None:
            check.fits("observed", observed, self.unary, self.batch_shape, self.event_shape)
            if observed.dtype != torch.bool:
                raise TypeError(f"Expected observed to be a Boolean tensor; got {observed.dtype}.")
            broadcast_batches(labels=labels.shape[: -len(event)], observed=observed.shape[:-1])
            allowed = allowed | ~observed.unsqueeze(-1)
            free = ~observed if free is None else ~observed | free
        if self._validate_args:
            check.sets("labels", labels, free) if sets else check.labels("labels", labels, self.num_labels, free)
        return LinearChainCRF(
            torch.where(allowed, self.unary, -torch.inf),
            self.transition,
            initial=self.initial,
            final=self.final,
            lengths=self.lengths,
            validate_args=self._validate_args,
        ).expand(broadcast_shapes(self.batch_shape, allowed.shape[:-2]))

    def log_marginal_of(self, labels: Tensor, observed: Tensor | None = None) -> Tensor:
        """Returns the log-probability of some of the labels in nats, (*batch), with all others summed out.

        The arguments are those of :meth:`given`. The result is -inf if the labels are impossible.
        """
        part = self.given(labels, observed)
        rows = part.inference
        total = log_partition_or_none(rows.potentials()).reshape(rows.rows)
        return rows.in_batch(total - self.inference.log_partition())

    def as_autoregressive(self) -> AutoregressiveDistribution:
        """Returns the same distribution in terms of its left-to-right conditionals p(y_t | y_{t-1}).

        Its context is a table of conditional logits (*batch, N, V * V), through which gradients flow.
        """
        tables = conditional_logits(LogMessages(self.inference.possible())).to(self.unary.dtype).flatten(-2)
        tables = tables.reshape(*self._rows, self.event_shape[0], self.num_labels**2)
        return AutoregressiveDistribution(
            ConditionalTables(self.num_labels),
            Categorical(self.num_labels),
            self.event_shape,
            tables,
            lengths=self.lengths,
            validate_args=self._validate_args,
        ).expand(self.batch_shape)

    def site_values(self) -> Tensor:
        """Returns all labels (V,)."""
        return torch.arange(self.num_labels, device=self.unary.device)

    def _checked(self, value: Tensor) -> Tensor:
        value = numbers("value", value)
        check.fits("value", value, self.unary, self.batch_shape, self.event_shape)
        return value
