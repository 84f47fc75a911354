"""Enumerated latent chains of labels and ``infer_discrete``, against sums over all label strings."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    TraceEnum_ELBO,
    config_enumerate,
    infer_discrete,
)

from support.checks import close
from support.latent_chains import (
    HMM,
    LENGTHS,
    ROWS,
    SD,
    Y,
    free,
    guided,
    log_q_by_hand,
    plain,
    sampled,
)
from support.pyro_chains import STRINGS, N, V, as_often, crf_of, gradients, log_prob_by_hand
from support.pyro_models import normal, nothing, same_loss_and_gradient

# --- enumeration of all strings


@pytest.mark.parametrize("lengths", [None, torch.full((ROWS,), 3)])
def test_parallel_enumeration_is_the_exact_marginal(lengths):
    hmm = HMM()
    truth = -hmm.evidence_by_hand(lengths).sum()
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    same_loss_and_gradient(objective, sampled(hmm, lengths, "parallel"), nothing, truth, list(hmm.leaves))
    configured = config_enumerate(sampled(hmm, lengths), default="parallel")
    same_loss_and_gradient(objective, configured, nothing, -hmm.evidence_by_hand(lengths).sum(), list(hmm.leaves))


def test_rows_of_several_lengths_are_not_enumerated():
    with pytest.raises(NotImplementedError, match="rows of equal lengths"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(sampled(HMM(), LENGTHS, "parallel"), nothing)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_an_enumerated_guide_gives_the_exact_elbo(how):
    hmm, parts = HMM(), free()
    rows = ROWS if how == "parallel" else 1  # in sequence, all V^N joint values of all rows are visited
    log_q, joint = log_q_by_hand(parts)[:, :rows], hmm.joint_by_hand()[:, :rows]
    truth = (log_q.exp() * (log_q - joint)).sum()
    q = crf_of([p[:rows] for p in parts])
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(sampled(hmm, rows=rows), guided(q, enumerate=how))
    assert loss == pytest.approx(truth.item(), abs=1e-9)
    leaves = [*hmm.leaves, *parts]
    for leaf, g in zip(leaves, gradients(truth, leaves), strict=True):
        close(leaf.grad, g, 1e-9)


def test_enumeration_beside_another_variable():
    """A continuous latent variable with particles, under two plates."""
    hmm, loc = HMM(), torch.tensor(0.3, dtype=torch.float64)

    def model():
        shift = pyro.sample("shift", normal(0.0))
        with pyro.plate("outer", 1, dim=-2), pyro.plate("data", ROWS, dim=-1):
            z = pyro.sample("z", hmm.prior(), infer={"enumerate": "parallel"})
            mean = hmm.mean[z] + shift[..., None]
            pyro.sample("y", dist.Normal(mean, SD).to_event(1), obs=Y)

    def guide():
        pyro.sample("shift", normal(loc, 0.2))

    torch.manual_seed(5)
    loss = TraceEnum_ELBO(4, vectorize_particles=True, max_plate_nesting=2).loss(model, guide)
    torch.manual_seed(5)
    shifts = 0.3 + 0.2 * torch.randn(4, 1, 1, dtype=torch.float64).flatten()
    each = [
        hmm.evidence_by_hand(y=Y - s).sum() + normal(0.0).log_prob(s) - normal(0.3, 0.2).log_prob(s) for s in shifts
    ]
    assert loss == pytest.approx(-torch.stack(each).mean().item(), abs=1e-9)


def by_index(hmm):
    """The index of the string as the site: Pyro's ``infer_discrete`` and marginals take scalar sites only."""

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS):
            prior = hmm.prior()
            strings = prior.enumerate_support(expand=False)
            k = pyro.sample("k", dist.Categorical(logits=prior.log_prob(strings).T), infer={"enumerate": "parallel"})
            z = strings.squeeze(1)[k]
            pyro.sample("y", dist.Normal(hmm.mean[z], SD).to_event(1), obs=Y)
            return z

    return model


@pytest.mark.parametrize("temperature", [0, 1])
def test_infer_discrete_of_the_index(temperature):
    """Its best string is the posterior's mode, its draws and marginals are the posterior's, which needs no enumeration."""
    hmm = HMM()
    decoded = infer_discrete(by_index(hmm), first_available_dim=-2, temperature=temperature)
    posterior = hmm.posterior()
    if temperature == 0:
        assert torch.equal(decoded(), posterior.mode)
        return
    p = (hmm.joint_by_hand() - hmm.evidence_by_hand()).exp()
    as_often(torch.stack([decoded() for _ in range(60)]), p)
    as_often(posterior.sample((2000,)), p)
    marginal = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(by_index(hmm), nothing)["k"]
    close(marginal.probs.T, posterior.log_prob(STRINGS[:, None]).exp())


def test_infer_discrete_refuses_vector_sites():
    """No wrong answer: Pyro raises."""
    model = sampled(HMM(), enumerate_="parallel")
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="Invalid tensor shape"):
            infer_discrete(model, first_available_dim=-2, temperature=temperature)()
    with pytest.raises(TypeError, match="logits"):
        TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(model, nothing)


def test_infer_discrete_by_scalar_sites_of_plain_pyro():
    """Viterbi by Pyro's own chain is the mode, row by row and within each length."""
    hmm = HMM()
    with poutine.trace() as found:
        infer_discrete(plain(hmm, LENGTHS), first_available_dim=-2, temperature=0)()
    z = torch.stack([found.trace.nodes[f"z{t}"]["value"].expand(ROWS) for t in range(N)], -1)
    there = torch.arange(N) < LENGTHS[:, None]
    assert torch.equal(z[there], hmm.posterior(LENGTHS).mode[there])


def test_log_prob_of_posterior_strings():
    """p(z | y) = p(z, y) / p(y), for the CRF as Pyro's distribution of z."""
    hmm = HMM()
    truth = hmm.joint_by_hand(lengths=LENGTHS) - hmm.evidence_by_hand(LENGTHS)
    close(hmm.posterior(LENGTHS).log_prob(STRINGS[:, None]), truth)
    zero = torch.zeros(V, dtype=torch.float64)
    prior = log_prob_by_hand([torch.zeros(ROWS, N, V).double(), hmm.log_step, hmm.log_first, zero], STRINGS[:, None])
    close(hmm.prior().log_prob(STRINGS[:, None]), prior)
