"""Bounds on the log evidence from several draws of a guide, and estimators of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from .draws import Draws, drawn

OBJECTIVES = ("elbo", "iwae", "forward")
GROUP = 8  # draws in each bound of "iwae"


class Bound(Trace_ELBO):
    r"""A bound on the log evidence from S draws z_i of a guide q, and the gradient that a fit follows.

    Let w_i = p(z_i) / q(z_i). The bound is the mean, over groups of K draws, of the logarithm of the mean of w_i in the group. The
    objective determines K and the gradient with respect to the parameters phi of the guide:

    * "elbo": K = 1, so the bound is the mean of log w_i. The guide minimises KL(q | p).
    * "iwae": K = 8, or S if that is less. More draws make the bound tighter, and its gradient noisier.
    * "forward": K = S, and the guide follows the gradient of sum_i W_i log q(z_i), where W_i are the normalised weights. So it
      minimises KL(p | q), up to the bias of the weights. The parameters of the model follow the gradient of the bound.

    By default, the gradient is that of all terms that depend on the parameters. With ``path``, it flows through the draws only,
    not through the parameters of log q: these are the estimators "sticking the landing" for "elbo" and the doubly
    reparameterised ones for the others. They have no variance at q = p. They need a second evaluation of log q.

    Draws of a guide that are not or only partly reparameterised also have a score term, whose baseline is the bound of the
    other draws.

    Args:
        draws: how draws are made and evaluated.
        objective: as above.
        path: whether the gradient flows through the draws only.

    Attributes:
        power: the power of p(z), below 1 to temper the posterior.

    References: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Bornschein, Bengio, "Reweighted
    wake-sleep", ICLR 2015; Mnih, Rezende, "Variational inference for Monte Carlo objectives", ICML 2016; Roeder, Wu, Duvenaud,
    "Sticking the landing", NeurIPS 2017; Tucker et al., "Doubly reparameterized gradient estimators for Monte Carlo
    objectives", ICLR 2019.
    """

    def __init__(self, draws: Draws, objective: str = "elbo", path: bool = False) -> None:
        super().__init__(num_particles=draws.size, max_plate_nesting=draws.nesting)
        self.draws, self.objective, self.path = draws, objective, path
        self.group = {"elbo": 1, "iwae": min(GROUP, draws.size), "forward": draws.size}[objective]
        if draws.size % self.group:
            raise ValueError(
                f'Expected num_particles to be at most {GROUP} or a multiple of it for objective="iwae"; got {draws.size}.'
            )
        if objective == "forward" and draws.size == 1:
            raise ValueError('Expected num_particles > 1 for objective="forward", whose weights compare draws; got 1.')
        self.power = 1.0

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the negative bound (nats)."""
        guide, model = partial(guide, *args, **kwargs), partial(model, *args, **kwargs)
        with torch.no_grad():
            traces = self.draws.of(guide)
            return -self.bound(self._log_w(self.draws.log_p(model, traces), self.draws.log_q(traces))).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Adds the gradients to the parameters, and returns the negative bound (nats)."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the negative bound (nats), whose gradient is that of the fit."""
        guide, model = partial(guide, *args, **kwargs), partial(model, *args, **kwargs)
        if self.path:
            log_w, surrogate = self._path(model, guide)
        elif self.objective == "forward":
            log_w, surrogate = self._forward(model, guide)
        else:
            log_w, surrogate = self._plain(model, guide)
        return -(self.bound(log_w) + surrogate - surrogate.detach())

    def bound(self, log_w: Tensor) -> Tensor:
        """Returns the bound of the log weights (S,)."""
        return self._of_groups(log_w).mean()

    def _of_groups(self, log_w: Tensor) -> Tensor:
        groups = log_w.reshape(-1, self.group)
        return groups.logsumexp(1) - math.log(self.group)

    def _log_w(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (self.power * log_p - log_q).detach()

    def _weights(self, log_w: Tensor) -> Tensor:
        """Returns the normalised weights (S,) of the draws in their groups."""
        return log_w.reshape(-1, self.group).softmax(1).flatten()

    def _shares(self, log_w: Tensor) -> Tensor:
        """Returns the derivatives (S,) of the bound."""
        return self._weights(log_w) * self.group / len(log_w)

    def _gains(self, log_w: Tensor, score: Tensor) -> Tensor:
        """Returns the gains (S,) of the bound by each draw: the coefficients of the score terms."""
        size = len(log_w)
        if size == 1 or not score.requires_grad:
            return log_w
        if self.group == 1:
            return (log_w - (log_w.sum() - log_w) / (size - 1)) / size
        groups = log_w.reshape(-1, self.group)
        i = torch.arange(self.group, device=log_w.device)
        others = groups[:, (i[:, None] + i[1:]) % self.group].logsumexp(2) - math.log(self.group - 1)
        return (self._of_groups(log_w)[:, None] - others).flatten() / len(groups)

    def _plain(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        traces = self.draws.of(guide)
        score, entropy = self.draws.score_parts(traces)
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(traces)
        log_w = self._log_w(log_p, log_q)
        own = entropy if self.objective == "elbo" else log_q
        return log_w, (self._shares(log_w) * (self.power * log_p - own) + self._gains(log_w, score) * score).sum()

    def _forward(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            traces = [_leaves(trace)[0] for trace in self.draws.of(guide)]
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(self.draws.again(guide, traces))
        log_w = self._log_w(log_p, log_q)
        shares = self._shares(log_w)
        terms = (self.power * log_p + log_q).where(shares > 0, 0.0)  # log p may be -inf where the weight is 0
        return log_w, (shares * terms).sum()

    def _path(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """The gradient at the values of all draws is computed first, and then goes on from the values to the parameters."""
        original = self.draws.of(guide)
        score, _ = self.draws.score_parts(original)
        pairs = [_leaves(trace) for trace in original]
        traces, leaves = [trace for trace, _ in pairs], [leaf for _, found in pairs for leaf in found]
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(self.draws.again(guide, traces))
        log_w = self._log_w(log_p, log_q)
        weights = self._weights(log_w)
        shares = self._shares(log_w)
        excess = shares - 1 / len(shares)  # of mean 0
        if self.objective == "forward":
            factors, coefficients = 1 - weights, excess
        else:
            factors, coefficients = weights, self._gains(log_w, score) - excess
        total = (shares * factors * (self.power * log_p - log_q)).sum()
        at = [leaf for _, leaf in leaves]
        gradients = torch.autograd.grad(total, at, retain_graph=True, allow_unused=True) if at else ()
        through = sum(
            ((g * value).sum() for (value, _), g in zip(leaves, gradients, strict=True) if g is not None),
            log_w.new_zeros(()),
        )
        return log_w, through + (shares * self.power * log_p + coefficients * score).sum()


def _leaves(trace: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Returns a copy of a guide's trace with values without history, and pairs of differentiable values and these."""
    copy, pairs = trace.copy(), []
    for name, site in drawn(trace):
        value = site["value"]
        leaf = value.detach()
        if value.requires_grad:
            pairs.append((value, leaf.requires_grad_()))
        copy.nodes[name] = {**{k: v for k, v in site.items() if k not in COMPUTED}, "value": leaf}
    return copy, pairs


COMPUTED = ("log_prob", "log_prob_sum", "unscaled_log_prob", "score_parts")
