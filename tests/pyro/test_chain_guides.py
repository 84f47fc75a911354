"""Structured guides of chains, beside a flow too, against exact evidence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    Predictive,
    Trace_ELBO,
)
from torch import nn
from torch.distributions import kl_divergence

import pyro_genexact as gx
from support.checks import close, has_frequencies
from support.latent_chains import HMM, LENGTHS, Y, elbo_by_hand, free, lengths_or_none, optimised, sampled
from support.pyro_chains import STRINGS, crf_of
from support.pyro_models import nothing
from support.values import sized

DOUBLE = {"dtype": torch.float64}
# --- a chain as the guide of a chain


def chain(hmm, q, y=Y, lengths=None, size=None):
    """The ELBO as a factor: no site is sampled."""

    def model():
        pyro.module("crf", q)
        with pyro.plate("data", len(y), subsample_size=size) as i:
            n = None if lengths is None else lengths[i]
            posterior = q(y[i].unsqueeze(-1), n)
            elbo = posterior.expectation(hmm.emissions(y[i])) - kl_divergence(posterior, hmm.prior(len(i), n))
            pyro.factor("elbo", elbo)

    return model


@lengths_or_none
def test_elbo_of_a_chain_is_the_evidence_less_the_divergence_from_the_posterior(lengths):
    hmm, q = HMM(), crf_of(free(), lengths)
    elbo = q.expectation(hmm.emissions()) - kl_divergence(q, hmm.hidden(lengths).prior())
    close(elbo, hmm.hidden(lengths).log_prob(Y) - kl_divergence(q, hmm.hidden(lengths).posterior(Y)))
    close(elbo.sum(), elbo_by_hand(hmm, free(), lengths))


@lengths_or_none
def test_a_linear_crf_learns_the_posterior_of_all_observations(lengths):
    """Emissions of equal variance have logits linear in y: what is learned from three rows holds for others."""
    hmm, q = HMM().requires_grad_(False), gx.CRF(3, context=1).double()
    found = optimised(lambda: Trace_ELBO().differentiable_loss(chain(hmm, q, lengths=lengths), nothing), q.parameters())
    assert found == pytest.approx(-hmm.evidence_by_hand(lengths).sum().item(), abs=1e-8)
    y = sized(3, 4, seed=30)
    close(q(y.unsqueeze(-1)).log_prob(STRINGS[:, None]), hmm.joint_by_hand(y=y) - hmm.evidence_by_hand(y=y), 1e-2)
    p = (hmm.joint_by_hand(y=y) - hmm.evidence_by_hand(y=y)).exp()
    marginals = torch.einsum("sr,stv->rtv", p, nn.functional.one_hot(STRINGS, 3).double())
    close(q(y.unsqueeze(-1)).marginals, marginals, 1e-3)


@pytest.mark.parametrize("size", [None, 2])
def test_fit_guide_of_an_exact_elbo(size):
    hmm, q = HMM().requires_grad_(False), gx.CRF(3, context=1).double()
    for p in q.emissions.parameters():
        nn.init.zeros_(p)
    result = gx.fit_guide(
        chain(hmm, q, lengths=LENGTHS, size=size), nothing, steps=60, lr=0.2, num_particles=1, progress=False
    )
    evidence = hmm.evidence_by_hand(LENGTHS).sum().item()
    elbo = -Trace_ELBO().loss(chain(hmm, q, lengths=LENGTHS), nothing)
    assert evidence - 0.2 < elbo <= evidence + 1e-9
    if size is None:
        assert result.final == pytest.approx(elbo, abs=1e-9)  # nothing is drawn


def test_predictive_of_an_amortised_chain():
    hmm, q = HMM(), gx.CRF(3, context=1).double()
    with torch.no_grad():
        for k, p in enumerate(q.parameters()):
            p.copy_(sized(*p.shape, seed=k))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", q(Y.unsqueeze(-1)))

    out = Predictive(sampled(hmm), guide=guide, num_samples=2000, parallel=True)()["z"]
    has_frequencies(out, STRINGS[:, None].expand(-1, 3, -1), q(Y.unsqueeze(-1)).log_prob(STRINGS[:, None]).exp())


def test_a_flow_of_globals_beside_a_chain_that_is_summed_out():
    """Shift and log scale of the emissions have a flow, the states the exact posterior given them; truth by a grid."""
    hmm, y = HMM().requires_grad_(False), Y + 0.7

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2, **DOUBLE), torch.tensor([1.0, 0.5], **DOUBLE)).to_event(1))
        shift, log_scale = a.unsqueeze(-2).split(1, -1)  # the same for all sites and states
        emissions = dist.Normal(hmm.mean + shift, log_scale.exp().expand_as(hmm.mean + shift))
        with pyro.plate("data", 3):
            pyro.sample("y", gx.HiddenMarkov(hmm.log_first, hmm.log_step, emissions, duration=4), obs=y)

    line = torch.linspace(-4, 4, 60, **DOUBLE)
    grid = torch.cartesian_prod(line, 0.5 * line)
    scores = [dist.Normal(hmm.mean + s, r.exp()).log_prob(y.unsqueeze(-1)) for s, r in grid]
    chains = gx.LinearChainCRF(torch.stack(scores), hmm.log_step, initial=hmm.log_first)
    prior = dist.Normal(torch.zeros(2, **DOUBLE), torch.tensor([1.0, 0.5], **DOUBLE)).to_event(1)
    log_joint = prior.log_prob(grid) + chains.log_partition.sum(-1)
    cell = math.log((8 / 59) * (4 / 59))
    guide = gx.guides.AutoFlow(model, hidden=(8,), transforms=2)
    result = gx.fit_guide(model, guide, steps=120, lr=0.05, progress=False)
    evidence = (log_joint.logsumexp(0) + cell).item()
    assert evidence - 0.15 < result.final < evidence + 0.05
    with torch.no_grad():
        a = guide.get_posterior().sample((4000,))
    mean = log_joint.softmax(0) @ grid
    sd = (log_joint.softmax(0) @ (grid - mean) ** 2).sqrt()
    assert ((a.mean(0) - mean).abs() < 0.15 * sd).all()
    assert (a.std(0) / sd - 1).abs().max() < 0.15
