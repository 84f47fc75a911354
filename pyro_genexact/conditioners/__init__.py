"""Conditioners: networks that map the context and the earlier sites to the parameters of each site."""

from ..core.faces import publish
from .angles import Angles
from .attention import Transformer, TransformerState
from .convolution import CausalConv
from .independent import Independent, IndependentState
from .made import MADE
from .markov import Markov, MarkovState
from .masked import MaskedLinear
from .nade import NADE, NADEState
from .pixelcnn import PixelCNN, PixelCNNState
from .pretrained import Pretrained, PretrainedState
from .recurrent import Recurrent
from .state_space import StateSpace
from .steps import StepState
from .sweeps import MADEState

__all__ = [
    "MADE",
    "NADE",
    "Angles",
    "CausalConv",
    "Independent",
    "IndependentState",
    "MADEState",
    "Markov",
    "MarkovState",
    "MaskedLinear",
    "NADEState",
    "PixelCNN",
    "PixelCNNState",
    "Pretrained",
    "PretrainedState",
    "Recurrent",
    "StateSpace",
    "StepState",
    "Transformer",
    "TransformerState",
]

publish(globals())
