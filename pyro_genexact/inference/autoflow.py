"""``AutoFlow``, an automatic guide whose posterior of all continuous latents is a normalising flow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import IndependentTransform

from ..core.checks import check_positive, check_sizes
from ..core.devices import device_of
from ..core.quantiles import quantiles as quantiles_of
from ..core.random import seeded
from ..flows.base import Flow
from ..flows.recipes import iaf
from .density import Density, apart, initial, is_enumerated
from .fit_guide import fit_guide
from .guide_flow import check_plates, guide_flow
from .mixture_guide import AtLatents, FlowMixture
from .mixture_start import spread
from .warm_start import PATHS, finder, improve

STARTS = ("pathfinder", "laplace")


class AutoFlow(AutoContinuous):
    """An automatic guide that is a normalising flow over all continuous latents of a model.

    The unconstrained latents are ``z = loc + L tails(flow(noise))``. Latents are mapped to the reals by ``biject_to`` and
    concatenated to one vector of D numbers, as in Pyro's other automatic guides, and the guide has the same methods
    (``get_posterior``, ``get_base_dist``, ``get_transform`` for ``NeuTraReparam``, ...). The location loc, the lower
    triangular matrix L, and the skewness and weight of the tails are learned jointly with the flow, so that the guide
    can represent every Gaussian.

    The guide starts close to a Gaussian with the values of ``init_loc_fn`` as mean and ``init_scale`` as standard
    deviations, as ``AutoMultivariateNormal`` does. The first call replaces this Gaussian by the one that :meth:`fit_pathfinder`
    finds, if that has a higher ELBO. Discrete latents that the model marks for parallel enumeration
    (``config_enumerate``) are not part of the guide.

    With ``blocks``, the guide of a hierarchical model has the dependencies of its posterior: q(z) = q(globals) times the
    product over the G rows of a plate of q(locals of the row | globals). The flow of the rows is
    ``recipe(d, context=C, **options)`` with the same weights for all rows. Its context is the globals and a learned
    embedding of each row, and that of the globals is ``recipe(G0, **options)``. Other plates inside of a row are part of its
    d numbers. The affine map is z0 = c0 + L0 x0 and z_g = c_g + L_g x_g + B_g x0, with parameters per row, so that the guide
    can represent every Gaussian with these independences. Time and memory are linear in G. The first call maximises the
    density of the globals, with the rows integrated out by Laplace's approximation, which is exact for Gaussian rows. Only one
    plate can be named, since rows of two plates depend on each other if they share data.

    With ``rank``, L is a scale of each latent and a stretch along r directions, which costs O(D r) where the triangular L
    costs O(D^2). On a regression with 300 coefficients, fits with rank 100 and with L ended 36 and 0.07 nats below the log evidence,
    so use ``rank`` only if D^2 numbers are too many. With hundreds of latents, prefer ``recipe=flows.realnvp``, whose networks are
    smaller than those of ``iaf``, and whose ELBO was 0.4 nats higher there.

    The first call creates the parameters, so call the guide once before ``load_state_dict``. Two guides of this class use
    the same names in Pyro's parameter store; SVI then optimises only one of them, and
    :func:`~pyro_genexact.fit_guide` optimises both.

    With ``mixture=K``, q(z) = sum_k w_k q_k(z) is a mixture of K such flows with learned weights, for posteriors with several
    modes. The warm start places the flows at different modes, see :meth:`fit_pathfinder`. Draws are differentiable given their
    flow; the weights have score-function gradients, so the fit needs several draws per step. Each flow also evaluates the
    draws of the others, so a step takes about K + 1 times as long as for one flow. A mixture has no transform from noise, so
    ``NeuTraReparam`` and ``sample_posterior(method="nuts")`` raise an error. Use ``iaf`` for mixtures too: with K = 2 and D = 10, fits
    with ``iaf``, ``realnvp`` and ``coupling_nsf`` ended 0.01, 0.07 and 0.07 nats below the log evidence, and a step of 256 draws took
    15, 11 and 22 ms.

    :class:`~pyro_genexact.guides.Amortized` is a guide for any observation, and for latents in subsampled plates.

    Args:
        model: a Pyro model.
        recipe: a function that is called as ``recipe(D, **options)`` and returns a :class:`~pyro_genexact.Flow` over
            D real numbers.
        init_loc_fn: the initial value of each latent, see ``pyro.infer.autoguide.initialization``. Latents with an
            improper prior, which cannot be sampled, start at 0 in unconstrained space.
        init_scale: the initial standard deviation of each unconstrained latent.
        warm_start: "pathfinder" or "laplace" to call :meth:`fit_pathfinder` or :meth:`fit_laplace` in the first call, or the
            number of steps of :meth:`fit_gaussian`, 0 for none.
        blocks: the name of a plate whose rows are independent given the latents outside of it. With ``iaf``, networks then
            have one hidden layer of 32 units by default.
        rank: r, the number of directions of a low-rank affine map; None for a triangular matrix.
        mixture: K, the number of flows.
        options: keyword arguments of the recipe.

    Raises:
        TypeError: if the recipe is not callable or does not return a flow, or ``blocks`` is not a name.
        RuntimeError: at the first call, if the model has no continuous latents.
        ValueError: if two of ``blocks``, ``rank`` and ``mixture`` are given. At the first call, if a latent is in a subsampled plate, if a
            discrete latent is not enumerated, if no latent is in the plate of ``blocks``, if ``rank`` is above D, or if the
            flow is not over D real numbers; with ``blocks``, if the base of the flows is not standard normal.

    Warns:
        UserWarning: at a warm start by name, if rows of ``blocks`` depend on each other given the globals. It fails then.

    References: Rezende, Mohamed, "Variational Inference with Normalizing Flows", ICML 2015; Kucukelbir et al., "Automatic
    Differentiation Variational Inference", JMLR 2017; Jones, Pewsey, "Sinh-arcsinh distributions", Biometrika 2009; Zhang et
    al., "Pathfinder", JMLR 2022; Agrawal, Domke, "Amortized Variational Inference for Simple Hierarchical Models", NeurIPS
    2021; Rue, Martino, Chopin, "Approximate Bayesian inference for latent Gaussian models by using integrated nested Laplace
    approximations", JRSS B 2009; Morningstar et al., "Automatic Differentiation Variational Inference with Mixtures", AISTATS
    2021.

    Example:
        >>> import torch
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoFlow(model, hidden=(8,))
        >>> sorted(guide(torch.ones(5)))
        ['scale']
        >>> guide.quantiles([0.05, 0.95])["scale"].shape
        torch.Size([2])

        A hierarchical model with a flow whose weights all groups share:

        >>> def groups(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("groups", len(y)):
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> guide = AutoFlow(groups, blocks="groups")
        >>> guide(torch.zeros(100))["theta"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        recipe: Callable[..., Flow] = iaf,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        warm_start: int | str = "pathfinder",
        blocks: str | None = None,
        rank: int | None = None,
        mixture: int = 1,
        **options: Any,
    ) -> None:
        check_positive(init_scale=init_scale)
        check_sizes(1, mixture=mixture)
        if not callable(recipe):
            raise TypeError(f"Expected recipe to be callable; got {type(recipe).__name__}.")
        if not isinstance(warm_start, str):
            check_sizes(0, warm_start=warm_start)
        elif warm_start not in STARTS:
            raise ValueError(f"Expected warm_start to be one of {STARTS} or a number of steps; got {warm_start!r}.")
        if not isinstance(blocks, (str, NoneType)):
            raise TypeError(f"Expected blocks to be the name of one plate or None; got {blocks!r}.")
        if rank is not None:
            check_sizes(1, rank=rank)
            if blocks is not None:
                raise ValueError(f"Expected rank=None with blocks, which have an affine map of their own; got {rank}.")
        if mixture > 1 and (blocks, rank) != (None, None):
            raise ValueError(f"Expected mixture=1 with blocks or rank; got {mixture}.")
        super().__init__(model, init_loc_fn=partial(initial, init_loc_fn))
        self._bare_model: Any = (model,)  # without the handler that sets the initial values
        self._recipe, self._options = recipe, options
        self._init_scale, self._warm_start = init_scale, warm_start
        self._blocks, self._rank, self._mixture = blocks, rank, mixture

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return prototype_hide_fn(msg) or is_enumerated(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._make(*args, **kwargs)
            if isinstance(self._warm_start, str):
                getattr(self, f"fit_{self._warm_start}")(*args, **kwargs)
            elif self._warm_start:
                self.fit_gaussian(self._warm_start, *args, **kwargs)
        except BaseException:
            self.prototype_trace = None  # the next call tries again
            raise

    @torch.no_grad()  # tensors without a graph, so that the prototype trace can be copied
    def _make(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model and creates the flow, whose initial location is the latents of that run."""
        super()._setup_prototype(*args, **kwargs)
        sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]  # type: ignore[union-attr]
        for site in sites:
            check_plates(site)
        loc = torch.cat([biject_to(site["fn"].support).inv(site["value"]).flatten() for site in sites])
        last = self._init_scale, self._blocks, self._rank
        points = [loc]
        if self._mixture > 1:
            points = spread(loc, self._init_scale, self._mixture, lambda: Density(self._program(), *args, **kwargs))
        flows = [guide_flow(self._recipe, self._options, sites, point, *last) for point in points]
        self.flow: Any = FlowMixture(flows) if self._mixture > 1 else flows[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws the latents at sites of their names, and returns them."""
        if self._mixture == 1 or poutine.get_mask() is False:
            return super().forward(*args, **kwargs)
        with AtLatents():
            return super().forward(*args, **kwargs)

    def get_base_dist(self) -> Any:
        """Returns the distribution of the noise. A mixture of flows has none, and raises a ValueError."""
        return self._single().base()

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Returns the transform from the noise to the unconstrained latents. A mixture of flows raises a ValueError."""
        return self._single()().transforms[0]  # type: ignore[no-any-return]

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the distribution of the D unconstrained latents, as one vector (D,).

        Raises:
            RuntimeError: if the guide has not been called yet.
        """
        return self._made()()

    def fit_gaussian(self, steps: int = 500, /, *args: Any, **kwargs: Any) -> Any:
        """Fits only loc and L (and the weights of a mixture), by :func:`~pyro_genexact.fit_guide` with a learning rate of 0.1.

        Args:
            steps: the number of steps.
            args: arguments of the model.
            kwargs: keyword arguments of the model.

        Returns:
            The :class:`~pyro_genexact.GuideResult`.
        """
        if self.prototype_trace is None:
            self._make(*args, **kwargs)
        flows = self.flow.parts if self._mixture > 1 else [self.flow]
        parameters = [p for flow in flows for p in flow.transforms[-1].parameters()]
        parameters += [self.flow.logits] if self._mixture > 1 else []
        with apart(), torch.enable_grad():
            return fit_guide(
                self._program(), self, *args, steps=steps, lr=0.1, parameters=parameters, progress=False, **kwargs
            )

    def fit_laplace(self, *args: Any, **kwargs: Any) -> bool:
        """Sets loc to the mode of the unconstrained posterior and L L' to the inverse Hessian there (Laplace approximation).

        BFGS from eight starts finds up to three modes, and the Laplace approximation with the highest ELBO is chosen. The starts
        are the guide's location, medians of prior draws, and points that are uniform between -2 and 2. The guide stays
        unchanged if the search fails, or if the Laplace approximation has a lower ELBO than the guide. With ``blocks``, the
        mode is that of the globals, with the rows integrated out; with ``rank``, the Hessian is that of the last steps. A
        mixture starts at the Laplace approximations of several modes, as in :meth:`fit_pathfinder`.

        Args:
            args: arguments of the model.
            kwargs: keyword arguments of the model.

        Returns:
            Whether the guide has changed.

        Cost: a hundred gradients of the model at eight points at once, and D more per mode for the Hessian. With ``blocks``,
        about ten gradients per row number d and step of a path.
        """
        return self._improve("laplace", *args, **kwargs)

    def fit_pathfinder(self, *args: Any, **kwargs: Any) -> bool:
        """Sets loc and L to the Gaussian with the highest ELBO on the paths of an optimiser (Pathfinder).

        Each of eight paths climbs the unconstrained log density by BFGS, from the starts of :meth:`fit_laplace`. Each
        iterate has a Gaussian, whose covariance is the estimate of the inverse Hessian. With more than 100 latents, both are
        those of L-BFGS. The candidates are the best Gaussian of each path and, for up to 1000 latents without ``rank``, the
        Laplace approximations at up to three ends of paths. With ``blocks``, the paths are those of the globals, with
        the rows integrated out. The guide gets the candidate with the highest ELBO, and stays unchanged if none has a higher
        ELBO than the guide itself.

        For a mixture of K flows there are 8 K paths. Paths with the same end are one mode, whose Gaussian is the best one of
        these paths. Modes are added one after another, each time the one for which a mixture of Gaussians with optimal weights
        has the highest ELBO. If fewer than K modes raise it, further Gaussians of the same modes follow. The weights are the
        optimal ones, except for a tenth that all flows share evenly.

        Args:
            args: arguments of the model.
            kwargs: keyword arguments of the model.

        Returns:
            Whether the guide has changed.

        Cost: as :meth:`fit_laplace`, for eight K paths.

        Reference: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational inference", JMLR 2022.
        """
        return self._improve("pathfinder", *args, **kwargs)

    def _improve(self, kind: str, *args: Any, **kwargs: Any) -> bool:
        if self.prototype_trace is None:
            self._make(*args, **kwargs)
        flow, size = self.flow, self._mixture
        last = (flow.parts[0] if size > 1 else flow).transforms[-1]
        part = flow if size > 1 else last
        with apart(), torch.random.fork_rng([]):
            density = Density(self._program(), *args, **kwargs)
            center = last()(torch.zeros_like(last.loc)).detach()
            return improve(part, center, self.get_posterior, density, finder(kind, part, self._blocks), size * PATHS)

    @torch.no_grad()
    def median(  # type: ignore[override]
        self, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns the median of each latent by name; see :meth:`quantiles`.

        Args:
            args: ignored; accepted as in Pyro's guides.
            num_samples: the number of draws.
            kwargs: ignored; accepted as in Pyro's guides.
        """
        found = self.quantiles([0.5], num_samples=num_samples)
        return {name: value[0] for name, value in found.items()}

    @torch.no_grad()
    def quantiles(  # type: ignore[override]
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Estimates quantiles of each latent from draws with a fixed seed, so that every call returns the same values.

        If the support of a latent is a product of intervals, these are the quantiles of each element. For other supports
        (simplex, Cholesky factors, ...) they are the quantiles of the unconstrained elements, mapped to the support.

        Args:
            quantiles: Q probabilities.
            args: ignored; accepted as in Pyro's guides.
            num_samples: the number of draws. The standard error of a quantile is about 1 / sqrt(num_samples) standard
                deviations of the latent.
            kwargs: ignored; accepted as in Pyro's guides.

        Returns:
            Tensors (Q, *latent shape) by name of the latent.

        Raises:
            RuntimeError: if the guide has not been called yet.
            ValueError: if ``quantiles`` are not probabilities.
        """
        posterior = self.get_posterior()
        with seeded(0, device_of(self.flow.parameters())):
            latent = posterior.sample((num_samples,))
        sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]  # type: ignore[union-attr]
        depth = max(len(site["fn"].batch_shape) for site in sites)
        latent = latent.reshape(num_samples, *[1] * depth, -1)  # the draws are a plate around all others
        q = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        if q.dim() != 1 or not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"Expected quantiles to be a list of probabilities; got {quantiles}.")
        result = {}
        for site, value in self._unpack_latent(latent):
            onto, shape = biject_to(site["fn"].support), self._unconstrained_shapes[site["name"]]
            value = value.reshape(num_samples, *shape)
            if _elementwise(onto):
                result[site["name"]] = quantiles_of(onto(value), q)
            else:
                result[site["name"]] = onto(quantiles_of(value, q))
        return result

    def _made(self) -> Flow | FlowMixture:
        if self.prototype_trace is None:
            raise RuntimeError("Call the guide once before using this method; the first call creates the flow.")
        return self.flow

    def _single(self) -> Flow:
        flow = self._made()
        if isinstance(flow, FlowMixture):
            raise ValueError(  # which NeuTraReparam does not replace by its own
                f"Expected a guide that is one transform of noise; got a mixture of {self._mixture} flows, which is none. "
                "NeuTra and sample_posterior(method='nuts') need mixture=1."
            )
        return flow

    def _program(self) -> Any:
        if self._bare_model is None:
            raise RuntimeError("Unpickled guides carry no model; construct the guide anew and load the state dict.")
        return self._bare_model[0]

    def __getstate__(self) -> dict[str, Any]:
        kept = self._model, self.master
        state = super().__getstate__()
        self._model, self.master = kept  # Pyro's __getstate__ removes them from the guide itself
        return {**state, "_bare_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._bare_model = self._model, self._bare_model
        return new


def _elementwise(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0
