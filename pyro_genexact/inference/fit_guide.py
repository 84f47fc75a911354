"""Variational inference with defaults that fit: ``fit_guide`` and its ``GuideResult``."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.checks import check_positive, check_sizes
from ..core.devices import device_of
from ..core.random import checked_seed, seeded
from .checkpoint import Checkpoint, digest
from .descent import Descent
from .elbo import Objective, default_loss, needs_log_prob
from .engine import Clock, Engine, Interrupts
from .fitting import Progress, fabric_of, modes_kept
from .ranks import Ranks
from .variational import Variational

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GuideResult:
    """What ``fit_guide`` did, step by step; steps count from 0.

    Attributes:
        elbo: the estimate of each step (nats, all data), of the weights before it.
        final: the mean of estimates by some hundred draws for the weights that were kept.
        seconds: wall-clock time.
        steps: how many were taken.
        stopped: why: "flat" (the ELBO), "steps" (all of them taken) or "interrupted".
        skipped: the steps without update, for loss or gradient was not finite, and the sites or parameters where.
    """

    elbo: list[float]
    final: float
    seconds: float
    steps: int
    stopped: str
    skipped: dict[int, list[str]] = field(default_factory=dict)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the ELBO over steps, on new axes unless some are given, and returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(range(len(self.elbo)), self.elbo, linewidth=0.5, label="step")
        ax.axhline(self.final, color="gray", linestyle="--", label=f"kept: {self.final:.2f}")
        late = sorted(x for x in self.elbo[len(self.elbo) // 10 :] if math.isfinite(x))
        if late:  # the first steps would set the scale
            low, high = late[len(late) // 50], max(late[-1], self.final)
            ax.set_ylim(min(low, self.final) - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
        ax.set(xlabel="step", ylabel="ELBO (nats)")
        ax.legend()
        return ax


def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    steps: int | None = None,
    lr: float = 0.01,
    num_particles: int = 16,
    loss: Any = None,
    optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    max_grad_ratio: float = 10.0,
    parameters: Iterable[Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
    fabric: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    **kwargs: Any,
) -> GuideResult:
    """Maximises the ELBO of a Pyro model and its guide, in place, as SVI does, but to the end.

    With ``steps`` the learning rate goes to 0 along a cosine. Without, it drops whenever the ELBO is flat, three times, and
    then the fit ends, or after 20 000 steps. Weights are averaged over the last steps, and of the
    averages, the last and the first weights those with the best ELBO on fresh draws are kept. On four posteriors of 4 to 10
    latents, default fits of :class:`~pyro_genexact.guides.AutoFlow` took 3750 to 8250 steps, 24 to 72 seconds of one CPU thread.

    A step whose loss or gradient is not finite changes nothing, also where Pyro's validation raises because of it. After ten in
    a row the fit goes back to the averages, and on with 0.3 times the learning rate. Torch's global random state and the modes
    of modules are left as they were.

    Args:
        model, guide: called as ``model(*args, **kwargs)``; their parameters are those of Pyro's SVI.
        args, kwargs: of model and guide.
        steps: how many; by default until the ELBO is flat.
        lr: learning rate of Adam at the start; an ``optimizer`` brings its own.
        num_particles: draws in each estimate: at once, if model and guide are found to give the same log_prob for a batch of
            draws as one by one, else one by one. A ``loss`` brings its own.
        loss: a Pyro ELBO; by default ``Trace_ELBO``, or ``TraceEnum_ELBO`` if the model has sites to enumerate.
        optimizer: makes the optimizer of the parameters, e.g. ``functools.partial(torch.optim.SGD, lr=1)``.
        max_grad_ratio: longer gradients than this times their usual norm are cut to it; ``math.inf`` cuts none.
        parameters: the only ones to change; by default all.
        seed: of all draws.
        progress: shows the ELBO on stderr: a bar in a terminal, about ten lines elsewhere, and one a minute.
        fabric: a Lightning Fabric of one device, for its precision; by default that of model and guide in full precision.
        checkpoint: a file. A fit that was killed continues from it, when called again with the same arguments, and ends bit for
            bit where it would have ended (on a CPU with the same number of threads). It holds Pyro's parameter store, and the
            states of model and guide where these are modules.
        every: steps between two checkpoints; by default a minute.

    Returns:
        The history; after a KeyboardInterrupt too.

    Raises:
        ValueError, TypeError: for an argument that does not fit, no parameters, or latents that only one of model and guide has,
            or that appear in some runs only (where Pyro's validation is on).
        NotImplementedError: if the distribution of a site has no ``log_prob``, such as a simulator at an observed site.
        FloatingPointError: for a loss or gradient that is not finite in the first step, or again after going back three times,
            with the step and the sites; the weights stay those before.

    Example:
        >>> import torch
        >>> import pyro, pyro_genexact as gx
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> guide = gx.guides.AutoFlow(model, hidden=(8,))
        >>> result = gx.fit_guide(model, guide, torch.tensor(2.0), steps=300, lr=0.03, progress=False)
        >>> abs(result.final - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()) < 0.1
        True
    """
    seed = checked_seed(seed)
    _check(model, guide, steps, lr, num_particles, loss, max_grad_ratio, every)
    clock = Clock()
    modules = nn.ModuleList(part for part in (model, guide) if isinstance(part, nn.Module))
    device = device_of([*modules.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))])
    fabric = _on_one_device(fabric_of(fabric, device), device)
    parameters = None if parameters is None else [*parameters]
    settings = {
        "steps": steps, "lr": lr, "num_particles": num_particles, "max_grad_ratio": max_grad_ratio, "seed": seed
    }  # fmt: skip
    programs = partial(model, *args, **kwargs), partial(guide, *args, **kwargs)
    with (
        modes_kept(modules), seeded(seed, device), poutine.block(), torch.enable_grad(), _same_latents(),
        needs_log_prob(*programs),
    ):  # fmt: skip
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            guide(*args, **kwargs)
        if checkpoint is not None:
            settings |= _described(model, guide, loss, optimizer, parameters, fabric, args, kwargs)
        if loss is None:
            loss = default_loss(*programs, num_particles)
        objective = Objective(loss, model, guide, args, kwargs, fabric.autocast)
        descent = Descent(optimizer or partial(torch.optim.Adam, lr=lr), parameters, max_grad_ratio)
        task = Variational(objective, descent, steps, device, modules, Interrupts())
        ranks = Ranks(fabric)
        with Progress(task.total, "step", progress) as bar:
            file = Checkpoint(checkpoint, every, settings, ranks)
            stopped = Engine(ranks, device, clock, file, bar, task.interrupts).run(task)
    return GuideResult(task.elbo, task.final, clock.seconds, task.steps, stopped, task.skipped)


def _on_one_device(fabric: Any, device: torch.device) -> Any:
    if fabric.world_size > 1:
        raise ValueError(
            f"Expected fabric of one device (Pyro's ELBOs call backward themselves); got one of {fabric.world_size} "
            "processes."
        )
    if fabric.device.type != device.type:
        raise ValueError(f"Expected fabric on the device of model and guide, {device}; got {fabric.device}.")
    return fabric


def _described(
    model: Any, guide: Any, loss: Any, optimizer: Any, parameters: Any, fabric: Any, args: Any, kwargs: Any
) -> dict[str, Any]:
    """Of the arguments that are no plain values, what can be compared with a checkpoint."""
    particles = getattr(loss, "num_particles", None)
    return {
        "model": _named(model),
        "guide": _named(guide),
        "loss": None if loss is None else f"{type(loss).__name__}(num_particles={particles})",
        "optimizer": None if optimizer is None else _named(optimizer),
        "parameters": None if parameters is None else len(parameters),
        "precision": fabric.strategy.precision.precision,
        "arguments": digest([args, sorted(kwargs.items())]),
    }


def _named(function: Any) -> str:
    if isinstance(function, nn.Module):
        return (
            f"{type(function).__name__} of parameters { {name: [*p.shape] for name, p in function.named_parameters()} }"
        )
    return getattr(function, "__qualname__", None) or re.sub(" at 0x[0-9a-f]*", "", repr(function))


@contextmanager
def _same_latents() -> Iterator[None]:
    """Makes errors of Pyro's warnings of latents that only one of model and guide has: the ELBO would be wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found (non-auxiliary )?vars in (model|guide) but not")
        try:
            yield
        except UserWarning as error:
            if not str(error).startswith("Found "):
                raise
            raise ValueError(f"Expected the same latents in every run of model and guide; {error}.") from error


def _check(
    model: Any, guide: Any, steps: Any, lr: float, num_particles: int, loss: Any, ratio: float, every: Any
) -> None:
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise TypeError(f"Expected {name} to be callable; got {type(value).__name__}.")
    given = {name: value for name, value in (("steps", steps), ("every", every)) if value is not None}
    check_sizes(1, num_particles=num_particles, **given)
    check_positive(lr=lr)
    if not ratio > 0:
        raise ValueError(f"Expected max_grad_ratio > 0; got {ratio}.")
    if loss is not None and not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"Expected loss to be a Pyro ELBO, with loss_and_grads; got {type(loss).__name__}.")
