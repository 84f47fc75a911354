"""Planar, radial and Sylvester flows against Pyro's, explicit matrices and quadrature, at any scale."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import TransformedDistribution

import pyro_genexact as gx
from pyro_genexact.transforms import Planar, Radial, Sylvester
from pyro_genexact.transforms.matrices import reflected
from pyro_genexact.transforms.residual import _admissible
from support.values import built, sized, with_ladj

KINDS = {
    "planar": lambda D, **o: Planar(D, **o),
    "radial": lambda D, **o: Radial(D, **o),
    "sylvester": lambda D, **o: Sylvester(D, **o),
    "sylvester rank": lambda D, **o: Sylvester(D, rank=1, reflections=2, **o),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def with_numbers(module, *parts):
    module = module.double()
    with torch.no_grad():
        module.phi.copy_(torch.cat([part.flatten() for part in parts]))
    return module


def agree(t, other, x, tol=1e-12):
    for got, expected in zip(with_ladj(t, x), with_ladj(other, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def free(u, w):
    """v of which the admissible u comes: along w, p + sqrt(1/|w|^2 + |v|^2) = u + 1/|w|."""
    norm = w.norm()
    along = u @ w / norm
    across = u - along * w / norm
    c, a = along + 1 / norm, 1 / norm**2 + across @ across
    return across + (c**2 - a) / (2 * c) * w / norm


@pytest.mark.parametrize("seed", range(3))
def test_planar_is_that_of_pyro(seed):
    torch.manual_seed(seed)
    other = dist.transforms.Planar(4).double()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    u = other.u_hat(other.u, other.w)
    t = with_numbers(Planar(4), free(u, other.w), other.w, other.bias)()
    agree(t, other, 3 * sized(7, 4))


@pytest.mark.parametrize("seed", range(3))
def test_radial_is_that_of_pyro(seed):
    torch.manual_seed(seed)
    other = dist.transforms.Radial(4).double()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    alpha, slope = (torch.nn.functional.softplus(p) for p in (other.alpha_prime, other.beta_prime))
    t = with_numbers(Radial(4), other.x0, alpha.log().sinh(), (slope / alpha).log().sinh())()
    agree(t, other, 3 * sized(7, 4))


def test_sylvester_is_that_of_pyro_where_it_does_not_turn():
    """With other reflections Pyro's log-determinant is not that of its values."""
    other = dist.transforms.Sylvester(3, 2).double()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    normal = sized(1, 3).repeat(2, 1)  # twice the same reflection
    with torch.no_grad():
        other.u_unnormed.copy_(normal)
    r, s = (m.detach().T.flip(0, 1) for m in (other.R(), other.S()))  # Pyro multiplies rows: upper becomes lower
    v = torch.stack([free(a[None], b[None])[0] for a, b in zip(r.diag(), s.diag(), strict=True)])
    square = torch.zeros(3, 4, dtype=torch.float64)
    square[:, 1:] += r.triu(1) + v.diag()
    square[:, :3] += s.T
    module = Sylvester(3, reflections=2)
    t = with_numbers(module, normal - module.axes, square, other.b.detach().flip(0))()
    x = 3 * sized(7, 3)
    y, ladj = with_ladj(t, x.flip(-1))
    expected = other(x)
    torch.testing.assert_close(y.flip(-1), expected)
    torch.testing.assert_close(ladj, other.log_abs_det_jacobian(x, expected), rtol=1e-6, atol=1e-6)  # which adds 1e-8


def test_sylvester_by_its_matrices():
    module = built(Sylvester(4, rank=3, reflections=5))
    q, r, s, b, slope = module._read(module.phi)
    assert (r.tril(-1) == 0).all() and (s.tril(-1) == 0).all()
    torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(slope, 1 + r.diag() * s.diag())
    x = sized(6, 4)
    torch.testing.assert_close(module()(x), x + (q @ r @ torch.tanh(s @ q.T @ x.T + b[:, None])).T)


def test_reflections_are_multiplied_first_to_last():
    normals = sized(2, 5, 4)
    expected = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    for v in normals.unbind(1):
        expected = expected - 2 * (expected @ v[..., None]) * v[:, None] / v.square().sum(-1)[:, None, None]
    torch.testing.assert_close(reflected(normals, 4), expected)
    torch.testing.assert_close(reflected(normals, 3), expected[..., :3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_slope_is_positive_and_right_however_large_and_opposed_the_vectors(dtype):
    w = sized(50, 3) * 10 ** (4 * torch.rand(50, 1, dtype=torch.float64) - 1)
    v = -w * torch.rand(50, 1, dtype=torch.float64)
    v[::2] += sized(25, 3, seed=1)
    v, w = v.to(dtype).requires_grad_(), w.to(dtype)
    gain, slope = _admissible((v * v).sum(-1), (w * w).sum(-1), (v * w).sum(-1))
    assert (slope > 0).all()
    assert torch.autograd.grad(slope.log().sum(), v)[0].isfinite().all()
    u = v + w * gain[:, None]
    sizes = 1 + (v.double().norm(dim=-1) * w.double().norm(dim=-1)).square()
    error = (slope - 1 - (w * u).sum(-1)).abs() / sizes.sqrt()
    assert error.max() < 20 * torch.finfo(dtype).eps


def test_opposed_vectors_of_one_feature_keep_their_slope():
    """1 + w u = exp(arsinh(w v)) there: about 1 / (2 |w v|), of which 1 + w u would lose all digits."""
    v, w = torch.tensor([-3e4, -20.0, 0.0, 5.0]), torch.tensor([2e3, 30.0, 7.0, 4.0])
    slope = _admissible(v * v, w * w, v * w)[1]
    expected = (v.double() * w.double()).asinh().exp()
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=0)


@kinds
@pytest.mark.parametrize("context", [0, 2])
def test_near_the_identity_at_the_start(kind, context):
    module = kind(5, context=context).double()
    x = 2 * sized(50, 5)
    t = module(sized(50, 2, seed=1)) if context else module()
    assert 0 < (t(x) - x).abs().max() < 1


@pytest.mark.parametrize("kind", [Planar, Radial, Sylvester])
def test_zeros_are_the_identity(kind):
    module = kind(3)
    t = with_numbers(module, torch.zeros_like(module.phi))()
    x = sized(4, 3)
    torch.testing.assert_close(t(x), x)
    torch.testing.assert_close(t.inv(x.clone()), x)
    (grad,) = torch.autograd.grad(t(x).sin().sum() + t.log_abs_det_jacobian(x, t(x)).sum(), module.phi)
    assert grad.isfinite().all()


@kinds
@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_round_trips_at_any_scale(kind, features, dtype, tol):
    size = 10 ** (6 * torch.rand(300, 1, dtype=torch.float64) - 2)
    y = (sized(300, features) * size).clamp(-1e4, 1e4).to(dtype)
    for seed in range(5):
        torch.manual_seed(seed)
        module = built(kind(features)).to(dtype)
        x = module().inv(y)
        back, ladj = with_ladj(module(), x.clone())
        assert ((back - y).abs().amax(-1) <= tol * (1 + y.abs().amax(-1))).all()
        torch.testing.assert_close(-module().inv.log_abs_det_jacobian(y, x), ladj, rtol=tol, atol=1e2 * tol)


@kinds
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_large_parameters(kind, scale):
    module = kind(3).double()
    module.phi.data = 0.5 * scale * sized(len(module.phi), seed=3)
    y = 10 * sized(40, 3)
    for t in (module(), module().inv):
        out, ladj = with_ladj(t, y)
        grads = torch.autograd.grad(out.sin().sum() + ladj.sum(), module.phi)
        assert all(value.isfinite().all() for value in (out, ladj, *grads))
    torch.testing.assert_close(module()(module().inv(y).clone()), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_sylvester_loses_no_more_than_its_slopes_cost(rank, scale, dtype):
    """A number y rounded by eps |x| where dy/dx is up to 1 + |R| |S|: 1e-2 in float32 at 100, 1e-11 in float64."""
    eps = torch.finfo(dtype).eps
    for seed in range(5):
        torch.manual_seed(seed)
        module = Sylvester(4, rank=rank)
        y = torch.randn(300, 4, dtype=dtype)
        with torch.no_grad():
            module = module.to(dtype)
            module.phi.mul_(scale)
            _, r, s, _, _ = module._read(module.phi)
            r, s = (torch.linalg.matrix_norm(m, 2) for m in (r, s))
            t = module()
            x = t.inv(y)
            back, ladj = with_ladj(module(), x.clone())
            size = eps * (1 + torch.maximum(x.abs(), y.abs()).amax(-1))
            assert ((back - y).abs().amax(-1) <= 8 * (1 + r * s) * size).all()
            assert ((t.log_abs_det_jacobian(x, y) - ladj).abs() <= 32 * (1 + s) * size).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_derivatives_of_sylvesters_inverse_are_those_of_its_matrix(scale):
    module = Sylvester(4, rank=3).double()
    module.phi.data.mul_(scale)
    y, t = sized(6, 4).requires_grad_(), module()
    x = t.inv(y)
    ladj = t.log_abs_det_jacobian(x, y)
    forward = torch.stack([torch.autograd.functional.jacobian(module(), row) for row in x.detach()])
    pulled = torch.stack([torch.autograd.grad(x[:, i].sum(), y, retain_graph=True)[0] for i in range(4)], 1)
    torch.testing.assert_close(pulled, torch.linalg.inv(forward), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(forward)[1], rtol=1e-8, atol=1e-8)


def test_radial_at_its_centre():
    module = built(Radial(3))
    x = module.phi.detach()[None, :3].clone().requires_grad_()
    y, ladj = with_ladj(module(), x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, 3 * module.phi[None, 4].asinh())
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], module.phi[4].asinh().exp().expand(1, 3).detach(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(module().inv(y.detach().clone()), x)


def test_nan_stays_nan():
    for kind in (Planar, Radial, Sylvester):
        module = kind(2)
        assert module().inv(torch.tensor([[torch.nan, 1.0], [2.0, 1.0]])).isnan().tolist() == [[True] * 2, [False] * 2]
        module.phi.data.fill_(torch.nan)
        assert module()(torch.ones(2)).isnan().all() and module().inv(torch.ones(2)).isnan().all()


@kinds
def test_each_context_row_has_noise_of_its_own(kind):
    module = built(kind(3, context=2, hidden=(4,)))
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    for context, batch in ((torch.zeros(5, 2).double(), (5,)), (torch.zeros(4, 1, 2).double(), (4, 1))):
        d = TransformedDistribution(base, [module(context)])
        assert d.batch_shape == batch and d.event_shape == (3,)
        y = d.sample((6,))
        assert y.shape == (6, *batch, 3) and len(y.flatten(0, -2).unique(dim=0)) == y.flatten(0, -2).shape[0]
        assert d.log_prob(y).shape == (6, *batch) and d.log_prob(y[0, 0]).shape == batch


@kinds
def test_the_mass_is_one(kind):
    module = kind(2).double()
    module.phi.data = 0.7 * sized(len(module.phi), seed=4)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    axis = torch.linspace(-12, 12, 400, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        for t in (module(), module().inv):
            assert (t(points) - points).abs().max() > 0.2
            mass = TransformedDistribution(base, [t]).log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
            assert abs(mass - 1) < 1e-6


def test_errors():
    for kind in (Planar, Radial, Sylvester):
        with pytest.raises(ValueError, match="Expected features to be an integer >= 1; got 0"):
            kind(0)
        with pytest.raises(ValueError, match="Expected context to be an integer >= 0; got -1"):
            kind(2, context=-1)
        with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 2 \(features\); got \(4, 3\)"):
            kind(2)()(torch.zeros(4, 3))
        with pytest.raises(ValueError, match=r"Expected value.dtype == torch.float32 .*; got torch.float64"):
            kind(2)().inv(torch.zeros(4, 2, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"Expected a context \(\*batch, 3\)"):
            kind(2, context=3)()
        with pytest.raises(ValueError, match="Expected no context"):
            kind(2)(torch.zeros(3))
    with pytest.raises(ValueError, match=r"Expected rank <= 2 \(features\); got 3"):
        Sylvester(2, rank=3)
    module = Sylvester(2)
    module.phi.data[:2] = torch.tensor([-1.0, 0.0])
    with pytest.raises(ValueError, match="Expected vectors other than zero"):
        module()(torch.zeros(2))
    with pytest.raises(ValueError, match="Expected reflections to be an integer >= 1; got 0"):
        Sylvester(2, reflections=0)


def test_a_flow_of_them_learns():
    """A crescent that no Gaussian fits: y2 = x2 + tanh(2 x1)."""
    torch.manual_seed(0)
    x = torch.randn(2000, 2)
    rows = torch.stack([x[:, 0], 0.3 * x[:, 1] + 2 * torch.tanh(2 * x[:, 0])], -1)
    gaussian = dist.MultivariateNormal(rows.mean(0), rows.T.cov()).log_prob(rows).mean()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    onto = gx.transforms.Inverse(gx.transforms.Standardize.from_data(rows))
    flow = gx.Flow([Planar(2).inv, Radial(2).inv, Sylvester(2).inv, onto], base)
    optimizer = torch.optim.Adam(flow.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow().log_prob(rows).mean()
        loss.backward()
        optimizer.step()
    assert -loss > gaussian + 0.2
