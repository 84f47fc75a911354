"""What importing does: nothing to torch, Pyro or zuko, and quickly. Every check is a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_genexact as gx

ROOT = Path(gx.__file__).parents[1]

STATE = """
import os, sys, warnings, logging, threading
import torch, pyro

def describe(value):
    return value if isinstance(value, (int, float, str, bool, type(None))) else f"{type(value).__name__} {id(value)}"

def classes(*modules):
    for module in modules:
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if isinstance(value, type) and value.__module__.startswith(("torch.", "pyro.")):
                yield value

def state():
    import pyro.distributions, pyro.distributions.transforms, torch.distributions.constraints
    from torch.distributions import biject_to, constraint_registry, kl, transform_to
    found = {
        "validate": torch.distributions.Distribution._validate_args,
        "debug": __debug__,
        "settings": {k: describe(v) for k, v in pyro.settings.get().items()},
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print": str(vars(torch._tensor_str.PRINT_OPTS)),
        "rng": torch.get_rng_state().sum().item(),
        "params": sorted(pyro.get_param_store().keys()),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "filters": [str(f) for f in warnings.filters],
        "log": [(logging.getLogger(n).level, len(logging.getLogger(n).handlers)) for n in (None, "pyro", "torch")],
        "environ": dict(os.environ),
        "python threads": threading.active_count(),
        "hooks": [describe(sys.excepthook), describe(sys.displayhook)],
        "biject_to": {k.__qualname__: describe(v) for k, v in biject_to._registry.items()},
        "transform_to": {k.__qualname__: describe(v) for k, v in transform_to._registry.items()},
        "kl": sorted(  # of our own classes there may be new ones
            f"{p.__qualname__} {q.__qualname__} {f.__qualname__}"
            for (p, q), f in kl._KL_REGISTRY.items()
            if not any(c.__module__.startswith("pyro_genexact.") for c in (p, q))
        ),
    }
    modules = (torch.distributions, torch.distributions.constraints, torch.distributions.transforms,
               pyro.distributions, pyro.distributions.transforms, torch.nn, pyro.nn)
    for cls in classes(*modules):
        found[f"class {cls.__module__}.{cls.__qualname__}"] = {
            k: describe(v) for k, v in vars(cls).items() if not k.startswith(("_abc_", "__abstract", "__slotnames__"))
        }
    for module in modules:
        found[f"module {module.__name__}"] = {
            k: describe(v) for k, v in vars(module).items() if not k.startswith("__") and k not in ("warnings",)
        }
    return found

def differences(a, b):
    out = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if x != y and isinstance(x, dict) and isinstance(y, dict):
            out += [f"{key}.{k}: {x.get(k)} -> {y.get(k)}" for k in x.keys() | y.keys() if x.get(k) != y.get(k)]
        elif x != y:
            out.append(f"{key}: {x} -> {y}")
    return out
"""

USER_SETS = """
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(123)
torch.set_grad_enabled(False)
torch.set_printoptions(precision=3)
warnings.simplefilter("error", BytesWarning)
pyro.param("mine", torch.ones(2))
pyro.enable_validation({validate})
"""


FORKS = """
import json, os, signal, sys, time, traceback
start = time.process_time()
import pyro
seconds = time.process_time() - start
for line in sys.stdin:
    reader, writer = os.pipe()
    if not (child := os.fork()):
        signal.alarm(120)
        os.dup2(writer, 1), os.dup2(writer, 2)
        try:
            exec(compile(json.loads(line), "check", "exec"), {"__name__": "__main__", "seconds": seconds})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush(), os._exit(1)
        sys.stdout.flush(), os._exit(0)
    os.close(writer)
    with open(reader) as output:
        text = output.read()
    print(json.dumps([os.waitpid(child, 0)[1], text]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """A function from code to the last line that it prints, as JSON. Each call is a fork of a process that imported Pyro alone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # compile once
    words, pipe = [sys.executable, "-c", FORKS], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env) as parent:

        def run(code):
            print(json.dumps(code), file=parent.stdin, flush=True)
            status, text = json.loads(parent.stdout.readline())
            assert status == 0, text[-3000:]
            return json.loads(text.splitlines()[-1])

        yield run
        parent.stdin.close()


@pytest.mark.parametrize("zuko, validate", [("never", True), ("never", False), ("before", True)])
def test_importing_changes_nothing(zuko, validate, run):
    code = STATE + ("import zuko, arviz\n" if zuko == "before" else "") + USER_SETS.format(validate=validate)
    code += """
import json
before = state()
import pyro_genexact as gx
import pyro_genexact.conditioners, pyro_genexact.heads, pyro_genexact.transforms, pyro_genexact.distributions
print(json.dumps(differences(before, state())))
"""
    assert run(code) == []


def test_using_changes_nothing(run):
    """Building, sampling and scoring change torch's random state at most."""
    code = (
        STATE
        + USER_SETS.format(validate=True)
        + """
import json
import pyro_genexact as gx
torch.broadcast_shapes((2, 1), (3,))  # torch loads parts of its own when first asked, with a filter of warnings
before = state()
flow = gx.flows.maf(3, context=2, hidden=(8,), support=torch.distributions.constraints.positive)
d = flow(torch.zeros(4, 2))
with torch.enable_grad():
    y = d.rsample()
    d.log_prob(y).sum().backward()
after = state()
before.pop("rng"), after.pop("rng")
print(json.dumps(differences(before, after)))
"""
    )
    assert run(code) == []


def test_zuko_after_does_what_it_does_alone(run):
    """What zuko leaves behind is its own affair: the same with us imported first."""
    tail = """
import json
from torch.distributions import Distribution
constraints = sorted(f"{c.__qualname__} {sorted(c.arg_constraints) if isinstance(c.arg_constraints, dict) else 'property'}"
    for c in classes(torch.distributions, pyro.distributions) if issubclass(c, Distribution))
print(json.dumps([Distribution._validate_args, str(Distribution.__dict__.get("arg_constraints")), constraints,
                  str(torch.get_default_dtype())]))
"""
    alone = run(STATE + "import zuko" + tail)
    assert run(STATE + "import pyro_genexact, zuko" + tail) == alone
    assert run(STATE + "import zuko, pyro_genexact" + tail) == alone


def test_our_validation_is_the_users_with_zuko_before(run):
    """Zuko switched validation off, and it stays off; the user switches it on, and it stays on."""
    code = """
import json, torch, pyro, zuko
off = torch.distributions.Distribution._validate_args
import pyro_genexact as gx
stayed = torch.distributions.Distribution._validate_args
torch.distributions.Distribution.set_default_validate_args(True)
flow = gx.flows.maf(2, support=torch.distributions.constraints.positive)
try:
    flow().log_prob(torch.tensor([-1.0, 1.0]))
    caught = "nothing"
except ValueError:
    caught = "ValueError"
print(json.dumps([off, stayed, torch.distributions.Distribution._validate_args, caught]))
"""
    assert run(code) == [False, False, True, "ValueError"]


TIMES = """
import json, sys, time
clock = time.process_time  # of this process alone: the neighbours of a busy machine don't count
others = set(sys.modules); start = clock(); import pyro_genexact; end = clock()
heavy = {"zuko", "arviz", "matplotlib", "tqdm.notebook", "tqdm.auto", "tqdm.autonotebook", "scipy", "pandas", "sklearn",
         "transformers"}
# Pyro imports tqdm.auto for its own bars; the notebook part itself comes with neither
print(json.dumps([seconds, end - start, sorted(heavy & (set(sys.modules) - others)), "tqdm.notebook" in sys.modules]))
"""


def test_import_is_quick_and_heavy_modules_stay_out(run):
    """At most 10% longer than ``import pyro`` alone."""
    runs = [run(TIMES) for _ in range(3)]
    assert [heavy for _, _, *heavy in runs] == [[[], False]] * 3
    alone, extra = (statistics.median(column) for column in list(zip(*runs, strict=True))[:2])
    assert extra < 0.1 * alone, f"import pyro {alone:.2f} s, pyro_genexact {extra:.2f} s more"


def test_fit_runs_without_the_heavy_modules(run):
    code = """
import json, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in ("zuko", "arviz", "matplotlib", "tqdm.notebook", "ipywidgets"):
            raise ImportError("looked for " + name)
sys.meta_path.insert(0, Block())
import pyro_genexact as gx
torch.manual_seed(0)
result = gx.fit(gx.flows.maf(2, hidden=(4,), transforms=1), torch.randn(20, 2), epochs=2, progress=False)
print(json.dumps(len(result.train)))
"""
    assert run(code) == 2


def test_tqdm_is_imported_plainly():
    """None of our files names tqdm's notebook part."""
    for path in Path(gx.__file__).parent.rglob("*.py"):
        assert not re.search(r"tqdm\.(auto|notebook|autonotebook)", path.read_text()), path


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+([.+a-z]\w*)*", gx.__version__)
    try:
        installed = importlib.metadata.version("pyro-genexact")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert gx.__version__ == installed


def test_types_are_declared():
    assert (Path(gx.__file__).parent / "py.typed").is_file()


def test_public_names_exist():
    for module in (gx, gx.conditioners, gx.encoders, gx.heads, gx.transforms):
        assert module.__all__
        for name in module.__all__:
            assert getattr(module, name) is not None
    for name in ("maf", "iaf", "Flow"):
        assert callable(getattr(gx.flows, name))
