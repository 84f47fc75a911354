"""Simulations of a model with posterior draws given each of them, for checks of calibration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ..core.checks import check_sizes
from ..simulation.latent_sites import OnlySites
from ..simulation.simulations import ResampleObserved, kept_rows, simulate, traced
from .guide_draws import draw, latents

Values = dict[str, Tensor]
STACK = 5  # from a warning here to the user: this function, its caller, sbc_ranks or tarp, and their wrapper no_grad
LARGEST = 2**15  # elements of latents that are drawn at once: memory is bounded, and the networks stay in the cache


@dataclass
class Simulated:
    """N simulations of a model and S posterior draws given each.

    Attributes:
        truth: the simulated latents, (N, ...) by name.
        data: the simulated observations, (N, ...) by name.
        posterior: a function from the data of n simulations, (n, ...) by name, to S draws (S, n, ...) of each latent.
        num_samples: S.
        at_once: the number of simulations to pass to ``posterior``.
    """

    truth: Values
    data: Values
    posterior: Callable[[Values], Mapping[str, Tensor]]
    num_samples: int
    at_once: int

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        posterior: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observed: str | Sequence[str] | None,
        num_simulations: int,
        num_samples: int,
        vectorize: bool | None,
    ) -> Simulated:
        """Simulates the model. An object with ``draws`` is asked for many posteriors at once, others for one."""
        check_sizes(1, num_simulations=num_simulations, num_samples=num_samples)
        observed = getattr(posterior, "observed", None) if observed is None else observed
        if observed is None:
            raise ValueError("Expected observed to be the names of the observed sites; got None.")
        names = [observed] if isinstance(observed, str) else list(observed)
        batched = hasattr(posterior, "draws")
        of_model, of_posterior = _accepted(model, kwargs), {} if batched else _accepted(posterior, kwargs)
        if unknown := sorted(kwargs.keys() - of_model.keys() - of_posterior.keys()):
            raise TypeError(f"Expected keyword arguments of the model or the posterior; neither takes {unknown}.")
        program = OnlySites(None)(partial(model, *args, **of_model))  # factors raise an error
        chosen = getattr(posterior, "chosen", None)  # the latents of an amortised guide of some of them
        of_truth = [name for name in _latents(traced(program), names) if chosen is None or name in chosen]
        seed = int(torch.randint(2**31, (), device="cpu"))
        found = simulate(
            program, [*of_truth, *names], num_simulations, seed=seed, vectorize=vectorize, stacklevel=STACK
        )
        if batched:
            found = _usable(found, posterior, names)
            size = sum(found[name][0].numel() for name in of_truth) * num_samples
            one, at_once = partial(posterior.draws, num=num_samples), max(1, LARGEST // max(1, size))
        else:
            shapes = {name: (num_samples, *found[name].shape[1:]) for name in of_truth}
            one = partial(_one, model, posterior, args, of_model, of_posterior, shapes)
            at_once = 1
        truth, data = {name: found[name] for name in of_truth}, {name: found[name] for name in names}
        return cls(truth, data, one, num_samples, at_once)

    def __iter__(self) -> Iterator[tuple[Values, Values, Values]]:
        """Yields latents (n, ...), data (n, ...) and draws (S, n, ...) of a few simulations at a time."""
        size = len(next(iter(self.truth.values())))
        for start in range(0, size, self.at_once):
            truth, data = ({n: x[start : start + self.at_once] for n, x in v.items()} for v in (self.truth, self.data))
            with warnings.catch_warnings():  # among N simulations of the model, some are unlike those of a fit
                warnings.filterwarnings("ignore", ".* less probable than all of ")
                draws = self.posterior(data)
            draws = _checked(draws, {name: (self.num_samples, *value.shape) for name, value in truth.items()})
            device = draws[next(iter(truth))].device
            truth, data = ({n: x.to(device) for n, x in values.items()} for values in (truth, data))
            yield truth, data, {name: value.detach() for name, value in draws.items()}


def rank(name: str, truth: Tensor, draws: Tensor) -> Tensor:
    """Returns the number of draws (S, ...) below the truth (...); a random number of the draws equal to it counts.

    Raises:
        ValueError: for NaN, which has no rank.
    """
    if truth.isnan().any() or draws.isnan().any():
        raise ValueError(f"Expected {name!r} without NaN, which has no rank; got NaN.")
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    spread = torch.rand(equal.shape, dtype=torch.float64, device=equal.device) * (equal + 1)
    return below + torch.minimum(spread.long(), equal)


def _usable(found: Values, posterior: Any, observed: list[str]) -> Values:
    """Returns the simulations without NaN or infinity, or those with observations that the posterior can read."""
    usable = {name: x.reshape(len(x), -1).isfinite().all(1) for name, x in found.items()}
    if hasattr(posterior, "usable"):
        usable = {name: x for name, x in usable.items() if name not in observed}
        usable["observations"] = posterior.usable({name: found[name] for name in observed})
    kept = kept_rows(usable, STACK + 1)
    return {name: x[kept.to(x.device)] for name, x in found.items()}


def _latents(trace: Any, observed: list[str]) -> list[str]:
    """Returns the names of the latents of a trace in which observed sites were sampled."""
    names = list(latents(trace))
    if unknown := [name for name in observed if name not in trace.nodes]:
        raise ValueError(f"Expected observed to be sites of the model, {names}; got {unknown}.")
    rest = [name for name in names if name not in observed]
    if unnamed := [name for name in rest if trace.nodes[name]["infer"].get("was_observed")]:
        raise ValueError(
            f"Expected observed to name all observed sites of the model; got {observed} without {unnamed}."
        )
    if not rest:
        raise ValueError("Expected a model with latents; got only observed sites.")
    return rest


def _one(
    model: Any,
    posterior: Any,
    args: Any,
    of_model: Any,
    kwargs: Any,
    shapes: Mapping[str, tuple[int, ...]],
    data: Values,
) -> Mapping[str, Tensor]:
    """Returns draws (S, 1, ...) given the data of one simulation, (1, ...) by name."""
    data, num_samples = {name: value[0] for name, value in data.items()}, next(iter(shapes.values()))[0]
    parameters = _parameters(posterior)
    given, named = _with_data(parameters, args, kwargs, data)
    if "num_samples" in parameters:
        with torch.enable_grad():  # for samplers that follow gradients
            draws: Mapping[str, Tensor] = posterior(*given, **named, num_samples=num_samples)
    else:
        conditioned = partial(poutine.condition(ResampleObserved()(model), data=data), *args, **of_model)
        draws = draw(conditioned, partial(posterior, *given, **named), (), {}, num_samples).draws
    return {name: value.unsqueeze(1) for name, value in _checked(draws, shapes).items()}


def _checked(draws: Any, shapes: Mapping[str, tuple[int, ...]]) -> Values:
    """Returns the draws of the latents as tensors of these shapes; NumPy arrays are converted."""
    if not isinstance(draws, Mapping):
        raise TypeError(f"Expected draws to be a dict by latent; got {type(draws).__name__}.")
    found = {name: torch.as_tensor(draws[name]) for name in shapes if name in draws}
    for name, shape in shapes.items():
        if name not in found or found[name].shape != shape:
            got = tuple(found[name].shape) if name in found else "none"
            raise ValueError(f"Expected draws of {name!r} of shape {shape}; got {got}.")
    return found


def _parameters(program: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program).parameters
    except ValueError:  # callables without a signature, such as a function wrapped by a poutine handler
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _accepted(program: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a program takes: those in its signature, or all if it has ``**kwargs``."""
    parameters = _parameters(program)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in kwargs.items() if name in named}


def _with_data(
    parameters: Mapping[str, inspect.Parameter], args: Any, kwargs: Any, data: Values
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with the data in them, which replace arguments of the same name, also positional ones."""
    places = list(parameters)
    given, rest = list(args), dict(data)
    for name in data:
        if name in places and places.index(name) < len(given):
            given[places.index(name)] = rest.pop(name)
    return tuple(given), kwargs | rest
