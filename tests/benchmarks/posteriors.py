"""Reference posteriors of posteriordb: automatic guides of this library, of Pyro and of NumPyro beside long runs of NUTS.

    OMP_NUM_THREADS=1 python tests/benchmarks/posteriors.py --data DIR [--only NAME ...] [--guides NAME ...]

DIR holds ``NAME.data.json`` and ``NAME.npz`` (means and standard deviations of reference draws) of stan-dev/posteriordb. Guides
of this library are fitted by ``fit_guide`` with default settings; Pyro's by the same function in the time of the first, of
two learning rates the better; NumPyro's by its SVI with as many steps and draws a step, of two learning rates the
better. Columns: ELBO (nats), Pareto k-hat and effective sample size of 10 000 draws, and, over the coordinates, the largest
error of a mean in reference standard deviations and the worst ratio of standard deviations, plain and PSIS-corrected; seconds of
CPU, on one thread those of a quiet machine.
NumPyro's guides need the extra ``bench``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch.distributions import constraints
from torch.nn.functional import pad, silu

import pyro_genexact as gx

SAMPLES = 10_000


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * t, sigma), obs=y)


def ark(lags, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + (lags * beta).sum(-1), sigma), obs=y)


def kidscore(x, y):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def garch(y, sigma1):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))  # flat where alpha1 + beta1 < 1
    alpha1, beta1 = shares[..., 0], shares[..., 1]
    news = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = torch.cat([(sigma1**2).expand((*news.shape[:-1], 1)), news], -1)
    lag = 1
    while lag < len(y):  # s_t^2 = news_t + beta1 s_(t-1)^2, summed by doubling
        variance = variance + beta1**lag * pad(variance[..., :-lag], (lag, 0))
        lag *= 2
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def eight_schools_data(d):
    return torch.tensor(d["y"]).float(), torch.tensor(d["sigma"]).float()


def ark_data(d):
    y, k = torch.tensor(d["y"]), d["K"]
    return torch.stack([y[k - i : len(y) - i] for i in range(1, k + 1)], -1), y[k:]


def kidscore_data(d):
    hs, iq = torch.tensor(d["mom_hs"]).float(), torch.tensor(d["mom_iq"]).float()
    return torch.stack([torch.ones_like(hs), hs, iq, hs * iq], -1), torch.tensor(d["kid_score"]).float()


def garch_data(d):
    return torch.tensor(d["y"]), torch.tensor(d["sigma1"])


def columns(*parts):
    return torch.cat([p.reshape(len(p), -1) for p in parts], -1)


# name: model, data, the draws (S, ...) of the latents as coordinates (S, D) in the order of the reference
POSTERIORS = {
    "eight_schools-eight_schools_noncentered": (
        eight_schools,
        eight_schools_data,
        lambda d: columns(d["mu"].view(-1, 1) + d["tau"].view(-1, 1) * d["t"], d["mu"], d["tau"]),
    ),
    "arK-arK": (ark, ark_data, lambda d: columns(d["alpha"], d["beta"], d["sigma"])),
    "kidiq-kidscore_interaction": (kidscore, kidscore_data, lambda d: columns(d["beta"], d["sigma"])),
    "garch-garch11": (garch, garch_data, lambda d: columns(d["mu"], d["alpha0"], d["shares"].flatten(1)[:, :2])),
}


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
PARTICLES = 16


def moments(draws, weights=None):
    x = draws.double()
    w = torch.full((len(x), 1), 1 / len(x)) if weights is None else weights.unsqueeze(-1)
    mean = (w * x).sum(0)
    return mean, (w * (x - mean) ** 2).sum(0).sqrt()


def score(name, ratios, draws, coordinates, reference, seconds, steps):
    """A row of the table: errors in units of the reference's standard deviations, plain and PSIS-corrected."""
    result = gx.diagnostics.Importance(ratios, draws)
    row = {"guide": name, "elbo": result.elbo, "khat": result.khat, "ess": result.ess / len(ratios)}
    mean, sd = (torch.tensor(reference[k]).double() for k in ("mean", "sd"))
    x = coordinates(result.draws)
    for label, weights in (("", None), (" psis", result.log_weights.exp())):
        m, s = moments(x, weights)
        worst = (s / sd).log().abs().argmax()
        row |= {"mean" + label: ((m - mean) / sd).abs().max().item(), "sd" + label: (s / sd)[worst].item()}
    return {**row, "seconds": seconds, "steps": steps}


def fit_torch(name, model, data, coordinates, reference, **options):
    """Fits one guide of this library or of Pyro; a row of the table."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = {**OURS, **PYRO}[name](model)
    start = time.process_time()
    result = gx.fit_guide(model, guide, *data, num_particles=PARTICLES, progress=False, **options)
    seconds = time.process_time() - start
    torch.manual_seed(1)
    found = gx.diagnostics.psis(model, guide, *data, num_samples=SAMPLES)
    return score(name, found.log_ratios, found.draws, coordinates, reference, seconds, result.steps)


def steps_in(seconds, name, model, data):
    """How many steps a guide of Pyro makes in a time."""
    guide = PYRO[name](model)
    gx.fit_guide(model, guide, *data, steps=5, num_particles=PARTICLES, progress=False)
    start = time.process_time()
    gx.fit_guide(model, guide, *data, steps=50, num_particles=PARTICLES, progress=False)
    return max(100, int(seconds / (time.process_time() - start) * 50))


def fit_numpyro(name, posterior, data, coordinates, reference, steps, lr):
    """The same for a guide of NumPyro, with Adam and a cosine as learning rate."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide
    from numpyro.infer.util import log_density
    from posteriors_numpyro import MODELS

    model, data = MODELS[posterior], [jax.numpy.asarray(x.numpy()) for x in data]
    guide = getattr(autoguide, name.split()[1])(model)
    adam = numpyro.optim.Adam(lambda step: lr * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * step / steps)))
    start = time.process_time()
    svi = SVI(model, guide, adam, Trace_ELBO(num_particles=PARTICLES))
    params = svi.run(jax.random.PRNGKey(0), steps, *data, progress_bar=False, stable_update=True).params
    seconds = time.process_time() - start

    def draw(key):
        log_q, trace = log_density(numpyro.handlers.seed(guide, key), data, {}, params)
        latents = {n: site["value"] for n, site in trace.items() if site["type"] == "sample"}
        log_p, _ = log_density(numpyro.handlers.seed(model, key), data, {}, latents)
        return log_p - log_q, latents

    ratios, latents = jax.vmap(draw)(jax.random.split(jax.random.PRNGKey(1), SAMPLES))
    draws = {n: torch.tensor(np.asarray(x)) for n, x in latents.items()}
    return score(name, torch.tensor(np.asarray(ratios)), draws, coordinates, reference, seconds, steps)


def better(*rows):
    return max(rows, key=lambda row: row["elbo"] if math.isfinite(row["elbo"]) else -math.inf)


def table(posterior, names, folder):
    """The rows of one posterior."""
    model, load, coordinates = POSTERIORS[posterior]
    data = load(json.loads((folder / f"{posterior}.data.json").read_text()))
    reference = np.load(folder / f"{posterior}.npz")
    seconds, steps = 60.0, 5000  # unless a flow says otherwise
    for name in names:
        common = model, data, coordinates, reference
        if name in OURS:
            row = fit_torch(name, *common)
            if name == "AutoFlow(iaf)":
                seconds, steps = row["seconds"], row["steps"]
        elif name in PYRO:
            count = steps_in(seconds, name, model, data)
            row = better(*(fit_torch(name, *common, steps=count, lr=lr) for lr in (0.03, 0.01)))
        else:
            row = better(*(fit_numpyro(name, posterior, *common[1:], steps, lr) for lr in (0.01, 0.003)))
        yield row


def line(cells):
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--guides", nargs="*", default=DEFAULT, choices=[*OURS, *PYRO, *NUMPYRO])
    args = parser.parse_args()
    for name in args.only:
        posterior = next(n for n in POSTERIORS if name in n)
        print(f"\n{posterior}\n")
        for i, row in enumerate(table(posterior, args.guides, args.data)):
            if not i:
                print(line(row), line("---" for _ in row), sep="\n")
            print(
                line(f"{x:.{1 if k == 'seconds' else 3}f}" if isinstance(x, float) else str(x) for k, x in row.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
