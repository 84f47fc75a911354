"""Peak memory of the log-likelihood of a linear-chain CRF and its gradient, beside pytorch-crf's.

Run with: ``python tests/benchmarks/memory_crf.py``
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

SIZES = ((32, 256, 23), (8, 1024, 50))


def peak(call: Callable[[], object]) -> float:
    """The most bytes of tensors that a call holds at a time above those before it, in MiB.

    Counted from the allocations and releases that torch's profiler records: independent of the allocator's own caches.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def ours(unary: Tensor, transition: Tensor, ends: Tensor, labels: Tensor) -> Callable[[], None]:
    """Log-likelihood and gradient of a LinearChainCRF."""
    import pyro_genexact as gx

    def call() -> None:
        gx.LinearChainCRF(unary, transition, initial=ends[0], final=ends[1]).log_prob(labels).sum().backward()

    return call


def pytorch_crf(unary: Tensor, transition: Tensor, ends: Tensor, labels: Tensor) -> Callable[[], None]:
    """The same by the package pytorch-crf."""
    import torchcrf

    model = torchcrf.CRF(unary.shape[-1], batch_first=True)
    for own, value in (
        (model.transitions, transition),
        (model.start_transitions, ends[0]),
        (model.end_transitions, ends[1]),
    ):
        own.data.copy_(value.detach())

    def call() -> None:
        model(unary, labels, reduction="sum").backward()

    return call


def resident(which: str, batch: int, sites: int, labels: int) -> tuple[float, float]:
    """The peak of tensors, and the growth of the peak of the resident set of this process, in MiB; run it in a fresh process."""
    import resource

    torch.set_num_threads(1)
    torch.manual_seed(0)
    unary = torch.randn(batch, sites, labels, requires_grad=True)
    transition, ends = torch.randn(labels, labels, requires_grad=True), torch.randn(2, labels, requires_grad=True)
    make = {"ours": ours, "pytorch-crf": pytorch_crf}[which]
    small = torch.randn(2, 3, labels, requires_grad=True)
    make(small, transition, ends, torch.zeros(2, 3, dtype=torch.long))()  # what loads at the first call
    transition.grad = ends.grad = None
    call = make(unary, transition, ends, torch.randint(labels, (batch, sites)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    unary.grad = transition.grad = ends.grad = None
    return peak(call), grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("WHICH", "B", "N", "V"), help="one measurement, in this process")
    options = parser.parse_args()
    if options.one:
        which, *size = options.one
        tensors, process = resident(which, *map(int, size))
        print(f"{which:12s} B, N, V = {', '.join(size):14s} tensors {tensors:8.1f} MiB   process {process:8.1f} MiB")
        return
    for size in SIZES:
        for which in ("ours", "pytorch-crf"):
            subprocess.run([sys.executable, __file__, "--one", which, *map(str, size)], check=True)


if __name__ == "__main__":
    main()
