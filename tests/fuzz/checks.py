"""What must hold of every case: a function for each, against a truth that does not come from what is checked."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from math import prod
from typing import Any

import pyro
import torch
from descriptions import Labels, States, build
from torch import Tensor
from torch.distributions import biject_to
from torch.func import functional_call, vmap
from truths import Subject, by_strings, near, rounding, truth

from pyro_genexact import testing

CHECKS: dict[str, Callable[[Subject], None]] = {}
MANY = 400  # draws


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    CHECKS[function.__name__] = function
    return function


def silent(d: Any) -> Any:
    """The distribution without validation, of what it is made of too."""
    d = copy.copy(d)
    d.__dict__["_validate_args"] = False
    if hasattr(d, "base_dist"):
        d.base_dist = silent(d.base_dist)
    return d


@check
def shapes(s: Subject) -> None:
    """Of samples and log_prob, expand of a Size, tuple and list, values with fewer batch dims."""
    d, batch, event = s.d, tuple(s.d.batch_shape), tuple(s.d.event_shape)
    for name in ("sample", *(["rsample"] if d.has_rsample else [])):
        y = getattr(d, name)(torch.Size((3, 1)))
        assert tuple(y.shape) == (3, 1, *batch, *event), f"{name}: shape {tuple(y.shape)}"
        assert tuple(d.log_prob(y).shape) == (3, 1, *batch), f"log_prob of {name}"
    lp = d.log_prob(s.y)
    for kind, size in ((torch.Size, (2, *batch)), (list, (1, 2, *batch))):
        wide = d.expand(kind(size))
        assert (tuple(wide.batch_shape), tuple(d.batch_shape)) == (size, batch), f"expand({size})"
        near(f"log_prob after expand({size})", wide.log_prob(s.y), lp.expand(size), s.tolerance)
    draws = d.expand((3, *batch)).sample((2,))
    assert tuple(draws.shape) == (2, 3, *batch, *event), f"sample after expand: shape {tuple(draws.shape)}"
    ragged = s.case.kind == "sequence" or "lengths" in s.given  # a value of one row may be none of another
    for dropped in range(0 if ragged else len(batch) + 1):
        part = s.y[(0,) * (1 + dropped)]
        near("log_prob of fewer dims", d.log_prob(part), d.log_prob(part.expand(batch + event)), s.tolerance)


@check
def empty(s: Subject) -> None:
    """No samples, no rows after expand, and no rows in what the call is given."""
    subjects = {"as it is": (s.d, (0,)), "expanded": (s.d.expand((0, *s.d.batch_shape)), ())}
    if s.d.batch_shape and s.wide and not isinstance(s.module, (Labels, States)):
        none = {name: value[:0] for name, value in s.wide.items()}
        subjects["called"] = s.call(s.module, none), (2,)
    for case, (d, size) in subjects.items():
        for name in ("sample", *(["rsample"] if d.has_rsample else [])):
            y = getattr(d, name)(torch.Size(size))
            assert y.shape == size + d.batch_shape + d.event_shape, f"{name}, {case}: shape {tuple(y.shape)}"
            assert d.log_prob(y).shape == size + d.batch_shape, f"log_prob of {name}, {case}"


@check
def support(s: Subject) -> None:
    """Draws lie in the support and have finite log_prob; NaN, infinities and -1 for a category never count."""
    assert s.d.support.check(s.y).all(), "draws outside the support"
    assert s.d.log_prob(s.y).isfinite().all(), "log_prob of draws is not finite"
    if "lengths" in s.given or s.case.prefix_lengths is not None:
        return  # padding may be anything
    for far in (float("nan"), float("inf")) if s.y.is_floating_point() else (-1,):
        with pyro.validation_enabled(False):
            lp = silent(s.d).log_prob(torch.full_like(s.y, far))
        assert not (lp > -torch.inf).any(), f"log_prob of {far}: {lp.flatten()[0]}"


@check
def densities(s: Subject) -> None:
    """Each row's log_prob is the one written out, and that of the row alone; sites add up."""
    lp, known = s.d.log_prob(s.y), s.tolerance + rounding(s.d, s.y)
    for place, row in s.rows:
        at = (slice(None), *place)
        tol = known[at]
        near(f"log_prob of row {place}", lp[0][place], truth(s, place, row, s.y[0][place]), tol[0])
        if not isinstance(s.module, (Labels, States)):  # whose rows are part of the module
            near(f"log_prob of row {place} alone", s.call(s.module, row).log_prob(s.y[at]), lp[at], tol)
    if hasattr(s.d, "log_prob_sites"):
        sites = s.d.log_prob_sites(s.y)
        near("sum of log_prob_sites", sites.flatten(lp.dim()).sum(-1), lp, s.tolerance)


@check
def directions(s: Subject) -> None:
    """What remembers, or works site by site, agrees with the parallel pass: rsample and log_prob, uniforms and back."""
    if s.d.has_rsample:
        y = s.d.rsample((2,))
        # near a finite end a value holds less than what it was made from
        tol = 10 * s.tolerance + rounding(s.d, y)
        near("log_prob of rsample", s.d.log_prob(y), s.d.log_prob(y.detach().clone()), tol)
    if not hasattr(s.d, "to_uniform") or s.dtype == torch.float32:
        return
    try:
        u = s.d.to_uniform(s.y)
    except NotImplementedError:  # of a family without a cdf
        return
    inside = ((u > 1e-4) & (u < 1 - 1e-4)) | u.isnan()  # far out a quantile is not unique to rounding
    if inside.all():
        near("from_uniform(to_uniform(y))", s.d.from_uniform(u), s.y, 1e-5)


@check
def mass(s: Subject) -> None:
    """The total is 1: by enumeration, quadrature on one axis, or draws against the density."""
    if s.dtype == torch.float32:
        return
    d, rows = s.d, prod(s.d.batch_shape)
    if d.has_enumerate_support:
        try:
            total = d.log_prob(d.enumerate_support()).exp().sum(0)
        except ValueError as error:
            assert "at most" in str(error)
        else:
            return near("mass by enumeration", total, torch.ones_like(total), 1e-6)
    torch.manual_seed(s.case.seed)
    with torch.no_grad():
        y = d.sample((MANY,))
        if (y == y.round()).all():
            return frequencies(d, y)
        try:
            t = biject_to(d.support)
        except NotImplementedError:  # of padding, of values and flags
            return None
        if "lengths" in s.given:
            return None
        u = t.inv(y).reshape(MANY, rows, -1)
        inside = [bool(d.support.check(torch.full_like(y[0], v)).all()) for v in (1e6, 1e-9, -1e-9, -1e6)]
        # next to another end than 0 numbers are too far apart, and a pole at 0 has no finite density there
        pole = bool((silent(d).log_prob(torch.zeros_like(y[0])) == torch.inf).any())
        line = inside in ([True] * 4, [True, True, False, False]) and not pole
        if u.shape[-1] == prod(d.event_shape) == 1 and line:
            testing.line_mass(d, factor=1.0, draws=100)
        bridge(d, t, u)


def frequencies(d: Any, y: Tensor) -> None:
    """Distinct draws of each row have no more mass than 1, and as many draws as their mass says."""
    for place in torch.cartesian_prod(*map(torch.arange, (*d.batch_shape, 1, 1))).tolist():
        at = tuple(place[:-2])
        values, counts = y[(slice(None), *at)].unique(dim=0, return_counts=True)
        wide = values.reshape(len(values), *[1] * len(d.batch_shape), *d.event_shape)
        with pyro.validation_enabled(False):  # what one row draws may be no value of another
            p = silent(d).log_prob(wide).exp()[(slice(None), *at)]
        assert p.sum() < 1 + 1e-6, f"mass {p.sum():.8g} of distinct draws"
        off = (counts - MANY * p).abs() / (MANY * p * (1 - p)).clamp(min=1.0).sqrt()
        often = MANY * p >= 5
        assert not (off[often] > 6).any(), f"{off[often].max():.3g} standard errors between draws and mass"


def bridge(d: Any, t: Any, u: Tensor) -> None:
    """E_p[q / (p + q)] = E_q[p / (p + q)] for a normal q that overlaps p: of mass and draws at once."""
    low, middle, high = u.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=u.dtype), 0)
    # several draws on an end of the support stand for all that rounding carries there
    apart = (u.sort(0)[0].diff(dim=0) > 0).flatten(2).all(-1).all(0)
    q = torch.distributions.Normal(middle, (high - low) / 1.35 + 1e-9)

    def share(u: Tensor, sign: float) -> Tensor:
        v = u.reshape(MANY, *t.inverse_shape(d.batch_shape + d.event_shape))
        y = t(v)
        log_p = (silent(d).log_prob(y) + t.log_abs_det_jacobian(v, y)).reshape(MANY, -1)
        return (sign * (q.log_prob(u).sum(-1) - log_p)).sigmoid()

    with pyro.validation_enabled(False):
        ours, theirs = share(u, 1.0), share(q.sample((MANY,)), -1.0)
    z = (ours.mean(0) - theirs.mean(0)) / ((ours.var(0) + theirs.var(0)) / MANY + 1e-6).sqrt()
    z = torch.where(apart, z, 0.0)
    assert z.abs().max() < 6, f"{z.abs().max():.3g} standard errors between draws and density"


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def slope(what: str, f: Callable[..., Tensor], leaves: dict[str, Tensor], differences: bool = True) -> None:
    """The gradients of f at the leaves are finite, and agree with a difference along a random direction."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    total = f(leaves)
    if not total.requires_grad:
        return
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.isfinite().all(), f"gradient of {what} by {name}: {grad[~grad.isfinite()][0]}"
    if not differences:
        return
    way = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}
    got = sum((grad * way[name]).sum() for name, grad in zip(leaves, grads, strict=True))
    if 1e-6 * abs(got) > 1e-2 * (1 + abs(total)):  # f is no line over such a step
        return
    with torch.no_grad():
        ends = [f({name: leaf + h * way[name] for name, leaf in leaves.items()}) for h in (1e-6, -1e-6, 1e-5, -1e-5)]
    fine, coarse = (ends[0] - ends[1]) / 2e-6, (ends[2] - ends[3]) / 2e-5
    off = min((got - fine).abs(), (got - coarse).abs())
    # that two differences differ by more than theory shows a kink, or rounding
    assert off <= 1e-4 * (1 + fine.abs()) + (fine - coarse).abs(), f"slope of {what}: {got:.8g}, not {fine:.8g}"


REJECTED = ("Gamma", "Beta", "Chi2", "StudentT", "Dirichlet", "Fisher")  # draws with implicit gradients: no differences


@check
def gradients(s: Subject) -> None:
    """Of log_prob and of rsample: finite, and those of finite differences."""

    def given(leaves: dict[str, Tensor]) -> Any:
        args = {**s.given, **({"context": leaves[".context"]} if ".context" in leaves else {})}
        weights = {name: leaf for name, leaf in leaves.items() if name[0] != "."}
        return s.call(lambda **k: functional_call(s.module, weights, (), k), args)

    leaves = weights_of(s.module) | ({".context": s.given["context"]} if "context" in s.given else {})
    exact = s.dtype == torch.float64 and bool((rounding(s.d, s.y) < 1e-6).all())
    slope("log_prob", lambda x: given(x).log_prob(s.y).sum(), leaves, exact)
    tiny = ((s.y.abs() < 1e-15) & (s.y != 0)).any()  # next to which a slope may be beyond all numbers
    if s.y.is_floating_point() and not s.d.support.is_discrete and not tiny:

        def by_value(x: dict[str, Tensor]) -> Tensor:
            with pyro.validation_enabled(False):
                return silent(s.d).log_prob(x["y"]).sum()

        slope("log_prob", by_value, {"y": s.y}, False)
    if s.d.has_rsample:

        def draw(x: dict[str, Tensor]) -> Tensor:
            torch.manual_seed(s.case.seed)
            return given(x).rsample((2,)).asinh().sum()

        slope("rsample", draw, leaves, exact and not any(name in s.case.head + s.case.model for name in REJECTED))


NO_VMAP = ("dist.Multinomial", "OrderedLogistic")  # whose own code looks at values or writes in place


def copied(thing: Any) -> Any:
    return copy.deepcopy(pickle.loads(pickle.dumps(thing)))


@check
def copies(s: Subject) -> None:
    """Deep copies, pickles, a state_dict in a module made anew, and a module that was on meta do what the original does."""
    expected = s.d.log_prob(s.y)

    def run(module: Any) -> Tensor:
        return s.call(module, s.given).log_prob(s.y)

    near("log_prob of a copy of the module", run(copied(s.module)), expected, 1e-12)
    fresh = s.call(s.module, s.given)
    for when, d in (("before", fresh), ("after", s.d)):
        near(f"log_prob of a copy {when} use", copied(d).log_prob(s.y), expected, 1e-12)
    torch.save(s.module.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = build(s.case, redrawn=False)
    other.load_state_dict(torch.load(file, weights_only=True))
    near("log_prob after load_state_dict", run(other), expected, 1e-12)


@check
def meta(s: Subject) -> None:
    """A module that was on meta, made empty and loaded does what the original does."""
    other = build(s.case, redrawn=False).to("meta").to_empty(device="cpu")
    other.load_state_dict(s.module.state_dict())
    near("log_prob after to_empty", s.call(other, s.given).log_prob(s.y), s.d.log_prob(s.y), 1e-12)


@check
def functional(s: Subject) -> None:
    """functional_call with other weights is the module that has them; torch.func.grad is autograd's; rows by vmap."""
    weights = {name: p + 0.1 * torch.randn_like(p) for name, p in weights_of(s.module).items()}
    other = copy.deepcopy(s.module)
    other.load_state_dict(weights, strict=False)
    expected = s.call(other, s.given).log_prob(s.y)

    def total(weights: dict[str, Tensor]) -> Tensor:
        return s.call(lambda **k: functional_call(s.module, weights, (), k), s.given).log_prob(s.y)

    near("log_prob by functional_call", total(weights), expected, s.tolerance)
    if not weights or s.case.seed % (4 if s.case.kind == "flow" else 2):  # roots take long under torch.func
        return
    grads = torch.autograd.grad(expected.sum(), list(other.parameters()), allow_unused=True, materialize_grads=True)
    found = torch.func.grad(lambda w: total(w).sum())(weights)
    for name, grad in zip(weights, grads, strict=True):
        near(f"torch.func.grad by {name}", found[name], grad, 10 * s.tolerance)
    if len(s.d.batch_shape) != 1 or isinstance(s.module, (Labels, States)) or any(f in s.case.head for f in NO_VMAP):
        return
    try:
        rows = vmap(lambda y, given: s.call(s.module, given).log_prob(y), (1, 0), 1)(s.y, s.wide)
    except RuntimeError as error:
        assert "Batching rule not implemented" in str(error), f"vmap: {error}"
        return
    near("log_prob by vmap", rows, s.d.log_prob(s.y), s.tolerance + rounding(s.d, s.y))


@check
def queries(s: Subject) -> None:
    """Of chains: log Z, marginals, pairs, the mode and its probability, entropy, by all strings."""
    if s.case.kind != "chain":
        return
    d = s.d.posterior(s.y[0]) if isinstance(s.module, States) else s.d
    for place, _ in s.rows:
        scores, strings = by_strings(s, place, s.y[0][place])
        V, n, p = d.num_labels, strings.shape[1], scores.softmax(0)
        one = torch.nn.functional.one_hot(strings, V).to(p)
        near("log_partition", d.log_partition[place], scores.logsumexp(0), s.tolerance)
        near("entropy", d.entropy()[place], torch.special.entr(p).sum(), s.tolerance)
        near("max_log_prob", d.max_log_prob[place], p.max().log(), s.tolerance)
        near("marginals", d.marginals[place][:n], torch.einsum("k,knv->nv", p, one), s.tolerance)
        pairs = torch.einsum("k,kni,knj->nij", p, one[:, : n - 1], one[:, 1:]) if n > 1 else p.new_zeros(0, V, V)
        near("pair_marginals", d.pair_marginals[place][: max(n - 1, 0)], pairs, s.tolerance)
