"""Central intervals against NumPy's quantiles, and what a fan chart shows."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_genexact import diagnostics as dg
from support.conjugate import DATA, guide_of, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_intervals_are_quantiles(dtype):
    draws = (10 * torch.randn(37, 2, 3)).to(dtype)
    bounds = dg.central_intervals(draws, probs=(0.9, 0.5, 1.0))
    assert bounds.dtype == (torch.float64 if dtype == torch.int64 else dtype)
    truth = np.quantile(draws.double().numpy(), [[0.05, 0.95], [0.25, 0.75], [0, 1]], axis=0)
    np.testing.assert_allclose(bounds, truth, rtol=1e-5, atol=1e-5)


def test_intervals_of_nan_and_of_one_draw():
    draws = torch.tensor([[1.0, torch.nan], [3.0, 0.0]])
    assert dg.central_intervals(draws, (1.0,)).isnan().tolist() == [[[False, True]] * 2]
    assert dg.central_intervals(draws[:1, 0], (0.5,)).tolist() == [[1.0, 1.0]]
    np.testing.assert_array_equal(dg.plot_fan(draws).lines[0].get_ydata(), [2.0, np.nan])
    plt.close("all")


def test_ranks_of_many_draws_in_half_precision():
    draws = torch.linspace(-1, 1, 70_001).half()
    torch.testing.assert_close(dg.central_intervals(draws, (0.9,)), torch.tensor([[-0.9, 0.9]]).half())


ERRORS = {
    "none": (
        lambda: dg.central_intervals(torch.zeros(0, 3)),
        ValueError,
        r"shape \(S, \*event\), S >= 1; got \(0, 3\)",
    ),
    "number": (lambda: dg.central_intervals(torch.tensor(1.0)), ValueError, r"S >= 1; got \(\)"),
    "list": (lambda: dg.central_intervals([1.0, 2.0]), TypeError, "draws to be of class Tensor; got list"),
    "percent": (lambda: dg.central_intervals(torch.zeros(3), (0.5, 90)), ValueError, r"in \(0, 1\]; got \(0.5, 90\)"),
    "zero": (lambda: dg.central_intervals(torch.zeros(3), (0.0,)), ValueError, r"in \(0, 1\]; got \(0.0,\)"),
    "one prob": (lambda: dg.central_intervals(torch.zeros(3), 0.9), TypeError, "a sequence of numbers; got 0.9"),
    "text": (lambda: dg.central_intervals(torch.zeros(3), "0.9"), TypeError, "a sequence of numbers; got '0.9'"),
    "prob of a fan": (lambda: dg.plot_fan(torch.zeros(3, 2), probs=[1.5]), ValueError, r"in \(0, 1\]; got \[1.5\]"),
    "no probs": (lambda: dg.central_intervals(torch.zeros(3), ()), ValueError, "one or more numbers"),
    "vector": (lambda: dg.plot_fan(torch.zeros(3)), ValueError, r"draws of shape \(S, T\); got \(3,\)"),
    "x": (lambda: dg.plot_fan(torch.zeros(3, 2), [1, 2, 3]), ValueError, r"x of shape \(2,\).*got \(3,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_fan_has_its_median_levels_and_labels():
    draws, x = torch.randn(101, 4), [3, 1, 2, 0]
    ax = dg.plot_fan(draws, x, probs=(0.9, 0.25), label="a")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "a, median",
        "a, central 25%",
        "a, central 90%",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "value")
    line = ax.lines[0]
    assert line.get_xdata().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(line.get_ydata(), draws.median(0).values[[3, 1, 2, 0]], rtol=1e-6)
    low, high = dg.central_intervals(draws, (0.9,))[0]
    corners = ax.collections[1].get_paths()[0].get_extents()
    assert (corners.y0, corners.y1) == (pytest.approx(low.min().item()), pytest.approx(high.max().item()))
    ax.set_ylabel("price")
    assert dg.plot_fan(draws, probs=(0.5,), ax=ax, color="C1") is ax
    assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)) == ("x", "price", 2)
    plt.close("all")


def test_fan_of_inference_data_takes_its_names():
    data = dg.inference_data(model, guide_of(), DATA, num_samples=30, coords={"row": list("abcde")})
    ax = dg.plot_fan(data["posterior_predictive"]["y"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("row", "y")
    assert [text.get_text() for text in ax.get_xticklabels()] == list("abcde")
    with pytest.raises(ValueError, match=r"dims chain, draw and one more; got \('chain', 'draw'\)"):
        dg.plot_fan(data["posterior"]["mu"])
    plt.close("all")
