"""What tests of conditioners compare with: NADE written out, a site after another, and calls inside a PyroModule."""

import pyro
import torch


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
