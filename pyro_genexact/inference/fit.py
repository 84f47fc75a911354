"""Maximum likelihood by minibatch stochastic gradient: ``fit`` and its ``FitResult``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from ..core.checks import check_positive, check_sizes
from ..core.devices import device_of
from ..core.random import checked_seed, seeded
from .batches import Context, Items
from .checkpoint import Checkpoint, digest
from .engine import Clock, Engine, Interrupts
from .fitting import Progress, fabric_of, modes_kept
from .learning_rate import WARM, LearningRate
from .likelihood import MaximumLikelihood, takes_closure
from .loaders import Loader
from .log_prob import Penalty
from .ranks import Ranks
from .sources import Rows, hold_out, source_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONG, LONGEST = 100, 1000  # epochs at most, without and with validation
RATE, VALIDATED_RATE = 1e-3, 3e-3  # of Adam; a higher one needs the validation that stops it
DROPS = (1.0, 0.1)  # factors of the learning rate with validation; after the last its nats are flat
COOLING = 0.3  # the last part of the budget, in which the learning rate goes to 0
EMA = 0.99  # decay of the averages that are validated too
FUSED = ("cpu", "cuda")  # devices on which one kernel of torch takes Adam's whole step
LONG_PATIENCE = 20  # epochs, with the user's own schedule
LARGEST, SMALLEST, FEWEST = 256, 32, 32  # rows in a batch, and batches in an epoch of few rows with validation
SAMPLE = 64  # rows that a checkpoint compares


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` did, epoch by epoch; epochs count from 0.

    Attributes:
        train: mean log_prob of a row in each epoch (nats; in train mode, while the weights moved).
        validation: the same for the validation rows after each epoch, in eval mode, under ``module.for_validation()`` where
            the module has that; empty without validation.
        best_epoch: the epoch whose weights the module holds: the one of the best validation nats, or, without validation, the
            last one (after an interrupt the weights are those of its last step); -1 if no epoch ended or none had a finite
            validation.
        seconds: wall-clock time.
        stopped: why training ended: "flat" (the validation nats, or the loss of an optimizer with a closure), "epochs" or
            "seconds" (all of them spent), or "interrupted".
        steps: how many the optimizer took.
    """

    train: list[float]
    validation: list[float]
    best_epoch: int
    seconds: float
    stopped: str
    steps: int

    @property
    def interrupted(self) -> bool:
        """Whether a KeyboardInterrupt ended the training."""
        return self.stopped == "interrupted"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws nats over epochs, on new axes unless some are given, and returns the axes."""
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(range(len(self.train)), self.train, marker=".", label="train")
        if self.validation:
            ax.plot(range(len(self.validation)), self.validation, marker=".", label="validation")
        if self.best_epoch >= 0:
            ax.axvline(self.best_epoch, color="gray", linestyle="--", label=f"best epoch: {self.best_epoch}")
        ax.set(xlabel="epoch", ylabel="nats")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
        return ax


def fit(
    module: nn.Module,
    data: Any,
    context: Context = None,
    *,
    validation: Any = None,
    weights: Any = None,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    num_workers: int = 0,
    lr: float | None = None,
    patience: int | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
    max_grad_norm: float = 10.0,
    penalty: Penalty | None = None,
    ema: float | None = None,
    fabric: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Maximises the mean log_prob of the rows of ``data`` (nats) by minibatch stochastic gradient, in place.

    The learning rate rises over the first 100 steps. With validation rows it drops to a tenth when the validation nats are flat,
    and the fit ends when they are flat again; the weights with the best validation nats, or their averages if these are better,
    are kept. Without them the last weights are kept. ``epochs`` and ``seconds`` are caps: the rate goes to 0 along a cosine
    in the last 30 % of whichever is spent first.

    Parameters with ``requires_grad=False`` stay as they are. The same seed gives the same weights. Torch's global random state
    and the module's train or eval mode are left as they were.

    Args:
        module: called as ``module()``, ``module(context)`` or, with a dict, ``module(**context)``; returns a
            distribution whose log_prob of B rows has shape (B,).
        data: a tensor (N, *event_shape); a NumPy array or a pandas table of numbers; a map-style or iterable Dataset whose items are
            a row or a (row, context) tuple; or a DataLoader of these. Arrays become tensors of the module's dtype, or of
            integers; those in memory-mapped files are read batch by batch.
        context: a tensor, array or table (N, ...), or a dict of such, taken row by row with the data.
        validation: rows held out: as ``data``, a (data, context) pair, or the fraction of ``data`` to take at random.
        weights: of the rows, (N,), finite and not negative: the weighted mean is maximised.
        epochs: passes over the data, at most: by default 100, and 1000 with validation.
        seconds: of training and validation. The epoch in which they end is cut short, and validated.
        batch_size: rows in a batch of each process, by default 256, and with validation fewer (32 at least) where an epoch would
            have less than 32 batches; a DataLoader brings its own.
        accumulate: batches in a step.
        num_workers: processes that read a Dataset ahead, as in a DataLoader.
        lr: learning rate of Adam, by default 1e-3, and 3e-3 with validation; an ``optimizer`` brings its own.
        patience: epochs without better validation nats after which the rate drops, by default 10, but at least 200 steps; with a
            ``schedule`` or an optimizer that evaluates the loss itself, after which the fit ends, by default 20.
        optimizer: makes the optimizer of the parameters, e.g. ``functools.partial(torch.optim.SGD, lr=1)``. One that evaluates
            the loss itself (``torch.optim.LBFGS``) is for steps of all rows: its gradients are not cut, its rate stays,
            and the fit ends when a step improves the loss by less than 1e-8 of it.
        schedule: makes a scheduler from the optimizer and the total number of steps, in place of the rule above; stepped once
            a step.
        max_grad_norm: longer gradients are cut to this norm; ``math.inf`` cuts none.
        penalty: maps the module to a scalar tensor, which is subtracted from the mean log_prob (nats per row). Minus the
            log-density of a prior, divided by N, gives the maximum a posteriori.
        ema: decay of an exponential moving average of the weights. With validation it is 0.99 by default (unless there is a
            ``schedule``), weights and averages are validated, and the better ones kept; without, there is none by default,
            and the averages are kept if there are. 0 for none.
        fabric: a Lightning Fabric of one or several devices, launched by the user, with its precision, loggers and callbacks;
            by default one of the module's device. The module moves to its device. Loggers receive the nats of each epoch,
            callbacks ``on_train_batch_end(module, step, nats)`` and ``on_train_epoch_end(module, epoch, train, validation)``.
        checkpoint: a file. A fit that was killed continues from it, when called again with the same arguments, and ends
            bit for bit where it would have ended (on a CPU with the same number of threads; not with ``seconds`` or an
            iterable Dataset). A fit that was complete returns at once.
        every: steps between two checkpoints; by default a minute.
        seed: of the shuffling, the random split and whatever the module draws.
        progress: shows nats on stderr: a bar in a terminal, about ten lines elsewhere, and one a minute.

    Returns:
        The history; after a KeyboardInterrupt too, with the weights kept as above.

    Raises:
        ValueError, TypeError: for an argument that does not fit, NaN or infinity in data or context, a
            log_prob of another shape than (B,), a result that is no distribution, or a checkpoint of other arguments.
        FloatingPointError: for a loss or gradient that is not finite, with epoch, step and rows (from 0);
            the weights stay those before that step.
        RuntimeError: in the other processes, when one raises.

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> from pyro.distributions import Normal
        >>> class Gaussian(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self):
        ...         return Normal(self.loc, 1.0)
        >>> model = Gaussian()
        >>> result = gx.fit(model, torch.tensor([2.0, 3.0, 4.0]), lr=0.1, progress=False)
        >>> abs(model.loc.item() - 3) < 0.1, len(result.train)
        (True, 100)
    """
    seed = checked_seed(seed)
    counts = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "patience": patience}
    _check(module, optimizer, lr, seconds, ema, max_grad_norm, num_workers, every=every, **counts)
    settings = {**counts, "seconds": seconds, "ema": ema, "max_grad_norm": max_grad_norm, "seed": seed}
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError("Expected module to have trainable parameters; got none.")
    if any(is_lazy(p) for p in params):
        raise ValueError("Expected module with initialised parameters; got lazy ones. Call it once on a few rows.")
    fabric = fabric_of(fabric, device_of(params))
    clock = Clock()  # the first import of Fabric is not part of the budget
    ranks, device = Ranks(fabric), fabric.device
    with modes_kept(module), seeded(seed + ranks.rank, device), torch.enable_grad():
        with ranks.agreed():
            dtype = next((p.dtype for p in params if p.is_floating_point()), torch.get_default_dtype())
            sources = hold_out(source_of(data, context, weights, "data", dtype), validation, seed, dtype)
            validated = sources[1] is not None
            rows = batch_size or _batch_size(sources[0], validated, ranks)
            train = _loader(sources[0], rows, ranks, device, seed, num_workers)
            rows = batch_size or LARGEST
            held_out = _loader(sources[1], rows, ranks, device, None, num_workers) if validated else None
            epochs = epochs or (LONGEST if validated else LONG)
            fused = device.type in FUSED and all(p.is_floating_point() for p in params)
            adam = partial(torch.optim.Adam, lr=lr or (VALIDATED_RATE if validated else RATE), fused=fused)
            opt = (optimizer or adam)(params)
            own = None if schedule is None else schedule(opt, _steps(train, epochs, accumulate))
            by_rule = own is None and not takes_closure(opt)
            rate = LearningRate(WARM, DROPS, COOLING) if by_rule else LearningRate(1, (1.0,), 0.0)
            patience = patience or (None if by_rule else LONG_PATIENCE)
            ema = EMA if ema is None and validated and by_rule else ema
            settings |= {} if checkpoint is None else _described(module, opt, own, penalty, fabric, sources)
        lengths = ranks.gather(train.batches)
        if len(set(lengths)) > 1:
            raise ValueError(f"Expected data with as many batches in each process; got {lengths}.")
        task = MaximumLikelihood(
            module, opt, fabric, ranks, train, held_out, rate, own, clock,
            epochs, seconds, max_grad_norm, accumulate, penalty, ema or None, patience, Interrupts(),
        )  # fmt: skip
        with closing(task), Progress(epochs, "epoch", progress and ranks.first) as bar:
            file = Checkpoint(checkpoint, every, settings, ranks)
            stopped = Engine(ranks, device, clock, file, bar, task.interrupts).run(task)
    ranks.close()
    if ranks.first:
        task.warn()
    return FitResult(*task.history, task.best_epoch, clock.seconds, stopped, task.steps)


def _loader(
    source: Rows | Iterable[Any], batch_size: int, ranks: Ranks, device: torch.device, seed: int | None, workers: int
) -> Loader:
    if isinstance(source, Rows):
        return source.loader(batch_size, ranks, device, seed, workers)
    if isinstance(source, IterableDataset):
        source = DataLoader(source, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    return Loader(source, "data" if seed is not None else "validation", device)


def _steps(train: Loader, epochs: int, accumulate: int) -> int:
    """Of all epochs."""
    if train.batches is None:
        raise ValueError("Expected data of known length with schedule; got a loader without a length.")
    return epochs * math.ceil(train.batches / accumulate)


def _batch_size(source: Any, validated: bool, ranks: Ranks) -> int:
    """The default: small data that are validated get more steps an epoch."""
    if not validated or not isinstance(source, Rows):
        return LARGEST
    return min(LARGEST, max(SMALLEST, len(source.index) // (FEWEST * ranks.size)))


def _described(
    module: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    penalty: Penalty | None,
    fabric: Any,
    sources: Iterable[Any],
) -> dict[str, Any]:
    """Of the arguments that are no plain values, what can be compared with a checkpoint."""
    kinds = (int, float, str, tuple, Tensor)
    plain = [{name: x for name, x in group.items() if isinstance(x, kinds)} for group in optimizer.param_groups]
    shapes = {
        name: f"{p.dtype} {[*p.shape]}{'' if p.requires_grad else ' frozen'}" for name, p in module.named_parameters()
    }
    of_data, of_validation = (None if source is None else _digest(source) for source in sources)
    return {
        "module": f"{type(module).__name__} of parameters {shapes}",
        "optimizer": f"{type(optimizer).__name__} of {plain}",
        "schedule": None if schedule is None else type(schedule).__name__,
        "penalty": None if penalty is None else getattr(penalty, "__qualname__", type(penalty).__name__),
        "processes": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
        "data": of_data,
        "validation": of_validation,
    }


def _digest(source: Any) -> str:
    """The number of rows, and a hash of some of them."""
    if not isinstance(source, Rows):
        return type(source).__name__
    rows = source.index[:: max(1, len(source.index) // SAMPLE)]
    some: Any = source.source.weights if isinstance(source.source, Items) else vars(source.source[rows])
    return f"{len(source.index)} rows ({digest([rows, some])})"


def _check(
    module: Any, optimizer: Any, lr: Any, seconds: Any, ema: Any, max_grad_norm: float, num_workers: Any, **counts: Any
) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected module to be a torch.nn.Module; got {type(module).__name__}.")
    check_sizes(1, **{name: value for name, value in counts.items() if value is not None})
    check_sizes(0, num_workers=num_workers)
    if lr is not None and optimizer is not None:
        raise ValueError(f"Expected lr=None with an optimizer (which brings its own); got {lr}.")
    check_positive(**{name: x for name, x in (("lr", lr), ("seconds", seconds)) if x is not None})
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"Expected 0 <= ema < 1; got {ema}.")
    if not max_grad_norm > 0:
        raise ValueError(f"Expected max_grad_norm > 0; got {max_grad_norm}.")
