"""Chains of NUTS in the space of the noise of a guide, where a good guide makes the posterior close to its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoContinuous, init_to_sample
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.integrator import potential_grad
from torch import Tensor, nn

from ..core.checks import check_kind
from ..inference.mapped import rows
from .guide_draws import CHECKED, ModelAndPosterior

POINTS = 10  # number of draws at which the compiled potential energy is compared


def transported(
    programs: ModelAndPosterior, draws: int, chains: int, warmup: int, report: Callable[[int], None]
) -> tuple[dict[str, Tensor], Tensor]:
    """Runs chains of NUTS one after another, each with its own warm-up, from draws of the guide's noise.

    The potential energy is compiled if the model runs on many draws in one pass, so that it does not branch on values, and
    if the compiled energy and its gradient agree with the others at draws of the noise.

    Args:
        programs: the model and its guide.
        draws: the number of draws per chain.
        chains: the number of chains.
        warmup: the number of steps per chain that adapt the step size and the masses.
        report: called after each step with the number of steps of all chains so far.

    Returns:
        The latents (chains * draws, ...) by name, and whether the transition to each draw diverged (chains, draws).

    Raises:
        TypeError: if the guide is no ``AutoContinuous``.
        ValueError: if the guide has no transform from noise to latents.
    """
    guide = programs.posterior
    check_kind("guide for method 'nuts'", guide, AutoContinuous)
    vectorised = programs.vectorised(2) is not None
    diverging, done, noise = torch.zeros(chains, draws, dtype=torch.bool, device="cpu"), 0, []

    def note(kernel: Any, state: Any, stage: str, i: int) -> None:
        nonlocal done
        if stage == "Sample":
            diverging[done // (warmup + draws), i] = i in kernel.diagnostics()["divergences"]
        done += 1
        report(done)

    with frozen(guide), torch.enable_grad():
        neutra = NeuTraReparam(guide)
        options: dict[str, Any] = {"init_strategy": init_to_sample, "num_chains": POINTS + chains}
        setup = partial(initialize_model, neutra.reparam(programs.model), programs.args, programs.kwargs, **options)
        starts, energy, transforms, _ = setup()
        (*points,) = ({name: x[i] for name, x in starts.items()} for i in range(POINTS + chains))
        if vectorised and (fast := compiled(setup, starts, energy, points[:POINTS])):
            energy = fast
        for start in points[POINTS:]:
            kernel, quiet = NUTS(potential_fn=energy), {"hook_fn": note, "disable_progbar": True}
            mcmc = MCMC(kernel, draws, warmup_steps=warmup, initial_params=start, **quiet)
            mcmc.run()
            noise += [transforms[name].inv(value) for name, value in mcmc.get_samples().items()]
    with torch.no_grad():
        latent = torch.cat(noise)
        found = neutra.transform_sample(latent.reshape(len(latent), *[1] * programs.depth, -1))
    return {name: rows(found[name], programs.shape(name), len(latent)) for name in programs.latents}, diverging


def compiled(setup: Callable[..., Any], starts: Any, energy: Any, points: list[dict[str, Tensor]]) -> Any:
    """Returns the compiled potential energy if it has the same values and gradients at these points, and otherwise None."""
    with suppress(Exception):  # what cannot be compiled can raise anything
        _, fast, _, _ = setup(jit_compile=True, skip_jit_warnings=True, initial_params=starts)
        for point in points:
            (slopes, value), (others, other) = (potential_grad(f, point) for f in (energy, fast))
            pairs = [(value, other), *((slopes[name], others[name]) for name in point)]
            if not all(torch.allclose(a, b, rtol=CHECKED, atol=CHECKED) for a, b in pairs):
                return None
        return fast
    return None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient in this context."""
    learned = [p for p in module.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
