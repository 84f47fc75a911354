"""``fit_amortized``: fits an amortised guide to simulations (neural posterior estimation)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..core.checks import check_kind, check_sizes
from ..core.leaves import map_leaves
from ..core.random import checked_seed, generator, seeded
from ..inference.fit import FitResult, fit
from .amortized import Amortized
from .latent_sites import OnlySites
from .observations import joined, stacked, tensors_of, values_of
from .posterior_network import AmortizedPosterior, Posterior
from .simulated_rows import rows_of
from .simulations import simulate
from .typicality import FITTED, KEPT

FIRST = 4096  # endless simulations that set the standardisation; those held out for validation among them
MEMBERS = 4  # of the default ensemble
BATCHES = 100  # of endless simulations in an epoch
AT_ONCE = 256  # simulations that are encoded at once after the fit


def fit_amortized(
    model: Callable[..., Any],
    guide: Amortized,
    *args: Any,
    simulations: int | Mapping[str, Any] | Dataset[Any] | Iterable[Mapping[str, Any]] = 10_000,
    ensemble: int | None = None,
    vectorize: bool | None = None,
    num_workers: int = 0,
    validation: float | None = 0.1,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    patience: int | None = None,
    fabric: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    seed: int = 0,
    progress: bool = True,
    compile: bool = False,
    **kwargs: Any,
) -> FitResult:
    """Fits an amortised guide to simulations of a model, in place.

    The objective is the mean log density of the simulated latents given the simulated observations (neural posterior
    estimation). Its maximum is the posterior, averaged over observations that the model generates. No site needs a
    ``log_prob``.

    Simulations with NaN or infinity are left out, with a warning; the posterior given an observation without them is not
    affected. At a site whose encoder reads missing entries, NaN is a missing entry, and only simulations without any entry are
    left out.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``; its observed sites are sampled.
        guide: the guide.
        args: arguments of the model.
        simulations: N, the number of joint draws from the prior predictive; or these draws, tensors (N, ...) of all latents
            and observed sites by name (or PaddedSequences of sets and series); or a Dataset of such dicts, one item per draw;
            or an endless iterator of such dicts with any number of rows, an epoch is then 100 of these
            batches, and the first ones are the validation rows.
        ensemble: K, the number of flows, trained together, whose equal mixture is the posterior; by default that of a guide
            that already has networks, else 4.
        vectorize: whether the model runs all simulations at once, in a plate around all others; by default, if this agrees
            with single runs. Otherwise it runs N times. A model with noise outside of its sites does not agree; if this
            noise has one number per simulation, pass True.
        num_workers: the number of processes for runs one by one.
        validation: the fraction of the simulations to hold out for early stopping, or None.
        epochs: as in :func:`~pyro_genexact.fit`, like the arguments below.
        seconds: the maximum time of training.
        batch_size: the number of simulations per step.
        lr: the learning rate.
        patience: the number of epochs without better validation nats after which the learning rate drops.
        fabric: a Lightning Fabric.
        checkpoint: the path of a checkpoint file.
        every: the number of steps between two checkpoints.
        seed: the seed of simulations, networks and training.
        progress: whether to report simulations and training on stderr.
        compile: whether to compile the steps of training, as in :func:`~pyro_genexact.fit`.
        kwargs: keyword arguments of the model.

    Returns:
        The history of the fit; nats are per simulation, and those of training are the mean over the K flows.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``ensemble`` is not a positive integer, if there are too few simulations, if sites are missing, or have
            other shapes than in the model, if no simulation is finite, if latents or their supports differ between runs of
            the model, or if it has a ``pyro.factor``, which simulations ignore.

    Cost: N runs of the model, and a forward and a backward pass of the networks over the simulations per epoch.

    Reference: Le, Baydin, Wood, "Inference compilation and universal probabilistic programming", AISTATS 2017.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genexact.guides import Amortized
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = Amortized(model)
        >>> fit_amortized(model, guide, simulations=1000, epochs=3, progress=False).stopped
        'epochs'
    """
    check_kind("guide", guide, Amortized)
    seed = checked_seed(seed)
    if ensemble is None and guide.network is None:
        ensemble = MEMBERS
    if ensemble is not None:
        check_sizes(1, ensemble=ensemble)
    with seeded(seed, torch.device("cpu")):
        network = guide.setup(*args, ensemble=ensemble, **kwargs)
    names = [*(x.name for x in guide.latents), *guide.observed]
    if isinstance(simulations, Integral):
        program = OnlySites(None if guide.chosen else names)(guide.program(args, kwargs, model))
        simulations = simulate(
            program, names, int(simulations), seed=seed, vectorize=vectorize, num_workers=num_workers, progress=progress
        )
    options = {
        "epochs": epochs, "seconds": seconds, "batch_size": batch_size, "lr": lr, "patience": patience, "fabric": fabric,
        "checkpoint": checkpoint, "every": every, "seed": seed, "progress": progress, "compile": compile,
    }  # fmt: skip
    if not isinstance(simulations, Mapping) and hasattr(simulations, "__len__") and hasattr(simulations, "__getitem__"):
        simulations = stacked(simulations)
    if isinstance(simulations, Mapping):
        packed, observations = rows_of(guide, simulations, names)
        network.standardise(packed, observations)
        result = fit(_Training(network), packed, tensors_of(observations), validation=validation, **options)
        _fit_typicality(guide, observations, len(packed), seed)
        return result
    if not isinstance(simulations, Iterable):
        raise TypeError(
            f"Expected simulations to be a number, a dict of tensors, a Dataset or an iterator; got {type(simulations).__name__}."
        )
    return _fit_endless(guide, network, iter(simulations), names, validation, options)


def _fit_endless(
    guide: Amortized, network: Posterior, batches: Iterator[Any], names: list[str], validation: Any, options: Any
) -> FitResult:
    first, size = [], 0
    for batch in batches:
        first.append(rows_of(guide, batch, names))
        size += len(first[-1][0])
        if size >= FIRST:
            break
    if not first:
        raise ValueError("Expected simulations to yield at least one batch; got an empty iterator.")
    packed = torch.cat([rows for rows, _ in first])
    observations = {name: joined(data[name] for _, data in first) for name in first[0][1]}
    network.standardise(packed, observations)
    held_out = None if validation is None else (packed, tensors_of(observations))
    rest = chain([] if held_out else first, (rows_of(guide, batch, names) for batch in batches))
    loader = DataLoader(_Stream((rows, tensors_of(data)) for rows, data in rest), batch_size=None)
    result = fit(_Training(network), loader, validation=held_out, **{**options, "batch_size": None})
    _fit_typicality(guide, observations, len(packed), options["seed"])
    return result


@torch.no_grad()
def _fit_typicality(guide: Amortized, observations: dict[str, Any], size: int, seed: int) -> None:
    """Fits the flow of the features, so that the guide can warn of observations unlike these simulations."""
    network = guide.made()
    if size < 2 or guide.typicality is None:
        return
    index = torch.randperm(size, generator=generator(seed), device="cpu")[: FITTED + KEPT]
    parts = [map_leaves(lambda x, i=i: x[i.to(x.device)], observations) for i in index.split(AT_ONCE)]  # type: ignore[misc]
    features = torch.cat([network.encode(part)[1] for part in parts])
    guide.typicality.to(features).fit(features, network.has_rows, seed)


class _Stream(IterableDataset[Any]):
    """The next batches of an iterator as one epoch.

    Raises:
        ValueError: if the iterator ends.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for number in range(BATCHES):
            try:
                batch = next(self.batches)
            except StopIteration:
                raise ValueError(
                    f"Expected simulations to be an iterator without end, with {BATCHES} batches per epoch after the first "
                    f"{FIRST} draws; got {number} batches in the last epoch. Pass stored draws as a dict or a Dataset."
                ) from None
            yield batch


class _Training(nn.Module):
    """The network as ``fit`` trains it: with the mean log density of its members in training mode."""

    def __init__(self, network: Posterior) -> None:
        super().__init__()
        self.network = network

    def forward(self, **observations: Tensor) -> AmortizedPosterior:
        return self.network.given(values_of(observations), mean=self.training)
