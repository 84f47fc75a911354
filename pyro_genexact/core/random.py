"""Random numbers from a seed, without lasting changes to torch's random state."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .functional import assert_later, at_hand


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators of the CPU and a device, and restores their states on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would also reseed the other GPUs, whose states are not restored
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """Returns the states of torch's generators of the CPU and, if it is a GPU, of the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restores states that :func:`random_state` returned."""
    cpu, *cuda = states
    torch.set_rng_state(cpu.clone())  # a view with an offset crashes torch 2.13
    for state in cuda:
        torch.cuda.set_rng_state(state.clone(), device)


def uniforms(shape: Any, device: torch.device) -> Tensor:
    """Draws numbers u with 0 < u < 1 and 0 < 1 - u < 1, in float64 (in float32 on MPS devices)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    eps = torch.finfo(dtype).eps
    return torch.rand(shape, dtype=dtype, device=device).mul_(1 - eps).add_(eps / 2)  # in place, for large arrays


def chosen(weights: Tensor) -> Tensor:
    """Draws an index (*batch, 1) in proportion to weights (*batch, V), with the numbers of ``torch.multinomial``.

    On a device it does not wait for the check of the weights.
    """
    if at_hand(weights):
        return weights.reshape(-1, weights.shape[-1]).multinomial(1).reshape(*weights.shape[:-1], 1)
    total = weights.sum(-1)
    assert_later((total > 0) & (total < torch.inf), "Expected finite weights that are not all zero.")
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)


def generator(seed: int, *keys: int) -> torch.Generator:
    """Returns a CPU generator whose numbers depend on the seed and the keys only."""
    mixed = seed
    for key in keys:  # the mixing steps of splitmix64, so that neighbouring seeds and keys give different streams
        mixed = (mixed + 0x9E3779B97F4A7C15 * (key + 1)) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return torch.Generator(device="cpu").manual_seed(mixed % 2**63)


def checked_seed(seed: Any) -> int:
    """Returns the seed as an int.

    Raises:
        ValueError: if it is not an integer from 0 to 2**63 - 1.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if isinstance(seed, bool) or not 0 <= value < 2**63:
        raise ValueError(f"Expected seed to be an integer from 0 to 2**63 - 1; got {seed!r}.")
    return value
