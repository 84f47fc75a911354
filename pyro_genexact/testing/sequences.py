"""The law of sequences of random length: every query agrees with the chain rule, string by string."""

from __future__ import annotations

from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import Conditioner
from ..contexts import PaddedSequence, kind_of
from ..heads.filters import Tempered
from .densities import drawn, frequencies, unvalidated_log_prob
from .helpers import broken, close, finite, gradients_of, made, raises, same, seeded

LARGEST = 4096


def sequence(subject: Any, context: Tensor | None = None, tol: float = 1e-10, draws: int = 2000) -> None:
    """Checks every query of a distribution over sequences of random length against the chain rule, string by string.

    For all arrays over the values of a finite head, or otherwise for samples, the law computes
    log p(y) = sum_t log p(y_t | y_{<t}) up to the first end by ``start`` and ``extend`` of the conditioner. It checks

    - ``log_prob`` and ``log_prob_sites``, which are 0 for padding; all arrays together have mass 1;
    - ``support`` and ``enumerate_support``; other arrays have log_prob -inf, or raise a ValueError if they are validated;
    - ``lengths_of``, ``entropy``, and the frequencies of samples, also from ``expand``, by chi-square;
    - ``conditional_on_prefix`` for prefixes of all lengths, equal or different between rows, in one or two steps, and also for
      prefixes that have ended: log_prob, lengths and samples;
    - ``with_head``, ``termination_curve`` (also after a prefix), and log_prob of ended strings for any other ``max_len``.

    Values and gradients must not depend on inputs, outputs and covariates of the conditioner after the end.

    Args:
        subject: a distribution with the constructor, attributes and queries of
            :class:`pyro_genexact.distributions.SequenceDistribution`, without a prefix, or a module whose call returns one; in
            float64.
        context: the context of the module, or None.
        tol: the tolerance, relative to 1 + |value|.
        draws: the number of samples.

    Raises:
        AssertionError: if the law is broken.
        ValueError: if there are more than 4096 arrays, or if the distribution has a prefix.

    Example:
        >>> from pyro_genexact import Sequence, conditioners, heads
        >>> net, head = conditioners.Markov(2, 2, order=1), heads.Categorical(2)
        >>> sequence(Sequence(net, head, eos=0, max_len=3).double())
    """
    d = made(subject, context)
    if d.prefix is not None:
        raise ValueError("Expected a distribution without a prefix; got one with a prefix.")
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
    _after_prefixes(d, truth, arrays is not None, draws, tol)


class ByChainRule(NamedTuple):
    """Strings and their log-probabilities by the chain rule.

    Attributes:
        strings: (S, *batch, T, *site_shape).
        ends: (S, *batch, T), whether a site is an end.
        present: (S, *batch, T), whether no end precedes the site.
        sites: (S, *batch, T), log p(y_t | y_{<t}), 0 for padding.
    """

    strings: Tensor
    ends: Tensor
    present: Tensor
    sites: Tensor

    def lengths(self, d: Any) -> Tensor:
        """Returns the number of sites before the end; if the end is a flag of a site with a value, this site counts too."""
        return (self.present if d.eos is None else self.present & ~self.ends).sum(-1)


def _again(d: Any, **changes: Any) -> Any:
    """Returns a new distribution with some other arguments."""
    fields = ("conditioner", "head", "eos", "max_len", "context", "source_lengths", "limit")
    return type(d)(**({name: getattr(d, name) for name in fields} | changes)).expand(d.batch_shape)


def _where(d: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which sites of y (*, T, *site_shape) are ends, and which have no end before them."""
    ends = d.head.ends(y) if d.eos is None else y == d.eos
    return ends, ends.cumsum(-1) - ends.long() == 0


def _is_filler(d: Any, y: Tensor) -> Tensor:
    filled = y == (0 if d.eos is None else d.eos)
    return filled.all(-1) if d.head.site_shape else filled


def _all_arrays(d: Any, sites: int) -> tuple[Tensor, Tensor]:
    """Returns all arrays (N, sites, *site_shape) over the values of the head, and which of them are sequences."""
    values = d.head(d.chain.like.new_zeros(1, 1, d.head.num_params)).enumerate_support()[:, 0, 0]
    if (count := len(values) ** sites) > LARGEST:
        raise ValueError(f"Expected at most {LARGEST} arrays; got {len(values)}^{sites} = {count}.")
    index = torch.arange(len(values), device=values.device)
    arrays = values[torch.cartesian_prod(*[index] * sites).reshape(-1, sites)]
    present = _where(d, arrays)[1]
    return arrays, (present | _is_filler(d, arrays)).all(-1)


def _strings(d: Any) -> tuple[Tensor, Tensor | None]:
    """Returns all strings (S, *batch, *event) and all other arrays (N, *event); for infinite supports, samples and None."""
    if not d.has_enumerate_support:
        with seeded(0):
            return d.sample((100,)), None
    arrays, legal = _all_arrays(d, d.max_len)
    strings = arrays[legal].reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    return strings.expand(len(strings), *d.batch_shape, *d.event_shape), arrays[~legal]


def _by_chain_rule(d: Any, head: Any, strings: Tensor) -> ByChainRule:
    """Computes the log-probabilities of strings by ``start`` and ``extend``, reading each one to its end in one chunk."""
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
    """Checks the total mass, and that ``enumerate_support`` has each string once."""
    log_prob = truth.sites.sum(-1)
    close("sequence", "mass of all strings", d.log_prob(truth.strings).logsumexp(0), 0.0, tol)
    mine = d.enumerate_support()
    same("sequence", "shape of enumerate_support", tuple(mine.shape), tuple(truth.strings.shape))
    found = (mine.unsqueeze(1) == truth.strings.unsqueeze(0)).flatten(2).all(-1)
    if not (found.sum(0) == 1).all():
        broken("sequence", "enumerate_support", "a string is missing or occurs twice")
    possible = log_prob > -inf
    entropy = -(log_prob.exp() * log_prob.masked_fill(~possible, 0.0)).sum(0)
    close("sequence", "entropy", d.entropy(), entropy, tol)


def _illegal(d: Any, truth: ByChainRule, arrays: Tensor | None) -> None:
    """Checks that arrays that are not sequences are outside the support and have log_prob -inf, or raise a ValueError."""
    if not d.support.check(truth.strings).all():
        broken("sequence", "support", "a string is outside")
    if arrays is None:  # strings with another last site
        gone = truth.strings[~truth.present[..., -1]]
        arrays = gone.repeat(3, *[1] * (gone.dim() - 1))
        arrays[:, -1] = torch.stack([gone[:, -1] + fill for fill in (1.0, -2.0, torch.nan)]).flatten(0, 1)
    if not len(arrays):
        return
    shaped = arrays.reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    checked = d.support.check(shaped).reshape(len(arrays), -1).any(1)
    if checked.any():
        broken("sequence", "support", f"{arrays[checked][0].tolist()} is inside")
    log_prob = _again(d, validate_args=False).log_prob(shaped)
    close("sequence", "log_prob of what is no sequence", log_prob, -inf, 0.0)
    strict = _again(d, validate_args=True)
    for array in arrays[:: max(len(arrays) // 100, 1)]:
        with raises("sequence", f"log_prob of {array.tolist()}, validated", ValueError):
            strict.log_prob(array)


def _values(d: Any, truth: ByChainRule, tol: float) -> None:
    close("sequence", "log_prob", d.log_prob(truth.strings), truth.sites.sum(-1), tol)
    close("sequence", "log_prob_sites", d.log_prob_sites(truth.strings), truth.sites, tol)
    same("sequence", "lengths_of", d.lengths_of(truth.strings).tolist(), truth.lengths(d).tolist())


class Spied(Conditioner):
    """A conditioner with other inputs and outputs at masked sites, where they must not matter."""

    def __init__(self, net: Any, mask: Tensor, other: Tensor, added: Tensor) -> None:
        super().__init__()
        self.net, self.mask, self.other, self.added = net, mask, other, added
        self.num_params, self.num_sites, self.site, self.context = net.num_params, net.num_sites, net.site, net.context

    def start(self, context: Any, batch_size: int) -> tuple[Tensor, Any]:
        return self.net.start(context, batch_size)  # type: ignore[no-any-return]

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.net.extend(y, state)  # type: ignore[no-any-return]

    def forward(self, y: Tensor, context: Any = None) -> Tensor:
        phi: Tensor = self.net(torch.where(self.mask, self.other, y), context)
        return phi + self.added


def _padding(d: Any, truth: ByChainRule, tol: float) -> None:
    """Checks that inputs and outputs after the end have no effect and no gradient."""
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
            close("sequence", f"gradient of {name} after the end", after, 0.0, 0.0)


def _covariates(d: Any, truth: ByChainRule, tol: float) -> None:
    """Checks that covariates after the end have no effect, including NaN."""
    if not kind_of(d.conditioner.context).by_site:
        return
    shape = (*truth.present.shape, d.context.shape[-1])
    context = d.context.expand(shape).masked_fill(~truth.present.unsqueeze(-1), torch.nan).requires_grad_()
    log_prob = _again(d.expand(shape[:-2]), context=context).log_prob(truth.strings)
    close("sequence", "log_prob, covariates NaN after the end", log_prob, truth.sites.sum(-1), tol)
    leaves = [context, *(p for p in d.conditioner.parameters() if p.requires_grad)]
    grads = gradients_of(log_prob[log_prob > -inf].sum(), leaves)
    close("sequence", "gradient of covariates after the end", grads[0][~truth.present], 0.0, 0.0)
    for grad in grads:
        finite("sequence", "gradient, covariates NaN after the end", grad)


def _prefixes(d: Any, truth: ByChainRule, tol: float) -> None:
    """Checks conditional distributions given prefixes of the same length in all rows, and of lengths from 0 to k."""
    strings, dim = truth.strings, truth.ends.dim() - 1
    rows = torch.arange(truth.ends[..., 0].numel(), device=strings.device).reshape(truth.ends.shape[:-1])
    for k in range(1, d.max_len):
        for case, starts in (("", None), ("up to ", rows % (k + 1))):
            first, index = strings.narrow(dim, 0, k), torch.arange(d.max_len - k, device=strings.device)
            index = (torch.full_like(rows, k) if starts is None else starts).unsqueeze(-1) + index
            if starts is not None:
                behind = torch.arange(k, device=strings.device) >= starts.unsqueeze(-1)
                first = torch.where(_like_sites(behind, first), torch.nan if first.is_floating_point() else -100, first)
            given = {f"{case}{k} sites": d.conditional_on_prefix(first, starts)}
            if k > 1:  # rows with a prefix of one site have no second part
                lengths = (None, None) if starts is None else (starts.clamp(max=1), (starts - 1).clamp(min=0))
                step = d.conditional_on_prefix(first.narrow(dim, 0, 1), lengths[0])
                step = step.conditional_on_prefix(first.narrow(dim, 1, k - 1), lengths[1])
                given[f"{case}1 and {k - 1} sites"] = step
            rest = strings.take_along_dim(_like_sites(index, strings), dim)
            after = ByChainRule(rest, *(of.take_along_dim(index, -1) for of in truth[1:]))
            for name, c in given.items():
                close("sequence", f"log_prob after {name}", c.log_prob(rest), after.sites.sum(-1), tol)
                same("sequence", f"lengths_of after {name}", c.lengths_of(rest).tolist(), after.lengths(d).tolist())


def _like_sites(index: Tensor, sites: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (sites.dim() - index.dim()))


def _other_lengths(d: Any, truth: ByChainRule, tol: float) -> None:
    """Checks that ended strings have the same probability for another max_len."""
    if d.conditioner.num_sites is not None or kind_of(d.conditioner.context).by_site:
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


def _draws(d: Any, truth: ByChainRule, listed: bool, draws: int, tol: float) -> None:
    """Checks that samples have the right frequencies, also from an expanded batch, whose rows are independent."""
    with seeded(0):
        curve = d.termination_curve(num_samples=(samples := max(draws // 4, 2)))
    many = d.chain.like
    for name, many in drawn("sequence", "", d, draws):
        if listed:
            frequencies("sequence", name, many, truth.strings, truth.sites.sum(-1))
    if listed:
        p = truth.sites.sum(-1).exp()
        ended, noise = (p.unsqueeze(-1) * (truth.ends.cumsum(-1) > 0)).sum(0), d.chain.like.new_zeros(())
    else:
        ended = (_where(d, many)[0].cumsum(-1) > 0).to(d.chain.like).mean(0)
        noise = ended * (1 - ended) / draws
    error = (curve.standard_error.square() + noise).sqrt()
    # samples may miss rare histories
    _within("termination_curve", (curve.probability - ended).abs() - 1 / samples, error, tol)


def _after_prefixes(d: Any, truth: ByChainRule, listed: bool, draws: int, tol: float) -> None:
    """Checks samples and termination curves after the prefixes of ten rows, one of which has ended."""
    k, dim, samples = min(2, d.max_len - 1), truth.ends.dim() - 1, max(draws // 4, 2)
    over = truth.ends[..., :k].any(-1)
    whole, none = (part.reshape(len(part), -1).all(1) for part in (over, ~over))
    rows = torch.cat([whole.nonzero()[:1], none.nonzero()[:9]]).flatten()
    if not k:
        return
    prefix, over = truth.strings[rows].narrow(dim, 0, k), over[rows]
    starts = torch.where(over, k, torch.arange(len(rows), device=rows.device).reshape(-1, *[1] * (dim - 1)) % (k + 1))
    for case, lengths in (("", None), (", ragged", starts)):
        c = d.conditional_on_prefix(prefix, lengths)
        with seeded(2):
            curve = c.termination_curve(num_samples=samples)
        name = f"termination_curve after a prefix{case}"
        if listed:
            arrays, legal = _all_arrays(d, c.max_len)
            rest = arrays[legal].reshape(-1, *[1] * dim, *c.event_shape)
            log_prob = unvalidated_log_prob(c, rest)
            with seeded(1):
                frequencies("sequence", f"sample after a prefix{case}", c.sample((draws,)), rest, log_prob)
            p = torch.where(_where(d, rest)[0].cumsum(-1) > 0, log_prob.exp().unsqueeze(-1), 0.0).sum(0)
            # samples are unlikely to miss histories with a probability above 10 / samples
            off = (curve.probability - p).abs() - 10 / samples
            _within(name, off[~over], curve.standard_error[~over], tol)
        close("sequence", f"{name}, ended", curve.probability[over], 1.0, 0.0)


def _within(case: str, off: Tensor, error: Tensor, tol: float) -> None:
    """Checks that differences are at most 5 standard errors."""
    if not (off - 5 * error <= tol).all():
        broken("sequence", case, f"off by {off.max():.3g}, more than 5 standard errors")
