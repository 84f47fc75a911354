"""Variational autoencoders of handwritten digits: a flow as the guide, a flow as the prior, beside Gaussians.

    python examples/vae.py [--out vae.png] [--smoke-test]

The data are scikit-learn's 1797 digits of 8x8 pixels with levels 0 ... 16. Training images are shown turned, sheared, scaled
and shifted at random by some tenths, which keeps networks from learning them by heart. The model has latents z of
8 features for each image, and pixels that are independent given z:

    z ~ prior,    x_j ~ discretised logistic on 0 ... 16, its location and scale by a network of z

The guide q(z | x) is, given the output of an encoder,

* Gaussian: independent normals;
* IAF: the same normals pushed through an inverse autoregressive flow that reads the encoder's output too, so that
  the Gaussian is a special case, near which it starts.

The prior is standard normal, or a masked autoregressive flow (MAF). Model and guide are fitted together, with the
same networks, number of steps and settings for all; in a first phase the terms of z count for a tenth, or latents
would be switched off before the decoder has found a use for them.

* ELBO: nats an image of the test images; ± is 2 standard errors over images.
* IW: the importance-weighted bound log 1/K sum_k p(x, z_k) / q(z_k | x), which tends to log p(x) from below. It
  judges the model, where the ELBO judges the model less KL(q || posterior). The z_k are drawn with the guide's noise
  doubled, for guides are narrower than posteriors, and weights need the tails.
* Active: latents whose posterior mean varies over images (variance above 0.05).

Then other guides are fitted to the same models, which are frozen: ELBOs differ, but the IW bounds have to agree. The "best
Gaussian of each image" has normals fitted to that image alone: what it gains on a guide with an encoder was lost by the
encoder (the amortisation gap), not by the family. The last model has 2 latents, so that log p(x) can be had by
quadrature, and its posteriors can be seen.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, one_hot, pad

import pyro_genexact as gx

LEVELS, SIDE, HIDDEN = 17, 8, 128
WIDE = 2.0  # what the guide's noise is multiplied by for importance weights
PIXELS = SIDE * SIDE
Bounds = tuple[Tensor, Tensor, int]  # of bounds


def digits(copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images (with new distortions in each copy), test images and their digits."""
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.data), generator=generator)
    x, label = torch.tensor(data.data).float()[order], torch.tensor(data.target)[order]
    train = x[500:].repeat(copies, 1).view(-1, 1, SIDE, SIDE)
    maps = torch.eye(2, 3) + 0.05 * torch.randn(len(train), 2, 3, generator=generator)
    grid = affine_grid(maps, list(train.shape), align_corners=False)
    train = (
        grid_sample(train, grid, mode="bicubic", align_corners=False)
        .round()
        .clamp(0, LEVELS - 1)
    )
    return train.flatten(1), x[200:500], label[200:500]


def mlp(*sizes: int) -> nn.Sequential:
    layers = [
        part
        for a, b in itertools.pairwise(sizes)
        for part in (nn.Linear(a, b), nn.SiLU())
    ]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A model of images and its guide.

    Args:
        D: features of the latents.
        guide: "Gaussian" or "IAF".
        prior: "normal" or "MAF".
        of: take the model of this one, and make the guide alone.
    """

    def __init__(
        self,
        D: int,
        guide: str = "Gaussian",
        prior: str = "normal",
        of: VAE | None = None,
    ) -> None:
        super().__init__()
        options = {"transforms": 2, "hidden": (64,), "activation": torch.tanh}
        self.D, self.head = D, gx.heads.DiscretizedLogistic(LEVELS)
        self.decoder = (
            mlp(D, HIDDEN, HIDDEN, PIXELS * self.head.num_params)
            if of is None
            else of.decoder
        )
        self.flow = gx.flows.maf(D, **options) if prior == "MAF" else None
        if of is not None:
            self.flow = of.flow
        self.encoder = nn.Sequential(mlp(PIXELS, HIDDEN, HIDDEN), nn.SiLU())
        self.normals = nn.Linear(HIDDEN, 2 * D)
        self.iaf = (
            gx.flows.iaf(D, context=HIDDEN, **options) if guide == "IAF" else None
        )

    def prior(self) -> dist.TorchDistribution:
        return (
            dist.Normal(torch.zeros(self.D), 1.0).to_event(1)
            if self.flow is None
            else self.flow()
        )

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        return self.head(self.decoder(z).unflatten(-1, (PIXELS, -1))).to_event(1)

    def q(self, x: Tensor, wide: float = 1.0) -> dist.TorchDistribution:
        """The guide's distribution, the standard deviations of its normals times ``wide``."""
        h = self.encoder(x / LEVELS)
        loc, log_scale = self.normals(h).chunk(2, -1)
        base = dist.Normal(loc, wide * log_scale.exp()).to_event(1)
        return (
            base
            if self.iaf is None
            else dist.TransformedDistribution(base, self.iaf(h).transforms)
        )

    def model(self, x: Tensor, batch: int | None = None, weight: float = 1.0) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(x), subsample_size=batch) as rows:
            with poutine.scale(scale=weight):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x[rows])

    def guide(
        self,
        x: Tensor,
        batch: int | None = None,
        weight: float = 1.0,
        wide: float = 1.0,
    ) -> None:
        pyro.module("vae", self)
        with (
            pyro.plate("images", len(x), subsample_size=batch) as rows,
            poutine.scale(scale=weight),
        ):
            pyro.sample("z", self.q(x[rows], wide))


def fit(vae: VAE, train: Tensor, steps: int, guide_only: bool = False) -> float:
    """Fits model and guide, or the guide alone; returns the seconds."""
    pyro.clear_param_store()
    settings = {"batch": 128, "num_particles": 1, "progress": False}
    settings["optimizer"] = partial(torch.optim.AdamW, lr=4e-3)
    if guide_only:
        settings["parameters"] = [
            p
            for name, p in vae.named_parameters()
            if name.startswith(("encoder", "normals", "iaf"))
        ]
        return gx.fit_guide(
            vae.model, vae.guide, train, steps=steps, **settings
        ).seconds
    first = gx.fit_guide(
        vae.model, vae.guide, train, steps=steps // 4, weight=0.1, **settings
    )
    return (
        first.seconds
        + gx.fit_guide(vae.model, vae.guide, train, steps=steps, **settings).seconds
    )


@torch.no_grad()
def log_ratios(
    vae: VAE, x: Tensor, draws: int, wide: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(x, z) - log q(z | x) of draws (K, N), in nats, and the draws' mean (N, D)."""
    pyro.clear_param_store()
    ratios, means = [], []
    for _ in range(draws // 50):
        many = pyro.plate("draws", 50, dim=-2)
        q = poutine.trace(many(vae.guide)).get_trace(x, wide=wide)
        p = poutine.trace(poutine.replay(many(vae.model), trace=q)).get_trace(x)
        p.compute_log_prob()
        q.compute_log_prob()
        ratios.append(
            p.nodes["z"]["log_prob"]
            + p.nodes["x"]["log_prob"]
            - q.nodes["z"]["log_prob"]
        )
        means.append(q.nodes["z"]["value"].mean(0))
    return torch.cat(ratios).double(), torch.stack(means).mean(0)


def bounds(vae: VAE, x: Tensor, draws: int) -> Bounds:
    """ELBO (N), importance-weighted bound (N), and how many latents are active."""
    ratios, means = log_ratios(vae, x, max(50, draws // 10))
    weighted = log_ratios(vae, x, draws, WIDE)[0].logsumexp(0) - math.log(draws)
    return ratios.mean(0), weighted, int((means.var(0) > 0.05).sum())


def mean(x: Tensor) -> str:
    """The mean with 2 standard errors."""
    return f"{x.mean():.2f} ± {2 * x.std() / math.sqrt(len(x)):.2f}"


def mosaic(rows: Tensor) -> Tensor:
    """The first 40 rows as 5 x 8 images with gaps, NaN."""
    tiles = pad(rows[:40].view(5, 8, SIDE, SIDE), (0, 1, 0, 1), value=math.nan)
    return tiles.permute(0, 2, 1, 3).reshape(5 * (SIDE + 1), 8 * (SIDE + 1))[:-1, :-1]


def images(axes: plt.Axes, rows: Tensor, title: str) -> None:
    cmap = matplotlib.colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    axes.imshow(mosaic(rows), cmap=cmap, vmin=0, vmax=LEVELS - 1)
    axes.set_title(title)
    axes.set_axis_off()


def contours(axes: plt.Axes, at: Tensor, log_p: Tensor, color: str) -> None:
    """Highest density regions of 50, 90 and 99 percent."""
    p = log_p.flatten().softmax(0).view(log_p.shape)
    ranked = p.flatten().sort(descending=True).values
    levels = ranked[
        [int((ranked.cumsum(0) < mass).sum()) for mass in (0.99, 0.9, 0.5)]
    ].unique()
    axes.contour(*at, p.T, levels=levels, colors=color, linewidths=1.3)


def aggregate(axes: plt.Axes, vae: VAE, x: Tensor, label: Tensor) -> None:
    """Draws of the posteriors of images by digit, over contours of the prior."""
    z = torch.cat([vae.q(x).sample() for _ in range(5)])
    dots = axes.scatter(
        *z.T, c=label.repeat(5), cmap="tab10", vmin=-0.5, vmax=9.5, s=5, linewidths=0
    )
    at = grid(z.min(0).values - 1, z.max(0).values + 1, 150)
    contours(
        axes,
        at,
        vae.prior().log_prob(torch.cartesian_prod(*at)).view(150, 150),
        "black",
    )
    axes.figure.colorbar(dots, ax=axes, ticks=range(10), label="digit")
    axes.set_title(
        "Latents of the test images, IAF guide,\nand contours of the MAF prior"
    )


def one_posterior(
    axes: plt.Axes, vae: VAE, x: Tensor, gaussian: dist.TorchDistribution
) -> None:
    """The exact posterior of an image (64), and contours of the guides."""
    guides = {
        "IAF guide": (vae.q(x), "tab:blue"),
        "best Gaussian": (gaussian, "tab:orange"),
    }
    draws = torch.cat([q.sample((2000,)) for q, _ in guides.values()])
    low, high = draws.quantile(torch.tensor([0.005, 0.995]), 0)
    at = grid(low - 0.4 * (high - low), high + 0.4 * (high - low), 150)
    points, shape = torch.cartesian_prod(*at), (150, 150)
    exact = (
        vae.prior().log_prob(points) + log_likelihood(vae, x.unsqueeze(0), points)[:, 0]
    ).view(shape)
    axes.pcolormesh(
        *at, (exact - exact.max()).exp().T, cmap="Greys", vmax=1.2, rasterized=True
    )
    for name, (q, color) in guides.items():
        contours(axes, at, q.log_prob(points).view(shape), color)
        axes.plot([], [], color=color, label=name)


@torch.no_grad()
def picture(
    vaes: dict[str, VAE],
    plane: tuple[VAE, VAE, Tensor],
    test: Tensor,
    label: Tensor,
    out: Path,
) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    tops = upper.subplots(1, 4)
    images(tops[0], test, "Test images")
    for axes, (name, vae) in zip(tops[1:], vaes.items(), strict=True):
        images(
            axes,
            vae.likelihood(vae.prior().sample((40,))).sample(),
            f"Samples: {name} prior",
        )
    left, *rights = lower.subplots(1, 3, width_ratios=(1.2, 1, 1))
    vae, alone, kl = plane
    aggregate(left, vae, test, label)
    for axes, row in zip(
        rights,
        kl.argsort(descending=True)[[len(kl) // 50, len(kl) // 10]].tolist(),
        strict=True,
    ):
        gaussian = dist.Normal(alone.loc[row], alone.log_scale[row].exp()).to_event(1)
        one_posterior(axes, vae, test[row], gaussian)
        axes.set_title(
            f"Posterior of a test image of a {int(label[row])}:\nexact (grey) and by the guides"
        )
    rights[0].legend(frameon=False)
    figure.savefig(out, dpi=100)


def report_models(
    vaes: dict[str, VAE], train: Tensor, test: Tensor, steps: int, draws: int
) -> dict[str, Bounds]:
    """Fits and scores all."""
    print(
        f"{'guide, prior':<18}{'ELBO':>16}{'gain':>15}{'IW':>16}{'gain':>15}{'IW - ELBO':>14}{'active':>8}{'fit, s':>8}"
    )
    result: dict[str, Bounds] = {}
    for name, vae in vaes.items():
        seconds = fit(vae, train, steps)
        elbo, weighted, active = result[name] = bounds(vae, test, draws)
        first, *others = result.values()
        gains = [
            mean(a - b) if others else ""
            for a, b in zip((elbo, weighted), first, strict=False)
        ]
        row = f"{mean(elbo):>16}{gains[0]:>15}{mean(weighted):>16}{gains[1]:>15}{mean(weighted - elbo):>14}"
        print(f"{name:<18}{row}{active:>8}{seconds:>8.0f}", flush=True)
    return result


def report_refitted(name: str, guide: str, own: Bounds, other: Bounds) -> None:
    """Differences that another guide makes to the same model, image by image."""
    elbo, weighted = (mean(b - a) for a, b in zip(own[:2], other[:2], strict=True))
    print(
        f"model of {name:<18}with guide {guide:<28}: ELBO {elbo:>14}, IW {weighted:>14}",
        flush=True,
    )


def grid(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Midpoints (2, S) of cells."""
    return (
        low.unsqueeze(1) + (high - low).unsqueeze(1) * (torch.arange(size) + 0.5) / size
    )


@torch.no_grad()
def log_likelihood(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x | z) of latents (G, D) and images (N, 64), (G, N): a product of tables with one-hot pixels."""
    levels, hot = (
        torch.arange(LEVELS).view(-1, 1, 1),
        one_hot(x.long(), LEVELS).float().flatten(1),
    )
    tables = (
        vae.likelihood(part).base_dist.log_prob(levels).permute(1, 2, 0).flatten(1)
        for part in z.split(2000)
    )
    return torch.cat([table @ hot.T for table in tables])


@torch.no_grad()
def evidence(vae: VAE, x: Tensor, size: int) -> Tensor:
    """log p(x) (N): the mean of p(x | z) over a grid of the prior's own uniforms, which is fine where the prior is dense."""
    (transform,) = vae.prior().transforms
    noise = torch.special.ndtri((torch.arange(size) + 0.5) / size)
    log_x = log_likelihood(vae, x, transform(torch.cartesian_prod(noise, noise)))
    return log_x.double().logsumexp(0) - 2 * math.log(size)


def best_gaussians(vae: VAE, x: Tensor, steps: int) -> VAE:
    """The same model, whose guide is independent normals for each of the images x, fitted to it without an encoder."""
    other = VAE(vae.D, of=vae)
    with torch.no_grad():
        z = vae.q(x).sample((200,))
    other.loc, other.log_scale = nn.Parameter(z.mean(0)), nn.Parameter(z.std(0).log())
    other.q = lambda _, wide=1.0: dist.Normal(
        other.loc, wide * other.log_scale.exp()
    ).to_event(1)
    pyro.clear_param_store()
    settings = {
        "lr": 0.03,
        "num_particles": 4,
        "parameters": [other.loc, other.log_scale],
        "progress": False,
    }
    gx.fit_guide(other.model, other.guide, x, steps=steps, **settings)
    return other


def report_plane(
    train: Tensor, test: Tensor, steps: int, draws: int, size: int
) -> tuple[VAE, VAE, Tensor]:
    """Fits a model with two latents; returns it, with Gaussians for the test images, and their KL (N)."""
    vae = VAE(2, "IAF", "MAF")
    fit(vae, train, steps)
    alone = best_gaussians(vae, test, steps // 3)
    exact = evidence(vae, test, size)
    print(f"\n2 latents, MAF as prior: log p(x) by quadrature {mean(exact)}")
    for name, one in (("IAF", vae), ("best Gaussian of each image", alone)):
        elbo, weighted, _ = bounds(one, test, draws)
        print(
            f"{name:<28}: KL(q || posterior) {mean(exact - elbo)}, IW less log p(x) {mean(weighted - exact)}"
        )
    return vae, alone, exact - elbo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("vae.png"), metavar="FILE")
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="a few steps only, to see that everything runs",
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
    results = report_models(vaes, train, test, steps, draws)
    print("\nOther guides for the same models")
    for name, guide in (("Gaussian, normal", "IAF"), ("IAF, normal", "Gaussian")):
        other = VAE(8, guide, of=vaes[name])
        fit(other, train, steps, guide_only=True)
        report_refitted(name, guide, results[name], bounds(other, test, draws))
    alone = best_gaussians(vaes["IAF, normal"], test, steps // 3)
    report_refitted(
        "IAF, normal",
        "best Gaussian of each image",
        results["IAF, normal"],
        bounds(alone, test, draws),
    )

    plane = report_plane(train, test, steps, draws, size)
    picture(vaes, plane, test, label, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
