"""Each semiring against all label strings, a user's own, counts, traces, and chains read from their end."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact.chains.semirings import draw
from pyro_genexact.semirings import (
    ChainPotentials,
    Count,
    Draw,
    KMax,
    LogSumExp,
    Max,
    Semiring,
    fold,
    mean,
    trace,
    trace_k,
)
from support.label_chains import EACH, Small, agree, near


def rows(c: Small) -> ChainPotentials:
    """The chain of all rows."""
    return c.crf().inference.potentials()


class Min(Semiring):
    """The worst score of a possible labelling."""

    def lift(self, potentials):
        return potentials.masked_fill(potentials == -torch.inf, torch.inf)

    def plus(self, a, dim):
        return a.amin(dim)

    def choose(self, candidates):
        return candidates.argmin(-1)


class Polynomial(Semiring):
    """Weights (D, *) by a degree that labels and steps add to; potentials are pairs (2, *) of a log-weight and a degree."""

    def __init__(self, size):
        self.size = size

    def lift(self, pair):
        degrees = torch.arange(self.size).reshape(-1, *[1] * (pair.dim() - 1))
        return torch.where(pair[1] == degrees, pair[0].exp(), 0.0)

    def times(self, a, lifted):
        return torch.stack([sum(a[i] * lifted[d - i] for i in range(d + 1)) for d in range(self.size)])

    def plus(self, a, dim):
        return a.sum(dim)


def test_totals(cases):
    for c in cases:
        chain, scores = rows(c), c.scores.flatten(1)
        near(fold(LogSumExp(), chain)[0], scores.logsumexp(0), c.name)
        near(fold(Draw(), chain)[0], scores.logsumexp(0), c.name)
        near(fold(Max(), chain)[0], scores.amax(0), c.name)
        near(fold(Min(), chain)[0], scores.masked_fill(scores == -torch.inf, torch.inf).amin(0), c.name)
        near(fold(Count(), chain)[0], (scores > -torch.inf).double().sum(0), c.name)
        order = torch.cat([scores.sort(0, descending=True).values, scores.new_full((5, len(scores[0])), -torch.inf)])
        for k in (1, 2, 5):
            near(fold(KMax(k), chain)[0], order[:k], c.name)


def test_messages_are_the_totals_of_the_sites_so_far(cases):
    for c in cases:
        chain, length = rows(c), c.there.sum(-1)
        messages = fold(LogSumExp(), chain)[1]
        assert len(messages) == c.sites
        for t, message in enumerate(messages):
            for label in range(c.labels):
                part = c.map(torch.clone, lengths=length.clamp(max=t + 1), final=None)
                last = c.strings[:, (part.lengths - 1).clamp(min=0)]
                truth = part.scores.masked_fill(last != label, -torch.inf).logsumexp(0)
                some = (length > 0).flatten()
                near(message[some, label], truth.flatten()[some], f"{c.name} t={t}")


def test_traces(cases):
    for c in cases:
        chain, scores = rows(c), c.scores.flatten(1)
        for semiring, best in (
            (Max(), scores.argmax(0)),
            (Min(), scores.masked_fill(scores == -torch.inf, torch.inf).argmin(0)),
        ):
            labels = trace(semiring, chain, fold(semiring, chain)[1])
            assert (labels == c.strings[best]).all(), c.name
            assert (trace(semiring, chain, fold(semiring, chain)[1], (2, 3)) == labels).all()
        for k in (1, 3):
            semiring = KMax(k)
            total, messages = fold(semiring, chain)
            labels = trace_k(semiring, chain, messages)
            assert labels.shape == (k, len(total[0]), c.sites)
            fine = total > -torch.inf
            near(scores.gather(0, c.index(labels))[fine], total[fine], c.name)
            if k <= c.labels:
                assert (labels[fine] == c.strings[scores.topk(k, 0).indices][fine]).all()


def test_traced_draws():
    for kind, zeros in EACH:
        c = Small(3, 3, kind, zeros)
        chain = rows(c)
        labels = trace(Draw(), chain, fold(Draw(), chain)[1], (8000,))
        agree(c.index(labels), c.log_prob)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_draws_at_the_ends_of_the_unit_interval(uniform, monkeypatch):
    """No label of weight zero is hit: from weights, of chains for a few draws a row, and by tables for many."""
    calls = []

    def rand(*shape, **options):
        calls.append(shape)
        return torch.full(torch.Size(shape if isinstance(shape[0], int) else shape[0]), uniform, **options)

    some = torch.tensor(list(product((False, True), repeat=4))[1:])  # all sets of labels
    allowed = torch.stack([some, some.flip(0), some.roll(5, 0)], 1)
    lengths = torch.arange(15) % 4
    allowed = allowed | (torch.arange(3) >= lengths.unsqueeze(-1)).unsqueeze(-1)
    unary = torch.randn(15, 3, 4, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    transitions = [torch.randn(*batch, 4, 4, dtype=torch.float64) for batch in ((), (15, 2), (15, 1))]
    monkeypatch.setattr(torch, "rand", rand)
    label = draw(some * torch.tensor([0.1, 0.7, 0.3, 0.9], dtype=torch.float64))
    assert some[torch.arange(15), label].all()
    for transition, count in product(transitions, (1, 60)):
        calls.clear()
        labels = gx.LinearChainCRF(unary, transition, lengths=lengths).sample((count,))
        assert calls and allowed.expand(count, -1, -1, -1).take_along_dim(labels.unsqueeze(-1), -1).all()


def test_expectation(cases):
    for c in cases:
        v = c.map(lambda p: torch.sin(p.clamp(min=-5.0)))
        values = rows(v)
        total, value = mean(rows(c), values)
        near(total, c.scores.logsumexp(0).flatten(), c.name)
        near(value, c.mean(v.scores).flatten(), c.name)
        # values that all rows share
        shared = values._replace(initial=values.initial[0], final=values.final[0])
        first = v.map(torch.clone, initial=None, final=None)
        first.initial, first.final = shared.initial, shared.final
        near(mean(rows(c), shared)[1], c.mean(first.scores).flatten(), c.name)


def test_a_semiring_of_ones_own(cases):
    """The weight of all labellings by how often the label changes and whether the first is the last one (two more)."""
    for c in cases:
        chain, y = rows(c), c.strings
        changes = (1.0 - torch.eye(c.labels, dtype=torch.float64)).expand_as(chain.transition)
        first = (torch.arange(c.labels) == c.labels - 1).double() * 2
        degrees = ChainPotentials(torch.zeros_like(chain.unary), changes, first.expand_as(chain.initial), 0 * first)
        if chain.transition.dim() == 2:
            chain, degrees = (k._replace(transition=k.transition.expand(1, 1, -1, -1)) for k in (chain, degrees))
        size = c.sites + 2
        paired = chain.map(lambda p, d: torch.stack(torch.broadcast_tensors(p, d)), degrees)
        changed = ((y[:, 1:] != y[:, :-1])[:, None, None] & c.there[..., 1:]).sum(-1)
        degree = (changed + 2 * ((y[:, 0] == c.labels - 1)[:, None, None] & c.there[..., 0])).flatten(1)
        weight = c.scores.exp().flatten(1)
        truth = torch.stack([torch.where(degree == d, weight, 0.0).sum(0) for d in range(size)])
        near(fold(Polynomial(size), paired)[0], truth, c.name)


def test_elements_with_dims_of_their_own(cases):
    """log Z at three temperatures at once; a transition that all rows share is lifted, too."""

    class Tempered(LogSumExp):
        def lift(self, potentials):
            return torch.stack([potentials, 2 * potentials, potentials / 3])

    for c in cases:
        truth = [(c.scores * beta).logsumexp(0).flatten() for beta in (1.0, 2.0, 1 / 3)]
        near(fold(Tempered(), rows(c))[0], torch.stack(truth), c.name)


def test_count_is_exact_to_2_to_the_53():
    def count(sites, allowed):
        labels = len(allowed)
        steps = torch.where(allowed, 0.0, -torch.inf)
        return int(
            fold(Count(), ChainPotentials(torch.zeros(sites, labels), steps, torch.zeros(labels), torch.zeros(labels)))[
                0
            ]
        )

    for labels, sites in ((2, 53), (3, 33), (5, 22), (16, 13)):
        assert count(sites, torch.ones(labels, labels, dtype=torch.bool)) == labels**sites <= 2**53
    fibonacci = [1, 2]  # of strings without two ones in a row
    while len(fibonacci) <= 75:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert count(75, torch.tensor([[True, True], [True, False]])) == fibonacci[75] < 2**53


@pytest.mark.parametrize("semiring", [LogSumExp(), Max(), Count(), KMax(3)], ids=lambda s: type(s).__name__)
def test_reversed_chains_have_the_same_total(cases, semiring):
    for c in cases:
        chain = rows(c)
        turned = chain.reversed()
        near(fold(semiring, turned)[0], fold(semiring, chain)[0], c.name)
        again = turned.reversed()
        there = c.there.flatten(0, 1)
        near(again.unary[there], chain.unary[there])
        if chain.transition.dim() > 2 and chain.transition.shape[1] > 1:
            near(again.transition[there[:, 1:]], chain.transition[there[:, 1:]])
        else:
            near(again.transition, chain.transition)
        near(again.initial, chain.initial)
        near(again.final, chain.final)
        assert again.lengths is chain.lengths


def test_reversed_labels_score_the_same(cases):
    for c in cases:
        chain, length = rows(c), c.there.sum(-1).flatten()
        place = (length.unsqueeze(-1) - 1 - torch.arange(c.sites)) % c.sites
        labels = trace(Max(), chain, fold(Max(), chain)[1])
        back = trace(Max(), turned := chain.reversed(), fold(Max(), turned)[1])
        assert (back.take_along_dim(place, -1)[c.there.flatten(0, 1)] == labels[c.there.flatten(0, 1)]).all(), c.name


def test_a_semiring_says_what_it_lacks():
    chain = ChainPotentials(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="Semiring must define plus"):
        fold(Semiring(), chain)
    total, messages = fold(LogSumExp(), chain)
    near(total, torch.tensor(4.0).log())
    with pytest.raises(TypeError, match="LogSumExp must define choose"):
        trace(LogSumExp(), chain, messages)
