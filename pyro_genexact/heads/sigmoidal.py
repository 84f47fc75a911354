"""Heads of bijections that are composed of sigmoids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..base import Head
from ..core.checks import check_positive, check_sizes
from ..transforms.monotone import Monotone
from .parameters import bounded


class DeepSigmoid(Head):
    """The deep sigmoidal flow (DSF) y = logit(sum_k w_k sigmoid(a_k x + b_k)); the dense one (DDSF) with more layers.

    Each layer maps h to logit(sum_k W_jk sigmoid(a_k h_k + b_k)) for J outputs, with J = K units, or J = 1 in the last
    layer; all units of the first layer read x. All parameters come from phi: the rows of W are softmaxes, and
    log a = bound tanh(raw / bound). At phi = 0, a = 1, W is uniform and b is spread over (-1, 1), so that the units
    differ. The slope in the tails is the smallest a, or a product of these over the layers.

    P = 3 K + (layers - 1) (2 K + K^2). Cost: 2 K sigmoids per layer and K^2 terms between layers. The inverse takes
    four to eight times as long for phi with a standard deviation up to 1, and about 15 to 25 times for 3.

    Args:
        units: K.
        layers: 1 gives DSF; more give DDSF without the paper's matrices u before the sigmoids.
        bound: the bound of log a, positive.

    Raises:
        ValueError: if ``units`` or ``layers`` is not a positive integer, or ``bound`` is not positive and finite.

    Reference: Huang, Krueger, Lacoste, Courville, "Neural Autoregressive Flows", ICML 2018.

    Example:
        >>> import torch
        >>> head = DeepSigmoid(units=4)
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> t.inv(torch.tensor([0.0, 10.0, 1e6]))[0]
        tensor([0.0000e+00, 1.0151e+01, 1.0000e+06])
    """

    def __init__(self, units: int = 8, layers: int = 1, bound: float = 5.0) -> None:
        super().__init__()
        check_sizes(1, units=units, layers=layers)
        check_positive(bound=bound)
        self.units, self.layers, self.bound = units, layers, bound
        self._sizes = [units, units, units * units] * (layers - 1) + [units] * 3
        self.num_params = sum(self._sizes)

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of one layer in the native loop, unless a subclass changed the head."""
        unchanged = type(self).forward is DeepSigmoid.forward
        return ("deep_sigmoid", [self.units, self.bound]) if unchanged and self.layers == 1 else None

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        spread, parts = _spread(self.units, phi), phi.split(self._sizes, -1)
        tensors: list[Tensor] = []
        for raw, b, w in zip(*(parts[i::3] for i in range(3)), strict=True):
            log_a = bounded(raw, self.bound)
            rows = w.unflatten(-1, (w.shape[-1] // self.units, self.units))
            tensors += [log_a.exp(), b + spread, log_a, (rows - rows.logsumexp(-1, keepdim=True)).flatten(-2)]
        return Monotone(deep_sigmoid, tensors)


class LogisticMixtureCDF(Head):
    """The coupling function of Flow++, y = exp(s) logit(sum_k pi_k sigmoid((x - mu_k) / s_k)) + m.

    phi contains m, s, the K logits of pi, the mu_k and the log s_k; s and log s_k are bounded as bound tanh(raw /
    bound). At phi = 0 the s_k are 1 and the mu_k are spread over (-1, 1), so that the components differ.

    P = 3 K + 2. Cost: 2 K sigmoids; the inverse costs as much as that of :class:`DeepSigmoid`.

    Args:
        components: K.
        bound: the bound of s and of the log s_k, positive.

    Raises:
        ValueError: if ``components`` is not a positive integer, or ``bound`` is not positive and finite.

    Reference: Ho, Chen, Srinivas, Duan, Abbeel, "Flow++: Improving Flow-Based Generative Models with Variational
    Dequantization and Architecture Design", ICML 2019.

    Example:
        >>> import torch
        >>> head = LogisticMixtureCDF(components=4)
        >>> t = head(torch.zeros(5, 3, head.num_params))
        >>> t.inv(torch.tensor([0.0, 10.0, 1e6]))[0]
        tensor([0.0000e+00, 1.0151e+01, 1.0000e+06])
    """

    def __init__(self, components: int = 8, bound: float = 5.0) -> None:
        super().__init__()
        check_sizes(1, components=components)
        check_positive(bound=bound)
        self.components, self.bound, self.num_params = components, bound, 3 * components + 2

    def forward(self, phi: Tensor, first: int = 0) -> Monotone:
        """Returns the transform of values (*batch, S) for phi (*batch, S, P)."""
        K = self.components
        shift, raw, logits, mu = phi.split([1, K + 1, K, K], -1)
        log_scale, log_s = bounded(raw, self.bound).split([1, K], -1)
        a, log_pi = torch.exp(-log_s), logits - logits.logsumexp(-1, keepdim=True)
        b = -a * (mu + _spread(K, phi))
        return Monotone(logistic_mixture, [shift, log_scale, a, b, -log_s, log_pi])


def deep_sigmoid(x: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    """Computes y = h_L and log dy/dx, with h_0 = x and h_j = logit(sum_k W_jk sigmoid(a_k h_k + b_k)) in each layer.

    Logarithms of the probability and of its complement keep both tails accurate. With the shares r_jk of unit k in the
    probability and q_jk in its complement, dh_j = sum_k a_k r_jk q_jk / W_jk dh_k, which in the tails is a mean of the
    a_k dh_k.

    Args:
        x: (*batch) values.
        *layers: four tensors per layer, a, b and log a (*batch, K), and log W (*batch, J K), with J = 1 in the last
            layer.
    """
    h, slope = x.unsqueeze(-1), None
    for a, b, log_a, log_w in zip(*(layers[i::4] for i in range(4)), strict=True):
        z = torch.addcmul(b, a, h)
        units = z.shape[-1]
        log_w = log_w.unflatten(-1, (log_w.shape[-1] // units, units))
        log_a = log_a if slope is None else log_a + slope
        both = torch.stack([logsigmoid(z), logsigmoid(-z)], -2)
        sides = both.unsqueeze(-2) + log_w.unsqueeze(-3)  # (*batch, 2, J, K)
        peak = sides.detach().amax(-1, keepdim=True)
        sides = sides - peak  # subtracted first, so that rounding of large numbers does not affect the shares
        total = sides.exp().sum(-1, keepdim=True).log()
        up, down = (total + peak).squeeze(-1).unbind(-2)
        slope = ((sides - total).sum(-3) - log_w + log_a.unsqueeze(-2)).logsumexp(-1)
        h = up - down
    return h.squeeze(-1), slope.squeeze(-1)  # type: ignore[union-attr]


def logistic_mixture(x: Tensor, shift: Tensor, log_scale: Tensor, *layer: Tensor) -> tuple[Tensor, Tensor]:
    """Computes exp(s) h + m and its log-derivative, with h of :func:`deep_sigmoid`; m and s have shape (*batch, 1)."""
    h, slope = deep_sigmoid(x, *layer)
    s = log_scale.squeeze(-1)
    return torch.addcmul(shift.squeeze(-1), h, s.exp()), slope + s


def _spread(count: int, like: Tensor) -> Tensor:
    """Returns evenly spaced numbers in (-1, 1) that are symmetric about 0."""
    return torch.arange(1 - count, count, 2, dtype=like.dtype, device=like.device) / count
