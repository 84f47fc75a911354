"""The law of linear-chain CRFs: every query agrees with the enumeration of all label strings."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .densities import drawn, frequencies
from .helpers import broken, close, gradients_of, made, noise_like, same

LARGEST = 4096


def chain(subject: Any, context: Tensor | None = None, tol: float = 1e-8, draws: int = 2000) -> None:
    """Checks every query of a linear-chain CRF against the enumeration of all label strings, for all lengths from 0.

    The score of each string, score(y) = initial[y_1] + sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}] + final[y_n],
    is computed from the potentials. The law checks

    - ``log_partition``, and ``log_prob`` of every string for any values in the padding;
    - ``marginals`` and ``pair_marginals``, which are also the gradients of ``log_partition`` in the potentials;
    - ``mode``, ``max_log_prob``, and ``k_best``: strings are in order, all different, and not more than there are;
    - ``entropy``;
    - the gradients of these in all potentials;
    - the frequencies of samples, also from ``expand``, by chi-square;
    - ``log_prob`` of ``as_autoregressive``.

    Results must not depend on the potentials of the padding, including NaN, and their gradients must be 0; labels and
    marginals are 0 there. Lengths for which a row has no possible string are left out.

    Cost: time and memory of V^N strings times N V^2, for each row and length.

    Args:
        subject: a distribution with the constructor, the attributes and the queries of
            :class:`~pyro_genexact.distributions.LinearChainCRF`, or a module whose call returns one; in float64.
        context: (*batch, N, C) or None.
        tol: the tolerance, relative to 1 + |value|.
        draws: the number of samples.

    Raises:
        AssertionError: if the law is broken.
        ValueError: if there are more than 4096 label strings.

    Example:
        >>> import torch
        >>> from pyro_genexact import LinearChainCRF
        >>> unary, transition = torch.randn(2, 3, 4).double(), torch.randn(4, 4).double()
        >>> chain(LinearChainCRF(unary, transition, lengths=torch.tensor([3, 1])))
    """
    d = made(subject, context)
    count = d.num_labels ** d.event_shape[0]
    if count > LARGEST:
        raise ValueError(f"Expected at most {LARGEST} label strings; got {d.num_labels}^{d.event_shape[0]} = {count}.")
    every = torch.arange(d.event_shape[0] + 1, device=d.unary.device).reshape(-1, *[1] * len(d.batch_shape))
    every = every.expand(-1, *d.batch_shape)
    possible = enumerated(_again(d, every, check=False)).log_partition().isfinite().reshape(len(every), -1).all(1)
    for case, it in (("", d), (", every length", _again(d, every[possible]))):
        truth = enumerated(it)
        _sums(case, it, truth, tol)
        _best(case, it, truth, tol)
        _draws(case, it, truth, draws)
        _derivatives(case, it, tol)
        _padding(case, it, tol)


class Enumerated(NamedTuple):
    """All S label strings of N sites, and their scores in each row.

    Attributes:
        strings: (S, N).
        scores: (S, *batch), without padding.
        once: (S, *batch), whether the padding is 0, which selects each string of a row's length once.
        inside: (*batch, N), whether a site is not padding.
        labels: the number of labels V.
    """

    strings: Tensor
    scores: Tensor
    once: Tensor
    inside: Tensor
    labels: int

    def log_partition(self) -> Tensor:
        """Returns the log-partition function (*batch)."""
        return self.scores.masked_fill(~self.once, -inf).logsumexp(0)

    def log_prob(self) -> Tensor:
        """Returns log-probabilities (S, *batch); -inf for repeated strings."""
        return (self.scores - self.log_partition()).masked_fill(~self.once, -inf)

    def marginals(self) -> Tensor:
        """Returns marginals (*batch, N, V)."""
        shown = one_hot(self.strings, self.labels).to(self.scores.dtype)
        return torch.einsum("s...,snv->...nv", self.log_prob().exp(), shown) * self.inside.unsqueeze(-1)

    def pair_marginals(self) -> Tensor:
        """Returns pair marginals (*batch, N - 1, V, V)."""
        shown = one_hot(self.strings, self.labels).to(self.scores.dtype)
        found = torch.einsum("s...,sni,snj->...nij", self.log_prob().exp(), shown[:, :-1], shown[:, 1:])
        return found * self.inside[..., 1:, None, None]

    def entropy(self) -> Tensor:
        """Returns the entropy (*batch) in nats."""
        log_prob = self.log_prob()
        impossible = log_prob == -inf
        return -(log_prob.masked_fill(impossible, 0.0) * log_prob.exp()).sum(0)


QUERIES: dict[str, tuple[Callable[[Any], Tensor], Callable[[Enumerated], Tensor]]] = {
    "log_partition": (lambda d: d.log_partition, Enumerated.log_partition),
    "marginals": (lambda d: d.marginals, Enumerated.marginals),
    "pair_marginals": (lambda d: d.pair_marginals, Enumerated.pair_marginals),
    "entropy": (lambda d: d.entropy(), Enumerated.entropy),
}
"""The queries of a chain, and the same by enumeration."""


def enumerated(d: Any) -> Enumerated:
    """Enumerates all strings and computes their scores from the potentials."""
    sites, labels, batch = d.event_shape[0], d.num_labels, d.batch_shape
    site = torch.arange(sites, device=d.unary.device)
    lengths = torch.full_like(site[:1], sites) if d.lengths is None else d.lengths.unsqueeze(-1)
    inside, last = (site < lengths).expand(*batch, sites), (site == lengths - 1).expand(*batch, sites)
    strings = torch.cartesian_prod(*[torch.arange(labels, device=site.device)] * sites).reshape(-1, sites)

    def at(potentials: Tensor | None, dims: tuple[int, ...], here: Tensor, *index: Tensor) -> Tensor:
        """Returns sums (S, *batch) over the sites ``here`` of potentials (*batch, *dims) at an index."""
        if potentials is None:
            return d.unary.new_zeros(())
        every: tuple[Any, ...] = (..., *index)
        found = potentials.expand(*batch, *dims)[every]
        return torch.where(here.unsqueeze(-2), found, 0.0).sum(-1).movedim(-1, 0)

    transition, steps = d.transition, (sites - 1, labels, labels)
    ends = [None if p is None else p.unsqueeze(-2) for p in (d.initial, d.final)]
    scores = at(d.unary, (sites, labels), inside, site, strings)
    scores = scores + at(transition, steps, inside[..., 1:], site[1:] - 1, strings[:, :-1], strings[:, 1:])
    scores = scores + at(ends[0], (sites, labels), inside & (site == 0), site, strings)
    scores = scores + at(ends[1], (sites, labels), last, site, strings)
    once = ~((strings != 0).reshape(-1, *[1] * len(batch), sites) & ~inside).any(-1)
    return Enumerated(strings, scores, once, inside, labels)


def _again(
    d: Any, lengths: Tensor | None, change: Callable[[str, Tensor], Tensor] | None = None, check: Any = None
) -> Any:
    """Returns a new chain with other lengths, and with detached or changed potentials."""
    potentials = {name: getattr(d, name) for name in ("unary", "transition", "initial", "final")}
    given = {name: p.detach() for name, p in potentials.items() if p is not None}
    if change is not None:
        given = {name: change(name, p) for name, p in given.items()}
    new = type(d)(given.pop("unary"), given.pop("transition"), **given, lengths=lengths, validate_args=check)
    return new if lengths is not None else new.expand(d.batch_shape)


def _filled(truth: Enumerated, fill: int) -> Tensor:
    """Returns all strings (S, *batch, N), with a value in the padding."""
    shape = (len(truth.strings), *truth.inside.shape)
    strings = truth.strings.reshape(len(truth.strings), *[1] * (truth.inside.dim() - 1), -1)
    return strings.expand(shape).masked_fill(~truth.inside, fill)


def _sums(case: str, d: Any, truth: Enumerated, tol: float) -> None:
    """Checks sums over all strings, and the log_prob of each."""
    for name, (query, expected) in QUERIES.items():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                where = f"{name}{', with grad' if grad else ''}{case}"
                close("chain", where, query(d), expected(truth), tol)
    for fill in (0, -100, d.num_labels):
        log_prob = truth.scores - truth.log_partition()
        close("chain", f"log_prob, {fill} for padding{case}", d.log_prob(_filled(truth, fill)), log_prob, tol)
    by_sites = d.as_autoregressive().log_prob(_filled(truth, 0))
    close("chain", f"as_autoregressive{case}", by_sites, truth.scores - truth.log_partition(), tol)


def _best(case: str, d: Any, truth: Enumerated, tol: float) -> None:
    """Checks the best strings, their order and their log_prob."""
    k = 5
    ranked = truth.log_prob().sort(0, descending=True).values
    missing = ranked.new_full((max(k - len(ranked), 0), *ranked.shape[1:]), -inf)
    ranked = torch.cat([ranked, missing])[:k]
    close("chain", f"max_log_prob{case}", d.max_log_prob, ranked[0], tol)
    close("chain", f"log_prob of the mode{case}", _looked_up(truth, d.mode, f"mode{case}"), ranked[0], tol)
    strings, log_prob = d.k_best(k)
    close("chain", f"log_prob of k_best{case}", log_prob, ranked, tol)
    found = _looked_up(truth, strings, f"k_best{case}")
    existing = ranked > -inf
    close("chain", f"strings of k_best{case}", found.where(existing, 0.0), ranked.where(existing, 0.0), tol)
    same = (strings.unsqueeze(0) == strings.unsqueeze(1)).all(-1) & existing & existing.unsqueeze(1)
    if same.sum() > existing.sum():
        broken("chain", f"k_best{case}", "a string occurs twice")


def _draws(case: str, d: Any, truth: Enumerated, draws: int) -> None:
    """Checks that samples have the right frequencies, also from an expanded batch, whose rows are independent."""
    strings = truth.strings.reshape(len(truth.strings), *[1] * len(d.batch_shape), -1)
    for name, labels in drawn("chain", case, d, draws):
        frequencies("chain", name, labels, strings, truth.log_prob())


def _derivatives(case: str, d: Any, tol: float) -> None:
    """Checks gradients in all potentials against those of enumeration."""
    d = _again(d, d.lengths, lambda name, p: p.clone().requires_grad_())
    leaves = {n: p for n in ("unary", "transition", "initial", "final") if (p := getattr(d, n)) is not None}
    truth = enumerated(d)
    marginals = {"unary": d.marginals, "transition": d.pair_marginals}
    for name, grad in zip(marginals, gradients_of(d.log_partition.sum(), [d.unary, d.transition]), strict=True):
        mine = marginals[name].sum_to_size(leaves[name].shape)
        close("chain", f"marginals, gradient of log_partition in {name}{case}", mine, grad, tol)
    labels = d.mode
    best = _looked_up(truth, labels, f"mode{case}")
    queries = QUERIES | {"log_prob": (lambda d: d.log_prob(labels), lambda truth: best)}
    for query, of in queries.items():
        got, expected = (f(subject) for f, subject in zip(of, (d, truth), strict=True))
        noise = noise_like(expected, 3)
        totals = [(value * noise).sum() for value in (got, expected)]
        grads = [gradients_of(total, list(leaves.values()), keep_graph=True) for total in totals]
        for name, mine, theirs in zip(leaves, *grads, strict=True):
            close("chain", f"gradient of {query} in {name}{case}", mine, theirs, tol)


def _padding(case: str, d: Any, tol: float) -> None:
    """Checks that results do not depend on the potentials of the padding, and that their gradients are 0."""
    if d.lengths is None:
        return
    sites, labels = d.event_shape[0], d.num_labels
    gone = torch.arange(sites, device=d.unary.device) >= d.lengths.unsqueeze(-1)
    gone = gone.expand(*d.batch_shape, sites)
    masks = {"unary": gone.unsqueeze(-1).expand(*gone.shape, labels)}
    if d.transition.dim() > 2 and d.transition.shape[-3] == sites - 1:
        masks["transition"] = gone[..., 1:, None, None].expand(*gone.shape[:-1], sites - 1, labels, labels)

    def spoilt(name: str, p: Tensor, fill: float) -> Tensor:
        if name in masks:
            p = p.expand(masks[name].shape).masked_fill(masks[name], fill)
        return p.clone().requires_grad_()

    for fill in (1e3, -inf, float("nan")):
        other = _again(d, d.lengths, lambda name, p, fill=fill: spoilt(name, p, fill))  # type: ignore[misc]
        where = f", {fill:g} for padding{case}"
        mode = d.mode
        same("chain", f"mode{where}", other.mode.tolist(), mode.tolist())
        for name, (query, _) in QUERIES.items():
            close("chain", f"{name}{where}", query(other), query(d), tol)
        close("chain", f"max_log_prob{where}", other.max_log_prob, d.max_log_prob, tol)
        close("chain", f"log_prob{where}", other.log_prob(mode), d.log_prob(mode), tol)
        total = other.log_prob(mode) + other.entropy() + 2 * other.log_partition
        total = (total + other.marginals.square().sum((-1, -2))).sum()
        grads = gradients_of(total, [getattr(other, name) for name in masks])
        for (name, mask), grad in zip(masks.items(), grads, strict=True):
            close("chain", f"gradient in the padding of {name}{where}", grad[mask], 0.0, 0.0)


def _index(truth: Enumerated, strings: Tensor, case: str) -> Tensor:
    """Returns the indices of label strings (*, *batch, N) among all strings."""
    if not (strings.masked_fill(truth.inside, 0) == 0).all():
        broken("chain", f"padding of {case}", "a label, not 0")
    if not ((strings >= 0) & (strings < truth.labels)).all():
        broken("chain", case, f"labels {int(strings.min())} to {int(strings.max())}, not 0 to {truth.labels - 1}")
    place = truth.labels ** torch.arange(strings.shape[-1] - 1, -1, -1, device=strings.device)
    return (strings * place).sum(-1)


def _looked_up(truth: Enumerated, strings: Tensor, case: str) -> Tensor:
    """Returns the log-probabilities (*, *batch) of label strings (*, *batch, N)."""
    index = _index(truth, strings, case)
    log_prob = truth.log_prob()
    many = index.reshape(-1, *log_prob.shape[1:])
    return log_prob.gather(0, many).reshape(index.shape)
