"""Both views of every conditioner as functions of the number of sites T: parallel passes, and steps from a state.

    OMP_NUM_THREADS=1 python tests/benchmarks/encoders.py [--only views,stepping,peer,fft] [--smoke-test]

* views: for each conditioner, the time of a training pass (forward and backward) over one row of T sites, the memory that autograd
  keeps for it, the time of one step after T sites, and the size of the state. Steps of different T are interleaved; medians.
* stepping: the time of a training pass at T = 1024, compared with T single steps, both with gradients.
* peer: a training pass of StateSpace's selective kind and of mambapy (``pip install mambapy``) at the same width, depth and state size,
  interleaved; and the largest difference between parallel pass and steps in float64.
* fft: the diagonal kind's scan by chunks, compared with a convolution by FFT, forward and backward; and how much the last site changes
  the outputs before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact import conditioners as c
from pyro_genexact.conditioners.scans import diagonal_scan
from pyro_genexact.testing import redraw

P, W = 2, 64
NETWORKS: dict[str, Callable[[int], gx.Conditioner]] = {
    "CausalConv": lambda T: c.CausalConv((), P, width=W),
    "StateSpace diagonal": lambda T: c.StateSpace((), P, width=W),
    "StateSpace selective": lambda T: c.StateSpace((), P, kind="selective", width=W),
    "Recurrent, GRU": lambda T: c.Recurrent((), P, hidden=W),
    "Markov, order 16": lambda T: c.Markov((), P, order=16, hidden=(W, W)),
    "Transformer": lambda T: c.Transformer((), P, width=W, depth=4, num_heads=4),
    "Transformer, window 64": lambda T: c.Transformer((), P, width=W, depth=4, num_heads=4, window=64),
    "NADE": lambda T: c.NADE(T, P, hidden=W),
    "MADE": lambda T: c.MADE(T, P, hidden=(W, W)),
}
FIXED = ("NADE", "MADE")  # their weights grow with T
LONGEST = {"NADE": 1024, "MADE": 1024, "Transformer, window 64": 4096}  # the mask of a window has T^2 entries


def seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def train(net: torch.nn.Module, *inputs: Any) -> None:
    net.zero_grad()
    net(*inputs).square().mean().backward()


def kept_bytes(net: gx.Conditioner, y: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, without the weights."""
    seen = {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}

    def pack(x: Tensor) -> Tensor:
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        phi = net(y)
    del phi
    return sum(seen.values())


def numbers_in(state: Any) -> int:
    """Real numbers in the tensors of a state, without weights."""
    if isinstance(state, Tensor):
        return state.numel() * (2 if state.is_complex() else 1)
    if hasattr(state, "_fields"):
        return sum(numbers_in(getattr(state, f)) for f in state._fields if f not in ("weights", "speed"))
    return sum(map(numbers_in, state)) if isinstance(state, tuple) else 0


def views(sites: list[int], repeats: int) -> None:
    for name, make in NETWORKS.items():
        lengths = [T for T in sites if name not in LONGEST or LONGEST[name] >= T]
        torch.manual_seed(0)
        states, one = {}, torch.zeros(1, 1)
        for T in lengths:
            net = make(T + 4 * repeats if name in FIXED else T)
            with torch.inference_mode():
                _, state = net.start(None, 1)
                states[T] = net, net.extend(torch.randn(1, T - 1), state)[1]
        times: dict[int, list[float]] = {T: [] for T in lengths}
        with torch.inference_mode():
            for _ in range(4 * repeats):
                for T, (net, state) in states.items():
                    start = time.perf_counter()
                    _, state = net.extend(one, state)
                    times[T].append(time.perf_counter() - start)
                    states[T] = net, state
        for T in lengths:
            net, y = make(T), torch.randn(1, T)
            train(net, y)
            took = seconds(lambda net=net, y=y: train(net, y), max(repeats // 4, 1) if T > 1024 else repeats)
            print(
                f"| {name} | {T} | {1e3 * took:.1f} ms | {kept_bytes(net, y) / 2**20:.2f} MiB | "
                f"{1e6 * median(times[T]):.0f} µs | {numbers_in(states[T][1])} |",
                flush=True,
            )


def stepping(sites: int, repeats: int) -> None:
    y = torch.randn(4, sites)
    for name in ("CausalConv", "StateSpace diagonal", "StateSpace selective", "Recurrent, GRU", "Transformer"):
        net = NETWORKS[name](sites)

        def steps(net: gx.Conditioner = net) -> Tensor:
            phi, state = net.start(None, len(y))
            phis = [phi]
            for y_t in y[:, :-1].split(1, 1):
                phi, state = net.extend(y_t, state)
                phis.append(phi.squeeze(1))
            return torch.stack(phis, 1)

        def train_by_steps(net: gx.Conditioner = net, steps: Callable[[], Tensor] = steps) -> None:
            net.zero_grad()
            steps().square().mean().backward()

        train(net, y)
        parallel, single = seconds(lambda net=net: train(net, y), repeats), seconds(train_by_steps, 1)
        with torch.no_grad():
            forward, sample = seconds(lambda net=net: net(y), repeats), seconds(steps, 1)
        print(
            f"{name}, T = {sites}, 4 rows: training pass {1e3 * parallel:.0f} ms, by steps {1e3 * single:.0f} ms "
            f"({single / parallel:.0f} times); without grad {1e3 * forward:.0f} and {1e3 * sample:.0f} ms "
            f"({sample / forward:.0f} times)",
            flush=True,
        )


def peer(repeats: int) -> None:
    from mambapy.mamba import Mamba, MambaConfig

    for rows, sites, width, depth in ((12, 64, 128, 4), (4, 1024, 64, 2)):
        ours = c.StateSpace((width,), width, kind="selective", width=width, depth=depth, state=16)
        theirs, y = Mamba(MambaConfig(d_model=width, n_layers=depth, d_state=16)), torch.randn(rows, sites, width)
        times: dict[str, list[float]] = {"ours": [], "mambapy": []}
        for _ in range(repeats + 1):
            for name, net in (("ours", ours), ("mambapy", theirs)):
                times[name].append(seconds(lambda net=net, y=y: train(net, y), 1))
        mine, other = (median(values[1:]) for values in times.values())
        sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
        print(
            f"{rows} rows of {sites} sites, width {width}, depth {depth}: selective {1e3 * mine:.0f} ms ({sizes[0]} weights), "
            f"mambapy {1e3 * other:.0f} ms ({sizes[1]} weights), ratio {other / mine:.1f}",
            flush=True,
        )
    for kind in ("diagonal", "selective"):
        net = redraw(c.StateSpace((), P, kind=kind, width=32, depth=2).double())
        y = torch.randn(2, 1024, dtype=torch.float64)
        with torch.no_grad():
            whole, (phi, state) = net(y), net.start(None, 2)
            phis = [phi.unsqueeze(1)]
            for y_t in y[:, :-1].split(1, 1):
                phi, state = net.extend(y_t, state)
                phis.append(phi)
        print(
            f"{kind}, float64, T = 1024: scan and steps differ by at most {(torch.cat(phis, 1) - whole).abs().max():.1e}"
        )


def fft(sites: list[int], repeats: int) -> None:
    def convolution(u: Tensor, rate: Tensor, read: Tensor) -> Tensor:
        n = u.shape[1]
        powers = (rate.unsqueeze(2) * torch.arange(n)).exp()
        kernel = (read.unsqueeze(2) * powers).real.sum(1)
        spectrum = torch.fft.rfft(u, 2 * n, 1) * torch.fft.rfft(kernel, 2 * n).t()
        return torch.fft.irfft(spectrum, 2 * n, 1)[:, :n]

    def chunks(u: Tensor, rate: Tensor, read: Tensor) -> Tensor:
        return diagonal_scan(u, torch.zeros(len(u), *rate.shape, dtype=rate.dtype), rate, read)[0]

    layer = c.StateSpace((), P, width=W, depth=1).layers[0]
    for T in sites:
        u = torch.randn(4, T, W, requires_grad=True)
        times: dict[Any, list[float]] = {convolution: [], chunks: []}
        for _ in range(repeats + 1):
            for scan in times:
                start = time.perf_counter()
                scan(u, *layer.prepared()).square().mean().backward()
                times[scan].append(time.perf_counter() - start)
        with torch.no_grad():
            last = torch.cat([u[:, :-1], 1e4 + u[:, -1:]], 1)
            leaks = [
                (scan(last, *layer.prepared()) - scan(u, *layer.prepared()))[:, :-1].abs().max().item()
                for scan in times
            ]
        by_fft, by_chunks = (median(values[1:]) for values in times.values())
        print(
            f"T = {T}, 4 rows, width {W}: FFT {1e3 * by_fft:.1f} ms, chunks {1e3 * by_chunks:.1f} ms; adding 10,000 to the last "
            f"site changes earlier outputs by {leaks[0]:.1e} and {leaks[1]:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="views,stepping,peer,fft")
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    sites, repeats = ([64, 256], 2) if args.smoke_test else ([64, 256, 1024, 4096, 16384], 12)
    calls = {
        "views": lambda: views(sites, repeats),
        "stepping": lambda: stepping(sites[-3] if len(sites) > 2 else 64, repeats),
        "peer": lambda: peer(repeats),
        "fft": lambda: fft(sites, repeats),
    }
    for name in args.only.split(","):
        calls[name]()


if __name__ == "__main__":
    main()
