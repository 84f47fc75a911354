"""What tests of conditioners compare with: NADE written out, a site after another, and calls inside a PyroModule."""

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_genexact as gx


class Model(pyro.nn.PyroModule):
    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self):
        return self.call(self.net)


def in_a_model(net, call):
    """The trace and the value of a call of a PyroModule inside another one's."""
    trace = pyro.poutine.trace(Model(net, call)).get_trace()
    return trace, trace.nodes["_RETURN"]["value"]


def naive_nade(net, y, x=None, order=None):
    """One site at a time, site i being variable order[i]; one unit vector a category."""
    T, order = net.num_sites, range(net.num_sites) if order is None else order.tolist()
    kinds = net.site if isinstance(net.site, list) else [net.site] * T
    widths = [kind if isinstance(kind, int) else kind[0] if kind else 1 for kind in kinds]
    phi = torch.zeros(len(y), T, net.num_params, dtype=torch.float64)
    for b in range(len(y)):
        a = net.hidden_bias.clone()
        if x is not None:
            a = a + net.hidden_context @ x[b]
        for i, t in enumerate(order):
            phi[b, i] = net.activation(a) @ net.readout[t] + net.bias[t]
            if x is not None:
                phi[b, i] += x[b] @ net.readout_context[t]
            value = y[b, i]
            inputs = torch.eye(kinds[t], dtype=torch.float64)[int(value)] if isinstance(kinds[t], int) else value
            first = sum(widths[:t])
            a = a + inputs.reshape(-1) @ net.weight[first : first + widths[t]]
    return phi


def by_sites(net, y, context=None, cut=None):
    """The parameters by ``start`` and ``extend``, and the last state."""
    phi, state = net.start(context, len(y))
    phis = [phi.unsqueeze(1)]
    for chunk in y[:, :-1].split(1 if cut is None else list(cut), 1):
        phi, state = net.extend(chunk, state)
        phis.append(phi)
    return torch.cat(phis, 1), state


class Anew(gx.Conditioner):
    """A fixed-size network that is evaluated anew on all sites at each step, with zeros for the sites to come."""

    class State(NamedTuple):
        position: int
        version: list[int]
        y: Tensor
        context: Tensor | None

    def __init__(self, net):
        super().__init__()
        self.net, self.num_params, self.num_sites = net, net.num_params, net.num_sites
        self.site, self.context = net.site, net.context

    def start(self, context, batch_size):
        like = next(self.net.parameters()).new_zeros(batch_size, self.num_sites)
        y = like.long() if isinstance(self.site, int) else like
        return self.net(y, context)[:, 0], self.State(0, self.new_version(), y, context)

    def extend(self, y, state):
        first, stop = state.position, state.position + y.shape[1]
        whole = torch.cat([state.y[:, :first], y.to(state.y.dtype), state.y[:, stop:]], 1)
        phi = self.net(whole, state.context)[:, first + 1 : stop + 1]
        return phi, self.advance(state, y.shape[1])._replace(y=whole)
