"""Flows of the library zuko as Pyro distributions. This module does not import zuko."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..core.binding import Bound
from ..core.checks import check_sizes
from ..core.devices import zeros_for
from ..core.functional import transformed
from ..core.independent import REAL_VECTOR, to_event
from ..core.precision import full_precision
from ..numerics.derivatives import implicit
from ..numerics.errors import ConvergenceError, worst_of
from ..numerics.vectors import refine
from ..transforms.base import adapted
from ..transforms.modules import BijectionModule, ConditionedTransform
from ..transforms.support import ToSupport
from .base import Flow, over_reals, support_of_numbers

Direction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def from_zuko(module: nn.Module, context: int | None = None) -> Flow:
    """Wraps a flow of the library zuko as a module whose call returns a Pyro distribution.

    Unlike ``pyro.contrib.zuko.ZukoToPyro``, the result has a support, ``sample`` and ``expand``, draws independent
    noise for each row of the context, and neither keeps stale values nor leaks memory. It shares its parameters with
    ``module``, so you can also train those with zuko.

    Cost: ``log_prob`` is zuko's. ``rsample`` is zuko's inverse and one forward pass that checks it. If zuko inverts by
    search, Newton's method refines the result, in one or two steps that cost D gradients of a pass each. It also finds
    solutions outside the interval that zuko searches, or raises an error. Gradients of samples are implicit and cost D
    gradients of a pass. They are also correct for the parameters of zuko's monotone networks in ``eval`` mode, where
    zuko's own are missing.

    Some maps of zuko are bounded, so that noise outside their image has no inverse: the image of ``GF`` ends before ±5,
    and ``NAF``, ``UNAF`` and ``SOSPF`` with several transforms clip values at ±11 between them (``SoftclipTransform``).
    The density of such a flow integrates to less than 1, in zuko too. A sample that would need such noise raises an
    error, whereas zuko silently moves it.

    ``CNF`` is as exact as its solver. The error of a log-density is up to a few hundred times ``atol + rtol``; measured
    in float64, it is 2e-4 nats at zuko's tolerances 1e-6 and 1e-5, 3e-8 with both at 1e-8, and 4e-10 with both at
    1e-10. The result depends by as much on the other rows of the call, because all rows share the solver's steps.
    Tolerances below 16 times the rounding unit of the dtype are raised to that value.

    Integrals and differential equations of zuko (``UNAF``, ``SOSPF``, ``CNF``) have first derivatives only. A second
    derivative raises an error, whereas zuko silently returns zero or a wrong value.

    Args:
        module: a ``zuko.flows.Flow`` over real vectors, such as ``zuko.flows.NAF(3, 2)``.
        context: C, the number of context features; by default inferred from zuko's layers. Required for custom layers.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: if ``module`` does not have the modules ``transform`` and ``base``.
        ValueError: if the support of the base is not all real vectors (as for the angles of ``NCSF``), if ``context``
            is not the width of zuko's layers, or for ``CNF(exact=False)``, whose log-density is a random estimate. In
            calls, for dropout and batch normalisation in training mode, and for values of another dtype than the
            parameters.
        ConvergenceError: when sampling, if no x is found that the transform maps onto the noise; for ``CNF``, if the
            time derivatives are not finite.
        RuntimeError: for second derivatives that zuko does not support.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Shift(nn.Module):  # a lazy transform of zuko
        ...     def forward(self, c=None):
        ...         return torch.distributions.AffineTransform(torch.ones(2), 1.0, event_dim=1)
        >>> class Normal(nn.Module):
        ...     def forward(self, c=None):
        ...         return torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> module = nn.Module()
        >>> module.transform, module.base = Shift(), Normal()
        >>> from_zuko(module)().log_prob(-torch.ones(5, 2)).shape
        torch.Size([5])
    """
    transform, base = (getattr(module, name, None) for name in ("transform", "base"))
    if not (isinstance(module, nn.Module) and isinstance(transform, nn.Module) and isinstance(base, nn.Module)):
        raise TypeError(
            f"Expected module to be a zuko.flows.Flow (a module with transform and base); got {type(module).__name__}."
        )
    if any(getattr(part, "exact", True) is False for part in transform.modules()):
        raise ValueError("Expected exact=True (otherwise log-densities are random estimates); got exact=False.")
    widths = {width for part in transform.modules() if (width := _width(part)) is not None}
    found = max(widths, default=None)
    if context is not None:
        check_sizes(0, context=context)
        if found not in (None, context):
            raise ValueError(f"Expected context == {found} (the context of zuko's layers); got {context}.")
    width = context or found or 0
    features = _features(base, width)
    return Flow([ZukoTransform(transform, width), ToSupport(constraints.real, features)], ZukoBase(base, width))


class ZukoTransform(BijectionModule):
    """Inverse of a transform module of zuko: zuko maps data to noise, this module maps noise to data.

    Args:
        transform: module whose call, with a context or None, returns a transform of vectors.
        context: C, the number of context features; 0 for none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Shift(nn.Module):
        ...     def forward(self, c=None):
        ...         return torch.distributions.AffineTransform(1.0, 2.0, event_dim=1)
        >>> ZukoTransform(Shift())()(torch.ones(3))
        tensor([0., 0., 0.])
    """

    def __init__(self, transform: nn.Module, context: int = 0) -> None:
        super().__init__()
        self.transform, self.context = transform, context

    def forward(self, context: Tensor | None = None) -> ConditionedZuko:
        """Returns the transform given the context (*batch, C)."""
        return ConditionedZuko(self, context)


class ConditionedZuko(ConditionedTransform):
    """The bijection from noise to data of a :class:`ZukoTransform`, given a context.

    It keeps using the weights that the module has at construction.

    Args:
        module: the module to invert.
        context: the context (*batch, C), or None.
        cache_size: 1 to cache the last value, 0 for no cache.

    Raises:
        ValueError: for dropout and batch normalisation in training mode.
        ConvergenceError: in the forward direction, if zuko's inverse followed by Newton's method finds no solution.
    """

    domain = codomain = REAL_VECTOR

    def __init__(self, module: ZukoTransform, context: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(module, context, cache_size)
        _check_modes(module.transform)
        bound = Bound(module.transform, one_draw=True)
        self.module, self._tensors = bound.copy(), list({id(t): t for t in bound.tensors}.values())
        part: Any
        for part in list(self.module.modules()):
            if type(part).__module__.startswith("zuko.flows"):
                part.training = True  # in eval mode, these layers drop the gradients of their parameters
            if hasattr(part, "ode"):
                part.ode = nn.Sequential(part.ode, _Finite())
                rounding = 16 * torch.finfo(part.freqs.dtype).eps  # with smaller tolerances the solver never ends
                part.atol, part.rtol = max(part.atol, rounding), max(part.rtol, rounding)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._of_rows(x, self._to_data)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._of_rows(y, self._to_noise)

    @full_precision
    def _of_rows(self, value: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Maps rows; rows that are not finite are returned unchanged, because zuko's solver would fail for all rows."""
        value = self._broadcast(value)
        with _outside_inference_mode():
            value, context = _plain(value), _plain(self.context)
            if not value.numel():  # zuko cannot reshape an empty tensor; one row provides the gradients
                one = None if context is None else context.new_zeros(1, context.shape[-1])
                image, ladj = direction(value.new_zeros(1, value.shape[-1]), one)
                return value + image[0], value.sum(-1) + ladj[0]
            finite = value.isfinite().all(-1, keepdim=True)
            image, ladj = direction(torch.where(finite, value, 0.0), context)
            inputs = [t for t in (value, context, *self._tensors) if t is not None and t.requires_grad]
            if inputs and torch.is_grad_enabled() and not transformed():
                # a transform without cache avoids a reference cycle
                image, ladj = _Once.apply(self.with_cache(0), image, ladj, *inputs)
            return torch.where(finite, image, value), torch.where(finite.squeeze(-1), ladj, 0.0)

    def _to_data(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self.module(context)
        with torch.no_grad():
            y = refine(transform, x, transform.inv(x))  # zuko's bisection clamps solutions to its interval
        inputs = [*([] if context is None else [context]), *(t for t in self._tensors if t.requires_grad)]
        y = implicit(_Image(self.module, inputs, context is not None), y, x, *inputs, event_dim=1)
        return y, -adapted(transform).call_and_ladj(y)[1]

    def _to_noise(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return adapted(self.module(context)).call_and_ladj(y)  # type: ignore[no-any-return]

    def holds_function_of_zuko(self, features: int) -> bool:
        """Returns whether the autograd graph of one row contains an autograd Function of zuko."""
        context = None if self.context is None else self.context.new_zeros(1, self.context.shape[-1])
        row = zeros_for(self.module, 1, features).requires_grad_()
        seen, left = set(), [t.grad_fn for t in adapted(self.module(context)).call_and_ladj(row)]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if getattr(getattr(type(node), "_forward_cls", None), "__module__", "").startswith("zuko."):
                    return True
                left += [parent for parent, _ in node.next_functions]
        return False


class _Finite(nn.Module):
    """The identity for finite numbers; raises otherwise, because zuko's solver would shrink its step forever."""

    def forward(self, slope: Tensor) -> Tensor:
        bad = ~slope.isfinite()
        if bad.any():
            index, worst = worst_of(bad, slope)
            raise ConvergenceError(
                f"Expected finite slopes of the flow's differential equation; got {worst} at index {index}.",
                worst,
                index,
                (0.0, 1.0),
            )
        return slope


class _Once(torch.autograd.Function):
    """The identity of ``image`` and ``ladj``; second derivatives raise an error if zuko supports only first ones.

    torch's ``once_differentiable`` is not sufficient: an engine that finds no path back to the inputs takes second
    derivatives to be zero. Here the gradients get a path, on which :class:`_Refusing` raises.
    """

    @staticmethod
    def forward(
        ctx: Any, transform: ConditionedZuko, image: Tensor, ladj: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.transform = transform
        ctx.save_for_backward(*inputs)
        return image.view_as(image), ladj.view_as(ladj)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        once = torch.is_grad_enabled() and ctx.transform.holds_function_of_zuko(grads[0].shape[-1])
        return (None, *grads, *(_Refusing.apply(*inputs) if once else [None] * len(inputs)))


class _Refusing(torch.autograd.Function):
    """Returns zeros; their derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "Second derivatives are not available for integrals and differential equations of zuko's flows."
        )


class _Image:
    """Maps y by a transform module, as a function of the tensors that the module uses.

    It sets the tensors in a copy that persists after the call, because zuko's backward passes evaluate layers again.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor], has_context: bool) -> None:
        self.module, self.tensors, self.has_context = module, tensors, has_context

    def __call__(self, y: Tensor, *given: Tensor) -> Tensor:
        new = {id(old): t for old, t in zip(self.tensors, given, strict=True)}
        module = Bound(self.module).copy()
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = new.get(id(p), p)  # type: ignore[assignment]
        x: Tensor = module(given[0] if self.has_context else None)(y)
        return x


class ZukoBase(nn.Module):
    """The base module of a zuko flow; its distributions are converted to distributions of vectors."""

    def __init__(self, base: nn.Module, context: int) -> None:
        super().__init__()
        self.base, self.context = base, context

    def forward(self, context: Tensor | None = None) -> Distribution:
        d: Distribution = self.base(context)
        return to_event(d, 0 if d.event_shape else 1)


def _check_modes(module: nn.Module) -> None:
    for name, part in module.named_modules():
        drops = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        if part.training and (drops or isinstance(part, nn.modules.batchnorm._NormBase)):
            raise ValueError(
                f"Expected deterministic layers; got {type(part).__name__} in training mode at transform.{name} "
                "(call its eval())."
            )


def _width(layer: Any) -> int | None:
    """Returns the number of context features of a zuko layer, or None if it cannot be inferred."""
    network = getattr(layer, "hyper", getattr(layer, "ode", None))
    if network is None:
        return 0 if hasattr(layer, "phi") else None  # element-wise, with free parameters
    linear: list[Any] = [part for part in network.modules() if hasattr(part, "in_features")]
    reads, writes = linear[0].in_features, linear[-1].out_features
    if hasattr(layer, "ode"):
        return reads - writes - 2 * len(layer.freqs)
    if getattr(layer, "mask", None) is not None:
        return reads - int(layer.mask.sum())
    return reads - writes // layer.total if hasattr(layer, "passes") else reads


def _features(base: nn.Module, context: int) -> int:
    """Returns the size of the base's vectors; raises a ValueError unless their support is all real vectors."""
    with torch.no_grad():
        d: Distribution = base(zeros_for(base, context) if context else None)
    try:
        known = over_reals(d)
    except NotImplementedError:  # for example zuko's mixtures
        raise ValueError(
            f"Expected module.base to be over all real vectors; got {type(d).__name__}, which has no support."
        ) from None
    if not known:
        support = support_of_numbers(d)
        raise ValueError(f"Expected module.base to be over all real vectors; got {type(d).__name__} over {support}.")
    return (d.batch_shape + d.event_shape)[-1]


def _plain(t: Any) -> Any:
    """Returns a clone of an inference-mode tensor, which autograd can use; other values unchanged."""
    return t.clone() if t is not None and t.is_inference() else t


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Replaces inference mode by ``no_grad``, because zuko's log-determinants are computed by autograd."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
