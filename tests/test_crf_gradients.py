"""The messages of LinearChainCRF by every path, its gradients of first and second order, and what it remembers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from label_chains import KINDS, Small, agree, all_sizes, near
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import kl_divergence

import pyro_genexact as gx
from pyro_genexact.distributions import messages as module
from pyro_genexact.distributions.messages import Logs, Merged, Scaled, messages_of, rows

EACH = list(product(KINDS, (False, True)))
PATHS = {"rescaled every 8": (8, 1), "rescaled every 1": (1,), "logs": ()}


@pytest.fixture(params=EACH, ids=str)
def cases(request):
    return all_sizes(*request.param)


def check(c: Small, messages: Any) -> None:
    near(messages.log_partition, c.scores.logsumexp(0).flatten(), c.name)
    near(messages.nodes(), c.marginals.flatten(0, 1), c.name)
    near(messages.pairs(), c.pair_marginals.flatten(0, 1), c.name)
    if c.transition.dim() == 2:
        weight = torch.linspace(-1.0, 2.0, len(messages.log_partition), dtype=torch.float64)
        near(messages.pair_total(weight), torch.einsum("b,btij->ij", weight, c.pair_marginals.flatten(0, 1)), c.name)


@pytest.mark.parametrize("attempts", PATHS.values(), ids=PATHS)
def test_messages_by_every_path(cases, attempts):
    for c in cases:
        messages = messages_of(c.crf()._chain(), attempts)
        assert isinstance(messages, Scaled if attempts else Logs)
        check(c, messages)
        if (c.labels, c.sites) == (3, 4):
            agree(c.index(messages.sample(20000)), c.log_prob.flatten(1))


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_draws_each_of_many_rows(count):
    for kind, zeros in EACH:
        c = Small(3, 3, kind, zeros)
        chain = c.crf()._chain()
        many = rows(chain, torch.arange(8).repeat(6000 // count))
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
    if not isinstance(messages, Merged):
        return {type(messages): rows.tolist()}
    found: dict[Any, list[int]] = {}
    for index, part in zip(messages.rows, messages.parts, strict=True):
        for path, its in rows_by_path(part, rows[index]).items():
            found.setdefault(path, []).extend(its)
    return found


@pytest.mark.parametrize(("kind", "zeros"), EACH)
def test_rows_take_the_path_that_they_need(kind, zeros):
    c, rate = wild(kind, zeros)
    chain = c.crf()._chain()
    messages = messages_of(chain)
    check(c, messages)
    agree(c.index(messages.sample(20000)), c.log_prob.flatten(1))
    near(c.crf().entropy(), c.entropy)
    every_8, every_1 = Scaled(chain, 8).exact, Scaled(chain, 1).exact
    rate, length = rate.flatten(), c.there.sum(-1).flatten()
    assert every_8[(rate == 0) | (length < 2)].all() and every_1[(rate < 2) | (length < 2)].all()
    if not zeros:  # which may leave a row no choice
        assert not every_8[(rate == 1) & (length == 9)].any() and not every_1[(rate == 2) & (length > 1)].any()
    assert rows_by_path(messages, torch.arange(20))[Logs] == (~every_1).nonzero().squeeze(-1).tolist() != []


@pytest.mark.parametrize("every", [8, 1])
def test_rows_that_are_exact_are(every):
    """The certificate, at any range: what it lets pass equals the recursion in log space."""
    kept = 0
    for scale, (kind, zeros) in product((10.0, 100.0, 300.0), EACH):
        c = Small(3, 20, kind, zeros, scale=scale)
        chain = c.crf()._chain()
        fast, slow = Scaled(chain, every), Logs(chain)
        near(fast.log_partition[fast.exact], slow.log_partition[fast.exact], c.name)
        near(fast.nodes()[fast.exact], slow.nodes()[fast.exact], c.name)
        near(fast.pairs()[fast.exact], slow.pairs()[fast.exact], c.name)
        kept += int(fast.exact.sum())
    assert 0 < kept < 3 * 6 * 42


def test_ordinary_rows_never_take_the_log_path(monkeypatch):
    calls = []

    def logs(chain):
        calls.append(len(chain.unary))
        return Logs(chain)

    monkeypatch.setattr(module, "Logs", logs)
    for (kind, zeros), dtype in product(EACH, (torch.float32, torch.float64)):
        c = Small(9, 64, kind, zeros, scale=3.0).map(lambda p, dtype=dtype: p.to(dtype))
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


@pytest.mark.parametrize(("kind", "zeros"), EACH)
@pytest.mark.parametrize("query", QUERIES)
def test_gradients_and_their_gradients(query, kind, zeros):
    """Equal to those of all strings, to second order; with zeros, too."""
    for labels, sites in ((3, 3), (2, 2 if query == "pair_marginals" else 1)):
        c = Small(labels, sites, kind, zeros)
        q, y = other(c), c.strings[c.log_prob.argmax(0)]
        ours, theirs = c.with_grad(), c.with_grad()
        out, truth = QUERIES[query][0](ours.crf(), q, y), QUERIES[query][1](theirs, q, y)
        near(out, truth, c.name)
        for _ in range(2):
            found, true = (
                torch.autograd.grad(
                    weighed(v), k.potentials, create_graph=True, allow_unused=True, materialize_grads=True
                )
                for v, k in ((out, ours), (truth, theirs))
            )
            for p, g in zip(found, true, strict=True):
                near(p, g, c.name)
            out, truth = (torch.cat([g.flatten() for g in grads]) for grads in (found, true))
            if not out.requires_grad:
                break


@pytest.mark.parametrize("query", ["log_partition", "log_prob", "entropy", "kl", "risk", "marginals"])
def test_finite_differences(query):
    for kind in KINDS:
        c = Small(2, 3, kind, zeros=True)
        q, y = other(c), c.strings[c.log_prob.argmax(0)]
        names = [name for name in ("unary", "transition", "initial", "final") if getattr(c, name) is not None]

        def of(*potentials, c=c, q=q, y=y, names=names):
            d = gx.LinearChainCRF(**dict(zip(names, potentials, strict=True)), lengths=c.lengths)
            return QUERIES[query][0](d, q, y)

        leaves = c.with_grad().potentials
        assert gradcheck(of, leaves, fast_mode=True)
        assert kind == "shared" or gradgradcheck(of, leaves, fast_mode=True)


@pytest.mark.parametrize("fillers", [[torch.nan, 1e30], [torch.inf, -torch.inf]], ids=str)
@pytest.mark.parametrize("query", QUERIES)
def test_padding_gets_no_gradient_and_gives_none(query, fillers):
    for kind in KINDS:
        c = Small(3, 3, kind, zeros=True)
        q, y = other(c), c.strings[c.log_prob.argmax(0)]
        filled = c.with_grad()
        with torch.no_grad():
            filled.unary[~c.there] = torch.tensor([*fillers, -1e30], dtype=torch.float64)
            if kind == "steps":
                filled.transition[~c.there[0, :, 1:]] = fillers[-1]
            if c.final is not None:
                filled.final[0] = fillers[0]  # of the rows of length 0
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
    from pyro_genexact.distributions import crf

    rows: list[int] = []

    def counted(chain, *args):
        rows.append(len(chain.unary))
        return messages_of(chain, *args)

    monkeypatch.setattr(crf, "messages_of", counted)
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
    agree(c.index(d.sample((20000,))), c.log_prob)
    assert (d.log_prob(y) - before).abs().max() > 0.1 and len(computed) == 2


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
