"""Every head with every kind of conditioner: the parallel factors are those met site by site."""

import pytest
import torch

from pyro_genexact.families.in_support import contains
from support import registry
from support.registry.heads import paired


@pytest.mark.parametrize("net", registry.PAIRED)
@pytest.mark.parametrize("head", registry.DISTRIBUTION_HEADS)
def test_factors_site_by_site(head, net):
    model = paired(head, net)
    torch.manual_seed(0)
    d = model()
    y = d.sample((3,))
    assert contains(model.head.support, y).all() and d.support.check(y).all()
    factors = d.log_prob_sites(y)
    phi, state = model.conditioner.start(None, 3)
    phi = phi.unsqueeze(1)
    for t in range(4):
        expected = model.head(phi, t).log_prob(y[:, t : t + 1])
        torch.testing.assert_close(factors[:, t : t + 1], expected, rtol=1e-9, atol=1e-9)
        if t < 3:
            phi, state = model.conditioner.extend(y[:, t : t + 1], state)
    torch.testing.assert_close(d.log_prob(y), factors.sum(1))
    grads = torch.autograd.grad(d.log_prob(y).sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads) and any((g != 0).any() for g in grads if g is not None)
