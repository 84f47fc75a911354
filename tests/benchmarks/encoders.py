"""Both views of every conditioner as functions of the number of sites T: parallel passes, and steps from a state.

    OMP_NUM_THREADS=1 python tests/benchmarks/encoders.py [--sections views,stepping,peer,fft] [--quick]

* views: for each conditioner, the time of a training pass (forward and backward) over one row of T sites, the memory that autograd
  keeps for it, the time of one step after T sites, and the size of the state. Steps of different T are interleaved; medians.
* stepping: the time of a training pass at T = 1024, compared with T single steps, both with gradients, and both without.
* peer: a training pass of StateSpace's selective kind and of mambapy (``pip install mambapy``) at the same width, depth and state size,
  interleaved; and the largest difference between parallel pass and steps in float64.
* fft: the diagonal kind's scan by chunks, compared with a convolution by FFT, forward and backward; and how much the last site changes
  the outputs before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import HERE, Call, Measurement, Named, measured, measurement, parser, run, seconds
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


def steps_after(sites: list[int], name: str, repeats: int) -> tuple[dict[int, list[float]], dict[int, int]]:
    """Microseconds of single steps after T sites, interleaved, and numbers in the state, by T."""
    states, one = {}, torch.zeros(1, 1)
    for T in sites:
        net = NETWORKS[name](T + repeats if name in FIXED else T)
        states[T] = net, net.extend(torch.randn(1, T - 1), net.start(None, 1)[1])[1]
    times: dict[int, list[float]] = {T: [] for T in sites}

    def step(T: int) -> None:
        net, state = states[T]
        states[T] = net, net.extend(one, state)[1]

    for _ in range(repeats):
        for T in sites:
            times[T].append(1e6 * seconds(lambda T=T: step(T)))  # type: ignore[misc]
    return times, {T: numbers_in(state) for T, (_, state) in states.items()}


def views(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for name, make in NETWORKS.items():
        lengths = [T for T in map(int, options.sites.split(",")) if name not in LONGEST or LONGEST[name] >= T]
        nets = {T: (make(T), torch.randn(1, T)) for T in lengths}
        found += measured(
            {(name, "training pass", f"T = {T}"): lambda pair=pair: train(*pair) for T, pair in nets.items()},
            options.rounds,
        )
        kept = {T: kept_bytes(*pair) / 2**20 for T, pair in nets.items()}
        found += [measurement((name, "kept for backward", f"T = {T}"), "MiB", [size]) for T, size in kept.items()]
        with torch.inference_mode():
            times, numbers = steps_after(lengths, name, 4 * options.rounds)
        found += [measurement((name, "one step", f"T = {T}"), "µs", each) for T, each in times.items()]
        found += [measurement((name, "state", f"T = {T}"), "numbers", [count]) for T, count in numbers.items()]
    return found


def stepping(options: argparse.Namespace) -> list[Measurement]:
    sites, found = min(1024, int(options.sites.split(",")[-1])), []
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

        case, rounds = f"{name}, T = {sites}, 4 rows", min(options.rounds, 3)
        calls: dict[Named, Call] = {
            (case, "training pass", HERE): lambda net=net: train(net, y),
            (case, "training pass", "by steps"): train_by_steps,
            (case, "forward", HERE): torch.no_grad()(lambda net=net: net(y)),
            (case, "forward", "by steps"): torch.no_grad()(steps),
        }
        found += measured(calls, rounds)
    return found


def peer(options: argparse.Namespace) -> list[Measurement]:
    from mambapy.mamba import Mamba, MambaConfig

    calls: dict[Named, Call] = {}
    for rows, sites, width, depth in ((12, 64, 128, 4), (4, 1024, 64, 2)):
        ours = c.StateSpace((width,), width, kind="selective", width=width, depth=depth, state=16)
        theirs, y = Mamba(MambaConfig(d_model=width, n_layers=depth, d_state=16)), torch.randn(rows, sites, width)
        case = f"{rows} rows of {sites} sites, width {width}, depth {depth}"
        for way, net in ((HERE, ours), ("mambapy", theirs)):
            calls[case, "training pass, selective", way] = lambda net=net, y=y: train(net, y)
            print(f"{case}: {sum(p.numel() for p in net.parameters())} weights {way}")
    for kind in ("diagonal", "selective"):
        net = redraw(c.StateSpace((), P, kind=kind, width=32, depth=2).double())
        y = torch.randn(2, 1024, dtype=torch.float64)
        with torch.no_grad():
            whole, (phi, state) = net(y), net.start(None, 2)
            phis = [phi.unsqueeze(1)]
            for y_t in y[:, :-1].split(1, 1):
                phi, state = net.extend(y_t, state)
                phis.append(phi)
        error = (torch.cat(phis, 1) - whole).abs().max()
        print(f"{kind}, float64, T = 1024: scan and steps differ by at most {error:.1e}")
    return measured(calls, options.rounds)


def convolution(u: Tensor, rate: Tensor, read: Tensor) -> Tensor:
    n = u.shape[1]
    powers = (rate.unsqueeze(2) * torch.arange(n)).exp()
    kernel = (read.unsqueeze(2) * powers).real.sum(1)
    spectrum = torch.fft.rfft(u, 2 * n, 1) * torch.fft.rfft(kernel, 2 * n).t()
    return torch.fft.irfft(spectrum, 2 * n, 1)[:, :n]


def chunks(u: Tensor, rate: Tensor, read: Tensor) -> Tensor:
    return diagonal_scan(u, torch.zeros(len(u), *rate.shape, dtype=rate.dtype), rate, read)[0]


def fft(options: argparse.Namespace) -> list[Measurement]:
    layer, calls = c.StateSpace((), P, width=W, depth=1).layers[0], dict[Named, Call]()
    for T in map(int, options.sites.split(",")):
        u = torch.randn(4, T, W, requires_grad=True)
        with torch.no_grad():
            last = torch.cat([u[:, :-1], 1e4 + u[:, -1:]], 1)
        for way, scan in ((HERE, chunks), ("FFT", convolution)):

            def call(scan: Any = scan, u: Tensor = u) -> Tensor:
                return scan(u, *layer.prepared())

            with torch.no_grad():
                leak = (call(u=last) - call())[:, :-1].abs().max()
            print(f"T = {T}, {way}: adding 10,000 to the last site changes earlier outputs by {leak:.1e}")
            calls[f"T = {T}, 4 rows, width {W}", "scan, forward and backward", way] = lambda call=call: (
                call().square().mean().backward()
            )
    return measured(calls, options.rounds)


if __name__ == "__main__":
    found = parser(__doc__, [views, stepping, peer, fft], rounds=12)
    found.set_defaults(threads=1, validate=True)
    found.add_argument("--sites", default="64,256,1024,4096,16384", help="numbers of sites")
    run(found, quick={"sites": "64,256"})
