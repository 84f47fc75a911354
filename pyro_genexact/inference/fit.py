"""Maximum likelihood by minibatch stochastic gradient: ``fit`` and its ``FitResult``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import Dataset

from ..base import DistributionModule
from ..core.devices import device_of
from ..core.random import seeded
from .batches import SHOWN, Batch, Context, hold_out, rows_of
from .fitting import Progress, modes_kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` did, epoch by epoch; epochs count from 0.

    Attributes:
        train: mean log_prob of a row in each epoch (nats; in train mode, while the weights moved).
        validation: the same for the validation rows after each epoch, in eval mode, under ``module.for_validation()`` where
            the module has that; empty without validation.
        best_epoch: the epoch whose weights the module holds: the one of the best validation nats, or the last
            full one without validation (after an interrupt the weights are those of its last step); -1 if no epoch was completed or none had a finite validation.
        seconds: wall-clock time.
        interrupted: whether a KeyboardInterrupt ended the training.
    """

    train: list[float]
    validation: list[float]
    best_epoch: int
    seconds: float
    interrupted: bool

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
    data: Tensor | Dataset[Any],
    context: Context = None,
    *,
    validation: Tensor | tuple[Tensor, Context] | Dataset[Any] | float | None = None,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float | None = None,
    patience: int = 20,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
    max_grad_norm: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Maximises the mean log_prob of the rows of ``data`` (nats) by minibatch stochastic gradient, in place.

    Parameters with ``requires_grad=False`` stay as they are. Batches are moved to the module's device one by
    one. The same seed gives the same weights. Torch's global random state and the module's train or eval mode
    are left as they were.

    Args:
        module: called as ``module()``, ``module(context)`` or, with a dict, ``module(**context)``; returns a
            distribution whose log_prob of B rows has shape (B,).
        data: tensor (N, *event_shape), or a map-style Dataset whose items are a row or a (row, context) pair.
        context: tensor (N, ...) or dict of such tensors, taken row by row with the data.
        validation: rows held out: a tensor, a (data, context) pair, a Dataset, or the fraction of ``data`` to
            take at random. The weights with the best validation nats are kept; without it, the last ones.
        epochs: passes over the data, at most.
        batch_size: rows in a step.
        lr: learning rate of Adam, 1e-3 by default; an ``optimizer`` brings its own.
        patience: epochs without better validation nats after which training stops.
        optimizer: makes the optimizer of the parameters, e.g. ``functools.partial(torch.optim.SGD, lr=1)``.
        schedule: makes a scheduler from the optimizer and the total number of steps; stepped once a batch;
            cosine annealing to 0 by default.
        max_grad_norm: longer gradients are cut to this norm; ``math.inf`` cuts none.
        seed: of the shuffling, the random split and whatever the module draws.
        progress: shows nats on stderr: a bar in a terminal, about ten lines elsewhere.

    Returns:
        The history; after a KeyboardInterrupt too, with the weights kept as above.

    Raises:
        ValueError, TypeError: for an argument that does not fit, NaN or infinity in data or context, a
            log_prob of another shape than (B,), or a result that is no distribution.
        FloatingPointError: for a loss or gradient that is not finite, with epoch, batch and rows (from 0);
            the weights stay those before that batch.

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
    _check_settings(module, epochs, batch_size, patience, lr, optimizer, max_grad_norm)
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError("Expected module to have trainable parameters; got none.")
    device, generator = device_of(params), torch.Generator(device="cpu").manual_seed(seed)
    train, held_out = hold_out(rows_of(data, context, "data"), validation, generator)
    opt = torch.optim.Adam(params, lr or 1e-3) if optimizer is None else optimizer(params)
    scheduler = (schedule or CosineAnnealingLR)(opt, epochs * math.ceil(len(train.index) / batch_size))

    scorer = module.for_validation() if isinstance(module, DistributionModule) else module
    history: tuple[list[float], list[float]] = ([], [])
    best_epoch, best_nats, best_state, interrupted = -1, -math.inf, None, False
    start = time.perf_counter()
    with Progress(epochs, "epoch", progress) as bar, modes_kept(module), seeded(seed, device), torch.enable_grad():
        try:
            for epoch in range(epochs):
                module.train()
                batches = train.batches(batch_size, device, generator)
                nats = [_train_epoch(module, batches, opt, scheduler, max_grad_norm, epoch)]
                if held_out is None:
                    best_epoch = epoch
                else:
                    nats.append(_evaluate(scorer.eval(), held_out.batches(batch_size, device), epoch))
                    if nats[1] > best_nats:
                        best_epoch, best_nats, best_state = epoch, nats[1], copy.deepcopy(module.state_dict())
                for values, value in zip(history, nats, strict=False):
                    values.append(value)
                stop = epoch + 1 == epochs or epoch - best_epoch >= patience
                bar.report(epoch + 1, partial(_text, nats), last=stop)
                if stop:
                    break
        except KeyboardInterrupt:
            interrupted = True
        if best_state is not None:
            module.load_state_dict(best_state)
        module.zero_grad()
    return FitResult(*history, best_epoch, time.perf_counter() - start, interrupted)


def _train_epoch(
    module: nn.Module,
    batches: Iterator[Batch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    max_grad_norm: float,
    epoch: int,
) -> float:
    """One pass; returns the mean log_prob of its rows."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        where = f"epoch {epoch}, batch {number}"
        optimizer.zero_grad()
        log_prob = log_prob_of(module, batch, where)
        loss = -log_prob.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        value, length = torch.stack((loss.detach(), norm)).tolist()  # the one wait for the device in a step
        if not math.isfinite(value + length):
            what, got = ("gradient", length) if math.isfinite(value) else ("loss", value)
            bad = batch.rows[~log_prob.detach().isfinite()].tolist()[:SHOWN] or _offending(module, batch)
            raise FloatingPointError(f"Expected a finite {what}; got {got} at {where}, first in rows {bad}.")
        if length > max_grad_norm:
            nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
        optimizer.step()
        scheduler.step()
        total -= value * len(batch.rows)
        count += len(batch.rows)
    return total / count


@torch.no_grad()
def _evaluate(module: nn.Module, batches: Iterator[Batch], epoch: int) -> float:
    """Mean log_prob of all rows; -inf and NaN are results like others, only never the best."""
    values = [log_prob_of(module, batch, f"epoch {epoch}, validation") for batch in batches]
    return torch.cat(values).mean().item()


def log_prob_of(module: nn.Module, batch: Batch, where: str) -> Tensor:
    """log_prob (B,) of the rows of the batch."""
    try:
        log_prob = _call(module, batch)
    except ValueError as error:  # validate_args met NaN parameters or a value outside the support: say where
        raise ValueError(f"{error}\nMet at {where}, first in rows {_offending(module, batch)}.") from error
    if log_prob.shape != batch.rows.shape:
        raise ValueError(
            f"Expected log_prob.shape == {tuple(batch.rows.shape)}, a value a row (do event dims lack "
            f".to_event?); got {tuple(log_prob.shape)}."
        )
    return log_prob


def _call(module: nn.Module, batch: Batch) -> Tensor:
    args = [value for key, value in batch.context.items() if key is None]
    distribution = module(*args, **{key: value for key, value in batch.context.items() if key is not None})
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(f"Expected module to return a distribution; got {type(distribution).__name__}.")
    log_prob: Tensor = distribution.log_prob(batch.data)
    return log_prob


def _offending(module: nn.Module, batch: Batch) -> list[int]:
    """The first rows that alone raise, or make loss or gradient non-finite.

    In eval mode, for batch norm cannot train on one row.
    """
    module.eval()
    with torch.enable_grad():
        return list(islice(_bisect(module, batch), SHOWN))


def _bisect(module: nn.Module, batch: Batch) -> Iterator[int]:
    # Halves are evaluated afresh: in a joint graph one row's infinite gradient, times zero, is NaN for all.
    if _is_finite(module, batch):
        return
    if len(batch.rows) == 1:
        yield int(batch.rows)
        return
    for half in torch.arange(len(batch.rows), device=batch.rows.device).tensor_split(2):
        yield from _bisect(module, batch.take(half))


def _is_finite(module: nn.Module, batch: Batch) -> bool:
    try:
        loss = _call(module, batch).sum()
    except ValueError:
        return False
    grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return all(bool(x.isfinite().all()) for x in (loss, *grads) if x is not None)


def _text(nats: list[float]) -> str:
    return ", ".join(f"{name} {value:.4f} nats" for name, value in zip(("train", "validation"), nats, strict=False))


def _check_settings(
    module: Any, epochs: int, batch_size: int, patience: int, lr: float | None, optimizer: Any, max_grad_norm: float
) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected module to be a torch.nn.Module; got {type(module).__name__}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not value >= 1:
            raise ValueError(f"Expected {name} >= 1; got {value}.")
    if lr is not None and optimizer is not None:
        raise ValueError(f"Expected lr=None with an optimizer (which brings its own); got {lr}.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"Expected lr positive and finite; got {lr}.")
    if not max_grad_norm > 0:
        raise ValueError(f"Expected max_grad_norm > 0; got {max_grad_norm}.")
