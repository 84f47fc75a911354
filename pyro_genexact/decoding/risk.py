"""Minimum Bayes risk decoding: the candidate with the highest expected utility."""

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
    """The result of :func:`minimum_bayes_risk`.

    Attributes:
        sequences: (*batch, *event), the best candidates.
        log_prob: (*batch), their exact log-probabilities under the model (nats).
        expected_utility: (*batch), their estimated expected utilities. As maxima of estimates, they are biased upwards;
            use fresh samples for an unbiased estimate.
        index: (*batch), the indices of the best candidates, the first one in case of ties.
        utilities: (N, *batch), the estimates for all candidates; NaN for those that the coarse stage removed.
        standard_error: (N, *batch), the standard errors of ``utilities`` as (weighted) means over independent samples. They
            are meaningless if the samples enumerate the support, and NaN for a single sample.
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
    r"""Chooses the candidate with the highest expected utility under a model, estimated from samples.

    .. math:: h^* = \arg\max_h E_{y \sim p}[u(h, y)] \approx \arg\max_h \sum_m w_m u(h, y_m)

    The result is exact if the samples are ``d.enumerate_support()`` and the weights are their probabilities. Often, the
    samples are also the candidates. With ``coarse`` there are two stages: ``coarse`` ranks all candidates, and ``utility``
    decides between the ``keep`` best ones. In this case, remove duplicate candidates first (``unique(dim=0)``).

    Args:
        d: the model, with any event shape, such as (T,) for sequences. The choice is made for each element of its batch.
        candidates: (N, *batch, *event), the values to choose from, such as ``d.sample((N,))``.
        samples: (M, *batch, *event), drawn from ``d``.
        utility: a function of candidates and samples that returns finite numbers (N, M, *batch), where higher is better;
            see :mod:`pyro_genexact.decoding.utilities`.
        weights: (M, *batch), not negative and with a positive sum, such as probabilities or importance weights; by default
            all samples have the same weight.
        coarse: a cheaper utility. It may use only the first K samples and return (N, K, *batch), as
            ``lambda h, y: utility(h, y[:10])`` does.
        keep: the number of candidates that remain after the coarse stage.

    Returns:
        The best candidates and the estimates for all.

    Raises:
        TypeError: if ``d`` is not a distribution, or if an argument or a result of a utility is not a tensor.
        ValueError: if shapes do not fit ``d``, if weights are negative, not finite or all zero, if utilities have another
            shape or are not finite, if only one of ``coarse`` and ``keep`` is given, or if ``keep`` is not in 1 ... N.

    Cost: N M utilities, or N M coarse ones and keep M, all in memory at once, and one ``log_prob``.

    References: Eikema, Aziz, "Is MAP decoding all you need? The inadequacy of the mode in neural machine translation", 2020; Eikema,
    Aziz, "Sampling-based approximations to minimum Bayes risk decoding for neural machine translation", 2022.

    Example:
        Exact decoding, where the best choice for the utility exact match is the mode; then decoding from samples.

        >>> import torch
        >>> from pyro_genexact import Autoregressive, conditioners, decoding, heads
        >>> head = heads.Categorical(3)
        >>> d = Autoregressive(conditioners.MADE(4, head.num_params, site=3), head, (4,))()
        >>> y = d.enumerate_support()
        >>> exact_match, p = decoding.utilities.exact_match, d.log_prob(y).exp()
        >>> exact = minimum_bayes_risk(d, y, y, exact_match, weights=p)
        >>> torch.equal(exact.sequences, d.mode)
        True
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
    """Returns the indices (keep, *batch) of the candidates that remain after the coarse stage, in their order."""
    count, batch_shape = len(candidates), weights.shape[1:]
    if coarse is None and keep is None:
        every = torch.arange(count, device=candidates.device).reshape(-1, *[1] * len(batch_shape))
        return every.expand(-1, *batch_shape)
    if coarse is None or keep is None:
        raise ValueError(f"Expected both coarse and keep or neither; got coarse={coarse} and keep={keep}.")
    check_sizes(1, keep=keep)
    if keep > count:
        raise ValueError(f"Expected keep between 1 and {count} (the number of candidates); got {keep}.")
    means, _ = _expected(coarse, candidates, samples, weights, "coarse")
    return means.argsort(stable=True, dim=0, descending=True)[:keep].sort(0).values


def _take(strings: Tensor, rows: Tensor) -> Tensor:
    """Selects values (K, *batch, *event) from (N, *batch, *event) by their indices ``rows`` (K, *batch)."""
    event = strings.shape[rows.dim() :]
    return strings.gather(0, rows.reshape(*rows.shape, *[1] * len(event)).expand(*rows.shape, *event))


def _expected(
    utility: Utility, candidates: Tensor, samples: Tensor, weights: Tensor, name: str = "utility"
) -> tuple[Tensor, Tensor]:
    """Returns the means of a utility over the samples and their standard errors, both (N, *batch)."""
    values = utility(candidates, samples)
    check_kind(f"the result of {name}", values, Tensor)
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
        raise ValueError(f"Expected weights with a positive sum over the samples that {name} uses; got zeros.")
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
                f"Expected {name}.shape == ({expected}), with batch and event shape of d; got {tuple(strings.shape)}."
            )


def _check_weights(weights: Tensor, shape: torch.Size) -> None:
    check_kind("weights", weights, Tensor)
    if weights.shape != shape:
        raise ValueError(f"Expected weights.shape == {tuple(shape)} (samples, *batch); got {tuple(weights.shape)}.")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"Expected weights to be finite and not negative; got {weights.min()} to {weights.max()}.")
