"""Latent chains of labels: a CRF as prior, as structured guide and summed out, against sums over all label strings."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pyro.infer.trace_mean_field_elbo as mean_field
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.importance import vectorized_importance_weights
from torch.distributions import kl_divergence

import pyro_genexact as gx
from support.checks import close
from support.latent_chains import (
    HMM,
    LENGTHS,
    ROWS,
    SD,
    Y,
    elbo_by_hand,
    free,
    guided,
    lengths_or_none,
    log_q_by_hand,
    optimised,
    plain,
    sampled,
)
from support.pyro_chains import STRINGS, N, V, as_often, crf_of, gradients
from support.pyro_models import nothing, same_loss_and_gradient


def summed(hmm, lengths=None):
    """The chain summed out: a factor of the evidence."""

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS):
            pyro.factor("y", hmm.posterior(lengths).log_partition)

    return model


@lengths_or_none
def test_log_partition_is_the_evidence(lengths):
    """As all strings, Pyro's enumerated chain and Pyro's HMM say, with all gradients."""
    hmm = HMM()
    truth = hmm.evidence_by_hand(lengths)
    close(hmm.posterior(lengths).log_partition, truth)
    close(hmm.prior(lengths=lengths).log_partition, torch.zeros(ROWS, dtype=torch.float64))
    if lengths is None:
        theirs = dist.DiscreteHMM(hmm.start, hmm.log_step, dist.Normal(hmm.mean, SD), duration=N)
        close(theirs.log_prob(Y), truth)
    hidden = hmm.hidden(lengths)
    close(hidden.log_prob(Y), truth)
    assert kl_divergence(hidden.posterior(Y), hmm.posterior(lengths)).abs().max() < 1e-12
    assert kl_divergence(hidden.prior(), hmm.prior(lengths=lengths)).abs().max() < 1e-12
    enumerated = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(plain(hmm, lengths), nothing)
    close(enumerated, -truth.sum())
    same_loss_and_gradient(Trace_ELBO(), summed(hmm, lengths), nothing, -truth.sum(), list(hmm.leaves))
    for a, b in zip(gradients(enumerated, list(hmm.leaves)), hmm.leaves, strict=True):
        close(a, b.grad, 1e-9)


def test_gradient_of_the_evidence_is_the_mean_over_the_posterior():
    """Fisher's identity, with the posterior's marginals from all strings."""
    hmm = HMM()
    p = hmm.joint_by_hand(lengths=LENGTHS).softmax(0)
    one_hot = torch.nn.functional.one_hot(STRINGS, V).double()
    marginals = torch.einsum("sr,stv->rtv", p, one_hot) * (torch.arange(N) < LENGTHS[:, None]).unsqueeze(-1)
    posterior = hmm.posterior(LENGTHS)
    close(posterior.marginals, marginals)
    (found,) = gradients(posterior.log_partition.sum(), [hmm.mean])
    close(found, (marginals * (Y.unsqueeze(-1) - hmm.mean)).sum((0, 1)) / SD**2)


def test_learning_by_the_log_partition_follows_enumeration():
    """Adam's losses, step by step, and the same parameters in the end."""
    ours, theirs = HMM(), HMM()
    paths = []
    for model, hmm in ((summed(ours), ours), (plain(theirs), theirs)):
        adam, losses = torch.optim.Adam(hmm.leaves, lr=0.1), []
        objective = Trace_ELBO() if hmm is ours else TraceEnum_ELBO(max_plate_nesting=1)
        for _ in range(12):
            adam.zero_grad()
            losses.append(objective.loss_and_grads(model, nothing))
            adam.step()
        paths.append(torch.tensor(losses, dtype=torch.float64))
    close(*paths, 1e-7)
    assert paths[0][-1] < paths[0][0] - 1
    for a, b in zip(ours.leaves, theirs.leaves, strict=True):
        close(a, b, 1e-6)


# --- the chain as a structured guide


def analytic(hmm, q, lengths=None):
    """z ~ prior, and the mean of log p(y | z) under the guide as a factor: no term of the ELBO is sampled."""

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS):
            pyro.sample("z", hmm.prior(lengths=lengths))
            pyro.factor("y", q.expectation(hmm.emissions()))

    return model


def turned(hmm, q, lengths=None):
    """p(z, y) as p(y) p(z | y)."""

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS):
            posterior = hmm.posterior(lengths)
            pyro.sample("z", posterior)
            pyro.factor("y", posterior.log_partition)

    return model


@pytest.fixture
def divergences(monkeypatch):
    """The divergences that Pyro asked for."""
    found, ask = [], mean_field.kl_divergence

    def counted(p, q):
        found.append(ask(p, q))
        return found[-1]

    monkeypatch.setattr(mean_field, "kl_divergence", counted)
    return found


@lengths_or_none
@pytest.mark.parametrize("written", [analytic, turned])
@pytest.mark.parametrize("particles", [1, 3])
def test_exact_elbo_of_a_structured_guide(lengths, written, particles, divergences):
    """Whatever is drawn: value and gradients, in the model and in the guide."""
    hmm, parts = HMM(), free()
    truth = -elbo_by_hand(hmm, parts, lengths)
    expected = gradients(truth, [*hmm.leaves, *parts])
    objective = TraceMeanField_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    q = crf_of(parts, lengths)
    with pyro.validation_enabled(False):  # with it, Pyro refuses sites that are not reparameterised
        loss = objective.loss_and_grads(written(hmm, q, lengths), guided(q))
    assert loss == pytest.approx(truth.item(), abs=1e-9)
    assert [kl.shape for kl in divergences] == [(ROWS,) if particles == 1 else (particles, ROWS)]
    for leaf, g in zip([*hmm.leaves, *parts], expected, strict=True):
        close(leaf.grad, g, 1e-9)


def test_pyro_refuses_discrete_sites_of_that_objective_when_it_validates():
    hmm, q = HMM(), crf_of(free())
    with pyro.validation_enabled(True), pytest.raises(NotImplementedError, match="reparameterized"):
        TraceMeanField_ELBO().loss(analytic(hmm, q), guided(q))


def test_mean_elbo_over_all_subsamples():
    hmm, parts = HMM(), free()

    def parted(index):
        return gx.LinearChainCRF(parts[0][index], parts[1][index], initial=parts[2][index], lengths=LENGTHS[index])

    def model(index):
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS, subsample=index) as i:
            pyro.sample("z", hmm.prior(len(i), LENGTHS[i]))
            pyro.factor("y", parted(i).expectation(hmm.emissions(Y[i])))

    def guide(index):
        with pyro.plate("data", ROWS, subsample=index) as i:
            pyro.sample("z", parted(i))

    with pyro.validation_enabled(False):
        subsets = [torch.tensor(i) for i in itertools.combinations(range(ROWS), 2)]
        losses = [TraceMeanField_ELBO().differentiable_loss(model, guide, i) for i in subsets]
    ends = [torch.zeros_like(p) if i == 3 else p for i, p in enumerate(parts)]
    mean, truth = torch.stack(losses).mean(), -elbo_by_hand(hmm, ends, LENGTHS)
    close(mean, truth)
    for a, b in zip(gradients(mean, parts), gradients(truth, parts), strict=True):
        close(a, b)


def test_the_best_guide_is_the_posterior():
    hmm, parts = HMM(), free(scale=0.3)

    def loss():
        q = crf_of(parts, LENGTHS)
        return TraceMeanField_ELBO().differentiable_loss(analytic(hmm, q, LENGTHS), guided(q))

    with pyro.validation_enabled(False):
        found = optimised(loss, parts)
    assert found == pytest.approx(-hmm.evidence_by_hand(LENGTHS).sum().item(), abs=1e-8)
    q, posterior = crf_of(parts, LENGTHS), hmm.posterior(LENGTHS)
    truth = hmm.joint_by_hand(lengths=LENGTHS) - hmm.evidence_by_hand(LENGTHS)
    close(q.log_prob(STRINGS[:, None]), truth, 1e-3)
    close(q.marginals, posterior.marginals, 1e-4)
    close(q.entropy(), posterior.entropy(), 1e-4)


def test_the_best_guide_given_some_labels():
    """Some states known: the conditional CRF is the posterior, its log Z is the evidence of y and of those states."""
    hmm, parts = HMM().requires_grad_(False).eval(), free(scale=0.3)
    labels = torch.tensor([[1, 0, 0, 2], [0, 2, 0, 0], [1, 1, 0, 0]])
    seen = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]) > 0
    fits = ((STRINGS[:, None] == labels) | ~seen).all(-1)  # (V^N, R)
    truth = hmm.joint_by_hand().masked_fill(~fits, -torch.inf).logsumexp(0)
    posterior = hmm.posterior().given(labels, seen)
    close(posterior.log_partition, truth)
    close(hmm.posterior().log_marginal_of(labels, seen), truth - hmm.evidence_by_hand())

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS):
            pyro.sample("z", posterior)
            pyro.factor("y", posterior.log_partition)

    def loss():
        return TraceMeanField_ELBO().differentiable_loss(model, guided(crf_of(parts).given(labels, seen)))

    with pyro.validation_enabled(False):
        found = optimised(loss, parts)
    assert found == pytest.approx(-truth.sum().item(), abs=1e-8)
    close(crf_of(parts).given(labels, seen).marginals, posterior.marginals, 1e-4)


@lengths_or_none
def test_the_posterior_as_a_guide_has_no_variance(lengths):
    """Every draw has the log-weight log p(y), in each objective and in importance sampling."""
    hmm = HMM()
    model, guide = sampled(hmm, lengths), guided(hmm.posterior(lengths))
    truth = hmm.evidence_by_hand(lengths).sum().item()
    for vectorised in (True, False):
        for objective in (Trace_ELBO, TraceGraph_ELBO, RenyiELBO):
            elbo = objective(num_particles=2, vectorize_particles=vectorised, max_plate_nesting=1)
            assert elbo.loss(model, guide) == pytest.approx(-truth, abs=1e-9)
    importance = Importance(model, guide, num_samples=5).run()
    weights = torch.stack(importance.log_weights).detach()
    close(weights, torch.full_like(weights, truth))
    assert float(importance.get_ESS()) == pytest.approx(5)
    batch, _, _ = vectorized_importance_weights(model, guide, num_samples=4, max_plate_nesting=1)
    close(batch, torch.full_like(batch, truth))


def test_importance_sampling_from_another_chain():
    """The mean weight estimates the evidence, weighted draws the posterior."""
    hmm, parts = HMM().requires_grad_(False).eval(), [p.detach() for p in free(scale=0.3)]
    log_q = log_q_by_hand(parts)
    truth, rows = hmm.evidence_by_hand(), []
    with pyro.plate("draws", 4000, dim=-2):
        guide_trace = poutine.trace(guided(crf_of(parts))).get_trace()
        trace = poutine.trace(poutine.replay(sampled(hmm), guide_trace)).get_trace()
    for t in (trace, guide_trace):
        t.compute_log_prob()
    rows = sum(trace.nodes[n]["log_prob"] for n in ("z", "y")) - guide_trace.nodes["z"]["log_prob"]  # (4000, R)
    second = (2 * hmm.joint_by_hand() - log_q).logsumexp(0) - 2 * truth  # log E[(w / p(y))^2]
    error = (second.exp() - 1).sqrt() / 4000**0.5
    assert (((rows - truth).exp().mean(0) - 1).abs() < 5 * error).all()
    found = Importance(sampled(hmm), guided(crf_of(parts)), num_samples=3).run()
    z = [t.nodes["z"]["value"] for t in found.exec_traces]
    joint = torch.stack([hmm.joint_by_hand(one).sum() for one in z])
    close(torch.stack(found.log_weights), joint - torch.stack([crf_of(parts).log_prob(one).sum() for one in z]))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_score_function_gradient_is_unbiased(elbo):
    """Its mean over many draws is the gradient of the ELBO by all strings, in the model and in the guide."""
    hmm, parts = HMM(), free()
    leaves = [*hmm.leaves, *parts]
    truth = -elbo_by_hand(hmm, parts, LENGTHS)
    expected = torch.cat([g.flatten() for g in gradients(truth, leaves)])
    objective = elbo(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    losses, grads = [], []
    for _ in range(20):
        for p in leaves:
            p.grad = None
        losses.append(objective.loss_and_grads(sampled(hmm, LENGTHS), guided(crf_of(parts, LENGTHS))))
        grads.append(torch.cat([p.grad.flatten() for p in leaves]))
    losses, grads = torch.tensor(losses, dtype=torch.float64), torch.stack(grads)
    assert abs(losses.mean() - truth) < 5 * losses.std() / 20**0.5
    error = grads.std(0) / 20**0.5
    assert ((grads.mean(0) - expected).abs() < 6 * error + 1e-9).all()
    assert (expected.abs() > 6 * error).sum() > 20  # errors small enough to tell


def test_predictive_draws_from_the_guide():
    hmm = HMM()
    out = Predictive(sampled(hmm), guide=guided(hmm.posterior()), num_samples=3000, parallel=True)()["z"]
    truth = (hmm.joint_by_hand() - hmm.evidence_by_hand()).exp()
    as_often(out, truth)


def test_svi_with_a_guide_in_the_param_store():
    """The exact objective through ``pyro.param`` and Pyro's optimiser."""
    hmm = HMM().requires_grad_(False).eval()

    def q():
        return crf_of([pyro.param(name, torch.zeros_like(p)) for name, p in zip("abcd", free(), strict=True)], LENGTHS)

    def model():
        return analytic(hmm, q(), LENGTHS)()

    with pyro.validation_enabled(False):
        svi = SVI(model, lambda: guided(q())(), pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
        losses = [svi.step() for _ in range(60)]
    floor = -hmm.evidence_by_hand(LENGTHS).sum().item()
    assert losses[0] > floor + 1 and min(losses) > floor - 1e-9 and losses[-1] < floor + 0.02
    assert set(pyro.get_param_store().keys()) == set("abcd")
