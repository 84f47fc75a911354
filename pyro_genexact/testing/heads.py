"""The law of heads of distributions."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..base import Head
from ..families.in_support import contains, log_prob_everywhere
from .helpers import broken, close, each, each_matters, finite, like_of, no_error, noise_like, same, seeded


def distribution_head(
    head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-9, dtype: torch.dtype = torch.float64
) -> None:
    """A head of distributions: shapes, a static support, site by site, expand, gradients, and finite at phi to ±1e8.

    log_prob and its gradient are finite there in float64; in float32 they are never NaN, and log_prob is finite where
    that in float64 is within the range of float32. Both are the same after a sample of the same object. Where samples are
    reparameterised, their gradient agrees with the score function's estimate within 5 standard errors.

    A head that ``truncates``, or holds one that does (see :class:`~pyro_genexact.heads.Filter`), may rule values out: there
    log_prob is finite at samples of the same phi, and those that are not ruled out have all the mass.

    Args:
        head: with parameters or buffers in float64, if it has any: theirs is the dtype of the inputs.
        sites: S, how many; a head of a fixed number of sites needs that.
        seed: of phi and the samples.
        tol: relative to 1 + |value|.
        dtype: of the inputs to a head without parameters and buffers.
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
            broken("head", "gradient of rsample", "0, not more")
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
    """The same distribution twice, with its gradients, and d as it was; also once more."""
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
    """Two estimates of d E f(y) / d phi, from the same samples, have the same mean."""
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
    if any(getattr(part, "truncates", False) for part in head.modules()):
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
    """Samples, after a look at those of another phi."""
    d = head(phi)
    lp = d.log_prob(y)
    (grad,) = torch.autograd.grad(lp.sum(), phi)
    if lp.isnan().any() or (lp == torch.inf).any() or not grad.isfinite().all():
        broken("head", f"log_prob and gradient at phi = {case}", "not finite, nor -inf and 0")
    if d.has_enumerate_support:
        total = d.log_prob(d.enumerate_support()).logsumexp(0)
        close("head", f"log of the total mass at phi = {case}", total, 0.0, 1e-5)
    with seeded(0):
        return d.sample()


def _unmoved_by_samples(d: Any, y: Any, phi: torch.Tensor, case: str) -> None:
    """log_prob and its gradient, before and after a sample of the same object."""
    found = []
    for _ in range(2):
        lp = d.log_prob(y)
        found.append((lp, *torch.autograd.grad(lp.sum(), phi, retain_graph=True)))
        with seeded(0):
            d.sample()
    for what, before, after in zip(("log_prob", "gradient"), *found, strict=True):
        close("head", f"{what} after a sample, phi = {case}", after, before, 1e-9)
