"""Random numbers from a seed, with torch's random state restored afterwards."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws on a device and on the CPU start from the seed; torch's random state is restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would reseed all GPUs, which nothing restores
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """The states of torch's generators on the CPU and, if it is a GPU, on the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restores what :func:`random_state` returned."""
    cpu, *cuda = states
    torch.set_rng_state(cpu.clone())  # a view with an offset crashes torch 2.13
    for state in cuda:
        torch.cuda.set_rng_state(state.clone(), device)


def generator(seed: int, *keys: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the seed and the keys only."""
    mixed = seed
    for key in keys:  # the steps of splitmix64, so that neighbouring seeds and keys share no stream
        mixed = (mixed + 0x9E3779B97F4A7C15 * (key + 1)) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return torch.Generator(device="cpu").manual_seed(mixed % 2**63)


def checked_seed(seed: Any) -> int:
    """The seed as an int; ValueError unless it is an integer from 0 to 2**63 - 1."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value < 2**63:
        raise ValueError(f"Expected seed to be an integer from 0 to 2**63 - 1; got {seed!r}.")
    return value
