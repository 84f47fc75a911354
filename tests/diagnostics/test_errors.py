"""Wrong inputs of diagnostics, by the text of their errors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

import pyro_genexact as gx
from pyro_genexact import diagnostics as dg
from support.conjugate import DATA, NORMAL, amortised, guide_of, model, two_latents


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
    "missing": (lambda: dg.psis(model, lambda y: None, DATA), r"all latents of the model; \['mu'\] are missing"),
    "unknown": (
        lambda: dg.psis(nothing, guide_of(), DATA),
        r"only latents of the model, \[\], and sites with infer={'is_auxiliary': True}; got \['mu'\]",
    ),
    "subsampled": (
        lambda: dg.psis(part_of_the_data, guide_of(), DATA),
        r"plates without subsampling \(log p would be an estimate\); got 2 of 5 rows in plate 'row'",
    ),
    "point": (
        lambda: dg.psis(model, AutoDelta(model), DATA),
        r"a density for each latent; got a point estimate for \['mu'\]",
    ),
    "sometimes": (lambda: dg.psis(sometimes, sometimes, DATA), r"same latents in every run .*; got \['more'\] in some"),
    "fit": (
        lambda: dg.inference_data(gx.flows.maf(2), gx.FitResult([], [], 0, 0.0, "epochs", 0)),
        "no draws to reweight",
    ),
    "no latents": (lambda: dg.inference_data(nothing, lambda y: None, DATA), "a model without latents.*held_out"),
    "no draws": (lambda: dg.inference_data(model, {"mu": torch.tensor(1.0)}, DATA), r"draws of shape \(S, ...\)"),
    "row": (lambda: dg.HeldOut(torch.zeros(1)), r"log_prob of shape \(N,\), N >= 2; got \(1,\)"),
    "nan row": (lambda: dg.HeldOut(torch.tensor([0.0, torch.nan])), r"first in rows \[1\]"),
    "other rows": (lambda: dg.HeldOut(torch.zeros(2)) - dg.HeldOut(torch.zeros(3)), "same 2 rows; got 3"),
    "none": (lambda: dg.compare({}), "at least one model"),
    "no width": (
        lambda: dg.bits_per_dim(torch.zeros(3), (8, 8), width=0.0),
        "width to be positive and finite; got 0.0",
    ),
    "empty event": (lambda: dg.bits_per_dim(torch.zeros(3), (8, 0)), r"event_shape to be a sequence of integers >= 1"),
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


class Simulator(dist.TorchDistribution):
    """Draws only: its base class has no log_prob."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, loc):
        super().__init__(loc.shape, validate_args=False)
        self.loc = loc

    def sample(self, sample_shape=()):
        return self.loc + torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype).abs()


def simulated(y=None):
    mu = pyro.sample("mu", NORMAL)
    pyro.sample("y", Simulator(mu), obs=y)


def prior(y=None):
    pyro.sample("mu", NORMAL)


WITHOUT_LIKELIHOOD = {
    "psis": lambda: dg.psis(simulated, prior, DATA[0], num_samples=30),
    "inference_data": lambda: dg.inference_data(simulated, {"mu": torch.zeros(3)}, DATA[0]),
    "sbc_ranks": lambda: dg.sbc_ranks(simulated, prior, observed="y", num_simulations=1),
    "fit_guide": lambda: gx.fit_guide(simulated, prior, DATA[0], progress=False),
    "AutoFlow": lambda: gx.fit_guide(simulated, gx.guides.AutoFlow(simulated), DATA[0], progress=False),
}


@pytest.mark.parametrize("name", WITHOUT_LIKELIHOOD)
def test_a_simulator_as_an_observed_site_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"every site to have a log_prob; got none for 'y' \(Simulator\)"):
        WITHOUT_LIKELIHOOD[name]()


def test_sbc_of_a_simulator_by_a_sampler():
    def sampler(y, num_samples):
        return {"mu": torch.randn(num_samples, dtype=y.dtype)}

    assert dg.sbc_ranks(simulated, sampler, observed="y", num_simulations=3)["mu"].shape == (3,)
