"""The models of posteriors.py in NumPyro."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * t, sigma), obs=y)


def ark(lags, y):
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def kidscore(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def garch(y, sigma1):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = numpyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1, beta1, _ = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    variance = jnp.concatenate([sigma1[None] ** 2, alpha0 + alpha1 * (y[:-1] - mu) ** 2])
    lag = 1
    while lag < len(y):
        variance = variance + beta1**lag * jnp.pad(variance[:-lag], (lag, 0))
        lag *= 2
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


MODELS = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "arK-arK": ark,
    "kidiq-kidscore_interaction": kidscore,
    "garch-garch11": garch,
}
