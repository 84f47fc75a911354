"""Exact posterior draws from guides that are wrong, against closed forms and quadrature."""

from __future__ import annotations

import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal

import pyro_genexact as gx
from pyro_genexact.diagnostics import nuts
from support.conjugate import DATA, MEAN, NORMAL, VARIANCE, guide_of, model
from support.values import F64

SD = VARIANCE**0.5
QUIET = {"progress": False}
REWEIGHTED = ("metropolis", "importance")


def wrong(scale=1.5):
    """A guide of Pyro that is half a standard deviation off and too wide."""
    guide = AutoDiagonalNormal(model)
    guide(DATA)
    guide.loc.data.fill_(MEAN + 0.5 * SD)
    guide.scale = torch.full((1,), scale * SD, dtype=F64)
    return guide


def agrees(values, truth, sd):
    """The mean of values (chains, draws) is within 4 standard errors of the truth, by their effective sample size."""
    error = sd / az.ess(values, method="mean") ** 0.5
    assert abs(values.mean() - truth) < 4 * error, (values.mean(), truth, error)


@pytest.mark.parametrize("method", [*REWEIGHTED, "nuts"])
def test_a_wrong_guide_is_corrected(method):
    size = {"draws": 200, "chains": 2, "warmup": 40} if method == "nuts" else {"draws": 1000}
    data = gx.sample_posterior(model, wrong(), DATA, method=method, **size, **QUIET)
    mu = data.posterior["mu"].values
    assert mu.shape == (size.get("chains", 4), size["draws"]) and data.posterior.attrs["method"] == method
    agrees(mu, MEAN, SD)
    agrees((mu - MEAN) ** 2, VARIANCE, VARIANCE * 2**0.5)
    for p in (0.1, 0.5, 0.9):  # exact quantiles
        below = mu < MEAN + SD * math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1, dtype=F64)).item()
        agrees(below.astype(float), p, math.sqrt(p * (1 - p)))
    np.testing.assert_allclose(data.posterior["twice"], 2 * mu)
    table = az.summary(data, kind="diagnostics", var_names="mu")
    assert table["r_hat"].item() < 1.02 and table["ess_bulk"].item() > 0.2 * mu.size
    at = torch.tensor(mu[1, 5])
    joint = NORMAL.log_prob(at) + dist.Normal(at, 0.7).log_prob(DATA).sum()
    assert data.sample_stats["lp"][1, 5].item() == pytest.approx(joint.item())
    assert data.log_likelihood["y"].dims == ("chain", "draw", "row")
    assert data.observed_data["y"].values.tolist() == DATA.tolist()


def test_importance_reports_the_effective_sample_size_of_its_weights():
    data = gx.sample_posterior(model, guide_of(MEAN, 1.5 * SD), DATA, method="importance", **QUIET)
    x = torch.linspace(-4, 6, 20001, dtype=F64)
    p, q = dist.Normal(MEAN, SD).log_prob(x), dist.Normal(MEAN, 1.5 * SD).log_prob(x)
    share = 1 / torch.trapezoid((2 * p - q).exp(), x).item()  # E_q[w]^2 / E_q[w^2]
    assert data.posterior.attrs["importance_ess"] / (4 * 5100) == pytest.approx(share, rel=0.02)
    assert data.posterior.attrs["khat"] < 0.3
    assert len(np.unique(data.posterior["mu"])) == 4000  # no weight is above 1 / 4000


def test_copies_of_a_draw_are_next_to_each_other():
    """Of a guide that rarely draws from the posterior, ArviZ's effective sample size is about the number of distinct draws."""
    with pytest.warns(UserWarning, match="k-hat"):
        data = gx.sample_posterior(
            model, guide_of(MEAN, 60 * SD), DATA, method="importance", proposals=1, draws=500, **QUIET
        )
    mu = data.posterior["mu"].values
    assert len(np.unique(mu)) < 200 and az.ess(mu) < 2 * len(np.unique(mu))
    agrees(mu, MEAN, SD)


def test_acceptance_rate_is_that_of_the_densities():
    """E min(1, r(z') / r(z)) for z of the posterior and z' of the guide, by quadrature; 1 for the exact guide."""
    exact = gx.sample_posterior(model, guide_of(), DATA, draws=20, **QUIET)
    np.testing.assert_allclose(exact.sample_stats["acceptance_rate"], 1.0, atol=1e-9)
    assert exact.posterior.attrs["khat"] == -math.inf
    assert len(np.unique(exact.posterior["mu"])) == 80
    x = torch.linspace(MEAN - 8 * SD, MEAN + 8 * SD, 1001, dtype=F64)
    p, q = (dist.Normal(MEAN, s * SD).log_prob(x).softmax(0) for s in (1.0, 1.5))
    ratio = p / q
    truth = (p[:, None] * q * (ratio / ratio[:, None]).clamp(max=1)).sum().item()
    data = gx.sample_posterior(model, guide_of(MEAN, 1.5 * SD), DATA, **QUIET)
    assert data.sample_stats["acceptance_rate"].shape == (4, 1000)
    assert float(data.sample_stats["acceptance_rate"].mean()) == pytest.approx(truth, abs=0.02)


def test_skewed_posterior_and_a_chain_that_stays():
    """A rate of an exponential: the posterior is Gamma(4, 6). One proposal per draw repeats rejected states."""
    y = torch.tensor([0.5, 2.0, 2.5], dtype=F64)

    def events():
        rate = pyro.sample("rate", dist.Exponential(torch.ones((), dtype=F64)))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    def guide():
        pyro.sample("rate", dist.LogNormal(torch.tensor(-0.6, dtype=F64), 0.8))

    mean, variance = 4 / 6, 4 / 36
    for method in REWEIGHTED:
        data = gx.sample_posterior(events, guide, method=method, proposals=1 if method == "metropolis" else 5, **QUIET)
        rate = data.posterior["rate"].values
        agrees(rate, mean, variance**0.5)
        agrees((rate - mean) ** 2, variance, variance * (2 + 6 / 4) ** 0.5)
        if method == "metropolis":
            repeated = (np.diff(rate) == 0).mean()
            assert (
                repeated == pytest.approx(1 - float(data.sample_stats["acceptance_rate"].mean()), abs=0.03)
                and repeated > 0.1
            )


def test_two_modes_have_their_weights():
    def modes():
        weights = torch.tensor([0.7, 0.3], dtype=F64)
        parts = dist.Normal(torch.tensor([-2.0, 2.0], dtype=F64), 0.5)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts))

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), 2.5))

    for method in REWEIGHTED:
        left = gx.sample_posterior(modes, guide, method=method, **QUIET).posterior["x"].values < 0
        agrees(left.astype(float), 0.7, 0.21**0.5)


@pytest.mark.parametrize("method", REWEIGHTED)
def test_a_narrow_guide_is_reported(method):
    with pytest.warns(UserWarning, match=f"k-hat is .* far from .* method='{method}' are not reliable") as found:
        gx.sample_posterior(model, guide_of(MEAN, 0.4 * SD), DATA, draws=100, method=method, **QUIET)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gx.sample_posterior(model, guide_of(MEAN, 1.1 * SD), DATA, draws=100, method=method, **QUIET)


@pytest.mark.parametrize("method", [*REWEIGHTED, "nuts"])
def test_a_seed_gives_the_same_draws_and_keeps_the_random_state(method):
    guide, size = wrong(), {"draws": 5, "chains": 2, "warmup": 5, "method": method}
    state = torch.get_rng_state()
    one, two, other = (
        gx.sample_posterior(model, guide, DATA, seed=s, **size, **QUIET).posterior["mu"].values for s in (3, 3, 4)
    )
    assert (one == two).all() and (one != other).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in guide.parameters())


def test_the_noise_of_a_flow_is_sampled():
    guide = gx.guides.AutoFlow(model, hidden=(4,), transforms=1, warm_start=0, init_scale=0.5)
    for size in ({"draws": 300, "chains": 2}, {"draws": 80, "chains": 2, "warmup": 30, "method": "nuts"}):
        data = gx.sample_posterior(model, guide, DATA, predictions=False, **size, **QUIET)
        agrees(data.posterior["mu"].values, MEAN, SD)
        assert set(data.groups()) == {"posterior", "sample_stats", "observed_data"}


def test_an_amortised_guide_is_corrected():
    guide = gx.guides.Amortized(model, observed="y")
    gx.fit_amortized(model, guide, DATA, simulations=100, epochs=1, progress=False)
    data = gx.sample_posterior(model, guide, DATA, draws=150, **QUIET)
    agrees(data.posterior["mu"].values, MEAN, SD)


def groups_of_rows(y):
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    corr = pyro.sample("corr", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("group", 2, dim=-2):
        level = pyro.sample("level", NORMAL)
        with pyro.plate("school", 3, dim=-1):
            theta = pyro.sample("theta", dist.Normal(level, scale))
            pyro.deterministic("effect", theta - level)
            pyro.sample("y", dist.Normal(theta + corr[..., 0], 1.0), obs=y)


@pytest.mark.parametrize("method", ["metropolis", "nuts"])
def test_sites_have_their_supports_and_the_names_of_plates(method):
    y = torch.arange(6, dtype=F64).reshape(2, 3) / 4
    guide = AutoMultivariateNormal(groups_of_rows, init_scale=0.5)
    guide(y)
    warnings.simplefilter("ignore")  # it is not fitted
    data = gx.sample_posterior(groups_of_rows, guide, y, draws=4, chains=2, warmup=4, method=method, **QUIET)
    dims = {name: x.dims[2:] for name, x in data.posterior.data_vars.items()}
    assert dims == {
        "scale": (), "corr": ("corr_dim_0",), "level": ("group",), "theta": ("group", "school"), "effect": ("group", "school")
    }  # fmt: skip
    assert (data.posterior["scale"] > 0).all()
    np.testing.assert_allclose(data.posterior["corr"].sum("corr_dim_0"), 1.0)
    np.testing.assert_allclose(data.posterior["effect"], data.posterior["theta"] - data.posterior["level"])
    assert data.sample_stats["lp"].shape == data.posterior["scale"].shape == (2, 4)


@config_enumerate
def mixture(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4], dtype=F64)))
        pyro.sample("x", dist.Normal(loc + 2.0 * k, 1.0), obs=x)


@pytest.mark.parametrize("method", ["metropolis", "nuts"])
def test_enumerated_latents_stay_summed_out(method):
    x = torch.tensor([0.1, 2.2, 1.0], dtype=F64)
    guide = AutoDiagonalNormal(pyro.poutine.block(mixture, hide=["k"]), init_scale=1.0)
    guide(x)
    data = gx.sample_posterior(mixture, guide, x, draws=80, chains=2, warmup=30, method=method, **QUIET)
    grid = torch.linspace(-8, 8, 4001, dtype=F64).unsqueeze(-1)
    parts = torch.stack([dist.Normal(grid + 2.0 * k, 1.0).log_prob(x) + math.log(p) for k, p in ((0, 0.6), (1, 0.4))])
    log_p = dist.Normal(0.0, 2.0).log_prob(grid[:, 0]) + parts.logsumexp(0).sum(-1)
    p, at = log_p.softmax(0), data.posterior["loc"].values
    mean = (p * grid[:, 0]).sum()
    sd = (p * (grid[:, 0] - mean) ** 2).sum().sqrt()
    agrees(at, mean.item(), sd.item())
    np.testing.assert_allclose(data.sample_stats["lp"], np.interp(at, grid[:, 0], log_p), atol=1e-3)
    assert set(data.posterior.data_vars) == {"loc"} and "log_likelihood" not in list(data.groups())


def walk(y):
    """Written for one draw: a loop over scalars that are stacked."""
    state, values = pyro.sample("start", NORMAL), []
    for _ in y:
        state = 0.5 * state
        values.append(state)
    pyro.sample("y", dist.Normal(torch.stack(values), 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("method", ["importance", "nuts"])
def test_a_model_for_one_draw(method):
    y, slopes = torch.tensor([1.0, 0.2], dtype=F64), torch.tensor([0.5, 0.25], dtype=F64)
    guide = AutoDiagonalNormal(walk, init_scale=1.0)
    guide(y)
    data = gx.sample_posterior(walk, guide, y, method=method, draws=80, chains=2, warmup=30, **QUIET)
    variance = 1 / (1 + (slopes**2).sum().item() / 0.25)
    agrees(data.posterior["start"].values, variance * (slopes * y).sum().item() / 0.25, variance**0.5)


def test_only_models_that_do_not_branch_on_values_are_compiled(monkeypatch):
    """The density differs on the two sides of 0, and a compiled one would be that of one side."""

    def sided(y):
        mu = pyro.sample("mu", NORMAL)
        pyro.factor("side", torch.tensor(1.0 if mu > 0 else -1.0, dtype=F64))

    asked = []
    compiled = nuts.compiled
    monkeypatch.setattr(nuts, "compiled", lambda *given: asked.append(compiled(*given)))
    for program in (sided, model):
        guide = AutoDiagonalNormal(program, init_scale=1.0)
        guide(DATA)
        gx.sample_posterior(program, guide, DATA, draws=3, chains=1, warmup=3, method="nuts", **QUIET)
        assert len(asked) == (program is model)
    assert asked[0] is not None


def test_a_compiled_energy_that_differs_is_not_used():
    points = [{"z": torch.tensor([x], dtype=F64)} for x in (0.5, -0.5)]

    def energy(z):
        return (z["z"] ** 2).sum()

    def same(z):
        return energy(z) + 0.0

    def other(z):  # where z is not positive
        return (z["z"].abs() * z["z"]).sum()

    found = [nuts.compiled(lambda fast=fast, **_: (0, fast, 0, 0), {}, energy, points) for fast in (same, other, None)]
    assert found == [same, None, None]


def test_progress(capfd):
    gx.sample_posterior(model, guide_of(), DATA, draws=600)
    assert "12400/12400 proposals" in capfd.readouterr().err


def subsampled(y):
    mu = pyro.sample("mu", NORMAL)
    with pyro.plate("row", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 0.7), obs=y[rows])


def nowhere(y):
    pyro.sample("mu", dist.Uniform(torch.tensor(7.0, dtype=F64), 8.0, validate_args=False))


ERRORS = {
    "draws": ({"draws": 0}, "Expected draws to be an integer >= 1; got 0"),
    "chains": ({"chains": 0}, "Expected chains to be an integer >= 1; got 0"),
    "proposals": ({"proposals": 0.5}, "Expected proposals to be an integer >= 1; got 0.5"),
    "method": ({"method": "gibbs"}, "one of 'metropolis', 'importance', 'nuts'; got 'gibbs'"),
    "seed": ({"seed": -1}, "seed to be an integer from 0"),
    "point": ({"guide": AutoDelta(model)}, r"a density for each latent; got a point estimate for \['mu'\]"),
    "missing": ({"guide": lambda y: None}, r"all latents of the model; \['mu'\] are missing"),
    "rows": ({"model": subsampled}, "plates without subsampling"),
    "observed": (
        {"model": lambda y: pyro.sample("y", NORMAL, obs=y[0]), "guide": lambda y: None},
        "a model with latents",
    ),
    "nowhere": ({"model": nowhere}, "positive density under the model; got -inf for all"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, message = ERRORS[name]
    programs = {"model": model, "guide": guide_of()}
    with pytest.raises(ValueError, match=message):
        given = programs | options
        gx.sample_posterior(given.pop("model"), given.pop("guide"), DATA, **given, **QUIET)


def test_nuts_needs_a_transform_of_noise():
    with pytest.raises(TypeError, match="guide for method 'nuts' to be of class AutoContinuous; got function"):
        gx.sample_posterior(model, guide_of(), DATA, method="nuts", **QUIET)
