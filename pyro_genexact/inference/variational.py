"""The task that the engine runs for ``fit_guide``: steps of variational inference."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..core.random import random_state, set_random_state
from .bounds import Bound
from .descent import Descent
from .elbo import FAILURES, Objective
from .engine import Interrupts
from .learning_rate import WARM, LearningRate

WINDOWS = 50, 250  # least and most steps over which ELBOs and weights are averaged
WINDOW_DRAWS = 12_800  # draws in these steps, if that is possible
HOT = 0.01  # power of the log-probability of the model in the first step of a tempered fit
PATIENCE = 3  # windows without a better ELBO after which the learning rate drops
DROPS = (1.0, 0.3, 0.1, 0.03)  # factors of the learning rate; the fit ends after the last
LONGEST = 20_000  # maximum number of steps, unless the user gives one
SKIPPED = 10  # non-finite steps in a row after which the fit returns to earlier weights with a lower learning rate
BACK = 3  # maximum number of such returns
LONG = 120.0  # expected seconds from which a fit is called long
DRY = 100  # maximum number of runs of model and guide to find the parameters of a checkpoint
PLAIN = ("best", "elbo", "skipped", "in_a_row", "final", "stopped")  # attributes that are saved in checkpoints


class Variational:
    """Maximises an ELBO step by step; a task for the engine. ``elbo`` and ``skipped`` are those of the result.

    Args:
        objective: the ELBO.
        descent: the optimizer.
        steps: the number of steps, or None.
        device: the device of the draws.
        modules: model and guide, if they are modules.
        interrupts: signals that are delayed during each update.
        tempering: the number of first steps with a tempered posterior, which do not count as the best.
    """

    def __init__(
        self,
        objective: Objective,
        descent: Descent,
        steps: int | None,
        device: torch.device,
        modules: nn.Module,
        interrupts: Interrupts,
        tempering: int = 0,
    ) -> None:
        self.tempering = tempering
        self.objective, self.descent, self.device, self.modules = objective, descent, device, modules
        self.interrupts = interrupts
        self.total = steps or LONGEST
        self.particles = getattr(objective.loss, "num_particles", 1)
        self.read_every = max(WINDOWS[0], min(WINDOWS[1], WINDOW_DRAWS // self.particles))
        self.window = self.read_every if steps is None else max(1, min(self.read_every, steps // 10))
        self.adaptive = steps is None
        self.rate = LearningRate(WARM, DROPS, 0.0) if self.adaptive else LearningRate(WARM, (1.0,), 1.0)
        self.best = -math.inf
        self.elbo: list[float] = []
        self.skipped: dict[int, list[str]] = {}
        self.in_a_row = 0
        self.final = math.nan
        self.stopped: str | None = None
        self.start, self.before = time.perf_counter(), 0  # when this process took its first step, and the steps before
        self.expected: float | None = None  # seconds that are left at the first report, if all steps are taken

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return len(self.elbo)

    @property
    def done(self) -> float:
        """The number of steps so far."""
        return self.steps

    def step(self) -> None:
        """Takes a step, or skips it if its loss or gradient is not finite."""
        if self.tempering:
            self.objective.loss.power = HOT ** max(0.0, 1 - self.steps / self.tempering)
        state = random_state(self.device)
        loss, norm = self._gradients(state)

        def count() -> None:
            step = self.steps
            if math.isfinite(loss + norm):
                self.in_a_row = 0
                self.descent.step(self.rate.factor(step, step / self.total), norm, max(1 / (step + 1), 1 / self.window))
            else:
                self._skip(step, state, loss, norm)
            self.elbo.append(-loss)
            self._end_window()

        with self.interrupts.held():
            count()

    def _end_window(self) -> None:
        if self.steps % self.read_every == 0 and self.steps >= self.tempering + self.read_every:
            middle, error = _middle(self.elbo[-self.read_every :])
            if self.adaptive:
                self.rate.read(middle > self.best + error, 1 / PATIENCE)
            if middle > self.best:
                self.best = middle
                self.descent.remember()
        self.stopped = "flat" if self.rate.flat else "steps" if self.steps == self.total else None

    def _gradients(self, state: list[Tensor]) -> tuple[float, float]:
        """Sets the gradients; returns the loss and their norm."""
        try:
            return self._evaluate()
        except FAILURES as error:
            # from validate_args: NaN parameters (after steps that are far too long) or a value outside the support
            set_random_state(state, self.device)
            loss = math.nan if self.steps and self._lost() else 0.0
            if math.isfinite(loss):
                error.add_note(f"Raised at step {self.steps}.")
                raise
            return loss, math.nan

    def _lost(self) -> bool:
        """Returns whether loss or gradients are not finite if Pyro validates nothing."""
        try:
            with pyro.validation_enabled(False):
                return not math.isfinite(sum(self._evaluate()))
        except FAILURES:
            return not all(bool(p.isfinite().all()) for p in self.descent.names)

    def _evaluate(self) -> tuple[float, float]:
        self.descent.clear()
        loss, found = self.objective.gradients()
        self.descent.meet(found)
        gradients = self.descent.gradients()
        if not self.steps and not gradients:
            raise ValueError(
                f"Expected the loss to depend on parameters; it depends on none of {[*self.descent.names.values()]}. If Pyro's "
                "parameter store has others of the same names, call pyro.clear_param_store() first."
            )
        return loss, nn.utils.get_total_norm([gradient for _, gradient in gradients]).item()

    def _skip(self, step: int, state: list[Tensor], loss: float, norm: float) -> None:
        """Stores where a step was not finite; returns to earlier weights or raises after too many of these steps."""
        what, got = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        set_random_state(state, self.device)
        where = self.objective.non_finite_sites() if what == "loss" else []
        where = where or [name for name, grad in self.descent.gradients() if not grad.isfinite().all()]
        self.skipped[step] = where
        self.in_a_row += 1
        if self.in_a_row == SKIPPED:
            now = random_state(self.device)
            self.descent.go_back(lambda: math.isfinite(self.objective.elbo(step, 2)[0]))
            set_random_state(now, self.device)
            self.in_a_row = 0
        if step == 0 or self.descent.went_back > BACK:
            raise FloatingPointError(f"Expected a finite {what}; got {got} at step {step}, at {where}.")

    def finish(self, hurry: bool) -> None:
        """Loads the weights with the best ELBO on a few hundred fresh draws, the same for all, and stores this ELBO."""
        if not math.isnan(self.final):
            return
        if self.tempering:
            self.objective.loss.power = 1.0
        if not self.descent.average:
            self.final = -math.inf
            return
        seed = int(torch.randint(2**31, (), device="cpu"))
        repeats = 2 if hurry else max(8, min(64, 256 // self.particles, self.steps // 10))
        self.final, start = self.descent.keep_best(lambda: self.objective.elbo(seed, repeats))
        if start is not None and self.final > start + 1:
            warnings.warn(
                f"The fit ended with an ELBO of {start:.4g} nats, below the initial {self.final:.4g} nats; the initial weights "
                "are kept. Try a smaller lr.",
                stacklevel=6,
            )

    # --- checkpoints and progress -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns the state on which later steps depend, without torch's random state."""
        store: Any = pyro.get_param_store()
        return {
            "modules": self.modules.state_dict(),
            "store": {name: value.detach() for name, value in store._params.items()},
            "descent": self.descent.state_dict(),
            "rate": self.rate.state_dict(),
            "plain": {name: getattr(self, name) for name in PLAIN},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state; first runs model and guide until they have created its parameters."""
        found: dict[Tensor, str] = {}
        wanted = [name for group in state["descent"]["groups"] for name in group]
        for _ in range(DRY):
            found |= self.objective.gradients()[1]
            if all(list(found.values()).count(name) >= wanted.count(name) for name in wanted):
                break
        else:
            raise ValueError(
                f"Expected model and guide to have the parameters of the checkpoint, {wanted}; got {[*found.values()]}."
            )
        shapes, old = (
            {name: tuple(getattr(x, "shape", ())) for name, x in values.items()}
            for values in (self.modules.state_dict(), state["modules"])
        )
        if shapes != old:
            raise ValueError(f"Expected model and guide to have the shapes of the checkpoint, {old}; got {shapes}.")
        self.modules.load_state_dict(state["modules"])
        store: Any = pyro.get_param_store()
        with torch.no_grad():
            for name, value in state["store"].items():
                if name in store._params:
                    store._params[name].copy_(value)
                else:
                    pyro.param(name, value)
        self.descent.load_state_dict(state["descent"], found)
        self.rate.load_state_dict(state["rate"])
        for name, value in state["plain"].items():
            setattr(self, name, value)
        self.start, self.before = time.perf_counter(), self.steps

    def text(self) -> str:
        """Returns the median ELBO of the last steps; the first time also how long a long fit takes, and why."""
        text = f"ELBO {statistics.median(self.elbo[-max(1, self.total // 10) :]):.3f} nats"
        if self.expected is None:
            seconds = (time.perf_counter() - self.start) / max(1, self.steps - self.before)
            self.expected = (self.total - self.steps) * seconds
            if self.expected > LONG:
                loss = self.objective.loss
                together = (
                    loss.draws.way != "alone" if isinstance(loss, Bound) else getattr(loss, "vectorize_particles", True)
                )
                one_by_one = self.particles > 1 and not together
                why = ", as draws are evaluated one by one" if one_by_one else ""
                text += f"; a step takes {seconds:.2g} s{why}, and all steps at most {self.expected / 60:.0f} min more"
        return text


def _middle(values: list[float]) -> tuple[float, float]:
    """Returns the median and its standard error, from the quartiles, which is robust to heavy tails."""
    ranked = sorted(x if math.isfinite(x) else -math.inf for x in values)
    low, high = ranked[len(ranked) // 4], ranked[3 * len(ranked) // 4]
    return statistics.median(ranked), 0.93 * (high - low) / math.sqrt(len(ranked))
