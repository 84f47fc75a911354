"""The laws of heads of bijections and of distributions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ..base import Head
from ..distributions.guard import contains, guarded_log_prob
from .helpers import _broken, _close, _noise_like, _same, _seeded


def bijection_head(
    head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-7, dtype: torch.dtype = torch.float64
) -> None:
    """A head of bijections: sizes, the identity nearly at phi = 0, increasing, onto, exact log-derivative, site by site.

    Args:
        head: with parameters or buffers in float64, if it has any: theirs is the dtype of the inputs.
        sites: S, how many.
        seed: of the inputs.
        tol: relative to 1 + |value|.
        dtype: of the inputs to a head without parameters and buffers.
    """
    like = _like(head, dtype)
    phi = 0.7 * _noise_like(like.new_empty(8, sites, head.num_params), seed)
    x = 2 * _noise_like(like.new_empty(8, sites, *head.site_shape), seed + 1)
    dims = len(head.site_shape)
    transform = head(phi.requires_grad_())
    y = transform(x)
    ladj = transform.log_abs_det_jacobian(x, y)
    _same("head", "shape of y", tuple(y.shape), tuple(x.shape))
    _same("head", "event dims", (transform.domain.event_dim, transform.codomain.event_dim), (dims, dims))
    _same("head", "shape of log|dy/dx|", tuple(ladj.shape), tuple(phi.shape[:2]))
    _close("head", "inverse", transform.inv(y.clone()), x, tol)
    identity = head(torch.zeros_like(phi))(x)
    if (identity - x).abs().max() > 0.5:
        _broken("head", "near the identity at phi = 0", f"{identity.flatten()[0]:.3g} from {x.flatten()[0]:.3g}")
    for t in range(sites):
        part = head(phi[:, t : t + 1], t)
        _close("head", f"site {t} alone", part(x[:, t : t + 1]), y[:, t : t + 1], tol)
        _close(
            "head",
            f"site {t} alone, log|dy/dx|",
            part.log_abs_det_jacobian(x[:, t : t + 1], y[:, t : t + 1]),
            ladj[:, t : t + 1],
            tol,
        )
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v).sum((0, 1)), x).reshape(
        prod(head.site_shape), 8, sites, -1
    )
    _close("head", "log-derivative", ladj, torch.linalg.slogdet(jacobian.permute(1, 2, 0, 3))[1], tol)
    rising = transform(torch.linspace(-10, 10, 50).to(like).reshape(50, *[1] * x.dim()).expand(50, *x.shape)).diff(
        dim=0
    )
    if not rising.min() > 0:
        _broken("head", "increasing", f"a step of {rising.min():.3g}, not above 0")
    for far in (1e4, -1e4):
        target = torch.full_like(x, far)
        _close("head", f"onto {far:g}", transform(transform.inv(target).clone()), target, tol)
    (grad,) = torch.autograd.grad(y.sum() + ladj.sum(), phi)
    _each_matters(grad, "values and log-derivatives")


def distribution_head(
    head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-9, dtype: torch.dtype = torch.float64
) -> None:
    """A head of distributions: shapes, a static support, site by site, gradients, and finite at phi to ±1e8.

    Args:
        head: as in :func:`bijection_head`.
        sites: S, how many; a head of a fixed number of sites needs that.
        seed: of phi and the samples.
        tol: relative to 1 + |value|.
        dtype: of the inputs to a head without parameters and buffers.
    """
    like, event = _like(head, dtype), tuple(head.site_shape)
    phi = (0.7 * _noise_like(like.new_empty(8, sites, head.num_params), seed)).requires_grad_()
    d = head(phi)
    _same("head", "batch and event shape", (tuple(d.batch_shape), tuple(d.event_shape)), ((8, sites), event))
    _same("head", "event dims of the support", head.support.event_dim, len(event))
    with _seeded(seed):
        y = d.sample()
    _same("head", "shape of samples", tuple(y.shape), (8, sites, *event))
    for case, values in (("samples", y), ("samples at phi = 0", head(torch.zeros_like(phi)).sample())):
        if not contains(head.support, values).all():
            _broken("head", f"support holds {case}", f"{values.flatten()[0]} outside {head.support}")
    lp = d.log_prob(y)
    _same("head", "shape of log_prob", tuple(lp.shape), (8, sites))
    if not lp.isfinite().all():
        _broken("head", "log_prob of samples", f"{lp[~lp.isfinite()][0]}, not finite")
    for t in range(sites):
        part = head(phi[:, t : t + 1], t)
        _close("head", f"site {t} alone", part.log_prob(y[:, t : t + 1]), lp[:, t : t + 1], tol)
    (grad,) = torch.autograd.grad(lp.sum(), phi, retain_graph=True)
    _each_matters(grad, "log_prob")
    if d.has_rsample:
        with _seeded(seed):
            (grad,) = torch.autograd.grad(d.rsample().sin().sum(), phi)
        if not grad.abs().max() > 0:
            _broken("head", "gradient of rsample", "0, not more")
    if y.is_floating_point():
        wrong = guarded_log_prob(d, torch.full_like(y, torch.nan), head.support)
        _close("head", "log_prob of NaN", wrong, torch.full_like(wrong, -torch.inf), tol)
    for far in (1e4, -1e4, 1e8, -1e8):
        _finite_at(head, y, far * torch.sign(_noise_like(phi, seed + 2)).detach().requires_grad_(), f"±{abs(far):g}")
        _finite_at(head, y, torch.full_like(phi, far).requires_grad_(), f"{far:g}")


def _finite_at(head: Head, y: Any, phi: torch.Tensor, case: str) -> None:
    lp = head(phi).log_prob(y)
    (grad,) = torch.autograd.grad(lp.sum(), phi)
    for what, value in (("log_prob", lp), ("gradient", grad)):
        if not value.isfinite().all():
            _broken("head", f"{what} at phi = {case}", f"{value[~value.isfinite()][0]}, not finite")


def _like(head: Head, dtype: torch.dtype) -> torch.Tensor:
    own = (v for v in (*head.parameters(), *head.buffers()) if v.is_floating_point())
    return next(own, torch.empty(0, dtype=dtype))


def _each_matters(grad: torch.Tensor, of: str) -> None:
    size = grad.abs().amax((0, 1))
    if not (size > 0).all():
        _broken("head", "every parameter matters", f"gradient 0 of parameter {int(size.argmin())} in {of}, not more")
