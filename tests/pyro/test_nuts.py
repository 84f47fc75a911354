"""NUTS over autoregressive sites: posterior moments against Gauss-Legendre quadrature of the density by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close
from support.pyro_models import T, build, by_hand, normal, phi_by_hand, scale_of, smooth
from support.values import built, params_of, sized


def legendre(n, low, high):
    """Nodes and weights of n-point Gauss-Legendre quadrature, by the eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    return low + (nodes + 1) / 2 * (high - low), vectors[0] ** 2 * (high - low)


def grid(*axes):
    """All points (N, D) of a product of rules, and their weights (N,)."""
    points = torch.cartesian_prod(*[nodes for nodes, _ in axes])
    weights = torch.cartesian_prod(*[weights for _, weights in axes]).prod(-1)
    return points, weights


def moments(values, log_density, weights):
    """Mean and covariance (D, D) of values (N, D) under an unnormalised density."""
    p = (log_density.exp() * weights).detach()
    p = p / p.sum()
    mean = p @ values
    return mean, (p[:, None] * (values - mean)).T @ (values - mean)


def nuts(model, samples=40, warmup=25):
    """Draws of z by a short chain, whose posteriors have much the same scale in every coordinate."""
    kernel = NUTS(model, step_size=0.3, adapt_mass_matrix=False, max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["z"]


def agrees(z, mean, cov):
    """Draws (..., D) whose law has this mean and covariance: whitened, within Monte Carlo error."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (z - mean).flatten(0, -2).T, upper=False)
    n = white.shape[1]
    assert white.mean(1).abs().max() < 5 / n**0.5
    assert (torch.cov(white) - torch.eye(len(cov), dtype=torch.float64)).abs().max() < 8 / n**0.5


REPLICATES = 25  # independent rows of one plate with the same data: as many chains in one


def observe(d, mean, y, scale):
    """z_n ~ d, y ~ N(mean(z_n), scale) in a plate of replicates."""

    def f():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", d() if callable(d) else d)
            pyro.sample("y", normal(mean(z), scale).to_event(1), obs=y.expand(REPLICATES, -1))

    return f


def converged(make, tol=2e-3):
    """The moments of make(n) with n nodes an axis, which agree with those of fewer."""
    fine, coarse = make(28), make(22)
    for a, b in zip(fine, coarse, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=0)
    return fine


@pytest.mark.parametrize("net, head", [("made", "Normal"), ("recurrent", "LogNormal"), ("nade", "Normal")])
def test_nuts_over_continuous_sites(net, head):
    model = smooth(build(net, head, context=0))
    y = torch.tensor([0.4, -0.6, 0.8], dtype=torch.float64)
    positive = head == "LogNormal"
    z = nuts(observe(model, torch.log if positive else (lambda z: z), y, 0.5))
    assert z.shape == (40, REPLICATES, T)

    def truth(n):
        points, weights = grid(*[legendre(n, v - 2.8, v + 2.8) for v in y.tolist()])
        values = points.exp() if positive else points
        log_density = by_hand(model, values) + normal(points, 0.5).log_prob(y).sum(-1)
        return moments(points, log_density + points.sum(-1) * positive, weights)  # dz = z d(log z)

    agrees(z.log() if positive else z, *converged(truth))


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_nuts_over_sites_of_several_supports(order):
    """A real, a positive and a unit-interval site, through the joint constraint, visited in any order."""
    torch.manual_seed(1)
    head = heads.PerSite([heads.Normal(), heads.LogNormal(), heads.Beta()])
    net = conditioners.MADE(T, 2, hidden=(8,), activation=torch.tanh, direct=False)
    model = smooth(built(gx.Autoregressive(net, head, (T,), order)))
    where = torch.tensor(order or [0, 1, 2])
    y = torch.tensor([0.5, 0.2, 0.6], dtype=torch.float64)  # of the visited sites

    def log_prior(v):  # in visiting order
        phi = phi_by_hand(model, params_of(model), v)
        a, b = phi[..., 0], (10 * torch.tanh(phi[..., 1] / 10)).exp()
        beta = dist.Beta((10 * torch.tanh(a[..., 2] / 10)).exp(), b[..., 2]).log_prob(v[..., 2])
        return (
            dist.Normal(a[..., 0], b[..., 0]).log_prob(v[..., 0])
            + dist.LogNormal(a[..., 1], scale_of(phi[..., 1, 1], "LogNormal")).log_prob(v[..., 1])
            + beta
        )

    def mean(z):  # positive site by its logarithm, the unit interval by its logit
        v = z[..., where]
        return torch.stack([v[..., 0], v[..., 1].log(), v[..., 2].logit()], -1)

    d = model()
    value = torch.empty(4, T, dtype=torch.float64)
    value[:, where] = torch.tensor([[-1.0, 0.3, 0.2]], dtype=torch.float64) + sized(4, T).abs() / 10
    close(d.log_prob(value), log_prior(value[:, where]))
    z = nuts(observe(model, mean, y, 0.5))
    assert d.support.check(z).all()

    def truth(n):
        u, weights = grid(*[legendre(n, v - 2.8, v + 2.8) for v in y.tolist()])
        v = torch.stack([u[:, 0], u[:, 1].exp(), u[:, 2].sigmoid()], -1)
        jacobian = u[:, 1] + v[:, 2].log() + (1 - v[:, 2]).log()
        return moments(u, log_prior(v) + jacobian + normal(u, 0.5).log_prob(y).sum(-1), weights)

    agrees(mean(z), *converged(truth))


def test_nuts_over_points_of_a_simplex():
    """Two sites of three shares each: four free coordinates."""
    torch.manual_seed(1)
    net = conditioners.MADE(2, 3, site=(3,), hidden=(8,), activation=torch.tanh, direct=False)
    model = smooth(built(gx.Autoregressive(net, heads.ContinuousCategorical(3), (2, 3))))
    y = torch.tensor([0.2, 0.5, 0.3, 0.6, 0.3, 0.1], dtype=torch.float64)

    def log_prior(z):  # (N, 2, 3); the normaliser as a divided difference of exp
        eta = phi_by_hand(model, params_of(model), z.flatten(-2))
        gaps = eta.unsqueeze(-1) - eta.unsqueeze(-2) + torch.eye(3, dtype=torch.float64)
        return ((eta * z).sum(-1) - (eta.exp() / gaps.prod(-1)).sum(-1).log()).sum(-1)

    close(model().log_prob(y.reshape(2, 3)), log_prior(y.reshape(1, 2, 3))[0])
    z = nuts(observe(model, lambda z: z.flatten(-2), y, 0.3))
    assert z.shape == (40, REPLICATES, 2, 3) and model().support.check(z).all()

    def truth(n):
        u, weights = grid(*[legendre(n // 2, 0.0, 1.0)] * 4)
        first, second = u[:, 0::2], (1 - u[:, 0::2]) * u[:, 1::2]  # Duffy's map of a square to a triangle
        p = torch.stack([first, second, 1 - first - second], -1)
        log_density = log_prior(p) + normal(p.flatten(1), 0.3).log_prob(y).sum(-1) + (1 - first).log().sum(-1)
        return moments(p[..., :2].flatten(1), log_density, weights)

    agrees(z[..., :2].flatten(-2), *converged(truth))


@pytest.mark.parametrize(
    "strategy", [init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform, "value"]
)
@pytest.mark.parametrize("head", ["LogNormal", "PerSite", "ContinuousCategorical"])
def test_initial_values_of_chains(strategy, head):
    torch.manual_seed(1)
    made = {
        "LogNormal": lambda: build("made", "LogNormal", context=0),
        "PerSite": lambda: built(
            gx.Autoregressive(
                conditioners.MADE(2, 2, direct=False), heads.PerSite([heads.Normal(), heads.Beta()]), (2,), [1, 0]
            )
        ),
        "ContinuousCategorical": lambda: built(
            gx.Autoregressive(conditioners.MADE(2, 3, site=(3,), direct=False), heads.ContinuousCategorical(3), (2, 3))
        ),
    }
    model = made[head]().requires_grad_(False)
    value = model().sample()
    chosen = init_to_value(values={"z": value}) if strategy == "value" else strategy
    kernel = NUTS(lambda: pyro.sample("z", model()), init_strategy=chosen)
    kernel.setup(warmup_steps=1)
    u = kernel.initial_params["z"]
    to_support = kernel.transforms["z"].inv
    z = to_support(u)
    assert model().support.check(z).all()
    if strategy == "value":
        close(z, value, 1e-7)
    log_joint = model().log_prob(z) + to_support.log_abs_det_jacobian(u, z).sum()
    assert kernel.potential_fn({"z": u}).item() == pytest.approx(-log_joint.item(), abs=1e-9)
