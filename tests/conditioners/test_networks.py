"""Independent, Markov, NADE and MADE: starts, priors, dropout, and each against the same computed by hand."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch.func import functional_call, vmap

from pyro_genexact import Autoregressive, heads, testing
from pyro_genexact.conditioners import CausalConv, PixelCNN, StateSpace, nade
from pyro_genexact.conditioners.independent import Independent
from pyro_genexact.conditioners.made import MADE
from pyro_genexact.conditioners.markov import Markov
from pyro_genexact.conditioners.nade import NADE
from pyro_genexact.conditioners.recurrent import Recurrent
from pyro_genexact.contexts import Covariates
from pyro_genexact.core.binding import Bound
from pyro_genexact.testing import conditioner_inputs
from pyro_genexact.transforms import AutoregressiveTransform
from support.networks import in_a_model, naive_nade
from support.registry import CONDITIONERS
from support.registry.conditioners import factory

NEW = ("CausalConv", "PixelCNN", "StateSpace diagonal", "StateSpace selective")


def test_steps_have_power():
    class Later(Markov):
        def forward(self, y, context=None):
            return super().forward(y, context.roll(1, 1))

    with pytest.raises(
        AssertionError, match=r"context use broken \[feature 0\]: changes site 0 by 0, which must not be 0"
    ):
        testing.context_use(factory(Later, (), 2, order=1, hidden=(8,), context=Covariates(2))())

    class Endless(Recurrent):
        def extend(self, y, state):
            return super().extend(y, state._replace(context=torch.cat([state.context, state.context], 1)))

    with pytest.raises(AssertionError, match=r"consumption broken \[5 of 5 sites, grad False\]: no error"):
        testing.consumption(factory(Endless, (), 2, hidden=6, context=Covariates(2))())


@pytest.mark.parametrize(
    "kind", ["Recurrent gru", "Recurrent lstm", "Markov", "Independent", "CausalConv", "StateSpace selective"]
)
def test_later_covariates_are_not_read(kind):
    net = CONDITIONERS[f"{kind} steps"]()
    y, context = conditioner_inputs(net)
    moved = context.clone()
    moved[:, 3:] += 1
    change = (net(y, moved) - net(y, context)).abs().amax((0, 2))
    assert (change[:3] == 0).all()
    assert (change[3:] > 1e-6).all()


# Starts


@pytest.mark.parametrize("name", [name for name in CONDITIONERS if not name.startswith("RunningSum")])
def test_phi_starts_small(name, monkeypatch):
    """So that heads start near phi = 0, which is where they are sensible; and not at 0, where parts would stay alike."""
    monkeypatch.setattr("support.values.redraw", lambda module: module)
    torch.manual_seed(0)
    net = CONDITIONERS[name]()
    phi = net(*conditioner_inputs(net, 100))
    assert 0 < phi.abs().max() < 0.5


def test_starts_differ():
    torch.manual_seed(0)
    assert Independent(4, 3).phi.unique().numel() == 12
    for net in (Recurrent((), 2), Recurrent((3,), 2, cell="lstm"), Recurrent(5, 2, hidden=7, cell="elman")):
        assert (net.begin != 0).all() and net.begin.unique().numel() == net.encoder.features


# Calls under vmap


VMAPPED = [
    lambda: factory(CausalConv, 2, 3, width=4, dilations=(1, 2))(),
    lambda: factory(StateSpace, 2, 3, width=4, depth=1, state=2)(),
    lambda: factory(PixelCNN, (2, 1, 2), 3, site=2, width=4, depth=1)(),
    lambda: factory(StateSpace, 2, 3, kind="selective", width=4, depth=1, state=2)(),
    lambda: factory(NADE, 4, 3, site=2, hidden=6)(),
    lambda: factory(NADE, 4, 3, site=[(), 3, (), 2], hidden=6)(),
    lambda: factory(Markov, 2, 3, order=2, hidden=(5,))(),
    lambda: factory(MADE, 4, 3, site=2, hidden=(8,))(),
    lambda: factory(MADE, 4, 3, site=[(), 3, (), 2], hidden=(8,))(),
]


@pytest.mark.parametrize("make", VMAPPED)
def test_categories_under_vmap(make):
    net = make()
    rows = [conditioner_inputs(net, 5, 4, seed)[0] for seed in range(3)]
    if isinstance(net, NADE) and isinstance(net.site, list):
        bad = rows[0].clone()
        bad[2, 1] = 3
        with pytest.raises(ValueError, match="3 categories"):  # still checked outside of vmap
            net(bad)

    def by_chunks(y):
        phi, state = net.start(None, len(y))
        first, state = net.extend(y[:, :1], state)
        return torch.cat([phi.unsqueeze(1), first, net.extend(y[:, 1:-1], state)[0]], 1)

    expected = torch.stack([net(y) for y in rows])
    for call in (net, by_chunks):
        torch.testing.assert_close(vmap(call)(torch.stack(rows)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Recurrent gru layers", "Recurrent lstm", "Recurrent elman", "Markov", "NADE", *NEW])
def test_priors_on_weights(name):
    net = CONDITIONERS[name]()
    y, context = conditioner_inputs(net)
    plain = copy.deepcopy(net)
    shapes = {key: p.shape for key, p in net.named_parameters()}
    to_pyro_module_(net)
    for key, shape in shapes.items():
        owner, _, leaf = key.rpartition(".")
        prior = dist.Normal(torch.zeros(shape, dtype=torch.float64), 0.5).to_event(len(shape))
        setattr(net.get_submodule(owner), leaf, PyroSample(prior))
    pyro_copy = copy.deepcopy(net)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(net).get_trace(y, context)
    drawn = {key: trace.nodes[key]["value"] for key in shapes}
    assert torch.equal(trace.nodes["_RETURN"]["value"], functional_call(plain, drawn, (y, context)))

    trace, bound = in_a_model(pyro_copy, lambda net: Bound(net).copy())  # it keeps its draw, in every view
    drawn = {key: trace.nodes[f"net.{key}"]["value"] for key in shapes}
    expected = functional_call(plain, drawn, (y, context))
    assert torch.equal(bound(y, context), expected)
    _, state = bound.start(context, len(y))
    torch.testing.assert_close(bound.extend(y[:, :-1], state)[0], expected[:, 1:], rtol=0, atol=1e-12)


def test_made_dropout_is_that_of_the_same_network_in_eval():
    net = factory(MADE, 4, 2, hidden=(64,), context=1, activation=torch.tanh, dropout=0.5)()
    same = factory(MADE, 4, 2, hidden=(64,), context=1, activation=torch.tanh)()
    same.load_state_dict(net.state_dict())
    y, context = conditioner_inputs(net)
    assert torch.equal(net.eval()(y, context), same(y, context)) and net.has_adjoint
    assert not net.train().has_adjoint and "dropout=0.5" in repr(net)


@pytest.mark.parametrize("grad", [False, True])
def test_made_drops_the_same_way_in_both_views(grad):
    """Many rows alike: the mean is that of the whole network, which is linear in what is dropped; deviations agree."""
    net = factory(MADE, 4, 2, hidden=(64,), activation=torch.tanh, dropout=0.5)()
    y, _ = conditioner_inputs(net, rows=1)
    many, whole = y.expand(8000, -1), net.eval()(y)[0]
    net.train()
    with torch.set_grad_enabled(grad):
        phi, state = net.start(None, 8000)
        stepped = torch.cat([phi.unsqueeze(1), net.extend(many[:, :1], state)[0]], 1)
        phi, state = net.extend(many[:, 1:3], net.extend(many[:, :1], net.start(None, 8000)[1])[1])
    draws = {"parallel": net(many), "one site": stepped, "two sites": phi}
    sites = {"parallel": slice(None), "one site": slice(0, 2), "two sites": slice(2, 4)}
    spread = draws["parallel"].std(0)
    for name, values in draws.items():
        at = sites[name]
        errors = spread[at] / 8000**0.5
        read = spread[at] > 0  # the first site reads nothing
        assert ((values.mean(0) - whole[at]).abs()[read] < 4.5 * errors[read]).all(), name
        assert ((values.std(0) / spread[at] - 1).abs()[read] < 0.05).all(), name


def test_gradients_of_the_inverse_while_units_are_dropped():
    net, head = factory(MADE, 4, 2, hidden=(16,), activation=torch.tanh, dropout=0.5)(), heads.Affine()
    t = AutoregressiveTransform(net, head)()
    y, _ = conditioner_inputs(net, rows=3)

    def of_seed(y):
        torch.manual_seed(3)
        return t.inv(y.clone())

    assert torch.autograd.gradcheck(of_seed, y.requires_grad_(), fast_mode=True)
    model = Autoregressive(net, heads.Normal(), (4,))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(model().rsample((5,)).sum(), [*net.parameters()]))


# Independent


def test_independent_is_constant_in_history():
    for name in ("Independent", "Independent context", "Independent steps"):
        net = CONDITIONERS[name]()
        (y, x), (other, _) = conditioner_inputs(net), conditioner_inputs(net, seed=1)
        assert torch.equal(net(y, x), net(other, x))
    phi = CONDITIONERS["Independent"]()
    assert torch.equal(phi(torch.zeros(3, 5, dtype=torch.float64)), phi.phi.expand(3, 5, 2))


def test_independent_steps_share_a_network():
    net = CONDITIONERS["Independent steps"]()
    y, x = conditioner_inputs(net)
    same = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(net(y, same), net(y, same)[:, :1].expand(-1, 5, -1))


# Markov


def test_markov_by_hand():
    net = CONDITIONERS["Markov context"]()
    y, x = conditioner_inputs(net, rows=3)
    for b in range(3):
        for t in range(5):
            window = []
            for s in (t - 2, t - 1):
                window += [net.encoder.weight[y[b, s]], torch.ones(1)] if s >= 0 else [torch.zeros(8), torch.zeros(1)]
            phi = net.net(torch.cat([*window, x[b]]))
            torch.testing.assert_close(net(y, x)[b, t], phi, rtol=0, atol=1e-12)


def test_markov_knows_how_much_history_it_has():
    net = CONDITIONERS["Markov"]()
    phi = net(torch.zeros(1, 5, dtype=torch.float64))[0]
    assert (phi[0] != phi[1]).all()
    assert (phi[1] != phi[2]).all()
    torch.testing.assert_close(phi[2], phi[3])


@pytest.mark.parametrize("name", [name for name in CONDITIONERS if name.startswith("NADE")])
def test_nade_by_hand(name):
    net = CONDITIONERS[name]()
    y, x = conditioner_inputs(net, rows=3)
    torch.testing.assert_close(net(y, x), naive_nade(net, y, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("site", [(), (2,), 3, [(), 3, (), 2, 4, ()] * 3], ids=str)
@pytest.mark.parametrize("context", [0, 2])
def test_nade_in_panels(site, context, monkeypatch):
    """Four panels of 4 sites and one of 1: values and gradients, every chunk length, and no site leaks into earlier ones."""
    monkeypatch.setattr(nade, "_TILE", 0)
    net = factory(NADE, 18, 2, site=site, hidden=6, context=context)()
    y, x = conditioner_inputs(net, rows=3)
    inputs = list(net.parameters())
    if not isinstance(site, int):
        inputs.append(y.requires_grad_())
    phi, expected = net(y, x), naive_nade(net, y, x)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(value.sin().sum(), inputs) for value in (phi, expected)]
    for got, truth in zip(*grads, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
    testing.chunks(net)
    if not isinstance(site, int):
        bad = y.detach().clone()
        bad[:, 11] = torch.nan  # a real site in every list
        changed = net(bad, x)
        assert torch.equal(changed[:, :12], phi[:, :12]) and changed[:, 12:].isnan().all()
