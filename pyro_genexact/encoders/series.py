"""Series: an encoder of series of any length, by a conditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner
from ..conditioners.recurrent import Recurrent
from ..contexts import PaddedSequence, unpadded
from ..core.checks import check_sizes
from .base import Encoder, Readout, with_size


class Series(Encoder):
    """Encodes series of any length: a conditioner reads all steps, and predicts the features after the last one.

        s = phi_{n+1}(z_1, ..., z_n),      c = readout([s, log(1 + n)])

    Here z_t is step t, standardised, with one more number per entry, which is 1 if the entry was observed and 0 if not.
    The parameters phi_t of a conditioner are a function of the steps before t only. So all conditioners for sequences
    serve as encoders, values beyond a row's length are never read, and a series of length 0 has the parameters of the
    first site. NaN stands for a missing entry. A step without observed entries still counts as a step of time.

    Cost: a parallel pass of the conditioner over N + 1 steps.

    Args:
        inputs: F, the number of entries of a step.
        features: C, the number of features.
        conditioner: callable (site, num_params) that makes the network, such as
            ``functools.partial(CausalConv, dilations=(1, 2, 4, 8))``, which reads the last 16 steps. Its ``max_len``, if it
            has one, must be larger than N.
        width: the number of parameters per site that the conditioner predicts, and the width of the hidden layer that
            reads them.

    Shapes: values (*batch, N, F), or a :class:`~pyro_genexact.PaddedSequence` of these and lengths (*batch), to features
    (*batch, C) of the dtype of the parameters. Integers and Booleans are converted.

    Raises:
        TypeError: if ``conditioner`` does not return a conditioner. In calls, as :class:`DeepSet`.
        ValueError: if a size is not a positive integer, or the conditioner has a fixed number of sites or a context. In
            calls, as :class:`DeepSet`, and for more than ``max_len - 1`` steps.

    References: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014; Radev, Mertens, Voss,
    Ardizzone, Köthe, "BayesFlow: Learning Complex Stochastic Models With Invertible Neural Networks", IEEE Transactions on
    Neural Networks and Learning Systems 2020 (networks of series, for posteriors).

    Example:
        >>> import functools, torch
        >>> from pyro_genexact.conditioners import CausalConv
        >>> Series(2, 8)(torch.randn(5, 30, 2)).shape
        torch.Size([5, 8])
        >>> network = functools.partial(CausalConv, dilations=(1, 2, 4, 8))
        >>> Series(2, 8, conditioner=network)(torch.randn(5, 30, 2)).shape
        torch.Size([5, 8])
    """

    event_dim = 2

    def __init__(
        self, inputs: int, features: int, *, conditioner: Callable[[Any, int], Conditioner] = Recurrent, width: int = 64
    ) -> None:
        super().__init__(inputs, features)
        check_sizes(1, width=width)
        if not callable(conditioner):
            raise TypeError(f"Expected conditioner to be callable; got {type(conditioner).__name__}.")
        net = conditioner((2 * inputs,), width)
        if not isinstance(net, Conditioner):
            raise TypeError(f"Expected conditioner(site, num_params) to be a Conditioner; got {type(net).__name__}.")
        if net.num_sites is not None or net.context:
            raise ValueError(
                f"Expected a conditioner of sequences without context; got num_sites={net.num_sites}, "
                f"context={net.context}."
            )
        self.conditioner, self.readout = net, Readout(width + 1, features, width)

    def forward(self, values: Tensor | PaddedSequence) -> Tensor:
        """Returns features (*batch, C) of series (*batch, N, F)."""
        steps = self.entries(values).inputs
        batch, (length, width) = steps.shape[:-2], steps.shape[-2:]
        _, lengths = unpadded(values)
        count = torch.full(batch, length, device=steps.device) if lengths is None else lengths.long()
        after = torch.cat([steps, steps.new_zeros(*batch, 1, width)], -2)  # the site after the last step
        phi = self.conditioner(after.unsqueeze(0).flatten(0, -3))
        last = count.reshape(-1, 1, 1).expand(-1, 1, phi.shape[-1])
        summaries = phi.gather(1, last).reshape(*batch, phi.shape[-1]).to(steps.dtype)
        return self.readout(with_size(summaries, count))
