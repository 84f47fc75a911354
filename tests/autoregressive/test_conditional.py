"""Conditionals, and chain rules within chain rules, against plain distributions."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.values import built, sized


def test_nested_chain_rules():
    inner = gx.Autoregressive(conditioners.NADE(3, 1, context=4, hidden=6), heads.Bernoulli(), (3,))
    head = heads.ConditionalHead(inner)
    outer = built(gx.Autoregressive(conditioners.Recurrent((3,), 4, hidden=5), head, (2, 3)))
    d = outer()
    support = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6).reshape(64, 2, 3)
    torch.testing.assert_close(d.log_prob(support).logsumexp(0), torch.zeros((), dtype=torch.float64))
    phi = outer.conditioner(support)
    expected = sum(inner(phi[:, t]).log_prob(support[:, t]) for t in range(2))
    torch.testing.assert_close(d.log_prob(support), expected)
    assert torch.equal(d.enumerate_support(), support)
    assert all(p.grad is not None for p in outer.parameters() if [d.log_prob(support).sum().backward()])


def test_conditional_gaussian_by_hand():
    head = heads.MultivariateNormal(2)
    model = built(gx.Conditional(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, head.num_params)), head))
    x, y = sized(5, 3), sized(5, 2, seed=1)
    d = model(x)
    phi = model.network(x)
    inner = head(phi)
    expected = torch.distributions.MultivariateNormal(inner.loc, scale_tril=inner.scale_tril).log_prob(y)
    torch.testing.assert_close(d.log_prob(y), expected)
    assert d.batch_shape == (5,) and model.context == 3 and model(x[0]).batch_shape == ()


def test_conditional_refuses():
    with pytest.raises(ValueError, match=r"outputs \(\*batch, 2\) \(num_params of the head\); got \(5, 4\)"):
        gx.Conditional(nn.Linear(3, 4), heads.Normal())(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"the network does not start with nn\.Linear"):
        gx.Conditional(nn.Tanh(), heads.Normal())
    with pytest.raises(ValueError, match=r"context.shape\[-1\] == 3"):
        gx.Conditional(nn.Linear(3, 2), heads.Normal())(torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("head", "outside"), [(heads.VonMises, 7.0), (heads.Gamma, -1.0), (heads.Poisson, 0.5), (heads.Exponential, -1.0)]
)
def test_conditional_outside_the_support(head, outside):
    head = head()
    d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    y = torch.tensor(outside, dtype=torch.float64)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(y)
    with pyro.validation_enabled(False):
        assert (d.log_prob(y) == -math.inf).all()
        assert d.log_prob(d.sample((7,))).isfinite().all()


def test_conditional_is_of_its_family():
    head = heads.Normal(shape=(2,))
    d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    plain = head(built(gx.Conditional(nn.Linear(3, head.num_params), head)).network(sized(5, 3)))
    assert isinstance(d, pyro.distributions.Independent)
    other = pyro.distributions.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(d, other), torch.distributions.kl_divergence(plain, other)
    )
    wide, y = d.expand((4, 5)), sized(4, 5, 2)
    assert wide.batch_shape == (4, 5) and type(wide) is type(d)
    torch.testing.assert_close(wide.log_prob(y), plain.expand((4, 5)).log_prob(y))
    with torch.no_grad():
        d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    for same in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        torch.testing.assert_close(same.log_prob(y), d.log_prob(y))


@pytest.mark.parametrize("head", [heads.Normal, heads.StudentT])
def test_conditional_with_reparam(head):
    """Pyro's strategies make another distribution of the family from its parameters."""
    head = head()
    model = built(gx.Conditional(nn.Linear(3, head.num_params), head))
    x = sized(3)

    def site():
        return pyro.sample("z", model(x))

    for config in (LocScaleReparam(0.5), AutoReparam()):
        wrapped = pyro.poutine.reparam(site, config={"z": config} if isinstance(config, LocScaleReparam) else config)
        trace = pyro.poutine.trace(wrapped).get_trace()
        assert trace.nodes["z"]["value"].isfinite() and any("decentered" in name for name in trace.nodes)
