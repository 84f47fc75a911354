"""The head of any distribution class whose parameters have a fixed size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from math import prod
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..base import Constant, Head
from ..core.buffers import register_given
from ..core.checks import check_widths
from ..core.independent import independent, to_event
from ..core.leaves import tensors_in
from ..core.precision import full_precision
from ..core.shapes import parts_of
from ..families import table
from ..families.completed import completed
from ..families.repaired import REPAIRED
from .parameters import Cholesky, Link, Part, fixed_value, short_repr

_VMAP_ERRORS = ("vmap: ", "Batching rule not implemented")
"""The beginnings of errors that ``torch.func.vmap`` raises because of the code inside it."""


class Parametric(Head):
    """The head of any torch or Pyro distribution class whose parameters have a fixed size.

    All parameters that are not fixed are predicted by a network, which returns phi: unconstrained numbers for each site.
    Each number r of phi is bounded smoothly to z = b tanh(r / b), with b = 10 for most parameters and 4 for tail
    exponents. ``transform_to`` of the parameter's constraint then maps z to the parameter: for instance, a scale is exp(z)
    and a probability is sigmoid(z). Real parameters and the off-diagonal entries of Cholesky factors are r itself. The
    exceptions are the logits of NegativeBinomial and Geometric, which are bounded because they scale the counts.

    phi = 0 gives unit scales, concentrations 1, equal probabilities, four degrees of freedom, and stability 1.5 (which
    is predicted in (0.2, 2)). Samples that rounding would move out of the support are replaced by the nearest numbers
    inside. Among equivalent parameters, logits are predicted instead of probabilities, and ``scale_tril`` instead of a
    covariance or precision matrix. A parameter that is itself a distribution is passed as a head, whose parameters
    follow the others in phi. Distributions have the dtype and device of phi, and their ``log_prob`` is in nats.

    Args:
        family: the distribution class. For a class of torch that Pyro also exports, Pyro's version is used. Families
            whose own methods are wrong in some cases are replaced by corrected versions.
        shape: for families with scalar parameters, the shape of a site: ``()``, or ``(k,)`` for k independent values.
            For families with vector parameters (``MultivariateNormal``, ``Dirichlet``, ``Categorical``, ...), the shape
            of these: ``(k,)``, or ``(n, k)`` for n independent values if the family has scalar events.
        **fixed: parameters that are not predicted: numbers or tensors that broadcast with ``shape``, heads, and other
            options of the family. They follow phi's dtype and device. An ``nn.Parameter`` remains a parameter; others
            are not part of the ``state_dict``. Further sizes are also passed here, such as ``rank`` for
            ``LowRankMultivariateNormal`` and ``components`` for the mixtures.

    Attributes:
        family: the class whose subclass :meth:`forward` returns.
        parameters_of: the shapes of the predicted parameters, by name.
        has_rsample: whether samples are reparameterised.

    Raises:
        ValueError: if the family cannot be a head, with the reason: no exact density or sampler, a support that depends
            on predicted parameters, integer parameters that are not fixed, or values that are matrices. Also if a fixed
            parameter violates its constraint, or does not broadcast to its shape per site.
        TypeError: if ``family`` is not a distribution class, or a fixed parameter is not a number, tensor or head.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> head = Parametric(dist.StudentT, df=3.0)
        >>> head, head.num_params
        (Parametric(StudentT, df=3.0), 2)
        >>> head(torch.zeros(5, 1, 2)).sample().shape
        torch.Size([5, 1])
        >>> Parametric(dist.LowRankMultivariateNormal, (4,), rank=1).parameters_of
        {'loc': (4,), 'cov_factor': (4, 1), 'cov_diag': (4,)}
        >>> Parametric(dist.Pareto)
        Traceback (most recent call last):
        ...
        ValueError: Expected a family that can be a head; got Pareto: its support depends on scale: pass a fixed value.
    """

    def __init__(self, family: type[Distribution], shape: tuple[int, ...] = (), **fixed: Any) -> None:
        super().__init__()
        if not (isinstance(family, type) and issubclass(family, Distribution)):
            raise TypeError(f"Expected family to be a distribution class; got {family!r}.")
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"Expected shape to be a tuple; got {shape!r}.")
        check_widths(1, shape=tuple(shape))
        self._constant_support: Any = None
        self.name, shape = family.__name__, tuple(shape)
        self._settings = ([f"shape={shape}"] if shape else []) + [f"{n}={short_repr(v)}" for n, v in fixed.items()]
        exported = getattr(dist, self.name, None)
        if family.__module__.startswith("torch.distributions"):
            family = exported or family
        # a user's own class may have the same name as one of Pyro's
        self._pyro_name = self.name if family is exported else ""
        self.family: Any = REPAIRED.get(self._pyro_name, family)
        if self._pyro_name in table.REASONS:
            self._refuse(table.REASONS[self._pyro_name])
        if self._pyro_name == "SineSkewed" and shape != (1,):
            self._refuse(
                "its density is positive only if the absolute values of skewness sum to at most 1: Expected shape == "
                f"(1,); got {shape}"
            )
        parameters = self._parameters_to_predict(fixed)
        vector = any(p.shape for p in parameters.values())
        if vector and not shape:
            names = ", ".join(n for n, p in parameters.items() if p.shape)
            raise ValueError(f"Expected shape to be (k,), the size of {names} of {self.name}; got ().")
        self._lead = shape[:-1] if vector else shape
        self._fix(fixed, parameters, shape[-1] if shape else 0)
        self._plan = self._lay_out(parameters, {**fixed, "k": shape[-1] if shape else 0})
        self._sizes = [prod(part.raw) for part in self._plan]
        self._sizes += [int(head.num_params) for head in self._heads.values()]  # type: ignore[arg-type]
        self._scalars = all(part.raw == () for part in self._plan) and not self._heads and self._sizes != [1]
        self.num_params = sum(self._sizes)
        self.parameters_of = {part.name: part.shape for part in self._plan}
        self._probe()
        support = self.support
        self._constant_support = None if tensors_in(support) else support

    @full_precision  # some families multiply matrices in their constructors
    def forward(self, phi: Tensor, first: int = 0) -> Any:
        """Returns the distribution of batch shape (*batch, S) and event shape ``site_shape`` for phi (*batch, S, P)."""
        rows = phi.shape[:-1]
        if 0 in rows:  # some families cannot be constructed for empty batches, but all can be expanded to them
            return self.forward(phi.sum(tuple(range(len(rows))), keepdim=True), first).expand(rows)
        if len(self._sizes) == 1:
            parts = iter([phi])  # the gradient of a split would copy it
        else:
            parts = iter(parts_of(phi) if self._scalars else phi.split(self._sizes, -1))
        values = dict(self._options.forward())
        for name, _, raw, link in self._plan:
            part = next(parts)
            if not self._scalars and len(raw) != 1:
                part = part.unflatten(-1, raw) if raw else part.squeeze(-1)
            values[name] = part if link is None else link(part)
        for tensors in (self._buffers, self._parameters):
            for name, fixed in tensors.items():
                values[name] = fixed.to(phi if fixed.is_floating_point() else phi.device)  # type: ignore[union-attr]
        for name, head in self._heads.items():
            values[name] = head(next(parts))
        d: Any = completed(self.family)(**values)
        if not self._sizes:
            d = d.expand(rows + self._lead)
        return to_event(d, len(self._lead))

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name of a Bernoulli or Categorical family in the native loop, unless a subclass changed the head."""
        name, unchanged = self._pyro_name, type(self).forward is Parametric.forward
        plain = name == "Bernoulli" or (name == "Categorical" and not self._lead)
        return (name.lower(), []) if plain and unchanged and [*self.parameters_of] == ["logits"] else None

    @property
    def support(self) -> Any:  # type: ignore[override]
        """The support of a site's value; constructed on each access if it depends on fixed parameters."""
        if self._constant_support is not None:
            return self._constant_support
        like = next(chain(self.parameters(), self.buffers()), torch.empty((), dtype=torch.float64, device="cpu"))
        return self._support(torch.zeros(self.num_params, dtype=torch.float64, device=like.device))

    def extra_repr(self) -> str:
        return ", ".join([self.name, *self._settings])

    def __repr__(self) -> str:
        return f"Parametric({self.extra_repr()})"

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"Expected a family that can be a head; got {self.name}: {reason}.")

    def _parameters_to_predict(self, fixed: dict[str, Any]) -> dict[str, table.Parameter]:
        known = inspect.getattr_static(self.family, "arg_constraints")
        parameters = {n: table.describe(c) for n, c in known.items()} if isinstance(known, dict) else {}
        parameters |= table.PARAMETERS.get(self._pyro_name, {})
        for names in table.ALTERNATIVES:
            keep = next((n for n in names if n in fixed), next((n for n in names if n in parameters), None))
            for other in set(names) - {keep}:
                parameters.pop(other, None)
        arguments = inspect.signature(self.family.__init__).parameters
        sizes = {size for p in parameters.values() for size in p.shape if size != "k"}
        if unknown := sorted(set(fixed) - set(arguments) - sizes):
            raise ValueError(
                f"Expected arguments of {self.name} ({', '.join(list(arguments)[1:])}); got {', '.join(unknown)}."
            )
        required = [n for n, a in arguments.items() if a.default is a.empty and a.kind in (a.POSITIONAL_OR_KEYWORD,)]
        if missing := [n for n in (*required[1:], *sizes) if n not in parameters and n not in fixed]:
            self._refuse(f"it needs {', '.join(missing)}, which cannot be predicted: pass a fixed value")
        return parameters

    def _fix(self, fixed: dict[str, Any], parameters: dict[str, table.Parameter], k: int) -> None:
        """Stores fixed values: heads as submodules, numbers and tensors as buffers or parameters, others as options."""
        options: dict[str, Any] = {}
        self._heads = nn.ModuleDict()
        arguments, sizes = inspect.signature(self.family.__init__).parameters, {**fixed, "k": k}
        constraint = inspect.getattr_static(self.family, "arg_constraints")
        for name, value in fixed.items():
            if name not in arguments:
                continue  # a size, not an argument of the family
            if isinstance(value, Head):
                self._heads[name] = value
                continue
            if isinstance(value, Distribution):
                raise TypeError(f"Expected {name} to be a head; got a distribution {type(value).__name__}.")
            if name in parameters:
                shape = self._lead + tuple(sizes[size] for size in parameters[name].shape)
                value = fixed_value(name, value, shape, constraint.get(name, parameters[name].constraint))
                if parameters[name].shape and not isinstance(value, nn.Parameter):
                    value = value.expand(shape)  # families do not broadcast within vectors
            elif isinstance(value, float):
                value = torch.tensor(value, dtype=torch.float64, device="cpu")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                register_given(self, name, value)
            else:
                options[name] = value
        if "validate_args" in arguments:
            options.setdefault("validate_args", False)
        self._options = Constant(options)

    def _lay_out(self, parameters: dict[str, table.Parameter], sizes: dict[str, Any]) -> list[Part]:
        plan = []
        for name, (constraint, shape, bound) in parameters.items():
            if name in sizes:
                continue  # fixed
            if not constraints.is_dependent(constraint) and constraint.is_discrete:
                self._refuse(f"{name} is an integer, which cannot be predicted: pass a fixed value")
            value = tuple(sizes[size] for size in shape)
            raw, link = value, None if bound is None else self._link(name, constraint, bound)
            if constraint is constraints.lower_cholesky:
                raw, link = (value[0] * (value[0] + 1) // 2,), Cholesky(value[0], bound or 10.0)
            plan.append(Part(name, self._lead + value, self._lead + raw, link))
        return plan

    def _link(self, name: str, constraint: Any, bound: float) -> Callable[[Tensor], Tensor]:
        try:
            return Link(constraint, bound, table.OFFSETS.get(name, 0.0))
        except NotImplementedError:
            self._refuse(f"{name} has no map from real numbers: pass a fixed value")

    def _support(self, phi: Tensor) -> Any:
        d, dims = self(phi), len(self._lead)
        base = d.base_dist if dims else d
        support = table.SUPPORTS[self._pyro_name](base) if self._pyro_name in table.SUPPORTS else base.support
        return independent(support, dims)

    def _probe(self) -> None:
        """Constructs a distribution, and raises a ValueError if the family does not have what a head needs."""
        phi = torch.zeros(2, 3, self.num_params, dtype=torch.float64, device="cpu")
        try:
            with torch.random.fork_rng(devices=[]):  # keeps the user's random state
                d = self(phi)
                self.site_shape, self.has_rsample = tuple(d.event_shape), d.has_rsample
                value = d.sample()
            if d.batch_shape != (2, 3) or d.log_prob(value).shape != (2, 3) or value.shape != (2, 3, *self.site_shape):
                self._refuse("it does not support a batch of parameters")
        except (TypeError, AttributeError, RuntimeError, IndexError, AssertionError) as error:
            if str(error).startswith(_VMAP_ERRORS):
                raise  # unrelated to the family
            reason = f"no density or no sampler ({error})" if isinstance(error, NotImplementedError) else error
            raise ValueError(f"Expected a family that can be a head; got {self.name}: {reason}.") from error
        if len(self.site_shape) > 1:
            self._refuse(f"its values have shape {self.site_shape}, not () or (k,)")
        at_zero = tensors_in(self._support(phi[0, 0]))
        for part, where in zip(self._plan, phi[0, 0].split(self._sizes), strict=False):
            where += 1  # a view of phi
            moved = tensors_in(self._support(phi[0, 0]))
            where -= 1
            if not all(torch.equal(a, b) for a, b in zip(at_zero, moved, strict=True)):
                self._refuse(f"its support depends on {part.name}: pass a fixed value")
