"""Encoders of sets: DeepSet and SetTransformer, whose outputs do not depend on the order of the items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

from ..contexts import PaddedSequence
from ..core.checks import check_sizes
from ..core.functional import at_hand
from ..core.precision import at_least
from .base import Encoder, Readout, with_size


class SetEncoder(Encoder):
    """Base class of encoders of sets (*batch, N, F); a subclass defines :meth:`summaries`.

    The features are a function of the number n of items, the means of their standardised entries and the summaries. An
    item without any observed entry counts as absent, like those beyond a row's length.

    Args:
        inputs: F, the number of entries of an item.
        features: C, the number of features.
        outputs: W, the number of summaries.
        width: the width of the hidden layer that reads means and summaries.
    """

    event_dim = 2

    def __init__(self, inputs: int, features: int, outputs: int, width: int) -> None:
        super().__init__(inputs, features)
        self.readout = Readout(2 * inputs + outputs + 1, features, width)

    def summaries(self, items: Tensor, present: Tensor, count: Tensor) -> Tensor:
        """Returns summaries (B, W) of the items (B, N, 2F) that are present (B, N), given their number (B); 0 for none.

        The items are zero where ``present`` is False.
        """
        raise TypeError(f"{type(self).__name__} must define summaries(items, present, count)")

    def forward(self, values: Tensor | PaddedSequence) -> Tensor:
        """Returns features (*batch, C) of sets (*batch, N, F), the same for each order of the items."""
        found = self.entries(values)
        batch = found.z.shape[:-2]
        items, present = found.inputs.unsqueeze(0).flatten(0, -3), found.seen.any(-1).unsqueeze(0).flatten(0, -2)
        count = present.sum(-1)
        means = items.sum(-2) / count.clamp(min=1).unsqueeze(-1)
        summaries = torch.cat([means, self.summaries(items, present, count)], -1)
        return self.readout(with_size(summaries, count)).reshape(*batch, self.features)


class DeepSet(SetEncoder):
    """Encodes sets of any size: a network of each item, the mean over the items, and a network of the mean.

        c = readout([mean_i z_i, mean_i h(z_i), log(1 + n)])

    Here z_i is item i, standardised, with one more number per entry, which is 1 if the entry was observed and 0 if not.
    The features do not depend on the order of the items, up to rounding. The mean and the number of items n are separate
    inputs, because the location of a posterior is a function of means and its scale a power of n. One encoder thus
    serves sets of one item and of thousands. An empty set has means of zero.

    Values beyond a row's length are never read. NaN stands for a missing entry; an item whose entries are all missing
    counts as absent. Append a dim of size 1 to items that are numbers, and encode categories as one-hot vectors.

    Cost: O(n (F W + W^2)) operations per set. On the CPU, absent items cost nothing.

    Args:
        inputs: F, the number of entries of an item.
        features: C, the number of features.
        width: W, the width of the networks.

    Shapes: values (*batch, N, F), or a :class:`~pyro_genexact.PaddedSequence` of these and lengths (*batch), to features
    (*batch, C) of the dtype of the parameters. Integers and Booleans are converted.

    Raises:
        TypeError: in calls, if the values are not of such a kind, or lengths not integers.
        ValueError: if a size is not a positive integer. In calls, for values of another shape, dtype or device, and
            lengths of another shape or outside 0 ... N.

    References: Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, "Deep Sets", NeurIPS 2017; Radev, Mertens,
    Voss, Ardizzone, Köthe, "BayesFlow: Learning Complex Stochastic Models With Invertible Neural Networks", IEEE
    Transactions on Neural Networks and Learning Systems 2020 (with the number of items, for posteriors).

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> simulated = torch.randn(100, 20, 1)
        >>> encoder = DeepSet(1, 8).standardize(simulated)
        >>> encoder(simulated).shape
        torch.Size([100, 8])
        >>> encoder(gx.PaddedSequence(simulated[:2], torch.tensor([20, 3]))).shape
        torch.Size([2, 8])
    """

    def __init__(self, inputs: int, features: int, *, width: int = 64) -> None:
        check_sizes(1, inputs=inputs, width=width)
        super().__init__(inputs, features, width, width)
        self.width = width
        self.items = nn.Sequential(nn.Linear(2 * inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.features}, width={self.width}"

    def summaries(self, items: Tensor, present: Tensor, count: Tensor) -> Tensor:
        if at_hand(present) and not present.all():
            h = at_least(self.items(items[present]), items)
            total = h.new_zeros(len(items), self.width).index_add(0, present.nonzero()[:, 0], h)
        else:
            h = at_least(self.items(items), items)
            total = torch.where(present.unsqueeze(-1), h, 0.0).sum(-2)
        return total / count.clamp(min=1).unsqueeze(-1)


class SetTransformer(SetEncoder):
    """Encodes sets of any size by attention: learned queries attend to the items.

        x_i = in(z_i),      x = layer(x) (``depth`` times),      s = attend(queries, x),
        c = readout([mean_i z_i, s, log(1 + n)])

    The items z_i are those of :class:`DeepSet`. In each layer, learned points attend to the items, and the items attend
    to these points, so that items influence each other at a cost linear in n. With ``depth=0`` each query is a weighted
    mean of functions of single items. The features do not depend on the order of the items, up to rounding. The
    summaries s of an empty set are zero.

    Use it instead of :class:`DeepSet` if what an item says depends on the other items, as for outliers or clusters.
    Padding and missing entries are treated as there.

    Cost: O(n W (W + points)) operations per layer and set, padding included.

    Args:
        inputs: F, the number of entries of an item.
        features: C, the number of features.
        width: W, the width of the layers, a multiple of ``num_heads``.
        num_heads: the number of attention heads.
        depth: the number of layers before the pooling, at least 0.
        points: the number of learned points of a layer.
        queries: the number of learned queries that pool the items.

    Shapes and errors: as :class:`DeepSet`; a ValueError also if ``num_heads`` does not divide ``width``.

    Reference: Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant
    Neural Networks", ICML 2019.

    Example:
        >>> import torch
        >>> SetTransformer(2, 8, width=16)(torch.randn(5, 30, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        *,
        width: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        points: int = 16,
        queries: int = 4,
    ) -> None:
        check_sizes(1, inputs=inputs, width=width, num_heads=num_heads, points=points, queries=queries)
        check_sizes(0, depth=depth)
        if width % num_heads:
            raise ValueError(f"Expected width to be a multiple of num_heads; got {width} and {num_heads}.")
        super().__init__(inputs, features, queries * width, width)
        self.width, self.num_heads, self.depth = width, num_heads, depth
        self.read = nn.Linear(2 * inputs, width)
        self.points = nn.ParameterList(torch.randn(points, width) for _ in range(depth))
        self.gather: Any = nn.ModuleList(Attend(width, num_heads) for _ in range(depth))
        self.spread: Any = nn.ModuleList(Attend(width, num_heads) for _ in range(depth))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.pool = Attend(width, num_heads)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.features}, width={self.width}, num_heads={self.num_heads}, depth={self.depth}"

    def summaries(self, items: Tensor, present: Tensor, count: Tensor) -> Tensor:
        some = (count > 0).unsqueeze(-1)
        if not items.shape[1]:
            items, present = items.new_zeros(len(items), 1, items.shape[2]), present.new_zeros(len(items), 1)
        allowed = (present | ~some)[:, None, None]  # without a step to attend to, softmax is not defined
        x = self.read(items)
        for points, gather, spread in zip(self.points, self.gather, self.spread, strict=True):
            x = spread(x, gather(points.expand(len(x), -1, -1), x, allowed), None)
        pooled = at_least(self.pool(self.queries.expand(len(x), -1, -1), x, allowed).flatten(1), items)
        return torch.where(some, pooled, 0.0)


class Attend(nn.Module):
    """A layer of :class:`SetTransformer`: x + attention(norm(x), norm(items)), then y + mlp(norm(y))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.norm_items, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.mix = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, items: Tensor, allowed: Tensor | None) -> Tensor:
        """Maps x (B, S, W) to (B, S, W), given items (B, N, W), those that are allowed (B, 1, 1, N) or None for all."""
        query = self._heads(self.query(self.norm(x)))
        key, value = map(self._heads, self.key_value(self.norm_items(items)).chunk(2, -1))
        x = x + self.mix(attention(query, key, value, allowed).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
