"""Maximum likelihood by minibatch stochastic gradient: ``fit`` and its ``FitResult``."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from ..base import DistributionModule
from ..core.random import seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Context = Tensor | Mapping[str, Tensor] | None
SHOWN = 10  # rows that an error message lists


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
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
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
    device, generator = params[0].device, torch.Generator(device="cpu").manual_seed(seed)
    train, held_out = _hold_out(_rows(data, context, "data"), validation, generator)
    opt = torch.optim.Adam(params, lr or 1e-3) if optimizer is None else optimizer(params)
    scheduler = (schedule or CosineAnnealingLR)(opt, epochs * math.ceil(len(train.index) / batch_size))

    scorer = module.for_validation() if isinstance(module, DistributionModule) else module
    history: tuple[list[float], list[float]] = ([], [])
    best_epoch, best_nats, best_state, interrupted = -1, -math.inf, None, False
    start = time.perf_counter()
    bar = tqdm(total=epochs, unit="epoch", disable=not (progress and sys.stderr.isatty()))
    with bar, _state_kept(module, seed, device), torch.enable_grad():
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
                if progress:
                    _report(bar, nats, epoch + 1, stop)
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
    batches: Iterator[_Batch],
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
        log_prob = _log_prob(module, batch, where)
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
def _evaluate(module: nn.Module, batches: Iterator[_Batch], epoch: int) -> float:
    """Mean log_prob of all rows; -inf and NaN are results like others, only never the best."""
    values = [_log_prob(module, batch, f"epoch {epoch}, validation") for batch in batches]
    return torch.cat(values).mean().item()


def _log_prob(module: nn.Module, batch: _Batch, where: str) -> Tensor:
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


def _call(module: nn.Module, batch: _Batch) -> Tensor:
    args = [value for key, value in batch.context.items() if key is None]
    distribution = module(*args, **{key: value for key, value in batch.context.items() if key is not None})
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(f"Expected module to return a distribution; got {type(distribution).__name__}.")
    log_prob: Tensor = distribution.log_prob(batch.data)
    return log_prob


def _offending(module: nn.Module, batch: _Batch) -> list[int]:
    """The first rows that alone raise, or make loss or gradient non-finite.

    In eval mode, for batch norm cannot train on one row.
    """
    module.eval()
    with torch.enable_grad():
        return list(islice(_bisect(module, batch), SHOWN))


def _bisect(module: nn.Module, batch: _Batch) -> Iterator[int]:
    # Halves are evaluated afresh: in a joint graph one row's infinite gradient, times zero, is NaN for all.
    if _is_finite(module, batch):
        return
    if len(batch.rows) == 1:
        yield int(batch.rows)
        return
    for half in torch.arange(len(batch.rows), device=batch.rows.device).tensor_split(2):
        yield from _bisect(module, batch.take(half))


def _is_finite(module: nn.Module, batch: _Batch) -> bool:
    try:
        loss = _call(module, batch).sum()
    except ValueError:
        return False
    grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return all(bool(x.isfinite().all()) for x in (loss, *grads) if x is not None)


@contextmanager
def _state_kept(module: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Draws start from the seed; torch's random state and the mode of each submodule are given back."""
    modes = [(part, part.training) for part in module.modules()]
    with seeded(seed, device):
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode


def _report(bar: tqdm[Any], nats: list[float], done: int, last: bool) -> None:
    """Moves the bar, or, where stderr is no terminal, prints about ten lines in all."""
    names = ("train", "validation")
    text = ", ".join(f"{name} {value:.4f} nats" for name, value in zip(names, nats, strict=False))
    if not bar.disable:
        bar.set_postfix_str(text, refresh=False)
        bar.update()
    elif last or done % max(1, int(bar.total or 0) // 10) == 0:
        print(f"{done}/{bar.total} epochs: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Batch:
    """B rows; ``rows`` (B,) are their numbers in the user's data. The key of a positional context is None."""

    rows: Tensor
    data: Tensor
    context: dict[str | None, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> _Batch:
        context = {key: function(value) for key, value in self.context.items()}
        return _Batch(function(self.rows), function(self.data), context)

    def take(self, rows: Tensor) -> _Batch:
        return self.map(lambda x: x.detach().index_select(0, rows.to(x.device)))

    def check(self, name: str) -> _Batch:
        """Raises for a tensor of another number of rows, or with NaN or infinity; name is the argument."""
        prefix = "context" if name == "data" else f"{name} context"
        named = {prefix + ("" if key is None else f"[{key!r}]"): value for key, value in self.context.items()}
        for label, x in {name: self.data, **named}.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"Expected {label} to be a tensor; got {type(x).__name__}.")
            if x.shape[:1] != self.rows.shape:
                raise ValueError(
                    f"Expected {label}.shape[0] == {len(self.rows)} (rows of {name}); got {tuple(x.shape)}."
                )
            if x.is_floating_point() and not x.isfinite().all():
                bad = self.rows[~x.isfinite().reshape(len(x), -1).all(1).to(self.rows.device)].tolist()
                raise ValueError(f"Expected {label} to be finite; got NaN or infinity, first in rows {bad[:SHOWN]}.")
        return self


@dataclass(frozen=True)
class _Rows:
    """The rows ``index`` (N,) of tensors or of a Dataset; ``name`` is the argument that gave them."""

    source: _Batch | Dataset[Any]
    index: Tensor
    name: str

    def batches(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Iterator[_Batch]:
        """Batches on the device, in random order where a generator is given."""
        order = self.index if generator is None else self.index[_permutation(len(self.index), generator)]
        if isinstance(self.source, _Batch):
            order = order.to(self.source.data.device)  # once an epoch, not once a batch
        for rows in torch.split(order, batch_size):
            yield self.take(rows).map(lambda x: x.to(device))

    def take(self, rows: Tensor) -> _Batch:
        if isinstance(self.source, _Batch):
            return self.source.take(rows)
        batch = default_collate([self.source[row] for row in rows.tolist()])
        # a TensorDataset of one tensor has 1-tuples
        row, *context = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(context) > 1:
            raise TypeError(f"Expected items of {self.name} to be a row or (row, context); got {len(batch)} parts.")
        return _Batch(rows, row, _keyed(*context)).check(self.name)


def _keyed(context: Any = None) -> dict[str | None, Tensor]:
    if context is None:
        return {}
    return dict(context) if isinstance(context, Mapping) else {None: context}


def _permutation(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")


def _rows(data: Any, context: Any, name: str) -> _Rows:
    """All rows of what the user gave, checked as far as can be without reading a Dataset."""
    if not isinstance(data, Tensor) and not (isinstance(data, Dataset) and hasattr(data, "__len__")):
        raise TypeError(f"Expected {name} to be a tensor or a map-style Dataset; got {type(data).__name__}.")
    if (isinstance(data, Tensor) and data.dim() == 0) or len(data) == 0:
        got = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else "an empty Dataset"
        raise ValueError(f"Expected {name} with at least one row; got {got}.")
    index = torch.arange(len(data), device="cpu")
    if isinstance(data, Tensor):
        return _Rows(_Batch(index, data, _keyed(context)).check(name), index, name)
    if context is not None:
        raise ValueError("Expected context=None with a Dataset (its items may be (row, context)); got one.")
    return _Rows(data, index, name)


def _hold_out(train: _Rows, validation: Any, generator: torch.Generator) -> tuple[_Rows, _Rows | None]:
    """Rows for training and rows for validation."""
    if validation is None:
        return train, None
    if isinstance(validation, (int, float)):
        return _split(train, validation, generator)
    pair = validation if isinstance(validation, (tuple, list)) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"Expected validation to be a (data, context) pair; got {len(pair)} parts.")
    held_out = _rows(pair[0], pair[1], "validation")
    one, other = train.take(train.index[:1]), held_out.take(held_out.index[:1])
    if other.context.keys() != one.context.keys():
        raise ValueError(
            f"Expected validation with {_describe(one)} (as data has), e.g. as (data, context); got {_describe(other)}."
        )
    shape, got = tuple(one.data.shape[1:]), tuple(other.data.shape[1:])
    if got != shape:
        raise ValueError(f"Expected validation.shape[1:] == {shape} (that of data); got {got}.")
    return train, held_out


def _describe(batch: _Batch) -> str:
    keys = list(batch.context)
    return "no context" if not keys else "a context" if keys == [None] else f"a context of {keys}"


def _split(rows: _Rows, fraction: float, generator: torch.Generator) -> tuple[_Rows, _Rows]:
    total = len(rows.index)
    if not 0 < fraction < 1:
        raise ValueError(f"Expected 0 < validation < 1 (a fraction of data); got {fraction}.")
    if not 0 < round(fraction * total) < total:
        raise ValueError(f"Expected validation to leave rows on both sides; got {fraction} of {total} rows.")
    held_out, kept = _permutation(total, generator).tensor_split([round(fraction * total)])
    return replace(rows, index=kept), replace(rows, index=held_out)


def _check_settings(
    module: Any,
    epochs: int,
    batch_size: int,
    patience: int,
    lr: float | None,
    optimizer: Any,
    max_grad_norm: float,
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
