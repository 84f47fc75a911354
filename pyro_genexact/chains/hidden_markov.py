"""HiddenMarkov: hidden Markov models, computed by the same recursion as linear-chain CRFs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ..core.checks import check_kind, check_like, check_sizes
from ..core.functional import at_hand, visible
from ..core.independent import independent
from ..core.leaves import map_leaves, tensors_in
from ..core.precision import exactly, widened
from ..core.shapes import broadcast_shapes
from ..core.values import floating, numbers
from ..families.in_support import feasible_point, known_to_contain, log_prob_everywhere
from ..families.mixture import union
from . import checks as check
from .crf import LinearChainCRF
from .distribution import ChainDistribution
from .labels import PaddedSites
from .log_partition import log_partition_or_none, messages_for, plain_operations_only
from .messages import LogMessages, ScaledMessages
from .padding import mask_padding
from .semirings import ChainPotentials, Max, fold


class HiddenMarkov(ChainDistribution):
    """Hidden Markov model: observations x_1 ... x_N of a latent Markov chain z_1 ... z_N with V states.

        p(x) = sum_z p(z_1) p(x_1 | z_1) prod_{t > 1} p(z_t | z_{t-1}) p(x_t | z_t)

    log_prob is exact. It is the log-normaliser of the :class:`~pyro_genexact.distributions.LinearChainCRF` over states
    that :meth:`posterior` returns. Given observations x,

    * smoothing, p(z_t | x), is ``posterior(x).marginals``, and p(z_t, z_{t+1} | x) is ``posterior(x).pair_marginals``;
    * filtering, p(z_t | x_1 ... x_t), is ``filter(x)``;
    * a sample from p(z | x) is ``posterior(x).sample()``;
    * the most probable states (Viterbi) are ``posterior(x).mode``, and the k best are ``posterior(x).k_best(k)``.

    An event is a tensor (N, *obs), where obs is the event shape of ``observation_dist``. With ``lengths``, the sites
    from a row's length on are padding: any value including NaN is accepted there, samples are 0, and gradients are
    zero. To leave out missing observations, use ``observation_dist.mask(mask)`` with mask (*batch, N, 1), and put any
    value of the support in their place.

    The batch shape is that of all arguments, broadcast. Values of a wider dtype give results of that dtype.

    Cost: log_prob and its gradient cost as much as the CRF's log Z, and V log_probs per observation. Sampling draws V
    observations per site and selects one.

    Args:
        initial: (V) or (*batch, V), logits of the *first observed* state. In Pyro's ``DiscreteHMM``, a transition
            precedes the first observation: there p(z_1) is the initial distribution times the transition.
        transition: (V, V), where [i, j] is the logit of the next state j given state i; or one matrix per step,
            (*batch, N - 1, V, V); or one per row, (*batch, 1, V, V). Rows are normalised. Logits may be -inf, but not a
            whole row.
        observation_dist: distribution of an observation given each state, of batch shape (V), (N, V), (*batch, N, V) or
            (*batch, 1, V), and of any event shape. Values outside the support of some states are possible from the
            others.
        lengths: integers (*batch) in 0 ... N, the number of observations of each row; by default N. An empty row has
            log_prob 0.
        duration: N; required if neither ``transition`` nor ``observation_dist`` has a dim of N steps.
        validate_args: whether to check logits and values. Without checks, values outside the support have log_prob
            -inf, and a row of logits that are all -inf gives NaN.

    Raises:
        TypeError: if an argument is of another class.
        ValueError: if shapes, dtypes or devices do not match, N cannot be inferred, or lengths are outside 0 ... N.
            When validating, also for logits that are NaN, +inf or a row of -inf, and for values outside the support.
            ``filter`` and queries of the ``posterior`` raise it for impossible observations.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> seen = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> d = HiddenMarkov(torch.zeros(2), stay, seen, duration=4)
        >>> x = torch.tensor([-1.5, 0.2, 0.1, 2.0])
        >>> d.log_prob(x)
        tensor(-7.2075)
        >>> d.filter(x)[:, 1], d.posterior(x).marginals[:, 1]
        (tensor([0.0474, 0.1927, 0.2939, 0.9649]), tensor([0.1656, 0.5269, 0.7632, 0.9649]))
        >>> d.posterior(x).mode, d.sample((3,)).shape
        (tensor([0, 1, 1, 1]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        observation_dist: Distribution,
        lengths: Tensor | None = None,
        *,
        duration: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        initial, transition, observation_dist = map(widened, (initial, transition, observation_dist))
        sites, batch_shape = _shapes(initial, transition, observation_dist, lengths, duration)
        self.num_states = initial.shape[-1]
        self.initial, self.transition = initial.log_softmax(-1), transition.log_softmax(-1)
        self.observation_dist = observation_dist
        self.lengths = check.lengths_like(initial.new_empty(sites, 0), lengths, "initial")
        super().__init__(batch_shape, Size((sites, *observation_dist.event_shape)), validate_args=validate_args)
        if self._validate_args:
            for name, logits in (("initial", initial), ("transition", transition)):
                check.log_weights(**{name: logits})
                if visible(logits) and (logits == -torch.inf).all(-1).any():
                    raise ValueError(
                        f"Expected {name} to have a finite logit in each row (of next states); got a row of -inf."
                    )

    def __repr__(self) -> str:
        parts = f"{type(self.observation_dist).__name__}, {tuple(self.batch_shape)}, {tuple(self.event_shape)}"
        return f"{type(self).__name__}({parts}, num_states={self.num_states})"

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint of sequences that some state can emit; padding may have any value."""
        one = self._observable()
        return independent(one, 1) if self.lengths is None else PaddedSites(one, self.lengths)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether observations have a finite support and rows have equal lengths."""
        return super().has_enumerate_support and bool(self.observation_dist.has_enumerate_support)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) in nats, of the batch shape broadcast with that of the value.

        It is -inf with gradient zero for impossible values.
        """
        posterior = self._given(value, False).inference
        return posterior.in_batch(_evidence(posterior.potentials()))

    def prior(self) -> LinearChainCRF:
        """Returns the distribution p(z) of the states without observations."""
        unary = self.initial.new_zeros(self.event_shape[0], self.num_states)
        return self._states(unary, self._validate_args)

    def posterior(self, value: Tensor) -> LinearChainCRF:
        """Returns the distribution p(z | value) of the states, for smoothing, sampling, Viterbi and entropy.

        Its ``log_partition`` is log_prob. Like its other queries, it raises a ValueError if the value is impossible.
        """
        return self._given(value, self._validate_args)

    def filter(self, value: Tensor) -> Tensor:
        """Returns the filtering probabilities p(z_t | x_1 ... x_t), (*batch, N, V), differentiable; 0 at padding.

        For prediction, multiply the probabilities at the last site of a row by the transition matrix.

        Raises:
            ValueError: if the value is impossible. Under torch.func and the tracer, which hide values, the result is
                NaN from the first impossible site on.
        """
        posterior = self.posterior(value).inference
        # in log space: exp space may underflow for a prefix although the whole sequence is exact
        messages = LogMessages(posterior.possible())
        return posterior.in_batch(mask_padding(messages.padding, messages.forward.softmax(-1)), 2)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Returns observations (*sample_shape, *batch, N, *obs)."""
        with torch.no_grad():
            states = self.prior().sample(sample_shape)
            each = self.observation_dist.expand((*self.batch_shape, self.event_shape[0], self.num_states))
            draws = exactly(each.sample, Size(sample_shape))
            index = states.reshape(*states.shape, 1, *[1] * (len(self.event_shape) - 1))
            seen = draws.take_along_dim(index, self._state_dim).squeeze(self._state_dim)
            padding = self.padding(len(self.event_shape) - 1)
            return seen if padding is None else seen.masked_fill(padding, 0)

    @property
    def mean(self) -> Tensor:
        """E[x_t], (*batch, N, *obs): the means of the states weighted by p(z_t); 0 at padding."""
        return self._average(self._shares(), self.observation_dist.mean)

    @property
    def variance(self) -> Tensor:
        """Var[x_t], (*batch, N, *obs): mean of the states' variances plus variance of their means; 0 at padding."""
        p = self._shares()
        mean = torch.where(p > 0, self.observation_dist.mean, 0.0)
        off = mean - self._average(p, mean).unsqueeze(self._state_dim)
        return self._average(p, self.observation_dist.variance + off.square())

    def site_values(self) -> Tensor:
        """Returns all values (K, *obs) of an observation."""
        if not self.observation_dist.has_enumerate_support:
            got = type(self.observation_dist).__name__
            raise NotImplementedError(f"Expected observation_dist to enumerate a finite support; got {got}.")
        return self.observation_dist.enumerate_support(expand=False).reshape(-1, *self.event_shape[1:])

    def _states(self, unary: Tensor, validate_args: bool, batch: Sequence[int] = ()) -> LinearChainCRF:
        """Returns the chain of states with log-likelihoods (*, N, V), of this batch shape broadcast with ``batch``."""
        dtype = torch.promote_types(unary.dtype, self.initial.dtype)
        unary, transition, initial = (p.to(dtype) for p in (unary, self.transition, self.initial))
        states = LinearChainCRF(unary, transition, initial=initial, lengths=self.lengths, validate_args=validate_args)
        return states.expand(broadcast_shapes(batch, self.batch_shape))

    def _given(self, value: Tensor, validate_args: bool) -> LinearChainCRF:
        value = floating(numbers("value", value), [self.initial])
        check.fits("value", value, self.initial, self.batch_shape, self.event_shape, len(self.event_shape))
        if self._validate_args and visible(value):
            self._validate_sample(value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return self._states(self._log_likelihoods(value), validate_args, batch)

    @property
    def _state_dim(self) -> int:
        """The dim of V in (*batch, N, V, *obs), counted from the right."""
        return -len(self.event_shape)

    def _log_likelihoods(self, value: Tensor) -> Tensor:
        """Returns log p(x_t | z_t), (*batch, N, V); values at padding are ignored."""
        value = value.unsqueeze(self._state_dim)  # (*batch, N, 1, *obs)
        support: Any = self.observation_dist.support
        padding = self.padding(-self._state_dim)
        if padding is not None:
            value = torch.where(padding, feasible_point(support, value), value)
        if not plain_operations_only() and known_to_contain(support, value):
            return exactly(self.observation_dist.log_prob, value)
        return exactly(log_prob_everywhere, self.observation_dist, value, support)

    def _shares(self) -> Tensor:
        """Returns p(z_t), (*batch, N, V, 1 ...), which broadcasts with (*batch, N, V, *obs)."""
        p = self.prior().marginals
        return p.reshape(*p.shape, *[1] * (len(self.event_shape) - 1))

    def _average(self, p: Tensor, values: Tensor) -> Tensor:
        """Averages values (*batch, N, V, *obs) over the states; they may be infinite where p is 0."""
        return (p * torch.where(p > 0, values, 0.0)).sum(self._state_dim)

    def _observable(self) -> Any:
        """Returns the support of an observation: the union over states if their bounds differ."""
        support: Any = self.observation_dist.support
        if not tensors_in(support):
            return support

        def of_state(k: int) -> Callable[[Tensor], Tensor]:
            dim = self._state_dim
            return lambda bound: bound.select(dim, k if bound.shape[dim] > 1 else 0) if bound.dim() >= -dim else bound

        return union([map_leaves(of_state(k), support) for k in range(self.num_states)])


def _evidence(chain: ChainPotentials) -> Tensor:
    """Returns log Z (B,) in double precision, with gradient zero where it is infinite.

    It is -inf if no path is possible, and +inf at a pole of a density.
    """
    poles = chain.unary == torch.inf
    if at_hand(poles) and not poles.any():
        return log_partition_or_none(chain)
    finite = chain._replace(unary=chain.unary.masked_fill(poles, 0.0))
    messages = messages_for(finite, ~poles.flatten(1).any(1))
    log_z = log_partition_or_none(finite, messages)
    return log_z if isinstance(messages, ScaledMessages) else log_z.masked_fill(_reached(chain, poles), torch.inf)


def _reached(chain: ChainPotentials, poles: Tensor) -> Tensor:
    """Returns whether (B,) a possible path passes through one of the poles (B, N, V)."""
    score = chain.map(lambda p: torch.zeros_like(p).masked_fill(p == -torch.inf, -torch.inf))
    return fold(Max(), score._replace(unary=score.unary.masked_fill(poles, 1.0)))[0] > 0


def _shapes(
    initial: Tensor, transition: Tensor, observation_dist: Distribution, lengths: Tensor | None, duration: int | None
) -> tuple[int, Size]:
    """Returns N and the batch shape; raises a TypeError or ValueError if the arguments do not match."""
    check_kind("initial", initial, Tensor)
    check_kind("transition", transition, Tensor)
    check_kind("observation_dist", observation_dist, Distribution)
    if initial.dim() < 1 or not initial.shape[-1] or not initial.is_floating_point():
        raise ValueError(
            f"Expected initial of shape (*batch, V), floating-point, V >= 1; got {initial.dtype} {tuple(initial.shape)}."
        )
    check_like("transition", transition, initial)
    for tensor in tensors_in(observation_dist):
        if tensor.is_floating_point() and tensor.dim():  # scalar tensors adapt to any dtype
            check_like("observation_dist", tensor, initial)
    states = initial.shape[-1]
    if transition.shape[-2:] != (states, states):
        raise ValueError(
            f"Expected transition.shape[-2:] == ({states}, {states}) (states of initial); got {tuple(transition.shape)}."
        )
    observed = observation_dist.batch_shape
    if observed[-1:] != (states,):
        raise ValueError(
            f"Expected observation_dist.batch_shape[-1] == {states} (states of initial); got {tuple(observed)}."
        )
    durations = {} if duration is None else {"duration": duration}
    if len(observed) > 1 and observed[-2] != 1:
        durations["observation_dist"] = observed[-2]
    if transition.dim() > 2 and transition.shape[-3] != 1:
        durations["transition"] = transition.shape[-3] + 1
    if not durations:
        raise ValueError(
            "Expected duration=N (neither observation_dist.batch_shape[-2] nor transition determines N); got None."
        )
    check_sizes(1, **durations)
    if len({*durations.values()}) > 1:
        got = ", ".join(f"{n} by {name}" for name, n in durations.items())
        raise ValueError(f"Expected the same number N of observations (transition has N - 1 steps); got {got}.")
    batch_shape = check.batch_shape_of(
        initial=initial.shape[:-1],
        transition=transition.shape[:-3],
        observation_dist=observed[:-2],
        lengths=getattr(lengths, "shape", ()),
    )
    return next(iter(durations.values())), batch_shape
