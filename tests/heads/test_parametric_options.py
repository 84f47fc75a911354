"""``Parametric``: names, families of one's own, fixed parameters, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import constraints

from pyro_genexact import heads
from pyro_genexact.heads import Normal, Parametric, VonMises, common_families
from support.families import mass_above, noise
from support.values import draws


def test_short_names():
    short = [
        heads.Bernoulli((3,)), heads.Beta(), heads.Binomial(4), heads.Categorical(5), heads.ContinuousCategorical(3),
        heads.Dirichlet(3), heads.Exponential(), heads.Gamma(), heads.Geometric(),
        heads.Laplace(), heads.LogNormal(), heads.MultivariateNormal(3), heads.NegativeBinomial(),
        heads.Normal((2,)), heads.OneHotCategorical(4), heads.Poisson(), heads.StudentT(df=4.0),
        heads.VonMises(), heads.ZeroInflatedPoisson(),
    ]  # fmt: skip
    assert [h.num_params for h in short] == [3, 2, 1, 5, 3, 3, 1, 2, 1, 2, 2, 9, 2, 4, 4, 1, 2, 2, 2]
    parts = {name: part for name, part in vars(common_families).items() if isinstance(part, type) and name[0] != "_"}
    classes = [part for part in parts.values() if issubclass(part, Parametric) and part is not Parametric]
    assert [type(head) for head in short] == classes and [head.name for head in short] == [c.__name__ for c in classes]
    for head, kind in zip(short, classes, strict=True):
        assert getattr(heads, kind.__name__) is kind and isinstance(head, Parametric)
        assert not isinstance(Parametric(dist.Cauchy), kind)
        for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            phi = noise(head, 2, 3)
            assert isinstance(twin, kind) and repr(twin) == repr(head)
            assert torch.equal(draws(twin(phi)), draws(head(phi)))
    assert repr(short[0]) == "Parametric(Bernoulli, shape=(3,))"
    assert repr(heads.StudentT(df=4.0)) == "Parametric(StudentT, df=4.0)"


def test_a_torch_family_becomes_pyros():
    assert isinstance(Parametric(torch.distributions.Normal)(torch.zeros(1, 2)), dist.Normal)


class Beta(dist.TorchDistribution):
    """A user's own family with one of Pyro's names: the density x / 2 on (0, 2), scaled."""

    arg_constraints = {"width": constraints.greater_than(1.0)}
    support = constraints.positive

    def __init__(self, width, validate_args=None):
        self.width = width
        super().__init__(width.shape, validate_args=validate_args)

    def sample(self, sample_shape=()):
        u = torch.rand(torch.Size(sample_shape) + self.batch_shape, dtype=self.width.dtype)
        return (1 - u).log().neg().sqrt() * self.width

    def log_prob(self, value):
        return (2 * value).log() - 2 * self.width.log() - (value / self.width).square()


def test_a_users_own_family():
    head = Parametric(Beta)
    d = head(torch.zeros(2, 3, 1))
    assert (
        isinstance(d, Beta) and torch.equal(d.width, torch.full((2, 3), 2.0)) and head.support is constraints.positive
    )
    assert abs(mass_above(head(noise(head, 1, 1)), 0.0, math.inf) - 1) < 1e-6


def test_user_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    Parametric(dist.Gamma)
    assert torch.equal(before, torch.random.get_rng_state())


def test_moves_with_the_module():
    head = Parametric(dist.StudentT, (2,), df=torch.tensor([3.0, 4.0]))
    assert head.to(torch.float64)._buffers["df"].dtype == torch.float64
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    head.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_fixed_parameter_trains_and_is_saved():
    df = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    head = Parametric(dist.StudentT, df=df)
    assert list(head.state_dict()) == ["df"] and dict(head.named_parameters())["df"] is df
    value = torch.tensor([[0.5]], dtype=torch.float64)
    head(torch.zeros(1, 1, 2, dtype=torch.float64)).log_prob(value).backward()
    step = 1e-5
    slope = (st.t(3 + step).logpdf(0.5) - st.t(3 - step).logpdf(0.5)) / (2 * step)
    assert abs(float(df.grad) - slope) < 1e-8
    assert copy.deepcopy(head)(torch.zeros(1, 2)).df == 3.0


def test_options_follow_the_module():
    shift = dist.transforms.AffineTransform(torch.tensor(1.0, dtype=torch.float64), 2.0)
    head = Parametric(dist.TransformedDistribution, base_distribution=Normal(), transforms=[shift])
    assert head(torch.zeros(1, 2, dtype=torch.float64)).sample().dtype == torch.float64
    twin = copy.deepcopy(head).float()
    d = twin(torch.zeros(1, 2))
    assert d.sample().dtype == torch.float32 and shift.loc.dtype == torch.float64
    assert abs(float(d.log_prob(torch.tensor(2.0))) - st.norm(1, 2).logpdf(2.0)) < 1e-6


class Triangle(torch.distributions.Distribution):
    """A user's own family without Pyro's mixin: 2 (1 - y / width) / width on (0, width)."""

    arg_constraints = {"width": constraints.greater_than(1.0)}
    support = constraints.positive

    def __init__(self, width, validate_args=None):
        self.width = width
        super().__init__(width.shape, validate_args=validate_args)

    def sample(self, sample_shape=()):
        u = torch.rand(torch.Size(sample_shape) + self.batch_shape, dtype=self.width.dtype)
        return self.width * (1 - u.sqrt())

    def log_prob(self, value):
        return (2 / self.width * (1 - value / self.width).clamp(min=1e-300)).log()


class RowByRow(Triangle):
    """Neither validates nor takes values or parameters without elements."""

    def sample(self, sample_shape=()):
        rows = [super().sample()] * math.prod(sample_shape)
        return torch.stack(rows).reshape(*sample_shape, *self.batch_shape)

    def log_prob(self, value):
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        rows = value.reshape(-1, *self.batch_shape).unbind(0)
        return torch.stack([super(RowByRow, self).log_prob(row) for row in rows]).reshape(value.shape)


def test_a_users_family_is_completed():
    head = Parametric(RowByRow)
    phi = torch.zeros(3, 2, 1, dtype=torch.float64, requires_grad=True)
    d, none = head(phi), head(phi[:0])
    assert d.sample((0,)).shape == (0, 3, 2) and d.log_prob(d.sample((0, 4))).shape == (0, 4, 3, 2)
    assert none.batch_shape == (0, 2) and none.sample((5,)).shape == (5, 0, 2)
    assert torch.equal(torch.autograd.grad(none.log_prob(none.sample()).sum(), phi)[0], torch.zeros_like(phi))
    d._validate_args = True
    assert d.log_prob(d.sample()).isfinite().all()
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.tensor(-1.0, dtype=torch.float64))


def test_a_family_without_pyros_mixin():
    head = Parametric(Triangle, (2,))
    d = head(torch.zeros(3, 2, dtype=torch.float64))
    assert isinstance(d.base_dist, Triangle) and d.batch_shape == (3,) and d.event_shape == (2,)
    value = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.allclose(d.log_prob(value), torch.tensor(2 * math.log(0.75), dtype=torch.float64))
    with pyro.plate("rows", 3):
        assert pyro.sample("y", d).shape == (3, 2)
    for twin in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        assert twin.family is head.family
    assert torch.equal(pickle.loads(pickle.dumps(d)).log_prob(value), d.log_prob(value))
    assert Parametric(Triangle)(torch.zeros(3, 1)).expand((2, 3)).sample().shape == (2, 3)


@pytest.mark.parametrize(
    ("family", "shape", "fixed", "error", "text"),
    [
        (dist.StudentT, (), {"df": torch.tensor([1.0, 5.0, 50.0])}, ValueError, "Expected df.shape to broadcast to ()"),
        (dist.StudentT, (2,), {"df": torch.ones(3)}, ValueError, "Expected df.shape to broadcast to (2,) (per site); got (3,)."),
        (dist.StudentT, (2,), {"df": torch.ones(1, 2)}, ValueError, "got (1, 2)."),
        (dist.MultivariateNormal, (3,), {"loc": torch.zeros(2)}, ValueError, "Expected loc.shape to broadcast to (3,)"),
        (dist.Binomial, (), {"total_count": 2.5}, ValueError, "Expected total_count to satisfy IntegerGreaterThan(lower_bound=0); got 2.5."),
        (dist.Binomial, (), {"total_count": -1}, ValueError, "got -1."),
        (dist.Beta, (), {"concentration1": 0.0}, ValueError, "Expected concentration1 to satisfy GreaterThan(lower_bound=0.0); got 0.0."),
        (dist.Normal, (), {"scale": -1}, ValueError, "Expected scale to satisfy GreaterThan(lower_bound=0.0); got -1."),
        (dist.Normal, (2,), {"scale": torch.tensor([1.0, -2.0])}, ValueError, "got -2.0."),
        (dist.StudentT, (), {"df": -1.0}, ValueError, "Expected df to satisfy"),
        (dist.Normal, (), {"loc": math.nan}, ValueError, "Expected loc to satisfy"),
        (dist.Gamma, (), {"concentration": -0.5}, ValueError, "Expected concentration to satisfy"),
        (dist.MultivariateNormal, (2,), {"scale_tril": torch.ones(2, 2)}, ValueError, "Expected scale_tril to satisfy"),
        (dist.Binomial, (), {"total_count": None}, TypeError, "Expected total_count to be a number, a tensor or a head; got None."),
        (dist.Normal, (), {"scale": "a"}, TypeError, "Expected scale to be a number, a tensor or a head; got 'a'."),
        (dist.Binomial, (), {"total_count": True}, TypeError, "got True."),
    ],
)  # fmt: skip
def test_fixed_parameters_are_checked(family, shape, fixed, error, text):
    with pytest.raises(error) as caught:
        Parametric(family, shape, **fixed)
    assert text in str(caught.value)


def test_fixed_parameters_broadcast():
    for scale in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0])):
        d = Parametric(dist.Normal, (3,), scale=scale)(torch.zeros(5, 3))
        assert torch.equal(d.base_dist.scale, scale.expand(5, 3))
    assert torch.equal(Parametric(dist.MultivariateNormal, (2,), loc=1.0)(torch.zeros(5, 3)).loc, torch.ones(5, 2))


@pytest.mark.parametrize(
    ("family", "shape", "fixed", "text"),
    [
        (dist.OneHotCategoricalStraightThrough, (3,), {}, "the gradient of its samples is biased by design"),
        (dist.Delta, (), {}, "got Delta: a point mass has no density."),
        (dist.Pareto, (), {}, "got Pareto: its support depends on scale: pass a fixed value."),
        (
            dist.Binomial,
            (),
            {},
            "got Binomial: total_count is an integer, which cannot be predicted: pass a fixed value.",
        ),
        (dist.Uniform, (), {}, "got Uniform: "),
        (dist.NanMaskedNormal, (), {}, "got NanMaskedNormal: its values may be missing: use Normal."),
        (dist.NanMaskedMultivariateNormal, (2,), {}, "its values may have missing entries: use MultivariateNormal."),
        (dist.Wishart, (3,), {}, "got Wishart: its values are matrices."),
        (dist.VonMises3D, (2,), {}, "Expected concentration to have rightmost dim 3"),
        (
            dist.MultivariateNormal,
            (),
            {},
            r"Expected shape to be (k,), the size of loc, scale_tril of MultivariateNormal",
        ),
        (dist.MultivariateNormal, (2, 3), {}, "its values have shape (2, 3), not () or (k,)."),
        (dist.Normal, (0,), {}, "Expected shape to be a sequence of integers >= 1; got (0,)."),
        (dist.Normal, (), {"rate": 1.0}, "Expected arguments of Normal (loc, scale"),
        (dist.LowRankMultivariateNormal, (3,), {}, "got LowRankMultivariateNormal: it needs rank"),
        (dist.SineSkewed, (2,), {"base_dist": VonMises((2,))}, "Expected shape == (1,); got (2,)."),
        (dist.ZeroInflatedDistribution, (), {}, "got ZeroInflatedDistribution: it needs base_dist"),
        (dist.ProjectedNormal, (7,), {}, "got ProjectedNormal: no density or no sampler"),
    ],
)
def test_errors(family, shape, fixed, text):
    with pytest.raises(ValueError) as caught:
        Parametric(family, shape, **fixed)
    assert text in str(caught.value)


def test_errors_of_vmap_are_not_the_familys():
    def density(y):
        return Parametric(dist.Normal)(torch.zeros(1, 2)).log_prob(y)

    with pytest.raises(RuntimeError, match=r"^vmap: called random operation"):
        torch.func.vmap(density)(torch.zeros(3, 1))
    expected = torch.full((3, 1), -math.log(2 * math.pi) / 2)
    assert torch.allclose(torch.func.vmap(density, randomness="different")(torch.zeros(3, 1)), expected)
    head = Parametric(dist.Normal)
    assert torch.allclose(torch.func.vmap(lambda y: head(torch.zeros(1, 2)).log_prob(y))(torch.zeros(3, 1)), expected)


def test_type_errors():
    with pytest.raises(TypeError, match="Expected family to be a distribution class; got Normal"):
        Parametric(dist.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="Expected shape to be a tuple; got 3"):
        Parametric(dist.Normal, 3)
    with pytest.raises(TypeError, match="Expected base_dist to be a head; got a distribution Poisson"):
        Parametric(dist.ZeroInflatedDistribution, base_dist=dist.Poisson(1.0))
