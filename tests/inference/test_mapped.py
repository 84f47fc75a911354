"""Models that are written for one draw, which ``torch.vmap`` maps over the draws of a guide."""

from __future__ import annotations

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.util import prune_subsample_sites

import pyro_genexact as gx
from pyro_genexact.inference.bounds import Bound
from pyro_genexact.inference.elbo import default_loss

Y = torch.tensor([0.3, 0.1, -0.4, 0.2, 0.6])


def chain(y=Y):
    """An autoregression of order 1 as a loop over scalars, which are stacked."""
    a = pyro.sample("a", dist.Normal(0.0, 0.5))
    means = [torch.zeros(())]
    for t in range(1, len(y)):
        means.append(a * y[t - 1])
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(means), 1.0), obs=y)


def from_the_left():
    with pyro.plate("groups", 2):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(alpha[torch.tensor([0, 1, 1])], 1.0), obs=torch.ones(3))


def plates_of_size_one():
    """The latent's own dims of size 1 must not be mistaken for those between plates."""
    with pyro.plate("outer", 1), pyro.plate("inner", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    rows = torch.stack([z[0, 0] * k + z[1, 0] for k in range(4)])
    pyro.sample("y", dist.Normal(rows, 1.0).to_event(1), obs=torch.ones(4))


def learned():
    """Has a parameter of its own and an auxiliary factor."""
    loc = pyro.param("loc", torch.tensor(0.2))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(torch.stack([z, 2 * z]), 1.0), obs=torch.ones(2))
    pyro.factor("prefer", -z.square())


def branching(y=Y):
    a = pyro.sample("a", dist.Normal(0.0, 0.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(torch.stack([a if a > 0 else -a] * len(y)), 1.0), obs=y)


def choice_of(model):
    guide = gx.guides.AutoFlow(model, hidden=(4,), warm_start=0)
    guide()
    return guide, default_loss(model, guide, 6)


def shapes_of(guide):
    sites = prune_subsample_sites(poutine.trace(guide).get_trace()).nodes.items()
    return {name: site["value"].shape for name, site in sites if site["type"] == "sample"}


@pytest.mark.parametrize("model", [chain, from_the_left, plates_of_size_one, learned])
def test_loss_and_gradients_are_those_of_single_runs(model):
    guide, loss = choice_of(model)
    assert isinstance(loss, Bound) and loss.draws.way == "mapped"
    parameters = [*guide.parameters(), *pyro.get_param_store()._params.values()]
    found = loss.loss_and_grads(model, guide)
    gradients = [p.grad.clone() for p in parameters]

    torch.manual_seed(0)
    (trace,) = loss.draws.of(guide)
    torch.manual_seed(0)
    for p in parameters:
        p.grad = None
    again = loss.loss_and_grads(model, guide)
    mapped = [p.grad.clone() for p in parameters]
    assert again != found and any((a != b).any() for a, b in zip(gradients, mapped, strict=True))

    for p in parameters:
        p.grad = None
    shapes, total = shapes_of(guide), 0.0
    for row in range(6):
        values = {name: trace.nodes[name]["value"].reshape(6, *shape)[row] for name, shape in shapes.items()}
        given = {name: value for name, value in values.items() if "latent" in name}  # the others are computed from it
        one = poutine.trace(poutine.condition(guide, data=given)).get_trace()
        run = poutine.trace(poutine.replay(model, trace=one)).get_trace()
        total = total + (one.log_prob_sum() - run.log_prob_sum()) / 6
    total.backward()
    assert again == pytest.approx(total.item(), rel=1e-5)
    for p, expected in zip(parameters, mapped, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-5)


def test_model_and_guide_have_the_same_rows():
    """Latents in a subsampled plate, whose model is mapped over draws."""
    y, loc = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2.0, 4.0, 6.0, 8.0], requires_grad=True)

    def model():
        with pyro.plate("rows", 4, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.stack([z[0], z[1] + 1]), 1.0), obs=y[rows])

    def guide():
        with pyro.plate("rows", 4, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(loc[rows], 1.0))

    loss = default_loss(model, guide, 6)
    assert isinstance(loss, Bound) and loss.draws.way == "mapped"
    (trace,) = traces = loss.draws.of(guide)
    z = trace.nodes["z"]["value"].detach().reshape(6, 2)
    rows = y[trace.nodes["rows"]["value"]]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + torch.tensor([0.0, 1.0]), 1.0).log_prob(rows)
    torch.testing.assert_close(loss.draws.log_p(model, traces).detach(), 2 * expected.sum(1))


ROWS = torch.arange(12.0)


@pytest.mark.parametrize("way", ["plated", "mapped"])
@pytest.mark.parametrize("local", [False, True])
def test_subsampled_rows_are_those_of_the_guide_and_do_not_prevent_draws_at_once(way, local):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if local else 0.0
            mean = a + z if way == "plated" else torch.stack([a * k for k in range(4)]) + z
            pyro.sample("y", dist.Normal(mean, 1.0), obs=ROWS[rows])

    def guide():
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
        if local:
            with pyro.plate("rows", 12, subsample_size=4) as rows:
                pyro.sample("z", dist.Normal(ROWS[rows], 0.1))

    loss = default_loss(model, guide, 4)
    if way == "plated":
        assert isinstance(loss, Trace_ELBO) and loss.vectorize_particles
        return
    assert loss.draws.way == "mapped"
    (trace,) = loss.draws.of(guide)
    found = loss.draws.log_p(model, [trace])
    if local:  # the model has its own rows otherwise
        single = [poutine.replay(model, trace=loss.draws.row(trace, i)) for i in range(4)]
        alone = torch.stack([poutine.trace(one).get_trace().log_prob_sum() for one in single])
        assert torch.allclose(found, alone, rtol=1e-5)


def test_fits_end_at_the_exact_posterior():
    guide = gx.guides.AutoFlow(chain, hidden=(4,), warm_start=0)
    result = gx.fit_guide(chain, guide, steps=600, lr=0.03, progress=False)
    precision = 4.0 + Y[:-1].square().sum()
    draws = guide.get_posterior().sample((4000,))
    assert draws.mean().item() == pytest.approx(((Y[:-1] * Y[1:]).sum() / precision).item(), abs=0.04)
    assert draws.std().item() == pytest.approx(precision.rsqrt().item(), rel=0.06)
    covariance = torch.eye(5) + 0.25 * torch.outer(lags := torch.cat([torch.zeros(1), Y[:-1]]), lags)
    evidence = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(Y).item()
    assert result.final == pytest.approx(evidence, abs=0.02)


def test_score_function_gradients_have_the_right_mean():
    """The gradient of the ELBO of a Bernoulli guide with probability q is known."""
    q = torch.tensor(0.3, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(torch.stack([z, -z]), 1.0), obs=torch.tensor([1.0, 0.0]))

    def guide():
        pyro.sample("z", dist.Bernoulli(q))

    loss = default_loss(model, guide, 4000)
    assert isinstance(loss, Bound) and loss.draws.way == "mapped"
    torch.manual_seed(0)
    loss.loss_and_grads(model, guide)
    log_p = [dist.Normal(torch.tensor([z, -z]), 1.0).log_prob(torch.tensor([1.0, 0.0])).sum() for z in (0.0, 1.0)]
    (exact,) = torch.autograd.grad(q * (log_p[1] - q.log()) + (1 - q) * (log_p[0] - (1 - q).log()), q)
    assert -q.grad.item() == pytest.approx(exact.item(), abs=0.06)


def test_models_that_branch_are_evaluated_one_by_one_and_with_fewer_draws():
    guide = AutoNormal(branching)
    with pytest.warns(UserWarning, match="The 4 draws of each step are evaluated one by one"):
        loss = default_loss(branching, guide, None)
    assert type(loss) is Trace_ELBO and loss.num_particles == 4 and not loss.vectorize_particles


def test_compiled_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # quick
    fit = partial(gx.fit_guide, chain, steps=30, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = tmp_path / "fit"
        one, two = (gx.guides.AutoFlow(chain, hidden=(4,)) for _ in range(2))
        one.load_state_dict(two.state_dict())
        first = fit(one, checkpoint=path, every=10)
        assert fit(two, checkpoint=path).elbo == first.elbo
    assert fit(gx.guides.AutoFlow(chain, hidden=(4,)), compile=True).steps == 30


@pytest.mark.parametrize("model", [chain, from_the_left, learned])
def test_importance_ratios_are_those_of_single_runs(model):
    guide, _ = choice_of(model)
    found = gx.diagnostics.psis(model, guide, num_samples=50)
    for row in (0, 20, 49):
        latents = {name: x[row] for name, x in found.draws.items()}
        log_p = poutine.trace(poutine.condition(model, data=latents)).get_trace().log_prob_sum()
        vector = torch.cat([x.reshape(-1) for x in latents.values()])
        log_q = guide.get_posterior().log_prob(vector)
        assert found.log_ratios[row].item() == pytest.approx((log_p - log_q).item(), abs=1e-4)


def test_log_likelihoods_of_given_draws_are_those_of_single_runs():
    values = torch.linspace(-1, 1, 30)
    found = gx.diagnostics.inference_data(chain, {"a": values})["log_likelihood"]["y"].values.squeeze()
    means = torch.cat([torch.zeros(30, 1), values[:, None] * Y[:-1]], 1)
    assert torch.allclose(torch.as_tensor(found), dist.Normal(means, 1.0).log_prob(Y), atol=1e-5)
