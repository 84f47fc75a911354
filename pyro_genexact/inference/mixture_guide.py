"""A mixture of flows with learned weights, and its site in a guide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import extract_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ..base import DistributionModule
from ..core.functional import visible
from ..core.independent import REAL_VECTOR
from ..core.leaves import tensors_in
from ..core.random import chosen
from ..core.values import checked_value
from ..core.versions import versions_of
from .normal import Normal


class FlowMixture(DistributionModule):
    """A module whose call returns the mixture q(z) = sum_k w_k q_k(z) of K flows, with weights w = softmax(logits).

    Args:
        parts: flows without context over vectors (D,).
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        like = next(p for p in self.parts.parameters() if p.is_floating_point())
        self.logits = nn.Parameter(like.new_zeros(len(self.parts)))

    @torch.no_grad()
    def put(self, normals: Sequence[Normal], weights: Tensor) -> None:
        """Sets the last maps of the flows to K Gaussians, and the weights (K,)."""
        for part, normal in zip(self.parts, normals, strict=True):
            part.transforms[-1].put(*normal)  # type: ignore[union-attr,index,operator]
        self.logits.copy_(weights.log())

    def forward(self) -> MixtureOfFlows:  # type: ignore[override]
        """Returns the distribution."""
        return MixtureOfFlows(self.logits, [part() for part in self.parts])


class MixtureOfFlows(TorchDistribution):
    """The mixture q(z) = sum_k w_k q_k(z), w = softmax(logits), whose draws are differentiable given their components.

    ``has_rsample`` is False, since the choice of a component has no derivative. Pyro's sites nevertheless draw by ``rsample``,
    and ``score_parts`` has the log weight of the component of each draw, so that gradients of an ELBO are unbiased, with the
    variance of a score function for the weights only. Distributions that wrap this one draw by ``sample``, with the score
    function of all parameters.

    Args:
        logits: (K,) unnormalised log weights.
        parts: K distributions of batch shape () and event shape (D,).

    Cost: a draw evaluates the flow of its component. ``log_prob`` of the last draws evaluates each flow's inverse at the draws
    of the others, and that of other values all inverses. Under transforms of ``torch.func`` and while torch records, traces
    or compiles, all flows make all draws, of which one is chosen.

    Reference: Morningstar et al., "Automatic Differentiation Variational Inference with Mixtures", AISTATS 2021.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = REAL_VECTOR
    has_rsample = False

    def __init__(self, logits: Tensor, parts: Sequence[Distribution], batch_shape: Any = ()) -> None:
        self.logits, self.parts = logits, list(parts)
        self._drawn: Any = None  # the last draws, their version, their components, and in their order the draws of each
        self._found: Any = None  # the log_prob of the last draws, and what must not have changed since
        super().__init__(Size(batch_shape), self.parts[0].event_shape)

    def __call__(self, sample_shape: Any = ()) -> Tensor:
        """Draws as :meth:`rsample`; sites of Pyro's models and guides call this method."""
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample, *batch, D), differentiable in the parameters of the components, but not in the weights."""
        shape = Size((*sample_shape, *self.batch_shape))
        with torch.no_grad():
            which = chosen(self.logits.softmax(-1).expand(max(1, shape.numel()), -1)).squeeze(-1)[: shape.numel()]
        order: Any = None
        groups: Any = None  # if their sizes are unknown
        if visible(which) and not torch.jit.is_tracing():  # type: ignore[attr-defined]
            order = which.argsort(stable=True)
            sizes = which.bincount(minlength=len(self.parts)).tolist()
            groups = [part.rsample((n,)) for part, n in zip(self.parts, sizes, strict=True)]
            value = torch.cat(groups)[order.argsort()]
        else:
            each = torch.stack([part.rsample((shape.numel(),)) for part in self.parts])
            value = each.take_along_dim(which[None, :, None], 0).squeeze(0)
        value = value.reshape(*shape, *self.event_shape)
        self._drawn, self._found = (value, versions_of([value]), which.reshape(shape), order, groups), None
        return value

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample, *batch, D) without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log sum_k w_k q_k(value) in nats, (*sample, *batch)."""
        value, provenance = extract_provenance(value)  # type: ignore[assignment]
        if (drawn := self._last(value)) is None or drawn[4] is None:
            value = checked_value(self, value)
            each = torch.stack([part.log_prob(value) for part in self.parts], -1)
            total = (self.logits.log_softmax(-1) + each).logsumexp(-1)
            return track_provenance(total.expand(torch.broadcast_shapes(total.shape, self.batch_shape)), provenance)
        stamp = [torch.is_grad_enabled(), *versions_of([value, *tensors_in([self.logits, self.parts])])]
        if self._found is None or self._found[0] != stamp:
            self._found = stamp, self._of_draws(*drawn[3:]).reshape(drawn[2].shape)
        return track_provenance(self._found[1], provenance)

    def _of_draws(self, order: Tensor, groups: list[Tensor]) -> Tensor:
        """Returns the log_prob (S,) of draws; a flow that made a draw has its inverse in its cache."""
        columns = []
        for k, (part, own) in enumerate(zip(self.parts, groups, strict=True)):
            before, after = (sum(map(len, some)) for some in (groups[:k], groups[k + 1 :]))
            others = part.log_prob(torch.cat([*groups[:k], *groups[k + 1 :]]))
            first, second = others.split([before, after])
            columns.append(torch.cat([first, part.log_prob(own), second]))
        return (self.logits.log_softmax(-1) + torch.stack(columns, -1)).logsumexp(-1)[order.argsort()]

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Returns Pyro's parts of an estimator of gradients: log q(x), the log weight of x's component, and log q(x).

        Raises:
            ValueError: if x has a history, but is not the last draw of this distribution, so that its component is unknown.
        """
        value, _ = extract_provenance(x)
        log_prob = self.log_prob(x)
        if (drawn := self._last(value)) is not None:
            return ScoreParts(log_prob, self.logits.log_softmax(-1)[drawn[2]], log_prob)
        if value.requires_grad:  # type: ignore[attr-defined]
            raise ValueError(
                f"Expected x to be the last draw of this distribution, or without gradient; got {tuple(x.shape)} numbers of "
                "another origin, whose components are unknown."
            )
        return ScoreParts(log_prob, log_prob, 0)  # type: ignore[arg-type]

    def _last(self, value: Any) -> Any:
        """Returns the last draws, with all that is known of them, if these are the value."""
        drawn = self._drawn
        return drawn if drawn is not None and drawn[0] is value and drawn[1] == versions_of([value]) else None

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureOfFlows:
        return type(self)(self.logits, self.parts, batch_shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None, "_found": None}


class AtLatents(Messenger):
    """Moves log q(z) of a mixture from the auxiliary site of all latents to the site of the first latent.

    Pyro's ELBOs multiply the score of a site by the costs of the latents, and some of them leave out that of auxiliary sites.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_q: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], MixtureOfFlows):
            msg["mask"] = False  # which leaves only the score
        elif self.log_q is not None and isinstance(msg["fn"], Delta) and msg["fn"].v.numel():
            delta, log_q, self.log_q = msg["fn"], self.log_q, None
            parts = math.prod(delta.batch_shape) // log_q.numel()  # numbers in the plates of the latent
            msg["fn"] = Delta(delta.v, delta.log_density + log_q / parts, delta.event_dim)

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], MixtureOfFlows):
            self.log_q = msg["fn"].log_prob(msg["value"])
