"""Weights of flows at ``pyro.sample`` sites: Pyro's modules, priors, functional_call."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.func import functional_call

import pyro_genexact as gx
from support.checks import close
from support.pyro_flows import ROWS, D, build, call, kinds, log_prob_by_hand, noise_by_hand, redraw, rows
from support.values import params_of


class Regression(PyroModule):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, y=None):
        d = call(self.flow, x)  # outside the plate, which would draw weights with priors once a row
        with pyro.plate("data", ROWS):
            return pyro.sample("y", d, obs=y)


@kinds
def test_attribute_of_a_pyro_module(kind):
    flow, x = build(kind), rows(kind)
    model, y = Regression(flow), torch.randn(ROWS, D, dtype=torch.float64)
    names = {f"flow$$${name}" for name in params_of(flow)}
    trace = poutine.trace(model, param_only=False).get_trace(x, y)
    assert {n for n, site in trace.nodes.items() if site["type"] == "param"} == names
    close(trace.log_prob_sum(), log_prob_by_hand(flow, params_of(flow), y, x).sum())

    start = log_prob_by_hand(flow, params_of(flow), y, x).sum().item()
    svi = SVI(model, lambda *_: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(40)]
    assert losses[0] == pytest.approx(-start)
    end = log_prob_by_hand(flow, params_of(flow), y, x).sum().item()  # the very parameters of the module moved
    assert end > start + 5 and -losses[-1] == pytest.approx(end, abs=1.0)


def test_pyro_module_restores_from_the_store():
    flow = build("conditional maf")
    old = {k: v.detach().clone() for k, v in params_of(flow).items()}
    pyro.module("flow", flow)
    loaded = pyro.module("flow", build("conditional maf", seed=1), update_module_params=True)
    for name, value in loaded.named_parameters():
        close(value.detach(), old[name])


def with_priors(kind, transforms=2):
    """A flow whose every parameter is a PyroSample."""
    flow = build(kind, transforms=transforms)
    template = build(kind, transforms=transforms)  # the plain copy that names and masks are read from
    to_pyro_module_(flow)
    for module in list(flow.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros_like(value.detach()), 0.5).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    return flow, template


@kinds
def test_weights_with_priors(kind):
    flow, template = with_priors(kind)
    names = set(params_of(template))
    x, y = rows(kind), torch.randn(ROWS, D, dtype=torch.float64)
    assert not list(flow.parameters())

    trace = poutine.trace(lambda: call(flow, x)).get_trace()
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert set(sites) == names and len(sites) == len(names)
    d = trace.nodes["_RETURN"]["value"]
    weights = {name: trace.nodes[name]["value"] for name in names}
    # the module's context is over, and the weights are those of the trace nonetheless
    close(d.log_prob(y), log_prob_by_hand(template, weights, y, x))
    close(d.log_prob(y), functional_call(template, weights, () if x is None else (x,)).log_prob(y))
    draws = d.sample() if x is not None else d.sample((ROWS,))
    close(d.log_prob(draws.clone()), log_prob_by_hand(template, weights, draws, x))
    torch.manual_seed(3)
    a = d.sample((50,))
    torch.manual_seed(3)
    b = functional_call(template, weights, () if x is None else (x,)).sample((50,))
    close(a, b)
    other = call(flow, x).log_prob(y)  # another call, other weights
    assert (other - d.log_prob(y)).abs().max() > 1e-3


@kinds
def test_weights_with_priors_conditioned_and_replayed(kind):
    flow, template = with_priors(kind)
    x, y = rows(kind), torch.randn(ROWS, D, dtype=torch.float64)
    weights = {name: value.detach() for name, value in params_of(template).items()}
    conditioned = poutine.condition(lambda: call(flow, x), data=weights)
    close(conditioned().log_prob(y), log_prob_by_hand(template, weights, y, x))


@kinds
def test_weights_with_priors_in_svi_and_predictive(kind):
    flow, template = with_priors(kind, transforms=1)
    model, x = Regression(flow), rows(kind)
    y = 0.3 * torch.randn(ROWS, D, dtype=torch.float64) + 2
    guide = AutoNormal(model, init_scale=0.05)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(120)]
    assert sum(losses[-20:]) / 20 < sum(losses[:10]) / 10 - 20
    out = Predictive(model, guide=guide, num_samples=20)(x)
    assert out["y"].shape == (20, ROWS, D)
    assert set(out) == {"y"} | {f"flow.{name}" for name in params_of(template)}
    assert (out["y"].mean((0, 1)) - 2).abs().max() < 1
    assert all(v.grad is not None and v.grad.isfinite().all() for v in guide.parameters())


@kinds
@pytest.mark.parametrize("way", ["log_prob", "rsample"])
def test_frozen_parameters_stay(kind, way):
    flow, x = build(kind), rows(kind)
    frozen = {name for name in params_of(flow) if ".layers.0." in name}
    for name, p in flow.named_parameters():
        p.requires_grad_(name not in frozen)

    def loss(params):
        d = functional_call(flow, params, () if x is None else (x,))
        torch.manual_seed(5)
        if way == "rsample":
            return (d.rsample(() if d.batch_shape else (ROWS,)) ** 2).sum()
        return -d.log_prob(torch.randn(ROWS, D, dtype=torch.float64)).sum()

    loss(params_of(flow)).backward()
    for name, p in flow.named_parameters():
        if name in frozen:
            assert p.grad is None, name
            continue
        step = torch.randn_like(p) * 1e-6
        plus, minus = ({**params_of(flow), name: p + sign * step} for sign in (1, -1))
        numeric = ((loss(plus) - loss(minus)) / 2).item()
        assert numeric == pytest.approx((p.grad * step).sum().item(), rel=1e-4, abs=1e-9), name


@kinds
def test_functional_call_outlives_the_call(kind):
    flow, x = build(kind), rows(kind)
    args = () if x is None else (x,)
    other = {name: value.detach().clone().requires_grad_() for name, value in params_of(build(kind, seed=7)).items()}
    y = torch.randn(ROWS, D, dtype=torch.float64)
    d = functional_call(flow, other, args)
    close(d.log_prob(y), log_prob_by_hand(flow, other, y, x))
    assert (d.log_prob(y) - log_prob_by_hand(flow, params_of(flow), y, x)).abs().max() > 1e-2
    draw = d.rsample(() if d.batch_shape else (ROWS,))
    torch.manual_seed(1)
    again = d.rsample(() if d.batch_shape else (ROWS,))
    torch.manual_seed(1)
    base = d.base_dist.sample(() if d.batch_shape else (ROWS,))
    close(noise_by_hand(flow, other, again, x)[0], base)
    grads = torch.autograd.grad((draw**2).sum(), list(other.values()))
    assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_functional_call_replaces_buffers_too():
    torch.manual_seed(0)
    data = torch.randn(50, D, dtype=torch.float64)
    flow = redraw(gx.flows.maf, D, transforms=1, hidden=(8,), standardize=data)
    buffers = {name: value for name, value in flow.named_buffers() if name.endswith(("shift", "scale"))}
    assert len(buffers) == 2
    y = torch.randn(6, D, dtype=torch.float64)
    moved = {name: value * 2 if name.endswith("scale") else value + 1 for name, value in buffers.items()}
    expected = functional_call(flow, moved, ()).log_prob(y)  # hand: z of (y - shift - 1) / 2 / scale
    shift, scale = (next(v for k, v in moved.items() if k.endswith(e)) for e in ("shift", "scale"))
    inner = gx.Flow(list(flow.transforms)[:1], flow.base)
    close(expected, inner().log_prob((y - shift) / scale) - scale.log().sum())


class Shift(dist.TransformModule):
    """y = x + shift, as users write transforms that learn."""

    bijective = True
    domain = codomain = dist.constraints.real_vector

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def _call(self, x):
        return x + self.shift

    def _inverse(self, y):
        return y - self.shift

    def log_abs_det_jacobian(self, x, y):
        return x.new_zeros(x.shape[:-1])


def test_functional_call_replaces_parameters_of_plain_transforms_too():
    flow = gx.Flow([Shift()], dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    d = functional_call(flow, {"transforms.0.shift": shift}, ())
    close(d.log_prob(shift), torch.tensor(-D / 2 * math.log(2 * math.pi), dtype=torch.float64))


def test_plain_transforms_with_priors_keep_their_weights_after_the_call():
    flow = gx.Flow([Shift()], dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
    to_pyro_module_(flow)
    flow.transforms[0].shift = PyroSample(dist.Normal(torch.zeros(D, dtype=torch.float64), 5.0).to_event(1))
    trace = poutine.trace(flow).get_trace()
    value = trace.nodes["transforms.0.shift"]["value"]
    with poutine.trace() as later:
        log_prob = trace.nodes["_RETURN"]["value"].log_prob(value)
    assert not later.trace.nodes
    close(log_prob, torch.tensor(-D / 2 * math.log(2 * math.pi), dtype=torch.float64))


def test_nested_module_and_plain_module_agree():
    """``pyro.module`` in a function and an attribute of a PyroModule see the same parameters."""
    flow = build("conditional maf")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow(x)

    outer, x = Outer(), rows("conditional maf")
    pyro.module("outer", outer)
    assert set(pyro.get_param_store().keys()) == {f"outer$$$flow.{name}" for name in params_of(flow)}
    y = torch.randn(ROWS, D, dtype=torch.float64)
    close(outer(x).log_prob(y), log_prob_by_hand(flow, params_of(flow), y, x))
