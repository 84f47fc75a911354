"""Pathfinder: a quick approximation of a posterior, corrected by importance sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.checks import check_sizes
from ..inference.density import Density
from ..inference.normal import Normals
from ..inference.pathfinder import ranked
from ..inference.paths import ascend
from .importance import SMALLEST, Importance

KEPT = 10.0  # nats; components whose ELBO is lower than the highest by more are left out


def pathfinder(
    model: Callable[..., Any], *args: Any, paths: int = 8, num_samples: int = 1000, **kwargs: Any
) -> Importance:
    """Approximates the posterior of a model by Gaussians along the paths of an optimiser, in seconds and without a guide.

    The latents are mapped to the reals. K paths climb their log density by BFGS, from medians of prior draws and from points
    that are uniform between -2 and 2. Each iterate has a Gaussian, whose covariance is the optimiser's estimate of the
    inverse Hessian. The proposal is the mixture, with equal weights, of the Gaussian with the highest ELBO on each path
    and of the Laplace approximations at up to three modes, without those whose ELBO is lower than the highest by 10 nats. The
    density of the whole mixture is in the weights, so that several paths to one mode do not increase its weight.

    Discrete latents that the model marks with ``infer={"enumerate": "parallel"}`` are summed out, one point at a time.

    Args:
        model: a Pyro model with observed data.
        args: its arguments.
        paths: K, the number of paths.
        num_samples: S, the number of draws, at least 25.
        kwargs: keyword arguments of the model.

    Returns:
        Draws of all continuous latents with their log ratios and weights. Use them only if ``khat`` is below ``threshold``.

    Raises:
        ValueError: if a latent is discrete and not enumerated, if a plate is subsampled, if no path has a start of finite
            density and positive curvature, or if a log ratio is NaN.

    Reference: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational inference", JMLR 2022. There,
    each path has few draws of its own, and covariances are limited to the last six steps.

    Cost: about a hundred gradients at K points at once, twenty values for each iterate, and S values.

    Example:
        >>> import torch
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> _ = torch.manual_seed(0)
        >>> result = pathfinder(model, torch.tensor([0.5, -1.0, 2.0, 0.3]))
        >>> result.khat < result.threshold, result.draws["scale"].shape
        (True, torch.Size([1000]))
        >>> round(result.expectation(lambda d: d["scale"]).item(), 1)
        1.3
    """
    check_sizes(1, paths=paths)
    check_sizes(SMALLEST, num_samples=num_samples)
    density = Density(model, *args, **kwargs)
    if density.subsampled:
        raise ValueError(f"Expected plates without subsampling (log p would be an estimate); got {density.subsampled}.")
    found = ranked(density, ascend(density, density.starts(paths)))
    if not found:
        raise ValueError(f"Expected a start of finite density and positive curvature; got none of {paths} starts.")
    proposal = Normals([normal for elbo, normal in found if elbo > found[0][0] - KEPT])
    z = proposal.sample(num_samples)
    with torch.no_grad():
        ratios = density(z) - proposal.log_prob(z)
    return Importance(ratios, density.values(z))
