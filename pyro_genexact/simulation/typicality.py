"""Tail probabilities of observations under a flow of their features, which is fitted to simulations."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..core.random import seeded
from ..flows.recipes import nsf
from ..inference.fit import fit

DIRECTIONS = 16  # principal components of the features, which the flow models
FITTED, KEPT = 2048, 4096  # simulations to which the flow is fitted, and others whose log densities are kept
EPOCHS, BATCH, RATE = 12, 256, 1e-2
NOISE = (
    0.05  # sd of noise on the standardised components in the fit, since the density of discrete features is infinite
)
SMALL = 1e-3  # sd of a component, relative to the largest, below which it counts as constant
TIE = 1e-3  # difference of two log densities, relative to 1 + |value|, that may come from rounding
LEVEL = 0.01  # share of batches of observations of the model with a warning, at most


class Typicality(nn.Module):
    """Measures how typical observations are of simulations, from their features.

    The log density of an observation is that of a spline flow over its leading principal components, plus that of a normal
    distribution of the log of its distance from their span. The flow is fitted to some simulations. The tail probability
    is the rank of the log density among those of n other simulations, (1 + number of these that are not larger) / (1 + n).
    It is at most p with a probability of at most p if the observation comes from the model, no matter how well the flow
    fits.

    With rows of a plate, the log density is the smallest of the rows. Tail probabilities therefore need as many rows as
    the simulations have: they are too small with more rows, and too large with fewer.

    Args:
        features: F, the number of features.

    Reference: Schmitt, Bürkner, Köthe, Radev, "Detecting model misspecification in amortized Bayesian inference with neural
    networks", GCPR 2023; Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005 (the rank).
    """

    mean: Tensor
    directions: Tensor
    inverse_scale: Tensor
    rest: Tensor
    kept: Tensor
    rows: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        size = min(max(1, features), DIRECTIONS)
        self.flow = nsf(size, transforms=2, hidden=(32, 32))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("directions", torch.zeros(features, size))
        self.register_buffer("inverse_scale", torch.zeros(size))
        self.register_buffer(
            "rest", torch.tensor([1.0, 0.0, 1.0])
        )  # smallest distance, mean and sd of the log distance
        self.register_buffer("kept", torch.full((KEPT,), torch.inf))  # sorted; infinity after the last one
        self.register_buffer("rows", torch.ones(()))  # of a simulation

    def forward(self, features: Tensor) -> Tensor:
        """Returns log densities (...,) of features (..., F)."""
        components, distance = self._components(features)
        _, mean, sd = self.rest
        found: Tensor = self.flow().log_prob(components) - ((distance - mean) / sd).square() / 2
        return found.nan_to_num(nan=torch.finfo(found.dtype).min)

    def _components(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns standardised components (..., K), and the log of the squared distance from their span."""
        x = features - self.mean
        projected = x @ self.directions
        rest = (x - projected @ self.directions.T).square().sum(-1)
        return (projected * self.inverse_scale).asinh(), (rest + self.rest[0]).log()

    def score(self, features: Tensor, has_rows: bool) -> Tensor:
        """Returns the log densities (*batch,) of observations with features (*batch, [R,] F)."""
        each: Tensor = self(features)
        return each.amin(-1) if has_rows else each

    def below(self, score: Tensor) -> Tensor:
        """Returns the number of kept log densities that are not larger than the given ones, up to rounding.

        Equal observations have equal log densities up to rounding only, which depends on the size of the batch.
        """
        return torch.searchsorted(self.kept, score + TIE * (1 + score.abs()), right=True)

    @torch.no_grad()
    def fit(self, features: Tensor, has_rows: bool, seed: int) -> None:
        """Fits the flow to one half of the simulations (N, [R,] F), N >= 2, and keeps log densities of the other half."""
        with seeded(seed, features.device):
            order = torch.randperm(len(features), device=features.device)
            features = features[order]
            half = min(len(features) // 2, FITTED)
            x = features[:half].flatten(0, -2)
            x = x[torch.randperm(len(x), device=x.device)[:FITTED]]
            self._standardise(x)
            components, distance = self._components(x)
            self.rest[1:].copy_(torch.stack([distance.mean(), distance.std(correction=0).clamp_min(0.1)]))
            components = components + NOISE * torch.randn_like(components)
        for parameter in self.flow.parameters():
            parameter.requires_grad_(True)
        fit(self.flow, components, epochs=EPOCHS, batch_size=BATCH, lr=RATE, seed=seed, progress=False)
        for parameter in self.flow.parameters():  # the objective of a fit of the guide does not contain them
            parameter.requires_grad_(False)
        scores = self.score(features[half : half + KEPT], has_rows).sort().values
        self.kept.fill_(torch.inf)[: len(scores)].copy_(scores)
        self.rows.fill_(features.shape[1] if has_rows else 1)

    def _standardise(self, x: Tensor) -> None:
        self.mean.copy_(x.mean(0))
        x = (x - self.mean).double()
        size = min(self.directions.shape[1], *x.shape)
        _, found, directions = torch.svd_lowrank(x, size, niter=4)
        sd = found / len(x) ** 0.5
        used = sd > SMALL * sd.max()
        self.directions.zero_()[:, :size].copy_(directions * used)
        self.inverse_scale.zero_()[:size].copy_(torch.where(used, 1 / sd, 0.0))
        scale = sd.max() if (sd > 0).any() else torch.ones_like(sd.max())
        self.rest[0].copy_((SMALL * scale).square())

    def tail(self, score: Tensor) -> Tensor:
        """Returns the tail probabilities of log densities."""
        return (1 + self.below(score)) / (1 + self.count())

    def count(self) -> Tensor:
        """Returns n, the number of simulations whose log densities are kept; 0 before the fit."""
        return self.kept.isfinite().sum()

    @torch.no_grad()
    def warn(self, features: Tensor, has_rows: bool) -> None:
        """Warns the user of the caller if observations are unlike all n simulations.

        A batch of B observations of the model has k observations that are less typical than all simulations with a
        probability of at most (B / (B + n))^k.
        """
        score, rows = self.score(features, has_rows), features.shape[-2] if has_rows else 1
        if not score.numel():
            return
        below = (self.below(score) == 0).sum()
        found, size, trained = torch.stack([below.float(), self.count().float(), self.rows.float()]).tolist()
        batch = score.numel() * max(1.0, rows / trained)
        if not found or not size or (batch / (batch + size)) ** found > LEVEL:
            return
        which = "The observation is" if score.numel() == 1 else f"{found:.0f} of {score.numel()} observations are"
        warnings.warn(
            f"{which} less probable than all of {size:.0f} simulations, under a flow of the features. The posterior of such "
            "an observation is an extrapolation. Compare the observation with predictive_data, and revise the model.",
            stacklevel=4,  # this function has a wrapper, no_grad
        )
