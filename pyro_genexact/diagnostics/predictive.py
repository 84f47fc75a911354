"""Prior and posterior predictive checks of models that can be simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_sizes
from ..core.values import numbers
from ..simulation.latent_sites import OnlySites
from ..simulation.simulations import is_deterministic, simulate, traced
from .data import arrays, container, count
from .guide_draws import dims_of, latents

Statistic = Callable[[dict[str, Tensor]], Tensor]


def predictive_data(
    model: Callable[..., Any],
    posterior: Any,
    observations: Mapping[str, Tensor],
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    vectorize: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from the posterior predictive and the prior predictive, and converts them to ArviZ's format.

    The result has the groups posterior and prior (latents and other ``pyro.deterministic`` sites), posterior_predictive and
    prior_predictive (new values of the observed sites) and observed_data. No site needs a ``log_prob``, so the model can be a
    simulator. With a likelihood, :func:`inference_data` also returns log-likelihoods.

    Args:
        model: a Pyro model. Its observed sites are sampled, or are ``pyro.deterministic`` outputs of a simulator.
        posterior: a :class:`~pyro_genexact.guides.Amortized` or another object with a method ``draws(observations, num)``,
            or draws {name: (S, ...)} of all latents.
        observations: the observations of one run of the model by site.
        args: arguments of the model.
        num_samples: S, the number of draws.
        coords: labels along dims, such as those of plates, by name of the dim.
        dims: names of all dims of a site, plates first, by name of the site; by default dims have the names of plates.
        vectorize: whether the model runs S times at once, in a plate around all others; by default, if this agrees with
            single runs.
        kwargs: keyword arguments of the model.

    Returns:
        An ``InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with 1.x.

    Raises:
        TypeError: if the posterior has no draws, or an observation is a PaddedSequence.
        ValueError: if the names or shapes of observations or draws differ from the sites of the model.

    Cost: S draws of the posterior, and 2 S runs of the model, at once or one by one.

    Reference: Gelman, Meng, Stern, "Posterior predictive assessment of model fitness via realized discrepancies", Statistica
    Sinica 1996.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_genexact as gx
        >>> def simulator():
        ...     p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("y", dist.Binomial(10, p))
        >>> guide = gx.guides.Amortized(simulator, observed="y")
        >>> result = gx.fit_amortized(simulator, guide, simulations=500, epochs=2, progress=False)
        >>> data = predictive_data(simulator, guide, {"y": torch.tensor(7.0)}, num_samples=100)
        >>> dict(data["posterior_predictive"]["y"].sizes), dict(data["prior"]["p"].sizes)
        ({'chain': 1, 'draw': 100}, {'chain': 1, 'draw': 100})
    """
    if not isinstance(posterior, Mapping) and not hasattr(posterior, "draws"):
        raise TypeError(
            f"Expected posterior to be draws by latent or to have a method draws; got {type(posterior).__name__}."
        )
    program = OnlySites(None)(partial(model, *args, **kwargs))  # factors raise an error
    trace = traced(program)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    if unknown := [name for name in observations if name not in sites]:
        raise ValueError(f"Expected observations of sites of the model, {list(sites)}; got {unknown}.")
    observations = _of_one_run(observations, sites)
    given = posterior if isinstance(posterior, Mapping) else posterior.draws(observations, num_samples)
    given = {name: torch.as_tensor(value).detach() for name, value in given.items()}
    size = count(given)
    check_sizes(1, num_samples=size)
    chosen = getattr(posterior, "chosen", None)  # of a guide of some of the latents; the others are drawn given these
    hidden = [name for name in latents(trace) if name not in observations and (chosen is None or name in chosen)]
    if set(hidden) != set(given):
        raise ValueError(f"Expected draws of the latents of the model, {hidden}; got {list(given)}.")
    _of_one_run({name: value[0] for name, value in given.items()}, sites)
    others = [name for name, site in sites.items() if is_deterministic(site) and name not in observations]
    names, seed = [*hidden, *others, *observations], int(torch.randint(2**31, (), device="cpu"))
    posterior_draws = simulate(program, names, size, given=given, seed=seed, vectorize=vectorize)
    prior_draws = simulate(program, names, size, seed=seed + 1, vectorize=vectorize)
    of_plates = {name: dims_of(name, sites[name]) for name in names}
    groups = {"observed_data": arrays(observations, of_plates, 0)}
    for kind, draws in (("posterior", posterior_draws), ("prior", prior_draws)):
        groups[kind] = arrays({name: draws[name] for name in (*hidden, *others)}, of_plates)
        groups[f"{kind}_predictive"] = arrays({name: draws[name] for name in observations}, of_plates)
    return container(groups, of_plates, coords, dims)


def _of_one_run(values: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns values as tensors, which have the shapes of one run of the model."""
    found = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            raise TypeError(f"Expected {name!r} to be a tensor, with NaN as padding; got {type(value).__name__}.")
        found[name], expected = torch.as_tensor(value), sites[name]["value"].shape
        if found[name].shape != expected:
            got = tuple(found[name].shape)
            raise ValueError(f"Expected {name!r} of shape {tuple(expected)}, as in one run of the model; got {got}.")
    return found


def predictive_p_values(data: Any, statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Computes posterior predictive p-values, the probabilities that a statistic of new data exceeds that of the observed data.

    Ties count half. Where a statistic is NaN, such as an element without data, the p-value is NaN. A value near 0 or 1 shows a
    property of the data that the fitted model does not reproduce. The distribution of these p-values under the model is not uniform but concentrates near 1/2.

    Args:
        data: the result of :func:`predictive_data` or :func:`inference_data`.
        statistics: functions by name, called with tensors (S, ...) of the observed sites by name. They return real numbers
            (S, ...).

    Returns:
        Float64 tensors (...) by name of the statistic.

    Raises:
        ValueError: if a statistic does not keep the dim of draws.

    Cost: two calls of each statistic.

    Reference: see :func:`predictive_data`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 5):
        ...         pyro.sample("y", dist.Normal(mu, 1.0))
        >>> draws, y = {"mu": torch.randn(200)}, torch.tensor([0.1, -0.2, 0.3, 0.0, 40.0])
        >>> data = predictive_data(model, draws, {"y": y})
        >>> predictive_p_values(data, {"maximum": lambda values: values["y"].amax(-1)})
        {'maximum': tensor(0., dtype=torch.float64)}
    """
    seen = {str(name): torch.as_tensor(x.values)[None] for name, x in data["observed_data"].data_vars.items()}
    group = data["posterior_predictive"]
    new = {name: torch.as_tensor(group[name].values).flatten(0, 1) for name in seen}
    found = {}
    for name, statistic in statistics.items():
        one, many = (numbers(name, statistic(values)).double() for values in (seen, new))
        size = len(next(iter(new.values())))
        if one.shape[:1] != (1,) or many.shape != (size, *one.shape[1:]):
            raise ValueError(
                f"Expected the statistic {name!r} to return one value per draw, with shape[0] == 1 and {size}; got "
                f"{tuple(one.shape)} and {tuple(many.shape)}."
            )
        found[name] = torch.where(
            one.isnan() | many.isnan(), torch.nan, (many > one).double() + (many == one).double() / 2
        ).mean(0)
    return found
