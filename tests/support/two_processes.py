"""Checks of ``gx.fit`` in two CPU processes.

    python tests/support/two_processes.py FOLDER

Both processes run every check in turn and write what they saw to FOLDER/0.json and FOLDER/1.json.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import signal
import sys
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from lightning_fabric import Fabric
from sharded_layers import sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import pyro_genexact as gx

torch.set_num_threads(1)
TWO = Fabric(accelerator="cpu", devices=2, strategy="ddp")
JOINT = 8  # rows in a batch of all processes
TRAINED = {"epochs": 2, "optimizer": partial(SGD, lr=1.0), "max_grad_norm": 1.0, "progress": False}


class Net(nn.Module):
    """y ~ Normal(a small network of x, 1); ``hook(module)`` runs at the start of each forward."""

    def __init__(self, norm=False, dropout=0.0, hook=None):
        super().__init__()
        torch.manual_seed(3)
        parts = [nn.Linear(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)]
        self.net = nn.Sequential(*([nn.BatchNorm1d(2)] if norm else []), *parts).double()
        self.hook = hook

    def forward(self, x):
        if self.hook is not None:
            self.hook(self)
        return dist.Normal(self.net(x).squeeze(-1), 1.0, validate_args=False)


class Unused(Net):
    """Has a parameter that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))


def rows(n=21):
    torch.manual_seed(4)
    x = torch.randn(n, 2, dtype=torch.float64)
    return x.prod(-1) + torch.randn(n, dtype=torch.float64), x


def fit(module, *data, fabric=TWO, **options):
    size = 1 if fabric is None else fabric.world_size
    return gx.fit(module, *(data or rows()), fabric=fabric, batch_size=JOINT // size, **{**TRAINED, **options})


def state(module):
    return torch.cat([x.double().flatten() for x in module.state_dict().values()])


def distance(one, other):
    return (state(one) - state(other)).abs().max().item()


def keep_rate(optimizer, steps):
    return LambdaLR(optimizer, lambda step: 1.0)


# --- the same as one process ------------------------------------------------------------------------------


def as_one_process(*data, **options):
    """How far weights and history of two processes are from those of one with the joint batch."""
    joint, alone = Net(), Net()
    two, one = fit(joint, *data, **options), fit(alone, *data, fabric=None, **options)
    pairs = [*zip(two.train + two.validation, one.train + one.validation, strict=True)]
    return {
        "weights": distance(joint, alone),
        "moved": distance(alone, Net()),
        "nats": max(abs(a - b) for a, b in pairs),
        "steps": [two.steps, one.steps],
    }


def equal_weights(module, *data, **options):
    """What the other process must have too."""
    result = fit(module, *data, **options)
    return {"state": state(module).tolist(), "train": result.train, "validation": result.validation}


def draws():
    """What modules draw in their first forward."""
    found = []
    fit(Net(hook=lambda module: found.append(torch.rand(3).tolist())))
    return found[0]


def uneven_loaders():
    loader = DataLoader(TensorDataset(*rows(8 + 8 * TWO.global_rank)), 4)
    return fault(Net(), loader)


def buffers_sent():
    """How often buffers are sent in forwards."""
    with mock.patch.object(DistributedDataParallel, "_sync_buffers") as sent:
        fit(Net(norm=True))
    return sent.call_count


def groups_left():
    """The process groups that are left of a fit and of one that fails, before a garbage collection."""
    made = []

    def new_group(whole=torch.distributed.new_group, **options):
        group = whole(**options)
        made.append(weakref.ref(group))
        return group

    gc.disable()
    with mock.patch.object(torch.distributed, "new_group", new_group):
        fit(Net())
        fault(Net(hook=after(2, raises)))
    left = sum(group() is not None for group in made)
    gc.enable()
    return [len(made), left]


def silent():
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        fit(Net(), progress=True)
    return stderr.getvalue()


# --- faults -----------------------------------------------------------------------------------------------


def fault(module, *data, **options):
    """The error, and how far the weights are from those after the last step that was taken."""
    steps = []

    class Watched(SGD):
        def step(self, closure=None):
            super().step(closure)
            steps.append(copy.deepcopy(module.state_dict()))

    reference = copy.deepcopy(module)
    try:
        fit(module, *data, **{"optimizer": partial(Watched, lr=1.0), **options})
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = ""
    reference.load_state_dict(steps[-1] if steps else reference.state_dict())
    return {"error": text, "moved": distance(module, reference), "steps": len(steps)}


def after(calls, what):
    """A hook that does something in process 1 alone, in a later forward."""
    seen = []

    def hook(module):
        seen.append(0)
        if TWO.global_rank == 1 and len(seen) == calls:
            what(module)

    return hook


def infinite(module):
    def once(_, args, out):
        handle.remove()
        return out * torch.tensor([[torch.nan]] + [[1.0]] * (len(out) - 1))

    handle = module.net.register_forward_hook(once)


def raises(module):
    raise RuntimeError("out of luck")


class Raising(Dataset):
    """Raises in process 1 alone, in the second epoch."""

    def __init__(self, how):
        self.how, self.read = how, 0

    def __len__(self):
        return 21

    def __getitem__(self, row):
        self.read += 1
        if TWO.global_rank == 1 and self.read > 4:
            return self.how(row)
        y, x = rows()
        return y[row], x[row]


def unreadable(row):
    raise OSError("unreadable")


def not_a_number(row):
    return torch.tensor(torch.nan), torch.zeros(2)


def dies(row):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_worker():
    """The loader looks for dead workers every 0.1 s instead of every 5 s."""
    with mock.patch.object(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,)):
        return fault(Net(), Raising(dies), num_workers=1)


def full_disk(folder):
    path = folder / "full"
    if TWO.global_rank == 0:
        (folder / "full.part").symlink_to("/dev/full")
    seen = fault(Net(), checkpoint=path, every=2)
    return {**seen, "files": [file.name for file in folder.glob("full*")]}


# --- interrupts and checkpoints ---------------------------------------------------------------------------


def interrupted(module, **options):
    result = fit(module, epochs=5, **options)
    return {"stopped": result.stopped, "steps": result.steps, "state": state(module).tolist()}


def interrupt(module=None):
    signal.raise_signal(signal.SIGINT)


class Interrupting(SGD):
    """Is interrupted within its third step, in process 1 alone."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        if self.taken == 3 and TWO.global_rank == 1:
            interrupt()
        super().step(closure)


def interrupted_while_saving(folder):
    calls = []

    def gather(ranks, value, whole=gx.inference.ranks.Ranks.gather):
        calls.append(0)
        if TWO.global_rank == 1 and len(calls) == 3:
            interrupt()
        return whole(ranks, value)

    with mock.patch.object(gx.inference.ranks.Ranks, "gather", gather):
        return interrupted(Net(), checkpoint=folder / "saving", every=1)


class Killed(Exception):
    """Ends a fit just after it has renamed a checkpoint, as SIGKILL would."""


def resumed(folder, make, *data, **options):
    """Whether fits that are killed at each of their checkpoints, and continued, end like one that is not."""
    options = {"epochs": 3, "optimizer": None, "every": 1, **options}
    whole = make()
    expected = fit(whole, *(x() for x in data), **options)
    path, kills = folder / str(len(list(folder.iterdir()))), 0
    TWO.barrier()  # both have counted the files
    while kills < 100:
        module, error, result = make(), "", None
        with mock.patch.object(os, "replace", replace_and_raise):
            try:
                result = fit(module, *(x() for x in data), checkpoint=path, **options)
            except Exception as raised:
                error = repr(raised)
        if "Killed" not in error:
            break
        kills += 1
    same = result and (result.train, result.validation, result.steps, result.best_epoch) == (
        expected.train, expected.validation, expected.steps, expected.best_epoch
    )  # fmt: skip
    return {"error": error, "kills": kills, "same": bool(same and distance(module, whole) == 0)}


def replace_and_raise(*paths, replace=os.replace):
    replace(*paths)
    raise Killed


def shuffled():
    return TWO.setup_dataloaders(DataLoader(TensorDataset(*rows(20)), 4, shuffle=True))


def guide():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    try:
        gx.fit_guide(model, model, fabric=TWO, progress=False)
    except ValueError as error:
        return str(error)


def checks(folder):
    torch.manual_seed(5)
    row_weights = torch.rand(21)
    held_out = tuple(x[:7] + 0.1 for x in rows())
    return {
        "uneven": lambda: as_one_process(),
        "accumulate": lambda: as_one_process(accumulate=2),
        "row_weights": lambda: as_one_process(weights=row_weights),
        "validation": lambda: as_one_process(validation=held_out, epochs=4),
        "ema": lambda: as_one_process(ema=0.8),
        "schedule": lambda: as_one_process(schedule=keep_rate),
        "penalty": lambda: as_one_process(penalty=lambda module: 0.1 * module.net[0].weight.square().sum()),
        "lbfgs": lambda: as_one_process(optimizer=partial(torch.optim.LBFGS, max_iter=3)),
        "equal_batch_norm": lambda: equal_weights(Net(norm=True), validation=held_out),
        "equal_averages": lambda: equal_weights(Net(norm=True), ema=0.8, validation=held_out),
        "equal_dropout": lambda: equal_weights(Net(dropout=0.5)),
        "equal_loaders": lambda: equal_weights(Net(), shuffled()),
        "draws": draws,
        "one_row": lambda: as_one_process(*rows(1)),
        "fewer_rows": lambda: as_one_process(*(x[:3] for x in rows()), validation=tuple(x[:1] for x in rows())),
        "uneven_loaders": uneven_loaders,
        "unused": lambda: fault(Unused()),
        "buffers": buffers_sent,
        "groups": groups_left,
        "silent": silent,
        "nan": lambda: fault(Net(hook=after(5, infinite))),
        "raises": lambda: fault(Net(hook=after(5, raises))),
        "dataset": lambda: fault(Net(), Raising(unreadable)),
        "dataset_nan": lambda: fault(Net(), Raising(not_a_number)),
        "worker": lambda: fault(Net(), Raising(unreadable), num_workers=1),
        "killed_worker": killed_worker,
        "full_disk": lambda: full_disk(folder),
        "interrupted_forward": lambda: interrupted(Net(hook=after(4, interrupt))),
        "interrupted_step": lambda: interrupted(Net(), optimizer=partial(Interrupting, lr=1.0)),
        "interrupted_save": lambda: interrupted_while_saving(folder),
        "resumed": lambda: resumed(folder, lambda: Net(norm=True, dropout=0.5), validation=0.3, ema=0.9),
        "resumed_loaders": lambda: resumed(folder, Net, shuffled),
        "guide": guide,
        "sharded": sharded,
    }


def main(folder):
    TWO.launch()
    results = {}
    for name, check in checks(folder).items():
        try:
            results[name] = check()
        except Exception as error:  # the others may pass
            results[name] = {"raised": repr(error)}
        TWO.barrier()
    (folder / f"{TWO.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
