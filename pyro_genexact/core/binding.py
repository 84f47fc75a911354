"""Bound and Held record the state of a module at a call: its weights, buffers, submodules and modes."""

from __future__ import annotations

from operator import is_
from typing import Any, Generic, TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_Part = tuple[nn.Module, type, bool, dict[str, Any], dict[str, Any], dict[str, Any]]
"""A module, its class, its training flag, and its parameters, buffers and submodules."""


class Bound(Generic[ModuleT]):
    """Records the current parameters, buffers, submodules and modes of a module.

    Objects that the module's call returns keep a ``Bound`` and so continue to use this state. :attr:`module` is the
    module itself, with its hooks, as long as it still has everything that was recorded. It is a shallow copy with the
    recorded objects once one of them has been replaced, for instance by ``load_state_dict(assign=True)``, ``train()``,
    a parametrisation, or because the call was made by :func:`torch.func.functional_call`. Pyro modules, whose
    attributes are samples, are always copied. Tensors are never copied, so changes in place remain visible.

    Args:
        module: any module.
        one_draw: whether each Pyro sample must have the shape of its prior.

    Raises:
        ValueError: if ``one_draw`` is set and a Pyro sample has more dims than its prior, as in a plate of particles.
    """

    def __init__(self, module: ModuleT, one_draw: bool = False) -> None:
        self._module = module
        self._tree: list[_Part] = []
        self._copy: ModuleT | None = None
        if not _is_bare(module):
            self._record(module, one_draw)

    @property
    def module(self) -> ModuleT:
        """The module in the recorded state."""
        if self._is_unchanged():
            return self._module
        if self._copy is None:
            self._copy = self.copy()
        return self._copy

    @property
    def tensors(self) -> list[Tensor]:
        """The recorded parameters, buffers and Pyro samples, in the order of the modules."""
        return [t for part in self._tree for kind in part[3:5] for t in kind.values() if t is not None]

    def copy(self) -> ModuleT:
        """Returns a shallow copy of the module and its submodules in the recorded state; the module if it has none."""
        made: dict[int, Any] = {id(part[0]): object.__new__(part[1]) for part in self._tree}
        for module, _, training, tensors, buffers, parts in self._tree:
            fields = module.__dict__ | {"training": training, "_parameters": tensors.copy(), "_buffers": buffers.copy()}
            fields["_modules"] = {name: None if part is None else made[id(part)] for name, part in parts.items()}
            fields["_load_state_dict_pre_hooks"] = {}  # these hooks refer to the original module
            if isinstance(module, PyroModule):
                fields |= {"_pyro_params": {}, "_pyro_samples": {}}  # already among the parameters
            made[id(module)].__dict__.update(fields)
        return made.get(id(self._module), self._module)  # type: ignore[no-any-return]

    def _record(self, module: nn.Module, one_draw: bool) -> None:
        own = module.__dict__
        if isinstance(module, PyroModule):
            kinds = _sampled(module, one_draw)
        else:
            kinds = own["_parameters"].copy(), own["_buffers"].copy(), own["_modules"].copy()
        self._tree.append((module, type(module), own["training"], *kinds))
        for part in kinds[2].values():
            if part is not None:
                self._record(part, one_draw)

    def _is_unchanged(self) -> bool:
        """Whether the module has exactly the recorded objects; always False for Pyro modules."""
        for module, kind, training, tensors, buffers, parts in self._tree:
            own = module.__dict__
            if type(module) is not kind or own["training"] is not training or isinstance(module, PyroModule):
                return False
            for now, then in (own["_parameters"], tensors), (own["_buffers"], buffers), (own["_modules"], parts):
                if (now or then) and not (len(now) == len(then) and all(map(is_, now.values(), then.values()))):
                    return False
        return True


def _is_bare(module: nn.Module) -> bool:
    """Whether the module has no tensors and no submodules to record."""
    own = module.__dict__
    if own["_modules"] or isinstance(module, PyroModule):
        return False
    return not any(t is not None for kind in (own["_parameters"], own["_buffers"]) for t in kind.values())


def _sampled(module: PyroModule, one_draw: bool) -> tuple[dict[str, Any], ...]:
    """Returns the parameters and samples, the buffers, and the submodules of a Pyro module.

    Reading its attributes runs Pyro's sample and param statements.
    """
    own = module.__dict__
    tensors, parts = ({name: getattr(module, name) for name in own[kind]} for kind in ("_parameters", "_modules"))
    samples = {name: getattr(module, name) for kind in ("_pyro_params", "_pyro_samples") for name in own[kind]}
    for name, prior in own["_pyro_samples"].items() if one_draw else ():
        if isinstance(prior, Distribution) and samples[name].shape != prior.batch_shape + prior.event_shape:
            raise ValueError(
                f"Expected one draw of {name}, {tuple(prior.batch_shape + prior.event_shape)} (networks take no batch "
                f"of weights: no vectorised particles, no Predictive(parallel=True)); got {tuple(samples[name].shape)}."
            )
    return tensors | samples, own["_buffers"].copy(), parts


class Held:
    """A descriptor that records a module when the attribute is set, as a :class:`Bound`, and returns it when read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, instance: Any, module: nn.Module) -> None:
        instance.__dict__[self.name] = Bound(module, one_draw=True)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else instance.__dict__[self.name].module


def held_tensors(instance: Any) -> list[Tensor]:
    """Returns the tensors of all modules in an instance's :class:`Held` attributes, each tensor once."""
    held = (part.tensors for part in vars(instance).values() if isinstance(part, Bound))
    return list({id(t): t for tensors in held for t in tensors}.values())
