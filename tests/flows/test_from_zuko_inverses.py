"""Inverses of zuko's flows where zuko's own search is wrong: brackets, roots far out, bounded images."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from support.checks import close
from support.values import F64
from support.zuko_flows import F, given, make, zuko

# Exact or an error


class Searched(nn.Module):
    """A lazy transform as zuko's, whose inverse is clamped to ±10 as zuko's bisection."""

    class Transform(torch.distributions.Transform):
        domain = codomain = torch.distributions.constraints.real_vector
        bijective = True

        def __init__(self, f):
            super().__init__()
            self.f = f

        def _call(self, x):
            return self.f(x)

        def _inverse(self, y):
            return zuko.utils.bisection(self.f, y, torch.full_like(y, -10.0), torch.full_like(y, 10.0), n=24)

        def log_abs_det_jacobian(self, x, y):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(self.f(x).sum(), x)[0].log().sum(-1)

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, c=None):
        return self.Transform(self.f)


def of(transform, D=2, scale=1.0):
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(D).double(), torch.full((D,), scale).double(), buffer=True
    )
    return gx.flows.from_zuko(zuko.flows.Flow([transform], base))


def identity(x):
    return 1.0 * x


def test_beyond_the_bracket_of_zukos_search():
    """f(x) = x at 25: zuko gives 10."""
    flow = of(Searched(identity))
    x = torch.tensor([25.0, -1e6], dtype=F64)
    clamped = Searched(identity)().inv(x)
    assert clamped.abs().max() < 11
    close(flow().transforms[0](x), x, 1e-9)


def test_no_silent_failure():
    """A bounded transform has no inverse there: an error with the worst residual and where it is."""
    flow = of(Searched(torch.tanh))
    x = torch.tensor([[0.1, 0.2], [0.5, 3.0]], dtype=F64)
    with pytest.raises(gx.ConvergenceError, match=r"Expected Newton's .* at index \(1, 1\), for y = 3") as info:
        flow().transforms[0](x)
    assert info.value.index == (1, 1) and info.value.residual == pytest.approx(2.0, abs=1e-3)
    close(flow().transforms[0](x[:1]), x[:1].atanh(), 1e-9)


@pytest.mark.parametrize("name, dtype", [("GF", torch.float32), ("GF", F64), ("SOSPF", F64), ("NAF", F64)])
def test_roots_far_from_zukos_guess(name, dtype):
    """Parameters scaled by three: undamped steps jump about where zuko's guess, clamped to ±10, is far from the root."""
    module = getattr(F, name)(1, transforms=1).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
        x = torch.linspace(-2.5, 2.5, 21, dtype=dtype).unsqueeze(-1)
        y = gx.flows.from_zuko(module)().transforms[0](x)
        close(module.transform()(y), x, 1e-3 if dtype == torch.float32 else 1e-9)
        assert (y.diff(dim=0) > 0).all()


def test_refine_halves_its_steps():
    """From 3, Newton's method for arctan runs away; from 1.5 in one feature of a system as well."""
    f = lambda x: torch.stack([x[..., 0].atan(), x[..., 1].atan() + x[..., 0]], -1)  # noqa: E731
    y = torch.tensor([[0.0, 0.0], [0.4, 0.5]], dtype=F64)
    x = gx.numerics.refine(f, y, torch.tensor([[3.0, -1.5], [-8.0, 4.0]], dtype=F64))
    expected = torch.stack([y[:, 0].tan(), (y[:, 1] - y[:, 0].tan()).tan()], -1)
    close(x, expected, 1e-9)
    with pytest.raises(gx.ConvergenceError):  # 0.5 - tan(1.2) < -pi / 2 has no root
        gx.numerics.refine(f, torch.tensor([1.2, 0.5], dtype=F64), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("name", ["NAF", "UNAF", "SOSPF", "GF"])
def test_zukos_defaults(name):
    """Three transforms, bounded by softclip or erf: densities are zuko's; draws are exact, or refused as having no inverse."""
    torch.manual_seed(1)
    module = getattr(F, name)(2).double()
    d = gx.flows.from_zuko(module)()
    y = torch.randn(20, 2, dtype=F64)
    close(d.log_prob(y), module().log_prob(y), 1e-12)
    exact = 0
    with torch.no_grad():
        transform = module.transform()
        for x in d.base_dist.sample((20,)):
            try:
                back = transform(d.transforms[0](x))
            except gx.ConvergenceError as error:
                assert not error.residual <= 1e-10
            else:
                exact += 1
                close(back, x, 1e-9)
    assert exact >= 5


def test_noise_outside_of_the_image_raises():
    """GF ends at erfinv(1 - 1e-6) sqrt(2) = 4.89, and softclip at 11 of its argument."""
    t = gx.flows.from_zuko(F.GF(1, transforms=1).double())().transforms[0]
    with pytest.raises(gx.ConvergenceError, match="Expected Newton's method"):
        t(torch.tensor([4.9], dtype=F64))
    t(torch.tensor([4.0], dtype=F64))
    between = zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=11.0)
    with pytest.raises(gx.ConvergenceError, match="Expected Newton's method"):
        of(between)().transforms[0](torch.tensor([0.5, 12.0], dtype=F64))


def test_under_vmap():
    """Densities of rows, and samples where no step of Newton's method is needed: NaN where one is."""
    _, flow = make("MAF", 2, 2)
    c, y = given(2), torch.randn(3, 2, dtype=F64)
    with pyro.validation_enabled(False):  # which looks at values in older versions of torch
        rows = torch.vmap(lambda c, y: flow(c).log_prob(y))(c, y)
    close(rows, flow(c).log_prob(y))
    f = lambda y, guess: gx.numerics.refine(torch.sinh, y, guess)  # noqa: E731
    x = torch.vmap(f)(y, torch.stack([y[0].asinh(), y[1].asinh() + 0.1, y[2].asinh()]))
    close(x[[0, 2]], y[[0, 2]].asinh())
    assert x[1].isnan().all()
