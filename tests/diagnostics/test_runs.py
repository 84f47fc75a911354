"""Runs of model and guide together: plates, masks, enumerated and deterministic sites."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal
from torch.distributions import constraints

from pyro_genexact import diagnostics as dg
from pyro_genexact.diagnostics import guide_draws
from support.conjugate import DATA, MEAN, NORMAL, VARIANCE, guide_of, model
from support.values import F64


def centred(y):
    """Group offsets beside school effects, in two plates that cross."""
    mu = pyro.sample("mu", NORMAL)
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    corr = pyro.sample("corr", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("group", 2, dim=-2):
        level = pyro.sample("level", NORMAL)
        with pyro.plate("school", y.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu + level, tau))
            pyro.deterministic("effect", theta - mu)  # in a plate, and without event_dim
            pyro.sample("y", dist.Normal(theta + corr[..., 0], 1.0), obs=y)


GROUPED = torch.arange(8, dtype=F64).reshape(2, 4) / 4


def sequentially(model):
    """The same model, which does not run in a plate around it."""

    def alone(*args):
        assert not any(frame.name.startswith("_draws") for frame in _frames())
        return model(*args)

    return alone


def branching(model):
    """The same model, which ``torch.vmap`` cannot map either."""

    def alone(*args):
        with poutine.trace() as trace:
            returned = sequentially(model)(*args)
        assert all(site["value"].isfinite().all() for site in trace.trace.nodes.values() if site["type"] == "sample")
        return returned

    return alone


def _frames():
    return [f for f in pyro.poutine.runtime._PYRO_STACK if isinstance(f, pyro.poutine.indep_messenger.IndepMessenger)]


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_ratios_of_automatic_guides_are_those_of_single_runs(make, monkeypatch):
    singles = []
    one = guide_draws.ModelAndPosterior.one
    monkeypatch.setattr(guide_draws.ModelAndPosterior, "one", lambda pair, i: singles.append(i) or one(pair, i))
    guide = make(centred, init_scale=0.3)
    guide(GROUPED)
    for prepare in (lambda m: m, sequentially, branching):
        result = dg.psis(prepare(centred), guide, GROUPED, num_samples=30)
        assert singles == ([] if prepare is not branching else list(range(30)))
        shapes = {name: tuple(value.shape[1:]) for name, value in result.draws.items()}
        assert shapes == {"mu": (), "tau": (), "corr": (3,), "level": (2, 1), "theta": (2, 4)}
        for i in (0, 7):  # the density of the latents under the guide, through the maps of their supports
            values = {name: value[i] for name, value in result.draws.items()}
            truth = poutine.trace(poutine.condition(centred, values)).get_trace(GROUPED).log_prob_sum()
            unconstrained = torch.cat(
                [
                    torch.distributions.biject_to(constraint).inv(values[name]).flatten()
                    for name, constraint in (
                        ("mu", constraints.real),
                        ("tau", constraints.positive),
                        ("corr", constraints.simplex),
                        ("level", constraints.real),
                        ("theta", constraints.real),
                    )
                ]
            )
            log_q = guide.get_posterior().log_prob(unconstrained).sum()
            for name, constraint in (("tau", constraints.positive), ("corr", constraints.simplex)):
                to = torch.distributions.biject_to(constraint)
                x = to.inv(values[name])
                log_q = log_q - to.log_abs_det_jacobian(x, values[name]).sum()
            assert result.log_ratios[i].item() == pytest.approx((truth - log_q).item(), abs=1e-4)


def test_inference_data_has_named_dims_and_what_arviz_wants():
    guide = AutoDiagonalNormal(centred, init_scale=0.1)
    guide(GROUPED)
    data = dg.inference_data(centred, guide, GROUPED, num_samples=60, coords={"school": list("abcd")})
    posterior = {name: x.dims[2:] for name, x in data.posterior.data_vars.items()}
    assert posterior == {
        "mu": (),
        "tau": (),
        "corr": ("corr_dim_0",),
        "level": ("group",),
        "theta": ("group", "school"),
        "effect": ("group", "school"),
    }
    for group in ("log_likelihood", "posterior_predictive"):
        assert data[group]["y"].dims == ("chain", "draw", "group", "school")
    assert data.observed_data["y"].sel(school="b").values.tolist() == GROUPED[:, 1].tolist()
    np.testing.assert_allclose(data.posterior["effect"], data.posterior["theta"] - data.posterior["mu"])
    loc = data.posterior["theta"] + data.posterior["corr"].isel(corr_dim_0=0)
    truth = st.norm.logpdf(GROUPED.numpy(), loc.transpose("chain", "draw", "group", "school"), 1.0)
    np.testing.assert_allclose(data.log_likelihood["y"], truth, atol=1e-6)
    residual = data.posterior_predictive["y"] - loc
    assert 0.9 < float(residual.std()) < 1.1
    assert abs(float(residual.mean())) < 0.2
    assert len(az.summary(data, kind="stats")) == 1 + 1 + 3 + 2 + 8 + 8


def test_events_masks_factors_and_scales():
    mask = torch.tensor([True, False, True])

    def f():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.factor("prior", -loc.square().sum(-1))
        with pyro.plate("row", 3), poutine.scale(scale=2.0), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(3, 2, dtype=F64))

    def g():
        pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=F64), 0.5).to_event(1))

    for program in (f, sequentially(f)):
        result = dg.psis(program, g, num_samples=50)
        loc = result.draws["loc"]
        log_lik = st.norm.logpdf(1.0, loc.numpy(), 1.0).sum(-1)
        truth = st.norm.logpdf(loc.numpy()).sum(-1) - loc.square().sum(-1).numpy() + 2 * 2 * log_lik
        truth -= st.norm.logpdf(loc.numpy(), 0, 0.5).sum(-1)
        np.testing.assert_allclose(result.log_ratios.numpy(), truth, atol=1e-5)
        data = dg.inference_data(program, g, num_samples=20)
        assert list(data.log_likelihood.data_vars) == ["y"]
        assert data.log_likelihood["y"].dims == ("chain", "draw", "row")
        assert data.posterior_predictive["y"].shape == (1, 20, 3, 2)
        log_lik = st.norm.logpdf(1.0, data.posterior["loc"].values, 1.0).sum(-1)
        np.testing.assert_allclose(data.log_likelihood["y"], log_lik[..., None] * mask.numpy(), atol=1e-6)


def test_a_model_that_mixes_draws_is_run_one_by_one():
    """In a plate around it the sum would run over all draws: found out, and not believed."""

    def mixing(y):
        mu = pyro.sample("mu", NORMAL)
        pyro.sample("y", dist.Normal(mu.sum() + y, 1.0), obs=y)

    result = dg.psis(mixing, guide_of(), DATA[0], num_samples=40)
    mu = result.draws["mu"].numpy()
    truth = st.norm.logpdf(mu) + st.norm.logpdf(mu) - st.norm.logpdf(mu, MEAN, VARIANCE**0.5)
    np.testing.assert_allclose(result.log_ratios.numpy(), truth, atol=1e-9)


def test_enumerated_latents_are_summed_out():
    """Two hidden labels in a plate, one outside: against the sum written out."""
    y = torch.tensor([0.5, -1.5, 2.0], dtype=F64)
    p = torch.tensor([0.3, 0.7], dtype=F64)

    @config_enumerate
    def mixture():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
        flip = pyro.sample("flip", dist.Bernoulli(torch.tensor(0.2, dtype=F64)))
        pyro.deterministic("distance", loc[..., 1] - loc[..., 0])
        with pyro.plate("row", 3):
            label = pyro.sample("label", dist.Categorical(p))
            pyro.sample("y", dist.Normal(loc[label] + flip, 1.0), obs=y)

    def g():
        pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 0.5).to_event(1))

    result = dg.psis(mixture, g, num_samples=30)
    assert list(result.draws) == ["loc"]
    loc = result.draws["loc"].numpy()
    parts = []
    for flip in (0, 1):
        rows = p.numpy() * st.norm.pdf(y.numpy()[:, None], loc[:, None] + flip)
        parts.append((0.2 if flip else 0.8) * rows.sum(-1).prod(-1))
    truth = np.log(sum(parts)) + st.norm.logpdf(loc, 0, 3).sum(-1) - st.norm.logpdf(loc, [-1, 1], 0.5).sum(-1)
    np.testing.assert_allclose(result.log_ratios.numpy(), truth, atol=1e-9)
    with pytest.raises(ValueError, match=r"all latents of the model; \['flip', 'label'\] are missing"):
        dg.inference_data(mixture, g)


def test_a_latent_given_an_enumerated_one():
    """z ~ N(2k - 1, 1), k summed out."""

    @config_enumerate
    def model_():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
        z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64)[k], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5, dtype=F64))

    result = dg.psis(model_, lambda: pyro.sample("z", dist.Normal(torch.tensor(0.2, dtype=F64), 1.5)), num_samples=30)
    z = result.draws["z"].numpy()
    prior = 0.3 * st.norm.pdf(z, -1) + 0.7 * st.norm.pdf(z, 1)
    truth = np.log(prior) + st.norm.logpdf(0.5, z) - st.norm.logpdf(z, 0.2, 1.5)
    np.testing.assert_allclose(result.log_ratios.numpy(), truth, atol=1e-9)


def test_deterministic_sites_in_plates_are_not_drawn_anew():
    def model_(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            total = pyro.deterministic("total", mu + z)
            pyro.sample("y", dist.Normal(total, 0.01), obs=y)

    y = torch.arange(5, dtype=F64)
    guide = AutoDiagonalNormal(model_)
    guide(y)
    data = dg.inference_data(model_, guide, y, num_samples=30)
    posterior = data.posterior
    np.testing.assert_allclose(posterior["total"], posterior["mu"].values[..., None] + posterior["z"], atol=1e-12)
    np.testing.assert_allclose(data.posterior_predictive["y"], posterior["total"], atol=0.06)


def test_point_guide_goes_to_arviz():
    guide = AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(0.5)}))
    guide(DATA)
    data = dg.inference_data(model, guide, DATA, num_samples=30)
    assert (data.posterior["mu"].values == 0.5).all()
