"""Small autoregressive models with their densities in plain tensor operations, for the tests of Pyro's inference."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close
from support.values import built, params_of, sized

T, C, ROWS = 3, 2, 4
NETS = {
    "made": lambda params, context=C: conditioners.MADE(
        T, params, context=context, hidden=(8, 6), activation=torch.tanh, direct=False
    ),
    "nade": lambda params, context=C: conditioners.NADE(T, params, context=context, hidden=5),
    "recurrent": lambda params, context=C: conditioners.Recurrent((), params, context=context, hidden=5),
}
HEADS = {"Bernoulli": heads.Bernoulli, "Normal": heads.Normal, "LogNormal": heads.LogNormal}
X = sized(ROWS, C, seed=1)
nets = pytest.mark.parametrize("net", NETS)


def build(net, head="Bernoulli", context=C, seed=0):
    torch.manual_seed(seed)
    head = HEADS[head]()
    return built(gx.Autoregressive(NETS[net](head.num_params, context), head, (T,)))


def call(model, x=X):
    return model(x) if model.context else model()


def phi_by_hand(model, w, y, x=None):
    """(*batch, T, P) from values (*batch, T): the network in plain tensor operations; no code of the package runs."""
    net, sites = model.conditioner, model.conditioner.num_sites or T
    w = {name.removeprefix("conditioner."): value for name, value in w.items()}
    if isinstance(net, conditioners.MADE):
        h = y
        for i, layer in enumerate(net.layers):
            h = h @ (w[f"layers.{i}.weight"] * layer.mask).T + w[f"layers.{i}.bias"]
            h = h if x is None else h + x @ w[f"layers.{i}.context_weight"].T
            h = h.tanh() if i + 1 < len(net.layers) else h
        return h.unflatten(-1, (sites, -1))
    phis = []
    if isinstance(net, conditioners.NADE):
        total = w["hidden_bias"] if x is None else w["hidden_bias"] + x @ w["hidden_context"].T
        for t in range(T):
            phi = torch.sigmoid(total) @ w["readout"][t] + w["bias"][t]
            phis.append(phi if x is None else phi + x @ w["readout_context"][t])
            total = total + y[..., t, None] * w["weight"][t]
    else:
        h, read = y.new_zeros(*y.shape[:-1], net.hidden), w["begin"].expand(*y.shape[:-1], 1)
        for t in range(T):
            if x is not None:
                now = x[..., t, :] if isinstance(net.context, gx.Covariates) else x
                read = torch.cat([read, now.expand(*read.shape[:-1], C)], -1)
            a = (read @ w["rnn.weight_ih_l0"].T + w["rnn.bias_ih_l0"]).chunk(3, -1)
            b = (h @ w["rnn.weight_hh_l0"].T + w["rnn.bias_hh_l0"]).chunk(3, -1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
            phis.append(h @ w["last.weight"].T + w["last.bias"])
            read = y[..., t, None]
    return torch.stack(torch.broadcast_tensors(*phis), -2)


def family_by_hand(model, phi):
    name = model.head.name
    if name == "Bernoulli":
        return dist.Bernoulli(logits=phi[..., 0])
    return getattr(dist, name)(phi[..., 0], scale_of(phi[..., 1], name))


def scale_of(raw, name):
    bound = 4 if name == "LogNormal" else 10
    return (bound * torch.tanh(raw / bound)).exp()


def sites_by_hand(model, y, x=None, w=None):
    """log p of each site, (*batch, T)."""
    x = x if model.context else None
    dims = 2 if isinstance(model.context, gx.Covariates) else 1
    shape = torch.broadcast_shapes(y.shape[:-1], () if x is None else x.shape[:-dims])
    y = y.expand(*shape, T)
    return family_by_hand(model, phi_by_hand(model, params_of(model) if w is None else w, y, x)).log_prob(y)


def by_hand(model, y, x=None, w=None):
    return sites_by_hand(model, y, x, w).sum(-1)


ORDERS = torch.tensor([[0, 1, 2], [2, 0, 1]])


def ensemble_by_hand(model, y, x):
    """The mixture over ORDERS of a NADE, whose weights go with their variables."""
    parts = []
    for order in ORDERS:
        w = {k: v[order] if "hidden" not in k else v for k, v in params_of(model).items()}
        parts.append(by_hand(model, y[..., order], x, w))
    return torch.stack(parts).logsumexp(0) - math.log(len(ORDERS))


def binaries(n=T):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n)


def normal(loc, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64))


def draws(model, rows=ROWS, seed=3):
    torch.manual_seed(seed)
    return call(model).sample() if model.context else model().sample((rows,))


def same_loss_and_gradient(objective, model, guide, truth, params, tol=1e-9):
    """loss_and_grads of an objective against a loss by hand."""
    for p in params:
        p.grad = None
    assert objective.loss(model, guide) == pytest.approx(truth.item(), abs=tol)
    assert objective.loss_and_grads(model, guide) == pytest.approx(truth.item(), abs=tol)
    expected = torch.autograd.grad(truth, params, allow_unused=True, materialize_grads=True)
    assert sum(g.abs().sum() for g in expected) > 0
    for p, g in zip(params, expected, strict=True):
        close(torch.zeros_like(p) if p.grad is None else p.grad, g, tol)


Y = sized(ROWS, seed=2)
W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def mixture_model(model, enumerate_=None):
    """z_n ~ model(x_n), y_n ~ N(w z_n + b, 1/2)."""

    def f():
        pyro.module("net", model)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", call(model), infer={"enumerate": enumerate_} if enumerate_ else {})
            pyro.sample("y", normal(z @ W, 0.5), obs=Y)

    return f


def mixture_by_hand(model, theta=0.0):
    z = binaries()[:, None]
    return (by_hand(model, z, X) + normal(z @ W + theta, 0.5).log_prob(Y)).logsumexp(0).sum()


def nothing(*_):
    pass


def smooth(model):
    """Smaller weights: a density that few nodes integrate well, and short chains explore."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.6)
    return model.requires_grad_(False)


def vectorised(loss, particles, **options):
    return loss(num_particles=particles, vectorize_particles=True, max_plate_nesting=1, **options)
