"""Variational inference with defaults that fit: ``fit_guide`` and its ``GuideResult``."""

from __future__ import annotations

import math
import statistics
import time
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

from ..core.checks import check_sizes
from ..core.devices import device_of
from ..core.random import seeded
from .descent import Descent
from .elbo import Objective, default_loss
from .fitting import Progress, modes_kept
from .learning_rate import LearningRate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SKIPPED = 10  # non-finite steps in a row after which the fit goes back and on, more slowly,
BACK = 3  # so many times


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
    **kwargs: Any,
) -> GuideResult:
    """Maximises the ELBO of a Pyro model and its guide, in place, as SVI does, but to the end.

    With ``steps`` the learning rate goes to 0 along a cosine. Without, it drops whenever the ELBO is flat, three times, and
    then the fit ends, or after 20 000 steps. Weights are averaged over the last steps, and of the
    averages, the last and the first weights those with the best ELBO on fresh draws are kept. A step whose loss or gradient is
    not finite changes nothing; after ten in a row the fit goes back to the averages, and on with 0.3 times the learning rate. Torch's global random state and the modes of modules are left as they were.

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
        progress: shows the ELBO on stderr: a bar in a terminal, about ten lines elsewhere.

    Returns:
        The history; after a KeyboardInterrupt too.

    Raises:
        ValueError, TypeError: for an argument that does not fit, no parameters, or latents that only one of model and guide has,
            or that appear in some runs only (where Pyro's validation is on).
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
    _check(model, guide, steps, lr, num_particles, loss, max_grad_ratio)
    start = time.perf_counter()
    modules = nn.ModuleList(part for part in (model, guide) if isinstance(part, nn.Module))
    device = device_of([*modules.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))])
    with modes_kept(modules), seeded(seed, device), poutine.block(), torch.enable_grad(), _same_latents():
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            guide(*args, **kwargs)
        if loss is None:
            loss = default_loss(partial(model, *args, **kwargs), partial(guide, *args, **kwargs), num_particles)
        descent = Descent(optimizer or partial(torch.optim.Adam, lr=lr), parameters, max_grad_ratio)
        fit = _Fit(Objective(loss, model, guide, args, kwargs), descent, LearningRate(steps))
        with Progress(fit.rate.total, "step", progress) as bar:
            stopped = fit.run(bar)
        final = fit.keep_best()
    return GuideResult(fit.elbo, final, time.perf_counter() - start, len(fit.elbo), stopped, fit.skipped)


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


class _Fit:
    """What the parts of a fit do in each step and at the end; ``elbo`` and ``skipped`` are as in the result."""

    def __init__(self, objective: Objective, descent: Descent, rate: LearningRate) -> None:
        self.objective, self.descent, self.rate = objective, descent, rate
        self.elbo: list[float] = []
        self.skipped: dict[int, list[str]] = {}
        self.in_a_row = 0

    def run(self, bar: Progress) -> str:
        """Steps until the end; returns why it is the end."""
        try:
            for step in range(self.rate.total):
                self.step(step)
                bar.report(step + 1, lambda: f"ELBO {statistics.median(self.elbo[-bar.every :]):.3f} nats")
                if self.rate.improves(self.elbo):
                    self.descent.remember()
                if self.rate.flat:
                    return "flat"
            return "steps"
        except KeyboardInterrupt:
            return "interrupted"

    def step(self, step: int) -> None:
        state = torch.get_rng_state()
        self.descent.clear()
        try:
            loss, found = self.objective.gradients()
        except ValueError as error:  # validate_args met NaN parameters or a value outside the support: say when
            raise ValueError(f"{error}\nMet at step {step}.") from error
        self.descent.meet(found)
        gradients = self.descent.gradients()
        if not step and not gradients:
            raise ValueError(
                f"Expected parameters that the loss depends on; got none of {[*self.descent.names.values()]}. Does Pyro's store "
                "have others of these names? pyro.clear_param_store() empties it."
            )
        norm = nn.utils.get_total_norm([gradient for _, gradient in gradients]).item()
        self.elbo.append(-loss)
        if not math.isfinite(loss + norm):
            self.skip(step, state, loss, norm)
            return
        self.in_a_row = 0
        self.descent.step(self.rate.factor(step), norm, self.rate.weight(step))

    def skip(self, step: int, state: Tensor, loss: float, norm: float) -> None:
        """Notes where a step was not finite; goes back, or raises a FloatingPointError, if that is all there is."""
        what, got = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        where = self.objective.non_finite_sites(state) if what == "loss" else []
        where = where or [name for name, grad in self.descent.gradients() if not grad.isfinite().all()]
        self.skipped[step] = where
        self.in_a_row += 1
        lost = self.in_a_row == SKIPPED
        if step == 0 or (lost and self.descent.went_back == BACK):
            raise FloatingPointError(f"Expected a finite {what}; got {got} at step {step}, at {where}.")
        if lost:
            self.descent.go_back()
            self.in_a_row = 0

    def keep_best(self) -> float:
        """Loads the best weights by some hundred fresh draws, the same for all; returns their ELBO."""
        if not self.descent.average:
            return -math.inf
        seed = int(torch.randint(2**31, (), device="cpu"))
        particles = getattr(self.objective.loss, "num_particles", 1)
        repeats = max(8, min(64, 256 // particles, len(self.elbo) // 10))
        return self.descent.keep_best(lambda: self.objective.elbo(seed, repeats))


def _check(model: Any, guide: Any, steps: Any, lr: float, num_particles: int, loss: Any, ratio: float) -> None:
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise TypeError(f"Expected {name} to be callable; got {type(value).__name__}.")
    check_sizes(1, num_particles=num_particles, **({} if steps is None else {"steps": steps}))
    if not 0 < lr < math.inf:
        raise ValueError(f"Expected lr positive and finite; got {lr}.")
    if not ratio > 0:
        raise ValueError(f"Expected max_grad_ratio > 0; got {ratio}.")
    if loss is not None and not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"Expected loss to be a Pyro ELBO, with loss_and_grads; got {type(loss).__name__}.")
