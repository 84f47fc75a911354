"""Variational inference with defaults that fit: ``fit_guide`` and its ``GuideResult``."""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..core.checks import check_sizes
from .elbo import default_loss
from .fit import _state_kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WARM = 100  # first steps, over which the learning rate rises; at most a tenth of them
WINDOW = 250  # steps over which ELBOs and weights are averaged
PATIENCE = 3  # windows without a better ELBO after which the learning rate drops
DROPS = (1.0, 0.3, 0.1, 0.03)  # of the learning rate; after the last the ELBO is flat
LONGEST = 20_000  # steps, unless the user says how many
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
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
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
    with (
        _state_kept(modules, seed, _device(modules, args, kwargs)),
        poutine.block(),
        torch.enable_grad(),
        _same_latents(),
    ):
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            guide(*args, **kwargs)
        loss = default_loss(model, guide, args, kwargs, num_particles) if loss is None else loss
        run = _Run(model, guide, args, kwargs, loss, parameters, optimizer or partial(torch.optim.Adam, lr=lr))
        bar = tqdm(total=steps or LONGEST, unit="step", disable=not (progress and sys.stderr.isatty()))
        with bar:
            stopped = _loop(run, steps, max_grad_ratio, bar, progress)
        final = run.keep_best()
    return GuideResult(run.elbo, final, time.perf_counter() - start, len(run.elbo), stopped, run.skipped)


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


def _loop(run: _Run, steps: int | None, ratio: float, bar: tqdm[Any], progress: bool) -> str:
    """Steps until the end; returns why it is the end."""
    total, drop, best, waited = steps or LONGEST, 0, -math.inf, 0
    try:
        for step in range(total):
            factor = DROPS[drop] if steps is None else 0.5 * (1 + math.cos(math.pi * step / steps))
            factor *= min(1.0, (step + 1) / min(WARM, total / 10))
            run.step(factor, ratio, WINDOW if steps is None else max(1, min(WINDOW, steps // 10)))
            if progress:
                _report(bar, run.elbo, step + 1)
            if (step + 1) % WINDOW:
                continue
            middle, error = _middle(run.elbo[-WINDOW:])
            waited = 0 if middle > best + error else waited + 1
            if middle > best:
                best = middle
                run.remember()
            if waited >= PATIENCE and steps is None:
                waited, drop = 0, drop + 1
                if drop == len(DROPS):
                    return "flat"
        return "steps"
    except KeyboardInterrupt:
        return "interrupted"


class _Run:
    """The weights that change, their averages, and what was seen on the way."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        loss: Any,
        parameters: Iterable[Tensor] | None,
        optimizer: Callable[[list[Tensor]], Optimizer],
    ) -> None:
        self.model, self.guide, self.args, self.kwargs, self.loss = model, guide, args, kwargs, loss
        self.allowed = None if parameters is None else set(parameters)
        self.make_optimizer = optimizer
        self.optimizer: Optimizer | None = None
        self.names: dict[Tensor, str] = {}
        self.start: dict[Tensor, Tensor] = {}
        self.average: dict[Tensor, Tensor] = {}
        self.best: dict[Tensor, Tensor] = {}
        self.usual_norm = math.nan
        self.elbo: list[float] = []
        self.skipped: dict[int, list[str]] = {}
        self.in_a_row = self.went_back = 0

    def step(self, factor: float, ratio: float, window: int) -> None:
        number, state = len(self.elbo), torch.get_rng_state()
        for p in self.names:
            p.grad = None
        try:
            with poutine.trace(param_only=True) as capture:
                value = _number(self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs))
        except ValueError as error:  # validate_args met NaN parameters or a value outside the support: say when
            raise ValueError(f"{error}\nMet at step {number}.") from error
        self._find(capture.trace)
        params = [p for p in self.names if p.grad is not None]
        if not number and not params:
            raise ValueError(
                f"Expected parameters that the loss depends on; got none of {[*self.names.values()]}. Does Pyro's store have "
                "others of these names? pyro.clear_param_store() empties it."
            )
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]).item()
        self.elbo.append(-value)
        if not math.isfinite(value + norm):
            self._skip(number, state, value, norm)
            return
        self.in_a_row = 0
        if norm > ratio * self.usual_norm:
            nn.utils.clip_grads_with_norm_(params, ratio * self.usual_norm, torch.as_tensor(norm))
            norm = ratio * self.usual_norm
        self.usual_norm = norm if math.isnan(self.usual_norm) else 0.98 * self.usual_norm + 0.02 * norm
        self._update(factor, max(1 / (number + 1), 1 / window))

    def remember(self) -> None:
        """Keeps the averages as the best so far."""
        self.best = {p: value.clone() for p, value in self.average.items()}

    def keep_best(self) -> float:
        """Loads the weights, of the averages, the remembered and the last ones, with the best ELBO; returns it.

        Those of the start if they are better by more than chance: losses need not tell of each improvement.
        """
        if not self.average:
            return -math.inf
        seed = int(torch.randint(2**31, (), device="cpu"))
        states = [{p: p.detach().clone() for p in self.average}, self.average, self.best, self.start]
        scores = []
        for state in filter(None, states):
            _load(state)
            scores.append((*self._score(seed), state))
        *others, (first, error, _) = scores
        score, _, state = max(others, key=lambda one: one[0])
        if first - 2 * error > score:
            score, state = first, self.start
        _load(state)
        for p in self.names:
            p.grad = None
        return score

    @torch.no_grad()
    def _score(self, seed: int) -> tuple[float, float]:
        """The mean of estimates by some hundred draws, -inf if it is not finite, and its standard error."""
        torch.default_generator.manual_seed(seed)
        repeats = max(8, min(64, 256 // getattr(self.loss, "num_particles", 1), len(self.elbo) // 10))
        values = [_number(self.loss.loss(self.model, self.guide, *self.args, **self.kwargs)) for _ in range(repeats)]
        mean = -statistics.fmean(values)
        return (mean, statistics.stdev(values) / math.sqrt(repeats)) if math.isfinite(mean) else (-math.inf, 0.0)

    def _find(self, trace: Any) -> None:
        """Adds the parameters not met before."""
        store: Any = pyro.get_param_store()  # where averages that serve as baselines are replaced in each step
        values = {n: site["value"].unconstrained() for n, site in trace.nodes.items() if site["type"] == "param"}
        found = {p: n for n, p in values.items() if n not in store or store[n].unconstrained() is p}
        for part in (self.model, self.guide):
            # of two modules with the same name Pyro's store knows one
            found |= {p: found.get(p, name) for name, p in _named_parameters(part) if p.requires_grad}
        new = [p for p in found if p not in self.names and (self.allowed is None or p in self.allowed)]
        if not new and not self.names:
            raise ValueError("Expected model or guide to have parameters; got none.")
        self.names |= {p: found[p] for p in new}
        self.start |= {p: p.detach().clone() for p in new}
        for p in found.keys() - self.names.keys():
            p.grad = None
        if new and self.optimizer is None:
            self.optimizer = self.make_optimizer(new)
        elif new:
            self.optimizer.add_param_group({"params": new})  # type: ignore[union-attr]

    def _update(self, factor: float, weight: float) -> None:
        for group in self.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = factor * 0.3**self.went_back * group.setdefault("initial_lr", group["lr"])
        self.optimizer.step()  # type: ignore[union-attr]
        with torch.no_grad():
            for p in self.names:
                self.average.setdefault(p, p.detach().clone()).lerp_(p, weight)

    def _skip(self, number: int, state: Tensor, value: float, norm: float) -> None:
        """Notes where a step was not finite; goes back, or raises a FloatingPointError, if that is all there is."""
        what, got = ("gradient", norm) if math.isfinite(value) else ("loss", value)
        where = self._sites(state) if what == "loss" else []
        where = where or [n for p, n in self.names.items() if p.grad is not None and not p.grad.isfinite().all()]
        self.skipped[number] = where
        self.in_a_row += 1
        lost = self.in_a_row == SKIPPED
        if number == 0 or (lost and self.went_back == BACK):
            raise FloatingPointError(f"Expected a finite {what}; got {got} at step {number}, at {where}.")
        if lost:
            self._go_back()

    def _go_back(self) -> None:
        """To the best or average weights, with a lower learning rate."""
        _load(self.best or self.average)
        self.optimizer.state.clear()  # type: ignore[union-attr]
        self.in_a_row, self.went_back = 0, self.went_back + 1

    @torch.no_grad()
    def _sites(self, state: Tensor) -> list[str]:
        """The sites whose log_prob is not finite, with the same draws."""
        torch.set_rng_state(state)
        if not hasattr(self.loss, "_get_traces"):
            return []
        found: dict[str, None] = {}
        for traces in self.loss._get_traces(self.model, self.guide, self.args, self.kwargs):
            for of, trace in zip(("model", "guide"), traces, strict=True):
                trace.compute_log_prob()
                sites = ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" in s)
                found |= {f"{n} ({of})": None for n, s in sites if not s["log_prob"].isfinite().all()}
        return list(found)


def _named_parameters(part: Any) -> Iterator[tuple[str, Tensor]]:
    return part.named_parameters() if isinstance(part, nn.Module) else iter(())


def _load(state: dict[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for p, value in state.items():
            p.copy_(value)


def _number(loss: Any) -> float:
    """A loss as a number; of two, as ``ReweightedWakeSleep`` has, the model's: minus the importance-weighted bound."""
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _middle(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, whatever the tails."""
    ranked = sorted(x if math.isfinite(x) else -math.inf for x in values)
    low, high = ranked[len(ranked) // 4], ranked[3 * len(ranked) // 4]
    return statistics.median(ranked), 0.93 * (high - low) / math.sqrt(len(ranked))


def _device(modules: nn.Module, args: Any, kwargs: dict[str, Any]) -> torch.device:
    tensors = [*modules.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))]
    return tensors[0].device if tensors else torch.get_default_device()


def _report(bar: tqdm[Any], elbo: list[float], done: int) -> None:
    """Moves the bar, or, where stderr is no terminal, prints about ten lines in all."""
    every = max(1, int(bar.total or 0) // (100 if not bar.disable else 10))
    if done % every and done != bar.total:
        return
    text = f"ELBO {statistics.median(elbo[-every:]):.3f} nats"
    if bar.disable:
        print(f"{done}/{bar.total} steps: {text}", file=sys.stderr, flush=True)
    else:
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)


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
