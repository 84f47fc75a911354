"""The native loop over the sites of MADE returns what the loop in Python returns, from the same random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import silu

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import native
from pyro_genexact.conditioners import MADE
from pyro_genexact.conditioners.masked import MaskedLinear
from pyro_genexact.conditioners.sweeps import Sweeps
from support.values import DTYPES, built, sized

BAND = torch.ones(20, 20, dtype=torch.bool).tril(-1).triu(-3)
NETWORKS = {  # the number of sites and options; panels have 16 sites
    "relu": (20, {"activation": torch.relu, "hidden": (40, 50)}),
    "tanh, context": (20, {"activation": torch.tanh, "context": 3}),
    "sigmoid, no direct link": (35, {"activation": torch.sigmoid, "hidden": (33, 70), "direct": False}),
    "silu, narrow": (18, {"activation": silu, "hidden": (3,)}),
    "linear": (17, {"hidden": ()}),
    "band": (20, {"adjacency": BAND}),
    "one site": (1, {"context": 2}),
    "dropout, in evaluation": (5, {"dropout": 0.5}),
}
BIJECTIONS = {
    "affine": lambda: h.Affine(bound=3.0),
    "affine vectors": lambda: h.Affine((3,)),
    "spline": lambda: h.RationalQuadraticSpline(),
    "spline vectors": lambda: h.RationalQuadraticSpline(5, bound=3.0, shape=(2,)),
    "sum of squares": h.SumOfSquares,
    "constant squares": lambda: h.SumOfSquares(2, degree=0),
    "Bernstein": h.Bernstein,
    "Bernstein of one slope": lambda: h.Bernstein(1),
    "sigmoids": h.DeepSigmoid,
}
FAMILIES = {
    "Bernoulli": (h.Bernoulli, ()),
    "Bernoulli of categories": (h.Bernoulli, 2),
    "Bernoulli vectors": (lambda: h.Bernoulli((3,)), (3,)),
    "Categorical": (lambda: h.Categorical(4), 4),
    "Parametric": (lambda: h.Parametric(torch.distributions.Categorical, (3,)), 3),
}


def network(name, head, site, dtype=torch.float64):
    sites, options = NETWORKS[name]
    net = built(MADE(sites, head.num_params, site=site, **options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.4)  # so that 35 affine sites do not overflow
    return net


def both(call):
    results = []
    for on in (True, False):
        with native.enabled(on), torch.no_grad():
            torch.manual_seed(3)
            results.append(call())
    return results


def given_to(net, rows, *site_shape, dtype=torch.float64):
    context = sized(rows, net.context, seed=1).to(dtype) if net.context else None
    return sized(rows, net.num_sites, *site_shape).to(dtype), context


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("head", BIJECTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_bijections(name, head, dtype, tol):
    head = BIJECTIONS[head]()
    net = network(name, head, head.site_shape, dtype)
    module = gx.transforms.AutoregressiveTransform(net, head)
    for rows in (1, 70):
        y, context = given_to(net, rows, *head.site_shape, dtype=dtype)
        with torch.no_grad():
            assert net.native_loop(head, y, context) is not None

        def inverse(context=context, y=y):
            t = module(context).inv
            x = t(y)
            return x, t.log_abs_det_jacobian(y, x)

        here, there = both(inverse)
        assert all(a.dtype is dtype and a.stride() == b.stride() for a, b in zip(here, there, strict=True))
        scale = there[0].abs().max().clamp(min=1)  # errors grow along the sites
        torch.testing.assert_close(here[0] / scale, there[0] / scale, rtol=10 * tol, atol=10 * tol)
        torch.testing.assert_close(here[1], there[1], rtol=100 * tol, atol=100 * tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_families(name, family, dtype):
    make, site = FAMILIES[family]
    net = network(name, head := make(), site, dtype)
    model = gx.Autoregressive(net, head, (net.num_sites, *head.site_shape))
    _, context = given_to(net, 70, dtype=dtype)
    u = torch.rand(70, net.num_sites, *head.site_shape, dtype=torch.float64)
    with torch.no_grad():
        assert net.native_loop(head, u, context) is not None
    here, there = both(lambda: model(context).sample((3,) if net.context else (70,)))
    assert here.dtype is there.dtype
    assert torch.equal(here, there)
    assert torch.equal(*both(lambda: model(context).from_uniform(u)))


def test_orders_and_broadcasting():
    net = network("tanh, context", head := h.Bernoulli(), ())
    model = gx.Autoregressive(net, head, (4, 5), torch.randperm(20))
    assert torch.equal(*both(lambda: model(sized(2, 1, 3)).expand((2, 3)).sample((5,))))


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("head", ["affine", "affine vectors", "spline"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, head, rows):
    """The native loop leaves a state for the reverse sweep, and the native sweep returns what that in Python returns."""
    head = BIJECTIONS[head]()
    net = network(name, head, head.site_shape)
    module = gx.transforms.AutoregressiveTransform(net, head)
    y, context = given_to(net, rows, *head.site_shape)
    wanted = [y.requires_grad_(), *net.parameters()]
    wanted += [] if context is None else [context.requires_grad_()]

    def gradients(on):
        with native.enabled(on):
            x, ladj = module(context).inv.call_and_ladj(y)
            return torch.autograd.grad(x.sin().sum() + ladj.sum(), wanted)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        scale = b.abs().max().clamp(min=1)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-8, atol=1e-8)


def test_the_sweep_is_native(monkeypatch):
    net = network("tanh, context", head := h.Affine(), ())
    y, context = given_to(net, 3)
    monkeypatch.setattr(Sweeps, "reverse", None)
    module = gx.transforms.AutoregressiveTransform(net, head)
    module(context).inv(y.requires_grad_()).sum().backward()
    assert y.grad.isfinite().all()


def test_parameters_of_nan_raise():
    head = h.Categorical(3)
    net = MADE(2, 3, site=3)
    with torch.no_grad():
        net.layers[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not NaN; got NaN"):
        gx.Autoregressive(net, head, (2,))().sample((2,))


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("head", [h.SumOfSquares, h.Bernstein, h.DeepSigmoid])
def test_steep_roots(head, dtype, tol):
    """The log-derivative at the root times the error of the root is rounding of y, for parameters far from 0."""
    net = MADE(2, (head := head()).num_params, hidden=()).to(dtype)
    with torch.no_grad():
        net.layers[0].weight.zero_()
        net.layers[0].bias.copy_(3 * sized(*net.layers[0].bias.shape))
    y = (sized(200, 2) * 10 ** (2 * sized(200, 1, seed=1))).to(dtype)
    module = gx.transforms.AutoregressiveTransform(net, head)
    with torch.no_grad():
        found = net.native_loop(head, y, None)
        assert found is not None
        back, ladj = module().call_and_ladj(found.values)
    slope = head(net(found.values)).log_abs_det_jacobian(found.values, y).exp()
    error = (back - y).abs() / (1 + y.abs() + slope * found.values.abs())
    assert error.max() < tol / 10
    torch.testing.assert_close(found.totals, -ladj, rtol=tol, atol=tol)


def test_roots_that_are_not_found_are_left_to_python():
    net = network("relu", head := h.SumOfSquares(), ())
    y, _ = given_to(net, 4)
    module = gx.transforms.AutoregressiveTransform(net, head)
    y[0, 19] = torch.nan
    here, there = both(lambda: module().inv(y))
    assert torch.equal(here.isnan(), y.isnan())
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9, equal_nan=True)
    y[2, 3] = torch.inf
    with pytest.raises(gx.ConvergenceError, match="Expected a root"), torch.no_grad():
        module().inv(y)


def test_nan_and_infinity_as_in_python():
    net = network("relu", head := h.RationalQuadraticSpline(), ())
    y, _ = given_to(net, 4)
    y[0, 0], y[1, 19], y[2, 3], y[3, 1] = torch.nan, torch.nan, torch.inf, -1e9
    module = gx.transforms.AutoregressiveTransform(net, head)
    here, there = both(lambda: module().inv(y))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9, equal_nan=True)


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


def test_rows_do_not_depend_on_the_batch_or_on_threads():
    net = network("relu", head := h.Affine(), ())
    y, _ = given_to(net, 300)
    with torch.no_grad():
        every = net.native_loop(head, y, None).values
        assert torch.equal(every[37:38], net.native_loop(head, y[37:38], None).values)
        large = MADE(64, 2, hidden=(512, 512)).double()
        y = sized(300, 64)
        one = large.native_loop(head, y, None).values
        torch.set_num_threads(2)
        try:
            two = large.native_loop(head, y, None).values
        finally:
            torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_fake_tensors():
    net = network("tanh, context", head := h.Affine(), ())
    y, context = given_to(net, 4)
    with torch.no_grad():
        real = net.native_loop(head, y, context, keep=True)
        arguments = (
            [layer.masked() for layer in [*net.layers, net.direct]],
            [sized(len(layer.bias), 4) for layer in net.layers],
        )
        rest = net._sweeps.ends, True, 1, 0, "affine", [7.0], True
        torch.library.opcheck(torch.ops.pyro_genexact.loop.default, (y.unsqueeze(2), *arguments, *rest))
    assert real.phi.shape == (4, 20, 2)
    hidden, weights = [sized(64, 4), sized(64, 4)], arguments[0]
    sweep = sized(4, 20, 1), sized(4, 20, 1, 2), sized(4, 20, 2), hidden, weights, net._sweeps.ends, True, 1
    torch.library.opcheck(torch.ops.pyro_genexact.reverse.default, sweep)
