"""Shared parts of conditioners: site encoders, dense layers, contexts and padding masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding

from ..base import Conditioner, Site
from ..contexts import PaddedSequence, unpadded
from ..core.binding import Bound, ModuleT
from ..core.checks import check_like, check_sizes, check_widths, permutation
from ..core.functional import checkable, compiling
from ..core.lengths import checked_lengths, present
from .checks import check_callable, check_rows


class SiteEncoder(nn.Module):
    """Encodes sites as network inputs: embeds categories, and passes real numbers and vectors through.

    Args:
        site: an integer V, ``()`` or ``(k,)``.
        width: width of the embedding of categories.

    Maps (B, S, *site_shape) to (B, S, features), where ``features`` is the width, or the number of elements of a site.

    Raises:
        ValueError: if ``site`` is a list or of another kind, or a size is not a positive integer.

    Example:
        >>> import torch
        >>> encoder = SiteEncoder(5, width=8)
        >>> encoder(torch.zeros(2, 3, dtype=torch.long), like=torch.zeros(1)).shape
        torch.Size([2, 3, 8])
        >>> SiteEncoder((), width=8).features
        1
    """

    def __init__(self, site: Site, width: int) -> None:
        super().__init__()
        if isinstance(site, list):
            raise ValueError(f"Expected site to be one kind, the same at every site; got {site}.")
        (numbers,) = site_widths(site, 1)
        check_sizes(1, width=width)
        self.site, self.features = site, width if isinstance(site, int) else numbers
        self.weight = nn.Parameter(torch.randn(site, width)) if isinstance(site, int) else None

    def forward(self, y: Tensor, like: Tensor) -> Tensor:
        """Encodes y; real sites must have the dtype and device of the parameter ``like``."""
        if self.weight is not None:
            return embedding(labels_of(y, self.site), self.weight)  # type: ignore[arg-type]
        check_like("y", y, like)
        return y if self.site else y.unsqueeze(-1)


class Dense(nn.Module):
    """Dense network; the last layer starts small, so that heads start near phi = 0.

    Args:
        inputs: number of inputs.
        outputs: number of outputs.
        hidden: widths of the hidden layers.
        activation: elementwise activation of the hidden layers.

    Example:
        >>> import torch
        >>> Dense(3, 4, hidden=(8,), activation=torch.relu)(torch.zeros(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int], activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        check_widths(1, hidden=hidden)
        check_callable(activation)
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(below, above) for below, above in zip(widths, hidden, strict=False))
        self.last, self.activation = small_linear(widths[-1], outputs), activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.last(x)


def small_linear(inputs: int, outputs: int) -> nn.Linear:
    """Returns a linear layer with a tenth of the usual initial weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


def share(inputs: int, outputs: int, shares: int, bias: bool = True) -> nn.Linear:
    """Returns a linear layer, scaled such that ``shares`` of them add up to the variance of one standard layer."""
    layer = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        layer.weight.mul_(shares**-0.5)
    return layer


def encode(y: Tensor, site: Site | Sequence[Site], first: int, like: Any) -> Tensor:
    """Encodes sites (B, S, *site_shape), the first at ``first``, as numbers (B, features), with one-hot categories."""
    if isinstance(site, tuple):
        check_like("y", y, like)
        return y.flatten(1)
    if isinstance(site, int):
        return _one_hot(y, site, like).flatten(1)
    kinds = site[first : first + y.shape[1]]
    columns = [
        _one_hot(y[:, i], kind, like) if isinstance(kind, int) else y[:, i, None].to(like.dtype)
        for i, kind in enumerate(kinds)
    ]
    return torch.cat(columns, 1) if columns else like.new_empty(y.shape[0], 0)


def _one_hot(y: Tensor, categories: int, like: Tensor) -> Tensor:
    # torch's one_hot reads the values, which synchronises with a GPU and fails under torch.func
    labels = labels_of(y, categories).unsqueeze(-1)
    return (labels == torch.arange(categories, device=labels.device)).to(like.dtype)


def labels_of(y: Tensor, categories: int) -> Tensor:
    """Returns categories as integers; raises a ValueError if values are not integers or out of range.

    Without validation, it does not read values on a device: the callers replace values outside the support before.
    """
    labels = y.long()
    if not y.numel() or not checkable(y):
        return labels
    if y.is_floating_point() and (labels != y).any():
        raise ValueError(
            f"Expected integers 0 ... {categories - 1} at a site with {categories} categories; got {y[labels != y][0]}."
        )
    low, high = (int(bound) for bound in labels.aminmax())
    if not 0 <= low <= high < categories:
        raise ValueError(
            f"Expected integers 0 ... {categories - 1} at a site with {categories} categories; got {low} ... {high}."
        )
    return labels


def site_kinds(site: Site | Sequence[Site], num_sites: int) -> list[Site]:
    """Returns the kind of each of T sites.

    Raises:
        ValueError: for invalid kinds, and for a list of another length or with vectors.
    """
    kinds = list(site) if isinstance(site, list) else [site] * num_sites
    if len(kinds) != num_sites or (isinstance(site, list) and not all(k == () or isinstance(k, int) for k in kinds)):
        raise ValueError(
            f"Expected site to be one kind or a list of {num_sites} scalar kinds, () or an integer; got {site}."
        )
    for kind in kinds:
        if not isinstance(kind, (int, tuple)) or (isinstance(kind, tuple) and len(kind) > 1):
            raise ValueError(f"Expected site to be (), (k,) or an integer; got {kind}.")
        (check_sizes if isinstance(kind, int) else check_widths)(1, site=kind)
    return kinds  # type: ignore[return-value]


def site_widths(site: Site | Sequence[Site], num_sites: int) -> list[int]:
    """Returns the number of network inputs of each site."""
    return [kind if isinstance(kind, int) else prod(kind) for kind in site_kinds(site, num_sites)]


def dropped(x: Tensor, module: Any) -> Tensor:
    """Applies dropout at rate ``module.dropout`` in training mode."""
    return dropout(x, module.dropout) if module.dropout and module.training else x


def new_conditioner(make: Any, num_params: int, context: int) -> Conditioner:
    """Returns the conditioner that the callable makes.

    Raises:
        TypeError: if ``make`` is not such a callable or returns something else.
        ValueError: if the conditioner has other sizes.
    """
    expected = "Expected conditioner to be a callable (num_params, context) that makes one"
    if isinstance(make, nn.Module) or not callable(make):  # conditioners are callable, too
        raise TypeError(f"{expected}; got {type(make).__name__}.")
    try:
        inspect.signature(make).bind(num_params, context)
    except ValueError:  # a builtin has no signature
        pass
    except TypeError as error:
        name = getattr(make, "__name__", type(make).__name__)
        raise TypeError(f"{expected}; got {name}{inspect.signature(make)}.") from error
    net = make(num_params, context)
    if not isinstance(net, Conditioner):
        raise TypeError(f"Expected conditioner(num_params, context) to be a Conditioner; got {type(net).__name__}.")
    if (found := (net.num_params, net.context)) != (num_params, context):
        raise ValueError(f"Expected a conditioner of (num_params, context) == {num_params, context}; got {found}.")
    return net


def resumed(state: Any) -> Any:
    """Returns the state; with grad on, clones tensors from inference mode, which autograd cannot save."""
    return type(state)(*map(_copied_out, state)) if torch.is_grad_enabled() and not compiling() else state


def _copied_out(field: Any) -> Any:
    if isinstance(field, Tensor):
        return field.clone() if field.is_inference() else field
    return tuple(map(_copied_out, field)) if type(field) is tuple else field


def covariates(context: Tensor, first: int, sites: int) -> Tensor:
    """Returns the context (B, S, C) of S sites from ``first`` on, given a context (B, C) or covariates (B, T, C)."""
    if context.dim() == 2:
        return context.unsqueeze(1).expand(-1, sites, -1)
    if first + sites > context.shape[1]:
        raise ValueError(
            f"Expected context.shape[1] >= {first + sites} (covariates of all sites); got {tuple(context.shape)}."
        )
    return context[:, first : first + sites]


def joined(inputs: Tensor, context: Tensor | None, first: int) -> Tensor:
    """Concatenates the inputs and the covariates of each site to (B, S, features + C)."""
    return inputs if context is None else torch.cat([inputs, covariates(context, first, inputs.shape[1])], -1)


def with_tensors(module: ModuleT, **tensors: Tensor) -> ModuleT:
    """Returns a bound copy of a module in which the given tensors replace its parameters."""
    bound = Bound(module).copy()
    kinds = (
        cls for cls in type(module).__mro__ if not any(isinstance(getattr(cls, n, None), property) for n in tensors)
    )
    if type(module) is not (kind := next(kinds)):  # a parametrised weight is a property, which would hide the tensor
        bare: ModuleT = object.__new__(kind)
        bare.__dict__.update(bound.__dict__)
        bound = bare
    for name, tensor in tensors.items():
        bound.__dict__.pop(name, None)  # PyroSample stores its value here
        bound._parameters[name] = tensor  # type: ignore[assignment]
    return bound


def source_steps(context: Tensor | PaddedSequence, rows: int) -> tuple[Tensor, Tensor | None]:
    """Returns the steps (B, S, C) of a source, zero at padding, with S >= 1; and the steps (B, 1, S) to attend to.

    The second value is None if every row attends to all steps. A row without steps attends to zeros.
    """
    values, lengths = unpadded(context)
    check_rows("context", values, rows, "the batch")
    if values.dim() != 3:
        raise ValueError(
            f"Expected context.shape == ({rows}, S, {values.shape[-1]}) (sources); got {tuple(values.shape)}."
        )
    if not values.shape[1]:
        return values.new_zeros(rows, 1, values.shape[2]), None
    if lengths is None:
        return values, None
    lengths = checked_lengths(lengths, values.shape[1], "context.lengths", "steps of the source")
    if lengths.shape != values.shape[:1]:
        raise ValueError(
            f"Expected context.lengths.shape == ({rows},) (rows of the batch); got {tuple(lengths.shape)}."
        )
    steps = present(lengths, values, -2)
    allowed = steps.squeeze(2) | (lengths == 0).unsqueeze(1)
    return torch.where(steps, values, 0.0), allowed.unsqueeze(1)


def visits(conditioner: Conditioner, order: Tensor, like: Tensor, *widths: int) -> list[Tensor]:
    """Returns index tensors (T * w,), one per width w, that reorder w rows per variable into visiting order."""
    site, name = conditioner.site, type(conditioner).__name__
    if isinstance(site, list) and any(kind != site[0] for kind in site):
        raise ValueError(f"Expected site to be one kind, to permute the sites of {name}; got {site}.")
    order = permutation(order, conditioner.num_sites).to(like.device)  # type: ignore[arg-type]
    return [(order[:, None] * w + torch.arange(w, device=order.device)).flatten() for w in widths]
