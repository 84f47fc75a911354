"""``likelihood``: learns the conditional distribution of an observed site given latents from simulations of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.utils.data import default_collate

from ..core.checks import check_kind, check_sizes
from ..core.random import checked_seed, generator, seeded
from ..inference.fit import FitResult, fit
from .columns import Columns, affine_splines
from .given import Given, input_of, support_of
from .items import check_alike, check_density, finite, tables
from .simulations import Draws, is_deterministic, simulate, traced

ROWS = 100_000  # evaluated at once
BATCHES, DEFAULT_BATCH, LARGEST_BATCH = 200, 256, 1024  # steps per epoch of many rows, and sizes of their batches


class Likelihood(nn.Module):
    """A learned distribution of one observed site given values of latents; :func:`likelihood` creates and fits it.

    Use the result of a call as the distribution of a ``pyro.sample`` site: in plates of any size, in hierarchical models, with
    any guide and with NUTS. Its density is exact: it is positive on the support alone, integrates to 1, and is that of its samples.

    Args:
        given: the encoder of the latents.
        module: a module of ``given``'s number of features, whose call returns a distribution of the observed site.

    Attributes:
        names: the names of the latents, in the order of the call.
        module: the :class:`~pyro_genexact.DistributionModule` of the site.
        result: the history of the fit; None in copies and in saved files.

    Example:
        >>> import torch
        >>> import pyro, pyro.distributions as dist
        >>> def simulator():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.deterministic("y", mu + torch.randn_like(mu))
        >>> learned = likelihood(simulator, simulations=500, epochs=2, vectorize=True, progress=False)
        >>> learned(torch.zeros(3)).batch_shape, learned(mu=torch.tensor(0.5)).sample((4,)).shape
        (torch.Size([3]), torch.Size([4]))
    """

    given: Given
    result: FitResult | None = None

    def __init__(self, given: Any, module: nn.Module) -> None:
        super().__init__()
        self.given, self.module = given, module

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "result"}

    @property
    def names(self) -> list[str]:
        return [x.name for x in self.given.latents]

    def forward(self, *values: Tensor | float, **named: Tensor | float) -> Any:
        """Returns the distribution of the observed site.

        Args:
            values: values (*batch, ...) of the latents in the order of ``names``; their batch shapes are broadcast.
            named: values by name.

        Raises:
            ValueError: if a latent is missing or given twice, has another shape, or is outside its support. If Pyro does not
                validate, as within MCMC, the density given such a value is NaN.
        """
        if len(values) > len(self.names):
            raise ValueError(f"Expected values of {self.names}; got {len(values)} values.")
        found = dict(zip(self.names, values, strict=False))
        if twice := sorted(found.keys() & named.keys()):
            raise ValueError(f"Expected one value per latent; got two of {twice}.")
        found |= named
        if set(found) != set(self.names):
            raise ValueError(f"Expected values of {self.names}; got {list(found)}.")
        return self.module(self.given(found))


def likelihood(
    model: Callable[..., Any],
    *args: Any,
    observed: str = "y",
    given: Sequence[str] | None = None,
    simulations: int | Mapping[str, Tensor] | Any = 10_000,
    proposal: Callable[..., Any] | Mapping[str, Tensor] | None = None,
    support: Any = None,
    recipe: Callable[..., Any] = affine_splines,
    module: Callable[[int], nn.Module] | None = None,
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
    **kwargs: Any,
) -> Likelihood:
    """Learns the distribution of an observed site given latents, from simulations of a model (neural likelihood estimation).

    The objective is the mean log density of the simulated values given the simulated latents. Its maximum is at the likelihood
    wherever latents are simulated, whatever their distribution. Rows in the plates of the observed site are independent and
    identically distributed given the latents; the networks are those of one row. So a likelihood that was learned in a small
    plate, or without one, serves any number of rows and groups.

    The value may be a number, a vector or an array; its entries are real numbers (on intervals, half lines or simplices too), counts,
    categories or Booleans. Counts come first in the chain rule over the entries, then categories, then a flow over the residuals of
    a linear regression of the real numbers. Learn several observed sites one by one, each given the ones before.

    Simulations with NaN or infinity are left out, with a warning: the result is then the likelihood *given success*.

    Args:
        model: a Pyro model, called as ``model(*args, **kwargs)``; its observed sites are sampled.
        args: arguments of the model.
        observed: the observed site: of ``pyro.sample``, whose log_prob is not used, or of ``pyro.deterministic``.
        given: the names of the inputs, in the order of the call: latents, other observed sites, or covariates of the rows as
            sample or deterministic sites. By default all latents. Latents that are left out are averaged over.
        simulations: N, the number of joint draws; or these draws, tensors (N, ...) by name; or a Dataset of such dicts, one item per
            draw.
        proposal: draws (M, ...) of some inputs by name, or a program that is called as ``proposal(*args, **kwargs)`` and
            samples them, such as a guide. They replace draws from the prior, and should cover the posterior. Other latents
            are drawn from the model; those that are not inputs should not come before the proposed ones.
        support: the support of the observed site, or a list of one constraint per entry of a vector; by default that of its
            distribution, and the real numbers for ``pyro.deterministic`` sites.
        recipe: a function that is called as ``recipe(D, context=C)`` and returns a :class:`~pyro_genexact.Flow` over D real
            numbers; by default an affine layer and two spline layers. For series, use one with a recurrent conditioner.
        module: a function that is called as ``module(C)`` and returns any :class:`~pyro_genexact.DistributionModule` of C context
            features over values of the observed site, in place of the above.
        vectorize: whether the model runs all simulations at once, as in :func:`~pyro_genexact.fit_amortized`.
        num_workers: the number of processes for runs one by one.
        validation: the fraction of the simulations to hold out for early stopping, or None.
        epochs: as in :func:`~pyro_genexact.fit`, like the arguments below.
        seconds: the maximum time of training.
        batch_size: the number of rows per step; by default that of ``fit``, and up to 1024 for more than 51,200 rows.
        lr: the learning rate.
        patience: the number of epochs without better validation nats after which the learning rate drops.
        fabric: a Lightning Fabric.
        checkpoint: the path of a checkpoint file.
        every: the number of steps between two checkpoints.
        seed: the seed of simulations, networks and training.
        progress: whether to report simulations and training on stderr.
        kwargs: keyword arguments of the model.

    Returns:
        The learned likelihood, in eval mode. Its parameters are frozen, which saves time in gradients with respect to latents; use
        ``requires_grad_()`` before fitting it further.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a site is missing or has another shape in some simulations, if the site has a continuous support and repeated
            values, if values are outside the support, or if rows of its plates differ in distribution.

    Cost: N runs of the model, and a forward and a backward pass of the networks over the N R rows per epoch.

    References: Papamakarios, Sterratt, Murray, "Sequential neural likelihood", AISTATS 2019; Fengler et al., "Likelihood
    approximation networks (LANs) for fast inference of simulation models in cognitive neuroscience", eLife 2021; Boelts et al.,
    "Flexible and efficient simulation-based inference for models of decision-making", eLife 2022.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def simulator():
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Poisson(rate))
        >>> learned = likelihood(simulator, simulations=500, epochs=2, progress=False)
        >>> rate = torch.tensor([0.5, 2.0])
        >>> learned(rate).log_prob(torch.tensor(3.0)).shape
        torch.Size([2])
        >>> learned(rate).support
        IntegerGreaterThan(lower_bound=0)
    """
    if not callable(model):
        raise TypeError(f"Expected model to be callable; got {type(model).__name__}.")
    check_kind("observed", observed, str)
    seed = checked_seed(seed)
    program = partial(model, *args, **kwargs)
    with seeded(seed, torch.device("cpu")):
        nodes: Any = traced(program).nodes
    names = _inputs(nodes, observed, given)
    propose = None if proposal is None else partial(_proposed, proposal, args, kwargs, nodes, names, seed=seed)
    options = {"seed": seed, "vectorize": vectorize, "num_workers": num_workers, "progress": progress}
    draws = _simulated(program, nodes, [*names, observed], simulations, propose, options)
    y, inputs, shared = tables(nodes, names, observed, draws)
    with seeded(seed + 1, torch.device("cpu")):
        again: Any = traced(program).nodes  # other values of the latents
    with seeded(seed, torch.device("cpu")):
        layouts = {n: v.shape[2:] for n, v in inputs.items()}
        learned = _made(nodes, again, layouts, observed, y, support, recipe, module)
    learned = learned.to(next((v for v in (*inputs.values(), y) if v.is_floating_point()), torch.empty(0)))
    train, held_out = _rows(learned, y, inputs, shared, observed, _halves(len(y), validation, seed))
    if batch_size is None and len(train[0]) > BATCHES * DEFAULT_BATCH:
        batch_size = min(len(train[0]) // BATCHES, LARGEST_BATCH)
    if isinstance(learned.module, Columns):
        learned.module.standardise(train[0], learned.given(train[1]))
    learned.result = fit(
        learned, *train, validation=held_out, epochs=epochs, seconds=seconds, batch_size=batch_size, lr=lr, patience=patience,
        fabric=fabric, checkpoint=checkpoint, every=every, seed=seed, progress=progress,
    )  # fmt: skip
    return learned.eval().requires_grad_(False)


def _simulated(
    program: Any, nodes: Any, names: list[str], simulations: Any, propose: Any, options: dict[str, Any]
) -> Mapping[str, Tensor]:
    """Returns simulations (N, ...) by site: those of the user, or new ones."""
    if isinstance(simulations, int):
        check_sizes(1, simulations=simulations)
        draws = None if propose is None else propose(simulations)
        latents = [n for n, site in nodes.items() if _is_latent(site)]  # the check of the vectorised run needs them
        wanted = [*dict.fromkeys([*names, *latents, *(draws or ())])]
        return simulate(program, wanted, simulations, given=draws, **options)
    if propose is not None:
        raise ValueError("Expected no proposal with stored simulations, which have their own; got one.")
    if not isinstance(simulations, Mapping):
        if not (hasattr(simulations, "__len__") and hasattr(simulations, "__getitem__")):
            raise TypeError(
                f"Expected simulations to be a number, a dict of tensors or a Dataset; got {type(simulations).__name__}."
            )
        simulations = default_collate([simulations[i] for i in range(len(simulations))])
    if missing := [name for name in names if name not in simulations]:
        raise ValueError(f"Expected simulations with the sites {names}; got none of {missing}.")
    return simulations  # type: ignore[no-any-return]


def _rows(
    learned: Likelihood, y: Tensor, inputs: dict[str, Tensor], shared: bool, observed: str, halves: Any
) -> tuple[Any, Any]:
    """Returns the rows for training and those held out, each with their inputs, after checks; standardises the inputs.

    Args:
        learned: the likelihood before the fit.
        y: (N, R, *item), the values of the observed site.
        inputs: (N, R, ...) by name.
        shared: whether all rows of a simulation have the same inputs.
        observed: the name of the site.
        halves: the numbers of the simulations for training, and of those held out or None.
    """
    kept = finite({**inputs, observed: y}, observed)
    learned.given.standardise({name: value[kept] for name, value in inputs.items()})
    if isinstance(learned.module, Columns):
        check_density(y[kept], observed, learned.module.real_places)
    if shared and y.shape[1] > 1:
        whole = kept.all(1)
        items = y[whole].reshape(len(y[whole]), y.shape[1], -1)
        check_alike(items, learned.given({n: v[whole, 0] for n, v in inputs.items()}), observed)

    def part(of: Any) -> Any:
        rows = kept[of]
        return _inside(learned, y[of][rows], {n: v[of][rows] for n, v in inputs.items()}, observed)

    train, held_out = halves
    return part(train), None if held_out is None else part(held_out)


def _inputs(nodes: Any, observed: str, given: Sequence[str] | None) -> list[str]:
    """Returns the names of the inputs; by default all latents."""
    sites = {name: site for name, site in nodes.items() if _is_site(site)}
    if isinstance(given, str):
        raise TypeError(f"Expected given to be a sequence of names; got the string {given!r}.")
    latents = (n for n, site in sites.items() if n != observed and _is_latent(site))
    names = list(latents if given is None else given)
    if unknown := [name for name in (observed, *names) if name not in sites]:
        raise ValueError(f"Expected observed and given to be sites of the model, {list(sites)}; got {unknown}.")
    if not names or observed in names or len(set(names)) < len(names):
        raise ValueError(f"Expected at least one input other than {observed!r}, and each one once; got {names}.")
    return names


def _is_site(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


def _is_latent(site: Any) -> bool:
    helper = ("_deterministic", "was_observed", "is_auxiliary")
    return _is_site(site) and not any(site["infer"].get(flag) for flag in helper)


def _proposed(proposal: Any, args: Any, kwargs: Any, nodes: Any, inputs: list[str], size: int, *, seed: int) -> Draws:
    """Returns N draws (N, ...) of the proposal, each of its M draws equally often up to 1."""
    sites = {n: nodes[n]["value"] for n in inputs if not is_deterministic(nodes[n])}
    if not isinstance(proposal, Mapping):
        if not callable(proposal):
            raise TypeError(f"Expected proposal to be a dict of draws or a program; got {type(proposal).__name__}.")
        program = partial(proposal, *args, **kwargs)
        with seeded(seed, torch.device("cpu")):
            names = [n for n, site in traced(program).nodes.items() if _is_latent(site) and n in sites]
        proposal = _drawn(program, names, size, seed + 1)
    found = {name: torch.as_tensor(value) for name, value in proposal.items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    lengths = {shape[:1] for shape in shapes.values()}
    if (
        len(lengths) != 1
        or lengths & {(), (0,)}
        or any(n not in sites or s[1:] != sites[n].shape for n, s in shapes.items())
    ):
        raise ValueError(
            f"Expected proposal with draws (M, ...), M >= 1, of some inputs, { {n: tuple(v.shape) for n, v in sites.items()} }; got "
            f"{shapes}."
        )
    count = next(iter(lengths))[0]
    index = torch.randperm(max(size, count), generator=generator(seed), device="cpu")[:size] % count
    return {name: value[index].to(sites[name].dtype) for name, value in found.items()}


def _drawn(program: Callable[[], Any], names: Sequence[str], size: int, seed: int) -> Draws:
    """Returns draws of a guide. A vectorised run need not agree with single ones: draws of any distribution will do."""
    with suppress(Exception):  # such as shapes that do not fit an outer plate
        return simulate(program, names, size, seed=seed, vectorize=True)
    return simulate(program, names, size, seed=seed, vectorize=False)


def _made(
    nodes: Any, again: Any, inputs: Mapping[str, Size], observed: str, y: Tensor, support: Any, recipe: Any, module: Any
) -> Likelihood:
    """Returns the likelihood with new networks; ``again`` are the sites of another run."""
    given, item = Given([input_of(nodes[n], again[n], shape) for n, shape in inputs.items()]), y.shape[2:]
    if module is None:
        support = support_of(nodes[observed], again[observed], item) if support is None else support
        if not y.is_floating_point() and support is constraints.real:
            raise ValueError(f"Expected support= for {observed!r}, whose values are {y.dtype}; got none.")
        return Likelihood(given, Columns(support, item, given.features, recipe, y.dtype))
    made = module(given.features)
    check_kind("module(C)", made, nn.Module)
    with torch.no_grad():
        d = made(torch.zeros(given.features))
    if not isinstance(d, torch.distributions.Distribution) or (d.batch_shape, d.event_shape) != (Size(), item):
        got = tuple(d.event_shape) if isinstance(d, torch.distributions.Distribution) else type(d).__name__
        raise ValueError(
            f"Expected module(C) to return distributions of event_shape {tuple(item)} ({observed!r}); got {got}."
        )
    return Likelihood(given, made)


def _halves(size: int, validation: float | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Returns the simulations for training and those for validation or None."""
    order = torch.randperm(size, generator=generator(seed), device="cpu")
    if validation is None:
        return order, None
    count = round(validation * size)
    if not 0 < count < size:
        raise ValueError(f"Expected validation to leave simulations in both parts; got {validation} of {size}.")
    return order[count:], order[:count]


@torch.no_grad()
def _inside(learned: Likelihood, y: Tensor, inputs: Draws, name: str) -> tuple[Tensor, Draws]:
    """Returns the rows in the interior of the support; values on the boundary come from rounding, and have probability 0."""
    found = []
    for i in torch.arange(len(y)).split(ROWS):
        d = learned(**{n: v[i] for n, v in inputs.items()})
        d._validate_args = False
        found.append(d.log_prob(y[i]) > -torch.inf)
    inside = torch.cat(found)
    if (share := 1 - inside.double().mean().item()) > 0.001:
        raise ValueError(
            f"Expected simulations of {name!r} in the support; got {share:.1%} outside or on the boundary."
        )
    if share:
        warnings.warn(
            f"{int((~inside).sum())} values of {name!r} on the boundary of the support are left out.", stacklevel=5
        )
    return y[inside], {n: v[inside] for n, v in inputs.items()}
