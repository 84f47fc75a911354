"""gx.save and gx.load: what comes back is equal, and what a file can make the loading process do is nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import types
import zipfile
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import transforms
from torch.serialization import get_safe_globals, safe_globals

import pyro_genexact as gx
from pyro_genexact.conditioners import MADE
from pyro_genexact.saving.listed import listed
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
    with pytest.raises(TypeError, match=r"Identity: tensors of subclasses have no place in a file"):
        gx.save(module, path)


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
    with pytest.raises(TypeError, match=r"^Expected allow to (be a sequence of|hold) classes and functions; got "):
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


class Reduced:
    """Its pickle is a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def stamp(path, version=gx.__version__):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = f"pyro_genexact {version}".encode()


def forge(path, data):
    """A file like ours with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {"data.pkl": data, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", text)
    stamp(path)


@pytest.fixture
def mark(tmp_path):
    """A file that an attack writes, if it succeeds."""
    yield tmp_path / "attacked"
    assert not (tmp_path / "attacked").exists()


def calls(mark):
    """Calls that write the file, by the names that the error must have."""
    text = f"open({str(mark)!r}, 'w')"
    return {
        "posix.system": (os.system, (f"touch {mark}",)),
        "builtins.eval": (eval, (text,)),
        "builtins.exec": (exec, (text,)),
        "io.open": (open, (str(mark), "w")),
        "builtins.getattr": (getattr, (nn.Module, "eval")),
        "functools.partial": (partial, (os.system, f"touch {mark}")),
        "Popen": (subprocess.Popen, (["touch", str(mark)],)),
        "torch.serialization.load": (torch.load, (str(mark),)),
        "torch.serialization.save": (torch.save, (3, str(mark))),
        "pyro_genexact.save": (gx.save, (flow(), str(mark))),
        "pyro_genexact.load": (gx.load, (str(mark),)),
    }


@pytest.mark.parametrize("name", calls(""))
@pytest.mark.parametrize("nested", [False, True])
def test_calls_are_refused(name, nested, path, mark):
    attack = Reduced(*calls(mark)[name])
    module = flow()
    if nested:
        module.transforms[0].extra = [attack]
    torch.save(module if nested else attack, path)
    with pytest.raises(
        ValueError, match=r"^Expected a file written by pyro_genexact.save; got .*, which torch.save wrote"
    ):
        gx.load(path)
    stamp(path)
    with pytest.raises(ValueError, match=f"^Expected only listed classes in .*; got .*{re.escape(name)}.* Pass allow"):
        gx.load(path)


def test_a_module_that_save_wrote_with_a_call(path, mark):
    module = flow()
    module.extra = Reduced(os.system, (f"touch {mark}",))
    gx.save(module, path)
    with pytest.raises(ValueError, match=r"got posix.system. Pass allow=\[system\] if you trust the file.$"):
        gx.load(path)
    module.extra = Reduced(partial, (os.system, f"touch {mark}"))
    gx.save(module, path)
    with pytest.raises(ValueError, match=r"got posix.system. Pass"):
        gx.load(path, allow=[partial])


def test_a_pickle_of_another_kind(path, mark):
    path.write_bytes(pickle.dumps(Reduced(os.system, (f"touch {mark}",))))
    with pytest.raises(ValueError, match=r"^Expected a file written by .*, which is incomplete or of another kind.$"):
        gx.load(path)


IDENTITY = b"ctorch.nn.modules.linear\nIdentity\n)R"
CHANGES = {  # of what every file shares, or by other ways than names
    "an attribute of a listed function": b"ctorch.nn.functional\nsilu\n}U\x01aK\x01sb.",
    "an attribute of a listed class": b"cpyro_genexact.flows\nFlow\n}U\x01aK\x01sb.",
    "a class of a stack": b"U\x02osU\x06system\x93.",
    "an instruction that calls": b"(U\x04trueios\nsystem\n.",
    "a call of what a call returned": b"ctorch.nn.modules.linear\nIdentity\n)R)R.",
    "a function of torch that calls and sets attributes of a class": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n("
        + IDENTITY
        + b"ctorch.distributions.normal\nNormal\n"
        # the class that the argument's method returns is taken for the tensor
        + IDENTITY
        + b"}U\x0bas_subclass"
        + IDENTITY
        + b"sb\x85}U\x01aK\x01stR."
    ),
    "an unfinished pickle": b"}",
}


@pytest.mark.parametrize("code", CHANGES.values(), ids=CHANGES)
def test_changes_are_refused(code, path):
    forge(path, b"\x80\x02" + code)
    with pytest.raises(ValueError, match=r"^Expected a file written by .*, which was changed.$"):
        gx.load(path)
    assert not hasattr(nn.functional.silu, "a") and not hasattr(gx.Flow, "a")
    assert not hasattr(torch.distributions.Normal, "a")


def test_a_file_without_a_module(path):
    forge(path, b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"^Expected a file with a module; got .* with dict.$"):
        gx.load(path)


def test_incomplete_files(path):
    gx.save(flow(), path)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^Expected a file written by .*(incomplete|torch.save wrote)"):
            gx.load(path)
    with pytest.raises(FileNotFoundError):
        gx.load(path.parent / "none.pt")


def test_damaged_files(path):
    module = flow()
    gx.save(module, path)
    weights = next(p for p in module.parameters() if p.numel() == 8).detach().numpy().tobytes()
    assert path.read_bytes().count(weights) == 1
    path.write_bytes(path.read_bytes().replace(weights, weights[:-1] + bytes([weights[-1] ^ 1])))
    with pytest.raises(ValueError, match=r"^Expected a file written by .*, whose checksums differ: it is damaged.$"):
        gx.load(path)


def test_a_state_dict(path):
    torch.save(flow().state_dict(), path)
    with pytest.raises(ValueError, match=r"torch.save wrote. Load a state_dict with module.load_state_dict\("):
        gx.load(path)


def test_another_major_version(path):
    gx.save(flow(), path)
    stamp(path, "77.1.2")
    with pytest.raises(ValueError, match=r"got .* of version 77.1.2. Install pyro-genexact==77.\* to load it.$"):
        gx.load(path)
    stamp(path, f"{gx.__version__.split('.')[0]}.99.0")
    gx.load(path)


def test_nothing_global_changes_and_threads_share(path):
    gx.save(nn.ModuleList([flow(), Encoder()]), path)
    failed = []

    def run():
        try:
            for _ in range(5):
                gx.load(path, allow=[Encoder])
        except Exception as error:
            failed.append(error)

    with safe_globals([nn.ModuleList, Encoder]):  # as a user's own code may have it
        before = get_safe_globals()
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and set(get_safe_globals()) == set(before)
        torch.save(Encoder(), path)
        stamp(path, "0.1.0")
        gx.load(path)  # as that code says
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="incomplete"):
            gx.load(path)
        assert set(get_safe_globals()) == set(before)


def test_what_is_listed():
    """Classes, and functions of tensors: no modules, instances or functions of this package, no functions that read files."""
    values = listed()
    functions = {name for name, value in values.items() if not isinstance(value, type)}
    assert all(name.split(".")[0] == "torch" and callable(values[name]) for name in functions)
    x = torch.full((2, 2), 0.5)
    for name in functions:
        assert isinstance(values[name](x, *([-1] if "softm" in name else [])), torch.Tensor), name
    assert {name.split(".")[0] for name in values} == {"torch", "pyro", "pyro_genexact"}
    refused = ("SpanningTree", "AutoFlow", "DataParallel", "Rejector", "save", "load", "fit", "partial", "ScriptModule")
    assert not [name for name in values if name.rpartition(".")[2] in refused]
