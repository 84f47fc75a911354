"""The native operator on modules that were changed, and the cases that it leaves to Python."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import native
from pyro_genexact.conditioners import MADE
from pyro_genexact.conditioners.masked import MaskedLinear
from support.native_networks import both, given_to, network
from support.values import sized


def steps(net, y):
    phi, state = net.start(None, len(y))
    return phi, net.extend(y[:, :-1], state)[0].flatten(1)


@torch.enable_grad()
def gradient(module, y):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(module().inv(y).sin().sum(), y)[0]


def weight_normed(net):
    torch.nn.utils.parametrizations.weight_norm(net.layers[1], "weight")
    return net


def orthogonal(net):
    torch.nn.utils.parametrizations.orthogonal(net.layers[2], "weight")
    return net


def column_major(net):
    net.load_state_dict({name: t.t().contiguous().t() for name, t in net.state_dict().items()}, assign=True)
    return net


class Halved(MaskedLinear):
    def masked(self):
        return super().masked() / 2


def halved(net):
    net.layers[1].__class__ = Halved
    return net


def edited(net):
    with torch.no_grad():
        net.native_loop(h.Affine(), sized(5, 20), None)  # remembers the mask
    net.layers[1].mask[30:, :20] = 0
    return net


def replaced(net):
    net.layers[1].mask = net.layers[1].mask * (torch.arange(40) > 3)
    return net


CHANGES = [
    weight_normed,
    lambda net: net.permuted(torch.randperm(20)),
    copy.deepcopy,
    orthogonal,
    column_major,
    halved,
    edited,
    replaced,
]


@pytest.mark.parametrize("change", CHANGES)
def test_copies_and_computed_weights(change):
    net = change(network("relu", head := h.Affine(), ()))
    y, _ = given_to(net, 5)
    with torch.no_grad():
        assert net.native_loop(head, y, None) is not None
    module = gx.transforms.AutoregressiveTransform(net, head)
    torch.testing.assert_close(*both(lambda: module().inv(y)))
    torch.testing.assert_close(*both(lambda: torch.cat(steps(net, y), 1)))
    torch.testing.assert_close(*both(lambda: gradient(module, y)))


def test_inference_mode():
    net = network("tanh, context", head := h.Affine(), ())
    y, context = given_to(net, 5)
    module = gx.transforms.AutoregressiveTransform(net, head)
    with torch.inference_mode():
        there = module(context).inv(y)
    assert torch.equal(there, both(lambda: module(context).inv(y))[0])


def test_compiled_functions_do_not_need_the_library():
    net = network("relu", head := h.Affine(), ())
    y, _ = given_to(net, 5)

    @torch.no_grad()
    def missing(y):
        return y if net.native_loop(head, y, None) is None else y + 1

    assert not torch.equal(missing(y), y)
    assert torch.equal(torch.compile(missing, backend="eager", fullgraph=True)(y), y)


def test_recorded_functions_do_not_need_the_library():
    net = network("relu", head := h.Affine(), ())
    y, _ = given_to(net, 5)
    with torch.no_grad():
        graph = make_fx(gx.transforms.AutoregressiveTransform(net, head)().inv)(y)
    assert "pyro_genexact" not in graph.code


@pytest.mark.parametrize("head", [h.RationalQuadraticSpline(8), h.Affine((3,)), h.DeepSigmoid()])
def test_a_head_that_does_not_fit_raises_as_in_python(head):
    module = gx.transforms.AutoregressiveTransform(net := MADE(5, 2), h.Affine())
    module.head, messages = head, set()
    y = torch.randn(3, 5, *head.site_shape)
    for on in (True, False):
        with native.enabled(on), torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as raised:
            module().inv(y)
        messages.add(str(raised.value))
    assert len(messages) == 1
    with torch.no_grad():
        assert net.native_loop(head, y, None) is None
        assert MADE(5, 4, site=3).native_loop(h.Categorical(4), torch.rand(2, 5).double(), None) is None
        assert MADE(5, 2).native_loop(h.Affine((1,)), torch.rand(2, 5), None) is None
        assert MADE(5, 2, site=3).native_loop(h.Affine(), torch.rand(2, 5), None) is None


def test_the_operator_checks_sizes():
    net, y = network("relu", h.Affine(), ()), sized(4, 20, 1)
    weights = [layer.masked() for layer in [*net.layers, net.direct]]
    offsets = [sized(len(layer.bias), 4) for layer in net.layers]

    def call(y=y, weights=weights, offsets=offsets, ends=net._sweeps.ends, head="affine", settings=(7.0,)):
        return torch.ops.pyro_genexact.loop(y, weights, offsets, ends, True, 0, 0, head, settings, False)

    with torch.no_grad():
        call()
        for options in [
            {"y": y.float()},
            {"y": sized(4, 19, 1)},
            {"y": sized(4, 20, 2)},
            {"weights": weights[1:]},
            {"weights": [weights[0][1:], *weights[1:]]},
            {"weights": [weights[0][:, 2:], *weights[1:]]},
            {"weights": [weights[0].t().contiguous().t(), *weights[1:]]},
            {"offsets": [o[:, :3] for o in offsets]},
            {"offsets": [offsets[0][1:], *offsets[1:]]},
            {"ends": net._sweeps.ends.int()},
            {"ends": net._sweeps.ends[:, 1:].contiguous()},
            {"head": "spline", "settings": (8.0, 5.0)},
            {"head": "bernstein", "settings": (16.0, 5.0)},
            {"settings": ()},
        ]:
            with pytest.raises(RuntimeError, match=r"Expected|expected"):
                call(**options)


class Shifted(h.Affine):
    def forward(self, phi, first=0):
        return super().forward(phi + 1, first)


class Finishing(MADE):
    def _finish(self, *args):
        return super()._finish(*args)


def with_attribute(module, name):
    setattr(module, name, getattr(module, name))
    return module


def hooked(head):
    head.register_forward_hook(lambda module, args, output: None)
    return head


class Slower(MADE):
    def extend(self, y, state):
        phi, state = super().extend(y, state)
        return phi + 1, state


def test_other_cases_are_left_to_python():
    y, affine = sized(3, 5), h.Affine()
    made = network("dropout, in evaluation", affine, ())
    made_of = [
        (made, Shifted(), y),
        (made.train(), affine, y),
        (MADE(5, 2).double(), h.Shift(), y),
        (MADE(5, 2, activation=torch.nn.ELU()).double(), affine, y),
        (MADE(5, 2, site=[(), (), 2, (), ()]).double(), affine, y),
        (MADE(5, 2), affine, y),  # another dtype
        (MADE(5, 2).double(), affine, y[:0]),
        (Slower(5, 2).double(), affine, y),
        (Finishing(5, 2).double(), affine, y),
        (with_attribute(MADE(5, 2).double(), "extend"), affine, y),
        (MADE(5, 2).double(), with_attribute(h.Affine(), "forward"), y),
        (MADE(5, 2).double(), hooked(h.Affine()), y),
        (MADE(5, 1).double(), h.Bernoulli(), y.float()),  # u in single precision
    ]
    with torch.no_grad():
        assert all(net.native_loop(head, given, None) is None for net, head, given in made_of)
        assert MADE(5, 2).double().native_loop(affine, y, None) is not None
        with native.enabled(False):
            assert MADE(5, 2).double().native_loop(affine, y, None) is None
    assert MADE(5, 2).double().native_loop(affine, y, None) is None  # with grad
