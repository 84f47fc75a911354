"""Strings at ``pyro.sample`` sites: handlers, objectives and importance sampling, against sums over all strings."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close, has_frequencies
from support.pyro_models import normal, nothing, same_loss_and_gradient
from support.small_conditioners import Bigram
from support.values import built, sized

V, T, ROWS = 3, 3, 4
X, Y = sized(ROWS, 2, seed=1), sized(ROWS, seed=2)
W = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
ALL = torch.cartesian_prod(*[torch.arange(V)] * T)
STRINGS = ALL[((ALL == 0).cumsum(1) * ALL == 0).all(1)]  # 0 ends
TOKENS = STRINGS[torch.tensor([0, 3, 9, 14])]


def prior(seed=0):
    return gx.Sequence(Bigram(sized(V + 1, V, seed=seed)), heads.Categorical(V), 0, T)


def log_p_by_hand(lm, z=STRINGS):
    """log p of strings (*, T), a table looked up symbol by symbol."""
    log_p = lm.conditioner.table.log_softmax(-1)
    before, total = torch.full(z.shape[:-1], V), torch.zeros(z.shape[:-1], dtype=torch.float64)
    for t in range(T):
        there = before != 0
        total = total + torch.where(there, log_p[before, z[..., t]], 0.0)
        before = torch.where(there, z[..., t], 0)
    return total


def reading(seed=0):
    """A model of strings given X."""
    torch.manual_seed(seed)
    net = conditioners.Markov(V, V, order=1, context=2, hidden=(4,), activation=torch.tanh)
    return built(gx.Sequence(net, heads.Categorical(V), 0, T))


def observed(lm, x=X, tokens=TOKENS, size=None):
    def model():
        pyro.module("lm", lm)
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            return pyro.sample("y", lm(x[rows]), obs=None if tokens is None else tokens[rows])

    return model


def test_subsampled_plate_scales_the_log_density():
    lm = reading()
    every = lm(X).log_prob(TOKENS)
    close(poutine.trace(observed(lm)).get_trace().log_prob_sum(), every.sum())
    for _ in range(5):
        trace = poutine.trace(observed(lm, size=2)).get_trace()
        rows = trace.nodes["data"]["value"]
        assert len(rows) == 2
        close(trace.log_prob_sum(), ROWS / 2 * every[rows].sum())


def test_mask_and_scale():
    lm, mask = reading(), torch.tensor([True, False, True, False])
    every = lm(X).log_prob(TOKENS)
    with poutine.mask(mask=mask), poutine.scale(scale=2.5):
        trace = poutine.trace(observed(lm)).get_trace()
    close(trace.log_prob_sum(), 2.5 * every[mask].sum())
    nonsense = TOKENS.clone()
    nonsense[1] = torch.tensor([0, 1, 7])  # a masked row is not looked at, unless values are validated
    with poutine.mask(mask=mask), pyro.validation_enabled(False):
        trace = poutine.trace(observed(lm, tokens=nonsense)).get_trace()
        total = trace.log_prob_sum()
    close(total, every[mask].sum())
    assert all(p.grad.isfinite().all() for p in _with_gradients(lm, total))
    with pytest.raises(ValueError, match=r"Expected value to be 0 after the first eos \(0\); got 1 at site 1"):
        poutine.trace(observed(lm, tokens=nonsense)).get_trace().log_prob_sum()


def _with_gradients(lm, total):
    total.backward()
    return list(lm.parameters())


def test_predictive_in_parallel():
    lm = reading()
    draws = Predictive(observed(lm, tokens=None), num_samples=3000, parallel=True)()["y"]
    assert draws.shape == (3000, ROWS, T)
    p = lm(X).log_prob(STRINGS[:, None]).exp()
    has_frequencies(draws, STRINGS[:, None].expand(-1, ROWS, -1), p)
    seen = draws[:, :2].flatten(1).unique(dim=0)
    assert len(seen) > 60  # of 15^2 pairs: rows are drawn each for itself


def test_replay_and_condition():
    lm = reading()
    trace = poutine.trace(observed(lm, tokens=None)).get_trace()
    again = poutine.trace(poutine.replay(observed(lm, tokens=None), trace)).get_trace()
    assert torch.equal(again.nodes["y"]["value"], trace.nodes["y"]["value"])
    held = poutine.trace(poutine.condition(observed(lm, tokens=None), {"y": TOKENS})).get_trace()
    close(held.log_prob_sum(), lm(X).log_prob(TOKENS).sum())


def test_svi_learns_a_language_model():
    """No guide: SVI is maximum likelihood, of a bigram the counts'."""
    lm = prior()
    data = STRINGS[torch.tensor([0, 1, 2, 2, 5, 9, 9, 12, 14, 14])]

    def model():
        pyro.module("lm", lm)
        with pyro.plate("data", len(data)):
            pyro.sample("y", lm(), obs=data)

    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step() for _ in range(120)]
    counts = torch.zeros(V + 1, V, dtype=torch.float64)
    for row in data.tolist():
        before = V
        for symbol in row:
            counts[before, symbol] += before != 0
            before = symbol if before != 0 else 0
    best = torch.special.xlogy(counts, counts / counts.sum(1, keepdim=True).clamp(min=1)).sum()
    assert losses[-1] == pytest.approx(-best.item(), abs=0.05) and losses[-1] >= -best - 1e-9


def latent(lm, enumerate_=None):
    """z_n ~ lm, y_n ~ N(w z_n, 1)."""

    def model():
        pyro.module("lm", lm)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", lm(), infer={"enumerate": enumerate_} if enumerate_ else {})
            pyro.sample("y", normal(z.double() @ W), obs=Y)

    return model


def guided(q):
    def guide():
        pyro.module("q", q)
        with pyro.plate("data", ROWS):
            pyro.sample("z", q(X))

    return guide


def joint_by_hand(lm):
    """(N, ROWS)."""
    return log_p_by_hand(lm)[:, None] + normal((STRINGS.double() @ W)[:, None]).log_prob(Y)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_score_function_gradient_is_unbiased(elbo):
    """Its mean over many draws is the gradient of the ELBO by all strings, in the prior and in the guide."""
    lm, q = prior(), reading()
    leaves = [*lm.parameters(), *q.parameters()]
    log_q = q(X).log_prob(STRINGS[:, None])
    truth = -(log_q.exp() * (joint_by_hand(lm) - log_q)).sum()
    grads = torch.autograd.grad(truth, leaves, allow_unused=True, materialize_grads=True)
    expected = torch.cat([g.flatten() for g in grads])
    objective = elbo(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    losses, found = [], []
    for _ in range(20):
        for p in leaves:
            p.grad = None
        losses.append(objective.loss_and_grads(latent(lm), guided(q)))
        found.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in leaves]))
    losses, found = torch.tensor(losses, dtype=torch.float64), torch.stack(found)
    assert abs(losses.mean() - truth) < 5 * losses.std() / 20**0.5
    error = found.std(0) / 20**0.5
    assert ((found.mean(0) - expected).abs() < 6 * error + 1e-9).all()
    assert (expected.abs() > 6 * error).sum() > 20  # errors small enough to tell


def test_enumerated_latent_strings():
    lm = prior()
    model = config_enumerate(latent(lm, "parallel"))
    truth = -joint_by_hand(lm).logsumexp(0).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), model, nothing, truth, [*lm.parameters()])


def test_enumerated_guide():
    lm, q = prior(), reading()
    log_q = q(X).log_prob(STRINGS[:, None])
    truth = -(log_q.exp() * (joint_by_hand(lm) - log_q)).sum()
    guide = config_enumerate(guided(q), "parallel")
    same_loss_and_gradient(
        TraceEnum_ELBO(max_plate_nesting=1), latent(lm), guide, truth, [*lm.parameters(), *q.parameters()]
    )


def importance(lm, proposal, n=300):
    """Log-weights (n), the strings that were drawn, of z ~ lm and y ~ N(w z, 1)."""

    def model():
        z = pyro.sample("z", lm())
        pyro.sample("y", normal(z.double() @ W), obs=Y[0])

    def guide():
        pyro.sample("z", proposal())

    torch.manual_seed(3)
    with torch.no_grad():
        posterior = Importance(model, guide, num_samples=n).run()
    weights = torch.stack([torch.as_tensor(w) for w in posterior.log_weights])
    return weights, torch.stack([t.nodes["z"]["value"] for t in posterior.exec_traces])


def estimate(weights):
    """The mean of the weights, and its standard error."""
    return weights.exp().mean(), weights.exp().std() / len(weights) ** 0.5


def test_importance_with_a_tempered_proposal():
    """Weights are exact; their mean is an unbiased estimate of the evidence, the weighted mean one of a length."""
    lm = prior()
    proposal = lm.with_head(heads.Tempered(lm.head, 1.5))
    weights, z = importance(lm, proposal)
    of_y = normal(z.double() @ W).log_prob(Y[0])
    flat = prior()
    with torch.no_grad():
        flat.conditioner.table.copy_(lm.conditioner.table.log_softmax(-1) / 1.5)
        close(weights, log_p_by_hand(lm, z) + of_y - log_p_by_hand(flat, z))
        joint = joint_by_hand(lm)[:, 0]
    mean, error = estimate(weights)
    assert abs(mean - joint.logsumexp(0).exp()) < 5 * error and error < 0.1 * mean
    share = weights.softmax(0)
    lengths = lm().lengths_of(z).double()
    truth = (joint.softmax(0) * (STRINGS != 0).sum(1)).sum()
    expected = (share * lengths).sum()
    assert abs(expected - truth) < 5 * (share.square() * (lengths - expected).square()).sum().sqrt()


def test_importance_with_a_truncated_proposal_keeps_only_its_mass():
    """A TopP proposal never draws some strings: the estimate is the evidence without theirs."""
    lm = prior()
    proposal = lm.with_head(heads.TopP(lm.head, 0.6))
    weights, _ = importance(lm, proposal)
    with torch.no_grad():
        joint, kept = joint_by_hand(lm)[:, 0], proposal().log_prob(STRINGS) > -torch.inf
    mean, error = estimate(weights)
    every, some = joint.exp().sum(), joint.exp()[kept].sum()
    assert 0 < kept.sum() < len(kept)
    assert abs(mean - some) < 5 * error and mean < every - 6 * error


def test_latent_strings_with_observed_beginning():
    """A conditional of a string at a site, whose prefix is another site."""
    lm = prior()

    def model():
        with pyro.plate("data", ROWS):
            first = pyro.sample("first", dist.Categorical(torch.ones(V, dtype=torch.float64)))
            pyro.sample("rest", lm().conditional_on_prefix(first.unsqueeze(-1)))

    trace = poutine.trace(model).get_trace()
    first, rest = (trace.nodes[name]["value"] for name in ("first", "rest"))
    both = torch.cat([first.unsqueeze(1), rest], 1)
    alone = lm.conditioner.table.log_softmax(-1)[-1, first]
    trace.compute_log_prob()
    close(trace.nodes["rest"]["log_prob"], log_p_by_hand(lm, both) - alone)


def test_shape_of_a_site_in_nested_plates():
    lm = prior()
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 5, dim=-1):
        z = pyro.sample("z", lm())
    assert z.shape == (3, 5, T) and len(z.reshape(15, T).unique(dim=0)) > 1
