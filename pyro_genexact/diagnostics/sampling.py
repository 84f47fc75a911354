"""``sample_posterior``, which turns a fitted guide into draws of the exact posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ..core.checks import check_sizes
from ..core.devices import device_of
from ..core.random import checked_seed, seeded, uniforms
from ..inference.elbo import needs_log_prob
from ..inference.fitting import Progress
from ..inference.mapped import CHUNK
from .data import container, groups_of
from .guide_draws import GuideDraws, ModelAndPosterior, combined, draw
from .importance import Importance, systematic
from .nuts import transported

METHODS = ("metropolis", "importance", "nuts")
STARTS = 100  # proposals per chain, from which its first state is resampled
UNRELIABLE = (
    "k-hat is {:.2f}, above {:.2f}: the guide is so far from the posterior that draws by method={!r} are not reliable. "
    "Fit the guide longer, use a larger flow, or use method='nuts'."
)
DIVERGED = (
    "{} of {} transitions of NUTS diverged, so the draws may miss parts of the posterior. Fit the guide longer, or use a "
    "larger flow or another parametrisation."
)


def sample_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    draws: int = 1000,
    chains: int = 4,
    method: str = "metropolis",
    proposals: int = 5,
    warmup: int = 200,
    predictions: bool = True,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    r"""Draws from the exact posterior of a model with a fitted guide, in ArviZ's format.

    Let q be the density of the guide, p the joint density of latents and data, and r = p / q.

    - "metropolis" runs independence Metropolis chains. Each step proposes an independent draw z' of the guide, and accepts
      it with probability min(1, r(z') / r(z)); otherwise the state z stays. Each chain starts at one of 100 draws of the
      guide, chosen in proportion to r. Every ``proposals``-th state is kept. The chains converge to the posterior wherever
      the guide has mass.
    - "importance" resamples ``proposals`` times as many draws of the guide with Pareto-smoothed weights
      (:func:`~pyro_genexact.diagnostics.psis`). The sampling is systematic: a draw comes at most once unless its weight
      exceeds 1 / (chains * draws). Copies stay next to each other, so that ArviZ's effective sample size accounts for them.
    - "nuts" runs NUTS on the noise of the guide (NeuTra). It needs a guide that is one transform of noise: an
      ``AutoContinuous`` of Pyro with a ``get_transform``, such as :class:`~pyro_genexact.guides.AutoFlow` without ``mixture``.
      NUTS can reach latents that the guide rarely draws, and costs the most per draw.

    With the first two methods, all proposals are drawn and evaluated in passes of up to 1000. A model that does not run in
    an outer plate is mapped by ``torch.vmap`` over the draws, or else run once per draw. Discrete latents that only the
    model has, and that it marks with ``infer={"enumerate": "parallel"}``, are summed out.

    The result has the groups of :func:`~pyro_genexact.diagnostics.inference_data`, with ``chains`` chains: posterior,
    log_likelihood, posterior_predictive and observed_data. If latents are summed out, it has neither log_likelihood,
    posterior_predictive nor ``pyro.deterministic`` sites, which depend on them. The group sample_stats has ``lp`` (log p in
    nats) and, by method, ``acceptance_rate`` (the mean acceptance probability of the steps to each draw) or ``diverging``.
    ``posterior.attrs`` has ``method`` and, for the first two methods, ``khat`` and ``importance_ess``, the k-hat and
    effective sample size of all proposals. ``az.summary`` computes the effective sample size and R-hat of each latent. No
    method reliably finds a separate mode in which the guide never draws.

    Args:
        model: a Pyro model with observed data.
        guide: a fitted guide of all latents that are not summed out.
        args: arguments of model and guide.
        draws: the number of draws per chain.
        chains: the number of chains.
        method: "metropolis", "importance" or "nuts".
        proposals: the number of draws of the guide per draw of the result; not used by "nuts".
        warmup: the number of steps of each chain that adapt NUTS; not used by the other methods.
        predictions: whether the result has log_likelihood and posterior_predictive, which need memory for chains * draws
            numbers per observed value.
        seed: the seed. Torch's random state does not change.
        progress: whether to report progress on stderr.
        kwargs: keyword arguments of model and guide.

    Returns:
        An ``InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: if ``draws``, ``chains``, ``proposals`` or ``warmup`` is not a positive integer, if ``method`` is unknown,
            if no proposal of a chain has a posterior density, if ``method`` is "nuts" and the guide is a mixture of flows, and as
            :func:`~pyro_genexact.diagnostics.psis`.
        TypeError: if ``method`` is "nuts" and the guide is no ``AutoContinuous``.
        NotImplementedError: as :func:`~pyro_genexact.diagnostics.psis`.

    Warns:
        UserWarning: if k-hat is above its threshold (see :class:`~pyro_genexact.diagnostics.Importance`), or if transitions of
            NUTS diverged.

    Cost: chains * (100 + draws * proposals) evaluations of guide and model without gradients; for "nuts",
    chains * (warmup + draws) trajectories of up to 1023 gradients, one after another. Then one evaluation of the model per
    draw. The first two methods store all proposals.

    References: Gabrié, Rotskoff, Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows", PNAS 2022;
    Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024; Hoffman et al., "NeuTra-lizing Bad Geometry in
    Hamiltonian Monte Carlo Using Neural Transport", 2019.

    Example:
        >>> import torch
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):  # the exact posterior is Normal(0.5, 0.5**0.5)
        ...     pyro.sample("mu", dist.Normal(0.3, 1.0))
        >>> data = sample_posterior(model, guide, torch.tensor(1.0), progress=False)
        >>> dict(data.posterior["mu"].sizes)
        {'chain': 4, 'draw': 1000}
        >>> round(float(data.posterior["mu"].mean()), 1), round(float(data.posterior["mu"].std()), 1)
        (0.5, 0.7)
    """
    check_sizes(1, draws=draws, chains=chains, proposals=proposals, warmup=warmup)
    seed = checked_seed(seed)
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    modules = nn.ModuleList(part for part in (model, guide) if isinstance(part, nn.Module))
    device = device_of([*modules.parameters(), *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))])
    alone = [partial(program, *args, **kwargs) for program in (model, guide)]
    with seeded(seed, device), poutine.block(), needs_log_prob(*alone), torch.no_grad():
        programs = ModelAndPosterior(model, guide, args, kwargs, predict=False)
        if not programs.latents:
            raise ValueError("Expected a model with latents; got only observed sites.")
        if method == "nuts":
            latents, stats, attrs = _nuts(programs, draws, chains, warmup, progress)
        else:
            latents, stats, attrs = _reweighted(programs, draws, chains, method, proposals, progress)
        found = _evaluated(programs, latents, predictions and not programs.enumerated)
    groups = groups_of(found, chains)
    stats["lp"] = found.log_p.reshape(chains, draws)
    groups["sample_stats"] = {name: value.cpu().numpy() for name, value in stats.items()}
    data = container(groups, found.dims, None, None)
    data["posterior"].attrs.update(method=method, **attrs)
    return data


def _nuts(
    programs: ModelAndPosterior, draws: int, chains: int, warmup: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    total = chains * (warmup + draws)
    with Progress(total, "step", progress) as bar:
        latents, diverging = transported(
            programs, draws, chains, warmup, lambda done: bar.report(done, lambda: "NUTS", last=done == total)
        )
    if diverging.any():
        warnings.warn(DIVERGED.format(int(diverging.sum()), diverging.numel()), stacklevel=3)
    return latents, {"diverging": diverging}, {}


def _reweighted(
    programs: ModelAndPosterior, draws: int, chains: int, method: str, proposals: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Returns latents (chains * draws, ...) by name, the group sample_stats, and attributes."""
    weighted = _proposals(programs, chains * (STARTS + draws * proposals), progress)
    if weighted.khat > weighted.threshold:
        warnings.warn(UNRELIABLE.format(weighted.khat, weighted.threshold, method), stacklevel=3)
    stats = {}
    if method == "importance":
        index = systematic(weighted.log_weights, chains * draws)
    else:
        states, stats["acceptance_rate"] = metropolis(weighted.log_ratios.reshape(chains, -1), proposals)
        index = states.flatten().to(weighted.log_ratios.device)
    if (dead := weighted.log_ratios[index].isneginf()).any():
        raise ValueError(
            f"Expected proposals of positive density under the model; {int(dead.sum())} draws have none. Fit the guide longer."
        )
    attrs = {"khat": weighted.khat, "importance_ess": weighted.ess}
    return {name: value[index] for name, value in weighted.draws.items()}, stats, attrs


def _proposals(programs: ModelAndPosterior, total: int, progress: bool) -> Importance:
    """Returns draws of the guide with their weights, from passes that bound the memory of the model."""
    runs, ratios, done = [], [], 0
    with Progress(total, "proposal", progress) as bar:
        for part in _passes(total):
            found = programs.run(len(part))
            runs.append(found.draws)
            ratios.append(found.log_ratios)
            done += len(part)
            bar.report(done, lambda: "draws of the guide", last=done == total)
    return Importance(torch.cat(ratios), {name: torch.cat([run[name] for run in runs]) for name in programs.latents})


def _evaluated(programs: ModelAndPosterior, latents: dict[str, Tensor], predictions: bool) -> GuideDraws:
    """Runs the model on draws (S, ...) of its latents."""
    runs: list[GuideDraws] = []
    for part in _passes(len(latents[programs.latents[0]])):
        given = {name: value[part.to(value.device)] for name, value in latents.items()}
        found = draw(programs.model, given, programs.args, programs.kwargs, len(part), predict=predictions)
        runs.append(found if predictions else replace(found, log_likelihood={}))
    return replace(combined(torch.cat, runs), observed=runs[0].observed, dims=runs[0].dims)


def _passes(total: int) -> tuple[Tensor, ...]:
    """Returns the indices of the draws of each pass; the passes have about equal sizes."""
    return torch.arange(total, device="cpu").tensor_split(-(-total // CHUNK))


def metropolis(log_ratios: Tensor, proposals: int) -> tuple[Tensor, Tensor]:
    """Runs independence Metropolis chains through log ratios, on the CPU.

    Args:
        log_ratios: log p - log q of each chain's proposals, (chains, STARTS + draws * proposals).
        proposals: the number of steps per draw.

    Returns:
        The places of the kept states among the flattened ratios, (chains, draws), and the mean acceptance probability of the
        steps to each of them, (chains, draws).
    """
    ratios = log_ratios.detach().double().cpu().T  # (proposals, chains)
    thresholds = uniforms(ratios.shape, ratios.device).log()
    # the maximum of log weights plus Gumbel noise is at a place drawn in proportion to the weights
    state = (ratios[:STARTS] - (-thresholds[:STARTS]).log()).argmax(0)
    current = ratios[:STARTS].gather(0, state[None])[0]
    states, steps = [], []
    for t in range(STARTS, len(ratios)):
        steps.append(ratios[t] - current)
        accepted = thresholds[t] < steps[-1]
        state, current = state.where(~accepted, t), current.where(~accepted, ratios[t])
        states.append(state)
    rates = torch.stack(steps).exp().clamp(max=1).nan_to_num().unflatten(0, (-1, proposals)).mean(1)
    offsets = len(ratios) * torch.arange(ratios.shape[1], device="cpu").unsqueeze(-1)
    return torch.stack(states[proposals - 1 :: proposals], 1) + offsets, rates.T
