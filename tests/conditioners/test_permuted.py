"""Conditioners in another order of sites, against the same computed by hand."""

import copy

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.func import functional_call

from pyro_genexact import heads, testing
from pyro_genexact.conditioners.independent import Independent
from pyro_genexact.conditioners.made import MADE
from pyro_genexact.conditioners.nade import NADE
from pyro_genexact.testing import conditioner_inputs
from pyro_genexact.transforms import ConditionedAutoregressive
from support.networks import in_a_model, naive_nade
from support.registry import CONDITIONERS
from support.registry.conditioners import factory

ORDER = torch.tensor([3, 0, 4, 1, 2])
PERMUTED = {
    "MADE permuted": lambda: factory(MADE, 5, 2, hidden=(12, 10), context=2)().permuted(ORDER),
    "MADE direct permuted": lambda: factory(MADE, 5, 2, hidden=(12,), direct=True)().permuted(ORDER),
    "NADE permuted": lambda: factory(NADE, 5, 3, site=3, hidden=7, context=2)().permuted(ORDER),
    "Independent permuted": lambda: factory(Independent, 5, 2, context=2)().permuted(ORDER),
}


@pytest.mark.parametrize("law", [testing.chunks, testing.reorder, testing.consumption, testing.context_use])
@pytest.mark.parametrize("name", PERMUTED)
def test_laws_of_permuted_networks(name, law):
    law(PERMUTED[name]())


def test_nade_permuted_by_hand():
    for name, order in (
        ("NADE context", ORDER),
        ("NADE categories", ORDER),
        ("NADE vectors", torch.tensor([2, 0, 3, 1])),
    ):
        net = CONDITIONERS[name]()
        y, x = conditioner_inputs(net, rows=3)
        torch.testing.assert_close(net.permuted(order)(y, x), naive_nade(net, y, x, order), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"context": 2, "hidden": (12, 10)},
        {"hidden": (12,), "direct": True, "site": 3},
        {"hidden": (), "context": 1, "site": (2,)},
    ],
)
def test_made_permuted_by_hand(options):
    net = factory(MADE, 5, 2, **options)()
    y, x = conditioner_inputs(net)
    other = factory(MADE, 5, 2, **options)()
    k = {(): 1, 3: 3, (2,): 2}[net.site]
    with torch.no_grad():
        for i, v in enumerate(ORDER.tolist()):
            ins, of = (
                (slice(i * k, (i + 1) * k), slice(v * k, (v + 1) * k)),
                (slice(2 * i, 2 * i + 2), slice(2 * v, 2 * v + 2)),
            )
            columns, rows = ins, of
            if len(net.layers) > 1:
                other.layers[0].weight[:, columns[0]] = net.layers[0].weight[:, columns[1]]
                other.layers[-1].weight[rows[0]] = net.layers[-1].weight[rows[1]]
            links = [(other.layers[0], net.layers[0])] if len(net.layers) == 1 else []
            links += [(other.direct, net.direct)] if net.direct is not None else []
            for into, source in links:
                for j, u in enumerate(ORDER.tolist()):
                    into.weight[rows[0], j * k : (j + 1) * k] = source.weight[rows[1], u * k : (u + 1) * k]
            other.layers[-1].bias[rows[0]] = net.layers[-1].bias[rows[1]]
            if x is not None:
                other.layers[-1].context_weight[rows[0]] = net.layers[-1].context_weight[rows[1]]
    assert torch.equal(net.permuted(ORDER)(y, x), other(y, x))
    assert not torch.allclose(net(y, x), other(y, x))
    assert torch.equal(net.permuted(torch.arange(5))(y, x), net(y, x))
    testing.causality(other)


def test_independent_permuted_by_hand():
    for name in ("Independent", "Independent steps"):
        net = CONDITIONERS[name]()
        y, x = conditioner_inputs(net)
        there = net.permuted(ORDER)(y, x if x is None else x[:, ORDER])
        assert torch.equal(there, net(y, x)[:, ORDER])
    net = factory(Independent, 5, 2, context=2)()
    y, x = conditioner_inputs(net)
    torch.testing.assert_close(net.permuted(ORDER)(y, x), net(y, x)[:, ORDER], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["MADE", "NADE context", "Independent"])
def test_permuted_reaches_the_parameters(name):
    net = factory(MADE, 5, 2, hidden=(12,), direct=True)() if name == "MADE" else CONDITIONERS[name]()
    y, x = conditioner_inputs(net)
    kept = {key: p.detach().clone() for key, p in net.named_parameters()}
    grads = torch.autograd.grad(net.permuted(ORDER)(y, x).square().sum(), list(net.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert all(torch.equal(p, kept[key]) for key, p in net.named_parameters())
    here, there = net(y, x), net.permuted(ORDER).permuted(ORDER.argsort())(y, x)
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", ["MADE permuted", "MADE direct permuted"])
def test_permuted_sweep(name):
    """The reverse sweep of a permuted MADE gives the gradients of the parameters that it was made of."""
    source = factory(MADE, 5, 2, hidden=(12, 10), context=2, direct="direct" in name)()

    y, x = conditioner_inputs(source, 4)
    head = heads.Affine().double()
    transform = ConditionedAutoregressive(source.permuted(ORDER), head, x)
    got = transform.inv(y)
    parameters = list(source.parameters())
    sweep = torch.autograd.grad(got.square().sum(), parameters)
    net, xs = source.permuted(ORDER), []
    phi, state = net.start(x, 4)
    phi = phi.unsqueeze(1)
    for t in range(5):
        if t:
            phi, state = net.extend(xs[-1], state)
        xs.append(head(phi).inv(y[:, t : t + 1]))
    for a, b in zip(sweep, torch.autograd.grad(torch.cat(xs, 1).square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_permuted_with_computed_weights():
    """Weights that are no parameters: parametrised, or drawn from a prior."""
    for make, owner, leaf in (
        (factory(MADE, 5, 2, hidden=(12,)), "layers.0", "weight"),
        (factory(NADE, 5, 2, hidden=7), "", "weight"),
        (factory(Independent, 5, 2, context=2), "net.last", "weight"),
    ):
        net = make()
        y, x = conditioner_inputs(net)
        weight = net.get_parameter(f"{owner}.{leaf}".lstrip("."))
        expected = functional_call(net, {f"{owner}.{leaf}".lstrip("."): 2 * weight}, (y, x))

        class Twice(nn.Module):
            def forward(self, w):
                return 2 * w

        computed = copy.deepcopy(net)
        nn.utils.parametrize.register_parametrization(computed.get_submodule(owner), leaf, Twice())
        torch.testing.assert_close(computed(y, x), expected)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(computed.permuted(ORDER)(y, x), net.permuted(ORDER)(y, x))

        prior = dist.Normal(torch.zeros_like(weight), 1.0).to_event(2)
        to_pyro_module_(computed := copy.deepcopy(net))
        setattr(computed.get_submodule(owner), leaf, PyroSample(prior))
        trace, bound = in_a_model(computed, lambda net: net.permuted(ORDER))
        value = trace.nodes[".".join(filter(None, ["net", owner, leaf]))]["value"]
        with torch.no_grad():
            weight.copy_(value)
        torch.testing.assert_close(
            bound(y, x), net.permuted(ORDER)(y, x), rtol=1e-13, atol=1e-13
        )  # products of other strides
