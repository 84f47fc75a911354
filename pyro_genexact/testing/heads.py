"""The law of heads of bijections."""

from __future__ import annotations

from math import prod

import torch

from ..base import Head
from .helpers import _broken, _close, _noise_like, _same


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
    own = (v for v in (*head.parameters(), *head.buffers()) if v.is_floating_point())
    like = next(own, torch.empty(0, dtype=dtype))
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
    if not (grad.abs().amax((0, 1)) > 0).all():
        _broken(
            "head",
            "every parameter matters",
            f"gradient 0 of parameter {int(grad.abs().amax((0, 1)).argmin())}, not more",
        )
