"""Chains of labels at ``pyro.sample`` sites: likelihoods, handlers, learning, priors on potentials, conventions."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro_models import clean as clean
from registry import built, sized
from test_pyro import close, params_of
from torch.distributions import kl_divergence
from torch.func import functional_call, grad, hessian, jacrev, vmap

import pyro_genexact as gx

ROWS, N, V, C = 6, 4, 3, 2
LENGTHS = torch.tensor([4, 2, 0, 3, 1, 4])
X = sized(ROWS, N, C, seed=1)
STRINGS = torch.cartesian_prod(*[torch.arange(V)] * N)  # (V^N, N)


def potentials(rows=ROWS, seed=2, scale=1.0):
    """unary (rows, N, V), transition (V, V), initial (V), final (V), as leaves."""
    shapes = ((rows, N, V), (V, V), (V,), (V,))
    return [(scale * sized(*shape, seed=seed + i)).requires_grad_() for i, shape in enumerate(shapes)]


def score_by_hand(parts, y, lengths=None):
    """The score of labels y (*, R, N): (*, R), site by site."""
    unary, transition, initial, final = parts
    rows = torch.arange(len(unary))
    lengths = torch.full((len(unary),), N) if lengths is None else lengths
    total = torch.zeros(torch.broadcast_shapes(y.shape[:-1], (len(unary),)), dtype=unary.dtype)
    for t in range(N):
        here, label = lengths > t, torch.where(lengths > t, y[..., t], 0)
        step = initial[label] if t == 0 else transition[before, label]  # noqa: F821
        total = total + torch.where(here, unary[rows, t, label] + step, 0.0)
        total = total + torch.where(lengths == t + 1, final[label], 0.0)
        before = label  # noqa: F841
    return total


def log_prob_by_hand(parts, y, lengths=None):
    """log p(y), (*, R); log Z is a sum over all V^N strings, of which V^(N - length) are one."""
    pad = 0 if lengths is None else (N - lengths).double() * math.log(V)
    return score_by_hand(parts, y, lengths) - score_by_hand(parts, STRINGS[:, None], lengths).logsumexp(0) + pad


def crf_of(parts, lengths=None, **options):
    return gx.LinearChainCRF(*parts[:2], initial=parts[2], final=parts[3], lengths=lengths, **options)


def labels(rows=ROWS, seed=3, lengths=LENGTHS):
    """Labels (rows, N), -100 in padding."""
    y = torch.randint(V, (rows, N), generator=torch.Generator().manual_seed(seed))
    return y if lengths is None else y.masked_fill(torch.arange(N) >= lengths[:, None], -100)


TAGS = labels()


def tagger(parts, y=TAGS, lengths=LENGTHS):
    def model():
        with pyro.plate("data", ROWS):
            return pyro.sample("tags", crf_of(parts, lengths), obs=y)

    return model


def module(**options):
    """A CRF module in float64 with parameters far from zero."""
    return built(gx.CRF(V, context=C, **options))


def parts_of(net, w, x=X):
    """What the module's potentials are, by plain tensor operations with weights ``w``."""
    return x @ w["emissions.weight"].T + w["emissions.bias"], w["transition"], w["initial"], w["final"]


def gradients(loss, parts):
    return torch.autograd.grad(loss, parts, materialize_grads=True)


def as_often(draws, p):
    """Draws (K, R, N) are the strings as often as their masses (V^N, R) say: within 5 standard errors and 3 draws."""
    index = (draws * V ** torch.arange(N - 1, -1, -1)).sum(-1)
    found = torch.stack([one.bincount(minlength=len(p)) for one in index.T], 1)
    assert ((found - len(draws) * p).abs() < 5 * (len(draws) * p * (1 - p)).sqrt() + 3).all() and (
        found[p == 0] == 0
    ).all()


def normal(loc, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), scale)


def nothing(*_):
    pass


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
