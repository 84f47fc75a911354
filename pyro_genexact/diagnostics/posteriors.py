"""Calibration of posteriors on simulated data: ranks of latents and other quantities, and coverage of random regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .simulated import Simulated, Values, rank

Quantity = Callable[[Values, Values], Tensor]


@torch.no_grad()
def sbc_ranks(
    model: Callable[..., Any],
    posterior: Any,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    num_simulations: int = 200,
    num_samples: int = 99,
    test_quantities: Mapping[str, Quantity] | None = None,
    vectorize: bool | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Computes the ranks of true latents among posterior draws, for simulation-based calibration.

    Each simulation draws latents and data from the model, and then S draws of the posterior given these data. The rank of a
    latent is the number of draws below it; ties, as between discrete latents, are broken at random. If the posterior is
    exact, ranks are uniform on 0 ... S. Many ranks at both ends show that the posterior is too narrow, many in the middle
    that it is too wide, and many at one end that it is biased.

    Uniform ranks do not prove that the posterior is exact: the prior has uniform ranks too. Ranks of a quantity of latents
    *and data*, such as the log-likelihood, detect this and more. A guide's own log density is such a quantity:
    ``test_quantities={"log q": guide.log_prob}``.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``; its observed sites are sampled.
        posterior: one of

            * a :class:`~pyro_genexact.guides.Amortized`, or any object with a method ``draws(observations, num=S)`` that
              takes observations (n, ...) by site and returns draws (S, n, ...) by latent. It draws many posteriors at once;
            * an amortised guide, which is called with the arguments of the model, and with the simulated data as arguments
              that have the names in ``observed``;
            * a function that is called in the same way, also with ``num_samples``, and returns draws
              {name: (num_samples, ...)}.
        args: arguments of the model, and of a posterior that is a guide or function.
        observed: the name or names of the sites that are data, by default the attribute ``observed`` of the posterior.
            ``pyro.deterministic`` sites, such as the output of a simulator, can be among them.
        num_simulations: N, the number of simulations.
        num_samples: S, the number of draws of each posterior.
        test_quantities: functions by name, called as ``f(latents, data)`` with tensors (*sample, n, ...) and (n, ...) by
            name, where n simulations have different latents and data. They return real numbers (*sample, n, ...).
        vectorize: whether the model runs all simulations at once, in a plate around all others; by default, if this agrees
            with single runs. Otherwise it runs N times.
        kwargs: keyword arguments. Model and posterior each get those in their signature, or all if they have ``**kwargs``.

    Returns:
        Integer tensors (N, *latent shape) by name of the latent, and of the quantities. With a batched posterior,
        simulations with NaN or infinity are left out, with a warning.

    Raises:
        TypeError: if neither model nor posterior takes a keyword argument, or if draws are not a dict.
        ValueError: if ``observed`` has names that are not sites of the model or leaves out observed sites, if the posterior
            does not draw all latents with the right shape, if latents, draws or quantities are NaN, and as :func:`psis`.
        NotImplementedError: if the posterior is a guide without ``draws`` and a site has no ``log_prob``, such as a
            simulator. Functions with an argument ``num_samples`` do not need it.

    Cost: N simulations, and S draws of N posteriors, of which a bounded number are in memory at a time.

    Reference: Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", 2018; Modrák et
    al., "Simulation-based calibration checking for Bayesian computation", Bayesian Analysis 2023 (test quantities).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> residual = lambda latents, data: (data["y"] - latents["mu"]).abs()
        >>> ranks = sbc_ranks(
        ...     model, guide, observed="y", num_simulations=50, test_quantities={"residual": residual}
        ... )
        >>> {name: tuple(r.shape) for name, r in ranks.items()}
        {'mu': (50,), 'residual': (50,)}
    """
    found = Simulated.of(model, posterior, args, kwargs, observed, num_simulations, num_samples, vectorize)
    quantities: dict[str, Quantity] = {name: partial(_latent, name) for name in found.truth}
    if twice := sorted(quantities.keys() & (test_quantities or {}).keys()):
        raise ValueError(f"Expected test_quantities with other names than the latents; got {twice}.")
    quantities |= test_quantities or {}
    ranks: dict[str, list[Tensor]] = {name: [] for name in quantities}
    for truth, data, draws in found:
        for name, f in quantities.items():
            ranks[name].append(_rank(name, f(truth, data), f(draws, data), num_samples))
    return {name: torch.cat(rows) for name, rows in ranks.items()}


@torch.no_grad()
def tarp(
    model: Callable[..., Any],
    posterior: Any,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    num_simulations: int = 200,
    num_samples: int = 99,
    references: Callable[[Values], Mapping[str, Tensor]] | None = None,
    vectorize: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Tests the joint coverage of a posterior with random reference points (TARP).

    A simulation has true latents and data, and a reference point. The ball around this point through the true latents is
    a credible region, whose level is its posterior mass. If the posterior is exact, it is uniform. The result is the
    number of draws within the ball, and is uniform on 0 ... S. Plot it by :func:`plot_coverage`. Unlike :func:`sbc_ranks`,
    one number per simulation tests all latents jointly.

    The distance is Euclidean, over all elements of all latents. Each element is divided by its standard deviation over the
    simulations; discrete latents count as numbers, and ties are broken at random.

    By default the reference points are the latents of other simulations, which are draws from the prior. Such a test does not
    distinguish the prior from the posterior. Reference points that depend on the data do. The theorem of the paper requires
    them: if the coverage is right for every such choice, the posterior is exact.

    Args:
        model: as in :func:`sbc_ranks`.
        posterior: as in :func:`sbc_ranks`.
        args: arguments of the model, and of a posterior that is a guide or function.
        observed: as in :func:`sbc_ranks`.
        num_simulations: N, the number of simulations.
        num_samples: S, the number of draws of each posterior.
        references: a function from the data (N, ...) by site to reference points, real numbers (N, ...) by latent. It may be
            random.
        vectorize: as in :func:`sbc_ranks`.
        kwargs: keyword arguments of model and posterior.

    Returns:
        An integer tensor (N,).

    Raises:
        TypeError: as :func:`sbc_ranks`.
        ValueError: as :func:`sbc_ranks`, and if the references have other names or shapes than the latents.
        NotImplementedError: as :func:`sbc_ranks`.

    Cost: that of :func:`sbc_ranks`.

    Reference: Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-based accuracy testing of posterior estimators for
    general inference", ICML 2023.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> tarp(model, guide, observed="y", num_simulations=50).shape
        torch.Size([50])
        >>> near = lambda data: {"mu": data["y"] + torch.randn(50)}
        >>> ranks = tarp(model, guide, observed="y", num_simulations=50, references=near)
    """
    found = Simulated.of(model, posterior, args, kwargs, observed, num_simulations, num_samples, vectorize)
    if references is None:
        centres: Mapping[str, Tensor] = {name: value.roll(1, 0) for name, value in found.truth.items()}
    else:
        centres = references(found.data)
    shapes = [{name: tuple(x.shape) for name, x in values.items()} for values in (found.truth, centres)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Expected references of the shapes of the latents, {shapes[0]}; got {shapes[1]}.")
    scales = {name: value.double().std(0, correction=0) for name, value in found.truth.items()}
    ranks, done = [], 0
    for truth, _, draws in found:
        size = len(next(iter(truth.values())))
        distances = [torch.zeros((), dtype=torch.float64)] * 2
        for name, scale in scales.items():
            centre = centres[name][done : done + size].to(truth[name].device).double()
            scale = torch.where(scale > 0, scale, torch.inf).to(centre.device)
            for i, value in enumerate((truth[name], draws[name])):
                rest = ((value.double() - centre) / scale).square()
                distances[i] = distances[i].to(rest.device) + rest.reshape(*rest.shape[: i + 1], -1).sum(-1)
        ranks.append(rank("distance to the references", *distances))
        done += size
    return torch.cat(ranks)


def _latent(name: str, latents: Values, data: Values) -> Tensor:
    return latents[name]


def _rank(name: str, truth: Tensor, draws: Tensor, num_samples: int) -> Tensor:
    if draws.shape != (num_samples, *truth.shape):
        raise ValueError(
            f"Expected {name!r} of draws to have shape {(num_samples, *truth.shape)}, as that of the true latents "
            f"with a dim of draws; got {tuple(draws.shape)}."
        )
    return rank(name, truth, draws)
