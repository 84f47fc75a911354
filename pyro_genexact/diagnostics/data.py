"""``inference_data``, which converts posterior draws, log-likelihoods and predictions to ArviZ's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.checks import check_sizes
from . import arviz_compat
from .guide_draws import GuideDraws, draw

NO_POSTERIOR = (
    "Expected a model with latent sites and their posterior; got {}. A maximum-likelihood fit has a single value of its "
    "parameters and no draws to reweight, so leave-one-out by importance sampling would score the rows that it was fitted "
    "to. Use diagnostics.held_out on held-out rows and diagnostics.compare instead."
)


def inference_data(
    model: Callable[..., Any],
    posterior: Callable[..., Any] | Mapping[str, Tensor],
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    """Converts posterior draws to ArviZ's format, with log-likelihoods and predictions of the observed sites.

    The result has the groups posterior (latents and ``pyro.deterministic`` sites), log_likelihood (of each observed value in
    nats, without ``poutine.scale``), posterior_predictive (new values of the observed sites) and observed_data. Dims have the
    names of their plates. The draws form one chain. For independent draws of a guide, R-hat is meaningless; use :func:`psis`
    to check the guide. ``az.loo`` assumes exact posterior draws, so pass ``psis(...).resample()`` instead of the guide
    unless k-hat is small.

    Args:
        model: a Pyro model with observed data.
        posterior: a guide, or draws {name: (S, ...)} of all latents.
        args: arguments of model and guide.
        num_samples: S, the number of draws of a guide.
        coords: labels along dims, such as those of plates, by name of the dim.
        dims: names of all dims of a site, plates first, by name of the site; by default dims have the names of plates.
        kwargs: keyword arguments of model and guide.

    Returns:
        An ``InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: if the model has no latents, if the posterior is the result of a maximum-likelihood fit (use
            :func:`held_out` instead), and as :func:`psis`.
        NotImplementedError: if the distribution of a site has no ``log_prob``, such as a simulator at an observed site.

    Cost: S evaluations of the guide and 2 S of the model, without gradients.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("person", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y.mean(), 0.5))
        >>> data = inference_data(model, guide, torch.randn(5), num_samples=100)
        >>> dict(data.log_likelihood["y"].sizes)
        {'chain': 1, 'draw': 100, 'person': 5}
    """
    if not callable(posterior) and not isinstance(posterior, Mapping):
        raise ValueError(NO_POSTERIOR.format(type(posterior).__name__))
    if isinstance(posterior, Mapping):
        num_samples = count(posterior)
    check_sizes(1, num_samples=num_samples)
    found = draw(model, posterior, args, kwargs, num_samples, predict=True)
    if not found.draws:
        raise ValueError(NO_POSTERIOR.format("a model without latents"))
    return container(groups_of(found), found.dims, coords, dims)


def groups_of(found: GuideDraws, chains: int = 1) -> dict[str, dict[str, Any]]:
    """Returns the groups of the result by name, each with arrays (chains, draws, ...) by name of the site."""
    return {
        "posterior": arrays(found.draws | found.deterministic, found.dims, chains),
        "log_likelihood": arrays(found.log_likelihood, found.dims, chains),
        "posterior_predictive": arrays(found.predictive, found.dims, chains),
        "observed_data": arrays(found.observed, found.dims, 0),
    }


def container(
    groups: Mapping[str, Mapping[str, Any]],
    of_plates: Mapping[str, list[str | None]],
    coords: Mapping[str, Sequence[Any]] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> Any:
    """Converts groups of arrays to ArviZ's format, with names of dims from plates and from the user."""
    names = {name: [dim for dim in own if dim is not None] for name, own in of_plates.items()}
    names |= {name: list(given) for name, given in (dims or {}).items()}  # ArviZ adds default names of event dims
    options = {"coords": {name: list(labels) for name, labels in (coords or {}).items()}, "dims": names}
    return arviz_compat.from_groups({name: group for name, group in groups.items() if group}, **options)


def count(draws: Mapping[str, Tensor]) -> int:
    """Returns the number S of draws (S, ...)."""
    counts = {name: value.shape[:1] for name, value in draws.items()}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            f"Expected draws of shape (S, ...) with the same S; got { ({k: tuple(v.shape) for k, v in draws.items()}) }."
        )
    return next(iter(counts.values()))[0]


def arrays(values: Mapping[str, Tensor], dims: Mapping[str, list[str | None]], chains: int = 1) -> dict[str, Any]:
    """Converts values to NumPy arrays without the dims of size 1 between plates: draws (S, ...) to chains (C, S / C, ...).

    With no chains, the values have no dim of draws.
    """
    arrays = {}
    first = int(chains > 0)
    for name, value in values.items():
        gone = [i + first for i, dim in enumerate(dims[name]) if dim is None]
        array = value.detach().squeeze(gone).cpu().numpy() if gone else value.detach().cpu().numpy()
        arrays[name] = array.reshape(chains, len(array) // chains, *array.shape[1:]) if chains else array
    return arrays
