"""What a call returns holds its modules with the tensors, parts and modes that they had at the call."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pyro_genexact as gx
from pyro_genexact import heads, transforms
from pyro_genexact.conditioners import MADE
from pyro_genexact.core.binding import Bound
from pyro_genexact.testing.helpers import seeded
from support.values import built, sized

X = sized(3, 4)


def coupling():
    return built(transforms.Coupling(4, heads.Affine(), mask=torch.tensor([True, False, True, False]), hidden=(8,)))


def autoregressive(head=None):
    head = head or heads.Affine()
    return built(transforms.AutoregressiveTransform(MADE(4, head.num_params, hidden=(8,)), head))


MODULES = {
    "autoregressive": autoregressive,
    "block": lambda: built(transforms.BlockAutoregressive(4, hidden=(4,))),
    "coupling": coupling,
    "monotone network": lambda: autoregressive(heads.MonotoneNetwork(2, hidden=(4,))),
    "sylvester": lambda: built(transforms.Sylvester(4, rank=2)),
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]()


def both(t):
    """Values, log-determinants and gradients of both directions."""
    found = []
    for u in (t, t.inv):
        x = X.clone().requires_grad_()
        y, ladj = u.call_and_ladj(x)
        found += [y, ladj, *torch.autograd.grad(y.sin().sum() + ladj.sum(), x, create_graph=True)]
    return found


def others(module):
    """Other values for all parameters."""
    return {name: p.detach() * 1.1 + 0.1 for name, p in module.named_parameters()}


def same(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def assign(module):
    module.load_state_dict(module.state_dict() | others(module), assign=True)


def replace(module):
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else nn.Parameter(p.detach() * 1.1 + 0.1)


def replace_parts(module):
    new = copy.deepcopy(module)
    replace(new)
    module._modules.update(new._modules)
    module._parameters.update(new._parameters)


@pytest.mark.parametrize("change", [assign, replace, replace_parts])
def test_what_is_replaced_after_the_call_is_not_read(module, change):
    t, expected = module(), both(module())
    change(module)
    same(both(t), expected)
    with pytest.raises(AssertionError):
        same(both(module()), expected)


def test_tensors_of_a_functional_call(module):
    weights = {name: nn.Parameter(w) for name, w in others(module).items()}
    before, changed = both(module()), copy.deepcopy(module)
    assign(changed)
    t = functional_call(module, weights, ())
    same(both(t), both(changed()))
    same(both(module()), before)
    grads = torch.autograd.grad(sum(v.sum() for v in both(t)), list(weights.values()), materialize_grads=True)
    expected = torch.autograd.grad(
        sum(v.sum() for v in both(changed())), list(changed.parameters()), materialize_grads=True
    )
    same(grads, expected)


def test_a_graph_made_within_a_functional_call_is_differentiated_after_it(module):
    """Backward passes evaluate networks again."""

    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self):
            y, ladj = self.inner().inv.call_and_ladj(X)
            return y.sin().sum() + ladj.sum()

    weights = {name: w.requires_grad_() for name, w in others(module).items()}
    changed = copy.deepcopy(module)
    assign(changed)
    score = functional_call(Score(), {f"inner.{name}": w for name, w in weights.items()}, ())
    y, ladj = changed().inv.call_and_ladj(X)
    for first, wanted in ((score, weights.values()), (y.sin().sum() + ladj.sum(), changed.parameters())):
        wanted = list(wanted)
        grads = torch.autograd.grad(first, wanted, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), wanted, materialize_grads=True)
        found = [*grads, *second]
        if first is score:
            expected = found
    same(found, expected)


def scores(d):
    """Log-probabilities, their gradients, and samples."""
    x = X.clone().requires_grad_()
    with seeded(0):
        found = [d.log_prob(x), d.rsample((3,))]
    return [*found, *torch.autograd.grad(found[0].sum(), x)]


@pytest.mark.parametrize("change", [assign, replace, replace_parts])
def test_distributions_read_the_weights_of_their_call(change):
    net = MADE(4, 2, hidden=(8,))
    module = built(gx.Autoregressive(net, heads.Normal(), (4,)))
    d, expected = module(), scores(module())
    change(module)
    same(scores(d), expected)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), d.expand((3,))):
        same([other.log_prob(X)], expected[:1])
    rest = d.conditional_on_prefix(X[0, :2])
    change(module)
    again = d.conditional_on_prefix(X[0, :2])
    same([again.log_prob(X[:, 2:])], [rest.log_prob(X[:, 2:])])
    with pytest.raises(AssertionError):
        same(scores(module()), expected)


def test_buffers_of_a_functional_call():
    module = coupling()
    t = functional_call(module, {"order": torch.tensor([1, 3, 0, 2]), "restore": torch.tensor([2, 0, 3, 1])}, ())
    assert torch.equal(t(X)[:, [1, 3]], X[:, [1, 3]]) and torch.equal(module()(X)[:, [0, 2]], X[:, [0, 2]])


def test_changes_in_place_are_seen(module):
    t = module()
    both(t)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
    same(both(t), both(module()))


@pytest.mark.parametrize("when", ["before", "after", "replaced"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_of_what_a_call_returns(module, copied, when):
    t, expected = module(), both(module())
    if when == "after":
        both(t)
    if when == "replaced":
        assign(module)
    other = copied(t)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
    same(both(other), expected)


def test_the_mode_is_that_of_the_call():
    net = built(gx.conditioners.MADE(4, 2, hidden=(64,), dropout=0.5))
    module = transforms.AutoregressiveTransform(net, heads.Affine())
    eval_, train = module.eval()(), module.train()()
    assert torch.equal(eval_(X.clone()), eval_(X.clone())) and not torch.equal(train(X.clone()), train(X.clone()))
    module.eval()
    assert torch.equal(eval_(X.clone()), eval_(X.clone())) and not torch.equal(train(X.clone()), train(X.clone()))


@pytest.mark.parametrize("make", [autoregressive, coupling], ids=["autoregressive", "coupling"])
def test_layers_are_called_where_they_stand(make):
    """So that hooks which gather a layer's weights for its call alone, as those of FSDP, find it."""
    module, called = make(), []
    t = module()
    layers = {name: part for name, part in module.named_modules() if list(part.parameters(recurse=False))}
    for name, part in layers.items():
        part.register_forward_pre_hook(lambda part, _, name=name: called.append((name, part)))
    t(X)
    assert [name for name, _ in called] == list(layers) and all(part is layers[name] for name, part in called)


def test_a_parametrisation_after_the_call():
    module = coupling()
    t, expected = module(), both(module())
    layer = next(part for part in module.modules() if isinstance(part, nn.Linear))
    torch.nn.utils.parametrizations.spectral_norm(layer)
    same(both(t), expected)
    assert not torch.allclose(module()(X), expected[0])


def test_a_module_that_still_has_all_is_not_copied():
    net = MADE(4, 2, hidden=(8,))
    bound, made = Bound(net), Bound(net).copy()
    assert (
        bound.module is net
        and made is not net
        and all(a is b for a, b in zip(made.parameters(), net.parameters(), strict=True))
    )
    net.register_buffer("more", torch.zeros(()))
    assert bound.module is not net and not hasattr(bound.module, "more")
    del net.more
    assert bound.module is net
