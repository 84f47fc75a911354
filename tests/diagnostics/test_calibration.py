"""Held-out scores, probability integrals and ranks: uniform on the model, and on no other."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import diagnostics as dg
from support.conjugate import DATA, amortised, two_latents
from support.values import F64


def test_bits_of_dequantised_levels_bound_the_exact_bits():
    beta, levels, fine = st.beta([2.0, 5.0], [3.0, 1.5]), 4, 2000
    x = np.array([[0, 3], [2, 1], [3, 3]])
    exact = dg.bits_per_dim(torch.tensor(np.log(beta.cdf((x + 1) / levels) - beta.cdf(x / levels)).sum(1)), (2,))
    y = (x + (np.arange(fine)[:, None, None] + 0.5) / fine) / levels
    bound = dg.bits_per_dim(torch.tensor(beta.logpdf(y).sum(-1)), (2,), width=1 / levels).mean(0)
    assert (bound > exact).all()
    flat = st.beta(1.0, 1.0).logpdf(y[0]).sum(-1)  # a density that is constant within levels
    assert dg.bits_per_dim(torch.tensor(flat), (1, 2), width=1 / levels).tolist() == pytest.approx([2.0] * 3)
    assert exact[0] == pytest.approx(-np.log2(beta.cdf([0.25, 1.0]) - beta.cdf([0.0, 0.75])).mean())


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


def test_sbc_passes_each_keyword_to_what_takes_it():
    seen = set()

    def model(x, y=None, *, size=0):
        seen.add(("model", size))
        return two_latents(x, y)

    def guide(x, y, scale=1.0):
        seen.add(("guide", scale))
        amortised(scale)(x, y)

    def anything(x, y, **kwargs):
        seen.add(("anything", *kwargs.values()))
        amortised()(x, y)

    options = {"observed": "y", "num_simulations": 2, "num_samples": 3}
    dg.sbc_ranks(model, guide, 0.5, **options, size=4, scale=2.0)
    assert seen == {("model", 4), ("guide", 2.0)}
    dg.sbc_ranks(model, anything, 0.5, **options, size=5)
    assert seen >= {("model", 5), ("anything", 5)}
    dg.sbc_ranks(poutine.scale(model, scale=2.0), guide, 0.5, **options, size=6)  # a callable without a signature
    with pytest.raises(TypeError, match=r"keyword arguments of the model or the posterior; neither takes \['steps'\]"):
        dg.sbc_ranks(model, guide, 0.5, **options, steps=4)


def test_plot_of_ranks_and_uniforms(exact_ranks):
    import matplotlib.pyplot as plt

    axes = dg.plot_uniformity(exact_ranks, num_samples=99)
    assert [ax.get_title() for ax in axes] == ["mu", "side"]
    assert all(ax.lines and ax.collections for ax in axes)  # the curve and its band
    assert {ax.get_xlabel() for ax in axes} == {"normalised rank"}
    assert axes[0].get_ylabel() == "ECDF difference to uniform"
    texts = [text.get_text() for legend in axes[0].figure.legends for text in legend.get_texts()]
    assert texts == ["94% simultaneous band of uniform samples"]
    u = torch.rand(50)
    u[3] = torch.nan
    axes = dg.plot_uniformity(u, ci_prob=0.9, confidence_bands="pointwise")
    assert [ax.get_xlabel() for ax in axes] == ["probability integral transform"]
    assert axes[0].figure.legends[0].get_texts()[0].get_text() == "90% pointwise band of uniform samples"
    plt.close("all")


def test_families_without_a_cdf_have_no_pit():
    with pytest.raises(NotImplementedError, match="with a cdf; got VonMises"):
        dg.pit(dist.VonMises(0.0, 1.0), torch.tensor(0.0))


def test_held_out_of_no_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module; got Normal"):
        dg.held_out(dist.Normal(0.0, 1.0), DATA)
