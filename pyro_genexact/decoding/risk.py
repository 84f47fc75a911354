"""Minimum Bayes risk: the string of the highest expected utility."""

from __future__ import annotations

from collections.abc import Callable
from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..core.checks import check_kind, check_sizes

__all__ = ["BayesDecision", "minimum_bayes_risk"]

Utility = Callable[[Tensor, Tensor], Tensor]


class BayesDecision(NamedTuple):
    """What :func:`minimum_bayes_risk` chose.

    Attributes:
        sequences: (*batch, T), the best candidate.
        log_prob: (*batch), its exact log-probability under the model, in nats.
        expected_utility: (*batch), its estimated expected utility. As a maximum of estimates it is biased upwards: fresh samples
            tell without bias how good ``sequences`` is.
        index: (*batch), which candidate it is; of equal ones the first.
        utilities: (N, *batch), the estimate for every candidate, NaN for those that the coarse stage dropped.
        standard_error: (N, *batch), of ``utilities`` as (weighted) means over independent samples, which says nothing about an
            enumeration; NaN where they are NaN, or with one sample.
    """

    sequences: Tensor
    log_prob: Tensor
    expected_utility: Tensor
    index: Tensor  # type: ignore[assignment]
    utilities: Tensor
    standard_error: Tensor


def minimum_bayes_risk(
    d: Distribution,
    candidates: Tensor,
    samples: Tensor,
    utility: Utility,
    *,
    weights: Tensor | None = None,
    coarse: Utility | None = None,
    keep: int | None = None,
) -> BayesDecision:
    r"""The candidate of the highest expected utility under the model, estimated from samples.

    .. math:: h^* = \arg\max_h E_{y \sim p}[u(h, y)] \approx \arg\max_h \sum_m w_m u(h, y_m)

    Exact where samples are ``d.enumerate_support()`` and weights their probabilities. N-by-N: candidates are the samples. Two stages, coarse
    to fine: ``coarse`` ranks all candidates, ``utility`` decides between the ``keep`` best: hand each candidate in once (``unique(dim=0)``), or
    copies of one fill the places.

    Cost: N M utilities (with ``coarse``: N M coarse ones and keep M), in memory at once, and one ``log_prob``.

    Args:
        d: the model, of any event shape (a string's is (T,)); the choice is made for each element of its batch.
        candidates: (N, *batch, T), the strings to choose from, as ``d.sample((N,))`` gives them.
        samples: (M, *batch, T), drawn from d.
        utility: takes candidates (N, *batch, T) and samples (M, *batch, T) and returns finite numbers (N, M, *batch), higher is better:
            see :mod:`pyro_genexact.decoding.utilities`.
        weights: (M, *batch), not negative, of any positive sum: probabilities or importance weights; by default all are equal.
        coarse: another utility, cheaper. It may return (N, K, *batch), those for the first K samples only:
            ``lambda h, y: utility(h, y[:10])``.
        keep: how many candidates pass the coarse stage.

    Raises:
        ValueError: for shapes that do not fit d, weights that are negative, not finite or all zero, utilities of another shape or not
            finite, ``coarse`` without ``keep`` or the other way round, and a keep that is no integer 1 ... N.

    References: Eikema, Aziz, "Is MAP decoding all you need? The inadequacy of the mode in neural machine translation", 2020; Eikema,
    Aziz, "Sampling-based approximations to minimum Bayes risk decoding for neural machine translation", 2022.

    Example: exact, where the best choice for exact match is the mode; then from samples.

        >>> import torch
        >>> from pyro_genexact import Autoregressive, conditioners, decoding, heads
        >>> head = heads.Categorical(3)
        >>> d = Autoregressive(conditioners.MADE(4, head.num_params, site=3), head, (4,))()
        >>> y = d.enumerate_support()
        >>> exact = minimum_bayes_risk(d, y, y, decoding.utilities.exact_match, weights=d.log_prob(y).exp())
        >>> torch.equal(exact.sequences, d.mode), torch.equal(exact.log_prob, d.log_prob(d.mode))
        (True, True)
        >>> y = d.sample((30,))
        >>> choice = minimum_bayes_risk(d, y, y, decoding.utilities.edit_similarity())
        >>> choice.sequences.shape, choice.utilities.shape
        (torch.Size([4]), torch.Size([30]))
    """
    _check_strings(d, candidates=candidates, samples=samples)
    if weights is None:
        weights = samples.new_ones(samples.shape[: 1 + len(d.batch_shape)], dtype=torch.get_default_dtype())
    _check_weights(weights, samples.shape[: 1 + len(d.batch_shape)])
    rows = _kept(candidates, samples, weights, coarse, keep)
    means, errors = _expected(utility, _take(candidates, rows), samples, weights)
    best = means.argmax(0, keepdim=True)
    index = rows.gather(0, best)
    sequences = _take(candidates, index)[0]
    unknown = means.new_full(candidates.shape[: means.dim()], nan)
    return BayesDecision(
        sequences,
        d.log_prob(sequences),
        means.gather(0, best)[0],
        index[0],
        unknown.scatter(0, rows, means),
        unknown.scatter(0, rows, errors),
    )


def _kept(candidates: Tensor, samples: Tensor, weights: Tensor, coarse: Utility | None, keep: int | None) -> Tensor:
    """Which candidates pass the coarse stage, (keep, *batch), in their order."""
    count, batch_shape = len(candidates), weights.shape[1:]
    if coarse is None and keep is None:
        every = torch.arange(count, device=candidates.device).reshape(-1, *[1] * len(batch_shape))
        return every.expand(-1, *batch_shape)
    if coarse is None or keep is None:
        raise ValueError(f"Expected coarse and keep together; got coarse={coarse} and keep={keep}.")
    check_sizes(1, keep=keep)
    if keep > count:
        raise ValueError(f"Expected keep between 1 and {count} (the candidates); got {keep}.")
    means, _ = _expected(coarse, candidates, samples, weights, "coarse")
    return means.argsort(stable=True, dim=0, descending=True)[:keep].sort(0).values


def _take(strings: Tensor, rows: Tensor) -> Tensor:
    """Strings (K, *batch, *event) of those (N, *batch, *event) that rows (K, *batch) name."""
    event = strings.shape[rows.dim() :]
    return strings.gather(0, rows.reshape(*rows.shape, *[1] * len(event)).expand(*rows.shape, *event))


def _expected(
    utility: Utility, candidates: Tensor, samples: Tensor, weights: Tensor, name: str = "utility"
) -> tuple[Tensor, Tensor]:
    """Means of a utility over the samples and their standard errors, both (N, *batch)."""
    values = utility(candidates, samples)
    check_kind(f"what {name} returns", values, Tensor)
    count = values.shape[1] if name == "coarse" and values.dim() > 1 else len(samples)
    if values.shape != (len(candidates), *weights[:count].shape) or not count:
        raise ValueError(
            f"Expected {name} to return shape {(len(candidates), *weights.shape)} (candidates, samples, *batch); "
            f"got {tuple(values.shape)}."
        )
    if not values.isfinite().all():
        wrong = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"Expected {name} to return finite numbers; got {values[tuple(wrong)]} at {wrong}.")
    weights = weights[:count]
    total = weights.sum(0)
    if not (total > 0).all():
        raise ValueError(f"Expected weights with a positive sum over the samples that {name} reads; got zeros.")
    means = (weights * values).sum(1) / total
    variance = (weights * (values - means.unsqueeze(1)) / total).square().sum(1)
    return means, variance.sqrt() * (sqrt(count / (count - 1)) if count > 1 else nan)


def _check_strings(d: Distribution, **arguments: Tensor) -> None:
    check_kind("d", d, Distribution)
    shape = (*d.batch_shape, *d.event_shape)
    for name, strings in arguments.items():
        check_kind(name, strings, Tensor)
        if tuple(strings.shape[1:]) != shape or not strings.dim() or not len(strings):
            expected = ", ".join(map(str, ("number", *shape)))
            raise ValueError(
                f"Expected {name}.shape == ({expected}) (batch and event shape of d last); got {tuple(strings.shape)}."
            )


def _check_weights(weights: Tensor, shape: torch.Size) -> None:
    check_kind("weights", weights, Tensor)
    if weights.shape != shape:
        raise ValueError(f"Expected weights.shape == {tuple(shape)} (samples, *batch); got {tuple(weights.shape)}.")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("Expected weights that are finite and not negative; got others.")
