"""Reference posteriors of posteriordb: automatic guides of this library, of Pyro and of NumPyro beside long runs of NUTS.

    OMP_NUM_THREADS=1 python tests/benchmarks/posteriors.py --data DIR [--only NAME ...] [--guides NAME ...] [--markdown]

DIR holds ``NAME.data.json`` and ``NAME.npz`` (means and standard deviations of reference draws) of stan-dev/posteriordb. Guides
of this library are fitted by ``fit_guide`` with default settings; Pyro's by the same function for the same wall time, of
two learning rates the better; NumPyro's by its own SVI for the same number of steps and draws a step, of two learning
rates the better. Needs the extra ``bench`` for the last.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints
from torch.nn.functional import pad

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
    variance = torch.cat([(sigma1**2).expand(news.shape[:-1] + (1,)), news], -1)
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

OURS = {
    "AutoFlow(iaf)": lambda model: gx.guides.AutoFlow(model),
    "AutoFlow(nsf)": lambda model: gx.guides.AutoFlow(model, gx.flows.nsf),
}
PYRO = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[64], num_transforms=2),
}


def moments(draws, weights=None):
    x = draws.double()
    w = torch.full((len(x), 1), 1 / len(x)) if weights is None else weights.unsqueeze(-1)
    mean = (w * x).sum(0)
    return mean, (w * (x - mean) ** 2).sum(0).sqrt()


def score(name, model, data, guide, coordinates, reference, seconds, steps):
    """A row of the table: errors in units of the reference's standard deviations, plain and PSIS-corrected."""
    torch.manual_seed(1)
    result = gx.diagnostics.psis(model, guide, *data, num_samples=SAMPLES)
    row = {"guide": name, "elbo": result.elbo, "khat": result.khat, "ess": result.ess / SAMPLES, "seconds": seconds, "steps": steps}
    mean, sd = (torch.tensor(reference[k]).double() for k in ("mean", "sd"))
    x = coordinates(result.draws)
    for label, weights in (("", None), (" psis", result.log_weights.exp())):
        m, s = moments(x, weights)
        row["mean" + label] = ((m - mean) / sd).abs().max().item()
        row["sd" + label] = (s / sd).log().abs().max().exp().item()
    return row


def show(row):
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--guides", nargs="*")
    args = parser.parse_args()
    for name in args.only:
        name = next(n for n in POSTERIORS if name in n)
        model, load, coordinates = POSTERIORS[name]
        data = load(json.loads((args.data / f"{name}.data.json").read_text()))
        reference = np.load(args.data / f"{name}.npz")
        print(name)
        for label, make in {**OURS, **PYRO}.items():
            if args.guides and label not in args.guides:
                continue
            pyro.set_rng_seed(0)
            pyro.clear_param_store()
            guide = make(model)
            start = time.perf_counter()
            result = gx.fit_guide(model, guide, *data, progress=False)
            seconds = time.perf_counter() - start
            show(score(label, model, data, guide, coordinates, reference, seconds, result.steps))


if __name__ == "__main__":
    main()
