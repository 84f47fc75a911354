"""The messages of LinearChainCRF by every path, its gradients of first and second order, and what it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_genexact as gx
from pyro_genexact.chains import messages as module
from pyro_genexact.chains.messages import LogMessages, MergedMessages, ScaledMessages, messages_of, select_rows
from pyro_genexact.semirings import Max, fold
from support.label_chains import EACH, KINDS, Small, agree, near

PATHS = {"rescaled every 8": (8, 1), "rescaled every 1": (1,), "logs": ()}


def check(c: Small, messages: Any) -> None:
    near(messages.log_partition, c.scores.logsumexp(0).flatten(), c.name)
    near(messages.marginals(), c.marginals.flatten(0, 1), c.name)
    near(messages.pair_marginals(), c.pair_marginals.flatten(0, 1), c.name)
    if c.transition.dim() == 2:
        weight = torch.linspace(-1.0, 2.0, len(messages.log_partition), dtype=torch.float64)
        near(
            messages.expected_steps(weight), torch.einsum("b,btij->ij", weight, c.pair_marginals.flatten(0, 1)), c.name
        )


@pytest.mark.parametrize("attempts", PATHS.values(), ids=PATHS)
def test_messages_by_every_path(cases, attempts):
    for c in cases:
        messages = messages_of(c.crf().inference.potentials(), attempts)
        assert isinstance(messages, ScaledMessages if attempts else LogMessages)
        check(c, messages)
        if (c.labels, c.sites) == (3, 3):
            agree(c.index(messages.sample(8000)), c.log_prob.flatten(1))


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_draws_each_of_many_rows(count):
    for kind, zeros in EACH:
        c = Small(3, 3, kind, zeros)
        chain = c.crf().inference.potentials()
        many = select_rows(chain, torch.arange(8).repeat(3000 // count))
        place = c.index(messages_of(many).sample(count))
        agree(place.reshape(count, -1, 8).flatten(0, 1), c.log_prob.flatten(1))


def wild(kind: str, zeros: bool) -> tuple[Small, Tensor]:
    """Rows that hate to change the label and are paid 0, 200 or 20000 nats for it at each site, and which is which."""
    c = Small(2, 9, kind, zeros)
    rate = torch.arange(20).reshape(c.batch) % 3
    pay = torch.tensor([0.0, 200.0, 2e4], dtype=torch.float64)[rate]
    away = (torch.arange(9).unsqueeze(-1) + torch.arange(2)) % 2
    sticky = c.transition - 1e4 * (1 - torch.eye(2, dtype=torch.float64))
    return c.map(torch.clone, unary=c.unary - pay[..., None, None] * away, transition=sticky), rate


def rows_by_path(messages: Any, rows: Tensor) -> dict[Any, list[int]]:
    if not isinstance(messages, MergedMessages):
        return {type(messages): rows.tolist()}
    found: dict[Any, list[int]] = {}
    for index, part in zip(messages.rows, messages.parts, strict=True):
        for path, its in rows_by_path(part, rows[index]).items():
            found.setdefault(path, []).extend(its)
    return found


@pytest.mark.parametrize(("kind", "zeros"), EACH)
def test_rows_take_the_path_that_they_need(kind, zeros):
    c, rate = wild(kind, zeros)
    chain = c.crf().inference.potentials()
    messages = messages_of(chain)
    check(c, messages)
    agree(c.index(messages.sample(4000)), c.log_prob.flatten(1))
    near(c.crf().entropy(), c.entropy)
    every_8, every_1 = ScaledMessages(chain, 8).exact, ScaledMessages(chain, 1).exact
    rate, length = rate.flatten(), c.there.sum(-1).flatten()
    assert every_8[(rate == 0) | (length < 2)].all() and every_1[(rate < 2) | (length < 2)].all()
    if not zeros:  # which may leave a row no choice
        assert not every_8[(rate == 1) & (length == 9)].any() and not every_1[(rate == 2) & (length > 1)].any()
    assert rows_by_path(messages, torch.arange(20))[LogMessages] == (~every_1).nonzero().squeeze(-1).tolist() != []


def test_ordinary_rows_never_take_the_log_path(monkeypatch):
    calls = []

    def logs(chain):
        calls.append(len(chain.unary))
        return LogMessages(chain)

    monkeypatch.setattr(module, "LogMessages", logs)
    for kind, zeros in EACH:
        c = Small(9, 64, kind, zeros, scale=3.0).map(lambda p, zeros=zeros: p.double() if zeros else p.float())
        d = c.crf()
        assert d.marginals.isfinite().all() and d.sample((2,)).shape == (2, 2, 65, 64)
    assert calls == []
    assert wild("shared", zeros=False)[0].crf().log_partition.isfinite().all()
    assert calls == [5]  # and this would have counted


def matching(c: Small, y: Tensor) -> Tensor:
    """log p (*batch) of the labels y (*batch, N) at every other site."""
    seen = torch.arange(c.sites) % 2 == 0
    fits = ((c.strings[:, None, None] == y) | ~seen | ~c.there).all(-1)
    return c.log_prob.masked_fill(~fits, -torch.inf).logsumexp(0)


# of a CRF d, another q, labels y (*batch, N); and the same of all strings, where index are the places of y
QUERIES = {
    "log_partition": (lambda d, q, y: d.log_partition, lambda c, q, y: c.scores.logsumexp(0)),
    "log_prob": (lambda d, q, y: d.log_prob(y), lambda c, q, y: c.log_prob.gather(0, c.index(y)[None])[0]),
    "max_log_prob": (lambda d, q, y: d.max_log_prob, lambda c, q, y: c.log_prob.amax(0)),
    "k_best": (lambda d, q, y: d.k_best(2)[1], lambda c, q, y: c.log_prob.sort(0, descending=True).values[:2]),
    "marginals": (lambda d, q, y: d.marginals, lambda c, q, y: c.marginals),
    "pair_marginals": (lambda d, q, y: d.pair_marginals, lambda c, q, y: c.pair_marginals),
    "entropy": (lambda d, q, y: d.entropy(), lambda c, q, y: c.entropy),
    "kl": (lambda d, q, y: kl_divergence(d, q.crf()), lambda c, q, y: c.mean(c.log_prob - q.log_prob)),
    "kl of the other": (lambda d, q, y: kl_divergence(q.crf(), d), lambda c, q, y: q.mean(q.log_prob - c.log_prob)),
    "cross_entropy": (lambda d, q, y: d.cross_entropy(q.crf()), lambda c, q, y: -c.mean(q.log_prob)),
    "risk": (
        lambda d, q, y: d.risk(y),
        lambda c, q, y: c.mean(((c.strings[:, None, None] != y) & c.there).sum(-1).double()),
    ),
    "log_marginal_of": (
        lambda d, q, y: d.log_marginal_of(y, torch.arange(y.shape[-1]) % 2 == 0),
        lambda c, q, y: matching(c, y),
    ),
    "as_autoregressive": (
        lambda d, q, y: d.as_autoregressive().log_prob(y),
        lambda c, q, y: c.log_prob.gather(0, c.index(y)[None])[0],
    ),
}


def other(c: Small) -> Small:
    """Another chain with the same zeros."""
    return c.map(lambda p: torch.where(p > -torch.inf, torch.cos(3 * p.clamp(min=-9.0)), p))


def weighed(values: Tensor) -> Tensor:
    """A sum of finite values with distinct weights."""
    weight = torch.linspace(-1.0, 2.0, values.numel(), dtype=torch.float64).reshape(values.shape)
    return torch.where(values > -torch.inf, values * weight, 0.0).sum()


def derive_equally(
    out: Tensor, ours: Sequence[Tensor], truth: Tensor, theirs: Sequence[Tensor], name: str = ""
) -> None:
    """A value equals the truth, and so do its gradients of first and second order in leaves."""
    near(out, truth, name)
    for _ in range(2):
        alone, found, true = (
            torch.autograd.grad(
                weighed(v), leaves, retain_graph=True, create_graph=again, allow_unused=True, materialize_grads=True
            )
            for v, leaves, again in ((out, ours, False), (out, ours, True), (truth, theirs, True))
        )
        for p, g in zip((*alone, *found), (*true, *true), strict=True):
            near(p, g, name)
        out, truth = (torch.cat([g.flatten() for g in grads]) for grads in (found, true))
        if not out.requires_grad:
            break


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query", QUERIES)
def test_gradients_and_their_gradients(query, kind):
    """Equal to those of all strings, to second order; with zeros, too."""
    for labels, sites, zeros in ((3, 3, True), (2, 3, False), (2, 2 if query == "pair_marginals" else 1, True)):
        c = Small(labels, sites, kind, zeros)
        q, y = other(c), c.strings[c.log_prob.argmax(0)]
        ours, theirs = c.with_grad(), c.with_grad()
        out, truth = QUERIES[query][0](ours.crf(), q, y), QUERIES[query][1](theirs, q, y)
        derive_equally(out, ours.potentials, truth, theirs.potentials, c.name)


@pytest.mark.parametrize("name", ["unary", "transition", "initial", "final"])
def test_gradients_of_one_kind_of_potentials_alone(name):
    c = Small(3, 3, "shared", zeros=True)
    ours, theirs = (c.map(torch.clone, **{name: getattr(c, name).clone().requires_grad_()}) for _ in range(2))
    for query in ("log_partition", "marginals", "pair_marginals", "entropy"):
        out, truth = QUERIES[query][0](ours.crf(), c, c), QUERIES[query][1](theirs, c, c)
        derive_equally(out, [getattr(ours, name)], truth, [getattr(theirs, name)], query)


@pytest.mark.parametrize("query", ["log_partition", "log_prob", "marginals", "entropy", "kl"])
def test_gradients_where_ends_are_made_from_the_unary_potentials(query):
    c = Small(2, 3, "shared", zeros=False)
    q, y = other(c), c.strings[c.log_prob.argmax(0)]
    ours, theirs = c.with_grad(), c.with_grad()
    for one in (ours, theirs):
        one.initial, one.final = 2 * one.unary[..., 0, :], one.unary[..., 0, :].sin()
    leaves = ([one.unary, one.transition] for one in (ours, theirs))
    out, truth = QUERIES[query][0](ours.crf(), q, y), QUERIES[query][1](theirs, q, y)
    derive_equally(out, next(leaves), truth, next(leaves))


@pytest.mark.parametrize("query", ["log_partition", "entropy", "kl", "marginals"])
def test_finite_differences(query):
    c = Small(2, 3, "shared", zeros=True)

    def of(unary, transition, initial, final):
        d = gx.LinearChainCRF(unary, transition, initial=initial, final=final, lengths=c.lengths)
        return QUERIES[query][0](d, other(c), c)

    leaves = c.with_grad().potentials
    assert gradcheck(of, leaves, fast_mode=True) and gradgradcheck(of, leaves, fast_mode=True)


class Made(TorchDispatchMode):
    """Counts the numbers that are written down."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("query", ["log_partition", "marginals", "pair_marginals", "entropy", "kl"])
def test_cost_is_linear_in_the_number_of_sites(query):
    """Of gradients of first and second order, with a transition for each step: no gradient of a part is as large as the whole."""
    made = []
    for sites in (10, 20, 30):
        leaves = [torch.zeros(sites, 2, requires_grad=True), torch.zeros(sites - 1, 2, 2, requires_grad=True)]
        q = SimpleNamespace(crf=partial(gx.LinearChainCRF, torch.zeros(sites, 2), torch.eye(2)))
        with Made() as counted:
            out = QUERIES[query][0](gx.LinearChainCRF(*leaves), q, None)
            grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
        made.append(counted.count)
    assert made[2] - made[1] < 1.05 * (made[1] - made[0]), made


@pytest.mark.parametrize("fillers", [[torch.nan, torch.inf, -torch.inf], [1e30, 1e30, -1e30]], ids=str)
@pytest.mark.parametrize("query", QUERIES)
def test_padding_gets_no_gradient_and_gives_none(query, fillers):
    for kind in KINDS:
        c = Small(3, 3, kind, zeros=True)
        q, y = other(c), c.strings[c.log_prob.argmax(0)]
        filled = c.with_grad()
        with torch.no_grad():
            filled.unary[~c.there] = torch.tensor(fillers, dtype=torch.float64)
            if kind == "steps":
                filled.transition[~c.there[0, :, 1:]] = fillers[0]
            if c.final is not None:
                filled.final[0] = fillers[1]  # of the rows of length 0
        leaves = c.with_grad()
        out, truth = (QUERIES[query][0](k.crf(validate_args=False), q, y) for k in (filled, leaves))
        near(out, truth, c.name)
        for create_graph in (True, False):
            found, true = (
                torch.autograd.grad(weighed(v), k.potentials, create_graph=create_graph, retain_graph=True)
                for v, k in ((out, filled), (truth, leaves))
            )
            for p, g in zip(found, true, strict=True):
                near(p, g, f"{c.name} create_graph={create_graph}")
            assert (found[0][~c.there] == 0).all()


@pytest.fixture
def computed(monkeypatch):
    """How many rows messages were computed of, call by call."""
    from pyro_genexact.chains import log_partition

    rows: list[int] = []

    def counted(chain, *args, **options):
        rows.append(len(chain.unary))
        return messages_of(chain, *args, **options)

    monkeypatch.setattr(log_partition, "messages_of", counted)
    return rows


def test_messages_are_computed_once_and_shared_by_all_that_expand(computed):
    c = Small(3, 4, "steps", zeros=True)
    d = c.with_grad().crf()
    wide = d.expand((5, *c.batch))
    y = wide.sample((3,))
    wide.log_prob(y).sum().backward()
    d.log_prob(y[0, 0]).sum().backward()
    with torch.no_grad():
        assert wide.marginals.shape == (5, *c.batch, 4, 3) and wide.log_partition.stride()[0] == 0
        assert d.pair_marginals.shape == (*c.batch, 3, 3, 3)
    assert wide.unary is d.unary and wide.expand((2, 5, *c.batch)).transition is d.transition
    assert computed == [10]
    assert d.given(y[0, 0]).log_partition.isfinite().all()  # another distribution
    assert computed == [10, 10]


@pytest.mark.parametrize("name", ["unary", "transition", "initial", "final", "lengths"])
def test_a_change_in_place_is_seen(name, computed):
    c = Small(3, 3, "shared", zeros=False)
    d, y = c.crf(), c.strings[5]
    wide = d.expand((2, *c.batch))
    before = d.log_prob(y)
    near(d.log_prob(y), before)
    assert len(computed) == 1
    if name == "lengths":
        d.lengths.copy_(torch.tensor([3, 0, 1, 2]))
        c = c.map(torch.clone, lengths=d.lengths)
    else:
        getattr(d, name)[..., 1] -= 3.0  # the potentials of c themselves
        c = c.map(torch.clone)
    for same in (d, wide):
        near(same.log_prob(y), (c.raw - c.scores.logsumexp(0))[5].expand(same.batch_shape))
        near(same.entropy(), c.entropy.expand(same.batch_shape))
        near(same.marginals, c.marginals.expand(*same.batch_shape, -1, -1))
        assert (same.mode == c.strings[c.log_prob.argmax(0)]).all()
    agree(c.index(d.sample((4000,))), c.log_prob)
    assert (d.log_prob(y) - before).abs().max() > 0.1 and len(computed) == 2


def test_the_best_labels_are_found_once_until_potentials_change(monkeypatch):
    from pyro_genexact.chains import inference as chain_inference

    folds = []
    monkeypatch.setattr(
        chain_inference, "fold", lambda semiring, chain: folds.append(semiring) or fold(semiring, chain)
    )
    c = Small(3, 3, "shared", zeros=False)
    for _ in range(2):
        d = c.crf() if not folds else d  # noqa: F821
        assert (d.mode == c.strings[c.log_prob.argmax(0)]).all()
        near(d.max_log_prob, c.log_prob.amax(0))
        assert (d.expand((2, *c.batch)).mode == d.mode).all()
        d.unary[..., 1] -= 3.0
        c = c.map(torch.clone)
    assert [type(s) for s in folds] == [Max, Max]


@pytest.mark.parametrize("kind", KINDS)
def test_two_backward_passes_through_one_distribution(kind):
    c = Small(3, 3, kind, zeros=True)
    leaf, y = c.with_grad(), c.strings[c.log_prob.argmax(0)]
    d = leaf.crf()
    first, second = d.log_prob(y), d.log_prob(y)
    once = torch.autograd.grad(first.sum(), leaf.potentials)
    twice = torch.autograd.grad((2 * second).sum() + d.entropy().sum() * 0, leaf.potentials)
    for a, b in zip(once, twice, strict=True):
        near(2 * a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_sample_drawn_without_grad_is_scored_with_it(mode):
    for kind in KINDS:
        c = Small(3, 3, kind, zeros=True)
        leaf, truth = c.with_grad(), c.with_grad()
        d = leaf.crf()
        with mode():
            y = d.sample()
            value = d.log_prob(y)
            assert d.marginals.shape == (*c.batch, 3, 3)  # remembered, too
        near(d.log_prob(y).detach(), value.clone())
        found = torch.autograd.grad(d.log_prob(y).sum() + d.marginals.square().sum(), leaf.potentials)
        log_prob = truth.log_prob.gather(0, c.index(y.clone())[None])
        true = torch.autograd.grad(log_prob.sum() + truth.marginals.square().sum(), truth.potentials)
        for a, b in zip(found, true, strict=True):
            near(a, b)
    with torch.inference_mode():
        c = Small(3, 3, "shared", zeros=True)
        d = c.crf()
        before = d.log_partition.clone()
        near(d.log_partition, c.scores.logsumexp(0))
        d.unary[..., 0] += 2.0
        near(d.log_partition, c.map(torch.clone).scores.logsumexp(0))
        assert (d.log_partition - before).abs().max() > 0.1
