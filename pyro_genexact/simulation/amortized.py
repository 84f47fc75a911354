"""``Amortized``, a guide that maps any observation to a posterior of all latents of a model."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Size, Tensor, nn

from ..contexts import unpadded
from ..core.checks import check_sizes
from ..flows.recipes import nsf
from .latent_sites import dim_of, latent_sites
from .latent_space import Group, Latent, broadcast
from .observations import Inputs, Observed, encoders_by_site
from .one_call import check_whole, observed_in, plates_of, register, run_of
from .posterior_network import Member, Posterior
from .simulated_rows import rows_of
from .simulations import simulate
from .typicality import Typicality

_WITHOUT_MODEL: dict[str, Any] = {"_model": (None,), "_encoders": {}, "_recipe": None, "_options": {}}
START = 1000  # simulated rows that standardise a guide before it is fitted by the ELBO


class Amortized(nn.Module):
    """A guide that maps any observation to a posterior of all latents of a model.

    The latents, their supports and their plates are those of the model. The posterior of a latent has no mass outside of
    its support, and its density is exact. The *row plate* is the leftmost plate that contains latents and observed sites.
    The latents in it are *local*: each row has the same networks, and the number of rows may change from call to call. All
    others are *global*, and the sizes of other plates are fixed. If sites outside of the row plate depend on its latents, so
    that its rows are not independent given the others, all latents are global. The posterior is

        q(globals | all observations) prod_r q(locals of row r | observations of row r, globals),

    or, of an ensemble, the equal mixture of K such products. Each factor is also given the observed sites outside of the plate.

    Discrete latents with finite supports have a chain rule of categorical heads, and continuous ones a flow given these. The flow
    is over the residuals of a linear regression of the unconstrained latents on the observations, with mean 0 and covariance 1.

    Fit the guide to simulations by :func:`~pyro_genexact.fit_amortized`, or to the ELBO by :func:`~pyro_genexact.fit_guide`.
    Draws are reparameterised if all latents are continuous, and ``recipe=flows.iaf`` is then the fastest recipe for the ELBO. As
    a Pyro guide it is called with the arguments of the model, and reads the observations from ``observations=``, from keyword arguments with
    the names of the observed sites, or from the observed sites of a run of the model. The row plate may be subsampled if all
    latents are in it and the guide has one flow; model and guide then have the same rows.

    An observed site is one vector unless an encoder reads it. Encoders of sets and series read any number of items, and values
    of different sizes as a :class:`~pyro_genexact.PaddedSequence`. All encoders of :mod:`pyro_genexact.encoders` but
    ``Standardized`` read NaN as a missing entry. Other data on which the posterior depends, such as covariates, need a site too:
    ``pyro.sample("x", Delta(x), obs=x)``.

    Copies keep the model. Pickles and files of :func:`~pyro_genexact.save` do not contain it; the loaded guide has draws and
    densities, but cannot create networks or run the model.

    Args:
        model: a Pyro model.
        observed: the name or names of the observed sites: ``pyro.sample`` sites, whose log_prob is not used, or
            ``pyro.deterministic`` sites with the output of a simulator.
        encoder: a module with an attribute ``features``, which maps the value of an observed site (*batch, ...) to a tensor
            (*batch, features), or a dict of these by site, or a :class:`~pyro_genexact.encoders.Joint`. If there are local
            latents, it reads the value of one row. An encoder of :mod:`pyro_genexact.encoders` reads the site as one vector or,
            if its ``event_dim`` is 2, as items (N, F), or (N,) for F = 1. Other modules get values of the site's shape,
            standardised unless they have a method ``standardize``. By default
            :class:`~pyro_genexact.encoders.Standardized`.
        recipe: a function that is called as ``recipe(D, context=C, **options)`` and returns a
            :class:`~pyro_genexact.Flow` over D real numbers.
        latents: the name or names of the latents; the others, such as the hidden states of a simulator, are averaged over, and
            need not exist in every run. By default all. :func:`~pyro_genexact.diagnostics.psis` and SVI need all latents.
        options: keyword arguments of the recipe.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: at the first call, if the model has no latents or lacks an observed site, if the support of a latent
            is an infinite discrete set, or depends on other latents or on the row, if an encoder does not fit its site, or if a
            plate is subsampled although latents outside of it depend on all of its data.

    References: Papamakarios, Murray, "Fast ε-free inference of simulation models with Bayesian conditional density
    estimation", NeurIPS 2016; Greenberg, Nonnenmacher, Macke, "Automatic posterior transformation for likelihood-free
    inference", ICML 2019.

    Example:
        >>> import torch
        >>> import pyro, pyro.distributions as dist, pyro_genexact as gx
        >>> def model(y=None):
        ...     p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("y", dist.Binomial(10, p), obs=y)
        >>> guide = Amortized(model, observed="y")
        >>> result = gx.fit_amortized(model, guide, simulations=500, epochs=2, progress=False)
        >>> guide.draws({"y": torch.tensor(7.0)}, 100)["p"].shape
        torch.Size([100])
    """

    network: Posterior | None
    typicality: Typicality | None
    latents: list[Latent]

    def __init__(
        self,
        model: Callable[..., Any],
        observed: str | Sequence[str] = ("y",),
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        recipe: Callable[..., Any] = nsf,
        *,
        latents: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("recipe", recipe)):
            if not callable(value):
                raise TypeError(f"Expected {name} to be callable; got {type(value).__name__}.")
        self.observed = (observed,) if isinstance(observed, str) else tuple(observed)
        if not self.observed or not all(isinstance(name, str) for name in self.observed):
            raise ValueError(f"Expected observed to be names of sites; got {observed!r}.")
        self.chosen = (latents,) if isinstance(latents, str) else None if latents is None else tuple(latents)
        if self.chosen == () or not all(isinstance(name, str) for name in self.chosen or ()):
            raise ValueError(f"Expected latents to be names of sites; got {latents!r}.")
        self._model: Any = (model,)  # in a tuple, so that it is not a submodule
        self._encoders, self._recipe, self._options = encoders_by_site(encoder, self.observed), recipe, options
        self.network, self.typicality = None, None

    def setup(self, *args: Any, ensemble: int | None = None, **kwargs: Any) -> Any:
        """Creates the networks, if there are none or another number of them, from runs of the model.

        Args:
            args: arguments of the model.
            ensemble: K, the number of flows whose equal mixture is the posterior; by default the present one or 1.
            kwargs: keyword arguments of the model.
        """
        if self.network is not None and ensemble in (None, len(self.network.members)):
            return self.network
        one, sites, plate = latent_sites(self.program(args, kwargs), self.observed, self.chosen)
        made = [Latent.of(site, dim_of(site, plate)) for site in sites.values()]
        groups = Group([x for x in made if x.row is None]), Group([x for x in made if x.row is not None])
        floating = [s["value"] for s in sites.values() if s["value"].is_floating_point()] or [torch.empty(0)]
        like = max(floating, key=lambda value: value.dtype.itemsize)
        self.latents, self._plate = made, plate
        self._name = "_".join(["amortized", *(x.name for x in made)])
        self.network = self._network(one, groups, plate, ensemble or 1).to(like).eval()
        self.typicality = Typicality(self.network.features).to(like).eval().requires_grad_(False)
        return self.network

    def _network(self, trace: Any, groups: tuple[Group, Group], plate: Any, ensemble: int) -> Posterior:
        inside: list[Observed] = []
        outside: list[Observed] = []
        for name in self.observed:
            site = trace.nodes[name]
            if not isinstance(site["value"], Tensor):
                raise TypeError(f"Expected the value of {name!r} to be a tensor; got {type(site['value']).__name__}.")
            shape, dim = list(site["value"].shape), dim_of(site, plate)
            axis = None if dim is None else dim - site["fn"].event_dim
            if axis is not None:
                if len(shape) + axis < 0:
                    raise ValueError(
                        f"Expected pyro.deterministic({name!r}, value, event_dim=n), with n dims to the right of plate "
                        f"{plate!r}; got a value of shape {tuple(shape)} and event_dim {site['fn'].event_dim}."
                    )
                shape.pop(axis)
            sites = outside if plate is not None and axis is None else inside
            sites.append(Observed(name, Size(shape), axis, self._encoders.get(name)))
        inputs, more = Inputs(inside), Inputs(outside) if outside else None
        make = partial(Member, groups, plate is not None, inputs, more, self._recipe, self._options)
        return Posterior(make, groups, plate is not None, inputs, more, ensemble)

    def program(self, args: Any, kwargs: Mapping[str, Any], model: Any = None) -> Callable[[], Any]:
        """Returns a model without arguments, by default that of the guide.

        It gets those observations for which it has arguments.
        """
        model = self._model[0] if model is None else model
        if model is None:
            raise RuntimeError("Unpickled guides carry no model; construct the guide anew and load the state dict.")
        try:
            known = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
        except ValueError:
            return partial(model, *args, **kwargs)
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return partial(model, *args, **kwargs)
        return partial(model, *args, **{n: v for n, v in kwargs.items() if n in known or n not in self.observed})

    def posterior(self, observations: Mapping[str, Any]) -> Any:
        """Returns the distribution of all latents as one vector, given observations (*batch, ...) by site."""
        network = self.made()
        return network(**self.checked(observations))  # type: ignore[no-any-return]

    def checked(self, observations: Mapping[str, Any], finite: bool = True) -> dict[str, Any]:
        """Returns the observations after checks, as the networks read them.

        Args:
            observations: tensors (*batch, ...) by site, or a :class:`~pyro_genexact.PaddedSequence` of sets or series.
            finite: whether to raise an error if a value cannot be read.
        """
        network = self.made()
        if not isinstance(observations, Mapping) or set(observations) != set(self.observed):
            got = list(observations) if isinstance(observations, Mapping) else type(observations).__name__
            raise ValueError(f"Expected observations to be a dict of {list(self.observed)}; got {got}.")
        like, found, leads = next(network.parameters()), {}, set()
        for site in self.sites():
            value = site.checked(observations[site.name], like)
            if finite and not site.usable(value).all():
                among = " where it is not missing" if site.reads_missing else ""
                raise ValueError(f"Expected observations[{site.name!r}] to be finite{among}; got NaN or infinity.")
            x = unpadded(value)[0]
            lead = x.shape[: x.dim() - site.dims]
            leads.add((lead, None) if site.axis is None else (lead[:-1], lead[-1]))
            found[site.name] = value
        rows = {r for _, r in leads if r is not None}
        if len({batch for batch, _ in leads}) > 1 or len(rows) > 1 or 0 in rows:
            shapes = {name: tuple(unpadded(value)[0].shape) for name, value in observations.items()}
            raise ValueError(f"Expected observations of the same batch shape and number of rows; got shapes {shapes}.")
        return found

    def usable(self, observations: Mapping[str, Any]) -> Tensor:
        """Returns which of the observations (*batch, ...) the networks can read, (*batch,)."""
        found = self.checked(observations, finite=False)
        return torch.stack([site.usable(found[site.name]) for site in self.sites()]).all(0)

    def sites(self) -> list[Any]:
        """Returns the observed sites."""
        network = self.made()
        return [*network.inputs.sites, *(network.outside.sites if network.outside is not None else ())]

    def forward(self, *args: Any, observations: Mapping[str, Any] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Samples the latents as Pyro sites, and returns them by name.

        Args:
            args: arguments of the model.
            observations: the observations of one run by site.
            kwargs: keyword arguments of the model.
        """
        if self.network is None:
            self.setup(*args, **kwargs)
            self._standardise(self.program(args, kwargs))
        network, run = self.made(), None
        if observations is None:
            given = {name: kwargs[name] for name in self.observed if isinstance(kwargs.get(name), Tensor)}
            run = (
                None
                if not network.has_rows and len(given) == len(self.observed)
                else run_of(self.program(args, kwargs))
            )
            observations = given if run is None else observed_in(run, self.observed, given)
        if run is not None:
            check_whole(run, self.observed, self._plate)
        posterior = self.posterior(observations)
        if posterior.batch_shape:
            raise ValueError(
                f"Expected observations of one run of the model; got batch shape {tuple(posterior.batch_shape)}."
            )
        register(self._name, network)
        splits = not network.groups[0].size and len(network.members) == 1
        plates, weight = plates_of(self.latents, self._plate, posterior.rows, run, splits)
        with poutine.scale(scale=weight):
            packed = pyro.sample(f"_{self._name}", posterior, infer={"is_auxiliary": True})
        values = self._unpacked(packed, posterior.rows, True)
        for x in self.latents:
            with ExitStack() as stack:
                for frame in x.frames:
                    stack.enter_context(plates[frame.name])
                pyro.sample(x.name, Delta(values[x.name], event_dim=x.event_dim))
        return values

    def _standardise(self, program: Callable[[], Any]) -> None:
        """Standardises by a few simulations, before the guide is fitted by the ELBO."""
        network, names = self.made(), [*(x.name for x in self.latents), *self.observed]
        with (
            warnings.catch_warnings(),
            suppress(ValueError),
        ):  # without usable simulations, all shifts are 0 and scales 1
            warnings.simplefilter("ignore")
            size = simulate(program, names, 1)
            rows = max((size[x.name].shape[x.row] for x in self.latents if x.row is not None), default=1)
            network.standardise(*rows_of(self, simulate(program, names, -(-START // rows)), names))

    def draws(self, observations: Mapping[str, Any], num: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws from the posterior.

        Args:
            observations: tensors (*batch, ...) by observed site, or PaddedSequences of sets and series.
            num: S, the number of draws.
            args: arguments of the model, which are read only if the guide has not been fitted or called.
            kwargs: keyword arguments of the model.

        Returns:
            Tensors (S, *batch, ...) by latent.

        Raises:
            ValueError: if an observed site is missing or has another shape, NaN or infinity.

        Warns:
            UserWarning: if observations are unlike all simulations, see :meth:`tail_probability`. At most 1% of the calls
                with observations of the model warn, and 1 / (n + 1) of those with one observation, where n is half the
                number of simulations, at most 4096.

        Cost: S draws of the flow; with an ensemble, each draw runs one of its flows.
        """
        check_sizes(1, num=num)
        self.setup(*args, **kwargs)
        with torch.no_grad():
            posterior = self.posterior(observations)
            if self.typicality is not None:
                self.typicality.warn(posterior.features, self.made().has_rows)
            return self._unpacked(posterior.sample((num,)), posterior.rows)

    @torch.no_grad()
    def tail_probability(self, observations: Mapping[str, Any]) -> Tensor:
        """Returns the probability that the model generates a less typical observation.

        It is the rank of a log density, under a flow of the features that the encoder returns, among up to 4096 simulations.
        It is uniform for observations of the model with as many rows as the simulations. A small value shows an observation
        unlike all simulations, for which the posterior is an extrapolation. ``draws`` warns if it is the smallest possible value.

        Args:
            observations: tensors (*batch, ...) by observed site.

        Returns:
            A tensor (*batch).

        Raises:
            RuntimeError: if the guide has not been fitted by :func:`~pyro_genexact.fit_amortized`.
            ValueError: as ``draws``.
        """
        network, typicality = self.made(), self.typicality
        if typicality is None or not typicality.count():
            raise RuntimeError("Fit the guide by fit_amortized before using this method.")
        return typicality.tail(typicality.score(self.posterior(observations).features, network.has_rows))

    def log_prob(self, latents: Mapping[str, Tensor], observations: Mapping[str, Any]) -> Tensor:
        """Returns the exact log density of latents in nats, on their supports.

        It is the density of all latents jointly: a product of a probability of the discrete ones and a density of the
        continuous ones. It is -inf outside of the supports.

        Args:
            latents: tensors (*sample, *batch, ...) by latent, whose sample and batch dims broadcast.
            observations: tensors (*batch, ...) by observed site.

        Returns:
            A tensor (*sample, *batch).
        """
        posterior = self.posterior(observations)
        return posterior.log_prob(self.packed(latents, posterior.rows))

    def packed(self, latents: Mapping[str, Tensor], rows: int) -> Tensor:
        """Returns latents (*batch, ...) by name as vectors (*batch, P)."""
        network = self.made()
        if set(latents) != {x.name for x in self.latents}:
            raise ValueError(f"Expected latents {[x.name for x in self.latents]}; got {list(latents)}.")
        like = next(network.parameters())
        values = {name: torch.as_tensor(value).to(like.device) for name, value in latents.items()}
        of_all, of_row = network.groups
        parts = [group.pack(values, rows, like.dtype).flatten(-2) for group in (of_all, of_row) if group.size]
        return broadcast(parts, 1)

    def _unpacked(self, packed: Tensor, rows: int, merged: bool = False) -> dict[str, Tensor]:
        of_all, of_row = self.made().groups
        parts = self.made().split(packed, rows)
        found = of_all.unpack(parts[0].unsqueeze(-2), packed.shape[:-1], merged) if of_all.size else {}
        found |= of_row.unpack(parts[1], packed.shape[:-1], merged) if of_row.size else {}
        return {x.name: found[x.name] for x in self.latents}

    def __getstate__(self) -> dict[str, Any]:
        """The state without what creates networks: model, recipe, and encoders, which are parts of the networks."""
        modules = copy.deepcopy(self._modules)  # without Pyro's marks at parameters in its store, which have no pickle
        return {**self.__dict__, "_modules": modules, **_WITHOUT_MODEL}

    def __deepcopy__(self, memo: dict[int, Any]) -> Amortized:
        new = memo[id(self)] = type(self).__new__(type(self))
        kept = {name: self.__dict__[name] for name in ("_model", "_recipe", "_options")}
        new.__setstate__(copy.deepcopy({**self.__dict__, **_WITHOUT_MODEL, "_encoders": self._encoders}, memo) | kept)
        return new

    def made(self) -> Any:
        """Returns the networks.

        Raises:
            RuntimeError: before the first call.
        """
        if self.network is None:
            raise RuntimeError("Fit the guide by fit_amortized, or call it once, before using this method.")
        return self.network
