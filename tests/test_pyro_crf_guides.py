"""Latent chains of labels: a CRF as prior, as structured guide and summed out, against sums over all label strings."""

from __future__ import annotations

import itertools
import math

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
    config_enumerate,
    infer_discrete,
)
from pyro.infer.importance import vectorized_importance_weights
from pyro_models import clean as clean
from pyro_models import same_loss_and_gradient
from registry import sized
from test_pyro import close
from test_pyro_crf import STRINGS, N, V, as_often, crf_of, gradients, log_prob_by_hand, normal, nothing, score_by_hand
from torch import nn
from torch.distributions import kl_divergence

import pyro_genexact as gx

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


def guided(q, **infer):
    def guide():
        with pyro.plate("data", q.batch_shape[0]):
            pyro.sample("z", q, infer=infer)

    return guide


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
    with pytest.raises(NotImplementedError, match="one length"):
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
