"""Models of images: the time of samples.

    OMP_NUM_THREADS=1 python tests/benchmarks/images.py [--only sampling] [--smoke-test]

* sampling: samples of PixelCNN from its cache, compared with samples whose image is evaluated anew for each pixel. In float64 both
  must be the same at one seed. Times are wall-clock time of one batch; the median of several batches from the cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.testing import redraw


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


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return median(times), result


def sampling(smoke: bool) -> None:
    size, rows = (8, 4) if smoke else (28, 16)
    for dtype, width, depth in ((torch.float32, 32, 7), (torch.float64, 16, 4)):
        torch.manual_seed(0)
        net = gx.conditioners.PixelCNN((1, size, size), 1, width=width, depth=depth).to(dtype)
        net = redraw(net)

        def sample(net: gx.Conditioner) -> Tensor:
            torch.manual_seed(1)
            return gx.Autoregressive(net, gx.heads.Bernoulli(), (size, size))().sample((rows,))

        sample(net)
        cached, got = seconds(lambda net=net: sample(net), 2 if smoke else 9)
        anew, expected = seconds(lambda net=net: sample(Anew(net)), 1)
        print(
            f"{size} x {size}, {rows} images, width {width}, depth {depth}, {dtype}: from the cache {cached:.2f} s, anew "
            f"{anew:.1f} s ({anew / cached:.0f} times); equal samples: {torch.equal(got, expected)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calls: dict[str, Callable[[bool], None]] = {"sampling": sampling}
    parser.add_argument("--only", default=",".join(calls))
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    for name in args.only.split(","):
        calls[name](args.smoke_test)


if __name__ == "__main__":
    main()
