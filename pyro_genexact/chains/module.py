"""The learnable linear-chain CRF: a module whose call returns the distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base import DistributionModule
from ..contexts import Covariates, check_context
from ..core.buffers import register_given
from ..core.checks import check_kind, check_sizes
from .crf import LinearChainCRF


class CRF(DistributionModule):
    """A learnable linear-chain CRF: its call maps a sequence of contexts to a :class:`~pyro_genexact.distributions.LinearChainCRF` of labels.

    It owns the potentials of the transitions and of both ends; the emissions, potentials of the labels of a site, come from the
    context by a linear layer or any other module.

    Args:
        num_labels: V.
        context: C or ``Covariates(C)``, the features of a site, for a linear layer C -> V; or a module from the context to (*batch, N, V).
        allowed: (V, V) Boolean, [i, j] whether label j may follow label i; by default all.
        allowed_initial: (V) Boolean, which labels may come first.
        allowed_final: (V) Boolean, which may come last.

    Raises:
        ValueError: for constraints of another shape; in calls for a context of another width, or emissions of other than V labels.
        TypeError: for constraints that are not Boolean, a context that is neither integer nor module; in calls for emissions that
            are no tensor.

    Reference: Huang, Xu, Yu, "Bidirectional LSTM-CRF models for sequence tagging", 2015.

    Example:
        >>> import torch
        >>> model = CRF(3, context=8)
        >>> crf = model(torch.randn(5, 7, 8), lengths=torch.tensor([7, 7, 4, 1, 0]))
        >>> crf.log_prob(crf.mode).shape
        torch.Size([5])
    """

    transition: Tensor
    initial: Tensor
    final: Tensor
    allowed: Tensor | None
    allowed_initial: Tensor | None
    allowed_final: Tensor | None

    def __init__(
        self,
        num_labels: int,
        context: int | Covariates | nn.Module,
        *,
        allowed: Tensor | None = None,
        allowed_initial: Tensor | None = None,
        allowed_final: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_kind("num_labels", num_labels, int)
        check_sizes(1, num_labels=num_labels)
        self.num_labels = num_labels
        if isinstance(context, nn.Module):
            self.emissions = context
        else:
            width = context.features if isinstance(context, Covariates) else context
            if not isinstance(width, int):
                raise TypeError(f"Expected context to be an integer or a module; got {context}.")
            check_sizes(1, context=width)
            self.context, self.emissions = Covariates(width), nn.Linear(width, num_labels)
        sizes = {"transition": (num_labels, num_labels), "initial": (num_labels,), "final": (num_labels,)}
        for (name, size), constraint in zip(sizes.items(), (allowed, allowed_initial, allowed_final), strict=True):
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))
            argument = "allowed" if name == "transition" else f"allowed_{name}"
            if constraint is not None and (not isinstance(constraint, Tensor) or constraint.dtype != torch.bool):
                raise TypeError(
                    f"Expected {argument} to be a Boolean tensor; got {getattr(constraint, 'dtype', constraint)}."
                )
            if constraint is not None and tuple(constraint.shape) != size:
                raise ValueError(f"Expected {argument}.shape == {size} (labels); got {tuple(constraint.shape)}.")
            register_given(self, argument, constraint)

    def forward(self, context: Any = None, lengths: Tensor | None = None) -> LinearChainCRF:
        """The CRF given the context (*batch, N, C) and the lengths (*batch) of its rows."""
        if self.context:
            check_context(self, context)
        unary = self.emissions(context)
        check_kind("emissions", unary, Tensor)
        if unary.shape[-1:] != (self.num_labels,):
            raise ValueError(f"Expected emissions (*batch, N, {self.num_labels}) (labels); got {tuple(unary.shape)}.")
        transition = _only(self.transition, self.allowed)
        if unary.is_floating_point():  # narrower under autocast
            unary = unary.to(torch.promote_types(unary.dtype, transition.dtype))
        return LinearChainCRF(
            unary,
            transition if transition.dim() == 2 else transition.unsqueeze(-3),  # draws of a prior, each for all steps
            initial=_only(self.initial, self.allowed_initial),
            final=_only(self.final, self.allowed_final),
            lengths=lengths,
        )


def _only(potentials: Tensor, allowed: Tensor | None) -> Tensor:
    return potentials if allowed is None else potentials.masked_fill(~allowed, -torch.inf)
