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


class Bound(Trace_ELBO):
    r"""A bound on the log evidence from S draws z_i of a guide q, in one of three forms, and the gradient that a fit follows.

    Let log w_i = log p(z_i) - log q(z_i), and let W_i = w_i / sum_j w_j be the normalised weights.

    * "elbo": the bound is the mean of log w_i. The guide minimises KL(q | p).
    * "iwae": the bound is the logarithm of the mean of w_i.
    * "forward": the bound is that of "iwae", but the guide follows the gradient sum_i W_i d/dphi log q(z_i), so it minimises
      KL(p | q), up to the bias of the normalised weights; the parameters of the model follow the gradient of the bound.

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
        """Returns the bound of the log weights (..., S)."""
        if self.objective == "elbo":
            return log_w.mean(-1)
        return log_w.logsumexp(-1) - math.log(log_w.shape[-1])

    def _log_w(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (self.power * log_p - log_q).detach()

    def _weights(self, log_w: Tensor) -> Tensor:
        """Returns the derivatives (S,) of the bound."""
        return log_w.softmax(0) if self.objective != "elbo" else torch.full_like(log_w, 1 / len(log_w))

    def _gains(self, log_w: Tensor, score: Tensor) -> Tensor:
        """Returns the bound less that of the draws other than i, (S,): the coefficients of the score terms."""
        size = len(log_w)
        if size == 1 or not score.requires_grad:
            return log_w
        i = torch.arange(size, device=log_w.device)
        others = log_w[(i[:, None] + i[1:]) % size]
        return self.bound(log_w) - self.bound(others)

    def _plain(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        traces = self.draws.of(guide)
        score, entropy = self.draws.score_parts(traces)
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(traces)
        log_w = self._log_w(log_p, log_q)
        own = entropy if self.objective == "elbo" else log_q
        return log_w, (self._weights(log_w) * (self.power * log_p - own) + self._gains(log_w, score) * score).sum()

    def _forward(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            traces = [_leaves(trace)[0] for trace in self.draws.of(guide)]
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(self.draws.again(guide, traces))
        log_w = self._log_w(log_p, log_q)
        return log_w, (self._weights(log_w) * (self.power * log_p + log_q)).sum()

    def _path(self, model: Callable[[], Any], guide: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """The gradient at the values of all draws is computed first, and then goes on from the values to the parameters."""
        original = self.draws.of(guide)
        score, _ = self.draws.score_parts(original)
        pairs = [_leaves(trace) for trace in original]
        traces, leaves = [trace for trace, _ in pairs], [leaf for _, found in pairs for leaf in found]
        log_p, log_q = self.draws.log_p(model, traces), self.draws.log_q(self.draws.again(guide, traces))
        log_w = self._log_w(log_p, log_q)
        weights = self._weights(log_w)
        factors, coefficients = torch.ones_like(weights), self._gains(log_w, score)
        if self.objective == "iwae":
            factors, coefficients = weights, coefficients - weights + 1 / len(weights)
        elif self.objective == "forward":
            factors, coefficients = 1 - weights, weights - 1 / len(weights)
        total = (weights * factors * (self.power * log_p - log_q)).sum()
        at = [leaf for _, leaf in leaves]
        gradients = torch.autograd.grad(total, at, retain_graph=True, allow_unused=True) if at else ()
        through = sum(
            ((g * value).sum() for (value, _), g in zip(leaves, gradients, strict=True) if g is not None),
            log_w.new_zeros(()),
        )
        return log_w, through + (weights * self.power * log_p + coefficients * score).sum()


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
