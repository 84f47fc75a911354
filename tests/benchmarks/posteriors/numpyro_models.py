"""The models of ``models.py`` in NumPyro, with the same latents and arguments."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


def flat(name, support, *shape):
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


def normal_vector(name, scale, size):
    return numpyro.sample(name, dist.Normal(0.0, scale).expand([size]).to_event(1))


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * t, sigma), obs=y)


def ark(lags, y):
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = normal_vector("beta", 10.0, lags.shape[1])
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def regression(x, y):
    beta = flat("beta", constraints.real_vector, x.shape[1])
    sigma = flat("sigma", constraints.positive)
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore(x, y):
    beta = flat("beta", constraints.real_vector, x.shape[1])
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def blr(x, y):
    beta = normal_vector("beta", 10.0, x.shape[1])
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kilpisjarvi(x, y, loc, scale):
    alpha = numpyro.sample("alpha", dist.Normal(loc[0], scale[0]))
    beta = numpyro.sample("beta", dist.Normal(loc[1], scale[1]))
    sigma = flat("sigma", constraints.positive)
    numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def diamonds(x, y):
    b = normal_vector("b", 1.0, x.shape[1])
    intercept = numpyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat("sigma", constraints.positive)
    numpyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def garch(y, sigma1):
    mu = flat("mu", constraints.real)
    alpha0 = flat("alpha0", constraints.positive)
    alpha1, beta1, _ = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    variance = jnp.concatenate([sigma1[None] ** 2, alpha0 + alpha1 * (y[:-1] - mu) ** 2])
    lag = 1
    while lag < len(y):
        variance = variance + beta1**lag * jnp.pad(variance[:-lag], (lag, 0))
        lag *= 2
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def gaussian_process(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    smooth = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(y)), smooth + sigma * jnp.eye(len(y))), obs=y)


def increasing(name, loc):
    x = flat(name, constraints.positive_ordered_vector, len(loc))
    numpyro.factor(f"{name}_prior", dist.Normal(jnp.array(loc), 1.0).log_prob(x).sum())
    return x


def hidden_markov(theta, emitted):
    """Sums out the states by the forward algorithm, given log densities (times, states)."""

    def step(weights, row):
        return row + jax.nn.logsumexp(weights[:, None] + jnp.log(theta), 0), None

    weights, _ = jax.lax.scan(step, emitted[0] - jnp.log(len(theta)), emitted[1:])
    numpyro.factor("y", jax.nn.logsumexp(weights))


def hmm(y):
    theta = numpyro.sample("theta", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    mu = increasing("mu", [3.0, 10.0])
    hidden_markov(theta, dist.Normal(mu, 1.0).log_prob(y[:, None]))


def hmm_drive(y, alpha):
    theta = numpyro.sample("theta", dist.Dirichlet(alpha).to_event(1))
    phi, rate = increasing("phi", [0.0, 3.0]), increasing("lambda", [0.0, 3.0])
    hidden_markov(theta, dist.Exponential(jnp.stack([phi, rate], -1)).log_prob(y[:, None]).sum(-1))
