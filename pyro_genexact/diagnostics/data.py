"""inference_data: posterior draws, log-likelihoods and predictions in ArviZ's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.checks import check_sizes
from . import arviz_compat
from .guide_draws import GuideDraws, draw

NO_POSTERIOR = (
    "Expected a model with latent sites and their posterior; got {}. A single maximum-likelihood fit has one value of its "
    "parameters, no draws to average or to reweigh, so leave-one-out by importance sampling would score the rows that it was "
    "fitted to. Use diagnostics.held_out on rows kept aside and diagnostics.compare."
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
    """Posterior draws with log-likelihood and predictions, for ``az.summary``, ``az.loo``, ``az.compare`` and all plots.

    Groups: posterior (latents and ``pyro.deterministic`` sites), log_likelihood (of each observed value, as the model says,
    without ``poutine.scale``), posterior_predictive (new values of the observed sites), observed_data. Dims are named after
    plates. Draws of a guide are independent and make one chain: R-hat has nothing to compare, and says nothing of the
    guide, which :func:`psis` does. ``az.loo`` takes the draws for those of the posterior; if k-hat is not small,
    hand over ``psis(...).resample()`` in place of the guide.

    Args:
        model: a Pyro model with its data observed.
        posterior: a guide, or draws {name: (S, ...)} of all latents.
        args: of model and guide.
        num_samples: S, draws of a guide.
        coords: labels of dims, e.g. of plates, by name.
        dims: names of the dims of sites, where those from the plates are not enough: all, plates first.
        kwargs: of model and guide.

    Returns:
        ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: for a model without latents or a module fitted by maximum likelihood (which has no posterior: see
            :func:`held_out`), and as :func:`psis`.

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
        num_samples = _count(posterior)
    check_sizes(1, num_samples=num_samples)
    found = draw(model, posterior, args, kwargs, num_samples, predict=True)
    if not found.draws:
        raise ValueError(NO_POSTERIOR.format("a model without latents"))
    names = {name: [dim for dim in own if dim is not None] for name, own in found.dims.items()}
    names |= {name: list(given) for name, given in (dims or {}).items()}  # ArviZ names the other dims
    groups = {
        "posterior": _arrays(found.draws | found.deterministic, found),
        "log_likelihood": _arrays(found.log_likelihood, found),
        "posterior_predictive": _arrays(found.predictive, found),
        "observed_data": _arrays(found.observed, found, chain=False),
    }
    options = {"coords": {name: list(labels) for name, labels in (coords or {}).items()}, "dims": names}
    return arviz_compat.from_groups({name: group for name, group in groups.items() if group}, **options)


def _count(draws: Mapping[str, Tensor]) -> int:
    counts = {name: value.shape[:1] for name, value in draws.items()}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            f"Expected draws of shape (S, ...), one S for all; got { ({k: tuple(v.shape) for k, v in draws.items()}) }."
        )
    return next(iter(counts.values()))[0]


def _arrays(values: Mapping[str, Tensor], found: GuideDraws, chain: bool = True) -> dict[str, Any]:
    """NumPy arrays, (1, S, ...) with a chain, without the dims of size 1 that stand between plates."""
    arrays = {}
    for name, value in values.items():
        kept = [i + chain for i, dim in enumerate(found.dims[name]) if dim is not None]
        gone = [i for i in range(int(chain), len(found.dims[name]) + chain) if i not in kept]
        array = value.detach().squeeze(gone).cpu().numpy() if gone else value.detach().cpu().numpy()
        arrays[name] = array[None] if chain else array
    return arrays
