"""``gx.fit`` in two CPU processes: what ``support/two_processes.py`` saw in one launch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

import pyro_genexact as gx
from support.regressions import Linear, regression_rows

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "support/two_processes.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("processes")
    script = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(script, timeout=120, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "name",
    [
        "uneven",
        "accumulate",
        "row_weights",
        "validation",
        "ema",
        "schedule",
        "penalty",
        "lbfgs",
        "one_row",
        "fewer_rows",
    ],
)
def test_weights_and_nats_are_those_of_one_process_with_the_joint_batch(name, seen):
    for one in seen:
        assert one[name]["moved"] > 0.1 and one[name]["steps"][0] == one[name]["steps"][1]
        assert one[name]["weights"] < 1e-12 and one[name]["nats"] < 1e-12


@pytest.mark.parametrize("name", ["equal_batch_norm", "equal_averages", "equal_dropout", "equal_loaders"])
def test_both_processes_end_with_the_same_weights_buffers_and_history(name, seen):
    assert seen[0][name] == seen[1][name]


def test_dropout_differs_between_processes(seen):
    assert seen[0]["draws"] != seen[1]["draws"]


def test_no_forward_sends_buffers(seen):
    assert seen[0]["buffers"] == seen[1]["buffers"] == 0


def test_no_process_group_outlives_its_fit(seen):
    """The workers of later data loaders are forks without its threads; a collection in them would wait for these."""
    assert seen[0]["groups"] == seen[1]["groups"] == [2, 0]


def test_the_first_process_alone_prints(seen):
    assert seen[0]["silent"].count("epochs: train") == 2 and seen[1]["silent"] == ""


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("nan", ["FloatingPointError: Expected a finite loss; got nan at epoch 1, batch 1, first in rows [1]."] * 2),
        (
            "raises",
            ["RuntimeError: Process 1 of this fit raised RuntimeError: out of luck", "RuntimeError: out of luck"],
        ),
        ("dataset", ["RuntimeError: Process 1 of this fit raised OSError: unreadable", "OSError: unreadable"]),
        (
            "dataset_nan",
            ["raised ValueError: Expected data to be finite; got NaN", "ValueError: Expected data to be finite"],
        ),
        (
            "worker",
            ["Process 1 of this fit raised OSError: Caught OSError in DataLoader worker", "OSError: unreadable"],
        ),
        (
            "killed_worker",
            ["RuntimeError: Process 1 of this fit raised RuntimeError: DataLoader worker", "DataLoader worker"],
        ),
        (
            "full_disk",
            ["OSError: [Errno 28] No space left", "Process 0 of this fit raised OSError: [Errno 28] No space left"],
        ),
        (
            "unused",
            [
                "ValueError: Expected the loss to depend on each parameter if there are several processes; it does not depend on ['unused']"
            ]
            * 2,
        ),
        (
            "uneven_loaders",
            ["ValueError: Expected data with the same number of batches in each process; got [2, 4]."] * 2,
        ),
    ],
)
def test_a_fault_of_one_process_is_named_in_both_and_leaves_the_weights(name, texts, seen):
    for one, text in zip(seen, texts, strict=True):
        assert text in one[name]["error"] and one[name]["moved"] == 0
    assert seen[0][name]["steps"] == seen[1][name]["steps"]
    assert seen[0]["full_disk"]["files"] == []


@pytest.mark.parametrize("name", ["interrupted_forward", "interrupted_step", "interrupted_save"])
def test_an_interrupt_of_one_process_stops_both_after_the_same_step(name, seen):
    assert seen[0][name] == seen[1][name]
    assert seen[0][name]["stopped"] == "interrupted" and 0 < seen[0][name]["steps"] < 15


@pytest.mark.parametrize("name", ["resumed", "resumed_loaders"])
def test_a_fit_that_was_killed_at_each_checkpoint_ends_bit_for_bit(name, seen):
    for one in seen:
        assert one[name]["same"] and one[name]["kills"] >= 6, one[name]


def test_guides_are_fitted_by_one_process(seen):
    assert seen[0]["guide"].startswith("Expected fabric with one device")


def parallel(name):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._strategy = type(name, (), {})()
    return fabric


@pytest.mark.parametrize(
    ("fabric", "text"),
    [
        (
            lambda: Fabric(accelerator="cpu", devices=2, strategy="ddp"),
            "Expected a fabric with several devices to be launched",
        ),
        (
            lambda: Fabric(accelerator="cpu", devices=1, precision="bf16-true"),
            "Expected fabric with precision '32-true'",
        ),
        (lambda: parallel("FSDPStrategy"), "Expected fabric with one device or strategy 'ddp' .*; got FSDPStrategy"),
    ],
    ids=["unlaunched", "precision", "sharded"],
)
def test_fabrics_that_do_not_fit(fabric, text):
    module = Linear()
    with pytest.raises(ValueError, match=text):
        gx.fit(module, *regression_rows(), fabric=fabric(), progress=False)
    assert torch.equal(module.weight, torch.zeros(2))


@pytest.mark.parametrize("name", ["MADE", "Transformer", "Source"])
def test_layers_sharded_over_processes_give_the_same_values_and_gradients(name, seen):
    for one in seen:
        nats, grads, share = one["sharded"][name]
        assert nats < 1e-12 and grads < 1e-12
        assert share == pytest.approx(0.5, abs=0.1)
