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
from .fitting import Progress, adam, fabric_of, modes_kept
from .learning_rate import WARM, LearningRate
from .likelihood import MaximumLikelihood, takes_closure
from .loaders import Loader
from .log_prob import Penalty, RowLoss
from .ranks import Ranks
from .sources import Rows, hold_out, source_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONG, LONGEST = 100, 1000  # maximum number of epochs without and with validation
RATE, VALIDATED_RATE = 1e-3, 3e-3  # learning rates of Adam; early stopping allows the higher one
DROPS = (1.0, 0.1)  # factors of the learning rate with validation; the fit ends after the last
COOLING = 0.3  # the final fraction of the budget, over which the learning rate decays to 0
EMA = 0.99  # decay of the averaged weights
LONG_PATIENCE = 20  # epochs, if the user gives a schedule
LARGEST, SMALLEST, FEWEST = 256, 32, 32  # largest and smallest default batch; fewest batches per epoch with validation
SAMPLE = 64  # rows that are hashed for a checkpoint


@dataclass(frozen=True)
class FitResult:
    """The history of a call of :func:`fit`. Epochs count from 0.

    Attributes:
        train: mean log_prob per row in each epoch (nats), computed in train mode while the weights changed.
        validation: mean log_prob per validation row after each epoch (nats), in eval mode and under
            ``module.for_validation()`` if the module has this method; empty without validation.
        best_epoch: the epoch whose weights the module has: with validation the one with the best validation nats, without
            it the last one (after an interrupt, the weights are those of the last step). It is -1 if no epoch was
            completed, or if none had finite validation nats.
        seconds: wall-clock time.
        stopped: the reason why training ended: "flat" (the validation nats, or the loss of an optimizer with a closure,
            no longer improved), "epochs" or "seconds" (the budget was spent), or "interrupted".
        steps: the number of optimizer steps.
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
        """Plots the nats per epoch on ``ax`` (new axes by default), and returns the axes."""
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
    loss: RowLoss | None = None,
    ema: float | None = None,
    fabric: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    seed: int = 0,
    progress: bool = True,
    compile: bool = False,
) -> FitResult:
    """Fits a module to the rows of ``data`` in place, by maximum likelihood with minibatch stochastic gradients.

    The objective is the mean log_prob per row, in nats. The training nats and the validation nats are this mean over the
    rows in question. The learning rate rises over the first 100 steps. With validation rows, it drops to a tenth when the
    validation nats no longer improve. The fit ends when they stop improving for the second time. The module then has the
    weights with the best validation nats, or their moving average if that is better. Without validation, the module has
    the last weights. ``epochs`` and ``seconds`` are upper limits. In the last 30% of the limit that is reached first, the
    learning rate decays to 0 along a cosine.

    Parameters with ``requires_grad=False`` do not change. The same seed gives the same weights. The fit restores torch's
    global random state and the train or eval mode of each submodule.

    Args:
        module: a module that is called as ``module()``, ``module(context)`` or, if the context is a dict,
            ``module(**context)``, and returns a distribution whose log_prob of B rows has shape (B,).
        data: a tensor (N, *event_shape); a NumPy array or a pandas table of numbers; a map-style or iterable Dataset
            whose items are a row or a (row, context) tuple; or a DataLoader of these. Arrays are converted to the
            module's dtype, or to int64 if they are integers. Memory-mapped arrays are read batch by batch.
        context: a tensor, array or table (N, ...), or a dict of these.
        validation: validation rows: in any form of ``data``, as a (data, context) pair, or the fraction of ``data`` to
            hold out at random.
        weights: (N,), finite and not negative. The objective is then the weighted mean.
        epochs: the maximum number of passes over the data; by default 100 without validation, 1000 with it.
        seconds: the maximum time of training and validation. The last epoch is cut short and validated.
        batch_size: the number of rows per batch and process. By default 256; with validation it is smaller, down to 32,
            if an epoch would otherwise have fewer than 32 batches. A DataLoader has its own batch size.
        accumulate: the number of batches that are combined for each step.
        num_workers: the number of processes that read a Dataset, as in a DataLoader.
        lr: the learning rate of Adam; by default 1e-3 without validation, 3e-3 with it. Not allowed with ``optimizer``.
        patience: the number of epochs without better validation nats after which the learning rate drops; by default 10,
            and at least 200 steps. With a ``schedule``, or an optimizer that evaluates the loss itself, the fit ends
            after this number of epochs; the default is then 20.
        optimizer: a function from the list of parameters to an optimizer, e.g. ``functools.partial(torch.optim.SGD, lr=1)``.
            Use optimizers that evaluate the loss themselves (``torch.optim.LBFGS``) with all rows in one batch: their
            gradients are not clipped, their learning rate is constant, and the fit ends when a step decreases the loss
            by less than a fraction of 1e-8.
        schedule: a function from the optimizer and the total number of steps to a learning-rate scheduler, which replaces
            the rule above. It is stepped after every step.
        max_grad_norm: gradients are clipped to this norm; ``math.inf`` turns clipping off.
        penalty: a function from the module to a scalar tensor, which is subtracted from the mean log_prob (nats per row).
            The negative log-density of a prior, divided by N, gives the maximum a posteriori estimate.
        loss: a function from the returned distribution and B rows to their losses (B,), which replaces -log_prob in training
            and validation, such as :func:`~pyro_genexact.fenchel_young_loss` for sparse heads. The numbers that are
            reported as nats are then minus the mean loss.
        ema: the decay of an exponential moving average of the weights, 0 for none. By default 0.99 with validation (unless
            there is a ``schedule``) and none without. With validation, both the weights and their average are validated,
            and the better ones are kept. Without validation, the average is kept if ``ema`` is given.
        fabric: a Lightning Fabric with one or several devices, launched by the user, whose precision, loggers and callbacks
            are used; by default one with the module's device. The module is moved to the device. Loggers receive the nats
            of each epoch; callbacks are called as ``on_train_batch_end(module, step, nats)`` and
            ``on_train_epoch_end(module, epoch, train, validation)``.
        checkpoint: the path of a checkpoint file. If the process was killed, calling the fit again with the same arguments
            continues from this file and gives bitwise the same result as an uninterrupted fit (on a CPU with the same
            number of threads; not with ``seconds`` or an iterable Dataset). If the fit was complete, the call returns
            at once.
        every: the number of steps between two checkpoints; by default they are a minute apart.
        seed: the seed of shuffling, of the random split and of random numbers in the module.
        progress: whether to print the nats to stderr: as a bar in a terminal, elsewhere as about ten lines, and at least
            one line per minute.
        compile: whether to compile the log_prob and its gradient by ``torch.compile``, which takes from seconds to a
            minute once and makes the steps of small models faster. The first batch is evaluated without compilation. In
            the first epoch, all rows are checked against the support of the distribution, unless ``loss`` is given; later
            batches are not validated, and while a compiled step runs, validation is off in all threads. Validation nats
            are computed without compilation. Random numbers that the module draws differ from those without compilation,
            also in the first step after a checkpoint. Register hooks before the fit. A number that the module reads and
            that changes in each step fails after eight steps; keep it in a buffer. Pyro modules cannot be compiled.

    Returns:
        The history. A KeyboardInterrupt also ends the fit with a result, and the weights are chosen as above.

    Raises:
        TypeError: if an argument or the result of the module has the wrong type.
        ValueError: if an argument has a wrong value, if data or context contain NaN or infinity, if log_prob does not have
            shape (B,), or if the checkpoint belongs to a fit with other arguments.
        FloatingPointError: if a loss or gradient is not finite. The message has the epoch, the batch and the rows, counted
            from 0; the weights are those before the step.
        RuntimeError: in the other processes of a fabric, if one process raises. With ``compile``, also torch's errors if
            the log_prob cannot be compiled as a whole, with a note.

    Cost: a forward and a backward pass over the data per epoch, and a forward pass over the validation rows (two with ``ema``).

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
    if not isinstance(compile, bool):
        raise TypeError(f"Expected compile to be True or False; got {compile!r}.")
    counts = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "patience": patience}
    functions = {"optimizer": optimizer, "schedule": schedule, "penalty": penalty, "loss": loss}
    _check(module, functions, lr, seconds, ema, max_grad_norm, num_workers, every=every, **counts)
    settings = {**counts, "seconds": seconds, "ema": ema, "max_grad_norm": max_grad_norm, "seed": seed}
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError("Expected module to have trainable parameters; got none.")
    if any(is_lazy(p) for p in params):
        raise ValueError(
            "Expected module with initialised parameters; got lazy ones. Call it once on a few rows first."
        )
    fabric = fabric_of(fabric, device_of(params))
    clock = Clock()  # after the first import of Fabric, which does not count towards ``seconds``
    device, seeds = fabric.device, seeded(seed + fabric.global_rank, fabric.device)
    with closing(Ranks(fabric)) as ranks, modes_kept(module), seeds, torch.enable_grad():
        with ranks.agreed():
            dtype = next((p.dtype for p in params if p.is_floating_point()), torch.get_default_dtype())
            sources = hold_out(source_of(data, context, weights, "data", dtype), validation, seed, dtype)
            validated = sources[1] is not None
            rows = batch_size or _batch_size(sources[0], validated, ranks)
            train = _loader(sources[0], rows, ranks, device, seed, num_workers)
            rows = batch_size or LARGEST
            held_out = _loader(sources[1], rows, ranks, device, None, num_workers) if validated else None
            epochs = epochs or (LONGEST if validated else LONG)
            opt = (optimizer or partial(adam, lr=lr or (VALIDATED_RATE if validated else RATE)))(params)
            own = None if schedule is None else schedule(opt, _steps(train, epochs, accumulate))
            by_rule = own is None and not takes_closure(opt)
            rate = LearningRate(WARM, DROPS, COOLING) if by_rule else LearningRate(1, (1.0,), 0.0)
            patience = patience or (None if by_rule else LONG_PATIENCE)
            ema = EMA if ema is None and validated and by_rule else ema
            settings |= {} if checkpoint is None else _described(module, opt, own, penalty, loss, fabric, sources)
        lengths = ranks.gather(train.batches)
        if len(set(lengths)) > 1:
            raise ValueError(f"Expected data with the same number of batches in each process; got {lengths}.")
        task = MaximumLikelihood(
            module, opt, fabric, ranks, train, held_out, rate, own, clock,
            epochs, seconds, max_grad_norm, accumulate, penalty, loss, ema or None, patience, Interrupts(), compile,
        )  # fmt: skip
        with closing(task), Progress(epochs, "epoch", progress and ranks.first) as bar:
            file = Checkpoint(checkpoint, every, settings, ranks)
            stopped = Engine(ranks, device, clock, file, bar, task.interrupts).run(task)
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
    """Returns the total number of steps."""
    if train.batches is None:
        raise ValueError("Expected data of known length with schedule; got a loader without a length.")
    return epochs * math.ceil(train.batches / accumulate)


def _batch_size(source: Any, validated: bool, ranks: Ranks) -> int:
    """Returns the default batch size, which is smaller for few rows with validation, so that epochs have enough steps."""
    if not validated or not isinstance(source, Rows):
        return LARGEST
    return min(LARGEST, max(SMALLEST, len(source.index) // (FEWEST * ranks.size)))


def _described(
    module: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    penalty: Penalty | None,
    loss: RowLoss | None,
    fabric: Any,
    sources: Iterable[Any],
) -> dict[str, Any]:
    """Returns descriptions of the other arguments, which a checkpoint compares with those of the fit that wrote it."""
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
        "penalty": _name_of(penalty),
        "loss": _name_of(loss),
        "processes": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
        "data": of_data,
        "validation": of_validation,
    }


def _name_of(function: Any) -> str | None:
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def _digest(source: Any) -> str:
    """Returns the number of rows and a hash of some of them."""
    if not isinstance(source, Rows):
        return type(source).__name__
    rows = source.index[:: max(1, len(source.index) // SAMPLE)]
    some: Any = source.source.weights if isinstance(source.source, Items) else vars(source.source[rows])
    return f"{len(source.index)} rows ({digest([rows, some])})"


def _check(
    module: Any,
    functions: dict[str, Any],
    lr: Any,
    seconds: Any,
    ema: Any,
    max_grad_norm: float,
    num_workers: Any,
    **counts: Any,
) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected module to be a torch.nn.Module; got {type(module).__name__}.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"Expected {name} to be callable; got {type(function).__name__}.")
    check_sizes(1, **{name: value for name, value in counts.items() if value is not None})
    check_sizes(0, num_workers=num_workers)
    if lr is not None and functions["optimizer"] is not None:
        raise ValueError(f"Expected lr=None with an optimizer, which has its own learning rate; got {lr}.")
    check_positive(**{name: x for name, x in (("lr", lr), ("seconds", seconds)) if x is not None})
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"Expected 0 <= ema < 1; got {ema}.")
    if not max_grad_norm > 0:
        raise ValueError(f"Expected max_grad_norm > 0; got {max_grad_norm}.")
