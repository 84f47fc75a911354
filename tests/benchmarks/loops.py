"""Default fits of models that are written for one draw: ARMA(1, 1) of 200 observations, as a loop over scalars.

    OMP_NUM_THREADS=1 python tests/benchmarks/loops.py

``sites`` observes each time step at a site of its own, ``stacked`` stacks the means for one site in a plate, and ``branching`` does
so unless a latent has another sign. Columns: the way in which draws are evaluated, CPU seconds of the warm start and of the fit,
steps, milliseconds per step, ELBO (nats) and k-hat of 2000 draws.
"""

import time
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from timing import show

import pyro_genexact as gx
from pyro_genexact.inference.bounds import Bound
from pyro_genexact.inference.elbo import default_loss

LENGTH = 200


def series() -> torch.Tensor:
    torch.manual_seed(0)
    noise, y = 0.5 * torch.randn(LENGTH), torch.zeros(LENGTH)
    for t in range(1, LENGTH):
        y[t] = 0.3 + 0.7 * y[t - 1] + noise[t] + 0.4 * noise[t - 1]
    return y


def latents():
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    return mu, phi, theta, pyro.sample("sigma", dist.HalfCauchy(2.5))


def sites(y):
    mu, phi, theta, sigma = latents()
    mean = mu + phi * mu
    for t in range(len(y)):
        pyro.sample(f"y_{t}", dist.Normal(mean, sigma), obs=y[t])
        mean = mu + phi * y[t] + theta * (y[t] - mean)


def stacked(y, branch=False):
    mu, phi, theta, sigma = latents()
    means = [mu + phi * mu]
    for t in range(len(y) - 1):
        means.append(mu + phi * y[t] + theta * (y[t] - means[-1]))
    if branch and sigma < 0:
        raise AssertionError
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(means), sigma), obs=y)


def way(loss) -> str:
    if isinstance(loss, Bound):
        return f"{loss.num_particles} draws by vmap"
    return f"{loss.num_particles} draws " + ("in a plate" if loss.vectorize_particles else "one by one")


def main() -> None:
    y, rows = series(), []
    models = {"sites": sites, "stacked": stacked, "branching": partial(stacked, branch=True)}
    for name, model in models.items():
        pyro.set_rng_seed(0)
        guide = gx.guides.AutoFlow(model)
        start = time.process_time()
        guide(y)
        warm = time.process_time() - start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how = way(default_loss(partial(model, y), partial(guide, y), None))
            start = time.process_time()
            result = gx.fit_guide(model, guide, y, progress=False)
        fit = time.process_time() - start
        found = gx.diagnostics.psis(model, guide, y, num_samples=2000)
        step = f"{1000 * fit / result.steps:.0f}"
        rows.append(
            [name, how, f"{warm:.0f}", f"{fit:.0f}", str(result.steps), step, f"{found.elbo:.2f}", f"{found.khat:.2f}"]
        )
    show(["model", "draws", "warm start", "fit", "steps", "ms", "ELBO", "k-hat"], rows, markdown=True)


if __name__ == "__main__":
    main()
