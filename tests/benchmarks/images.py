"""Models of images: the time of samples.

    OMP_NUM_THREADS=1 python tests/benchmarks/images.py [--quick]

Samples of PixelCNN from its cache are compared with samples whose image is evaluated anew for each pixel. Both must be the same at one
seed. A sample of the second kind takes more than ten seconds, so it is drawn once.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from timing import HERE, Measurement, measured, measurement, parser, run, seconds
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.testing import redraw

ANEW = "anew for each pixel"


class Anew(gx.Conditioner):
    """A network of real sites that is evaluated anew on all sites at each step, with zeros for the sites to come."""

    class State(NamedTuple):
        position: int
        version: list[int]
        y: Tensor

    def __init__(self, net: gx.Conditioner) -> None:
        super().__init__()
        self.net, self.num_params, self.num_sites, self.site = net, net.num_params, net.num_sites, net.site

    def start(self, context: Any, batch_size: int) -> tuple[Tensor, State]:
        y = next(self.net.parameters()).new_zeros(batch_size, self.num_sites)
        return self.net(y)[:, 0], self.State(0, self.new_version(), y)

    def extend(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        place = slice(state.position, state.position + y.shape[1])
        whole = state.y.clone()
        whole[:, place] = y
        phi = self.net(whole)[:, place.start + 1 : place.stop + 1]
        return phi, self.advance(state, y.shape[1])._replace(y=whole)


def sampling(options: argparse.Namespace) -> list[Measurement]:
    found, side, rows = [], options.side, 16
    for dtype, width, depth in ((torch.float32, 32, 7), (torch.float64, 16, 4)):
        net = redraw(gx.conditioners.PixelCNN((1, side, side), 1, width=width, depth=depth).to(dtype))
        drawn: dict[str, Tensor] = {}

        def sample(way: str, net: gx.Conditioner, drawn: dict[str, Tensor] = drawn) -> None:
            torch.manual_seed(1)
            drawn[way] = gx.Autoregressive(net, gx.heads.Bernoulli(), (side, side))().sample((rows,))

        case = f"{rows} images of {side} x {side} pixels, width {width}, depth {depth}, {str(dtype)[6:]}"
        found += measured({(case, "sample", HERE): lambda sample=sample, net=net: sample(HERE, net)}, options.rounds)
        anew = seconds(lambda sample=sample, net=net: sample(ANEW, Anew(net)))
        found.append(measurement((case, "sample", ANEW), "ms", [1e3 * anew]))
        print(f"{case}: equal samples: {torch.equal(*drawn.values())}")
    return found


if __name__ == "__main__":
    found = parser(__doc__, [sampling])
    found.set_defaults(threads=1, validate=True)
    found.add_argument("--side", type=int, default=28)
    run(found, quick={"side": 8})
