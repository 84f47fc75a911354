"""Importance ratios, k-hat and leave-one-out, against conjugate models and ArviZ."""

from __future__ import annotations

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch

from pyro_genexact import diagnostics as dg
from pyro_genexact.diagnostics import arviz_compat
from support.conjugate import DATA, MEAN, NORMAL, NUM, VARIANCE, guide_of, model
from support.values import F64

COVARIANCE = 0.49 * torch.eye(NUM, dtype=F64) + 1
EVIDENCE = dist.MultivariateNormal(torch.zeros(NUM, dtype=F64), COVARIANCE).log_prob(DATA).item()


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


def test_discrete_latents_have_bounded_weights():
    """A fair coin proposes a state of probability 0.3: two ratios, and no tail."""

    def coin(p):
        return lambda: pyro.sample("k", dist.Bernoulli(torch.tensor(p, dtype=F64)))

    result = dg.psis(coin(0.3), coin(0.5), num_samples=10000)
    assert result.khat == -math.inf == result.khat_of(lambda d: 1 + d["k"]).item()
    assert result.expectation(lambda d: d["k"]).item() == pytest.approx(0.3, abs=0.02)
    assert result.ess == pytest.approx(10000 / (2 * 0.3**2 + 2 * 0.7**2), rel=0.02)
    rare = torch.zeros(10000, dtype=F64)
    rare[7] = 8.0  # one draw of a state that the guide rarely draws
    assert dg.Importance(rare).khat == math.inf


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


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_the_first_and_the_last_draw_are_resampled_by_their_weights_only(monkeypatch, noise):
    """At both ends of uniform noise; the numbers are those that float32 has."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size[0], noise, **options))
    ratios = torch.zeros(5000, dtype=F64)
    ratios[[0, -1]] = -torch.inf
    again = dg.Importance(ratios, {"x": torch.arange(5000)}).resample()["x"]
    assert again.min() == 1 and again.max() == 4998


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
    truth = arviz_compat.psislw(ratios)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", base)
    monkeypatch.setitem(sys.modules, "arviz_stats", ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz", NewArviz)
    weights, khat = arviz_compat.psislw(ratios)
    assert len(asked) == 1
    torch.testing.assert_close(weights, truth[0])
    assert khat == truth[1]
    groups, coords, dims = dg.inference_data(model, guide_of(), DATA, num_samples=30)
    assert set(groups) == {"posterior", "log_likelihood", "posterior_predictive", "observed_data"}
    assert dims["y"] == ["row"] and coords == {}
    (groups, _, _), options = dg.plot_uniformity({"mu": torch.rand(40)}, color="red", visuals={"title": False})
    assert groups["prior_sbc"]["mu"].shape == (1, 40)
    labels = {"xlabel": {"text": "probability integral transform"}, "ylabel": {"text": "ECDF difference to uniform"}}
    assert options == {"var_names": ["mu"], "color": "red", "visuals": labels | {"title": False}}
