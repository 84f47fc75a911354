"""Hundreds of latents: L-BFGS estimates against BFGS, low-rank affine maps, guides whose last layer is one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference.density import Density
from pyro_genexact.inference.lanczos import low_rank_laplace
from pyro_genexact.inference.low_rank import LowRank, LowRankAffine
from pyro_genexact.inference.normal import Pushed
from pyro_genexact.inference.pathfinder import ranked
from pyro_genexact.inference.paths import ascend
from pyro_genexact.inference.secants import MEMORY, dense, limited
from support.latents import DOUBLE, numbers, still

D = 130
SCALE = torch.linspace(0.5, 2.0, D, **DOUBLE)


def independent():
    with pyro.plate("rows", D):
        pyro.sample("z", dist.Normal(torch.arange(D, **DOUBLE) / D, SCALE))


def few_directions():
    """A normal distribution with standard deviations near 1, and 5 along one direction of D = 130."""
    with pyro.plate("rows", D):
        z = pyro.sample("z", dist.Normal(numbers(), 1.0))
    pyro.factor("prior", (1 - 1 / 25) * (z.sum(-1, keepdim=True) ** 2) / (2 * D))


def random_map(size, rank):
    basis = torch.linalg.qr(torch.randn(size, rank, **DOUBLE)).Q
    loc, scale, stretch = (
        torch.randn(size, **DOUBLE),
        torch.rand(size, **DOUBLE) + 0.5,
        torch.rand(rank, **DOUBLE) + 0.5,
    )
    return LowRankAffine(loc, scale, basis, stretch)


def curvatures(size, count):
    """Steps and changes of the gradient of a quadratic function."""
    root = torch.randn(size, size, **DOUBLE) / size**0.5
    steps = torch.randn(count, size, **DOUBLE)
    return list(zip(steps, steps @ (root @ root.mT + torch.eye(size, **DOUBLE)), strict=True))


def test_limited_memory_is_bfgs_from_the_diagonal():
    torch.manual_seed(0)
    estimate, full, pairs = None, None, curvatures(15, MEMORY + 3)
    for i, (step, change) in enumerate(pairs):
        estimate, full = limited(estimate, step, change), dense(full, step, change)
        if i < MEMORY:
            torch.testing.assert_close(estimate @ step, full @ step)
    expected = estimate.diagonal.diag()
    for step, change in pairs[-MEMORY:]:
        expected = dense(expected, step, change)
    vector = torch.randn(15, **DOUBLE)
    torch.testing.assert_close(estimate @ vector, expected @ vector)
    root = estimate.root(vector)
    torch.testing.assert_close(root.lower() @ root.lower().mT, expected)
    torch.testing.assert_close(root.lower(), torch.linalg.cholesky(expected))
    assert limited(estimate, pairs[0][0], -pairs[0][1]) is estimate  # no positive curvature


def test_the_diagonal_of_separable_functions_is_found():
    torch.manual_seed(1)
    estimate, hessian = None, torch.linspace(1.0, 9.0, 6, **DOUBLE)
    for _ in range(200):
        step = torch.randn(6, **DOUBLE)
        estimate = limited(estimate, step, hessian * step)
    torch.testing.assert_close(estimate.diagonal, 1 / hessian, atol=0, rtol=0.3)


def test_a_low_rank_map_has_the_density_of_its_covariance():
    torch.manual_seed(2)
    t = random_map(6, 2)
    root = t.scale.diag() @ (torch.eye(6, **DOUBLE) + t.basis @ (t.stretch - 1).diag() @ t.basis.mT)
    truth = dist.MultivariateNormal(t.loc, root @ root.mT)
    z = torch.randn(4, 6, **DOUBLE)
    torch.testing.assert_close(Pushed(t).log_prob(z), truth.log_prob(z))
    torch.testing.assert_close(t(t.inv(z)), z)
    jacobian = torch.func.jacrev(t)(z[0])
    torch.testing.assert_close(t.log_abs_det_jacobian(z[0], z[0]), torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_layer_takes_the_strongest_directions(rank):
    torch.manual_seed(3)
    layer, given = LowRank(numbers(6), 0.3, rank), random_map(6, 2)
    assert (layer().scale == 0.3).all()
    layer.put(given)
    x, t = torch.randn(5, 6, **DOUBLE), layer()
    torch.testing.assert_close(t.basis.mT @ t.basis, torch.eye(rank, **DOUBLE))
    if rank > 1:
        torch.testing.assert_close(t(x), given(x))
    else:
        kept = given.stretch.log().abs().argmax(keepdim=True)
        expected = LowRankAffine(given.loc, given.scale, given.basis[:, kept], given.stretch[kept])
        torch.testing.assert_close(t(x), expected(x))


def test_the_learned_map_is_that_of_its_parameters():
    torch.manual_seed(10)
    layer, given = LowRank(numbers(6), 0.3, 2), random_map(6, 2)
    layer.put(given)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.3 * torch.randn_like(weight)
    loc, scale = given.loc + given.scale * layer.loc, given.scale * layer.log_scale.exp()
    basis = layer.basis @ torch.linalg.cholesky(layer.basis.mT @ layer.basis).inverse().mT
    x = torch.randn(5, 6, **DOUBLE)
    torch.testing.assert_close(layer()(x), LowRankAffine(loc, scale, basis, layer.log_stretch.exp())(x))


def test_directions_that_were_known_before_leave_gradients_finite():
    torch.manual_seed(9)
    layer, one, axes = LowRank(numbers(4), 0.3, 2), numbers(4) + 1, torch.eye(4, **DOUBLE)
    layer.put(LowRankAffine(numbers(4), one, axes[:, :2], torch.tensor([3.0, 2.0], **DOUBLE)))
    last = LowRankAffine(numbers(4), one, axes[:, 1:2], torch.tensor([3.0], **DOUBLE))
    layer.put(last)
    x = torch.randn(5, 4, **DOUBLE)
    torch.testing.assert_close(layer()(x), last(x))
    layer()(x).square().sum().backward()
    assert layer.basis.grad.isfinite().all()  # a QR decomposition has no derivative if columns are equal


def test_paths_with_more_than_a_hundred_latents_use_low_rank_gaussians():
    torch.manual_seed(4)
    density = Density(independent)
    paths = ascend(density, density.starts(2))
    assert all(torch.allclose(path[-1].point, torch.arange(D, **DOUBLE) / D, atol=0.01) for path in paths)
    elbo, best = ranked(density, paths, low_rank=True)[0]
    assert isinstance(best, Pushed) and -60 < elbo < 0
    assert ranked(density, paths)[0][0] == pytest.approx(0.0, abs=1e-3)  # Laplace's approximation


def test_lanczos_finds_scales_and_both_ends_of_the_spectrum():
    torch.manual_seed(8)
    precision = 1 / SCALE**2
    directions = torch.linalg.qr(torch.randn(D, 2, **DOUBLE)).Q
    scaled = torch.eye(D, **DOUBLE) + directions @ torch.tensor([24.0, -0.96], **DOUBLE).diag() @ directions.mT
    truth = dist.MultivariateNormal(numbers(D), precision_matrix=scaled * (precision[:, None] * precision).sqrt())

    def model():
        pyro.sample("z", truth)

    density = Density(model)
    density.starts(2)
    found = low_rank_laplace(density, numbers(D), 4)
    z = truth.sample((500,))
    gap = (
        truth.log_prob(z) - Pushed(found).log_prob(z)
    ).mean()  # the Kullback-Leibler divergence, for 2 of 130 directions
    assert gap < 3.0
    independent_density = Density(independent)
    independent_density.starts(2)
    exact = low_rank_laplace(independent_density, torch.arange(D, **DOUBLE) / D, 4)
    torch.testing.assert_close(exact.lower(), SCALE.diag(), atol=1e-4, rtol=1e-4)


def test_importance_weights_of_low_rank_gaussians():
    torch.manual_seed(7)
    result = gx.diagnostics.pathfinder(few_directions, paths=4, num_samples=1000)
    assert result.log_evidence == pytest.approx(math.log(5), abs=0.05) and result.khat < 0.7


@pytest.mark.parametrize("rank, warm_start", [(None, "pathfinder"), (3, "pathfinder"), (3, "laplace")])
def test_a_stretched_direction_is_found(rank, warm_start):
    torch.manual_seed(5)
    guide = AutoFlow(few_directions, still, rank=rank, warm_start=warm_start)
    guide()
    z = guide.get_posterior().sample((2000,)).detach()
    assert z.sum(-1).div(D**0.5).std().item() == pytest.approx(5, rel=0.1)
    evidence = math.log(5)
    tolerance = 1e-3 if rank is None else 1.0
    elbo = -Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss(few_directions, guide)
    assert evidence - tolerance < elbo < evidence + 0.1


@pytest.mark.parametrize("recipe", [gx.flows.realnvp, gx.flows.coupling_nsf, gx.flows.iaf])
def test_recipes_with_three_hundred_latents(recipe):
    torch.manual_seed(6)

    def model():
        with pyro.plate("rows", 300):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=torch.ones(300))

    guide = AutoFlow(model, recipe, hidden=(8,), transforms=2)
    result = gx.fit_guide(model, guide, steps=3, num_particles=4, lr=1e-4, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(1.0)).item() * 300
    assert evidence - 20 < result.final < evidence + 1


def test_errors():
    with pytest.raises(ValueError, match=r"rank >= 1; got rank=0|rank"):
        AutoFlow(independent, rank=0)
    with pytest.raises(ValueError, match="rank=None with blocks"):
        AutoFlow(independent, rank=2, blocks="rows")
    with pytest.raises(ValueError, match=r"rank <= 130, the number of unconstrained latents; got 131"):
        AutoFlow(independent, rank=131)()
