"""Conditioners: networks that map the context and the earlier sites to the parameters of each site."""

from ..core.faces import publish
from .angles import Angles
from .attention import Transformer, TransformerState
from .independent import Independent, IndependentState
from .made import MADE
from .markov import Markov, MarkovState
from .masked import MaskedLinear
from .nade import NADE, NADEState
from .pretrained import Pretrained, PretrainedState
from .recurrent import Recurrent, RecurrentState
from .sweeps import MADEState

__all__ = [
    "MADE",
    "NADE",
    "Angles",
    "Independent",
    "IndependentState",
    "MADEState",
    "Markov",
    "MarkovState",
    "MaskedLinear",
    "NADEState",
    "Pretrained",
    "PretrainedState",
    "Recurrent",
    "RecurrentState",
    "Transformer",
    "TransformerState",
]

publish(globals())
