"""Stochastic beam search: sampling without replacement by a beam search over perturbed log-probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.checks import check_sizes
from .prefix_search import PrefixSearch


class StochasticBeam(NamedTuple):
    """A sample without replacement, the result of :func:`stochastic_beam_search`.

    Attributes:
        sequences: values (k, *batch, *event), in the order of sequential sampling without replacement.
        log_prob: (k, *batch), their log-probabilities under the model (nats); -inf if the support has fewer than k values.
        gumbels: (k, *batch), their perturbed log-probabilities in descending order (nats).
        threshold: (*batch), the (k + 1)-th largest of all perturbed log-probabilities (nats); -inf if there is none.
        log_inclusion: (k, *batch), the log-probabilities that a value is in the sample, given the threshold (nats).
    """

    sequences: Tensor
    log_prob: Tensor
    gumbels: Tensor
    threshold: Tensor
    log_inclusion: Tensor


@torch.no_grad()
def stochastic_beam_search(d: Any, k: int) -> StochasticBeam:
    r"""Draws an exact sample of k different values without replacement.

    Each value y has a perturbed log-probability G(y) = log p(y) + Gumbel noise; the k values with the largest ones are
    returned. A beam search finds them, since the perturbed log-probability of a prefix can be sampled as the maximum over
    all values that begin with it. With the threshold :math:`\kappa`, an unbiased estimate of an expectation is

    .. math:: E[f] \approx \sum_{i=1}^k f(y_i) \frac{p(y_i)}{q(y_i)}, \quad
        q(y) = P(G(y) > \kappa) = 1 - \exp(-\exp(\log p(y) - \kappa))

    Args:
        d: a :class:`~pyro_genexact.distributions.SequenceDistribution` or ``AutoregressiveDistribution`` whose sites have
            a finite support. Arrays without an end count as values.
        k: the number of values.

    Returns:
        The values with their log-probabilities and inclusion probabilities.

    Raises:
        TypeError: if ``d`` is another distribution.
        ValueError: if k is not a positive integer.

    Cost: that of a beam search of width k + 1.

    Reference: Kool, van Hoof, Welling, "Stochastic beams and where to find them: the Gumbel-top-k trick for sampling
    sequences without replacement", ICML 2019.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> net, head = gx.conditioners.Recurrent(3, 3, hidden=8), gx.heads.Categorical(3)
        >>> model = gx.Sequence(net, head, eos=0, max_len=4)
        >>> beam = stochastic_beam_search(model(), 6)
        >>> weights = (beam.log_prob - beam.log_inclusion).exp()
        >>> mean_length = (weights * model().lengths_of(beam.sequences)).sum(0)
    """
    check_sizes(1, k=k)
    search = PrefixSearch(d)
    loop = search.loop()
    rows = torch.arange(search.rows, device=loop.phi.device)
    log_p = search.log_probs(search.rows, 1)
    noisy = -torch.empty_like(log_p).exponential_().log()  # the maximum over all values
    done = ~search.open().unsqueeze(-1)
    strings = search.filler(search.rows, 1, 0)
    for t, phi in loop:
        beams = log_p.shape[1]
        values, factors = search.factors(phi, t, rows.repeat_interleave(beams))
        factors = factors.reshape(search.rows, beams, len(values))
        # the only successor of an ended prefix is itself
        stays = torch.full_like(factors, -torch.inf)
        stays[..., 0] = 0.0
        ahead = log_p.unsqueeze(-1) + torch.where(done.unsqueeze(-1), stays, factors)
        perturbed = torch.where(done.unsqueeze(-1), noisy.unsqueeze(-1) + stays, _below(noisy, ahead))
        noisy, index = perturbed.flatten(1).topk(min(k + 1, beams * len(values)), 1)
        log_p, parent = ahead.flatten(1).take_along_dim(index, 1), index // len(values)
        done = done.take_along_dim(parent, 1)
        value = torch.where(done, search.filler(), values[index % len(values)])
        strings = torch.cat([strings.take_along_dim(parent.unsqueeze(-1), 1), value.unsqueeze(-1)], -1)
        last = (search.sizes(t, rows) == search.sites).unsqueeze(-1)
        done = done | (log_p == -torch.inf) | search.ends(value, t, rows) | last
        if done.all():
            break
        offset = torch.arange(0, search.rows * beams, beams, device=rows.device).unsqueeze(-1)
        search.read(loop, value.flatten(), (parent + offset).flatten())
    strings = search.filled(strings)
    if missing := max(k + 1 - log_p.shape[1], 0):
        log_p, noisy = (pad(x, (0, missing), value=-torch.inf) for x in (log_p, noisy))
        strings = torch.cat([strings, strings[:, :1].expand(-1, missing, -1)], 1)
    threshold = noisy[:, k]
    log_p, noisy, strings = log_p[:, :k], noisy[:, :k], strings[:, :k]
    inclusion = torch.where(log_p == -torch.inf, 0.0, (-(-(log_p - threshold.unsqueeze(1)).exp()).expm1()).log())
    shape = d.batch_shape
    by_rank = [x.T.reshape(k, *shape) for x in (log_p, noisy, inclusion)]
    sequences = search.event(strings.transpose(0, 1), (k,))
    return StochasticBeam(sequences, by_rank[0], by_rank[1], threshold.reshape(shape), by_rank[2])


def _below(top: Tensor, log_p: Tensor) -> Tensor:
    """Samples Gumbel variables with locations log_p (n, W, K), given that the maximum over K is ``top`` (n, W)."""
    gumbel = log_p - torch.empty_like(log_p).exponential_().log()
    largest = gumbel.amax(-1, keepdim=True)
    # -log(exp(-top) - exp(-largest) + exp(-gumbel)), computed in a way that avoids overflow
    gap = largest - gumbel
    top = top.unsqueeze(-1)
    v = top - gumbel + torch.log(-torch.expm1(-gap))
    found = top - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    found = torch.where(gap == 0, top, found)
    return torch.where(log_p == -torch.inf, -torch.inf, found)
