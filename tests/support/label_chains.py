"""Linear chains so small that all their label strings can be written down: the truth that CRF and semirings are tested against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.testing.chains import Enumerated, enumerated

KINDS = ("shared", "steps", "rows")
EACH = list(product(KINDS, (False, True)))  # with and without structural zeros


class Small:
    """Potentials of a batch (2, N + 1), of every length from 0 to N where ragged, and all V^N strings with their scores.

    Transitions are shared (V, V), of each step (N + 1, N - 1, V, V) or of each row (2, 1, 1, V, V). Zeros are -inf in all
    potentials; the string of the last label alone stays possible.
    """

    def __init__(
        self, labels: int, sites: int, kind: str, zeros: bool, ragged: bool = True, scale: float = 1.5
    ) -> None:
        self.labels, self.sites, self.batch = labels, sites, (2, sites + 1)
        self.name = f"V={labels} N={sites} {kind} zeros={zeros} ragged={ragged}"
        g = torch.Generator().manual_seed(hash((labels, sites, KINDS.index(kind), zeros, ragged)) % 2**31)

        def made(*shape: int) -> Tensor:
            potentials = scale * torch.randn(*shape, labels, generator=g, dtype=torch.float64)
            dead = torch.rand(potentials.shape, generator=g) < 0.25 * zeros
            dead[..., -1] = False
            return potentials.masked_fill(dead, -torch.inf)

        steps = {"shared": (labels,), "steps": (sites + 1, sites - 1, labels), "rows": (2, 1, 1, labels)}
        self.unary, self.transition = made(2, sites + 1, sites), made(*steps[kind])
        self.initial = None if kind == "steps" else made()
        self.final = None if kind == "rows" else made(sites + 1)
        self.lengths = torch.arange(sites + 1) if ragged else None

    @property
    def potentials(self) -> list[Tensor]:
        return [p for p in (self.unary, self.transition, self.initial, self.final) if p is not None]

    def crf(self, **options: Any) -> gx.LinearChainCRF:
        ends = {"initial": self.initial, "final": self.final, "lengths": self.lengths}
        return gx.LinearChainCRF(self.unary, self.transition, **{**ends, **options})

    def map(self, function: Callable[[Tensor], Tensor], **others: Any) -> Small:
        """A copy with a function of its potentials, and with other attributes."""
        new = object.__new__(Small)
        kept = ("labels", "sites", "batch", "name", "lengths")
        new.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        for name in ("unary", "transition", "initial", "final"):
            potentials = getattr(self, name)
            setattr(new, name, None if potentials is None else function(potentials))
        new.__dict__.update(others)
        return new

    def with_grad(self) -> Small:
        """A copy whose potentials are leaves that require gradients."""
        return self.map(lambda p: p.clone().requires_grad_())

    @cached_property
    def truth(self) -> Enumerated:
        """What all strings tell, which is what the laws compare with."""
        return enumerated(self.crf(validate_args=False))

    @property
    def strings(self) -> Tensor:
        """(V^N, N), the last label fastest."""
        return self.truth.strings

    @property
    def there(self) -> Tensor:
        """(*batch, N), which sites are no padding."""
        return self.truth.inside

    @property
    def raw(self) -> Tensor:
        """(V^N, *batch), the scores of the strings, whatever they hold in padding."""
        return self.truth.scores

    @cached_property
    def values(self) -> Tensor:
        """(V^N, *batch, N), the strings with -100 in padding."""
        return torch.where(self.there, self.strings[:, None, None], -100)

    @cached_property
    def scores(self) -> Tensor:
        """(V^N, *batch), -inf for strings with anything but 0 in padding, so that each string of a row counts once."""
        return self.raw.masked_fill(~self.truth.once, -torch.inf)

    @cached_property
    def log_prob(self) -> Tensor:
        return self.truth.log_prob()

    @cached_property
    def one_hot(self) -> Tensor:
        """(V^N, N, V)."""
        return torch.nn.functional.one_hot(self.strings, self.labels).double()

    @cached_property
    def marginals(self) -> Tensor:
        return self.truth.marginals()

    @cached_property
    def pair_marginals(self) -> Tensor:
        return self.truth.pair_marginals()

    def mean(self, values: Tensor) -> Tensor:
        """Of values (V^N, *batch) of the strings, anything (even infinite) where they are impossible."""
        p = self.log_prob.exp()
        return (p * torch.where(p > 0, values, 0.0)).sum(0)

    @cached_property
    def entropy(self) -> Tensor:
        return self.truth.entropy()

    def index(self, values: Tensor) -> Tensor:
        """The places of strings (*, N) in ``strings``."""
        return (values * self.labels ** torch.arange(self.sites - 1, -1, -1)).sum(-1)


@lru_cache
def all_sizes(kind: str, zeros: bool) -> list[Small]:
    """V 2 ... 4 and N 1 ... 6 of every length (up to 300 strings unless transitions are shared), and some without lengths."""
    ragged = [Small(v, n, kind, zeros) for v in (2, 3, 4) for n in range(1, 7) if v**n <= 300 or kind == "shared"]
    return [*ragged, *(Small(v, n, kind, zeros, ragged=False) for v, n in ((2, 1), (3, 2), (4, 3)))]


def near(found: Tensor, truth: Tensor, name: str = "") -> None:
    """Equal to 1e-10, infinities too; no NaN."""
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


def agree(index: Tensor, log_prob: Tensor) -> None:
    """Chi-square of draws (K, *batch) among S outcomes of log-probabilities (S, *batch): nothing impossible, p above 1e-4."""
    outcomes, draws = log_prob.flatten(1).exp(), index.flatten(1)
    for p, drawn in zip(outcomes.unbind(1), draws.unbind(1), strict=True):
        count, expected = drawn.bincount(minlength=len(p)).double(), p * len(drawn)
        assert count[p == 0].sum() == 0
        rare = expected < 5
        count = torch.cat([count[~rare], count[rare].sum().reshape(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)]).clamp(min=1e-9)
        statistic = ((count - expected) ** 2 / expected.clamp(min=1.0)).sum()
        assert chi2.sf(float(statistic), max(int((~rare).sum()), 1)) > 1e-4
