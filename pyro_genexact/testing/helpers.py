"""Helpers of the laws: redrawn weights, inputs, and comparisons that name the law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.func import functional_call

from ..base import Conditioner, Head
from ..contexts import PaddedSequence, kind_of

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


def conditioner_inputs(
    conditioner: Conditioner, rows: int = 6, sites: int = 5, seed: int = 0, padded: bool = False
) -> tuple[Tensor, Any]:
    """Random sites (rows, T, *site_shape) and context (rows, C), (rows, T, C) or None, as the conditioner reads them.

    A source is (rows, 3, C); ``padded``, of lengths 0, 1, 2, 3, 0, ... with NaN after them.
    """
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
    kind = kind_of(conditioner.context)
    if kind.by_site:
        return y, draw(rows, sites, kind.features)
    if kind.attended:
        values = draw(rows, 3, kind.features)
        lengths = torch.arange(rows, device=values.device) % 4
        beyond = torch.arange(3, device=values.device) >= lengths.unsqueeze(1)
        return y, PaddedSequence(values.masked_fill(beyond.unsqueeze(2), torch.nan), lengths) if padded else values
    return y, draw(rows, kind.features) if kind.features else None


def made(subject: Any, context: Tensor | None = None) -> Any:
    """A transform or distribution as it is; of a module, what its call returns."""
    if isinstance(subject, (Transform, Distribution)):
        return subject
    return subject() if context is None else subject(context)


def as_function(subject: Any, names: Sequence[str], forward: bool, there_and_back: bool = False) -> Any:
    """Value and log-determinant as a function of the argument, the context, if any, and the parameters of these names.

    Of the transform that the subject is or returns, or of its inverse, whose argument may be found from that of the transform.
    """

    def f(value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        state = dict(zip(names, weights, strict=True))
        t: Any = functional_call(subject, state, context) if names else made(subject, *context)
        if there_and_back and not forward:
            value = t(value)
        t, value = t if forward else t.inv, value.clone()  # gradcheck edits .data, which no cache can see
        out = t(value)
        return out, t.log_abs_det_jacobian(value, out) + 0 * out.sum()  # always on the graph, so always checked

    return f


def broken(law: str, case: str, numbers: str) -> NoReturn:
    raise AssertionError(f"{law} broken [{case}]: {numbers}")


def same(law: str, case: str, got: Any, expected: Any) -> None:
    if got != expected:
        broken(law, case, f"{got}, not {expected}")


def close(law: str, case: str, got: Tensor, expected: Tensor | float, tol: float) -> None:
    """Equal within tol * (1 + |expected|), equal infinities included; with one number, all of them."""
    if not isinstance(expected, Tensor):
        expected = torch.full_like(got, expected)
    same(law, f"{case}, shape", tuple(got.shape), tuple(expected.shape))
    within(law, case, got, expected, tol * (1 + expected.abs()))


def within(law: str, case: str, got: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Equal within a bound, equal infinities included."""
    gap = (got - expected).abs()
    off = ~(((gap <= bound) & expected.isfinite()) | (got == expected))
    if off.any():
        first, other, by = (x[off][0].item() for x in (got, expected, gap))
        broken(law, case, f"{first:.12g}, not {other:.12g} (off by {by:.3g})")


def each(law: str, case: str, values: Tensor, good: Tensor, otherwise: str, at: Tensor | None = None) -> None:
    """All values are good; ``otherwise`` says what the first is that is not, ``at`` what it belongs to."""
    if not good.all():
        where = "" if at is None else f" at {at[~good].flatten()[0]:.9g}"
        broken(law, f"{case}{where}", f"{values[~good].flatten()[0]:.10g}, {otherwise}")


def finite(law: str, case: str, values: Tensor, at: Tensor | None = None) -> None:
    each(law, case, values, values.isfinite(), "not finite", at)


def like_of(head: Head, dtype: torch.dtype) -> Tensor:
    own = (v for v in (*head.parameters(), *head.buffers()) if v.is_floating_point())
    return next(own, torch.empty(0, dtype=dtype))


def each_matters(grad: Tensor, of: str) -> None:
    size = grad.abs().amax((0, 1))
    if not (size > 0).all():
        broken("head", "every parameter matters", f"gradient 0 of parameter {int(size.argmin())} in {of}, not more")


@contextmanager
def raises(law: str, case: str, error: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    broken(law, case, f"no error, not a {getattr(error, '__name__', error)}")


@contextmanager
def no_error(law: str, case: str, *errors: type[Exception], named: bool = False) -> Iterator[None]:
    """Errors of these kinds break the law; ``named``, with the name of the kind in the message."""
    try:
        yield
    except errors as error:
        name = f"{type(error).__name__}: " if named else ""
        raise AssertionError(f"{law} broken [{case}]: {name}{error}") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


def noise_like(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device="cpu").to(value.device)


def gradients_of(total: Tensor, leaves: Sequence[Tensor], keep_graph: bool = False) -> list[Tensor]:
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves), retain_graph=keep_graph, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
