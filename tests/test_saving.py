"""gx.save and gx.load: what comes back is equal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import transforms

import pyro_genexact as gx
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import conditioner_inputs, made
from support import registry
from support.families import HEADS as FAMILIES
from support.registry.chains import of_potentials, of_states
from support.registry.transforms import Chained, OfPrefixes, of_cubics
from support.small_conditioners import RunningSum
from support.values import Built, draws, sized
from support.with_zuko import zuko

OF_TESTS = [Built, Chained, OfPrefixes, RunningSum, of_cubics, of_potentials, of_states, partial]
OF_ZUKO = [
    zuko.distributions.DiagNormal,
    zuko.flows.continuous.FFJTransform,
    zuko.lazy.UnconditionalDistribution,
    zuko.nn.Linear,
    zuko.nn.MLP,
]


def again(module, path, allow=()):
    gx.save(module, path)
    return gx.load(path, allow=allow)


def foreign(module):
    """What to allow: nothing for modules that consist of this package's classes and those of torch.nn."""
    others = [type(part).__module__.split(".")[0] in ("support", "zuko") for part in module.modules()]
    return [*OF_TESTS, *OF_ZUKO] if any(others) else []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.mark.parametrize("name", registry.CONDITIONERS)
def test_conditioners(name, path):
    net = registry.CONDITIONERS[name]()
    inputs = conditioner_inputs(net)
    assert torch.equal(again(net, path, foreign(net))(*inputs), net(*inputs))


@pytest.mark.parametrize("name", registry.HEADS)
def test_heads_of_bijections(name, path):
    head = registry.HEADS[name]()
    phi = sized(2, 3, head.num_params)
    x = sized(2, 3, *head.site_shape, seed=1)
    assert torch.equal(again(head, path)(phi)(x), head(phi)(x))


@pytest.mark.parametrize("name", [*registry.DISTRIBUTION_HEADS, *FAMILIES])
def test_heads_of_distributions(name, path):
    head = (registry.DISTRIBUTION_HEADS.get(name) or (lambda: FAMILIES[name]))().double()
    phi = 0.5 * sized(2, head.num_sites or 3, head.num_params)
    y = draws(head(phi))
    same = again(head, path)
    assert torch.equal(same(phi).log_prob(y), head(phi).log_prob(y))
    assert torch.equal(same.support.check(y), head.support.check(y))


@pytest.mark.parametrize("name", registry.TRANSFORMS)
def test_transforms(name, path):
    module, x, context = registry.TRANSFORMS[name]()
    module = module if isinstance(module, nn.Module) else gx.Constant(module)
    one, other = made(module, context), made(again(module, path, foreign(module)), context)
    y, same = one(x), other(x)
    assert torch.equal(same, y)
    assert torch.equal(other.log_abs_det_jacobian(x, same), one.log_abs_det_jacobian(x, y))


@pytest.mark.parametrize("name", {**registry.DISTRIBUTIONS, **registry.FILTERED})
def test_distributions(name, path):
    module, context = {**registry.DISTRIBUTIONS, **registry.FILTERED}[name]()
    given = () if context is None else (context,)
    one = module.eval()(*given)
    y = draws(one, 2)
    other = again(module, path, foreign(module))(*given)
    assert torch.equal(other.log_prob(y), one.log_prob(y))
    assert type(other.support) is type(one.support)


FRESH = """
import json, sys, torch
import pyro_genexact as gx
equal, before = {}, torch.serialization.get_safe_globals()
for name in sys.argv[2:]:
    y, context, expected = torch.load(f"{sys.argv[1]}/{name}.values", weights_only=True)
    d = gx.load(f"{sys.argv[1]}/{name}.pt")(*([] if context is None else [context]))
    equal[name] = torch.equal(d.log_prob(y), expected)
print(json.dumps([equal, set(before) == set(torch.serialization.get_safe_globals())]))
"""


def test_in_a_fresh_interpreter(tmp_path):
    names = ["maf list of four", "naf", "Autoregressive columns", "CRF module", "Sequence transformer", "Conditional"]
    for name in names:
        module, context = registry.DISTRIBUTIONS[name]()
        d = module.eval()(*([] if context is None else [context]))
        gx.save(module, tmp_path / f"{name}.pt")
        torch.save((y := draws(d, 2), context, d.log_prob(y).detach()), tmp_path / f"{name}.values")
    code = [sys.executable, "-c", FRESH, str(tmp_path), *names]
    root = str(Path(gx.__file__).parents[1])
    done = subprocess.run(code, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [dict.fromkeys(names, True), True]


class Encoder(nn.Module):
    """Of a user."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x)


class Regression(PyroModule):
    """Of a user of Pyro."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)
        self.shift = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.flow = flow(context=2)

    def forward(self):
        return pyro.sample("y", self.flow(self.scale * self.shift))


def flow(**options):
    return gx.flows.maf(2, hidden=(4,), transforms=1, **options)


def test_modes_and_frozen_parameters_come_back(path):
    module = nn.ModuleDict({"trained": flow(), "frozen": flow().eval().requires_grad_(False)})
    module["tied"] = module["trained"]
    same = again(module, path)
    assert same.training and not same["frozen"].training and same["tied"] is same["trained"]
    assert {p.requires_grad for p in same["frozen"].parameters()} == {False}
    assert {p.requires_grad for p in same["trained"].parameters()} == {True}


def test_no_gradients_and_nothing_remembered(path):
    value = transforms.ExpTransform(cache_size=1)
    module = nn.ModuleList([flow(), gx.Constant(value)])
    gx.save(module, path)
    before = path.stat().st_size
    module[0]().log_prob(torch.zeros(1000, 2)).sum().backward()
    x = torch.zeros(1000, 2)
    y = module[1]()(x)
    same = again(module, path)
    assert all(p.grad is not None for p in module[0].parameters()) and all(p.grad is None for p in same.parameters())
    assert path.stat().st_size == before and same[1]()._cached_x_y == (None, None)
    assert module[1]()._cached_x_y == (x, y)  # saving changes nothing


def test_tensors_with_attributes(path):
    """Buffers of torch.nn.Buffer are; they come back plain."""
    module = nn.Identity()
    module.first = nn.Buffer(torch.ones(2))
    module.register_buffer("second", module.first)
    module.leaf = torch.ones(3, requires_grad=True)
    module.leaf.tag = 3
    same = again(module, path)
    assert same.first is same.second and same.leaf.requires_grad and torch.equal(same.first, module.first)
    module.other = torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {}))
    with pytest.raises(TypeError, match=r"Identity: subclasses of tensors cannot be saved"):
        gx.save(module, path)


def test_a_module_in_the_parameter_store_of_pyro(path):
    flow = gx.flows.maf(2, hidden=(4,))
    pyro.module("flow", flow)  # sets attributes of the parameters
    gx.save(flow, path)
    again = gx.load(path)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in again.parameters())
    assert torch.equal(again().log_prob(torch.ones(2)), flow().log_prob(torch.ones(2)))


def test_derived_buffers_are_left_out_of_the_file(path):
    """They are refilled in the dtype and on the device that they had."""
    net = MADE(20, 2, hidden=(200, 200)).double()
    y = sized(3, 20)
    same = again(net, path)
    states, masks = (sum(t.nbytes for t in tensors) for tensors in (net.state_dict().values(), net.buffers()))
    assert states < path.stat().st_size < states + masks / 10
    assert torch.equal(same(y), net(y)) and {mask.dtype for mask in same.buffers()} == {torch.float64}
    bare = again(net.to("meta"), path)
    assert [mask.shape for mask in bare.buffers()] == [mask.shape for mask in net.buffers()]
    assert {mask.device.type for mask in bare.buffers()} == {"meta"}


def test_modules_of_pyro(path):
    """Such as a user's model, whose parameters and priors come back too."""
    module = Regression()
    same = again(module, path, [Regression])
    values = []
    for model in (module, same):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        values.append(pyro.poutine.trace(model).get_trace().log_prob_sum())
    assert torch.equal(*values) and same.state_dict().keys() == module.state_dict().keys()


def test_device(path, device):
    gx.save(flow(), path)
    assert {t.device.type for t in gx.load(path, device).state_dict().values()} == {device}
    assert {t.device.type for t in gx.load(path, torch.device("meta")).parameters()} == {"meta"}


def test_classes_of_users_need_allow(path):
    module = gx.Conditional(nn.Sequential(nn.Linear(1, 2), Encoder(), nn.Linear(3, 2)), gx.heads.Normal())
    gx.save(module, path)
    name = f"{Encoder.__module__}.Encoder"
    message = f"Expected only listed classes in {path}; got {name}. Pass allow=[Encoder] if you trust the file."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gx.load(path)
    c = torch.ones(4, 1)
    assert torch.equal(gx.load(path, allow=[Encoder])(c).log_prob(c[:, 0]), module(c).log_prob(c[:, 0]))


def test_classes_that_moved(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "before", types.SimpleNamespace(Encoder=Encoder))
    monkeypatch.setattr(Encoder, "__module__", "before")
    gx.save(module := Encoder(), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"got before.Encoder. Pass allow=\[Encoder\]"):
        gx.load(path, allow=[Encoder])
    assert torch.equal(gx.load(path, allow=[(Encoder, "before.Encoder")]).layer.weight, module.layer.weight)


@pytest.mark.parametrize("allow", [Encoder, "Encoder", [3], [("a.B", "a.B")]])
def test_allow_is_a_sequence_of_classes(path, allow):
    gx.save(flow(), path)
    with pytest.raises(TypeError, match=r"^Expected allow to (be a sequence of|contain) classes and functions; got "):
        gx.load(path, allow=allow)


def test_what_cannot_be_saved(path):
    def local(x):
        return x

    class Local(nn.Module):
        pass

    module = nn.Identity()
    gx.save(module, path)
    before = path.read_bytes()
    others = [module.forward, torch.Tensor.tanh, [].append, threading.Lock(), path.open("rb")]
    for wrong in (lambda x: x, local, Local, Local(), *others):
        module.extra = [wrong]
        with pytest.raises(
            TypeError, match=r"^Expected a module that can be saved; got Identity: .*(pickle|; define it)"
        ):
            gx.save(module, path)
        assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before
    with pytest.raises(TypeError, match=r"^Expected module to be a torch.nn.Module; got dict.$"):
        gx.save({}, path)
