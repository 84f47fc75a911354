"""Augmented data in ``fit``, and Tweedie's formula where the posterior mean is known."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_genexact as gx
from support.checks import fails


def noisy(x, scale=0.1):
    return x + scale * torch.randn_like(x)


class Mean(gx.DistributionModule):
    """A normal with a learned mean and scale, which records its data."""

    def __init__(self, context=0):
        super().__init__()
        self.loc, self.log_scale, self.context, self.seen = nn.Parameter(torch.zeros(2)), nn.Parameter(Z()), context, []

    def forward(self, context=None):
        self.seen.append(context)
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def Z():
    return torch.zeros(2)


@pytest.mark.parametrize("kind", ["tensor", "array", "memory map", "Dataset", "Dataset of pairs", "context", "dict"])
def test_items(kind, tmp_path):
    x, c = torch.arange(20.0).view(10, 2), torch.arange(10.0).unsqueeze(1)
    data = {
        "tensor": lambda: gx.Augmented(x, noisy),
        "array": lambda: gx.Augmented(x.numpy().astype(np.float64), noisy),
        "memory map": lambda: gx.Augmented(mapped(x, tmp_path / "rows"), noisy),
        "Dataset": lambda: gx.Augmented(_Rows(x), noisy),
        "Dataset of pairs": lambda: gx.Augmented(TensorDataset(x, c), noisy),
        "context": lambda: gx.Augmented(x, noisy, c.numpy()),
        "dict": lambda: gx.Augmented(x, noisy, {"context": c}),
    }[kind]()
    first, second = ([data[i] for i in range(len(data))] for _ in range(2))
    pairs = kind in ("Dataset of pairs", "context", "dict")
    for one, other, row, label in zip(first, second, x, c, strict=True):
        if pairs:
            (one, of_one), (other, _) = one, other
            assert torch.equal(of_one["context"] if kind == "dict" else of_one, label)
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - row).abs().max() < 0.6
    whole = next(iter(DataLoader(data, batch_size=10)))
    assert (whole[0] if pairs else whole).shape == (10, 2)


def mapped(x, path):
    rows = np.memmap(path, dtype="float64", mode="w+", shape=x.shape)
    rows[:] = x
    return rows


class _Rows(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row]


def test_fit_sees_fresh_noise_in_each_epoch():
    seen = []

    def recorded(x):
        y = noisy(x, 3.0)
        seen.append((x, y))
        return y

    x, c = torch.ones(40, 2), torch.arange(40.0).unsqueeze(1)
    model = Mean(context=1)
    torch.manual_seed(5)
    gx.fit(model, gx.Augmented(x, recorded, c), epochs=100, lr=0.05, batch_size=20, progress=False)
    assert len({float(y[0, 0]) for _, y in seen}) == len(seen) == 200
    # the scale is that of noise over all epochs, which fixed noise of 40 rows would miss by 11%
    assert torch.allclose(model.log_scale.exp(), torch.tensor([3.0, 3.0]), rtol=0.1)
    runs = []
    for _ in range(2):  # the seed of the fit determines the noise
        model = Mean()
        torch.randn(3)
        gx.fit(model, gx.Augmented(x, noisy), epochs=2, progress=False)
        runs.append(model.loc.detach().clone())
    assert torch.equal(*runs)


def test_workers_draw_different_noise():
    data = gx.Augmented(torch.zeros(8, 1), noisy)
    values = torch.cat([*DataLoader(data, batch_size=2, num_workers=2)])
    assert len(values.unique()) == 8


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_denoised_is_the_posterior_mean(scale):
    """For a normal x, and for a mixture of two points, whose posterior mean is tanh."""
    y = torch.linspace(-4, 4, 9, dtype=torch.float64)
    prior = 1.7
    spread = (prior**2 + scale**2) ** 0.5
    normal = dist.Normal(torch.zeros(9, dtype=torch.float64), spread)
    torch.testing.assert_close(gx.denoised(normal, y, scale), y * prior**2 / spread**2)
    points = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2, dtype=torch.float64)),
        dist.Normal(torch.tensor([-1.0, 1.0], dtype=torch.float64), scale),
    )
    torch.testing.assert_close(gx.denoised(points, y, scale), (y / scale**2).tanh(), rtol=0, atol=1e-9)


def test_denoised_broadcasts_with_the_batch():
    normals = dist.Normal(torch.tensor([[0.0], [1.0], [2.0]]), 2**0.5).to_event(1)
    torch.testing.assert_close(gx.denoised(normals, torch.ones(1), 1.0), torch.tensor([[0.5], [1.0], [1.5]]))


def test_denoised_of_a_flow():
    torch.manual_seed(0)
    flow = gx.flows.tarflow((2, 2), 1, 2, width=8, depth=1, num_heads=1, transforms=1)
    d = flow(torch.zeros(5, 2))
    with torch.inference_mode():
        y = d.sample((3,))
    found = gx.denoised(d, y, 0.2)
    leaf = y.clone().requires_grad_()
    (score,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(found, y + 0.04 * score)
    assert not found.requires_grad and all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize(
    "run, kind, text",
    [
        (lambda: gx.Augmented(3, noisy), TypeError, "Expected data to be a tensor, an array, a table, a Dataset"),
        (lambda: gx.Augmented(Z(), 0.1), TypeError, "Expected function to be a function; got float."),
        (
            lambda: gx.Augmented(_Rows(Z()), noisy, Z()),
            ValueError,
            "Expected context=None with a Dataset, whose items may be (row, context); got Tensor.",
        ),
        (
            lambda: gx.Augmented(Z(), noisy, torch.zeros(3)),
            ValueError,
            "Expected context.shape[0] == 2 (rows of data); got (3,).",
        ),
        (
            lambda: gx.Augmented(Z(), lambda x: x[:0])[0],
            ValueError,
            "Expected function to return a tensor of 1 rows, as it was given; got (0,).",
        ),
        (
            lambda: gx.Augmented(Z(), lambda x: None)[0],
            ValueError,
            "Expected function to return a tensor of 1 rows, as it was given; got NoneType.",
        ),
        (
            lambda: gx.denoised(Mean(), Z(), 0.1),
            TypeError,
            "Expected distribution to be of class Distribution; got Mean.",
        ),
        (
            lambda: gx.denoised(dist.Poisson(Z() + 1), Z(), 0.1),
            ValueError,
            "Expected distribution.support to be all real values; got IntegerGreaterThan(lower_bound=0).",
        ),
        (
            lambda: gx.denoised(dist.Normal(0.0, 1.0), torch.tensor([1, 2]), 0.1),
            TypeError,
            "Expected y to be a floating-point tensor; got torch.int64.",
        ),
        (
            lambda: gx.denoised(dist.Normal(0.0, 1.0), Z(), 0.0),
            ValueError,
            "Expected scale to be positive and finite; got 0.0.",
        ),
    ],
)
def test_errors(run, kind, text):
    fails(kind, text, run)
