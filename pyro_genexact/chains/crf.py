"""The linear-chain conditional random field as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints, kl_divergence

from ..autoregressive.distribution import AutoregressiveDistribution
from ..core.checks import check_sizes
from ..core.independent import independent
from ..core.shapes import broadcast_shapes
from ..core.values import numbers
from ..transforms.base import _mark
from . import checks as check
from .labels import LabelStrings, Lookup, conditionals, pick
from .log_partition import in_log_space, known, log_partition, log_partition_or_none, opaque, widened
from .messages import Logs, Messages, messages_of, wide, within
from .semirings import Chain, KMax, Max, fold, mean, trace, trace_k


class LinearChainCRF(TorchDistribution):
    r"""Label strings y_1 ... y_N with p(y) = exp(score(y)) / Z, a product of factors on neighbours.

        score(y) = initial[y_1] + sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}] + final[y_N]

    Z is exact, and so are marginals, modes, samples, entropies and conditionals. Potentials are log-weights: any real numbers,
    or -inf for what is impossible. An event is a tensor (N,) of integers 0 ... V - 1. With ``lengths`` the sites from a row's
    length on are padding: any label is accepted there, samples hold 0, marginals are 0, no gradient flows.

    Cost: log Z and its gradient are one recursion of N products of (B, V) and (V, V) matrices for both directions; all queries
    share it. Modes and gradients of gradients take tensors (B, V, V) a step.

    Args:
        unary: (*batch, N, V), of a label at a site.
        transition: (V, V), of a step from label i to label j at [i, j]; or of each step, (*batch, N - 1, V, V), or the same for
            all steps of a row, (*batch, 1, V, V): draws (*batch, V, V) of a prior need ``unsqueeze(-3)``.
        initial: (V) or (*batch, V), of the first label; by default 0.
        final: (V) or (*batch, V), of the last label; by default 0.
        lengths: (*batch) integers 0 ... N, how many sites a row has; by default N. The empty string has log_prob 0.
        validate_args: whether potentials and values are checked; without, values outside the support have log_prob -inf.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, lengths outside 0 ... N, and (when validating) potentials that
            are NaN or +inf and labels outside 0 ... V - 1; from queries of rows where no label string is possible.

    Shapes: the batch shape is that of all arguments, broadcast.

    Reference: Lafferty, McCallum, Pereira, "Conditional random fields", ICML 2001; Rabiner, "A tutorial on hidden Markov
    models", 1989.

    Example:
        >>> crf = LinearChainCRF(torch.zeros(5, 7, 3), torch.eye(3))
        >>> crf.log_prob(crf.sample((4,))).shape, crf.marginals.shape
        (torch.Size([4, 5]), torch.Size([5, 7, 3]))
        >>> crf.mode[0], crf.entropy()[0]
        (tensor([0, 0, 0, 0, 0, 0, 0]), tensor(6.9506))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

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
        check.potentials(unary, transition, initial, final)
        self.num_labels, sites = unary.shape[-1], unary.shape[-2]
        self.unary, self.transition, self.initial, self.final = unary, transition, initial, final
        self.lengths = check.lengths_like(unary, lengths)
        self._rows = check.batch_shape_of(unary, transition, initial, final, self.lengths)
        self._remembered: dict[str, Any] = {}  # shared with all that expand makes
        super().__init__(self._rows, Size((sites,)), validate_args=validate_args)
        if self._validate_args:
            check.numbers((unary, transition, initial, final), self._chain)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({tuple(self.batch_shape)}, {tuple(self.event_shape)}, num_labels={self.num_labels})"
        )

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether rows have one length."""
        return self.lengths is None or self.lengths.is_meta or len(self.lengths.unique()) < 2

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Strings of labels 0 ... V - 1; padding may hold anything."""
        if self.lengths is None:
            return independent(constraints.integer_interval(0, self.num_labels - 1), 1)
        return LabelStrings(self.num_labels, self.lengths)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LinearChainCRF:
        """The same with another batch shape, without copies; rows are drawn independently, everything else is computed once."""
        new = self._get_checked_instance(LinearChainCRF, _instance)
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_batch_shape"})
        shape = Size(batch_shape)
        check.expansion(self.batch_shape, shape)
        new._batch_shape = shape
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of the batch shape broadcast with the value's."""
        value = numbers("value", value)
        check.fits("value", value, self.unary, self.batch_shape, self.event_shape)
        if self._validate_args:
            self._validate_sample(value)
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        return (self._score(value) - self._log_partition().reshape(self._rows)).to(self.unary.dtype).expand(shape)

    @property
    def log_partition(self) -> Tensor:
        """log Z (*batch) in nats, of score(y) over all label strings."""
        return self._wide(self._log_partition().to(self.unary.dtype))

    def score(self, value: Tensor) -> Tensor:
        """The log-weight of a label string, log_prob + log_partition; -inf outside the support."""
        value = numbers("value", value)
        check.fits("value", value, self.unary, self.batch_shape, self.event_shape)
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self._score(value).to(self.unary.dtype).expand(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Label strings (*sample_shape, *batch, N), from the last site to the first given the forward messages."""
        shape = Size((*sample_shape, *self.batch_shape))
        rows = (1,) * (len(shape) - len(self._rows)) + self._rows
        dims = sorted(range(len(shape)), key=lambda d: rows[d] == shape[d] and d >= len(shape) - len(self._rows))
        count = prod(shape) // max(prod(self._rows), 1)
        with torch.no_grad():
            labels = (Logs(self._chain()) if opaque() else self._messages()).sample(count)
        labels = labels.reshape(*(shape[d] for d in dims), *self.event_shape)
        back = sorted(range(len(shape)), key=dims.__getitem__)
        return labels.permute(*back, len(shape))

    @property
    def marginals(self) -> Tensor:
        """p(y_t = i), (*batch, N, V): the gradient of log Z in the unary potentials; differentiable in turn."""
        return self._marginals(self._chain(), "unary", lambda messages: messages.nodes())

    @property
    def pair_marginals(self) -> Tensor:
        """p(y_t = i, y_{t+1} = j), (*batch, N - 1, V, V)."""
        chain = self._chain()
        rows, sites, labels = chain.unary.shape
        steps = chain.transition.expand(rows, sites - 1, labels, labels)
        return self._marginals(chain._replace(transition=steps), "transition", lambda messages: messages.pairs())

    @property
    def mode(self) -> Tensor:
        """The most probable label string (*batch, N)."""
        return self._wide(self._best())

    @property
    def max_log_prob(self) -> Tensor:
        """The log-probability (*batch) of the mode, in nats."""
        score = self._score(
            self._best().reshape(*self._rows, *self.event_shape)
        )  # with the gradient of the mode's factors
        return self._wide((score - self._log_partition().reshape(self._rows)).to(self.unary.dtype).flatten())

    def k_best(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable label strings (k, *batch, N), best first, and their log-probabilities (k, *batch) in nats.

        Where there are fewer, the rest have log-probability -inf and labels 0.

        Cost: N steps that sort V sets of k V numbers.
        """
        check_sizes(1, k=k)
        chain, semiring = self._double(), KMax(k)
        scores, messages = fold(semiring, chain)
        labels = trace_k(semiring, chain, messages).masked_fill((scores == -torch.inf).unsqueeze(-1), 0)
        log_prob = (scores - self._log_partition()).to(self.unary.dtype)
        return self._wide(labels, 1), self._wide(log_prob, 1)

    def entropy(self) -> Tensor:
        """-sum_y p(y) log p(y) (*batch) in nats: log Z - E[score]."""
        chain = widened(self._chain())
        score = self._mean(chain, chain.map(lambda p: p.masked_fill(p == -torch.inf, 0.0)))
        return self._wide((self._log_partition() - score).to(self.unary.dtype))

    def cross_entropy(self, other: Any) -> Tensor:
        """-sum_y p(y) log q(y) (*batch) in nats, for q a CRF or independent categories."""
        return self.entropy() + kl_divergence(self, other)

    def expectation(self, unary: Tensor, transition: Tensor | None = None) -> Tensor:
        """E[sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}]] of an additive function with finite values.

        Args:
            unary: (*features, *batch, N, V) or what broadcasts with it.
            transition: (V, V), or (*features, *batch, N - 1 or 1, V, V); by default 0.

        Returns:
            (*features, *batch), with gradients in the potentials and in the values.

        Cost: with ``transition`` the pair marginals are made, B N V^2 numbers.
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
        """The expected cost of labels drawn from this distribution where the truth is ``labels``.

        Args:
            labels: (*batch, N), the truth.
            cost: (V, V), [i, j] of saying i where j is true; by default 1 where they differ: the risk is the expected number of errors.

        Reference: Smith, Eisner, "Minimum risk annealing for training log-linear models", ACL 2006.
        """
        if cost is None:
            cost = 1 - torch.eye(self.num_labels, dtype=self.unary.dtype, device=self.unary.device)
        check.costs(cost, self.unary)
        check.fits("labels", labels, self.unary, self.batch_shape, self.event_shape)
        gone = self._gone()
        check.labels("labels", labels, self.num_labels, gone)
        return self.expectation(cost.T[(labels if gone is None else torch.where(gone, 0, labels)).long()])

    def given(self, labels: Tensor, observed: Tensor | None = None) -> LinearChainCRF:
        """The exact conditional distribution given a part of the labels, again a CRF.

        Its ``log_partition`` less this one's is the log-probability of what was observed.

        Args:
            labels: (*batch, N) integers, or (*batch, N, V) Boolean, the labels that are allowed at each site.
            observed: (*batch, N) Boolean, where the labels are known; by default everywhere.
        """
        sets = isinstance(labels, Tensor) and labels.dtype == torch.bool
        event = self.unary.shape[-2:] if sets else self.event_shape
        check.fits("labels", labels, self.unary, self.batch_shape, event, len(event))
        allowed = labels if sets else labels.unsqueeze(-1) == torch.arange(self.num_labels, device=labels.device)
        free = self._gone()
        if observed is not None:
            check.fits("observed", observed, self.unary, self.batch_shape, self.event_shape)
            if observed.dtype != torch.bool:
                raise TypeError(f"Expected observed to be a Boolean tensor; got {observed.dtype}.")
            check.broadcast_batches(labels=labels.shape[: -len(event)], observed=observed.shape[:-1])
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
        """The log-probability of a part of the labels, all others summed out; arguments as in :meth:`given`; -inf where impossible."""
        part = self.given(labels, observed)
        total = part._wide(log_partition_or_none(part._chain()))
        return (total - self._wide(self._log_partition())).to(self.unary.dtype)

    def as_autoregressive(self) -> AutoregressiveDistribution:
        """The same distribution by its left-to-right conditionals p(y_t | y_{t-1}).

        Its conditioner looks the logits up in tables (*batch, N, V * V), which are its context; gradients flow through them.
        """
        from ..heads.parametric import Categorical  # which imports this package

        tables = conditionals(self._double()).to(self.unary.dtype).flatten(-2)
        tables = tables.reshape(*self._rows, self.event_shape[0], self.num_labels**2)
        return AutoregressiveDistribution(
            Lookup(self.num_labels),
            Categorical(self.num_labels),
            self.event_shape,
            tables,
            lengths=self.lengths,
            validate_args=self._validate_args,
        ).expand(self.batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All V^N label strings, (V^N, *batch, N), the last label fastest; padding is 0. Batch dims of 1 without ``expand``.

        Raises:
            NotImplementedError: for rows of several lengths.
            ValueError: for more than 2^20 strings.
        """
        sites, used = self.event_shape[0], self.event_shape[0]
        if self.lengths is not None and self.lengths.numel():
            used = int(self.lengths.max())
            if bool((self.lengths != used).any()):
                raise NotImplementedError(
                    f"Expected rows of one length to be enumerated; got lengths {self.lengths.unique().tolist()}."
                )
        count = self.num_labels**used
        if count > 2**20:
            raise ValueError(f"Expected at most {2**20} label strings to be enumerated; got {self.num_labels}^{used}.")
        index = torch.arange(count, device=self.unary.device)
        digits = [index // self.num_labels**t % self.num_labels for t in range(used - 1, -1, -1)]
        strings = torch.stack([*digits, *[torch.zeros_like(index)] * (sites - used)], -1)
        strings = strings.reshape(count, *[1] * len(self.batch_shape), sites)
        return strings.expand(count, *self.batch_shape, sites) if expand else strings

    def _chain(self, rows: Size | None = None) -> Chain:
        """The potentials of all rows, flattened to (B, N, V), (V, V) or (B, N - 1 or 1, V, V), (B, V), (B, V), (B); padding is 0."""
        rows = self._rows if rows is None else rows

        def flat(potentials: Tensor, dims: int) -> Tensor:
            shape = potentials.shape[potentials.dim() - dims :]
            return potentials.expand((*rows, *shape)).reshape(prod(rows), *shape)

        lengths = None if self.lengths is None else flat(self.lengths, 0)
        transition = self.transition
        if transition.dim() > 2:
            transition = flat(transition, 3)
            if transition.shape[1] == self.unary.shape[-2] - 1:
                transition = within(lengths, transition, 1)
        zero = self.unary.new_zeros(self.num_labels)
        initial, final = (flat(zero if p is None else p, 1) for p in (self.initial, self.final))
        if lengths is not None:  # an empty row has no ends
            empty = (lengths == 0).unsqueeze(-1)
            initial, final = initial.masked_fill(empty, 0.0), final.masked_fill(empty, 0.0)
        return Chain(within(lengths, flat(self.unary, 2)), transition, initial, final, lengths)

    def _double(self) -> Chain:
        self._log_partition()  # raises where nothing is possible
        return widened(self._chain())

    def _wide(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values (..., B, ...) of all rows in the batch shape."""
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        ones = (1,) * (len(self.batch_shape) - len(self._rows))
        return values.reshape((*before, *ones, *self._rows, *after)).expand((*before, *self.batch_shape, *after))

    def _gone(self) -> Tensor | None:
        """(*, N), where sites are padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.event_shape[0], device=self.lengths.device) >= self.lengths.unsqueeze(-1)

    def _messages(self, chain: Chain | None = None) -> Messages:
        """From :meth:`_chain`, where that is at hand."""

        def computed() -> Messages:
            messages = messages_of(self._chain() if chain is None else chain)
            check.possible(messages.log_partition, self._rows)  # what cannot be is not remembered, but found anew
            return messages

        return self._once("messages", computed)

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Computed once, as long as the potentials are what they were."""
        parts = (self.unary, self.transition, self.initial, self.final, self.lengths)
        state = [None if p is None else _mark(p) for p in parts]
        if self._remembered.get("state") != state:
            self._remembered.clear()
        if name not in self._remembered:
            self._remembered.update({name: compute(), "state": state})
        return self._remembered[name]

    def _log_partition(self) -> Tensor:
        chain = self._chain()
        return log_partition(chain, None if opaque() else self._messages(chain))

    def _mean(self, chain: Chain, values: Chain) -> Tensor:
        """The mean (B) of a sum of values of the factors; of B rows that are those of this distribution, or repeat them."""
        if opaque():
            return mean(chain, values)[1]
        messages = self._messages() if len(chain.unary) == prod(self._rows) else messages_of(chain)
        return known(messages.mean(values), lambda c, v: mean(widened(c), v)[1], chain, values)

    def _score(self, value: Tensor) -> Tensor:
        """Of the shapes of value and rows, broadcast; in a wide dtype."""
        gone = self._gone()
        value = value if gone is None else torch.where(gone, 0, value)
        labels = value.long()
        inside = (labels >= 0) & (labels < self.num_labels) & (labels == value)
        labels = torch.where(inside, labels, 0)
        steps = labels[..., :-1] * self.num_labels + labels[..., 1:]
        transition = self.transition.flatten(-2)
        factors = [
            pick(self.unary, labels),
            pick(transition if transition.dim() > 1 else transition.unsqueeze(0), steps),
        ]
        if gone is not None:
            factors = [torch.where(gone[..., past:], 0.0, f) for past, f in enumerate(factors)]
        site = torch.arange(self.event_shape[0], device=labels.device)
        last = self.event_shape[0] if self.lengths is None else self.lengths.unsqueeze(-1)
        for end, here in ((self.initial, (site == 0) & (last > 0)), (self.final, site == last - 1)):
            if end is not None:
                factors.append(torch.where(here, pick(end.unsqueeze(-2), labels), 0.0))
        score = sum(wide(f).sum(-1) for f in factors)
        return torch.where(inside.all(-1), score, -torch.inf)

    def _best(self) -> Tensor:
        """The labels (B, N) of the mode."""

        def computed() -> Tensor:
            with torch.no_grad():
                chain = widened(self._chain())
                score, messages = fold(Max(), chain)
                check.possible(score, self._rows)
                return trace(Max(), chain, messages)

        return computed() if opaque() else self._once("mode", computed)

    def _marginals(self, chain: Chain, which: str, quick: Callable[[Messages], Tensor]) -> Tensor:
        """The gradient of log Z in one kind of potentials."""

        def gradient(chain: Chain) -> Tensor:
            def total(potentials: Tensor) -> Tensor:
                return in_log_space(chain._replace(**{which: potentials})).sum()

            return torch.func.grad(total)(getattr(chain, which)).to(self.unary.dtype)

        if opaque():
            return self._wide(gradient(chain))
        return self._wide(known(quick(self._messages()).to(self.unary.dtype), gradient, chain))
