"""Checks the models against reference draws, in float64 and without a fit.

* ``pyro`` and ``numpyro``: log densities of 20 reference draws, compared with the formulas of ``formulas.py``. The number is the
  largest error of the differences from the first draw, relative to 1 plus their size. It is up to 1e-5 for
  hidden Markov models, because ``HiddenMarkov`` normalises the rows of transitions and the reference draws have rounded ones.
* ``vectorised``: the same for the Pyro model with all 20 draws in one plate, as guides evaluate it.
* ``z``: the gradient of the log density of the unconstrained latents, Jacobian included, has mean 0 over the posterior. The columns
  have |mean| / (sd / sqrt(n)) over all n reference draws: the largest of the D coordinates, the probability that the largest of
  D standard normals is smaller, and all.
"""

import json

import numpy as np
import pyro
import torch
from data import POSTERIORS
from formulas import FORMULAS
from guides import start
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.util import site_is_subsample
from scipy.stats import norm

FEW = 20


def traced(model, data, latents):
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(*data)
    trace.compute_log_prob()
    return {name: site for name, site in trace.nodes.items() if "log_prob" in site and not site_is_subsample(site)}


def log_density(model, data, latents):
    """The joint log density of one draw."""
    return sum(site["log_prob"].sum() for site in traced(model, data, latents).values()).item()


def log_densities(model, data, draws):
    """Joint log densities (S,) of all draws in one run, in a plate around all others."""
    ranks = {name: len(site["fn"].batch_shape) for name, site in traced(model, data, draws[0]).items()}
    depth, size = max(ranks.values()), len(draws)
    latents = {
        name: torch.stack([draw[name] for draw in draws]).reshape(size, *[1] * (depth - ranks[name]), *value.shape)
        for name, value in draws[0].items()
    }
    outer = pyro.plate("draws", size, dim=-depth - 1)
    sites = traced(outer(model), data, latents)
    return sum(site["log_prob"].reshape(size, -1).sum(-1) for site in sites.values())


def gap(found, truth):
    """The largest error of differences of log densities, relative to 1 plus their size."""
    found, truth = np.asarray(found) - found[0], np.asarray(truth) - truth[0]
    return float(np.max(np.abs(found - truth) / (1 + np.abs(truth))))


def gradients(model, data, draws):
    """Gradients (S, D) of the log density of the unconstrained latents, one draw at a time."""
    _, potential, transforms, _ = initialize_model(InitMessenger(start)(model), data, init_strategy=start)
    found = []
    for latents in draws:
        free = {name: transforms[name](value).detach().requires_grad_() for name, value in latents.items()}
        grads = torch.autograd.grad(-potential(free), list(free.values()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def in_numpyro(name, data, draws):
    """Log densities by NumPyro's version of the model."""
    import jax
    import numpyro_models
    from numpyro.infer.util import log_density

    jax.config.update("jax_enable_x64", True)
    model, arrays = getattr(numpyro_models, name), [x.numpy() for x in data]
    return [log_density(model, arrays, {}, {n: x.numpy() for n, x in latents.items()})[0].item() for latents in draws]


def check(names, folder):
    """One row per posterior."""
    torch.set_default_dtype(torch.float64)
    for name in names:
        posterior, raw = POSTERIORS[name], json.loads((folder / f"{name}.data.json").read_text())
        data, reference = posterior.read(folder, name)
        x = torch.tensor(reference["draws"]).double()
        draws = [posterior.layout.latents(row) for row in x]
        truth = [FORMULAS[name](raw, row.numpy()) for row in x[:FEW]]
        single = [log_density(posterior.model, data, latents) for latents in draws[:FEW]]
        together = log_densities(posterior.model, data, draws[:FEW]).numpy()
        g = gradients(posterior.model, data, draws)
        z = (g.mean(0) / (g.std(0) / len(g) ** 0.5)).abs()
        yield {
            "posterior": name,
            "pyro": f"{gap(single, truth):.0e}",
            "numpyro": f"{gap(in_numpyro(posterior.model.__name__, data, draws[:FEW]), truth):.0e}",
            "vectorised": f"{gap(together, truth):.0e}",
            "z": z.max().item(),
            "probability": float((2 * norm.cdf(z.max()) - 1) ** len(z)),
            "all z": " ".join(f"{v:.1f}" for v in z),
        }
