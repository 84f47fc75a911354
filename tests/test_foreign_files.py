"""gx.load does nothing that a file asks for, and says what is wrong with one that is damaged or of another kind."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import threading
import zipfile
from functools import partial

import pytest
import torch
from torch import nn
from torch.serialization import get_safe_globals, safe_globals

import pyro_genexact as gx
from pyro_genexact.saving.listed import listed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def flow():
    return gx.flows.maf(2, hidden=(4,), transforms=1)


class Own(nn.Module):
    """Of a user."""


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
    with pytest.raises(ValueError, match=f"^Expected only listed classes in .*; got .*{re.escape(name)}.*"):
        gx.load(path)


def test_a_module_that_save_wrote_with_a_call(path, mark):
    module = flow()
    module.extra = Reduced(os.system, (f"touch {mark}",))
    gx.save(module, path)
    with pytest.raises(ValueError, match=r"got posix.system. These could execute arbitrary code on your machine.$"):
        gx.load(path)
    module.extra = Reduced(partial, (os.system, f"touch {mark}"))
    gx.save(module, path)
    with pytest.raises(ValueError, match=r"got posix.system. These could"):
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
    gx.save(nn.ModuleList([flow(), Own()]), path)
    failed = []

    def run():
        try:
            for _ in range(3):
                gx.load(path, allow=[Own])
        except Exception as error:
            failed.append(error)

    with safe_globals([nn.ModuleList, Own]):  # as a user's own code may have it
        before = get_safe_globals()
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and set(get_safe_globals()) == set(before)
        torch.save(Own(), path)
        stamp(path, "0.1.0")
        gx.load(path)  # as that code says
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="incomplete"):
            gx.load(path)
        assert set(get_safe_globals()) == set(before)


class Nested(nn.Module):
    """Loads another file when it is loaded."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.part = gx.load(self.other)


def test_a_class_that_loads(path, tmp_path):
    module = Nested()
    module.other = str(tmp_path / "other.pt")
    gx.save(flow(), module.other)
    gx.save(module, path)
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(gx.load(path, allow=[Nested])), daemon=True)
    thread.start()
    thread.join(20)
    assert isinstance(loaded[0].part, gx.Flow)


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
