"""The models of posteriors of posteriordb in Pyro, without loops over data.

With S draws at once, latents have batch dims (S,), or (S, 1) if the model has a plate, on the left of those written here.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch.nn.functional import pad

import pyro_genexact as gx


def flat(name, support, *shape):
    """A latent with a flat prior."""
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


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


def regression(x, y):
    """Linear regression with flat priors."""
    beta = flat("beta", constraints.real_vector, x.shape[1])
    sigma = flat("sigma", constraints.positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def kidscore(x, y):
    beta = flat("beta", constraints.real_vector, x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def blr(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), sigma), obs=y)


def kilpisjarvi(x, y, loc, scale):
    alpha = pyro.sample("alpha", dist.Normal(loc[0], scale[0]))
    beta = pyro.sample("beta", dist.Normal(loc[1], scale[1]))
    sigma = flat("sigma", constraints.positive)
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def diamonds(x, y):
    """The rows are one event, because a product of matrices is faster than a sum over columns within a plate."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    intercept = pyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat("sigma", constraints.positive)
    pyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    pyro.sample("y", dist.Normal(intercept.unsqueeze(-1) + b @ x.T, sigma.unsqueeze(-1)).to_event(1), obs=y)


def garch(y, sigma1):
    mu = flat("mu", constraints.real)
    alpha0 = flat("alpha0", constraints.positive)
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


def gaussian_process(x, y):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho, alpha, sigma = (value[..., None, None] for value in (rho, alpha, sigma))
    smooth = alpha**2 * (-((x.unsqueeze(-1) - x) ** 2) / (2 * rho**2)).exp()
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), smooth + sigma * torch.eye(len(y))), obs=y)


def increasing(name, loc):
    """Increasing positive numbers, each with prior Normal(loc, 1)."""
    x = flat(name, constraints.positive_ordered_vector, len(loc))
    pyro.factor(f"{name}_prior", dist.Normal(torch.tensor(loc), 1.0).log_prob(x).sum(-1))
    return x


def hidden_markov(theta, emission, y):
    """Observes a series given rows theta of transitions and the emission (..., 1, states); its states are summed out."""
    initial, transition = torch.zeros(theta.shape[-1]), theta.log().unsqueeze(-3)
    pyro.sample("y", gx.HiddenMarkov(initial, transition, emission, duration=len(y)), obs=y)


def hmm(y):
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = increasing("mu", [3.0, 10.0])
    hidden_markov(theta, dist.Normal(mu.unsqueeze(-2), 1.0), y)


def hmm_drive(y, alpha):
    theta = pyro.sample("theta", dist.Dirichlet(alpha).to_event(1))
    phi, rate = increasing("phi", [0.0, 3.0]), increasing("lambda", [0.0, 3.0])
    hidden_markov(theta, dist.Exponential(torch.stack([phi, rate], -1).unsqueeze(-3)).to_event(1), y)
