"""Reparameterised draws and their gradients: the reverse sweep against a graph of all steps."""

import copy

import pyro
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.core.random import uniforms
from pyro_genexact.families.cdf import quantile
from support.registry import PAIRED
from support.registry.heads import paired
from support.small_models import CONTEXT, binary, real


@pytest.mark.parametrize("net", ["made", "recurrent", "nade"])
def test_gradients_through_the_whole_history(net):
    head = heads.Normal()
    kinds = {
        "made": lambda: conditioners.MADE(4, 2, hidden=(8,), context=2, activation=torch.tanh),
        "recurrent": lambda: conditioners.Recurrent((), 2, hidden=5, context=2),
        "nade": lambda: conditioners.NADE(4, 2, hidden=5, context=2),
    }
    model = real(net=kinds[net](), head=head)
    names = [name for name, _ in model.named_parameters()]

    def f(context, *weights):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (context,)).rsample((2,))

    inputs = (CONTEXT.clone().requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def ancestors(node):
    """The names of all functions that a tensor came from."""
    names, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and type(node).__name__.removesuffix("Backward") not in names:
            names.add(type(node).__name__.removesuffix("Backward"))
            todo += [parent for parent, _ in node.next_functions]
    return names


class Scaled(gx.Head):
    """A head with a parameter of its own."""

    num_params = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, phi, first=0):
        return pyro.distributions.Normal(phi[..., 0], self.scale.exp() * phi[..., 1].exp(), validate_args=False)


@pytest.mark.parametrize("order", [None, torch.tensor([2, 0, 1, 3])])
def test_the_sweep_agrees_with_a_graph_of_all_steps(monkeypatch, order):
    model = real(order, head=Scaled(), context=2)
    found = []
    for sweeps in (True, False):
        monkeypatch.setattr("pyro_genexact.autoregressive.distribution.can_sweep", lambda _, sweeps=sweeps: sweeps)
        torch.manual_seed(0)
        context = CONTEXT.clone().requires_grad_()
        d = model(context)
        y = d.rsample((5,))
        assert ("_Sweep" in ancestors(y.grad_fn)) == sweeps
        found.append(
            [y.detach(), *torch.autograd.grad(y.sin().sum() + d.log_prob(y).sum(), [context, *model.parameters()])]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_changed_before_backward_is_found():
    model = real()
    y = model().rsample()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_rsample_needs_a_reparameterised_family():
    with pytest.raises(NotImplementedError, match=r"family is reparameterised; got Bernoulli"):
        binary()(CONTEXT).rsample()


@pytest.mark.parametrize("net", PAIRED)
@pytest.mark.parametrize("head", ["Bernoulli", "Categorical", "Normal", "Mixture"])
def test_the_same_seed_gives_what_running_the_network_again_gives(head, net):
    model = paired(head, net)
    torch.manual_seed(5)
    y = model().sample((6,))
    torch.manual_seed(5)
    again = torch.zeros_like(y)
    discrete = head in ("Bernoulli", "Categorical")  # uniform numbers are drawn first
    u = uniforms((5, 6, 1), y.device) if discrete else None
    with torch.no_grad():
        for t in range(4):
            d = model.head(model.conditioner(again)[:, t : t + 1], t)
            again[:, t : t + 1] = quantile(d, u[t]) if discrete else d.sample()
    assert torch.equal(y, again) or torch.allclose(y, again, rtol=1e-12, atol=0)


def test_copies_on_a_graph():
    """A head that has weights makes tensors of a graph, which are not kept."""
    inner = gx.Conditional(nn.Linear(3, 2), heads.Normal())
    d = real(head=heads.ConditionalHead(inner), sites=2)()
    y = d.rsample((3,))
    assert torch.equal(copy.deepcopy(d).log_prob(y), d.log_prob(y))


@pytest.mark.parametrize(
    "net", [conditioners.MADE(5, 2, hidden=()), conditioners.Markov((), 2, order=1, hidden=())], ids=["sweep", "graph"]
)
@pytest.mark.parametrize("growth", [3.0, 300.0])
def test_gradients_of_draws_beside_padding_that_would_grow(net, growth):
    """A site is about the exponential of so many times those before: the third or second is beyond all numbers."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()[::2] = growth if p.dim() == 2 else 0.0
    d = gx.Autoregressive(net, heads.LogNormal(), (5,))(lengths=torch.tensor([1, 0]))
    torch.manual_seed(0)
    y = d.rsample((20,))
    assert (y[..., 1:] == 0).all() and (y[:, 0, 0] > 0).all()
    for grad in torch.autograd.grad(y.log1p().sum(), list(net.parameters())):
        assert grad.isfinite().all()
