"""Internal parts of modules. Saved files contain these names, so they must not be renamed or removed."""

from .base import Slot
from .conditioners.attention import Layer
from .conditioners.convolution import GatedConv
from .conditioners.encoding import Dense, SiteEncoder
from .conditioners.guided import GuidedConditioner
from .conditioners.pixel_layer import PixelLayer
from .conditioners.state_space import DiagonalLayer, SelectiveLayer
from .conditioners.sweeps import Sweeps
from .core.buffers import Packed
from .core.faces import publish
from .core.independent import All, Independent
from .encoders.base import Readout
from .encoders.sets import Attend
from .families.repaired import REPAIRED
from .families.supports import AllPositive, Between, Counts, Sphere
from .flows.coupling_recipes import Diagonal
from .flows.zuko import ZukoBase, ZukoTransform
from .heads.composite import Grouping
from .heads.parameters import Cholesky, Link, Part
from .inference.gaussian import CholeskyAffine, Gaussian, SinhArcsinh, Tails
from .inference.typicality import Typicality
from .transforms.base import Adapted, Inverted
from .transforms.block_network import BlockLinear
from .transforms.coupling import FirstSite
from .transforms.prefixes import Elementwise
from .transforms.support import Interior

__all__ = [
    "Adapted",
    "All",
    "AllPositive",
    "Attend",
    "Between",
    "BlockLinear",
    "Cholesky",
    "CholeskyAffine",
    "Counts",
    "Dense",
    "Diagonal",
    "DiagonalLayer",
    "Elementwise",
    "FirstSite",
    "GatedConv",
    "Gaussian",
    "Grouping",
    "GuidedConditioner",
    "Independent",
    "Interior",
    "Inverted",
    "Layer",
    "Link",
    "Packed",
    "Part",
    "PixelLayer",
    "Readout",
    "SelectiveLayer",
    "SinhArcsinh",
    "SiteEncoder",
    "Slot",
    "Sphere",
    "Sweeps",
    "Tails",
    "Typicality",
    "ZukoBase",
    "ZukoTransform",
]

_families = {family.__name__: family for family in REPAIRED.values()}  # depends on the versions of torch and Pyro
globals().update(_families)
publish({**globals(), "__all__": [*__all__, *_families]})
