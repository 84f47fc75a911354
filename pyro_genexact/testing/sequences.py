"""The laws of sequences of random length: each query against the chain rule, string by string."""

from __future__ import annotations

from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import Conditioner
from ..contexts import Covariates, PaddedSequence
from ..heads.filters import Tempered
from .densities import goodness_of_fit, unvalidated_log_prob
from .helpers import broken, close, gradients_of, made, raises, same, seeded

LARGEST = 4096


def sequence(subject: Any, context: Tensor | None = None, tol: float = 1e-10, draws: int = 2000) -> None:
    r"""Every query of a distribution over sequences of random length is what the chain rule tells, string by string.

    Of all arrays over the values of a finite head, or else of draws, log p(y) = sum_t log p(y_t | y_{<t}) up to the first end, by
    ``start`` and ``extend`` of the conditioner, which read nothing else. So are known

    - ``log_prob`` and ``log_prob_sites``, 0 for padding; all arrays together have mass 1;
    - ``support`` and ``enumerate_support``; log_prob is -inf for any other array, or a ValueError when validating;
    - ``lengths_of``, ``entropy``, and how often a string is drawn, by ``sample`` and from ``expand``, by chi-square;
    - ``conditional_on_prefix`` of every number of sites, the same in all rows or not (from 0, whatever stands behind them), at once
      or in two steps, of prefixes that have ended, too: its log_prob, lengths and draws;
    - ``with_head``, ``termination_curve`` (of what follows a prefix, too), and the log_prob of ended strings under any other
      ``max_len``.

    Neither the values nor the gradients depend on what a conditioner reads or predicts after the end, nor on covariates there.

    Args:
        subject: a distribution with the constructor, the attributes and the queries of
            :class:`pyro_genexact.distributions.SequenceDistribution`, without a prefix, or a module whose call returns one; in
            float64.
        context: as the module takes it, or None.
        tol: relative to 1 + |value|.
        draws: how many samples.

    Raises:
        AssertionError: that names the query, and the numbers.
        ValueError: for more than 4096 arrays, or a prefix.

    Example:
        >>> from pyro_genexact import Sequence, conditioners, heads
        >>> sequence(Sequence(conditioners.Markov(2, 2, order=1), heads.Categorical(2), eos=0, max_len=3).double())
    """
    d = made(subject, context)
    if d.prefix is not None:
        raise ValueError("Expected a distribution without a prefix; got one with.")
    strings, arrays = _strings(d)
    truth = _by_chain_rule(d, d.head, strings)
    if arrays is not None:
        _enumeration(d, truth, tol)
    _illegal(d, truth, arrays)
    _values(d, truth, tol)
    _padding(d, truth, tol)
    _covariates(d, truth, tol)
    _prefixes(d, truth, tol)
    _other_lengths(d, truth, tol)
    _other_head(d, truth, tol)
    _draws(d, truth, arrays is not None, draws, tol)
    _curve_after_prefixes(d, truth, arrays is not None, draws, tol)


class ByChainRule(NamedTuple):
    """Strings and what is true of them.

    Attributes:
        strings: (S, *batch, T, *site_shape).
        ends: (S, *batch, T), whether a site is an end.
        present: (S, *batch, T), whether none precedes it.
        sites: (S, *batch, T), log p(y_t | y_{<t}), 0 for padding.
    """

    strings: Tensor
    ends: Tensor
    present: Tensor
    sites: Tensor

    def lengths(self, counts_end: bool) -> Tensor:
        return (self.present if counts_end else self.present & ~self.ends).sum(-1)


def _again(d: Any, **changes: Any) -> Any:
    """The same distribution anew, but for some arguments."""
    fields = ("conditioner", "head", "eos", "max_len", "context", "source_lengths", "limit")
    return type(d)(**({name: getattr(d, name) for name in fields} | changes)).expand(d.batch_shape)


def _where(d: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Which sites of y (*, T, *site_shape) are ends, and which have none before them."""
    ends = d.head.ends(y) if d.eos is None else y == d.eos
    return ends, ends.cumsum(-1) - ends.long() == 0


def _is_filler(d: Any, y: Tensor) -> Tensor:
    filled = y == (0 if d.eos is None else d.eos)
    return filled.all(-1) if d.head.site_shape else filled


def _all_arrays(d: Any, sites: int) -> tuple[Tensor, Tensor]:
    """All arrays (N, sites, *site_shape) over the values of the head, and which of them are sequences."""
    values = d.head(d.chain.like.new_zeros(1, 1, d.head.num_params)).enumerate_support()[:, 0, 0]
    if (count := len(values) ** sites) > LARGEST:
        raise ValueError(f"Expected at most {LARGEST} arrays; got {len(values)}^{sites} = {count}.")
    index = torch.arange(len(values), device=values.device)
    arrays = values[torch.cartesian_prod(*[index] * sites).reshape(-1, sites)]
    present = _where(d, arrays)[1]
    return arrays, (present | _is_filler(d, arrays)).all(-1)


def _strings(d: Any) -> tuple[Tensor, Tensor | None]:
    """Legal strings (S, *batch, *event), and all arrays that are none, (N, *event); of infinitely many, draws and None."""
    if not d.has_enumerate_support:
        with seeded(0):
            return d.sample((100,)), None
    arrays, legal = _all_arrays(d, d.max_len)
    strings = arrays[legal].reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    return strings.expand(len(strings), *d.batch_shape, *d.event_shape), arrays[~legal]


def _by_chain_rule(d: Any, head: Any, strings: Tensor) -> ByChainRule:
    """Each string is read to its end, in one chunk, by ``start`` and ``extend``."""
    shape, (ends, present) = strings.shape[: strings.dim() - len(d.event_shape)], _where(d, strings)
    context = d.chain.contexts(shape)
    y = strings.reshape(prod(shape), *d.event_shape)
    last = present.reshape(len(y), -1).sum(-1) - 1
    sites = d.chain.like.new_zeros(len(y), d.max_len)
    for n in last.unique().tolist():
        rows = (last == n).nonzero().squeeze(1)
        given = PaddedSequence(*(part[rows] for part in context)) if isinstance(context, PaddedSequence) else context
        given = given[rows] if isinstance(given, Tensor) else given
        phi, state = d.conditioner.start(given, len(rows))
        phi = phi.unsqueeze(1)
        if n:
            phi = torch.cat([phi, d.conditioner.extend(d.chain.read(y[rows, :n]), state)[0]], 1)
        sites[rows, : n + 1] = head(phi).log_prob(y[rows, : n + 1]).detach()
    return ByChainRule(strings, ends, present, sites.reshape(ends.shape))


def _enumeration(d: Any, truth: ByChainRule, tol: float) -> None:
    """The mass is on the strings, all of them and each once."""
    log_prob = truth.sites.sum(-1)
    close("sequence", "mass of all strings", d.log_prob(truth.strings).logsumexp(0), torch.zeros_like(log_prob[0]), tol)
    mine = d.enumerate_support()
    same("sequence", "shape of enumerate_support", tuple(mine.shape), tuple(truth.strings.shape))
    found = (mine.unsqueeze(1) == truth.strings.unsqueeze(0)).flatten(2).all(-1)
    if not (found.sum(0) == 1).all():
        broken("sequence", "enumerate_support", "a string is missing or twice")
    possible = log_prob > -inf
    entropy = -(log_prob.exp() * log_prob.masked_fill(~possible, 0.0)).sum(0)
    close("sequence", "entropy", d.entropy(), entropy, tol)


def _illegal(d: Any, truth: ByChainRule, arrays: Tensor | None) -> None:
    """What is no sequence is outside the support: -inf, or a ValueError."""
    if not d.support.check(truth.strings).all():
        broken("sequence", "support", "a string is outside")
    if arrays is None:  # strings with another last site
        gone = truth.strings[~truth.present[..., -1]]
        arrays = gone.repeat(3, *[1] * (gone.dim() - 1))
        arrays[:, -1] = torch.stack([gone[:, -1] + fill for fill in (1.0, -2.0, torch.nan)]).flatten(0, 1)
    if not len(arrays):
        return
    checked = d.support.check(arrays.reshape(-1, *[1] * len(d.batch_shape), *d.event_shape))
    if checked.any():
        broken(
            "sequence",
            "support",
            f"{arrays[checked.flatten(1).any(1) if checked.dim() > 1 else checked][0].tolist()} is inside",
        )
    shaped = arrays.reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    log_prob = _again(d, validate_args=False).log_prob(shaped)
    close("sequence", "log_prob of what is no sequence", log_prob, torch.full_like(log_prob, -inf), 0.0)
    strict = _again(d, validate_args=True)
    for array in arrays[:: max(len(arrays) // 100, 1)]:
        with raises("sequence", f"log_prob of {array.tolist()}, validated", ValueError):
            strict.log_prob(array)


def _values(d: Any, truth: ByChainRule, tol: float) -> None:
    close("sequence", "log_prob", d.log_prob(truth.strings), truth.sites.sum(-1), tol)
    close("sequence", "log_prob_sites", d.log_prob_sites(truth.strings), truth.sites, tol)
    same("sequence", "lengths_of", d.lengths_of(truth.strings).tolist(), truth.lengths(d.eos is None).tolist())


class Spied(Conditioner):
    """A conditioner that reads and predicts something else where it should not matter."""

    def __init__(self, net: Any, mask: Tensor, other: Tensor, added: Tensor) -> None:
        super().__init__()
        self.net, self.mask, self.other, self.added = net, mask, other, added
        self.num_params, self.num_sites, self.site, self.context = net.num_params, net.num_sites, net.site, net.context

    def start(self, context: Any, batch_size: int) -> tuple[Tensor, Any]:
        phi, state = self.net.start(context, batch_size)
        return phi, state

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        phi, state = self.net.extend(y, state)
        return phi, state

    def forward(self, y: Tensor, context: Any = None) -> Tensor:
        phi: Tensor = self.net(torch.where(self.mask, self.other, y), context)
        return phi + self.added


def _padding(d: Any, truth: ByChainRule, tol: float) -> None:
    """Nothing is read or scored after the end, and no gradient comes from there."""
    gone = ~truth.present.reshape(-1, d.max_len)
    wide = gone.reshape(*gone.shape, *[1] * len(d.head.site_shape))
    other = d.chain.read(truth.strings.roll(1, 0).reshape(-1, *d.event_shape))
    for size in (0.0, 3.0):
        added = size * gone.unsqueeze(-1) * d.chain.like.new_ones(d.head.num_params)
        added.requires_grad_()
        y = truth.strings.detach().clone()
        y.requires_grad_(y.is_floating_point())
        log_prob = _again(d, conditioner=Spied(d.conditioner, wide, other, added)).log_prob(y)
        close("sequence", "log_prob, whatever is read and predicted after the end", log_prob, truth.sites.sum(-1), tol)
        total = log_prob[log_prob > -inf].sum()
        grads = gradients_of(total, [added, *([y] if y.requires_grad else [])])
        for name, grad in zip(("the parameters", "the values"), grads, strict=False):
            after = grad.reshape(*gone.shape, -1)[gone]
            close("sequence", f"gradient of {name} after the end", after, torch.zeros_like(after), 0.0)


def _covariates(d: Any, truth: ByChainRule, tol: float) -> None:
    """No covariates are read after the end, be they NaN."""
    if not isinstance(d.conditioner.context, Covariates):
        return
    shape = (*truth.present.shape, d.context.shape[-1])
    context = d.context.expand(shape).masked_fill(~truth.present.unsqueeze(-1), torch.nan).requires_grad_()
    log_prob = _again(d.expand(shape[:-2]), context=context).log_prob(truth.strings)
    close("sequence", "log_prob, covariates NaN after the end", log_prob, truth.sites.sum(-1), tol)
    leaves = [context, *(p for p in d.conditioner.parameters() if p.requires_grad)]
    grads = gradients_of(log_prob[log_prob > -inf].sum(), leaves)
    after = grads[0][~truth.present]
    close("sequence", "gradient of covariates after the end", after, torch.zeros_like(after), 0.0)
    if not all(grad.isfinite().all() for grad in grads):
        broken("sequence", "gradient, covariates NaN after the end", "not finite")


def _prefixes(d: Any, truth: ByChainRule, tol: float) -> None:
    """What follows a prefix has the probability of both over that of the prefix."""
    strings, T, dim = truth.strings, d.max_len, truth.ends.dim() - 1
    counts = d.eos is None
    for k in range(1, T):
        first, rest = strings.split([k, T - k], dim)
        expected = truth.sites[..., k:].sum(-1)
        lengths = truth._replace(ends=truth.ends[..., k:], present=truth.present[..., k:]).lengths(counts)
        given = {f"{k} sites": d.conditional_on_prefix(first)}
        if k > 1:
            halves = first.split([1, k - 1], dim)
            given[f"1 and {k - 1} sites"] = d.conditional_on_prefix(halves[0]).conditional_on_prefix(halves[1])
        for name, c in given.items():
            close("sequence", f"log_prob after {name}", c.log_prob(rest), expected, tol)
            same("sequence", f"lengths_of after {name}", c.lengths_of(rest).tolist(), lengths.tolist())
        _ragged(d, truth, k, tol)


def _ragged(d: Any, truth: ByChainRule, k: int, tol: float) -> None:
    """Each row has its own number of sites, from 0 to k."""
    strings, dim = truth.strings, truth.ends.dim() - 1
    starts = (torch.arange(truth.ends[..., 0].numel(), device=strings.device) % (k + 1)).reshape(truth.ends.shape[:-1])
    index = starts.unsqueeze(-1) + torch.arange(d.max_len - k, device=starts.device)
    rest = strings.take_along_dim(_like_sites(index, strings), dim)
    expected = truth.sites.take_along_dim(index, -1).sum(-1)
    behind = torch.arange(k, device=starts.device) >= starts.unsqueeze(-1)
    first = strings.narrow(dim, 0, k)
    first = torch.where(_like_sites(behind, first), torch.nan if first.is_floating_point() else -100, first)
    ragged = {f"up to {k} sites": d.conditional_on_prefix(first, starts)}
    if k > 1:  # the second part as far as there is one
        halves = [first.narrow(dim, 0, 1), first.narrow(dim, 1, k - 1)]
        lengths = [starts.clamp(max=1), (starts - 1).clamp(min=0)]
        step = d.conditional_on_prefix(halves[0], lengths[0])
        ragged[f"up to 1 and {k - 1} sites"] = step.conditional_on_prefix(halves[1], lengths[1])
    for name, c in ragged.items():
        close("sequence", f"log_prob after {name}", c.log_prob(rest), expected, tol)


def _like_sites(index: Tensor, sites: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (sites.dim() - index.dim()))


def _other_lengths(d: Any, truth: ByChainRule, tol: float) -> None:
    """With another max_len, ended strings have the same probability, and an array without end is that many sites."""
    if d.conditioner.num_sites is not None or isinstance(d.conditioner.context, Covariates):
        return
    dim = truth.ends.dim() - 1
    for T in range(1, d.max_len):
        short = _again(d, max_len=T)
        cut = truth.strings.narrow(dim, 0, T)
        close("sequence", f"log_prob, max_len={T}", short.log_prob(cut), truth.sites[..., :T].sum(-1), tol)
    ended = truth.ends.any(-1).flatten(1).all(1) if dim > 1 else truth.ends.any(-1)
    strings = truth.strings[ended]
    filler = torch.full_like(strings.narrow(dim, 0, 1), 0 if d.eos is None else d.eos)
    longer = _again(d, max_len=d.max_len + 2).log_prob(torch.cat([strings, filler, filler], dim))
    close("sequence", "log_prob, two more sites", longer, truth.sites[ended].sum(-1), tol)


def _other_head(d: Any, truth: ByChainRule, tol: float) -> None:
    plain = d.eos is not None and d.has_enumerate_support
    head = Tempered(d.head, 0.5) if plain else d.head
    expected = _by_chain_rule(d, head, truth.strings).sites.sum(-1)
    close("sequence", "log_prob with another head", d.with_head(head).log_prob(truth.strings), expected, tol)
    close("sequence", "log_prob after with_head", d.log_prob(truth.strings), truth.sites.sum(-1), tol)


def _draws(d: Any, truth: ByChainRule, finite: bool, draws: int, tol: float) -> None:
    """Strings are drawn as often as their probability says, independently from row to row of an expanded batch."""
    with seeded(0):
        curve = d.termination_curve(num_samples=(samples := max(draws // 4, 2)))
    wide = d.expand((draws, *d.batch_shape))
    many = d.chain.like
    for name, draw in (("sample", lambda: d.sample((draws,))), ("sample of expand", wide.sample)):
        with seeded(0):
            many = draw()
        if not d.support.check(many).all():
            broken("sequence", name, "a value outside the support")
        if finite:
            _frequencies(name, many, truth.strings, d.log_prob(truth.strings))
    if finite:
        p = truth.sites.sum(-1).exp()
        ended, noise = (p.unsqueeze(-1) * (truth.ends.cumsum(-1) > 0)).sum(0), d.chain.like.new_zeros(())
    else:
        ended = (_where(d, many)[0].cumsum(-1) > 0).to(d.chain.like).mean(0)
        noise = ended * (1 - ended) / draws
    error = (curve.standard_error.square() + noise).sqrt()
    off = (curve.probability - ended).abs() - 5 * error - 1 / samples  # rarer histories may be missed
    if not (off <= tol).all():
        broken("sequence", "termination_curve", f"off by {off.max():.3g} more than 5 standard errors")
    rows = truth.strings[:: max(len(truth.strings) // 5, 1)][:6]
    k = min(2, d.max_len - 1)
    if finite and k:
        starts = (torch.arange(rows.shape[: rows.dim() - len(d.event_shape)].numel(), device=rows.device) + 1) % (k + 1)
        starts = starts.reshape(rows.shape[: rows.dim() - len(d.event_shape)])
        c = d.conditional_on_prefix(rows.narrow(starts.dim(), 0, k), starts)
        arrays, legal = _all_arrays(d, d.max_len - k)
        rest = arrays[legal].reshape(-1, *[1] * starts.dim(), *c.event_shape)
        with seeded(1):
            _frequencies("sample after a prefix", c.sample((draws,)), rest, unvalidated_log_prob(c, rest))


def _curve_after_prefixes(d: Any, truth: ByChainRule, finite: bool, draws: int, tol: float) -> None:
    """The curve of ten rows, of whose prefixes one has ended, as long as the others or not."""
    k, dim, samples = min(2, d.max_len - 1), truth.ends.dim() - 1, max(draws // 4, 2)
    over = truth.ends[..., :k].any(-1)
    whole, none = (part.flatten(1).all(1) if dim > 1 else part for part in (over, ~over))
    rows = torch.cat([whole.nonzero()[:1], none.nonzero()[:9]]).flatten()
    if not k or len(rows) < 2:
        return
    prefix, over = truth.strings[rows].narrow(dim, 0, k), over[rows]
    starts = torch.where(over, k, torch.arange(len(rows), device=rows.device).reshape(-1, *[1] * (dim - 1)) % (k + 1))
    for case, lengths in (("", None), (", ragged", starts)):
        c = d.conditional_on_prefix(prefix, lengths)
        with seeded(2):
            curve = c.termination_curve(num_samples=samples)
        name = f"termination_curve after a prefix{case}"
        close("sequence", f"{name}, ended", curve.probability[over], torch.ones_like(curve.probability[over]), 0.0)
        if finite:
            arrays, legal = _all_arrays(d, c.max_len)
            rest = arrays[legal].reshape(-1, *[1] * dim, *c.event_shape)
            ended = _where(d, rest)[0].cumsum(-1) > 0
            p = torch.where(ended, unvalidated_log_prob(c, rest).exp().unsqueeze(-1), 0.0).sum(0)
            # no history of a probability above 10 / samples is likely to be missed
            off = (curve.probability - p).abs() - 5 * curve.standard_error - 10 / samples
            if not (off[~over] <= tol).all():
                broken("sequence", name, f"off by {off[~over].max():.3g} more than 5 standard errors")


def _frequencies(case: str, many: Tensor, strings: Tensor, log_prob: Tensor) -> None:
    """Draws (M, *batch, *event) of strings (S, *batch or 1s, *event) with these log-probabilities (S, *batch)."""
    batch = log_prob.dim() - 1
    seen = torch.stack([(many == string).flatten(1 + batch).all(-1).sum(0) for string in strings]).to(log_prob)
    same("sequence", f"{case}, strings among all", seen.sum(0).min().item(), float(len(many)))
    goodness_of_fit("sequence", case, seen, len(many) * log_prob.detach().exp())
