"""Flows of the library zuko as Pyro distributions that keep every convention. Zuko itself is not imported."""

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
    """A flow of the library zuko as a module whose call returns a Pyro distribution.

    What ``pyro.contrib.zuko.ZukoToPyro`` breaks holds: nothing stale is served and nothing leaks, there are a support,
    ``sample`` and ``expand``, and each row of the context draws noise of its own. The parameters are those of the module
    itself, which zuko may train as well.

    ``log_prob`` costs what it costs in zuko. ``rsample`` is zuko's inverse, checked by one pass forward; where that is a
    search, its result is refined by Newton's method (D gradients of a pass a step, one or two steps), also beyond the bounds
    of the search, or it raises.

    Some maps of zuko are bounded, so that noise outside of their image has no inverse: ``GF``, whose image ends before ±5,
    and ``NAF``, ``UNAF`` and ``SOSPF`` of more than one transform, between which ``SoftclipTransform`` cuts at ±11. Such a
    flow lacks the mass of that noise, in zuko too: its density integrates to less than 1, and a draw that would fall there
    raises, instead of being moved elsewhere as zuko does.

    ``CNF`` is as exact as its solver: a log-density is off by up to some hundred ``atol + rtol`` (measured in float64: 2e-4 nats at
    zuko's 1e-6 and 1e-5, 3e-8 at 1e-8, 4e-10 at 1e-10 for both), also against the Jacobian of its own map, and by as much it
    depends on the other rows of the call, which share their steps. Tolerances below 16 roundings of the dtype are taken for that.

    Integrals and differential equations of zuko (``UNAF``, ``SOSPF``, ``CNF``) have first derivatives only: a second one raises,
    where zuko's own are zero or wrong without a word.

    Gradients of samples are implicit (D gradients of a pass), and right also where zuko's
    aren't: parameters of its monotone networks have theirs in ``eval`` too.

    Args:
        module: a ``zuko.flows.Flow``, such as ``zuko.flows.NAF(3, 2)``, over real vectors.
        context: C, features of the context; by default read off zuko's own layers. Needed for layers of one's own.

    Raises:
        TypeError: for something without zuko's ``transform`` and ``base``.
        ValueError: for a base over less than all real vectors (``NCSF``, whose angles have a box), a context of another
            width than zuko's layers take, or ``CNF(exact=False)``, whose log-density is a random estimate. In calls, for
            layers in training mode that draw or use other rows (dropout, batch norms), and values of another dtype than the
            parameters.
        ConvergenceError: when sampling, where no x is found that the transform maps onto the noise: where there is none,
            as for draws of ``GF``, ``NAF``, ``UNAF`` and ``SOSPF`` outside of the image, or Newton's method ends elsewhere; and
            for a differential equation whose slopes are not finite, as of a context or parameters that aren't.
        RuntimeError: for second derivatives, where zuko has none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Shift(nn.Module):  # what zuko calls a lazy transform
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
            raise ValueError(f"Expected context == {found} (that of zuko's layers); got {context}.")
    width = context or found or 0
    features = _features(base, width)
    return Flow([ZukoTransform(transform, width), ToSupport(constraints.real, features)], ZukoBase(base, width))


class ZukoTransform(BijectionModule):
    """A transform module of zuko, from data to noise, as one from noise to data.

    Args:
        transform: its call, with a context or None, returns a transform of vectors.
        context: C, features of the context; 0 for none.

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
        """The transform given the context (*batch, C)."""
        return ConditionedZuko(self, context)


class ConditionedZuko(ConditionedTransform):
    """The bijection from noise to data that a transform module of zuko is, given a context.

    Args:
        module: with zuko's, from data to noise; the weights it has now are used from here on.
        context: (*batch, C) or None.

    Raises:
        ValueError: for layers in training mode that draw or use other rows.
        ConvergenceError: in the forward direction, where zuko's inverse and Newton's method after it end elsewhere.
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
                part.training = True  # in eval, zuko's layers of this kind drop gradients of their parameters
            if hasattr(part, "ode"):
                part.ode = nn.Sequential(part.ode, _Finite())
                rounding = 16 * torch.finfo(part.freqs.dtype).eps  # below which steps would have no end
                part.atol, part.rtol = max(part.atol, rounding), max(part.rtol, rounding)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._of_rows(x, self._to_data)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._of_rows(y, self._to_noise)

    @full_precision
    def _of_rows(self, value: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """Images of rows. Those that are not finite stay as they are: they would stop zuko's solver for all others."""
        value = self._broadcast(value)
        with _outside_inference_mode():
            value, context = _plain(value), _plain(self.context)
            if not value.numel():  # which zuko cannot reshape: with the gradients of one row
                one = None if context is None else context.new_zeros(1, context.shape[-1])
                image, ladj = direction(value.new_zeros(1, value.shape[-1]), one)
                return value + image[0], value.sum(-1) + ladj[0]
            finite = value.isfinite().all(-1, keepdim=True)
            image, ladj = direction(torch.where(finite, value, 0.0), context)
            inputs = [t for t in (value, context, *self._tensors) if t is not None and t.requires_grad]
            if inputs and torch.is_grad_enabled() and not transformed():
                image, ladj = _Once.apply(self.with_cache(0), image, ladj, *inputs)  # which remembers nothing: no cycle
            return torch.where(finite, image, value), torch.where(finite.squeeze(-1), ladj, 0.0)

    def _to_data(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self.module(context)
        with torch.no_grad():
            y = refine(transform, x, transform.inv(x))  # zuko's bisection may have been clamped
        inputs = [*([] if context is None else [context]), *(t for t in self._tensors if t.requires_grad)]
        y = implicit(_Image(self.module, inputs, context is not None), y, x, *inputs, event_dim=1)
        return y, -adapted(transform).call_and_ladj(y)[1]

    def _to_noise(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return adapted(self.module(context)).call_and_ladj(y)  # type: ignore[no-any-return]

    def holds_function_of_zuko(self, features: int) -> bool:
        """Whether one of zuko's own autograd Functions is in the graph, of one row."""
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
    """The identity, of numbers that are finite: zuko's solver would look for a step that is small enough forever."""

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
    """The identity of image and ladj. A second derivative raises where a function of zuko has but a first.

    torch's own ``once_differentiable`` does not: an engine that looks for a way back to the inputs finds none, and takes
    second derivatives for zero. Here gradients get zeros that have one.
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
    """Zeros, whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "Expected first derivatives only, of an integral or a differential equation of zuko; got a second."
        )


class _Image:
    """What a transform module maps y to, as a function of the tensors that it computes with.

    Put in place in a copy that stays, not for the call alone, since zuko's own backward passes evaluate layers again.
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
    """The base module of a flow of zuko, whose distributions are made one of vectors."""

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
                f"Expected layers that map a row always to the same; got {type(part).__name__} in training mode as "
                f"transform.{name} (call its eval())."
            )


def _width(layer: Any) -> int | None:
    """Features of the context that a layer of zuko reads; None if that is not known."""
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
    """The size of the base's vectors; ValueError unless they are all real ones."""
    with torch.no_grad():
        d: Distribution = base(zeros_for(base, context) if context else None)
    try:
        known = over_reals(d)
    except NotImplementedError:  # as of zuko's mixtures
        raise ValueError(
            f"Expected module.base over all real vectors; got {type(d).__name__}, which has no support."
        ) from None
    if not known:
        support = support_of_numbers(d)
        raise ValueError(f"Expected module.base over all real vectors; got {type(d).__name__} over {support}.")
    return (d.batch_shape + d.event_shape)[-1]


def _plain(t: Any) -> Any:
    """One that autograd may use, of a tensor made in inference mode."""
    return t.clone() if t is not None and t.is_inference() else t


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """In inference mode, no_grad in its place: zuko's log-derivatives are gradients."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
