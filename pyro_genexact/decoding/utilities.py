"""Utilities u(h, y) of choosing h if y is true, for :func:`~pyro_genexact.decoding.minimum_bayes_risk`.

A utility is a function of candidates (N, *batch, T) and references (M, *batch, T) that returns numbers (N, M, *batch), where
higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..core.checks import check_kind

__all__ = ["Text", "edit_distance", "edit_similarity", "exact_match"]


def exact_match(candidates: Tensor, references: Tensor) -> Tensor:
    """Returns 1 for equal arrays and 0 for others. The best choice under this utility is the most probable value.

    Args:
        candidates: (N, *batch, T).
        references: (M, *batch, T).

    Returns:
        A tensor (N, M, *batch) of the default dtype.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the shapes after the first dim differ.

    Example:
        >>> import torch
        >>> exact_match(torch.tensor([[1, 2], [2, 2]]), torch.tensor([[2, 2]]))
        tensor([[0.],
                [1.]])
    """
    _check_pairs(candidates, references)
    if candidates.shape[-1] != references.shape[-1]:
        raise ValueError(
            f"Expected references.shape[-1] == {candidates.shape[-1]} (that of the candidates); got {references.shape[-1]}."
        )
    return (candidates.unsqueeze(1) == references).all(-1).to(torch.get_default_dtype())


def edit_distance(candidates: Tensor, references: Tensor, eos: int | None = None) -> Tensor:
    r"""Computes the Levenshtein distance, the smallest number of insertions, deletions and substitutions.

    .. math:: D_{ij} = \min(D_{i-1,j} + 1,\; D_{i,j-1} + 1,\; D_{i-1,j-1} + [h_i \ne y_j])

    The computation is vectorised over all pairs and over the positions j of y: with :math:`Q_{ij} = D_{ij} + i - j`, the
    second term is :math:`Q_{i,j-1}`, so that a row is a cumulative minimum over j.

    Args:
        candidates: strings (N, *batch, T).
        references: strings (M, *batch, S).
        eos: the symbol that ends a string and is not part of it; by default, strings are the whole arrays.

    Returns:
        An integer tensor (N, M, *batch).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if the batch shapes differ.

    Cost: time N M T S and memory N M S, where T and S are the largest lengths before ``eos``.

    Reference: Levenshtein, "Binary codes capable of correcting deletions, insertions, and reversals", 1966.

    Example:
        >>> import torch
        >>> candidates = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0]])
        >>> edit_distance(candidates, torch.tensor([[1, 3, 0, 0]]), eos=0)
        tensor([[1],
                [2]])
    """
    _check_pairs(candidates, references)
    ours, theirs = _lengths(candidates, eos).unsqueeze(1), _lengths(references, eos)
    candidates, references = candidates.unsqueeze(1), references[..., : _longest(theirs)]
    shape = (len(candidates), *theirs.shape)
    last = theirs.expand(shape).unsqueeze(-1)
    row = candidates.new_zeros(*shape, references.shape[-1] + 1, dtype=torch.int32)
    distance = last[..., 0]
    for i in range(1, _longest(ours) + 1):
        differs = candidates[..., i - 1, None] != references
        steps = torch.minimum(row[..., 1:] + 2, row[..., :-1] + differs)
        row = torch.cat([torch.full_like(row[..., :1], 2 * i), steps], -1).cummin(-1).values
        distance = torch.where(ours == i, row.gather(-1, last)[..., 0] + theirs - i, distance)
    return distance


def edit_similarity(eos: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the utility 1 - (edit distance) / (length of the longer string), which is between 0 and 1.

    It is 1 for equal strings, including two empty ones. See :func:`edit_distance`.

    Args:
        eos: the symbol that ends a string and is not part of it; by default, strings are the whole arrays.

    Returns:
        A function of candidates (N, *batch, T) and references (M, *batch, S) that returns a tensor (N, M, *batch).

    Example:
        >>> import torch
        >>> candidates = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0]])
        >>> references = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0]])
        >>> edit_similarity(eos=0)(candidates, references)
        tensor([[0.6667, 0.0000],
                [0.0000, 1.0000]])
    """
    return partial(_edit_similarity, eos=eos)


def _edit_similarity(candidates: Tensor, references: Tensor, eos: int | None) -> Tensor:
    distance = edit_distance(candidates, references, eos)
    longer = torch.maximum(_lengths(candidates, eos).unsqueeze(1), _lengths(references, eos))
    return 1 - distance / longer.clamp(min=1)


class Text:
    """A utility from a metric of texts. Each distinct pair of texts in a call is scored once.

    Args:
        metric: "chrf" or "bleu", the sentence scores of ``sacrebleu`` from 0 to 100 with its default settings (BLEU with
            effective order; both are 0 for two empty texts), or a function (hypothesis, reference) -> number.
        decode: a function from a string, a tensor (length,) on the CPU, to a ``str``.
        eos: the symbol that ends a string and is not passed to ``decode``; by default, strings are the whole arrays.

    Raises:
        ImportError: if ``sacrebleu`` is not installed, for "chrf" and "bleu".
        TypeError: if ``decode`` does not return a ``str``.
        ValueError: if the metric is unknown, or if batch shapes differ.

    References: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015; Papineni et al., "BLEU", 2002; Post, "A call
    for clarity in reporting BLEU scores", 2018.

    Example:
        >>> import torch
        >>> def overlap(hypothesis, reference):
        ...     h, y = set(hypothesis), set(reference)
        ...     return len(h & y) / len(h | y)
        >>> utility = Text(overlap, lambda y: "".join(".abc"[i] for i in y), eos=0)
        >>> references = torch.tensor([[1, 1, 2], [1, 2, 3]])
        >>> utility(torch.tensor([[1, 2, 0], [3, 3, 0]]), references)
        tensor([[1.0000, 0.6667],
                [0.0000, 0.3333]])
    """

    def __init__(
        self, metric: str | Callable[[str, str], float], decode: Callable[[Tensor], str], eos: int | None = None
    ) -> None:
        self.metric = metric if callable(metric) else _sentence_score(metric)
        self.decode, self.eos = decode, eos

    def __call__(self, candidates: Tensor, references: Tensor) -> Tensor:
        """Returns the scores (N, M, *batch) of candidates (N, *batch, T) for references (M, *batch, S)."""
        _check_pairs(candidates, references)
        ours, theirs = self._texts(candidates), self._texts(references)
        pairs = [pair for h in ours for y in theirs for pair in zip(h, y, strict=True)]
        scores = {pair: float(self.metric(*pair)) for pair in dict.fromkeys(pairs)}
        shape = (len(candidates), *references.shape[:-1])
        dtype, device = torch.get_default_dtype(), candidates.device
        return torch.tensor([scores[pair] for pair in pairs], dtype=dtype, device=device).reshape(shape)

    def _texts(self, strings: Tensor) -> list[list[str]]:
        """Returns the texts of strings (N, *batch, T), one list for each of N."""
        strings = strings.reshape(len(strings), prod(strings.shape[1:-1]), strings.shape[-1]).cpu()
        lengths = _lengths(strings, self.eos).tolist()
        return [[self._text(y[:n]) for y, n in zip(*row, strict=True)] for row in zip(strings, lengths, strict=True)]

    def _text(self, string: Tensor) -> str:
        text = self.decode(string)
        check_kind("the result of decode", text, str)
        return text


def _sentence_score(metric: str) -> Callable[[str, str], float]:
    if metric not in ("chrf", "bleu"):
        raise ValueError(f"Expected metric 'chrf', 'bleu' or a function (hypothesis, reference); got {metric!r}.")
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError(
            f"The metric {metric!r} needs sacrebleu; install it with pip install 'pyro-genexact[sacrebleu]'."
        ) from error
    scorer = CHRF() if metric == "chrf" else BLEU(effective_order=True)
    return lambda hypothesis, reference: scorer.sentence_score(hypothesis, [reference]).score


def _lengths(strings: Tensor, eos: int | None) -> Tensor:
    """Returns the number of symbols (N, *batch) before the first ``eos``."""
    if eos is None:
        return strings.new_full(strings.shape[:-1], strings.shape[-1], dtype=torch.long)
    return (strings == eos).cumsum(-1).eq(0).sum(-1)


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _check_pairs(candidates: Tensor, references: Tensor) -> None:
    for name, strings in (("candidates", candidates), ("references", references)):
        check_kind(name, strings, Tensor)
        if strings.dim() < 2 or not len(strings):
            raise ValueError(f"Expected {name} of shape (N, *batch, T), N >= 1; got shape {tuple(strings.shape)}.")
    if candidates.shape[1:-1] != references.shape[1:-1]:
        raise ValueError(
            f"Expected references of batch shape {tuple(candidates.shape[1:-1])} (that of the candidates); "
            f"got {tuple(references.shape[1:-1])}."
        )
