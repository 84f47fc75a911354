"""Sites that say whether they are the last ones, against their two parts."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_genexact import heads, testing
from pyro_genexact.distributions import Stopped, StoppedConstraint
from pyro_genexact.families.in_support import feasible_point
from support.checks import goodness
from support.values import sized

INNER = {
    "real": heads.Normal,
    "positive": heads.LogNormal,
    "angle": heads.VonMises,
    "vector": lambda: heads.MultivariateNormal(2),
    "vector of one": lambda: heads.Normal((1,)),
    "simplex": lambda: heads.Dirichlet(3),
    "tokens": lambda: heads.Categorical(3),
    "bits": lambda: heads.Bernoulli((2,)),
    "mixture": lambda: heads.Mixture(heads.Normal(), 2),
}


@pytest.fixture(params=INNER)
def inner(request):
    return INNER[request.param]()


def test_log_prob_is_the_sum_of_two(inner):
    head = heads.Stopped(inner)
    phi = sized(3, 4, head.num_params)
    d, of_value = head(phi), inner(phi[..., :-1])
    assert head.num_params == inner.num_params + 1 and d.event_shape == head.site_shape and d.batch_shape == (3, 4)
    assert not d.has_rsample and torch.equal(d.stop_logits, phi[..., -1])
    y = d.sample((5,))
    assert y.dtype == torch.float64 and y.shape == (5, 3, 4, *head.site_shape) and head.support.check(y).all()
    value, flag = (y[..., :-1] if inner.site_shape else y[..., 0]), y[..., -1]
    assert torch.equal(head.ends(y), flag == 1)
    truth = of_value.log_prob(value) + dist.Bernoulli(logits=phi[..., -1]).log_prob(flag)
    torch.testing.assert_close(d.log_prob(y), truth, rtol=1e-12, atol=1e-12)


def test_samples():
    phi = torch.tensor([0.2, -0.4, 0.7, -0.3]).double()
    d = heads.Stopped(heads.Categorical(3))(phi.reshape(1, 1, 4))
    y = d.sample((4000,)).squeeze(1).squeeze(1)
    stop = phi[3].sigmoid()
    p = torch.outer(phi[:3].softmax(-1), torch.stack([1 - stop, stop])).flatten()
    assert goodness(2 * y[:, 0] + y[:, 1], p) > 1e-4


def test_enumeration():
    head = heads.Stopped(INNER["tokens"]())
    d = head(sized(2, 3, head.num_params))
    values = d.enumerate_support()
    assert values.shape == (6, 2, 3, 2) and d.enumerate_support(expand=False).shape == (6, 1, 1, 2)
    assert values[:, 0, 0].tolist() == [[v, f] for v in range(3) for f in (0, 1)]
    lp = d.log_prob(values)
    torch.testing.assert_close(lp.logsumexp(0), torch.zeros(2, 3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.entropy(), -(lp.exp() * lp).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(d.mode, values.take_along_dim(lp.argmax(0)[None, ..., None], 0)[0])


@pytest.mark.parametrize("kind", ["bits", "real"])
def test_no_enumeration(kind):
    head = heads.Stopped(INNER[kind]())
    d = head(sized(2, 3, head.num_params))
    assert not d.has_enumerate_support
    with pytest.raises(NotImplementedError):
        d.enumerate_support()


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_tokens_that_a_dtype_does_not_tell_apart(dtype, most):
    phi = torch.zeros(1, 1, most + 3)
    phi[..., most + 1] = 50.0
    values = heads.Stopped(heads.Categorical(most + 1))(phi[..., 1:].to(dtype)).enumerate_support()
    assert torch.equal(values[::2, 0, 0, 0].long(), torch.arange(most + 1))
    head = heads.Stopped(heads.Categorical(most + 2))
    assert head(phi).sample()[..., 0] == most + 1
    message = (
        rf"Expected integers between -{most} and {most}, which {dtype} .of the flag. represents; got IntegerInterval"
    )
    with pytest.raises(ValueError, match=message):
        head(phi.to(dtype))
    counts = torch.tensor([3.0, most + 1])
    for inner in (dist.Binomial(counts, 0.5 * torch.ones(2)), dist.Binomial(counts, 0.5 * torch.ones(2)).to_event(1)):
        Stopped(inner, torch.zeros(()))
        with pytest.raises(ValueError, match=f"Expected integers between -{most} and {most}"):
            Stopped(inner, torch.zeros((), dtype=dtype))


def test_moments():
    phi = sized(4, 1, 3)
    d = heads.Stopped(heads.Normal())(phi)
    stop = phi[..., 2].sigmoid()
    torch.testing.assert_close(d.mean, torch.stack([phi[..., 0], stop], -1))
    torch.testing.assert_close(d.variance, torch.stack([d.inner.variance, stop * (1 - stop)], -1))


def test_continuing(inner):
    head = heads.Stopped(inner)
    phi = sized(3, 4, head.num_params).requires_grad_()
    d = head(phi)
    rest, log_p = d.continuing()
    torch.testing.assert_close(log_p, torch.log1p(-phi[..., -1].sigmoid()), rtol=1e-12, atol=1e-12)
    y = rest.sample((200,))
    assert not head.ends(y).any()
    torch.testing.assert_close(rest.log_prob(y), d.log_prob(y) - log_p, rtol=1e-10, atol=1e-10)
    y[..., -1] = 1
    assert (rest.log_prob(y) == -torch.inf).all()
    assert torch.autograd.grad(rest.log_prob(y).sum(), phi)[0].isfinite().all()


def test_certain_stops():
    logits = torch.tensor([-torch.inf, -1e8, 0.0, 1e8, torch.inf]).double().requires_grad_()
    d = Stopped(dist.Normal(torch.zeros(5).double(), 1.0), logits)
    value = torch.zeros(5, 2).double()
    value[:, 1] = torch.tensor([0, 1, 1, 1, 1])
    at_0 = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).double()
    truth = at_0 + logsigmoid(torch.tensor([torch.inf, -1e8, 0, 1e8, torch.inf]).double())
    torch.testing.assert_close(d.log_prob(value), truth)
    flat = 0.5 + 0.5 * torch.tensor(2 * torch.pi).double().log()
    truth = flat + torch.tensor([0, 0, 2, 0, 0]).double().where(torch.arange(5) != 2, torch.tensor(2.0).double().log())
    torch.testing.assert_close(d.entropy(), truth)
    assert torch.autograd.grad(d.entropy().sum() + d.log_prob(value).sum(), logits)[0].isfinite().all()
    assert d.continuing()[1].tolist() == [0, 0, logsigmoid(torch.tensor(0.0).double()).item(), -1e8, -torch.inf]
    assert d.sample((20,))[..., 1].mean(0)[[0, 1, 3, 4]].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "outside"),
    [
        ("real", [[torch.nan, 0], [torch.inf, 1], [0.3, 0.5], [0.3, torch.nan], [0.3, -1], [0.3, 2]]),
        ("positive", [[-1.0, 0], [0.0, 1], [torch.inf, 0], [1.0, 0.5]]),
        ("angle", [[3.5, 0], [torch.nan, 0], [1.0, 2]]),
        ("vector", [[0.0, torch.inf, 1], [torch.nan, 0.0, 0], [0.0, 0.0, 0.1]]),
        ("simplex", [[0.5, 0.6, 0.2, 0], [0.5, 0.5, 0.0, 0], [0.2, 0.3, 0.5, 3]]),
        ("tokens", [[3, 0], [-1, 0], [0.5, 1], [1, 0.5]]),
    ],
)
def test_outside_the_support(kind, outside):
    head = heads.Stopped(INNER[kind]())
    values = torch.tensor(outside).double()
    d = head(sized(1, head.num_params).requires_grad_())
    assert not head.support.check(values).any() and not d.support.check(values).any()
    lp = d.log_prob(values)
    assert (lp == -torch.inf).all() and not torch.autograd.grad(lp.sum(), d.stop_logits)[0].any()
    checking = Stopped(d.inner, d.stop_logits, head.head.support, validate_args=True)
    for value in values:
        with pytest.raises(ValueError):
            checking.log_prob(value)


def test_anchor(inner):
    head = heads.Stopped(inner)
    like = torch.full((2, 5, *head.site_shape), torch.nan).double()
    found = feasible_point(head.support, like)
    assert found.shape == like.shape and head.support.check(found).all()


def test_built_directly_over_broadcast_batches():
    d = Stopped(dist.Normal(torch.zeros(3, 1).double(), 1.0), torch.zeros(4).double())
    assert (
        d.batch_shape == (3, 4) and d.sample().shape == (3, 4, 2) and d.expand((2, 3, 4)).sample().shape == (2, 3, 4, 2)
    )
    assert str(d.support) == "StoppedConstraint(Real())"
    assert StoppedConstraint(constraints.boolean).is_discrete and not d.support.is_discrete


def test_in_a_filter_of_tokens_and_with_first():
    """Tokens under a filter that counts sites, beside a flag."""
    head = heads.Stopped(heads.MinLength(heads.Categorical(3), 2, eos=1))
    p = head(sized(2, 4, 4), 1).inner.probs
    assert torch.equal(p[..., 1] == 0, torch.tensor([True, False, False, False]).expand(2, 4))
    testing.distribution_head(heads.Stopped(heads.TopK(heads.Categorical(3), 2)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: heads.Stopped(3), TypeError, "Expected head to be of class Head; got int."),
        (lambda: heads.Stopped(heads.Affine()), TypeError, "Expected a head of distributions; got Affine"),
        (lambda: heads.Stopped(heads.PerSite([heads.Normal()])), ValueError, "treat all sites alike; got a PerSite."),
        (lambda: Stopped(3, torch.zeros(2)), TypeError, "Expected inner to be a distribution; got int."),
        (
            lambda: Stopped(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), torch.zeros(2)),
            ValueError,
            r"Expected inner.event_shape to be \(\) or \(k,\); got \(2, 3\).",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
