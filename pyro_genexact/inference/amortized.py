"""``Amortized``, a guide that maps any observation to a posterior of all latents of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn

from ..core.checks import check_sizes
from ..flows.recipes import nsf
from .latent_space import Group, Latent, check_supports
from .posterior_network import AmortizedPosterior, Inputs, Member, Posterior
from .simulations import traced
from .typicality import Typicality

_numbers = count()


class Amortized(nn.Module):
    """A guide that maps any observation to a posterior of all latents of a model, learned from simulations.

    The latents, their supports and their plates are those of the model. The posterior of a latent has no mass outside of
    its support, and its density is exact. Latents in a plate that also contains observed sites are *local*: each row of this
    plate has the same networks, and the number of rows may change from call to call. All others are *global*. The posterior is

        q(globals | all observations) prod_r q(locals of row r | observations of row r, globals).

    Discrete latents with finite supports have a chain rule of categorical heads, and continuous ones a flow given these. The flow
    is over the residuals of a linear regression of the unconstrained latents on the observations, with mean 0 and covariance 1.

    Fit the guide by :func:`~pyro_genexact.fit_amortized`, which needs only simulations. As a Pyro guide it is called with the
    arguments of the model, and reads the observations from ``observations=``, from keyword arguments with the names of the
    observed sites, or from the observed sites of a run of the model.

    Args:
        model: a Pyro model.
        observed: the name or names of the observed sites: ``pyro.sample`` sites, whose log_prob is not used, or
            ``pyro.deterministic`` sites with the output of a simulator.
        encoder: a module with an attribute ``features``, which maps the value of an observed site (*batch, ...) to a tensor
            (*batch, features), or a dict of these by site. If there are local latents, it reads the value of one row. By
            default the values are flattened.
        recipe: a function that is called as ``recipe(D, context=C, **options)`` and returns a
            :class:`~pyro_genexact.Flow` over D real numbers.
        options: keyword arguments of the recipe.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: at the first call, if the model has no latents or lacks an observed site, or if the support of a latent
            is an infinite discrete set or depends on other latents.

    References: Papamakarios, Murray, "Fast ε-free inference of simulation models with Bayesian conditional density
    estimation", NeurIPS 2016; Greenberg, Nonnenmacher, Macke, "Automatic posterior transformation for likelihood-free
    inference", ICML 2019.

    Example:
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
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("recipe", recipe)):
            if not callable(value):
                raise TypeError(f"Expected {name} to be callable; got {type(value).__name__}.")
        self.observed = (observed,) if isinstance(observed, str) else tuple(observed)
        if not self.observed or not all(isinstance(name, str) for name in self.observed):
            raise ValueError(f"Expected observed to be names of sites; got {observed!r}.")
        self._model: Any = (model,)  # in a tuple, so that it is not a submodule
        self._encoders, self._recipe, self._options = _encoders(encoder, self.observed), recipe, options
        self.network, self.typicality = None, None
        self._name = f"amortized_{next(_numbers)}"

    def setup(self, *args: Any, ensemble: int | None = None, **kwargs: Any) -> Posterior:
        """Creates the networks, if there are none or another number of them, from runs of the model.

        Args:
            args: arguments of the model.
            ensemble: K, the number of flows whose equal mixture is the posterior; by default the present one or 1.
            kwargs: keyword arguments of the model.
        """
        if self.network is not None and ensemble in (None, len(self.network.members)):
            return self.network
        program = self.program(args, kwargs)
        one, other = traced(program), traced(program)
        sites = {name: site for name, site in one.nodes.items() if _is_latent(site)}
        latents = {name: site for name, site in sites.items() if name not in self.observed}
        self._check(one, other, latents)
        plate = _row_plate(one, latents, self.observed)
        made = [Latent.of(site, _dim(site, plate)) for site in latents.values()]
        groups = Group([x for x in made if x.row is None]), Group([x for x in made if x.row is not None])
        floating = [s["value"] for s in latents.values() if s["value"].is_floating_point()]
        like = floating[0] if floating else torch.empty(0)
        self.latents, self._plate, self._sizes = made, plate, None
        self.network = self._network(one, groups, plate, ensemble or 1).to(like).eval()
        self.typicality = Typicality(self.network.features).to(like).eval().requires_grad_(False)
        return self.network

    def _check(self, one: Any, other: Any, latents: Mapping[str, Any]) -> None:
        if missing := [name for name in self.observed if name not in one.nodes]:
            raise ValueError(f"Expected observed to be sites of the model, {list(one.nodes)}; got {missing}.")
        if unnamed := [name for name, site in latents.items() if site["infer"].get("was_observed")]:
            raise ValueError(
                f"Expected observed to name all observed sites of the model; got {self.observed} without {unnamed}."
            )
        if not latents:
            raise ValueError("Expected a model with latents; got only observed sites.")
        again = {name for name, site in other.nodes.items() if _is_latent(site)} - {*self.observed}
        if again != set(latents):
            raise ValueError(
                f"Expected the same latents in every run of the model; got {sorted(again ^ set(latents))} in some runs only."
            )
        for name, site in latents.items():
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized or frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"Expected latents in vectorised plates without subsampling; got {name!r} in {frame.name!r}."
                    )
        check_supports((site, other.nodes[name]) for name, site in latents.items())

    def _network(self, trace: Any, groups: tuple[Group, Group], plate: Any, ensemble: int) -> Posterior:
        axes: dict[str, int | None] = {}
        inner: dict[str, Size] = {}
        outer: dict[str, Size] = {}
        for name in self.observed:
            site = trace.nodes[name]
            shape, dim = list(site["value"].shape), _dim(site, plate)
            axes[name] = axis = None if dim is None else dim - site["fn"].event_dim
            if axis is not None:
                shape.pop(axis)
            (outer if plate is not None and dim is None else inner)[name] = Size(shape)
        inputs = Inputs(inner, {n: e for n, e in self._encoders.items() if n in inner})
        outside = Inputs(outer, {n: e for n, e in self._encoders.items() if n in outer}) if outer else None
        make = partial(Member, groups, plate is not None, inputs, outside, self._recipe, self._options)
        return Posterior(make, groups, axes, inputs, outside, ensemble)

    def program(self, args: Any, kwargs: Mapping[str, Any], model: Any = None) -> Callable[[], Any]:
        """Returns a model, by default that of the guide, without arguments; it gets observations only if it has arguments for them."""
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

    def posterior(self, observations: Mapping[str, Tensor]) -> AmortizedPosterior:
        """Returns the distribution of all latents as one vector, given observations (*batch, ...) by site."""
        network = self.made()
        return network(**self.checked(observations))  # type: ignore[no-any-return]

    def checked(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the observations, after checks, on the device of the networks."""
        network = self.made()
        if not isinstance(observations, Mapping) or set(observations) != set(self.observed):
            got = list(observations) if isinstance(observations, Mapping) else type(observations).__name__
            raise ValueError(f"Expected observations to be a dict of {list(self.observed)}; got {got}.")
        found, batches, rows = {}, set(), set()
        device = next(network.parameters()).device
        for name, axis in network.row_axes.items():
            value = torch.as_tensor(observations[name]).to(device)
            of: Any = network.inputs if name in network.inputs.shapes else network.outside
            shape: list[Any] = list(of.shapes[name])
            if axis is not None:
                shape.insert(len(shape) + 1 + axis, "rows")
            tail = value.shape[value.dim() - len(shape) :]
            if value.dim() < len(shape) or any(e not in ("rows", n) for e, n in zip(shape, tail, strict=True)):
                text = ", ".join(map(str, ["*batch", *shape]))
                raise ValueError(
                    f"Expected observations[{name!r}] of shape ({text}), as in the model; got {tuple(value.shape)}."
                )
            if not value.isfinite().all():
                raise ValueError(f"Expected observations[{name!r}] to be finite; got NaN or infinity.")
            batches.add(value.shape[: value.dim() - len(shape)])
            rows |= set() if axis is None else {value.shape[axis]}
            found[name] = value
        if len(batches) > 1 or len(rows) > 1 or 0 in rows:
            shapes = {name: tuple(value.shape) for name, value in found.items()}
            raise ValueError(f"Expected observations of the same batch shape and number of rows; got shapes {shapes}.")
        return found

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Samples the latents as Pyro sites, and returns them by name.

        Args:
            args: arguments of the model.
            observations: the observations of one run by site.
            kwargs: keyword arguments of the model.
        """
        self.setup(*args, **kwargs)
        posterior = self.posterior(self._observations(args, kwargs) if observations is None else observations)
        if posterior.batch_shape:
            raise ValueError(
                f"Expected observations of one run of the model; got batch shape {tuple(posterior.batch_shape)}."
            )
        pyro.module(self._name, self.made())
        packed = pyro.sample(f"_{self._name}", posterior, infer={"is_auxiliary": True})
        values = self._unpacked(packed, posterior.rows, True)
        frames = {f.name: f for x in self.latents for f in x.frames}
        plates = {
            f.name: pyro.plate(f.name, posterior.rows if f.name == self._plate else f.size, dim=f.dim)
            for f in frames.values()
        }
        for x in self.latents:
            with ExitStack() as stack:
                for frame in x.frames:
                    stack.enter_context(plates[frame.name])
                value = values[x.name]
                pyro.sample(x.name, Delta(value, event_dim=x.event_dim))
        return values

    def _observations(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the observations among the keyword arguments, or those of a run of the model."""
        if all(isinstance(kwargs.get(name), Tensor) for name in self.observed):
            return {name: kwargs[name] for name in self.observed}
        with torch.no_grad(), poutine.block():
            nodes: Any = poutine.trace(self.program(args, kwargs)).get_trace().nodes
        missing = [n for n in self.observed if not nodes[n]["is_observed"] or nodes[n]["infer"].get("_deterministic")]
        if missing:
            raise ValueError(
                f"Expected values of the observed sites: pass observations={{name: value}}, or arguments with which the model "
                f"observes them; got none for {missing}."
            )
        return {name: nodes[name]["value"] for name in self.observed}

    def draws(self, observations: Mapping[str, Tensor], num: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws from the posterior.

        Args:
            observations: tensors (*batch, ...) by observed site.
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

        Cost: S draws of the flow; with an ensemble, of each of its flows.
        """
        check_sizes(1, num=num)
        self.setup(*args, **kwargs)
        posterior = self.posterior(observations)
        if self.typicality is not None:
            self.typicality.warn(posterior.features, self.made().has_rows)
        return self._unpacked(posterior.sample((num,)), posterior.rows)

    @torch.no_grad()
    def tail_probability(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Returns the probability that the model generates a less typical observation.

        It is the rank of a log density, under a flow of the features that the encoder returns, among up to 4096 simulations.
        It is uniform for observations of the model. A small value shows an observation unlike all simulations, for which
        the posterior is an extrapolation: ``draws`` warns if this is the smallest value possible.

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

    def log_prob(self, latents: Mapping[str, Tensor], observations: Mapping[str, Tensor]) -> Tensor:
        """Returns the exact log density of latents in nats, on their supports.

        It is the density of all latents jointly: a product of a probability of the discrete ones and a density of the
        continuous ones. It is -inf outside of the supports.

        Args:
            latents: tensors (*sample, *batch, ...) by latent.
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
        return torch.cat(parts, -1)

    def _unpacked(self, packed: Tensor, rows: int, merged: bool = False) -> dict[str, Tensor]:
        of_all, of_row = self.made().groups
        parts = self.made().split(packed, rows)
        found = of_all.unpack(parts[0].unsqueeze(-2), packed.shape[:-1], merged) if of_all.size else {}
        found |= of_row.unpack(parts[1], packed.shape[:-1], merged) if of_row.size else {}
        return {x.name: found[x.name] for x in self.latents}

    def made(self) -> Posterior:
        """Returns the networks.

        Raises:
            RuntimeError: before the first call.
        """
        if self.network is None:
            raise RuntimeError("Fit the guide by fit_amortized, or call it once, before using this method.")
        return self.network


def _is_latent(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not site["infer"].get("_deterministic")
    )


def _row_plate(trace: Any, latents: Mapping[str, Any], observed: Sequence[str]) -> str | None:
    """Returns the name of the leftmost plate that contains latents and observed sites."""
    of_data = {f.name for name in observed for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized}
    shared = [f for site in latents.values() for f in site["cond_indep_stack"] if f.name in of_data]
    return min(shared, key=lambda f: f.dim).name if shared else None


def _dim(site: Any, plate: str | None) -> int | None:
    """Returns the dim of a plate in the batch shape of a site; None if the site is not in it."""
    return next((f.dim for f in site["cond_indep_stack"] if f.name == plate), None)


def _encoders(encoder: Any, observed: Sequence[str]) -> dict[str, nn.Module]:
    if encoder is None:
        return {}
    if isinstance(encoder, nn.Module) and not isinstance(encoder, nn.ModuleDict):
        if len(observed) > 1:
            raise ValueError(
                f"Expected encoder to be a dict with several observed sites {list(observed)}; got one module."
            )
        encoder = {observed[0]: encoder}
    found = dict(encoder.items())
    if unknown := sorted(set(found) - set(observed)):
        raise ValueError(f"Expected encoder to be a dict of observed sites, {list(observed)}; got {unknown}.")
    for name, module in found.items():
        if not isinstance(module, nn.Module) or not isinstance(getattr(module, "features", None), int):
            raise TypeError(
                f"Expected encoder of {name!r} to be a module with an integer attribute features; got {type(module).__name__}."
            )
    return found
