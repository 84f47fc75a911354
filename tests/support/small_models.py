"""Small autoregressive models and models of strings."""

import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.small_conditioners import Bigram
from support.values import built, sized

ORDER = torch.tensor([3, 1, 0, 2, 5, 4])
CONTEXT = sized(3, 2, seed=4)


def binary(order=None, event_shape=(6,), context=2, **options):
    return built(
        gx.Autoregressive(
            conditioners.MADE(6, 1, context=context, hidden=(16,), **options), heads.Bernoulli(), event_shape, order
        )
    )


def real(order=None, sites=4, head=None, net=None, context=0):
    head = head or heads.Normal()
    net = net or conditioners.MADE(sites, head.num_params, hidden=(16,), activation=torch.tanh, context=context)
    return built(gx.Autoregressive(net, head, (sites, *head.site_shape), order))


def bigram(V=3, eos=0, max_len=6, table=None):
    return gx.Sequence(Bigram(sized(V + 1, V) if table is None else table), heads.Categorical(V), eos, max_len)
