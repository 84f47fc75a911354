"""Hidden Markov models of all kinds of observations, and all their state paths."""

from __future__ import annotations

from itertools import product

import pyro
import pyro.distributions as dist
import torch

import pyro_genexact as gx
from support.values import sized

F64, INF, NAN = torch.float64, float("inf"), float("nan")
OBSERVED = {  # of parameters of the shape (..., V, 2)
    "categorical": lambda p: dist.Categorical(logits=torch.cat([p, -p], -1)),
    "poisson": lambda p: dist.Poisson(p[..., 0].exp()),
    "normal": lambda p: dist.Normal(p[..., 0], p[..., 1].exp()),
    "gamma": lambda p: dist.Gamma(p[..., 0].exp(), p[..., 1].exp()),
    "uniform": lambda p: dist.Uniform(p[..., 0] - 3, p[..., 0] + p[..., 1].exp()),
    "independent": lambda p: dist.Normal(p, 0.7).to_event(1),
    "multivariate": lambda p: dist.MultivariateNormal(p, torch.eye(2, dtype=F64) + 0.5),
}


def parameters(states=3, sites=4, batch=(), steps=None, zeros=False):
    """Logits of the first state and of steps, and parameters of observations, one a site where steps differ."""
    initial = 1.5 * sized(*batch, states, seed=1)
    transition = 1.5 * sized(*((states, states) if steps is None else (*batch, steps, states, states)), seed=2)
    if zeros:
        initial[..., 0] = -INF
        transition[..., -1, 0] = transition[..., 0, 0] = -INF
    return initial, transition, sized(*batch, sites if steps == sites - 1 else 1, states, 2, seed=3)


def made(observed, given, sites, **options):
    return gx.HiddenMarkov(*given[:2], OBSERVED[observed](given[2]), duration=sites, **options)


def of_paths(observed, given, x):
    """All paths (V^n, n) of a row without batch dims, and their log-probabilities jointly with x (n, *obs)."""
    initial, transition, p = given
    states, n = len(initial), len(x)
    if not n:
        return torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=F64)
    z = torch.tensor(list(product(range(states), repeat=n)), dtype=torch.long).reshape(states**n, n)
    with pyro.validation_enabled(False):  # where uniform densities are 0 outside
        seen = OBSERVED[observed](p.expand(n, -1, -1) if len(p) == 1 else p[:n]).log_prob(x[:, None])
    first, steps = initial.log_softmax(-1), transition.log_softmax(-1)
    joint = torch.zeros(len(z), dtype=F64)
    for t in range(n):
        step = steps if steps.dim() == 2 else steps[t - 1 if len(steps) > 1 else 0] if t else None
        joint = joint + seen[t, z[:, t]] + (first[z[:, 0]] if t == 0 else step[z[:, t - 1], z[:, t]])
    return z, joint


def spread(values, z, states):
    """The sum of path values (P) by the state (n, V) at each site."""
    hot = torch.nn.functional.one_hot(z, states).to(F64)
    return torch.einsum("p,pnv->nv", values, hot)
