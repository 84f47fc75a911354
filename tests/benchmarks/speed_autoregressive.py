"""Speed of autoregressive models, beside the same work done plainly in torch, in one process.

    python tests/benchmarks/speed_autoregressive.py [--rounds 7] [--markdown]
                                                  [--sections sample,train,recurrent,rsample,categories]

* sample: 784 binary sites by a MADE of 500 units, batch 100, against running the whole network again for each site;
  the same seed gives the same samples in float64.
* train: a step of that MADE with a Bernoulli head, against the same masked network in plain torch with
  ``binary_cross_entropy_with_logits`` (loss, backward, Adam), argument validation off and on.
* recurrent: sampling a GRU with a normal head for lengths 64 ... 2048, microseconds a step.
* rsample: rsample + backward, and a sample without grad, normal head.
* categories: the mean of -log p of one of 50,000 categories in each of 256 rows, and its gradient by the logits, against
  ``cross_entropy``: time, and peak of memory in copies of the logits.

Medians over interleaved rounds after a warm-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import pyro
import torch
from timing import HERE, Measurement, measured, measurement, parser, peak_megabytes, run
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear

import pyro_genexact as gx

SITES, HIDDEN, BATCH = 784, 500, 100


def binary() -> gx.Autoregressive:
    head = gx.heads.Bernoulli()
    return gx.Autoregressive(
        gx.conditioners.MADE(SITES, head.num_params, hidden=(HIDDEN,), direct=False), head, (SITES,)
    )


@torch.no_grad()
def rerun(model: gx.Autoregressive, rows: int) -> Tensor:
    """The network once a site, as libraries without incremental evaluation do."""
    y = next(model.parameters()).new_zeros(rows, SITES)
    u = torch.rand(SITES + 1, rows, 1, dtype=torch.float64, device="cpu")  # as the package draws them
    for t in range(SITES):
        phi = model.conditioner(y)[:, t : t + 1]
        y[:, t : t + 1] = 1 - u[t] < model.head(phi, t).probs
    return y


def sample(options: argparse.Namespace) -> list[Measurement]:
    model, what = binary(), (f"{SITES} binary sites, MADE({HIDDEN}), batch {BATCH}", "sample")
    calls = {
        (*what, HERE): lambda: model().sample((BATCH,)),
        (*what, "evaluating the network once per site"): lambda: rerun(model, BATCH),
    }
    found = measured(calls, options.rounds)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    drawn = []
    for draw in calls.values():
        torch.manual_seed(0)
        drawn.append(draw())
    print(f"the same seed gives the same samples in float64: {torch.equal(*drawn)}\n")
    return found


class Plain(nn.Module):
    """The same masked network with nothing around it."""

    def __init__(self, made: gx.conditioners.MADE) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(layer.weight.detach().clone()) for layer in made.layers)
        self.biases = nn.ParameterList(nn.Parameter(layer.bias.detach().clone()) for layer in made.layers)
        self.masks = [layer.mask for layer in made.layers]

    def forward(self, y: Tensor) -> Tensor:
        x = torch.relu(linear(y, self.weights[0] * self.masks[0], self.biases[0]))
        return linear(x, self.weights[1] * self.masks[1], self.biases[1])


def steps(batch: int) -> dict[str, Callable[[], None]]:
    """A training step of each way, on the same rows."""
    y = torch.randint(2, (batch, SITES)).float()
    model = binary()
    plain = Plain(model.conditioner)
    losses: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        HERE: (model, lambda: -model().log_prob(y).mean()),
        "plain PyTorch": (plain, lambda: binary_cross_entropy_with_logits(plain(y), y, reduction="sum") / len(y)),
    }
    a, b = (loss() for _, loss in losses.values())
    assert abs(a - b) < 1e-3

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return {
        way: partial(step, torch.optim.Adam(module.parameters(), lr=1e-4), loss)
        for way, (module, loss) in losses.items()
    }


def train(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for batch in (BATCH, 512):
        made, case = steps(batch), f"{SITES} binary sites, MADE({HIDDEN}), batch {batch}"
        for validation in (False, True):
            operation = "training step" + ", validation on" * validation
            with pyro.validation_enabled(validation):
                found += measured({(case, operation, way): step for way, step in made.items()}, options.rounds)
    return found


def recurrent(options: argparse.Namespace) -> list[Measurement]:
    head = gx.heads.Normal()
    net = gx.conditioners.Recurrent((), head.num_params, hidden=128)
    lengths = {(f"{n} sites, GRU(128), batch 100", "sample", HERE): n for n in (64, 256, 1024, 2048)}
    models = {key: gx.Autoregressive(net, head, (n,)) for key, n in lengths.items()}
    calls = {key: lambda model=model: model().sample((100,)) for key, model in models.items()}
    return measured(calls, options.rounds, "µs per step", lengths)


def rsample(options: argparse.Namespace) -> list[Measurement]:
    head, calls = gx.heads.Normal(), {}
    for sites, hidden, batch in ((64, (512, 512), 256), (784, (1024,), 100)):
        net = gx.conditioners.MADE(sites, head.num_params, hidden=hidden, direct=False)
        model, case = gx.Autoregressive(net, head, (sites,)), f"{sites} normal sites, MADE{hidden}, batch {batch}"
        case = case.replace(",)", ")")
        calls[case, "sample", HERE] = lambda model=model, batch=batch: model().sample((batch,))
        calls[case, "rsample + backward", HERE] = lambda model=model, batch=batch: (
            model().rsample((batch,)).sum().backward()
        )
    return measured(calls, options.rounds)


def categories(options: argparse.Namespace) -> list[Measurement]:
    rows, number = 256, options.categories
    phi, y, head = torch.randn(rows, number), torch.randint(number, (rows,)), gx.heads.Categorical(number)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = phi.detach().requires_grad_()
        return torch.autograd.grad(loss(logits), logits)[0]

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        HERE: lambda logits: -head(logits.unsqueeze(1)).log_prob(y.unsqueeze(1)).mean(),
        "plain PyTorch": lambda logits: cross_entropy(logits, y),
    }
    case = f"{rows} rows of {number:,} categories"
    calls = {(case, "loss + gradient", way): partial(gradient, loss) for way, loss in losses.items()}
    torch.testing.assert_close(*(call() for call in calls.values()))
    copies = {way: peak_megabytes(call) / (4e-6 * phi.numel()) for (*_, way), call in calls.items()}
    return [
        *measured(calls, options.rounds),
        *(measurement((case, "peak of memory", way), "copies", [found]) for way, found in copies.items()),
    ]


if __name__ == "__main__":
    found = parser(__doc__, [sample, train, recurrent, rsample, categories])
    found.add_argument("--categories", type=int, default=50_000)
    run(found, quick={"categories": 1000})
