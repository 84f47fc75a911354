"""Models whose layers are sharded over the two processes of ``two_processes.py``."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pyro_genexact as gx


def sharded():
    """Differences between models whose layers are sharded over the processes, and the same models in one process."""
    torch.manual_seed(6)
    x, context = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    made = gx.conditioners.MADE(5, 2, hidden=(8, 8), context=3)
    transformer = partial(gx.conditioners.Transformer, (), 2, width=8, depth=2, num_heads=2)
    found = {}
    for name, net, given in (
        ("MADE", made, context),
        ("Transformer", transformer(context=3), context),
        ("Source", transformer(context=gx.Source(1)), x.unsqueeze(2)),
    ):
        whole = gx.Autoregressive(net, gx.heads.Normal(), (5,)).double()
        parted = copy.deepcopy(whole)
        for layer in parted.conditioner.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        nats = [module(given).log_prob(x) for module in (whole, parted)]
        for one in nats:
            one.sum().backward()
        pairs = [*zip(whole.parameters(), parted.parameters(), strict=True)]
        sizes = [q.to_local().numel() / p.numel() for p, q in pairs if isinstance(q, DTensor)]
        grads = [(p.grad, q.grad.full_tensor() if isinstance(q, DTensor) else q.grad) for p, q in pairs]
        found[name] = [
            (nats[0] - nats[1]).abs().max().item(),
            max((p - q).abs().max().item() for p, q in grads if p is not None),
            sum(sizes) / len(sizes),
        ]
    return found
