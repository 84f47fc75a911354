"""Fits by each objective of ``fit_guide``, with tempering, compilation and checkpoints."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.inference.bounds import Bound
from support.known_posterior import D, conjugate, exact_elbo, normal


@pytest.mark.parametrize("options", [{"objective": "iwae"}, {"objective": "forward"}, {"path_gradient": True}])
def test_fits_end_at_the_exact_posterior(options):
    """A guide that can represent the posterior finds it under every objective."""
    y, x = torch.tensor([0.5, 1.0, 2.0, 0.1], **D), torch.tensor([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [0.2, -1.0]], **D)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **D), 1.0).to_event(1))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal((z[..., None, :] * x).sum(-1), 0.5), obs=y)

    evidence = dist.MultivariateNormal(torch.zeros(4, **D), x @ x.T + 0.25 * torch.eye(4, **D))
    guide = AutoMultivariateNormal(model)
    result = gx.fit_guide(model, guide, steps=300, lr=0.05, num_particles=64, progress=False, **options)
    assert result.final == pytest.approx(evidence.log_prob(y).item(), abs=0.01)


def test_checkpoints_belong_to_an_objective(tmp_path):
    pyro.param("loc", torch.tensor(0.5, **D))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc"), 0.5))

    fit = partial(gx.fit_guide, conjugate, guide, steps=4, every=2, num_particles=8, progress=False)
    fit(checkpoint=tmp_path / "fit")
    for options in ({"objective": "iwae"}, {"path_gradient": True}, {"tempering": 2}):
        with pytest.raises(ValueError, match=f"was written with.*{next(iter(options))}="):
            fit(checkpoint=tmp_path / "fit", **options)


@pytest.mark.parametrize("path", [False, True])
def test_compiled_steps_are_the_same(path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # quick
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        options = {"steps": 12, "num_particles": 8, "objective": "forward", "path_gradient": path, "compile": compile}
        found.append(gx.fit_guide(conjugate, AutoNormal(conjugate), progress=False, **options).elbo)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_tempered_steps_have_growing_powers_and_count_for_nothing(monkeypatch):
    powers, gradients = [], Bound.loss_and_grads

    def spy(self, *args):
        powers.append(self.power)
        return gradients(self, *args)

    monkeypatch.setattr(Bound, "loss_and_grads", spy)

    def guide():  # the posterior
        scale = pyro.param("scale", torch.tensor(0.2**0.5, **D), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.8, **D)), scale))

    options = {"steps": 15, "lr": 1e-9, "num_particles": 4000, "tempering": 10, "progress": False}
    result = gx.fit_guide(conjugate, guide, **options)
    assert powers == pytest.approx([0.01 ** (1 - i / 10) for i in range(10)] + [1.0] * 5)
    evidence = dist.Normal(torch.zeros((), **D), 1.25**0.5).log_prob(torch.tensor(1.0, **D)).item()
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.2)
    for power, elbo in zip(powers, result.elbo, strict=True):  # E[log p] = evidence - entropy
        assert elbo == pytest.approx(power * (evidence - entropy) + entropy, abs=0.1)
    assert result.final == pytest.approx(evidence, abs=1e-6)


def test_the_final_elbo_is_not_tempered():
    pyro.param("loc", torch.tensor(0.5, **D)), pyro.param("scale", torch.tensor(0.8, **D))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    result = gx.fit_guide(conjugate, guide, steps=4, tempering=4, lr=1e-6, num_particles=4096, progress=False)
    exact = exact_elbo(*(torch.tensor(x, **D) for x in (0.5, 0.8))).item()
    assert result.final == pytest.approx(exact, abs=0.05) and result.elbo[-1] > exact + 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"objective": "renyi"}, ValueError, "objective to be one of 'elbo', 'iwae', 'forward'; got 'renyi'"),
        ({"path_gradient": "yes"}, TypeError, "path_gradient to be True, False or None; got 'yes'"),
        ({"tempering": -1}, ValueError, "tempering"),
        ({"tempering": 5, "steps": 4}, ValueError, "tempering <= steps; got 5 and 4"),
        ({"tempering": 5, "compile": True}, ValueError, "tempering=0 with compile=True.*got 5"),
        (
            {"loss": Trace_ELBO(), "objective": "iwae"},
            ValueError,
            "either loss or another objective.*Trace_ELBO with 'iwae'",
        ),
        ({"objective": "forward", "num_particles": 1}, ValueError, "num_particles > 1 for objective=.forward.*got 1"),
        ({"objective": "iwae", "num_particles": 12}, ValueError, "at most 8 or a multiple of it.*got 12"),
    ],
)
def test_errors(options, error, match):
    guide, _ = normal(0.5, 0.8)
    with pytest.raises(error, match=match):
        gx.fit_guide(conjugate, guide, progress=False, **options)
