"""Time and memory of a categorical head with many categories, beside cross_entropy, in one process.

    python tests/benchmarks/categories.py [--rows 256] [--categories 50000] [--rounds 15]

The call is the negative log-probability of one category per row, averaged, and its gradient by the logits. Memory is
the peak of live tensor storage made within the call, in copies of the logits (see speed.py).
"""

from __future__ import annotations

import argparse
import statistics
import time

import pyro
import torch
from speed import peak_megabytes
from torch.nn.functional import cross_entropy

import pyro_genexact as gx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--categories", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)

    phi = torch.randn(args.rows, args.categories)
    y = torch.randint(args.categories, (args.rows,))
    head = gx.heads.Categorical(args.categories)

    def gradient(loss) -> torch.Tensor:
        logits = phi.detach().requires_grad_()
        loss(logits).backward()
        return logits.grad

    calls = {
        "heads.Categorical": lambda: gradient(lambda p: -head(p.unsqueeze(1)).log_prob(y.unsqueeze(1)).mean()),
        "cross_entropy": lambda: gradient(lambda p: cross_entropy(p, y)),
    }
    torch.testing.assert_close(*(call() for call in calls.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rows} rows of {args.categories} categories"
    )
    for name, call in calls.items():
        copies = 1e6 * peak_megabytes(call) / (phi.numel() * phi.element_size())
        print(f"{name:20} {1e3 * statistics.median(times[name]):8.1f} ms {copies:6.2f} copies")
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(f"median ratio of times {ratio:.2f}")


if __name__ == "__main__":
    main()
