"""CRF: a module with learned transitions whose call returns a linear-chain CRF."""

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
    """Module that maps contexts to a :class:`~pyro_genexact.distributions.LinearChainCRF` of labels.

    Its parameters are the potentials of the transitions and of both ends. A linear layer or another module computes the
    emissions, which are the potentials of labels at sites, from the context.

    Args:
        num_labels: V, the number of labels.
        context: C or ``Covariates(C)``, the number of features per site, for a linear layer from C to V; or a module
            that maps the context to emissions (*batch, N, V).
        allowed: Boolean (V, V), where [i, j] is True if label j may follow label i; by default all may.
        allowed_initial: Boolean (V), the labels that may come first; by default all.
        allowed_final: Boolean (V), the labels that may come last; by default all.

    Raises:
        TypeError: if a constraint is not Boolean, or ``context`` is neither an integer nor a module. In calls, if the
            emissions are not a tensor.
        ValueError: if a constraint has another shape. In calls, if the context has another width, or the emissions are
            not of V labels.

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
        """Returns the CRF given the context (*batch, N, C) and the lengths (*batch) of its rows."""
        if self.context:
            check_context(self, context)
        unary = self.emissions(context)
        check_kind("emissions", unary, Tensor)
        if unary.shape[-1:] != (self.num_labels,):
            raise ValueError(
                f"Expected emissions (*batch, N, {self.num_labels}) (num_labels); got {tuple(unary.shape)}."
            )
        transition = _only(self.transition, self.allowed)
        if unary.is_floating_point():  # emissions are narrower under autocast
            unary = unary.to(torch.promote_types(unary.dtype, transition.dtype))
        return LinearChainCRF(
            unary,
            # batched transitions are draws from a prior, each for all steps
            transition if transition.dim() == 2 else transition.unsqueeze(-3),
            initial=_only(self.initial, self.allowed_initial),
            final=_only(self.final, self.allowed_final),
            lengths=lengths,
        )


def _only(potentials: Tensor, allowed: Tensor | None) -> Tensor:
    return potentials if allowed is None else potentials.masked_fill(~allowed, -torch.inf)
