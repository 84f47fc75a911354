"""Laws of the conventions of torch and Pyro for transforms."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import _InverseTransform

from ..families.supports import innermost
from .helpers import broken, close, made, no_error, same, seeded


def conventions(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """Checks attributes, caching, equality and shapes of a transform against the conventions of torch and Pyro.

    - ``domain`` and ``codomain`` are constraints, also on the class, with the event dims of arguments and values;
      ``bijective`` is True.
    - ``_call`` and ``_inverse``, which torch's own methods call, return the same values.
    - ``sign`` is defined for monotone transforms of scalars and not for others of scalars. Where it is defined, it is the sign
      of the slope or of the determinant.
    - ``with_cache`` returns the same bijection; ``inv.inv is t`` also holds for these copies.
    - ``t == t`` and ``t.inv == t.inv``; t differs from its inverse; equal transforms have equal values. Transforms of this
      package are equal only if they are the same object, as Pyro's modules: comparing parameters would read all of them, and
      a cache keyed by equality would return old values after an update of the parameters.
    - ``forward_shape`` and ``inverse_shape`` are right for values with more and with fewer batch dims.

    Args:
        subject: a transform, or a module whose call returns one.
        x: values (B, *event) in the domain, with the batch dim B of the context.
        context: (B, C) or None.
        tol: the tolerance, relative to 1 + |value|.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> import torch
        >>> from torch.distributions.transforms import AffineTransform
        >>> conventions(AffineTransform(1.0, 2.0), torch.randn(5).double())
    """
    t = made(subject, context)
    with torch.no_grad():
        y = t(x).clone()
    _constraints(t, x, y)
    _methods(t, x, y, tol)
    _sign(t, x, y)
    for name, u, value, image in (("t", t, x, y), ("t.inv", t.inv, y, x)):
        for size in (0, 1):
            with no_error("conventions", f"{name}.with_cache({size})", NotImplementedError):
                cached = u.with_cache(size)
            if cached.inv.inv is not cached:
                broken("conventions", f"{name}.with_cache({size})", "inv.inv is another object")
            close("conventions", f"{name}.with_cache({size})", cached(value), image, tol)
        _shapes(name, u, value)
    _equality(t, subject, x, context, tol)


def as_distribution(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """Checks torch's ``TransformedDistribution`` with t, and with ``t.inv``.

    Shapes, independent rows, log_prob, support and ``expand`` must be right; for monotone transforms of scalars, also ``cdf``
    and ``icdf``. Arguments as in :func:`conventions`.
    """
    t = made(subject, context)
    with torch.no_grad():
        y = t(x).clone()
    for name, u, value in (("t", t, x), ("t.inv", t.inv, y)):
        event = value.shape[value.dim() - u.domain.event_dim :]
        for case, shape in (("base of its batch", value.shape), ("base without a batch", event)):
            _pushed(f"{name}, {case}", made(subject, context), name == "t", value.new_zeros(shape), tol)


def _constraints(t: Transform, x: Tensor, y: Tensor) -> None:
    for name, value in (("domain", x), ("codomain", y)):
        for of, constraint in (("the class", getattr(type(t), name)), ("the transform", getattr(t, name))):
            if not isinstance(constraint, constraints.Constraint):
                broken("conventions", f"{name} of {of}", f"{type(constraint).__name__}, not a constraint")
        constraint = getattr(t, name)
        if constraints.is_dependent(constraint):
            broken("conventions", f"{name} of the transform", "a dependent constraint")
        if constraint.event_dim > value.dim():
            broken("conventions", f"event dims of the {name}", f"{constraint.event_dim}, of {value.dim()} dims")
        of_inverse = getattr(t.inv, "codomain" if name == "domain" else "domain")
        kinds = [(type(c), c.event_dim) for c in (of_inverse, constraint)]
        same("conventions", f"{name} as that of t.inv", *kinds)
        inside = constraint.check(value)
        same("conventions", f"shape of {name}.check", tuple(inside.shape), _batch(value, constraint.event_dim))
        if not inside.all():
            broken("conventions", name, f"value outside {constraint}")
    for name, u in (("t", t), ("t.inv", t.inv)):
        same("conventions", f"bijective, of {name}", u.bijective, True)


def _methods(t: Transform, x: Tensor, y: Tensor, tol: float) -> None:
    if isinstance(t, _InverseTransform):  # torch defines its methods by those of its inverse
        t, x, y = t.inv, y, x
    for name, value, image in (("_call", x, y), ("_inverse", y, x)):
        try:
            with torch.no_grad():
                found = getattr(t, name)(value)
        except NotImplementedError:
            broken("conventions", name, "not implemented")
        close("conventions", name, found, image, tol)


def _sign(t: Transform, x: Tensor, y: Tensor) -> None:
    dims = t.domain.event_dim, t.codomain.event_dim
    for name, u, value in (("t", t, x), ("t.inv", t.inv, y)):
        monotone = dims != (0, 0) or _monotone(u, value)
        try:
            sign = torch.as_tensor(u.sign, device="cpu")
        except NotImplementedError:
            if dims == (0, 0) and monotone:
                broken("conventions", f"sign of {name}", "not defined, though it is monotone")
            return
        if not monotone:  # such as a rotation of the circle
            broken("conventions", f"sign of {name}", f"{sign.flatten()[0].item()}, though it is not monotone")
        value = value.detach().clone().requires_grad_()
        if dims == (0, 0):
            (slope,) = torch.autograd.grad(u(value).sum(), value)
            found = slope.sign()
        else:  # the determinant in the first row
            rows = value.detach().reshape(prod(_batch(value, u.domain.event_dim)), -1)

            def image(first: Tensor, u: Any = u, rows: Tensor = rows, shape: Any = value.shape) -> Tensor:
                out: Tensor = u(torch.cat([first.unsqueeze(0), rows[1:]]).reshape(shape))
                return out.reshape(len(rows), -1)[0]

            jacobian = torch.autograd.functional.jacobian(image, rows[0])
            if jacobian.shape[0] != jacobian.shape[1]:
                return
            found = torch.linalg.slogdet(jacobian)[0]
        if (found != sign.to(found)).any():
            broken("conventions", f"sign of {name}", f"{sign.flatten()[0].item()}, not {found.flatten()[0].item():g}")


def _monotone(u: Transform, value: Tensor) -> bool:
    """Returns whether a transform of scalars is monotone on its domain, or between the extreme values if that is infinite."""
    low, high = (getattr(u.domain, f"{end}_bound", torch.inf) for end in ("lower", "upper"))
    low, high = (torch.as_tensor(end, device="cpu").detach().cpu().to(value) for end in (low, high))
    if not (low.isfinite().all() and high.isfinite().all()):
        low, high = value.min(), value.max()
    share = torch.linspace(1e-3, 1 - 1e-3, 200, device="cpu").to(value).reshape(-1, *[1] * value.dim())
    with torch.no_grad():
        steps = u(torch.lerp(low, high, share).expand(-1, *value.shape)).diff(dim=0)
    return bool(((steps >= 0).all(0) | (steps <= 0).all(0)).all())


def _shapes(name: str, u: Transform, value: Tensor) -> None:
    cases = {"of its batch": value, "of one batch dim more": value.expand(2, *value.shape)}
    if value.dim() > u.domain.event_dim:
        cases["of one batch dim less"] = value[0]
        cases["of one row"] = value[:1]
    for case, v in cases.items():
        with torch.no_grad():
            found = tuple(u(v.clone()).shape)
        same("conventions", f"{name}.forward_shape, values {case}", tuple(u.forward_shape(v.shape)), found)
        if case != "of one batch dim less":
            wide = torch.Size((*found[: len(found) - u.codomain.event_dim], *v.shape[v.dim() - u.domain.event_dim :]))
            back = tuple(u.inverse_shape(torch.Size(found)))
            same("conventions", f"{name}.inverse_shape, values {case}", back, tuple(wide))


def _equality(t: Any, subject: Any, x: Tensor, context: Tensor | None, tol: float) -> None:
    for case, equal in (
        ("t == t", t == t),
        ("t.inv == t.inv", t.inv == t.inv),
        ("t.inv.inv == t", t.inv.inv == t),
        ("t != t is False", (t != t) is False),
        ("t != t.inv", t != t.inv),
        ("t != another kind of transform", t != dist.transforms.AffineTransform(0.1, 1.1)),
    ):
        if not equal:
            broken("conventions", case, "False, not True")
    other = copy.deepcopy(subject)
    with torch.no_grad():
        for value in other.parameters() if isinstance(other, nn.Module) else ():
            value.add_(0.1)
        u = made(other, context)
        same("conventions", "t == u as u == t", t == u, u == t)
        if t == u:
            close("conventions", "values of equal transforms", u(x), t(x), tol)


def _pushed(case: str, t: Any, forward: bool, like: Tensor, tol: float) -> None:
    u = t if forward else t.inv
    base = _base(u.domain, like)
    d = dist.TransformedDistribution(base, [u])
    for name, each, batch in (("", d, d.batch_shape), ("expand, ", d.expand((2, *d.batch_shape)), (2, *d.batch_shape))):
        where = f"{case}: {name}"
        for draw in ("sample", "rsample"):
            with seeded(17), torch.no_grad():
                y = getattr(each, draw)((3,)).clone()
            same("as distribution", f"{where}shape of {draw}", tuple(y.shape), (3, *batch, *d.event_shape))
        rows = y.reshape(prod(y.shape[: y.dim() - len(d.event_shape)]), -1)
        if len(rows.unique(dim=0)) < len(rows):
            broken("as distribution", f"{where}noise of each row", f"{rows[0, 0]:.6g} twice")
        if not each.support.check(y).all():
            broken("as distribution", f"{where}support", "samples outside")
        x = u.inv(y)
        expected = base.log_prob(x) - u.with_cache(0).log_abs_det_jacobian(x, y)
        close("as distribution", f"{where}log_prob", each.log_prob(y), expected, tol)
    if not (u.domain.event_dim or u.codomain.event_dim) and _monotone(u, x):
        with seeded(17), torch.no_grad():
            y = d.sample((3,)).clone()
            x = u.inv(y)
            p = torch.where(u(x + 1e-3) > u(x), base.cdf(x), 1 - base.cdf(x))
            close("as distribution", f"{case}: cdf", d.cdf(y), p, tol)
            close("as distribution", f"{case}: icdf", d.icdf(p), y, 1e-6)


def _base(domain: Any, like: Tensor) -> Any:
    """Returns a distribution over the domain with the shape of ``like``."""
    onto = None if innermost(domain) is constraints.real else biject_to(domain)
    size = like.shape if onto is None else onto.inverse_shape(like.shape)
    dims = domain.event_dim if onto is None else onto.domain.event_dim
    base = dist.Normal(like.new_zeros(size), like.new_ones(size)).to_event(dims)
    return base if onto is None else dist.TransformedDistribution(base, [onto])


def _batch(value: Tensor, event_dim: int) -> tuple[int, ...]:
    return tuple(value.shape[: value.dim() - event_dim])
