"""Fits the guides of the table, and scores their draws."""

import math
import sys
import time

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch.nn.functional import silu

import pyro_genexact as gx

SAMPLES = 10_000


def start(site):
    """Medians of the priors, where Pyro's own raises for the flat ones, at 0 there, or at 1 for positive numbers."""
    try:
        return init_to_median(site)
    except NotImplementedError:
        return torch.distributions.biject_to(site["fn"].support)(torch.zeros(site["fn"].shape()))


OURS = {
    "AutoFlow(iaf)": lambda model: gx.guides.AutoFlow(model),
    "AutoFlow(nsf)": lambda model: gx.guides.AutoFlow(model, gx.flows.nsf, inverse=True, activation=silu),
    "AutoFlow(iaf, relu)": lambda model: gx.guides.AutoFlow(model, activation=torch.relu),
}
PYRO = {
    "AutoNormal": lambda model: AutoNormal(model, init_loc_fn=start),
    "AutoMultivariateNormal": lambda model: AutoMultivariateNormal(model, init_loc_fn=start),
    # which has no start to be set
    "AutoIAFNormal": lambda model: AutoIAFNormal(InitMessenger(start)(model), hidden_dim=[64, 64], num_transforms=3),
}
NUMPYRO = ("numpyro AutoIAFNormal", "numpyro AutoBNAFNormal")
DEFAULT = [name for name in (*OURS, *PYRO, *NUMPYRO) if name not in ("AutoFlow(iaf, relu)", "AutoNormal")]
PARTICLES = 256


def moments(draws, weights=None):
    x = draws.double()
    w = torch.full((len(x), 1), 1 / len(x)) if weights is None else weights.unsqueeze(-1)
    mean = (w * x).sum(0)
    return mean, (w * (x - mean) ** 2).sum(0).sqrt()


def score(name, ratios, draws, layout, reference, seconds, steps):
    """A row of the table: errors in units of the reference's standard deviations, plain and PSIS-corrected.

    It has NaN if a guide that did not converge has draws without a finite density.
    """
    if ratios.isnan().any() or ratios.isposinf().any():
        return unscored(name, seconds, steps)
    result = gx.diagnostics.Importance(ratios, draws)
    row = {"guide": name, "elbo": result.elbo, "khat": result.khat, "ess": result.ess / len(ratios)}
    mean, sd = (torch.tensor(reference[k]).double() for k in ("mean", "sd"))
    x = layout.coordinates(result.draws)
    for label, weights in (("", None), (" psis", result.log_weights.exp())):
        m, s = moments(x, weights)
        worst = (s / sd).log().abs().argmax()
        row |= {"mean" + label: ((m - mean) / sd).abs().max().item(), "sd" + label: (s / sd)[worst].item()}
    return {**row, "seconds": seconds, "steps": steps}


def unscored(name, seconds, steps):
    columns = ("elbo", "khat", "ess", "mean", "sd", "mean psis", "sd psis")
    return {"guide": name, **dict.fromkeys(columns, math.nan), "seconds": seconds, "steps": steps}


def attempted(fit, name, *args):
    """The row of a fit of a peer's guide, or one with the name of the error that it raises."""
    try:
        return fit(name, *args)
    except Exception as error:
        print(f"{name}: {error!r}", file=sys.stderr, flush=True)
        return unscored(f"{name} ({type(error).__name__})", math.nan, 0)


def fit_torch(name, model, data, layout, reference, **options):
    """Fits one guide of this library or of Pyro; a row of the table."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = {**OURS, **PYRO}[name](model)
    start = time.process_time()
    result = gx.fit_guide(model, guide, *data, progress=False, **options)
    seconds = time.process_time() - start
    torch.manual_seed(1)
    found = gx.diagnostics.psis(model, guide, *data, num_samples=SAMPLES)
    return score(name, found.log_ratios, found.draws, layout, reference, seconds, result.steps)


def steps_in(seconds, name, model, data):
    """How many steps a guide of Pyro makes in a time."""
    guide = PYRO[name](model)
    gx.fit_guide(model, guide, *data, steps=5, progress=False)
    start = time.process_time()
    gx.fit_guide(model, guide, *data, steps=50, progress=False)
    return max(100, int(seconds / (time.process_time() - start) * 50))


def fit_pyro(name, model, data, layout, reference, seconds, lr):
    """Fits a guide of Pyro for a time."""
    steps = steps_in(seconds, name, model, data)
    return fit_torch(name, model, data, layout, reference, steps=steps, lr=lr)


def fit_numpyro(name, model, data, layout, reference, steps, lr):
    """The same for a guide of NumPyro, with Adam and a cosine as learning rate."""
    import jax
    import numpyro
    import numpyro_models
    from numpyro.infer import SVI, Trace_ELBO, autoguide
    from numpyro.infer.util import log_density

    model, data = getattr(numpyro_models, model.__name__), [jax.numpy.asarray(x.numpy()) for x in data]
    guide = getattr(autoguide, name.split()[1])(model)
    adam = numpyro.optim.Adam(lambda step: lr * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * step / steps)))
    start = time.process_time()
    svi = SVI(model, guide, adam, Trace_ELBO(num_particles=PARTICLES))
    params = svi.run(jax.random.PRNGKey(0), steps, *data, progress_bar=False, stable_update=True).params
    jax.block_until_ready(params)
    seconds = time.process_time() - start

    def draw(key):
        log_q, trace = log_density(numpyro.handlers.seed(guide, key), data, {}, params)
        latents = {n: site["value"] for n, site in trace.items() if site["type"] == "sample"}
        log_p, _ = log_density(numpyro.handlers.seed(model, key), data, {}, latents)
        return log_p - log_q, latents

    ratios, latents = jax.vmap(draw)(jax.random.split(jax.random.PRNGKey(1), SAMPLES))
    draws = {n: torch.tensor(np.asarray(x)) for n, x in latents.items()}
    return score(name, torch.tensor(np.asarray(ratios)), draws, layout, reference, seconds, steps)


def better(*rows):
    return max(rows, key=lambda row: row["elbo"] if math.isfinite(row["elbo"]) else -math.inf)
