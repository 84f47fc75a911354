"""The log density of a model's unconstrained latents, at many points in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor
from torch.distributions import biject_to

from ..core.random import seeded
from .draws import marginal, samples
from .elbo import FAILURES
from .mapped import mapped

POINTS = "_points"  # the plate of points
CHUNK = 250  # maximum number of points in one pass
AGAIN = 3  # maximum number of further tries if fewer than two starts have a finite density
WIDTH = 2.0  # half the width of the uniform distribution of starts


def is_enumerated(site: Any) -> bool:
    """Returns whether a site is marked for parallel enumeration."""
    return bool(site["infer"].get("enumerate") == "parallel")


def initial(init_loc_fn: Callable[..., Any], site: Any, width: float = 0.0) -> Any:
    """Returns the initial value of a site; with an improper prior, it is uniform within +-width in unconstrained space."""
    if is_enumerated(site):
        return site["fn"].sample()
    try:
        return init_loc_fn(site)
    except NotImplementedError:  # an improper prior cannot be sampled
        fn = site["fn"]
        onto = biject_to(fn.support)
        shape = onto.inverse_shape(fn.batch_shape + fn.event_shape)
        return onto(width * (2 * torch.rand(shape) - 1) if width else torch.zeros(shape))


class PointGuide(AutoContinuous):
    """A guide with all mass at the points ``at_point`` (..., D) of the unconstrained latents, an argument of the call."""

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return prototype_hide_fn(msg) or is_enumerated(msg)

    def _setup_prototype(self, *args: Any, at_point: Tensor, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)

    def get_posterior(self, *args: Any, at_point: Tensor, **kwargs: Any) -> Any:
        """Returns a Delta distribution at the points."""
        return dist.Delta(at_point, event_dim=1)

    @torch.no_grad()
    def start(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the model, with the arguments of the call, and returns its initial values as a vector (D,)."""
        super()._setup_prototype(*args, **kwargs)
        return self._init_loc()  # type: ignore[no-any-return]


class Density:
    """The log density log p(x(z)) + log |det dx/dz| of the unconstrained latents z of a model; p includes the data.

    Discrete latents that are marked for parallel enumeration are summed out. Points run in an outer plate, or under
    ``torch.vmap`` if the model is written for one draw and enumerates nothing, or one by one if it branches on values. The points of ``starts`` choose
    the first of these ways that agrees with single runs. Subsampled plates have the same rows in every evaluation.

    Args:
        model: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.

    Attributes:
        dim: D.
        batched: whether points are evaluated together.
        dtype: the dtype of the latents in evaluations.
        subsampled: names of plates of which a run has some rows only.
    """

    def __init__(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.width = 0.0
        self.guide = PointGuide(model, lambda site: initial(init_to_median, site, self.width))
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            self.like = self.guide.start(*args, **kwargs)
            trace = poutine.trace(self.guide.model).get_trace(*args, **kwargs)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        frames = [frame for site in sites for frame in site["cond_indep_stack"]]
        self.dim, self.enumerates = len(self.like), any(map(is_enumerated, sites))
        self.nesting = -min((frame.dim for frame in frames if frame.vectorized), default=0)
        self.subsampled = {frame.name for frame in frames if frame.full_size not in (None, frame.size)}
        self.width = WIDTH
        self.way: Callable[[Tensor], Tensor] = self._alone
        self.dtype = self.like.dtype

    @property
    def batched(self) -> bool:
        return self.way != self._alone

    @torch.no_grad()
    def starts(self, size: int, first: Tensor | None = None) -> Tensor:
        """Returns points (S', D), S' at most ``size``, of finite density, and chooses the way of evaluation by them.

        Half of them are medians of 15 prior draws, the others are uniform between -2 and 2. The first is ``first`` (D,).
        """
        given = [] if first is None else [first.to(self.like)[None]]
        points = torch.cat([*given, self._tries(size)])[:size]
        alone = _safely(self._alone, points)
        for _ in range(AGAIN):
            if alone.isfinite().sum() > 1:
                break
            more = self._tries(size)
            points, alone = torch.cat([points, more]), torch.cat([alone, _safely(self._alone, more)])
        points, alone = points[alone.isfinite()][:size], alone[alone.isfinite()][:size]
        if len(points) > 1:
            ways = (pair for pair in self._ways() if _agrees(*pair, points, alone))
            self.way, self.dtype = next(ways, (self._alone, self.dtype))
        return points

    def _tries(self, size: int) -> Tensor:
        points = [WIDTH * (2 * torch.rand(self.dim) - 1).to(self.like) for _ in range(size - size // 2)]
        with poutine.block(), pyro.validation_enabled(False):
            for _ in range(size // 2):
                with suppress(*FAILURES):
                    points.insert(0, self.guide.start(*self.args, **self.kwargs))
        return torch.stack(points)

    def _ways(self) -> Iterator[tuple[Callable[[Tensor], Tensor], torch.dtype]]:
        """Yields ways of evaluation and dtypes. Many models of float32 data run with latents in float64, which has less noise."""
        dtypes = [self.dtype] if self.like.device.type == "mps" else [torch.float64, self.dtype]
        for way in (self._plated, self._mapped):
            yield from ((way, dtype) for dtype in dtypes)

    def __call__(self, z: Tensor) -> Tensor:
        """Returns the log densities (S,) of points (S, D), NaN where the model raises; differentiable."""
        parts = z.to(self.like.device, self.dtype).split(CHUNK)
        return torch.cat([_safely(self.way, part) for part in parts]).to(z)

    def gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log densities (S,) of points (S, D) and their gradients (S, D)."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            values = self(z)
            (gradients,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), gradients

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Returns the latents (S, ...) by name, on their supports, at points (S, D)."""
        with torch.no_grad(), poutine.block():
            wide = z.to(self.like).reshape(len(z), *[1] * self.nesting, self.dim)
            sites = self.guide._unpack_latent(wide)
            shapes = self.guide.prototype_trace.nodes  # type: ignore[union-attr]
            found = {site["name"]: biject_to(site["fn"].support)(value) for site, value in sites}
            return {name: value.reshape(len(z), *shapes[name]["value"].shape) for name, value in found.items()}

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Draws the same subsample in each evaluation, and leaves the random state alone."""
        with poutine.block(), pyro.validation_enabled(False), seeded(0, self.like.device):
            yield

    def _traces(self, z: Tensor, nesting: int, wrap: Any = lambda program: program) -> tuple[Any, Any]:
        guide = poutine.trace(wrap(self.guide)).get_trace(*self.args, at_point=z, **self.kwargs)
        model = wrap(self.model)
        if self.enumerates:
            model = poutine.enum(model, first_available_dim=-1 - nesting)
        return guide, poutine.trace(poutine.replay(model, trace=guide)).get_trace(*self.args, **self.kwargs)

    def _one(self, z: Tensor) -> Tensor:
        """Returns the log density of a point (D,)."""
        guide, model = self._traces(z, self.nesting)
        log_p = marginal(model, POINTS, 1).squeeze(0) if self.enumerates else model.log_prob_sum()
        return log_p - guide.log_prob_sum()  # type: ignore[no-any-return]

    def _alone(self, z: Tensor) -> Tensor:
        values = []
        for point in z:
            with self._quiet():
                values.append(self._one(point))
        return torch.stack(values)

    def _mapped(self, z: Tensor) -> Tensor:
        with self._quiet():
            return mapped(self._one, z, randomness="same")  # type: ignore[no-any-return]

    def _plated(self, z: Tensor) -> Tensor:
        with self._quiet():
            plate: Any = pyro.plate(POINTS, len(z), dim=-self.nesting - 1)
            wide = z.reshape(len(z), *[1] * self.nesting, self.dim)
            guide, model = self._traces(wide, self.nesting + 1, plate)
            log_p = marginal(model, POINTS, len(z)) if self.enumerates else self._total(model, z)
            return log_p - self._total(guide, z)

    def _total(self, trace: Any, z: Tensor) -> Tensor:
        trace.compute_log_prob()
        return sum((self._of_points(site["log_prob"], len(z)) for _, site in samples(trace)), z.new_zeros(len(z)))

    def _of_points(self, log_prob: Tensor, size: int) -> Tensor:
        if log_prob.dim() <= self.nesting or log_prob.shape[-1 - self.nesting] != size:
            return log_prob.sum()
        return log_prob.movedim(-1 - self.nesting, 0).reshape(size, -1).sum(1)


def _agrees(way: Callable[[Tensor], Tensor], dtype: torch.dtype, points: Tensor, alone: Tensor) -> bool:
    """Returns whether the log densities (S,) of points (S, D) are those of single runs."""
    with suppress(Exception):  # what does not run in a pass can raise anything
        return torch.allclose(way(points.to(dtype)).to(alone), alone, rtol=1e-3, atol=1e-3)
    return False


def _safely(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Returns the values (S,) of a function of points (S, D), NaN for the points for which it raises."""
    try:
        return function(points)
    except FAILURES:
        if len(points) == 1:
            return points.sum(1) * torch.nan
        return torch.cat([_safely(function, half) for half in points.chunk(2)])
