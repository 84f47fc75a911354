"""The fourteen posteriors: model, data, and latents as coordinates in the order of the reference draws."""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import models
import numpy as np
import torch


def tensor(values):
    return torch.tensor(np.asarray(values, float), dtype=torch.get_default_dtype())


def tensors(d, *names):
    return tuple(tensor(d[name]) for name in names)


def design(*columns):
    """A matrix of a column of ones and the given columns."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def ark(d):
    y, k = tensor(d["y"]), d["K"]
    return torch.stack([y[k - i : len(y) - i] for i in range(1, k + 1)], -1), y[k:]


def kidscore(d):
    hs, iq, score = tensors(d, "mom_hs", "mom_iq", "kid_score")
    return design(hs, iq, hs * iq), score


def diamonds(d):
    x, y = tensors(d, "X", "Y")
    return x[:, 1:] - x[:, 1:].mean(0), y


def nes(d):
    age, y = tensors(d, "age_discrete", "partyid7")
    ideology, race, *others = tensors(d, "real_ideo", "race_adj", "educ1", "gender", "income")
    return design(ideology, race, *((age == group).to(y) for group in (2, 3, 4)), *others), y


def kilpisjarvi(d):
    loc, scale = (tensor([d[f"p{kind}{name}"] for name in ("alpha", "beta")]) for kind in ("mu", "s"))
    return *tensors(d, "x", "y"), loc, scale


def earnings(d):
    earn, height, male = tensors(d, "earn", "height", "male")
    return design(height, male, height * male), earn.log()


def mesquite(d):
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    return design(*tensors(d, *names)), tensor(d["weight"])


def drive(d):
    u, v, alpha = tensors(d, "u", "v", "alpha")
    return torch.stack([u, v], -1), alpha


class Layout:
    """Latents as coordinates, site after site.

    Args:
        shapes: the shape of each latent by name.
    """

    def __init__(self, **shapes):
        self.shapes = shapes

    def coordinates(self, draws):
        """Draws of latents (S, ...) as a matrix (S, D)."""
        return torch.cat([draws[name].reshape(-1, math.prod(shape)) for name, shape in self.shapes.items()], -1)

    def latents(self, x):
        """Latents of one vector (D,) of coordinates."""
        parts = x.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Schools(Layout):
    """Effects theta = mu + tau t in place of t."""

    def coordinates(self, draws):
        mu, tau = draws["mu"].view(-1, 1), draws["tau"].view(-1, 1)
        return super().coordinates({**draws, "t": mu + tau * draws["t"]})

    def latents(self, x):
        found = super().latents(x)
        return {**found, "t": (found["t"] - found["mu"]) / found["tau"]}


class Shares(Layout):
    """Without the last share, which is what remains of 1."""

    def coordinates(self, draws):
        return super().coordinates({**draws, "shares": draws["shares"][..., :-1]})

    def latents(self, x):
        found = super().latents(x)
        rest = 1 - found["shares"].sum(-1, keepdim=True)
        return {**found, "shares": torch.cat([found["shares"], rest], -1)}


class Posterior(NamedTuple):
    model: Callable[..., Any]
    data: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]  # the model's arguments from the data of posteriordb
    layout: Layout

    def read(self, folder, name):
        """The model's arguments, and the reference (``draws``, ``mean``, ``sd``)."""
        return self.data(json.loads((folder / f"{name}.data.json").read_text())), np.load(folder / f"{name}.npz")


def linear(columns):
    return Layout(beta=(columns,), sigma=())


def xy(d):
    return tensors(d, "x", "y")


def blr(d):
    return tensors(d, "X", "y")


POSTERIORS = {
    "eight_schools-eight_schools_noncentered": Posterior(
        models.eight_schools, lambda d: tensors(d, "y", "sigma"), Schools(t=(8,), mu=(), tau=())
    ),
    "arK-arK": Posterior(models.ark, ark, Layout(alpha=(), beta=(5,), sigma=())),
    "kidiq-kidscore_interaction": Posterior(models.kidscore, kidscore, linear(4)),
    "garch-garch11": Posterior(
        models.garch, lambda d: tensors(d, "y", "sigma1"), Shares(mu=(), alpha0=(), shares=(2,))
    ),
    "gp_pois_regr-gp_regr": Posterior(models.gaussian_process, xy, Layout(rho=(), alpha=(), sigma=())),
    "hmm_example-hmm_example": Posterior(models.hmm, lambda d: tensors(d, "y"), Layout(theta=(2, 2), mu=(2,))),
    "bball_drive_event_0-hmm_drive_0": Posterior(
        models.hmm_drive, drive, Layout(theta=(2, 2), phi=(2,), **{"lambda": (2,)})
    ),
    "diamonds-diamonds": Posterior(models.diamonds, diamonds, Layout(b=(24,), intercept=(), sigma=())),
    "nes1972-nes": Posterior(models.regression, nes, linear(9)),
    "kilpisjarvi_mod-kilpisjarvi": Posterior(models.kilpisjarvi, kilpisjarvi, Layout(alpha=(), beta=(), sigma=())),
    "earnings-logearn_interaction": Posterior(models.regression, earnings, linear(4)),
    "sblrc-blr": Posterior(models.blr, blr, linear(5)),
    "sblri-blr": Posterior(models.blr, blr, linear(5)),
    "mesquite-mesquite": Posterior(models.regression, mesquite, linear(7)),
}
