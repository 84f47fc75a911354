"""The log-probability of a value of every model written out for one row: what the checks compare with."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import product
from typing import Any

import torch
from descriptions import Case, States, build
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import constraints

import pyro_genexact as gx

EXPLODED = {torch.float64: 1e100, torch.float32: 1e15}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


def near(what: str, got: Tensor, expected: Tensor, tol: float | Tensor) -> None:
    """Of one shape and equal within tol * (1 + |expected|), infinities too; NaN never."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    off = ~(((got - expected).abs() <= tol * (1 + expected.abs())) & expected.isfinite() | (got == expected))
    assert not off.any(), f"{what}: {got[off][0].item():.10g}, not {expected[off][0].item():.10g}"


def rounding(d: Any, y: Tensor) -> Tensor:
    """To first order, by how much rounding of values changes their log_prob (*sample, *batch), a hundred times."""
    y = y.detach().clone().requires_grad_(y.is_floating_point())
    log_prob = d.log_prob(y)
    if not (log_prob.requires_grad and y.requires_grad):
        return torch.zeros_like(log_prob)
    (slopes,) = torch.autograd.grad(log_prob.sum(), y, allow_unused=True, materialize_grads=True)
    change = (slopes * y.detach()).abs().reshape(*log_prob.shape, -1).sum(-1)
    if isinstance(d.support, type(constraints.simplex)):  # the Jacobian of the truth has 1 - y on its diagonal
        change = change + 1 / (1 - y.detach()).amin(-1)
    return (100 * torch.finfo(y.dtype).eps * change).nan_to_num(torch.inf)


class Subject:
    """The module of a case, what its call is given, the distribution that it returns, and values of that."""

    def __init__(self, case: Case, module: Any = None) -> None:
        self.case, self.module, self.dtype = case, module or build(case), getattr(torch, case.dtype)
        self.tolerance = TOLERANCE[self.dtype]
        model = getattr(self.module, "autoregressive", self.module)
        self.site_shape = tuple(getattr(getattr(model, "head", None), "site_shape", ()))
        self.event_dims = {"prefix": 1 + len(self.site_shape), "context": 1 if isinstance(model.context, int) else 2}
        self.given: dict[str, Tensor] = {}
        torch.manual_seed(case.seed)
        if case.context:
            self.given["context"] = torch.randn(case.context, dtype=self.dtype)
        for name in ("lengths", "source_lengths", "prefix_lengths"):
            if (value := getattr(case, name)) is not None:
                self.given[name] = torch.tensor(value, dtype=getattr(torch, case.integers))
        if case.prefix:
            d = self.call(self.module, self.given)
            sites = in_order(d.sample(), len(d.event_shape), self.site_shape, case.order)
            self.given["prefix"] = sites.narrow(len(d.batch_shape), 0, case.prefix)
        self.d = self.call(self.module, self.given)

    @staticmethod
    def call(module: Any, given: dict[str, Tensor]) -> Any:
        """What the module's call returns, given the prefix too."""
        d = module(**{name: value for name, value in given.items() if not name.startswith("prefix")})
        after = [given[name] for name in ("prefix", "prefix_lengths") if name in given]
        return d.conditional_on_prefix(*after) if "prefix" in given else d

    @cached_property
    def y(self) -> Tensor:
        """Two draws."""
        torch.manual_seed(self.case.seed)
        with torch.no_grad():
            return self.d.sample((2,)).clone()

    @property
    def exploded(self) -> bool:
        """Whether a chain of heavy tails drew numbers of which a network makes infinite ones."""
        drawn = [self.y, *([self.given["prefix"]] if "prefix" in self.given else [])]
        return any(bool((t.abs() > EXPLODED[self.dtype]).any()) for t in drawn if t.is_floating_point())

    @cached_property
    def wide(self) -> dict[str, Tensor]:
        """What the call is given, of the whole batch shape."""
        shapes = {name: value.shape[value.dim() - self.event_dims.get(name, 0) :] for name, value in self.given.items()}
        return {name: value.expand(self.d.batch_shape + shapes[name]) for name, value in self.given.items()}

    @cached_property
    def rows(self) -> list[tuple[tuple[int, ...], dict[str, Tensor]]]:
        """Of each row its place in the batch and what the call is given for it alone, a source cut to its length."""
        found = []
        for place in product(*map(range, self.d.batch_shape)):
            row = {name: value[place] for name, value in self.wide.items()}
            if row.get("source_lengths", 0) > 0:
                row["context"] = row["context"][: row["source_lengths"]]
            found.append((place, row))
        return found


def in_order(y: Tensor, dims: int, site_shape: tuple[int, ...], order: Any) -> Tensor:
    """Values of so many dims (*, T, *site_shape) in visiting order."""
    cut = y.dim() - dims
    sites = y.reshape(*y.shape[:cut], -1, *site_shape)
    return sites if order is None else sites.index_select(cut, torch.as_tensor(order))


def truth(s: Subject, place: tuple[int, ...], row: dict[str, Tensor], y: Tensor) -> Tensor:
    """log p of one value of one row."""
    if s.case.kind == "autoregressive":
        return of_autoregressive(s, row, y, s.module, s.case.order)
    if s.case.kind == "sequence":
        return of_sequence(s, row, y)
    if s.case.kind == "flow":
        return of_flow(s, row, y)
    if s.case.kind == "chain":
        if isinstance(s.module, States):
            return by_strings(s, place, y)[0].logsumexp(0)
        scores, strings = by_strings(s, place, y)
        n = strings.shape[1]
        return scores[(strings == y[:n]).all(1)].squeeze(0) - scores.logsumexp(0)
    if isinstance(s.module, gx.Conditional):
        return s.module.head(s.module.network(row["context"])).log_prob(y)
    inner, found = s.module.autoregressive, []
    for order in s.module.orders:
        model = copy.copy(inner)
        model._modules = {"conditioner": inner.conditioner.permuted(order), "head": inner.head.permuted(order)}
        found.append(of_autoregressive(s, row, y, model, order))
    return torch.stack(found).logsumexp(0) - torch.tensor(len(found), dtype=s.dtype).log()


def site_by_site(model: Any, sites: Tensor, row: dict[str, Tensor], order: Any = None) -> Tensor:
    """log p (T) of sites (T, *site_shape) in visiting order, each from its own parameters: the network reads one at a time."""
    net, context = model.conditioner, row.get("context")
    if isinstance(net.context, gx.Covariates) and order is not None:
        context = context[order]
    context = None if context is None else context.unsqueeze(0)
    if "source_lengths" in row:
        context = gx.PaddedSequence(context, row["source_lengths"].reshape(1))
    phi, state = net.start(context, 1)
    found = [phi.new_zeros(0)]
    for t, site in enumerate(sites):
        found.append(model.head(phi.reshape(1, 1, -1), t).log_prob(site.reshape(1, 1, *site.shape)).reshape(1))
        if t < len(sites) - 1:
            read = site.to(phi.dtype) if isinstance(net.site, tuple) else site
            phi, state = net.extend(read.reshape(1, 1, *site.shape), state)
    return torch.cat(found)


def of_autoregressive(s: Subject, row: dict[str, Tensor], y: Tensor, model: Any, order: Any) -> Tensor:
    # what follows a prefix is in visiting order
    sites = torch.cat([row["prefix"], y]) if "prefix" in row else in_order(y, y.dim(), s.site_shape, order)
    if "lengths" in row:
        sites = sites[: row["lengths"]]
    return site_by_site(model, sites, row, order)[s.case.prefix :].sum()


def of_sequence(s: Subject, row: dict[str, Tensor], y: Tensor) -> Tensor:
    past = row.get("prefix", y[:0])[: row.get("prefix_lengths", s.case.prefix)]
    eos = s.module.eos
    ended = [bool(site[-1] == 1) if eos is None else bool(site == eos) for site in (*past, *y)]
    if any(ended[: len(past)]):
        return torch.zeros((), dtype=s.dtype)
    stop = ended.index(True) + 1 if any(ended) else len(ended)
    return site_by_site(s.module, torch.cat([past, y])[:stop], row)[len(past) :].sum()


def of_flow(s: Subject, row: dict[str, Tensor], y: Tensor) -> Tensor:
    """By the change of variables, with autograd's Jacobian; both directions undo each other."""
    d = s.call(s.module, row)
    t, base = d.transforms[0].with_cache(0), d.base_dist
    x, n = t.inv(y).detach(), int(row.get("lengths", y.numel()))
    near("t(t.inv(y))", t(x), y, s.tolerance)
    if not n:
        return torch.zeros((), dtype=s.dtype)
    at = base.sample()  # as exact as the condition of the inverse allows
    size = 1 + jacobian(t.inv, t(at)).norm() * (1 + t(at).abs().max())
    back = t.inv(t(at).clone())
    near("t.inv(t(x))", back.reshape(-1)[:n], at.reshape(-1)[:n], size * s.tolerance)
    matrix = jacobian(t, x).reshape(y.numel(), x.numel())[:n, :n]
    return base.log_prob(x) - torch.linalg.slogdet(matrix[: matrix.shape[1]])[1]


def by_strings(s: Subject, place: tuple[int, ...], y: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (K) of all strings of labels (K, n), or of states together with the observations."""

    def own(p: Tensor, dims: int) -> Tensor:
        return p.expand(*s.d.batch_shape, *p.shape[p.dim() - dims :])[place]

    sites, module = s.d.event_shape[0], s.module
    n = int(s.given["lengths"].expand(s.d.batch_shape)[place]) if "lengths" in s.given else sites
    if isinstance(module, States):
        initial, final = own(module.initial, 1).log_softmax(-1), None
        phi = module.phi.expand(*s.d.batch_shape, sites, *module.phi.shape[-2:])[place]
        each = [module.head(phi[t : t + 1]).log_prob(y[t].expand(1, phi.shape[1], *y.shape[1:])) for t in range(n)]
        unary, steps = torch.cat([phi.new_zeros(0, phi.shape[1]), *each]), module.transition.log_softmax(-1)
    else:
        unary, steps, initial, final = own(s.d.unary, 2), s.d.transition, s.d.initial, s.d.final
        initial, final = (None if p is None else own(p, 1) for p in (initial, final))
    V = unary.shape[-1]
    steps = (steps if steps.dim() == 2 else own(steps, 3)).expand(max(sites - 1, 1), V, V)
    strings = torch.tensor(list(product(range(V), repeat=n)), dtype=torch.long).reshape(V**n, n)
    scores = unary.new_zeros(V**n)
    for t in range(n):
        scores = scores + unary[t, strings[:, t]]
        if t:
            scores = scores + steps[t - 1, strings[:, t - 1], strings[:, t]]
    if n:
        for end, at in ((initial, 0), (final, n - 1)):
            scores = scores if end is None else scores + end[strings[:, at]]
    return scores, strings
