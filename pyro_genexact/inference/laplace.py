"""The Laplace approximation as the initial Gaussian of a guide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from .elbo import default_loss
from .gaussian import Gaussian


class PointGuide(AutoContinuous):
    """A guide with all mass at the point ``at_point`` (D,) of the unconstrained latents, an argument of the call."""

    def _setup_prototype(self, *args: Any, at_point: Tensor, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)

    def get_posterior(self, *args: Any, at_point: Tensor, **kwargs: Any) -> Any:
        """Returns a Delta distribution at the point."""
        return dist.Delta(at_point, event_dim=1)


def improve(
    affine: Gaussian, model: Callable[[], Any], guide: Callable[[], Any], point_guide: Callable[..., Any]
) -> bool:
    """Sets the affine map of a guide to the Laplace approximation, unless that fails or has a lower ELBO.

    Args:
        affine: the last transform of the guide.
        model: the model, called without arguments.
        guide: the guide, called without arguments.
        point_guide: a point guide, called as ``point_guide(at_point=z)``.

    Returns:
        Whether the map has changed.
    """
    with poutine.block(), torch.enable_grad(), torch.random.fork_rng([]):
        start = affine()(torch.zeros_like(affine.loc)).detach()
        loss = default_loss(model, guide, 1)

        def energy(z: Tensor) -> Tensor:
            torch.default_generator.manual_seed(0)  # the same subsample in each evaluation
            z = z if z.requires_grad else z.detach().requires_grad_()  # TraceEnum_ELBO requires it
            value: Tensor = loss.differentiable_loss(model, partial(point_guide, at_point=z))
            return value

        def elbo() -> float:
            with torch.no_grad():
                return -sum(loss.loss(model, guide) for _ in range(32))

        old, better = copy.deepcopy(affine.state_dict()), False
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                point_guide(at_point=start)  # runs the model once, for the shapes
            before = elbo()
            affine.put(*laplace(energy, start))
            better = elbo() > before
        except (ValueError, RuntimeError, IndexError):
            pass  # the model raised, has no second derivative, or has other latents in each run
        finally:
            if not better:
                affine.load_state_dict(old)
        return better


def laplace(energy: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a local minimum of ``energy`` (D,) and the lower triangular root (D, D) of its inverse Hessian there."""
    mode = _minimum(energy, start)
    return mode, inverse_root(torch.autograd.functional.hessian(energy, mode))


def _minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Returns a local minimum, found by L-BFGS and then by Newton steps as long as they decrease the function."""
    z = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value = function(z)
        (z.grad,) = torch.autograd.grad(value, z)  # leaves the gradients of the model's parameters alone
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    best, z = function(z).item(), z.detach()
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(function, z)
        root = inverse_root(torch.autograd.functional.hessian(function, z))
        new = z - root @ (root.mT @ gradient)
        value = function(new).item()
        if not value < best:
            break
        best, z = value, new
    return z


def inverse_root(hessian: Tensor) -> Tensor:
    """Returns lower triangular L with L L' the inverse of a symmetric matrix, after taking absolute values of eigenvalues."""
    values, vectors = torch.linalg.eigh(hessian.double().nan_to_num())
    values = values.abs().clamp(min=1e-10 * values.abs().max().clamp(min=1e-300))
    r = torch.linalg.qr((vectors / values.sqrt()).mT).R
    return (r.mT * r.diagonal().sign()).to(hessian)
