"""Laws of transforms, and the law of copies, which holds for every subject."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import ComposeTransform, Transform
from torch.distributions.utils import _sum_rightmost

from .helpers import as_function, broken, close, gradients_of, made, no_error, same


def inverse(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """Checks that a transform and its inverse agree.

    ``inv.inv is t``, round trips return their arguments, shapes and domains are right, and log-determinants are negatives of
    each other. If the transform has ``call_and_ladj``, it returns the same values and log-determinants in both directions.

    Args:
        subject: a transform, or a module whose call returns one.
        x: values (B, *event) in the domain, with the batch dim B of the context.
        context: (B, C) or None.
        tol: the tolerance, relative to 1 + |value|.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> import torch
        >>> from torch.distributions.transforms import SigmoidTransform
        >>> inverse(SigmoidTransform(), torch.randn(5).double())
    """
    t = made(subject, context)
    if t.inv.inv is not t:
        broken("inverse", "inv.inv is t", f"{t.inv.inv} is not {t}")
    y = t(x)
    fresh = made(subject, context)
    back = fresh.inv(y.clone())
    close("inverse", "t.inv(t(x))", back, x, tol)
    close("inverse", "t(t.inv(y))", made(subject, context)(back.clone()), y, tol)
    ladj = t.log_abs_det_jacobian(x, y)
    same("inverse", "shape of log|dy/dx|", tuple(ladj.shape), tuple(x.shape[: x.dim() - t.domain.event_dim]))
    for case, got in (
        ("after the inverse", fresh.inv.log_abs_det_jacobian(y, back)),
        ("of other tensors", t.inv.log_abs_det_jacobian(y.clone(), x.clone())),
        ("without a cache", t.with_cache(0).inv.log_abs_det_jacobian(y, x)),
    ):
        close("inverse", f"log|dx/dy| {case} is minus log|dy/dx|", got, -ladj, tol)
    pairs = {"t": (t, x, y, ladj), "t.inv": (t.inv, y, x, -ladj), "another t.inv": (fresh.inv, y.clone(), x, -ladj)}
    for case, (u, value, *expected) in pairs.items():
        for quantity, got, want in zip(("value", "log-determinant"), _pair(u, value), expected, strict=False):
            close("inverse", f"call_and_ladj of {case}, {quantity}", got, want, tol)
    caches: dict[str, Callable[[], Transform]] = {
        "with_cache(1)": lambda: t.with_cache(1),
        "ComposeTransform([t], cache_size=1)": lambda: ComposeTransform([t], cache_size=1),
    }
    for case, make in caches.items():
        with no_error("inverse", case, NotImplementedError):
            cached = make()
        close("inverse", case, cached(x), y, 0.0)
        close("inverse", f"{case}.inv", cached.inv(y.clone()), x, tol)
        close("inverse", f"{case}, log|dy/dx|", cached.log_abs_det_jacobian(x, y), ladj, tol)
    same("inverse", "forward_shape", tuple(t.forward_shape(x.shape)), tuple(y.shape))
    same("inverse", "inverse_shape", tuple(t.inverse_shape(y.shape)), tuple(x.shape))
    for name, constraint, value in (("domain", t.domain, x), ("codomain", t.codomain, y)):
        same("inverse", f"{name}.check", bool(constraint.check(value).all()), True)
        same("inverse", f"{name}.check of NaN", bool(constraint.check(value * float("nan")).any()), False)
    same("inverse", "event dims of the domain of inv", t.inv.domain.event_dim, t.codomain.event_dim)
    same("inverse", "event dims of the codomain of inv", t.inv.codomain.event_dim, t.domain.event_dim)


def _pair(t: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Returns value and log-determinant by ``call_and_ladj``, or nothing if the transform does not have it."""
    return t.call_and_ladj(x) if hasattr(t, "call_and_ladj") else ()


def log_det(
    subject: Any, x: Tensor, context: Tensor | None = None, triangular: bool = False, tol: float = 1e-6
) -> None:
    """Checks log|dy/dx| in both directions against the Jacobian by autograd and by finite differences.

    If y has more elements than x (a simplex), only the first ones are used.

    Args:
        subject: as in :func:`inverse`.
        x: as in :func:`inverse`.
        context: as in :func:`inverse`.
        triangular: whether to check also that outputs do not depend on later sites and that diagonals are positive.
        tol: the tolerance, relative to 1 + |value|.
    """
    t = made(subject, context)
    y = t(x).detach()
    for name, f, value in (("y", t.with_cache(0), x), ("x", t.with_cache(0).inv, y)):
        if name == "x" and x.shape != y.shape:
            continue
        dims, rows = t.domain.event_dim, len(value)
        out = f(value).detach()
        ladj = f.log_abs_det_jacobian(value, out)
        size, used = prod(value.shape[1:]), slice(prod(value.shape[1:]))
        full = torch.autograd.functional.jacobian(f, value).reshape(rows, -1, rows, size)
        jacobian = full.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        close("log-determinant", f"rows of {name} are independent", full.abs().sum(2), jacobian.abs(), tol)
        steps = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *value.shape[1:]) * 1e-5
        differences = torch.stack([(f(value + h) - f(value - h)).reshape(rows, -1) / 2e-5 for h in steps], -1).detach()
        for case, matrix in (("autograd", jacobian), ("finite differences", differences)):
            sign, expected = torch.linalg.slogdet(matrix[:, used])
            close("log-determinant", f"of {name} by {case}", _sum_rightmost(ladj, ladj.dim() - 1), expected, tol)
            if triangular:
                blocks = matrix.unflatten(1, (value.shape[1], -1)).unflatten(3, (value.shape[1], -1)).abs().amax((2, 4))
                close("triangularity", f"of {name} by {case}", blocks.triu(1), 0.0, tol)
                close("triangularity", f"sign of the diagonal of {name} by {case}", sign, 1.0, tol)
        same("log-determinant", f"dims of {name}", dims + ladj.dim() >= value.dim() - (dims == 0), True)


def derivatives(subject: Any, x: Tensor, context: Tensor | None = None) -> None:
    """Checks first and second derivatives of both directions in the argument, the context and the parameters of a module.

    ``gradcheck`` and ``gradgradcheck`` of torch run on value and log-determinant. Arguments as in :func:`inverse`.
    """
    y = made(subject, context)(x).detach()
    of_module = isinstance(subject, nn.Module) and not isinstance(subject, Transform)  # Pyro's TransformModule is both
    parameters = dict(subject.named_parameters()) if of_module else {}
    there_and_back = x.shape != y.shape  # there are no derivatives outside the support
    for name, value in (("t", x), ("t.inv", y)):
        f = as_function(subject, list(parameters), name == "t", there_and_back)
        leaves = [x if there_and_back else value, *([] if context is None else [context])]
        inputs = [v.detach().clone().requires_grad_() for v in (*leaves, *parameters.values())]
        for check in (gradcheck, gradgradcheck):
            with no_error("derivatives", f"{check.__name__} of {name}", RuntimeError, AssertionError):
                check(f, inputs, fast_mode=True)


def cache(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """Checks that a transform's cache is not used for another tensor, or after values, parameters or grad mode change.

    Arguments as in :func:`inverse`.
    """
    subject = copy.deepcopy(subject)
    parameters = list(subject.parameters()) if isinstance(subject, nn.Module) else []

    def check(case: str, t: Any, x: Tensor) -> None:
        fresh = made(subject, context).with_cache(0)
        pair, expected, y = _pair(t, x), fresh(x), t(x)
        ladj = fresh.log_abs_det_jacobian(x, expected)
        for got, want in zip(pair, (expected, ladj), strict=False):
            close("cache", f"{case}: call_and_ladj", got, want, tol)
        close("cache", f"{case}: value", y, expected, tol)
        close("cache", f"{case}: log|dy/dx|", t.log_abs_det_jacobian(x, y), ladj, tol)
        same("cache", f"{case}: requires_grad", y.requires_grad, expected.requires_grad)

    t, x = made(subject, context), x.detach().clone()
    with torch.no_grad():
        other = t(x * 0.5).clone()
    check("after other values", t, x)
    with torch.no_grad():
        y = t(x)
        x.mul_(0.5)  # every domain here is a cone or the reals
        check("x edited in place", t, x)
        wanted, y = x * 2, t(x)
        y.copy_(made(subject, context)(wanted))
        close("cache", "y edited in place: inverse", t.inv(y), wanted, tol)
        back = t.inv(other.copy_(y))
        back.mul_(0.5)
        other.copy_(made(subject, context)(wanted))
        close("cache", "x found, then edited in place: inverse", t.inv(other), wanted, tol)
        x.copy_(0.5 * wanted)
        y = t(x)
    check("without grad, then with", t, x)
    for p in parameters:
        y = t(x)
        with torch.no_grad():
            p.add_(0.1 * torch.ones_like(p))
        check("parameters updated", t, x)
        check("parameters updated, called again", made(subject, context), x)
    with torch.inference_mode():
        y = t(x)
        close("cache", "in inference mode", y, made(subject, context)(x), tol)
        t.inv(y)
    check("after inference mode", t, x)
    if parameters:
        grads = []
        with torch.no_grad():
            t(x)
        for each in (t, made(subject, context).with_cache(0)):
            y = each(x)
            grads.append(gradients_of(y.sin().sum() + each.log_abs_det_jacobian(x, y).sum(), parameters))
        for i, (got, expected) in enumerate(zip(*grads, strict=True)):
            close("cache", f"without grad, then with: gradient of parameter {i}", got, expected, tol)


def copies(subject: Any, run: Callable[[Any], Tensor]) -> None:
    """Checks that deep copies and pickles, made before and after use, give the same results as the original.

    Args:
        subject: a conditioner, head, transform, distribution or a module of these.
        run: a function of the subject that returns a tensor, such as ``lambda flow: flow().log_prob(y)``.
    """
    copied: dict[str, Any] = {}
    for when in ("before", "after"):
        copied[f"deepcopy {when} use"] = copy.deepcopy(subject)
        copied[f"pickle {when} use"] = pickle.loads(pickle.dumps(subject))
        copied[f"copy of a copy {when} use"] = copy.deepcopy(pickle.loads(pickle.dumps(subject)))
        expected = run(subject)
    for case, other in copied.items():
        close("copies", case, run(other), expected, 1e-12)
