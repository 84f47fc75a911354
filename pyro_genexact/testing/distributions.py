"""Laws of distributions and of modules whose call returns one."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import combinations_with_replacement
from math import copysign, inf, log, prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from ..base import Constant
from .densities import frequencies, log_density, quadrature, unvalidated_log_prob
from .helpers import (
    broken,
    close,
    each,
    finite,
    gradients_of,
    made,
    noise_like,
    raises,
    redraw,
    same,
    seeded,
    truncates,
)
from .transforms import copies


def shapes(subject: Any, context: Tensor | None = None) -> None:
    """Checks shapes of samples and log_prob, ``expand``, values with fewer batch dims, and that rows are independent.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> shapes(dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))
    """
    d = made(subject, context)
    batch, event = d.batch_shape, d.event_shape
    for size in ((), (2,), (2, 3)):
        for name in ("sample", *(["rsample"] if d.has_rsample else [])):
            value = getattr(d, name)(torch.Size(size))
            same("shapes", f"{name}({size})", tuple(value.shape), (*size, *batch, *event))
            same("shapes", f"log_prob of {name}({size})", tuple(d.log_prob(value).shape), (*size, *batch))
    same("shapes", "event dims of the support", d.support.event_dim, len(event))
    value = d.sample()
    for dropped in range(1, len(batch) + 1):
        part = value[(0,) * dropped]
        whole = d.log_prob(part.expand_as(value))
        close("shapes", f"a value without its first {dropped} batch dims", d.log_prob(part), whole, 1e-9)
    lp = d.log_prob(value)
    for kind in (torch.Size, tuple, list):
        wide = d.expand(kind((4, *batch)))
        draws = wide.sample()
        same("shapes", f"expand({kind.__name__})", tuple(wide.batch_shape), (4, *batch))
        same("shapes", "expand leaves the original", tuple(d.batch_shape), tuple(batch))
        same("shapes", "sample of an expanded one", tuple(draws.shape), (4, *batch, *event))
        close("shapes", "log_prob of an expanded one", wide.log_prob(value), lp.expand(4, *batch), 1e-9)
        if not d.support.is_discrete and (draws[0] == draws[1]).any():
            broken("shapes", "independent rows", f"{draws[0].flatten()[0]} twice")
    if not d.support.is_discrete and len(batch) and batch[0] > 1 and (value[0] == value[1]).any():
        broken("shapes", "independent rows", f"{value[0].flatten()[0]} twice")


def support(subject: Any, context: Tensor | None = None, outside: Tensor | None = None, count: int = 1000) -> None:
    """Checks that samples are in the support, and that values outside have log_prob -inf, or raise if validated.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
        outside: values (N, *event) outside the support; infinite and NaN values are checked in any case.
        count: the number of samples.
    """
    d = made(subject, context)
    value = d.sample((count,))
    each("support", "samples inside", value, d.support.check(value), f"not within {d.support}")
    finite("support", "log_prob of samples", d.log_prob(value))
    if d.support.is_discrete and outside is None:
        return
    one = value[0].reshape(-1, *d.event_shape)[0]
    given, bad = (0, []) if outside is None else (len(outside), list(outside.to(one.device)))
    for far in (inf, -inf, float("nan")) if one.is_floating_point() else ():
        wrong = one.clone(memory_format=torch.contiguous_format)
        wrong.view(-1)[-1] = far
        bad += [wrong, torch.full_like(one, far)]
    strict = copy.copy(d)
    strict._validate_args = True
    for i, v in enumerate(bad):
        lp = unvalidated_log_prob(d, v)
        if not v.isnan().any() and not (lp == -inf).all():
            broken("support", f"log_prob of {v.tolist()}", f"{lp.flatten()[0]}, not -inf")
        if v.isnan().any() and (lp > -inf).any():
            broken("support", f"log_prob of {v.tolist()}", f"{lp.flatten()[0]}, not NaN or -inf")
        if i < given or not d.support.check(v).any():  # torch's constraints.real admits infinities
            with raises("support", f"log_prob of {v.tolist()} when validating", ValueError):
                strict.log_prob(v)


def mass(subject: Any, context: Tensor | None = None, tol: float = 1e-3) -> None:
    """Checks that the total mass is 1, by enumeration, or by quadrature for one or two unconstrained numbers.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
        tol: the tolerance of the mass.
    """
    d = made(subject, context)
    if d.support.is_discrete:
        total = d.log_prob(d.enumerate_support()).exp().sum(0)
    else:
        total = torch.stack([(density * weights).sum(0) for _, weights, density in quadrature(d)]).sum(0)
    close("mass", "total", total, 1.0, tol)


def agreement(
    subject: Any, context: Tensor | None = None, count: int = 4000, seed: int = 0, limit: float = 5.0
) -> None:
    """Checks that samples agree with log_prob by tests of goodness of fit.

    For finite supports, this is Pearson's chi-square over the enumerated support. For others, the law compares, in
    unconstrained space, both sides of E_p[g q / (p + q)] = E_q[g p / (p + q)] for bounded functions g and a normal q that
    overlaps p. For one number, there is also the Kolmogorov-Smirnov statistic against the cdf by quadrature.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
        count: the number of samples.
        seed: the seed of the samples.
        limit: the largest deviation that is allowed, in standard errors.
    """
    d = made(subject, context)
    if d.support.is_discrete:
        values = d.enumerate_support(expand=False)
        with seeded(seed):
            y = d.sample((count,))
        return frequencies("agreement", "samples and log_prob", y, values, d.log_prob(values), limit)
    with seeded(seed), torch.no_grad():
        y = d.sample((count,))
        u = biject_to(d.support).inv(y).reshape(count, prod(d.batch_shape), -1)
        center, spread = _center_and_spread(u)
        normal = torch.distributions.Normal(center, spread)
        v = center + spread * torch.randn_like(u)

        def terms(values: Tensor, sign: float) -> Tensor:
            log_p = log_density(d, values.reshape(count, *d.batch_shape, -1)).reshape(count, -1)
            share = (sign * (normal.log_prob(values).sum(-1) - log_p)).sigmoid()  # q / (p + q), or p / (p + q)
            columns = ((values - center) / spread).tanh().unbind(-1)
            pairs = [a * b for a, b in combinations_with_replacement((torch.ones_like(share), *columns), 2)]
            return torch.stack(pairs) * share

        ours, theirs = terms(u, 1.0), terms(v, -1.0)
        z = (ours.mean(1) - theirs.mean(1)) / ((ours.var(1) + theirs.var(1)) / count).sqrt()
        off = f"standard errors between the means, not below {limit}"
        each("agreement", "samples and log_prob", z.abs(), z.abs() < limit, off)
        if u.shape[-1] == 1:
            parts = zip(*quadrature(d), strict=True)
            points, weights, density = (torch.cat(part).reshape(-1, u.shape[1]) for part in parts)
            cdf = (weights * density).cumsum(0) - weights * density / 2
            for row in range(u.shape[1]):
                mine = u[:, row, 0].sort()[0].contiguous()
                at = torch.searchsorted(points[:, row].contiguous(), mine).clamp(1, len(points) - 1)
                left, right = points[at - 1, row], points[at, row]
                p = torch.lerp(cdf[at - 1, row], cdf[at, row], ((mine - left) / (right - left)).clamp(0, 1))
                statistic = (p - (torch.arange(count, device=p.device) + 0.5) / count).abs().max() * count**0.5
                if not statistic < 2.2:  # p = 1e-4
                    broken("agreement", f"Kolmogorov-Smirnov, row {row}", f"{statistic:.3g}, not below 2.2")


def gradients(module: nn.Module, context: Tensor | None = None, inert: Collection[str] = (), tol: float = 1e-4) -> None:
    """Checks the gradients of all parameters from log_prob and rsample against finite differences, in train and eval mode.

    Args:
        module: a module whose call returns a distribution.
        context: (*batch, C) or None.
        inert: patterns of names of parameters whose gradients may be 0, since they cannot matter.
        tol: the tolerance of a derivative along a random direction, relative to 1 + |value|.
    """
    module = copy.deepcopy(module)
    with seeded(0):
        y = made(module, context).sample((8,))
    for training in (True, False):
        module.train(training)
        for case in ("log_prob", *(["rsample"] if made(module, context).has_rsample else [])):

            def total(case: str = case) -> Tensor:
                with seeded(0):
                    d = made(module, context)
                    return d.log_prob(y).sum() if case == "log_prob" else d.rsample((3,)).sin().sum()

            names, parameters = zip(*[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True)
            for name, p, grad in zip(names, parameters, gradients_of(total(), parameters), strict=True):
                where = f"{case} of {name}, {'train' if training else 'eval'}"
                if not grad.abs().max() > 0 and not any(fnmatch(name, pattern) for pattern in inert):
                    broken("gradients", where, "0, which must not be 0")
                direction, start = noise_like(p, 1), p.detach().clone()
                with torch.no_grad():
                    ends = [(p.copy_(start + h * direction), total())[1] for h in (1e-6, -1e-6)]
                    p.copy_(start)
                close("gradients", where, (grad * direction).sum(), (ends[0] - ends[1]) / 2e-6, tol)


def extremes(module: nn.Module, context: Tensor | None = None) -> None:
    """Checks that log_prob and its gradients are finite at values to ±1e8 and near the ends of the support.

    In float32, they must not be NaN. If a part of the module has the attribute ``truncates`` (see
    :class:`~pyro_genexact.Head`), log_prob may also be -inf, with finite gradients. Discrete distributions are checked at
    counts to 1e8 if these are in the support.
    """
    d = made(module, context)
    if d.support.is_discrete:
        return _extreme_counts(module, context)
    size = biject_to(d.support).inverse_shape(torch.Size((*d.batch_shape, *d.event_shape)))
    sparse = truncates(module)
    real = all(bool(d.support.check(far * torch.ones_like(d.sample())).all()) for far in (1e9, -1e9))
    for dtype in (torch.float64, torch.float32):
        net = copy.deepcopy(module).to(dtype)
        given = None if context is None else context.to(dtype)
        d = made(net, given)
        for far in (1e4, -1e4, 1e8, -1e8):
            u = d.sample().new_full(size, far if real else copysign(log(abs(far)), far), dtype=dtype)
            for sign in (1.0, (-1.0) ** torch.arange(size[-1], device=u.device)):
                y = biject_to(d.support)(u * sign).detach().requires_grad_()
                lp = unvalidated_log_prob(d, y)
                counted = lp if sparse else lp[lp.isfinite()]
                grads = gradients_of(counted.sum(), [y, *net.parameters()], keep_graph=True)
                for what, value in (("log_prob", lp), *((f"gradient {i}", g) for i, g in enumerate(grads))):
                    good = value.isfinite() if dtype == torch.float64 else ~value.isnan()
                    if sparse and what == "log_prob":
                        good = good | (value == -inf)
                    each("extremes", f"{what} at {far:g}, {dtype}", value, good, "not finite")


def _extreme_counts(module: nn.Module, context: Tensor | None) -> None:
    for far in (1e4, 1e8):
        d = made(module, context)
        y = torch.full_like(d.sample(), far)
        if bool(d.support.check(y).all()):
            lp = d.log_prob(y)
            for i, value in enumerate((lp, *gradients_of(lp.sum(), list(module.parameters())))):
                finite("extremes", f"log_prob or gradient {i} at {far:g}", value)


def saturation(module: nn.Module, context: Tensor | None = None) -> None:
    """Checks that gradients of a flow's samples are finite in float32, also if an extreme base saturates the support.

    The law replaces the base of the module by a normal with standard deviation 60 or 1000.
    """
    module = copy.deepcopy(module).float()
    context = None if context is None or not context.is_floating_point() else context.float()
    shape = made(module, context).base_dist.event_shape
    for spread in (60.0, 1e3):
        like = next(module.parameters(), torch.empty(0, device="cpu"))
        module.base = Constant(dist.Normal(like.new_zeros(shape), spread).to_event(len(shape)))
        with seeded(0):
            d = made(module, context)
            y = d.rsample((64,))
            values = {
                "draws": y,
                "log(1 + |draws|)": y.abs().log1p(),
                "log_prob of draws": d.log_prob(y),
                # without saturated draws, whose inverse is too large
                "log_prob of draws, computed anew": (anew := made(module, context).log_prob(y))[anew > -1e6],
            }
            for case, value in values.items():
                for i, found in enumerate((value, *gradients_of(value.sum(), [*module.parameters()], keep_graph=True))):
                    what = f"gradient {i - 1} of {case}" if i else case
                    finite("saturation", f"{what}, base of deviation {spread:g}", found)


def persistence(module: nn.Module, context: Tensor | None = None) -> None:
    """Checks that log_prob is the same after saving and loading a state_dict with ``weights_only=True``, and for copies."""
    with torch.no_grad():
        y = made(module, context).sample((3,))
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = redraw(copy.deepcopy(module), seed=7)
        other.load_state_dict(torch.load(file, weights_only=True))
        close("persistence", "state_dict", made(other, context).log_prob(y), made(module, context).log_prob(y), 1e-12)
        copies(module, lambda m: made(m, context).log_prob(y))
        copies(made(module, context), lambda d: d.log_prob(y))


def freshness(module: nn.Module, context: Tensor | None = None, tol: float = 1e-9) -> None:
    """Checks that caches are never out of date: after parameters change, and after sampling without grad or in inference mode.

    Args:
        module: a module whose call returns a distribution.
        context: (*batch, C) or None.
        tol: the tolerance, relative to 1 + |value|.
    """
    unused, module = copy.deepcopy(module), copy.deepcopy(module)
    parameters = list(module.parameters())
    for case, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        d = made(module, context)
        with mode():
            y = d.sample()
            d.log_prob(y)
        y = y.clone() if case == "inference_mode" else y
        grads = gradients_of(d.log_prob(y).sum(), parameters)
        fresh = copy.deepcopy(module)
        expected = gradients_of(made(fresh, context).log_prob(y.clone()).sum(), list(fresh.parameters()))
        for i, pair in enumerate(zip(grads, expected, strict=True)):
            close("freshness", f"sample under {case}, then log_prob: gradient of parameter {i}", *pair, tol)
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.1)
        fresh = copy.deepcopy(unused)
        fresh.load_state_dict(module.state_dict())
        now, expected = (made(m, context).log_prob(y.clone()) for m in (module, fresh))
        close("freshness", "parameters changed, the module called again", now, expected, tol)


def _center_and_spread(u: Tensor) -> tuple[Tensor, Tensor]:
    low, center, high = u.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=u.dtype, device=u.device), 0)
    return center, (high - low) / 1.35
