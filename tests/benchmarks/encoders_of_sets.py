"""One encoder for 1 ... 1000 exchangeable observations: KL(posterior || flow) in nats at each number N of them.

    OMP_NUM_THREADS=1 python tests/benchmarks/encoders_of_sets.py [--models NAME ...] [--encoders NAME ...] [--flows NAME ...]

Models with conjugate posteriors: ``mean`` is N(mu, 1) with mu ~ N(0, 1); ``both`` is N(mu, s^2) with s^-2 ~ Gamma(3, 3) and
mu ~ N(0, s^2), whose latents are mu and log s. Encoder and flow are trained by ``fit`` on simulations with N log-uniform between 1
and 1000; the KL is the mean over 300 new data sets of each N of that over 200 draws of the exact posterior. The flow ``nsf`` has
default settings; ``located`` is the same flow under a shift and a scale of each latent that are linear in the features of the
encoder; ``Amortized`` is the guide with its default settings, with the precision s^-2 in place of log s.
"""

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch

import pyro_genexact as gx
from pyro_genexact.transforms import AutoregressiveTransform, Inverse, Standardize

SIZES = (1, 3, 10, 30, 100, 300, 1000)
FEATURES = 64
ENCODERS = {"DeepSet": gx.encoders.DeepSet, "SetTransformer": gx.encoders.SetTransformer}


class Mean:
    latents = 1

    def simulate(self, rows, items):
        mu = torch.randn(rows, 1)
        return mu, mu + torch.randn(rows, items)

    def posterior(self, y):
        n = y.shape[1]
        return lambda t: dist.Normal(y.sum(1) / (1 + n), (1 + n) ** -0.5).log_prob(t[..., 0])

    def draws(self, y, num):
        n = y.shape[1]
        return dist.Normal(y.sum(1) / (1 + n), (1 + n) ** -0.5).sample((num,)).unsqueeze(-1)


class Both:
    """The posterior: s^-2 ~ Gamma(3 + n / 2, b) and mu ~ N(sum y / (1 + n), s^2 / (1 + n))."""

    latents = 2

    def simulate(self, rows, items):
        log_s = -0.5 * dist.Gamma(3.0, 3.0).sample((rows, 1)).log()
        mu = log_s.exp() * torch.randn(rows, 1)
        return torch.cat([mu, log_s], 1), mu + log_s.exp() * torch.randn(rows, items)

    def parts(self, y):
        n, y = y.shape[1], y.double()
        centre = y.sum(1) / (1 + n)
        b = 3 + 0.5 * ((y - centre[:, None]).square().sum(1) + centre.square())
        return dist.Gamma(3 + 0.5 * n, b), lambda log_s: dist.Normal(centre, log_s.exp() * (1 + n) ** -0.5)

    def posterior(self, y):
        precision, location = self.parts(y)

        def log_prob(t):
            mu, log_s = t.double().unbind(-1)
            return precision.log_prob((-2 * log_s).exp()) + math.log(2) - 2 * log_s + location(log_s).log_prob(mu)

        return log_prob

    def draws(self, y, num):
        precision, location = self.parts(y)
        log_s = -0.5 * precision.sample((num,)).log()
        return torch.stack([location(log_s).sample(), log_s], -1).float()


MODELS = {"mean": Mean(), "both": Both()}


class Amortised(gx.DistributionModule):
    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def forward(self, values, lengths):
        longest = int(lengths.max())
        return self.flow(self.encoder(gx.PaddedSequence(values[:, :longest, None], lengths)))


def nsf(theta):
    return gx.flows.nsf(theta.shape[1], context=FEATURES, standardize=theta)


def located(theta):
    size = theta.shape[1]
    net = gx.conditioners.Independent(size, 2, context=FEATURES, hidden=())
    parts = [*gx.flows.nsf(size, context=FEATURES).transforms][:-1]
    own = [AutoregressiveTransform(net, gx.heads.Affine()), Inverse(Standardize.from_data(theta))]
    return gx.Flow([*parts, *own], dist.Normal(torch.zeros(size), 1.0).to_event(1))


FLOWS = {"nsf": nsf, "located": located}


def pyro_mean():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), 1.0).expand([*mu.shape, SIZES[-1]]).to_event(1))


def pyro_both():
    precision = pyro.sample("precision", dist.Gamma(3.0, 3.0))
    s = precision.rsqrt()
    mu = pyro.sample("mu", dist.Normal(0.0, s))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), s.unsqueeze(-1)).expand([*mu.shape, SIZES[-1]]).to_event(1))


def latents_of(theta):
    found = {"mu": theta[..., 0]}
    return found if theta.shape[-1] == 1 else {**found, "precision": (-2 * theta[..., 1]).exp()}


class Guide:
    """The guide with its default settings, as a function like the modules above."""

    def __init__(self, name, encoder):
        self.model = {"mean": pyro_mean, "both": pyro_both}[name]
        self.guide = gx.guides.Amortized(self.model, observed="y", encoder=encoder)

    def fit(self, theta, y, lengths, epochs):
        simulations = {**latents_of(theta), "y": gx.PaddedSequence(y, lengths)}
        gx.fit_amortized(
            self.model, self.guide, simulations=simulations, validation=0.05, epochs=epochs, progress=False
        )

    def __call__(self, y, lengths):
        self.observations = {"y": gx.PaddedSequence(y, lengths)}
        return self

    def log_prob(self, theta):
        found = self.guide.log_prob(latents_of(theta), self.observations)
        return found if theta.shape[-1] == 1 else found + math.log(2) - 2 * theta[..., 1]


@torch.no_grad()
def divergences(model, module):
    """The mean KL and its standard error at each N."""
    found = {}
    for n in SIZES:
        _, y = model.simulate(300, n)
        t = model.draws(y, 200)
        q = module(y, torch.full((len(y),), n)).log_prob(t)
        kl = (model.posterior(y)(t) - q).mean(0)
        found[n] = float(kl.mean()), float(kl.std() / len(y) ** 0.5)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=[*ENCODERS])
    parser.add_argument("--flows", nargs="+", choices=[*FLOWS, "Amortized"], default=["Amortized"])
    parser.add_argument("--simulations", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    print("model encoder flow | KL (nats) at N =", *SIZES, "| CPU seconds", flush=True)
    for name in options.models:
        model = MODELS[name]
        torch.manual_seed(0)
        lengths = torch.exp(torch.rand(options.simulations) * math.log(1001)).long().clamp(1, 1000)
        theta, y = model.simulate(options.simulations, 1000)
        for kind in options.encoders:
            for flow in options.flows:
                torch.manual_seed(1)
                encoder, start = ENCODERS[kind](1, FEATURES), time.process_time()
                if flow == "Amortized":
                    module = Guide(name, encoder)
                    module.fit(theta, y, lengths, options.epochs)
                else:
                    encoder.standardize(gx.PaddedSequence(y[:2000, :, None], lengths[:2000]))
                    module = Amortised(encoder, FLOWS[flow](theta))
                    context = {"values": y, "lengths": lengths}
                    gx.fit(module, theta, context, validation=0.05, epochs=options.epochs, progress=False)
                seconds = time.process_time() - start
                figures = [f"{kl:.4f}±{error:.4f}" for kl, error in divergences(model, module).values()]
                print(name, kind, flow, "|", *figures, f"| {seconds:.0f}", flush=True)


if __name__ == "__main__":
    main()
