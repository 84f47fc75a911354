"""Guides with blocks: hierarchical Gaussians in closed form, the layout of latents, one transform of all latents."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import init_to_mean
from pyro.infer.reparam import NeuTraReparam
from torch import nn

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference.arrow import ArrowAffine, Layout
from pyro_genexact.inference.density import Density
from pyro_genexact.inference.integrated import Integrated
from support.latents import DOUBLE, numbers

SIGMA = torch.tensor([0.5, 1.0, 2.0, 0.7, 1.5], **DOUBLE)
Y = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0], **DOUBLE)
TAU = 1.7


def schools(tau=TAU):
    mu = pyro.sample("mu", dist.Normal(numbers() + 1, 5.0))
    with pyro.plate("schools", len(Y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def mixed():
    """Three globals and, per row, four numbers at sites of several shapes and supports; the plate of rows is at dim -2."""
    scale = pyro.sample("scale", dist.Gamma(numbers() + 2.0, 1.0))
    with pyro.plate("rows", 3, dim=-2):
        simplex = pyro.sample("simplex", dist.Dirichlet(numbers(3) + 1))
        with pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(simplex[..., 0], scale))
    beta = pyro.sample("beta", dist.Normal(numbers(2), 1.0).to_event(1))
    pyro.factor("data", -(z - beta.sum(-1)).square().sum() / 2)


def only_rows():
    with pyro.plate("rows", 4):
        pyro.sample("z", dist.MultivariateNormal(numbers(2) + 1, torch.tensor([[2.0, 0.5], [0.5, 1.0]], **DOUBLE)))


class Still(nn.Module):
    """A module whose call returns a fixed transform, whatever the context."""

    def __init__(self, context):
        super().__init__()
        self.context = context

    def forward(self, context=None):
        return gx.transforms.Reverse()


def fixed(D, context=0):
    return gx.Flow([Still(context)], dist.Normal(numbers(D), 1.0).to_event(1))


def shaken(guide):
    with torch.no_grad():
        for weight in guide.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return guide


def posterior_of_schools(tau=TAU):
    """The joint normal distribution of mu, theta and y is that of mu, then theta given mu, then y given theta."""
    eye, n = torch.eye(len(Y), **DOUBLE), len(Y)
    precision = numbers(n + 1, n + 1)
    precision[0, 0] = 1 / 25 + n / tau**2
    precision[0, 1:] = precision[1:, 0] = -1 / tau**2
    precision[1:, 1:] = eye / tau**2 + (1 / SIGMA**2).diag()
    linear = torch.cat([numbers(1) + 1 / 25, Y / SIGMA**2])
    return dist.MultivariateNormal(torch.linalg.solve(precision, linear), precision_matrix=precision)


def evidence_of_schools():
    covariance = 25 + (SIGMA**2 + TAU**2).diag()
    return dist.MultivariateNormal(numbers(len(Y)) + 1, covariance).log_prob(Y).item()


def test_the_start_is_exact_for_a_hierarchical_gaussian():
    torch.manual_seed(0)
    guide = AutoFlow(schools, fixed, blocks="schools")
    guide()
    truth = posterior_of_schools()
    z = truth.sample((7,))
    torch.testing.assert_close(guide.get_posterior().log_prob(z), truth.log_prob(z), atol=1e-3, rtol=0)
    for _ in range(3):
        assert -Trace_ELBO().loss(schools, guide) == pytest.approx(evidence_of_schools(), abs=1e-3)


@pytest.mark.parametrize("recipe", [gx.flows.iaf, gx.flows.realnvp])
@pytest.mark.parametrize(("model", "plate"), [(mixed, "rows"), (mixed, "inner"), (only_rows, "rows")])
def test_one_bijection_whose_rows_depend_on_the_globals_only(model, plate, recipe):
    torch.manual_seed(1)
    guide = AutoFlow(model, recipe, blocks=plate, hidden=(6,), activation=torch.tanh, warm_start=0)
    guide()
    t = shaken(guide).get_transform()
    x = torch.randn(4, guide.latent_dim, **DOUBLE)
    y = t(x)
    jacobians = torch.stack([torch.autograd.functional.jacobian(guide.get_transform(), row) for row in x])
    ladj = torch.linalg.slogdet(jacobians).logabsdet
    torch.testing.assert_close(guide.get_transform().log_abs_det_jacobian(x, y), ladj)
    torch.testing.assert_close(guide.get_transform().inv(y.clone()), x)
    log_prob = guide.get_posterior().log_prob(y.clone())
    torch.testing.assert_close(log_prob, dist.Normal(numbers(), 1.0).log_prob(x).sum(-1) - ladj)
    layer = guide.flow.transforms[-1]
    of_all, rows, of_row = layer.layout
    packed = jacobians[:, layer.order].abs().amax(0) > 0
    assert packed[of_all:, :of_all].all() and not packed[:of_all, of_all:].any()
    expected = torch.eye(rows, dtype=torch.bool).repeat_interleave(of_row, 0).repeat_interleave(of_row, 1)
    assert not packed[of_all:, of_all:][~expected].any()


def test_rows_are_those_of_the_plate():
    torch.manual_seed(2)
    guide = AutoFlow(mixed, blocks="rows", hidden=(4,), warm_start=0)
    guide()
    last = guide.flow.transforms[-1]
    assert last.layout == Layout(3, 3, 4)  # 2 of the simplex and 2 of z
    noise = torch.zeros(guide.latent_dim, **DOUBLE)
    before, values = guide.get_transform()(noise), {}
    for name, z in (
        ("before", before),
        ("after", guide.get_transform()(noise.index_fill(0, torch.arange(7, 11), 1.0))),
    ):
        values[name] = {site["name"]: value for site, value in guide._unpack_latent(z)}
    changed = {name: (value != values["before"][name]) for name, value in values["after"].items()}
    assert not changed["scale"].any() and not changed["beta"].any()
    assert torch.equal(changed["z"], torch.tensor([[False] * 2, [True] * 2, [False] * 2]))
    assert torch.equal(changed["simplex"].flatten(1), torch.tensor([[False] * 2, [True] * 2, [False] * 2]))


def test_an_arrow_is_the_normal_distribution_of_its_covariance():
    torch.manual_seed(3)
    layout = Layout(2, 3, 2)
    loc, of_all, of_rows, across = (torch.randn(*s, **DOUBLE) for s in ((8,), (2, 2), (3, 2, 2), (3, 2, 2)))
    of_all, of_rows = (x.tril(-1) + x.diagonal(0, -2, -1).exp().diag_embed() for x in (of_all, of_rows))
    t = ArrowAffine(layout, loc, of_all, of_rows, across)
    root = torch.block_diag(of_all, *of_rows)
    root[2:, :2] = across.flatten(0, 1)
    truth = dist.MultivariateNormal(loc, root @ root.mT)
    z = torch.randn(5, 4, 8, **DOUBLE)
    x, ladj = t.inverse_and_ladj(z)
    torch.testing.assert_close(dist.Normal(numbers(), 1.0).log_prob(x).sum(-1) + ladj, truth.log_prob(z))
    torch.testing.assert_close(t(x), z)


def test_the_learned_map_is_that_of_its_parameters():
    torch.manual_seed(7)
    guide = AutoFlow(mixed, fixed, blocks="rows", warm_start=0)
    guide()
    last = shaken(guide).flow.transforms[-1]
    root = torch.block_diag(last.of_all, *last.of_rows).tril(-1) + last.log_scale.exp().diag()
    root[3:, :3] = last.across.flatten(0, 1)
    x = torch.randn(5, guide.latent_dim, **DOUBLE)
    torch.testing.assert_close(last()(x)[:, last.order], last.center + last.loc + x @ root.mT)


def test_rows_have_the_same_networks_and_an_embedding_each():
    torch.manual_seed(8)
    guide = AutoFlow(mixed, blocks="rows", warm_start=0)
    guide()
    flow = shaken(guide).flow.transforms[0]
    assert flow.of_rows.transforms[0].conditioner.hidden == (32,)
    x = flow.layout.joined(torch.randn(3, **DOUBLE), torch.randn(4, **DOUBLE).expand(3, 4))
    _, rows = flow.layout.split(flow()(x))
    assert (rows[0] - rows[1]).abs().min() > 1e-3
    with torch.no_grad():
        flow.embedding.zero_()
    _, rows = flow.layout.split(flow()(x))
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1))


@pytest.mark.parametrize("kind", ["laplace", "pathfinder"])
def test_rows_without_globals_start_at_the_exact_gaussian(kind):
    torch.manual_seed(4)
    guide = AutoFlow(only_rows, fixed, blocks="rows", warm_start=kind)
    guide()
    for _ in range(3):
        assert Trace_ELBO().loss(only_rows, guide) == pytest.approx(0.0, abs=1e-4)  # the log evidence is 0


def test_rows_are_integrated_out_exactly_if_they_are_gaussian():
    """log p(mu, log tau, y) with theta integrated out."""
    torch.manual_seed(5)

    def model():
        schools(pyro.sample("tau", dist.LogNormal(numbers(), 1.0)))

    guide = AutoFlow(model, fixed, blocks="schools", warm_start=0)
    guide()
    density = Density(model)
    integrated = Integrated(density, guide.flow.transforms[-1], density.starts(3))
    points = torch.tensor([[0.5, 1.0], [-0.3, 2.0], [1.5, -4.0]], **DOUBLE).requires_grad_()  # log tau, mu
    scale, mu = points.unbind(1)
    y = dist.Normal(mu, (scale.exp() ** 2 + SIGMA.unsqueeze(-1) ** 2).sqrt()).log_prob(Y.unsqueeze(-1)).sum(0)
    truth = y + dist.Normal(1, 5).log_prob(mu) + dist.Normal(numbers(), 1).log_prob(scale)
    values, gradients = integrated.gradients(points.detach())
    torch.testing.assert_close(values, truth.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(truth.sum(), points)[0])


def test_rows_that_are_not_gaussian():
    """Counts: Newton steps from the left are far too long, and the curvature at the modes depends on the global."""

    def model():
        mu = pyro.sample("mu", dist.Normal(numbers(), 1.0))
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(mu, 3.0))
            pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor([100.0, 1.0], **DOUBLE))

    guide = AutoFlow(model, fixed, blocks="rows", warm_start=0)
    guide()
    density = Density(model)
    density.starts(2)
    integrated = Integrated(density, guide.flow.transforms[-1], torch.tensor([[0.0, -5.0, -15.0]], **DOUBLE))
    mu = torch.tensor([[0.5]], **DOUBLE)
    z = integrated.settled(mu)[0, :, 0]
    torch.testing.assert_close(
        torch.tensor([100.0, 1.0], **DOUBLE) - z.exp() - (z - mu[0]) / 9, numbers(2), atol=0.01, rtol=0
    )
    value, gradient = integrated.gradients(torch.cat([mu, mu + 1e-3, mu - 1e-3]))
    assert gradient[0].item() == pytest.approx((value[1] - value[2]).item() / 2e-3, abs=1e-6)


def test_rows_that_depend_on_each_other_are_noticed():
    """Also if they do not at the guide's location, where the global is 0."""

    def chain():
        phi = pyro.sample("phi", dist.Normal(numbers(), 1.0))
        with pyro.plate("times", 6):
            z = pyro.sample("z", dist.Normal(numbers(), 1.0))
        pyro.factor("smooth", phi * (z[..., 1:] * z[..., :-1]).sum(-1, keepdim=z.dim() > 1))

    with pytest.warns(UserWarning, match="rows depend on each other"):
        AutoFlow(chain, blocks="times", hidden=(4,), init_loc_fn=init_to_mean)()


def test_conventions_of_automatic_guides():
    torch.manual_seed(6)
    guide = shaken(AutoFlow(mixed, blocks="rows", hidden=(6,), warm_start=0))
    guide()
    again = copy.deepcopy(guide)
    torch.testing.assert_close(again.median()["z"], guide.median()["z"])
    other = AutoFlow(mixed, blocks="rows", hidden=(6,), warm_start=0)
    other()
    other.load_state_dict(guide.state_dict())
    z = guide.get_posterior().sample((3,))
    torch.testing.assert_close(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))
    result = gx.fit_guide(mixed, guide, steps=5, num_particles=8, progress=False)
    assert math.isfinite(result.final) and not result.skipped
    trace = pyro.poutine.trace(NeuTraReparam(guide).reparam(mixed)).get_trace()
    assert trace.nodes["z"]["value"].shape == (3, 2)


def test_a_recipe_may_return_flows_of_float64():
    def double(D, context=0):
        return gx.flows.iaf(D, context, hidden=(6,)).double()

    assert AutoFlow(schools, double, blocks="schools", warm_start=0)()["theta"].dtype == torch.float64


def test_errors():
    def subsampled():
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(numbers(), 1.0))

    def wide(D, context=0):
        return gx.flows.iaf(D + 1, context)

    def heavy(D, context=0):
        return gx.flows.iaf(D, context, base=dist.StudentT(3.0).expand([D]).to_event(1))

    with pytest.raises(TypeError, match=r"name of one plate or None; got \['a', 'b'\]"):
        AutoFlow(schools, blocks=["a", "b"])
    with pytest.raises(ValueError, match=r"one of \['inner', 'rows'\]; got 'columns'"):
        AutoFlow(mixed, blocks="columns")()
    with pytest.raises(ValueError, match="no latents in subsampled plates"):
        AutoFlow(subsampled, blocks="rows")()
    with pytest.raises(ValueError, match="flow over 3 real numbers"):
        AutoFlow(mixed, wide, blocks="rows")()
    with pytest.raises(ValueError, match="with context=7; got context=0"):
        AutoFlow(mixed, lambda D, context=0: gx.flows.iaf(D), blocks="rows")()
    with pytest.raises(ValueError, match="standard normal base"):
        AutoFlow(mixed, heavy, blocks="rows")()
    with pytest.raises(TypeError, match="Expected recipe to return a Flow; got int"):
        AutoFlow(mixed, lambda D, context=0: 3, blocks="rows")()
