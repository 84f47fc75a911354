"""Learned likelihoods against exact ones: surfaces, masses, plates, groups, proposals and Pyro's inference."""

from __future__ import annotations

import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.simulation.columns import Columns, affine_splines
from pyro_genexact.testing import redraw

QUICK = {"simulations": 300, "epochs": 1, "progress": False}
SMALL = partial(affine_splines, hidden=(32,))


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def one_row():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    pyro.deterministic("y", dist.Gumbel(mu, sigma).sample())


def groups(likelihood, y):
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", y.shape[-1], dim=-1):
        mu = pyro.sample("mu", dist.Normal(centre, 1.0))
        with pyro.plate("rows", y.shape[-2], dim=-2):
            pyro.sample("y", likelihood(mu, torch.tensor(1.0)), obs=y)


@pytest.fixture(scope="module")
def gumbel():
    options = {"simulations": 10_000, "epochs": 12, "batch_size": 512, "lr": 1e-2, "recipe": SMALL}
    return gx.likelihood(one_row, vectorize=True, progress=False, **options)


def test_log_likelihood_of_many_rows_is_close_to_the_exact_one(gumbel):
    mu, sigma = torch.meshgrid(torch.linspace(-1, 3, 60), torch.linspace(0.4, 2.5, 60), indexing="ij")
    for truth in ((0.5, 0.8), (1.5, 1.5)):
        y = dist.Gumbel(*map(torch.tensor, truth)).sample((30, 1, 1))
        posteriors = []
        for likelihood in (dist.Gumbel, gumbel):
            with torch.no_grad():
                log_p = likelihood(mu, sigma).log_prob(y).sum(0)
            weights = log_p.flatten().softmax(0).reshape(log_p.shape)
            mean = torch.stack([(weights * x).sum() for x in (mu, sigma)])
            sd = torch.stack([(weights * x.square()).sum() for x in (mu, sigma)]).sub(mean.square()).sqrt()
            posteriors.append((mean, sd))
        (mean, sd), (found, width) = posteriors
        assert ((found - mean) / sd).abs().max() < 0.5
        assert (width / sd - 1).abs().max() < 0.25


def test_more_groups_than_in_the_simulations(gumbel):
    """Six groups of five rows, where the simulations have one row: log-likelihoods near the mode are nearly exact."""
    y = dist.Gumbel(torch.randn(6), 1.0).sample((5,))
    prior = pyro.infer.Predictive(groups, num_samples=2, parallel=True)
    assert prior(gumbel, y)["mu"].shape == (2, 1, 6)
    mu = y.mean(0) - 0.6 + 0.3 * torch.randn(200, 6)
    with torch.no_grad():
        exact = dist.Gumbel(mu[:, None], 1.0).log_prob(y).sum((-1, -2))
        found = gumbel(mu[:, None], torch.tensor(1.0)).log_prob(y).sum((-1, -2))
    moments = dist.Normal(mu[:, None] + 0.577, 1.283).log_prob(y).sum((-1, -2))
    assert (found - exact).std() < 0.4 * exact.std() < (moments - exact).std()


def test_normalised_and_consistent_with_samples(gumbel):
    d = gumbel(torch.tensor([0.0, 1.0]), 0.7)
    y = torch.linspace(-30, 60, 40_001).unsqueeze(-1)
    with torch.no_grad():
        assert torch.allclose(torch.trapezoid(d.log_prob(y).exp(), y, dim=0), torch.ones(2), atol=1e-3)
        draws = d.sample((4000,))
    exact = dist.Gumbel(torch.tensor([0.0, 1.0]), 0.7)
    assert draws.shape == (4000, 2) and (draws.mean(0) - exact.mean).abs().max() < 0.12


def test_gradients_in_the_latents(gumbel):
    y, found = dist.Gumbel(0.5, 1.0).sample((50,)), []
    for likelihood in (dist.Gumbel, gumbel):
        mu = torch.tensor(-0.5, requires_grad=True)
        likelihood(mu, torch.tensor(1.0)).log_prob(y).sum().backward()
        found.append(mu.grad)
    assert abs(found[1] / found[0] - 1) < 0.2


def test_inference(gumbel):
    y = dist.Gumbel(torch.tensor([0.0, 1.0]), 1.0).sample((4,))
    mcmc = MCMC(NUTS(partial(groups, gumbel), max_tree_depth=3), 3, warmup_steps=2, disable_progbar=True)
    mcmc.run(y)
    assert mcmc.get_samples()["mu"].shape == (3, 2)
    model = partial(groups, gumbel)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(3, vectorize_particles=True))
    assert torch.tensor(svi.step(y)).isfinite()


def test_copies_and_files(gumbel, tmp_path):
    gx.save(gumbel, tmp_path / "learned.pt")
    expected = gumbel(0.0, 1.0).log_prob(torch.tensor(0.3))
    for copy in (gx.load(tmp_path / "learned.pt"), pickle.loads(pickle.dumps(gumbel))):
        assert torch.equal(copy(mu=0.0, sigma=1.0).log_prob(torch.tensor(0.3)), expected)


def test_enumerated_latent():
    def simulator(y=None):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(4.0 * k, 1.0), obs=y)

    learned = gx.likelihood(
        simulator, simulations=1000, epochs=4, batch_size=128, lr=1e-2, recipe=SMALL, progress=False
    )

    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"}).long()
            pyro.sample("y", learned(k), obs=y)

    def guide(y):
        pyro.sample("p", dist.Delta(torch.tensor(0.7)))

    y = torch.tensor([0.0, 4.0, 4.5])
    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, y)
    each = learned(torch.tensor([[0], [1]])).log_prob(y) + torch.tensor([[0.3], [0.7]]).log()
    assert abs(found - each.logsumexp(0).sum().item()) < 1e-4
    exact = dist.Normal(torch.tensor([[0.0], [4.0]]), 1.0).log_prob(y)
    assert (learned(torch.tensor([[0], [1]])).log_prob(y)[[0, 1], [0, 1]] - exact[[0, 1], [0, 1]]).abs().max() < 0.4


def test_local_latents_and_covariates_of_rows():
    x = torch.linspace(-1, 1, 4)

    def simulator():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            at = pyro.deterministic("x", x.expand(*slope.shape[:-1], 4), event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * at + z, 0.1))

    learned = gx.likelihood(simulator, given=["slope", "x", "z"], **QUICK)
    assert learned.names == ["slope", "x", "z"]
    d = learned(torch.ones(5, 1), x=torch.zeros(7), z=torch.zeros(7))
    assert (d.batch_shape, d.event_shape) == ((5, 7), ())
    with pytest.raises(ValueError, match="identically distributed rows"):
        gx.likelihood(simulator, given=["slope"], **QUICK)


def test_plates_left_of_other_dims_and_standardised_inputs():
    def simulator():
        mu = pyro.sample("mu", dist.Normal(100.0, 5.0))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("y", dist.Normal(mu, 1.0))

    learned = gx.likelihood(simulator, **QUICK)
    assert learned(torch.ones(2)).event_shape == ()
    features = learned.given({"mu": torch.tensor([100.0, 105.0])}).squeeze(-1)
    assert (features - torch.tensor([0.0, 1.0])).abs().max() < 0.3


def test_columns_of_several_kinds():
    """The mass over all counts and categories, and the integral over the numbers, is 1; samples have these probabilities."""
    support = [constraints.positive, constraints.boolean, constraints.nonnegative_integer]
    module = redraw(Columns(support, (3,), 2, SMALL).double())
    d = module(torch.tensor([0.3, -1.0], dtype=torch.double))
    log_y = torch.linspace(-9, 9, 181, dtype=torch.double)
    counts = torch.arange(40.0, dtype=torch.double)
    y = torch.stack(torch.meshgrid(log_y.exp(), torch.arange(2.0, dtype=torch.double), counts, indexing="ij"), -1)
    with torch.no_grad():
        mass = (d.log_prob(y) + y[..., 0].log()).exp()
        table = torch.trapezoid(mass, log_y, dim=0)
        draws = d.sample((20_000,))
    tail = (draws[:, 2] >= 40).double().mean()
    assert abs(table.sum() + tail - 1) < 0.01
    for k, n in ((0, 0), (1, 0), (1, 3)):
        share = ((draws[:, 1] == k) & (draws[:, 2] == n)).double().mean()
        assert abs(share - table[k, n]) < 5 * (table[k, n] / 20_000) ** 0.5 + 1e-4
    d._validate_args = False
    assert d.log_prob(torch.tensor([[-1.0, 1, 2], [1.0, 0.5, 2], [1.0, 1, -1], [1.0, 1, 1.5]])).isneginf().all()


def test_counts_learn_a_poisson():
    def simulator():
        rate = pyro.sample("rate", dist.LogNormal(1.0, 1.0))
        pyro.sample("y", dist.Poisson(rate))

    learned = gx.likelihood(simulator, simulations=6000, epochs=8, batch_size=256, lr=1e-2, progress=False)
    rate, y = torch.tensor([1.0, 3.0, 12.0]), torch.arange(4000.0).unsqueeze(-1)
    with torch.no_grad():
        mass, exact = learned(rate).log_prob(y).exp(), dist.Poisson(rate).log_prob(y).exp()
    assert torch.allclose(mass.sum(0), torch.ones(3), atol=1e-4)
    assert 0.5 * (mass - exact).abs().sum(0).max() < 0.1  # total variation


def test_proposal_of_draws_and_of_a_program():
    def simulator():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(mu, 1.0))

    seen = []

    def module(features):
        class Watching(Columns):
            def standardise(self, value, context):
                seen.append(value.mean().item())
                super().standardise(value, context)

        return Watching(constraints.real, (), features, SMALL)

    def guide():
        pyro.sample("mu", dist.Delta(dist.Normal(-5.0, 0.1).sample(pyro.sample("seen", dist.Normal(0.0, 1.0)).shape)))

    gx.likelihood(simulator, proposal={"mu": torch.full((300,), 7.0)}, module=module, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # guides with Delta sites are vectorised too
        gx.likelihood(simulator, proposal=guide, module=module, **QUICK)
    gx.likelihood(simulator, proposal={"mu": torch.full((9,), 3.0)}, module=module, vectorize=False, **QUICK)
    assert abs(seen[0] - 7) < 0.3 and abs(seen[1] + 5) < 0.3 and abs(seen[2] - 3) < 0.3


def test_any_module_as_the_likelihood():
    def simulator():
        p = pyro.sample("p", dist.Beta(torch.ones(2), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(p[..., :1].expand(*p.shape[:-1], 5)).to_event(1))

    def chain(features):
        net = gx.conditioners.Recurrent(2, 1, context=features, hidden=8)
        return gx.Autoregressive(net, gx.heads.Bernoulli(), (5,))

    learned = gx.likelihood(simulator, module=chain, **QUICK)
    assert learned(torch.rand(3, 2)).sample().shape == (3, 5)
    with pytest.raises(ValueError, match="event_shape"):
        gx.likelihood(simulator, module=lambda c: gx.flows.maf(2, context=c), **QUICK)


def failing():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", torch.where(mu > 1, torch.nan, mu + torch.randn_like(mu)))


def test_failed_simulations_are_named():
    with pytest.warns(UserWarning, match="likelihood is then that given success"):
        learned = gx.likelihood(failing, vectorize=True, **QUICK)
    assert learned(0.5).log_prob(torch.tensor(0.3)).isfinite()


def plain(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def two_latents():
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a + b, 1.0))


def constant():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", torch.zeros_like(mu))


def whole():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", (mu > 0).long())


def test_inputs_outside_their_support_have_no_density():
    def simulator():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(rate, 1 + p))

    learned = gx.likelihood(simulator, **QUICK)
    assert learned(1.0, 1.0).log_prob(torch.tensor(0.3)).isfinite()  # on the boundary
    for values in ((-1.0, 0.5), (torch.nan, 0.5), (1.0, 1.5)):
        with pytest.raises(ValueError, match="in the support"):
            learned(*values)
        with pyro.validation_enabled(False):
            assert learned(*values).log_prob(torch.tensor(0.3)).isnan()


def bounded_by_a_latent():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.01))
    pyro.sample("y", dist.Uniform(-100 * scale, 100 * scale))


@pytest.mark.parametrize(
    "model, options, text",
    [
        (plain, {"observed": "z"}, "sites of the model"),
        (plain, {"given": ["y"]}, "at least one input"),
        (plain, {"simulations": 0}, "simulations"),
        (plain, {"simulations": {"mu": torch.zeros(9)}}, "none of"),
        (plain, {"simulations": {"mu": torch.zeros(9), "y": torch.zeros(8)}}, "same number"),
        (plain, {"simulations": {"mu": torch.randn(99), "y": torch.randn(99, 2)}}, "of shape"),
        (plain, {"simulations": {"mu": torch.randn(99), "y": torch.full((99,), torch.nan)}}, "without NaN"),
        (plain, {"support": constraints.positive}, "in the support"),
        (plain, {"simulations": iter([])}, "a Dataset"),
        (plain, {"simulations": 4}, "validation"),
        (plain, {"given": []}, "at least one input"),
        (plain, {"support": "real"}, "support to be of class Constraint"),
        (plain, {"support": constraints.simplex}, "support of events of shape"),
        (plain, {"proposal": {"mu": torch.zeros(5, 3)}}, "proposal with draws"),
        (plain, {"proposal": {"mu": torch.tensor(1.0)}}, "proposal with draws"),
        (plain, {"proposal": {"y": torch.zeros(5)}}, "proposal with draws"),
        (two_latents, {"proposal": {"b": torch.zeros(5)}, "given": ["a"]}, "proposal with draws"),
        (plain, {"proposal": 3}, "a dict of draws or a program"),
        (plain, {"proposal": {"mu": torch.zeros(9)}, "simulations": {"mu": torch.zeros(9)}}, "no proposal"),
        (bounded_by_a_latent, {}, "its own differs"),
        (constant, {"vectorize": True}, "with a density; got the value 0"),
        (whole, {"vectorize": True}, "Expected support="),
    ],
)
def test_errors(model, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        gx.likelihood(model, **{**QUICK, **options})


def test_errors_of_the_call():
    learned = gx.likelihood(plain, **QUICK)
    for values, named in (((), {}), ((1.0, 2.0), {}), ((1.0,), {"mu": 1.0}), ((1.0,), {"z": 1.0})):
        with pytest.raises(ValueError, match="Expected"):
            learned(*values, **named)
