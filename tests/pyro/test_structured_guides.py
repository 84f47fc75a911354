"""Guides of dependent discrete latents, against enumeration."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    JitTrace_ELBO,
    Predictive,
    ReweightedWakeSleep,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from pyro.infer.tracegraph_elbo import JitTraceGraph_ELBO
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close, has_frequencies
from support.pyro_models import binaries, vectorised
from support.values import sized

DOUBLE = {"dtype": torch.float64}
# --- an autoregressive model as the guide of dependent discrete latents

T, P, NOISE = 3, torch.tensor([0.5, 0.4, 0.6], **DOUBLE), 0.5
Z = binaries(T)
SEEN = torch.tensor([[1.0, 0.0]], **DOUBLE)


def parities(z):
    """Whether neighbours differ: two opposite strings explain each y."""
    return (z[..., 1:] - z[..., :-1]).abs()


def joint(y):
    """log p(z, y) of all strings, (8, R)."""
    prior = dist.Bernoulli(P).to_event(1).log_prob(Z)
    return prior[:, None] + dist.Normal(parities(Z)[:, None], NOISE).to_event(1).log_prob(y)


def bits(y, size=None):
    with pyro.plate("data", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Bernoulli(P).to_event(1))
        pyro.sample("y", dist.Normal(parities(z), NOISE).to_event(1), obs=y[i])


def network(kind="made", context=2, hidden=12, scale=None):
    net = {
        "made": lambda: conditioners.MADE(T, 1, context=context, hidden=(hidden,), activation=torch.relu),
        "recurrent": lambda: conditioners.Recurrent((), 1, context=context, hidden=hidden),
    }[kind]()
    q = gx.Autoregressive(net, heads.Bernoulli(), (T,)).double()
    if scale:
        with torch.no_grad():
            for k, p in enumerate(q.parameters()):
                p.copy_(scale * sized(*p.shape, seed=k))
    return q


def amortised(q, baseline=None, value=None):
    """z ~ q(y), with a baseline and the module that computes it."""

    def guide(y, size=None, observations=None):
        pyro.module("q", q)
        if value is not None:
            pyro.module("value", value)
        y = y if observations is None else observations["y"]
        with pyro.plate("data", y.shape[-2], subsample_size=size) as i:
            pyro.sample("z", q(y[..., i, :]), infer={"baseline": baseline} if baseline else {})

    return guide


def elbo(q, y):
    """Of each row, by all strings."""
    log_q = q(y).log_prob(Z[:, None])
    return (log_q.exp() * (joint(y) - log_q)).sum(0)


def factorised(y):
    """The best ELBO of independent bits for one row: coordinate ascent from each corner."""
    table, best = joint(y)[:, 0].reshape(2, 2, 2), -math.inf
    for corner in Z:
        p = torch.stack([0.95 - 0.9 * corner, 0.05 + 0.9 * corner], -1)
        for step in range(60):
            t = step % T
            others = [p[s] for s in range(T) if s != t]
            p[t] = torch.einsum("abc,b,c->a", table.movedim(t, 0), *others).softmax(0)
        mean = torch.einsum("abc,a,b,c->", table, *p)
        best = max(best, (mean - torch.xlogy(p, p).sum()).item())
    return best


AVERAGE = {"use_decaying_avg_baseline": True}


class Level(nn.Module):
    """A baseline: one number for each row and particle."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1, **DOUBLE)

    def forward(self, y):
        return self.net(y).squeeze(-1).expand(64, -1)


@pytest.mark.parametrize("how", ["plain", "average", "network", "wake", "enumerated"])
def test_a_fitted_guide_of_opposite_strings(how):
    """Better than any independent bits by the nats that enumeration says."""
    q, value = network(), Level() if how == "network" else None
    baseline = {"average": AVERAGE, "network": {"nn_baseline": value, "nn_baseline_input": SEEN}}.get(how)
    guide, loss = amortised(q, baseline, value), vectorised(TraceGraph_ELBO, 64)
    if how == "wake":
        loss = vectorised(ReweightedWakeSleep, 64, model_has_params=False)
    elif how == "enumerated":
        guide, loss = config_enumerate(guide, default="parallel"), None
    result = gx.fit_guide(bits, guide, SEEN, steps=100, lr=0.05, num_particles=1, loss=loss, progress=False)
    evidence, found = joint(SEEN).logsumexp(0).item(), elbo(q, SEEN).item()
    assert evidence - 0.06 < found <= evidence
    assert found > factorised(SEEN) + 0.5
    p, log_q = joint(SEEN).softmax(0), q(SEEN).log_prob(Z[:, None])
    assert (p - log_q.exp()).abs().sum() / 2 < 0.12
    assert result.final == pytest.approx(found, abs=1e-9 if how == "enumerated" else 0.05)
    if value is not None:  # it learned the mean of log p - log q
        assert value(SEEN)[0].item() == pytest.approx(found, abs=0.3)


def test_an_average_as_baseline_is_no_parameter():
    """It is replaced in each step, and is none for the optimizer."""
    made = []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.05))
        return made[0]

    q = network()
    loss = vectorised(TraceGraph_ELBO, 4)
    gx.fit_guide(bits, amortised(q, AVERAGE), SEEN, steps=5, loss=loss, optimizer=optimizer, progress=False)
    held = [p for group in made[0].param_groups for p in group["params"]]
    assert len(held) == len(list(q.parameters()))


def gradients_of(loss, model, guide, parameters, y, repeats, *args):
    rows = []
    for _ in range(repeats):
        for p in parameters:
            p.grad = None
        loss.loss_and_grads(model, guide, y, *args)
        rows.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(rows)


def test_baselines_leave_the_gradient_and_take_its_variance():
    q = network(hidden=5, scale=0.7)
    parameters = list(q.parameters())
    y = SEEN.expand(2, -1) - 3  # far from what the model says: costs far from 0
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(-elbo(q, y).sum(), parameters)])
    variance = {}
    for name, baseline in (("none", None), ("average", AVERAGE)):
        loss, guide = vectorised(TraceGraph_ELBO, 200), amortised(q, baseline)
        grads = gradients_of(loss, bits, guide, parameters, y, 80)[30:]  # the average starts at 0
        error = grads.std(0) / 50**0.5
        assert ((grads.mean(0) - truth).abs() < 6 * error + 1e-9).all()
        variance[name] = grads.var(0).sum()
        if name == "average":
            assert (truth.abs() > 6 * error).sum() > 15  # errors small enough to tell
    assert variance["average"] < variance["none"] / 10


def test_wake_phase_gradient_is_that_of_the_inclusive_divergence():
    """-sum_z p(z | y) grad log q(z), up to the bias 1 / particles of weights that are normalised."""
    q = network(hidden=5, scale=0.7)
    parameters = list(q.parameters())
    inclusive = -(joint(SEEN).softmax(0) * q(SEEN).log_prob(Z[:, None])).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(inclusive, parameters)])
    grads = gradients_of(vectorised(ReweightedWakeSleep, 20_000), bits, amortised(q), parameters, SEEN, 20)
    error = grads.std(0) / 20**0.5
    assert ((grads.mean(0) - truth).abs() < 6 * error + 0.002).all()
    assert (truth.abs() > 6 * error + 0.02).sum() > 15


def test_gradient_through_two_dependent_sites():
    """The second guide reads the first one's draw."""
    first, second = network(hidden=5, scale=0.7), network(context=5, hidden=5, scale=0.6)
    w = sized(T, T, seed=40)

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(P).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=a @ w).to_event(1))
            pyro.sample("y", dist.Normal(parities(a) + parities(b), 0.8).to_event(1), obs=y)

    def guide(y):
        pyro.module("first", first)
        pyro.module("second", second)
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", first(y))
            pyro.sample("b", second(torch.cat([y.expand(*a.shape[:-1], 2), a], -1)))

    a, b, parameters = Z[:, None], Z, [*first.parameters(), *second.parameters()]
    log_q = (
        first(SEEN).log_prob(a) + second(torch.cat([SEEN.expand(8, 1, 2), a], -1)).log_prob(b[:, None, None])[..., 0].T
    )
    log_p = dist.Bernoulli(P).to_event(1).log_prob(a) + dist.Bernoulli(logits=a @ w).to_event(1).log_prob(b)
    log_p = log_p + dist.Normal(parities(a) + parities(b), 0.8).to_event(1).log_prob(SEEN)
    truth = (log_q.exp() * (log_q - log_p)).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(truth, parameters)])
    grads = gradients_of(vectorised(TraceGraph_ELBO, 1000), model, guide, parameters, SEEN, 40)
    error = grads.std(0) / 40**0.5
    assert ((grads.mean(0) - truth).abs() < 6 * error + 1e-9).all()
    assert (truth.abs() > 6 * error).sum() > 30


ROWS = (parities(Z) + 0.3 * sized(8, 2, seed=3)).contiguous()


def test_sleep_phase_amortises():
    """Draws of the model teach both modes of the posteriors of all data."""
    q = network(hidden=32)
    loss = vectorised(ReweightedWakeSleep, 64, insomnia=0.0)
    gx.fit_guide(bits, amortised(q), ROWS, steps=100, lr=0.1, loss=loss, progress=False)
    p, evidence = joint(ROWS).softmax(0), joint(ROWS).logsumexp(0)
    assert (p * (p.log() - q(ROWS).log_prob(Z[:, None]))).sum(0).mean() < 0.04
    independent = torch.tensor([factorised(y[None]) for y in ROWS], **DOUBLE)
    assert (elbo(q, ROWS) - independent).mean() > 0.3
    assert (evidence - elbo(q, ROWS)).mean() < 0.06


def test_gradient_in_a_subsampled_plate():
    """Rows of the context with those of the data, and scaled as they are."""
    q = network(hidden=5, scale=0.7)
    parameters = list(q.parameters())
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(-elbo(q, ROWS).sum(), parameters)])
    grads = gradients_of(vectorised(TraceGraph_ELBO, 300), bits, amortised(q), parameters, ROWS, 60, 4)
    error = grads.std(0) / 60**0.5
    assert ((grads.mean(0) - truth).abs() < 6 * error + 1e-9).all()
    assert (truth.abs() > 6 * error).sum() > 8


def test_an_enumerated_guide_of_categories():
    """Two dependent categories of three, in subsamples: the mean over all of them is the ELBO."""
    y, level = torch.tensor([0.3, 1.8, 3.1], **DOUBLE), torch.arange(3, **DOUBLE)
    values = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    q = gx.Autoregressive(conditioners.MADE(2, 3, site=3, context=1, hidden=(6,)), heads.Categorical(3), (2,)).double()

    def model(index):
        with pyro.plate("data", 3, subsample=index) as i:
            z = pyro.sample("z", dist.Categorical(torch.ones(2, 3, **DOUBLE)).to_event(1))
            pyro.sample("y", dist.Normal(level[z].sum(-1), 0.5), obs=y[i])

    def guide(index):
        with pyro.plate("data", 3, subsample=index) as i:
            pyro.sample("z", q(y[i, None]), infer={"enumerate": "parallel"})

    log_q = q(y[:, None]).log_prob(values[:, None])
    log_p = dist.Normal(level[values].sum(-1)[:, None], 0.5).log_prob(y) - 2 * math.log(3)
    truth = (log_q.exp() * (log_q - log_p)).sum()
    pairs = [torch.tensor(i) for i in ([0, 1], [0, 2], [1, 2])]
    close(torch.stack([TraceEnum_ELBO().differentiable_loss(model, guide, i) for i in pairs]).mean(), truth)


@pytest.mark.parametrize("loss", [JitTrace_ELBO, JitTraceGraph_ELBO])
def test_compiled_losses(loss):
    """Compiled once, and right for other weights too."""
    q = network("recurrent", hidden=4, scale=0.7)
    compiled = vectorised(loss, 500, ignore_jit_warnings=True)
    guide = amortised(q)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for p in q.parameters():
                p.mul_(scale)
        losses = torch.tensor([compiled.loss_and_grads(bits, guide, ROWS) for _ in range(20)], **DOUBLE)
        assert abs(losses.mean() + elbo(q, ROWS).sum()) < 5 * losses.std() / 20**0.5


def test_predictive_of_an_autoregressive_guide():
    q = network(scale=0.7)
    out = Predictive(bits, guide=amortised(q), num_samples=3000, parallel=True)(ROWS[:3])["z"]
    has_frequencies(out, Z[:, None].expand(-1, 3, -1), q(ROWS[:3]).log_prob(Z[:, None]).exp())
