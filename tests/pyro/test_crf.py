"""Chains of labels at ``pyro.sample`` sites: likelihoods, handlers, learning, priors on potentials."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.func import functional_call

import pyro_genexact as gx
from support.checks import close
from support.pyro_chains import (
    LENGTHS,
    ROWS,
    STRINGS,
    TAGS,
    C,
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
from support.pyro_models import normal, nothing
from support.values import params_of, sized

# --- likelihood


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_handlers(lengths):
    """Trace, scale, mask, condition, replay, do, block: each site's log_prob against the sum over strings."""
    parts, y = potentials(), labels(lengths=lengths)
    truth, keep = log_prob_by_hand(parts, y, lengths), torch.arange(ROWS) % 3 == 0
    model = tagger(parts, None, lengths)
    seen = poutine.condition(model, {"tags": y})
    close(poutine.trace(tagger(parts, y, lengths)).get_trace().log_prob_sum(), truth.sum())
    close(poutine.trace(seen).get_trace().log_prob_sum(), truth.sum())
    close(poutine.trace(poutine.scale(seen, 0.25)).get_trace().log_prob_sum(), 0.25 * truth.sum())
    close(poutine.trace(poutine.mask(seen, keep)).get_trace().log_prob_sum(), truth[keep].sum())
    drawn = poutine.trace(model).get_trace()
    value = drawn.nodes["tags"]["value"]
    replayed = poutine.trace(poutine.replay(model, drawn)).get_trace()
    assert replayed.nodes["tags"]["value"] is value
    close(replayed.log_prob_sum(), log_prob_by_hand(parts, value, lengths).sum())
    assert "tags" not in poutine.trace(poutine.block(model, hide=["tags"])).get_trace().nodes
    assert poutine.do(model, {"tags": y})() is y
    uncond = poutine.trace(poutine.uncondition(seen)).get_trace().nodes["tags"]
    assert not uncond["is_observed"] and uncond["value"].shape == (ROWS, N)


def test_masked_rows_get_no_gradient():
    parts, keep = potentials(), torch.arange(ROWS) % 3 == 0
    loss = poutine.trace(poutine.mask(tagger(parts), keep)).get_trace().log_prob_sum()
    found, truth = gradients(loss, parts), gradients(log_prob_by_hand(parts, TAGS, LENGTHS)[keep].sum(), parts)
    assert found[0][~keep].abs().max() == 0 and found[0][0].abs().sum() > 0
    for f, t in zip(found, truth, strict=True):
        close(f, t)


def test_obs_mask_of_rows_imputes_the_others():
    """``obs_mask`` makes the unseen rows a latent site of the same prior."""
    parts, seen = potentials(), torch.arange(ROWS) < 2

    def model():
        with pyro.plate("data", ROWS):
            return pyro.sample("tags", crf_of(parts, LENGTHS), obs=TAGS, obs_mask=seen)

    trace = poutine.trace(model).get_trace()
    value = trace.nodes["_RETURN"]["value"]
    assert torch.equal(value[seen], TAGS[seen])
    close(trace.log_prob_sum(), log_prob_by_hand(parts, value, LENGTHS).sum())


def test_mean_over_all_subsamples_is_the_full_loss():
    """Each of the 20 subsamples of 3 ragged rows, scaled by 2; its gradient likewise."""
    parts = potentials()

    def model(index):
        with pyro.plate("data", ROWS, subsample=index) as i:
            crf = gx.LinearChainCRF(parts[0][i], parts[1], initial=parts[2], final=parts[3], lengths=LENGTHS[i])
            pyro.sample("tags", crf, obs=TAGS[i])

    losses = []
    for index in itertools.combinations(range(ROWS), 3):
        i = torch.tensor(index)
        losses.append(Trace_ELBO().differentiable_loss(model, nothing, i))
        close(losses[-1], -2 * log_prob_by_hand([parts[0][i], *parts[1:]], TAGS[i], LENGTHS[i]).sum())
    mean, truth = torch.stack(losses).mean(), -log_prob_by_hand(parts, TAGS, LENGTHS).sum()
    close(mean, truth)
    for f, t in zip(gradients(mean, parts), gradients(truth, parts), strict=True):
        close(f, t)


def test_random_subsample_of_a_module():
    """The plate draws the rows, :func:`pyro.subsample` cuts context, lengths and labels."""
    net = module()

    def model():
        with pyro.plate("data", ROWS, subsample_size=4):
            x, lengths, y = (pyro.subsample(t, event_dim=e) for t, e in ((X, 2), (LENGTHS, 0), (TAGS, 1)))
            pyro.sample("tags", net(x, lengths), obs=y)

    trace = poutine.trace(model).get_trace()
    i = trace.nodes["data"]["value"]
    truth = log_prob_by_hand(parts_of(net, params_of(net), X[i]), TAGS[i], LENGTHS[i]).sum() * ROWS / 4
    close(trace.log_prob_sum(), truth)


def test_labels_outside_name_the_site():
    wrong = TAGS.clone()
    wrong[0, 1] = V
    with pytest.raises(ValueError, match="tags"):
        Trace_ELBO().loss(tagger(potentials(), wrong), nothing)
    # without checks the label is impossible
    with pyro.validation_enabled(False):
        log_prob = crf_of(potentials(), LENGTHS).log_prob(wrong)
    assert log_prob[0] == -torch.inf and log_prob[1:].isfinite().all()


@pytest.mark.parametrize("epochs", [1, 15])
def test_svi_learns_what_fit_learns(epochs):
    """Gradient descent by ``gx.fit``, by SVI on ``pyro.module``, and by hand through the sum over all strings."""
    start = module()
    fitted, stepped = copy.deepcopy(start), copy.deepcopy(start)
    gx.fit(
        fitted,
        TAGS,
        {None: X, "lengths": LENGTHS},
        epochs=epochs,
        batch_size=ROWS,
        max_grad_norm=math.inf,
        progress=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )

    def model():
        net = pyro.module("net", stepped)
        with pyro.plate("data", ROWS):
            pyro.sample("tags", net(X, LENGTHS), obs=TAGS)

    svi = SVI(model, nothing, pyro.optim.SGD({"lr": 0.3 / ROWS}), Trace_ELBO())
    losses = [svi.step() for _ in range(epochs)]
    hand = {name: p.detach().clone().requires_grad_() for name, p in start.named_parameters()}
    for epoch in range(epochs):
        loss = -log_prob_by_hand(parts_of(start, hand), TAGS, LENGTHS)
        assert losses[epoch] == pytest.approx(loss.sum().item(), abs=1e-9)
        moved = gradients(loss.mean(), list(hand.values()))
        hand = {n: (p - 0.3 * g).detach().requires_grad_() for (n, p), g in zip(hand.items(), moved, strict=True)}
    for net in (fitted, stepped):
        for name, p in net.named_parameters():
            close(p, hand[name])
    assert (hand["transition"] - start.transition).abs().max() > 0.05


def test_predictive_draws_the_strings_as_often_as_their_mass():
    net = module().requires_grad_(False)

    def model():
        with pyro.plate("data", ROWS):
            return pyro.sample("tags", net(X, LENGTHS))

    out = Predictive(model, num_samples=4000, parallel=True)()["tags"]
    assert out.shape == (4000, ROWS, N) and (out[:, 2] == 0).all()
    truth = log_prob_by_hand(parts_of(net, params_of(net)), STRINGS[:, None], LENGTHS).exp()  # (V^N, R)
    p = torch.where((STRINGS[:, None].ne(0) & (torch.arange(N) >= LENGTHS[:, None])).any(-1), 0.0, truth)
    close(p.sum(0), torch.ones(ROWS, dtype=p.dtype))
    as_often(out, p)
    assert Predictive(model, num_samples=2)()["tags"].shape == (2, ROWS, N)


# --- the module and its parameters


def test_module_in_the_param_store_saved_and_loaded():
    band = torch.ones(V, V, dtype=torch.bool).fill_diagonal_(False)
    net, other = module(allowed=band), gx.CRF(V, context=C, allowed=band).double()
    pyro.module("tagger", net)
    store = pyro.get_param_store()
    assert set(store.keys()) == {f"tagger$$${name}" for name in params_of(net)}
    y = net(X).sample()
    truth = net(X).log_prob(y)
    assert truth.isfinite().all() and (other(X).log_prob(y) - truth).abs().max() > 0.1
    state = pickle.dumps(store.get_state())
    pyro.clear_param_store()
    store.set_state(pickle.loads(state))
    close(pyro.module("tagger", other, update_module_params=True)(X).log_prob(y), truth)
    assert "allowed" in net.state_dict() and (other(X).sample().diff() != 0).all()


class Tagger(PyroModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x=X, y=None):
        crf = self.net(x, LENGTHS)  # outside the plate, which would draw weights with priors once a row
        with pyro.plate("data", ROWS):
            return pyro.sample("tags", crf, obs=y)


def with_priors(names=("transition", "initial", "final", "emissions.weight", "emissions.bias")):
    """A CRF module with priors N(0, 1/2) on parameters, and a plain copy."""
    net = module()
    template = copy.deepcopy(net)
    to_pyro_module_(net)
    for name in names:
        owner, _, last = name.rpartition(".")
        value = params_of(template)[name].detach()
        prior = PyroSample(dist.Normal(torch.zeros_like(value), 0.5).to_event(value.dim()))
        setattr(net.get_submodule(owner), last, prior)
    return net, template


def test_weights_with_priors():
    net, template = with_priors()
    assert not list(net.parameters())
    trace = poutine.trace(lambda: net(X, LENGTHS)).get_trace()
    weights = {name: trace.nodes[name]["value"] for name in params_of(template)}
    crf = trace.nodes["_RETURN"]["value"]
    # the module's context is over, and the weights are those of the trace nonetheless
    close(crf.log_prob(TAGS), log_prob_by_hand(parts_of(net, weights), TAGS, LENGTHS))
    close(crf.log_prob(TAGS), functional_call(template, weights, (X, LENGTHS)).log_prob(TAGS))
    assert (net(X, LENGTHS).log_prob(TAGS) - crf.log_prob(TAGS)).abs().max() > 1e-3  # another call, other weights
    given = {name: value.detach() for name, value in params_of(template).items()}
    seen = poutine.condition(lambda: net(X, LENGTHS), given)()
    close(seen.log_prob(TAGS), log_prob_by_hand(parts_of(net, given), TAGS, LENGTHS))


def test_weights_with_priors_in_svi_and_predictive():
    net, template = with_priors()
    model = Tagger(net)
    guide = AutoNormal(model, init_scale=0.05)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(X, TAGS) for _ in range(50)]
    assert sum(losses[-20:]) / 20 < sum(losses[:5]) / 5 - 1
    assert all(v.grad is not None and v.grad.isfinite().all() for v in guide.parameters())
    out = Predictive(model, guide=guide, num_samples=3)()
    assert out["tags"].shape == (3, ROWS, N) and set(out) == {"tags"} | {f"net.{n}" for n in params_of(template)}


@pytest.mark.parametrize("particles", [2, ROWS])
def test_vectorised_particles_of_potentials(particles):
    """Draws (P, 1, V, V) of the transition are one a particle, also where there are as many particles as rows."""
    names = ("transition", "initial", "final")
    net, template = with_priors(names)
    model = Tagger(net)
    guide = AutoNormal(model, init_scale=0.7)
    guide(X, TAGS)
    objective = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(5)
    loss = objective.loss_and_grads(model, guide, X, TAGS)
    torch.manual_seed(5)
    with pyro.plate("particles", particles, dim=-2):
        drawn = {k.removeprefix("net."): v for k, v in guide(X, TAGS).items()}
    truth = 0.0
    for p in range(particles):
        w = {n: drawn[n][p, 0] for n in names}
        truth = truth - log_prob_by_hand(parts_of(net, {**params_of(template), **w}), TAGS, LENGTHS).sum()
        for n in names:
            loc, scale = getattr(guide.locs.net, n), getattr(guide.scales.net, n)
            truth = truth + (dist.Normal(loc, scale).log_prob(w[n]) - normal(0.0, 0.5).log_prob(w[n])).sum()
    assert loss == pytest.approx(truth.item() / particles, abs=1e-9)


def test_posterior_draws_of_potentials_in_parallel():
    """Each draw of a transition makes its own strings: these stay where they are, those never do."""
    net, _ = with_priors(("transition",))
    eye = 60.0 * torch.eye(V, dtype=torch.float64)
    draws = {"net.transition": torch.stack([eye, -eye] * 50)[:, None]}
    out = Predictive(Tagger(net), draws, parallel=True)()["tags"]
    assert out.shape == (100, ROWS, N)
    moves = (out.diff() != 0) & (torch.arange(1, N) < LENGTHS[:, None])
    assert not moves[::2].any() and moves[1::2].sum((1, 2)).eq((LENGTHS - 1).clamp(min=0).sum()).all()


def one_potential(theta, rows=4):
    """Labels tend to stay by theta: rows of two labels, shaped for draws theta (*particles)."""
    unary = sized(rows, N, 2, seed=9)
    return gx.LinearChainCRF(unary, (theta[..., None, None] * torch.eye(2, dtype=torch.float64)).unsqueeze(-3))


def test_hmc_finds_the_posterior_of_a_potential():
    """Against quadrature over theta, of the likelihood by the sum over all strings."""
    torch.manual_seed(1)
    y = one_potential(torch.tensor(1.0, dtype=torch.float64)).sample()

    def model():
        theta = pyro.sample("theta", normal(0.0, 2.0))
        with pyro.plate("data", 4):
            pyro.sample("tags", one_potential(theta), obs=y)

    theta = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    strings = torch.cartesian_prod(*[torch.arange(2)] * N)
    unary, stays = sized(4, N, 2, seed=9), (strings.diff() == 0).sum(-1)
    fixed = torch.stack([unary[:, t, strings[:, t]] for t in range(N)]).sum(0)  # (rows, 2^N)
    log_z = (fixed + theta[:, None, None] * stays).logsumexp(-1)
    log_post = (theta[:, None] * (y.diff() == 0).sum(-1) - log_z).sum(-1) - theta**2 / 8
    mass = (log_post - log_post.logsumexp(0)).exp()
    mean = (mass * theta).sum()
    sd = (mass * (theta - mean) ** 2).sum().sqrt()

    kernel = HMC(model, step_size=0.6 * sd.item(), num_steps=3, adapt_step_size=False, adapt_mass_matrix=False)
    kernel.setup(0)
    for value in (-0.7, 1.3):
        at = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(kernel.potential_fn({"theta": at}), at)
        i = int((theta - value).abs().argmin())
        close(found, -(log_post[i + 1] - log_post[i - 1]) / (theta[i + 1] - theta[i - 1]), 1e-4)
    kernel = HMC(model, step_size=0.6 * sd.item(), num_steps=3, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["theta"]
    assert (draws.mean() - mean).abs() < 5 * sd / 50**0.5  # at least a third as many independent draws
    assert draws.std() / sd == pytest.approx(1.0, abs=0.25)
