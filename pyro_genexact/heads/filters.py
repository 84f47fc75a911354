"""Decoding filters as heads: temperature, top-k, top-p, min-p and forbidden tokens, with renormalised probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, log
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from ..base import Head
from ..core.buffers import register_derived
from ..core.checks import check_numbers, check_sizes, check_widths
from ..core.functional import assert_later, checkable
from ..families.categorical import Categorical, log_probs, normalised
from .checks import check_distribution_head


class Filter(Head):
    """Base class of heads that change the token probabilities of another head.

    A subclass defines :meth:`filtered`. The filter has the parameters and the support of the wrapped head. Its
    distributions are Categorical; removed tokens remain in the support with log_prob -inf and gradient zero. Filters
    compose, and the innermost one is applied first: ``TopP(Tempered(head, 0.7), 0.9)``.

    The set of tokens that :class:`TopK`, :class:`TopP` and :class:`MinP` keep is a step function of phi, so gradients
    are those of the kept tokens. A token within rounding of the threshold may be kept when phi is computed site by
    site, but not when all sites are computed at once.

    Args:
        head: a head over the integers 0 ... V - 1, such as ``Categorical``, ``Bernoulli``, ``DiscretizedLogistic``, a
            mixture of these, or another filter.

    Attributes:
        head: the wrapped head.
        num_tokens: V.
        truncates: whether phi determines which tokens have mass.

    Raises:
        TypeError: if ``head`` is not a head over integers 0 ... V - 1.
        ValueError: if ``head`` is a ``PerSite``.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> class Squared(Filter):
        ...     def filtered(self, logits, first):
        ...         return 2 * logits
        >>> Squared(heads.Categorical(2))(torch.tensor([[1.0, 3.0]]).log()).probs
        tensor([[0.1000, 0.9000]])
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        if isinstance(head, Head) and head.num_sites is not None:
            advice = "" if isinstance(self, MinLength) else f" (use PerSite([{type(self).__name__}(...), ...]) instead)"
            raise ValueError(f"Expected head to treat all sites alike; got a PerSite{advice}.")
        self.num_tokens = _tokens_of(head)
        self.head, self.num_params = head, head.num_params

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The support of the wrapped head."""
        return self.head.support

    def forward(self, phi: Tensor, first: int = 0) -> Categorical:
        """Returns the Categorical of batch shape (*batch, S) for phi (*batch, S, P)."""
        return normalised(self.filtered(self._unfiltered(phi, first), first))

    def _unfiltered(self, phi: Tensor, first: int) -> Tensor:
        """Returns the log-probabilities (*batch, S, V) of the wrapped head, at least in float32."""
        logits = log_probs(self.head(phi, first))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        """Returns logits (*batch, S, V) given log-probabilities of that shape; -inf removes a token.

        ``first`` is the index of the first site.
        """
        raise TypeError(f"{type(self).__name__} must define filtered(logits, first)")

    def permuted(self, order: Tensor) -> Filter:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _modules={"head": self.head.permuted(order)})
        return new


class Tempered(Filter):
    """Raises probabilities to the power 1 / temperature and renormalises: q_v proportional to p_v^(1 / temperature).

    Temperatures below 1 give a more peaked distribution, and temperatures above 1 a flatter one.

    Args:
        head: a head over the integers 0 ... V - 1.
        temperature: a positive, finite number.

    Raises:
        TypeError: if ``head`` is not such a head, or ``temperature`` is not a number.
        ValueError: if ``temperature`` is not positive and finite.

    Reference: Ackley, Hinton, Sejnowski, "A learning algorithm for Boltzmann machines", Cognitive Science, 1985.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> Tempered(heads.Categorical(2), 0.5)(torch.tensor([[1.0, 3.0]]).log()).probs
        tensor([[0.1000, 0.9000]])
    """

    def __init__(self, head: Head, temperature: float) -> None:
        super().__init__(head)
        self.temperature = _number("temperature", temperature, inf)

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        # avoids a temperature that underflows to 0 in the dtype of the logits
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        return (logits - logits.detach().amax(-1, keepdim=True)) / temperature


class TopK(Filter):
    """Keeps the k most probable tokens and renormalises. Among equally probable tokens, smaller indices come first.

    Args:
        head: a head over the integers 0 ... V - 1.
        k: the number of tokens, at least 1; all tokens are kept if k >= V.

    Raises:
        TypeError: if ``head`` is not such a head.
        ValueError: if ``k`` is not a positive integer.

    Reference: Fan, Lewis, Dauphin, "Hierarchical neural story generation", ACL 2018.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> TopK(heads.Categorical(4), 2)(torch.tensor([[1.0, 4.0, 2.0, 2.0]]).log()).probs
        tensor([[0.0000, 0.6667, 0.3333, 0.0000]])
    """

    truncates = True

    def __init__(self, head: Head, k: int) -> None:
        super().__init__(head)
        check_sizes(1, k=k)
        self.k = k

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        k, p = min(self.k, self.num_tokens), logits.detach()
        least = p.topk(k).values[..., -1:]
        above, ties = p > least, p == least
        room = k - above.sum(-1, keepdim=True)
        return torch.where(above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= room)), logits, -inf)


class TopP(Filter):
    """Keeps the nucleus, the smallest set of most probable tokens with mass at least p, and renormalises.

    At least one token is kept. Among equally probable tokens, smaller indices come first.

    Args:
        head: a head over the integers 0 ... V - 1.
        p: a number with 0 < p <= 1; all tokens are kept if p is 1.

    Raises:
        TypeError: if ``head`` is not such a head, or ``p`` is not a number.
        ValueError: if ``p`` is not in (0, 1].

    Reference: Holtzman, Buys, Du, Forbes, Choi, "The curious case of neural text degeneration", ICLR 2020.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> TopP(heads.Categorical(3), 0.7)(torch.tensor([[0.1, 0.6, 0.3]]).log()).probs
        tensor([[0.0000, 0.6667, 0.3333]])
    """

    truncates = True

    def __init__(self, head: Head, p: float) -> None:
        super().__init__(head)
        self.p = _number("p", p, 1.0)

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        if self.p == 1:
            return logits
        ranked, order = logits.detach().sort(dim=-1, descending=True, stable=True)
        below = ranked.exp().flip(-1).cumsum(-1).flip(-1)  # the mass of a token and all less probable ones
        keep = pad(below[..., 1:] > 1 - self.p, (1, 0), value=True)
        return torch.where(torch.zeros_like(keep).scatter(-1, order, keep), logits, -inf)


class MinP(Filter):
    """Keeps the tokens that are at least p times as probable as the most probable one, and renormalises.

    Args:
        head: a head over the integers 0 ... V - 1.
        p: a number with 0 < p <= 1.

    Raises:
        TypeError: if ``head`` is not such a head, or ``p`` is not a number.
        ValueError: if ``p`` is not in (0, 1].

    Reference: Nguyen et al., "Turning up the heat: min-p sampling for creative and coherent LLM outputs", 2024.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> MinP(heads.Categorical(3), 0.4)(torch.tensor([[0.1, 0.6, 0.3]]).log()).probs
        tensor([[0.0000, 0.6667, 0.3333]])
    """

    truncates = True

    def __init__(self, head: Head, p: float) -> None:
        super().__init__(head)
        self.p = _number("p", p, 1.0)

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        p = logits.detach()
        return torch.where(p - p.amax(-1, keepdim=True) >= log(self.p), logits, -inf)


class _Without(Filter):
    """Excludes forbidden tokens and renormalises.

    If no allowed token has mass, ``forward`` raises a ValueError; on a device without validation, an assertion fails
    there. Under ``torch.func``, where values cannot be tested, and at phi = 0, which models use to probe a head, the
    distribution is then uniform on the allowed tokens.
    """

    def forward(self, phi: Tensor, first: int = 0) -> Categorical:
        logits = self._unfiltered(phi, first)
        some = torch.where(self.forbidden(logits, first), -inf, logits.detach()).amax(-1) > -inf
        if not checkable(some):
            assert_later(some | (phi == 0).all(), "Expected filters to leave tokens with mass; got none.")
        elif not some.all() and phi.any():
            row = (~some).nonzero()[0].tolist()
            raise ValueError(
                f"Expected {type(self).__name__} to leave tokens with mass; got none at {row} (batch, site). Apply it "
                "first, as in TopK(Forbid(head, tokens), k)."
            )
        return normalised(self.filtered(torch.where(some.unsqueeze(-1), logits, 0.0), first))

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        return torch.where(self.forbidden(logits, first), -inf, logits)

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        """Whether each token is forbidden, of a shape that broadcasts with the logits (*batch, S, V)."""
        raise TypeError(f"{type(self).__name__} must define forbidden(logits, first)")


class Forbid(_Without):
    """Excludes the given tokens and renormalises.

    Args:
        head: a head over the integers 0 ... V - 1.
        tokens: the tokens to exclude.

    Raises:
        TypeError: if ``head`` is not such a head, or ``tokens`` is not a collection.
        ValueError: if ``tokens`` contains anything but integers 0 ... V - 1, or all of these. Also by the call, if none
            of the other tokens has mass.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> Forbid(heads.Categorical(3), [1])(torch.tensor([[0.1, 0.6, 0.3]]).log()).probs
        tensor([[0.2500, 0.0000, 0.7500]])
    """

    def __init__(self, head: Head, tokens: Iterable[int] | Tensor) -> None:
        super().__init__(head)
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        if not isinstance(tokens, Iterable):
            raise TypeError(f"Expected tokens to be a collection of integers; got {tokens!r}.")
        tokens = list(tokens)
        check_widths(0, tokens=tokens)
        for token in tokens:
            _check_token("tokens", token, self.num_tokens)
        mask = [v in tokens for v in range(self.num_tokens)]
        if all(mask):
            raise ValueError(f"Expected tokens to leave at least one of {self.num_tokens}; got {tokens}.")
        self._forbidden: Tensor
        register_derived(self, "_forbidden", torch.tensor(mask, device="cpu"))

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        return self._forbidden.to(logits.device)


class MinLength(_Without):
    """Excludes the token ``eos`` at sites 0 ... n - 1, so that sequences have at least n tokens before it.

    Args:
        head: a head over the integers 0 ... V - 1.
        n: the smallest number of tokens before ``eos``.
        eos: the token that ends a sequence.

    Raises:
        TypeError: if ``head`` is not such a head.
        ValueError: if ``n`` is not an integer >= 0, or ``eos`` is not one of the tokens or the only one. Also by the
            call, if none of the other tokens has mass.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> MinLength(heads.Categorical(2), 1, eos=0)(torch.zeros(3, 2)).probs[:, 0]
        tensor([0.0000, 0.5000, 0.5000])
    """

    def __init__(self, head: Head, n: int, eos: int) -> None:
        super().__init__(head)
        check_sizes(0, n=n)
        _check_token("eos", eos, self.num_tokens)
        if n and self.num_tokens == 1:
            raise ValueError("Expected a head of at least two tokens; got eos only.")
        self.n, self.eos = n, eos

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        sites, tokens = (torch.arange(size, device=logits.device) for size in logits.shape[-2:])
        return (first + sites < self.n).unsqueeze(-1) & (tokens == self.eos)

    def permuted(self, order: Tensor) -> MinLength:
        raise ValueError("Expected a head that can be permuted; got MinLength, which counts the sites of sequences.")


def _tokens_of(head: Any) -> int:
    """Returns V for a head over the integers 0 ... V - 1.

    Raises:
        TypeError: if it is another head.
    """
    d = check_distribution_head(head)
    if not d.event_shape and d.has_enumerate_support:
        values = d.enumerate_support(expand=False).flatten()
        if values.is_meta or values.tolist() == list(range(len(values))):
            return len(values)
    raise TypeError(f"Expected a head over integers 0 ... V - 1; got a head of {type(d).__name__}.")


def _check_token(name: str, token: Any, num_tokens: int) -> None:
    check_sizes(0, **{name: token})
    if token >= num_tokens:
        raise ValueError(f"Expected {name} among 0 ... {num_tokens - 1} (the tokens of the head); got {token}.")


def _number(name: str, value: Any, most: float) -> float:
    check_numbers(**{name: value})
    if not (0 < value <= most and value < inf):
        raise ValueError(f"Expected 0 < {name} {'< inf' if most == inf else f'<= {most:g}'}; got {value}.")
    return value
