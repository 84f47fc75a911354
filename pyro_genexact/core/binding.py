"""Modules as they are at a call, for what the call returns."""

from __future__ import annotations

from typing import Any, TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
