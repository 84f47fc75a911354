"""TarFlow on digits: bits per dimension, errors of the inverse, and the time of samples with and without the cache.

    OMP_NUM_THREADS=1 python tests/benchmarks/tarflow.py [--epochs 150] [--sections speed,affine,spline]

* affine, spline: trains a TarFlow on scikit-learn's digits (17 levels, the split and the noise of
  ``examples/density_estimation.py``) for --epochs, with new dequantising noise in each epoch. It prints the
  bits per dimension of the 300 test rows with two standard errors; the largest error of the images (in (0, 1)) and of their
  standardised logits after a round trip, in float32 and float64; and the passes and the time of ``solver="fixed_point"`` for 100 samples,
  relative to the loop over sites.
* speed: the time of samples of 28 x 28 images with patches of 2 pixels (196 sites), by the cache, by the solver, and by
  one parallel pass for each site.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from timing import HERE, Measurement, measured, measurement, parser, run, seconds
from torch import Tensor
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.transforms import AutoregressiveTransform, Chain, Inverse

LEVELS, SIDE = 17, 8
SPLINE = partial(gx.heads.RationalQuadraticSpline, 8, 5.0)
SIZES: dict[str, dict[str, Any]] = {
    "affine": {"patch": 2, "transforms": 6, "width": 64, "depth": 1},
    "spline": {"patch": 2, "transforms": 3, "width": 64, "depth": 2, "head": SPLINE},
}


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Levels of 1297 training images; dequantised validation and test images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=generator)]
    parts = x[500:].repeat(20, 1), x[:200], x[200:500]  # the example draws the noise of 20 copies first
    _, validation, test = ((part + torch.rand(part.shape, generator=generator)) / LEVELS for part in parts)
    return x[500:].view(-1, SIDE, SIDE), validation.view(-1, SIDE, SIDE), test.view(-1, SIDE, SIDE)


def dequantised(levels: Tensor) -> Tensor:
    return (levels + torch.rand(levels.shape)).div(LEVELS).clamp(1e-6, 1 - 1e-6)


@torch.no_grad()
def errors(flow: gx.Flow, y: Tensor) -> tuple[float, float]:
    """The largest error of images in (0, 1) and of their standardised logits after a round trip to the noise."""
    t = flow().transforms[0]
    blocks = Chain(t.parts[:-2])  # without scale and support
    logits = Chain(t.parts[-2:]).inv(y)
    return (t(t.inv(y).clone()) - y).abs().max().item(), (
        blocks(blocks.inv(logits).clone()) - logits
    ).abs().max().item()


def trained(name: str, epochs: int) -> gx.Flow:
    """Trains a flow and prints its bits per dimension."""
    train, validation, test = digits()
    torch.manual_seed(0)
    rows = dequantised(train.repeat(20, 1, 1))
    flow = gx.flows.tarflow(
        (SIDE, SIDE), **SIZES[name], dropout=0.1, support=constraints.unit_interval, standardize=rows
    )
    took = seconds(
        lambda: gx.fit(
            flow,
            gx.Augmented(train, dequantised),
            validation=validation,
            optimizer=partial(torch.optim.AdamW, lr=4e-3, weight_decay=0.1),
            epochs=epochs,
            patience=epochs,
            batch_size=128,
            progress=False,
        ),
        clock=time.process_time,
    )
    flow.eval()
    with torch.no_grad():
        bits = math.log2(LEVELS) - flow().log_prob(test) / (SIDE**2 * math.log(2))
    error = 2 * bits.std().item() / math.sqrt(len(bits))
    print(
        f"{name}: {bits.mean():.3f} ± {error:.3f} bits per dimension after {epochs} epochs, "
        f"{took:.0f} s of one thread; {sum(p.numel() for p in flow.parameters())} parameters",
        flush=True,
    )
    return flow


def study(name: str, options: argparse.Namespace) -> list[Measurement]:
    flow, test = trained(name, options.epochs), digits()[2]
    for dtype in (torch.float32, torch.float64):
        images, logits = errors(copy.deepcopy(flow).to(dtype), test.to(dtype))
        print(f"  round trips in {dtype}: images {images:.1e}, logits {logits:.1e}")
    solved, what = flow(solver="fixed_point"), (f"digits, {name} blocks", "100 samples")
    found = measured(
        {(*what, HERE): lambda: flow().sample((100,)), (*what, "solver"): lambda: solved.sample((100,))}, options.rounds
    )
    print(f"  passes of the solver: {solved.passes}", flush=True)
    return found


def affine(options: argparse.Namespace) -> list[Measurement]:
    return study("affine", options)


def spline(options: argparse.Namespace) -> list[Measurement]:
    return study("spline", options)


@torch.no_grad()
def without_cache(flow: gx.Flow, noise: Tensor) -> Tensor:
    """Images of noise (B, H, W), by one parallel pass of a network for each site."""
    x = noise
    for part in flow.transforms:
        module = part.transform if isinstance(part, Inverse) else part
        if not isinstance(module, AutoregressiveTransform):
            x = (part() if isinstance(part, Inverse) else part() if isinstance(part, gx.Constant) else part)(x)
            continue
        y = torch.zeros_like(x)
        for t in range(x.shape[1]):
            phi = module.conditioner(y)[:, t : t + 1]
            y[:, t : t + 1] = module.head(phi, t).inv(x[:, t : t + 1])
        x = y
    return x


@torch.no_grad()
def speed(options: argparse.Namespace) -> list[Measurement]:
    side, what = options.side, (f"4 images of {options.side} x {options.side} pixels, patches of 2 pixels", "sample")
    flow = gx.flows.tarflow((side, side), 2, transforms=2, width=64, depth=2).eval()
    noise, solved = torch.randn(4, side, side), flow(solver="fixed_point")
    anew = torch.no_grad()(lambda: without_cache(flow, noise))
    ways = {
        (*what, HERE): torch.no_grad()(lambda: flow().transforms[0](noise)),
        (*what, "solver"): torch.no_grad()(lambda: solved.transforms[0](noise.clone())),
    }
    images = [anew(), *(way() for way in ways.values())]
    difference = max((image - images[0]).abs().max() for image in images)
    print(f"images differ by at most {difference:.1e}; passes of the solver: {solved.passes} of {side**2 // 4} sites")
    once = measurement((*what, "one parallel pass for each site"), "ms", [1e3 * seconds(anew)])
    return [*measured(ways, options.rounds), once]


if __name__ == "__main__":
    found = parser(__doc__, [speed, affine, spline])
    found.set_defaults(threads=1, validate=True)
    found.add_argument("--epochs", type=int, default=150)
    found.add_argument("--side", type=int, default=28)
    run(found, quick={"epochs": 2, "side": 8, "sections": "speed"})
