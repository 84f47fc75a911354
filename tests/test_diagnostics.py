"""Diagnostics of fits: against conjugate models, quadrature, SciPy, and on models known to be wrong."""

from __future__ import annotations

import math

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

import pyro_genexact as gx
from pyro_genexact import diagnostics as dg
from pyro_genexact.diagnostics import bridge, runs

F64 = torch.float64
NORMAL = dist.Normal(torch.zeros((), dtype=F64), 1.0)
DATA = torch.tensor([0.3, 1.9, -0.4, 1.1, 2.2], dtype=F64)
NUM = len(DATA)
VARIANCE = 1 / (1 + NUM / 0.49)
MEAN = VARIANCE * DATA.sum().item() / 0.49
COVARIANCE = 0.49 * torch.eye(NUM, dtype=F64) + 1
EVIDENCE = dist.MultivariateNormal(torch.zeros(NUM, dtype=F64), COVARIANCE).log_prob(DATA).item()


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def model(y):
    """mu ~ N(0, 1), y_i ~ N(mu, 0.7^2): the posterior is N(MEAN, VARIANCE)."""
    mu = pyro.sample("mu", NORMAL)
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.7), obs=y)


def guide_of(loc=MEAN, scale=VARIANCE**0.5):
    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(loc, dtype=F64), scale))

    return guide


def test_exact_guide():
    result = dg.psis(model, guide_of(), DATA, num_samples=2000)
    assert result.khat == -math.inf
    assert result.ess == pytest.approx(2000, rel=1e-9)
    assert result.log_evidence == pytest.approx(EVIDENCE, abs=1e-9)
    assert result.elbo == pytest.approx(EVIDENCE, abs=1e-9)
    assert result.draws["mu"].shape == (2000,)


def test_shifted_guide_is_corrected():
    """A wide, shifted guide: bounded ratios, so a small k-hat; all estimates within their errors."""
    result = dg.psis(model, guide_of(MEAN + 0.2, 1.5 * VARIANCE**0.5), DATA, num_samples=4000)
    assert result.khat < 0.3
    # E_q[w^2] / E_q[w]^2 by quadrature
    x = torch.linspace(-4, 6, 20001, dtype=F64)
    p, q = dist.Normal(MEAN, VARIANCE**0.5).log_prob(x), dist.Normal(MEAN + 0.2, 1.5 * VARIANCE**0.5).log_prob(x)
    assert result.ess == pytest.approx(4000 / torch.trapezoid((2 * p - q).exp(), x).item(), rel=0.05)
    assert result.log_evidence == pytest.approx(EVIDENCE, abs=5 / result.ess**0.5)
    error = 5 * (VARIANCE / result.ess) ** 0.5
    assert result.expectation(lambda d: d["mu"]).item() == pytest.approx(MEAN, abs=error)
    assert result.draws["mu"].mean().item() > MEAN + 0.15
    moments = result.expectation(lambda d: torch.stack([d["mu"] - MEAN, (d["mu"] - MEAN) ** 2], -1))
    assert moments[1].item() == pytest.approx(VARIANCE, rel=0.15)
    again = result.resample(3000)["mu"]
    assert again.shape == (3000,)
    counts = (again[:, None] == result.draws["mu"]).sum(0)
    assert ((counts - 3000 * result.log_weights.exp()).abs() < 1).all()
    assert result.elbo == pytest.approx(EVIDENCE - torch.trapezoid(q.exp() * (q - p), x).item(), abs=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_khat_is_the_tail_index(rate):
    """Of exponential p of a rate below that of q, 1, the ratios are Pareto with k = 1 - rate, without any body."""

    def exponential(rate):
        def f():
            pyro.sample("x", dist.Exponential(torch.tensor(rate, dtype=F64)))

        return f

    result = dg.psis(exponential(rate), exponential(1.0), num_samples=10000)
    assert result.khat == pytest.approx(1 - rate, abs=0.3)
    assert (result.khat > result.threshold) == (rate < 0.3)


def test_heavy_tailed_posterior():
    def heavy():
        pyro.sample("x", dist.StudentT(torch.ones(10, dtype=F64), 0.0, 1.0).to_event(1))

    def normal():
        pyro.sample("x", NORMAL.expand([10]).to_event(1))

    result = dg.psis(heavy, normal, num_samples=2000)
    assert result.khat > 0.7
    assert dg.psis(normal, heavy, num_samples=2000).khat < 0.6


def test_khat_of_a_function_is_its_tail_index():
    """Of exact draws of Student's t, |x|^m has a tail of shape m / df; the ratios have none."""
    torch.manual_seed(1)
    x = dist.StudentT(torch.tensor(1.5, dtype=F64)).sample((20000,))
    result = dg.Importance(torch.zeros(20000, dtype=F64), {"x": x})
    functions = {"square": lambda d: d["x"] ** 2, "value": lambda d: d["x"], "bounded": lambda d: d["x"].cos()}
    found = result.khat_of(lambda d: torch.stack([f(d) for f in functions.values()], -1))
    assert found.shape == (3,) and result.khat == -math.inf
    for k, shape in zip(found.tolist(), (2 / 1.5, 1 / 1.5), strict=False):
        assert abs(k - shape) < 3 * (1 + shape) / math.sqrt(3 * math.sqrt(20000))  # errors of a fit to 3 sqrt(S) draws
    assert found[2] < 0 and result.khat_of(lambda d: d["x"] - 1e9).item() < 0.7
    assert result.khat_of(lambda d: torch.ones(20000)) == -math.inf


def test_khat_of_a_function_is_at_least_that_of_the_ratios():
    ratios = 3 * torch.randn(1000, dtype=F64)
    result = dg.Importance(ratios, {"x": torch.randn(1000, dtype=F64)})
    assert result.khat_of(lambda d: torch.ones(1000)).item() == pytest.approx(result.khat)
    assert result.khat_of(lambda d: d["x"]).item() >= result.khat


def test_threshold():
    ratios = torch.randn(100, dtype=F64)
    assert dg.Importance(ratios).threshold == pytest.approx(0.5)
    assert dg.Importance(ratios.repeat(100)).threshold == pytest.approx(0.7)


def test_psis_is_arvizs():
    ratios = 2 * torch.randn(500, dtype=F64)
    result = dg.Importance(ratios)
    weights, khat = az.psislw(ratios.numpy().copy())
    assert result.khat == pytest.approx(float(khat), rel=1e-12)
    np.testing.assert_allclose(result.log_weights.numpy(), weights - np.logaddexp.reduce(weights), atol=1e-12)
    order = ratios.argsort()
    low = order[:250]  # below the tail: as they came
    unsmoothed = (ratios - ratios.logsumexp(0))[low] - result.log_weights[low]
    assert unsmoothed.std() < 1e-9
    raw = ratios.logsumexp(0).item() - math.log(500)
    assert result.log_evidence == pytest.approx(raw - unsmoothed.mean().item() * -1, abs=1e-9)


def test_draws_without_density_have_no_weight():
    ratios = torch.randn(200, dtype=F64)
    ratios[::2] = -torch.inf
    result = dg.Importance(ratios, {"x": torch.arange(200.0)})
    assert (result.log_weights[::2] == -torch.inf).all()
    assert result.log_evidence == pytest.approx(ratios.logsumexp(0).item() - math.log(200), abs=0.1)
    assert (result.resample()["x"] % 2 == 1).all()


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


def _frames():
    return [f for f in pyro.poutine.runtime._PYRO_STACK if isinstance(f, pyro.poutine.indep_messenger.IndepMessenger)]


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_ratios_of_automatic_guides_are_those_of_single_runs(make, monkeypatch):
    singles = []
    one = runs._Pair.one
    monkeypatch.setattr(runs._Pair, "one", lambda pair, i: singles.append(i) or one(pair, i))
    guide = make(centred, init_scale=0.3)
    guide(GROUPED)
    for prepare in (lambda m: m, sequentially):
        result = dg.psis(prepare(centred), guide, GROUPED, num_samples=30)
        assert singles == ([] if prepare is not sequentially else list(range(30)))
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


def test_loo_is_the_exact_one():
    """Leave-one-out predictive densities of the conjugate model in closed form."""
    data = dg.inference_data(model, guide_of(), DATA, num_samples=4000)
    rest = [torch.cat([DATA[:i], DATA[i + 1 :]]) for i in range(NUM)]
    v = 1 / (1 + (NUM - 1) / 0.49)
    truth = sum(
        st.norm.logpdf(y.item(), v * r.sum().item() / 0.49, (v + 0.49) ** 0.5) for y, r in zip(DATA, rest, strict=True)
    )
    loo = az.loo(data, pointwise=True)
    assert loo.elpd_loo == pytest.approx(truth, abs=0.15)

    def ignorant(y):
        mu = pyro.sample("mu", dist.Normal(torch.full((), -5.0, dtype=F64), 0.05))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    other = dg.inference_data(ignorant, guide_of(-5.0, 0.05), DATA, num_samples=500)
    table = az.compare({"ignorant": other, "conjugate": data})
    assert list(table.index) == ["conjugate", "ignorant"]


def test_resampled_draws_go_to_arviz():
    result = dg.psis(model, guide_of(MEAN + 0.2, 1.5 * VARIANCE**0.5), DATA, num_samples=4000)
    data = dg.inference_data(model, result.resample(), DATA)
    assert data.posterior["mu"].shape == (1, 4000)
    assert float(data.posterior["mu"].mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(data.posterior["mu"].std()) == pytest.approx(VARIANCE**0.5, rel=0.1)
    np.testing.assert_allclose(data.posterior["twice"], 2 * data.posterior["mu"])


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
    with pytest.raises(ValueError, match=r"all latents of the model; got none for \['flip', 'label'\]"):
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


def test_held_out_is_a_mean_with_its_error():
    flow = gx.flows.maf(2, context=3, hidden=(8,))
    flow.train()
    x, c = torch.randn(50, 2), torch.randn(50, 3)
    score = dg.held_out(flow, x, c, batch_size=16)
    assert flow.training
    with torch.no_grad():
        truth = flow(c).log_prob(x)
    torch.testing.assert_close(score.log_prob, truth)
    assert score.mean == pytest.approx(np.mean(truth.double().numpy()))
    assert score.standard_error == pytest.approx(st.sem(truth.double().numpy()))
    other = dg.HeldOut(truth + 0.1 * torch.randn(50))
    difference = score - other
    paired = st.ttest_rel(truth.numpy(), other.log_prob.numpy())
    assert difference.mean / difference.standard_error == pytest.approx(paired.statistic, rel=1e-4)
    low, high = paired.confidence_interval(0.95)
    half = difference.standard_error * st.t.ppf(0.975, 49)
    assert (low, high) == pytest.approx((difference.mean - half, difference.mean + half), rel=1e-4)
    best, worst = dg.compare({"a": score, "b": truth - 1})
    assert (best.name, worst.name, worst.difference.mean) == ("a", "b", pytest.approx(-1, abs=1e-5))
    assert worst.difference.standard_error < 1e-6 < worst.score.standard_error


def uniform(u):
    """The p-value of Kolmogorov and Smirnov."""
    return st.kstest(u.flatten().double().numpy(), "uniform").pvalue


def autoregressive(head):
    torch.manual_seed(1)
    net = gx.conditioners.MADE(3, head.num_params, hidden=(8,))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return gx.Autoregressive(net, head, (3,)).double()()


def shaken(flow):
    torch.manual_seed(1)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return flow.double()


PIT = {
    "normal": lambda: dist.Normal(torch.zeros(3, dtype=F64), 2.0).to_event(1),
    "poisson": lambda: dist.Poisson(torch.full((3,), 2.5, dtype=F64)),
    "autoregressive": lambda: autoregressive(gx.heads.StudentT()),
    "binary": lambda: autoregressive(gx.heads.Bernoulli()),
    "maf": lambda: shaken(gx.flows.maf(3, hidden=(8,), transforms=2))(),
    "iaf_positive": lambda: shaken(gx.flows.iaf(3, hidden=(8,), transforms=2, support=constraints.positive))(),
    "univariate": lambda: shaken(gx.flows.univariate(gx.flows.nsf))(),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
    ),
}


@pytest.mark.parametrize("name", PIT)
def test_pit_is_uniform_on_the_model_and_on_no_other(name):
    d = PIT[name]()
    with torch.no_grad():
        y = d.sample((1000,))
        u = dg.pit(d, y)
        assert u.shape == y.shape
        assert uniform(u) > 1e-3
        columns = u.reshape(1000, -1)
        if columns.shape[1] > 1:  # and independent
            assert all(st.kendalltau(columns[:, i], columns[:, i - 1]).pvalue > 1e-3 for i in range(columns.shape[1]))
        wrong = y + 1 if name == "poisson" else torch.zeros_like(y) if name == "binary" else 1.5 * y
        assert uniform(dg.pit(d, wrong)) < 1e-6


def test_pit_of_a_flow_is_the_cdf_of_its_base():
    flow = gx.Flow([dist.transforms.AffineTransform(1.0, 2.0)], dist.Normal(torch.zeros(2), 1.0).to_event(1))
    u = dg.pit(flow(), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(u, torch.tensor([0.5, st.norm.cdf(1.0)], dtype=u.dtype))


def test_pit_of_padding_is_nan():
    flow = gx.flows.maf(3, hidden=(8,))
    y = torch.randn(2, 3)
    u = dg.pit(flow(lengths=torch.tensor([3, 1])), y)
    assert u.isnan().tolist() == [[False] * 3, [False, True, True]]
    torch.testing.assert_close(u[0], dg.pit(flow(), y[0]))


def two_latents(x, y=None):
    mu = pyro.sample("mu", NORMAL)
    side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)
    return side


def amortised(scale=1.0, shift=0.0):
    """The exact posterior, N(sum(y - x) / 5, 1/5), made narrower or moved."""

    def guide(x, y):
        pyro.sample("mu", dist.Normal((y - x).sum(-1) / 5 + shift, scale * 0.2**0.5))
        pyro.sample("side", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))

    return guide


def chi_square(ranks, size=100, bins=10):
    counts = np.bincount(ranks.flatten().numpy() * bins // size, minlength=bins)
    return st.chisquare(counts).pvalue


@pytest.fixture(scope="module")
def exact_ranks():
    pyro.set_rng_seed(0)
    return dg.sbc_ranks(two_latents, amortised(), 0.5, observed="y", num_simulations=200)


def test_sbc_of_the_exact_posterior(exact_ranks):
    assert {name: (r.shape, r.dtype) for name, r in exact_ranks.items()} == {
        "mu": ((200,), torch.int64),
        "side": ((200,), torch.int64),
    }
    for ranks in exact_ranks.values():
        assert ranks.min() >= 0 and ranks.max() <= 99
        assert chi_square(ranks) > 1e-3


@pytest.mark.parametrize("kind", ["narrow", "biased"])
def test_sbc_finds_wrong_posteriors(kind):
    guide = amortised(0.4) if kind == "narrow" else amortised(shift=0.4)
    ranks = dg.sbc_ranks(two_latents, guide, 0.5, observed="y", num_simulations=150)
    assert chi_square(ranks["mu"]) < 1e-5
    assert chi_square(ranks["side"]) > 1e-3
    if kind == "narrow":
        assert ((ranks["mu"] < 10) | (ranks["mu"] >= 90)).double().mean() > 0.4
    else:
        assert (ranks["mu"] < 50).double().mean() > 0.7


def test_sbc_of_a_sampler_with_data_in_its_place():
    """A sampler that is no guide, and arguments given by position, also to a module."""

    def sampler(x, y, num_samples):
        loc, shape = (y - x).sum() / 5, (num_samples,)
        return {"mu": dist.Normal(loc, 0.2**0.5).sample(shape), "side": torch.rand(shape) < 0.3}

    ranks = dg.sbc_ranks(two_latents, sampler, 0.5, torch.zeros(4), observed=["y"], num_simulations=400)
    assert chi_square(ranks["mu"]) > 1e-3
    assert chi_square(ranks["side"]) > 1e-3

    class Guide(torch.nn.Module):
        def forward(self, x, y):
            amortised()(x, y)

    ranks = dg.sbc_ranks(two_latents, Guide(), 0.5, torch.zeros(4), observed="y", num_simulations=100)
    assert chi_square(ranks["mu"]) > 1e-3


def test_plot_of_ranks_and_uniforms(exact_ranks):
    import matplotlib.pyplot as plt

    axes = dg.plot_uniformity(exact_ranks, num_samples=99)
    assert [ax.get_title() for ax in axes] == ["mu", "side"]
    assert all(ax.lines and ax.collections for ax in axes)  # the curve and its band
    u = torch.rand(50)
    u[3] = torch.nan
    assert len(dg.plot_uniformity(u)) == 1
    plt.close("all")


class NewArviz:
    """The calls of ArviZ 1.x that differ: groups as one dict, ratios of log-likelihoods, the plot of ecdfs."""

    @staticmethod
    def from_dict(data, *, coords=None, dims=None):
        return data, coords, dims

    @staticmethod
    def plot_ecdf_pit(dt, **options):
        return dt, options


def test_new_names_of_arviz(monkeypatch):
    import sys
    from types import ModuleType, SimpleNamespace

    asked = []

    def psislw(log_likelihood):
        asked.append(log_likelihood)
        return az.psislw(-log_likelihood)

    base = ModuleType("arviz_stats.base")
    base.array_stats = SimpleNamespace(psislw=psislw)
    ratios = 2 * torch.randn(300, dtype=F64)
    truth = bridge.psislw(ratios)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", base)
    monkeypatch.setitem(sys.modules, "arviz_stats", ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz", NewArviz)
    weights, khat = bridge.psislw(ratios)
    assert len(asked) == 1
    torch.testing.assert_close(weights, truth[0])
    assert khat == truth[1]
    groups, coords, dims = dg.inference_data(model, guide_of(), DATA, num_samples=30)
    assert set(groups) == {"posterior", "log_likelihood", "posterior_predictive", "observed_data"}
    assert dims["y"] == ["row"] and coords == {}
    (groups, _, _), options = dg.plot_uniformity({"mu": torch.rand(40)}, color="red")
    assert groups["prior_sbc"]["mu"].shape == (1, 40)
    assert options == {"var_names": ["mu"], "color": "red"}


def part_of_the_data(y):
    mu = pyro.sample("mu", NORMAL)
    with pyro.plate("row", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 0.7), obs=y[index])


def sometimes(y):
    if pyro.sample("mu", NORMAL) > 0:
        pyro.sample("more", NORMAL)


def nothing(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


ERRORS = {
    "too few draws": (lambda: dg.psis(model, guide_of(), DATA, num_samples=10), "num_samples to be an integer >= 25"),
    "matrix": (lambda: dg.Importance(torch.zeros(30, 2)), r"log_ratios of shape \(S,\), S >= 25; got \(30, 2\)"),
    "nan": (lambda: dg.Importance(torch.full((30,), torch.nan)), "got NaN or infinity for 30 of 30 draws"),
    "nowhere": (lambda: dg.Importance(torch.full((30,), -torch.inf)), "draws of positive density"),
    "draws": (lambda: dg.Importance(torch.zeros(30), {"x": torch.zeros(3)}), r"draws of shape \(30, ...\)"),
    "values": (lambda: dg.Importance(torch.zeros(30)).khat_of(lambda d: torch.full((30,), torch.inf)), "finite values"),
    "expectation": (
        lambda: dg.Importance(torch.zeros(30)).expectation(lambda d: torch.zeros(3)),
        r"function\(draws\).shape\[0\] == 30; got \(3,\)",
    ),
    "missing": (lambda: dg.psis(model, lambda y: None, DATA), r"all latents of the model; got none for \['mu'\]"),
    "unknown": (
        lambda: dg.psis(nothing, guide_of(), DATA),
        r"latents of the model, \[\], and sites with infer={'is_auxiliary': True}; got \['mu'\]",
    ),
    "subsampled": (
        lambda: dg.psis(part_of_the_data, guide_of(), DATA),
        r"plates without subsampling \(log p would be an estimate\); got 2 of 5 in plate 'row'",
    ),
    "point": (
        lambda: dg.psis(model, AutoDelta(model), DATA),
        r"a density of each latent; got one value in all draws for \['mu'\]",
    ),
    "sometimes": (lambda: dg.psis(sometimes, sometimes, DATA), r"same latents in every run .*; got \['more'\] in some"),
    "fit": (lambda: dg.inference_data(gx.flows.maf(2), gx.FitResult([], [], 0, 0.0, False)), "no draws to average"),
    "no latents": (lambda: dg.inference_data(nothing, lambda y: None, DATA), "a model without latents.*held_out"),
    "no draws": (lambda: dg.inference_data(model, {"mu": torch.tensor(1.0)}, DATA), r"draws of shape \(S, ...\)"),
    "row": (lambda: dg.HeldOut(torch.zeros(1)), r"log_prob of shape \(N,\), N >= 2; got \(1,\)"),
    "nan row": (lambda: dg.HeldOut(torch.tensor([0.0, torch.nan])), r"first in rows \[1\]"),
    "other rows": (lambda: dg.HeldOut(torch.zeros(2)) - dg.HeldOut(torch.zeros(3)), "same 2 rows; got 3"),
    "none": (lambda: dg.compare({}), "at least one model"),
    "observed": (lambda: dg.sbc_ranks(two_latents, amortised(), 0.5, observed="z"), r"got \['z'\]"),
    "two observed": (lambda: dg.sbc_ranks(model, guide_of(), DATA, observed=[]), r"without \['y'\]"),
    "nothing latent": (lambda: dg.sbc_ranks(nothing, guide_of(), DATA, observed="y"), "a model with latents"),
    "wrong draws": (
        lambda: dg.sbc_ranks(model, lambda y, num_samples: {"mu": torch.zeros(3)}, DATA, observed="y"),
        r"draws of 'mu' of shape \(99,\); got \(3,\)",
    ),
    "outside": (lambda: dg.plot_uniformity(torch.tensor([0.2, 7.0])), r"numbers in \[0, 1\] for 'u'.*got 0.2.* to 7.0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_families_without_a_cdf_have_no_pit():
    with pytest.raises(NotImplementedError, match="with a cdf; got VonMises"):
        dg.pit(dist.VonMises(0.0, 1.0), torch.tensor(0.0))


def test_held_out_of_no_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module; got Normal"):
        dg.held_out(dist.Normal(0.0, 1.0), DATA)
