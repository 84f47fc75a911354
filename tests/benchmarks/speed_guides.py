"""Speed of flows as guides beside Pyro and zuko, in one process.

    python tests/benchmarks/speed_guides.py [--rounds 9] [--markdown] [--validate] [--sizes 8,32,128]
                                            [--sections step,external,table]

* step: one step of SVI (zero_grad, ``Trace_ELBO.loss_and_grads``, Adam) of a linear variational autoencoder whose guide is an amortised
  IAF: 32 latents given an encoder's 64 features, 4 transforms, hidden (256, 256), batch 256; ours, that of Pyro's
  ``ConditionalAffineAutoregressive`` and that of zuko's masked transforms, in the same alternating orders. The diagonal Gaussian has what
  remains: encoder, decoder, Pyro. Our networks read the context in every layer, the others' in the first.
* external: ``log_prob`` of 256 points that these guides did not draw, alone and with backward; also of twice the size.
* table: milliseconds of automatic guides of D normal latents: 256 draws with their ``log_prob``, ``log_prob`` of 256 other points, and
  a step of SVI with 256 particles at once. Recipes with their defaults (without umnn, some hundred times slower), those that would draw
  feature by feature with ``inverse=True``, but for maf; Pyro's ``AutoIAFNormal`` with as many transforms and units, at least D.

float32, one thread, medians over interleaved rounds after a warm-up. Argument validation is off for all (on: --validate).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import ConditionalAutoRegressiveNN
from speed import Size
from timing import HERE, Call, Measurement, Named, measured, parser, run, with_native
from torch import Tensor, nn
from torch.nn.functional import silu

import pyro_genexact as gx
from pyro_genexact import native

CONTEXT, BATCH = 64, 256
IAF, WIDE = Size(32, (256, 256), BATCH, 4), Size(64, (512, 512), BATCH, 4)


class PyroIAF(nn.Module):
    """The same orders and widths; conditioned anew in each call, so that nothing remembered is served."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.order = torch.arange(size.features)
        nets = (
            ConditionalAutoRegressiveNN(size.features, CONTEXT, [*size.hidden], permutation=self.order)
            for _ in range(size.transforms)
        )
        self.parts = nn.ModuleList(dist.transforms.ConditionalAffineAutoregressive(net) for net in nets)

    def forward(self, context: Tensor) -> Any:
        flip = self.order.flip(0)  # a Permute each, since each remembers one value
        chain = [part for affine in self.parts for part in (dist.transforms.Permute(flip), affine)][1:]
        base = dist.Normal(torch.zeros(len(context), len(flip)), 1.0).to_event(1)
        return dist.ConditionalTransformedDistribution(base, chain).condition(context)


class ZukoIAF(nn.Module):
    """The base pushed through zuko's masked transforms, each in its parallel direction."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from zuko.flows import MAF

        maf = MAF(size.features, CONTEXT, transforms=size.transforms, hidden_features=size.hidden)
        self.transform, self.base = maf.transform, maf.base

    def forward(self, context: Tensor) -> Any:
        from zuko.distributions import NormalizingFlow

        return Wrapped(NormalizingFlow(self.transform(context).inv, self.base().expand(context.shape[:-1])))


class Wrapped(dist.TorchDistribution):
    """zuko's flow for Pyro; a draw comes with its density in one pass."""

    has_rsample, arg_constraints = True, {}

    def __init__(self, flow: Any) -> None:
        self.flow, self.known = flow, (None, None)
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return self if torch.Size(batch_shape) == self.batch_shape else super().expand(batch_shape, _instance)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        self.known = self.flow.rsample_and_log_prob(sample_shape)
        return self.known[0]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.known[1] if value is self.known[0] else self.flow.log_prob(value)


class Gaussian(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.linear = nn.Linear(CONTEXT, 2 * size.features)

    def forward(self, context: Tensor) -> Any:
        loc, log_scale = self.linear(context).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def ours(size: Size, activation: Callable[[Tensor], Tensor] = torch.relu) -> nn.Module:
    """With the peers' activation by default."""
    widths = {"transforms": size.transforms, "hidden": size.hidden}
    return gx.flows.iaf(size.features, context=CONTEXT, activation=activation, **widths)


def smooth(size: Size) -> nn.Module:
    """With the recipe's own activation."""
    return ours(size, silu)


BUILDERS: dict[str, Callable[[Size], nn.Module]] = {HERE: ours, "Pyro": PyroIAF, "zuko": ZukoIAF}


def svi(model: Callable[[], Any], guide: Callable[[], Any], parameters: Sequence[Tensor], **options: Any) -> Call:
    """A step of SVI."""
    loss, optimizer = Trace_ELBO(**options), torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide)
        optimizer.step()

    return step


def amortised(q: nn.Module) -> Call:
    """A step of SVI of a linear variational autoencoder whose guide is q."""
    encoder, decoder = nn.Sequential(nn.Linear(CONTEXT, CONTEXT), nn.ReLU()), nn.Linear(IAF.features, CONTEXT)
    y = torch.randn(BATCH, CONTEXT)

    def model() -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", BATCH):
            z = pyro.sample("z", dist.Normal(torch.zeros(IAF.features), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 1.0).to_event(1), obs=y)

    def guide() -> None:
        pyro.module("encoder", encoder)
        pyro.module("q", q)
        with pyro.plate("data", BATCH):
            pyro.sample("z", q(encoder(y)))

    return svi(model, guide, [p for part in (encoder, decoder, q) for p in part.parameters()])


def step(options: argparse.Namespace) -> list[Measurement]:
    what = title(IAF), "SVI step, amortised IAF"
    calls: dict[Named, Call] = {(*what, name): amortised(build(IAF)) for name, build in BUILDERS.items()}
    calls[title(IAF), "SVI step, amortised IAF with silu", HERE] = amortised(smooth(IAF))
    calls[title(IAF), "SVI step, diagonal Gaussian", HERE] = amortised(Gaussian(IAF))
    return measured(calls, options.rounds)


def external(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in (IAF, WIDE):
        context, z = torch.randn(BATCH, CONTEXT), torch.randn(BATCH, size.features)
        for name, build in BUILDERS.items():
            calls |= scoring(build(size), context, z, size, name)
    return measured(calls, options.rounds)


def scoring(q: nn.Module, context: Tensor, z: Tensor, size: Size, name: str) -> dict[Named, Call]:
    def score() -> Tensor:
        return q(context).log_prob(z.clone())

    def train() -> None:
        q.zero_grad()
        score().sum().backward()

    what = f"log_prob of {BATCH} external points"
    calls: dict[Named, Call] = {(title(size), what, name): torch.no_grad()(score)}
    if name == HERE and native.is_built():
        calls[title(size), what, f"{HERE}, native"] = with_native(torch.no_grad()(score))
    if size == IAF:  # the peers' graphs hold gigabytes otherwise
        calls[title(size), f"{what} + backward", name] = train
    return calls


def title(size: Size) -> str:
    return f"D={size.features}, hidden {size.hidden}"


DRAW, SCORE, STEP = "draw with log_prob", "log_prob of other points", "SVI step"
ONE_WAY = ("nsf", "bnaf", "naf", "bpf", "sospf")  # recipes that draw in one pass with inverse=True
BOTH_WAYS = ("realnvp", "coupling_nsf", "nice", "glow_vector")


def guides(d: int) -> dict[str, Callable[[Callable[[], Any]], Any]]:
    """Makers of automatic guides, from a model."""

    def flow(recipe: str, **options: Any) -> Callable[[Callable[[], Any]], Any]:
        return lambda model: gx.guides.AutoFlow(model, getattr(gx.flows, recipe), warm_start=None, **options)

    return {
        "iaf": flow("iaf"),
        "maf": flow("maf"),
        **{f"{name}, inverse": flow(name, inverse=True) for name in ONE_WAY},
        **{name: flow(name) for name in BOTH_WAYS},
        "AutoNormal": AutoNormal,
        "AutoMultivariateNormal": AutoMultivariateNormal,
        "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[max(64, d)] * 2, num_transforms=3),
    }


def operations(make: Callable[[Callable[[], Any]], Any], d: int) -> dict[str, Call]:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))

    guide = make(model)
    guide()
    z = torch.randn(BATCH, d)

    def posterior() -> Any:
        found = dist.Normal(*guide._get_loc_and_scale("z")).to_event(1) if isinstance(guide, AutoNormal) else None
        for part in guide.modules():
            if isinstance(part, dist.transforms.AffineAutoregressive):
                part._cached_x_y = None, None
        return found or guide.get_posterior()

    @torch.no_grad()
    def draw() -> Tensor:
        q = posterior()
        return q.log_prob(q.rsample((BATCH,)))

    @torch.no_grad()
    def score() -> Tensor:
        return posterior().log_prob(z.clone())

    train = svi(model, guide, [*guide.parameters()], num_particles=BATCH, vectorize_particles=True, max_plate_nesting=0)
    return {DRAW: draw, SCORE: score, STEP: train}


def table(options: argparse.Namespace) -> list[Measurement]:
    pyro.settings.set(module_local_params=True)  # guides of one class would share their parameters by name
    found = []
    for d in map(int, options.sizes.split(",")):
        made = {name: operations(make, d) for name, make in guides(d).items()}
        calls = {(name, "guide", f"{key}, {d}"): call for name, parts in made.items() for key, call in parts.items()}
        found += measured(calls, options.rounds)
    return found


if __name__ == "__main__":
    found = parser(__doc__, [step, external, table], rounds=9)
    found.set_defaults(threads=1)
    found.add_argument("--sizes", default="8,32,128", help="numbers of latents in the table")
    run(found, quick={"sections": "step,table", "sizes": "8"})
