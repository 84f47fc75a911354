"""Variational inference: ``fit_guide`` and its ``GuideResult``."""

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
from .bounds import OBJECTIVES
from .checkpoint import Checkpoint, digest
from .descent import Descent
from .elbo import Objective, default_loss, needs_log_prob
from .engine import Clock, Engine, Interrupts
from .fitting import Progress, adam, fabric_of, modes_kept
from .ranks import Ranks
from .variational import Variational

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GuideResult:
    """The history of a call of :func:`fit_guide`. Steps count from 0.

    Attributes:
        elbo: the ELBO estimate of each step (nats, summed over all data), for the weights before the step. With another
            objective, it is the bound of this objective; with ``tempering``, the first steps have that of the tempered posterior.
        final: the ELBO, or other bound, of the weights that were kept (nats), estimated with a few hundred fresh draws.
        seconds: wall-clock time.
        steps: the number of steps.
        stopped: the reason why the fit ended: "flat" (the ELBO no longer improved), "steps" (all steps were taken) or
            "interrupted".
        skipped: the steps that were skipped because the loss or gradient was not finite, with the sites or parameters
            where it was not.
    """

    elbo: list[float]
    final: float
    seconds: float
    steps: int
    stopped: str
    skipped: dict[int, list[str]] = field(default_factory=dict)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plots the ELBO per step on ``ax`` (new axes by default), and returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(range(len(self.elbo)), self.elbo, linewidth=0.5, label="step")
        ax.axhline(self.final, color="gray", linestyle="--", label=f"final: {self.final:.2f}")
        late = sorted(x for x in self.elbo[len(self.elbo) // 10 :] if math.isfinite(x))
        if late:  # the y-limits leave out the first steps, whose ELBO is far lower
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
    num_particles: int | None = None,
    objective: str = "elbo",
    path_gradient: bool | None = None,
    tempering: int = 0,
    loss: Any = None,
    optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    max_grad_ratio: float = 10.0,
    parameters: Iterable[Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
    fabric: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    compile: bool = False,
    **kwargs: Any,
) -> GuideResult:
    """Fits a guide to a Pyro model in place, by maximising the ELBO (nats) until it no longer improves.

    By default, the learning rate drops three times, each time when the ELBO no longer improves. The fit ends when the ELBO
    stops improving again, and at the latest after 20,000 steps. With ``steps``, the learning rate decays to 0 along a
    cosine. The weights are averaged over the last steps. At the end, the fit estimates the ELBOs of the averaged, the last
    and the first weights with fresh draws, and keeps the best weights. On fourteen posteriors of 3 to 26 latents,
    default fits of :class:`~pyro_genexact.guides.AutoFlow` took 900 to 2100 steps, which is 4 to 32 seconds on one CPU thread.

    Steps whose loss or gradient is not finite are skipped, including those where Pyro's validation raises for this reason.
    After ten skipped steps in a row, the fit returns to the averaged weights and multiplies the learning rate by 0.3. The fit
    restores torch's global random state and the train or eval mode of each submodule.

    The objective is a bound on log p(data), from draws z_i of the guide q with weights w_i = p(z_i) / q(z_i):

    - "elbo": the mean of log w_i. Its maximum is the minimum of KL(q | p). The guide tends to be too narrow.
    - "iwae": the mean of the log mean of w_i in groups of 8 draws, the bound of the importance weighted autoencoder. The guide
      covers more of the posterior.
    - "forward": the guide minimises KL(p | q), with expectations by normalised weights of all draws (reweighted wake-sleep); the
      reported bound is the log mean of w_i. The guide tends to be too wide, as a proposal should be. It needs a good start,
      such as that of Pathfinder: if a few weights are far larger than the others, their gradient is of little use.

    The last two need true weights, so subsampled plates and guides with ``poutine.scale`` raise a ValueError. "forward" needs
    at least two draws.

    With ``path_gradient``, the gradient with respect to the guide leaves out the dependence of log q on the guide's parameters
    at fixed draws ("sticking the landing" for "elbo", and the doubly reparameterised estimators for the others). It has no
    variance where q = p, and needs a second evaluation of log q. It is wrong at jumps of the log-probability; with hard
    constraints on latents, use "forward" and ``path_gradient=False``. For latents that are not reparameterised, the baseline of the
    score-function gradient is the bound of the other draws.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``.
        guide: a guide of its latents, called as ``guide(*args, **kwargs)``. The parameters of both are optimised, as in
            Pyro's SVI.
        args: arguments of model and guide.
        steps: the number of steps; by default the fit ends when the ELBO no longer improves.
        lr: the initial learning rate of Adam. An ``optimizer`` has its own learning rate.
        num_particles: the number of draws in each ELBO estimate, by default 256, or fewer, but at least 16, if the sites of
            model and guide have more than 4096 numbers. The fit first evaluates two draws both at
            once and separately. Each step is one pass in an outer plate if the log_probs agree. For models that loop over
            scalars, stack them or index plates from the left, it is one pass by ``torch.vmap``, without Pyro's validation. If
            the model cannot be mapped either, as it branches on values of latents, draws are evaluated one by one, by
            default 4, and a warning says so. If latents are enumerated, ``TraceEnum_ELBO`` evaluates the draws, in one pass if
            the model runs in an outer plate and has few numbers, else one by one, by default 16. A ``loss`` has its own number
            of draws.
        objective: "elbo", "iwae" or "forward", see above.
        path_gradient: whether gradients flow through the draws only, see above; by default for "iwae" and "forward".
        tempering: the number of first steps in which the log-probability of model and data is multiplied by a factor that
            grows from 0.01 to 1. The guide then starts wide, and can cover modes before they become separate. Use it with
            ``warm_start=0``, and compare several seeds, since it does not always find all modes.
        loss: a Pyro ELBO, instead of ``objective``, ``path_gradient`` and ``tempering``.
        optimizer: a function from the list of parameters to an optimizer, e.g. ``functools.partial(torch.optim.SGD, lr=1)``.
        max_grad_ratio: gradients are clipped to this multiple of their running average norm; ``math.inf`` turns clipping
            off.
        parameters: the parameters to optimise; by default all. The others do not change.
        seed: the seed of all draws.
        progress: whether to print the ELBO to stderr: as a bar in a terminal, elsewhere as about ten lines, and at least
            one line per minute.
        fabric: a Lightning Fabric with one device, whose precision is used; by default full precision on the device of
            model and guide.
        checkpoint: the path of a checkpoint file. If the process was killed, calling the fit again with the same arguments
            continues from this file and gives bitwise the same result as an uninterrupted fit (on a CPU with the same
            number of threads). The file contains Pyro's parameter store and the states of model and guide if they are
            modules.
        every: the number of steps between two checkpoints; by default they are a minute apart.
        compile: whether to record the operations of one step, and to take all later steps by ``torch.compile`` of this
            record, which takes up to a few minutes once. The first step is evaluated as without ``compile``, and the next
            two are recorded. Each step must do the same operations on tensors of the same shapes, as for Pyro's
            ``JitTrace_ELBO``: numbers and choices of Python code, including those of the random module, are those of the
            record. Tensors that the model reads must be the same in each step; only subsampled plates change rows.
            Later steps are not validated, and meanwhile validation is off in all threads. Random numbers differ from
            those without compilation. A ``loss`` must have the method ``differentiable_loss``.
        kwargs: keyword arguments of model and guide.

    Returns:
        The history of the fit. A KeyboardInterrupt also ends the fit with a result.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a wrong value, if both ``loss`` and another objective are given, if model and guide
            have no parameters, or if they do not have the same latents in every run (checked if Pyro's validation is on).
        NotImplementedError: if the distribution of a site has no ``log_prob``, such as a simulator at an observed site.
        FloatingPointError: if the loss or gradient of the first step is not finite, or if ten steps in a row are still not
            finite after the fit has returned to earlier weights three times. The message has the step and the sites.
        RuntimeError: with ``compile``, torch's errors if a step cannot be recorded or compiled, with a note. A ValueError
            says if two recorded steps differ.

    Cost: ``num_particles`` gradients of model and guide per step.

    Example:
        >>> import torch
        >>> import pyro, pyro_genexact as gx
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> guide = gx.guides.AutoFlow(model, hidden=(8,))
        >>> y = torch.tensor(2.0)
        >>> result = gx.fit_guide(model, guide, y, steps=300, lr=0.03, progress=False)
        >>> abs(result.final - dist.Normal(0.0, 2**0.5).log_prob(y).item()) < 0.1
        True
    """
    seed = checked_seed(seed)
    _check(model, guide, steps, lr, num_particles, loss, max_grad_ratio, every, compile)
    _check_objective(objective, path_gradient, tempering, loss, steps, compile)
    path = objective != "elbo" if path_gradient is None else path_gradient
    clock = Clock()
    modules = nn.ModuleList(part for part in (model, guide) if isinstance(part, nn.Module))
    device = device_of([*modules.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))])
    fabric = _on_one_device(fabric_of(fabric, device), device)
    parameters = None if parameters is None else [*parameters]
    settings = {
        "steps": steps, "lr": lr, "num_particles": num_particles, "max_grad_ratio": max_grad_ratio, "seed": seed,
        "objective": objective, "path_gradient": path, "tempering": tempering,
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
            loss = default_loss(*programs, num_particles, objective, path, tempering > 0)
        bound = Objective(loss, model, guide, args, kwargs, fabric.autocast, compile)
        descent = Descent(optimizer or partial(adam, lr=lr), parameters, max_grad_ratio)
        task = Variational(bound, descent, steps, device, modules, Interrupts(), tempering)
        ranks = Ranks(fabric)
        with Progress(task.total, "step", progress) as bar:
            file = Checkpoint(checkpoint, every, settings, ranks)
            stopped = Engine(ranks, device, clock, file, bar, task.interrupts).run(task)
    return GuideResult(task.elbo, task.final, clock.seconds, task.steps, stopped, task.skipped)


def _on_one_device(fabric: Any, device: torch.device) -> Any:
    if fabric.world_size > 1:
        raise ValueError(
            f"Expected fabric with one device (Pyro's ELBOs call backward themselves); got {fabric.world_size} processes."
        )
    if fabric.device.type != device.type:
        raise ValueError(f"Expected fabric on the device of model and guide, {device}; got {fabric.device}.")
    return fabric


def _described(
    model: Any, guide: Any, loss: Any, optimizer: Any, parameters: Any, fabric: Any, args: Any, kwargs: Any
) -> dict[str, Any]:
    """Returns descriptions of the other arguments, which a checkpoint compares with those of the fit that wrote it."""
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
    """Turns Pyro's warning that only model or only guide has a latent into an error, since the ELBO would be wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found (non-auxiliary )?vars in (model|guide) but not")
        try:
            yield
        except UserWarning as error:
            if not str(error).startswith("Found "):
                raise
            raise ValueError(f"Expected the same latents in every run of model and guide; {error}.") from error


def _records_its_loss(kind: type) -> bool:
    """Whether no base class defines the loss that is compiled if a class overrides the loss that is not."""
    defined = [
        [i for i, part in enumerate(kind.__mro__) if name in vars(part)]
        for name in ("loss_and_grads", "differentiable_loss", "_differentiable_loss_particle")
    ]
    plain, *compiled = (min(places, default=len(kind.__mro__)) for places in defined)
    return bool(defined[1]) and min(compiled) <= plain


def _check(
    model: Any,
    guide: Any,
    steps: Any,
    lr: float,
    num_particles: Any,
    loss: Any,
    ratio: float,
    every: Any,
    compile: Any,
) -> None:
    if not isinstance(compile, bool):
        raise TypeError(f"Expected compile to be True or False; got {compile!r}.")
    if compile and loss is not None and not _records_its_loss(type(loss)):
        raise ValueError(
            "Expected loss with a method differentiable_loss of the class that defines loss_and_grads (compile=True calls "
            f"the former); got {type(loss).__name__}."
        )
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise TypeError(f"Expected {name} to be callable; got {type(value).__name__}.")
    sizes = {"num_particles": num_particles, "steps": steps, "every": every}
    given = {name: value for name, value in sizes.items() if value is not None}
    check_sizes(1, **given)
    check_positive(lr=lr)
    if not ratio > 0:
        raise ValueError(f"Expected max_grad_ratio > 0; got {ratio}.")
    if loss is not None and not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"Expected loss to be a Pyro ELBO with a method loss_and_grads; got {type(loss).__name__}.")


def _check_objective(objective: Any, path: Any, tempering: Any, loss: Any, steps: int | None, compile: bool) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected objective to be one of {', '.join(map(repr, OBJECTIVES))}; got {objective!r}.")
    if path not in (None, False, True):
        raise TypeError(f"Expected path_gradient to be True, False or None; got {path!r}.")
    check_sizes(0, tempering=tempering)
    if steps is not None and tempering > steps:
        raise ValueError(f"Expected tempering <= steps; got {tempering} and {steps}.")
    if tempering and compile:
        raise ValueError(f"Expected tempering=0 with compile=True, which records one step; got {tempering}.")
    if loss is not None and (objective, path, tempering) != (OBJECTIVES[0], None, 0):
        raise ValueError(
            "Expected either loss or another objective, path_gradient or tempering; got "
            f"{type(loss).__name__} with {objective!r}, {path} and {tempering}."
        )
