"""Log densities of the fourteen posteriors up to a constant, in NumPy, written independently of the Pyro models.

Each function takes the data of posteriordb and the coordinates of one reference draw. Densities are those of the latents, so
that of eight schools is one of (t, mu, tau), not of (theta, mu, tau).
"""

import numpy as np
from scipy.special import logsumexp
from scipy.stats import cauchy, expon, gamma, multivariate_normal, norm, t


def eight_schools(d, x):
    theta, mu, tau = x[:8], x[8], x[9]
    prior = norm.logpdf((theta - mu) / tau).sum() + norm.logpdf(mu, 0, 5) + cauchy.logpdf(tau, 0, 5)
    return prior + norm.logpdf(d["y"], theta, d["sigma"]).sum()


def ark(d, x):
    alpha, beta, sigma, y, k = x[0], x[1:6], x[6], np.array(d["y"]), d["K"]
    prior = norm.logpdf(x[:6], 0, 10).sum() + cauchy.logpdf(sigma, 0, 2.5)
    return prior + sum(norm.logpdf(y[i], alpha + beta @ y[i - k : i][::-1], sigma) for i in range(k, len(y)))


def normal_rows(y, mean, sigma):
    return norm.logpdf(np.asarray(y, float), mean, sigma).sum()


def kidscore(d, x):
    hs, iq = np.array(d["mom_hs"]), np.array(d["mom_iq"])
    mean = x[0] + x[1] * hs + x[2] * iq + x[3] * hs * iq
    return cauchy.logpdf(x[4], 0, 2.5) + normal_rows(d["kid_score"], mean, x[4])


def garch(d, x):
    mu, alpha0, alpha1, beta1 = x
    variance, total = d["sigma1"] ** 2, 0.0
    for i, y in enumerate(d["y"]):
        if i:
            variance = alpha0 + alpha1 * (d["y"][i - 1] - mu) ** 2 + beta1 * variance
        total += norm.logpdf(y, mu, variance**0.5)
    return total


def gaussian_process(d, x):
    rho, alpha, sigma = x
    gaps = np.subtract.outer(d["x"], d["x"])
    cov = alpha**2 * np.exp(-(gaps**2) / (2 * rho**2)) + sigma * np.eye(d["N"])
    prior = gamma.logpdf(rho, 25, scale=1 / 4) + norm.logpdf(alpha, 0, 2) + norm.logpdf(sigma)
    return prior + multivariate_normal.logpdf(d["y"], np.zeros(d["N"]), cov)


def forward(theta, emitted):
    """The forward algorithm with weight 1 for each first state; ``emitted`` has a row of log densities per time."""
    weights = emitted[0]
    for row in emitted[1:]:
        weights = row + logsumexp(weights[:, None] + np.log(theta), 0)
    return logsumexp(weights)


def hmm(d, x):
    emitted = np.stack([norm.logpdf(d["y"], mu, 1) for mu in x[4:]], 1)
    return norm.logpdf(x[4], 3) + norm.logpdf(x[5], 10) + forward(x[:4].reshape(2, 2), emitted)


def hmm_drive(d, x):
    theta, phi, rate = x[:4].reshape(2, 2), x[4:6], x[6:]
    emitted = [
        expon.logpdf(d["u"], scale=1 / a) + expon.logpdf(d["v"], scale=1 / b) for a, b in zip(phi, rate, strict=True)
    ]
    prior = norm.logpdf(phi, [0, 3]).sum() + norm.logpdf(rate, [0, 3]).sum()
    return prior + ((np.array(d["alpha"]) - 1) * np.log(theta)).sum() + forward(theta, np.stack(emitted, 1))


def diamonds(d, x):
    b, intercept, sigma = x[:24], x[24], x[25]
    columns = np.array(d["X"])[:, 1:]
    prior = norm.logpdf(b).sum() + t.logpdf(intercept, 3, 8, 10) + t.logpdf(sigma, 3, 0, 10)
    return prior + normal_rows(d["Y"], intercept + columns @ b - columns.mean(0) @ b, sigma)


def nes(d, x):
    ages = {1: 0.0, 2: x[3], 3: x[4], 4: x[5]}
    mean = x[0] + x[1] * np.array(d["real_ideo"]) + x[2] * np.array(d["race_adj"])
    mean += [ages[age] for age in d["age_discrete"]]
    mean += x[6] * np.array(d["educ1"]) + x[7] * np.array(d["gender"]) + x[8] * np.array(d["income"])
    return normal_rows(d["partyid7"], mean, x[9])


def kilpisjarvi(d, x):
    alpha, beta, sigma = x
    prior = norm.logpdf(alpha, d["pmualpha"], d["psalpha"]) + norm.logpdf(beta, d["pmubeta"], d["psbeta"])
    return prior + normal_rows(d["y"], alpha + beta * np.array(d["x"]), sigma)


def earnings(d, x):
    height, male = np.array(d["height"]), np.array(d["male"])
    return normal_rows(np.log(d["earn"]), x[0] + x[1] * height + x[2] * male + x[3] * height * male, x[4])


def blr(d, x):
    prior = norm.logpdf(x[:5], 0, 10).sum() + norm.logpdf(x[5], 0, 10)
    return prior + normal_rows(d["y"], np.array(d["X"]) @ x[:5], x[5])


def mesquite(d, x):
    mean = x[0] + x[1] * np.array(d["diam1"]) + x[2] * np.array(d["diam2"]) + x[3] * np.array(d["canopy_height"])
    mean += x[4] * np.array(d["total_height"]) + x[5] * np.array(d["density"]) + x[6] * np.array(d["group"])
    return normal_rows(d["weight"], mean, x[7])


FORMULAS = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "arK-arK": ark,
    "kidiq-kidscore_interaction": kidscore,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gaussian_process,
    "hmm_example-hmm_example": hmm,
    "bball_drive_event_0-hmm_drive_0": hmm_drive,
    "diamonds-diamonds": diamonds,
    "nes1972-nes": nes,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "earnings-logearn_interaction": earnings,
    "sblrc-blr": blr,
    "sblri-blr": blr,
    "mesquite-mesquite": mesquite,
}
