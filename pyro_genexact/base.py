"""The protocol: a conditioner encodes context and history, a head says what its numbers parameterise.

Symbols in every docstring: B flattened batch rows, T sites, S sites of a chunk, P parameters a site
(``head.num_params``), C context features, D features of a vector event.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from pyro.distributions.conditional import ConditionalDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from .core.buffers import register_derived, register_given, restore_derived

_FORGOTTEN: dict[str, Any] = {"_inv": None, "_last": None, "_watched": None, "_cached_x_y": (None, None)}
"""What transforms remember, and what stands there in one that remembers nothing."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)

Site = int | tuple[int, ...]
"""What one site looks like to a network: ``()`` a real number, ``(k,)`` a real vector, an integer V one of V categories."""


@dataclass(frozen=True)
class Steps:
    """A context of one vector of covariates a site, known in advance: ``context=Steps(C)`` expects (*batch, T, C).

    Example:
        >>> Steps(3)
        Steps(features=3)
    """

    features: int

    def __post_init__(self) -> None:
        check_sizes(1, features=self.features)

    def __str__(self) -> str:
        return f"Steps({self.features})"


@dataclass(frozen=True)
class Source:
    """A context that is a sequence of its own, of any length S: ``context=Source(C)`` expects (*batch, S, C).

    Conditioners read it by attention. Sources of several lengths are padded to one tensor; distributions and their modules
    take the lengths as ``source_lengths``, conditioners take both as :class:`Padded`.

    Example:
        >>> Source(3)
        Source(features=3)
    """

    features: int

    def __post_init__(self) -> None:
        check_sizes(1, features=self.features)

    def __str__(self) -> str:
        return f"Source({self.features})"


class Padded(NamedTuple):
    """Sequences of several lengths, padded to one tensor.

    Attributes:
        values: (*batch, S, C); what stands from a row's length on is never read.
        lengths: (*batch) integers 0 ... S.
    """

    values: Tensor
    lengths: Tensor


class Conditioner(nn.Module):
    """Encodes the context and the history of a site into the P parameters of that site.

    A conditioner defines :meth:`start` and :meth:`extend`; :meth:`forward` and :meth:`reorder` follow from them.
    ``forward`` must equal ``start`` followed by ``extend`` for every way of cutting y into chunks, and the parameters
    of a site must depend on earlier sites only. A state is a NamedTuple with the fields ``position`` (sites read so far)
    and ``clock`` (from :meth:`clock`), the rest batch-first tensors unless the class overrides :meth:`reorder`.
    A conditioner may also offer ``adjoint``, the reverse sweep (see :meth:`pyro_genexact.conditioners.MADE.adjoint`), and says so
    by ``has_adjoint``.

    Attributes:
        num_params: P, the numbers predicted for each site.
        site: what one site looks like, see :data:`Site`.
        context: C, the features of the context vector; :class:`Steps` of one vector a site; :class:`Source` of a sequence of
            its own; 0 for none.
        num_sites: T, or None where the conditioner takes any length.
    """

    num_params: int
    site: Site | Sequence[Site] = ()
    context: int | Steps | Source = 0
    num_sites: int | None = None

    @property
    def has_adjoint(self) -> bool:
        """Whether gradients through a sequential evaluation in the present mode come from ``adjoint``."""
        return False

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, Any]:
        """The parameters (B, P) of the first site, from the context (B, C) alone, and the state before any site."""
        raise TypeError(f"{type(self).__name__} must define start(context, batch_size)")

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads S more sites y (B, S, *site_shape): the parameters (B, S, P) of the S sites after them, and the new state.

        The given state is consumed: its buffers may be written in place. Using it again raises a RuntimeError.
        """
        raise TypeError(f"{type(self).__name__} must define extend(y, state)")

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters (B, T, P) of all T sites of y (B, T, *site_shape), each from the context and earlier sites."""
        phi, state = self.start(context, y.shape[0])
        if y.shape[1] == 1:
            return phi.unsqueeze(1)
        return torch.cat([phi.unsqueeze(1), self.extend(y[:, :-1], state)[0]], 1)

    def reorder(self, state: Any, index: Tensor) -> Any:
        """A copy of the batch rows ``index`` (B',) of a state, to branch from it; the state itself stays usable."""
        self.advance(state, 0)
        return type(state)(*(_rows(field, index) for field in state))

    def permuted(self, order: Tensor) -> Conditioner:
        """The conditioner of variables visited in another order (T,), with the same weights for each variable."""
        raise ValueError(f"Expected a conditioner whose weights belong to variables; got {type(self).__name__}.")

    @staticmethod
    def clock() -> list[int]:
        """A new counter of the sites read, shared by a state and its successors: how a consumed state is found out."""
        return [0]

    @staticmethod
    def advance(state: Any, sites: int) -> Any:
        """Consumes a state: the same with its position moved on by ``sites``; RuntimeError if it was consumed before."""
        if state.clock[0] != state.position:
            raise RuntimeError(
                f"Expected a fresh state; got one at site {state.position} whose buffers were extended to site "
                f"{state.clock[0]} (branch with conditioner.reorder before extend)."
            )
        state.clock[0] += sites
        return state._replace(position=state.position + sites)


class Head(nn.Module):
    """Says what the P numbers of a site parameterise: a distribution of it or a strictly monotone bijection of it.

    A new head defines ``num_params`` and :meth:`forward`.

    Attributes:
        num_params: P, the numbers a site needs.
        site_shape: the shape of one site's value.
        support: of a site's value, for heads of distributions; the same whatever phi is.
        domain: of a number of a site's value and of its image, for heads of bijections.
    """

    num_params: int
    site_shape: tuple[int, ...] = ()
    support: constraints.Constraint = constraints.real
    domain: constraints.Constraint = constraints.real

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(restore_derived)

    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """The distribution or transform of S sites from phi (*batch, S, P); ``first`` is the index of the first of them."""
        raise TypeError(f"{type(self).__name__} must define forward(phi, first)")

    def permuted(self, order: Tensor) -> Head:
        """The head for sites visited in another order: itself, unless it treats sites differently."""
        return self


@ConditionalDistribution.register
class DistributionModule(nn.Module):
    """A learnable distribution: calling it with a context (or none) returns a Pyro distribution of one forward pass.

    Attributes:
        context: C, the features that the call expects; :class:`Steps` of one vector a site; :class:`Source` of a sequence of
            its own; 0 for a call without context.
    """

    context: int | Steps | Source = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(restore_derived)

    def forward(self, context: Tensor | None = None) -> Any:
        """The distribution given the context (*batch, C)."""
        raise TypeError(f"{type(self).__name__} must define forward(context)")

    def condition(self, context: Tensor | None = None) -> Any:
        """The same as calling the module, under Pyro's name."""
        return self(context)

    def for_validation(self) -> DistributionModule:
        """What :func:`~pyro_genexact.fit` scores validation rows with: the module itself, unless that would cost too much."""
        return self


class Constant(nn.Module):
    """A module whose call returns a fixed distribution or transform; its tensors are buffers of the module.

    So they follow the module's device and dtype, and belong to its ``state_dict``. Plain numbers, such as the bound of
    ``greater_than(0.0)``, are settings, which a state does not hold. Attributes that torch computes lazily (``covariance_matrix``)
    are saved if they were computed before: give a distribution that was not used yet.

    Args:
        value: a distribution or transform, or a collection with such.
        persistent: False for a value that follows from sizes: it is not saved, but rebuilt when a state is loaded.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> base = Constant(dist.Normal(torch.zeros(2), 1.0)).double()
        >>> base().loc.dtype, list(base.state_dict())
        (torch.float64, ['value_0', 'value_1'])
    """

    context = 0

    def __init__(self, value: Any, persistent: bool = True) -> None:
        super().__init__()

        slots: dict[int, _Slot] = {}

        def keep(tensor: Tensor) -> _Slot:
            if id(tensor) not in slots:
                slots[id(tensor)] = _Slot(f"value_{len(slots)}")
                register = register_given if persistent else register_derived
                register(self, slots[id(tensor)].name, tensor)
            return slots[id(tensor)]

        self._template = map_leaves(keep, value)

    @property
    def value(self) -> Any:
        """The distribution or transform, with the tensors that the module has now."""
        return self()

    def forward(self) -> Any:
        return (
            map_leaves(lambda slot: self._buffers[slot.name], self._template, _Slot)
            if self._buffers
            else self._template
        )


class _Slot(NamedTuple):
    """Where a tensor of a template goes."""

    name: str


def bind(module: ModuleT, one_draw: bool = False) -> tuple[ModuleT, list[Tensor]]:
    """The module as it is now, and the tensors it computes with: parameters, buffers and Pyro samples, not copied.

    What a call returns keeps this shallow copy, so that a weight put in place for the call (a ``PyroSample``, a value from
    :func:`torch.func.functional_call`, a ``poutine`` handler) stays in place when the distribution is used after it.

    Raises:
        ValueError: with ``one_draw``, if a Pyro sample has more dims than its prior, as in a plate of particles.
    """
    if not (module._parameters or module._buffers or module._modules or isinstance(module, PyroModule)):
        return module, []  # nothing to keep
    bound = object.__new__(type(module))
    fields = dict(module.__dict__)
    fields |= {kind: dict(fields[kind]) for kind in ("_parameters", "_buffers", "_modules")}
    fields["_load_state_dict_pre_hooks"] = {}  # which hold the module itself, and could not be copied without it
    tensors: dict[str, Any] = {}
    if isinstance(module, PyroModule):  # whose attribute access has effects: params, samples, names
        for kind in ("_parameters", "_modules"):
            fields[kind] = {name: getattr(module, name) for name in fields[kind]}
        priors = dict(fields["_pyro_samples"])
        for kind in ("_pyro_params", "_pyro_samples"):
            tensors |= {name: getattr(module, name) for name in fields[kind]}
            fields[kind] = {}
        fields["_parameters"] |= tensors  # where a second bind finds them
        for name, prior in priors.items() if one_draw else ():
            if isinstance(prior, Distribution) and tensors[name].shape != prior.batch_shape + prior.event_shape:
                raise ValueError(
                    f"Expected one draw of {name}, {tuple(prior.batch_shape + prior.event_shape)} (networks take no batch "
                    f"of weights: no vectorised particles, no Predictive(parallel=True)); got {tuple(tensors[name].shape)}."
                )
    found = [t for t in (*fields["_parameters"].values(), *fields["_buffers"].values()) if t is not None]
    for name, child in fields["_modules"].items():
        if child is not None:
            fields["_modules"][name], more = bind(child, one_draw)
            found += more
    bound.__dict__.update(fields)
    return bound, found


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws on a device and on the CPU start from the seed; torch's random state is given back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would reseed all GPUs, which nobody gives back
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


class Settable:
    """A property of a class, of which an instance may be given another value, as Pyro's ``has_rsample_`` does."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.get(instance)


def check_context(module: Any, context: Any) -> None:
    """Raises a ValueError unless the context is what the module was built for, in width, dtype and device."""
    name, width, sites = type(module).__name__, module.context, ""
    if isinstance(width, Source) and isinstance(context, Padded):
        context = context.values
    if isinstance(width, (Steps, Source)):
        width, sites = width.features, "T, " if isinstance(width, Steps) else "S, "
    if (context is None) != (width == 0):
        expected = f"a context (*batch, {sites}{width})" if width else "no context"
        got = "none" if context is None else f"one of shape {tuple(getattr(context, 'shape', ()))}"
        raise ValueError(f"Expected {expected} ({name} built with context={module.context}); got {got}.")
    if context is None:
        return
    if not isinstance(context, Tensor):
        raise TypeError(f"Expected context to be a tensor; got {type(context).__name__}.")
    if context.dim() < (2 if sites else 1) or context.shape[-1] != width:
        raise ValueError(
            f"Expected context.shape[-1] == {width} ({name} built with context={module.context}); got {tuple(context.shape)}."
        )
    check_like("context", context, next((p for p in module.parameters() if p.is_floating_point()), context))


def check_sizes(least: int, **sizes: Any) -> None:
    """Raises a ValueError unless every argument is one integer of at least ``least``."""
    for name, size in sizes.items():
        if not _is_size(size, least):
            raise ValueError(f"Expected {name} to be an integer >= {least}; got {size!r}.")


def check_widths(least: int, **widths: Any) -> None:
    """Raises a ValueError unless every argument is a sequence of integers of at least ``least``."""
    for name, sizes in widths.items():
        if not isinstance(sizes, (tuple, list)) or not all(_is_size(size, least) for size in sizes):
            raise ValueError(f"Expected {name} to be a sequence of integers >= {least}; got {sizes!r}.")


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_numbers(**numbers: Any) -> None:
    """Raises a TypeError unless every argument is a real number."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"Expected {name} to be a number; got {number!r}.")


def check_positive(**numbers: Any) -> None:
    """Raises a TypeError unless every argument is a real number, a ValueError unless it is positive and finite."""
    check_numbers(**numbers)
    for name, number in numbers.items():
        if not 0 < number < inf:
            raise ValueError(f"Expected {name} to be positive and finite; got {number}.")


def check_like(name: str, value: Tensor, like: Tensor) -> None:
    """Raises a ValueError unless the value has the dtype and the device of a parameter."""
    if value.dtype != like.dtype:
        raise ValueError(f"Expected {name}.dtype == {like.dtype} (that of the parameters); got {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"Expected {name}.device == {like.device} (that of the parameters); got {value.device}.")


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """That of torch, which takes longer than an operation, asked only where shapes differ."""
    distinct = {tuple(shape) for shape in shapes if shape}
    return torch.Size(distinct.pop() if distinct else ()) if len(distinct) < 2 else torch.broadcast_shapes(*shapes)


def transformed() -> bool:
    """Whether torch.func is at work, under which no look at values is possible."""
    return torch._C._are_functorch_transforms_active()


def visible(value: Tensor) -> bool:
    """Whether values can be looked at, to check them or to choose a way."""
    return not (value.is_meta or transformed())


def vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Gradients of the inputs, zeros where nothing depends on them."""
    kept = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not kept:
        return [torch.zeros_like(i) for i in inputs]
    chosen = None if grads is None else [grads[i] for i in kept]
    return list(
        torch.autograd.grad(
            [outputs[i] for i in kept], inputs, chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a distribution, transform, constraint or module, or in a collection of such."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, _InverseTransform):
        return tensors_in(value.inv)
    if isinstance(value, nn.Module):
        plain = [part for part in value.__dict__.values() if isinstance(part, Tensor)]
        value = [*value._parameters.values(), *value._buffers.values(), *value._modules.values(), *plain]
    elif isinstance(value, (Distribution, Transform, constraints.Constraint)):
        value = {name: part for name, part in value.__dict__.items() if name not in _FORGOTTEN}
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (list, tuple)) else []


def _rows(field: Any, index: Tensor) -> Any:
    if isinstance(field, Tensor):
        return field.index_select(0, index)
    if hasattr(field, "_fields"):
        return type(field)(*(_rows(part, index) for part in field))
    return type(field)(_rows(part, index) for part in field) if isinstance(field, (tuple, list)) else field


def map_leaves(fn: Callable[[Any], Any], value: Any, kind: type = Tensor) -> Any:
    """A copy of a distribution, transform or constraint, or a collection of such, whose tensors went through fn.

    Those of a check that a constraint was given are among them. With another ``kind`` its instances went through fn
    instead. What transforms remember is left out.
    """
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map_leaves(fn, part, kind) for part in value)
    if isinstance(value, dict):
        return {name: map_leaves(fn, part, kind) for name, part in value.items()}
    if isinstance(value, _InverseTransform):
        return map_leaves(fn, value.inv, kind).inv
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_leaves(fn, getattr(value, f.name), kind) for f in fields(value)})
    if isinstance(value, (Distribution, Transform, constraints.Constraint)):
        value = copy.copy(value)
        parts = value.__dict__
        if isinstance(value, Transform):
            parts.update({name: forgotten for name, forgotten in _FORGOTTEN.items() if name in parts})
        parts.update({name: map_leaves(fn, part, kind) for name, part in parts.items()})
    return value
