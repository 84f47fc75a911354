"""Guided: a model that is trained with and without its context, and whose samples follow the context more strongly."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from .base import Conditioner, DistributionModule, Head
from .conditioners.guided import GuidedConditioner
from .contexts import check_context
from .core.binding import Bound
from .core.checks import check_kind, check_numbers, check_sizes


class Guided(DistributionModule):
    """Trains a model with and without its context, and strengthens the effect of the context (classifier-free guidance).

    In training mode, the call replaces the context of each row by zeros with probability ``rate``, for all parts of the
    model at once. In eval mode, every conditioner of the model predicts

        phi = phi(x) + w (phi(x) - phi(0))

    with the weight w. The result is again a distribution with an exact density: w = 0 is the model given the context,
    w = -1 the model without it, and w > 0 exaggerates what the context changes. Give classes as one-hot vectors; the
    bias of the layer that reads them is then a learned embedding of "no class".

    Cost: that of the model; in eval mode with w other than 0, the conditioners evaluate twice the rows.

    Args:
        module: a flow or an autoregressive model with a context vector, whose conditioners read it directly.
        rate: the probability that a row loses its context in training mode.
        weight: w. :func:`~pyro_genexact.fit` validates with w = 0.

    Raises:
        TypeError: if ``module`` is not a :class:`DistributionModule`, or a number is none.
        ValueError: if the context of the module is not a vector, if a part reads it without a conditioner, or if ``rate``
            is outside [0, 1] or ``weight`` not finite.

    Reference: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022.

    Example:
        >>> import torch
        >>> from pyro_genexact import flows
        >>> model = Guided(flows.maf(2, context=3)).eval()
        >>> strong = model.with_weight(2.0)
        >>> strong(torch.eye(3)).sample().shape
        torch.Size([3, 2])
    """

    def __init__(self, module: DistributionModule, rate: float = 0.1, weight: float = 0.0) -> None:
        super().__init__()
        check_kind("module", module, DistributionModule)
        check_numbers(rate=rate, weight=weight)
        check_sizes(1, **{"module.context": module.context})
        if not 0 <= rate <= 1:
            raise ValueError(f"Expected 0 <= rate <= 1; got {rate}.")
        if not isfinite(weight):
            raise ValueError(f"Expected weight to be finite; got {weight}.")
        _places(module, module.context)
        self.module, self.rate, self.weight, self.context = module, float(rate), float(weight), module.context

    def forward(self, context: Tensor | None = None, **options: Any) -> Any:
        """Returns the distribution given the context (*batch, C); ``options`` are those of the module's call."""
        given: Any = check_context(self, context)
        if self.training:
            kept = torch.rand(given.shape[:-1], dtype=given.dtype, device=given.device) >= self.rate
            return self.module(torch.where(kept.unsqueeze(-1), given, 0.0), **options)
        if not self.weight:
            return self.module(given, **options)
        guided = Bound(self.module).copy()
        for parent, name, net in _places(guided, self.context):
            parent._modules[name] = GuidedConditioner(net, self.weight)
        return guided(given, **options)

    def with_weight(self, weight: float) -> Guided:
        """Returns the same model, sharing its parameters, with another weight."""
        new = Guided(self.module, self.rate, weight)
        new.training = self.training
        return new

    def for_validation(self) -> DistributionModule:
        """Returns the model without guidance, which :func:`~pyro_genexact.fit` evaluates on validation rows."""
        return self.module.for_validation()


def _places(module: nn.Module, context: Any) -> list[tuple[nn.Module, str, Conditioner]]:
    """Returns the outermost conditioners of this context, each with its parent and name.

    Heads are skipped, because the context of a model within a head is phi.

    Raises:
        ValueError: if a part with this context has no conditioner that reads it.
    """
    found: list[tuple[nn.Module, str, Conditioner]] = []
    for name, part in module._modules.items():  # with all names of a part that has several
        if isinstance(part, Conditioner):
            found += [(module, name, part)] if part.context == context else []
        elif part is not None and not isinstance(part, Head):
            found += _places(part, context)
    if not found and getattr(module, "context", 0) == context:
        raise ValueError(
            f"Expected module whose parts of context={context} have conditioners; got {type(module).__name__} without."
        )
    return found
