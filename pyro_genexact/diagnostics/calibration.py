"""Calibration checks: probability integral transforms and simulation-based calibration."""

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
from ..inference.simulations import ResampleObserved
from . import arviz_compat
from .guide_draws import draw, latents


def pit(d: Distribution, value: Tensor) -> Tensor:
    """Computes probability integral transforms, which are independent and uniform on [0, 1] if the values come from ``d``.

    For autoregressive models and sequences, these are the conditional cdfs u_t = F_t(y_t | y_<t) in the model's order. For
    discrete sites they are randomised: u_t = F_t(y_t - 1) + v p_t(y_t) with v uniform. For univariate or elementwise
    families, they are cdfs. For flows over vectors, they are the cdfs of the base at the inverse image of the value; element
    i then belongs to *coordinate i of the base*, not to a variable of the data, so a deviation shows that the flow is wrong
    but not where. Padding is NaN.

    Use held-out rows, since rows that the model was fitted to appear better calibrated than new ones.

    Args:
        d: the distribution.
        value: (*sample, *batch, *event).

    Returns:
        A tensor with the shape of ``value``.

    Raises:
        NotImplementedError: if ``d`` has a family without a cdf, or is of another kind over vectors.

    Cost: that of ``log_prob``.

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
    """Computes the ranks of true latents among posterior draws, for simulation-based calibration.

    Each simulation draws latents and data from the model, and then S draws of the posterior given these data. The rank of a
    latent is the number of draws below it; ties, as between discrete latents, are broken at random. If the posterior is
    exact, ranks are uniform on 0 ... S. Uniform ranks do not prove that it is exact: the prior has uniform ranks too. Many
    ranks at both ends show that the posterior is too narrow, many in the middle that it is too wide, and many at one end
    that it is biased.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``; its observed sites are sampled.
        posterior: an amortised guide, or a function with an argument ``num_samples`` that returns draws
            {name: (num_samples, ...)}. It is called with the arguments of the model, and with the simulated data as
            arguments that have the names in ``observed``.
        args: arguments of model and posterior.
        observed: the name or names of the sites that are data. The posterior must have arguments with these names.
        num_simulations: N, the number of simulations.
        num_samples: S, the number of draws of each posterior.
        kwargs: keyword arguments. Model and posterior each get those in their signature, or all if they have ``**kwargs``.

    Returns:
        Integer tensors (N, *latent shape) by name of the latent.

    Raises:
        TypeError: if neither model nor posterior takes a keyword argument.
        ValueError: if ``observed`` has names that are not sites of the model or leaves out observed sites, if the posterior
            does not draw all latents with the right shape, and as :func:`psis`.
        NotImplementedError: if the posterior is a guide and a site has no ``log_prob``, such as a simulator. Functions
            with an argument ``num_samples`` do not need it.

    Cost: N runs of the model, and S draws of N posteriors.

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
    """Plots the difference between the empirical cdf (ECDF) of numbers and the cdf of the uniform distribution.

    ArviZ draws the plot. With 0.x it has a simultaneous band, which the curve of uniform numbers leaves with a probability of
    6% (``ci_prob=0.94``). ArviZ 1.x shows the p-value of a test of uniformity instead.

    Args:
        uniforms: results of :func:`pit` or :func:`sbc_ranks`, or a dict of such tensors by name, with one panel per name.
            NaN is ignored.
        num_samples: for ranks, the argument of :func:`sbc_ranks`; each rank is replaced by a random number in its interval.
        options: options of ``arviz.plot_ecdf`` (0.x) or ``arviz.plot_ecdf_pit`` (1.x).

    Returns:
        An array of axes with ArviZ 0.x, a ``PlotCollection`` with 1.x.

    Raises:
        ValueError: if there are no numbers, or numbers outside of [0, 1].

    Example:
        >>> import torch
        >>> axes = plot_uniformity({"uniform": torch.rand(100), "not": torch.rand(100) ** 2})
        >>> [ax.get_title() for ax in axes]
        ['uniform', 'not']
    """
    named = {"u": uniforms} if isinstance(uniforms, Tensor) else dict(uniforms)
    if num_samples is not None:
        named = {name: (r + torch.rand(r.shape, device=r.device)) / (num_samples + 1) for name, r in named.items()}
    named = {name: u[~u.isnan()] for name, u in named.items()}
    for name, u in named.items():
        if not u.numel() or not ((u >= 0) & (u <= 1)).all():
            got = f"{u.min().item()} to {u.max().item()}" if u.numel() else "none"
            raise ValueError(f"Expected numbers in [0, 1] for {name!r} (or ranks and num_samples); got {got}.")
    xlabel = "probability integral transform" if num_samples is None else "normalised rank"
    return arviz_compat.plot_uniformity(named, xlabel, **options)


def _rank(truth: Tensor, draws: Tensor) -> Tensor:
    """Returns the number of draws (S, ...) below the truth (...); a random number of the draws equal to it counts."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    spread = torch.rand(equal.shape, dtype=torch.float64, device=equal.device) * (equal + 1)
    return below + torch.minimum(spread.long(), equal)


def _truth(trace: Any, data_names: list[str]) -> dict[str, Tensor]:
    names = list(latents(trace))
    if unknown := [name for name in data_names if name not in names]:
        raise ValueError(f"Expected observed to be sites of the model, {names}; got {unknown}.")
    rest = [name for name in names if name not in data_names]
    if unnamed := [name for name in rest if trace.nodes[name]["infer"].get("was_observed")]:
        raise ValueError(
            f"Expected observed to name all observed sites of the model; got {data_names} without {unnamed}."
        )
    if not rest:
        raise ValueError("Expected a model with latents; got only observed sites.")
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
    """Returns the arguments with the data in them, which replace arguments of the same name, also positional ones."""
    places = list(parameters)
    given, rest = list(args), dict(data)
    for name in data:
        if name in places and places.index(name) < len(given):
            given[places.index(name)] = rest.pop(name)
    return tuple(given), kwargs | rest
