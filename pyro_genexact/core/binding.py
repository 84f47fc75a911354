"""Bound and Held: a module as it was at a call (weights, buffers, parts, modes), and the tensors it uses."""

from __future__ import annotations

from operator import is_
from typing import Any, Generic, TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_Part = tuple[nn.Module, type, bool, dict[str, Any], dict[str, Any], dict[str, Any]]
"""A module of a tree, its class, whether it is in training, and its parameters, buffers and parts."""


class Bound(Generic[ModuleT]):
    """A module as it is now, for what its call returns: with the parameters, buffers, parts and modes that it has now.

    :attr:`module` is the module itself for as long as it still has all of these: layers are called where they stand, with
    their hooks. Once one of them was replaced (by a ``load_state_dict(assign=True)``, ``train()``, a parametrisation, or
    because the call was one of :func:`torch.func.functional_call`), it is a shallow copy that has the recorded ones. Modules
    of Pyro, whose attributes are samples, are copied at once. Tensors are never copied, so changes in place are seen.

    Args:
        module: any module.
        one_draw: whether each Pyro sample must have the shape of its prior.

    Raises:
        ValueError: with ``one_draw``, if a Pyro sample has more dims than its prior, as in a plate of particles.
    """

    def __init__(self, module: ModuleT, one_draw: bool = False) -> None:
        self._module = module
        self._tree: list[_Part] = []
        self._copy: ModuleT | None = None
        if not _is_bare(module):
            self._record(module, one_draw)

    @property
    def module(self) -> ModuleT:
        """The module with what was recorded."""
        if self._stands():
            return self._module
        if self._copy is None:
            self._copy = self.copy()
        return self._copy

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and Pyro samples, in the order of the modules."""
        return [t for part in self._tree for kind in part[3:5] for t in kind.values() if t is not None]

    def copy(self) -> ModuleT:
        """A shallow copy of the module, down to its last part, with what was recorded; itself if that is nothing."""
        made: dict[int, Any] = {id(part[0]): object.__new__(part[1]) for part in self._tree}
        for module, _, training, tensors, buffers, parts in self._tree:
            fields = module.__dict__ | {"training": training, "_parameters": tensors.copy(), "_buffers": buffers.copy()}
            fields["_modules"] = {name: None if part is None else made[id(part)] for name, part in parts.items()}
            fields["_load_state_dict_pre_hooks"] = {}  # they hold the module itself, and could not be copied without it
            if isinstance(module, PyroModule):
                fields |= {"_pyro_params": {}, "_pyro_samples": {}}  # which stand among the parameters
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

    def _stands(self) -> bool:
        """Whether the module still has all that was recorded, and nothing else; False for those of Pyro."""
        for module, kind, training, tensors, buffers, parts in self._tree:
            own = module.__dict__
            if type(module) is not kind or own["training"] is not training or isinstance(module, PyroModule):
                return False
            for now, then in (own["_parameters"], tensors), (own["_buffers"], buffers), (own["_modules"], parts):
                if (now or then) and not (len(now) == len(then) and all(map(is_, now.values(), then.values()))):
                    return False
        return True


def _is_bare(module: nn.Module) -> bool:
    """Whether there is nothing to record."""
    own = module.__dict__
    if own["_modules"] or isinstance(module, PyroModule):
        return False
    return not any(t is not None for kind in (own["_parameters"], own["_buffers"]) for t in kind.values())


def _sampled(module: PyroModule, one_draw: bool) -> tuple[dict[str, Any], ...]:
    """What a module of Pyro has now: parameters and samples, buffers and parts. Access to its attributes has effects."""
    own = module.__dict__
    tensors, parts = ({name: getattr(module, name) for name in own[kind]} for kind in ("_parameters", "_modules"))
    samples = {name: getattr(module, name) for kind in ("_pyro_params", "_pyro_samples") for name in own[kind]}
    for name, prior in own["_pyro_samples"].items() if one_draw else ():
        if isinstance(prior, Distribution) and samples[name].shape != prior.batch_shape + prior.event_shape:
            raise ValueError(
                f"Expected one draw of {name}, {tuple(prior.batch_shape + prior.event_shape)} (networks take no batch "
                f"of weights: no vectorised particles, no Predictive(parallel=True)); got {tuple(samples[name].shape)}."
            )
    return tensors | samples, own["_buffers"].copy(), parts  # a copy finds the samples among its parameters


class Held:
    """An attribute that holds a module as it was when it was set: see :class:`Bound`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, instance: Any, module: nn.Module) -> None:
        instance.__dict__[self.name] = Bound(module, one_draw=True)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else instance.__dict__[self.name].module


def held_tensors(instance: Any) -> list[Tensor]:
    """What the modules compute with that an instance has in attributes of the kind :class:`Held`, each tensor once."""
    held = (part.tensors for part in vars(instance).values() if isinstance(part, Bound))
    return list({id(t): t for tensors in held for t in tensors}.values())
