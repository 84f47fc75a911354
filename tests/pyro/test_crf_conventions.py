"""Chains of labels as Pyro's distributions: shapes, plates, validation, copies, torch.func, traces, devices."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO
from torch.distributions import kl_divergence
from torch.func import grad, hessian, jacrev, vmap

import pyro_genexact as gx
from support.checks import close
from support.pyro_chains import (
    LENGTHS,
    ROWS,
    STRINGS,
    TAGS,
    N,
    V,
    X,
    as_often,
    crf_of,
    gradients,
    labels,
    log_prob_by_hand,
    module,
    parts_of,
    potentials,
    tagger,
)
from support.pyro_models import nothing
from support.values import params_of

# --- conventions


def test_shapes_and_flags():
    d = crf_of(potentials(), LENGTHS)
    assert (d.batch_shape, d.event_shape, d.event_dim) == ((ROWS,), (N,), 1)
    assert d.shape((5,)) == (5, ROWS, N) and d((5,)).shape == (5, ROWS, N) and d().dtype == torch.long
    assert crf_of(potentials(), LENGTHS * 0 + 2).has_enumerate_support and not d.has_enumerate_support  # ragged
    assert (
        not d.has_rsample
        and crf_of(potentials()).has_enumerate_support
        and d.support.is_discrete
        and d.support.event_dim == 1
    )
    for kind in (type(d).support, crf_of(potentials()).support):
        assert kind.is_discrete and kind.event_dim == 1
    assert d.support.check(TAGS).all() and d.support.check(TAGS + V).tolist() == (LENGTHS == 0).tolist()
    assert repr(d.support) == f"LabelStrings(num_labels={V})"
    wide = d.expand_by((5,))
    assert type(wide) is type(d) and wide.shape() == (5, ROWS, N) and d.batch_shape == (ROWS,)
    assert torch.unique(wide.sample()[:, 0], dim=0).shape[0] > 1  # rows of their own noise
    with pytest.raises(ValueError, match="broadcasts to"):
        d.expand((3,))
    with pytest.raises(ValueError, match="value"):
        crf_of(potentials(), validate_args=False).log_prob(TAGS[:, :1])


def test_independent_and_masked():
    parts = potentials()
    truth, keep = log_prob_by_hand(parts, TAGS, LENGTHS), torch.arange(ROWS) % 2 == 0
    d = crf_of(parts, LENGTHS)
    whole = d.to_event(1)
    assert (whole.batch_shape, whole.event_shape, whole.support.event_dim) == ((), (ROWS, N), 2)
    close(whole.log_prob(TAGS), truth.sum())
    assert whole.to_event(-1) is d and whole.sample((2,)).shape == (2, ROWS, N)
    close(d.mask(keep).log_prob(TAGS), truth * keep)
    assert crf_of(parts).mask(keep).has_enumerate_support and (d.mask(False).log_prob(TAGS) == 0).all()
    close(d.mask(keep).expand((2, ROWS)).log_prob(TAGS), (truth * keep).expand(2, ROWS))
    q = crf_of(potentials(seed=20), LENGTHS)
    strings = STRINGS[:, None]
    log_p, log_q = (log_prob_by_hand(p, strings, LENGTHS) for p in (parts, potentials(seed=20)))
    kl = (log_p.exp() * (log_p - log_q)).sum(0) / V ** (N - LENGTHS)
    close(kl_divergence(d, q), kl)
    close(kl_divergence(d.mask(keep), q.mask(keep)), kl * keep)
    close(kl_divergence(whole, q.to_event(1)), kl.sum())
    close(kl_divergence(d.expand((2, ROWS)), q), kl.expand(2, ROWS))
    close(kl_divergence(dist.Delta(TAGS, event_dim=1), d), -truth)


def test_plates_of_two_dims():
    """A row of potentials for each of 2 x 3, and the same row for all."""
    parts = potentials()
    unary = parts[0].reshape(2, 3, N, V)
    for unary_ in (unary, unary[:1, :1], unary[0, 0]):
        d = gx.LinearChainCRF(unary_, parts[1])

        def model(d=d):
            with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
                return pyro.sample("tags", d)

        trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
        y = trace.nodes["tags"]["value"]
        assert y.shape == (2, 3, N) and trace.nodes["tags"]["log_prob"].shape == (2, 3)
        flat = unary_.expand(2, 3, N, V).reshape(6, N, V)
        zero = torch.zeros(V, dtype=torch.float64)
        truth = log_prob_by_hand([flat, parts[1], zero, zero], y.reshape(6, N))
        close(trace.nodes["tags"]["log_prob"], truth.reshape(2, 3))


@pytest.mark.parametrize("validate", [True, False])
def test_validation_is_handed_on(validate):
    with pyro.validation_enabled(not validate):
        d = crf_of(potentials(), validate_args=validate)
        wrong = labels(lengths=None) + 10
        for other in (
            d,
            d.expand((2, ROWS)),
            d.expand_by((2,)),
            d.given(labels(lengths=None), torch.zeros(ROWS, N) > 0),
        ):
            assert other._validate_args is validate
            if validate:
                with pytest.raises(ValueError, match="support"):
                    other.log_prob(wrong)
            else:
                assert (other.log_prob(wrong) == -torch.inf).all()
        assert d.as_autoregressive()._validate_args is validate


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda d: pickle.loads(pickle.dumps(d)), "copy": copy.copy}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_of_their_own(way, used):
    parts = [p.detach() for p in potentials()]
    d, truth = crf_of(parts, LENGTHS), log_prob_by_hand(parts, TAGS, LENGTHS)
    if used:
        d.log_prob(TAGS), d.sample(), d.marginals, d.entropy(), d.expand((2, ROWS)).sample()
    new = COPIES[way](d)
    close(new.log_prob(TAGS), truth)
    for step in range(3):  # potentials changed in place are noticed, on either side
        for owner in (new, d):
            owner.unary[0] += 0.5 * torch.arange(V) * (step + 1)
            for one in (d, new):
                now = [one.unary, one.transition, one.initial, one.final]
                close(one.log_prob(TAGS), log_prob_by_hand(now, TAGS, LENGTHS))
    close(new.expand((2, ROWS)).marginals.sum(-1)[1], (torch.arange(N) < LENGTHS[:, None]).double())


def test_torch_func_over_potentials():
    """vmap over rows, grad, jacobian and hessian of the log-probability equal the loops and the sum over strings."""
    parts, y = [p.detach() for p in potentials()], labels(lengths=None)

    def log_prob(unary, transition, y):
        return gx.LinearChainCRF(unary, transition, initial=parts[2], final=parts[3]).log_prob(y)

    def by_hand(unary, transition):
        return log_prob_by_hand([unary, transition, *parts[2:]], y).sum()

    with pyro.validation_enabled(False):
        close(vmap(log_prob, (0, None, 0))(parts[0], parts[1], y), log_prob_by_hand(parts, y))
        many = torch.stack([parts[1], 2 * parts[1]])
        both = torch.stack([log_prob_by_hand([parts[0], t, *parts[2:]], y) for t in many])
        close(vmap(log_prob, (None, 0, None))(parts[0], many, y), both)
        each = vmap(grad(log_prob, (0, 1)), (0, None, 0))(parts[0], parts[1], y)
        whole = torch.autograd.functional.jacobian(by_hand, tuple(parts[:2]))
        close(each[0], whole[0])
        close(each[1].sum(0), whole[1])
        close(grad(lambda t: log_prob(parts[0], t, y).sum())(parts[1]), whole[1])
        curved = hessian(lambda t: log_prob(parts[0], t, y).sum())(parts[1])
        close(curved, torch.autograd.functional.hessian(lambda t: by_hand(parts[0], t), parts[1]))

        def query(name):
            def one(unary, transition):
                found = getattr(gx.LinearChainCRF(unary, transition), name)
                return found if isinstance(found, torch.Tensor) else found()

            return one

        for name in ("marginals", "pair_marginals", "entropy", "log_partition"):
            rows = vmap(query(name), (0, None))(parts[0], parts[1])
            close(rows, query(name)(parts[0], parts[1]))
            leaf = parts[1].clone().requires_grad_()
            slow = torch.autograd.functional.jacobian(lambda t, name=name: query(name)(parts[0], t), leaf)
            close(jacrev(lambda t, name=name: query(name)(parts[0], t))(parts[1]), slow)


def test_vmap_of_best_strings_draws_and_divergences():
    """Row by row, each of its length, as the loop says; draws of rows that are independent as often as their masses say."""
    unary, transition = (p.detach() for p in potentials()[:2])
    mapped = partial(vmap, randomness="different")

    def of(query):
        return lambda u, n: query(gx.LinearChainCRF(u, transition, lengths=n))

    def kl(d):
        return kl_divergence(d, gx.LinearChainCRF(d.unary.cos(), transition, lengths=d.lengths))

    for query in (lambda d: d.mode, lambda d: d.max_log_prob, lambda d: d.k_best(3)[1].movedim(0, -1), kl):
        close(mapped(of(query))(unary, LENGTHS), query(gx.LinearChainCRF(unary, transition, lengths=LENGTHS)))
    draws = mapped(of(lambda d: d.sample((3000,))), out_dims=1)(unary[[0, 0, 1]], torch.tensor([4, 4, 2]))
    zero = torch.zeros(V, dtype=torch.float64)
    p = log_prob_by_hand([unary[[0, 1]], transition, zero, zero], STRINGS[:, None], torch.tensor([4, 2])).exp()
    p[:, 1] *= (STRINGS[:, 2:] == 0).all(-1)
    as_often(draws, p[:, [0, 0, 1]])
    assert (draws[:, 0] != draws[:, 1]).any(-1).double().mean() > 0.5
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(of(lambda d: d.sample()))(unary, LENGTHS)
    other = mapped(lambda u, n: kl_divergence(of(lambda d: d)(u, n), gx.LinearChainCRF(u, transition)))(unary, LENGTHS)
    assert torch.equal(other == torch.inf, LENGTHS < N)  # no string of one is as long as one of the other


def test_traced_log_prob():
    """By ``torch.jit.trace``, at other potentials, labels and lengths than it was traced at."""

    def log_prob(y, lengths, *parts):
        return crf_of(parts, lengths).log_prob(y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks are traced as what they found
        traced = torch.jit.trace(log_prob, (TAGS, LENGTHS, *potentials()), check_trace=False)
    y, lengths, parts = labels(seed=8, lengths=LENGTHS.flip(0)), LENGTHS.flip(0), potentials(seed=20)
    found, truth = traced(y, lengths, *parts), log_prob_by_hand(parts, y, lengths)
    close(found, truth)
    for f, t in zip(gradients(found.sum(), parts), gradients(truth.sum(), parts), strict=True):
        close(f, t)


def test_jit_trace_elbo():
    """Compiled at one batch, right at another."""
    net, objective = module(), JitTrace_ELBO(ignore_jit_warnings=True)

    def model(x, lengths, y):
        pyro.module("net", net)
        with pyro.plate("data", ROWS):
            pyro.sample("tags", net(x, lengths), obs=y)

    for x, lengths in ((X, LENGTHS), (2 * X, LENGTHS.flip(0))):
        y = labels(lengths=lengths)
        truth = -log_prob_by_hand(parts_of(net, params_of(net), x), y, lengths).sum()
        grads = gradients(truth, list(net.parameters()))
        net.zero_grad()
        assert objective.loss_and_grads(model, nothing, x, lengths, y) == pytest.approx(truth.item(), abs=1e-9)
        for p, g in zip(net.parameters(), grads, strict=True):
            close(p.grad, g)


def test_default_device_is_nowhere_used():
    """With everything real on the CPU and the default device ``meta``."""
    parts, lengths, y = potentials(), LENGTHS, TAGS
    with torch.device("meta"):
        d = crf_of(parts, lengths)
        total = (
            poutine.trace(tagger(parts)).get_trace().log_prob_sum(lambda name, _: name == "tags")
        )  # plates have sites
        q = crf_of([2 * p for p in parts], lengths)
        independent = dist.Categorical(logits=parts[0]).to_event(1)
        for pair in ((d, crf_of(parts)), (crf_of(parts), d)):
            with pytest.raises(ValueError, match="of equal lengths; got"):
                kl_divergence(*pair)
        results = [
            kl_divergence(d, q),
            kl_divergence(d, independent),
            kl_divergence(independent, d),
            d.given(y.clamp(min=0), y == 0).log_partition,
            d.mode,
            d.k_best(2)[1],
            d.risk(y),
            d.as_autoregressive().log_prob(y),
            crf_of(parts).enumerate_support(),
        ]
    close(total, log_prob_by_hand(parts, TAGS, LENGTHS).sum())
    assert all(r.device.type == "cpu" for r in results)
