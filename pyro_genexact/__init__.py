"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import (
    conditioners,
    decoding,
    diagnostics,
    distributions,
    encoders,
    flows,
    guides,
    heads,
    native,
    numerics,
    semirings,
    transforms,
)
from . import parts as parts  # saved files contain these names
from .base import Conditioner, Constant, DistributionModule, Head
from .chains.crf import LinearChainCRF
from .chains.hidden_markov import HiddenMarkov
from .chains.module import CRF
from .contexts import Covariates, PaddedSequence, Source
from .core.faces import publish
from .diagnostics.sampling import sample_posterior
from .families.fenchel_young import fenchel_young_loss
from .flows.base import Flow
from .guidance import Guided
from .inference.fit import FitResult, fit
from .inference.fit_guide import GuideResult, fit_guide
from .inference.noise import Augmented, denoised
from .models import Autoregressive, Conditional, OrderEnsemble, Sequence
from .numerics.errors import ConvergenceError
from .saving.files import load, save
from .simulation.fit_amortized import fit_amortized
from .simulation.learned_likelihood import Likelihood, likelihood
from .version import __version__

__all__ = [
    "CRF",
    "Augmented",
    "Autoregressive",
    "Conditional",
    "Conditioner",
    "Constant",
    "ConvergenceError",
    "Covariates",
    "DistributionModule",
    "FitResult",
    "Flow",
    "GuideResult",
    "Guided",
    "Head",
    "HiddenMarkov",
    "Likelihood",
    "LinearChainCRF",
    "OrderEnsemble",
    "PaddedSequence",
    "Sequence",
    "Source",
    "__version__",
    "conditioners",
    "decoding",
    "denoised",
    "diagnostics",
    "distributions",
    "encoders",
    "fenchel_young_loss",
    "fit",
    "fit_amortized",
    "fit_guide",
    "flows",
    "guides",
    "heads",
    "likelihood",
    "load",
    "native",
    "numerics",
    "sample_posterior",
    "save",
    "semirings",
    "transforms",
]

publish(globals())
