"""Calibration: probability integral transforms (pit) and ranks of simulated truths (SBC)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from ..autoregressive.site_by_site import ChainRuleDistribution
from ..core.checks import check_sizes
from ..families.cdf import probability_integral
from . import arviz_compat
from .guide_draws import ResampleObserved, draw, latents


def pit(d: Distribution, value: Tensor) -> Tensor:
    """Probability integral transforms (*sample, *batch, *event): independent uniforms if the values come from d.

    Of an autoregressive model or a sequence the conditional cdfs u_t = F_t(y_t | y_<t) in the model's order, of a discrete
    one randomised: F_t(y_t - 1) + v p_t(y_t). Of a univariate or elementwise family its cdf. Of a flow over vectors the
    cdfs of its base at the inverse image: also independent uniforms, but number i belongs to *coordinate i of the base*,
    which is no variable of the data: a deviation there says that the flow is wrong, not where. Padding has NaN.

    Values that the model was fitted to look better than they are: take rows kept aside.

    Args:
        d: the distribution.
        value: (*sample, *batch, *event).

    Raises:
        NotImplementedError: for a family without a cdf, or a vector family that is none of these.

    Reference: Rosenblatt, "Remarks on a multivariate transformation", 1952; Smith, "Diagnostic checks of non-standard time
    series models", 1985.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> pit(dist.LogNormal(torch.zeros(2), 1.0).to_event(1), torch.tensor([1.0, 2.0]))
        tensor([0.5000, 0.7559])
    """
    while isinstance(d, Independent):
        d = d.base_dist
    if isinstance(d, MaskedDistribution):
        u = pit(d.base_dist, value)
        mask = torch.as_tensor(d._mask, device=u.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * d.base_dist.event_dim), u, torch.nan)
    if isinstance(d, ChainRuleDistribution):
        return d.to_uniform(value)
    if isinstance(d, TransformedDistribution) and d.event_shape:
        for transform in reversed(d.transforms):
            value = transform.inv(value)
        return pit(d.base_dist, value)
    return probability_integral(d, value)


@torch.no_grad()
def sbc_ranks(
    model: Callable[..., Any],
    posterior: Callable[..., Any],
    *args: Any,
    observed: str | Sequence[str],
    num_simulations: int = 200,
    num_samples: int = 99,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Simulation-based calibration: ranks (num_simulations, ...) of true latents among draws of their posterior.

    Each simulation draws latents and data from the model, then the posterior given these data. The rank of a latent is
    the number of its draws below it, uniform on 0 ... num_samples if the posterior is exact (ties, as of discrete
    latents, are broken at random). Uniform ranks are necessary, not sufficient: the prior itself passes, which has learned nothing.
    Ranks piled at both ends show a posterior too narrow, in the middle too wide, at one end biased.

    Args:
        model: called as ``model(*args, **kwargs)``; its observed sites are drawn anew.
        posterior: a guide, amortised over the data; or a function with an argument ``num_samples`` that returns draws
            {name: (num_samples, ...)}. Both are called as the model is, with the simulated data as arguments by the
            names of the sites in ``observed``.
        args: of model and posterior.
        observed: names of the sites that are data, which are arguments of the posterior too.
        num_simulations: N.
        num_samples: draws of each posterior.
        kwargs: keyword arguments; model and posterior each get those in their signature, or all if they have ``**kwargs``.

    Raises:
        TypeError: if neither model nor posterior takes a keyword argument.
        NotImplementedError: if the posterior is a guide, which needs the ``log_prob`` of each site, and a site of the
            model has none (a simulator). A function with an argument ``num_samples`` does not need it.
        ValueError: for names in ``observed`` that are no sites of the model, latents that the posterior does not
            draw, or draws of the wrong shape, and as :func:`psis`.

    Reference: Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", 2018; Modrák et
    al., "Simulation-based calibration checking for Bayesian computation", Bayesian Analysis 2023.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> ranks = sbc_ranks(model, guide, observed="y", num_simulations=50)["mu"]
        >>> ranks.shape, bool((ranks >= 0).all() and (ranks <= 99).all())
        (torch.Size([50]), True)
    """
    check_sizes(1, num_simulations=num_simulations, num_samples=num_samples)
    data_names = [observed] if isinstance(observed, str) else list(observed)
    of_model, of_posterior = _accepted(model, kwargs), _accepted(posterior, kwargs)
    if unknown := sorted(kwargs.keys() - of_model.keys() - of_posterior.keys()):
        raise TypeError(f"Expected keyword arguments of the model or the posterior; neither takes {unknown}.")
    ranks: dict[str, list[Tensor]] = {}
    for _ in range(num_simulations):
        trace: Any = poutine.trace(ResampleObserved()(model)).get_trace(*args, **of_model)
        truth = _truth(trace, data_names)
        data = {name: trace.nodes[name]["value"] for name in data_names}
        conditioned = partial(poutine.condition(ResampleObserved()(model), data=data), *args, **of_model)
        draws = _draws(conditioned, posterior, args, of_posterior, data, num_samples)
        for name, value in truth.items():
            if name not in draws or draws[name].shape != (num_samples, *value.shape):
                got = tuple(draws[name].shape) if name in draws else "none"
                raise ValueError(f"Expected draws of {name!r} of shape {(num_samples, *value.shape)}; got {got}.")
            ranks.setdefault(name, []).append(_rank(value, draws[name]))
    return {name: torch.stack(rows) for name, rows in ranks.items()}


def plot_uniformity(uniforms: Mapping[str, Tensor] | Tensor, num_samples: int | None = None, **options: Any) -> Any:
    """Plots the difference between the empirical cdf of numbers and the cdf of the uniform distribution.

    ArviZ draws the plot. In 0.x it has a simultaneous band, which the curve of uniform numbers leaves with a probability of
    6% (``ci_prob=0.94``). ArviZ 1.x prints the p-value of a test of uniformity in its place.

    Args:
        uniforms: of :func:`pit`, or ranks of :func:`sbc_ranks`; one panel for each name. NaN is left out.
        num_samples: that of the ranks, which are spread over their intervals; None for numbers between 0 and 1.
        options: of ``arviz.plot_ecdf`` (0.x), ``arviz.plot_ecdf_pit`` (1.x).

    Returns:
        The axes with ArviZ 0.x, the ``PlotCollection`` with 1.x.

    Raises:
        ValueError: for numbers outside of [0, 1].
    """
    named = {"u": uniforms} if isinstance(uniforms, Tensor) else dict(uniforms)
    if num_samples is not None:
        named = {name: (r + torch.rand(r.shape, device=r.device)) / (num_samples + 1) for name, r in named.items()}
    named = {name: u[~u.isnan()] for name, u in named.items()}
    for name, u in named.items():
        if not u.numel() or not ((u >= 0) & (u <= 1)).all():
            got = f"{u.min().item()} to {u.max().item()}" if u.numel() else "none"
            raise ValueError(f"Expected numbers in [0, 1] for {name!r} (ranks with num_samples); got {got}.")
    xlabel = "probability integral transform" if num_samples is None else "normalised rank"
    return arviz_compat.plot_uniformity(named, xlabel, **options)


def _rank(truth: Tensor, draws: Tensor) -> Tensor:
    """How many draws (S, ...) are below the truth (...), those equal to it counted at random."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    spread = torch.rand(equal.shape, dtype=torch.float64, device=equal.device) * (equal + 1)
    return below + torch.minimum(spread.long(), equal)


def _truth(trace: Any, data_names: list[str]) -> dict[str, Tensor]:
    names = list(latents(trace))
    if unknown := [name for name in data_names if name not in names]:
        raise ValueError(f"Expected observed to be sites of the model, of {names}; got {unknown}.")
    rest = [name for name in names if name not in data_names]
    if unnamed := [name for name in rest if trace.nodes[name]["infer"].get("was_observed")]:
        raise ValueError(
            f"Expected observed to name all observed sites of the model; got {data_names} without {unnamed}."
        )
    if not rest:
        raise ValueError("Expected a model with latents; got none beside the observed sites.")
    return {name: trace.nodes[name]["value"] for name in rest}


def _draws(
    model: Any, posterior: Any, args: Any, kwargs: Any, data: dict[str, Tensor], num_samples: int
) -> Mapping[str, Tensor]:
    """Draws of the posterior given simulated data; the model already has its arguments and these data."""
    parameters = _parameters(posterior)
    given, named = _with_data(parameters, args, kwargs, data)
    if "num_samples" in parameters:
        with torch.enable_grad():  # for samplers that follow gradients
            draws: Mapping[str, Tensor] = posterior(*given, **named, num_samples=num_samples)
        return {name: value.detach() for name, value in draws.items()}
    return draw(model, partial(posterior, *given, **named), (), {}, num_samples).draws


def _parameters(program: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program).parameters
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
    parameters: Mapping[str, inspect.Parameter], args: Any, kwargs: Any, data: dict[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the data in their places, also where they came by position."""
    places = list(parameters)
    given, rest = list(args), dict(data)
    for name in data:
        if name in places and places.index(name) < len(given):
            given[places.index(name)] = rest.pop(name)
    return tuple(given), kwargs | rest
