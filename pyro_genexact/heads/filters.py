"""Decoding rules as heads: temperature, top-k, top-p, min-p, forbidden tokens; renormalised."""

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
from ..core.functional import visible
from ..families.categorical import Categorical, log_probs, normalised
from .checks import check_distribution_head


class Filter(Head):
    """A head whose tokens 0 ... V - 1 get other probabilities; it has the parameters and the support of the one it wraps.

    Its distributions are Categorical, with log_prob -inf (gradient zero) for tokens that are filtered out: values of the
    support without mass. Filters compose, the innermost comes first: ``TopP(Tempered(head, 0.7), 0.9)``.

    Which tokens :class:`TopK`, :class:`TopP` and :class:`MinP` keep is a step function of phi, whose gradient is that of the
    kept tokens alone; a token within rounding of the border may be kept when phi comes site by site, and not when a
    network computes all sites at once.

    Args:
        head: of the integers 0 ... V - 1 (``Categorical``, ``Bernoulli``, ``DiscretizedLogistic``, mixtures, filters, ...).

    Attributes:
        head: the one that is wrapped.
        num_tokens: V.
        truncates: whether phi decides which tokens have mass.

    Raises:
        TypeError: for a head of anything else.
        ValueError: for a ``PerSite``.
    """

    truncates = False

    def __init__(self, head: Head) -> None:
        super().__init__()
        if isinstance(head, Head) and head.num_sites is not None:
            name = type(self).__name__
            raise ValueError(
                f"Expected head to treat all sites alike; got a PerSite (make it PerSite([{name}(...), ...]))."
            )
        self.num_tokens = _tokens_of(head)
        self.head, self.num_params = head, head.num_params

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """That of the wrapped head."""
        return self.head.support

    def forward(self, phi: Tensor, first: int = 0) -> Categorical:
        """phi (*batch, S, P) to the Categorical of batch shape (*batch, S)."""
        return normalised(self.filtered(self._unfiltered(phi, first), first))

    def _unfiltered(self, phi: Tensor, first: int) -> Tensor:
        """Log-probabilities (*batch, S, V) of the wrapped head, in float32 at least."""
        logits = log_probs(self.head(phi, first))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        """Logits (*batch, S, V) from log-probabilities, -inf for tokens that are filtered out."""
        raise TypeError(f"{type(self).__name__} must define filtered(logits, first)")

    def permuted(self, order: Tensor) -> Filter:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _modules={"head": self.head.permuted(order)})
        return new


class Tempered(Filter):
    """Probabilities to the power of 1 / temperature, renormalised: below 1 more peaked, above 1 flatter.

    Args:
        head: of the integers 0 ... V - 1.
        temperature: positive and finite.

    Raises:
        ValueError: for another temperature.

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
        # which underflows to 0 in fewer bits
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        return (logits - logits.detach().amax(-1, keepdim=True)) / temperature


class TopK(Filter):
    """The k most probable tokens; of equally probable ones at the border those that come first. All, if k >= V.

    Args:
        head: of the integers 0 ... V - 1.
        k: at least 1.

    Raises:
        ValueError: for another k.

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
    """The nucleus: the smallest set of tokens that has at least mass p; of equally probable ones those that come first.

    At least one token; all of them, if p is 1.

    Args:
        head: of the integers 0 ... V - 1.
        p: above 0, at most 1.

    Raises:
        ValueError: for another p.

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
        below = ranked.exp().flip(-1).cumsum(-1).flip(-1)  # a token's mass and that of the less probable ones
        keep = pad(below[..., 1:] > 1 - self.p, (1, 0), value=True)
        return torch.where(torch.zeros_like(keep).scatter(-1, order, keep), logits, -inf)


class MinP(Filter):
    """The tokens that are at least p times as probable as the most probable one.

    Args:
        head: of the integers 0 ... V - 1.
        p: above 0, at most 1.

    Raises:
        ValueError: for another p.

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
    """The tokens that are not forbidden.

    Where none of them has mass, a ValueError; but uniform on them without values to look at (torch.func), and at phi = 0,
    which models try to learn what a head makes.
    """

    def forward(self, phi: Tensor, first: int = 0) -> Categorical:
        logits = self._unfiltered(phi, first)
        some = torch.where(self.forbidden(logits, first), -inf, logits.detach()).amax(-1) > -inf
        if visible(some) and not some.all() and phi.any():
            row = (~some).nonzero()[0].tolist()
            raise ValueError(
                f"Expected {type(self).__name__} to leave tokens with mass; got none at {row} (batch, site): let it come "
                "first, as in TopK(Forbid(head, tokens), k)."
            )
        return normalised(self.filtered(torch.where(some.unsqueeze(-1), logits, 0.0), first))

    def filtered(self, logits: Tensor, first: int) -> Tensor:
        return torch.where(self.forbidden(logits, first), -inf, logits)

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        """Which tokens are, of a shape that broadcasts with the logits (*batch, S, V)."""
        raise TypeError(f"{type(self).__name__} must define forbidden(logits, first)")


class Forbid(_Without):
    """No token of some: the others, given that it is none of these.

    Args:
        head: of the integers 0 ... V - 1.
        tokens: those without mass.

    Raises:
        TypeError: for tokens that are no collection.
        ValueError: for tokens that are no integers 0 ... V - 1, or all of these. When called, where all other tokens have no
            mass either.

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
            raise ValueError(f"Expected tokens to leave one of {self.num_tokens}; got {tokens}.")
        self._forbidden: Tensor
        register_derived(self, "_forbidden", torch.tensor(mask, device="cpu"))

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        return self._forbidden.to(logits.device)


class MinLength(_Without):
    """No end before n tokens: ``eos`` is forbidden at sites 0 ... n - 1.

    Args:
        head: of the integers 0 ... V - 1.
        n: the least number of tokens before ``eos``.
        eos: the token that ends a sequence.

    Raises:
        ValueError: for n below 0, an ``eos`` that is none of the tokens or the only one. When called, where all other tokens
            have no mass.

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
            raise ValueError("Expected a token besides eos; got none.")
        self.n, self.eos = n, eos

    def forbidden(self, logits: Tensor, first: int) -> Tensor:
        sites, tokens = (torch.arange(size, device=logits.device) for size in logits.shape[-2:])
        return (first + sites < self.n).unsqueeze(-1) & (tokens == self.eos)

    def permuted(self, order: Tensor) -> MinLength:
        raise ValueError(
            "Expected a head of variables to visit in another order; got MinLength, which is of sequences."
        )


def _tokens_of(head: Any) -> int:
    """V of a head of the integers 0 ... V - 1; TypeError for another one."""
    d = check_distribution_head(head)
    if not d.event_shape and d.has_enumerate_support:
        values = d.enumerate_support(expand=False).flatten()
        if values.is_meta or values.tolist() == list(range(len(values))):
            return len(values)
    raise TypeError(f"Expected head to be of integers 0 ... V - 1; got one of {type(d).__name__}.")


def _check_token(name: str, token: Any, num_tokens: int) -> None:
    check_sizes(0, **{name: token})
    if token >= num_tokens:
        raise ValueError(f"Expected {name} among 0 ... {num_tokens - 1} (those of the head); got {token}.")


def _number(name: str, value: Any, most: float) -> float:
    check_numbers(**{name: value})
    if not (0 < value <= most and value < inf):
        raise ValueError(f"Expected 0 < {name} {'< inf' if most == inf else f'<= {most:g}'}; got {value}.")
    return value
