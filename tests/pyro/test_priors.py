"""Autoregressive models whose weights have priors: densities, SVI, ``Predictive``."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.func import functional_call

from support.checks import close
from support.pyro_models import ROWS, C, T, X, build, by_hand, call, draws, family_by_hand, nets, normal, phi_by_hand
from support.values import params_of


def with_priors(net, head="Normal", context=C):
    """A model whose every parameter is a PyroSample, and the plain copy that names and shapes are read from."""
    model, template = build(net, head, context), build(net, head, context)
    to_pyro_module_(model)
    for module in list(model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(normal(torch.zeros_like(value.detach()), 0.5).to_event(value.dim())))
    return model, template


class Rows(PyroModule):
    """y_n ~ net(x_n), the weights drawn outside the plate."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, y=None):
        d = call(self.net)
        with pyro.plate("data", ROWS):
            return pyro.sample("y", d, obs=y)


def weights_of(trace, template, prefix="net."):
    return {name: trace.nodes[prefix + name]["value"] for name in params_of(template)}


def prior_by_hand(weights):
    return sum(normal(0.0, 0.5).log_prob(w).sum() for w in weights.values())


@nets
@pytest.mark.parametrize("head", ["Bernoulli", "Normal"])
@pytest.mark.parametrize("context", [0, C])
def test_weights_with_priors(net, head, context):
    model, template = with_priors(net, head, context)
    assert not list(model.parameters())
    y = draws(template)
    trace = poutine.trace(Rows(model)).get_trace(y)
    drawn = {name for name, site in trace.nodes.items() if site["type"] == "sample"} - {"y", "data"}
    assert drawn == {f"net.{name}" for name in params_of(template)}
    weights = weights_of(trace, template)
    close(trace.log_prob_sum(), prior_by_hand(weights) + by_hand(template, y, X, weights).sum())

    # the module's call is over, and the distribution keeps the weights of the trace
    d = trace.nodes["y"]["fn"]
    with poutine.trace() as later:
        close(d.log_prob(y), by_hand(template, y, X, weights))
        torch.manual_seed(1)
        a = d.sample((50,))
    assert not later.trace.nodes
    torch.manual_seed(1)
    b = functional_call(template, weights, (X,) if context else ()).expand((ROWS,)).sample((50,))
    assert torch.equal(a, b)
    # and draws have their law: the mean of the first site's sufficient statistic
    first = family_by_hand(template, phi_by_hand(template, weights, y, X if context else None))
    z = (d.sample((2000,)) - first.mean)[..., 0] / first.variance[..., 0].sqrt()
    assert z.mean(0).abs().max() < 5 / 2000**0.5


@nets
def test_weights_with_priors_conditioned_and_their_gradient(net):
    """The potential that NUTS over the weights sees."""
    model, template = with_priors(net)
    y = draws(template)
    u = {f"net.{k}": v.detach().clone().requires_grad_() for k, v in params_of(template).items()}
    f = Rows(model)
    joint = poutine.trace(poutine.condition(f, data=u)).get_trace(y).log_prob_sum()
    kernel = NUTS(f)
    kernel.setup(1, y)
    assert set(kernel.initial_params) == set(u)
    potential = kernel.potential_fn(u)
    plain = {k.removeprefix("net."): v for k, v in u.items()}
    truth = prior_by_hand(plain) + by_hand(template, y, X, plain).sum()
    close(joint, truth)
    close(potential, -truth)
    for a, b in zip(torch.autograd.grad(potential, u.values()), torch.autograd.grad(-truth, u.values()), strict=True):
        close(a, b)


@nets
def test_svi_and_predictive_over_weights(net):
    model, template = with_priors(net)
    f, y = Rows(model), draws(template) + 2
    guide = AutoNormal(f, init_scale=0.05)
    guide(y)  # makes its parameters
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(f, guide, y)
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(y)
    weights = weights_of(trace, template)
    store = pyro.get_param_store()
    log_q = sum(
        dist.Normal(store[f"AutoNormal.locs.net.{k}"], store[f"AutoNormal.scales.net.{k}"]).log_prob(w).sum()
        for k, w in weights.items()
    )
    truth = log_q - prior_by_hand(weights) - by_hand(template, y, X, weights).sum()
    assert loss == pytest.approx(truth.item(), abs=1e-9)

    svi = SVI(f, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())
    out = Predictive(f, guide=guide, num_samples=30)()
    assert out["y"].shape == (30, ROWS, T)
    # each draw under its own weights: standard normal noise comes back
    noise = []
    for i, y in enumerate(out["y"]):
        w = {k: out[f"net.{k}"][i].reshape(v.shape) for k, v in params_of(template).items()}
        d = family_by_hand(template, phi_by_hand(template, w, y, X))
        noise.append((y - d.loc) / d.scale)
    noise = torch.stack(noise).flatten()
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5 and abs(noise.var() - 1) < 7 / len(noise) ** 0.5


@pytest.mark.parametrize("net", ["made", "nade"])
def test_log_density_of_many_weights_at_once(net):
    """``torch.func.vmap`` over draws of the weights, where ``Predictive(parallel=True)`` would need matrices of matrices."""
    template = build(net, "Normal")
    y = draws(template)
    many = {name: torch.stack([v, 0.5 * v, v + 0.1]).detach() for name, v in params_of(template).items()}
    with pyro.validation_enabled(False):
        got = torch.func.vmap(lambda w: functional_call(template, w, (X,)).log_prob(y))(many)
    expected = torch.stack([by_hand(template, y, X, {k: v[i] for k, v in many.items()}) for i in range(3)])
    close(got, expected.detach())
