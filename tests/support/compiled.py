"""What the law of compiled functions runs on: every entry of the registry, and why some are left out."""

from __future__ import annotations

import torch

from pyro_genexact import testing
from pyro_genexact.contexts import PaddedSequence
from pyro_genexact.testing import conditioner_inputs, encoder_inputs, made
from support import registry
from support.values import built, sized

SEARCH = "a search for a root, whose steps are unrolled: minutes of compilation"
FOREIGN = "zuko chooses its steps by values"
SLOW = {
    **dict.fromkeys(
        (
            "distribution naf inverse one feature",
            "distribution umnn inverse one feature",
            "distribution sospf inverse one feature",
            "distribution bpf inverse one feature",
            "distribution bnaf inverse",
            "transform Autoregressive Bernstein inverse",
            "transform Autoregressive generic inverse",
            "transform Autoregressive MonotoneNetwork inverse",
            "transform Block leaky context inverse",
            "transform Block deep inverse",
            "transform Planar context inverse",
            "transform Radial context inverse",
            "transform Sylvester context inverse",
        ),
        SEARCH,
    ),
    "distribution from_zuko CNF": FOREIGN,
    "distribution head Stable": "a quadrature that refines where values require it",
}


def of_distribution(name):
    module, context = registry.DISTRIBUTIONS[name]()
    with torch.no_grad():
        y = made(module, context).sample()
    given = () if context is None else (context,)
    testing.compiled(module, lambda y, *given: made(module, *given).log_prob(y), y, *given)


def of_transform(name):
    subject, x, context = registry.TRANSFORMS[name]()
    given = () if context is None else (context,)
    module = subject if isinstance(subject, torch.nn.Module) else None

    def run(x, *given):
        t = made(subject, *given)
        y = t(x)
        return y, t.log_abs_det_jacobian(x, y)

    testing.compiled(module, run, x, *given)


def of_conditioner(name):
    net = registry.CONDITIONERS[name]()
    y, context = conditioner_inputs(net)
    testing.compiled(net, net, y, *(() if context is None else (context,)))


def of_encoder(name):
    encoder = registry.ENCODERS[name]()
    values = encoder_inputs(encoder)
    testing.compiled(encoder, encoder, values)
    if encoder.event_dim > 1:
        lengths = torch.arange(len(values)) % (values.shape[1] + 1)
        testing.compiled(encoder, lambda x, n: encoder(PaddedSequence(x, n)), values, lengths)


def of_head(name):
    head = registry.HEADS[name]()
    phi, x = 0.5 * sized(3, 2, head.num_params), sized(3, 2, *head.site_shape, seed=1)

    def run(phi, x):
        t = head(phi)
        y = t(x)
        return y, t.log_abs_det_jacobian(x, y)

    testing.compiled(head, run, phi, x)


def of_distribution_head(name):
    head = built(registry.DISTRIBUTION_HEADS[name]())
    phi = 0.5 * sized(2, 4, head.num_params)
    with torch.no_grad():
        y = head(phi).sample()
    testing.compiled(head, lambda phi, y: head(phi).log_prob(y), phi, y)


TABLES = {
    "distribution": (of_distribution, registry.DISTRIBUTIONS),
    "transform": (of_transform, registry.TRANSFORMS),
    "conditioner": (of_conditioner, registry.CONDITIONERS),
    "encoder": (of_encoder, registry.ENCODERS),
    "head": (of_head, registry.HEADS),
    "distribution head": (of_distribution_head, registry.DISTRIBUTION_HEADS),
}
CASES = {f"{kind} {name}": (law, name) for kind, (law, names) in TABLES.items() for name in names}
