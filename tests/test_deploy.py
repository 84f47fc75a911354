"""What the page "Deploy a density" exports has the values of the model, in a process without this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE, Recurrent
from support.values import built

PAGE = (Path(__file__).parents[1] / "docs/howto/deploy.md").read_text()
EXPORT, LOAD, NOISE, ONNX = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CLASSES = EXPORT.split("\nmodel = ")[0]
ALONE = """
import sys
sys.modules.update(dict.fromkeys(("pyro", "pyro_genexact", "zuko")))  # so that their import fails
import torch
found = []
for folder in sys.argv[1:]:
    y = torch.load(folder + "/y.pt")
    log_prob = torch.export.load(folder + "/density.pt2").module()
    sample = torch.export.load(folder + "/sampler.pt2").module()
    torch.manual_seed(1)
    torch.save((log_prob(y), sample()), folder + "/found.pt")
assert sys.modules["pyro_genexact"] is None
"""


def made(count):
    return gx.Autoregressive(MADE(count, 1, hidden=(6,)), h.Bernoulli(), (count,))


def strings(net):
    return gx.Sequence(net, h.Categorical(4), eos=0, max_len=4)


MODELS = {
    "maf": lambda: gx.flows.maf(3, hidden=(6,), transforms=2),
    "made": lambda: made(4),
    "recurrent": lambda: strings(Recurrent(4, 4, hidden=5)),
}


def page(code, folder, monkeypatch, **names):
    monkeypatch.chdir(folder)
    exec(compile(code, "deploy.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The models, the values to score, and what a process without this package finds."""
    cases, folders = {}, []
    for name, make in MODELS.items():
        model, folder = built(make()).eval(), tmp_path_factory.mktemp(name)
        y = model().sample((7,))
        torch.save(y, folder / "y.pt")
        with pytest.MonkeyPatch.context() as patch:
            code = re.sub("(?m)^(model|y) = .*", "", EXPORT)
            page(code, folder, patch, model=model, y=y[:5])
        cases[name], folders = (model, y, folder / "found.pt"), [*folders, str(folder)]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *folders], check=True, cwd=folders[0], timeout=300)
    return cases


@pytest.mark.parametrize("name", MODELS)
def test_exported_functions_have_the_values_of_the_model(name, exported):
    model, y, path = exported[name]
    log_prob, draws = torch.load(path)
    torch.testing.assert_close(log_prob, model().log_prob(y).detach(), rtol=1e-12, atol=1e-12)
    torch.manual_seed(1)
    torch.testing.assert_close(draws, model().sample((100,)), rtol=1e-9, atol=1e-9)


def test_noise_is_an_argument(tmp_path, monkeypatch):
    model, rows = built(MODELS["maf"]()).eval(), torch.export.Dim("rows")
    y = torch.randn(5, 3, dtype=torch.float64)
    names = page(CLASSES + "rows = torch.export.Dim('rows')\n", tmp_path, monkeypatch)
    code = NOISE.replace("torch.randn(1000, 3)", "noise")
    noise = torch.randn(11, 3, dtype=torch.float64)
    found = page(code, tmp_path, monkeypatch, **names | {"model": model, "y": y, "rows": rows, "noise": noise})
    x = noise
    for t in model().transforms:
        x = t(x)
    torch.testing.assert_close(found["samples"], x.detach(), rtol=1e-9, atol=1e-9)
    assert pyro.infer.util.is_validation_enabled()


@pytest.mark.parametrize("make", [MODELS["maf"], lambda: gx.flows.nsf(3, hidden=(6,), transforms=1), MODELS["made"]])
def test_onnx(make, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, rows = built(make()).float().eval(), torch.export.Dim("rows")
    y = model().sample((9,))
    names = page(CLASSES, tmp_path, monkeypatch)
    found = page(ONNX, tmp_path, monkeypatch, **names | {"model": model, "y": y, "rows": rows})
    torch.testing.assert_close(torch.from_numpy(found["nats"]), model().log_prob(y).detach(), rtol=1e-4, atol=1e-4)


def test_the_page_runs(tmp_path, monkeypatch):
    page(EXPORT.replace("features=3", "features=3, hidden=(4,), transforms=1"), tmp_path, monkeypatch)
    page(LOAD, tmp_path, monkeypatch)
