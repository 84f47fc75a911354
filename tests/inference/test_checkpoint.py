"""Checkpoints of ``gx.fit`` and ``gx.fit_guide``: fits that are killed at any of them end bit for bit as one that is not."""

from __future__ import annotations

import functools
import os
import pickle
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_genexact as gx
from pyro_genexact.inference import variational
from support.regressions import regression_rows


class Killed(Exception):
    """Ends a fit just after it has renamed a checkpoint, as SIGKILL would."""


@pytest.fixture
def killed():
    def replace(*paths, whole=os.replace):
        whole(*paths)
        raise Killed

    return lambda: mock.patch.object(os, "replace", replace)


def check_resumes(run, path, killed, least):
    """A fit that is killed at each of its checkpoints, and built anew and continued each time, ends like one that is not."""
    expected = run(None)
    kills = 0
    while kills < 1000:
        pyro.clear_param_store()
        try:
            with killed():
                run(path)
        except Killed:
            kills += 1
        else:
            break
    pyro.clear_param_store()
    assert run(path) == expected  # the last kill is at the end: this call takes no step
    assert kills >= least


Y, X = regression_rows(20)

# --- fit --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), nn.Dropout(dropout), nn.Linear(4, 1))

    def forward(self, x):
        return dist.Normal(self.net(x).squeeze(-1), 1.0, validate_args=False)


class Noisy(Dataset):
    """Adds noise, as augmentations do."""

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return Y[row], X[row] + torch.randn(2)


def content(module):
    return [x.tolist() for x in module.state_dict().values()]


def fitted(*data, make=Net, **options):
    def run(path):
        module, given = make(), [x() if callable(x) else x for x in data]
        result = gx.fit(module, *given, **{"progress": False, "seed": 1, "every": 1, "checkpoint": path, **options})
        return content(module), result.train, result.validation, result.steps, result.best_epoch, result.stopped

    return run


SMALL = {"epochs": 3, "batch_size": 8}
PAIRS = TensorDataset(Y, X)
FITS = {
    "default rule": fitted(Y, X, validation=0.3, ema=0.9, **SMALL),
    "flat": fitted(Y, X, validation=0.3, patience=1, epochs=30, batch_size=16, every=1),
    "accumulate": fitted(Y, X, accumulate=2, weights=torch.arange(20.0), epochs=3, batch_size=4),
    "seconds": fitted(Y, X, seconds=1e6, **SMALL),
    "dataset": fitted(Noisy, **SMALL),
    "workers": fitted(Noisy, num_workers=2, every=3, epochs=4, batch_size=4, validation=(Y, X)),
    "loader": fitted(lambda: DataLoader(PAIRS, 8, shuffle=True), epochs=3, validation=(Y, X)),
    "loader, two at once": fitted(lambda: DataLoader(Noisy(), 4, shuffle=True), epochs=3, accumulate=2),
    "loader of own generator": fitted(
        lambda: DataLoader(PAIRS, 8, shuffle=True, generator=torch.Generator().manual_seed(7)), epochs=3
    ),
    "loader with workers": fitted(lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=1), epochs=2, every=2),
    "one cycle": fitted(
        Y, X, optimizer=SGD, schedule=lambda opt, steps: lr_scheduler.OneCycleLR(opt, 0.1, steps), **SMALL
    ),
    "milestones": fitted(Y, X, schedule=lambda opt, steps: lr_scheduler.MultiStepLR(opt, [2, 4]), **SMALL),
    "L-BFGS": fitted(Y, X, optimizer=functools.partial(torch.optim.LBFGS, max_iter=3), **SMALL),
}


@pytest.mark.parametrize("name", FITS)
def test_fit_resumes(name, tmp_path, killed):
    check_resumes(FITS[name], tmp_path / "fit", killed, 3)


def test_a_fit_that_continues_says_so(tmp_path, capsys):
    x = torch.randn(20, 2)
    for _ in range(2):
        torch.manual_seed(0)
        gx.fit(gx.flows.maf(2, hidden=(4,)), x, epochs=1, batch_size=10, checkpoint=tmp_path / "fit")
    assert capsys.readouterr().err.count(f"Continued from {tmp_path / 'fit'} after 2 steps.") == 1


# --- fit_guide --------------------------------------------------------------------------------------------


def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample(
        "x",
        dist.Normal(z, pyro.param("scale", torch.tensor(0.5), dist.constraints.positive)).to_event(1),
        obs=torch.ones(2),
    )


def plain():
    loc = pyro.param("loc", torch.zeros(2))
    pyro.sample("z", dist.Normal(loc, pyro.param("width", torch.ones(2), dist.constraints.positive)).to_event(1))


def graph_model():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.8))


def graph_guide():
    p = pyro.param("p", torch.tensor(0.4), dist.constraints.unit_interval)
    pyro.sample("z", dist.Bernoulli(p, validate_args=False), infer={"baseline": {"use_decaying_avg_baseline": True}})


def walled():
    """Not finite in most steps once the guide is far away."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(z > 3.0, torch.nan, z))


def narrow():
    pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.1))


def guided(model, make=None, guide=None, **options):
    def run(path):
        given = make(model) if make else guide
        result = gx.fit_guide(
            model,
            given,
            **{"progress": False, "seed": 1, "num_particles": 2, "every": 1, "checkpoint": path, **options},
        )
        store = {name: value.tolist() for name, value in pyro.get_param_store()._params.items()}
        skipped = {step: len(where) for step, where in result.skipped.items()}
        return store, str(result.elbo), result.final, result.steps, result.stopped, skipped

    return run


GUIDES = {
    "AutoFlow": guided(model, lambda model: gx.guides.AutoFlow(model, hidden=(4,)), steps=6),
    "plain": guided(model, guide=plain, steps=8),
    "flat": guided(model, guide=plain, lr=0.3, every=50),
    "baselines": guided(graph_model, guide=graph_guide, loss=TraceGraph_ELBO(), steps=8),
    "goes back": guided(walled, guide=narrow, lr=1.0, steps=60, every=5),
}


@pytest.mark.parametrize("name", GUIDES)
def test_fit_guide_resumes(name, tmp_path, killed, monkeypatch):
    monkeypatch.setattr(variational, "WINDOWS", (10, 10))
    check_resumes(GUIDES[name], tmp_path / "guide", killed, 3)


def test_a_partial_of_a_function_is_the_same_argument_later(tmp_path):
    def run(path):
        optimizer = functools.partial(lambda parameters, lr: SGD(parameters, lr), lr=0.1)  # anew, at another address
        return guided(model, guide=plain, steps=4, optimizer=optimizer)(path)

    assert run(tmp_path / "guide") == run(tmp_path / "guide")


def test_the_same_guide_continues_in_the_same_process(tmp_path, killed):
    guide = gx.guides.AutoFlow(model, hidden=(4,))
    expected = guided(model, guide=guide, steps=4)(None)
    pyro.clear_param_store()
    guide = gx.guides.AutoFlow(model, hidden=(4,))
    run = guided(model, guide=guide, steps=4, every=3)
    with killed(), pytest.raises(Killed):
        run(tmp_path / "guide")
    assert run(tmp_path / "guide") == expected


# --- files ------------------------------------------------------------------------------------------------


def write(path, **options):
    return fitted(Y, X, **{"epochs": 2, "batch_size": 8, **options})(path)


def frozen():
    module = Net()
    module.net[1].bias.requires_grad_(False)
    return module


OTHERS = {
    "lr": ({"lr": 0.1}, "optimizer="),
    "optimizer": ({"optimizer": SGD}, "optimizer="),
    "lr of a group": (
        {"optimizer": lambda p: torch.optim.Adam([{"params": p, "lr": torch.tensor(0.1)}], lr=1e-3, fused=True)},
        r"optimizer=.*'lr': 0.001.*'lr': tensor\(0.1000\)",
    ),
    "epochs": ({"epochs": 3}, "epochs=2 instead of 3"),
    "batch_size": ({"batch_size": 4}, "batch_size=8 instead of 4"),
    "accumulate": ({"accumulate": 2}, "accumulate=1 instead of 2"),
    "seed": ({"seed": 2}, "seed=1 instead of 2"),
    "ema": ({"ema": 0.9}, "ema=None instead of 0.9"),
    "seconds": ({"seconds": 9.0}, "seconds=None instead of 9.0"),
    "validation": ({"validation": 0.3}, "data=.* validation=None instead of '6 rows"),
    "weights": ({"weights": torch.arange(20.0)}, "data="),
    "penalty": ({"penalty": lambda module: 0.0}, "penalty=None instead of"),
    "schedule": (
        {"schedule": lambda opt, steps: lr_scheduler.ConstantLR(opt)},
        "schedule=None instead of 'ConstantLR'",
    ),
    "module": ({"make": lambda: nn.Sequential(Net())}, "module=.Net of parameters"),
    "frozen": ({"make": frozen}, "net.1.bias.* frozen"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arguments_are_named(name, tmp_path):
    options, text = OTHERS[name]
    path = tmp_path / "fit"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"Expected checkpoint of a fit with the same arguments; .*{text}"):
        write(path, **options)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["fit"]


@pytest.mark.parametrize("other", [(-Y, X), (Y, -X), (TensorDataset(Y, X),)], ids=["data", "context", "dataset"])
def test_other_data_are_told_apart(other, tmp_path):
    write(tmp_path / "fit")
    with pytest.raises(ValueError, match="data='20 rows"):
        fitted(*other, epochs=2, batch_size=8)(tmp_path / "fit")


@pytest.mark.parametrize(
    ("one", "other"), [(X, -X), (X, X.double()), (X.numpy(), Y.numpy()), (1, 2), ({"x": [X]}, {"x": [Y]}), (None, X)]
)
def test_other_arguments_of_a_model_are_told_apart(one, other, tmp_path):
    def run(arg):
        gx.fit_guide(
            lambda arg: model(), lambda arg: plain(), arg, steps=2, progress=False, checkpoint=tmp_path / "guide"
        )

    run(one)
    with pytest.raises(ValueError, match="written with arguments="):
        run(other)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"guide": lambda: plain()}, "guide='plain' instead of '<lambda>'"),
        ({"loss": TraceGraph_ELBO(num_particles=3)}, "loss=None instead of 'TraceGraph_ELBO.num_particles=3.'"),
        ({"optimizer": SGD}, "optimizer=None instead of 'SGD'"),
        ({"parameters": [torch.zeros(1)]}, "parameters=None instead of 1"),
        ({"lr": 0.2}, "lr=0.01 instead of 0.2"),
    ],
)
def test_other_arguments_of_fit_guide_are_named(options, text, tmp_path):
    guided(model, guide=plain, steps=2)(tmp_path / "guide")
    with pytest.raises(ValueError, match=text):
        guided(model, **{"guide": plain, "steps": 2, **options})(tmp_path / "guide")


class Unknown:
    """Would run when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def foreign(kind, path):
    write(path)
    whole = path.read_bytes()
    if kind == "text":
        path.write_text("once upon a time")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"format": "pyro_genexact checkpoint 1", "state": Unknown()}))
    elif kind == "tensors":
        torch.save(Net().state_dict(), path)
    elif kind == "object":
        torch.save(Unknown(), path)
    else:
        path.write_bytes(whole[: round(float(kind) * len(whole))])


@pytest.mark.parametrize("kind", ["text", "pickle", "tensors", "object", "0", "0.1", "0.5", "0.9", "0.999"])
def test_foreign_and_truncated_files_are_left_alone(kind, tmp_path):
    path = tmp_path / "fit"
    foreign(kind, path)
    before = path.read_bytes()
    text = "has other content" if kind == "tensors" else "is truncated or of another kind"
    for run in (write, GUIDES["plain"]):
        with pytest.raises(ValueError, match=f"Expected checkpoint to be a file that a fit has written; .*{text}"):
            run(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["fit"]


def test_a_folder_that_is_missing_is_named_before_the_fit(tmp_path):
    module = Net()
    with pytest.raises(ValueError, match="Expected checkpoint in a folder that exists"):
        fitted(Y, X, make=lambda: module, epochs=2)(tmp_path / "no" / "fit")
    assert content(module) == content(Net())


@pytest.mark.parametrize("options", [{"lr": np.float64(0.1)}, {"max_grad_norm": np.float32(3)}, {"seed": np.int64(3)}])
def test_numbers_of_numpy(options, tmp_path, killed):
    with killed(), pytest.raises(Killed):
        write(tmp_path / "fit", **options)
    assert write(tmp_path / "fit", **options) == write(None, **options)


class Exotic(SGD):
    def state_dict(self):
        return {**super().state_dict(), "unknown": Unknown}


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Expected the states of optimizer, schedule and module to consist of tensors"):
        write(tmp_path / "fit", optimizer=Exotic)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, killed):
    expected = write(None)
    path, part = tmp_path / "fit", tmp_path / "fit.part"
    with killed(), pytest.raises(Killed):
        write(path)
    before = path.read_bytes()
    part.symlink_to("/dev/full")  # each write fails for want of space
    with pytest.raises(OSError, match="No space left on device"):
        write(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["fit"]
    part.write_bytes(b"what a fit that was killed within a write leaves")
    assert write(path) == expected and os.listdir(tmp_path) == ["fit"]
