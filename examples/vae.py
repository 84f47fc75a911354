"""Variational autoencoders of handwritten digits with flows as guide and as prior.

    python examples/vae.py [--out vae.png] [--smoke-test]

The data are scikit-learn's 1797 images of digits: 8 x 8 pixels with grey levels 0 to
16. The training images are distorted at random, which reduces overfitting. The model
has 8 latents z for each image, and the pixels are independent given z:

    z ~ prior,    x_j ~ discretised logistic on 0, ..., 16

A decoder network computes the location and the scale of each pixel from z. The guide
q(z | x) depends on the output of an encoder network and is one of:

* Gaussian: independent normals;
* IAF: the same normals, transformed by an inverse autoregressive flow that also reads
  the encoder's output. It starts near the Gaussian, which is a special case.

The prior is standard normal or a masked autoregressive flow (MAF). Each model is fitted
together with its guide; networks, steps and settings are the same for all. During the
first phase the terms of z have a weight of 0.1, which prevents the model from switching
latents off before the decoder uses them.

The tables report, for the test images, with two standard errors over images:

* ELBO: the evidence lower bound in nats per image;
* IW: the importance-weighted bound log 1/K sum_k p(x, z_k) / q(z_k | x) in nats per
  image, which approaches log p(x) from below. It evaluates the model, whereas the ELBO
  evaluates the model and the guide together. The z_k are drawn with twice the standard
  deviation of the guide's noise, because guides are narrower than posteriors;
* active: the number of latents whose posterior mean has a variance above 0.05.

The example then freezes the models and fits other guides to them. The ELBO changes,
but the IW bound should not. A guide "of each image" has no encoder: the encoder's
outputs are free parameters, which are fitted to each test image. The gain of such a
guide is the loss due to the encoder (the amortisation gap).

The last model has 2 latents. Its log p(x) is computed by quadrature.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from _digits_figure import Posterior, draw, grid
from pyro import poutine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, one_hot

import pyro_genexact as gx

LEVELS, SIDE, HIDDEN = 17, 8, 128
PIXELS = SIDE * SIDE
WIDE = 2.0  # multiplies the standard deviation of the guide's noise for IW bounds


class Bounds(NamedTuple):
    elbo: Tensor  # (N,) nats
    iw: Tensor  # (N,) nats
    active: int


class Plane(NamedTuple):
    """The model with two latents and its guides."""

    vae: VAE
    guides: dict[str, VAE]
    kl: dict[str, Tensor]  # (N,) from each guide to the posterior, nats


def digits(copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns distorted training images, test images and the digits of the latter."""
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.data), generator=generator)
    x = torch.tensor(data.data).float()[order]
    label = torch.tensor(data.target)[order]
    train = x[500:].repeat(copies, 1).view(-1, 1, SIDE, SIDE)
    maps = torch.eye(2, 3) + 0.05 * torch.randn(len(train), 2, 3, generator=generator)
    grid = affine_grid(maps, list(train.shape), align_corners=False)
    train = grid_sample(train, grid, mode="bicubic", align_corners=False)
    return train.round().clamp(0, LEVELS - 1).flatten(1), x[200:500], label[200:500]


def mlp(*sizes: int) -> nn.Sequential:
    pairs = itertools.pairwise(sizes)
    layers = [part for a, b in pairs for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A model of images and its guide.

    Args:
        D: number of latents.
        guide: "Gaussian" or "IAF".
        prior: "normal" or "MAF".
        of: a VAE whose model is shared; only the guide is new.
    """

    def __init__(
        self, D: int, guide: str = "Gaussian", prior: str = "normal", of: Any = None
    ) -> None:
        super().__init__()
        options = {"transforms": 2, "hidden": (64,), "activation": torch.tanh}
        self.D, self.head = D, gx.heads.DiscretizedLogistic(LEVELS)
        if of is None:
            self.decoder = mlp(D, HIDDEN, HIDDEN, PIXELS * self.head.num_params)
            self.flow = gx.flows.maf(D, **options) if prior == "MAF" else None
        else:
            self.decoder, self.flow = of.decoder, of.flow
        self.encoder = nn.Sequential(mlp(PIXELS, HIDDEN, HIDDEN), nn.SiLU())
        self.normals = nn.Linear(HIDDEN, 2 * D)
        self.iaf = None
        if guide == "IAF":
            self.iaf = gx.flows.iaf(D, context=HIDDEN, **options)

    def prior(self) -> dist.TorchDistribution:
        if self.flow is not None:
            return self.flow()
        return dist.Normal(torch.zeros(self.D), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        return self.head(self.decoder(z).unflatten(-1, (PIXELS, -1))).to_event(1)

    def q(self, x: Tensor, wide: float = 1.0) -> dist.TorchDistribution:
        """The guide's distribution; ``wide`` multiplies its noise's deviations."""
        h = self.encoder(x / LEVELS)
        loc, log_scale = self.normals(h).chunk(2, -1)
        base = dist.Normal(loc, wide * log_scale.exp()).to_event(1)
        if self.iaf is None:
            return base
        return dist.TransformedDistribution(base, self.iaf(h).transforms)

    def model(self, x: Tensor, batch: int | None = None, weight: float = 1.0) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(x), subsample_size=batch) as rows:
            with poutine.scale(scale=weight):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x[rows])

    def guide(
        self, x: Tensor, batch: int | None = None, weight: float = 1.0, wide: float = 1
    ) -> None:
        pyro.module("vae", self)
        plate = pyro.plate("images", len(x), subsample_size=batch)
        with plate as rows, poutine.scale(scale=weight):
            pyro.sample("z", self.q(x[rows], wide))


class PerImage(nn.Module):
    """Replaces an encoder: a table of free outputs, one row for each known image."""

    def __init__(self, images: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.images, self.outputs = images, nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.unsqueeze(1) == self.images).all(-1).int().argmax(1)
        return self.outputs[rows]


def fit(vae: VAE, train: Tensor, steps: int, guide_only: bool = False) -> float:
    """Fits model and guide, or the guide alone; returns the seconds."""
    pyro.clear_param_store()
    run = partial(
        gx.fit_guide,
        vae.model,
        vae.guide,
        train,
        batch=128,
        num_particles=1,
        optimizer=partial(torch.optim.AdamW, lr=4e-3),
        progress=False,
    )
    if guide_only:
        parts = vae.encoder, vae.normals, *([vae.iaf] if vae.iaf else [])
        own = [p for part in parts for p in part.parameters()]
        return run(steps=steps, parameters=own).seconds
    first = run(steps=steps // 4, weight=0.1)
    return first.seconds + run(steps=steps).seconds


def per_image(vae: VAE, x: Tensor, guide: str, steps: int) -> VAE:
    """The same model, and a guide without an encoder, fitted to each image of x."""
    other = VAE(vae.D, guide, of=vae)
    with torch.no_grad():
        if guide == "Gaussian":
            z = vae.q(x).sample((200,))
            outputs = torch.cat([z.mean(0), z.std(0).log()], -1)
            other.normals = nn.Identity()
        else:
            outputs = vae.encoder(x / LEVELS)
            other.normals, other.iaf = vae.normals, vae.iaf
    other.encoder = PerImage(x / LEVELS, outputs)
    pyro.clear_param_store()
    own = [other.encoder.outputs]
    settings = {"steps": steps, "lr": 0.03, "num_particles": 4, "progress": False}
    gx.fit_guide(other.model, other.guide, x, parameters=own, **settings)
    return other


@torch.no_grad()
def log_ratios(
    vae: VAE, x: Tensor, draws: int, wide: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes log p(x, z) - log q(z | x) of draws (K, N), in nats, and their mean z (N, D)."""
    pyro.clear_param_store()
    ratios, means = [], []
    for _ in range(draws // 50):
        many = pyro.plate("draws", 50, dim=-2)
        q = poutine.trace(many(vae.guide)).get_trace(x, wide=wide)
        p = poutine.trace(poutine.replay(many(vae.model), trace=q)).get_trace(x)
        p.compute_log_prob()
        q.compute_log_prob()
        joint = p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"]
        ratios.append(joint - q.nodes["z"]["log_prob"])
        means.append(q.nodes["z"]["value"].mean(0))
    return torch.cat(ratios).double(), torch.stack(means).mean(0)


def bounds(vae: VAE, x: Tensor, draws: int) -> Bounds:
    ratios, means = log_ratios(vae, x, max(50, draws // 10))
    wide, _ = log_ratios(vae, x, draws, WIDE)
    active = int((means.var(0) > 0.05).sum())
    return Bounds(ratios.mean(0), wide.logsumexp(0) - math.log(draws), active)


def mean(x: Tensor) -> str:
    """The mean with two standard errors."""
    return f"{x.mean():.2f} ± {2 * x.std() / math.sqrt(len(x)):.2f}"


@torch.no_grad()
def log_likelihood(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Computes log p(x | z) (G, N) of latents (G, D) and images (N, 64).

    It multiplies tables of all pixels and levels with one-hot images.
    """
    levels = torch.arange(LEVELS).view(-1, 1, 1)
    hot = one_hot(x.long(), LEVELS).float().flatten(1)
    parts = []
    for part in z.split(2000):
        table = vae.likelihood(part).base_dist.log_prob(levels)
        parts.append(table.permute(1, 2, 0).flatten(1) @ hot.T)
    return torch.cat(parts)


@torch.no_grad()
def evidence(vae: VAE, x: Tensor, size: int) -> Tensor:
    """Computes log p(x) (N): the mean of p(x | z) over quantiles of the prior's base noise."""
    (transform,) = vae.prior().transforms
    noise = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    log_x = log_likelihood(vae, x, transform(torch.cartesian_prod(noise, noise)))
    return log_x.double().logsumexp(0) - 2 * math.log(size)


def report_models(
    vaes: dict[str, VAE], train: Tensor, test: Tensor, steps: int, draws: int
) -> dict[str, Bounds]:
    """Fits and evaluates all models; gains are differences from the first."""
    print(
        f"{'guide, prior':<18}{'ELBO':>15}{'gain':>13}{'IW':>15}{'gain':>13}"
        f"{'active':>7}{'fit, s':>7}"
    )
    result: dict[str, Bounds] = {}
    for name, vae in vaes.items():
        seconds = fit(vae, train, steps)
        own = result[name] = bounds(vae, test, draws)
        first = next(iter(result.values()))
        gains = mean(own.elbo - first.elbo), mean(own.iw - first.iw)
        gains = ("", "") if own is first else gains
        row = f"{mean(own.elbo):>15}{gains[0]:>13}{mean(own.iw):>15}{gains[1]:>13}"
        print(f"{name:<18}{row}{own.active:>7}{seconds:>7.0f}", flush=True)
    return result


def report_other_guides(
    vaes: dict[str, VAE],
    own: dict[str, Bounds],
    data: tuple[Tensor, Tensor],
    steps: int,
    draws: int,
) -> None:
    """Fits other guides to the frozen models and prints the changes of the bounds."""
    train, test = data
    print(f"\n{'model of':<18}{'other guide':<28}{'ELBO change':>20}{'IW change':>20}")

    def row(name: str, guide: str, other: VAE) -> None:
        new = bounds(other, test, draws)
        changes = [mean(b - a) for a, b in zip(own[name][:2], new[:2], strict=True)]
        print(f"{name:<18}{guide:<28}{changes[0]:>20}{changes[1]:>20}", flush=True)

    for name, guide in (("Gaussian, normal", "IAF"), ("IAF, normal", "Gaussian")):
        other = VAE(8, guide, of=vaes[name])
        fit(other, train, steps, guide_only=True)
        row(name, guide, other)
    for guide in ("Gaussian", "IAF"):
        other = per_image(vaes["IAF, normal"], test, guide, steps // 3)
        row("IAF, normal", f"{guide} of each image", other)


def report_plane(
    train: Tensor, test: Tensor, steps: int, draws: int, size: int
) -> Plane:
    """Fits a model with two latents and compares three guides with its posteriors."""
    torch.manual_seed(1)
    vae = VAE(2, "IAF", "MAF")
    fit(vae, train, steps)
    guides = {"IAF with encoder": vae}
    for guide in ("IAF", "Gaussian"):
        guides[f"{guide} of each image"] = per_image(vae, test, guide, steps // 3)
    exact, kl = evidence(vae, test, size), {}
    print(f"\nTwo latents, MAF prior: log p(x) by quadrature {mean(exact)}")
    print(
        f"{'guide':<27}{'KL(q || posterior)':>20}{'its median':>13}"
        f"{'IW - log p(x)':>20}"
    )
    for name, one in guides.items():
        found = bounds(one, test, draws)
        gap = kl[name] = exact - found.elbo
        row = f"{mean(gap):>20}{gap.median():>13.2f}{mean(found.iw - exact):>20}"
        print(f"{name:<27}{row}", flush=True)
    loss = mean(kl["IAF with encoder"] - kl["IAF of each image"])
    print(f"The encoder accounts for {loss} nats of the first divergence.")
    return Plane(vae, guides, kl)


@torch.no_grad()
def posterior(plane: Plane, image: Tensor, size: int = 120) -> Posterior:
    """The exact posterior of one image (1, 64) and the guides' densities on a grid."""
    qs = {name: guide.q(image) for name, guide in plane.guides.items()}
    draws = torch.cat([q.sample((2000,))[:, 0] for q in qs.values()])
    low, high = draws.quantile(torch.tensor([0.002, 0.998]), 0)
    margin = 0.25 * (high - low)
    at = grid(low - margin, high + margin, size)
    z = torch.cartesian_prod(*at)
    exact = log_likelihood(plane.vae, image, z)[:, 0] + plane.vae.prior().log_prob(z)
    guides = {name: q.log_prob(z[:, None]).view(size, size) for name, q in qs.items()}
    return Posterior(at, exact.view(size, size), guides)


@torch.no_grad()
def picture(
    vaes: dict[str, VAE], plane: Plane, test: Tensor, label: Tensor, out: Path
) -> None:
    """Draws samples, latents, and two images whose posteriors are far from Gaussian."""
    samples = {"test images": test[:40]}
    for name, vae in vaes.items():
        samples[f"{name} prior"] = vae.likelihood(vae.prior().sample((40,))).sample()
    order = plane.kl["Gaussian of each image"].argsort(descending=True)
    panels = []
    for row in order[[len(order) // 50, len(order) // 10]].tolist():
        kl = {name: gap[row].item() for name, gap in plane.kl.items()}
        one = test[row : row + 1]
        panels.append((f"image of a {label[row]}", posterior(plane, one), kl))
    latents = plane.vae.q(test).sample(), label, plane.vae.prior()
    draw(samples, latents, panels, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("vae.png"), metavar="FILE")
    parser.add_argument(
        "--smoke-test", action="store_true", help="run a few steps to check the code"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    steps, draws, size = (10, 50, 20) if args.smoke_test else (1200, 2000, 300)
    train, test, label = digits(copies=1 if args.smoke_test else 20)
    if args.smoke_test:
        test, label = test[:40], label[:40]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are small

    vaes = {
        "Gaussian, normal": VAE(8),
        "IAF, normal": VAE(8, "IAF"),
        "IAF, MAF": VAE(8, "IAF", "MAF"),
    }
    own = report_models(vaes, train, test, steps, draws)
    report_other_guides(vaes, own, (train, test), steps, draws)
    plane = report_plane(train, test, steps, draws, size)
    picture(vaes, plane, test, label, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
