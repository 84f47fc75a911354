"""Helpers for laws: random weights, inputs, and comparisons whose errors name the law."""

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
    """Replaces all parameters by normal random numbers, in place, and returns the module.

    The weights of each conditioner are scaled so that its outputs for normal inputs have a standard deviation of about
    ``spread``, which is far from the identity but does not make samples explode.

    Args:
        module: the module.
        seed: the seed of the numbers; torch's global random state does not change.
        spread: the standard deviation of the outputs of conditioners.

    Example:
        >>> import pyro_genexact as gx
        >>> flow = redraw(gx.flows.maf(3, hidden=(8,)).double(), seed=1)
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
    """Returns random sites (rows, T, *site_shape) and a random context for a conditioner.

    The context is (rows, C), (rows, T, C) for covariates, (rows, 3, C) for a source, or None.

    Args:
        conditioner: the conditioner.
        rows: the number of rows.
        sites: the number of sites T, if the conditioner does not fix it; at most its ``max_len``.
        seed: the seed of the numbers.
        padded: whether a source has lengths 0, 1, 2, 3, 0, ..., and NaN after them.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = (t for t in (*conditioner.parameters(), *conditioner.buffers()) if t.is_floating_point())
    like = next(tensors, torch.empty(0, device="cpu"))
    sites = conditioner.num_sites or min(sites, conditioner.max_len or sites)
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
    """Returns the subject if it is a transform or a distribution, and otherwise the result of calling it.

    Args:
        subject: a transform, a distribution, or a module whose call returns one.
        context: the argument of the call, or None for a call without arguments.
    """
    if isinstance(subject, (Transform, Distribution)):
        return subject
    return subject() if context is None else subject(context)


def as_function(subject: Any, names: Sequence[str], forward: bool, there_and_back: bool = False) -> Any:
    """Returns a function that computes value and log-determinant of a transform, or of its inverse.

    Args:
        subject: a transform, or a module whose call returns one.
        names: the names of parameters, which are the last arguments of the function, after the argument and the context.
        forward: whether to compute the transform or its inverse.
        there_and_back: whether the argument of the inverse is computed by the transform from the function's argument.
    """

    def f(value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        state = dict(zip(names, weights, strict=True))
        t: Any = functional_call(subject, state, context) if names else made(subject, *context)
        if there_and_back and not forward:
            value = t(value)
        t, value = t if forward else t.inv, value.clone()  # gradcheck edits .data, which caches cannot notice
        out = t(value)
        return out, t.log_abs_det_jacobian(value, out) + 0 * out.sum()  # gradcheck needs a graph, also for constants

    return f


def broken(law: str, case: str, numbers: str) -> NoReturn:
    """Raises the error of a broken law."""
    raise AssertionError(f"{law} broken [{case}]: {numbers}")


def same(law: str, case: str, got: Any, expected: Any) -> None:
    """Checks that two objects are equal."""
    if got != expected:
        broken(law, case, f"{got}, not {expected}")


def close(law: str, case: str, got: Tensor, expected: Tensor | float, tol: float) -> None:
    """Checks that tensors agree within tol * (1 + |expected|); equal infinities agree. A number stands for all elements."""
    if not isinstance(expected, Tensor):
        expected = torch.full_like(got, expected)
    same(law, f"{case}, shape", tuple(got.shape), tuple(expected.shape))
    within(law, case, got, expected, tol * (1 + expected.abs()))


def within(law: str, case: str, got: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Checks that tensors agree within a bound; equal infinities agree."""
    gap = (got - expected).abs()
    off = ~(((gap <= bound) & expected.isfinite()) | (got == expected))
    if off.any():
        first, other, by = (x[off][0].item() for x in (got, expected, gap))
        broken(law, case, f"{first:.12g}, not {other:.12g} (off by {by:.3g})")


def each(law: str, case: str, values: Tensor, good: Tensor, otherwise: str, at: Tensor | None = None) -> None:
    """Checks that all values are good.

    Args:
        law: the name of the law.
        case: the case.
        values: the values.
        good: whether each is good.
        otherwise: the text after the first value that is not.
        at: arguments that belong to the values, for the message.
    """
    if not good.all():
        where = "" if at is None else f" at {at[~good].flatten()[0]:.9g}"
        broken(law, f"{case}{where}", f"{values[~good].flatten()[0]:.10g}, {otherwise}")


def finite(law: str, case: str, values: Tensor, at: Tensor | None = None) -> None:
    """Checks that all values are finite."""
    each(law, case, values, values.isfinite(), "not finite", at)


def like_of(head: Head, dtype: torch.dtype) -> Tensor:
    """Returns a parameter or buffer of the head, or an empty tensor of the dtype."""
    own = (v for v in (*head.parameters(), *head.buffers()) if v.is_floating_point())
    return next(own, torch.empty(0, dtype=dtype))


def truncates(module: nn.Module) -> bool:
    """Whether a part of the module has the attribute ``truncates``: values of its support may have probability 0."""
    return any(getattr(part, "truncates", False) for part in module.modules())


def each_matters(grad: Tensor, of: str) -> None:
    """Checks that no element of phi has gradient 0 in all rows and sites; grad is (rows, sites, P)."""
    size = grad.abs().amax((0, 1))
    if not (size > 0).all():
        broken("head", "every parameter matters", f"gradient 0 of parameter {int(size.argmin())} in {of}")


@contextmanager
def raises(law: str, case: str, error: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    """Checks that an error is raised in this context."""
    try:
        yield
    except error:
        return
    kinds = error if isinstance(error, tuple) else (error,)
    broken(law, case, f"no error; expected {' or '.join(kind.__name__ for kind in kinds)}")


@contextmanager
def no_error(law: str, case: str, *errors: type[Exception], named: bool = False) -> Iterator[None]:
    """Checks that none of these errors is raised in this context; ``named`` adds the type of the error to the message."""
    try:
        yield
    except errors as error:
        name = f"{type(error).__name__}: " if named else ""
        raise AssertionError(f"{law} broken [{case}]: {name}{error}") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's random state in this context and restores it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


def noise_like(value: Tensor, seed: int) -> Tensor:
    """Returns normal random numbers with the shape, dtype and device of a tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device="cpu").to(value.device)


def gradients_of(total: Tensor, leaves: Sequence[Tensor], keep_graph: bool = False) -> list[Tensor]:
    """Returns the gradients of a scalar in the leaves; zeros for leaves on which it does not depend."""
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves), retain_graph=keep_graph, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
