"""LinearChainCRF against all label strings: V 2 ... 4, N 1 ... 6, every length, with and without structural zeros."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.distributions import kl_divergence

import pyro_genexact as gx
from support.label_chains import EACH, KINDS, Small, agree, all_sizes, near


@pytest.fixture(params=EACH, ids=str)
def cases(request):
    return all_sizes(*request.param)


def test_log_partition(cases):
    for c in cases:
        near(c.crf().log_partition, c.scores.logsumexp(0), c.name)


def test_log_prob_and_score_of_every_string(cases):
    for c in cases:
        d, log_prob = c.crf(), c.raw - c.scores.logsumexp(0)
        near(d.log_prob(c.values), log_prob, c.name)
        near(d.score(c.values), c.raw, c.name)
        near(d.log_prob(c.values.double()), log_prob, c.name)
        near(d.log_prob(c.strings[-1]), log_prob[-1], c.name)  # fewer dims: the same labels for all rows
        near(d.score(c.strings[-1]), c.raw[-1], c.name)
        more = c.strings.reshape(-1, 1, 1, 1, c.sites)
        near(d.log_prob(more), log_prob.unsqueeze(1), c.name)
        near(d.expand((3, *c.batch)).log_prob(more), log_prob.unsqueeze(1).expand(-1, 3, -1, -1), c.name)


@pytest.mark.parametrize("label", [-1.0, 3.0, 0.5, torch.nan, torch.inf, -100.0, 1e30])
def test_labels_outside_are_impossible_but_in_padding(label):
    for kind, site in product(KINDS, range(4)):
        c = Small(3, 4, kind, zeros=False)
        value = c.strings[50].double().expand(*c.batch, 4).clone()
        value[..., site] = label
        d = c.crf(validate_args=False)
        inside = ~c.there[..., site]
        truth = (c.raw - c.scores.logsumexp(0))[50].masked_fill(~inside, -torch.inf)
        near(d.log_prob(value), truth)
        near(d.score(value), c.raw[50].masked_fill(~inside, -torch.inf))
        with pytest.raises(ValueError, match="LabelStrings"):
            c.crf(validate_args=True).log_prob(value)
        assert (c.crf().support.check(value) == inside).all()


def test_marginals(cases):
    for c in cases:
        d = c.crf()
        near(d.marginals, c.marginals, c.name)
        near(d.pair_marginals, c.pair_marginals, c.name)
        leaf = c.with_grad()
        d = leaf.crf()
        near(d.marginals, c.marginals, c.name)  # by a recursion that can be differentiated
        near(d.pair_marginals, c.pair_marginals, c.name)
        steps = c.transition.expand(*c.batch, c.sites - 1, c.labels, c.labels).clone().requires_grad_()
        d = gx.LinearChainCRF(leaf.unary, steps, initial=leaf.initial, final=leaf.final, lengths=c.lengths)
        nodes, pairs = torch.autograd.grad(d.log_partition.sum(), [leaf.unary, steps])
        near(nodes, c.marginals, c.name)
        near(pairs, c.pair_marginals, c.name)


def test_mode(cases):
    for c in cases:
        d = c.crf()
        near(d.max_log_prob, c.log_prob.amax(0), c.name)
        assert (d.mode == c.strings[c.log_prob.argmax(0)]).all(), c.name


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_k_best(cases, rounded):
    for c in (c for c in cases if c.labels**c.sites <= 100):
        if rounded:
            c = c.map(torch.round)
        d, count = c.crf(), c.labels**c.sites
        best = torch.cat([c.log_prob.sort(0, descending=True).values, torch.full((3, *c.batch), -torch.inf)])
        for k in (2, count + 3):
            labels, log_prob = d.k_best(k)
            near(log_prob, best[:k], c.name)
            found, place = log_prob > -torch.inf, c.index(labels)
            near(c.log_prob.gather(0, place)[found], log_prob[found], c.name)
            assert (labels[~found] == 0).all()
            twice = (place == place.unsqueeze(1)) & found & found.unsqueeze(1)
            assert twice.sum() == found.sum(), c.name  # a string is the same as itself alone


def test_entropy(cases):
    for c in cases:
        near(c.crf().entropy(), c.entropy, c.name)


def test_entropy_of_huge_potentials():
    """Scores of 1e7, of which the entropy knows nothing."""
    huge = 1e4 * torch.randn(1000, 1, dtype=torch.float64).expand(1000, 2)
    d = gx.LinearChainCRF(huge, torch.full((2, 2), -1e4, dtype=torch.float64))
    near(d.entropy(), torch.tensor(1000 * math.log(2), dtype=torch.float64))
    q = gx.LinearChainCRF(torch.zeros_like(huge), torch.zeros(2, 2, dtype=torch.float64))
    assert abs(kl_divergence(d, q)) < 1e-7 and abs(kl_divergence(q, d)) < 1e-7


def test_enumerate_support():
    for kind in KINDS:
        c = Small(3, 4, kind, zeros=True, ragged=False)
        d = c.crf()
        assert (d.enumerate_support() == c.strings[:, None, None].expand(-1, *c.batch, -1)).all()
        assert (d.enumerate_support(expand=False) == c.strings[:, None, None]).all()
        for n in range(5):  # all rows of one length
            d = c.crf(lengths=torch.tensor(n))
            strings = d.enumerate_support(expand=False)
            assert len(strings) == len(strings.unique(dim=0)) == 3**n
            assert (strings[..., n:] == 0).all() and ((strings >= 0) & (strings < 3)).all()
            near(d.log_prob(strings).logsumexp(0), torch.zeros(c.batch, dtype=torch.float64))


def test_samples_are_the_distribution():
    for kind, zeros, (labels, sites) in product(KINDS, (False, True), ((2, 5), (4, 3), (3, 1))):
        c = Small(labels, sites, kind, zeros)
        values = c.crf().sample((8000,))
        assert values.shape == (8000, *c.batch, sites) and (values[:, ~c.there] == 0).all()
        agree(c.index(values), c.log_prob)
    c = Small(3, 3, "steps", zeros=True, ragged=False)
    agree(c.index(c.crf().sample((20000,))), c.log_prob)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_an_expanded_distribution_are_independent(kind):
    c = Small(2, 2, kind, zeros=False)
    d = c.crf().expand((2, *c.batch))
    place = c.index(d.sample((20000,)))
    joint = c.log_prob.unsqueeze(1) + c.log_prob  # of two copies
    agree(place[:, 0] * 4 + place[:, 1], joint.flatten(0, 1))


def test_expand_keeps_a_class_with_a_constructor_of_its_own():
    class Sticky(gx.LinearChainCRF):
        def __init__(self, unary):
            super().__init__(unary, torch.eye(unary.shape[-1], dtype=unary.dtype))

    d = Sticky(torch.randn(2, 3, 4, dtype=torch.float64)).expand((5, 2))
    assert type(d) is Sticky and d.sample().shape == (5, 2, 3) and d.entropy().shape == (5, 2)


def test_samples_stand_in_their_rows():
    place = torch.arange(6).reshape(2, 1, 3)
    digits = place.unsqueeze(-1) // torch.tensor([4, 2, 1]) % 2
    unary = torch.where(torch.nn.functional.one_hot(digits, 2).bool(), 0.0, -torch.inf)  # each row has one string
    d = gx.LinearChainCRF(unary, torch.zeros(2, 2))
    for shape in ((2, 1, 3), (2, 5, 3), (4, 2, 1, 3), (2, 4, 2, 5, 3)):
        for sample_shape in ((), (7,), (2, 3)):
            values = d.expand(shape).sample(sample_shape)
            assert (values == digits.expand(*sample_shape, *shape, 3)).all()
    first = gx.LinearChainCRF(unary[:1, :, :1], torch.zeros(2, 2)).expand((1, 5, 1)).sample()
    assert (first == 0).all() and first.shape == (1, 5, 1, 3)
