"""Amortised guides as guides of Pyro: the ELBO, plates and subsamples, importance weights, copies and files."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

import pyro_genexact as gx
from support.amortised import FAST, SMALL, Y, fitted, groups, normal, rows


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


EVIDENCE = dist.Normal(0.0, 1.25**0.5)  # of each number of ``normal`` and ``rows``
IAF = {**SMALL, "recipe": gx.flows.iaf}


def test_importance_weights_and_ranks():
    guide = fitted(normal, epochs=2)
    weighted = gx.diagnostics.psis(normal, guide, Y, num_samples=200)
    assert weighted.ess > 100 and weighted.khat < 0.7
    assert abs(weighted.log_evidence - EVIDENCE.log_prob(Y).sum()) < 0.1
    assert Predictive(normal, guide=guide, num_samples=7)(Y)["mu"].shape[0] == 7
    ranks = gx.diagnostics.sbc_ranks(normal, guide, observed="y", num_simulations=40, num_samples=9)["mu"]
    assert 3.2 < ranks.float().mean() < 5.8


def test_plates_in_a_guide():
    guide, y = fitted(groups, 4, epochs=2), torch.linspace(-1, 2, 4)
    assert gx.diagnostics.psis(groups, guide, y=y, num_samples=300).ess > 100
    with pytest.raises(ValueError, match="got 'z' in 'groups' with 3 of 9 rows"):
        gx.guides.Amortized(rows_of_one_mean, **SMALL)(torch.zeros(3), 9)


def rows_of_one_mean(y, total):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", total, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_the_elbo_reaches_the_evidence():
    guide = gx.guides.Amortized(normal, **IAF)
    result = gx.fit_guide(normal, guide, Y, steps=100, lr=0.02, num_particles=4, progress=False)
    assert abs(result.final - EVIDENCE.log_prob(Y).sum()) < 0.05


@pytest.mark.parametrize("total", [None, 100])
@pytest.mark.parametrize("together", [False, True])
def test_rows_have_the_scale_of_their_plate(total, together):
    """The ELBO by hand, whatever the subsample of the first call was."""
    y, guide = torch.randn(6, 2), gx.guides.Amortized(rows, **IAF)
    guide(torch.randn(3, 2), 30)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=together, max_plate_nesting=1)
    seen = []
    loss = elbo.loss(rows, lambda *a: seen.append(guide(*a)) or seen[-1], y, total)
    z = torch.cat([s["z"].reshape(-1, 6, 2) for s in seen])
    with torch.no_grad():
        log_q = guide.log_prob({"z": z}, {"y": y})
    log_p = (dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(y)).sum((-1, -2))
    assert loss == pytest.approx((total or 6) / 6 * (log_q - log_p).mean().item(), rel=1e-4)
    trace = poutine.trace(guide).get_trace(y[:4], total)
    assert trace.nodes["z"]["scale"] == (total or 4) / 4


def test_a_model_with_parameters_and_minibatches():
    """Principal components: the ELBO of all rows is close to the evidence at the learned weights."""
    truth = torch.randn(2, 5)
    data = torch.randn(400, 2) @ truth + 0.3 * torch.randn(400, 5)
    decoder = nn.Linear(2, 5)

    def model(y, batch=None):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(y), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 0.3).to_event(1), obs=y[index])

    guide = gx.guides.Amortized(model, encoder=gx.encoders.Vector(5, 16, width=16), **IAF)
    before = {name: value.clone() for name, value in guide.setup(data).state_dict().items()}
    gx.fit_guide(model, guide, data, batch=64, steps=200, lr=0.02, num_particles=1, progress=False)
    weight, bias = decoder.weight.detach(), decoder.bias.detach()
    exact = dist.MultivariateNormal(bias, weight @ weight.T + 0.09 * torch.eye(5)).log_prob(data).mean().item()
    optimum = dist.MultivariateNormal(data.mean(0), data.T.cov(correction=0)).log_prob(data).mean().item()
    elbo = -Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, data) / 400
    assert exact - 0.15 < elbo < exact + 0.02 and exact > optimum - 2
    changed = [name for name, value in guide.network.state_dict().items() if not torch.equal(value, before[name])]
    assert any("encoder" in name for name in changed)  # the encoder learns too


def test_covariates_are_observed_sites():
    """y = z c + noise: the posterior of z depends on c."""

    def model(y=None, c=None):
        c = pyro.sample("c", dist.Uniform(0.5, 2.0), obs=c)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * c, 0.5), obs=y)

    guide = fitted(model, observed=("y", "c"), simulations=3000, epochs=6)
    draws = guide.draws({"y": torch.ones(2), "c": torch.tensor([0.6, 1.8])}, 4000)["z"]
    precision = 1 + 4 * torch.tensor([0.6, 1.8]) ** 2
    torch.testing.assert_close(draws.mean(0), 4 * torch.tensor([0.6, 1.8]) / precision, atol=0.12, rtol=0)
    torch.testing.assert_close(draws.std(0), precision**-0.5, atol=0.08, rtol=0)


def test_sequential_plates():
    def model(y=None):
        for i in pyro.plate("each", 2):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y{i}", dist.Normal(z, 0.5), obs=None if y is None else y[i])

    guide = fitted(model, observed=("y0", "y1"), epochs=2)
    assert gx.diagnostics.psis(model, guide, y=Y, num_samples=200).ess > 100


def test_copies_files_and_dtypes(tmp_path):
    guide = fitted(normal, ensemble=2, epochs=1)
    guide(observations={"y": Y})
    draws = guide.draws({"y": Y}, 5)
    gx.save(guide, tmp_path / "guide.pt")
    again = gx.guides.Amortized(normal, **SMALL)
    again.setup(ensemble=2)
    again.load_state_dict(guide.state_dict())
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), gx.load(tmp_path / "guide.pt"), again]
    for one in copies:
        assert torch.equal(one.log_prob(draws, {"y": Y}), guide.log_prob(draws, {"y": Y}))
        assert one(observations={"y": Y})["mu"].shape == (2,)  # its own parameters are then in Pyro's store
        stored = pyro.get_param_store()._params["amortized_mu$$$members.0.embed.0.weight"]
        assert stored is one.network.members[0].embed[0].weight
    gx.fit_amortized(normal, copies[0], simulations=100, epochs=1, **{**FAST, "ensemble": 2})
    assert not torch.equal(copies[0].log_prob(draws, {"y": Y}), guide.log_prob(draws, {"y": Y}))
    with pytest.raises(RuntimeError, match="carry no model"):
        copies[1].setup(ensemble=3)
    wide = copies[1].double()
    assert wide.draws({"y": Y}, 3)["mu"].dtype == torch.float64
    torch.testing.assert_close(wide.log_prob(draws, {"y": Y}).float(), guide.log_prob(draws, {"y": Y}))
    q, value = wide.posterior({"y": Y}), draws["mu"].double()
    parts = wide.network.split(value, 1)
    each = [m.log_prob(*parts, given) for m, given in zip(wide.network.members, q.given, strict=True)]
    mixture = torch.stack(each).exp().mean(0).log()
    torch.testing.assert_close(q.log_prob(value), mixture, atol=1e-12, rtol=0)
    in_training = wide.network.given({"y": Y.double()}, mean=True).log_prob(value)
    torch.testing.assert_close(in_training, torch.stack(each).mean(0), atol=1e-12, rtol=0)


def test_threads():
    guide = fitted(normal, epochs=1)
    draws = guide.draws({"y": Y}, 50)
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        each = list(pool.map(lambda _: guide.log_prob(draws, {"y": Y}), range(20)))
        drawn = list(pool.map(lambda _: guide.draws({"y": Y}, 20)["mu"], range(20)))
    assert all(torch.equal(one, each[0]) for one in each) and torch.stack(drawn).isfinite().all()


def test_log_prob_of_draws_with_and_without_a_graph():
    """The log density that comes with a draw is that of the value, with its gradient; edits in place are seen."""
    network = gx.guides.Amortized(normal, **IAF).setup()
    guide_of = lambda: network.given({"y": Y})  # noqa: E731
    q = guide_of()
    z = q.rsample()
    known, fresh = q.log_prob(z), guide_of().log_prob(z)
    torch.testing.assert_close(known, fresh, atol=1e-4, rtol=0)
    weights = [p for p in network.parameters() if p.requires_grad]
    found = [torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (known, fresh)]
    for one, other in zip(*found, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        z = q.rsample()
        z.add_(1.0)
        torch.testing.assert_close(q.log_prob(z), guide_of().log_prob(z))
        z = q.rsample()
    assert q.log_prob(z).requires_grad
