"""Speed of autoregressive models, beside the same work done plainly in torch, in one process.

    python tests/benchmarks/speed_autoregressive.py [--rounds 7] [--markdown] [--sections sample,train,recurrent,rsample]

* sample: 784 binary sites by a MADE of 500 units, batch 100, against running the whole network again for each site;
  the same seed gives the same samples in float64.
* train: a step of that MADE with a Bernoulli head, against the same masked network in plain torch with
  ``binary_cross_entropy_with_logits`` (loss, backward, Adam), argument validation off and on.
* recurrent: sampling a GRU with a normal head for lengths 64 ... 2048, milliseconds a step.
* rsample: rsample + backward over a sample without grad, normal head.

Medians over interleaved rounds after a warm-up.
"""

from __future__ import annotations

import argparse

import pyro
import torch
from speed import interleave, show
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

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


def sample(rounds: int, markdown: bool) -> None:
    model = binary()
    calls = {"here": lambda: model().sample((BATCH,)), "again for each site": lambda: rerun(model, BATCH)}
    times = interleave(calls, rounds)
    ours, theirs = (1e3 * times[key] for key in calls)
    show(
        ["784 binary sites, MADE 500, batch 100", *calls, "ratio"],
        [["sample, ms", f"{ours:.4g}", f"{theirs:.4g}", f"{theirs / ours:.1f}"]],
        markdown,
    )
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    drawn = []
    for draw in calls.values():
        torch.manual_seed(0)
        drawn.append(draw())
    print(f"the same seed gives the same samples in float64: {torch.equal(*drawn)}\n")


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


def train(rounds: int, markdown: bool) -> None:
    rows = []
    for batch in (BATCH, 512):
        y = torch.randint(2, (batch, SITES)).float()
        model = binary()
        plain = Plain(model.conditioner)

        def ours(model: nn.Module = model, y: Tensor = y) -> Tensor:
            return -model().log_prob(y).mean()

        def theirs(plain: nn.Module = plain, y: Tensor = y) -> Tensor:
            return binary_cross_entropy_with_logits(plain(y), y, reduction="sum") / len(y)

        assert abs(ours() - theirs()) < 1e-3
        calls = {}
        for name, module, loss in (("here", model, ours), ("plain torch", plain, theirs)):
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

            def step(optimizer: torch.optim.Optimizer = optimizer, loss: object = loss) -> None:
                optimizer.zero_grad()
                loss().backward()  # type: ignore[operator]
                optimizer.step()

            calls[name] = step
        for validation in (False, True):
            with pyro.validation_enabled(validation):
                times = interleave(calls, rounds)
            a, b = (1e3 * times[key] for key in calls)
            rows.append([str(batch), "on" if validation else "off", f"{a:.4g}", f"{b:.4g}", f"{a / b:.3f}"])
    show(["batch", "validation", "here, ms", "plain torch, ms", "ratio"], rows, markdown)


def recurrent(rounds: int, markdown: bool) -> None:
    head = gx.heads.Normal()
    net = gx.conditioners.Recurrent((), head.num_params, hidden=128)
    models = {T: gx.Autoregressive(net, head, (T,)) for T in (64, 256, 1024, 2048)}
    times = interleave({T: lambda model=model: model().sample((100,)) for T, model in models.items()}, rounds)
    rows = [[str(T), f"{1e3 * t:.4g}", f"{1e6 * t / T:.1f}"] for T, t in times.items()]
    show(["T, GRU 128, batch 100", "sample, ms", "us a step"], rows, markdown)


def rsample(rounds: int, markdown: bool) -> None:
    head, rows = gx.heads.Normal(), []
    for sites, hidden, batch in ((64, (512, 512), 256), (784, (1024,), 100)):
        net = gx.conditioners.MADE(sites, head.num_params, hidden=hidden, direct=False)
        model = gx.Autoregressive(net, head, (sites,))
        calls = {
            "sample": lambda model=model, batch=batch: model().sample((batch,)),
            "both": lambda model=model, batch=batch: model().rsample((batch,)).sum().backward(),
        }
        times = interleave(calls, rounds)
        a, b = (1e3 * times[key] for key in calls)
        rows.append([f"{sites}, {hidden}, {batch}", f"{a:.4g}", f"{b:.4g}", f"{b / a:.2f}"])
    show(["sites, hidden, batch", "sample, ms", "rsample + backward, ms", "ratio"], rows, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sections", default="sample,train,recurrent,rsample")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    sections = {"sample": sample, "train": train, "recurrent": recurrent, "rsample": rsample}
    for name in args.sections.split(","):
        with pyro.validation_enabled(False):
            sections[name](args.rounds, args.markdown)


if __name__ == "__main__":
    main()
