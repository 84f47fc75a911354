"""Laplace's approximation as the start of a guide: the Gaussian at the mode of the unconstrained posterior."""

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
    """A guide without draws: the latents of a model at ``at_point`` (D,), their unconstrained numbers, which is given in the call."""

    def _setup_prototype(self, *args: Any, at_point: Tensor, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)

    def get_posterior(self, *args: Any, at_point: Tensor, **kwargs: Any) -> Any:
        """All mass at the point."""
        return dist.Delta(at_point, event_dim=1)


def improve(
    affine: Gaussian, model: Callable[[], Any], guide: Callable[[], Any], point_guide: Callable[..., Any]
) -> bool:
    """Moves the Gaussian of a guide to Laplace's approximation, unless that has a lower ELBO, or none; returns whether it did.

    Args:
        affine: the last part of the guide.
        model, guide: called without arguments.
        point_guide: called as ``point_guide(at_point=z)``.
    """
    with poutine.block(), torch.enable_grad(), torch.random.fork_rng([]):
        start = affine()(torch.zeros_like(affine.loc)).detach()
        loss = default_loss(model, guide, 1)

        def energy(z: Tensor) -> Tensor:
            torch.default_generator.manual_seed(0)  # the same subsample each time
            z = z if z.requires_grad else z.detach().requires_grad_()  # TraceEnum_ELBO wants it
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
        except (ValueError, RuntimeError, IndexError):  # no value or second derivative, or other latents in each run
            pass
        finally:
            if not better:
                affine.load_state_dict(old)
        return better


def laplace(energy: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """A local minimum of ``energy`` (D,) and the lower triangular root (D, D) of its inverse Hessian there."""
    mode = _minimum(energy, start)
    return mode, inverse_root(torch.autograd.functional.hessian(energy, mode))


def _minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A local minimum: L-BFGS, then Newton's steps while they help."""
    z = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value = function(z)
        (z.grad,) = torch.autograd.grad(value, z)  # of nothing else that the model reads
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
    """L with L L' the inverse of a symmetric matrix, of which negative curvature counts as positive."""
    values, vectors = torch.linalg.eigh(hessian.double().nan_to_num())
    values = values.abs().clamp(min=1e-10 * values.abs().max().clamp(min=1e-300))
    r = torch.linalg.qr((vectors / values.sqrt()).mT).R
    return (r.mT * r.diagonal().sign()).to(hessian)
