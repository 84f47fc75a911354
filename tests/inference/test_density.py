"""``Density``: log densities of unconstrained latents against formulas, in each way of evaluation."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch.distributions import constraints

from pyro_genexact.inference.density import CHUNK, Density
from pyro_genexact.inference.draws import marginal

Y = torch.tensor([0.3, -0.4, 0.2, 0.6])


def vectorised():
    """A positive scale, and in a plate three points on a simplex of three numbers."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(0.0, scale), obs=Y)


def of_vectorised(z):
    scale = z[:1].exp()
    log_p = dist.Gamma(2.0, 1.0).log_prob(scale).sum() + z[0] + dist.Normal(0.0, scale).log_prob(Y).sum()
    for row in z[1:].reshape(3, 2):  # stick breaking: the k-th share is the fraction v_k of what is left
        left, shares, log_det = 1.0, [], 0.0
        for k, u in enumerate(row):
            v = torch.sigmoid(u - math.log(2 - k))
            log_det = log_det + (v * (1 - v) * left).log()
            shares.append(v * left)
            left = left - v * left
        share = torch.stack([*shares, left])
        log_p = log_p + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]).to(z)).log_prob(share) + log_det
    return log_p


def looped():
    """Two ordered numbers, which the model stacks."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    means = torch.stack([x[0], x[1], x[0] * x[1], x[0] - x[1]])
    pyro.sample("y", dist.Normal(means, 1.0).to_event(1), obs=Y)


def of_looped(z):
    x = torch.stack([z[0], z[0] + z[1].exp()])
    means = torch.stack([x[0], x[1], x[0] * x[1], x[0] - x[1]])
    return dist.Normal(means, 1.0).log_prob(Y).sum() + z[1]


def branching():
    x = pyro.sample("x", dist.HalfNormal(2.0))
    pyro.sample("y", dist.Normal(x if x > 1 else 2 - x, 1.0).expand([4]).to_event(1), obs=Y)


def of_branching(z):
    x = z[0].exp()
    return dist.HalfNormal(2.0).log_prob(x) + dist.Normal((x - 1).abs() + 1, 1.0).log_prob(Y).sum() + z[0]


@config_enumerate
def mixture():
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 4):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(torch.where(k == 0, loc, -loc), 1.0), obs=Y)


def of_mixture(z):
    parts = [math.log(w) + dist.Normal(m, 1.0).log_prob(Y) for w, m in ((0.3, z[0]), (0.7, -z[0]))]
    return dist.Normal(0.0, 2.0).log_prob(z[0]) + torch.stack(parts).logsumexp(0).sum()


@pytest.mark.parametrize(
    ("model", "formula", "way"),
    [
        (vectorised, of_vectorised, "_plated"),
        (looped, of_looped, "_mapped"),
        (branching, of_branching, "_alone"),
        (mixture, of_mixture, "_plated"),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(model, formula, way):
    density = Density(model)
    starts = density.starts(6)
    assert density.way.__name__ == way and density.batched == (way != "_alone")
    z = torch.randn(5, density.dim, dtype=torch.float64)
    values, gradients = density.gradients(torch.cat([starts.double(), z]))
    copy = torch.cat([starts.double(), z]).requires_grad_()
    expected = torch.stack([formula(row) for row in copy])
    torch.testing.assert_close(values, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(density(z[:1]), expected[-5:-4].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), copy)[0], atol=1e-4, rtol=1e-4)


def test_values_on_the_supports():
    density = Density(vectorised)
    z = torch.randn(7, density.dim)
    found = density.values(z)
    torch.testing.assert_close(found["scale"], z[:, 0].exp())
    assert found["shares"].shape == (7, 3, 3) and torch.allclose(found["shares"].sum(-1), torch.ones(7, 3))


def test_points_for_which_the_model_raises_do_not_spoil_the_others():
    def model():
        a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        eye = torch.eye(2).to(a)
        chol = torch.linalg.cholesky(eye + a[..., None, None] * (1 - eye))  # of positive definite matrices for |a| < 1
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2).to(a), scale_tril=chol), obs=torch.ones(2).to(a))

    density = Density(model)
    density.starts(8)
    a = torch.tensor([0.5, 3.0, -0.2, 2.0, 0.0], dtype=torch.float64)
    values, gradients = density.gradients(a[:, None])
    expected = -math.log(2 * math.pi) - (1 - a**2).log() / 2 - 1 / (1 + a)
    assert torch.equal(values.isnan(), a > 1)
    assert torch.equal(gradients.isnan()[:, 0], a > 1)
    torch.testing.assert_close(values[a < 1], expected[a < 1], atol=1e-5, rtol=0)


def test_leaves_random_numbers_and_parameters_alone_and_repeats_subsamples():
    weight = torch.tensor(0.5, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(weight, 1.0))
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(10.0)[rows])

    density = Density(model)
    with poutine.trace() as outer:
        z = density.starts(4)
        before = torch.get_rng_state()
        values = density(torch.cat([z] * (CHUNK // 2)))
        density.gradients(z)
    assert not [name for name in outer.trace.nodes if not name.startswith("_")]
    assert torch.equal(torch.get_rng_state(), before) and weight.grad is None
    torch.testing.assert_close(values[: len(z)], values[-len(z) :])
    assert density.subsampled == {"rows"}


def test_latents_are_in_float64_if_the_model_accepts_it():
    """In float32, squares near 1e8 have errors of several nats."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("density", (1e4 + z) ** 2 - 2e4 * z - z**2)

    density = Density(model)
    density.starts(4)
    values, gradients = density.gradients(torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None])
    torch.testing.assert_close(values, torch.full((9,), 1e8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert gradients.abs().max() < 1e-5


ROWS = torch.linspace(-1, 2, 6, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("points", [1, 3])
def test_scales_multiply_and_masks_hide_the_rows_of_a_mixture_after_its_labels_are_summed_out(scale, points):
    """Of one point too, whose outer plate has size 1. Labels of masked rows have total mass 1."""
    shown = torch.tensor([True, True, False, True, False, True])

    @config_enumerate
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with poutine.scale(scale=scale), pyro.plate("rows", 6), poutine.mask(mask=shown):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(a + 2 * k, 1.0), obs=ROWS)

    density = Density(model)
    density.starts(4)
    assert density.batched
    z = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]
    parts = [dist.Normal(z + 2 * k, 1.0).log_prob(ROWS) + math.log(p) for k, p in ((0, 0.6), (1, 0.4))]
    rows = torch.stack(parts).logsumexp(0)[:, shown]
    truth = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + scale * rows.sum(1)
    assert torch.allclose(density(z), truth) and torch.allclose(density._alone(z), truth)


def test_sites_of_enumerated_latents_have_one_scale():
    @config_enumerate
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with pyro.plate("rows", 6, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=ROWS[rows])

    trace = poutine.trace(poutine.enum(model, first_available_dim=-2)).get_trace()
    with pytest.raises(ValueError, match=r"one scale of all sites that depend on enumerated latents; got \[1.0, 3.0\]"):
        marginal(trace, "points", 1)
