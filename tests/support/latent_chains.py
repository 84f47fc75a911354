"""A latent chain with noisy observations and guides of it, by sums over all label strings."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_genexact as gx
from support.pyro_chains import STRINGS, N, V, score_by_hand
from support.values import sized

ROWS, SD = 3, 1.0
LENGTHS = torch.tensor([4, 2, 3])
Y = sized(ROWS, N, seed=2)
lengths_or_none = pytest.mark.parametrize("lengths", [None, LENGTHS])


class HMM(nn.Module):
    """z a Markov chain of V states, y_t ~ N(mean[z_t], SD); the first state is one step after ``start``."""

    def __init__(self, seed=5):
        super().__init__()
        shapes = ((V,), (V, V), (V,))
        self.leaves = nn.ParameterList(sized(*shape, seed=seed + i) for i, shape in enumerate(shapes))

    @property
    def start(self):
        return self.leaves[0].log_softmax(0)

    @property
    def log_step(self):
        return self.leaves[1].log_softmax(1)

    @property
    def log_first(self):
        return (self.start.unsqueeze(1) + self.log_step).logsumexp(0)

    @property
    def mean(self):
        return self.leaves[2]

    def emissions(self, y=Y):
        """log p(y_t | z_t = v), (*, N, V)."""
        return dist.Normal(self.mean, SD).log_prob(y.unsqueeze(-1))

    def prior(self, rows=ROWS, lengths=None):
        flat = self.mean.new_zeros(rows, N, V)
        return gx.LinearChainCRF(flat, self.log_step, initial=self.log_first, lengths=lengths)

    def posterior(self, lengths=None, y=Y):
        """p(z | y); its log Z is log p(y)."""
        return gx.LinearChainCRF(self.emissions(y), self.log_step, initial=self.log_first, lengths=lengths)

    def hidden(self, lengths=None):
        return gx.HiddenMarkov(self.log_first, self.log_step, dist.Normal(self.mean, SD), lengths, duration=N)

    def joint_by_hand(self, z=STRINGS[:, None], lengths=None, y=Y):
        """log p(z, y), (*, R)."""
        emissions = -0.5 * ((y.unsqueeze(-1) - self.mean) / SD) ** 2 - math.log(SD) - 0.5 * math.log(2 * math.pi)
        return score_by_hand([emissions, self.log_step, self.log_first, torch.zeros_like(self.mean)], z, lengths)

    def evidence_by_hand(self, lengths=None, y=Y):
        return self.joint_by_hand(lengths=lengths, y=y).logsumexp(0) - copies(lengths).log()


def copies(lengths):
    """(R) of how many of the V^N strings are the same one within a row's length."""
    return V ** (torch.zeros(ROWS) if lengths is None else N - lengths).double()


def sampled(hmm, lengths=None, enumerate_=None, rows=ROWS):
    """z ~ prior and y ~ N(mean[z], SD) at sites."""
    there = torch.arange(N) < (torch.full((ROWS,), N) if lengths is None else lengths)[:rows, None]

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", rows):
            prior = hmm.prior(rows, None if lengths is None else lengths[:rows])
            z = pyro.sample("z", prior, infer={"enumerate": enumerate_} if enumerate_ else {})
            pyro.sample("y", dist.Normal(hmm.mean[z], SD).mask(there).to_event(1), obs=Y[:rows])
            return z

    return model


def free(seed=11, scale=1.0):
    """Potentials of a guide, as leaves."""
    shapes = ((ROWS, N, V), (ROWS, N - 1, V, V), (ROWS, V), (ROWS, V))
    return [(scale * sized(*shape, seed=seed + i)).requires_grad_() for i, shape in enumerate(shapes)]


def log_q_by_hand(parts, lengths=None):
    """(V^N, R), by rows of transitions of their own."""
    unary, transition, initial, final = parts
    rows = []
    for r in range(len(unary)):
        length = None if lengths is None else lengths[r : r + 1]
        flat = torch.zeros(V, V, dtype=unary.dtype)
        score = score_by_hand([unary[r : r + 1], flat, initial[r], final[r]], STRINGS[:, None], length).squeeze(-1)
        for t in range((N if length is None else int(length)) - 1):
            score = score + transition[r, t, STRINGS[:, t], STRINGS[:, t + 1]]
        rows.append(score - score.logsumexp(0))
    return torch.stack(rows, 1) + copies(lengths).log()


def elbo_by_hand(hmm, parts, lengths=None):
    log_q = log_q_by_hand(parts, lengths)
    return (log_q.exp() * (hmm.joint_by_hand(lengths=lengths) - log_q) / copies(lengths)).sum()


def optimised(loss, leaves):
    lbfgs = torch.optim.LBFGS(
        leaves,
        max_iter=100,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        history_size=40,
        line_search_fn="strong_wolfe",
    )

    def closure():
        lbfgs.zero_grad()
        value = loss()
        value.backward()
        return value

    lbfgs.step(closure)
    return loss().item()


def guided(q, **infer):
    def guide():
        with pyro.plate("data", q.batch_shape[0]):
            pyro.sample("z", q, infer=infer)

    return guide


# --- the chain summed out


def plain(hmm, lengths=None):
    """The same model of scalar sites in plain Pyro."""

    def model():
        pyro.module("hmm", hmm)
        with pyro.plate("data", ROWS, dim=-1):
            z = None
            for t in pyro.markov(range(N)):
                with poutine.mask(mask=torch.ones(ROWS) > 0 if lengths is None else lengths > t):
                    logits = hmm.log_first if z is None else hmm.log_step[z]
                    z = pyro.sample(f"z{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                    pyro.sample(f"y{t}", dist.Normal(hmm.mean[z], SD), obs=Y[:, t])

    return model
