"""TarFlow: patches and their order against loops, the start, both directions, wrong sizes."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import heads
from pyro_genexact.testing import redraw
from pyro_genexact.transforms import Patches
from support.checks import fails
from support.values import F64, normal_log_prob

SMALL = {"width": 8, "depth": 1, "num_heads": 1}
SHAPE = (2, 4, 6)


def flow(context=0, spread=0.3, **options):
    return redraw(gx.flows.tarflow(SHAPE, 2, context, **{"transforms": 2, **SMALL, **options}).double(), spread=spread)


def images(rows=3, scale=1.0):
    return scale * torch.randn(rows, *SHAPE, dtype=F64)


def test_patches_are_cut_in_raster_order():
    x = images()
    t = Patches(SHAPE, 2)
    expected = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in (0, 2) for j in (0, 2, 4)]
    assert torch.equal(t(x), torch.stack(expected, 1))
    assert torch.equal(t.inv(t(x)), x)
    assert (t.grid, t.site_shape) == ((2, 3), (8,))
    assert torch.equal(Patches((4, 6), 2)(x[:, 0]), Patches((1, 4, 6), 2)(x[:, :1]))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("head", [None, lambda shape: heads.RationalQuadraticSpline(3, shape=shape)])
def test_density_by_the_jacobian(head, inverse):
    d = flow(head=head, inverse=inverse)()
    y = images(2)
    to_base = d.transforms[0].inv
    for row in y:
        jacobian = torch.autograd.functional.jacobian(to_base, row).reshape(48, 48)
        expected = normal_log_prob(to_base(row).flatten()) + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(d.log_prob(row), expected, rtol=0, atol=1e-8)


def test_blocks_read_patches_in_alternating_orders():
    """One block lets a patch depend on earlier patches; two blocks let it depend on all."""
    cut = Patches(SHAPE, 2)
    for transforms, reads in ((1, torch.ones(6, 6).tril()), (2, torch.ones(6, 6))):
        parts = gx.transforms.Chain([cut.inv, flow(transforms=transforms)().transforms[0].inv, cut])
        jacobian = torch.autograd.functional.jacobian(parts, cut(images(1)[0]))
        assert torch.equal((jacobian.abs().amax((1, 3)) > 0).double(), reads.double())


def test_start_is_near_the_identity():
    torch.manual_seed(0)
    y = torch.randn(50, *SHAPE)
    d = gx.flows.tarflow(SHAPE, 2)()
    assert (d.transforms[0].inv(y) - y).abs().mean() < 0.2
    assert abs(d.log_prob(y).mean() - normal_log_prob(y.flatten(1)).mean()) < 5


@pytest.mark.parametrize("inverse", [False, True])
def test_directions_and_solver(inverse):
    net = flow(context=3, inverse=inverse)
    context, y = torch.randn(3, 3, dtype=F64), images(scale=0.5)
    t, other = net(context).transforms[0], net(context, solver="fixed_point").transforms[0]
    with torch.no_grad():
        x = t.inv(y)
        torch.testing.assert_close(t(x.clone()), y, rtol=0, atol=1e-10)
        torch.testing.assert_close(other(x), t(x.clone()), rtol=0, atol=1e-8)
        torch.testing.assert_close(other.inv(y), x, rtol=0, atol=1e-8)
    assert all(n <= 6 for n in other.passes)


def test_options_of_the_recipe():
    y = torch.rand(20, *SHAPE)
    base = dist.Normal(torch.zeros(SHAPE), 2.0).to_event(3)
    net = flow(support=constraints.unit_interval, standardize=y, base=base)
    d = net()
    assert d.event_shape == SHAPE and d.support.check(d.sample((7,))).all()
    plain = redraw(gx.flows.tarflow(SHAPE, 2, transforms=2, base=base, **SMALL).double(), spread=0.3)
    y = y.double()
    logits = torch.logit(y)
    mean, scale = logits.mean(0), logits.std(0, correction=0)
    expected = plain().log_prob((logits - mean) / scale) - (scale.log() + torch.log(y * (1 - y))).flatten(1).sum(1)
    torch.testing.assert_close(d.log_prob(y), expected, rtol=0, atol=2e-3)  # mean and scale are those of float32


@pytest.mark.parametrize(
    "run, text",
    [
        (lambda: Patches((4, 6), 4), "Expected patch to divide the height and width of (4, 6); got 4."),
        (lambda: Patches((4,), 2), "Expected image_shape to be (C, H, W) or (H, W); got (4,)."),
        (lambda: Patches((4, 0), 2), "Expected image_shape to be a sequence of integers >= 1; got (4, 0)."),
        (lambda: Patches((4, 4), 0), "Expected patch to be an integer >= 1; got 0."),
        (lambda: gx.flows.tarflow((3, 8, 6), 4), "Expected patch to divide the height and width of (3, 8, 6); got 4."),
        (lambda: gx.flows.tarflow(SHAPE, 2, transforms=0), "Expected transforms to be an integer >= 1; got 0."),
        (
            lambda: gx.flows.tarflow(SHAPE, 2, gx.Covariates(3)),
            "Expected context to be an integer >= 0; got Covariates",
        ),
        (lambda: gx.flows.tarflow(SHAPE, 2, width=24), "Expected width divisible by 4 * num_heads == 16"),
        (lambda: gx.flows.tarflow(SHAPE, 2, support=constraints.simplex), "Expected support to be the reals"),
        (
            lambda: gx.flows.tarflow(SHAPE, 2, base=dist.Normal(torch.zeros(48), 1.0).to_event(1)),
            "Expected base.event_shape == (2, 4, 6) (the flow's real events); got (48,).",
        ),
        (
            lambda: gx.flows.tarflow(SHAPE, 2, standardize=torch.zeros(9, 48)),
            "Expected standardize.shape[1:] == (2, 4, 6) (features); got (9, 48).",
        ),
        (lambda: flow()().log_prob(torch.zeros(2, 4, 4, dtype=F64)), "torch.Size([2, 4, 4])"),
        (lambda: flow()().log_prob(torch.zeros(3, 4, 6, dtype=F64)), "torch.Size([3, 4, 6])"),
        (lambda: flow().transforms[0](torch.zeros(5, 2, 2, 6)), "Expected value.shape[-3:] == (2, 4, 6)"),
        (lambda: flow().transforms[0].inv(torch.zeros(5, 2, 6)), "Expected value.shape[-2:] == (6, 8)"),
        (lambda: flow(context=3)(torch.zeros(2, 4, dtype=F64)), "Expected context.shape[-1] == 3"),
        (lambda: flow()(lengths=torch.tensor([2])), "Expected base to have independent real elements"),
    ],
)
def test_errors(run, text):
    fails(ValueError, text, run)


@pytest.mark.parametrize(
    "head, kind, text",
    [
        (lambda shape: heads.Normal(shape=shape), TypeError, "Expected head to make bijections"),
        (heads.Affine((8,)), TypeError, "Expected head to be a callable that makes a head; got Affine."),
        (lambda shape: heads.Affine(), ValueError, "Expected head to make heads of site_shape (8,); got ()."),
    ],
)
def test_errors_of_heads(head, kind, text):
    fails(kind, text, lambda: gx.flows.tarflow(SHAPE, 2, head=head))
