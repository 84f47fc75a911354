"""Flows as automatic guides: any recipe as the posterior of all continuous latents of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import IndependentTransform

from ..contexts import check_context
from ..core.checks import check_positive, check_sizes
from ..core.quantiles import quantiles as quantiles_of
from ..core.random import seeded
from ..flows.base import Flow, over_reals
from ..flows.recipes import iaf
from .fit_guide import fit_guide
from .gaussian import Gaussian, Tails
from .laplace import PointGuide, improve
from .plates import RowPlates


class AutoFlow(AutoContinuous):
    """A flow as the guide of all continuous latents of a model: unconstrained, they are loc + L tails(flow(noise)).

    Latents of every support are mapped to the reals by ``biject_to`` and concatenated to one vector of D numbers, as in Pyro's
    other automatic guides, whose methods it has (``get_posterior``, ``get_base_dist``, ``get_transform`` for
    ``NeuTraReparam``, ...). Loc, the lower triangular L, skewness and weight of the tails are learned beside the flow, so that
    every Gaussian is within reach, and it starts as one, up to the small start of the recipe's networks: at the values of
    ``init_loc_fn`` with standard deviations ``init_scale``, as ``AutoMultivariateNormal`` does, and then, where that has a
    higher ELBO, as Laplace's approximation. Discrete latents that the model marks for parallel enumeration
    (``config_enumerate``) are left to it. Parameters are made in the first call; call the guide before ``load_state_dict``.
    Two guides of one class share their names in Pyro's parameter store, where SVI knows one of them; ``fit_guide`` knows both.

    **Amortised**, with ``context=C``, the guide is called with the model's arguments and ``context=`` (*batch, C), an encoder's
    output. The leftmost plates of the model, one a batch dim, are then the rows, each with a flow of its own latents given its own
    context; they may be subsampled, and of another size in each call, for which the model is run up to its first latent in
    them. As SVI gives the same arguments to model and guide, wrap the call: ``lambda x: guide(x, context=encoder(x))``, with
    ``pyro.module("encoder", encoder)`` in it.

    Args:
        model: the model.
        recipe: called as ``recipe(D, **options)``, with ``context=C`` too where there is one; returns a flow over the reals.
        init_loc_fn: where each latent starts, see ``pyro.infer.autoguide.initialization``; where it needs draws and the
            prior has none (``ImproperUniform``), at unconstrained 0.
        init_scale: standard deviation of each unconstrained latent at the start.
        context: C, features of the context; 0 for none.
        warm_start: what the first call does first: "laplace", :meth:`fit_laplace`, or the steps of :meth:`fit_gaussian`, 0 for
            nothing. By default "laplace" without a context, 0 with one.
        options: of the recipe.

    Raises:
        RuntimeError: at the first call, for a model without continuous latents, as Pyro's guides do.
        ValueError: at the first call, for a latent in a subsampled plate that is not amortised, a discrete latent
            that is not enumerated, a recipe whose flow is not over D real numbers; for a context that does not fit.

    References: Rezende, Mohamed, "Variational Inference with Normalizing Flows", ICML 2015; Kucukelbir et al., "Automatic
    Differentiation Variational Inference", JMLR 2017; Jones, Pewsey, "Sinh-arcsinh distributions", Biometrika 2009.

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
    """

    def __init__(
        self,
        model: Callable[..., Any],
        recipe: Callable[..., Flow] = iaf,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        context: int = 0,
        warm_start: int | str | None = None,
        **options: Any,
    ) -> None:
        check_positive(init_scale=init_scale)
        if not callable(recipe):
            raise TypeError(f"Expected recipe to be callable; got {type(recipe).__name__}.")
        check_sizes(0, context=context)
        if warm_start == "laplace" and context:
            raise ValueError(f"Expected no Laplace warm start of a guide with a context; got context={context}.")
        if warm_start is None:
            warm_start = 0 if context else "laplace"
        if isinstance(warm_start, str) and warm_start != "laplace":
            raise ValueError(f"Expected warm_start == 'laplace' or a number of steps; got {warm_start!r}.")
        if warm_start != "laplace":
            check_sizes(0, warm_start=warm_start)  # type: ignore[arg-type]
        super().__init__(model, init_loc_fn=partial(_init, init_loc_fn))
        self._bare_model: Any = (model,)  # without the handler that sets the start
        self._plates: Any = None  # RowPlates after the first call
        self._recipe, self._init_scale, self._warm_start = recipe, init_scale, warm_start
        self._options = {**options, **({"context": context} if context else {})}
        self.context = context

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return prototype_hide_fn(msg) or _enumerated(msg)

    def _setup_prototype(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> None:
        try:
            self._make(*args, context=context, **kwargs)
            if self._warm_start == "laplace":
                self.fit_laplace(*args, **kwargs)
            elif isinstance(self._warm_start, int) and self._warm_start:
                self.fit_gaussian(self._warm_start, *args, context=context, **kwargs)
        except BaseException:
            self.prototype_trace = self._plates = None  # the next call tries again
            raise

    @torch.no_grad()  # what the trace keeps can be copied
    def _make(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> None:
        """Runs the model and makes the flow, which starts at the latents of that run."""
        super()._setup_prototype(*args, **kwargs)
        rows = self._rows(context)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())  # type: ignore[union-attr]
        plates = RowPlates.of(sites.values(), rows)
        for name in plates.names:  # around the whole guide in each call
            del self._prototype_frames[name]
        for name, stack in self._cond_indep_stacks.items():
            self._cond_indep_stacks[name] = [frame for frame in stack if frame.name in self._prototype_frames]
        values = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in sites.items()}
        self._unconstrained_shapes = {name: plates.of_one_row(value.shape) for name, value in values.items()}
        loc = torch.cat([value.reshape(rows.numel(), -1) for value in values.values()], -1).mean(0)
        self.latent_dim = len(loc)
        flow = self._recipe(self.latent_dim, **self._options)
        _check_flow(flow, self.context, loc)
        self.flow = Flow([*flow.transforms, Tails(loc), Gaussian(loc, self._init_scale)], flow.base).to(loc)
        self._plates = plates

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draws the latents, given the model's arguments and the context (*batch, C), and returns them by name."""
        if self._plates is None:
            self._setup_prototype(*args, context=context, **kwargs)
        rows = self._rows(context)
        with ExitStack() as stack:
            for plate in self._plates.now(rows, lambda: self._program()(*args, **kwargs)):
                stack.enter_context(plate)
            draws: dict[str, Tensor] = super().forward(context=self._plates.spread(context) if rows else context)
            return draws

    def get_base_dist(self) -> Any:
        """The noise, where no context is needed."""
        return self._made().base()

    def get_transform(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> Transform:
        """From the noise to the unconstrained latents, given the context (*batch, C)."""
        return self._made()(context).transforms[0]

    def get_posterior(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> Any:
        """The distribution (*batch) of the D unconstrained latents, given the context (*batch, C)."""
        return self._made()(context)

    def fit_gaussian(self, steps: int = 500, /, *args: Any, context: Tensor | None = None, **kwargs: Any) -> Any:
        """Fits loc and L alone, by :func:`~pyro_genexact.fit_guide` with the model's arguments; returns its result."""
        if self._plates is None:
            self._make(*args, context=context, **kwargs)
        guide = self if context is None else partial(self, context=context.detach())
        parameters = list(self.flow.transforms[-1].parameters())
        with poutine.block(), torch.enable_grad():
            return fit_guide(
                self._program(), guide, *args, steps=steps, lr=0.1, parameters=parameters, progress=False, **kwargs
            )

    def fit_laplace(self, *args: Any, **kwargs: Any) -> bool:
        """Moves loc to the mode of the unconstrained posterior, by L-BFGS, and L to its curvature there.

        Unless that has a lower ELBO than before, or none, as where there is no mode. For guides without context. Cost: some hundred
        gradients of the model, and D more for the Hessian.

        Returns:
            Whether it moved.
        """
        if self.context:
            raise ValueError(
                f"Expected a guide without context, for Laplace's approximation; got context={self.context}."
            )
        if self._plates is None:
            self._make(*args, **kwargs)
        affine: Any = self.flow.transforms[-1]
        model, point_guide = self._program(), PointGuide(poutine.block(self.model, hide_fn=_enumerated))
        programs = [partial(program, *args, **kwargs) for program in (model, self, point_guide)]
        return improve(affine, *programs)

    @torch.no_grad()
    def median(  # type: ignore[override]
        self, *args: Any, num_samples: int = 10_000, context: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The median of each latent: :meth:`quantiles` at 0.5, the same at each call."""
        found = self.quantiles([0.5], num_samples=num_samples, context=context)
        return {name: value[0] for name, value in found.items()}

    @torch.no_grad()
    def quantiles(  # type: ignore[override]
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 10_000,
        context: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each latent, by draws that are the same at each call: of each number where the support is a product of intervals.

        Elsewhere (simplex, Cholesky factors, ...) those of the unconstrained numbers, mapped to the support.

        Args:
            quantiles: Q probabilities.
            num_samples: draws; a quantile's standard error is about 1 / sqrt(num_samples) standard deviations.
            context: as in the call.

        Returns:
            For each latent's name values of shape (Q, *latent shape).
        """
        posterior, rows = self.get_posterior(context=context), self._rows(context)
        with seeded(0, self.flow.transforms[-1].loc.device):  # type: ignore[arg-type]
            latent = self._plates.spread(posterior.sample((num_samples,)))
        q = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        if q.dim() != 1 or not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"Expected quantiles to be a list of probabilities; got {quantiles}.")
        result = {}
        for site, value in self._unpack_latent(latent):
            onto, shape = biject_to(site["fn"].support), self._unconstrained_shapes[site["name"]]
            value = value.reshape(num_samples, *rows, *shape[len(rows) :])
            if _elementwise(onto):
                result[site["name"]] = quantiles_of(onto(value), q)
            else:
                result[site["name"]] = onto(quantiles_of(value, q))
        return result

    def _made(self) -> Flow:
        """The flow; an error before the first call."""
        if self._plates is None:
            raise RuntimeError("Expected the guide to have been called once before, to know the latents; it was not.")
        return self.flow

    def _program(self) -> Any:
        """The model."""
        if self._bare_model is None:
            raise RuntimeError("Expected a guide that has its model; got one from a pickle, which leaves it out.")
        return self._bare_model[0]

    def _rows(self, context: Tensor | None) -> torch.Size:
        """The batch shape of the context; an error unless it fits."""
        check_context(self, context)
        rows = torch.Size() if context is None else context.shape[:-1]
        if self._plates is not None:
            self._plates.check(rows)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        kept = self._model, self.master
        state = super().__getstate__()
        self._model, self.master = kept  # which Pyro takes from the guide itself
        return {**state, "_bare_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._bare_model = self._model, self._bare_model
        return new


def _enumerated(site: Any) -> bool:
    return site["infer"].get("enumerate") == "parallel"


def _init(init_loc_fn: Callable[..., Any], site: Any) -> Any:
    if _enumerated(site):
        return site["fn"].sample()
    try:
        return init_loc_fn(site)
    except NotImplementedError:  # nothing to sample from a flat prior
        fn = site["fn"]
        onto = biject_to(fn.support)
        return onto(torch.zeros(onto.inverse_shape(fn.batch_shape + fn.event_shape)))


def _check_flow(flow: Any, context: int, loc: Tensor) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"Expected recipe to return a Flow; got {type(flow).__name__}.")
    if flow.context != context:
        raise ValueError(f"Expected recipe to return a flow with context={context}; got {flow.context}.")
    one = flow.to(loc)(loc.new_zeros(context)) if context else flow.to(loc)()
    if one.event_shape != loc.shape or one.batch_shape or not over_reals(one):
        raise ValueError(
            f"Expected recipe to return a flow over {len(loc)} real numbers (the model's latents); got event_shape "
            f"{tuple(one.event_shape)}, batch_shape {tuple(one.batch_shape)} and support {one.support}."
        )


def _elementwise(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0
