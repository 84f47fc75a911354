"""The law of heads of distributions."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..base import Head
from ..families.in_support import contains, log_prob_everywhere
from .helpers import broken, close, each, each_matters, finite, like_of, no_error, noise_like, same, seeded, truncates


def distribution_head(
    head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-9, dtype: torch.dtype = torch.float64
) -> None:
    """Checks the protocol of a head of distributions.

    Shapes are right, the support does not depend on phi, sites can be evaluated one by one, ``expand`` works, each element of
    phi matters, and log_prob and its gradient are finite for phi to ±1e8. In float32, they must not be NaN, and log_prob must
    be finite if that in float64 is in the range of float32. Both are the same before and after sampling from the same object.
    The gradient of reparameterised samples agrees with the score-function estimate within 5 standard errors.

    If the head, or a part of it, has the attribute ``truncates`` (see :class:`~pyro_genexact.Head`), values may have
    probability 0; log_prob is then checked at samples with the same phi, and the remaining values must have total mass 1.

    Args:
        head: the head; its parameters or buffers, if there are any, should be in float64 and have the dtype of the inputs.
        sites: the number of sites S; if the head fixes it, that number.
        seed: the seed of phi and the samples.
        tol: the tolerance, relative to 1 + |value|.
        dtype: the dtype of the inputs if the head has no parameters and buffers.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> from pyro_genexact import heads
        >>> distribution_head(heads.Normal())
    """
    like, event = like_of(head, dtype), tuple(head.site_shape)
    phi = (0.7 * noise_like(like.new_empty(8, sites, head.num_params), seed)).requires_grad_()
    d = head(phi)
    same("head", "batch and event shape", (tuple(d.batch_shape), tuple(d.event_shape)), ((8, sites), event))
    same("head", "event dims of the support", head.support.event_dim, len(event))
    with seeded(seed):
        y = d.sample()
    same("head", "shape of samples", tuple(y.shape), (8, sites, *event))
    for case, values in (("samples", y), ("samples at phi = 0", head(torch.zeros_like(phi)).sample())):
        each("head", f"support holds {case}", values, contains(head.support, values), f"outside {head.support}")
    lp = d.log_prob(y)
    same("head", "shape of log_prob", tuple(lp.shape), (8, sites))
    finite("head", "log_prob of samples", lp)
    for t in range(sites):
        part = head(phi[:, t : t + 1], t)
        close("head", f"site {t} alone", part.log_prob(y[:, t : t + 1]), lp[:, t : t + 1], tol)
    (grad,) = torch.autograd.grad(lp.sum(), phi, retain_graph=True)
    each_matters(grad, "log_prob")
    if d.has_rsample:
        with seeded(seed):
            (grad,) = torch.autograd.grad(d.rsample().sin().sum(), phi)
        if not grad.abs().max() > 0:
            broken("head", "gradient of rsample", "0, which must not be 0")
        _pathwise(head, phi[0].detach(), seed)
    if y.is_floating_point():
        wrong = log_prob_everywhere(d, torch.full_like(y, torch.nan), head.support)
        close("head", "log_prob of NaN", wrong, -torch.inf, tol)
    _expands(head(phi), y, phi, tol)
    _unmoved_by_samples(head(phi), y, phi, "the samples'")
    for far in (1e4, -1e4, 1e8, -1e8):
        _finite_at(head, y, far * torch.sign(noise_like(phi, seed + 2)).detach().requires_grad_(), f"±{abs(far):g}")
        _finite_at(head, y, torch.full_like(phi, far).requires_grad_(), f"{far:g}")


def _expands(d: Any, y: Any, phi: torch.Tensor, tol: float) -> None:
    """Checks that ``expand`` returns the same distribution with the right gradients, also twice, and leaves d unchanged."""
    shape, lp = (2, *d.batch_shape), d.log_prob(y)
    (grad,) = torch.autograd.grad(lp.sum(), phi, retain_graph=True)
    for kind in (tuple, list, torch.Size):
        with no_error("head", f"expand to a {kind.__name__}", TypeError, AttributeError, RuntimeError, named=True):
            wide = d.expand(kind(shape))
            again = wide.expand((3, *shape))
        sizes = (tuple(wide.batch_shape), tuple(wide.event_shape), tuple(again.batch_shape))
        same("head", "expand, batch and event shape", sizes, (shape, tuple(d.event_shape), (3, *shape)))
        same("head", "expand, has_rsample", wide.has_rsample, d.has_rsample)
        with seeded(0):
            samples = again.sample((5,))
        same("head", "expand, shape of samples", tuple(samples.shape), (5, 3, *shape, *d.event_shape))
        close("head", "expand, log_prob", wide.log_prob(y), lp.expand(shape), tol)
        close("head", "expand twice, log_prob", again.log_prob(y), lp.expand(3, *shape), tol)
    (wide_grad,) = torch.autograd.grad(wide.log_prob(y).sum(), phi)
    close("head", "expand, gradient", wide_grad, 2 * grad, max(tol, 1e-7))
    same("head", "batch shape after expand", tuple(d.batch_shape), shape[1:])


def _pathwise(head: Head, phi: torch.Tensor, seed: int, rows: int = 1000) -> None:
    """Checks that the pathwise and the score-function estimate of d E[f(y)] / d phi have the same mean."""
    phi = phi.expand(rows, *phi.shape).clone().requires_grad_()
    with seeded(seed):
        y = head(phi).rsample()
    z = y.tanh() if not head.site_shape else y.tanh().sum(-1) + y.tanh().prod(-1)
    f = z + z.square()
    (path,) = torch.autograd.grad(f.sum(), phi)
    centred = (f - f.mean(0)).detach()
    (score,) = torch.autograd.grad((head(phi).log_prob(y.detach()) * centred).sum(), phi)
    error = (path - score).mean(0) / ((path - score).std(0) / rows**0.5 + 1e-6)
    if not error.abs().max() < 5:
        broken("head", "gradient of rsample", f"{error.abs().max():.3g} standard errors from the score function's")


def _finite_at(head: Head, y: Any, phi: torch.Tensor, case: str) -> None:
    d = head(phi)
    if truncates(head):
        y = _not_ruled_out(head, y, phi, case)
    lp = d.log_prob(y)
    (grad,) = torch.autograd.grad(lp.sum(), phi)
    for what, value in (("log_prob", lp), ("gradient", grad)):
        good = ~value.isnan() if value.dtype == torch.float32 else value.isfinite()
        each("head", f"{what} at phi = {case}", value, good, "not finite")
    if lp.dtype == torch.float32:
        exact = copy.deepcopy(head).double()(phi.double()).log_prob(y.double() if y.is_floating_point() else y)
        good = lp.isfinite() | (exact.abs() >= torch.finfo(torch.float32).max)
        each("head", f"log_prob at phi = {case}", lp, good, "finite in float64")
    _unmoved_by_samples(head(phi), y, phi, case)


def _not_ruled_out(head: Head, y: Any, phi: torch.Tensor, case: str) -> Any:
    """Returns samples for this phi, after checking log_prob at the samples y of another phi."""
    d = head(phi)
    lp = d.log_prob(y)
    grad, outside = (torch.autograd.grad(x.sum(), phi, retain_graph=True)[0] for x in (lp, lp[lp == -torch.inf]))
    if lp.isnan().any() or (lp == torch.inf).any() or not grad.isfinite().all() or outside.any():
        broken("head", f"log_prob and gradient at phi = {case}", "neither finite nor -inf with gradient 0")
    if d.has_enumerate_support:
        total = d.log_prob(d.enumerate_support()).logsumexp(0)
        close("head", f"log of the total mass at phi = {case}", total, 0.0, 1e-5)
    with seeded(0):
        return d.sample()


def _unmoved_by_samples(d: Any, y: Any, phi: torch.Tensor, case: str) -> None:
    """Checks that log_prob and its gradient are the same before and after sampling from the same object."""
    found = []
    for _ in range(2):
        lp = d.log_prob(y)
        found.append((lp, *torch.autograd.grad(lp.sum(), phi, retain_graph=True)))
        with seeded(0):
            d.sample()
    for what, before, after in zip(("log_prob", "gradient"), *found, strict=True):
        close("head", f"{what} after a sample, phi = {case}", after, before, 1e-9)
