"""The laws of conditioners, heads, transforms and distributions, as functions to run on one's own.

Each raises an AssertionError that names the broken law, the case and the two numbers. Laws have power only where the
subject is far from the identity and in float64: call ``redraw(module.double())`` first. ``subject`` is a transform or
distribution, or a module whose call (with the context, where one is given) returns it. None changes its subject.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import combinations_with_replacement
from math import inf, log, prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.utils import _sum_rightmost
from torch.func import functional_call

from .base import Conditioner, Head

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def redraw(module: ModuleT, seed: int = 0, spread: float = 0.5) -> ModuleT:
    """Gives all parameters new normal values, under a generator of its own, and returns the module.

    Those of each conditioner are scaled so that the numbers it predicts for normal inputs have a standard deviation of
    about ``spread``: clearly far from the identity, and not so far that samples explode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            deviation = 0.3 if p.dim() < 2 else 2.0 / prod(p.shape[1:]) ** 0.5
            p.copy_(deviation * torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu"))
        for part in module.modules():
            if isinstance(part, Conditioner):
                _scale_to(part, spread)
    return module


def _scale_to(conditioner: Conditioner, spread: float) -> None:
    inputs = conditioner_inputs(conditioner, 200)
    for _ in range(20):
        deviations = conditioner(*inputs).std(0)
        if not (deviations > 1e-6).any():
            return
        ratio = spread / float(deviations[deviations > 1e-6].square().mean().sqrt())
        for p in conditioner.parameters():
            p.mul_(min(max(ratio, 0.5), 2.0) ** 0.4)


# ---------------------------------------------------------------------------------------------------- conditioners


def conditioner_inputs(
    conditioner: Conditioner, rows: int = 6, sites: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Random sites (rows, T, *site_shape) and context (rows, C) or None, as the conditioner reads them."""
    generator, like = torch.Generator().manual_seed(seed), next(conditioner.parameters())
    sites = conditioner.num_sites or sites
    kinds = conditioner.site if isinstance(conditioner.site, list) else [conditioner.site]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)

    def draw_kind(kind: Any, count: int) -> Tensor:
        if isinstance(kind, int):
            return torch.randint(kind, (rows, count), generator=generator, device="cpu").to(like.device)
        return draw(rows, count, *kind)

    parts = [draw_kind(kind, sites if len(kinds) == 1 else 1) for kind in kinds]
    y = parts[0] if len(parts) == 1 else torch.cat([part.to(like.dtype) for part in parts], 1)
    return y, draw(rows, conditioner.context) if conditioner.context else None


def causality(
    conditioner: Conditioner,
    reads: Tensor | None = None,
    must_read: Tensor | None = None,
    sites: int = 5,
    seed: int = 0,
) -> None:
    """A site's parameters change with the earlier sites that it may read, and with no other: for any weights.

    Args:
        conditioner: also with noise for weights, copied, pickled, and through ``functional_call``.
        reads: (T, T) Boolean, ``reads[t, s]`` whether site t may read site s; by default all earlier ones.
        must_read: the sites that it does read; by default ``reads``.
        sites: T where the conditioner takes any.
        seed: of the inputs and the noise.
    """
    y, context = conditioner_inputs(conditioner, 16, sites, seed)
    noisy = redraw(copy.deepcopy(conditioner), seed + 1)
    noise = {name: p.detach() for name, p in noisy.named_parameters()}
    variants: dict[str, Callable[..., Tensor]] = {
        "as given": conditioner,
        "noise for weights": noisy,
        "deepcopy": copy.deepcopy(conditioner),
        "pickle": pickle.loads(pickle.dumps(conditioner)),
        "functional_call": lambda *inputs: functional_call(conditioner, noise, inputs),
    }
    reads = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device="cpu").tril(-1) if reads is None else reads
    must_read = reads if must_read is None else must_read
    for case, net in variants.items():
        with torch.no_grad():
            phi = net(y, context)
            for s in range(y.shape[1]):
                change = (net(_with_other_site(conditioner, y, s), context) - phi).abs().amax((0, 2)).tolist()
                for t, by in enumerate(change):
                    if by > 1e-12 and not reads[t, s]:
                        _broken(
                            "causality",
                            f"{case}, site {s}",
                            f"changes the parameters of site {t} by {by:.3g}, not by 0",
                        )
                    if not by > 1e-9 and must_read[t, s]:
                        _broken(
                            "causality",
                            f"{case}, site {s}",
                            f"changes the parameters of site {t} by {by:.3g}, not by more",
                        )


def chunks(conditioner: Conditioner, sites: int = 5, seed: int = 0, tol: float = 1e-9) -> None:
    """``forward`` equals ``start`` followed by ``extend``, however y is cut, without grad and with; so do the gradients."""
    y, context = conditioner_inputs(conditioner, 6, sites, seed)
    T = y.shape[1]
    leaves = [v.requires_grad_() for v in (y, context) if v is not None and v.is_floating_point()]
    leaves += [p for p in conditioner.parameters() if p.requires_grad]
    expected = conditioner(y, context)
    cotangent = _noise_like(expected, seed)
    grads = _gradients((expected * cotangent).sum(), leaves)
    cuts = [
        c for c in ((T - 1,), (1,) * (T - 1), (1, T - 2), (T - 2, 1), (2, *(1,) * (T - 3))) if min(c, default=1) > 0
    ]
    for cut in dict.fromkeys(c for c in cuts if sum(c) == T - 1) or [()]:
        with torch.no_grad():
            _close("chunks", f"cut {cut}, without grad", _by_chunks(conditioner, y, context, cut), expected, tol)
        phi = _by_chunks(conditioner, y, context, cut)
        _close("chunks", f"cut {cut}, with grad", phi, expected, tol)
        for i, (got, grad) in enumerate(zip(_gradients((phi * cotangent).sum(), leaves), grads, strict=True)):
            _close("chunks", f"cut {cut}, gradient of input or parameter {i}", got, grad, tol)


def reorder(conditioner: Conditioner, sites: int = 5, seed: int = 0, tol: float = 1e-9) -> None:
    """``reorder`` copies batch rows: branches go their own ways, and the state that they came from goes on too."""
    y, context = conditioner_inputs(conditioner, 6, sites, seed)
    T = y.shape[1]
    index = torch.tensor([4, 0, 4, 2], device=y.device)
    other = _with_other_site(conditioner, y, T - 2) if T > 1 else y
    for read in range(T - 1):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                _, state = conditioner.start(context, len(y))
                if read:
                    _, state = conditioner.extend(y[:, :read], state)
                branches = [conditioner.reorder(state, index) for _ in range(2)]
                got = [
                    conditioner.extend(rest[:, read : T - 1], branch)[0]
                    for rest, branch in ((other[index], branches[0]), (y[index], branches[1]), (y, state))
                ]
                phis = [conditioner(v, context)[:, read + 1 :] for v in (other, y)]
            wanted = (phis[0][index], phis[1][index], phis[1])
            for name, phi, value in zip(("first branch", "second branch", "trunk"), got, wanted, strict=True):
                _close("reorder", f"{name} after {read} sites, grad {grad}", phi, value, tol)


def consumption(conditioner: Conditioner, sites: int = 5, seed: int = 0) -> None:
    """A state that was extended raises a RuntimeError when it is used again; too many sites are an error."""
    y, context = conditioner_inputs(conditioner, 6, sites, seed)
    T = y.shape[1]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, old = conditioner.start(context, len(y))
            if conditioner.num_sites:
                with _raises("consumption", f"{T} of {T} sites, grad {grad}", ValueError):
                    conditioner.extend(y, old)
            if T > 1:
                conditioner.extend(y[:, :1], old)
                with _raises("consumption", f"extend again, grad {grad}", RuntimeError):
                    conditioner.extend(y[:, :1], old)
                with _raises("consumption", f"reorder after extend, grad {grad}", RuntimeError):
                    conditioner.reorder(old, torch.arange(2, device=y.device))


def context_use(conditioner: Conditioner, sites: int = 5, seed: int = 0) -> None:
    """Every site's parameters, the first one's too, are a non-linear function of every feature of the context."""
    y, context = conditioner_inputs(conditioner, 16, sites, seed)
    if context is None:
        return
    with torch.no_grad():
        phi, zero = conditioner(y, context), conditioner(y, torch.zeros_like(context))
        for feature in range(context.shape[1]):
            moved = context.clone()
            moved[:, feature] += 1.5
            by = (conditioner(y, moved) - phi).abs().amax((0, 2))
            if not (by > 1e-9).all():
                _broken(
                    "context use",
                    f"feature {feature}",
                    f"changes site {int(by.argmin())} by {by.min():.3g}, not by more",
                )
        bend = (conditioner(y, -context) + phi - 2 * zero).abs().amax((0, 2))
    if not (bend > 1e-6).all():
        _broken("context use", "non-linearity", f"site {int(bend.argmin())} bends by {bend.min():.3g}, not by more")


def sequential_gradient(conditioner: Conditioner, head: Head, seed: int = 0, sites: int = 5, tol: float = 1e-8) -> None:
    """Solving y_t = head(phi_t(x_<t))(x_t) for x has the gradients of autograd through ``start`` and ``extend``.

    It is the law of a conditioner's ``adjoint`` (the reverse sweep), in y, the context and every parameter.
    """
    from .transforms import ConditionedAutoregressive

    y, context = conditioner_inputs(conditioner, 4, sites, seed)
    leaves = [v.requires_grad_() for v in (y, context) if v is not None]
    leaves += [p for p in (*conditioner.parameters(), *head.parameters()) if p.requires_grad]
    transform = ConditionedAutoregressive(conditioner, head, context)
    x = transform.inv(y)
    found = x, -transform.log_abs_det_jacobian(x, y)

    phi, state = conditioner.start(context, len(y))
    xs, ladj = [head(phi.unsqueeze(1), 0).inv(y[:, :1])], 0.0
    phis = [phi.unsqueeze(1)]
    for t in range(1, y.shape[1]):
        phi, state = conditioner.extend(xs[-1], state)
        phis.append(phi)
        xs.append(head(phi, t).inv(y[:, t : t + 1]))
    for t, (phi, x_t) in enumerate(zip(phis, xs, strict=True)):
        ladj = ladj - head(phi, t).log_abs_det_jacobian(x_t, y[:, t : t + 1]).sum(1)
    expected = torch.cat(xs, 1), ladj
    for name, got, value in zip(("x", "log|dx/dy|"), found, expected, strict=True):
        _close("sequential gradient", name, got, value, tol)  # type: ignore[arg-type]
    weights = [_noise_like(value, seed + i) for i, value in enumerate(found)]
    for case, keep in (("of x", (1, 0)), ("of log|dx/dy|", (0, 1)), ("of both", (1, 1))):
        sums = [sum(k * (v * w).sum() for k, v, w in zip(keep, out, weights, strict=True)) for out in (found, expected)]
        pairs = zip(*(_gradients(total, leaves, keep_graph=True) for total in sums), strict=True)  # type: ignore[arg-type]
        for i, (got, value) in enumerate(pairs):
            _close("sequential gradient", f"{case}, input or parameter {i}", got, value, tol)


# ---------------------------------------------------------------------------------------------------------- heads


def bijection_head(head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-7) -> None:
    """A head of bijections: sizes, the identity nearly at phi = 0, increasing, onto, exact log-derivative, site by site."""
    like = next((b for b in (*head.parameters(), *head.buffers()) if b.is_floating_point()), torch.empty(0))
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


# ----------------------------------------------------------------------------------------------------- transforms


def inverse(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """``inv.inv is t``, round trips, shapes, domains, and log-determinants that are each other's negative.

    Args:
        subject: a transform, or a module whose call returns one.
        x: (B, *event) values in the domain; B also for the context.
        context: (B, C) or None.
        tol: relative to 1 + |value|.
    """
    t = made(subject, context)
    if t.inv.inv is not t:
        _broken("inverse", "inv.inv is t", f"{t.inv.inv} is not {t}")
    y = t(x)
    fresh = made(subject, context)
    back = fresh.inv(y.clone())
    _close("inverse", "t.inv(t(x))", back, x, tol)
    _close("inverse", "t(t.inv(y))", made(subject, context)(back.clone()), y, tol)
    ladj = t.log_abs_det_jacobian(x, y)
    _same("inverse", "shape of log|dy/dx|", tuple(ladj.shape), tuple(x.shape[: x.dim() - t.domain.event_dim]))
    for case, got in (
        ("after the inverse", fresh.inv.log_abs_det_jacobian(y, back)),
        ("of other tensors", t.inv.log_abs_det_jacobian(y.clone(), x.clone())),
        ("without a cache", t.with_cache(0).inv.log_abs_det_jacobian(y, x)),
    ):
        _close("inverse", f"log|dx/dy| {case} is minus log|dy/dx|", got, -ladj, tol)
    for size in (0, 1):
        try:
            cached = t.with_cache(size)
        except NotImplementedError as error:
            raise AssertionError(f"inverse broken [with_cache({size})]: {error}") from error
        _close("inverse", f"with_cache({size})", cached(x), y, 0.0)
        _close("inverse", f"with_cache({size}).inv", cached.inv(y.clone()), x, tol)
    _same("inverse", "forward_shape", tuple(t.forward_shape(x.shape)), tuple(y.shape))
    _same("inverse", "inverse_shape", tuple(t.inverse_shape(y.shape)), tuple(x.shape))
    for name, constraint, value in (("domain", t.domain, x), ("codomain", t.codomain, y)):
        _same("inverse", f"{name}.check", bool(constraint.check(value).all()), True)
        _same("inverse", f"{name}.check of NaN", bool(constraint.check(value * float("nan")).any()), False)
    _same(
        "inverse",
        "event dims of inv",
        (t.inv.domain.event_dim, t.inv.codomain.event_dim),
        (t.codomain.event_dim, t.domain.event_dim),
    )


def log_det(
    subject: Any, x: Tensor, context: Tensor | None = None, triangular: bool = False, tol: float = 1e-6
) -> None:
    """log|dy/dx| is that of autograd's Jacobian and of finite differences of the values, in both directions.

    With ``triangular``, also: no output depends on a later site, and diagonals are positive. Where y has more numbers than x
    (a simplex), its first ones count. Arguments as in :func:`inverse`.
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
        _close("log-determinant", f"rows of {name} are independent", full.abs().sum(2), jacobian.abs(), tol)
        steps = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *value.shape[1:]) * 1e-5
        differences = torch.stack([(f(value + h) - f(value - h)).reshape(rows, -1) / 2e-5 for h in steps], -1).detach()
        for case, matrix in (("autograd", jacobian), ("finite differences", differences)):
            sign, expected = torch.linalg.slogdet(matrix[:, used])
            _close("log-determinant", f"of {name} by {case}", _sum_rightmost(ladj, ladj.dim() - 1), expected, tol)
            if triangular:
                blocks = matrix.unflatten(1, (value.shape[1], -1)).unflatten(3, (value.shape[1], -1)).abs().amax((2, 4))
                _close("triangularity", f"of {name} by {case}", blocks.triu(1), torch.zeros_like(blocks), tol)
                _close("triangularity", f"sign of the diagonal of {name} by {case}", sign, torch.ones_like(sign), tol)
        _same("log-determinant", f"dims of {name}", dims + ladj.dim() >= value.dim() - (dims == 0), True)


def derivatives(subject: Any, x: Tensor, context: Tensor | None = None) -> None:
    """First and second derivatives of both directions, in the argument, the context and the parameters of a module.

    By torch's ``gradcheck`` and ``gradgradcheck`` of value and log-determinant; arguments as in :func:`inverse`.
    """
    y = made(subject, context)(x).detach()
    parameters = dict(subject.named_parameters()) if isinstance(subject, nn.Module) else {}
    for name, value in (("t", x), ("t.inv", y)):

        def f(value: Tensor, *rest: Tensor, forward: bool = name == "t") -> tuple[Tensor, Tensor]:
            given, weights = (None, rest) if context is None else (rest[0], rest[1:])
            if isinstance(subject, Transform):
                t: Any = subject
            elif isinstance(subject, nn.Module):
                t = functional_call(
                    subject, dict(zip(parameters, weights, strict=True)), () if given is None else (given,)
                )
            else:
                t = made(subject, given)
            if not forward and x.shape != y.shape:  # off the support there is no derivative: the way there and back
                value = t(value)
            t, value = t if forward else t.inv, value.clone()  # gradcheck edits .data, which no cache can see
            out = t(value)
            return out, t.log_abs_det_jacobian(value, out) + 0 * out.sum()  # always on the graph, so always checked

        leaves = [x if x.shape != y.shape else value, *([] if context is None else [context])]
        inputs = [v.detach().clone().requires_grad_() for v in (*leaves, *parameters.values())]
        for check in (gradcheck, gradgradcheck):
            try:
                check(f, inputs, fast_mode=True)
            except (RuntimeError, AssertionError) as error:
                raise AssertionError(f"derivatives broken [{check.__name__} of {name}]: {error}") from error


def cache(subject: Any, x: Tensor, context: Tensor | None = None, tol: float = 1e-8) -> None:
    """What a transform remembers is never served for another tensor, changed values, parameters or grad mode.

    Arguments as in :func:`inverse`.
    """
    subject = copy.deepcopy(subject)
    parameters = list(subject.parameters()) if isinstance(subject, nn.Module) else []

    def check(case: str, t: Any, x: Tensor) -> None:
        fresh = made(subject, context).with_cache(0)
        expected, y = fresh(x), t(x)
        _close("cache", f"{case}: value", y, expected, tol)
        _close(
            "cache", f"{case}: log|dy/dx|", t.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, expected), tol
        )
        if y.requires_grad != expected.requires_grad:
            _broken("cache", f"{case}: requires_grad", f"{y.requires_grad}, not {expected.requires_grad}")

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
        _close("cache", "y edited in place: inverse", t.inv(y), wanted, tol)
        back = t.inv(other.copy_(y))
        back.mul_(0.5)
        other.copy_(made(subject, context)(wanted))
        _close("cache", "x found, then edited in place: inverse", t.inv(other), wanted, tol)
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
        _close("cache", "in inference mode", y, made(subject, context)(x), tol)
        t.inv(y)
    check("after inference mode", t, x)
    if parameters:
        grads = []
        with torch.no_grad():
            t(x)
        for each in (t, made(subject, context).with_cache(0)):
            y = each(x)
            grads.append(_gradients(y.sin().sum() + each.log_abs_det_jacobian(x, y).sum(), parameters))
        for i, (got, expected) in enumerate(zip(*grads, strict=True)):
            _close("cache", f"without grad, then with: gradient of parameter {i}", got, expected, tol)


def copies(subject: Any, run: Callable[[Any], Tensor]) -> None:
    """Deep copies and pickles, made before and after use, do what the original does.

    Args:
        subject: a conditioner, head, transform, distribution or a module of these.
        run: what to compute with it, for instance ``lambda flow: flow().log_prob(y)``.
    """
    copied: dict[str, Any] = {}
    for when in ("before", "after"):
        copied[f"deepcopy {when} use"] = copy.deepcopy(subject)
        copied[f"pickle {when} use"] = pickle.loads(pickle.dumps(subject))
        expected = run(subject)
    for case, other in copied.items():
        _close("copies", case, run(other), expected, 1e-12)


# -------------------------------------------------------------------------------------------------- distributions


def shapes(subject: Any, context: Tensor | None = None) -> None:
    """Shapes of samples and log_prob, ``expand`` (Size, tuple, list; never mutates), values with fewer batch dims."""
    d = made(subject, context)
    batch, event = d.batch_shape, d.event_shape
    for size in ((), (2,), (2, 3)):
        for name in ("sample", *(["rsample"] if d.has_rsample else [])):
            value = getattr(d, name)(torch.Size(size))
            _same("shapes", f"{name}({size})", tuple(value.shape), (*size, *batch, *event))
            _same("shapes", f"log_prob of {name}({size})", tuple(d.log_prob(value).shape), (*size, *batch))
    _same("shapes", "event dims of the support", d.support.event_dim, len(event))
    value = d.sample()
    for dropped in range(1, len(batch) + 1):
        part = value[(0,) * dropped]
        _close(
            "shapes",
            f"a value without its first {dropped} batch dims",
            d.log_prob(part),
            d.log_prob(part.expand_as(value)),
            1e-9,
        )
    lp = d.log_prob(value)
    for kind in (torch.Size, tuple, list):
        wide = d.expand(kind((4, *batch)))
        draws = wide.sample()
        _same("shapes", f"expand({kind.__name__})", tuple(wide.batch_shape), (4, *batch))
        _same("shapes", "expand leaves the original", tuple(d.batch_shape), tuple(batch))
        _same("shapes", "sample of an expanded one", tuple(draws.shape), (4, *batch, *event))
        _close("shapes", "log_prob of an expanded one", wide.log_prob(value), lp.expand(4, *batch), 1e-9)
        if not d.support.is_discrete and (draws[0] == draws[1]).any():
            _broken("shapes", "independent rows", f"{draws[0].flatten()[0]} twice")
    if not d.support.is_discrete and len(batch) and batch[0] > 1 and (value[0] == value[1]).any():
        _broken("shapes", "independent rows", f"{value[0].flatten()[0]} twice")


def support(subject: Any, context: Tensor | None = None, outside: Tensor | None = None, count: int = 1000) -> None:
    """Samples lie in the support and have finite log_prob; values outside have -inf, or a ValueError when validating.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
        outside: (N, *event) values outside the support; infinite and NaN values are always tried.
        count: of samples.
    """
    d = made(subject, context)
    value = d.sample((count,))
    inside = d.support.check(value)
    if not inside.all():
        _broken("support", "samples inside", f"{value[~inside].flatten()[0]}, not within {d.support}")
    if not (lp := d.log_prob(value)).isfinite().all():
        _broken("support", "log_prob of samples", f"{lp[~lp.isfinite()][0]}, not finite")
    if d.support.is_discrete and outside is None:
        return
    one = value[0].reshape(-1, *d.event_shape)[0]
    given, bad = (0, []) if outside is None else (len(outside), list(outside.to(one)))
    for far in (inf, -inf, float("nan")):
        wrong = one.clone()
        wrong.view(-1)[-1] = far
        bad += [wrong, torch.full_like(one, far)]
    strict = copy.copy(d)
    strict._validate_args = True
    for i, v in enumerate(bad):
        lp = _log_prob(d, v)
        if not v.isnan().any() and not (lp == -inf).all():
            _broken("support", f"log_prob of {v.tolist()}", f"{lp.flatten()[0]}, not -inf")
        if v.isnan().any() and (lp > -inf).any():
            _broken("support", f"log_prob of {v.tolist()}", f"{lp.flatten()[0]}, not NaN or -inf")
        if i < given or not d.support.check(v).any():  # torch's constraints.real admits infinities
            with _raises("support", f"log_prob of {v.tolist()} when validating", ValueError):
                strict.log_prob(v)


def mass(subject: Any, context: Tensor | None = None, tol: float = 1e-3) -> None:
    """The total mass is 1: by enumeration, or by quadrature in the unconstrained space of one or two numbers."""
    d = made(subject, context)
    if d.support.is_discrete:
        total = d.log_prob(d.enumerate_support()).exp().sum(0)
    else:
        total = torch.stack([(density * weights).sum(0) for _, weights, density in _quadrature(d)]).sum(0)
    _close("mass", "total", total, torch.ones_like(total), tol)


def agreement(
    subject: Any, context: Tensor | None = None, count: int = 4000, seed: int = 0, limit: float = 5.0
) -> None:
    """Samples agree with log_prob: a goodness of fit in unconstrained space, within ``limit`` standard errors.

    E_p[g q / (p + q)] = E_q[g p / (p + q)] for bounded functions g and a normal q that overlaps p; of one number also the
    Kolmogorov-Smirnov statistic against the cdf by quadrature.
    """
    d = made(subject, context)
    with _seeded(seed), torch.no_grad():
        y = d.sample((count,))
        u = biject_to(d.support).inv(y)
        u = u.reshape(count, -1, u.shape[-1])
        center, spread = _center_and_spread(u)
        normal = torch.distributions.Normal(center, spread)
        v = center + spread * torch.randn_like(u)

        def terms(values: Tensor, sign: float) -> Tensor:
            log_p = _log_density(d, values.reshape(count, *d.batch_shape, -1)).reshape(count, -1)
            share = (sign * (normal.log_prob(values).sum(-1) - log_p)).sigmoid()  # q / (p + q), or p / (p + q)
            columns = ((values - center) / spread).tanh().unbind(-1)
            pairs = [a * b for a, b in combinations_with_replacement((torch.ones_like(share), *columns), 2)]
            return torch.stack(pairs) * share

        ours, theirs = terms(u, 1.0), terms(v, -1.0)
        z = (ours.mean(1) - theirs.mean(1)) / ((ours.var(1) + theirs.var(1)) / count).sqrt()
        if not z.abs().max() < limit:
            _broken(
                "agreement",
                "samples and log_prob",
                f"means that differ by {z.abs().max():.3g} standard errors, not below {limit}",
            )
        if u.shape[-1] == 1:
            points, weights, density = (
                torch.cat(parts).reshape(-1, u.shape[1]) for parts in zip(*_quadrature(d), strict=True)
            )
            cdf = (weights * density).cumsum(0) - weights * density / 2
            for row in range(u.shape[1]):
                mine = u[:, row, 0].sort()[0].contiguous()
                at = torch.searchsorted(points[:, row].contiguous(), mine).clamp(1, len(points) - 1)
                left, right = points[at - 1, row], points[at, row]
                p = torch.lerp(cdf[at - 1, row], cdf[at, row], ((mine - left) / (right - left)).clamp(0, 1))
                statistic = (p - (torch.arange(count, device=p.device) + 0.5) / count).abs().max() * count**0.5
                if not statistic < 2.2:  # p = 1e-4
                    _broken("agreement", f"Kolmogorov-Smirnov, row {row}", f"{statistic:.3g}, not below 2.2")


def gradients(module: nn.Module, context: Tensor | None = None, inert: Collection[str] = (), tol: float = 1e-4) -> None:
    """Every parameter receives its gradient from log_prob and rsample, in train and eval: that of finite differences.

    Args:
        module: its call returns a distribution.
        context: (*batch, C) or None.
        inert: patterns of names of parameters that cannot matter and so may get none.
        tol: of a derivative along a random direction, relative to 1 + |value|.
    """
    module = copy.deepcopy(module)
    y = made(module, context).sample()
    for training in (True, False):
        module.train(training)
        for case in ("log_prob", *(["rsample"] if made(module, context).has_rsample else [])):

            def total(case: str = case) -> Tensor:
                with _seeded(0):
                    d = made(module, context)
                    return d.log_prob(y).sum() if case == "log_prob" else d.rsample((3,)).sin().sum()

            names, parameters = zip(*[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True)
            for name, p, grad in zip(names, parameters, _gradients(total(), parameters), strict=True):
                where = f"{case} of {name}, {'train' if training else 'eval'}"
                if not grad.abs().max() > 0 and not any(fnmatch(name, pattern) for pattern in inert):
                    _broken("gradients", where, "0, not more")
                direction, start = _noise_like(p, 1), p.detach().clone()
                with torch.no_grad():
                    ends = [(p.copy_(start + h * direction), total())[1] for h in (1e-6, -1e-6)]
                    p.copy_(start)
                _close("gradients", where, (grad * direction).sum(), (ends[0] - ends[1]) / 2e-6, tol)


def extremes(module: nn.Module, context: Tensor | None = None) -> None:
    """log_prob and its gradients are finite at values to ±1e8 and near the support's ends; in float32 never NaN."""
    d = made(module, context)
    size = biject_to(d.support).inverse_shape(torch.Size((*d.batch_shape, *d.event_shape)))
    real = all(bool(d.support.check(far * torch.ones_like(d.sample())).all()) for far in (1e9, -1e9))
    for dtype in (torch.float64, torch.float32):
        net = copy.deepcopy(module).to(dtype)
        given = None if context is None else context.to(dtype)
        d = made(net, given)
        for far in (1e4, -1e4, 1e8, -1e8):
            u = torch.full(
                size, far if real else log(abs(far)) * (1 if far > 0 else -1), dtype=dtype, device=d.sample().device
            )
            for sign in (1.0, (-1.0) ** torch.arange(size[-1], device=u.device)):
                y = biject_to(d.support)(u * sign).detach().requires_grad_()
                lp = _log_prob(d, y)
                grads = _gradients(lp[lp.isfinite()].sum(), [y, *net.parameters()], keep_graph=True)
                for what, value in (("log_prob", lp), *((f"gradient {i}", g) for i, g in enumerate(grads))):
                    good = value.isfinite() if dtype == torch.float64 else ~value.isnan()
                    if not good.all():
                        _broken("extremes", f"{what} at {far:g}, {dtype}", f"{value[~good].flatten()[0]}, not finite")


def persistence(module: nn.Module, context: Tensor | None = None) -> None:
    """A state_dict through ``torch.load(weights_only=True)`` carries all that log_prob depends on; copies do too."""
    with torch.no_grad():
        y = made(module, context).sample((3,))
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = redraw(copy.deepcopy(module), seed=7)
        other.load_state_dict(torch.load(file, weights_only=True))
        _close("persistence", "state_dict", made(other, context).log_prob(y), made(module, context).log_prob(y), 1e-12)
        copies(module, lambda m: made(m, context).log_prob(y))
        copies(made(module, context), lambda d: d.log_prob(y))


def freshness(module: nn.Module, context: Tensor | None = None, tol: float = 1e-9) -> None:
    """Changed parameters are seen; a sample made without grad, or in inference mode, scores with gradients all the same."""
    unused, module = copy.deepcopy(module), copy.deepcopy(module)
    parameters = list(module.parameters())
    for case, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        d = made(module, context)
        with mode():
            y = d.sample()
            d.log_prob(y)
        y = y.clone() if case == "inference_mode" else y
        grads = _gradients(d.log_prob(y).sum(), parameters)
        expected = (
            _gradients(made(copy.deepcopy(module), context).log_prob(y.clone()).sum(), None or parameters)
            if False
            else None
        )
        fresh = copy.deepcopy(module)
        expected = _gradients(made(fresh, context).log_prob(y.clone()).sum(), list(fresh.parameters()))
        for i, pair in enumerate(zip(grads, expected, strict=True)):
            _close("freshness", f"sample under {case}, then log_prob: gradient of parameter {i}", *pair, tol)
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.1)
        fresh = copy.deepcopy(unused)
        fresh.load_state_dict(module.state_dict())
        now, expected = (made(m, context).log_prob(y.clone()) for m in (module, fresh))
        _close("freshness", "parameters changed, the module called again", now, expected, tol)


# --------------------------------------------------------------------------------------------------------- devices


def device(run: Callable[[], Any], seed: int = 0) -> None:
    """Nothing is made on the default device: ``run`` gives the same tensors while that is ``meta``."""
    with _seeded(seed):
        expected = list(_tensors(run()))
    try:
        with _seeded(seed), torch.device("meta"):
            found = list(_tensors(run()))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise AssertionError(f"device broken [the default device is meta]: {error}") from error
    for got, value in zip(found, expected, strict=True):
        _same("device", "the default device is meta", got.device, value.device)
        _close("device", "the default device is meta", got, value, 1e-12)


def meta(module: ModuleT, run: Callable[[ModuleT], Any]) -> None:
    """``run`` of the module on ``meta``, without validation, makes every tensor there."""
    import pyro

    try:
        with pyro.validation_enabled(False):
            values = list(_tensors(run(copy.deepcopy(module).to("meta"))))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise AssertionError(f"device broken [all on meta]: {error}") from error
    for value in values:
        _same("device", "all on meta", value.device.type, "meta")


# --------------------------------------------------------------------------------------------------------- helpers


def made(subject: Any, context: Tensor | None = None) -> Any:
    """A transform or distribution as it is; of a module, what its call returns."""
    if isinstance(subject, (Transform, Distribution)):
        return subject
    return subject() if context is None else subject(context)


def _broken(law: str, case: str, numbers: str) -> None:
    raise AssertionError(f"{law} broken [{case}]: {numbers}")


def _same(law: str, case: str, got: Any, expected: Any) -> None:
    if got != expected:
        _broken(law, case, f"{got}, not {expected}")


def _close(law: str, case: str, got: Tensor, expected: Tensor, tol: float) -> None:
    """Equal within tol * (1 + |expected|), equal infinities included."""
    _same(law, f"{case}, shape", tuple(got.shape), tuple(expected.shape))
    off = ~(((got - expected).abs() <= tol * (1 + expected.abs())) | (got == expected))
    if off.any():
        _broken(law, case, f"{got[off][0].item():.10g}, not {expected[off][0].item():.10g} (tolerance {tol:g})")


@contextmanager
def _raises(law: str, case: str, error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    _broken(law, case, f"no error, not a {error.__name__}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _noise_like(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device="cpu").to(value.device)


def _gradients(total: Tensor, leaves: Sequence[Tensor], keep_graph: bool = False) -> list[Tensor]:
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves), retain_graph=keep_graph, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def _with_other_site(conditioner: Conditioner, y: Tensor, s: int) -> Tensor:
    kind = conditioner.site[s] if isinstance(conditioner.site, list) else conditioner.site
    new = y.detach().clone()
    new[:, s] = (new[:, s] + 1) % kind if isinstance(kind, int) else new[:, s] + 1.7
    return new


def _by_chunks(conditioner: Conditioner, y: Tensor, context: Tensor | None, cut: Sequence[int]) -> Tensor:
    phi, state = conditioner.start(context, len(y))
    phis, first = [phi.unsqueeze(1)], 0
    for size in cut:
        chunk = y[:, first : first + size].clone()
        phi, state = conditioner.extend(chunk, state)
        if not torch.is_grad_enabled():
            chunk.zero_()  # the state may not lean on what it was given
        phis.append(phi)
        first += size
    return torch.cat(phis, 1)


def _log_prob(d: Any, value: Tensor) -> Tensor:
    """log_prob without validation, of the distribution and of all that it is made of."""
    import pyro

    with pyro.validation_enabled(False):
        return _unvalidated(d).log_prob(value)


def _unvalidated(d: Any) -> Any:
    d = copy.copy(d)
    d.__dict__.pop("_validate_args", None)
    if hasattr(d, "base_dist"):
        d.base_dist = _unvalidated(d.base_dist)
    return d


def _log_density(d: Any, u: Tensor) -> Tensor:
    """The log density of unconstrained values (N, *batch, size)."""
    t = biject_to(d.support)
    y = t(u)
    return _log_prob(d, y) + t.log_abs_det_jacobian(u, y)


def _quadrature(d: Any, points: int = 500, chunk: int = 100_000) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Points (N, *batch, size), weights (N, *batch) and densities of a trapezoid rule in sinh-spaced coordinates."""
    like = d.sample()
    size = biject_to(d.support).inverse_shape(like.shape)[-1]
    if size > 2:
        raise ValueError(f"Expected a distribution of one or two unconstrained numbers; got {size}.")
    v = torch.linspace(-8.0, 8.0, 10 * points if size == 1 else points, dtype=like.dtype, device=like.device)
    axis, weight = v.sinh(), v.cosh() * (v[1] - v[0])
    grid = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    weights = torch.cartesian_prod(*[weight] * size).reshape(-1, size).prod(-1)
    for u, w in zip(grid.split(chunk), weights.split(chunk), strict=True):
        u = u.reshape(-1, *[1] * len(d.batch_shape), size).expand(-1, *d.batch_shape, -1)
        w = w.reshape(-1, *[1] * len(d.batch_shape)).expand(u.shape[:-1])
        with torch.no_grad():
            yield u, w, _log_density(d, u).exp()


def _center_and_spread(u: Tensor) -> tuple[Tensor, Tensor]:
    low, center, high = u.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=u.dtype, device=u.device), 0)
    return center, (high - low) / 1.35
