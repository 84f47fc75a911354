"""LinearChainCRF given a part of the labels, as left-to-right conditionals, beside other distributions, and its expectations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, OneHotCategorical, kl_divergence
from torch.nn.functional import one_hot

import pyro_genexact as gx
from support.label_chains import EACH, KINDS, Small, agree, all_sizes, near


@pytest.fixture(params=EACH, ids=str)
def cases(request):
    """Of at most 64 strings, or 30 where transitions are not shared."""
    most = 64 if request.param[0] == "shared" else 30
    return [c for c in all_sizes(*request.param) if c.labels**c.sites <= most]


@pytest.fixture
def g():
    return torch.Generator().manual_seed(1)


def restricted(c: Small, allowed: Tensor) -> Tensor:
    """Scores (V^N, *batch) of the strings that sets (*batch, N, V) allow, -inf for others."""
    n = torch.arange(c.sites)
    fits = allowed.expand(*c.batch, -1, -1)[..., n, c.strings].movedim(-2, 0) | ~c.there
    return c.scores.masked_fill(~fits.all(-1), -torch.inf)


def check_given(c: Small, part: gx.LinearChainCRF, scores: Tensor) -> None:
    log_prob = scores - scores.logsumexp(0)
    near(part.log_partition, scores.logsumexp(0), c.name)
    near(part.log_prob(c.values)[scores > -torch.inf], log_prob[scores > -torch.inf], c.name)
    same = (c.strings[:, None, None] * c.there == c.strings[:, None, None]).all(-1)
    assert (part.log_prob(c.values)[same & (scores == -torch.inf)] == -torch.inf).all()
    near(part.max_log_prob, log_prob.amax(0), c.name)
    near(part.entropy(), -(log_prob.exp() * log_prob.clamp(min=-1e4)).sum(0), c.name)
    nodes = torch.einsum("s...,stv->...tv", log_prob.exp(), c.one_hot)
    near(part.marginals, torch.where(c.there.unsqueeze(-1), nodes, 0.0), c.name)


def test_given_labels_of_some_sites(cases, g):
    for c in cases:
        y = c.strings[c.log_prob.argmax(0)]  # possible in every row
        observed = torch.rand(*c.batch, c.sites, generator=g) < 0.5
        labels = torch.where(observed & c.there, y, torch.randint(-100, 100, y.shape, generator=g))
        allowed = one_hot(y, c.labels).bool() | ~observed.unsqueeze(-1)
        d, scores = c.crf(), restricted(c, allowed)
        check_given(c, d.given(labels, observed), scores)
        near(d.log_marginal_of(labels, observed), scores.logsumexp(0) - c.scores.logsumexp(0), c.name)
        near(d.log_marginal_of(labels.double(), observed), scores.logsumexp(0) - c.scores.logsumexp(0), c.name)
        whole = torch.where(c.there, y, -100)
        near(d.log_marginal_of(whole), d.log_prob(whole), c.name)
        near(d.given(whole).entropy(), torch.zeros(c.batch, dtype=torch.float64), c.name)
        assert (d.given(whole).sample() == y).all()
        nothing = torch.zeros(c.sites, dtype=torch.bool)
        near(d.log_marginal_of(labels, nothing), torch.zeros(c.batch, dtype=torch.float64), c.name)


def test_given_sets_of_labels(cases, g):
    for c in cases:
        y = one_hot(c.strings[c.log_prob.argmax(0)], c.labels).bool()
        allowed = torch.where(c.there.unsqueeze(-1), y | (torch.rand(y.shape, generator=g) < 0.4), False)
        d, scores = c.crf(), restricted(c, allowed)
        check_given(c, d.given(allowed), scores)
        near(d.log_marginal_of(allowed), scores.logsumexp(0) - c.scores.logsumexp(0), c.name)
        observed = torch.rand(*c.batch, c.sites, generator=g) < 0.5
        scores = restricted(c, allowed | ~observed.unsqueeze(-1))
        near(d.given(allowed, observed).log_partition, scores.logsumexp(0), c.name)
        # one set for all rows, and more dims than the distribution has
        shared = torch.ones(c.sites, c.labels, dtype=torch.bool)
        shared[-1, :-1] = False
        scores = restricted(c, shared)
        near(d.log_marginal_of(shared), scores.logsumexp(0) - c.scores.logsumexp(0), c.name)
        more = d.given(allowed.expand(3, *allowed.shape))
        assert more.batch_shape == (3, *c.batch)
        near(more.log_partition[1], restricted(c, allowed).logsumexp(0), c.name)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_evidence(kind):
    c = Small(3, 3, "shared", zeros=False)
    c.transition[0, 1] = -torch.inf
    steps = {"shared": c.transition, "steps": c.transition.expand(2, 3, 3), "rows": c.transition.expand(1, 3, 3)}[kind]
    c = c.map(torch.clone, transition=steps).with_grad()
    for labels in ([0, 1, 2], [2, 0, 1]):
        forbidden = torch.tensor(labels)
        d, scores, total = c.crf(), restricted(c, one_hot(forbidden, 3).bool()), c.scores.logsumexp(0)
        found, fine = d.log_marginal_of(forbidden), (scores > -torch.inf).any(0)
        assert fine.any() and not fine.all()
        near(found, scores.logsumexp(0) - total)
        # impossible rows have the gradient of -log Z alone
        truth = torch.where(fine, torch.where(fine, scores, c.scores).logsumexp(0), 0.0) - total
        for create_graph in (False, True):
            ours, theirs = (
                torch.autograd.grad(v.sum(), c.potentials, retain_graph=True, create_graph=create_graph)
                for v in (found, truth)
            )
            for a, b in zip(ours, theirs, strict=True):
                near(a, b, f"{labels} create_graph={create_graph}")
        with pytest.raises(ValueError, match=r"row \(0, "):
            d.given(forbidden).entropy()
    outside = c.crf(validate_args=False).log_marginal_of(torch.tensor([0, 7, 0]))
    assert (outside[:, 2:] == -torch.inf).all() and outside[:, :2].isfinite().all()
    with pytest.raises(ValueError, match="labels"):
        c.crf(validate_args=True).log_marginal_of(torch.tensor([0, 7, 0]))


def test_conditioning_twice_is_conditioning_once():
    for kind in KINDS:
        c = Small(3, 4, kind, zeros=True)
        y = c.strings[c.log_prob.argmax(0)]
        first, second = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, True])
        d = c.crf()
        near(
            d.log_marginal_of(y, first) + d.given(y, first).log_marginal_of(y, second),
            d.log_marginal_of(y, first | second),
        )
        near(d.given(y, first).given(y, second).entropy(), d.given(y, first | second).entropy())


def test_as_autoregressive_has_the_same_log_prob(cases):
    for c in cases:
        d = c.crf()
        a = d.as_autoregressive()
        assert a.batch_shape == d.batch_shape and a.event_shape == d.event_shape
        near(a.log_prob(c.values), d.log_prob(c.values), c.name)
        near(
            d.expand((3, *c.batch)).as_autoregressive().log_prob(c.values[:, None]),
            d.expand((3, *c.batch)).log_prob(c.values[:, None]),
        )


def test_as_autoregressive_has_the_same_samples():
    for kind, zeros in EACH:
        c = Small(3, 3, kind, zeros)
        values = c.crf().as_autoregressive().sample((4000,))
        assert (values[:, ~c.there] == 0).all()
        agree(c.index(values.long()), c.log_prob)
    c = Small(2, 4, "steps", zeros=False, ragged=False)
    a = c.crf().as_autoregressive()
    prefix = torch.tensor([1, 0])
    rest = a.conditional_on_prefix(prefix)
    near(rest.log_prob(torch.tensor([1, 1])), c.log_prob[11] - c.log_prob[8:12].logsumexp(0))


def test_divergence_of_two_crfs(cases):
    for c in cases:
        q = c.map(lambda p: torch.where(p > -torch.inf, torch.cos(3 * p.clamp(min=-9.0)), p))
        p_, q_ = c.crf(), q.crf()
        near(kl_divergence(p_, q_), c.mean(c.log_prob - q.log_prob), c.name)
        near(p_.cross_entropy(q_), -c.mean(q.log_prob), c.name)
        near(kl_divergence(p_, p_), torch.zeros(c.batch, dtype=torch.float64), c.name)
        near(kl_divergence(p_.expand((3, *c.batch)), q_), c.mean(c.log_prob - q.log_prob).expand(3, *c.batch))


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_divergence_of_two_crfs(kind):
    """Where the other forbids a string that this one allows, and only there."""
    seen = torch.zeros(2)
    for labels, sites in ((2, 3), (2, 1), (3, 4)):
        c = Small(labels, sites, kind, zeros=True)
        for q in (Small(labels, sites, k, zeros=True) for k in KINDS):
            truth = c.mean(c.log_prob - q.log_prob)
            near(kl_divergence(c.crf(), q.crf()), truth, c.name)
            near(c.crf().cross_entropy(q.crf()), c.entropy + truth, c.name)
            seen += torch.stack([(truth == torch.inf).sum(), (truth < torch.inf).sum()])
            leaf = c.with_grad()
            grads = torch.autograd.grad(kl_divergence(leaf.crf(), q.crf()).sum(), leaf.potentials)
            assert all(p.isfinite().all() for p in grads)
    assert (seen > 5).all()


def independent(logits: Tensor, family: type, by: str) -> Independent:
    parameter = {"logits": logits} if by == "logits" else {"probs": logits.softmax(-1)}
    return Independent(family(**parameter), 1)


@pytest.mark.parametrize("by", ["logits", "probs"])
@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
def test_divergence_from_and_to_independent_labels(family, by, g):
    for (kind, zeros), (labels, sites) in product(EACH, ((2, 1), (3, 3))):
        c = Small(labels, sites, kind, zeros)
        for dead in (0.0, 0.3) if sites > 1 else (0.3,):
            logits = torch.randn(*c.batch, c.sites, c.labels, generator=g, dtype=torch.float64)
            logits[..., :-1][torch.rand(logits[..., :-1].shape, generator=g) < dead] = -torch.inf
            q = independent(logits, family, by)
            alone = Small.map(c, torch.zeros_like, unary=logits.log_softmax(-1))
            p = c.crf()
            near(kl_divergence(p, q), c.mean(c.log_prob - alone.log_prob), c.name)
            near(p.cross_entropy(q), -c.mean(alone.log_prob), c.name)
            near(kl_divergence(q, p), alone.mean(alone.log_prob - c.log_prob), c.name)


@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_from_and_to_probabilities_that_underflow(family, dtype):
    """Logits of -1000 are no zeros: what they weigh is finite."""
    logits = torch.tensor([[0.0, -1000.0, -2000.0], [-1000.0, 0.0, 0.5]], dtype=dtype)
    p, q = gx.LinearChainCRF(-logits, 300 * torch.eye(3, dtype=dtype)), Independent(family(logits=logits), 1)
    assert (q.base_dist.probs == 0).sum() == 3
    strings = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_q = logits.double().log_softmax(-1)[torch.arange(2), strings].sum(-1)
    score = -logits.double()[torch.arange(2), strings].sum(-1) + 300 * (strings[:, 0] == strings[:, 1])
    log_p = score.log_softmax(0)
    for found, a, b in ((kl_divergence(p, q), log_p, log_q), (kl_divergence(q, p), log_q, log_p)):
        torch.testing.assert_close(found, (a.exp() * (a - b)).sum().to(dtype))
        assert found > 100


def test_expectation(cases, g):
    for c in cases:
        d, n, y = c.crf(), torch.arange(c.sites), c.strings
        for features in ((), (2,), (3, 2)):
            unary = torch.randn(*features, *c.batch, c.sites, c.labels, generator=g, dtype=torch.float64)
            steps = torch.randn(*features, *c.batch, c.sites - 1, c.labels, c.labels, generator=g, dtype=torch.float64)
            shared = torch.randn(c.labels, c.labels, generator=g, dtype=torch.float64)
            nodes = torch.where(c.there, unary[..., n, y].movedim(-2, 0), 0.0).sum(-1)
            pairs = steps[..., n[:-1], y[:, :-1], y[:, 1:]].movedim(-2, 0)
            pairs = torch.where(c.there[..., 1:], pairs, 0.0).sum(-1)
            changes = torch.where(c.there[..., 1:], shared[y[:, :-1], y[:, 1:]][:, None, None], 0.0).sum(-1)
            p = c.log_prob.exp()
            p = p.reshape(len(p), *[1] * len(features), *c.batch)
            near(d.expectation(unary), (p * nodes).sum(0), c.name)
            near(d.expectation(unary, steps), (p * (nodes + pairs)).sum(0), c.name)
            near(d.expectation(unary, shared), (p * nodes).sum(0) + c.mean(changes), c.name)
        near(d.expectation(torch.ones(c.labels, dtype=torch.float64)), c.there.sum(-1).double(), c.name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_expectation(kind, g):
    """In the potentials and in the values, which are of labels and steps, or of steps that all sites share."""
    for shape in ((2, 3, 3), (3, 3)):
        ours, theirs = (Small(3, 3, kind, zeros=True).with_grad() for _ in range(2))
        values = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 3), shape)]
        score = Small.map(theirs, torch.zeros_like, unary=values[0].expand_as(theirs.unary), initial=None, final=None)
        score.transition = values[1]
        found, truth = ours.crf().expectation(*values), theirs.mean(score.raw)
        near(found, truth)
        weight = torch.randn(found.shape, generator=g, dtype=torch.float64)
        grads = (
            torch.autograd.grad((v * weight).sum(), [*k.potentials, *values])
            for v, k in ((found, ours), (truth, theirs))
        )
        for a, b in zip(*grads, strict=True):
            near(a, b)


def test_risk_and_its_gradient(g):
    for (kind, zeros), (labels, sites) in product(EACH, ((2, 1), (3, 3))):
        c = Small(labels, sites, kind, zeros)
        y = torch.randint(0, c.labels, (*c.batch, c.sites), generator=g)
        cost = torch.rand(c.labels, c.labels, generator=g, dtype=torch.float64)
        ours, theirs = c.with_grad(), c.with_grad()
        padded = torch.where(c.there, y, -100)
        d = ours.crf()
        for found, each in (
            (d.risk(padded), (c.strings[:, None, None] != y).double()),
            (d.risk(padded, cost), cost[c.strings[:, None, None], y]),
        ):
            truth = theirs.mean((each * c.there).sum(-1))
            near(found, truth, c.name)
            grads = (
                torch.autograd.grad(v.sum(), k.potentials, retain_graph=True, materialize_grads=True)
                for v, k in ((found, ours), (truth, theirs))
            )
            for a, b in zip(*grads, strict=True):
                near(a, b, c.name)
