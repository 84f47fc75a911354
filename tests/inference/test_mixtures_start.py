"""The starts of guides that are mixtures of flows: Gaussians at several modes, and their weights."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference.mixture_start import mixtures
from pyro_genexact.inference.normal import Normal
from support.checks import close
from support.latents import DOUBLE, gaussian, numbers, still


def far_modes(weights=(0.7, 0.3), D=4):
    """Gaussians at -3 and 3 in each dim."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (D,)))
    parts = [math.log(w) + dist.Normal(m, 0.5).log_prob(z).sum(-1) for w, m in zip(weights, (-3.0, 3.0), strict=True)]
    pyro.factor("density", torch.stack(parts).logsumexp(0))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.5)])
@pytest.mark.parametrize("warm_start", ["pathfinder", "laplace"])
def test_components_start_at_modes_also_at_mirrored_ones(warm_start, weights):
    torch.manual_seed(0)
    guide = AutoFlow(lambda: far_modes(weights), still, mixture=2, warm_start=warm_start)
    guide()
    centers = torch.stack([part.transforms[-1].center for part in guide.flow.parts])
    order = centers[:, 0].argsort()
    close(centers[order], 3.0 * torch.tensor([[-1.0], [1.0]]).expand(2, 4), tol=0.01)
    found = guide.flow.logits.detach().softmax(0)[order]
    close(found, 0.9 * torch.tensor(weights) + 0.05, tol=0.01)  # a tenth of the weight is shared evenly


def test_components_without_a_warm_start_differ():
    torch.manual_seed(0)
    guide = AutoFlow(gaussian, still, mixture=3, warm_start=0)
    guide()
    assert torch.pdist(torch.stack([part.transforms[-1].center for part in guide.flow.parts])).min() > 0.05


def test_more_components_than_modes_are_not_worse():
    """One Gaussian: all components start there. The ELBO of that is 0."""
    for warm_start in ("pathfinder", "laplace"):
        torch.manual_seed(0)
        guide = AutoFlow(gaussian, still, mixture=3, warm_start=warm_start)
        guide()
        assert -0.3 < gx.diagnostics.psis(gaussian, guide, num_samples=500).elbo < 0.02
        before = copy.deepcopy(guide.state_dict())
        with torch.no_grad():
            guide.flow.logits += 0.0
        guide.fit_laplace()
        after = gx.diagnostics.psis(gaussian, guide, num_samples=500).elbo
        assert after > -0.3 and before.keys() == guide.state_dict().keys()


def pick(target, first, others, size):
    """The means and weights of Gaussians with standard deviation 1 at places on a line."""

    def density(z):
        return target(z.squeeze(-1))

    density.dim, density.batched = 1, True
    lists = [[Normal(numbers(1) + m, torch.eye(1, **DOUBLE)) for m in means] for means in (first, others)]
    ((normals, weights),) = mixtures(density, *lists, size)
    return torch.cat([normal.mean for normal in normals]), weights


def test_gaussians_of_other_modes_come_first_if_they_matter():
    parts = dist.Normal(torch.tensor([-1.5, 1.5], **DOUBLE), 1.0)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4], **DOUBLE)), parts).log_prob
    torch.manual_seed(0)
    close(pick(target, [-1.5, 50.0], [1.5], 2)[0], torch.tensor([-1.5, 1.5], **DOUBLE))
    close(pick(target, [-1.5, 1.5], [0.0], 2)[0], torch.tensor([-1.5, 1.5], **DOUBLE))


def test_missing_components_are_shifted_copies_that_share_the_largest_weight():
    parts = dist.Normal(torch.tensor([-5.0, 5.0], **DOUBLE), 1.0)
    target = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3], **DOUBLE)), parts).log_prob
    torch.manual_seed(0)
    means, weights = pick(target, [5.0, -5.0], [], 3)
    close(means[:2], torch.tensor([-5.0, 5.0], **DOUBLE))
    assert (means[2] + 5).abs().item() == pytest.approx(0.5)
    close(weights, 0.9 * torch.tensor([0.35, 0.3, 0.35], **DOUBLE) + 0.1 / 3, tol=1e-6)


def put(guide, centers, weights=(0.5, 0.5)):
    with torch.no_grad():
        for part, center in zip(guide.flow.parts, centers, strict=True):
            part.transforms[-1].put(torch.full((4,), center), 0.5 * torch.eye(4))
        guide.flow.logits.copy_(torch.tensor(weights).log())


def test_a_right_guide_stays_right():
    torch.manual_seed(0)
    guide = AutoFlow(far_modes, still, mixture=2, warm_start=0)
    guide()
    put(guide, (-3.0, 3.0), (0.7, 0.3))
    for fit in (guide.fit_pathfinder, guide.fit_laplace):
        fit()
        assert gx.diagnostics.psis(far_modes, guide, num_samples=500).elbo > -0.02


def test_steps_fit_gaussians_and_weights():
    torch.manual_seed(0)
    guide = AutoFlow(far_modes, still, mixture=2, warm_start=0)
    guide()
    put(guide, (-2.0, 2.0))
    guide.fit_gaussian(80)
    affines = [part.transforms[-1] for part in guide.flow.parts]
    means = torch.stack([affine()(torch.zeros(4)) for affine in affines]).detach()
    close(means, 3.0 * torch.tensor([[-1.0], [1.0]]).expand(2, 4), tol=0.1)
    close(guide.flow.logits.detach().softmax(0), torch.tensor([0.7, 0.3]), tol=0.05)
    assert not any(part.transforms[-2].skewness.any() for part in guide.flow.parts)
